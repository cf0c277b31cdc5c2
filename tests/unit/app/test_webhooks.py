"""What webhooks are sent, to whom, and to whom not: to a real receiver, from the real sender."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpcore
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import HttpUrl
from sqlalchemy import text

from app.webhooks.addresses import Addresses, GuardedBackend, is_public
from app.webhooks.sender import Sender
from app.webhooks.signing import signed_headers
from registry import deliveries, webhooks
from registry.database import Database
from registry.deliveries import Delivery
from registry.errors import UnprocessableRequest
from registry.settings import Settings
from registry.webhooks import Webhook
from tests.receiver import Receiver, receiving

TENANT = "default"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def allowing(**settings: Any) -> Settings:
    values = {"webhook_allow": "127.0.0.1", "webhook_http": True, "webhook_retry_seconds": 0.01}
    return Settings(**{**values, **settings})


def hook(database: Database, url: str) -> Webhook:
    with database.write() as connection:
        return webhooks.create_webhook(connection, TENANT, url, ["endpoint.moved"], actor="ada")


def announce(database: Database, times: int = 1) -> None:
    with database.write() as connection:
        for number in range(times):
            webhooks.announce(connection, TENANT, "endpoint.moved", {"number": number})


def told(database: Database, webhook: Webhook) -> list[Delivery]:
    with database.read() as connection:
        return list(deliveries.list_deliveries(connection, webhook.id, limit=100).items)


def send_until(
    database: Database, settings: Settings, condition: Callable[[], bool], senders: int = 1
) -> None:
    """Run senders until something holds."""

    async def run() -> None:
        tasks = [asyncio.create_task(Sender(database, settings).run()) for _ in range(senders)]
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, [t.exception() for t in tasks if t.done()]
            await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    asyncio.run(run())


def settled(delivery: Delivery) -> bool:
    """Whether a try has come to something."""
    return delivery.answered is not None or delivery.error is not None


def ended(database: Database, *hooks: Webhook) -> Callable[[], bool]:
    return lambda: all(d.status != "pending" for hook in hooks for d in told(database, hook))


def test_the_specifications_example_is_signed_as_it_says() -> None:
    headers = signed_headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_another_implementation_verifies_what_is_sent(
    database: Database, receiver: Receiver
) -> None:
    webhook = hook(database, f"{receiver.url}/ok?token=1")
    announce(database)
    send_until(database, allowing(), ended(database, webhook))
    (received,) = receiver.requests
    (delivery,) = told(database, webhook)
    assert (delivery.status, delivery.tries, delivery.answered) == ("delivered", 1, 200)
    assert received.path == "/ok?token=1"
    assert received.body == delivery.payload.encode()
    assert received.headers["webhook-id"] == delivery.id
    with openai.OpenAI(api_key="none", webhook_secret=webhook.secret) as client:
        client.webhooks.verify_signature(received.body, received.headers)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(received.body + b" ", received.headers)


def test_a_failed_delivery_is_tried_again_under_its_id(
    database: Database, receiver: Receiver
) -> None:
    webhook = hook(database, f"{receiver.url}/flaky")
    announce(database)
    send_until(database, allowing(), ended(database, webhook))
    (delivery,) = told(database, webhook)
    assert (delivery.status, delivery.tries) == ("delivered", 3)
    assert {received.headers["webhook-id"] for received in receiver.requests} == {delivery.id}
    assert len({received.body for received in receiver.requests}) == 1
    assert all("Cookie" not in received.headers for received in receiver.requests)


def test_what_nobody_takes_is_given_up_and_seen(
    database: Database, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    failing, gone = hook(database, f"{receiver.url}/500"), hook(database, f"{receiver.url}/gone")
    announce(database)
    (delivery,) = told(database, failing)
    send_until(database, allowing(webhook_retry_seconds=0.0001), lambda: delivery.id in caplog.text)
    (delivery,) = told(database, failing)
    assert (delivery.status, delivery.tries, delivery.answered) == ("given_up", 8, 500)
    assert len(receiver.of("/500")) == 8
    assert [d.tries for d in told(database, gone)] == [1]
    assert failing.secret not in caplog.text


def test_what_is_not_http_is_told_without_its_words(
    database: Database, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    webhook = hook(database, f"{receiver.url}/ssh")
    announce(database)
    (delivery,) = told(database, webhook)
    send_until(database, allowing(webhook_retry_seconds=0.0001), lambda: delivery.id in caplog.text)
    (delivery,) = told(database, webhook)
    assert (delivery.status, delivery.error) == ("given_up", "the answer is not HTTP")
    assert "after 8 tries (no answer)" in caplog.text
    assert "SSH" not in caplog.text


def test_a_host_that_is_not_found_is_told_as_one_that_is_not_public(database: Database) -> None:
    hooks = [hook(database, f"http://{host}:9/") for host in ("a" * 64 + ".example", "localhost")]
    announce(database)
    settings = allowing(webhook_allow="", webhook_retry_seconds=60)
    send_until(database, settings, lambda: all(settled(told(database, h)[0]) for h in hooks))
    first, second = (told(database, webhook)[0].error for webhook in hooks)
    assert first == second
    assert first is not None
    assert first.startswith("its host was not found, or has no public address")


def test_what_was_claimed_before_the_database_failed_is_sent(
    database: Database, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    webhook = hook(database, f"{receiver.url}/ok")
    announce(database, times=2)
    later, earlier = told(database, webhook)
    with database.write() as connection:
        connection.execute(
            text(
                "CREATE TRIGGER fails BEFORE UPDATE ON deliveries"
                f" WHEN NEW.seq = {later.seq} BEGIN SELECT RAISE(ABORT, 'secret'); END"
            )
        )
    send_until(database, allowing(), lambda: "does not answer" in caplog.text)
    delivered = {delivery.id: delivery for delivery in told(database, webhook)}
    assert (delivered[earlier.id].status, delivered[earlier.id].tries) == ("delivered", 1)
    assert delivered[later.id].tries == 0
    assert "secret" not in caplog.text
    assert "UPDATE" not in caplog.text


def test_a_redirect_is_not_followed(database: Database, receiver: Receiver) -> None:
    webhook = hook(database, f"{receiver.url}/redirect")
    announce(database)
    settings = allowing(webhook_retry_seconds=60)
    send_until(database, settings, lambda: told(database, webhook)[0].answered is not None)
    (delivery,) = told(database, webhook)
    assert (delivery.status, delivery.answered) == ("pending", 302)
    assert [received.path for received in receiver.requests] == ["/redirect"]


def test_a_receiver_that_does_not_answer_holds_up_nobody(
    database: Database, receiver: Receiver
) -> None:
    slow, quick = hook(database, f"{receiver.url}/slow"), hook(database, f"{receiver.url}/ok")
    announce(database, times=20)
    settings = allowing(webhook_seconds=30)
    have_ended = ended(database, quick)
    send_until(database, settings, lambda: have_ended() and len(receiver.of("/slow")) >= 4)
    assert {delivery.status for delivery in told(database, quick)} == {"delivered"}
    under_way = [delivery for delivery in told(database, slow) if delivery.tries]
    assert len(under_way) == len(receiver.of("/slow")) == 4
    assert {delivery.answered for delivery in under_way} == {None}


def test_an_answer_has_its_time_and_its_size(database: Database, receiver: Receiver) -> None:
    slow, endless = (
        hook(database, f"{receiver.url}/slow"),
        hook(database, f"{receiver.url}/endless"),
    )
    announce(database)
    settings = allowing(webhook_seconds=0.5, webhook_retry_seconds=60)
    send_until(database, settings, lambda: told(database, slow)[0].error is not None)
    assert told(database, slow)[0].error == "no answer within 0.5 s"
    assert told(database, endless)[0].status == "delivered"


def test_of_several_replicas_one_delivers(database: Database, receiver: Receiver) -> None:
    webhook = hook(database, f"{receiver.url}/ok")
    announce(database, times=60)
    send_until(database, allowing(), ended(database, webhook), senders=3)
    ids = [received.headers["webhook-id"] for received in receiver.requests]
    assert sorted(ids) == sorted(delivery.id for delivery in told(database, webhook))


def certificate(file: Path, name: str) -> Path:
    """A certificate for a name, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return file


@pytest.mark.parametrize(
    ("host", "is_trusted", "is_delivered"),
    [("localhost", True, True), ("localhost", False, False), ("127.0.0.1", True, False)],
)
def test_a_receiver_must_prove_that_it_has_the_urls_name(
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    is_trusted: bool,
    is_delivered: bool,
) -> None:
    file = certificate(tmp_path / "certificate.pem", "localhost")
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with receiving(file) as receiver:
        webhook = hook(database, receiver.url.replace("127.0.0.1", host) + "/ok")
        announce(database)
        settings = allowing(webhook_allow="127.0.0.1,::1", webhook_retry_seconds=60)
        send_until(database, settings, lambda: settled(told(database, webhook)[0]))
        (delivery,) = told(database, webhook)
        assert (delivery.status == "delivered") == is_delivered, delivery
        assert len(receiver.requests) == is_delivered
        assert is_delivered or "CERTIFICATE_VERIFY_FAILED" in (delivery.error or "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]"])
def test_an_address_that_is_not_public_is_never_connected_to(
    database: Database, receiver: Receiver, host: str
) -> None:
    webhook = hook(database, receiver.url.replace("127.0.0.1", host))
    announce(database)
    settings = allowing(webhook_allow="192.0.2.1, elsewhere", webhook_retry_seconds=60)
    send_until(database, settings, lambda: told(database, webhook)[0].error is not None)
    assert "has no public address; ERRATA_WEBHOOK_ALLOW" in (told(database, webhook)[0].error or "")
    assert receiver.connections == 0


@pytest.mark.parametrize("allowed", ["localhost", "127.0.0.0/8, ::1"])
def test_a_host_or_a_network_can_be_allowed(
    database: Database, receiver: Receiver, allowed: str
) -> None:
    webhook = hook(database, receiver.url.replace("127.0.0.1", "localhost") + "/ok")
    announce(database)
    send_until(database, allowing(webhook_allow=allowed), ended(database, webhook))
    assert told(database, webhook)[0].status == "delivered"


def test_what_was_looked_at_is_what_is_connected_to(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that points elsewhere at its second look-up."""
    port = int(receiver.url.rsplit(":", 1)[1])
    answers = iter(["127.0.0.1", "169.254.169.254"])

    def rebinding(*_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    backend = GuardedBackend(Addresses.of(allowing()))

    async def connect() -> Any:
        stream = await backend.connect_tcp("rebinding.example", port)
        peer = stream.get_extra_info("server_addr")
        await stream.aclose()
        return peer

    assert asyncio.run(connect()) == ("127.0.0.1", port)
    with pytest.raises(httpcore.ConnectError, match="no public address"):
        asyncio.run(connect())


def test_no_proxy_of_the_environment_is_asked(
    database: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        proxy = stack.enter_context(receiving())
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        webhook = hook(database, f"{receiver.url}/ok")
        announce(database)
        send_until(database, allowing(), ended(database, webhook))
        assert (len(receiver.requests), proxy.connections) == (1, 0)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.0.1",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.0.1",
        "192.0.0.20",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.0.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "::ffff:168.63.129.16",
        "64:ff9b::808:808",
        "64:ff9b::a83f:8110",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:a83f:8110::1",
        "fc00::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450::1"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("http://receiver.example/", "is not https"),
        ("https://ada:secret@receiver.example/", "a password"),
        ("https://receiver.example/#part", "fragment"),
        ("https://127.0.0.1/", "not public"),
        ("https://0x7f.1/", "not public"),
        ("https://[::ffff:7f00:1]/", "not public"),
        ("https://169.254.169.254/latest/meta-data", "not public"),
    ],
)
def test_a_url_that_cannot_be_right_is_refused_at_once(url: str, wrong: str) -> None:
    with pytest.raises(UnprocessableRequest, match=wrong) as refused:
        Addresses.of(Settings()).check_url(HttpUrl(url))
    assert refused.value.param == "url"
    assert "secret" not in refused.value.message


def test_a_url_that_may_be_right_is_taken() -> None:
    Addresses.of(Settings()).check_url(HttpUrl("https://receiver.example:8443/hook?a=b"))
    Addresses.of(allowing()).check_url(HttpUrl("http://127.0.0.1:9/"))
