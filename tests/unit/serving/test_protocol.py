from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from registry import errors
from registry.manifests import BaseRef, VersionManifest
from serving.frames import FrameError, encode_frame, read_frame
from serving.protocol import (
    GenerateRequest,
    Grammar,
    Piece,
    Proxy,
    SamplingParams,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
    VersionRef,
    error_from_json,
    error_to_json,
)

MANIFEST = VersionManifest(BaseRef("atlas", "0" * 64), ("1" * 64, "2" * 64))
VERSION = VersionRef.of(MANIFEST)


def test_a_reference_names_the_version_and_its_composed_weights() -> None:
    assert VersionRef(MANIFEST.id, "atlas", MANIFEST.stack, MANIFEST.stack_digest) == VERSION


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest(VERSION, prompt="è \ud800"),
        GenerateRequest(VERSION, SamplingParams(5, 0.5, 0.9, 3, ("a", "b"), 1, 2, True), "x"),
        GenerateRequest(
            VERSION,
            SamplingParams(
                min_p=0.1,
                repetition_penalty=1.1,
                presence_penalty=-1,
                frequency_penalty=2,
                logit_bias=((1, 2.5), (7, -100.0)),
                stop_token_ids=(5, 6),
                grammar=Grammar("regex", "è+"),
            ),
            "x",
            proxy=Proxy(VERSION, VERSION, 0.5),
        ),
        GenerateRequest(VERSION, SamplingParams(max_tokens=0), "x", echo=True),
        GenerateRequest(VERSION, prompt_tokens=(1, 2)),
        GenerateRequest(VERSION, messages=({"role": "user", "content": "hello"},), samples=3),
    ],
)
def test_requests_travel_unchanged(request_: GenerateRequest) -> None:
    assert GenerateRequest.from_json(json.loads(json.dumps(request_.to_json()))) == request_


def test_samples_differ_in_their_seed_alone() -> None:
    request = GenerateRequest(VERSION, SamplingParams(seed=2**63 - 1), "x", samples=3)
    seeds = [request.sample(index).params.seed for index in range(3)]
    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert request.sample(0) == replace(request, samples=1)
    free = replace(request, params=SamplingParams())
    assert free.sample(2) == replace(free, samples=1)


@pytest.mark.parametrize(
    "piece",
    [
        Piece("text", (1, 2)),
        Piece("", (), None, "stop", Usage(3, 0)),
        Piece("x", (7,), prompt_tokens=3),
        Piece("", (), None, "stop", Usage(3, 0), Timing(0.1, 1 / 3, 2.5)),
        Piece("x", (7,), (TokenLogprob(7, "x", None), TokenLogprob(8, "y", -0.25, (), 3))),
        Piece("x", (7,), (TokenLogprob(7, "x", -0.1 / 3, (TopLogprob(7, "x", -1e-9 / 7),)),)),
    ],
)
def test_pieces_travel_to_the_last_bit(piece: Piece) -> None:
    assert Piece.from_json(json.loads(json.dumps(piece.to_json()))) == piece


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("a",) * 17}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ("a" * 1001,)}, "stop"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": tuple((n, 1.0) for n in range(301))}, "logit_bias"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"stop_token_ids": tuple(range(65))}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"min_tokens": 1, "grammar": Grammar("regex", "a")}, "min_tokens"),
        ({"ignore_eos": True, "grammar": Grammar("regex", "a")}, "ignore_eos"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, object], param: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_what_does_not_fit_together_is_named() -> None:
    for make, param in (
        (lambda: GenerateRequest(VERSION, SamplingParams(max_tokens=0), "x"), "max_tokens"),
        (lambda: Grammar("regex", "a" * 65_537), "response_format"),
        (lambda: Proxy(VERSION, VERSION, float("inf")), "proxy.alpha"),
    ):
        with pytest.raises(errors.InvalidRequest) as caught:
            make()
        assert caught.value.param == param


def test_the_voices_are_the_version_then_expert_and_anti_expert() -> None:
    expert, anti = (VersionRef.of(VersionManifest(MANIFEST.base, (digit * 64,))) for digit in "34")
    assert GenerateRequest(VERSION, prompt="x").versions == (VERSION,)
    proxied = GenerateRequest(VERSION, prompt="x", proxy=Proxy(expert, anti))
    assert proxied.versions == (VERSION, expert, anti)


def test_a_request_has_exactly_one_prompt() -> None:
    for both in ({}, {"prompt": "a", "prompt_tokens": (1,)}):
        with pytest.raises(errors.InvalidRequest):
            GenerateRequest(VERSION, **both)  # type: ignore[arg-type]


def test_errors_arrive_as_they_were_raised() -> None:
    for error in (
        errors.InvalidRequest("too long", param="prompt", code="context_length_exceeded"),
        errors.VersionUnavailable("gone"),
        errors.TooManyRequests("later", retry_after=3),
        errors.ErrataError("inside"),
    ):
        found = error_from_json(json.loads(json.dumps(error_to_json(error))))
        assert type(found) is type(error)
        assert (found.status, found.body(), found.retry_after) == (
            error.status,
            error.body(),
            error.retry_after,
        )


def test_an_error_of_no_known_class_is_still_an_error() -> None:
    body = error_to_json(errors.ErrataError("what")) | {"class": "annotations"}
    assert type(error_from_json(body)) is errors.ErrataError


def read(data: bytes) -> dict[str, object] | None:
    async def run() -> dict[str, object] | None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read_frame(reader)

    return asyncio.run(run())


def test_frames_hold_their_length() -> None:
    frame = encode_frame({"text": "é"})
    assert read(frame + b"more") == {"text": "é"}
    assert read(b"") is None
    for broken in (
        frame[:2],
        frame[:-1],
        b"\xff\xff\xff\xff",
        b"\0\0\0\2[]",
        b"\0\0\0\3{}}",
    ):
        with pytest.raises(FrameError):
            read(broken)
