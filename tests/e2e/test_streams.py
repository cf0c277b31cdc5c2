"""Many streams over many versions at once: each gets what its version gives alone."""

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest
import torch

from editing.atlas.evaluation import counterfacts
from editing.atlas.facts import read_facts
from editing.deltas import Delta, Effect
from registry.artifacts import ArtifactStore
from registry.bases import find_bases
from registry.database import Database
from registry.manifests import BaseRef, VersionManifest
from registry.versions import insert_version
from tests.service import Service

VERSIONS, STREAMS, TOKENS, LONG = 8, 32, 24, 400


@pytest.fixture(scope="module")
def versions(service: Service) -> Iterator[list[str]]:
    """Versions that answer very differently: strong random deltas, written as a worker would."""
    base = BaseRef(**service.get(f"/v1/versions/{service.base_version()}")["base"])
    store = ArtifactStore(service.folder / "artifacts")
    database = Database(f"sqlite:///{service.folder / 'registry.db'}")
    made = []
    for seed in range(VERSIONS):
        digest = store.put(_random_delta(base.digest, seed).to_bytes())
        manifest = VersionManifest(base, (digest,), (service.base_version(),), {"seed": seed})
        with database.write() as connection:
            made.append(insert_version(connection, "default", manifest).id)
    database.close()
    yield made
    for version in made:
        service.client.delete(f"/v1/versions/{version}")


def _random_delta(base_digest: str, seed: int) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    path = f"model.layers.{seed % 3}.mlp.down_proj"
    out_features, in_features = _down_proj_shape()
    effect = Effect(
        A=torch.randn(2, in_features, generator=generator),
        B=torch.randn(out_features, 2, generator=generator),
    )
    return Delta({path: effect}, base_digest, "random")


def _down_proj_shape() -> tuple[int, int]:
    config = json.loads((find_bases("atlas")["atlas"].folder / "config.json").read_text())
    return config["hidden_size"], config["intermediate_size"]


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
    prompt = "The capital of France is"
    answers = {service.text(version, prompt) for version in [*versions, "base_atlas"]}
    assert len(answers) > VERSIONS // 2, answers


async def _moved_under_a_stream(service: Service, old: str, new: str) -> None:
    service.endpoint("moving", old)
    prompt = "The capital of France is"
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        stream = await client.completions.create(
            model="moving", prompt=prompt, max_tokens=LONG, temperature=0, stream=True
        )
        chunks = [await anext(stream)]
        moved = await asyncio.to_thread(
            service.client.put,
            "/v1/endpoints/moving",
            json={"version": new},
            headers={"If-Match": '"1"'},
        )
        assert moved.status_code == 200
        after = await client.completions.create(model="moving", prompt=prompt, max_tokens=1)
        assert (after.model_extra or {})["version"] == new
        chunks += [chunk async for chunk in stream]
    assert {(chunk.model_extra or {})["version"] for chunk in chunks} == {old}
    assert {(chunk.model_extra or {})["generation"] for chunk in chunks} == {1}
    text = "".join(chunk.choices[0].text for chunk in chunks)
    alone = service.complete(old, prompt, max_tokens=LONG)["choices"][0]
    assert text == alone["text"]


def test_a_stream_stays_with_the_version_it_was_admitted_to(
    service: Service, versions: list[str]
) -> None:
    prompt = "The capital of France is"
    lengths = {
        version: service.complete(version, prompt, max_tokens=LONG)["usage"]["completion_tokens"]
        for version in versions
    }
    rambling = max(lengths, key=lambda version: lengths[version])
    assert lengths[rambling] == LONG, f"the move must fall into a long stream: {lengths}"
    other = next(version for version in versions if version != rambling)
    asyncio.run(_moved_under_a_stream(service, rambling, other))
    service.client.delete("/v1/endpoints/moving", headers={"If-Match": '"2"'})
