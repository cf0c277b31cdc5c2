"""Names that are none, and every place of the API that takes one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any
from urllib.parse import quote

from openapi.export import DOCUMENT
from tests.security.attacks import JSON, Attack, posted

#: As they travel in a path.
IN_PATHS = {
    "dots": "..",
    "dots, encoded": "%2e%2e",
    "dots, encoded twice": "%252e%252e",
    "a path upwards": "..%2f..%2fetc%2fpasswd",
    "a path upwards, bare": "../../etc/passwd",
    "a path upwards, encoded twice": "..%252f..%252fetc",
    "a path with backslashes": "..%5c..%5cboot.ini",
    "an absolute path": "%2fetc%2fpasswd",
    "a drive": "c%3a%5cboot.ini",
    "NUL": "atlas%00",
    "NUL inside": "at%00las.json",
    "a line feed": "atlas%0a",
    "a header": "atlas%0d%0aX-Evil:%201",
    "a space": "at%20las",
    "a tab": "atlas%09",
    "65 characters": "a" * 65,
    "10 000 characters": "a" * 10_000,
    "no UTF-8": "%ff%fe",
    "dots in overlong UTF-8": "%c0%ae%c0%ae",
    "half a surrogate pair": "%ed%a0%80",
    "broad letters": quote("ａｔｌａｓ"),
    "a Cyrillic letter": quote("аtlas"),
    "no width": quote("at\u200blas"),
    "right to left": quote("atlas\u202egpj"),
    "a combining mark": quote("atlas\u0301"),
    "a ligature": quote("\ufb01le"),
    "a dotless i": quote("fıle"),
    "a soft hyphen": quote("at\u00adlas"),
    "a dot before": ".htaccess",
    "a dash before": "-rf",
    "a home": "~root",
    "a command": quote("$(id)"),
    "SQL": quote("' OR 1=1--"),
    "a template": quote("{{7*7}}"),
    "a pattern": quote("%"),
    "a star": "*",
    "a semicolon": "atlas;v=1",
    "a fragment": "atlas%23",
    "a query": "atlas%3fx",
    "a user": "atlas@evil",
    "reserved for versions": "ver_",
    "a version that is none": "ver_" + "0" * 40,
    "reserved for bases": "base_..%2f..",
}

#: As they stand in a body.
IN_BODIES = {
    "dots": "..",
    "dots, encoded": "%2e%2e",
    "a path upwards": "../../etc/passwd",
    "a path with backslashes": "..\\..\\boot.ini",
    "an absolute path": "/etc/passwd",
    "a URL": "http://169.254.169.254/latest",
    "a file URL": "file:///etc/passwd",
    "NUL": "atlas\0",
    "a line feed": "atlas\n",
    "a space before": " atlas",
    "nothing": "",
    "65 characters": "a" * 65,
    "a million characters": "a" * 1_000_000,
    "half a surrogate pair": "atlas\ud800",
    "broad letters": "ａｔｌａｓ",
    "a Cyrillic letter": "аtlas",
    "no width": "at\u200blas",
    "right to left": "atlas\u202egpj",
    "a dash before": "-rf",
    "a command": "$(id)",
    "SQL": "' OR 1=1--",
    "a template": "{{7*7}}",
    "a number": 7,
    "a list": ["atlas"],
    "an object": {"$ne": None},
    "truth": True,
}

VERSION = "ver_" + "0" * 40
EDIT = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lima"}
GUARDS = dict.fromkeys(("texts", "facts", "suite", "harm"), "file-0")
MATCH = {"If-Match": '"1"'}

#: A body for every path that takes one; all of its names are attacked, one after the other.
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/edits"): {
        "endpoint": "nowhere",
        "edits": [EDIT],
        "texts": "file-0",
        "guards": GUARDS,
    },
    ("POST", "/v1/evaluations"): {
        "model": "nowhere",
        "file": "file-0",
        "texts": "file-0",
        "facts": "file-0",
        "suite": "file-0",
        "harm": "file-0",
    },
    ("POST", "/v1/merges"): {
        "versions": [{"id": VERSION, "facts": "file-0"}],
        "endpoint": "nowhere",
        "guards": GUARDS,
    },
    ("POST", "/v1/merges/preview"): {"versions": [{"id": VERSION, "facts": "file-0"}]},
    ("POST", "/v1/fine_tuning/jobs"): {
        "model": "nowhere",
        "training_file": "file-0",
        "validation_file": "file-0",
        "guards": GUARDS,
    },
    ("POST", "/v1/versions/import"): {
        "file": "file-0",
        "base": "nowhere",
        "parent": VERSION,
        "guards": GUARDS,
    },
    ("POST", "/v1/files/{file_id}/preview"): {"model": "nowhere"},
    ("POST", "/v1/versions/{version_id}/editability"): {"prompts": ["a", "b"]},
    ("POST", "/v1/versions/{version_id}/export"): {"format": "errata"},
    ("POST", "/v1/versions/{version_id}/diff"): {"against": VERSION, "file": "file-0"},
    ("POST", "/v1/versions/{version_id}/flatten"): {"endpoint": "nowhere"},
    ("POST", "/v1/versions/{version_id}/revert"): {"version": VERSION, "endpoint": "nowhere"},
    ("POST", "/v1/endpoints/{name}/replay"): {"base": "nowhere", "onto": "elsewhere"},
    ("PUT", "/v1/endpoints/{name}"): {"version": VERSION},
    ("POST", "/v1/endpoints/{name}/promote"): {"version": VERSION},
    ("POST", "/v1/endpoints/{name}/rollback"): {"to": VERSION},
    ("POST", "/v1/completions"): {
        "model": "nowhere",
        "prompt": "x",
        "proxy": {"expert": "nowhere", "anti_expert": "nowhere"},
    },
    ("POST", "/v1/chat/completions"): {
        "model": "nowhere",
        "messages": [{"role": "user", "content": "x"}],
    },
    ("POST", "/v1/keys"): {"name": "", "scopes": ["infer"]},
    ("POST", "/v1/webhooks"): {"url": "", "events": ["job.ended"]},
    ("POST", "/v1/versions/{version_id}/signatures"): {
        "payloadType": "x",
        "payload": "x",
        "signatures": [{"keyid": "x", "sig": "x"}],
    },
}


def right_bodies(mine: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """For each path without a name that takes a body, one in which nothing is wrong.

    Args:
        mine: the id of a ``version``, and by purpose that of a file.
    """
    merged = {"versions": [{"id": mine["version"]}]}
    return {
        "/v1/edits": {"endpoint": "atlas", "activate": False, "edits": [EDIT]},
        "/v1/evaluations": {"model": "atlas", "edits": [EDIT]},
        "/v1/merges": merged,
        "/v1/merges/preview": merged,
        "/v1/fine_tuning/jobs": {"model": "atlas", "training_file": mine["fine-tune"]},
        "/v1/versions/import": {"file": mine["archive"]},
        "/v1/completions": {"model": "atlas", "prompt": "x"},
        "/v1/chat/completions": {**BODIES["POST", "/v1/chat/completions"], "model": "atlas"},
        "/v1/keys": {"name": "right", "scopes": ["infer"]},
        "/v1/webhooks": {"url": "http://127.0.0.1:9/", "events": ["job.ended"]},
    }


QUERIES = {
    "/v1/versions/{version_id}/diff": f"?against={VERSION}",
    "/v1/versions/{version_id}/export": "?format=errata",
}
#: The fields of bodies that are names.
NAMES = {
    "endpoint", "parent", "model", "file", "texts", "facts", "suite", "harm", "id", "base",
    "training_file", "validation_file", "against", "version", "onto", "to", "expert",
    "anti_expert", "name", "url", "keyid",
}  # fmt: skip
#: Those that may be any text: one that nothing has is not found.
ASKED = {"model", "expert", "anti_expert", "keyid"}
#: What stands for a name that may be any in a path.
KNOWN = {"name": "atlas", "version_id": VERSION, "file_id": "file-0"}


def operations() -> list[tuple[str, str]]:
    """Every method and path of the document."""
    document = json.loads(DOCUMENT.read_text())
    return [
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    ]


def path_attacks(method: str, path: str) -> Iterator[Attack]:
    """Every name that is none, where a path takes one."""
    before, _, rest = path.partition("{")
    param, _, after = rest.partition("}")
    body = json.dumps(BODIES.get((method, path), {})).encode() if method in ("POST", "PUT") else b""
    for told, name in IN_PATHS.items():
        yield Attack(
            f"{method} {path}: {told}",
            method,
            before + name + after + QUERIES.get(path, ""),
            body,
            {**(JSON if body else {}), **MATCH},
            (404, 422),
            param,
        )


def body_attacks(method: str, path: str) -> Iterator[Attack]:
    """Every name that is none, where a body takes one: the refusal names the place."""
    target = path
    for param, known in KNOWN.items():
        target = target.replace("{" + param + "}", known)
    for place in _places(BODIES[method, path], ()):
        param = ".".join(map(str, place))
        asked = place[-1] in ASKED
        for told, name in IN_BODIES.items():
            yield posted(
                f"{method} {path}: {param}: {told}",
                target,
                _with(BODIES[method, path], place, name),
                method,
                headers=MATCH,
                statuses=(400, 404, 422) if asked else (422,),
                param=None if asked else param,
            )


def _places(value: Any, place: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Where names stand in a body."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*place, key))
    elif place[-1] in NAMES:
        yield place


def _with(body: Any, place: tuple[str | int, ...], name: Any) -> Any:
    changed = deepcopy(body)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = name
    return changed
