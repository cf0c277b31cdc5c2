"""``errata bench …``: figures, each part of the project's by a command of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from app.cli.options import names

bench = typer.Typer(help="Measure, and write the figures as JSON.", no_args_is_help=True)

Dtype = Literal["float32", "bfloat16"]
Json = Annotated[Path | None, typer.Option("--json", help="Where figures go.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Where a PNG goes.")]
Parts = Annotated[list[str] | None, typer.Option(help="Parts, by commas; all by default.")]
Methods = Annotated[list[str] | None, typer.Option(help="Methods, by commas; all by default.")]
Device = Annotated[str, typer.Option(help="Where the base stands: cpu, cuda.")]
Quick = Annotated[bool, typer.Option(help="Tiny sizes: the figures mean nothing.")]


@bench.command("editing")
def bench_editing(
    json_file: Json = None,
    plot_file: Plot = None,
    only: Parts = None,
    methods: Methods = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Device = "cpu",
    quick: Quick = False,
    patience: Annotated[
        float | None, typer.Option(help="Seconds for batches, and for sequences; 1000 by default.")
    ] = None,
) -> None:
    """Every method on atlas's counterfactuals: alone, in one batch, in sequence; what time buys."""
    from benchmarks.editing.run import main as measure

    measure(json_file, plot_file, names(only), names(methods), threads, device, quick, patience)


@bench.command("finetuning")
def bench_finetuning(
    json_file: Json = None,
    plot_file: Plot = None,
    only: Parts = None,
    methods: Methods = None,
    threads: Annotated[int, typer.Option(help="CPU threads of a process.")] = 1,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Methods at once, a process each; by default all cores' worth."),
    ] = None,
    device: Device = "cpu",
    quick: Quick = False,
    keep: Annotated[
        Path | None,
        typer.Option(help="Where rows are kept as they are measured; a broken run goes on there."),
    ] = None,
) -> None:
    """Every method on a new relation of atlas, and training without padding beside peers."""
    from benchmarks.finetuning.run import main as measure

    chosen = names(only), names(methods)
    measure(json_file, plot_file, *chosen, threads, device, quick, jobs, keep)


@bench.command("load")
def bench_load(
    json_file: Json = None,
    minutes: Annotated[float, typer.Option(min=1, help="How long the streams run.")] = 10.0,
    streams: Annotated[int, typer.Option(min=1, help="How many ask at once.")] = 64,
    quick: Annotated[bool, typer.Option(help="Seconds, few streams: the figures mean nothing.")] = (
        False
    ),
) -> None:
    """A whole service for minutes: streams over HTTP, edits and moves all the while; its memory."""
    from benchmarks.load.run import main as measure

    measure(json_file, minutes, streams, quick)


@bench.command("merging")
def bench_merging(
    json_file: Json = None,
    only: Parts = None,
    methods: Methods = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    device: Device = "cpu",
    quick: Quick = False,
) -> None:
    """Every merge of versions that learnt apart and of sets of edits; exports beside peft."""
    from benchmarks.merging.run import main as measure

    measure(json_file, names(only), names(methods), threads, device, quick)


@bench.command("serving")
def bench_serving(
    json_file: Json = None,
    plot_file: Plot = None,
    only: Parts = None,
    threads: Annotated[int, typer.Option(help="CPU threads of the engine and its peers.")] = 2,
    dtype: Annotated[Dtype, typer.Option(help="Of the engine and its peers.")] = "float32",
    quick: Quick = False,
) -> None:
    """The engine beside its peers: prefill, generation, many versions, HTTP, swaps."""
    from benchmarks.serving.run import main as measure

    measure(json_file, plot_file, names(only), threads, dtype, quick)
