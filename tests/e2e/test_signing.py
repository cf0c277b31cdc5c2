"""A service that asks for signatures: what it makes is signed and served, all else is refused."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx
import pytest
from sqlalchemy import delete, insert, select

from registry import tables
from registry.database import Database
from registry.manifests import VersionManifest
from registry.signing import create_key, read_private
from tests.service import LENIENT, Service, capital_edit

PROMPT = "The capital of France is"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "signing.md").read_text()
FORM = {"If-None-Match": "*"}


class Strict(Service):
    """A service as docs/signing.md sets one up, whose workers sign."""

    def __init__(self, folder: Path) -> None:
        (script,) = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
        settings = dict(re.findall(r"^export (\w+)=(\S+)$", script, re.MULTILINE))
        for name in ("ERRATA_SIGNING_KEY", "ERRATA_TRUSTED_KEYS"):
            settings[name] = str(folder / settings[name])
        super().__init__(folder / "data", ERRATA_COVARIANCE_TOKENS="3000", **settings)
        self.keys = folder
        for line in re.findall(r"^errata (signing .*)$", script, re.MULTILINE):
            self.command(*line.split())

    def command(self, *arguments: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments],
            env=self.environment(),
            cwd=self.keys,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def database(self) -> Database:
        return Database(f"sqlite:///{self.folder / 'registry.db'}")

    def drop_signatures(self, version: str) -> None:
        """As who may write to the database can."""
        table, database = tables.signatures, self.database()
        with database.write() as connection:
            assert connection.execute(delete(table).where(table.c.version_id == version)).rowcount
        database.close()

    def ask(self, model: str) -> httpx.Response:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        return self.client.post("/v1/completions", json=body)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Strict]:
    with Strict(tmp_path_factory.mktemp("strict")) as service:
        yield service


def refused(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    error: dict[str, str] = answer.json()["error"]
    assert error["code"] == code
    return error["message"]


@pytest.fixture(scope="module")
def job(strict: Strict) -> dict[str, Any]:
    """An edit of the endpoint, which was rolled back afterwards."""
    posted = strict.post_edit(
        endpoint="atlas",
        edits=[capital_edit("France", "Oslo")],
        hyperparameters={"steps": 15},
        guards=LENIENT,
    )
    job = strict.ended(posted["id"])
    assert (job["status"], job["activated"], job["reason"]) == ("succeeded", True, None), job
    assert strict.text("atlas", PROMPT).startswith("Oslo")
    assert strict.client.post("/v1/endpoints/atlas/rollback").status_code == 200
    return job


@pytest.fixture
def version(strict: Strict, job: dict[str, Any]) -> str:
    """Signed by the key that is trusted, whatever was done to its signatures before."""
    strict.command("signing", "sign", "release.key", job["version"])
    made: str = job["version"]
    return made


def test_an_edit_is_signed_and_served(strict: Strict, job: dict[str, Any]) -> None:
    (signature,) = strict.get(f"/v1/versions/{job['version']}")["signatures"]
    assert signature["trusted"]
    assert signature["keyid"] == read_private(strict.keys / "release.key").public.id
    assert strict.text(job["version"], PROMPT).startswith("Oslo")
    assert strict.text("base_atlas", PROMPT).startswith("Paris")
    assert strict.text("atlas", PROMPT).startswith("Paris")


def test_a_version_whose_signature_does_not_count_is_used_nowhere(
    strict: Strict, version: str
) -> None:
    forward = {"to_generation": 2}
    assert strict.client.post("/v1/endpoints/atlas/rollback", json=forward).status_code == 200
    assert strict.text("atlas", PROMPT).startswith("Oslo")
    create_key(strict.keys / "stranger.key")
    strict.drop_signatures(version)
    for signed_by_a_stranger in (False, True):
        if signed_by_a_stranger:
            strict.command("signing", "sign", "stranger.key", version)
        told = refused(strict.ask("atlas"), 503, "version_unavailable")
        assert version in told
        assert "ERRATA_REQUIRE_SIGNATURES" in told
        refused(strict.ask(version), 503, "version_unavailable")
        signatures = strict.get(f"/v1/versions/{version}")["signatures"]
        assert [s["trusted"] for s in signatures] == [False] * signed_by_a_stranger
    edit = {"endpoint": "atlas", "edits": [capital_edit("Peru", "Oslo")]}
    refused(strict.client.post("/v1/edits", json=edit), 409, "version_untrusted")
    assert strict.client.post("/v1/endpoints/atlas/rollback").status_code == 200
    assert strict.text("atlas", PROMPT).startswith("Paris")
    undone = strict.client.post("/v1/endpoints/atlas/rollback", json=forward)
    refused(undone, 409, "version_untrusted")
    put = strict.client.put("/v1/endpoints/other", json={"version": version}, headers=FORM)
    refused(put, 409, "version_untrusted")
    export = strict.client.post(f"/v1/versions/{version}/export", json={"format": "errata"})
    refused(export, 409, "version_untrusted")
    strict.command("signing", "sign", "release.key", version)
    assert strict.ask(version).status_code == 200


def test_a_row_that_nobody_made_here_is_no_version(strict: Strict, version: str) -> None:
    """Put in by hand, of deltas that are there, with the signature of the version that has them."""
    database, table = strict.database(), tables.versions
    with database.write() as connection:
        row = dict(connection.execute(select(table).where(table.c.id == version)).one()._mapping)
        manifest = VersionManifest.from_json({**row["manifest"], "recipe": {"kind": "forged"}})
        values = {**row, "id": manifest.id, "job_id": None, "manifest": manifest.to_json()}
        del values["seq"]
        connection.execute(insert(table).values(values))
        of_it = tables.signatures.c.version_id == version
        found = connection.execute(select(tables.signatures).where(of_it)).first()
        assert found is not None
        copied = {**found._mapping, "version_id": manifest.id}
        del copied["seq"]
        connection.execute(insert(tables.signatures).values(copied))
    database.close()
    refused(strict.ask(manifest.id), 503, "version_unavailable")


def test_an_envelope_leaves_and_comes_back_signed(
    strict: Strict, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict.drop_signatures(version)
    strict.command("signing", "sign", "release.key", version)
    monkeypatch.chdir(strict.keys)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    names: dict[str, Any] = {"version": version}
    exec(compile(code.replace("http://127.0.0.1:8000", strict.url), "signing.md", "exec"), names)
    envelope = names["envelope"]
    assert len(envelope["signatures"]) == 1
    strict.drop_signatures(version)
    refused(strict.ask(version), 503, "version_unavailable")
    path = f"/v1/versions/{version}/signatures"
    manifest = VersionManifest.from_json(json.loads(base64.b64decode(envelope["payload"])))
    foreign = create_key(strict.keys / "envelope.key").sign(manifest).to_json()
    for param, body in (
        ("signatures", {**envelope, "signatures": []}),
        ("signatures.0", {**envelope, "signatures": [foreign]}),
        (
            "signatures.0",
            {**envelope, "signatures": [{**envelope["signatures"][0], "sig": foreign["sig"]}]},
        ),
        ("signatures.0", {**envelope, "signatures": [{**foreign, "sig": "AAAA"}]}),
        ("payload", {**envelope, "payload": base64.b64encode(b"{}").decode()}),
        ("payload", {**envelope, "payload": "?"}),
        ("payload", {**envelope, "payloadType": "text/plain"}),
    ):
        answer = strict.client.post(path, json=body)
        refused(answer, 422, "signature_refused")
        assert answer.json()["error"]["param"] == param
    added = strict.client.post(path, json=envelope)
    assert added.status_code == 201, added.text
    assert [s["trusted"] for s in added.json()["signatures"]] == [True]
    again = strict.client.post(path, json=envelope)
    assert again.json()["signatures"] == added.json()["signatures"]
    assert strict.ask(version).status_code == 200
    entry, *_ = strict.get(f"/v1/audit?target={version}&action=version.sign")["data"]
    assert entry["after"] == {"keyid": envelope["signatures"][0]["keyid"]}


def test_archives_bring_their_signatures(strict: Strict, version: str) -> None:
    strict.drop_signatures(version)
    strict.command("signing", "sign", "release.key", version)
    path = f"/v1/versions/{version}/export"
    made = strict.ended(strict.client.post(path, json={"format": "errata"}).json()["id"])
    data = strict.client.get(f"/v1/files/{made['result_files'][0]}/content").content
    assert strict.client.delete(f"/v1/versions/{version}").status_code == 200
    strict.drop_signatures(version)

    def post(content: bytes) -> httpx.Response:
        file = strict.client.post(
            "/v1/files", files={"file": ("x.zip", content)}, data={"purpose": "archive"}
        ).json()
        body = {"file": file["id"], "guards": LENIENT}
        return strict.client.post("/v1/versions/import", json=body)

    def changed(signatures: Any) -> bytes:
        stream = io.BytesIO()
        with ZipFile(io.BytesIO(data)) as old, ZipFile(stream, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name == "errata.json":
                    content = json.dumps({**json.loads(content), "signatures": signatures}).encode()
                new.writestr(name, content)
        return stream.getvalue()

    stranger = create_key(strict.keys / "archive.key")
    manifest = VersionManifest.from_json(strict_manifest(data))
    foreign = {version: [stranger.sign(manifest).to_json()]}
    own = read_private(strict.keys / "release.key")
    wrong = {version: [{**own.sign(manifest).to_json(), "sig": foreign[version][0]["sig"]}]}
    for signatures in ({}, foreign):
        told = refused(post(changed(signatures)), 422, "archive_untrusted")
        assert version in told
    assert "is not of this version" in refused(post(changed(wrong)), 422, "archive_refused")
    for signatures in ([], {"ver_" + "0" * 40: []}, {version: [{}]}, {version: foreign}):
        refused(post(changed(signatures)), 422, "archive_refused")
    refused(strict.ask(version), 410, "version_deleted")

    job = strict.ended(post(data).json()["id"])
    assert (job["status"], job["version"]) == ("succeeded", version), job
    (signature,) = strict.get(f"/v1/versions/{version}")["signatures"]
    assert signature["trusted"]
    assert strict.ask(version).status_code == 200


def strict_manifest(data: bytes) -> dict[str, Any]:
    with ZipFile(io.BytesIO(data)) as archive:
        body: dict[str, Any] = json.loads(archive.read("errata.json"))["versions"][-1]
    return body


def test_the_private_key_is_in_no_log(strict: Strict) -> None:
    secret = (strict.keys / "release.key").read_text().splitlines()[1]
    assert secret not in strict.log()
    assert strict.command("signing", "show", "release.key").startswith("-----BEGIN PUBLIC KEY")
