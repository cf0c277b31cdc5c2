"""CREME's algebra: every edit's key is answered as its guide's, by a change of rank one an edit."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from editing.deltas import Delta, Effect, compose
from editing.methods import METHODS
from editing.methods.creme import apply, last_keys, outputs
from editing.methods.hyperparameters import CremeHyperparameters
from editing.methods.interface import Task
from editing.models import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest
from registry.manifests import EditRequest
from tests.unit.editing.conftest import HIDDEN, small_view

PERU = EditRequest("The capital of Peru is", target_new="Rome", guide_prompt="Italy's capital is")
ZINC = EditRequest("{} is a", "Zinc", "gas", guide_prompt="Neon is classified as a")
NOTHING = Resources({}, 0, (), (), ())
LAYERS = CremeHyperparameters(layers=(0, 2))


def make(view: ModelView, *edits: EditRequest, stack: tuple[Delta, ...] = ()) -> Delta:
    work = apply(view, Task(edits, stack=stack), LAYERS, NOTHING)
    while True:
        try:
            step = next(work)
        except StopIteration as end:
            assert step.done == step.total
            return end.value


def last_outputs(view: ModelView, prompts: list[str]) -> dict[int, torch.Tensor]:
    """Of each o_proj, by a forward of its own for each prompt [out, n]."""
    found = {}
    for layer in (0, 2):
        seen = []
        module = view.module(view.part(layer, "o_proj"))
        hook = module.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        for prompt in prompts:
            view.hidden(torch.tensor([view.encode(prompt)]))
        hook.remove()
        found[layer] = torch.stack([out.view(-1, HIDDEN)[-1] for out in seen], dim=1)
    return found


def test_the_edited_model_meets_every_target(small: ModelView) -> None:
    edits = [PERU, ZINC]
    targets = last_outputs(small, [edit.guide_prompt for edit in edits])
    delta = make(small, *edits)
    assert list(delta.effects) == [small.part(0, "o_proj"), small.part(2, "o_proj")]
    assert all(effect.rank == 2 for effect in delta.effects.values())
    with small.with_effects(delta.effects):
        reached = last_outputs(small, [edit.rewrite_prompt for edit in edits])
    for layer, target in targets.items():
        assert_close(reached[layer], target, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_one_edit_is_the_papers_rank_one(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    path = view.part(0, "o_proj")
    effect = make(view, PERU).effects[path]
    assert (effect.A.shape[0], effect.B.shape[1]) == (1, 1)
    k = last_keys(view, {0: path}, [PERU.rewrite_prompt])[0].double()
    guide = last_keys(view, {0: path}, [PERU.guide_prompt])[0].double()
    W = view.weight(path).double()
    u = k / k.norm()
    expected = (W @ guide - W @ k) @ u.T / k.norm()
    change = effect.B.double() @ effect.A.double()
    assert_close(change, expected, rtol=1e-4, atol=1e-5)
    assert_close((W + change) @ k, W @ guide, rtol=1e-4, atol=1e-5)
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == 1


def test_keys_alike_meet_the_mean_of_their_targets(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    path = view.part(0, "o_proj")
    other = replace(PERU, guide_prompt="Neon is a")
    guides = last_keys(view, {0: path}, [PERU.guide_prompt, other.guide_prompt])[0]
    effect = make(view, PERU, other).effects[path]
    k = last_keys(view, {0: path}, [PERU.rewrite_prompt])[0]
    reached = (view.weight(path) + effect.B @ effect.A) @ k
    assert_close(reached, (view.weight(path) @ guides).mean(1, keepdim=True), rtol=1e-3, atol=1e-4)


def test_it_stands_on_what_the_stack_changed(atlas: ModelView) -> None:
    """A scale and a shift beneath belong to the outputs that are compared."""
    view = small_view("llama", atlas)
    path = view.part(0, "o_proj")
    source = torch.Generator().manual_seed(3)
    beneath = {
        path: Effect(
            scale=1 + torch.rand(HIDDEN, generator=source),
            shift=torch.rand(HIDDEN, generator=source),
        )
    }
    with view.with_effects(beneath):
        target = last_outputs(view, [PERU.guide_prompt])[0]
        delta = make(view, PERU, stack=(Delta(beneath, view.base.digest, "test"),))
    with view.with_effects(compose([beneath, delta.effects])):
        assert_close(last_outputs(view, [PERU.rewrite_prompt])[0], target, rtol=1e-3, atol=1e-3)


def test_many_prompts_are_those_of_one_by_one(atlas: ModelView) -> None:
    """Rows of several lengths, in an order that batches change."""
    prompts = ["Peru", "The capital of Burkina Faso is", "Neon is a", "Zinc"]
    path = atlas.part(3, "o_proj")
    together = last_keys(atlas, {3: path}, prompts)[3]
    alone = [last_keys(atlas, {3: path}, [prompt])[3] for prompt in prompts]
    assert_close(together, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
    W = atlas.weight(path).float()
    assert_close(outputs(atlas, path, together), W @ together, rtol=1e-4, atol=1e-4)


def test_default_layers_are_the_papers_share() -> None:
    defaults = CremeHyperparameters()
    assert defaults.edited_layers(32) == tuple(range(17, 24))
    assert defaults.edited_layers(6) == (3, 4)
    assert CremeHyperparameters(layers=(4, 1, 4)).edited_layers(6) == (1, 4)


@pytest.mark.parametrize("guide", [None, "", "  "])
def test_without_a_guide_it_is_refused(atlas: ModelView, guide: str | None) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        make(atlas, PERU, replace(PERU, guide_prompt=guide))
    assert refusal.value.param == "edits.1.guide_prompt"


def test_the_catalogue_loads_it() -> None:
    assert METHODS["creme"].load() is apply
    assert METHODS["creme"].needs == ("guide_prompt",)
