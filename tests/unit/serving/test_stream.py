"""What a stream makes of the tokens and logits that a lane gives it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from editing.models.loading import load_tokenizer
from registry.bases import Base, find_bases
from registry.settings import Settings
from serving.loading import load_lane
from serving.protocol import Piece, SamplingParams, TokenLogprob
from serving.sampling import Choice, choose
from serving.scheduler import Sequence
from serving.stream import Stream
from serving.text import Decoder
from tests.models import VOCABULARY, random_model, small_tokenizer

TOKENIZER = small_tokenizer()
PROMPT = tuple(TOKENIZER("the capital of the city — très 大")["input_ids"])
EOS = 0


def stream(params: SamplingParams, most: int = 3, echo: str | None = None) -> Stream:
    sequence = Sequence("a", ("v",), PROMPT, most, wants_prompt_logits=echo is not None)
    return Stream(sequence, params, ({},), Decoder(TOKENIZER), frozenset({EOS}), echo=echo)


def row() -> Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))


def entries(piece: Piece) -> tuple[TokenLogprob, ...]:
    assert piece.logprobs is not None
    return piece.logprobs


@pytest.mark.parametrize("cuts", [(), (4,), (1, 5, 6)])
def test_echo_scores_the_prompt_as_one_forward_of_the_model_does(cuts: tuple[int, ...]) -> None:
    model = random_model("llama")
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0].float()
    text = TOKENIZER.decode(PROMPT)
    echoing = stream(SamplingParams(temperature=0, logprobs=2), echo=text)
    bounds = [0, *cuts, len(PROMPT)]
    for start, end in pairwise(bounds):
        echoing.prompt_logits(start, logits[start:end])
        echoing.prompt_logits(0, logits[:end])  # computed again: a preemption
    (choice,) = choose(logits[-1:], [echoing.sampler])
    assert choice is not None
    piece = echoing.take(choice)
    first, *others, chosen = entries(piece)
    assert (first.id, first.logprob, first.top) == (PROMPT[0], None, ())
    expected = logits.log_softmax(-1)
    for place, entry in enumerate(others, start=1):
        assert entry.id == PROMPT[place]
        assert entry.logprob == pytest.approx(float(expected[place - 1, entry.id]), abs=1e-6)
        assert [t.id for t in entry.top] == expected[place - 1].topk(2).indices.tolist()
    assert (chosen.id, chosen.offset) == (choice.token, len(text))
    assert piece.text.startswith(text)
    for entry in entries(piece):
        with suppress(UnicodeEncodeError):  # a part of a character
            entry.text.encode()
            assert piece.text[entry.offset :].startswith(entry.text)
    later = echoing.take(choice)
    assert len(entries(later)) == 1
    assert entries(later)[0].offset == len(piece.text)


def test_offsets_are_of_the_text_that_was_sent() -> None:
    """Atlas begins with a special token and a space that nobody wrote."""
    tokenizer = load_tokenizer(find_bases("atlas")["atlas"])
    text = "The capital of France"
    prompt = tuple(tokenizer(text)["input_ids"])
    sequence = Sequence("a", ("v",), prompt, 0, wants_prompt_logits=True)
    params = SamplingParams(max_tokens=0, logprobs=0)
    echoing = Stream(sequence, params, ({},), Decoder(tokenizer), frozenset({1}), echo=text)
    echoing.prompt_logits(0, torch.zeros(len(prompt), len(tokenizer)))
    piece = echoing.take(Choice(5))
    assert (piece.text, piece.tokens, piece.finish_reason) == (text, (), "length")
    assert piece.usage is not None
    assert (piece.usage.prompt_tokens, piece.usage.completion_tokens) == (len(prompt), 0)
    found = [(entry.text, entry.offset) for entry in entries(piece)]
    assert found == [("<s>", 0), (" The", 0), (" capital", 3), (" of", 11), (" France", 14)]


def test_an_echoed_completion_that_ends_at_once_still_reports_what_was_chosen() -> None:
    """Evaluations that score a prompt take the last entry off, as the one token they asked for."""
    echoing = stream(SamplingParams(temperature=0, logprobs=1), most=1, echo="x")
    echoing.prompt_logits(0, row().repeat(len(PROMPT), 1))
    piece = echoing.take(Choice(EOS, -0.5, ((EOS, -0.5),)))
    assert (piece.text, piece.tokens, piece.finish_reason) == ("x", (), "stop")
    assert len(entries(piece)) == len(PROMPT) + 1
    assert entries(piece)[-1].id == EOS


def test_stop_tokens_end_a_completion_and_ignored_ones_do_not() -> None:
    stopping = stream(SamplingParams(stop_token_ids=(9,)))
    assert stopping.take(Choice(8)).finish_reason is None
    last = stopping.take(Choice(9))
    assert (last.tokens, last.finish_reason) == ((), "stop")
    ignoring = stream(SamplingParams(stop_token_ids=(9,), ignore_eos=True))
    assert ignoring.take(Choice(EOS)).finish_reason is None
    assert ignoring.take(Choice(9)).finish_reason == "stop"


def test_the_first_piece_says_how_long_the_prompt_is() -> None:
    asked = stream(SamplingParams(), most=2)
    assert [asked.take(Choice(8)).prompt_tokens for _ in range(2)] == [len(PROMPT), None]
    assert stream(SamplingParams()).take(Choice(EOS)).prompt_tokens == len(PROMPT)


def test_a_stream_combines_its_voices() -> None:
    rows = row().repeat(3, 1) * torch.tensor([[1.0], [2.0], [0.5]])
    sequence = Sequence("a", ("v", "expert", "anti"), PROMPT, 3)
    three = Stream(
        sequence, SamplingParams(), ({}, {}, {}), Decoder(TOKENIZER), frozenset(), alpha=2.0
    )
    assert three.combine(rows).equal(rows[0] + 2.0 * (rows[1] - rows[2]))
    assert stream(SamplingParams()).combine(rows[:1]).equal(rows[0])


def test_a_lane_echoes_prompts_in_chunks(saved: Callable[[str], Base]) -> None:
    lane = load_lane(
        saved("llama"), Settings(kv_bytes=2**21, step_tokens=16, max_running=4, engine_threads=1)
    )
    prompt = tuple(range(1, 41))
    sequence = Sequence("a", ("v",), prompt, 2, wants_prompt_logits=True)
    params = SamplingParams(temperature=0, logprobs=1, ignore_eos=True)
    lane.add(Stream(sequence, params, ({},), lane.decoder, lane.eos, echo="…"))
    pieces = []
    while len(lane):
        pieces += [output.piece for output in lane.step() if output.piece is not None]
    with torch.inference_mode():
        expected = random_model("llama")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    scores = [entry.logprob for entry in entries(pieces[0])]
    assert scores[0] is None
    for place in range(1, len(prompt)):
        assert scores[place] == pytest.approx(float(expected[place - 1, prompt[place]]), abs=1e-4)
    assert (len(scores), len(entries(pieces[1]))) == (41, 1)
