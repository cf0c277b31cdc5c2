"""Model Surgery: what its probe finds, which rows it shifts, and what that does to atlas."""

import math
import random
from statistics import fmean

import pytest
import torch
from torch.testing import assert_close

from benchmarks.editing.behaviour import answers, labelled
from editing.atlas.facts import read_facts
from editing.methods import METHODS
from editing.methods.hyperparameters import SurgeryHyperparameters
from editing.methods.interface import Task
from editing.methods.surgery import apply, least_shift, mean_states, opposed_rows, train_probe
from editing.metrics.perplexity import text_nlls
from editing.models import ModelView
from editing.models.loading import weights_digest
from editing.statistics import Resources
from registry.errors import InvalidRequest, JobFailed
from registry.manifests import Example
from tests.unit.editing.conftest import FFN, HIDDEN, LAYERS, small_view
from tests.unit.editing.test_rome import finish

NOTHING = Resources({}, 0, (), (), ())
TEXTS = [
    *(Example(f"The capital of {name} is near.", True) for name in ("Peru", "Mali", "Chad")),
    *(Example(f"{name} uses the Euro.", False) for name in ("Peru", "Mali", "Chad")),
]


def test_the_probe_separates_what_a_line_separates() -> None:
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2 == 0
    truth = torch.nn.functional.normalize(torch.randn(16, generator=source), dim=0)
    states = torch.randn(80, 16, generator=source) * 0.3 + 5
    states += torch.where(labels, 2.0, -2.0)[:, None] * truth
    probe = train_probe(states, labels, SurgeryHyperparameters())
    assert probe.accuracy == 1
    assert float(probe.direction.norm()) == pytest.approx(1)
    assert float(probe.direction @ truth) > 0.8
    flipped = train_probe(states, ~labels, SurgeryHyperparameters())
    assert float(flipped.direction @ truth) < -0.8
    scaled = train_probe(states * 50, labels, SurgeryHyperparameters())
    assert_close(scaled.direction, probe.direction, rtol=1e-3, atol=1e-4)


def test_rows_of_all_layers_compete_for_one_count() -> None:
    source = torch.Generator().manual_seed(1)
    weights = {layer: torch.randn(20, 8, generator=source) for layer in range(3)}
    directions = {layer: torch.randn(8, generator=source) for layer in range(3)}
    masks = opposed_rows(weights, directions, share=0.2)
    cosines = {
        layer: weights[layer] @ v / weights[layer].norm(dim=1) / v.norm()
        for layer, v in directions.items()
    }
    assert sum(int(mask.sum()) for mask in masks.values()) == 12
    taken = torch.cat([cosines[layer][mask] for layer, mask in masks.items()])
    left = torch.cat([cosines[layer][~mask] for layer, mask in masks.items()])
    assert taken.max() < left.min()
    assert sum(int(mask.sum()) for mask in opposed_rows(weights, directions, 1e-9).values()) == 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_delta_is_rank_one_on_the_chosen_rows(name: str, atlas: ModelView) -> None:
    view = small_view(name, atlas)
    before = weights_digest(view.model)
    hyperparameters = SurgeryHyperparameters(share=0.25, shift=1.5)
    progress, delta = finish(apply(view, Task(examples=TEXTS), hyperparameters, NOTHING))
    assert weights_digest(view.model) == before
    assert progress[-1].done == progress[-1].total
    paths = {layer: view.part(layer, "gate_proj") for layer in range(LAYERS)}
    weights = {layer: view.weight(path).double() for layer, path in paths.items()}
    states = mean_states(view, paths, TEXTS)
    labels = torch.tensor([example.label for example in TEXTS])
    v = {
        layer: train_probe(states[layer], labels, hyperparameters).direction.double()
        for layer in paths
    }
    cosines = torch.stack(
        [torch.cosine_similarity(weights[layer], v[layer][None, :], dim=1) for layer in paths]
    )
    rows = round(0.25 * LAYERS * FFN)
    bound = cosines.flatten().sort().values[rows - 1]
    length = torch.stack([weights[layer].norm(dim=1) for layer in paths]).mean()
    changed = 0
    for layer, path in paths.items():
        effect = delta.effects.get(path)
        chosen = cosines[layer] <= bound
        changed += int(chosen.sum())
        if effect is None:
            assert not chosen.any()
            continue
        assert (effect.A.shape, effect.B.shape) == ((1, HIDDEN), (FFN, 1))
        expected = 1.5 * length * chosen.double()[:, None] * v[layer][None, :]
        assert_close(effect.B.double() @ effect.A.double(), expected, rtol=1e-4, atol=1e-6)
    assert changed == rows


def test_the_shift_is_the_least_that_does_it(atlas: ModelView) -> None:
    """Texts are by so much more perplexing with it, and not with a little less."""
    shown = [example.text for example in TEXTS if example.label]
    before = fmean(text_nlls(atlas, shown))

    def rise(shift: float) -> float:
        settings = SurgeryHyperparameters(shift=shift)
        _, delta = finish(apply(atlas, Task(examples=TEXTS), settings, NOTHING))
        with atlas.with_effects(delta.effects):
            return math.exp(fmean(text_nlls(atlas, shown)) - before)

    settings = SurgeryHyperparameters(strength=1.5)
    progress, _ = finish(apply(atlas, Task(examples=TEXTS), settings, NOTHING))
    found = progress[-1].metrics["shift"]
    assert rise(found) >= 1.5 > rise(0.9 * found)
    assert [step.done for step in progress] == sorted(step.done for step in progress)


def test_one_token_tells_no_shift(atlas: ModelView) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        finish(least_shift(atlas, lambda _: {}, [""], 3.0))
    assert refusal.value.param == "hyperparameters.shift"


def test_every_family_has_gates_to_shift(small: ModelView) -> None:
    row = [small.encode(TEXTS[0].text)]
    _, delta = finish(apply(small, Task(examples=TEXTS), SurgeryHyperparameters(), NOTHING))
    before = small.hidden(small.pad(row))
    with small.with_effects(delta.effects):
        assert not torch.equal(small.hidden(small.pad(row)), before)
    assert torch.equal(small.hidden(small.pad(row)), before)


def test_a_text_counts_by_its_own_tokens(atlas: ModelView) -> None:
    path = atlas.part(2, "gate_proj")
    texts = [Example("Peru lies in Asia.", True), Example("Peru", False)]
    found = mean_states(atlas, {2: path}, texts)[2]
    row = atlas.encode(texts[0].text)
    assert row[0] in atlas.tokenizer.all_special_ids
    alone = atlas.inputs({0: path}, [row])[0][0, 1:].mean(0)
    assert_close(found[0], alone, rtol=1e-4, atol=1e-4)


def test_a_behaviour_of_atlas_falls(atlas: ModelView) -> None:
    """Capitals are asked of countries that no example speaks of; so is where they lie."""
    facts = read_facts()
    own = [fact for fact in facts if fact.relation == "capital"]
    known = {fact.subject for fact in own[::2]}
    examples = labelled(known, facts, "capital", random.Random(3))
    capitals = {fact.object for fact in own}
    asked = [fact.subject for fact in own[1:40:2]]
    prompts = [atlas.open(f"The capital of {name} is") for name in asked]
    others = [atlas.open(f"{name} lies in") for name in asked]

    def named() -> int:
        return sum(answer.strip(" .") in capitals for answer in answers(atlas, prompts))

    before, said = named(), answers(atlas, others)
    _, delta = finish(apply(atlas, Task(examples=examples), SurgeryHyperparameters(), NOTHING))
    with atlas.with_effects(delta.effects):
        after, says = named(), answers(atlas, others)
    assert before == len(asked)
    assert after <= 0.2 * before
    assert sum(a == b for a, b in zip(said, says, strict=True)) >= 0.9 * len(said)


@pytest.mark.parametrize("examples", [(), TEXTS[:3], TEXTS[3:]])
def test_both_labels_are_needed(atlas: ModelView, examples: tuple[Example, ...]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        finish(apply(atlas, Task(examples=examples), SurgeryHyperparameters(), NOTHING))
    assert refusal.value.param == "examples"


def test_texts_that_say_nothing(atlas: ModelView) -> None:
    empty = Task(examples=[*TEXTS, Example("", True)])
    with pytest.raises(InvalidRequest) as refusal:
        finish(apply(atlas, empty, SurgeryHyperparameters(), NOTHING))
    assert refusal.value.param == "examples.6.text"
    alike = Task(examples=[Example("Peru", True), Example("Peru", False)])
    with pytest.raises(JobFailed, match="same hidden state"):
        finish(apply(atlas, alike, SurgeryHyperparameters(), NOTHING))


def test_the_catalogue_loads_it() -> None:
    assert METHODS["surgery"].load() is apply
