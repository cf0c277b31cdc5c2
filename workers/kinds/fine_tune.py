"""Fine-tuning: a version's stack + rows -> one more delta, and versions on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from editing.deltas import Delta, compose
from editing.finetune.adapter import Adapter
from editing.finetune.catalogue import TUNINGS
from editing.finetune.hyperparameters import TuningHyperparameters
from editing.finetune.memory import SHARE, Plan, free_memory, plan
from editing.finetune.objectives.build import objective
from editing.finetune.rows import Sized
from editing.finetune.trainer import Schedule, State, Trainer
from editing.guards import Reading, failure, judge, read
from editing.metrics.norm import update_ratio
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.attempts import fence
from registry.checkpoints import list_checkpoints, record_checkpoint
from registry.curves import PURPOSE, as_csv, curves
from registry.files import ResultFile
from registry.jobs import add_event, all_events
from registry.manifests import GuardResult, Progress, VersionManifest, finite
from registry.results import Result
from registry.versions import Version
from telemetry import traces
from workers.evidence import limits_of, material_of
from workers.examples import examples_of, recipe_of
from workers.ground import parent_of
from workers.kinds.prepare import load_resources
from workers.recipes import TEXTS
from workers.work import Paused, Work

#: Versions that a run makes, its last among them.
CHECKPOINTS = 3
#: Times that the validation file is measured in a run.
MEASURED = 10

Planning = Callable[
    [Work, ModelView, Adapter, list[Any], TuningHyperparameters, Sequence[Sized]], Plan
]


@dataclass(frozen=True)
class Judged:
    """What stands at one step, measured."""

    manifest: VersionManifest
    metrics: dict[str, Any]
    guards: tuple[GuardResult, ...]


def perform(work: Work) -> Result:
    """Train from where an earlier attempt stopped, or from the start.

    Raises:
        Paused: the user asked for it; the state is kept.
    """
    request = work.claim.job.request
    parent, view, stack = parent_of(work)
    resources = load_resources(work, frozenset({TEXTS}))
    material = material_of(work, view.base, [], resources.references, request["guards"])
    with view.with_effects(compose(delta.effects for delta in stack)):
        trainer = _trainer(work, view, resources, _planned, _state(work))
        held_out = trainer.objective.rows(view, examples_of(work, view, "validation"))
        work.report(Progress(0, 0, "measuring before"))
        with traces.span("metrics"):
            before = read(view, material)

        def judged() -> Judged:
            work.report(Progress(trainer.step, trainer.total, "measuring"))
            delta = trainer.delta(request["method"])
            with traces.span("guards"), view.with_effects(delta.effects):
                after = read(view, material)
            limits = limits_of(work.settings, request["guards"])
            norm = update_ratio(view, delta.effects)
            return Judged(
                _manifest(work, parent, trainer, delta),
                _metrics(trainer, before, after, held_out),
                judge(material, before, after, norm, limits),
            )

        last = _trained(work, trainer, held_out, judged)
    work.models.check_untouched(work.claim.job.base)
    return Result(last.manifest, last.metrics, last.guards, file=_step_metrics(work))


def rerun(work: Work) -> VersionManifest:
    """As ``perform`` up to the recipe's step, unmeasured and in one go: what a recipe makes on
    another parent."""
    parent, view, stack = parent_of(work)
    request = work.claim.job.request
    with view.with_effects(compose(delta.effects for delta in stack)):
        trainer = _trainer(work, view, load_resources(work, frozenset({TEXTS})), _plan)
        for progress in trainer.run(request["step"]):
            work.report(progress)
        return _manifest(work, parent, trainer, trainer.delta(request["method"]))


def _trainer(
    work: Work,
    view: ModelView,
    resources: Resources,
    planned: Planning,
    state: State | None = None,
) -> Trainer:
    """The run that the request asks for, of the version that the view computes as.

    Args:
        planned: ``_plan``, or what keeps to the plan of an earlier attempt.
        state: where an earlier attempt has come to.
    """
    request = work.claim.job.request
    entry = TUNINGS[request["method"]]
    chosen = entry.hyperparameters(**request["hyperparameters"])
    harmful = examples_of(work, view, "harmful")
    aim = objective(view, chosen, request["options"], harmful, resources.texts)
    rows = aim.rows(view, examples_of(work, view, "rows"))
    adapter = entry.build(view, chosen, request["seed"])
    found = planned(work, view, adapter, rows, chosen, aim.others())
    schedule = Schedule.of(chosen, found, request["seed"])
    return Trainer(view, adapter, rows, schedule, state, aim)


def _step_metrics(work: Work) -> ResultFile:
    """The run's curves as a file of comma-separated values."""
    work.write_progress()
    with work.database.read() as connection:
        steps = curves(connection, work.claim.job.id)
    data = as_csv(steps)
    content = work.artifacts.put(data)
    return ResultFile("step_metrics.csv", PURPOSE, len(data), content, len(steps))


def _trained(
    work: Work, trainer: Trainer, held_out: list[Any], judged: Callable[[], Judged]
) -> Judged:
    """Run to the end, and say what stands there.

    Raises:
        Paused: the user asked for it; the state is kept.
    """
    try:
        with traces.span("method"):
            _train(work, trainer, held_out, judged)
        return judged()
    except Paused:
        _keep(work, trainer)
        raise


def _train(work: Work, trainer: Trainer, held_out: list[Any], judged: Callable[[], Judged]) -> None:
    """Run to the end; keep the state every so often, and a version at each mark before it."""
    marks = _marks(trainer)
    if trainer.step in marks and not _has_version(work, trainer.step):
        _keep(work, trainer, judged())
    measured = {round(trainer.total * part / MEASURED) for part in range(1, MEASURED + 1)}
    kept_at = time.monotonic()
    for progress in trainer.run():
        if held_out and trainer.step in measured:
            found = {**progress.metrics, **trainer.measure(held_out)}
            progress = replace(progress, metrics=found)
        work.report(progress)
        if trainer.step in marks:
            _keep(work, trainer, judged())
            kept_at = time.monotonic()
        elif time.monotonic() - kept_at >= work.settings.training_state_seconds:
            _keep(work, trainer)
            kept_at = time.monotonic()


def _planned(
    work: Work,
    view: ModelView,
    adapter: Adapter,
    rows: list[Any],
    chosen: TuningHyperparameters,
    others: Sequence[Sized] = (),
) -> Plan:
    """The plan of the job's first attempt, told as an event: what a run goes on with."""
    with work.database.read() as connection:
        for event in all_events(connection, work.claim.job.id):
            if "plan" in event.data:
                return Plan(**event.data["plan"])
    found = _plan(work, view, adapter, rows, chosen, others)
    told = f"flat rows of up to {found.tokens} tokens"
    told += ", with gradient checkpointing" if found.checkpointing else ""
    with work.database.write() as connection:
        fence(connection, work.claim)
        add_event(
            connection, work.claim.job.id, "message", {"message": told, "plan": asdict(found)}
        )
    return found


def _plan(
    work: Work,
    view: ModelView,
    adapter: Adapter,
    rows: list[Any],
    chosen: TuningHyperparameters,
    others: Sequence[Sized] = (),
) -> Plan:
    """What fits the memory at hand."""
    budget = work.settings.training_memory
    return plan(
        view,
        adapter,
        rows,
        int(chosen.batch_size),
        None if chosen.max_tokens == "auto" else chosen.max_tokens,
        round(SHARE * free_memory(view.device)) if budget is None else budget,
        others,
    )


def _marks(trainer: Trainer) -> set[int]:
    """Steps before the last one at which a version is made: ends of epochs, evenly spaced."""
    epochs = trainer.schedule.epochs
    each = trainer.total // epochs
    ends = {round(epochs * part / CHECKPOINTS) for part in range(1, CHECKPOINTS)}
    return {each * end for end in ends if 0 < end < epochs}


def _keep(work: Work, trainer: Trainer, judged: Judged | None = None) -> None:
    """Write down where the run stands; a version that a guard rejects is not made."""
    state = work.artifacts.put(trainer.state().to_bytes())
    metrics: dict[str, Any] = {} if judged is None else judged.metrics["after"]
    manifest = None
    if judged is not None and failure(judged.guards) is None:
        manifest = judged.manifest
    with work.database.write() as connection:
        record_checkpoint(connection, work.claim, trainer.step, state, metrics, manifest)


def _has_version(work: Work, step: int) -> bool:
    """Whether an attempt has come from a step to its version."""
    with work.database.read() as connection:
        found = list_checkpoints(connection, work.claim.job.id)
    return any(checkpoint.step == step and checkpoint.version_id for checkpoint in found)


def _state(work: Work) -> State | None:
    """Where the job's attempts so far have come to."""
    with work.database.read() as connection:
        found = list_checkpoints(connection, work.claim.job.id)
    return State.from_bytes(work.artifacts.get(found[-1].state)) if found else None


def _manifest(work: Work, parent: Version, trainer: Trainer, delta: Delta) -> VersionManifest:
    job = work.claim.job
    recipe = {
        "kind": "fine_tune",
        "job": job.id,
        "step": trainer.step,
        **{
            name: job.request[name]
            for name in (
                "method",
                "hyperparameters",
                "options",
                "rows",
                "harmful",
                "seed",
                "suffix",
                "message",
            )
        },
        "preprocessing": recipe_of(work),
        "author": job.actor,
    }
    with traces.span("artifact"):
        digest = work.artifacts.put(delta.to_bytes())
    return VersionManifest(
        base=parent.manifest.base,
        stack=(*parent.manifest.stack, digest),
        parents=(parent.id,),
        recipe=recipe,
    )


def _metrics(
    trainer: Trainer, before: Reading, after: Reading, held_out: list[Any]
) -> dict[str, Any]:
    each = sum(row.size for row in trainer.rows)
    return {
        "before": finite(before.metrics),
        "after": finite({**after.metrics, **(trainer.measure(held_out) if held_out else {})}),
        "trained_tokens": each * trainer.schedule.epochs,
        "trained_numbers": trainer.adapter.trainable(),
        "steps": trainer.step,
    }
