"""Bodies that are none, too large, or not what they say; headers that are none."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from registry.bases import find_bases
from tests.models import add_version
from tests.security.attacks import (
    JSON,
    PATIENCE,
    Attack,
    check_refused,
    ended_job,
    own_files,
    posted,
    raw,
    tried,
)
from tests.security.names import BODIES, EDIT, VERSION, right_bodies
from tests.service import Service

POSTS = [(method, path) for method, path in BODIES if "{" not in path]
MIB = 2**20


def long_list(count: int) -> bytes:
    return b'{"edits": [' + b'"x",' * count + b'"x"], "endpoint": "atlas"}'


#: What no route takes for a body, as bytes.
NO_JSON: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n\t ",
    "half an object": b'{"a": ',
    "an unquoted key": b"{a: 1}",
    "single quotes": b"{'a': 1}",
    "a comma too many": b'{"a": 1,}',
    "a comment": b'{"a": 1} // x',
    "two values": b"{} {}",
    "text": b"hello",
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "truth": b"true",
    "a string": b'"{}"',
    "a key twice": b'{"model": "atlas", "model": "base_atlas"}',
    "a key twice, once escaped": b'{"model": "atlas", "m\\u006fdel": "x"}',
    "a key twice, deep within": b'{"guards": {"texts": "a", "texts": "b"}}',
    "deep lists": b"[" * 100_000,
    "deep lists, closed": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep within a field": b'{"hyperparameters": ' + b'{"a":' * 400 + b"1" + b"}" * 401,
    "a number of 5000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "a number of a million digits": b'{"seed": ' + b"9" * MIB + b"}",
    "an exponent": b'{"seed": 1e999999999}',
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "half a character of UTF-8": b'{"model": "\xc3"}',
    "overlong UTF-8": b'{"model": "\xc0\xae\xc0\xae"}',
    "a surrogate in UTF-8": b'{"model": "\xed\xa0\x80"}',
    "half a surrogate pair": b'{"model": "\\ud800"}',
    "half a surrogate pair as a key": b'{"\\udfff": 1}',
    "a pair the wrong way": b'{"model": "\\udc00\\ud800"}',
    "UTF-16": '{"model": "atlas"}'.encode("utf-16"),
    "UTF-32": '{"model": "atlas"}'.encode("utf-32"),
    "UTF-7": b"+AHsAIgBtACI-",
    "a control character in a string": b'{"model": "a\x01b"}',
    "NUL bytes": b"\0" * 1000,
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93",
    "YAML": b"!!python/object/apply:os.system ['id']",
    "XML": b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
    "__proto__": b'{"__proto__": {"admin": true}}',
    "a field that is none": b'{"is_admin": true}',
    "500 000 fields": b"{" + b",".join(b'"f%d":1' % i for i in range(500_000)) + b"}",
    "a long list": long_list(1_000_000),
    "a long string": b'{"model": "' + b"a" * (4 * MIB) + b'"}',
    "too large": b" " * (8 * MIB + 1),
    "noise": random.Random(0).randbytes(4096),
}
BODY_STATUSES = (400, 404, 413, 415, 422)


@pytest.mark.parametrize(("method", "path"), POSTS)
def test_bodies_that_are_none(service: Service, method: str, path: str) -> None:
    attacks = [
        Attack(f"{path}: {name}", method, path, body, JSON, BODY_STATUSES)
        for name, body in NO_JSON.items()
    ]
    check_refused(service, attacks, what="bodies")


TYPES = [
    "", "text/plain", "application/xml", "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x", "multipart/form-data", "application/octet-stream",
    "application/json, text/html", "application/jsonp", "image/svg+xml", "application/x-pickle",
    "\xff", "a" * 1000,
]  # fmt: skip


@pytest.fixture(scope="module")
def right(service: Service) -> dict[str, dict[str, Any]]:
    """By path, a body in which nothing is wrong."""
    version = add_version(service.folder, find_bases("atlas")["atlas"], seed=90)
    return right_bodies({**own_files(service), "version": version})


def take_back(service: Service, path: str, made: dict[str, Any]) -> None:
    """End what a right body began, or delete what it made."""
    if path in ("/v1/keys", "/v1/webhooks"):
        assert service.client.delete(f"{path}/{made['id']}").is_success
    elif "completions" not in path:
        service.client.post(f"/v1/jobs/{made['id']}/cancel")


@pytest.mark.parametrize(("method", "path"), POSTS)
def test_right_bodies_of_another_type(
    service: Service, right: dict[str, dict[str, Any]], method: str, path: str
) -> None:
    """What a browser may send across origins unasked is among them."""
    body = json.dumps(right[path]).encode()
    taken = service.client.request(method, path, content=body, headers=JSON)
    assert taken.is_success, taken.text
    take_back(service, path, taken.json())
    attacks = [
        Attack(f"{path}: {kind!r:.40}", method, path, body, {"Content-Type": kind}, (415, 422))
        for kind in TYPES
    ]
    attacks.append(Attack(f"{path}: no type", method, path, body, statuses=(415, 422)))
    check_refused(service, attacks, what="content types")


def numbers() -> Iterator[Attack]:
    """Numbers that are none, or not finite, in each field that takes one."""
    edits = {"endpoint": "atlas", "edits": [EDIT]}
    places = [
        ("/v1/edits", edits, "batch_size"),
        ("/v1/edits", edits, "check_every"),
        *(("/v1/edits", edits, f"guards.{name}") for name in ("perplexity", "norm", "locality")),
        ("/v1/edits", edits, "hyperparameters.learning_rate"),
        ("/v1/edits", edits, "hyperparameters.steps"),
        ("/v1/edits", edits, "hyperparameters.layer"),
        ("/v1/merges", {"versions": [{"id": VERSION}]}, "seed"),
        ("/v1/merges", {"versions": [{"id": VERSION}]}, "rank"),
        ("/v1/merges", {}, "versions.weight"),
        ("/v1/keys", {"name": "x", "scopes": ["infer"]}, "expires_in"),
        ("/v1/keys", {"name": "x", "scopes": ["infer"]}, "requests_per_minute"),
        ("/v1/fine_tuning/jobs", {"model": "atlas", "training_file": "file-0"}, "seed"),
        *(
            ("/v1/completions", {"model": "atlas", "prompt": "x"}, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "best_of")
        ),
        *(
            ("/v1/completions", {"model": "atlas", "prompt": "x"}, name)
            for name in ("presence_penalty", "repetition_penalty", "seed", "timeout", "logprobs")
        ),
    ]
    bad = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "-" + "9" * 400]
    bad += ['"1; DROP TABLE jobs"', "[1]", "{}", '"0x10"', "-1e308", '"NaN"', "-9007199254740993"]
    for path, body, place in places:
        for value in bad:
            name, _, inner = place.partition(".")
            if name == "versions":
                text = f'{{"versions": [{{"id": "{VERSION}", "weight": {value}}}]}}'
            elif inner:
                text = f'{json.dumps(body)[:-1]}, "{name}": {{"{inner}": {value}}}}}'
            else:
                text = f'{json.dumps(body)[:-1]}, "{name}": {value}}}'
            if (place, value) not in (("seed", "-9007199254740993"),) or "completions" not in path:
                yield Attack(f"{path} {place}: {value[:20]}", "POST", path, text.encode(), JSON)


def test_numbers_that_are_none(service: Service) -> None:
    check_refused(service, numbers(), what="numbers")


# -- headers ------------------------------------------------------------------------------------

ETAGS = [
    "1", '"0"1', '""', '"-1"', '"1e9"', 'W/"1"', '"1", "2"', "*", '"9999999999"', '"' + "1" * 4000,
    '"\xb2"', "null", "'1'", '"٣"'.encode().decode("latin-1"), '"1;--"', " ",
]  # fmt: skip
EVENT_IDS = ["x", "-1", "1.5", "\xb2", "9" * 30, "9" * 5000, "1 2", "0x1", "null", '"1"']
KEYS = ["", "a" * 256, "a" * 10_000]
KEYLESS = ("/v1/keys", "/v1/webhooks", "/v1/completions", "/v1/chat/completions")


def header_attacks(job: str) -> Iterator[Attack]:
    for etag in ETAGS:
        headers = {"If-Match": etag, **JSON}
        body = json.dumps({"version": VERSION}).encode()
        told = f"If-Match {etag!r:.30}"
        yield Attack(f"PUT {told}", "PUT", "/v1/endpoints/atlas", body, headers, (400, 412))
        yield Attack(f"DELETE {told}", "DELETE", "/v1/endpoints/atlas", b"", headers, (400, 412))
        for call in ("promote", "rollback"):
            target = f"/v1/endpoints/atlas/{call}"
            yield Attack(f"{call} {told}", "POST", target, b"{}", headers, (400, 412))
    for value in ("x", '"1"', "**", '*, "1"', ""):
        headers = {"If-None-Match": value, **JSON}
        body = json.dumps({"version": VERSION}).encode()
        told = f"If-None-Match {value!r}"
        yield Attack(told, "PUT", "/v1/endpoints/new", body, headers, (400, 422))
    for value in EVENT_IDS:
        headers = {"Last-Event-ID": value}
        told, target = f"Last-Event-ID {value!r:.30}", f"/v1/jobs/{job}/events"
        yield Attack(told, "GET", target, b"", headers, (400, 422))
    for method, path in POSTS:
        for value in KEYS:
            if path not in KEYLESS:
                headers = {"Idempotency-Key": value, **JSON}
                body = json.dumps(BODIES[method, path]).encode()
                told = f"{path} Idempotency-Key {value[:9]}"
                yield Attack(told, method, path, body, headers, (400, 422), "idempotency-key")


def test_headers_that_are_none(service: Service) -> None:
    check_refused(service, header_attacks(ended_job(service)), what="headers")


HOSTS = [
    "", "evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "evil.example:80",
    "127.0.0.1, evil.example", "[::1", "localhost.evil", "\xff", "a" * 5000, "169.254.169.254",
    "127.0.0.1 evil", "//127.0.0.1",
]  # fmt: skip
ORIGINS = [
    "null", "https://evil.example", "http://127.0.0.1.evil.example", "file://", "*", "\xff",
    "http://localhost@evil.example", "javascript:alert(1)", "a" * 5000,
]  # fmt: skip


def test_hosts_and_origins_from_elsewhere(service: Service) -> None:
    statuses = (400, 403)
    attacks = [
        Attack(f"Host {host!r:.40}", "GET", "/v1/models", b"", {"Host": host}, statuses)
        for host in HOSTS
    ]
    for origin in ORIGINS:
        headers = {"Origin": origin, **JSON}
        body = json.dumps({"endpoint": "atlas", "edits": [EDIT]}).encode()
        told = f"Origin {origin!r:.40}"
        attacks.append(Attack(told, "POST", "/v1/edits", body, headers, (403,)))
    check_refused(service, attacks, what="hosts and origins")


TOKENS = [
    "er_", "er_0_0", "er_" + "0" * 16 + "_" + "A" * 43, "er_../../x_y", "er_' OR 1=1--_x",
    "er_\xff_x",
    "er_" + "a" * 10_000, "er_%00_x", "er__", "er_a_b_c_d", "er_é_x",
]  # fmt: skip


def test_keys_that_are_none(service: Service) -> None:
    attacks = [
        Attack(token[:30], "GET", "/v1/models", b"", {"Authorization": f"Bearer {token}"}, (401,))
        for token in TOKENS
    ]
    check_refused(service, attacks, what="API keys")


# -- what is not HTTP ---------------------------------------------------------------------------

HOST = "Host: 127.0.0.1\r\n"
GET = f"GET /healthz HTTP/1.1\r\n{HOST}"
POST = f"POST /v1/edits HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
NO_HTTP: dict[str, bytes] = {
    "noise": random.Random(1).randbytes(400) + b"\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200 + b"\r\n\r\n",
    "a method that is none": f"G\x00T /healthz HTTP/1.1\r\n{HOST}\r\n".encode(),
    "no version": f"GET /healthz\r\n{HOST}\r\n".encode(),
    "a target with spaces": f"GET /healthz x HTTP/1.1\r\n{HOST}\r\n".encode(),
    "a header without a colon": f"{GET}evil\r\n\r\n".encode(),
    "a header that goes on": f"{GET}X-A: 1\r\n\x00b: 2\r\n\r\n".encode(),
    "a negative length": f"{GET}Content-Length: -1\r\n\r\n".encode(),
    "a length that is none": f"{GET}Content-Length: 0x10\r\n\r\n".encode(),
    "two lengths": f"{GET}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}".encode(),
    "a length of 5000 digits": f"{GET}Content-Length: {'9' * 5000}\r\n\r\n".encode(),
    "a huge length": f"{POST}Content-Length: 99999999999\r\n\r\n{{}}".encode(),
    "a coding that is none": f"{GET}Transfer-Encoding: evil\r\n\r\n".encode(),
    "length and chunks": (
        f"{POST}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode()
    ),
    "a chunk's length that is none": f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
    "a chunk that is too long": (
        f"{POST}Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffffffffffffff\r\n".encode()
    ),
    "chunks without end": (
        f"{POST}Transfer-Encoding: chunked\r\n\r\n".encode() + b"10000\r\n" + b" " * 65536 + b"\r\n"
    )
    + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 130,
    "compressed": (
        f"{POST}Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x0b\x08\0".encode()
    ),
    "NUL in a header": f"{GET}If-Match: \0\r\n\r\n".encode(),
    "a bell in a header": (f"{POST}Idempotency-Key: \a\r\nContent-Length: 2\r\n\r\n{{}}".encode()),
}
MANY = "X: a\r\n" * 10_000
#: What the server takes for HTTP all the same.
ODD_HTTP: dict[str, bytes] = {
    "a version that is none": f"GET /healthz HTTP/9.9\r\n{HOST}\r\n".encode(),
    "100 kB of headers": f"{GET}X: {'a' * 100_000}\r\n\r\n".encode(),
    "10 000 headers": f"{GET}{MANY}\r\n".encode(),
    "a long target": f"GET /{'a' * 100_000} HTTP/1.1\r\n{HOST}\r\n".encode(),
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_not_http(service: Service, name: str) -> None:
    """Refused, by the server or by the service, and other requests go on."""
    answer = raw(service, NO_HTTP[name])
    assert 400 <= answer.status < 500 or answer.status == 505, (name, answer)
    tried["not HTTP"] = tried.get("not HTTP", 0) + 1
    assert service.client.get("/healthz", timeout=PATIENCE).status_code == 200


@pytest.mark.parametrize("name", ODD_HTTP)
def test_what_is_hardly_http(service: Service, name: str) -> None:
    """Answered or refused, and other requests go on."""
    assert raw(service, ODD_HTTP[name]).status < 500
    tried["odd HTTP"] = tried.get("odd HTTP", 0) + 1
    assert service.client.get("/healthz", timeout=PATIENCE).status_code == 200


def test_texts_that_no_database_holds(service: Service) -> None:
    """Half of a surrogate pair in whatever field: the refusal names the field."""
    half = "\ud800"
    edits, ask = {"endpoint": "atlas", "edits": [EDIT]}, {"model": "atlas", "prompt": "x"}
    chat = {"model": "atlas", "messages": [{"role": "user", "content": half}]}
    pattern = {"response_format": {"type": "regex", "regex": half}}
    told = [
        ("/v1/edits", {**edits, "message": half}, "message"),
        ("/v1/edits", {**edits, "guards": {"refusals": ["a", half]}}, "guards.refusals.1"),
        ("/v1/completions", {**ask, "prompt": half}, "prompt"),
        ("/v1/completions", {**ask, "stop": ["a", half]}, "stop.1"),
        ("/v1/completions", {**ask, "user": half}, "user"),
        ("/v1/completions", ask | pattern, "response_format.regex"),
        ("/v1/chat/completions", chat, "messages.0.content"),
        ("/v1/endpoints/atlas/rollback", {"message": half}, "message"),
        ("/v1/fine_tuning/jobs", {"metadata": {"a": half}}, "metadata.a"),
    ]
    attacks = [posted(param, path, body, param=param) for path, body, param in told]
    check_refused(service, attacks, what="half characters")
