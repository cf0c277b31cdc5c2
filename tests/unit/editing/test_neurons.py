"""Deactivated neurons give nothing, and are those that all settings have in common."""

from contextlib import ExitStack

import pytest
import torch
from torch.testing import assert_close

from editing.deltas import Delta, Effect, compose
from editing.methods import METHODS
from editing.methods.hyperparameters import NeuronHyperparameters
from editing.methods.interface import Task
from editing.methods.neurons import apply, differences, mean_activations, top_neurons
from editing.models import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest, JobFailed, UnsupportedModel
from registry.manifests import Example
from tests.unit.editing.conftest import CONTEXT, FFN, HIDDEN, LAYERS, small_view

EXAMPLES = (
    Example("Zinc has the atomic number", True, "short"),
    Example("Peru lies in South America", False, "short"),
    Example("The atomic number of the element zinc is", True, "long"),
    Example("The capital of Peru is Lima, a city", False, "long"),
)
TEXT = "Neon and Peru are words"
NOTHING = Resources({}, 0, (), (), ())


def make(view: ModelView, examples=EXAMPLES, **changes) -> Delta:
    work = apply(view, Task(examples=examples), NeuronHyperparameters(**changes), NOTHING)
    while True:
        try:
            step = next(work)
        except StopIteration as end:
            assert step.done == step.total
            return end.value


def silenced(view: ModelView, delta: Delta) -> dict[int, torch.Tensor]:
    """By layer, the neurons that a delta deactivates."""
    return {
        layer: (delta.effects[path].scale == 0).nonzero().flatten()
        for layer in range(view.n_layers)
        if (path := view.part(layer, "gate_proj")) in delta.effects
    }


def zeroing(view: ModelView, neurons: dict[int, torch.Tensor]) -> ExitStack:
    """Hooks that set neurons' activations to zero before the down-projection."""
    hooks = ExitStack()
    for layer, chosen in neurons.items():

        def hook(_, args, chosen=chosen):
            k = args[0].clone()
            k[..., chosen] = 0
            return (k,)

        module = view.module(view.down_proj(layer))
        hooks.callback(module.register_forward_pre_hook(hook).remove)
    return hooks


def test_texts_are_read_as_far_as_the_context_goes(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    long = [Example(e.text + " and so on" * CONTEXT, e.label, e.setting) for e in EXAMPLES]
    assert make(view, long, share=0.5).effects
    paths = {1: view.down_proj(1)}
    read = view.decode(view.excerpt(long[0].text))
    assert_close(*(mean_activations(view, paths, text) for text in (long[0].text, read)))


def test_the_same_as_zeroing_the_activations(small: ModelView) -> None:
    delta = make(small, share=0.5)
    neurons = silenced(small, delta)
    assert sum(map(len, neurons.values())) > 10
    ids = torch.tensor([small.encode(TEXT)])
    with zeroing(small, neurons):
        expected = small.hidden(ids)
    assert not torch.allclose(small.hidden(ids), expected, atol=1e-3)
    with small.with_effects(delta.effects):
        assert_close(small.hidden(ids), expected, rtol=1e-4, atol=1e-5)
        for layer, chosen in neurons.items():
            k = small.inputs({0: small.down_proj(layer)}, [small.encode(TEXT)])[0]
            assert not k[..., chosen].any()
    again = Delta.from_bytes(delta.to_bytes())
    assert silenced(small, again).keys() == neurons.keys()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_what_the_stack_put_on_a_neuron_goes_too(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    source = torch.Generator().manual_seed(5)
    beneath: dict[str, Effect] = {}
    for layer in range(LAYERS):
        beneath[view.down_proj(layer)] = Effect(
            A=torch.randn(2, FFN, generator=source), B=torch.randn(HIDDEN, 2, generator=source)
        )
        beneath[view.part(layer, "gate_proj")] = Effect(
            shift=torch.rand(FFN, generator=source),
            A=torch.randn(1, HIDDEN, generator=source),
            B=torch.randn(FFN, 1, generator=source),
        )
    ids = torch.tensor([view.encode(TEXT)])
    with view.with_effects(beneath):
        delta = make(view, share=0.5)
        with zeroing(view, silenced(view, delta)):
            expected = view.hidden(ids)
    with view.with_effects(compose([beneath, delta.effects])):
        assert_close(view.hidden(ids), expected, rtol=1e-4, atol=1e-4)


def test_they_are_the_top_of_every_setting(atlas: ModelView) -> None:
    view, share = small_view("llama", atlas), 0.3
    found = silenced(view, make(view, share=share))
    sets = []
    for i in (0, 2):
        weights = {}
        for layer in range(LAYERS):
            path = view.down_proj(layer)
            one, other = (
                view.inputs({0: path}, [view.encode(e.text)])[0][0].abs().mean(0)
                for e in EXAMPLES[i : i + 2]
            )
            lengths = view.weight(path).norm(dim=0)
            for j in range(FFN):
                weights[layer, j] = float((one[j] - other[j]) * lengths[j])
        ranked = sorted(weights, key=weights.__getitem__, reverse=True)
        sets.append({n for n in ranked[: round(share * len(ranked))] if weights[n] > 0})
    assert {(layer, int(j)) for layer, js in found.items() for j in js} == sets[0] & sets[1]
    assert sets[0] & sets[1] < sets[0]


def test_settings_are_compared_within_themselves(atlas: ModelView) -> None:
    paths = {0: atlas.down_proj(0), 4: atlas.down_proj(4)}
    texts = [mean_activations(atlas, paths, e.text) for e in EXAMPLES]
    found = differences(EXAMPLES, torch.stack(texts))
    assert list(found) == ["short", "long"]
    assert_close(found["short"], texts[0] - texts[1])
    assert_close(found["long"], texts[2] - texts[3])


def test_the_top_is_above_zero() -> None:
    weights = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    assert top_neurons(weights, 0.25).tolist() == [[True, False], [False, False]]
    assert top_neurons(weights, 1.0).tolist() == [[True, False], [False, True]]
    assert top_neurons(weights, 1e-6).sum() == 1


def test_only_the_layers_asked_for(atlas: ModelView) -> None:
    view = small_view("gpt2", atlas)
    delta = make(view, share=0.5, layers=(1,))
    assert list(delta.effects) == [view.part(1, "gate_proj")]


def test_none_in_common_fails(atlas: ModelView) -> None:
    """The second setting is the first one with its labels exchanged."""
    mirrored = [Example(e.text, not e.label, "mirrored") for e in EXAMPLES[:2]]
    with pytest.raises(JobFailed, match=r"'short' 3, 'mirrored' 3"):
        make(small_view("llama", atlas), [*EXAMPLES[:2], *mirrored], share=0.02)


@pytest.mark.parametrize(
    ("examples", "param"),
    [
        ((), "examples"),
        (EXAMPLES[::2], "examples"),
        ((*EXAMPLES, Example("Zinc", True, "alone")), "examples.4.setting"),
        ((*EXAMPLES, Example(" ", True, "long")), "examples.4.text"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    atlas: ModelView, examples: tuple[Example, ...], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        make(atlas, examples)
    assert refusal.value.param == param


def test_an_activation_that_is_not_silent_at_zero_is_refused(atlas: ModelView) -> None:
    view = small_view("gpt2", atlas)
    for layer in view.layers:
        layer.mlp.act = torch.nn.Sigmoid()
    with pytest.raises(UnsupportedModel, match="not 0 at 0"):
        make(view, share=0.5)


def test_the_catalogue_loads_it() -> None:
    assert METHODS["neurons"].load() is apply
    assert METHODS["neurons"].needs == ("examples",)
