"""Completions that would cost too much, and grammars that are bombs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from editing.datasets.rewards import read_reward, score
from editing.datasets.rows import Row
from registry.errors import JobFailed, UnprocessableRequest
from tests.security.attacks import (
    JSON,
    PATIENCE,
    Attack,
    at_rest,
    check_refused,
    posted,
    sent,
    trace,
    tried,
)
from tests.security.names import EDIT
from tests.service import Service

ASK: dict[str, Any] = {"model": "atlas", "prompt": "The capital of France is", "max_tokens": 4}
USER = {"role": "user", "content": "x"}

#: What either kind of completion refuses, by field.
BOMBS: dict[str, list[Any]] = {
    "n": [0, -1, 129, 10**9, 1.5, "many", [1]],
    "best_of": [0, 129, 10**9],
    "max_tokens": [-1, 1_000_001, 10**9, 2**63, 1.5],
    "min_tokens": [-1, 5, 1_000_001],
    "temperature": [-0.1, 2.1, 1e300],
    "top_p": [0, -1, 1.1],
    "top_k": [-1, 1_000_001, 10**12],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 101],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "seed": [2**63, -(2**63) - 1, 10**30, 1.5],
    "timeout": [0, -1, 601, 1e9],
    "stop": [[""], "", ["x"] * 17, "x" * 1001, [["x"]], {"a": "b"}, [1]],
    "stop_token_ids": [[-1], [0] * 65, [10**9], ["x"], "x"],
    "logit_bias": [
        {str(i): 1 for i in range(301)},
        {str(i): 1 for i in range(6000)},
        {"0": 101},
        {"-1": 1},
        {"1e3": 1},
        {"²": 1},
        {"x": 1},
        {"999999999": 1},
        {"9999999999": 1},
        [1],
        "x",
    ],
    "logprobs": [-1, 10**6, "x"],
    "stream": ["x", 7],
    "stream_options": ["x", [1]],
    "user": ["x" * 1001, 7],
    "safety_identifier": ["x" * 1001],
    "suffix": ["x"],
    "tools": [[{"type": "function"}]],
    "functions": [[{"name": "x"}]],
    "proxy": [{}, {"expert": "atlas"}, {"expert": "atlas", "anti_expert": "atlas", "alpha": 101}],
    "metadata": [{"a": "b"}],
    "service_tier": ["flex"],
    "model": ["", "x" * 257, "ver_" + "0" * 40, "base_", "base_../x", 7, None, ["atlas"]],
    "is_admin": [True],
}
PROMPTS: list[Any] = [
    [], [""] * 129, ["x"] * 128 + [1], [[]], [[1], []], [-1], [10**9], [2**70], [1.5], [True, "x"],
    7, None, {"a": 1}, [[["x"]]], "x" * 1_000_001, [0] * 600, "x " * 20_000, [[0] * 600],
]  # fmt: skip
MESSAGES: list[Any] = [
    [], [USER] * 1001, [{"role": "root", "content": "x"}], [{"role": "user"}], [{"content": "x"}],
    [{"role": "user", "content": 7}], [{"role": "user", "content": [7]}], "x", [[]], {},
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": "x" * 1_000_001}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1001}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}],
    [{"role": "user", "content": "x " * 20_000}],
    [{"role": "tool", "content": "x", "tool_call_id": "y"}],
]  # fmt: skip


def bombs() -> Iterator[Attack]:
    for name, values in BOMBS.items():
        for value in values:
            yield posted(f"{name}={value!r:.30}", "/v1/completions", {**ASK, name: value})
    chat = {"model": "atlas", "messages": [USER], "max_tokens": 4}
    for name in ("n", "best_of", "stop", "logit_bias", "stop_token_ids", "tools", "model"):
        for value in BOMBS[name]:
            told = f"chat: {name}={value!r:.30}"
            yield posted(told, "/v1/chat/completions", {**chat, name: value})
    for prompt in PROMPTS:
        yield posted(f"prompt {prompt!r:.30}", "/v1/completions", {**ASK, "prompt": prompt})
    for messages in MESSAGES:
        told = f"messages {messages!r:.60}"
        yield posted(told, "/v1/chat/completions", {**chat, "messages": messages})
    for many in ({"n": 2, "prompt": ["x"] * 65}, {"best_of": 3, "n": 1, "prompt": ["x"] * 43}):
        yield posted("too many together", "/v1/completions", {**ASK, **many})
    for wrong in ({"best_of": 2, "n": 3}, {"best_of": 2, "stream": True}, {"max_tokens": 0}):
        yield posted(f"{wrong}", "/v1/completions", {**ASK, **wrong})
    yield posted("top", "/v1/chat/completions", {**chat, "top_logprobs": 21, "logprobs": True})
    yield posted("both", "/v1/chat/completions", {**chat, "top_logprobs": 2})


def test_completions_that_would_cost_too_much(service: Service) -> None:
    check_refused(service, bombs(), what="completions")
    assert service.text("atlas", "The capital of France is").startswith("Paris")


def nested() -> Iterator[Attack]:
    """Values as deep as JSON is read and deeper, where otherwise all is right."""
    deep = "DEEP"
    edits = {"endpoint": "atlas", "edits": [EDIT]}
    schema = {"type": "json_schema", "json_schema": {"schema": deep}}
    tuning = {"model": "atlas", "training_file": "file-0"}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/edits", {**edits, "edits": [{**EDIT, "prompt": deep}]}),
        ("/v1/edits", {**edits, "hyperparameters": deep}),
        ("/v1/edits", {**edits, "guards": deep}),
        ("/v1/completions", {**ASK, "response_format": schema}),
        ("/v1/completions", {**ASK, "extra": deep}),
        ("/v1/merges", {"versions": [{"id": "ver_" + "0" * 40}], "hyperparameters": deep}),
        ("/v1/fine_tuning/jobs", {**tuning, "method": {"type": "lora", "lora": deep}}),
        ("/v1/fine_tuning/jobs", {**tuning, "preprocessing": [deep]}),
    ]
    for depth in (101, 200, 400, 600, 800, 900, 950, 980, 2000):
        value = '{"a":' * depth + "1" + "}" * depth
        for path, body in bodies:
            data = json.dumps(body).replace('"DEEP"', value).encode()
            yield Attack(f"{path} {depth} deep: {str(body)[-60:]}", "POST", path, data, JSON)


def test_values_that_are_deep(service: Service) -> None:
    check_refused(service, nested(), what="deep values")


# -- grammars -----------------------------------------------------------------------------------

REGEXES = [
    "(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*)*x", "(.*a){25}", "a{100000}", "(a{100}){100}",
    "((a{100}){100}){100}", "(((a*)*)*)*", "(x+x+)+y", "[^\\s\\S]", ".{0,100000}",
    "(a?){500}a{500}",
    "(?=a)b", "(?<!a)b", "(a)\\1", "(?P<x>a)(?P=x)", "(?R)", "(", ")", "[", "[z-a]", "*", "a**",
    "\\", "a{2,1}", "a{-1}", "(?i", "\\p{Evil}", "(" * 10_000 + ")" * 10_000, "a|" * 20_000,
    "\x00", "(?#", "\\u{110000}", "x" * 70_000, "é" * 40_000,
    "(?s).*" * 1000, "[a-z]{1,1000}{1,1000}",
]  # fmt: skip
LOOP: dict[str, Any] = {"$ref": "#"}
SCHEMAS: list[Any] = [
    {"$ref": "#"},
    {"$ref": "http://169.254.169.254/latest"},
    {"$ref": "file:///etc/passwd"},
    {"$ref": "../../etc/passwd"},
    {"$ref": "#/$defs/none"},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "array", "items": LOOP, "minItems": 1},
    {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    {"type": "array", "minItems": 5, "maxItems": 1},
    {"type": "string", "minLength": 10**9},
    {"type": "string", "maxLength": 10**12},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "pattern": "((a{100}){100}){100}"},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "integer", "multipleOf": 0},
    {"type": "integer", "minimum": 10**300},
    {"type": "number", "multipleOf": 1e-300},
    {"type": "evil"},
    {"type": ["string", "evil"]},
    {"enum": []},
    {"enum": [str(i) for i in range(6000)]},
    {"anyOf": []},
    {"not": {}},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"oneOf": [{"type": "object", "properties": {f"a{i}": {}}} for i in range(500)]},
    {"allOf": [{"anyOf": [{"type": "string"}, {"type": "integer"}]} for _ in range(40)]},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    {"type": "object", "required": [f"p{i}" for i in range(3000)]},
    {"type": "object", "patternProperties": {"(a+)+$": {}}},
    {"type": "object", "properties": {"a": "b"}},
    {"type": "object", "additionalProperties": "evil"},
    {"const": "x" * 60_000},
    {"const": "x" * 70_000},
    {"if": {}, "then": {}, "else": {}},
    {"type": "string", "format": "evil"},
    {"__proto__": {"type": "string"}},
    {"x-guidance": {"lark": "start: /a/"}, "type": "string"},
    {"type": "array", "items": {"type": "array", "items": {"type": "array", "maxItems": 10**6}}},
]


def test_grammars_that_are_bombs(service: Service) -> None:
    """Each is refused, or defused: answered in time, while others are answered too."""
    before = at_rest(service)
    formats = [{"type": "regex", "regex": regex} for regex in REGEXES]
    formats += [{"type": "json_schema", "json_schema": {"schema": schema}} for schema in SCHEMAS]
    wrong = []
    for form in formats:
        body = json.dumps({**ASK, "response_format": form}).encode()
        began = time.monotonic()
        answer = sent(service, Attack("", "POST", "/v1/completions", body, JSON))
        told = f"{str(form)[:150]}: {answer.status} {answer.body[:200]!r}"
        if (
            answer.status not in (200, 400, 422)
            or time.monotonic() - began > PATIENCE
            or (answer.status != 200 and "response_format" not in answer.error["param"])
        ):
            wrong.append(told)
    tried["grammars"] = len(formats)
    assert not wrong, "\n".join(wrong)
    assert trace(service) == before
    assert service.text("atlas", "The capital of France is").startswith("Paris")


@pytest.mark.parametrize("regex", REGEXES)
def test_rewards_that_are_bombs(regex: str) -> None:
    """A reward's expression is refused when it is read, or takes no longer than its text."""
    tried["rewards"] = tried.get("rewards", 0) + 1
    began = time.monotonic()
    try:
        reward = read_reward(Row({"regex": regex}, "reward"))
    except UnprocessableRequest:
        reward = None
    if reward is not None:
        for text in ("a" * 5000 + "!", "x" * 5000, "aaab" * 1000):
            with suppress(JobFailed):  # it has too many states on this text
                assert score(reward, text) in (0.0, 1.0)
    assert time.monotonic() - began < PATIENCE
