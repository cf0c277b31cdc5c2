"""Optimising what edits must say: all at once against one at a time through the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

from torch import Tensor
from torch.nn import functional as F

from benchmarks.editing.bench import Bench
from benchmarks.editing.oracle import one_by_one
from benchmarks.parts import Part
from editing.methods import METHODS
from editing.methods.hyperparameters import MemitHyperparameters
from editing.methods.locate import Place, places, spread
from editing.methods.memit import goals_of, solve_memit
from editing.methods.values import Goal, Text, Values, optimise
from editing.metrics import measure

#: Contexts and texts to keep as the references have them.
AS_PUBLISHED = {"prefixes": 20, "wordings": 0, "essence_texts": 1, "essence_tokens": 8}
#: No loss is ever below it.
NEVER = 1e-30

WHOLE = "one at a time, through the whole model"
LAYERS = "one at a time, layers that can change"
TOKENS = "one at a time, layers and tokens that can change"
BATCH = "all at once, layers and tokens that can change"
EVERY_STEP = "all at once, every edit for all its steps"
#: Each figure is the seconds of the first by the seconds of the second.
SPEEDUPS = {
    "target_optimisation_speedup": (WHOLE, BATCH),
    "target_optimisation_speedup_by_layers": (WHOLE, LAYERS),
    "target_optimisation_speedup_by_tokens": (LAYERS, TOKENS),
    "target_optimisation_speedup_by_batching": (TOKENS, BATCH),
    "target_optimisation_speedup_by_stops": (EVERY_STEP, BATCH),
}


def measure_targets(bench: Bench) -> Part:
    """MEMIT's values for the first seed's first edits, each way by turns.

    The two whose ratio is the figure take every turn, those between them the first one alone.

    All ways get the same texts, and the first four the same rule to stop. Contexts are many and
    texts to keep few, as in the references; MEMIT's own defaults keep more, which every way has to
    compute. S is that of MEMIT's solve on the values of each.
    """
    scale, view = bench.scale, bench.view
    set_by_scale = scale.settings(METHODS["memit"]).model_dump(exclude_unset=True)
    chosen = MemitHyperparameters(**AS_PUBLISHED | set_by_scale)
    layer = chosen.edited_layers(view.n_layers)[-1]
    edits = bench.requests(scale.seeds[0], scale.targets)
    found = places(view, edits, bench.resources)
    started = bench.now()
    bench.tell("sampling what is known of the subjects")
    goals = goals_of(view, layer, edits, found, chosen)
    sampling = bench.now() - started
    whole = [replace(goal, said=_whole(goal.said), kept=_whole(goal.kept)) for goal in goals]
    tireless = chosen.model_copy(update={"stop_loss": NEVER})

    def alone(goals: Sequence[Goal]) -> list[Values]:
        return [bench.follow(optimise(view, layer, [goal], chosen)) for goal in goals]

    ways: Mapping[str, Callable[[], list[Values]]] = {
        WHOLE: lambda: [one_by_one(view, layer, goals, chosen)],
        LAYERS: lambda: alone(whole),
        TOKENS: lambda: alone(goals),
        BATCH: lambda: [bench.follow(optimise(view, layer, goals, chosen))],
        EVERY_STEP: lambda: [bench.follow(optimise(view, layer, goals, tireless))],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, list[Values]] = {}
    for turn in range(scale.rounds):
        for name, way in ways.items():
            if turn > 0 and name not in (WHOLE, BATCH):
                continue
            bench.tell(f"round {turn + 1} of {scale.rounds}: {name}")
            started = bench.now()
            values[name] = way()
            seconds[name].append(bench.now() - started)
            bench.console.log(f"targets, {name}: {seconds[name][-1]:.1f} s")
    scores = {name: _score(bench, chosen, found, values[name]) for name in (WHOLE, BATCH)}
    return Part(
        {
            **{
                figure: ratio(seconds[slow], seconds[quick])
                for figure, (slow, quick) in SPEEDUPS.items()
            },
            "target_optimisation_score_difference": scores[BATCH] - scores[WHOLE],
        },
        {
            "targets": {
                "edits": len(edits),
                "layer": layer,
                "seconds": seconds,
                "sampling_seconds": sampling,
                "steps": {
                    name: fmean(step for one in found for step in one.steps)
                    for name, found in values.items()
                },
                "scores": scores,
                "hyperparameters": chosen.model_dump(),
            }
        },
    )


def ratio(slow: Sequence[float], quick: Sequence[float]) -> float:
    """How many times faster: the median over turns that both took, which may be the first alone."""
    return median(a / b for a, b in zip(slow, quick, strict=False))


def _whole(texts: Sequence[Text]) -> list[Text]:
    """The same texts, run from their first token on."""
    return [
        Text(text.ids, text.watched, 0, F.pad(text.coefficient, (text.start, 0))) for text in texts
    ]


def _score(
    bench: Bench, chosen: MemitHyperparameters, found: Sequence[Place], values: Sequence[Values]
) -> float:
    """S of the edits once MEMIT's solve has written the values into the layers."""
    view, scale = bench.view, bench.scale
    layers = chosen.edited_layers(view.n_layers)

    def solve(layer: int, K: Tensor) -> Tensor:
        return solve_memit(
            bench.resources.covariance[layer].to(K.device), K, chosen.covariance_weight
        )

    (one,) = values
    result = bench.follow(spread(view, layers, found, one.deltas, solve))
    with view.with_effects(result.effects):
        after = measure(view, bench.requests(scale.seeds[0], scale.targets))
    return after.metrics.get("score", 0.0)
