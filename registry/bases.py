"""Bases: local Hugging Face folders, named in ``ERRATA_BASES``, identified by their digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from registry.errors import UnsupportedModel, VersionUnavailable
from registry.manifests import BaseRef, canonical_json, sha256

#: Model families (``model_type`` in config.json) that editing and serving know.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi",
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,58}")


@dataclass(frozen=True)
class Base:
    """An untouched model on disk. ``depth`` counts its layers, ``context_length`` tokens."""

    name: str
    folder: Path
    digest: str
    family: str
    depth: int
    context_length: int
    has_chat_template: bool

    @property
    def ref(self) -> BaseRef:
        return BaseRef(self.name, self.digest)


def find_bases(spec: str) -> dict[str, Base]:
    """Read ``ERRATA_BASES``: ``name`` (bundled) or ``name=/folder``, by commas.

    Raises:
        UnsupportedModel: a name, folder or family that cannot be served; says which and why.
    """
    bases: dict[str, Base] = {}
    for entry in filter(None, (part.strip() for part in spec.split(","))):
        name, _, folder = entry.partition("=")
        if not NAME.fullmatch(name) or name.startswith(("ver_", "base_")):
            raise UnsupportedModel(
                f"ERRATA_BASES: {name!r} is no base name; names match {NAME.pattern}"
                " and do not begin with ver_ or base_"
            )
        if name in bases:
            raise UnsupportedModel(f"ERRATA_BASES: {name!r} is named twice")
        bases[name] = read_base(name, Path(folder) if folder else _bundled(name))
    if not bases:
        raise UnsupportedModel("ERRATA_BASES is empty; set it to `atlas` or `name=/folder`")
    return bases


def base_of(bases: Mapping[str, Base], version_id: str, ref: BaseRef) -> Base:
    """The base that a version stands on.

    Raises:
        VersionUnavailable: it is not among ``bases``, or its folder holds other files now.
    """
    base = bases.get(ref.name)
    if base is None or base.digest != ref.digest:
        raise VersionUnavailable(
            f"version {version_id!r} stands on base {ref.name!r} with digest {ref.digest[:12]}…,"
            " which this service has not loaded; add it to ERRATA_BASES"
            + ("" if base is None else " (the folder of that name holds other files now)")
        )
    return base


def read_base(name: str, folder: Path) -> Base:
    """Check a folder and take its digest.

    The digest covers every file that decides what the model computes: configuration, weights,
    tokenizer and chat template.
    """
    if not (folder / "config.json").is_file():
        raise UnsupportedModel(f"base {name!r}: {folder} holds no config.json")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UnsupportedModel(f"base {name!r}: config.json is not JSON: {error}") from error
    family = config.get("model_type")
    if family not in FAMILIES:
        cure = "; save its text model alone (Gemma3ForCausalLM)" if family == "gemma3" else ""
        raise UnsupportedModel(
            f"base {name!r}: family {family!r} is not supported; supported: {', '.join(FAMILIES)}"
            f"{cure}"
        )
    if "longrope" in _rope_types(config):
        raise UnsupportedModel(
            f"base {name!r}: longrope positions depend on the longest sequence of a step, so its"
            " sequences cannot share one; use a base with other position embeddings"
        )
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedModel(
            f"base {name!r}: {folder} holds no .safetensors file; other weight formats are refused,"
            " convert them first (model.save_pretrained does)"
        )
    if not (folder / "tokenizer.json").is_file():
        raise UnsupportedModel(f"base {name!r}: {folder} holds no tokenizer.json")
    return Base(
        name=name,
        folder=folder.absolute(),
        digest=_digest(folder),
        family=family,
        depth=int(config.get("num_hidden_layers") or config.get("n_layer") or 0),
        context_length=_context_length(config),
        has_chat_template=_has_chat_template(folder),
    )


def _bundled(name: str) -> Path:
    folder = Path(str(resources.files("editing"))) / name / "weights"
    if not folder.is_dir():
        raise UnsupportedModel(
            f"ERRATA_BASES: no bundled base is called {name!r} (there is `atlas`);"
            f" for a folder write {name}=/path/to/folder"
        )
    return folder


def _context_length(config: Mapping[str, Any]) -> int:
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 1024)


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """The kinds of rotary embedding; Gemma 3 has one for each kind of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
    return {str(part.get(key)) for part in parts for key in ("rope_type", "type")}


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and "chat_template" in json.loads(file.read_text())


def _digest(folder: Path) -> str:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".jinja"))
    return sha256(canonical_json({file.name: _file_digest(file) for file in files}))


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
