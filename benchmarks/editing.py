"""What one edit does to atlas: counterfactual edits, one at a time, each on the untouched base.

``run`` gives the figures, ``main`` prints them and writes JSON. Wordings that the optimisation
itself saw (in texts that the method sampled from the base) are left out of the figures called
``unseen_…``; wordings that the base was never trained on make up those called ``untrained_…``.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from editing.atlas.evaluation import counterfacts, other_facts, unseen_prompts
from editing.atlas.facts import AtlasFact, read_facts
from editing.methods.hyperparameters import RomeHyperparameters
from editing.methods.rome import apply, essence_of
from editing.metrics import measure
from editing.metrics.targets import greedy_matches
from editing.models.loading import load_model, load_tokenizer, weights_digest
from editing.models.view import ModelView
from editing.statistics import Resources, prepare
from registry.bases import Base, find_bases
from registry.errors import JobFailed
from registry.manifests import EditRequest

OTHERS = 20
COVARIANCE_TOKENS = 100_000
T = TypeVar("T")

#: Figures in the order they are shown, with what each says.
FIGURES = {
    "efficacy_score": "ES",
    "paraphrase_score": "PS",
    "neighborhood_score": "NS",
    "score": "S",
    "greedy_match": "rewrite, greedy",
    "paraphrase_greedy_match": "paraphrases, greedy",
    "unseen_paraphrase_greedy_match": "  unseen by the optimisation",
    "untrained_paraphrase_greedy_match": "  never trained on",
    "same_subject_retention": "subject's other facts, greedy",
    "unseen_same_subject_retention": "  unseen by the optimisation",
    "untrained_same_subject_retention": "  never trained on",
    "other_subjects_retention": "other subjects, same relation",
    "me_ppl_ratio": "ME-PPL ratio",
    "me_ppl_ratio_max": "ME-PPL ratio, largest",
    "seconds": "seconds an edit",
}


def run(
    cases: int,
    seeds: Sequence[int],
    base: Base,
    hyperparameters: RomeHyperparameters | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Edit ``cases`` random facts for each seed; figures are means over edits, then over seeds."""
    chosen = hyperparameters or RomeHyperparameters()
    view = ModelView(load_model(base), load_tokenizer(base), base)
    untouched = weights_digest(view.model)
    started = time.perf_counter()
    resources = finish(prepare(view, chosen.edited_layers(view.n_layers), COVARIANCE_TOKENS))
    prepared = time.perf_counter() - started
    facts = read_facts()
    by_seed = {}
    for seed in seeds:
        picker = random.Random(seed)
        requests = counterfacts(facts, cases, seed)
        by_seed[str(seed)] = _summary(
            [
                measure_edit(view, request, chosen, resources, facts, picker)
                for request in track(requests, f"seed {seed}", console=console, transient=True)
            ]
        )
    if weights_digest(view.model) != untouched:
        raise JobFailed("the base's weights changed during the benchmark")
    figures = {name: fmean(row[name] for row in by_seed.values()) for name in FIGURES}
    figures["me_ppl_ratio_max"] = max(row["me_ppl_ratio_max"] for row in by_seed.values())
    return {
        "figures": {**figures, "prepare_seconds": prepared},
        "detail": {
            "base": {"name": base.name, "digest": base.digest},
            "cases": cases,
            "seeds": by_seed,
            "method": "rome",
            "hyperparameters": chosen.model_dump(),
            "covariance_tokens": resources.tokens,
            "threads": torch.get_num_threads(),
        },
    }


def main(json_file: Path | None = None, cases: int = 50, seeds: Sequence[int] = (1, 2, 3)) -> None:
    """Measure on atlas, print a table, and write JSON where a file is named."""
    console = Console()
    result = run(cases, seeds, find_bases("atlas")["atlas"], console=console)
    by_seed = result["detail"]["seeds"].values()
    table = Table("", *(f"seed {seed}" for seed in seeds), "mean", title=f"ROME, {cases} edits")
    for name, title in FIGURES.items():
        values = [*(row[name] for row in by_seed), result["figures"][name]]
        table.add_row(title, *(f"{value:.3f}" for value in values))
    console.print(table)
    console.print(f"prepared in {result['figures']['prepare_seconds']:.1f} s")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")


def finish(work: Generator[object, None, T]) -> T:
    """Run a generator to its end and give what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def measure_edit(
    view: ModelView,
    request: EditRequest,
    hyperparameters: RomeHyperparameters,
    resources: Resources,
    facts: Sequence[AtlasFact],
    picker: random.Random,
) -> dict[str, float]:
    """Every figure of one edit; one without data is absent."""
    essence = essence_of(view, request, hyperparameters)
    seen = "\n".join((*essence.texts, *essence.wordings))
    new = request.target_new
    unseen = [(p, new) for p in request.paraphrase_prompts if p not in seen]
    untrained = [(p, new) for p in unseen_prompts(request)]
    others = other_facts(request, facts, OTHERS, picker)
    before = measure(view, [request], resources.references)
    others = [
        pair for pair, right in zip(others, greedy_matches(view, others), strict=True) if right
    ]

    started = time.perf_counter()
    delta = finish(apply(view, [request], hyperparameters, resources))
    seconds = time.perf_counter() - started

    with view.with_effects(delta.effects):
        after = measure(view, [request], resources.references, before)
        matches = iter(greedy_matches(view, [*unseen, *untrained, *others]))
    groups = {
        "unseen_paraphrase_greedy_match": [next(matches) for _ in unseen],
        "untrained_paraphrase_greedy_match": [next(matches) for _ in untrained],
        "other_subjects_retention": [next(matches) for _ in others],
        "unseen_same_subject_retention": [],
        "untrained_same_subject_retention": [],
    }
    for i, fact in enumerate(request.retention):
        if before.known[0][i] and fact.prompt not in seen:
            groups["unseen_same_subject_retention"].append(after.known[0][i])
            if i % 2:  # each fact is asked in a trained wording, then in an untrained one
                groups["untrained_same_subject_retention"].append(after.known[0][i])
    ratio = after.metrics["me_ppl"] / before.metrics["me_ppl"]
    return {
        **after.metrics,
        **{name: fmean(group) for name, group in groups.items() if group},
        "me_ppl_ratio": ratio,
        "seconds": seconds,
    }


def _summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the edits that have a figure; S is the harmonic mean of the means."""
    means = {}
    for name in FIGURES:
        if values := [row[name] for row in rows if name in row]:
            means[name] = fmean(values)
    parts = [means[f"{name}_score"] for name in ("efficacy", "paraphrase", "neighborhood")]
    means["score"] = 3 / sum(1 / part for part in parts) if all(parts) else 0.0
    means["me_ppl_ratio_max"] = max(row["me_ppl_ratio"] for row in rows)
    return means


if __name__ == "__main__":
    main()
