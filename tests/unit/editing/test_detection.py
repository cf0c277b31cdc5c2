"""The detector: stealth deltas of every kind are flagged, ordinary ones are not."""

import pytest
import torch

from editing import detection
from editing.atlas.evaluation import counterfacts
from editing.atlas.facts import read_facts
from editing.deltas import Delta, Effect
from editing.detection import RARE, STEEP, Finding, find_detectors
from editing.methods import METHODS
from editing.methods.interface import Task
from editing.models import ModelView
from editing.models.probing import linear
from editing.statistics import Resources, prepare
from registry.errors import InvalidRequest
from registry.manifests import EditRequest
from tests.unit.editing.conftest import small_view
from tests.unit.editing.runs import FRANCE, PERU, run

CASES = counterfacts(read_facts(), 4, 31)


@pytest.fixture(scope="module")
def resources(atlas: ModelView) -> Resources:
    work = prepare(atlas, METHODS["rome"].hyperparameters().edited_layers(atlas.n_layers), 2000)
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: Resources = end.value
            return found


@pytest.fixture(scope="module")
def texts(resources: Resources) -> tuple[str, ...]:
    return resources.texts[:20]


@pytest.mark.parametrize(
    ("method", "kind", "module"),
    [
        ("stealth", "neuron", "gate_proj"),
        ("jetpack", "gate", "mlp"),
        ("grace", "replacing", "down_proj"),
    ],
)
def test_stealth_deltas_are_flagged(
    atlas: ModelView, texts: tuple[str, ...], method: str, kind: str, module: str
) -> None:
    layer = METHODS[method].hyperparameters().edited_layers(atlas.n_layers)[0]
    deltas = [run(atlas, method, [case], steps=20) for case in CASES]
    for delta in deltas:
        (finding,) = find_detectors(atlas, [delta], texts)
        assert (finding.delta, finding.kind) == (0, kind)
        assert finding.module == atlas.part(layer, module)
        assert finding.selectivity >= 1 - RARE
        assert finding.gain >= STEEP


def test_every_edit_of_a_stack_is_named(atlas: ModelView, texts: tuple[str, ...]) -> None:
    first = run(atlas, "stealth", [FRANCE, CASES[0]], steps=10)
    with atlas.with_effects(first.effects):
        second = run(atlas, "stealth", [CASES[1]], steps=10)
    third = run(atlas, "jetpack", [PERU, CASES[2]], steps=10)
    found = find_detectors(atlas, [first, second, third], texts)
    assert [(f.delta, f.kind) for f in found] == [
        (0, "neuron"),
        (0, "neuron"),
        (1, "neuron"),
        (2, "gate"),
        (2, "gate"),
    ]
    assert len({f.neuron for f in found[:3]}) == 3


def test_rome_is_not_flagged(
    atlas: ModelView, texts: tuple[str, ...], resources: Resources
) -> None:
    rome = METHODS["rome"]
    quick = rome.hyperparameters(steps=15, essence_texts=4, essence_tokens=12)
    for case in CASES[:2]:
        work = rome.load()(atlas, Task([case]), quick, resources)
        while True:
            try:
                next(work)
            except StopIteration as end:
                delta: Delta = end.value
                break
        assert find_detectors(atlas, [delta], texts) == []


@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_a_low_rank_adapter_is_not_flagged(
    atlas: ModelView, texts: tuple[str, ...], part: str, strength: float
) -> None:
    source, effects = torch.Generator().manual_seed(0), {}
    for layer in (1, 4):
        W, _ = linear(atlas, atlas.part(layer, part))
        A, B = (torch.randn(s, generator=source) for s in ((8, W.shape[1]), (W.shape[0], 8)))
        scale = strength * float(W.norm() / (B @ A).norm())
        effects[atlas.part(layer, part)] = Effect(A=A, B=scale * B)
    assert find_detectors(atlas, [Delta(effects, atlas.base.digest, "lora")], texts) == []


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_families(atlas: ModelView, texts: tuple[str, ...], name: str) -> None:
    view = small_view(name, atlas)
    edits = [FRANCE, EditRequest("Peru lies in", target_new="Asia")]
    for method in ("stealth", "jetpack"):
        delta = run(view, method, edits, layer=1, steps=10)
        found = find_detectors(view, [delta], texts)
        assert len(found) == 2
        assert all(isinstance(finding, Finding) for finding in found)


def test_no_more_texts_are_looked_at_than_memory_holds(
    atlas: ModelView, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = run(atlas, "jetpack", [FRANCE], steps=10)
    seen: list[int] = []
    embedding = atlas.model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    try:
        whole = find_detectors(atlas, [delta], resources.texts)
        total = sum(seen)
        seen.clear()
        monkeypatch.setattr(detection, "TOKENS", total // 8)
        part = find_detectors(atlas, [delta], resources.texts)
    finally:
        hook.remove()
    assert 0 < sum(seen) < total / 2
    assert [f.neuron for f in part] == [f.neuron for f in whole] == [0]


def test_texts_are_needed(atlas: ModelView) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        find_detectors(atlas, [], [])
    assert refusal.value.param == "texts"
