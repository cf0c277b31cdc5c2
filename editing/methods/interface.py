"""What an editing method is, and what all of them check first."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol, TypeVar

from editing.deltas import Delta
from editing.methods.hyperparameters import Hyperparameters
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest
from registry.manifests import EditRequest, Progress

T = TypeVar("T")


class Apply(Protocol):
    """A method: computes one delta for all requests on top of the effects active in the view.

    Yields progress, returns the delta. It writes no weight and leaves no hook behind.
    """

    def __call__(
        self,
        view: ModelView,
        requests: Sequence[EditRequest],
        hyperparameters: Hyperparameters,
        resources: Resources,
    ) -> Generator[Progress, None, Delta]: ...


def part_of(
    work: Generator[Progress, None, T], index: int, count: int
) -> Generator[Progress, None, T]:
    """The work on one of ``count`` like parts, its progress told as progress of the whole."""
    try:
        while True:
            step = next(work)
            done, total = index * step.total + step.done, count * step.total
            yield Progress(done, total, step.message, step.metrics)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        work.close()


def check_requests(requests: Sequence[EditRequest]) -> None:
    """Refuse what no method can apply.

    Raises:
        InvalidRequest: names the field (``edits.0.prompt``) and what would be right.
    """
    if not requests:
        raise InvalidRequest("edits is empty; give at least one edit", param="edits")
    for i, request in enumerate(requests):
        if request.prompt.count("{}") != 1:
            raise InvalidRequest(
                f"edits.{i}.prompt: {request.prompt!r} must hold {{}} once, for the subject"
                ' ("The capital of {} is")',
                param=f"edits.{i}.prompt",
            )
        for name in ("subject", "target_new"):
            if not getattr(request, name).strip():
                raise InvalidRequest(f"edits.{i}.{name} is empty", param=f"edits.{i}.{name}")
