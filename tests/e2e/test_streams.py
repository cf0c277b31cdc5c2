"""Many streams over many versions at once: each gets what its version gives alone."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from editing.atlas.evaluation import counterfacts
from editing.atlas.facts import read_facts
from registry.bases import find_bases
from tests.models import add_version
from tests.service import Service

VERSIONS, STREAMS, TOKENS, LONG = 8, 32, 24, 400
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def versions(service: Service) -> Iterator[list[str]]:
    """Versions that answer very differently: strong random deltas, written as a worker would."""
    atlas = find_bases("atlas")["atlas"]
    made = [add_version(service.folder, atlas, seed) for seed in range(VERSIONS)]
    yield made
    for version in made:
        service.client.delete(f"/v1/versions/{version}")


async def _stream(client: openai.AsyncOpenAI, version: str, prompt: str) -> tuple[str, set[str]]:
    stream = await client.completions.create(
        model=version, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True
    )
    text, named = "", set()
    async for chunk in stream:
        text += chunk.choices[0].text
        named.add((chunk.model_extra or {})["version"])
    return text, named


async def _run(service: Service, versions: list[str]) -> tuple[list[str], list[str]]:
    cases = counterfacts(read_facts(), STREAMS, seed=5)
    asked = [(versions[i % VERSIONS], case.rewrite_prompt) for i, case in enumerate(cases)]
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        together = await asyncio.gather(*(_stream(client, *request) for request in asked))
        alone = [await _stream(client, *request) for request in asked]
    for (version, _), (_, named) in zip(asked, together, strict=True):
        assert named == {version}
    return [text for text, _ in together], [text for text, _ in alone]


def test_32_streams_over_8_versions_equal_each_alone(service: Service, versions: list[str]) -> None:
    together, alone = asyncio.run(_run(service, versions))
    assert together == alone
    assert len(set(alone)) > STREAMS // 2


def test_one_prompt_differs_between_the_versions(service: Service, versions: list[str]) -> None:
    answers = {service.text(version, PROMPT) for version in [*versions, "base_atlas"]}
    assert len(answers) > VERSIONS // 2, answers


async def _moved_under_a_stream(service: Service, old: str, new: str) -> None:
    service.endpoint("moving", old)
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        stream = await client.completions.create(
            model="moving", prompt=PROMPT, max_tokens=LONG, temperature=0, stream=True
        )
        chunks = [await anext(stream)]
        moved = await asyncio.to_thread(
            service.client.put,
            "/v1/endpoints/moving",
            json={"version": new},
            headers={"If-Match": '"1"'},
        )
        assert moved.status_code == 200
        after = await client.completions.create(model="moving", prompt=PROMPT, max_tokens=1)
        assert (after.model_extra or {})["version"] == new
        chunks += [chunk async for chunk in stream]
    assert {(chunk.model_extra or {})["version"] for chunk in chunks} == {old}
    assert {(chunk.model_extra or {})["generation"] for chunk in chunks} == {1}
    text = "".join(chunk.choices[0].text for chunk in chunks)
    alone = service.complete(old, PROMPT, max_tokens=LONG)["choices"][0]
    assert text == alone["text"]


def test_a_stream_stays_with_the_version_it_was_admitted_to(
    service: Service, versions: list[str]
) -> None:
    lengths = {
        version: service.complete(version, PROMPT, max_tokens=LONG)["usage"]["completion_tokens"]
        for version in versions
    }
    rambling = max(lengths, key=lambda version: lengths[version])
    assert lengths[rambling] == LONG, f"the move must fall into a long stream: {lengths}"
    other = next(version for version in versions if version != rambling)
    asyncio.run(_moved_under_a_stream(service, rambling, other))
    service.client.delete("/v1/endpoints/moving", headers={"If-Match": '"2"'})


async def _lost_under_a_stream(service: Service, streaming: str, lost: str) -> str:
    """What a stream says whose version goes away, beside one that cannot be loaded."""
    async with openai.AsyncOpenAI(
        base_url=f"{service.url}/v1", api_key="none", max_retries=0
    ) as client:
        stream = await client.completions.create(
            model=streaming, prompt=PROMPT, max_tokens=LONG, temperature=0, stream=True
        )
        text = (await anext(stream)).choices[0].text
        deleted = await asyncio.to_thread(service.client.delete, f"/v1/versions/{streaming}")
        assert deleted.status_code == 200, deleted.text
        for version in (streaming, lost):
            await asyncio.to_thread(_artifact(service, version).unlink, missing_ok=True)
        with pytest.raises(openai.InternalServerError) as refused:
            await client.completions.create(model=lost, prompt=PROMPT, max_tokens=1)
        assert (refused.value.status_code, refused.value.code) == (503, "version_unavailable")
        ready = await asyncio.to_thread(service.get, "/readyz")
        assert ready["bases"][0]["running"] == 1, "the stream must outlast the refusal"
        async for chunk in stream:
            text += chunk.choices[0].text
    return text


def _artifact(service: Service, version: str) -> Path:
    (digest,) = service.get(f"/v1/versions/{version}")["stack"]
    return service.folder / "artifacts" / digest[:2] / digest


def test_a_version_that_is_lost_fails_its_own_requests_alone(service: Service) -> None:
    """Unloading waits for the last request, and what cannot be loaded stalls nobody."""
    atlas = find_bases("atlas")["atlas"]
    for seed in range(50, 90):
        streaming = add_version(service.folder, atlas, seed)
        alone = service.complete(streaming, PROMPT, max_tokens=LONG)
        if alone["usage"]["completion_tokens"] == LONG:
            break
        service.client.delete(f"/v1/versions/{streaming}")
    lost = add_version(service.folder, atlas, 100)
    said = asyncio.run(_lost_under_a_stream(service, streaming, lost))
    assert said == alone["choices"][0]["text"]
    gone = service.client.post("/v1/completions", json={"model": streaming, "prompt": PROMPT})
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "version_deleted")
    service.client.delete(f"/v1/versions/{lost}")


def test_a_split_serves_each_user_one_version_and_moves_each_once(
    service: Service, versions: list[str]
) -> None:
    base, canary = service.base_version(), versions[0]
    service.endpoint("split", base)
    generation = 1

    def moved(path: str, method: str, body: dict[str, Any]) -> None:
        nonlocal generation
        response = service.client.request(
            method, f"/v1/endpoints/split{path}", json=body, headers={"If-Match": f'"{generation}"'}
        )
        assert response.status_code == 200, response.text
        generation += 1

    def served(user: str, field: str = "safety_identifier") -> str:
        answer = service.complete("split", "The", max_tokens=1, **{field: user})
        assert answer["generation"] == generation
        version: str = answer["version"]
        return version

    users = [f"user-{n}" for n in range(40)]
    before = dict.fromkeys(users, base)
    for share in (0.05, 0.25, 0.5, 1.0):
        split = [{"version": base, "weight": 1 - share}, {"version": canary, "weight": share}]
        moved("", "PUT", {"split": split} if share < 1 else {"version": canary})
        after = {user: served(user) for user in users}
        assert all(after[user] == canary for user in users if before[user] == canary)
        if share == 0.5:
            assert {served(user, "user") == after[user] for user in users[:8]} == {True}
            assert set(after.values()) == {base, canary}
            mixed = service.complete(
                "split", "The", max_tokens=1, safety_identifier=users[0], user="x"
            )
            assert mixed["version"] == after[users[0]], "safety_identifier comes first"
        before = after
    assert set(before.values()) == {canary}
    moved("/rollback", "POST", {})
    assert Counter(served(user) for user in users)[base] > 0, "the split is back"
    moved("/promote", "POST", {"version": base})
    assert {served(user) for user in users} == {base}
    service.client.delete("/v1/endpoints/split", headers={"If-Match": f'"{generation}"'})


def test_a_proxy_for_the_base_against_itself_is_the_expert(
    service: Service, versions: list[str]
) -> None:
    """base + 1 (expert - base) = expert; where the experts are the same, nothing changes."""
    prompt, base = "The capital of France is", service.base_version()

    def text(**proxy: Any) -> str:
        response = service.client.post(
            "/v1/completions",
            json={"model": base, "prompt": prompt, "temperature": 0, "proxy": proxy},
        )
        assert response.status_code == 200, response.text
        answer = response.json()
        names = {role: proxy[role] for role in ("expert", "anti_expert")}
        assert answer["version"] == base
        assert {role: answer["proxy"][role] for role in names} == names
        assert response.headers["errata-expert"] == proxy["expert"]
        assert response.headers["errata-anti-expert"] == proxy["anti_expert"]
        found: str = answer["choices"][0]["text"]
        return found

    for version in versions[:3]:
        own = service.complete(version, prompt, max_tokens=16)["choices"][0]["text"]
        assert text(expert=version, anti_expert=base) == own
    plain = service.complete(base, prompt, max_tokens=16)["choices"][0]["text"]
    assert text(expert=versions[0], anti_expert=versions[0], alpha=3) == plain
    assert text(expert=versions[0], anti_expert=versions[1], alpha=0) == plain
