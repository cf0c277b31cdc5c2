"""A merge: versions of one base -> one delta, made module by module -> guards -> artifact.

Guards compare the result with the base itself: the versions have no other parent in common.
Before it each version is measured on its own edits and facts, and after it the result is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editing.deltas import Delta, DeltaWriter
from editing.guards import judge, read
from editing.merging import MERGES
from editing.merging.conflicts import edit_conflicts
from editing.merging.merge import METHOD, Plan, merge, merge_state
from editing.metrics import Measurement, measure
from editing.metrics.norm import update_ratio
from editing.metrics.suites import score_facts
from editing.models.view import ModelView
from registry.manifests import EditRequest, Progress, VersionManifest, canonical_json, finite
from registry.results import Result
from telemetry import traces
from workers.evidence import detectors_in, limits_of, material_of
from workers.kinds.prepare import load_resources
from workers.merging import Origin, Parent, parents_of
from workers.recipes import TEXTS
from workers.work import Work


@dataclass(frozen=True)
class Found:
    """What a model makes of a version's edits and facts."""

    edits: Measurement
    facts: Sequence[bool]

    @property
    def metrics(self) -> dict[str, float | None]:
        share = {"fact_accuracy": sum(self.facts) / len(self.facts)} if self.facts else {}
        return finite({**self.edits.metrics, **share})


def perform(work: Work) -> Result:
    """Merge the versions that the request names and save the one delta that is made of them."""
    request = work.claim.job.request
    view, parents = parents_of(work)
    resources = load_resources(work, frozenset({TEXTS}))
    edits = {origin: edit for parent in parents for origin, edit in parent.edits.items()}
    work.report(Progress(0, 0, "measuring before"))
    material = material_of(
        work, view.base, [*edits.values()], resources.references, request["guards"]
    )
    with traces.span("metrics"):
        before = read(view, material)
        found = [_before(work, view, parent) for parent in parents]
    digest, metrics = _merged(work, view, parents)
    delta = Delta.from_bytes(work.artifacts.get(digest))
    work.report(Progress(0, 0, "measuring"))
    with traces.span("guards"), view.with_effects(delta.effects):
        after = read(view, material)
        now = [_measured(view, p, was) for p, was in zip(parents, found, strict=True)]
    norm = update_ratio(view, delta.effects)
    guards = judge(material, before, after, norm, limits_of(work.settings, request["guards"]))
    metrics |= {
        "before": finite(before.metrics),
        "after": finite(after.metrics),
        "inputs": [_survival(*each) for each in zip(parents, found, now, strict=True)],
        "detectors": detectors_in(view, delta, 0, resources),
    }
    work.models.check_untouched(work.claim.job.base)
    manifest = VersionManifest(
        base=view.base.ref,
        stack=(digest,),
        parents=tuple(parent.version.id for parent in parents),
        recipe=_recipe(work),
    )
    return Result(manifest, metrics, guards, _holds(work, parents, now))


def _merged(work: Work, view: ModelView, parents: Sequence[Parent]) -> tuple[str, dict[str, Any]]:
    """The digest of the merged delta, and what is to be said of it."""
    request = work.claim.job.request
    entry = MERGES[request["method"]]
    chosen = entry.hyperparameters(**request["hyperparameters"])
    plan = Plan(entry, chosen, request["seed"], request["rank"])
    inputs = [parent.input for parent in parents]
    with work.artifacts.scratch() as folder, (folder / "numbers").open("w+b") as scratch:
        writer = DeltaWriter(scratch, view.base.digest, METHOD)
        conflicts, residual = work.follow(merge(view, inputs, plan, writer))
        merge_state(inputs, writer)
        with traces.span("artifact"):
            digest = work.artifacts.put_chunks(writer.chunks())
    report = conflicts.to_json([parent.version.id for parent in parents])
    edits = edit_conflicts({parent.version.id: parent.edits for parent in parents})
    told: dict[str, Any] = {"conflicts": {**report, "edits": edits}}
    return digest, told if plan.rank is None else {**told, "residual": residual.to_json()}


def _before(work: Work, view: ModelView, parent: Parent) -> Found:
    """What a version itself makes of its edits and facts; its deltas leave memory with it."""
    work.report(Progress(0, 0, f"measuring {parent.version.id}"))
    if not parent.edits and not parent.facts:
        return Found(Measurement({}), ())
    with view.with_effects(parent.input.effects()):
        return _measured(view, parent)


def _measured(view: ModelView, parent: Parent, before: Found | None = None) -> Found:
    edits = list(parent.edits.values())
    was = None if before is None else before.edits
    measured = measure(view, edits, before=was) if edits else Measurement({})
    return Found(measured, score_facts(view, parent.facts) if parent.facts else ())


def _survival(parent: Parent, was: Found, now: Found) -> dict[str, Any]:
    """What of a version's edits that held on it holds on the result."""
    both = list(zip(parent.edits.items(), was.edits.holds, now.edits.holds, strict=True))
    return {
        "version": parent.version.id,
        "edits": {"before": was.metrics, "after": now.metrics},
        "held": sum(was.edits.holds),
        "survived": sum(then and still for _, then, still in both),
        "lost": [_told(*item) for item, then, still in both if then and not still],
    }


def _told(origin: Origin, edit: EditRequest) -> dict[str, str]:
    return {
        "id": f"{origin[0]}.{origin[1]}",
        "subject": edit.subject,
        "prompt": edit.prompt,
        "target_new": edit.target_new,
    }


def _holds(work: Work, parents: Sequence[Parent], now: Sequence[Found]) -> str:
    """The digest of ``{version id: [whether each of its edits holds]}``, as edit jobs keep it."""
    held: dict[str, dict[int, bool]] = {}
    for parent, found in zip(parents, now, strict=True):
        for (maker, place), holds in zip(parent.edits, found.edits.holds, strict=True):
            held.setdefault(maker, {})[place] = holds
    ordered: Mapping[str, list[bool]] = {
        maker: [flags[place] for place in sorted(flags)] for maker, flags in held.items()
    }
    return work.artifacts.put(canonical_json(ordered))


def _recipe(work: Work) -> dict[str, Any]:
    """How the version came to be."""
    job = work.claim.job
    names = ("method", "hyperparameters", "seed", "rank", "message")
    return {
        "kind": "merge",
        "job": job.id,
        **{name: job.request[name] for name in names},
        "versions": [
            {name: own[name] for name in ("id", "weight", "layer_weights")}
            for own in job.request["versions"]
        ],
        "author": job.actor,
    }
