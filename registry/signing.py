"""Signing keys (Ed25519, in PEM files) and whom this process trusts.

A signature is of a version's manifest, whose digest is the version's id and which names every delta
by digest. A version with an empty stack needs none: it computes what its base does, and the base's
files are compared with the digest that the manifest names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from registry.dsse import Signature, pae
from registry.errors import InvalidRequest
from registry.manifests import VersionManifest, canonical_json, sha256
from registry.settings import Settings

PAYLOAD_TYPE = "application/vnd.errata.version+json"
PUBLIC_SUFFIX = ".pub"
_WORLD = 0o007


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are compared with."""

    raw: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """``pub_`` and the first 160 bits of the digest of the key (DER, SubjectPublicKeyInfo)."""
        der = _public(self.raw).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return "pub_" + sha256(der)[:40]

    def to_pem(self) -> str:
        key = _public(self.raw)
        return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def signed(self, manifest: VersionManifest, sig: bytes) -> bool:
        """Whether this key made that signature of a manifest."""
        return _verified(self.raw, payload_of(manifest), sig)


@dataclass(frozen=True)
class SigningKey:
    """A private key; nothing that is printed of it tells what it is."""

    _key: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
        return PublicKey(self._key.public_key().public_bytes_raw())

    def sign(self, manifest: VersionManifest) -> Signature:
        """By Ed25519 (RFC 8032): the same key and manifest give the same bytes."""
        return Signature(self.public.id, self._key.sign(pae(PAYLOAD_TYPE, payload_of(manifest))))


@dataclass(frozen=True)
class Trust:
    """Whose signatures count here.

    Attributes:
        keys: the trusted keys by their ids.
        required: refuse versions that none of them signed.
    """

    keys: Mapping[str, PublicKey] = field(default_factory=dict)
    required: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Trust:
        """As ERRATA_TRUSTED_KEYS and ERRATA_REQUIRE_SIGNATURES say.

        Raises:
            InvalidRequest: a file is no public key, or signatures are required of nobody.
        """
        named = [Path(part.strip()) for part in settings.trusted_keys.split(",") if part.strip()]
        keys = {key.id: key for path in named for key in _public_keys(path)}
        if settings.require_signatures and not keys:
            raise InvalidRequest(
                "ERRATA_REQUIRE_SIGNATURES is set and ERRATA_TRUSTED_KEYS names no key: every"
                " version would be refused; `errata signing create FILE` makes a pair of keys",
                param="ERRATA_TRUSTED_KEYS",
            )
        return cls(keys, settings.require_signatures)

    def counts(self, manifest: VersionManifest, signature: Signature) -> bool:
        """Whether a signature is a trusted key's, and of that manifest."""
        key = self.keys.get(signature.keyid)
        return key is not None and key.signed(manifest, signature.sig)

    def accepts(self, manifest: VersionManifest, signatures: Iterable[Signature]) -> bool:
        """Whether a version may be used here."""
        if not self.required or not manifest.stack:
            return True
        return any(self.counts(manifest, signature) for signature in signatures)


def payload_of(manifest: VersionManifest) -> bytes:
    """What is signed of a version: the bytes that its id is the digest of."""
    return canonical_json(manifest.to_json())


def signer_of(settings: Settings) -> SigningKey | None:
    """The key of ERRATA_SIGNING_KEY, if one is named.

    Raises:
        InvalidRequest: the file is none; or signatures are required and this key's would not count.
    """
    if settings.signing_key is None:
        return None
    key = read_private(settings.signing_key)
    trust = Trust.of(settings)
    if trust.required and key.public.id not in trust.keys:
        raise InvalidRequest(
            f"ERRATA_SIGNING_KEY {settings.signing_key}: its public key {key.public.id} is not"
            " among ERRATA_TRUSTED_KEYS, so that what it signs would be refused; add its public key"
            " there (`errata signing show FILE` prints it)",
            param="ERRATA_SIGNING_KEY",
        )
    return key


def create_key(file: Path) -> SigningKey:
    """A new private key in a file that only its owner reads, and ``<file>.pub`` beside it.

    Raises:
        InvalidRequest: one of the files exists, or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    made = SigningKey(key)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write_new(file, private, 0o600)
    try:
        _write_new(public_file(file), made.public.to_pem().encode(), 0o644)
    except InvalidRequest:
        file.unlink()
        raise
    return made


def public_file(file: Path) -> Path:
    """Where the public key of a private one lies."""
    return file.with_name(file.name + PUBLIC_SUFFIX)


def read_private(file: Path) -> SigningKey:
    """A private key from a PEM file (PKCS 8, without a passphrase).

    Raises:
        InvalidRequest: it cannot be read, everybody could read it, or it holds something else.
    """
    data = _read(file)
    if file.stat().st_mode & _WORLD:
        raise InvalidRequest(f"{file}: everybody may read this private key; chmod 600 {file}")
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _no_key(file, "private", "`errata signing create FILE` makes one") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(file, "private", "`errata signing create FILE` makes one")
    return SigningKey(key)


def read_public(file: Path) -> PublicKey:
    """A public key from a PEM file. Raises InvalidRequest: it cannot be read, or is none."""
    cure = "`errata signing show FILE` prints the public key of a private one"
    try:
        key = load_pem_public_key(_read(file))
    except (ValueError, UnsupportedAlgorithm):
        raise _no_key(file, "public", cure) from None
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(file, "public", cure)
    return PublicKey(key.public_bytes_raw())


def read_key(file: Path) -> PublicKey:
    """The public key in a file of either kind. Raises InvalidRequest as ``read_private``."""
    return read_private(file).public if b" PRIVATE " in _read(file) else read_public(file)


def _public_keys(path: Path) -> list[PublicKey]:
    """The key in a file, or those in a folder's ``*.pub`` and ``*.pem``."""
    if not path.is_dir():
        return [read_public(path)]
    files = (file for file in path.iterdir() if file.suffix in (PUBLIC_SUFFIX, ".pem"))
    return [read_public(file) for file in sorted(files)]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{file}: the key cannot be read: {error.strerror}") from None


def _write_new(file: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise InvalidRequest(
            f"{file}: the key cannot be written: {error.strerror}; name a file that does not exist"
        ) from None
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)


def _no_key(file: Path, kind: str, cure: str) -> InvalidRequest:
    return InvalidRequest(f"{file}: it holds no {kind} Ed25519 key in PEM, unencrypted; {cure}")


@cache
def _public(raw: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(raw)


@lru_cache(4096)
def _verified(raw: bytes, payload: bytes, sig: bytes) -> bool:
    """Kept, since every request for a version asks the same."""
    try:
        _public(raw).verify(sig, pae(PAYLOAD_TYPE, payload))
    except InvalidSignature:
        return False
    return True
