"""Uploads that are not what they say: names, rows, archives, adapters; imports that fail."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.security.attacks import at_rest, check_refused, tried, uploaded
from tests.service import Service

MIB = 2**20
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
WEIGHTS = save({"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(2, 2)})
ADAPTER = {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": WEIGHTS}


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def beside(name: str, data: bytes = b"x") -> bytes:
    """An adapter, and a member that has no place in it."""
    return zipped({**ADAPTER, name: data})


def linked(name: str, target: str) -> bytes:
    """An adapter one member of which says that it is a symbolic link."""
    stream = io.BytesIO(zipped({k: v for k, v in ADAPTER.items() if k != name}))
    with zipfile.ZipFile(stream, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, target)
    return stream.getvalue()


def twice(name: str) -> bytes:
    stream = io.BytesIO(zipped(ADAPTER))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(stream, "a") as archive:
        archive.writestr(name, b"{}")
    return stream.getvalue()


def bomb(size: int) -> bytes:
    """Zeros that unpack to far more than the archive has."""
    return zipped({**ADAPTER, "README.md": b"\0" * size}, zipfile.ZIP_DEFLATED)


def lying(size: int) -> bytes:
    """A member that says it is small, in its own head and in the list, and is not."""
    data = bytearray(bomb(80 * MIB))
    real = struct.pack("<I", 80 * MIB)
    while (place := data.find(real)) >= 0:
        data[place : place + 4] = struct.pack("<I", size)
    return bytes(data)


def overlapping() -> bytes:
    """A list of members that all lie at one place (a zip bomb without recursion)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", b"\0" * (60 * MIB))
        first = archive.infolist()[0]
        for name in ("adapter_model.safetensors", "README.md"):
            info = zipfile.ZipInfo(name)
            for field in ("compress_type", "CRC", "compress_size", "file_size", "header_offset"):
                setattr(info, field, getattr(first, field))
            archive.filelist.append(info)
            archive.NameToInfo[name] = info
        archive._didModify = True
    return stream.getvalue()


def tarred(mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{mode}") as archive:
        for name, data in ADAPTER.items():
            info = tarfile.TarInfo(f"../../{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def flagged(bit: int) -> bytes:
    data = bytearray(zipped(ADAPTER))
    place = 0
    while (place := data.find(b"PK\x01\x02", place)) >= 0:
        data[place + 8] |= bit
        place += 4
    return bytes(data)


PLAIN = zipped(ADAPTER)
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"hello",
    "a pickle": lambda: pickle.dumps(ADAPTER),
    "an executable": lambda: b"\x7fELF" + b"\0" * 4096,
    "a PDF": lambda: b"%PDF-1.7\n",
    "a tar": lambda: tarred(""),
    "a tar, gzipped": lambda: tarred("gz"),
    "gzip": lambda: gzip.compress(PLAIN),
    "bzip2": lambda: bz2.compress(PLAIN),
    "xz": lambda: lzma.compress(PLAIN),
    "7z": lambda: b"7z\xbc\xaf\x27\x1c" + b"\0" * 100,
    "rar": lambda: b"Rar!\x1a\x07\x01\x00" + b"\0" * 100,
    "an empty zip": lambda: zipped({}),
    "its end alone": lambda: PLAIN[-22:],
    "its beginning alone": lambda: PLAIN[: len(PLAIN) // 2],
    "its end twice": lambda: PLAIN + PLAIN[-22:-1],
    "bytes changed in the list": lambda: PLAIN.replace(b"PK\x01\x02", b"PK\x01\x03"),
    "a folder": lambda: beside("folder/"),
    "all in a folder": lambda: zipped({f"adapter/{k}": v for k, v in ADAPTER.items()}),
    "a path upwards": lambda: beside("../../etc/cron.d/evil"),
    "a path upwards, as the weights": lambda: zipped({f"../{k}": v for k, v in ADAPTER.items()}),
    "an absolute path": lambda: beside("/etc/passwd"),
    "a path with backslashes": lambda: beside("..\\..\\evil.exe"),
    "a drive": lambda: beside("C:/evil.exe"),
    "a name that is long": lambda: beside("a" * 60_000),
    "a name from right to left": lambda: beside("README\u202edm.exe"),
    "a hidden file": lambda: beside(".bashrc"),
    "code beside it": lambda: beside("modeling_evil.py"),
    "a library beside it": lambda: beside("evil.so"),
    "a pickle beside it": lambda: beside("adapter_model.bin", pickle.dumps(1)),
    "a pickle as the weights": lambda: zipped(
        {"adapter_config.json": ADAPTER["adapter_config.json"], "adapter_model.bin": b"\x80\x04."}
    ),
    "a torch file": lambda: beside("training_args.pt"),
    "an archive within": lambda: beside("inner.zip", PLAIN),
    "a link": lambda: linked("evil", "/etc/passwd"),
    "a name twice": lambda: twice("adapter_config.json"),
    "10 001 members": lambda: zipped({**ADAPTER, **{f"a{i}": b"" for i in range(10_001)}}),
    "100 000 members": lambda: zipped({f"a{i}": b"" for i in range(100_000)}),
    "a bomb": lambda: bomb(100 * MIB),
    "a bomb of members at one place": overlapping,
    "an encrypted member": lambda: flagged(1),
    "a large configuration": lambda: zipped({**ADAPTER, "adapter_config.json": b" " * (9 * MIB)}),
    "no configuration": lambda: zipped({"adapter_model.safetensors": WEIGHTS}),
    "no weights": lambda: zipped({"adapter_config.json": b"{}"}),
    "compressed in a rare way": lambda: zipped(ADAPTER, zipfile.ZIP_BZIP2),
    "compressed in another rare way": lambda: zipped(ADAPTER, zipfile.ZIP_LZMA),
    "an adapter and an archive": lambda: beside("artifacts/" + "0" * 64),
}


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
    if answer.status_code == 200:
        file = answer.json()
        assert file["bytes"] == len(data)
        service.client.delete(f"/v1/files/{file['id']}")
    assert at_rest(service)["files"] == before["files"]
