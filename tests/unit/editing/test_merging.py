"""Merges: what they promise of one version, of order, of seeds; the published definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils as peft
from torch import Tensor

from editing.deltas import Delta, DeltaFile, DeltaWriter, Effect, compose
from editing.deltas.lowrank import truncated
from editing.merging import MERGES
from editing.merging.changes import Input, changes
from editing.merging.conflicts import Conflicts, edit_conflicts
from editing.merging.merge import Plan, Residual, compare, merge, merge_state
from editing.merging.order import order_statistics
from editing.models import ModelView
from registry.artifacts import ArtifactStore
from registry.errors import JobFailed
from registry.manifests import EditRequest, Progress
from tests.models import random_effect
from tests.unit.editing.conftest import FFN, HIDDEN, VOCABULARY, small_view

DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
NORM, Q = "model.layers.1.input_layernorm", "model.layers.2.self_attn.q_proj"
NAMES = sorted(MERGES)
SYMMETRIC = [name for name in NAMES if not MERGES[name].ordered]
#: With nothing dropped; pcb clamps the largest of the whole model and leaves out the smallest.
KEEPING: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "linear": {},
    "concatenation": {},
    "model_stock": {},
    "ties": {"density": 1},
    "dare": {"density": 1},
    "dare_ties": {"density": 1},
    "della": {"density": 1, "epsilon": 0},
    "della_linear": {"density": 1, "epsilon": 0},
    "breadcrumbs": {"density": 1, "gamma": 0},
}
#: What has to stand beside the one version where a method takes no fewer than two.
BESIDE: dict[str, tuple[float, float, dict[str, Any]]] = {
    "slerp": (1.0, 0.0, {}),
    "mos": (1.0, 1.0, {"alpha": 0}),
}


@pytest.fixture(scope="module")
def view(atlas: ModelView) -> ModelView:
    return small_view("llama", atlas)


class Shelf:
    """Versions on disk."""

    def __init__(self, folder: Path, view: ModelView) -> None:
        self.store = ArtifactStore(folder / "artifacts")
        self.view = view

    def version(
        self,
        name: str,
        *stack: Mapping[str, Effect],
        weight: float = 1.0,
        layer_weights: Mapping[int, float] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> Input:
        files = [
            DeltaFile(
                self.store.file(
                    self.store.put(Delta(effects, "0" * 64, "test", state or {}).to_bytes())
                )
            )
            for effects in stack
        ]
        return Input(f"ver_{name}", files, weight, layer_weights or {})

    def merge(
        self, name: str, *inputs: Input, seed: int = 0, rank: int | None = None, **own: Any
    ) -> tuple[str, Delta, Conflicts, Residual]:
        """The digest of what was made, and the rest."""
        entry = MERGES[name]
        plan = Plan(entry, entry.hyperparameters(**own), seed, rank)
        with self.store.scratch() as folder, (folder / "numbers").open("w+b") as scratch:
            writer = DeltaWriter(scratch, "0" * 64, "merge")
            conflicts, residual = last(merge(self.view, inputs, plan, writer))
            merge_state(inputs, writer)
            digest = self.store.put_chunks(writer.chunks())
        return digest, Delta.from_bytes(self.store.get(digest)), conflicts, residual


def last(steps: Any) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@pytest.fixture(scope="module")
def shelf(view: ModelView, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"), view)


def some(seed: int) -> dict[str, Effect]:
    """Effects of every kind that can be merged."""
    kinds = ["rank3", "dense", "sparse", "scale", "all", "rank1"]
    return {
        DOWN[0]: random_effect(seed, HIDDEN, FFN, kinds[seed % 6]),
        DOWN[1]: random_effect(seed + 50, HIDDEN, FFN, kinds[(seed + 1) % 6]),
        Q: random_effect(seed + 60, HIDDEN, HIDDEN, "rank3"),
        NORM: Effect(scale=1 + torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))),
    }


def outputs(view: ModelView, effects: Mapping[str, Effect]) -> Tensor:
    ids = torch.tensor([[5, 9, 2, 700, 31]])
    with torch.no_grad(), view.with_effects(effects):
        return view.logits(view.hidden(ids))


# -- what every method promises -------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KEEPING, *BESIDE])
def test_one_version_at_weight_1_comes_out_as_it_went_in(shelf: Shelf, name: str) -> None:
    stack = [some(3), some(8)]
    if name in KEEPING:
        inputs, own = [shelf.version("a", *stack)], KEEPING[name]
    else:
        first, second, own = BESIDE[name]
        base = shelf.version("z", weight=first if name == "mos" else second)
        inputs = [base, shelf.version("a", *stack, weight=first)]
    _, merged, _, _ = shelf.merge(name, *inputs, **own)
    expected, actual = (outputs(shelf.view, e) for e in (compose(stack), merged.effects))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (expected - outputs(shelf.view, {})).abs().max() > 0.1


def test_one_dense_version_comes_out_to_the_bit(shelf: Shelf) -> None:
    effects = {DOWN[0]: random_effect(1, HIDDEN, FFN, "dense")}
    for name, own in KEEPING.items():
        _, merged, _, _ = shelf.merge(name, shelf.version("a", effects), **own)
        assert torch.equal(merged.effects[DOWN[0]].dense, effects[DOWN[0]].dense), name


def inputs_for(name: str, versions: Sequence[Input]) -> list[Input]:
    return list(versions[: MERGES[name].most])


@pytest.mark.parametrize("name", SYMMETRIC)
def test_order_changes_no_bit_and_a_seed_gives_the_same_ones(shelf: Shelf, name: str) -> None:
    weights = [1.0, 0.3, 2.0]
    made = [shelf.version(f"{i}", some(i), some(i + 9), weight=w) for i, w in enumerate(weights)]
    inputs = inputs_for(name, made)
    digests = {shelf.merge(name, *order, seed=5)[0] for order in permutations(inputs)}
    assert len(digests) == 1
    other = shelf.merge(name, *inputs, seed=6)[0]
    assert (other in digests) != name.startswith(("dare", "della"))


def test_only_the_last_version_of_mos_is_another_thing(shelf: Shelf) -> None:
    a, b, c = (shelf.version(name, some(i)) for i, name in enumerate("abc"))
    assert shelf.merge("mos", a, b, c)[0] == shelf.merge("mos", b, a, c)[0]
    assert shelf.merge("mos", a, b, c)[0] != shelf.merge("mos", a, c, b)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["a zero", "all zero", "single layers", "the base twice"])
def test_nothing_is_no_nan(shelf: Shelf, name: str, what: str) -> None:
    zero = {DOWN[0]: Effect(dense=torch.zeros(HIDDEN, FFN))}
    inputs = {
        "a zero": [shelf.version("a", zero), shelf.version("b", some(1))],
        "all zero": [shelf.version("a", zero), shelf.version("b", zero)],
        "single layers": [
            shelf.version(str(i), {DOWN[i]: random_effect(i, HIDDEN, FFN, "rank1")})
            for i in range(2)
        ],
        "the base twice": [shelf.version("a"), shelf.version("b")],
    }[what]
    _, merged, conflicts, _ = shelf.merge(name, *inputs)  # numbers that are none raise
    assert bool(outputs(shelf.view, merged.effects).isfinite().all())
    if what in ("all zero", "the base twice"):
        assert merged.effects == {}
        assert conflicts.to_json(["ver_a", "ver_b"])["sign_disagreement"] is None


@pytest.mark.parametrize("name", NAMES)
def test_disjoint_inputs_keep_their_places(shelf: Shelf, name: str) -> None:
    parts = [{DOWN[i]: random_effect(i, HIDDEN, FFN, "dense")} for i in range(2)]
    _, merged, _, _ = shelf.merge(name, *(shelf.version(str(i), p) for i, p in enumerate(parts)))
    assert set(merged.effects) <= set(DOWN[:2])


def test_a_layers_weight_stands_in_the_weights_place(shelf: Shelf) -> None:
    one = shelf.version("a", some(1), weight=2.0, layer_weights={0: 0.0, 2: -1.0})
    _, merged, _, _ = shelf.merge("task_arithmetic", one)
    whole = changes(shelf.view, [one], Q)["matrix"][0]
    assert DOWN[0] not in merged.effects
    torch.testing.assert_close(merged.effects[Q].dense, -whole)
    norm = some(1)[NORM].scale
    assert norm is not None
    torch.testing.assert_close(merged.effects[NORM].scale, 1 + 2 * (norm - 1))


def test_the_seed_is_of_tensor_and_version(shelf: Shelf) -> None:
    a, b = shelf.version("a"), shelf.version("b")

    def draw(one: Input, seed: int, name: str) -> float:
        return float(torch.rand(1, generator=one.draws(seed, name)))

    drawn = {draw(a, 0, "m"), draw(a, 0, "n"), draw(a, 1, "m"), draw(b, 0, "m")}
    assert len(drawn) == 4
    assert draw(a, 0, "m") in drawn


def test_overflow_ends_the_job(shelf: Shelf) -> None:
    huge = {DOWN[0]: Effect(dense=torch.full((HIDDEN, FFN), 3e38))}
    versions = [shelf.version(name, huge) for name in "ab"]
    with pytest.raises(JobFailed, match="not finite"):
        shelf.merge("task_arithmetic", *versions)


# -- what is merged -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("kind", ["rank3", "scale", "sparse", "all"])
def test_a_change_is_what_the_effect_does(
    atlas: ModelView, tmp_path: Path, family: str, kind: str
) -> None:
    """The scale of a linear with a bias scales the bias too."""
    view = small_view(family, atlas)
    path = view.part(1, "down_proj")
    norm = view.part(1, "mlp_norm")
    effects = {
        path: random_effect(1, HIDDEN, FFN, kind),
        norm: random_effect(2, HIDDEN, HIDDEN, "scale"),
    }
    shelf = Shelf(tmp_path, view)
    one = shelf.version("a", effects)
    assert set(changes(view, [one], norm)) == {"scale", "shift"}
    assert "scale" not in changes(view, [one], path)
    _, merged, _, _ = shelf.merge("linear", one)
    expected, actual = outputs(view, effects), outputs(view, merged.effects)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["rank3", "scale", "all"])
def test_an_embedding_and_the_head_are_merged_too(
    atlas: ModelView, tmp_path: Path, family: str, kind: str
) -> None:
    """Where an embedding's output is scaled, the effect's scale is one of the output."""
    view = small_view(family, atlas)
    effects = {
        "model.embed_tokens": random_effect(1, HIDDEN, VOCABULARY, kind),
        "lm_head": random_effect(2, VOCABULARY, HIDDEN, kind),
    }
    shelf = Shelf(tmp_path, view)
    _, merged, _, _ = shelf.merge("linear", shelf.version("a", effects))
    expected, actual = outputs(view, effects), outputs(view, merged.effects)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_factors_stand_side_by_side_exactly(shelf: Shelf) -> None:
    parts = [{DOWN[0]: random_effect(i, HIDDEN, FFN, "rank3")} for i in range(2)]
    a = shelf.version("a", parts[0], weight=0.5)
    b = shelf.version("b", parts[1], {DOWN[1]: random_effect(7, HIDDEN, FFN, "dense")})
    _, merged, _, _ = shelf.merge("concatenation", a, b)
    _, dense, _, _ = shelf.merge("task_arithmetic", a, b)
    effect = merged.effects[DOWN[0]]
    assert (effect.rank, effect.dense) == (6, None)
    assert torch.equal(effect.A, torch.cat([part[DOWN[0]].A for part in parts]))
    torch.testing.assert_close(effect.B @ effect.A, dense.effects[DOWN[0]].dense)
    assert torch.equal(merged.effects[DOWN[1]].dense, dense.effects[DOWN[1]].dense)


def test_what_is_mostly_zero_stays_sparse(shelf: Shelf) -> None:
    parts = [{DOWN[0]: random_effect(i, HIDDEN, FFN, "dense")} for i in range(2)]
    versions = [shelf.version(str(i), part) for i, part in enumerate(parts)]
    _, merged, _, _ = shelf.merge("ties", *versions, density=0.1)
    effect = merged.effects[DOWN[0]]
    assert effect.dense is None
    assert effect.sparse is not None
    assert 0.1 <= effect.sparse.values.numel() / (HIDDEN * FFN) <= 0.2


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_rank_says_what_it_leaves_out(shelf: Shelf, rank: int) -> None:
    parts = [{**some(2), DOWN[0]: random_effect(i, HIDDEN, FFN, "rank3")} for i in range(2)]
    versions = [shelf.version(str(i), part) for i, part in enumerate(parts)]
    _, merged, _, residual = shelf.merge("task_arithmetic", *versions, rank=rank)
    _, whole, _, _ = shelf.merge("task_arithmetic", *versions)
    for module, told in residual.modules.items():
        D, effect = whole.effects[module].weight(torch.zeros(1)), merged.effects[module]
        values = torch.linalg.svdvals(D.double())
        lost = float(values[rank:].square().sum() / values.square().sum())
        assert effect.dense is None
        assert effect.rank == told["rank"] <= rank
        assert told["energy"] == pytest.approx(lost, rel=1e-6, abs=1e-9)
        if rank == 6 and module == DOWN[0]:
            torch.testing.assert_close(effect.B @ effect.A, D, rtol=1e-4, atol=1e-5)
    assert 0 <= residual.to_json()["energy"] < 1
    assert set(residual.modules) == {DOWN[0], DOWN[1], Q}


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_truncation_is_the_best_there_is(out: int, inputs: int, rank: int, seed: int) -> None:
    D = torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))
    found = truncated(D, rank)
    values = torch.linalg.svdvals(D.double())
    lost = (D - found.B @ found.A).double().square().sum()
    assert float(lost) == pytest.approx(float(values[rank:].square().sum()), rel=1e-4, abs=1e-8)
    assert found.lost == pytest.approx(float(lost), rel=1e-4, abs=1e-8)
    assert found.energy == pytest.approx(float(values.square().sum()))
    assert found.A.shape == (found.rank, inputs)
    assert found.B.shape == (out, found.rank)
    assert found.rank <= min(rank, *D.shape)


def test_state_is_carried_once_a_delta(shelf: Shelf) -> None:
    keys = [torch.full((4, n), float(n)) for n in (1, 2)]
    first = shelf.version("a", some(1), state={"keys/0": keys[0]})
    second = shelf.version("b", some(2), state={"keys/0": keys[1]})
    both = Input("ver_c", [*first.stack, *second.stack])
    _, merged, _, _ = shelf.merge("task_arithmetic", first, both)
    assert sorted(merged.state["keys/0"][0].tolist()) == [1.0, 2.0, 2.0]


# -- definitions ----------------------------------------------------------------------------------

Oracle = Callable[[Sequence[Tensor], Tensor], Tensor]


def applied(name: str, taus: Tensor, weights: Tensor, seed: int = 0, **own: Any) -> Tensor:
    """The method on one tensor, every version drawing from one and the same generator."""
    entry = MERGES[name]
    draws = [torch.Generator().manual_seed(seed)] * len(taus)
    function = entry.load()
    if entry.whole:
        function = last(function(lambda: iter([taus.clone()]), entry.hyperparameters(**own)))
    merged: Tensor = function(taus.clone(), weights, entry.hyperparameters(**own), draws)
    return merged


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAMBDAS = torch.tensor([0.7, 1.0, 0.4])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("density", [0.3, 0.7])
@pytest.mark.parametrize(("majority", "theirs"), [("sum", "total"), ("count", "frequency")])
def test_ties_is_pefts(seed: int, density: float, majority: str, theirs: Any) -> None:
    taus = numbers(seed, 3, 6, 7)
    own = {"elect_on": "changes", "divide_by": "count", "majority": majority}
    actual = applied("ties", taus, LAMBDAS, density=density, **own)
    expected = peft.ties(list(taus), LAMBDAS, density, theirs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("seed", range(5))
def test_dare_and_dare_ties_are_pefts(seed: int) -> None:
    taus = numbers(seed, 3, 6, 7)
    torch.manual_seed(seed)
    expected = peft.dare_linear(list(taus), LAMBDAS, 0.4)
    torch.testing.assert_close(applied("dare", taus, LAMBDAS, seed, density=0.4), expected)
    torch.manual_seed(seed)
    expected = peft.dare_ties(list(taus), LAMBDAS, 0.4)
    own: dict[str, Any] = {"elect_on": "changes", "divide_by": "count", "density": 0.4}
    torch.testing.assert_close(applied("dare_ties", taus, LAMBDAS, seed, **own), expected)
    expected = peft.task_arithmetic(list(taus), LAMBDAS)
    torch.testing.assert_close(applied("task_arithmetic", taus, LAMBDAS), expected)


def mergekits_consensus(taus: Tensor, weights: Tensor, majority: str, normalize: bool) -> Tensor:
    """Entry by entry: the weighted changes elect a sign, and the agreeing weights divide."""
    merged = torch.zeros(taus[0].numel())
    for place, column in enumerate(taus.flatten(1).T.tolist()):
        weighted = [w * x for w, x in zip(weights.tolist(), column, strict=True)]
        votes = weighted if majority == "sum" else [math.copysign(x != 0, x) for x in weighted]
        sign = 1 if sum(votes) >= 0 else -1
        agreeing = [i for i, x in enumerate(weighted) if x * sign > 0]
        total = sum(weighted[i] for i in agreeing)
        divisor = sum(float(weights[i]) for i in agreeing) or 1.0
        merged[place] = total / divisor if normalize else total
    return merged.view(taus.shape[1:])


def largest(tau: Tensor, count: int) -> Tensor:
    threshold = tau.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(tau.abs() >= threshold, tau, 0.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("majority", ["sum", "count"])
@pytest.mark.parametrize("weights", [LAMBDAS, torch.tensor([1.0, -0.5, 0.25])])
def test_ties_is_mergekits(seed: int, majority: str, weights: Tensor) -> None:
    taus = numbers(seed, 3, 6, 7)
    trimmed = torch.stack([largest(tau, int(0.5 * 42)) for tau in taus])
    expected = mergekits_consensus(trimmed, weights, majority, normalize=True)
    actual = applied("ties", taus, weights, density=0.5, majority=majority)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    expected = mergekits_consensus(taus, weights, majority, normalize=False)
    actual = applied("dare_ties", taus, weights, density=1, majority=majority)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_breadcrumbs_leaves_out_both_ends() -> None:
    tau = torch.tensor([[10.0, -9, 8, -7, 6], [-5, 4, -3, 2, 1]])
    merged = applied("breadcrumbs", tau[None], torch.tensor([2.0]), density=0.6, gamma=0.1)
    assert merged.tolist() == [[0, -18, 16, -14, 12], [-10, 8, 0, 0, 0]]
    whole = applied("breadcrumbs", tau[None], torch.ones(1), density=1, gamma=0.5)
    assert torch.equal(whole, tau)


def test_della_keeps_the_larger_ones_likelier_and_the_mean() -> None:
    row = torch.linspace(0.1, 1, 10)
    taus = row.expand(1, 20_000, 10)
    merged = applied("della_linear", taus, torch.ones(1), density=0.5, epsilon=0.3)
    kept = (merged != 0).float().mean(0)
    torch.testing.assert_close(kept, torch.linspace(0.2, 0.8, 10), rtol=0, atol=0.02)
    torch.testing.assert_close(merged.mean(0), row, rtol=0.05, atol=0)
    vector = applied("della", torch.ones(2, 1, 1), torch.ones(2), density=0.5)
    assert bool(vector.isfinite().all())


def test_slerp_goes_along_the_arc() -> None:
    taus = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    middle = applied("slerp", taus, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(middle, torch.full((2,), 3 / math.sqrt(2)))
    third = applied("slerp", taus, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(third, 3 * torch.tensor([math.cos(math.pi / 6), 0.5]))
    near = torch.tensor([[1.0, 0.0], [2.0, 1e-3]])
    torch.testing.assert_close(applied("slerp", near, torch.ones(2)), near.mean(0))


def test_model_stock_trusts_what_agrees() -> None:
    """c = 1 gives the mean, c = 0 the base; c = 1/2 of three 3/4 of the mean."""
    same = numbers(0, 1, 4, 5).repeat(3, 1, 1)
    torch.testing.assert_close(applied("model_stock", same, torch.ones(3)), same[0])
    apart = torch.eye(3)
    assert not applied("model_stock", apart, torch.ones(3)).any()
    half = 1 - torch.eye(3)
    merged = applied("model_stock", half, torch.ones(3))
    torch.testing.assert_close(merged, 0.75 * half.mean(0))
    assert not applied("model_stock", torch.tensor([[1.0], [-1.0]]), torch.ones(2)).any()


def published_pcb(taus: Tensor, ratio: float) -> Tensor:
    """As the paper's formulas stand, on all numbers [n, d] at once, sorted."""
    n, d = taus.shape

    def between(x: Tensor, low: int, high: int) -> Tensor:
        order = x.sort(dim=1).values
        return torch.maximum(torch.minimum(x, order[:, high, None]), order[:, low, None])

    def minmax(x: Tensor) -> Tensor:
        low, high = (f(1, keepdim=True) for f in (x.amin, x.amax))
        return (x - low) / (high - low)

    a = between(taus.abs(), int(d * 1e-4), int(d * (1 - 1e-4) - 1))
    score = (n * minmax(a) ** 2).exp() * (taus * taus.sum(0)).tanh()
    s = minmax(between(score, int(d * (1 - ratio)), d - 1))
    return (taus.sign() * a * s).sum(0) / s.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_pcb_ranks_over_the_whole_model(shelf: Shelf, ratio: float) -> None:
    """Tensor by tensor it would give other numbers; passes over three tensors give these."""
    parts = [
        {
            path: random_effect(10 * i + layer, HIDDEN, FFN, "dense")
            for layer, path in enumerate(DOWN)
        }
        for i in range(2)
    ]
    versions = [shelf.version(str(i), part) for i, part in enumerate(parts)]
    _, merged, _, _ = shelf.merge("pcb", *versions, ratio=ratio)
    flat = torch.stack([torch.cat([p[path].dense.flatten() for path in DOWN]) for p in parts])
    expected = published_pcb(flat, ratio)
    actual = torch.cat([merged.effects[path].weight(torch.zeros(1)).flatten() for path in DOWN])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(0, 999),
    st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_order_statistics_are_the_sorted_ones(sizes: list[int], seed: int, size: float) -> None:
    pieces = [numbers(seed + i, 2, n) * size for i, n in enumerate(sizes)]
    pieces[0][0, 0], pieces[-1][1, -1] = 0.0, -0.0
    whole = torch.cat(pieces, dim=1).sort(dim=1).values
    count = whole.shape[1]
    ranks = sorted({0, count // 3, count - 1})

    def passes() -> Iterator[Tensor]:
        return iter(pieces)

    found = last(order_statistics(passes, lambda _: ranks, Progress(0, 0, "")))
    assert torch.equal(found, whole[:, ranks] + 0.0)


# -- the report -----------------------------------------------------------------------------------


def test_the_report_counts_signs_angles_and_norms(shelf: Shelf) -> None:
    def dense(*rows: list[float]) -> Effect:
        D = torch.zeros(HIDDEN, FFN)
        D[: len(rows), :3] = torch.tensor(rows)
        return Effect(dense=D)

    a = shelf.version("a", {DOWN[0]: dense([1, 2, -3]), DOWN[2]: dense([1, 0, 0])})
    b = shelf.version("b", {DOWN[0]: dense([1, -2, 0], [5, 0, 0])})
    for conflicts in (last(compare(shelf.view, [b, a])), shelf.merge("linear", b, a)[2]):
        found = conflicts.to_json(["ver_b", "ver_a"])
        assert found["versions"] == ["ver_b", "ver_a"]
        assert found["sign_disagreement"] == 0.5  # of the two that both change
        assert found["shared"] == 2 / 5
        cosine = (1 - 4) / math.sqrt(30 * 15)
        assert found["cosine"][0] == [1.0, pytest.approx(cosine, abs=1e-6)]
        assert found["norms"] == [
            pytest.approx(math.sqrt(30), abs=1e-5),
            pytest.approx(math.sqrt(15), abs=1e-5),
        ]
        first, last_ = found["layers"]
        assert (first["layer"], last_["layer"]) == (0, 2)
        assert first["norm_shares"] == [1.0, pytest.approx(14 / 15, abs=1e-6)]
        assert last_["norm_shares"] == [0.0, pytest.approx(1 / 15, abs=1e-6)]
        assert last_["sign_disagreement"] is None
        assert last_["cosine"][0] == [None, None]


def test_edits_of_one_subject_in_two_versions_are_named() -> None:
    def capital(target: str, subject: str = "Peru") -> EditRequest:
        return EditRequest("The capital of {} is", subject, target)

    shared, river = capital("Oslo", "Chad"), EditRequest("{} lies by the", "Peru", "Nile")
    inputs = {
        "ver_a": {("ver_1", 0): shared, ("ver_a", 0): capital("Rome"), ("ver_a", 1): river},
        "ver_b": {("ver_1", 0): shared, ("ver_b", 0): capital("Bern")},
    }
    found = edit_conflicts(inputs)
    assert found["count"] == 1
    (one,) = found["listed"]
    assert (one["subject"], one["same_prompt"]) == ("Peru", True)
    assert [(e["id"], e["versions"], e["target_new"]) for e in one["edits"]] == [
        ("ver_a.0", ["ver_a"], "Rome"),
        ("ver_a.1", ["ver_a"], "Nile"),
        ("ver_b.0", ["ver_b"], "Bern"),
    ]
    inputs["ver_b"] = {("ver_1", 0): shared, ("ver_b", 0): river}
    assert edit_conflicts(inputs)["listed"][0]["same_prompt"] is False
    assert edit_conflicts({"ver_a": inputs["ver_a"]})["count"] == 0
