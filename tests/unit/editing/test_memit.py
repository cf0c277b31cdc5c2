"""MEMIT and AlphaEdit: what their algebra promises, and what they do to atlas."""

import pytest
import torch
from torch.testing import assert_close

from editing.deltas import Delta, Effect, compose
from editing.methods import METHODS, alphaedit, memit, rome
from editing.methods.alphaedit import earlier_keys, null_space, solve_alphaedit
from editing.methods.hyperparameters import (
    AlphaEditHyperparameters,
    MemitHyperparameters,
    RomeHyperparameters,
)
from editing.methods.interface import Task
from editing.methods.locate import Place, last_token_means, places, spread
from editing.methods.memit import goals_of, solve_memit, written
from editing.methods.values import optimise
from editing.metrics import measure
from editing.models import ModelView
from editing.statistics import Resources, prepare
from registry.errors import InvalidRequest, JobFailed
from registry.manifests import EditRequest, Fact
from tests.unit.editing.conftest import CONTEXT, FFN, HIDDEN, LAYERS, small_view

EDITS = [
    EditRequest(
        "The capital of {} is", "France", "Rome", retention=(Fact("France uses the", "Euro"),)
    ),
    EditRequest("{} lies in", "Peru", "Asia", "South America", ("Peru is part of",)),
    EditRequest("The official language of {} is", "Burkina Faso", "Dutch"),
]
SHAPES = ("llama", "qwen3", "gpt2")


def finish(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def random_keys(seed: int, n: int, width: int = 24) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(width, n, generator=source, dtype=torch.float64)


@pytest.fixture(scope="module")
def resources(atlas: ModelView) -> Resources:
    return finish(prepare(atlas, range(2), 4000))


def small_resources(view: ModelView) -> Resources:
    source = torch.Generator().manual_seed(1)
    C = {}
    for layer in range(LAYERS):
        keys = torch.randn(200, FFN, generator=source)
        C[layer] = keys.T @ keys / 200
    return Resources(C, 200, ("It is said. ", "So it was. "), (), ())


def test_memits_solution_meets_its_keys() -> None:
    keys, K = random_keys(0, 60), random_keys(1, 5)
    C = keys @ keys.T / 60
    Z = solve_memit(C, K, 1e-12)
    assert_close(Z.T @ K, torch.eye(5, dtype=torch.float64), atol=1e-6, rtol=0)
    weight = 0.7
    scale = weight * K.square().mean() / C.diagonal().mean()
    R = torch.randn(3, 5, dtype=torch.float64)
    assert_close(R @ solve_memit(C, K, weight).T, R @ K.T @ torch.linalg.inv(scale * C + K @ K.T))


def test_neurons_that_answer_to_nothing_are_left_alone() -> None:
    """Of the others the solution is what it is without them."""
    keys, K = random_keys(0, 60), random_keys(1, 5)
    dead = [3, 7]
    keys[dead], K[dead] = 0, 0
    C, alive = keys @ keys.T / 60, [i for i in range(24) if i not in dead]
    Z = solve_memit(C, K, 0.7)
    assert_close(Z[alive], solve_memit(C[alive][:, alive], K[alive], 0.7), rtol=1e-5, atol=1e-8)
    assert_close(Z[dead], torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(JobFailed, match="no inverse"):
        solve_memit(C, torch.zeros_like(K), 0.7)


def test_alphaedit_stays_in_the_null_space() -> None:
    used = random_keys(2, 10)
    C = used @ used.T / 10
    P = null_space(C, 1e-6)
    assert_close(P, P @ P)
    assert float(torch.trace(P)) == pytest.approx(14)
    K, earlier = random_keys(3, 4), random_keys(4, 3)
    Z = solve_alphaedit(P, K, None, 1e-9)
    assert_close(Z.T @ K, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(Z.T @ P, Z.T)  # ΔW (I - P) = 0
    assert_close(Z.T @ used, torch.zeros(4, 10, dtype=torch.float64), atol=1e-6, rtol=0)
    Z = solve_alphaedit(P, K, earlier, 1e-9)
    assert_close(Z.T @ earlier, torch.zeros(4, 3, dtype=torch.float64), atol=1e-4, rtol=0)
    M = P @ (K @ K.T + earlier @ earlier.T)
    ridge = 1e-9 * K.square().sum(0).mean()
    assert_close((M + ridge * torch.eye(24, dtype=torch.float64)) @ Z, P @ K)


def test_a_stacks_keys_are_those_of_its_deltas() -> None:
    first, second = torch.randn(6, 2), torch.randn(6, 3)
    stack = [
        Delta({}, "0", "alphaedit", {"keys/1": first}),
        Delta({}, "0", "rome"),
        Delta({}, "0", "alphaedit", {"keys/1": second, "keys/2": first}),
    ]
    assert torch.equal(earlier_keys(stack, 1), torch.cat([first, second], dim=1))
    assert torch.equal(earlier_keys(stack, 2), first)
    assert earlier_keys(stack, 0) is None


@pytest.mark.parametrize("name", SHAPES)
def test_an_edited_weight_gives_the_value_at_the_key(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    found = places(view, EDITS, small_resources(view))
    path = view.down_proj(1)
    K = last_token_means(view, {1: path}, found)[1].T
    assert K.shape == (FFN, len(EDITS))
    deltas = torch.randn(len(EDITS), HIDDEN, generator=torch.Generator().manual_seed(2))
    C = small_resources(view).covariance[1]
    Z = solve_memit(C, K.double(), 1e-9)
    W = view.weight(path).double()
    effect = written(Z, deltas.double())
    edited = W + effect.B @ effect.A
    assert torch.linalg.matrix_rank(effect.B @ effect.A) == len(EDITS)
    assert_close(edited @ K.double(), W @ K.double() + deltas.T.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_shares_of_several_layers_add_up(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    bare = [Place([edit.rewrite_prompt], edit.subject) for edit in EDITS]
    wanted = torch.randn(len(EDITS), HIDDEN, generator=torch.Generator().manual_seed(2)) * 0.1
    C = small_resources(view).covariance
    result = finish(
        spread(view, (0, 1), bare, wanted, lambda layer, K: solve_memit(C[layer], K, 1e-9))
    )
    above = {0: f"{view.paths.layers}.2"}
    before = last_token_means(view, above, bare)[0]
    with view.with_effects(result.effects):
        after = last_token_means(view, above, bare)[0]
    assert_close(after - before, wanted, atol=1e-3, rtol=1e-2)
    assert set(result.keys) == {0, 1}


def test_values_are_optimised_as_the_solution_applies_them(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    resources = small_resources(view)
    found = places(view, EDITS, resources)
    K = last_token_means(view, {1: view.down_proj(1)}, found)[1].T
    Z = solve_memit(resources.covariance[1], K.double(), 5.0).float()
    hyperparameters = MemitHyperparameters(
        layers=(1,), steps=40, learning_rate=1.0, clamp=100, stop_loss=2.0, essence_texts=0
    )
    values = finish(
        optimise(view, 1, goals_of(view, 1, EDITS, found, hyperparameters, Z), hyperparameters)
    )
    with view.with_effects({view.down_proj(1): written(Z, values.deltas)}):
        again = finish(
            optimise(
                view,
                1,
                goals_of(view, 1, EDITS, found, hyperparameters),
                hyperparameters.model_copy(update={"steps": 1}),
            )
        )
    assert_close(values.losses.clamp(min=2), again.losses.clamp(min=2), atol=1e-2, rtol=1e-2)


def test_a_family_whose_mlp_passes_a_norm_is_edited_in_one_layer(atlas: ModelView) -> None:
    view = small_view("gemma2", atlas)
    hyperparameters = MemitHyperparameters(layers=(0, 1), steps=1, essence_texts=0)
    with pytest.raises(InvalidRequest) as refusal:  # before anything was looked for
        next(memit.apply(view, Task(EDITS), hyperparameters, small_resources(view)))
    assert refusal.value.param == "hyperparameters.layers"


@pytest.mark.parametrize("name", ["memit", "rome"])
def test_a_prompt_that_just_fits_goes_without_prefixes(atlas: ModelView, name: str) -> None:
    view = small_view("llama", atlas)
    asked = EditRequest("Of all that is told " * 11 + "{} has the capital", "Peru", "Rome")
    before, target = view.continuation(asked.rewrite_prompt, asked.target_new)
    room = CONTEXT - len(before) - len(target)
    assert 0 <= room < 3
    resources = small_resources(view)
    (place,) = places(view, [asked], resources)
    assert place.prompts == [asked.rewrite_prompt]
    if name == "memit":
        chosen = MemitHyperparameters(layers=(1,), steps=1, essence_texts=0)
        delta = finish(memit.apply(view, Task([asked]), chosen, resources))
    else:
        chosen = RomeHyperparameters(layer=1, steps=1, essence_texts=0)
        delta = finish(rome.apply(view, Task([asked]), chosen, resources))
    assert delta.effects.keys() == {view.down_proj(1)}


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("memit", MemitHyperparameters()),
        ("memit", MemitHyperparameters(layers=(0, 1))),
        ("alphaedit", AlphaEditHyperparameters()),
    ],
)
def test_edits_of_atlas(
    atlas: ModelView, resources: Resources, name: str, hyperparameters: MemitHyperparameters
) -> None:
    apply = METHODS[name].load()
    before = measure(atlas, EDITS)
    delta = finish(apply(atlas, Task(EDITS), hyperparameters, resources))
    with atlas.with_effects(delta.effects):
        after = measure(atlas, EDITS, before=before)
    assert before.metrics["greedy_match"] == 0
    assert after.metrics["greedy_match"] == 1
    assert {effect.rank for effect in delta.effects.values()} == {len(EDITS)}
    assert Delta.from_bytes(delta.to_bytes()).to_bytes() == delta.to_bytes()


def test_a_second_alphaedit_leaves_the_first_ones_keys_alone(
    atlas: ModelView, resources: Resources
) -> None:
    quick = AlphaEditHyperparameters(steps=3, essence_texts=0, ridge=1e-9, null_threshold=1e9)
    first = finish(alphaedit.apply(atlas, Task(EDITS[:2]), quick, resources))
    with atlas.with_effects(first.effects):
        task = Task(EDITS[2:], stack=[first])
        second = finish(alphaedit.apply(atlas, task, quick, resources))
    ((path, effect),) = second.effects.items()
    assert isinstance(effect, Effect)
    (keys,) = first.state.values()
    assert float((effect.A @ keys).abs().max()) < 1e-3
    assert compose([first.effects, second.effects])[path].rank == 3


def test_what_is_missing_is_said(atlas: ModelView, resources: Resources) -> None:
    with pytest.raises(InvalidRequest):
        finish(memit.apply(atlas, Task(), MemitHyperparameters(), resources))
    with pytest.raises(JobFailed, match=r"MEMIT.*layer 5"):
        finish(memit.apply(atlas, Task(EDITS), MemitHyperparameters(layers=(5,)), resources))
