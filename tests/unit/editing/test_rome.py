"""ROME's closed form, its refusals, and what an edit of atlas does."""

import pytest
import torch
from torch.testing import assert_close

from editing.deltas import Delta
from editing.methods import METHODS
from editing.methods.essence import sample_essences
from editing.methods.hyperparameters import RomeHyperparameters
from editing.methods.interface import Task
from editing.methods.locate import Place, last_token_means, lookalike_keys
from editing.methods.rome import apply, solve_key
from editing.metrics import measure
from editing.metrics.targets import score_targets
from editing.models import ModelView
from editing.models.loading import weights_digest
from editing.statistics import Resources, prepare
from registry.errors import InvalidRequest, JobFailed
from registry.manifests import EditRequest, Fact, Progress
from tests.unit.editing.conftest import FFN, HIDDEN

FRANCE = EditRequest(
    prompt="The capital of {} is",
    subject="France",
    target_new="Rome",
    target_true="Paris",
    paraphrase_prompts=("France is governed from", "The government of France sits in"),
    retention=(
        Fact("The official language of France is", "French"),
        Fact("France uses the", "Euro"),
        Fact("To call France, dial", "+33"),
        Fact("France lies in", "Europe"),
    ),
)
PERU = EditRequest("{} lies in", "Peru", "Asia", "South America", ("Peru is part of",))


def finish(work) -> tuple[list[Progress], object]:
    yielded = []
    while True:
        try:
            yielded.append(next(work))
        except StopIteration as end:
            return yielded, end.value


@pytest.fixture(scope="module")
def resources(atlas: ModelView) -> Resources:
    layers = RomeHyperparameters().edited_layers(atlas.n_layers)
    return finish(prepare(atlas, layers, 4000))[1]


def test_the_key_solves_c_and_meets_itself() -> None:
    source = torch.Generator().manual_seed(0)
    K = torch.randn(50, 12, generator=source, dtype=torch.float64)
    C, k = K.T @ K / 50, torch.randn(12, generator=source)
    a = solve_key(C.float(), k, ridge=0.0)
    oracle = torch.linalg.inv(C) @ k.double()
    assert_close(a.double(), oracle / (k.double() @ oracle), rtol=1e-4, atol=1e-5)
    assert float(a @ k) == pytest.approx(1, abs=1e-5)


def test_a_key_without_an_inverse_of_c_is_told() -> None:
    C, k = torch.diag(torch.tensor([1.0, 2.0, 0.0])), torch.tensor([1.0, 1.0, 0.0])
    with pytest.raises(JobFailed, match=r"hyperparameters\.ridge"):
        solve_key(C, k, ridge=0.0)
    assert float(solve_key(C, k, ridge=1e-4) @ k) == pytest.approx(1)


def test_the_mean_key_is_the_subjects_last_token(atlas: ModelView) -> None:
    prompts = [
        "The capital of Burkina Faso is",
        "Peru lies in Asia. The capital of Burkina Faso is",
    ]
    path = atlas.down_proj(1)
    keys = [
        atlas.inputs({0: path}, [atlas.encode(prompt)])[0][0, len(atlas.encode(prompt)) - 2]
        for prompt in prompts
    ]
    expected = (keys[0] + keys[1]) / 2
    found = last_token_means(atlas, {1: path}, [Place(prompts, "Burkina Faso")])
    assert_close(found[1][0], expected, rtol=1e-4, atol=1e-3)


def test_an_edit_of_atlas(atlas: ModelView, resources: Resources) -> None:
    digest = weights_digest(atlas.model)
    before = measure(atlas, [FRANCE])
    progress, delta = finish(apply(atlas, Task([FRANCE]), RomeHyperparameters(), resources))
    assert weights_digest(atlas.model) == digest
    assert measure(atlas, [FRANCE]) == before
    with atlas.with_effects(delta.effects):
        after = measure(atlas, [FRANCE], before=before)
    assert before.metrics["efficacy_score"] == 0
    assert after.metrics["greedy_match"] == 1
    assert after.metrics["paraphrase_greedy_match"] == 1
    assert after.metrics["same_subject_retention"] == 1
    assert [step.done for step in progress] == sorted(step.done for step in progress)
    assert progress[-1].done == progress[-1].total == RomeHyperparameters().steps
    assert progress[-1].metrics["target_nll"] < RomeHyperparameters().stop_loss
    assert progress[1].metrics["target_nll"] > progress[-1].metrics["target_nll"]


def test_two_edits_are_one_delta_of_rank_two(atlas: ModelView, resources: Resources) -> None:
    progress, delta = finish(apply(atlas, Task([FRANCE, PERU]), RomeHyperparameters(), resources))
    (effect,) = delta.effects.values()
    assert effect.rank == 2
    steps = RomeHyperparameters().steps
    assert {step.total for step in progress} == {2 * steps}
    assert {0, steps, 2 * steps} <= {step.done for step in progress}
    assert Delta.from_bytes(delta.to_bytes()).to_bytes() == delta.to_bytes()
    with atlas.with_effects(delta.effects):
        assert measure(atlas, [FRANCE, PERU]).metrics["greedy_match"] == 1


def test_an_edit_is_the_same_twice(atlas: ModelView, resources: Resources) -> None:
    quick = RomeHyperparameters(steps=3)
    first, second = (
        finish(apply(atlas, Task([PERU]), quick, resources))[1].to_bytes() for _ in range(2)
    )
    assert first == second


def test_names_alike_are_found(atlas: ModelView) -> None:
    """Tokens that end the subject's name are looked up where they stand in other names."""
    texts = [
        "South Sudan lies in Africa.",
        "Peru lies in South America.",
        "North Macedonia is small",
    ]
    keys = lookalike_keys(atlas, 0, "North Sudan", texts)
    row = atlas.encode(texts[0])
    at = row.index(atlas.encode("North Sudan")[-1])
    expected = atlas.inputs({0: atlas.down_proj(0)}, [row])[0][0, at]
    assert_close(keys, expected[None], rtol=1e-4, atol=1e-3)
    nothing = lookalike_keys(atlas, 0, "South Sudan", texts)
    assert nothing.shape == (0, atlas.weight(atlas.down_proj(0)).shape[1])


def test_every_family_can_be_edited(small: ModelView) -> None:
    hyperparameters = RomeHyperparameters(
        layer=1, steps=4, essence_texts=4, essence_tokens=6, prefixes=1
    )
    resources = finish(prepare(small, [1], 300))[1]
    wanted = [(FRANCE.rewrite_prompt, FRANCE.target_new)]
    ((before, _),) = score_targets(small, wanted)
    _, delta = finish(apply(small, Task([FRANCE]), hyperparameters, resources))
    (path,) = delta.effects
    effect = delta.effects[path]
    assert path == small.down_proj(1)
    assert (effect.A.shape, effect.B.shape) == ((1, FFN), (HIDDEN, 1))
    with small.with_effects(delta.effects):
        ((after, _),) = score_targets(small, wanted)
    assert after < before


def test_the_essence_does_not_state_the_edited_fact(atlas: ModelView) -> None:
    (essence,) = sample_essences(atlas, [FRANCE], texts=48, tokens=40, wordings=4, seed=0)
    assert len(essence.texts) > 10
    assert not any("Paris" in text for text in essence.texts)
    assert [atlas.tokenizer.decode([token]) for token in essence.answers] == [
        atlas.tokenizer.decode(atlas.continuation(FRANCE.rewrite_prompt, "Paris")[1][:1])
    ]
    for wording in essence.wordings:
        assert "France" in wording
        match = measure(atlas, [EditRequest(wording.replace("France", "{}", 1), "France", "Paris")])
        assert match.metrics["greedy_match"] == 1


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (EditRequest("The capital of France is", "France", "Rome"), "edits.0.prompt"),
        (EditRequest("{} and {}", "France", "Rome"), "edits.0.prompt"),
        (EditRequest("The capital of {} is", " ", "Rome"), "edits.0.subject"),
        (EditRequest("The capital of {} is", "France", ""), "edits.0.target_new"),
    ],
)
def test_what_cannot_be_applied_is_refused(
    atlas: ModelView, resources: Resources, request_: EditRequest, param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        finish(apply(atlas, Task([request_]), RomeHyperparameters(), resources))
    assert refusal.value.param == param


def test_no_edits_and_no_covariance(atlas: ModelView, resources: Resources) -> None:
    with pytest.raises(InvalidRequest):
        finish(apply(atlas, Task(), RomeHyperparameters(), resources))
    with pytest.raises(JobFailed, match="layer 5"):
        finish(apply(atlas, Task([FRANCE]), RomeHyperparameters(layer=5), resources))


def test_the_catalogue_loads_it() -> None:
    assert METHODS["rome"].load() is apply
