"""Archives that users upload, checked without torch: adapters, and this project's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from editing.datasets import ARCHIVE
from editing.exchange.config import LoraForm, read_config
from editing.exchange.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ARTIFACTS,
    ERRATA,
    MANIFEST,
    PEFT,
    kind_of,
)
from registry.archives import Archive
from registry.bases import Base
from registry.dsse import Signature
from registry.edits import FLATTEN
from registry.errors import UnprocessableRequest
from registry.garbage import digests_in
from registry.history import RERUN
from registry.manifests import BaseRef, VersionManifest, canonical_json, sha256
from registry.signing import Trust
from workers.preprocessing import Preprocessing

__all__ = [
    "ARCHIVE",
    "ERRATA",
    "PEFT",
    "History",
    "Upload",
    "check_base",
    "check_signed",
    "open_upload",
]

FORMAT = "errata-archive-1"
#: What an archive's list of versions may hold; exports keep to it. The number of its JSON values
#: bounds what reading it takes: an empty list takes twenty times the memory of its text.
VERSIONS = 10_000
MANIFEST_BYTES = 64 * 2**20
MANIFEST_VALUES = 2_500_000
CONFIG_BYTES = 8 * 2**20
#: Signatures that one version may bring.
SIGNATURES = 16
_ARTIFACT = re.compile(re.escape(ARTIFACTS) + r"([0-9a-f]{64})")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"ver_[0-9a-f]{40}")
#: What may lie beside an adapter and is not read.
_BESIDE = ("README.md", MANIFEST)
_LARGEST = {ADAPTER_CONFIG: CONFIG_BYTES, MANIFEST: MANIFEST_BYTES}
_NO_EDITS = sha256(canonical_json([]))

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(strict=True, ge=0)]


class _Recipe(BaseModel):
    """What is read of any recipe that can run again."""

    method: str
    hyperparameters: dict[str, Any]
    author: str | None
    message: str | None


class _Edit(_Recipe):
    edits: Digest | None
    edit_count: Count
    examples: Digest | None = None
    texts: Digest | None = None
    batch_size: Count | None = None
    replaces: str = ""

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if not self.edit_count and self.edits not in (None, _NO_EDITS):
            raise ValueError("it has edits that it does not count")
        return self


class _Preprocessed(BaseModel):
    steps: list[Preprocessing] = []


class _Tuning(_Recipe):
    options: dict[str, Any]
    rows: Digest
    harmful: Digest | None
    seed: Count
    step: Count
    suffix: str | None
    preprocessing: _Preprocessed | None


@dataclass(frozen=True)
class History:
    """A version and what it came from, ancestors first, with the signatures of each by its id."""

    manifests: tuple[VersionManifest, ...]
    signatures: Mapping[str, tuple[Signature, ...]] = field(default_factory=dict)

    @property
    def head(self) -> VersionManifest:
        return self.manifests[-1]

    @property
    def ancestors(self) -> tuple[VersionManifest, ...]:
        return self.manifests[:-1]

    def to_bytes(self) -> bytes:
        """The content of ``errata.json``."""
        signed = {
            version_id: [signature.to_json() for signature in made]
            for version_id, made in self.signatures.items()
            if made
        }
        return canonical_json(
            {
                "format": FORMAT,
                "version": self.head.id,
                "versions": [manifest.to_json() for manifest in self.manifests],
                "signatures": signed,
            }
        )

    @property
    def needed(self) -> frozenset[str]:
        """The digests that the head cannot do without: its deltas."""
        return frozenset(self.head.stack)

    @property
    def named(self) -> frozenset[str]:
        """The digests that may be artifacts: the head's deltas and what any recipe names."""
        return self.needed | digests_in([manifest.recipe for manifest in self.manifests])


@dataclass(frozen=True)
class Upload:
    """An archive whose members have the names that its kind has: ``peft`` or ``errata``."""

    archive: Archive
    kind: str

    def form(self) -> LoraForm:
        """An adapter's configuration. Raises UnprocessableRequest."""
        return read_config(self.archive.read(ADAPTER_CONFIG))

    def history(self) -> History:
        """The versions in an archive of this project's, their artifacts all among its members.

        Raises:
            UnprocessableRequest: it is damaged, or lacks a delta.
        """
        history = _history(self.archive.read(MANIFEST))
        held = {digest for digest, _ in self.artifacts()}
        if missing := sorted(history.needed - held):
            raise _refused(f"it lacks the delta {missing[0]}; export the version again")
        if strange := sorted(held - history.named):
            raise _refused(f"it holds {ARTIFACTS}{strange[0]}, which none of its versions names")
        return history

    def artifacts(self) -> Iterator[tuple[str, str]]:
        """Digests, each with the name of the member that holds its bytes."""
        for name in self.archive.names:
            if match := _ARTIFACT.fullmatch(name):
                yield match[1], name


def open_upload(stream: BinaryIO, limit: int) -> Upload:
    """Look at an archive's members; nothing is extracted.

    Raises:
        UnprocessableRequest: it is no zip, too large, neither kind, or a member has a name that
            has no place in it.
    """
    archive = Archive(stream, limit)
    names = archive.names
    if unsafe := next((name for name in names if name.endswith((".bin", ".pt", ".pth"))), None):
        raise _refused(
            f"{unsafe!r} is a pickle, which is never loaded; save the adapter as"
            f" {ADAPTER_WEIGHTS} (peft's save_pretrained does)"
        )
    kind = kind_of(names)
    if kind is None:
        raise _refused(
            f"it holds neither an adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, in no folder)"
            f" nor {MANIFEST} of an errata archive; zip the files themselves (zip -j)"
        )
    expected = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if kind == PEFT else (MANIFEST,)
    if missing := [name for name in expected if name not in names]:
        raise _refused(f"it lacks {missing[0]}; add it")
    for name in names:
        beside = name in _BESIDE if kind == PEFT else _ARTIFACT.fullmatch(name) is not None
        if name not in expected and not beside:
            raise _refused(f"{name[:200]!r} has no place in it; leave it out")
        if archive.size(name) > (most := _LARGEST.get(name, limit)):
            raise _refused(f"{name} has more than {most} bytes")
    return Upload(archive, kind)


def check_base(history: History, bases: Mapping[str, Base]) -> Base:
    """The base that an archive's versions stand on.

    Raises:
        UnprocessableRequest: this service has another base of that name, or none.
    """
    ref = history.head.base
    base = bases.get(ref.name)
    if base is None:
        raise _refused(
            f"its versions stand on base {ref.name!r} with digest {ref.digest}, and this service"
            f" has {', '.join(bases)}; add that base to ERRATA_BASES under the name {ref.name!r}"
        )
    if base.digest != ref.digest:
        raise _refused(
            f"its versions stand on base {ref.name!r} with digest {ref.digest}; the base of that"
            f" name here has digest {base.digest}: other weights, on which its deltas mean nothing"
        )
    return base


def check_signed(history: History, trust: Trust) -> None:
    """Look at the signatures of trusted keys; those of others are kept as they are.

    Raises:
        UnprocessableRequest: one is of other bytes, or the head has none and needs one.
    """
    for manifest in history.manifests:
        for signature in history.signatures.get(manifest.id, ()):
            if signature.keyid in trust.keys and not trust.counts(manifest, signature):
                raise _refused(
                    f"the signature by {signature.keyid} of version {manifest.id} is not of this"
                    " version; export it again"
                )
    head = history.head
    if not trust.accepts(head, history.signatures.get(head.id, ())):
        raise UnprocessableRequest(
            f"file: no key that this service trusts signed version {head.id}, and it asks for that"
            " (ERRATA_REQUIRE_SIGNATURES); have it signed where it was made, and export it again",
            param="file",
            code="archive_untrusted",
        )


def values_in(data: bytes) -> int:
    """How many values JSON text has, or more: what may begin one is counted within texts too."""
    return 1 + sum(data.count(sign) for sign in (b",", b"[", b"{"))


def _history(data: bytes) -> History:
    if values_in(data) > MANIFEST_VALUES:
        raise _refused(f"{MANIFEST} has more than {MANIFEST_VALUES} values")
    try:
        body = json.loads(data, parse_constant=_no_constant)
        entries = _fields(body)["versions"]
        if len(entries) > VERSIONS:
            raise ValueError(f"it names {len(entries)} versions, at most {VERSIONS} are read")
        manifests = tuple(_manifest(entry) for entry in entries)
        ids = [manifest.id for manifest in manifests]
        signatures = _signatures(body.get("signatures", {}), set(ids))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _refused(f"{MANIFEST} is damaged: {error!r:.200}") from None
    if body.get("format") != FORMAT:
        raise _refused(f"{MANIFEST} has format {body.get('format')!r}; {FORMAT!r} is read")
    if not ids or len(set(ids)) != len(ids) or body.get("version") != ids[-1]:
        raise _refused(f"{MANIFEST} is damaged: its last version is not the one that it is of")
    if len({manifest.base for manifest in manifests}) != 1:
        raise _refused(f"{MANIFEST} names several bases")
    known: dict[str, VersionManifest] = {}
    for manifest in manifests:
        if strange := next((parent for parent in manifest.parents if parent not in known), None):
            raise _refused(
                f"{MANIFEST}: {manifest.id} comes from {strange}, which does not precede it"
            )
        if manifest.recipe.get("kind") == FLATTEN:
            beneath = [known[parent].stack for parent in manifest.parents]
            if len(manifest.stack) != 1 or len(beneath) != 1 or len(beneath[0]) < 2:
                raise _refused(
                    f"{MANIFEST}: {manifest.id} is no flatten: that makes one delta of the several"
                    " of one parent"
                )
        known[manifest.id] = manifest
    return History(manifests, signatures)


def _signatures(body: Any, ids: Set[str]) -> dict[str, tuple[Signature, ...]]:
    found = {}
    for version_id, made in _fields(body).items():
        if version_id not in ids or not isinstance(made, list) or len(made) > SIGNATURES:
            raise ValueError(f"the signatures of {version_id!r:.80} have no place in it")
        found[version_id] = tuple(Signature.from_json(signature) for signature in made)
    return found


def _manifest(entry: Any) -> VersionManifest:
    fields, base = _fields(entry), _fields(entry["base"])
    if fields.keys() != {"base", "stack", "parents", "recipe"} or base.keys() != {"name", "digest"}:
        raise ValueError("a version has other fields than base, stack, parents and recipe")
    _matching([base["digest"]], _DIGEST)
    recipe = _fields(fields["recipe"])
    if recipe.get("kind") in RERUN:
        _check_recipe(recipe, fields["stack"])
    if not isinstance(base["name"], str):
        raise TypeError("a base's name is no text")
    return VersionManifest(
        BaseRef(base["name"], base["digest"]),
        _matching(fields["stack"], _DIGEST),
        _matching(fields["parents"], _VERSION),
        recipe,
    )


def _check_recipe(recipe: Mapping[str, Any], stack: Any) -> None:
    """Refuse a recipe that could not be read, or run again, later on."""
    kind = recipe["kind"]
    try:
        (_Edit if kind == "edit" else _Tuning).model_validate(recipe)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in (kind, *first["loc"]))
        raise ValueError(f"{place}: {first['msg']}") from None
    if not stack:
        raise ValueError(f"{kind}: it made no delta")


def _fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an object is expected")
    return value


def _matching(values: Any, pattern: re.Pattern[str]) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError("a list is expected")
    for value in values:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(f"{value!r:.80} is no digest")
    return tuple(values)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _refused(why: str) -> UnprocessableRequest:
    return UnprocessableRequest(f"file: {why}", param="file", code="archive_refused")
