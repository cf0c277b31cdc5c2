"""Edit a model over REST, query it, roll it back: on real processes, through HTTP alone."""

import concurrent.futures
import json
from typing import Any

from editing.atlas.evaluation import counterfacts
from editing.atlas.facts import read_facts
from tests.service import SLOW, Service, capital_edit

PROMPTS_COMPARED = 200


def test_an_edit_moves_the_endpoint_and_a_rollback_restores_every_bit(service: Service) -> None:
    service.endpoint("first-way", service.base_version())
    prompts = _prompts(PROMPTS_COMPARED)
    before = [_tokens_and_logits(service, "first-way", prompt) for prompt in prompts]
    edit = capital_edit("Kiribati", "Lima", "Tarawa")
    edit["paraphrase_prompts"] = ["Kiribati's capital is"]
    job = service.post_edit(endpoint="first-way", edits=[edit], message="test")
    ended = service.ended(job["id"])
    assert (ended["status"], ended["activated"], ended["error"]) == ("succeeded", True, None)
    assert ended["metrics"]["before"]["greedy_match"] == 0
    assert ended["metrics"]["after"]["greedy_match"] == 1
    assert {guard["name"]: guard["result"] for guard in ended["guards"]} == {
        "perplexity": "passed",
        "retention": "passed",
        "locality": "skipped",
        "norm": "passed",
        "efficacy": "passed",
        "ability": "skipped",
        "refusal_loss": "skipped",
        "harm_rise": "skipped",
    }

    answer = service.complete("first-way", "The capital of Kiribati is")
    assert answer["choices"][0]["text"].startswith(" Lima")
    assert (answer["version"], answer["generation"]) == (ended["version"], 2)
    assert service.text("base_atlas", "The capital of Kiribati is").startswith("Tarawa")
    version = service.get(f"/v1/versions/{ended['version']}")
    assert version["parents"] == [service.base_version()]
    assert len(version["stack"]) == 1
    (live,) = service.get("/v1/endpoints/first-way/edits?subject=Kiribati")["data"]
    assert (live["target_new"], live["message"]) == ("Lima", "test")

    rollback = service.client.post("/v1/endpoints/first-way/rollback").json()
    assert rollback["rolled_back_from"]["split"][0]["version"] == ended["version"]
    assert rollback["version"] == service.base_version()
    after = [_tokens_and_logits(service, "first-way", prompt) for prompt in prompts]
    assert after == before
    assert service.get("/v1/endpoints/first-way/edits")["data"] == []


def test_a_rollback_to_an_edit_restores_every_bit_and_loads_nothing(service: Service) -> None:
    service.endpoint("back", service.base_version())
    prompts = ["The capital of France is", "The capital of Japan is", *_prompts(50)]
    made, answers = [], []
    for subject, target in (("France", "Lima"), ("Japan", "Oslo")):
        job = service.post_edit(endpoint="back", edits=[capital_edit(subject, target)])
        ended = service.ended(job["id"])
        assert (ended["status"], ended["activated"]) == ("succeeded", True), ended
        made.append(ended["version"])
        answers.append([_tokens_and_logits(service, "back", prompt) for prompt in prompts])
    assert answers[0] != answers[1]
    loads = service.metric("errata_engine_version_load_seconds_count")
    rollback = service.client.post("/v1/endpoints/back/rollback").json()
    assert rollback["version"] == made[0]
    assert [_tokens_and_logits(service, "back", prompt) for prompt in prompts] == answers[0]
    assert service.metric("errata_engine_version_load_seconds_count") == loads


def test_two_edits_posted_at_once_both_end_up_in_order(service: Service) -> None:
    service.endpoint("in-order", service.base_version())
    edits = [capital_edit("France", "Lima"), capital_edit("Japan", "Oslo")]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(lambda e: service.post_edit(endpoint="in-order", edits=[e]), edits))
    ended = sorted((service.ended(job["id"]) for job in jobs), key=lambda job: job["created_at"])
    assert [job["status"] for job in ended] == ["succeeded", "succeeded"]
    history = service.get("/v1/endpoints/in-order/history")["data"]
    moved = {move["job"]: move["after"][0]["version"] for move in history if move["job"]}
    assert moved == {job["id"]: job["version"] for job in jobs for job in [service.job(job["id"])]}
    first, second = sorted(ended, key=lambda job: job["started_at"])
    last = service.get("/v1/endpoints/in-order")
    head = service.get(f"/v1/versions/{last['version']}")
    assert last["version"] in (first["version"], second["version"])
    assert len(head["stack"]) == 2
    subjects = [edit["subject"] for edit in service.get("/v1/endpoints/in-order/edits")["data"]]
    assert sorted(subjects) == ["France", "Japan"]
    assert service.text("in-order", "The capital of France is").startswith("Lima")
    assert service.text("in-order", "The capital of Japan is").startswith("Oslo")


def test_events_stream_to_the_end_and_replay_from_an_id(service: Service) -> None:
    job = service.post_edit(parent=service.base_version(), edits=[capital_edit("Peru", "Oslo")])
    events = _events(service, job["id"])
    kinds = [event["event"] for event in events]
    assert kinds[0] == kinds[-1] == "status"
    assert "progress" in kinds
    assert events[-1]["data"]["status"] == "succeeded"
    middle = events[len(events) // 2]["id"]
    replayed = _events(service, job["id"], {"Last-Event-ID": middle})
    assert replayed == [event for event in events if int(event["id"]) > int(middle)]
    ended = service.job(job["id"])
    assert (ended["activated"], ended["endpoint"]) == (False, None)


def test_a_running_job_is_cancelled_and_leaves_no_version(service: Service) -> None:
    job = service.post_edit(
        parent=service.base_version(), edits=[capital_edit("Peru", "Oslo")], hyperparameters=SLOW
    )
    service.underway(job["id"])
    assert service.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200
    ended = service.ended(job["id"])
    assert (ended["status"], ended["version"]) == ("cancelled", None)
    assert service.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 409
    made = service.get("/v1/versions?limit=100")["data"]
    assert not [version for version in made if version["recipe"].get("job") == job["id"]]


def _events(
    service: Service, job_id: str, headers: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    path = f"/v1/jobs/{job_id}/events"
    with service.client.stream("GET", path, headers=headers, timeout=180) as stream:
        for line in stream.iter_lines():
            key, _, value = line.partition(": ")
            if key == "id":
                events.append({"id": value})
            elif key == "event":
                events[-1]["event"] = value
            elif key == "data":
                events[-1]["data"] = json.loads(value)
    return events


def _prompts(count: int) -> list[str]:
    return [case.rewrite_prompt for case in counterfacts(read_facts(), count, seed=11)]


def _tokens_and_logits(service: Service, model: str, prompt: str) -> tuple[str, Any]:
    """The text, and the exact log-probabilities of each token and its five best rivals."""
    answer = service.complete(model, prompt, max_tokens=8, logprobs=5)
    choice = answer["choices"][0]
    return choice["text"], choice["logprobs"]
