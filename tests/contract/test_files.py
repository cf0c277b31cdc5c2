"""Files: uploaded, read at once, listed, fetched, named by jobs, and forgotten."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.service import SLOW, Service, capital_edit

EDITS = "\n".join(
    json.dumps(capital_edit(subject, "Lima")) for subject in ("France", "Japan")
).encode()


def upload(
    service: Service, data: bytes, purpose: str = "edits", name: str = "a.jsonl"
) -> httpx.Response:
    return service.client.post("/v1/files", files={"file": (name, data)}, data={"purpose": purpose})


def test_a_file_comes_back_as_it_went(service: Service) -> None:
    made = upload(service, EDITS, name="folder/my edits.jsonl").json()
    assert (made["object"], made["purpose"], made["status"]) == ("file", "edits", "processed")
    assert (made["bytes"], made["rows"], made["filename"]) == (len(EDITS), 2, "my edits.jsonl")
    assert service.get(f"/v1/files/{made['id']}") == made
    content = service.client.get(f"/v1/files/{made['id']}/content")
    assert content.content == EDITS
    assert content.headers["X-Content-Type-Options"] == "nosniff"
    other = upload(service, b"one text a line", "texts").json()
    listed = service.get("/v1/files?limit=1")
    assert ([file["id"] for file in listed["data"]], listed["has_more"]) == ([other["id"]], True)
    after = service.get(f"/v1/files?after={other['id']}&purpose=edits")["data"]
    assert after[0] == made
    deleted = service.client.delete(f"/v1/files/{made['id']}").json()
    assert deleted == {"id": made["id"], "object": "file", "deleted": True}
    for path in (made["id"], f"{made['id']}/content"):
        assert service.client.get(f"/v1/files/{path}").status_code == 404


@pytest.mark.parametrize(
    ("data", "purpose", "status", "param", "said"),
    [
        (EDITS + b'\n{"prompt": "x"}', "edits", 422, "file", "line 3: target_new must be a text"),
        (b"", "edits", 422, "file", "no rows"),
        (b"\x89PNG\xff", "texts", 422, "file", "line 1 is not UTF-8"),
        (EDITS, "fine-tune", 422, "file", "subject is not a known field here"),
        (EDITS, "magic", 422, "purpose", "edits, examples, texts, facts, suite"),
    ],
)
def test_what_cannot_be_read_is_refused_and_not_kept(
    service: Service, data: bytes, purpose: str, status: int, param: str, said: str
) -> None:
    before = service.get("/v1/files")["data"]
    response = upload(service, data, purpose)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert said in error["message"]
    assert service.get("/v1/files")["data"] == before


def test_an_upload_without_its_parts(service: Service) -> None:
    for request, param in (
        ({"data": {"purpose": "edits"}}, "file"),
        ({"files": {"file": ("a", EDITS)}}, "purpose"),
        ({"json": {"purpose": "edits"}}, "file"),
        ({"files": {"file": ("a" * 300, EDITS)}, "data": {"purpose": "edits"}}, "file"),
    ):
        response = service.client.post("/v1/files", **request)  # type: ignore[arg-type]
        assert response.status_code == 422, response.text
        assert response.json()["error"]["param"] == param


def test_a_file_may_be_larger_than_a_body_but_not_than_its_limit(service: Service) -> None:
    text = b"word " * 1000 + b"\n"
    large = upload(service, text * 2000, "texts")  # 10 MB: a body may have 8 MiB
    assert (large.status_code, large.json()["rows"]) == (200, 2000)
    before = service.get("/v1/files")["data"]
    limit = 64 * 2**20
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    gigabyte = {"Content-Length": str(len(HEAD) + 2**30)}
    for refused in (
        upload(service, b" " * (limit + 1), "texts"),
        service.client.post("/v1/files", content=endless(80), headers=form),
        service.client.post("/v1/files", content=endless(2**10), headers={**form, **gigabyte}),
    ):
        assert refused.status_code == 413, refused.text
        said = f"the file has more than {limit} bytes, the limit (ERRATA_MAX_FILE_BYTES)"
        assert refused.json()["error"]["message"] == said
    assert service.get("/v1/files")["data"] == before
    assert not list((service.folder / "artifacts").rglob(".tmp-*"))


def test_a_large_file_is_never_in_memory(service: Service, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "x " * 5000, "completion": "y " * 5000}).encode() + b"\n"
    data = row * (60 * 2**20 // len(row))
    upload(service, row, "fine-tune")
    process = Path(f"/proc/{service.pid('api')}")
    (process / "clear_refs").write_text("5")  # the peak is counted from here
    before = peak_bytes(process)
    made = upload(service, data, "fine-tune").json()
    assert (made["rows"], made["bytes"]) == (len(data) // len(row), len(data))
    shown = service.client.post(f"/v1/files/{made['id']}/preview", json={"limit": 1})
    assert shown.json()["rows"] == made["rows"]
    assert service.client.get(f"/v1/files/{made['id']}/content").content == data
    parts = 32 if service.settings.artifact_url else 0  # on their way to an object store
    assert peak_bytes(process) - before < (16 + parts) * 2**20


HEAD = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\ntexts\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
)


def endless(mebibytes: int) -> Iterator[bytes]:
    """The body of an upload that does not come to its end."""
    yield HEAD
    for _ in range(mebibytes):
        yield b" " * 2**20


def peak_bytes(process: Path) -> int:
    """Most memory that a process has had."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())[0]) * 1024


def test_openais_client(service: Service) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        made = client.files.create(file=("edits.jsonl", EDITS), purpose="edits")  # type: ignore[arg-type]
        assert client.files.retrieve(made.id) == made
        assert made.id in [file.id for file in client.files.list(limit=1)]
        assert client.files.content(made.id).content == EDITS
        with pytest.raises(
            openai.UnprocessableEntityError, match="subject is not a known field here"
        ):
            client.files.create(file=EDITS, purpose="fine-tune")
        assert client.files.delete(made.id).deleted


def test_a_file_that_a_job_needs_stays_until_it_ends(service: Service) -> None:
    file = upload(service, EDITS).json()["id"]
    texts = upload(service, b"one\ntwo", "texts").json()["id"]
    body: dict[str, Any] = {"parent": service.base_version(), "file": file}
    wrong = service.client.post("/v1/edits", json={**body, "file": texts})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "file")
    job = service.post_edit(**body, guards={"texts": texts}, hyperparameters=SLOW)
    for needed in (file, texts):
        response = service.client.delete(f"/v1/files/{needed}")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "file_in_use")
        assert job["id"] in response.json()["error"]["message"]
    service.client.post(f"/v1/jobs/{job['id']}/cancel")
    service.ended(job["id"])
    for needed in (file, texts):
        assert service.client.delete(f"/v1/files/{needed}").status_code == 200


def test_a_suite_beyond_the_context_is_refused_before_there_is_a_job(service: Service) -> None:
    row = {"query": "word " * 600, "choices": ["a", "b"], "gold": 0}
    suite = upload(service, json.dumps(row).encode(), "suite").json()["id"]
    edit = {"endpoint": "atlas", "edits": [capital_edit("France", "Lima")]}
    for path, body, param in (
        ("/v1/evaluations", {"model": "atlas", "suite": suite}, "suite"),
        ("/v1/edits", {**edit, "guards": {"suite": suite}}, "guards.suite"),
    ):
        response = service.client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (422, param)
    assert service.client.delete(f"/v1/files/{suite}").status_code == 200
