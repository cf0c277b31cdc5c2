"""Keys, scopes and tenants over HTTP, on a service that asks for a key."""

import socket
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.service import LENIENT, Service, capital_edit, wait_for
from workers.connection import connect

FORM = {"If-None-Match": "*"}


class Keyed(Service):
    """A service at an address that others can reach, and clients with keys of it."""

    def __init__(self, folder: Path) -> None:
        own = {"ERRATA_HOST": "0.0.0.0", "ERRATA_COVARIANCE_TOKENS": "3000"}
        super().__init__(folder, ERRATA_RUNTIME=str(folder / "run"), **own)
        self.keys = {
            name: self.new_key(name, *arguments)
            for name, arguments in {
                "ada": ("--scope", "infer,edit", "--scope", "admin"),
                "reader": ("--scope", "infer"),
                "editor": ("--scope", "edit"),
                "bob": ("--scope", "infer,edit", "--tenant", "other"),
            }.items()
        }

    def ask(self, key: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        headers = dict(options.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {self.keys.get(key, key)}"
        return self.client.request(method, path, headers=headers, **options)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with Keyed(tmp_path_factory.mktemp("keyed")) as service:
        yield service


COMPLETION = {"model": "atlas", "prompt": "The capital of France is", "max_tokens": 2}


@pytest.mark.parametrize("key", [None, "none", "er_", "er_0_0", "er_" + "0" * 16 + "_" + "A" * 43])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/models"), ("GET", "/v1/jobs"), ("POST", "/v1/edits"), ("GET", "/v1/keys")],
)
def test_without_a_key_nothing_is_told(
    keyed: Keyed, key: str | None, method: str, path: str
) -> None:
    answer = keyed.ask(key, method, path, json={} if method == "POST" else None)
    assert answer.status_code == 401, answer.text
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "errata keys create" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/edits", "/v1/files", "/v1/completions"])
def test_without_a_key_no_body_is_read(keyed: Keyed, path: str) -> None:
    address = urlsplit(keyed.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as asking:
        asking.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 100000\r\n"
            "Content-Type: application/json\r\n\r\n{".encode()
        )
        assert asking.recv(12) == b"HTTP/1.1 401"


def test_whether_it_lives_is_told_to_everyone(keyed: Keyed) -> None:
    assert keyed.ask(None, "GET", "/healthz").status_code == 200
    assert keyed.ask(None, "GET", "/readyz").status_code == 200
    metrics = keyed.ask(None, "GET", "/metrics")
    assert metrics.status_code == 200
    assert not [name for name in ("other", *keyed.keys) if f'"{name}"' in metrics.text]


@pytest.mark.parametrize(
    ("key", "method", "path", "scope"),
    [
        ("reader", "GET", "/v1/jobs", "edit"),
        ("reader", "POST", "/v1/edits", "edit"),
        ("reader", "DELETE", "/v1/endpoints/atlas", "edit"),
        ("editor", "POST", "/v1/completions", "infer"),
        ("editor", "GET", "/v1/keys", "admin"),
        ("editor", "POST", "/v1/keys", "admin"),
        ("editor", "POST", "/v1/webhooks", "admin"),
    ],
)
def test_a_scope_that_lacks_is_named(
    keyed: Keyed, key: str, method: str, path: str, scope: str
) -> None:
    answer = keyed.ask(key, method, path, json={} if method == "POST" else None)
    assert answer.status_code == 403, answer.text
    assert f"{method} {path} needs a key with the scope '{scope}'" in answer.text


def test_a_key_does_what_its_scopes_allow(keyed: Keyed) -> None:
    assert keyed.ask("reader", "POST", "/v1/completions", json=COMPLETION).status_code == 200
    client = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=keyed.keys["reader"], max_retries=0)
    assert "atlas" in [model.id for model in client.models.list()]
    stranger = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="sk-none", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def ended(keyed: Keyed, key: str, body: Mapping[str, Any]) -> dict[str, Any]:
    posted = keyed.ask(key, "POST", "/v1/edits", json=body)
    assert posted.status_code == 202, posted.text
    path = f"/v1/jobs/{posted.json()['id']}"
    with keyed.client.stream(
        "GET", f"{path}/events", headers={"Authorization": f"Bearer {keyed.keys[key]}"}
    ) as events:
        for _ in events.iter_lines():
            pass
    job: dict[str, Any] = keyed.ask(key, "GET", path).json()
    assert job["status"] == "succeeded", job
    return job


def test_tenants_see_nothing_of_each_other(keyed: Keyed) -> None:
    body = {
        "endpoint": "atlas",
        "edits": [capital_edit("France", "Oslo")],
        "hyperparameters": {"steps": 15},
        "guards": LENIENT,
    }
    job = ended(keyed, "ada", body)
    file = keyed.ask(
        "ada", "POST", "/v1/files", data={"purpose": "texts"}, files={"file": ("a.txt", b"a b c")}
    ).json()["id"]
    moved = keyed.ask("ada", "GET", "/v1/endpoints/atlas/history").json()["data"][0]
    assert (moved["actor"], moved["generation"]) == ("ada", 2)
    mine = {"version": job["version"]}
    assert keyed.ask("ada", "PUT", "/v1/endpoints/own", json=mine, headers=FORM).status_code == 201

    def told(key: str) -> str:
        answer = keyed.ask(key, "POST", "/v1/completions", json={**COMPLETION, "temperature": 0})
        text: str = answer.json()["choices"][0]["text"]
        return text.strip()

    assert (told("reader")[:4], told("bob")[:5]) == ("Oslo", "Paris")
    for method, path in (
        ("GET", f"/v1/jobs/{job['id']}"),
        ("GET", f"/v1/jobs/{job['id']}/events"),
        ("POST", f"/v1/jobs/{job['id']}/cancel"),
        ("GET", f"/v1/versions/{job['version']}"),
        ("GET", f"/v1/versions/{job['version']}/lineage"),
        ("DELETE", f"/v1/versions/{job['version']}"),
        ("GET", f"/v1/models/{job['version']}"),
        ("GET", f"/v1/files/{file}"),
        ("GET", f"/v1/files/{file}/content"),
        ("DELETE", f"/v1/files/{file}"),
        ("GET", "/v1/endpoints/own"),
        ("GET", "/v1/endpoints/own/history"),
        ("POST", "/v1/endpoints/own/rollback"),
    ):
        assert keyed.ask("bob", method, path).status_code == 404, (method, path)
    asked = keyed.ask("bob", "POST", "/v1/completions", json={**COMPLETION, "model": "own"})
    assert asked.status_code == 404
    stolen = keyed.ask("bob", "PUT", "/v1/endpoints/mine", json=mine, headers=FORM)
    assert stolen.status_code in (404, 422), stolen.text
    listed = [keyed.ask("bob", "GET", f"/v1/{kind}").json()["data"] for kind in ("jobs", "files")]
    assert listed == [[], []]
    assert [e["name"] for e in keyed.ask("bob", "GET", "/v1/endpoints").json()["data"]] == ["atlas"]


def test_a_key_made_over_rest_is_shown_once_and_revoked_at_once(keyed: Keyed) -> None:
    body = {"name": "robot", "scopes": ["infer"], "expires_in": 3600}
    made = keyed.ask("ada", "POST", "/v1/keys", json=body)
    assert made.status_code == 201, made.text
    key, token = made.json()["id"], made.json()["key"]
    assert keyed.ask(token, "POST", "/v1/completions", json=COMPLETION).status_code == 200
    listed = keyed.ask("ada", "GET", "/v1/keys?limit=1").json()
    assert (listed["data"][0]["id"], listed["has_more"]) == (key, True)
    assert "key" not in listed["data"][0]
    assert token not in keyed.ask("ada", "GET", "/v1/keys").text
    assert keyed.ask("ada", "POST", "/v1/keys", json=body).status_code == 409
    revoked = keyed.ask("ada", "DELETE", f"/v1/keys/{key}").json()
    assert revoked["status"] == "revoked"
    refused = keyed.ask(token, "POST", "/v1/completions", json=COMPLETION)
    assert refused.status_code == 401
    assert "is revoked" in refused.text
    assert token not in keyed.log()
    other = [k for k in keyed.ask("ada", "GET", "/v1/keys").json()["data"] if k["name"] == "bob"]
    assert other == []


def test_a_key_that_has_used_up_its_minute_is_told_when_to_come_again(keyed: Keyed) -> None:
    hasty = keyed.new_key("hasty", "--scope", "infer", "--requests-per-minute", "3")
    answers = [keyed.ask(hasty, "GET", "/v1/models") for _ in range(5)]
    assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["Retry-After"]) <= 20
    assert keyed.ask("reader", "GET", "/v1/models").status_code == 200


def test_tokens_are_counted_whether_an_answer_is_waited_for_or_not(keyed: Keyed) -> None:
    whole, stream, hung_up = (
        keyed.new_key(f"chatty{number}", "--scope", "infer", "--tokens-per-minute", "6")
        for number in range(3)
    )
    long = {**COMPLETION, "max_tokens": 64}
    assert keyed.ask(whole, "POST", "/v1/completions", json=long).status_code == 200
    answer = keyed.ask(stream, "POST", "/v1/completions", json={**long, "stream": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    headers = {"Authorization": f"Bearer {hung_up}"}
    with keyed.client.stream(
        "POST", "/v1/completions", json={**long, "n": 8, "stream": True}, headers=headers
    ) as pieces:
        for number, _ in enumerate(pieces.iter_lines()):
            if number == 24:
                break

    tokens = (whole, stream, hung_up)
    with closing(connect(f"unix://{keyed.folder / 'run' / 'q'}")) as redis:

        def levels() -> list[float]:
            """Tokens that each has left; to ask for more would use some."""
            buckets = (f"errata:limit:key_{token.split('_')[1]}:tokens" for token in tokens)
            return [float(redis.hget(bucket, "level")) for bucket in buckets]

        wait_for(lambda: max(levels()) < 0, 30, lambda: str(levels()))  # charged after the answer
    for token in tokens:
        refused = keyed.ask(token, "POST", "/v1/completions", json=COMPLETION)
        assert refused.status_code == 429, refused.text
        assert "tokens of a minute" in refused.json()["error"]["message"]
        assert keyed.ask(token, "GET", "/v1/models").status_code == 200


def test_the_command_lists_and_revokes(keyed: Keyed) -> None:
    token = keyed.new_key("brief", "--scope", "infer", "--expires", "1h")
    shown = keyed.command("keys", "list").stdout
    assert "brief" in shown
    assert token not in shown
    key = "key_" + token.split("_")[1]
    assert keyed.ask(token, "GET", "/v1/models").status_code == 200
    assert "is revoked" in keyed.command("keys", "revoke", key).stdout
    assert keyed.ask(token, "GET", "/v1/models").status_code == 401
    for arguments in (
        ("create", "x", "--scope", "infer", "--expires", "soon"),
        ("create", "../x", "--scope", "infer"),
        ("create", "x", "--scope", "root"),
        ("create", "x", "--scope", ","),
        ("revoke", "key_0"),
    ):
        refused = keyed.command("keys", *arguments)
        assert refused.returncode != 0
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "127.0.0.1.evil.example:80"}, 400),
        ({"Host": ""}, 400),
        ({"Host": "[::1"}, 400),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]:8000"}, 200),
    ],
)
def test_no_page_from_elsewhere_reaches_a_service_without_keys(
    service: Service, headers: dict[str, str], status: int
) -> None:
    answer = service.client.get("/v1/models", headers=headers)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert "ERRATA_ALLOWED_HOSTS" in answer.json()["error"]["message"]


def test_the_audit_log_tells_who_changed_what(keyed: Keyed) -> None:
    def told(query: str, key: str = "ada") -> list[tuple[Any, ...]]:
        answer = keyed.ask(key, "GET", f"/v1/audit?{query}")
        assert answer.status_code == 200, answer.text
        return [(e["actor"], e["action"], e["target"]) for e in answer.json()["data"]]

    version = keyed.ask("reader", "GET", "/v1/models/base_atlas").json()["version"]
    body = {"version": version}
    made = keyed.ask("editor", "PUT", "/v1/endpoints/told", json=body, headers=FORM)
    assert made.status_code == 201, made.text
    gone = {"If-Match": made.headers["ETag"]}
    keyed.ask("ada", "DELETE", "/v1/endpoints/told", headers=gone)
    assert told("target=told") == [
        ("ada", "endpoint.delete", "told"),
        ("editor", "endpoint.create", "told"),
    ]
    assert told("target=told&action=endpoint.create") == [("editor", "endpoint.create", "told")]
    assert told("target=told&action=endpoint_") == []
    first = keyed.ask("ada", "GET", "/v1/audit?limit=1").json()
    assert first["has_more"]
    later = keyed.ask("ada", "GET", f"/v1/audit?limit=1&after={first['data'][0]['id']}").json()
    assert later["data"][0]["id"] < first["data"][0]["id"]
    assert ("errata", "key.create") in [entry[:2] for entry in told("action=key&limit=100")]
    assert keyed.ask("editor", "GET", "/v1/audit").status_code == 403
    assert told("actor=bob") == []
