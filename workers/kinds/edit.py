"""An edit: base + the parent's stack -> method, by batches -> delta -> guards -> artifact.

With ``check_every`` the guards look at the work while it goes on. Where one fails the job ends at
the last point that passed: its version holds the edits up to there, and no endpoint moves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from editing.deltas import Delta, Effect, compose, joined
from editing.guards import Material, Reading, failure, judge, read
from editing.methods import METHODS
from editing.methods.interface import Task, part_of
from editing.metrics import measure
from editing.metrics.norm import update_ratio
from editing.metrics.targets import fill_targets
from registry.errors import JobFailed
from registry.manifests import (
    EditRequest,
    Example,
    GuardResult,
    Progress,
    VersionManifest,
    canonical_json,
    finite,
)
from registry.results import Result
from registry.versions import READY, Version
from telemetry import traces
from workers.evidence import detectors_in, limits_of, material_of
from workers.ground import Ground, ground_of, holds_of, read_edits
from workers.work import Work


@dataclass(frozen=True)
class Applied:
    """What batches made.

    Attributes:
        deltas: one for each batch; ``effects`` is what they do together.
        count: how many edits they hold.
        reading: what the guards saw, and ``guards`` what they said.
        stopped_by: the guard that failed after ``stopped_at`` edits, later than this point.
    """

    deltas: tuple[Delta, ...] = ()
    effects: Mapping[str, Effect] = field(default_factory=dict)
    count: int = 0
    reading: Reading | None = None
    guards: tuple[GuardResult, ...] = ()
    stopped_by: GuardResult | None = None
    stopped_at: int = 0

    def plus(self, delta: Delta, count: int) -> Applied:
        """With the delta of a further batch of so many edits; no guard has seen it yet."""
        effects = compose([self.effects, delta.effects])
        return Applied((*self.deltas, delta), effects, self.count + count)


def perform(work: Work) -> Result:
    """Apply the request's edits on top of the parent and save what they change as one delta.

    On top of a delta of its own a method that retrains makes one of both, in that one's place.
    """
    ground = ground_of(work)
    with traces.span("metrics"), ground.as_it_was():
        work.report(Progress(0, 0, "measuring before"))
        edits = fill_targets(ground.view, read_edits(work, work.claim.job.request["edits"]))
        guards = work.claim.job.request["guards"]
        references = ground.resources.references
        material = material_of(work, ground.view.base, edits, references, guards)
        before = read(ground.view, material)
    done = _apply(work, ground, _tasks(work, ground, edits), material, before)
    edits, delta = edits[: done.count], joined(done.deltas)
    manifest = _manifest(work, ground, edits, delta)
    work.report(Progress(done.count, done.count, "measuring"))
    with traces.span("metrics"), ground.as_it_was():
        was = measure(ground.view, edits)
    with traces.span("metrics"), ground.with_change(delta.effects):
        now = measure(ground.view, edits, before=was)
        holds = _holds(work, ground, manifest, now.holds)
    work.models.check_untouched(work.claim.job.base)
    after = {} if done.reading is None else done.reading.metrics
    metrics: dict[str, Any] = {
        "before": finite({**was.metrics, **before.metrics}),
        "after": finite({**now.metrics, **after}),
        "detectors": _detectors(ground, delta),
    }
    if done.stopped_by is None:
        return Result(manifest, metrics, done.guards, holds)
    metrics["stopped"] = {
        "guard": asdict(done.stopped_by),
        "after_edits": done.stopped_at,
        "kept_edits": done.count,
    }
    return Result(manifest, metrics, done.guards, holds, withheld="guard_stopped")


def rerun(work: Work) -> VersionManifest:
    """As ``perform``, unmeasured: what a recipe makes on another parent."""
    ground = ground_of(work)
    with ground.as_it_was():
        edits = fill_targets(ground.view, read_edits(work, work.claim.job.request["edits"]))
    *_, done = _batches(work, ground, _tasks(work, ground, edits))
    return _manifest(work, ground, edits, joined(done.deltas))


def _apply(
    work: Work,
    ground: Ground,
    tasks: Sequence[tuple[Task, int]],
    material: Material,
    before: Reading,
) -> Applied:
    """Run the method on each task, on top of what it made of those before, under the guards.

    Args:
        tasks: each with the number of the job's edits in it.
        material: what the guards ask; ``before`` is what the parent answered.
    """
    every = work.claim.job.request.get("check_every")
    done = good = Applied()
    for place, made in enumerate(_batches(work, ground, tasks), start=1):
        done = made
        if place < len(tasks) and (every is None or done.count - good.count < every):
            continue
        work.report(Progress(place, len(tasks), f"guards after {done.count} edits"))
        done = _checked(work, ground, done, material.upto(done.count), before)
        failed = failure(done.guards)
        if failed is not None:
            return replace(good, stopped_by=failed, stopped_at=done.count) if good.deltas else done
        good = done
    return done


def _batches(work: Work, ground: Ground, tasks: Sequence[tuple[Task, int]]) -> Iterator[Applied]:
    """What is made after each task, on top of those before."""
    done = Applied()
    for place, (task, size) in enumerate(tasks):
        task = replace(task, stack=(*task.stack, *done.deltas))
        done = done.plus(_run(work, ground, task, done, place, len(tasks)), size)
        yield done


def _run(work: Work, ground: Ground, task: Task, done: Applied, place: int, count: int) -> Delta:
    """The method on the place-th of ``count`` tasks, on top of what is done."""
    apply = METHODS[ground.recipe.method].load()
    with ground.with_change(done.effects):
        steps = apply(ground.view, task, ground.recipe.hyperparameters, ground.resources)
        delta: Delta = work.follow(part_of(steps, place, count))
    return delta


def _checked(
    work: Work, ground: Ground, done: Applied, material: Material, before: Reading
) -> Applied:
    """With what the guards see and say of it."""
    with traces.span("guards"):
        with ground.with_change(done.effects):
            after = read(ground.view, material)
        norm = update_ratio(ground.view, done.effects)
    limits = limits_of(work.settings, work.claim.job.request["guards"])
    return replace(done, reading=after, guards=judge(material, before, after, norm, limits))


def _tasks(work: Work, ground: Ground, edits: Sequence[EditRequest]) -> list[tuple[Task, int]]:
    """The job in batches; the first trains anew what is to be retrained."""
    size = _batch_size(work) or max(1, len(edits))
    batches = [edits[i : i + size] for i in range(0, len(edits), size)] or [edits]
    examples, texts = _examples(work), _texts(work)
    asked = {edit.rewrite_prompt for edit in edits}
    older = [edit for edit in ground.retrained if edit.rewrite_prompt not in asked]
    return [
        (Task([*(() if place else older), *batch], examples, texts, ground.beneath), len(batch))
        for place, batch in enumerate(batches)
    ]


def _batch_size(work: Work) -> int | None:
    """Edits made at once, no more than the guards are to look at together; None for all."""
    sizes = [work.claim.job.request.get(name) for name in ("batch_size", "check_every")]
    return min((size for size in sizes if size is not None), default=None)


def _holds(work: Work, ground: Ground, manifest: VersionManifest, own: Sequence[bool]) -> str:
    """Ask every live edit whether its prompt's greedy answer still begins with its target.

    Returns the digest of ``{version id: [true or false for each of its edits]}``, the version's
    that is being made among them.
    """
    job = work.claim.job
    version = Version(job.tenant, manifest, READY, job.id, time.time())
    found = holds_of(work, ground.view, [version, *ground.chain], {version.id: own})
    return work.artifacts.put(canonical_json(found))


def _detectors(ground: Ground, delta: Delta) -> list[dict[str, Any]]:
    """What looks like a stealth attack in the delta that was made."""
    with ground.view.with_effects(ground.below):
        return detectors_in(ground.view, delta, len(ground.beneath), ground.resources)


def _examples(work: Work) -> list[Example]:
    digest = work.claim.job.request.get("examples")
    rows = [] if digest is None else json.loads(work.artifacts.get(digest))
    return [Example(**row) for row in rows]


def _texts(work: Work) -> Sequence[str]:
    """The rows of the file that the request names, if it names one."""
    digest = work.claim.job.request.get("texts")
    return () if digest is None else work.artifacts.rows(digest)


def _check_finite(delta: Delta) -> None:
    parts: Iterable[Any] = (t for e in delta.effects.values() for t in e.parts().values())
    if not all(bool(part.isfinite().all()) for part in parts):
        raise JobFailed(
            f"method {delta.method!r} made numbers that are not finite; give it milder"
            " hyperparameters"
        )


def _manifest(
    work: Work, ground: Ground, edits: Sequence[EditRequest], delta: Delta
) -> VersionManifest:
    """The version with a delta on top. Raises JobFailed for numbers that are none."""
    _check_finite(delta)
    with traces.span("artifact"):
        digest = work.artifacts.put(delta.to_bytes())
    return VersionManifest(
        base=ground.view.base.ref,
        stack=(*ground.digests, digest),
        parents=(ground.chain[0].id,),
        recipe=_recipe(work, edits, ground.replaced),
    )


def _recipe(work: Work, edits: Sequence[EditRequest], replaced: str | None) -> dict[str, Any]:
    """How the version came to be; the edits themselves are an artifact, named by digest."""
    job = work.claim.job
    recipe = {
        "kind": "edit",
        "job": job.id,
        "method": job.request["method"],
        "hyperparameters": job.request["hyperparameters"],
        "edits": work.artifacts.put(canonical_json([edit.to_json() for edit in edits])),
        "edit_count": len(edits),
        "examples": job.request.get("examples"),
        "texts": job.request.get("texts"),
        "batch_size": _batch_size(work),
        "author": job.actor,
        "message": job.request.get("message"),
    }
    return recipe if replaced is None else {**recipe, "replaces": replaced}
