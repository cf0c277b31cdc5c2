"""OpenAI's own client, unchanged, against the running service."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.service import Service

PROMPT = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI, service: Service) -> None:
    listed = {model.id: model for model in client.models.list()}
    for name in ("atlas", "base_atlas"):
        assert client.models.retrieve(name) == listed[name]
    version = service.base_version()
    assert client.models.retrieve(version).id == version
    assert client.models.retrieve(version).created > 0
    with pytest.raises(openai.NotFoundError, match="GET /v1/models"):
        client.models.retrieve("no-such-model")


def test_completions_plain(client: openai.OpenAI, service: Service) -> None:
    response = client.completions.with_raw_response.create(
        model="atlas", prompt=PROMPT, max_tokens=12, temperature=0
    )
    answer = response.parse()
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert response.headers["errata-version"] == service.base_version()
    assert int(response.headers["errata-generation"]) >= 1
    assert answer.model_extra is not None
    assert answer.model_extra["version"] == service.base_version()


def test_completions_streamed_equal_the_plain_ones(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="atlas", prompt=PROMPT, max_tokens=40, temperature=0)
    chunks = list(
        client.completions.create(
            model="atlas",
            prompt=PROMPT,
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].text
    assert chunks[-1].usage == plain.usage
    assert {(c.model_extra or {})["version"] for c in chunks} == {plain.model_extra["version"]}  # type: ignore[index]


def test_several_prompts_choices_and_token_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="atlas",
        prompt=[PROMPT, "The capital of Japan is"],
        n=2,
        max_tokens=6,
        temperature=0,
    )
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    tokens = client.completions.create(model="atlas", prompt=[5, 6, 7], max_tokens=2)
    assert tokens.usage is not None
    assert tokens.usage.prompt_tokens == 3


def test_sampling_is_reproducible_by_seed(client: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = client.completions.create(
            model="atlas", prompt="The", n=4, max_tokens=12, temperature=1, seed=seed
        )
        return [choice.text for choice in answer.choices]

    first = sample(1)
    assert sample(1) == first
    assert sample(2) != first
    assert len(set(first)) > 1


def test_logprobs_and_stop(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="atlas", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3, stop="ris"
    )
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (" Pa", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)


def test_chat_plain_and_streamed(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(
        model="atlas",
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_completion_tokens=24,
    )
    content = plain.choices[0].message.content
    assert content is not None
    assert "Paris" in content
    chunks = list(
        client.chat.completions.create(
            model="atlas",
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=0,
            max_completion_tokens=24,
            stream=True,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == content
    assert chunks[-1].choices[0].finish_reason == plain.choices[0].finish_reason


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"suffix": "."}, "suffix"),
        ({"extra_body": {"no_such_parameter": 1}}, "no_such_parameter"),
    ],
)
def test_an_unsupported_parameter_is_named(
    client: openai.OpenAI, parameters: dict[str, object], name: str
) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported") as caught:
        client.completions.create(model="atlas", prompt=PROMPT, **parameters)  # type: ignore[call-overload]
    assert caught.value.param == name


def test_what_would_be_dropped_is_refused_by_name(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    told: dict[str, Any] = {"role": "assistant", "content": "Paris", "refusal": None}
    asked = [*QUESTION, {**told, "tool_calls": [call]}, *QUESTION]
    for name, ask in {
        "messages.1.tool_calls": lambda: client.chat.completions.create(
            model="atlas", messages=asked, max_tokens=1
        ),
        "order": lambda: client.files.list(order="asc"),
        "metadata": lambda: client.fine_tuning.jobs.list(metadata={"team": "a"}),
        "expires_after": lambda: client.files.create(
            file=b"a b c",
            purpose="texts",  # type: ignore[arg-type]
            expires_after={"anchor": "created_at", "seconds": 3600},
        ),
    }.items():
        with pytest.raises(openai.BadRequestError, match="not supported") as caught:
            ask()
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    assert client.files.list(order="desc").object == "list"
    asked[1] = {**told, "tool_calls": [], "annotations": [], "audio": None}
    client.chat.completions.create(model="atlas", messages=asked, max_tokens=1)


def test_too_long_for_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="atlas", prompt=PROMPT, max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
