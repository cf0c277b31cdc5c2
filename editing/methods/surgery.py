"""Model Surgery: turn the MLPs' gates away from an unwanted behaviour (Wang et al., 2024,
arXiv:2407.08770).

A linear probe is trained on labelled texts to tell from hidden states whether a text shows the
behaviour; its weight v points to where it does. The rows of all layers' gate projections that
point most against v (smallest cosine) belong to neurons that are silent while the behaviour is
shown. They are shifted towards v, so that they speak exactly then:

    ΔW_l = α · w̄ · m_l v̂_lᵀ,   rank 1 a layer

with m_l [rows] the 0/1 mask of the rows chosen in layer l, v̂ the unit probe weight, and w̄ the mean
length of all gate rows.

As in the paper, a text's state is the mean over its tokens, the probe takes 20 epochs, and rows of
all layers compete for one count. Where the authors' script differs, or is bound to one model:

- it reads one probe off the last layer's output and uses it in every layer. Here every layer has
  its own, of what its gate projection is given: that is what the rows are multiplied with. On the
  bundled base this lowers a behaviour further at the same perplexity.
- it adds α · v with the v that training happened to end with. Here v̂ has length 1 and α is in
  units of the rows' mean length, which fits any model; and unless it is given, it is the smallest
  that makes the texts with the behaviour ``strength`` times as perplexing: one α does not suit all.
- it takes 16384 of a Llama-2-7B's 352256 rows; here the count is a share of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.deltas import Delta, Effect
from editing.methods.hyperparameters import SurgeryHyperparameters
from editing.methods.interface import Task, check_task, counted
from editing.metrics.perplexity import text_nlls
from editing.metrics.sampling import spaced
from editing.metrics.targets import batches
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest, JobFailed
from registry.manifests import Example, Progress

#: Texts of one optimiser step of a probe.
BATCH = 64
#: Where α is looked for, and in how many steps.
SHIFTS, TRIALS = (0.1, 10.0), 7
#: Of the examples, so many are read at each.
TEXTS = 200


@dataclass(frozen=True)
class Probe:
    """Attributes:
    direction: its weight at length 1 [in].
    accuracy: share of the texts it was trained on that it labels right.
    """

    direction: Tensor
    accuracy: float


def apply(
    view: ModelView, task: Task, hyperparameters: SurgeryHyperparameters, resources: Resources
) -> Generator[Progress, None, Delta]:
    """Train a probe a layer on ``task.examples`` and shift the rows that point against them."""
    check_task(task, "examples")
    layers = hyperparameters.edited_layers(view.n_layers)
    paths = {layer: view.part(layer, "gate_proj") for layer in layers}
    total = len(layers) + 1 + (TRIALS if hyperparameters.shift is None else 0)
    yield Progress(0, total, "reading the examples' hidden states")
    states = mean_states(view, paths, task.examples)
    labels = torch.tensor([example.label for example in task.examples], device=view.device)
    directions: dict[int, Tensor] = {}
    for done, layer in enumerate(layers, start=1):
        probe = train_probe(states[layer], labels, hyperparameters)
        directions[layer] = probe.direction
        yield Progress(
            done, total, f"probed layer {layer}", {"probe_accuracy": probe.accuracy, "layer": layer}
        )
    weights = {layer: view.weight(path).float() for layer, path in paths.items()}
    masks = opposed_rows(weights, directions, hyperparameters.share)
    length = torch.cat([weight.norm(dim=1) for weight in weights.values()]).mean()

    def shifted(shift: float) -> dict[str, Effect]:
        return {
            paths[layer]: Effect(
                A=directions[layer][None, :].cpu(),
                B=(shift * length * mask.float())[:, None].cpu(),
            )
            for layer, mask in masks.items()
            if mask.any()
        }

    shift = hyperparameters.shift
    if shift is None:
        shown = [example.text for example in task.examples if example.label]
        work = least_shift(view, shifted, spaced(shown, TEXTS), hyperparameters.strength)
        shift = yield from counted(work, len(layers) + 1, TRIALS, total)
    effects = shifted(shift)
    rows = sum(int(mask.sum()) for mask in masks.values())
    told = f"shifted {rows} rows of {len(effects)} layers by {shift:.3g}"
    yield Progress(total, total, told, {"rows": rows, "shift": shift})
    return Delta(effects, view.base.digest, "surgery")


def least_shift(
    view: ModelView,
    shifted: Callable[[float], Mapping[str, Effect]],
    texts: Sequence[str],
    strength: float,
) -> Generator[Progress, None, float]:
    """The smallest α, up to ``SHIFTS``, that multiplies the perplexity of texts by ``strength``.

    Found by bisection of its logarithm, in ``TRIALS`` readings of the texts; their perplexity is
    exp(mean over texts of the mean NLL of a token), which no single text decides.

    Args:
        shifted: the effects of an α.

    Raises:
        InvalidRequest: no text has a token to predict.
    """
    low, high = SHIFTS
    nlls = text_nlls(view, texts)
    if not nlls:
        raise InvalidRequest(
            "examples: none with the behaviour is longer than a token; give hyperparameters.shift",
            param="hyperparameters.shift",
        )
    before = fmean(nlls)
    for trial in range(TRIALS):
        shift = math.sqrt(low * high)
        with view.with_effects(shifted(shift)):
            rise = math.exp(min(fmean(text_nlls(view, texts)) - before, 700))
        low, high = (low, shift) if rise >= strength else (shift, high)
        yield Progress(trial, TRIALS, f"shift {shift:.3g}: perplexity of the examples x {rise:.3g}")
    return high


def mean_states(
    view: ModelView, paths: Mapping[int, str], examples: Sequence[Example]
) -> dict[int, Tensor]:
    """What modules are given, meant over a text's tokens: [texts, in] in fp32 by key of ``paths``.

    Special tokens do not count, and no token past the base's context.

    Raises:
        InvalidRequest: a text without a token of its own.
    """
    special = set(view.tokenizer.all_special_ids)
    rows = [view.excerpt(example.text) for example in examples]
    for i, row in enumerate(rows):
        if special.issuperset(row):
            raise InvalidRequest(f"examples.{i}.text is empty", param=f"examples.{i}.text")
    found: dict[int, list[Tensor]] = {key: [torch.empty(0)] * len(rows) for key in paths}
    for batch in batches([len(row) for row in rows]):
        inputs = view.inputs(paths, [rows[i] for i in batch])
        for place, i in enumerate(batch):
            own = [t for t, token in enumerate(rows[i]) if token not in special]
            for key, states in inputs.items():
                found[key][i] = states[place, own].mean(0)
    return {key: torch.stack(states) for key, states in found.items()}


def train_probe(states: Tensor, labels: Tensor, hyperparameters: SurgeryHyperparameters) -> Probe:
    """Logistic regression of labels [n] on states [n, in], by Adam in mini-batches.

    States are centred and brought to unit variance over all their elements, which leaves the
    weight's direction as it is.

    Raises:
        JobFailed: the states do not differ, or are not finite.
    """
    centred = states - states.mean(0)
    X, y = centred / centred.std(), labels.float()
    if not X.isfinite().all():
        raise JobFailed("Model Surgery: all examples have the same hidden state; give others")
    weight = torch.zeros(X.shape[1], device=X.device, requires_grad=True)
    bias = torch.zeros((), device=X.device, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=hyperparameters.learning_rate)
    source = torch.Generator().manual_seed(hyperparameters.seed)
    for _ in range(hyperparameters.epochs):
        order = torch.randperm(len(X), generator=source).to(X.device)
        for chosen in torch.split(order, BATCH):
            adam.zero_grad()
            loss = F.binary_cross_entropy_with_logits(X[chosen] @ weight + bias, y[chosen])
            torch.autograd.backward(loss)
            adam.step()
    right = ((X @ weight + bias).detach() > 0) == labels.bool()
    return Probe(F.normalize(weight.detach(), dim=0), right.float().mean().item())


def opposed_rows(
    weights: Mapping[int, Tensor], directions: Mapping[int, Tensor], share: float
) -> dict[int, Tensor]:
    """Masks [rows] by layer: the ``share`` of all layers' rows with the smallest cosine to v."""
    cosines = {
        layer: F.cosine_similarity(weight, directions[layer][None, :], dim=1)
        for layer, weight in weights.items()
    }
    flat = torch.cat(list(cosines.values()))
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(max(1, round(share * len(flat))), largest=False).indices] = True
    parts = torch.split(mask, [len(cosine) for cosine in cosines.values()])
    return dict(zip(cosines, parts, strict=True))
