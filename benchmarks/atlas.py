"""What the benches on atlas do alike: load the base, tell how far they are, leave it untouched."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.status import Status

from benchmarks.parts import Part, check_names, run_parts
from editing.models.loading import load_model, load_tokenizer, weights_digest
from editing.models.view import ModelView
from registry.bases import find_bases
from registry.errors import JobFailed
from registry.manifests import Progress

T = TypeVar("T")


class AtlasBench:
    """One run of a bench.

    Args:
        device: of the base.
        console: told what is under way.
    """

    def __init__(self, device: str, console: Console) -> None:
        self.base = find_bases("atlas")["atlas"]
        self.device = device
        self.console = console
        self._status: Status | None = None

    @cached_property
    def view(self) -> ModelView:
        model = load_model(self.base, device=self.device)
        return ModelView(model, load_tokenizer(self.base), self.base)

    def show(self, status: Status) -> None:
        """Where progress is shown from now on."""
        self._status = status

    def tell(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)

    def follow(self, work: Generator[Progress, None, T], name: str = "") -> T:
        """Run a generator to its end, show its progress, and give what it returns."""
        while True:
            try:
                step = next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            self.tell(f"{name} {step.done}/{step.total} {step.message}")


B = TypeVar("B", bound=AtlasBench)


def run_on_atlas(
    parts: Mapping[str, Callable[[B], Part]],
    only: Sequence[str],
    bench: B,
    threads: int,
    libraries: Sequence[str],
    **about: Any,
) -> dict[str, Any]:
    """The figures by name, and the detail they come from.

    Raises:
        InvalidRequest: there is no part of that name.
        JobFailed: a method wrote the base's weights.
    """
    check_names("--only: no part", only, parts)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        untouched = weights_digest(bench.view.model)
        with bench.console.status("preparing the base") as status:
            bench.show(status)
            result = run_parts(
                parts,
                only or parts,
                bench,
                bench.tell,
                libraries,
                base={"name": bench.base.name, "digest": bench.base.digest},
                threads=threads,
                device=bench.device,
                **about,
            )
        if weights_digest(bench.view.model) != untouched:
            raise JobFailed("the base's weights changed during the benchmark")
    finally:
        torch.set_num_threads(usual)
    return result
