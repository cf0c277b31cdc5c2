"""Uploads that are not what they say: names, rows, archives, adapters; imports that fail."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from typing import Any

import pytest

from tests.security.archives import ADAPTER, ARCHIVES, CONFIG, MIB, lying, zipped
from tests.security.attacks import at_rest, check_refused, tried, uploaded
from tests.service import Service


def test_archives_that_are_bombs_or_none(service: Service) -> None:
    """Refused when they are uploaded: nothing is unpacked, nothing kept."""
    attacks = [
        uploaded(name, {"file": ("a.zip", made())}, {"purpose": "archive"}, statuses=(413, 422))
        for name, made in ARCHIVES.items()
    ]
    check_refused(service, attacks, what="archives")


DEEP = b'{"a":' * 900 + b"1" + b"}" * 900
ROWS: dict[str, bytes] = {
    "nothing": b"",
    "blank lines": b"\n\n \n",
    "no JSON": b"hello\n",
    "half a row": b'{"prompt": ',
    "a number": b"7\n",
    "a list of numbers": b"[1, 2]",
    "an empty list": b"[]",
    "null": b"null\n",
    "a list within a list": b"[[]]",
    "an unknown row": b'{"evil": 1}\n',
    "no UTF-8": b'{"prompt": "\xff"}\n',
    "half a surrogate pair": b'{"prompt": "\\ud800", "completion": "x", "target": "x"}\n',
    "UTF-16": '{"prompt": "x"}\n'.encode("utf-16"),
    "NaN": b'{"prompt": NaN}\n',
    "Infinity": b"[Infinity]",
    "a number of 5000 digits": b'{"prompt": ' + b"9" * 5000 + b"}\n",
    "deep lists": b"[" * 100_000,
    "a deep row": DEEP + b"\n",
    "a list of deep rows": b"[" + DEEP + b"]",
    "a deep field": b'{"prompt": ' + DEEP + b"}\n",
    "a pickle": pickle.dumps([1, 2, 3]),
    "a gzip bomb": gzip.compress(b"\0" * (10 * MIB)),
    "NUL bytes": b"\0" * MIB,
    "a long line": b'{"prompt": "' + b"a" * (9 * MIB) + b'"}\n',
    "blank texts": b'{"prompt": " ", "completion": " ", "target": " "}\n',
    "a formula": b'{"prompt": "=cmd|\'/C calc\'!A0"}\n',
    "YAML": b"!!python/object/apply:os.system ['id']\n",
    "XML": b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>\n',
}
PURPOSES = ("fine-tune", "edits", "examples", "facts", "suite", "harm")


@pytest.mark.parametrize("purpose", PURPOSES)
def test_rows_that_are_none(service: Service, purpose: str) -> None:
    attacks = [
        uploaded(f"{purpose}: {name}", {"file": ("a.jsonl", data)}, {"purpose": purpose})
        for name, data in ROWS.items()
        if name != "a formula" or purpose not in ("harm", "fine-tune")  # there a prompt is a row
    ]
    check_refused(service, attacks, what="rows")


def test_forms_that_are_none(service: Service) -> None:
    good = {"file": ("a.txt", b"A text.")}
    texts = {"purpose": "texts"}
    purposes = ["", "evil", "../..", "texts\0", "TEXTS", "a" * 65, "a" * 100_000, "export"]
    attacks = [uploaded(f"purpose {p:.20}", good, {"purpose": p}) for p in purposes]
    attacks += [
        uploaded("no purpose", good, {}),
        uploaded("no file", {"evil": ("a.txt", b"x")}, texts),
        uploaded("a file without bytes", {"file": ("a.txt", b"")}, texts),
        uploaded("a file without a name", {"file": ("", b"A text.")}, texts),
        uploaded("1001 files", [("file", ("a.txt", b"A text."))] * 1001, texts),
        uploaded("1001 fields", good, {**texts, **{f"a{i}": "x" for i in range(1001)}}),
    ]
    names = ["a\u202etxt.exe", "\u200b", "a" * 256, "a\x7f.txt", "/", "a/", " "]
    attacks += [uploaded(f"name {n!r:.20}", {"file": (n, b"A text.")}, texts) for n in names]
    check_refused(service, attacks, what="forms")


def test_names_of_files_are_labels(service: Service) -> None:
    """What a client calls a file is shown and nothing else: no path is made of it."""
    names = {
        "../../etc/passwd": "passwd",
        "/etc/shadow": "shadow",
        "..\\..\\boot.ini": "boot.ini",
        "C:\\evil.exe": "evil.exe",
        "a/../../b.txt": "b.txt",
        "..": "..",
        "$(id).txt": "$(id).txt",
        "<script>.txt": "<script>.txt",
        "%2e%2e%2fx": "%2e%2e%2fx",
    }
    before = at_rest(service)
    for name, label in names.items():
        tried["names of files"] = tried.get("names of files", 0) + 1
        sent = {"file": (name, b"A text.")}
        made = service.client.post("/v1/files", files=sent, data={"purpose": "texts"})
        assert made.status_code == 200, made.text
        assert made.json()["filename"] == label
        path = f"/v1/files/{made.json()['id']}"
        answer = service.client.get(f"{path}/content")
        shown = f'attachment; filename="{made.json()["id"]}"'
        assert answer.headers["Content-Disposition"] == shown
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert service.client.delete(path).status_code == 200
    after = at_rest(service)
    assert after["folder"] == before["folder"]
    assert after["files"] == before["files"]


def imported(service: Service, data: bytes) -> dict[str, Any]:
    """How the import of an archive ends that was taken when it was uploaded."""
    sent = {"file": ("a.zip", data)}
    file = service.client.post("/v1/files", files=sent, data={"purpose": "archive"})
    assert file.status_code == 200, file.text
    asked = {"file": file.json()["id"]}
    answer = service.client.post("/v1/versions/import", json=asked)
    ended: dict[str, Any] = (
        {"status": "refused", "error": answer.json()["error"]}
        if answer.status_code == 422
        else service.ended(answer.json()["id"])
    )
    assert service.client.delete(f"/v1/files/{file.json()['id']}").status_code == 200
    return ended


CONFIGS: dict[str, Any] = {
    "no JSON": b"{",
    "a list": [],
    "deep": DEEP,
    "a deep option": b'{"peft_type": "LORA", "evil": ' + DEEP + b"}",
    "a pickle": pickle.dumps(CONFIG),
    "another kind": {**CONFIG, "peft_type": "LOHA"},
    "code": {**CONFIG, "auto_map": {"AutoModel": "evil.Evil"}},
    "modules to save": {**CONFIG, "modules_to_save": ["lm_head"]},
    "a pattern that explodes": {**CONFIG, "rank_pattern": {"(a+)+$": 2}},
    "a rank of 2**40": {**CONFIG, "r": 2**40},
    "a rank of 0": {**CONFIG, "r": 0},
    "a rank that is no number": {**CONFIG, "r": True},
    "an alpha that is none": b'{"peft_type": "LORA", "lora_alpha": NaN}',
    "an alpha that is infinite": b'{"peft_type": "LORA", "lora_alpha": 1e999}',
    "an alpha of 400 digits": b'{"peft_type": "LORA", "lora_alpha": ' + b"9" * 400 + b"}",
    "a key twice": b'{"peft_type": "LORA", "peft_type": "LORA", "r": 2}',
    "half a surrogate pair": b'{"peft_type": "LORA", "\\ud800": 1}',
    "a beginning that changes the base": {**CONFIG, "init_lora_weights": "pissa"},
    "targets that are numbers": {**CONFIG, "target_modules": [1]},
}


def test_configurations_that_are_none(service: Service) -> None:
    """Refused before a job is written; the file that was uploaded is kept until it is deleted."""
    before = at_rest(service)
    for name, config in CONFIGS.items():
        data = config if isinstance(config, bytes) else json.dumps(config).encode()
        ended = imported(service, zipped({**ADAPTER, "adapter_config.json": data}))
        tried["configurations"] = tried.get("configurations", 0) + 1
        assert ended["status"] == "refused", (name, ended)
        assert ended["error"]["param"] == "file", (name, ended)
    after = at_rest(service)
    for table in ("jobs", "versions", "files", "endpoints", "moves", "folder"):
        assert after[table] == before[table], table


def test_an_import_that_fails_leaves_no_version(service: Service) -> None:
    """What only the base can tell is told by the job."""
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    header = json.dumps({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]})
    text = f'{{"{name}": {header}, "{name}": {header}}}'.encode()
    doubled = struct.pack("<Q", len(text)) + text + struct.pack("<4f", 1, 2, 3, 4)
    before = at_rest(service)
    ended = imported(service, zipped({**ADAPTER, "adapter_model.safetensors": doubled}))
    tried["imports"] = 1
    assert (ended["status"], ended["version"]) == ("failed", None), ended
    assert "twice" in ended["error"]["message"], ended
    after = at_rest(service)
    for table in ("versions", "files", "endpoints", "moves", "folder"):
        assert after[table] == before[table], table


def test_a_member_that_lies_about_its_size(service: Service) -> None:
    """It is taken, since the list of members says that it is small, and is not read beyond that."""
    data = lying(1000)
    assert len(data) < MIB
    sent = {"file": ("a.zip", data)}
    before = at_rest(service)
    answer = service.client.post("/v1/files", files=sent, data={"purpose": "archive"})
    tried["archives that lie"] = 1
    assert answer.status_code == 200, answer.text
    file = answer.json()
    assert file["bytes"] == len(data)
    service.client.delete(f"/v1/files/{file['id']}")
    assert at_rest(service)["files"] == before["files"]
