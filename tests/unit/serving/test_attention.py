"""The packed attention over blocks: alone or many at once, wherever a sequence's blocks lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

import pytest
import torch
from torch import Tensor

from editing.deltas import Effect
from serving.attention import FEWEST_BATCHED, PackedStep
from serving.blocks import BLOCK
from serving.kv import KVPool
from serving.plan import Segment, StepPlan
from serving.runner import Runner
from tests.models import VOCABULARY, random_effect, random_model
from tests.unit.serving.packing import (
    DEVICE,
    Script,
    packed_logits,
    placed,
    plain_logits,
    random_script,
)

#: Where sequences find their blocks: together, with gaps that are no one's, far apart.
PLACES: dict[str, Callable[[], Iterable[int]]] = {
    "together": count,
    "gaps": lambda: (block for block in count() if block % 5),
    "apart": lambda: count(1, 3),
    "backwards": lambda: range(60, -1, -1),
}
#: One of each way in which families attend; windows end within a block and pass several.
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "gemma2": {"sliding_window": 33},
}
EFFECTS = {
    "base": {},
    "keys": {"model.layers.0.self_attn.k_proj": random_effect(1, 32, 64, "rank3")},
}


def runner_of(name: str, *, invariant: bool = False) -> Runner:
    model = random_model(name, **MODELS[name]).to(DEVICE)
    return Runner(model, kv_bytes=2**22, min_rows=4, batch_invariant=invariant)


def scripts(many: int = FEWEST_BATCHED + 2) -> dict[str, Script]:
    """Prompts over no, one and several ends of blocks, some in chunks; then three single tokens."""
    lengths = [(30, 0), (31, 0), (32, 0), (33, 1), (64, 7), (90, 40), (1, 100), (129, 0)]
    return {
        f"s{place}": random_script(
            place, ("base", "keys")[place % 2], *lengths[place % 8], 1, 1, 1, vocabulary=VOCABULARY
        )
        for place in range(many)
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_may_lie_anywhere(name: str, place: str) -> None:
    runner = runner_of(name)
    model = random_model(name, **MODELS[name])
    # what others left there: it must count for nothing
    for layer in range(2):
        for part in runner.pool.layer(layer):
            part.fill_(torch.nan)
    found = packed_logits(runner, scripts(), EFFECTS | effects_for(name), PLACES[place]())
    for key, script in scripts().items():
        plain = plain_logits(model, script.tokens, (EFFECTS | effects_for(name))[script.version])
        for (own, length), logits in found.items():
            if own == key:
                torch.testing.assert_close(logits, plain[length - 1], rtol=1e-3, atol=1e-3)


def effects_for(name: str) -> dict[str, dict[str, Effect]]:
    """Gemma's heads are wider than the others'."""
    wide = {"model.layers.0.self_attn.k_proj": random_effect(1, 64, 64, "rank3")}
    return {"keys": wide} if name == "gemma2" else {}


@pytest.mark.parametrize("name", MODELS)
def test_together_is_what_each_gets_alone(name: str) -> None:
    runner, effects = runner_of(name), EFFECTS | effects_for(name)
    together = packed_logits(runner, scripts(), effects)
    for key, script in scripts().items():
        for place, logits in packed_logits(runner, {key: script}, effects).items():
            torch.testing.assert_close(logits, together[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_sequences_may_share_blocks(name: str) -> None:
    """All begin with the same block, and go on in blocks of their own."""
    runner, model = runner_of(name), random_model(name, **MODELS[name])
    many = FEWEST_BATCHED + 2
    common = random_script(9, "base", BLOCK, vocabulary=VOCABULARY).tokens
    first = Segment("first", 0, "base", common, 0, (50,), 0)
    runner.logits(StepPlan((first,)), placed(EFFECTS))
    rests = [random_script(n, "base", n + 1, 1, vocabulary=VOCABULARY).tokens for n in range(many)]
    for last in (False, True):
        segments = tuple(
            Segment(n, 0, "base", *own(rest, last), (50, n), 1) for n, rest in enumerate(rests)
        )
        logits = runner.logits(StepPlan(segments), placed(EFFECTS)).cpu()
        for segment, rest, row in zip(segments, rests, logits, strict=True):
            plain = plain_logits(model, common + rest[: segment.end - BLOCK], {})
            torch.testing.assert_close(row, plain[-1], rtol=1e-3, atol=1e-3)


def own(rest: tuple[int, ...], last: bool) -> tuple[tuple[int, ...], int]:
    """A segment's tokens and position: all but the last token, or that."""
    return (rest[-1:], BLOCK + len(rest) - 1) if last else (rest[:-1], BLOCK)


def test_many_single_tokens_share_their_products() -> None:
    """Otherwise the tests above compare a way with itself."""
    pool = KVPool(1, 64, 2, 16, torch.float32, torch.device("cpu"))

    def step(blocks: list[int], *, batched: bool = True) -> PackedStep:
        segments = (Segment(b, 0, "v", (1,), 3, (b,), 1) for b in blocks)
        return PackedStep(StepPlan(tuple(segments)), pool, batched=batched)

    several = list(range(FEWEST_BATCHED))
    dense, far = step(several).singles(0), step([9 * block for block in several]).singles(0)
    assert dense is not None
    assert far is not None
    assert (dense._range is not None, far._range is not None) == (True, False)
    assert step(several[1:]).singles(0) is None
    assert step(several, batched=False).singles(0) is None


def test_a_batch_takes_no_numbers_from_blocks_of_others() -> None:
    """The pool read in place holds other sequences' blocks too, finite or not."""
    pool = KVPool(1, 64, 2, 16, torch.float32, torch.device("cpu"))
    keys, values = pool.layer(0)
    generator = torch.Generator().manual_seed(0)
    for part in (keys, values):
        part.copy_(torch.randn(part.shape, generator=generator))
    blocks = [block for block in range(20) if block % 5 != 3]
    segments = tuple(
        Segment(place, 0, "v", (1,), 2 * BLOCK - 1, tuple(blocks[place : place + 2]), 1)
        for place in range(0, len(blocks), 2)
    )
    query = torch.randn(len(segments), 4, 16, generator=generator)

    def attended() -> Tensor:
        batch = PackedStep(StepPlan(segments), pool, batched=True).singles(0)
        assert batch is not None
        assert batch._range is not None
        return batch.attend(query, keys, values, 0.25, None)

    before = attended()
    for bad in (torch.nan, torch.inf, -torch.inf):
        for part in (keys, values):
            part[[3, 8, 13, 18]] = bad
        assert torch.equal(attended(), before)
    for part in (keys, values):
        part[blocks[0]] = torch.nan
    after = attended()
    assert after[0].isnan().all()
    assert torch.equal(after[1:], before[1:])
