"""Archives that are bombs, lies or none, and the adapter that they begin with."""

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

import pytest
import torch
from safetensors.torch import save

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
