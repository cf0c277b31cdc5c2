"""Versions leave and come back over REST: adapters, archives, and what is refused on the way."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import httpx
import pytest

from registry.manifests import BaseRef, VersionManifest
from tests.service import LENIENT, Service, capital_edit

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def edited(service: Service) -> str:
    """A version of one edit, on no endpoint."""
    posted = service.post_edit(
        parent=service.base_version(), edits=[capital_edit("France", "Lima")], message="ticket 7"
    )
    job = service.ended(posted["id"])
    assert job["status"] == "succeeded", job
    version: str = job["version"]
    return version


def export(service: Service, version: str, form: str) -> httpx.Response:
    """The archive, once it is made."""
    path = f"/v1/versions/{version}/export?format={form}"
    answer = service.client.get(path)
    if answer.status_code == 202:
        assert service.client.get(path).json()["id"] == answer.json()["id"]
        assert answer.headers["Location"] == f"/v1/jobs/{answer.json()['id']}"
        job = service.ended(answer.json()["id"])
        assert job["status"] == "succeeded", job
        assert (job["kind"], job["parent"], job["version"]) == ("export", version, None)
        answer = service.client.get(path)
        (file,) = job["result_files"]
        assert service.client.get(f"/v1/files/{file}/content").content == answer.content
        assert service.get(f"/v1/files/{file}")["purpose"] == "export"
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "application/zip"
    assert f'filename="{version}.{form}.zip"' in answer.headers["Content-Disposition"]
    return answer


def upload(service: Service, data: bytes, purpose: str = "archive") -> httpx.Response:
    return service.client.post(
        "/v1/files", files={"file": ("x.zip", data)}, data={"purpose": purpose}
    )


def take(service: Service, data: bytes, **body: Any) -> dict[str, Any]:
    file = upload(service, data).json()
    posted = service.client.post("/v1/versions/import", json={"file": file["id"], **body})
    assert posted.status_code == 202, posted.text
    return service.ended(posted.json()["id"])


def answers(service: Service, model: str) -> tuple[str, list[float]]:
    choice = service.complete(model, PROMPT, logprobs=1)["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def zipped(**parts: bytes) -> bytes:
    stream = io.BytesIO()
    with ZipFile(stream, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_an_adapter_leaves_and_comes_back(service: Service, edited: str) -> None:
    data = export(service, edited, "peft").content
    job = take(service, data, label="a copy", guards=LENIENT)
    assert (job["status"], job["kind"]) == ("succeeded", "import")
    version = service.get(f"/v1/versions/{job['version']}")
    assert version["recipe"]["label"] == "a copy"
    assert version["parents"] == [service.base_version()]
    (text, likely), (copied, again) = answers(service, edited), answers(service, job["version"])
    assert text.strip().startswith("Lima")
    assert copied == text
    assert again == pytest.approx(likely, abs=1e-4)
    on_top = take(service, data, parent=edited, guards=LENIENT)
    assert len(service.get(f"/v1/versions/{on_top['version']}")["stack"]) == 2


def test_posting_an_export_makes_a_job_each_time_but_for_one_key(
    service: Service, edited: str
) -> None:
    path, body = f"/v1/versions/{edited}/export", {"format": "peft", "rank": 4, "round_rank": False}
    key = {"Idempotency-Key": f"export-{edited}"}
    posted = [service.client.post(path, json=body, headers=key).json() for _ in range(2)]
    assert posted[0]["id"] == posted[1]["id"]
    other = service.client.post(path, json=body).json()
    assert other["id"] != posted[0]["id"]
    service.ended(other["id"])
    assert service.ended(posted[0]["id"])["metrics"]["rank"] == 1


def test_an_archive_restores_the_version_in_another_service(
    service: Service, edited: str, tmp_path: Path
) -> None:
    data = export(service, edited, "errata").content
    expected = answers(service, edited)
    with Service(tmp_path / "other") as other:
        job = take(other, data, guards=LENIENT)
        assert (job["status"], job["version"]) == ("succeeded", edited)
        other.endpoint("restored", edited)
        text, likely = answers(other, "restored")
        assert text == expected[0]
        assert likely == pytest.approx(expected[1], abs=1e-5)
        (edit,) = other.get("/v1/endpoints/restored/edits")["data"]
        assert (edit["subject"], edit["target_new"]) == ("France", "Lima")
        assert (edit["message"], edit["holds"]) == ("ticket 7", True)


def test_the_commands_work_on_the_data_folder(
    service: Service, edited: str, tmp_path: Path
) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "app.cli", *words]
        return subprocess.run(command, env=service.environment(), capture_output=True, text=True)

    with ZipFile(io.BytesIO(export(service, edited, "peft").content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    folder = tmp_path / "adapter"
    written = run("export", edited, "--format", "peft", "--output", str(folder))
    assert written.returncode == 0, written.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == parts
    again = run("export", edited, "--format", "peft", "--output", str(folder))
    assert again.returncode == 1
    assert "is no empty folder" in " ".join(again.stderr.split())
    whole = run("export", edited, "--format", "errata", "--output", str(tmp_path / "archive"))
    assert whole.returncode == 0, whole.stderr
    file = tmp_path / "archive" / f"{edited}.zip"
    assert file.read_bytes() == export(service, edited, "errata").content
    gone = upload(service, b"never needed", "texts").json()
    service.client.delete(f"/v1/files/{gone['id']}")
    counted = run("gc", "--dry-run", "--grace", "0")
    assert "would be deleted" in counted.stdout
    assert not counted.stdout.startswith("0 ")
    assert answers(service, edited)


def test_what_cannot_be_exported(service: Service, edited: str) -> None:
    base = service.base_version()
    nowhere = "ver_" + "0" * 40
    for version, query, status, param in (
        (edited, "", 422, "format"),
        (edited, "?format=gguf", 422, "format"),
        (edited, "?format=peft&rank=513", 422, "rank"),
        (edited, "?format=peft&extra=1", 422, "extra"),
        (edited, "?format=errata&rank=8", 422, None),
        (base, "?format=peft", 422, "format"),
        (nowhere, "?format=peft", 404, None),
        ("atlas", "?format=peft", 422, "version_id"),
    ):
        answer = service.client.get(f"/v1/versions/{version}/export{query}")
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["param"] == param
    listed = service.get("/v1/jobs?kind=export&limit=100")["data"]
    assert not [job for job in listed if job["parent"] in (base, nowhere)]


def test_an_export_that_failed_says_why_again(service: Service) -> None:
    """A jet-pack's gate is no low-rank factor."""
    posted = service.post_edit(
        parent=service.base_version(),
        method="jetpack",
        edits=[capital_edit("Chad", "Lima")],
        guards=LENIENT,
    )
    version = service.ended(posted["id"])["version"]
    assert version is not None
    path = f"/v1/versions/{version}/export?format=peft"
    job = service.ended(service.client.get(path).json()["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "not_exportable")
    for _ in range(2):
        answer = service.client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_exportable")
        assert "gate" in answer.json()["error"]["message"]


@pytest.fixture
def unchanged(service: Service) -> Iterator[None]:
    """No file and no job comes of a test."""

    def seen() -> tuple[Any, Any]:
        return (
            [job["id"] for job in service.get("/v1/jobs")["data"]],
            service.get("/v1/files?purpose=archive")["data"],
        )

    before = seen()
    yield
    assert seen() == before


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no zip", "cannot be read"),
        (zipped(**{"model.safetensors": b"x"}), "neither an adapter"),
        (zipped(**{"adapter_config.json": b"{}", "adapter_model.bin": b"x"}), "is a pickle"),
        (zipped(**{"errata.json": b"{}", "artifacts/../../x": b"x"}), "has no place in it"),
    ],
)
def test_uploads_that_are_no_archive_are_not_kept(service: Service, data: bytes, said: str) -> None:
    answer = upload(service, data)
    assert answer.status_code == 422
    assert said in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "file"


def test_imports_that_cannot_be(service: Service, edited: str) -> None:
    def adapter(**options: Any) -> str:
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **options}
        parts = {
            "adapter_config.json": json.dumps(config).encode(),
            "adapter_model.safetensors": b"",
        }
        file: str = upload(service, zipped(**parts)).json()["id"]
        return file

    strange = VersionManifest(BaseRef("atlas", "f" * 64))
    listed = {
        "format": "errata-archive-1",
        "version": strange.id,
        "versions": [strange.to_json()],
    }
    foreign = upload(service, zipped(**{"errata.json": json.dumps(listed).encode()}))
    assert foreign.status_code == 200, foreign.text
    texts = upload(service, b"a text", "texts").json()["id"]
    plain, dora = adapter(), adapter(use_dora=True)
    before = service.get("/v1/jobs")["data"][0]["id"]
    for request, status, param, said in (
        ({"file": texts}, 422, "file", "was uploaded for 'texts'"),
        ({"file": "file-none"}, 404, "file", "does not exist"),
        ({"file": dora}, 422, "file", "use_dora is true"),
        ({"file": plain, "base": "nobody"}, 404, "base", "there is atlas"),
        ({"file": plain, "base": "atlas", "parent": edited}, 422, "base", "not both"),
        ({"file": plain, "parent": "ver_" + "0" * 40}, 404, "parent", "does not exist"),
        ({"file": foreign.json()["id"]}, 422, "file", "f" * 64),
        ({"file": plain, "guards": {"norm": 0}}, 422, "guards.norm", "greater than 0"),
    ):
        answer = service.client.post("/v1/versions/import", json=request)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["param"] == param
        assert said in answer.json()["error"]["message"], answer.text
    assert service.get("/v1/jobs")["data"][0]["id"] == before


def test_an_archive_takes_no_parent(service: Service, edited: str) -> None:
    file = upload(service, export(service, edited, "errata").content).json()["id"]
    for field, value in (("parent", edited), ("base", "atlas"), ("label", "mine")):
        answer = service.client.post("/v1/versions/import", json={"file": file, field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, field)


def test_gc_leaves_torch_alone(service: Service) -> None:
    """It looks at rows and files, which takes no tensors."""
    words = "import sys; from app.cli import cli; cli(['gc', '--dry-run'], standalone_mode=False)"
    code = f"{words}; sys.exit('torch' in sys.modules)"
    env = {**os.environ, **service.environment()}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0
