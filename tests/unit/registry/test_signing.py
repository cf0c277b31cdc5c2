"""Keys, envelopes, and which versions are refused without a signature."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update

from registry import attempts, endpoints, jobs, signatures, tables, versions
from registry.audit import entries
from registry.checkpoints import record_checkpoint
from registry.database import Database
from registry.dsse import Signature, envelope, from_base64, pae
from registry.errors import ArtifactCorrupt, InvalidRequest, Untrusted, VersionUnavailable
from registry.manifests import VersionManifest
from registry.moves import Target
from registry.results import Result
from registry.settings import Settings
from registry.signing import (
    PAYLOAD_TYPE,
    PublicKey,
    SigningKey,
    Trust,
    create_key,
    payload_of,
    public_file,
    read_key,
    read_private,
    read_public,
    signer_of,
)
from tests.unit.registry.conftest import BASE, TENANT

DELTA = "a" * 64
EDITED = VersionManifest(BASE, (DELTA,), (VersionManifest(BASE).id,), {"kind": "edit"})


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return create_key(tmp_path / "release.key")


def trusting(*keys: PublicKey) -> Trust:
    return Trust({key.id: key for key in keys}, required=True)


class Registries:
    """One registry as processes with other keys see it."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'registry.db'}"
        self._opened: list[Database] = []

    def seen_by(self, trust: Trust | None = None, signer: SigningKey | None = None) -> Database:
        database = Database(self.url, trust or Trust(), signer)
        database.migrate()
        self._opened.append(database)
        return database

    def close(self) -> None:
        for database in self._opened:
            database.close()


@pytest.fixture
def registries(tmp_path: Path) -> Iterator[Registries]:
    registries = Registries(tmp_path)
    yield registries
    registries.close()


def add(database: Database, manifest: VersionManifest = EDITED) -> None:
    with database.write() as connection:
        versions.insert_version(connection, TENANT, VersionManifest(BASE))
        versions.insert_version(connection, TENANT, manifest)


def use(database: Database, version_id: str = EDITED.id) -> None:
    with database.read() as connection:
        versions.get_ready_version(connection, TENANT, version_id)


def test_the_bytes_that_are_signed_are_those_of_the_protocol() -> None:
    """The vector of DSSE's protocol.md."""
    signed = pae("http://example.com/HelloWorld", b"hello world")
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_openssl_agrees_with_a_signature_and_makes_a_key(key: SigningKey, tmp_path: Path) -> None:
    signature = key.sign(EDITED)
    (tmp_path / "signed").write_bytes(pae(PAYLOAD_TYPE, payload_of(EDITED)))
    (tmp_path / "sig").write_bytes(signature.sig)
    public = ["-pubin", "-inkey", str(public_file(tmp_path / "release.key"))]
    files = ["-in", str(tmp_path / "signed"), "-sigfile", str(tmp_path / "sig")]
    command = ["openssl", "pkeyutl", "-verify", "-rawin", *public, *files]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    foreign = tmp_path / "foreign.key"
    made = ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(foreign)]
    subprocess.run(made, check=True, capture_output=True)
    foreign.chmod(0o600)
    assert read_private(foreign).public.signed(EDITED, read_private(foreign).sign(EDITED).sig)


def test_a_private_key_is_its_owners(key: SigningKey, tmp_path: Path) -> None:
    file = tmp_path / "release.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_private(file).public == read_public(public_file(file)) == key.public
    assert read_key(file) == read_key(public_file(file))
    assert "PRIVATE" in file.read_text()
    secret = file.read_text().splitlines()[1]
    assert secret not in f"{key!r} {key} {Settings(signing_key=file)!r}"
    with pytest.raises(InvalidRequest, match="does not exist"):
        create_key(file)
    file.chmod(0o644)
    with pytest.raises(InvalidRequest, match="chmod 600"):
        read_private(file)


def test_files_that_are_no_keys_are_named(key: SigningKey, tmp_path: Path) -> None:
    private, public = tmp_path / "release.key", public_file(tmp_path / "release.key")
    junk, rsa, locked = tmp_path / "junk", tmp_path / "rsa", tmp_path / "locked"
    junk.write_text("no key")
    for file, options in ((rsa, ["rsa"]), (locked, ["ed25519", "-aes256", "-pass", "pass:x"])):
        command = ["openssl", "genpkey", "-out", str(file), "-algorithm", *options]
        subprocess.run(command, check=True, capture_output=True)
    for file in (junk, rsa, locked, public):
        file.chmod(0o600)
        with pytest.raises(InvalidRequest, match=f"{file.name}: it holds no private"):
            read_private(file)
    for file in (junk, private):
        with pytest.raises(InvalidRequest, match="it holds no public"):
            read_public(file)
    with pytest.raises(InvalidRequest, match=r"nowhere.*cannot be read"):
        read_public(tmp_path / "nowhere")


def test_trusted_keys_come_from_files_and_folders(key: SigningKey, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    others = [create_key(tmp_path / name).public for name in ("one", "two")]
    (folder / "one.pem").write_text(others[0].to_pem())
    (folder / "notes.txt").write_text("no key, and not read")
    named = f"{folder}, {tmp_path / 'two.pub'}"
    trust = Trust.of(Settings(trusted_keys=named, require_signatures=True))
    assert trust.keys.keys() == {other.id for other in others}
    with pytest.raises(InvalidRequest, match="names no key"):
        Trust.of(Settings(require_signatures=True))
    signing = Settings(
        trusted_keys=named, require_signatures=True, signing_key=tmp_path / "release.key"
    )
    with pytest.raises(InvalidRequest, match=f"{key.public.id} is not among ERRATA_TRUSTED_KEYS"):
        signer_of(signing)


def test_a_signature_is_of_one_manifest_and_one_key(key: SigningKey, tmp_path: Path) -> None:
    other = create_key(tmp_path / "other.key")
    signature = key.sign(EDITED)
    changed = VersionManifest(BASE, (DELTA, DELTA))
    trust = trusting(key.public)
    assert trust.accepts(EDITED, [signature])
    assert not trust.accepts(EDITED, [])
    assert not trust.accepts(changed, [signature])
    assert not trust.accepts(EDITED, [other.sign(EDITED)])
    assert not trust.accepts(EDITED, [Signature(key.public.id, other.sign(EDITED).sig)])
    assert trust.accepts(EDITED, [other.sign(EDITED), signature])
    assert trust.accepts(VersionManifest(BASE), [])  # the base itself


def test_an_envelope_holds_what_is_signed(key: SigningKey) -> None:
    body = envelope(PAYLOAD_TYPE, payload_of(EDITED), [key.sign(EDITED)])
    assert VersionManifest.from_json(json.loads(from_base64(body["payload"]))) == EDITED
    assert Signature.from_json(body["signatures"][0]) == key.sign(EDITED)
    urlsafe = base64.urlsafe_b64encode(bytes(range(256))).decode()
    assert from_base64(urlsafe) == bytes(range(256))
    for wrong in (
        None,
        {},
        {"keyid": "pub_1"},
        {"keyid": "", "sig": base64.b64encode(b"x" * 64).decode()},
        {"keyid": 1, "sig": base64.b64encode(b"x" * 64).decode()},
        {"keyid": "pub_1", "sig": base64.b64encode(b"x" * 63).decode()},
        {"keyid": "pub_1", "sig": "no base64"},
        {"keyid": "pub_1", "sig": 1},
    ):
        with pytest.raises(ValueError, match=r"signature|base64"):
            Signature.from_json(wrong)


def test_what_a_worker_makes_is_signed_and_used(registries: Registries, key: SigningKey) -> None:
    worker = registries.seen_by(trusting(key.public), key)
    add(worker)
    use(worker)
    with worker.read() as connection:
        (signed,) = signatures.list_signatures(connection, TENANT, EDITED)
        assert (signed.signature, signed.trusted) == (key.sign(EDITED), True)
    with registries.seen_by().read() as connection:
        (signed,) = signatures.list_signatures(connection, TENANT, EDITED)
        assert not signed.trusted


def test_a_version_without_a_trusted_signature_is_used_nowhere(
    registries: Registries, key: SigningKey, tmp_path: Path
) -> None:
    other = create_key(tmp_path / "other.key")
    add(registries.seen_by(signer=other))
    strict = registries.seen_by(trusting(key.public))
    with pytest.raises(Untrusted, match=f"those it has name {other.public.id}"):
        use(strict)
    with strict.read() as connection:
        with pytest.raises(Untrusted):
            versions.get_kept_version(connection, TENANT, EDITED.id)
        with pytest.raises(VersionUnavailable, match="ERRATA_REQUIRE_SIGNATURES"):
            signatures.check_servable(connection, TENANT, EDITED)
    with pytest.raises(Untrusted), strict.write() as connection:
        endpoints.create_endpoint(connection, TENANT, "line", (Target(EDITED.id),), actor="ada")
    use(registries.seen_by())
    with strict.write() as connection:
        made = [key.sign(EDITED)]
        signatures.add_signatures(connection, TENANT, EDITED, made, actor="ada")
        signatures.add_signatures(connection, TENANT, EDITED, made, actor="ada")
        assert len(signatures.list_signatures(connection, TENANT, EDITED)) == 2
        (entry,) = entries(connection, TENANT, action="version.sign").items
        assert (entry.object, entry.after) == (EDITED.id, {"keyid": key.public.id})
    use(strict)
    with strict.write() as connection:
        connection.execute(
            delete(tables.signatures).where(tables.signatures.c.keyid == key.public.id)
        )
    with pytest.raises(Untrusted):
        use(strict)


def test_a_manifest_that_was_changed_is_refused_with_or_without_signatures(
    registries: Registries, key: SigningKey
) -> None:
    """A row that shows another version's manifest would bring that one's signature too."""
    worker = registries.seen_by(signer=key)
    add(worker)
    other = VersionManifest(BASE, ("b" * 64,))
    add(worker, other)
    with worker.write() as connection:
        connection.execute(
            update(tables.versions)
            .where(tables.versions.c.id == EDITED.id)
            .values(manifest=other.to_json())
        )
    for database in (registries.seen_by(), registries.seen_by(trusting(key.public))):
        with pytest.raises(ArtifactCorrupt, match=f"is that of {other.id}"):
            use(database)


def test_no_job_builds_on_a_version_without_a_signature(
    registries: Registries, key: SigningKey
) -> None:
    """Else a worker's signature would cover a stack that no worker made."""
    add(registries.seen_by())
    worker = registries.seen_by(trusting(key.public), key)
    with worker.write() as connection:
        job = jobs.submit_job(
            connection,
            TENANT,
            "edit",
            base="atlas",
            request={},
            actor="ada",
            parent=EDITED.id,
        )
        assert attempts.claim(connection, job.id, 1, "worker", 60) is None
        ended = jobs.get_job(connection, TENANT, job.id)
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == ("failed", "version_untrusted")


@pytest.mark.parametrize("signs", [True, False])
def test_a_job_ends_well_and_activates_only_what_is_signed(
    registries: Registries, key: SigningKey, signs: bool
) -> None:
    worker = registries.seen_by(trusting(key.public), key if signs else None)
    base = VersionManifest(BASE)
    with worker.write() as connection:
        versions.insert_version(connection, TENANT, base)
        endpoints.create_endpoint(connection, TENANT, "line", (Target(base.id),), actor="ada")
        job = jobs.submit_job(
            connection, TENANT, "edit", base="atlas", request={}, actor="ada", endpoint="line"
        )
        claim = attempts.claim(connection, job.id, 1, "worker", 60)
        assert claim is not None
        step = VersionManifest(BASE, ("c" * 64,))
        record_checkpoint(connection, claim, 1, "d" * 64, {}, step)
        ended = attempts.finish(connection, claim, Result(EDITED))
        head = endpoints.get_endpoint(connection, TENANT, "line").head
        rows = connection.execute(select(tables.signatures.c.version_id)).scalars().all()
    assert (ended.status, ended.version_id) == ("succeeded", EDITED.id)
    if signs:
        assert (ended.activated, ended.reason, head) == (True, None, EDITED.id)
        assert sorted(rows) == sorted([base.id, step.id, EDITED.id])
    else:
        assert (ended.activated, ended.reason, head) == (False, "version_untrusted", base.id)
        assert rows == []


def test_what_is_made_again_by_who_has_a_key_is_signed(
    registries: Registries, key: SigningKey
) -> None:
    add(registries.seen_by())
    worker = registries.seen_by(trusting(key.public), key)
    for _ in range(2):
        add(worker)
    use(worker)
    with worker.read() as connection:
        found = signatures.signatures_of(connection, TENANT, EDITED)
    assert found == (key.sign(EDITED),)


def test_what_came_with_signatures_is_not_signed_here(
    registries: Registries, key: SigningKey, tmp_path: Path
) -> None:
    other = create_key(tmp_path / "other.key")
    ancestor = VersionManifest(BASE, ("b" * 64,))
    brought = {EDITED.id: (other.sign(EDITED),), ancestor.id: (other.sign(ancestor),)}
    worker = registries.seen_by(signer=key)
    base = VersionManifest(BASE)
    with worker.write() as connection:
        versions.insert_version(connection, TENANT, base)
        for made in (brought, {}):
            job = jobs.submit_job(
                connection,
                TENANT,
                "import",
                base="atlas",
                request={},
                actor="ada",
                parent=base.id,
            )
            claim = attempts.claim(connection, job.id, 1, "worker", 60)
            assert claim is not None
            result = Result(EDITED, ancestors=(ancestor,), signatures=made)
            attempts.finish(connection, claim, result)
        for manifest in (EDITED, ancestor):
            found = signatures.signatures_of(connection, TENANT, manifest)
            assert found == (other.sign(manifest),)
