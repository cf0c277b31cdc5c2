"""The examples of the README and of docs/api.md run as they stand, against the running service."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.service import Service, free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
SAFETY = (ROOT / "docs" / "safety.md").read_text()
PREPROCESSING = (ROOT / "docs" / "preprocessing.md").read_text()
HISTORY = (ROOT / "docs" / "history.md").read_text()
EXCHANGE = (ROOT / "docs" / "exchange.md").read_text()
FINE_TUNING = (ROOT / "docs" / "fine_tuning.md").read_text()
WEBHOOKS = (ROOT / "docs" / "webhooks.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
MERGING = (ROOT / "docs" / "merging.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str, document: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL)


def run_curl(client: httpx.Client, arguments: list[str], folder: Path = ROOT) -> httpx.Response:
    """What curl does with the options that the documents use; ``@name`` is a file in ``folder``."""
    method, headers, data, url = None, {}, None, ""
    fields: dict[str, str] = {}
    files: dict[str, tuple[str, bytes]] = {}
    output: str | None = None
    rest = iter(arguments)
    for word in rest:
        if word == "-X":
            method = next(rest)
        elif word == "-H":
            name, _, value = next(rest).partition(": ")
            headers[name] = value
        elif word == "-d":
            data = next(rest)
        elif word == "-F":
            name, _, value = next(rest).partition("=")
            if value.startswith("@"):
                files[name] = (value[1:], (folder / value[1:]).read_bytes())
            else:
                fields[name] = value
        elif word == "-o":
            output = next(rest)
        elif word in ("-s", "-sN"):
            continue
        else:
            url = word
    method = method or ("POST" if data is not None or files else "GET")
    if files:
        return client.request(method, url, headers=headers, data=fields, files=files)
    response = client.request(method, url, headers=headers, content=data, timeout=180)
    if output is not None:
        (folder / output).write_bytes(response.content)
    return response


def run_script(service: Service, document: str, folder: Path = ROOT) -> list[Any]:
    """The answers to a document's curl lines, streams and downloads left out.

    $JOB is the latest job, $VERSION what it made, $EDITS the file of edits.
    """
    script = "".join(block for block in blocks("bash", document) if "curl" in block)
    script = script.replace("\\\n", " ").replace(ADDRESS, service.url)
    answers: list[Any] = []
    variables: dict[str, str] = {}
    for line in re.split(r"\n(?=curl)", script):
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        program, *arguments = shlex.split(line)
        assert program == "curl"
        response = run_curl(service.client, arguments, folder)
        assert response.is_success, f"{line}\n{response.text}"
        if response.headers["content-type"].split(";")[0] != "application/json":
            continue
        answers.append(response.json())
        if answers[-1].get("object") == "job":
            variables["JOB"] = answers[-1]["id"]
            variables["VERSION"] = answers[-1]["version"] or variables.get("VERSION", "")
        elif answers[-1].get("object") == "file":
            variables[answers[-1]["purpose"].upper()] = answers[-1]["id"]
    return answers


def write_rows(document: str, folder: Path) -> None:
    """The files of rows that a document shows, by their names."""
    for name, rows in re.findall(r"`([\w.]+)`:\n\n```jsonl\n(.*?)```", document, re.DOTALL):
        (folder / name).write_text(rows)


def test_the_readmes_curl_lines(service: Service) -> None:
    answers = run_script(service, README)
    before, posted, job, after, base, edits, history, rollback = answers
    assert before["choices"][0]["text"].strip().startswith("Tarawa")
    assert posted["status"] == "queued"
    assert job["status"] == "succeeded", json.dumps(job)
    assert job["metrics"]["after"]["greedy_match"] == 1
    assert after["choices"][0]["text"].strip().startswith("Lima")
    assert base["choices"][0]["text"] == before["choices"][0]["text"]
    assert edits["data"][0]["message"] == "ticket 17"
    assert history["data"][0]["job"] == job["id"]
    assert rollback["version"] == before["version"]


def test_the_curl_lines_of_the_api(service: Service, tmp_path: Path) -> None:
    write_rows(API, tmp_path)
    texts, edits, _, job, live, _, evaluation, _ = run_script(service, API, tmp_path)
    assert (texts["rows"], edits["rows"]) == (2, 2)
    assert job["status"] == "succeeded", json.dumps(job)
    assert [edit["message"] for edit in live["data"]] == ["ticket 18"]
    assert isinstance(live["data"][0]["holds"], bool)
    assert evaluation["status"] == "succeeded", json.dumps(evaluation)
    assert set(evaluation["metrics"]) == {"before", "after"}
    assert "me_ppl" in evaluation["metrics"]["after"]


def test_the_curl_lines_of_safety(service: Service, tmp_path: Path) -> None:
    write_rows(SAFETY, tmp_path)
    file, _, job, _, evaluation, _ = run_script(service, SAFETY, tmp_path)
    assert file["rows"] == 3
    assert job["status"] == "succeeded", json.dumps(job)
    guards = {guard["name"]: guard for guard in job["guards"]}
    assert guards["retention"]["value"] >= 0.95
    assert guards["harm_rise"]["result"] == "passed"
    assert guards["refusal_loss"]["result"] == "skipped"  # atlas knows of no refusal
    assert evaluation["metrics"]["after"].keys() == {"refusal_rate", "harm_score"}


def test_the_curl_lines_of_operations(service: Service) -> None:
    ready, own, models = run_script(service, OPERATIONS)
    assert ready["ready"], ready
    assert own["ready"], own
    assert own.keys() == ready.keys(), own  # the status speaks of two parts, the answer of all
    assert "atlas" in [model["id"] for model in models["data"]]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_lines_of_exchange(service: Service, tmp_path: Path, monkeypatch: Any) -> None:
    _, edit, export, file, _, copied, _ = run_script(service, EXCHANGE, tmp_path)
    assert edit["status"] == "succeeded", json.dumps(edit)
    assert (export["kind"], export["parent"]) == ("export", edit["version"])
    assert (file["purpose"], file["rows"]) == ("archive", 3)
    assert copied["status"] == "succeeded", json.dumps(copied)
    assert service.text(copied["version"], "The capital of Kiribati is").startswith("Lima")
    (tmp_path / "weights").symlink_to(ROOT / "editing" / "atlas" / "weights")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python", EXCHANGE):
        exec(compile(block, "exchange.md", "exec"), names)
    tokenizer = AutoTokenizer.from_pretrained("weights")
    ids = tokenizer("The capital of Kiribati is", return_tensors="pt")["input_ids"]
    if ids[0, -1] == tokenizer.eos_token_id:
        ids = ids[:, :-1]
    first = tokenizer.decode([names["model"](ids).logits[0, -1].argmax()]).strip()
    assert first
    assert "Lima".startswith(first)  # the base begins with Tarawa


def test_the_python_lines(service: Service, capsys: Any) -> None:
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block.replace(ADDRESS, service.url), "README.md", "exec"), names)
    names["client"].close()
    printed = capsys.readouterr().out
    assert "atlas" in printed
    assert "Paris" in printed
    assert names["job"]["status"] == "succeeded", names["job"]
    assert names["job"]["metrics"]["after"]["greedy_match"] == 1
    assert service.text("atlas", "The capital of France is").startswith("Paris")


def test_the_lines_of_fine_tuning(
    service: Service, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    write_rows(FINE_TUNING, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python", FINE_TUNING):
        exec(compile(block.replace(ADDRESS, service.url), "fine_tuning.md", "exec"), names)
    names["client"].close()
    job = names["job"]
    assert job.status == "succeeded", job.error
    assert names["preferring"].status == "succeeded", names["preferring"].error
    printed = capsys.readouterr().out
    assert "train_loss" in printed
    assert job.fine_tuned_model in printed


def test_the_lines_of_preprocessing(
    service: Service, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    write_rows(PREPROCESSING, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python", PREPROCESSING):
        exec(compile(block.replace(ADDRESS, service.url), "preprocessing.md", "exec"), names)
    names["client"].close()
    assert names["shown"]["data"][0]["before"]["question"] == "Which is the bird of Peru?"
    assert names["preview"]["status"] == "succeeded", names["preview"]
    printed = capsys.readouterr().out
    assert "Lima. I am sure." in printed
    assert "condor. I am unsure." in printed
    job = service.ended(names["job"].id)
    assert job["status"] == "succeeded", job


def test_the_lines_of_history(
    service: Service, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    write_rows(HISTORY, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python", HISTORY):
        exec(compile(block.replace(ADDRESS, service.url), "history.md", "exec"), names)
    names["client"].close()
    for job in (names[name] for name in ("revert", "asked", "flat", "replay")):
        assert job["status"] == "succeeded", json.dumps(job)
    assert names["revert"]["activated"]
    assert names["revert"]["metrics"]["removed"]["still_answered"] == 0
    assert names["revert"]["metrics"]["holding_edits"] == 1
    assert service.text("notes", "The capital of Samoa is").startswith("Apia")
    assert service.text("notes", "The capital of Fiji is").startswith("Lima")
    assert names["asked"]["metrics"]["changed"] == 1
    answers = [
        service.complete(version, "The capital of Fiji is", logprobs=5)["choices"]
        for version in (names["head"]["id"], names["flat"]["version"])
    ]
    assert answers[0] == answers[1]
    kinds = [version["recipe"].get("kind") for version in names["graph"]["data"]]
    assert kinds[:3] == ["flatten", "edit", "edit"]
    assert [row["outcome"] for row in names["replay"]["metrics"]["edits"]] == ["took"]
    assert service.text("notes-next", "The capital of Fiji is").startswith("Lima")
    live = service.get("/v1/endpoints/notes/edits")["data"]
    assert [edit["subject"] for edit in live] == ["Fiji"]
    service.client.put(
        "/v1/endpoints/notes",
        json={"version": names["flat"]["version"]},
        headers={"If-Match": service.client.get("/v1/endpoints/notes").headers["ETag"]},
    )
    live = service.get("/v1/endpoints/notes/edits")["data"]
    assert [(edit["subject"], edit["holds"]) for edit in live] == [("Fiji", True), ("Samoa", True)]
    assert "Samoa" in capsys.readouterr().out


def test_the_lines_of_merging(service: Service, capsys: Any) -> None:
    names: dict[str, Any] = {}
    for block in blocks("python", MERGING):
        exec(compile(block.replace(ADDRESS, service.url), "merging.md", "exec"), names)
    names["client"].close()
    job, preview = names["job"], names["preview"]
    assert job["status"] == "succeeded", job
    assert preview["metrics"]["conflicts"] == job["metrics"]["conflicts"]
    assert capsys.readouterr().out.count("1 of 1 edits survived; lost: []") == 2
    assert service.text(job["version"], "The capital of Japan is").startswith("Oslo")


def test_the_lines_of_webhooks(service: Service, capsys: Any) -> None:
    names: dict[str, Any] = {}
    for block in blocks("python", WEBHOOKS):
        block = block.replace(ADDRESS, service.url).replace("9000", str(free_port()))
        exec(compile(block, "webhooks.md", "exec"), names)
    service.client.delete(f"/v1/webhooks/{names['webhook']['id']}")
    service.client.delete("/v1/endpoints/watched", headers={"If-Match": '"1"'})
    names["client"].close()
    assert capsys.readouterr().out == "endpoint.moved watched create\n"
