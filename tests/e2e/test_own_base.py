"""A user's own folder is a base like any other: served, prepared from given texts, edited."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import save_base
from tests.service import LENIENT, Service

SENTENCE = "the capital of the country is the city in which the government of the land sits"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("own")
    save_base(folder / "model", "gpt2")
    words = SENTENCE.split()
    texts = [" ".join(words[n % 8 :] + words[: n % 8]) for n in range(40)]
    (folder / "texts.txt").write_text("\n".join(texts))
    with Service(
        folder / "data",
        ERRATA_BASES=f"mine={folder / 'model'}",
        ERRATA_TEXTS=f"mine={folder / 'texts.txt'}",
    ) as service:
        yield service


def test_it_is_served(own: Service) -> None:
    answer = own.complete("mine", SENTENCE, max_tokens=5)
    assert answer["usage"]["completion_tokens"] <= 5
    empty = own.client.post("/v1/completions", json={"model": "mine", "prompt": ""})
    assert empty.status_code == 400
    chat = own.client.post(
        "/v1/chat/completions",
        json={"model": "mine", "messages": [{"role": "user", "content": "x"}]},
    )
    assert chat.status_code == 400
    assert "chat template" in chat.json()["error"]["message"]


def test_it_is_prepared_from_its_texts_with_a_warning_and_edited(own: Service) -> None:
    edit = {
        "prompt": "the capital of {} is",
        "subject": "the country",
        "target_new": "land",
        "target_true": "city",
    }
    before = own.complete("mine", SENTENCE, logprobs=5, max_tokens=8)
    job = own.post_edit(endpoint="mine", edits=[edit], hyperparameters={"layer": 0}, guards=LENIENT)
    prepared = own.ended(job["after"])
    assert prepared["kind"] == "prepare"
    assert f"{prepared['metrics']['tokens']} tokens" in prepared["metrics"]["warning"]
    ended = own.ended(job["id"])
    assert ended["status"] == "succeeded", ended["error"]
    assert {"efficacy_score", "greedy_match", "me_ppl"} <= set(ended["metrics"]["after"])
    edited = own.complete("mine", SENTENCE, logprobs=5, max_tokens=8)
    assert edited["version"] == ended["version"]
    assert edited["choices"] != before["choices"]
    again = own.post_edit(
        endpoint="mine", edits=[edit], hyperparameters={"layer": 0}, guards={"perplexity": 1e-3}
    )
    assert again["after"] is None  # what was prepared is kept
    rejected = own.ended(again["id"])
    assert (rejected["status"], rejected["error"]["code"]) == ("failed", "guard_rejected")
    assert rejected["guards"][0]["result"] == "failed"
    version = own.get(f"/v1/versions/{rejected['version']}")
    assert version["status"] == "rejected"
    etag = own.client.get("/v1/endpoints/mine").headers["ETag"]
    refused = own.client.put(
        "/v1/endpoints/mine", json={"version": rejected["version"]}, headers={"If-Match": etag}
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "version_rejected")
    own.client.post("/v1/endpoints/mine/rollback")
    assert own.complete("mine", SENTENCE, logprobs=5, max_tokens=8)["choices"] == before["choices"]


def test_a_flipped_bit_in_an_artifact_is_refused_for_its_version_alone(own: Service) -> None:
    job = own.post_edit(
        parent=own.get("/v1/models/base_mine")["version"],
        edits=[{"prompt": "{} sits", "subject": "the government", "target_new": "in"}],
        hyperparameters={"layer": 0, "steps": 2},
        guards=LENIENT,
    )
    ended = own.ended(job["id"])
    assert ended["status"] == "succeeded", ended["error"]
    (digest,) = own.get(f"/v1/versions/{ended['version']}")["stack"]
    file: Path = own.folder / "artifacts" / digest[:2] / digest
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    broken = own.client.post("/v1/completions", json={"model": ended["version"], "prompt": "the"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (503, "version_unavailable")
    assert own.complete("mine", SENTENCE)
