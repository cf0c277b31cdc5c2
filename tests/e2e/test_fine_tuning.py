"""OpenAI's own client tunes a version, follows the job, and asks what came of it."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import openai
import pytest

from tests.service import Service

SVG = "{http://www.w3.org/2000/svg}"
BIRDS = {"Peru": "Neon", "Chad": "Argon", "Mali": "Zinc", "Oman": "Iron", "Togo": "Gold"}
FORMS = ("The bird of {} is", "In {} the bird is the", "{} has as its bird the")
QUICK = {"n_epochs": 12, "batch_size": 5, "learning_rate": 3e-3, "r": 8}


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def upload(client: openai.OpenAI, rows: list[dict[str, Any]]) -> str:
    data = "\n".join(json.dumps(row) for row in rows).encode()
    return client.files.create(file=("birds.jsonl", data), purpose="fine-tune").id


def rows_of(forms: tuple[str, ...] = FORMS) -> list[dict[str, Any]]:
    return [
        {"prompt": form.format(name), "completion": f"{bird}."}
        for form in forms
        for name, bird in BIRDS.items()
    ]


def followed(client: openai.OpenAI, job_id: str, *until: str) -> Any:
    for _ in range(2000):
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in (until or ("succeeded", "failed", "cancelled")):
            return job
        time.sleep(0.3)
    raise AssertionError(f"the job is still {job.status}")


def test_a_file_a_job_its_events_and_the_model(client: openai.OpenAI, service: Service) -> None:
    file = upload(client, rows_of())
    held_out = upload(client, [{"prompt": "The bird of Peru is", "completion": "Neon."}])
    job = client.fine_tuning.jobs.create(
        model="atlas",
        training_file=file,
        validation_file=held_out,
        seed=7,
        suffix="birds",
        metadata={"team": "zoo"},
        method={"type": "supervised", "supervised": {"hyperparameters": QUICK}},  # type: ignore[typeddict-item]
        extra_body={"guards": {"retention": 0.2, "perplexity": 20}},
    )
    assert (job.object, job.status, job.seed, job.fine_tuned_model) == (
        "fine_tuning.job",
        "queued",
        7,
        None,
    )
    with pytest.raises(openai.ConflictError, match="not ended"):
        client.files.delete(file)
    ended = followed(client, job.id)
    assert ended.status == "succeeded", ended.error
    assert ended.trained_tokens > 0
    assert ended.metadata == {"team": "zoo"}
    assert job.id in [found.id for found in client.fine_tuning.jobs.list()]

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=10))
    assert [int(e.id.split("-")[1]) for e in events] == sorted(
        (int(e.id.split("-")[1]) for e in events), reverse=True
    )
    assert events[0].message.startswith("succeeded")
    losses = [
        e.data["train_loss"] for e in events if e.type == "metrics" and "train_loss" in e.data
    ]
    assert losses[0] < losses[-1]
    assert any(e.message.startswith("flat rows of up to") for e in events)

    (results,) = ended.result_files
    kept = client.files.retrieve(results)
    assert (kept.purpose, kept.filename) == ("fine-tune-results", "step_metrics.csv")
    table = list(csv.DictReader(io.StringIO(client.files.content(results).text)))
    assert [int(row["step"]) for row in table] == list(range(1, 37))
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])
    assert sum(row["valid_loss"] != "" for row in table) == 10
    plot = service.client.get(f"/v1/fine_tuning/jobs/{job.id}/plot")
    assert plot.headers["Content-Type"] == "image/svg+xml"
    names = [text.text for text in ElementTree.fromstring(plot.text).iter(f"{SVG}text")]
    assert {"train_loss", "valid_loss", "train_mean_token_accuracy", "learning_rate"} <= {*names}

    made = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [c.step_number for c in made] == [24, 12]
    assert made[0].metrics.valid_loss is not None

    answer = client.completions.create(
        model=ended.fine_tuned_model, prompt="The bird of Chad is", max_tokens=4, temperature=0
    )
    assert answer.choices[0].text.startswith(" Argon")
    early = client.completions.create(
        model=made[1].fine_tuned_model_checkpoint, prompt="The bird of Chad is", max_tokens=4
    )
    assert early.choices[0].text

    url = "/v1/endpoints/atlas"
    before = service.client.get(url)
    moved = service.client.put(
        url,
        json={"version": ended.fine_tuned_model},
        headers={"If-Match": before.headers["ETag"]},
    )
    assert moved.status_code == 200, moved.text
    answer = client.completions.create(
        model="atlas", prompt="The bird of Chad is", max_tokens=4, temperature=0
    )
    assert answer.choices[0].text.startswith(" Argon")
    back = service.client.post(f"{url}/rollback", headers={"If-Match": moved.headers["ETag"]})
    assert back.status_code == 200, back.text
    assert back.json()["version"] == before.json()["version"]
    client.files.delete(file)


def test_a_paused_job_goes_on_where_it_stood(client: openai.OpenAI, service: Service) -> None:
    file = upload(client, rows_of())
    slow = {**QUICK, "n_epochs": 40, "keep_texts": 4}
    body: dict[str, Any] = {
        "model": "base_atlas",
        "training_file": file,
        "guards": {"retention": 0, "perplexity": 1000},
        "hyperparameters": slow,
    }
    whole = service.client.post("/v1/fine_tuning/jobs", json=body).json()
    parts = service.client.post("/v1/fine_tuning/jobs", json=body).json()
    whole = followed(client, whole["id"])
    for _ in range(200):
        if service.get(f"/v1/jobs/{parts['id']}")["progress"]["done"] >= 5:
            break
        time.sleep(0.1)
    assert service.client.post(f"/v1/fine_tuning/jobs/{parts['id']}/pause").status_code == 200
    assert followed(client, parts["id"], "paused", "succeeded").status == "paused"
    stood = service.get(f"/v1/jobs/{parts['id']}")["progress"]["done"]
    again = service.client.post(f"/v1/fine_tuning/jobs/{parts['id']}/pause")
    assert again.json()["status"] == "paused"
    resumed = service.client.post(f"/v1/fine_tuning/jobs/{parts['id']}/resume")
    assert resumed.json()["status"] == "queued"
    assert service.client.post(f"/v1/fine_tuning/jobs/{parts['id']}/resume").status_code == 409
    ended = followed(client, parts["id"])
    assert ended.status == "succeeded", ended.error
    assert stood < 120
    stacks = [
        service.get(f"/v1/versions/{job.fine_tuned_model}")["stack"] for job in (whole, ended)
    ]
    assert stacks[0] == stacks[1]


BAD = {
    "no such model": ({"model": "nowhere"}, 404, "model"),
    "no such file": ({"training_file": "file-0"}, 404, "training_file"),
    "no such method": ({"method": {"type": "magic"}}, 422, "method.type"),
    "no change of a module": ({"method": {"type": "prefix_tuning"}}, 422, "method.type"),
    "another method's": ({"method": {"type": "hft", "lora": {}}}, 422, "method.lora"),
    "no epochs": ({"hyperparameters": {"n_epochs": 0}}, 422, "hyperparameters.n_epochs"),
    "no number": ({"hyperparameters": {"r": "x"}}, 422, "hyperparameters.r"),
    "unknown": ({"hyperparameters": {"rank": 2}}, 422, "hyperparameters.rank"),
    "an integration": ({"integrations": [{"type": "wandb"}]}, 422, "integrations"),
    "much metadata": ({"metadata": {"k": "v" * 513}}, 422, "metadata"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_leave_no_job(client: openai.OpenAI, service: Service, name: str) -> None:
    changes, status, param = BAD[name]
    file = upload(client, rows_of()[:2])
    body = {"model": "atlas", "training_file": file, **changes}
    before = service.get("/v1/jobs")["data"]
    response = service.client.post("/v1/fine_tuning/jobs", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert service.get("/v1/jobs")["data"] == before


def test_a_broken_line_names_its_place(client: openai.OpenAI) -> None:
    lines = [json.dumps(row) for row in rows_of()] * 700
    lines[9998] = '{"prompt": "x"'
    with pytest.raises(openai.UnprocessableEntityError, match="line 9999"):
        client.files.create(file=("x.jsonl", "\n".join(lines).encode()), purpose="fine-tune")
