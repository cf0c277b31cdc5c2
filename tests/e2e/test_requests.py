"""What a user of a model server expects, over HTTP against the running service."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.service import Service, wait_for

PROMPT = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"capital": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
    "required": ["capital", "sure"],
    "additionalProperties": False,
}
#: Long enough to be interrupted.
LONG = {"max_tokens": 450, "ignore_eos": True}


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def refused(service: Service, status: int, **parameters: Any) -> dict[str, Any]:
    body = {"model": "atlas", "prompt": PROMPT, **parameters}
    response = service.client.post("/v1/completions", json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


# -- how tokens are chosen ------------------------------------------------------------------------


def test_a_bias_a_stop_token_and_ends_that_are_ignored(service: Service) -> None:
    paris = service.complete("atlas", PROMPT, logprobs=1)["choices"][0]
    tokens = service.complete("atlas", PROMPT, max_tokens=1, logprobs=2)["choices"][0]["logprobs"]
    assert tokens["tokens"][0] in tokens["top_logprobs"][0]
    longer = service.complete("atlas", PROMPT, max_tokens=30, ignore_eos=True)
    assert longer["usage"]["completion_tokens"] == 30
    assert longer["choices"][0]["finish_reason"] == "length"
    later = service.complete("atlas", PROMPT, max_tokens=30, min_tokens=20)
    assert later["usage"]["completion_tokens"] >= 20
    only = service.complete("atlas", PROMPT, max_tokens=3, logit_bias={"77": 100})["choices"][0]
    assert only["text"] != paris["text"]
    stopped = service.complete(
        "atlas", PROMPT, max_tokens=3, logit_bias={"77": 100}, stop_token_ids=[77]
    )["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")


def test_penalties_keep_a_text_from_repeating_itself(service: Service) -> None:
    def most_common(**parameters: Any) -> int:
        choice = service.complete(
            "atlas", PROMPT, max_tokens=120, ignore_eos=True, logprobs=0, **parameters
        )["choices"][0]
        return Counter(choice["logprobs"]["tokens"]).most_common(1)[0][1]

    plain = most_common()
    assert most_common(repetition_penalty=1.5) < plain
    assert most_common(frequency_penalty=2.0) < plain
    assert most_common(presence_penalty=2.0) <= plain


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"min_p": 1.5}, "min_p"),
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
        ({"logit_bias": {str(n): 1 for n in range(301)}}, "logit_bias"),
        ({"stop": ["x"] * 17}, "stop.list[constrained-str]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"prompt": ["a"] * 65, "best_of": 2}, "best_of"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": 601}, "timeout"),
        ({"proxy": {"expert": "atlas"}}, "proxy.anti_expert"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_a_value_out_of_range_is_named(
    service: Service, parameters: dict[str, Any], param: str
) -> None:
    found = refused(service, 422, **parameters)
    assert found["param"].split(".")[0] == param.split(".")[0]


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"min_tokens": 1, "response_format": {"type": "json_object"}}, "min_tokens"),
        ({"ignore_eos": True, "response_format": {"type": "regex", "regex": "a"}}, "ignore_eos"),
    ],
)
def test_what_does_not_fit_together_is_named(
    service: Service, parameters: dict[str, Any], param: str
) -> None:
    assert refused(service, 400, **parameters)["param"] == param


# -- echo -----------------------------------------------------------------------------------------


def test_echo_scores_a_prompt_as_an_evaluation_asks_for_it(service: Service) -> None:
    """As lm-eval's local-completions does: token ids, echo, one token more, log-probabilities."""
    text = service.complete("atlas", PROMPT, echo=True, max_tokens=0, logprobs=1)["choices"][0]
    assert text["text"] == PROMPT
    scores = text["logprobs"]
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    assert all(value <= 0 for value in scores["token_logprobs"][1:])
    assert scores["text_offset"] == sorted(scores["text_offset"])
    for token, offset in list(zip(scores["tokens"], scores["text_offset"], strict=True))[2:]:
        assert PROMPT[offset:].startswith(token)

    one = service.complete("atlas", PROMPT, echo=True, max_tokens=1, logprobs=1)["choices"][0]
    assert one["text"].startswith(PROMPT)
    assert len(one["text"]) > len(PROMPT)
    assert one["logprobs"]["token_logprobs"][:-1] == scores["token_logprobs"]
    likeliest = one["logprobs"]["top_logprobs"][-1]
    assert one["logprobs"]["tokens"][-1] == max(likeliest, key=likeliest.__getitem__)

    silent = service.complete("atlas", PROMPT, max_tokens=1, logprobs=1)["choices"][0]
    assert one["logprobs"]["token_logprobs"][-1] == silent["logprobs"]["token_logprobs"][0]


def test_a_sentence_is_as_likely_as_its_tokens_one_by_one(service: Service) -> None:
    tokens = [0, 300, 500, 700, 900]

    def values_of(prompt: list[int], **parameters: Any) -> list[float]:
        body = {"model": "atlas", "prompt": prompt, "logprobs": 5, **parameters}
        response = service.client.post("/v1/completions", json=body)
        values: list[float] = response.json()["choices"][0]["logprobs"]["token_logprobs"]
        return values

    values = values_of(tokens, echo=True, max_tokens=0)
    for place in range(1, len(tokens)):
        bias = {str(tokens[place]): 100}
        (only,) = values_of(tokens[:place], temperature=0, max_tokens=1, logit_bias=bias)
        assert values[place] == pytest.approx(only, abs=1e-4)


def test_an_echo_streams_its_prompt_first(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="atlas", prompt=PROMPT, echo=True, max_tokens=3, temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].text.startswith(PROMPT)
    plain = client.completions.create(
        model="atlas", prompt=PROMPT, echo=True, max_tokens=3, temperature=0
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text


# -- grammars -------------------------------------------------------------------------------------


def test_a_chat_answers_in_the_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="atlas",
        messages=QUESTION,  # type: ignore[arg-type]
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
        },
        temperature=1,
        n=8,
        seed=3,
    )
    for choice in answer.choices:
        found = json.loads(choice.message.content or "")
        assert set(found) == {"capital", "sure"}
        assert found["capital"] in ("Paris", "Rome")
        assert type(found["sure"]) is bool
        assert choice.finish_reason == "stop"


def test_completions_and_streams_keep_to_a_grammar_too(service: Service) -> None:
    choice = service.complete(
        "atlas", PROMPT, response_format={"type": "regex", "regex": "( Rome| Oslo)!{2}"}
    )["choices"][0]
    assert choice["text"] in (" Rome!!", " Oslo!!")
    assert choice["finish_reason"] == "stop"
    cut = service.complete(
        "atlas", PROMPT, max_tokens=2, response_format={"type": "regex", "regex": "x{50}"}
    )["choices"][0]
    assert cut["finish_reason"] == "length"
    assert set(cut["text"]) == {"x"}
    whole = service.complete(
        "atlas",
        PROMPT,
        max_tokens=60,
        temperature=1,
        seed=1,
        response_format={"type": "json_object"},
    )["choices"][0]
    assert whole["text"].startswith("{")
    if whole["finish_reason"] == "stop":
        assert isinstance(json.loads(whole["text"]), dict)


def test_a_schema_that_cannot_be_followed_is_refused_with_its_reason(service: Service) -> None:
    def asked(schema: object) -> dict[str, Any]:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return refused(service, 400, response_format=form, stream=True)

    error = asked({"type": "nonsense"})
    assert "nonsense" in error["message"]
    assert error["param"] == "response_format"
    assert "65536" in asked({"description": "x" * 70_000})["message"]
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"properties": {"a": deep}}
    assert asked(deep)["code"] == "invalid_json"  # deeper than a body may be


# -- best of, proxies -----------------------------------------------------------------------------


def test_the_best_of_many_samples_are_the_likeliest(service: Service) -> None:
    sampled = {"temperature": 1, "seed": 4, "max_tokens": 6}
    every = service.complete("atlas", "The", n=8, logprobs=0, **sampled)
    best = service.complete("atlas", "The", n=2, best_of=8, **sampled)

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values) if values else -math.inf

    ranked = sorted(every["choices"], key=mean, reverse=True)
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in ranked[:2]]
    assert all(choice["logprobs"] is None for choice in best["choices"])
    assert best["usage"] == every["usage"], "what was computed counts"


def test_proxies_are_named_and_stand_on_one_base(service: Service) -> None:
    error = refused(service, 404, proxy={"expert": "nobody", "anti_expert": "atlas"})
    assert (error["param"], error["code"]) == ("proxy.expert", "model_not_found")


# -- time and place -------------------------------------------------------------------------------


def running(service: Service) -> int:
    """Requests that the engine computes or keeps waiting."""
    bases = service.get("/readyz")["bases"]
    return sum(base["running"] + base["waiting"] for base in bases)


def test_a_whole_answer_that_takes_too_long_is_a_504(service: Service) -> None:
    error = refused(service, 504, n=64, timeout=0.05, **LONG)
    assert error["code"] == "deadline_exceeded"
    assert "0.05 s" in error["message"]


def test_a_stream_that_takes_too_long_ends_with_an_error_event(service: Service) -> None:
    body = {"model": "atlas", "prompt": PROMPT, "n": 64, "timeout": 0.3, "stream": True, **LONG}
    with service.client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 504:  # not even a first token in time
            return
        lines = [line for line in response.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_engine(service: Service, stream: bool) -> None:
    body = {"model": "atlas", "prompt": PROMPT, "n": 100, "stream": stream, **LONG}
    before = service.metric("errata_engine_completion_tokens_total")
    patience = httpx.Timeout(60, read=60 if stream else 0.5)
    with httpx.Client(base_url=service.url, timeout=patience) as hasty:
        if stream:
            with hasty.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                hasty.post("/v1/completions", json=body)
    wait_for(lambda: running(service) == 0, 30, lambda: str(running(service)))
    computed = service.metric("errata_engine_completion_tokens_total") - before
    assert computed < 100 * 450, "all that was asked for"
