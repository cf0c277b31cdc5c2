"""What the bench found, as a table, as JSON and as a picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.table import Table

#: Figures in the order they are shown, with what each says.
FIGURES = {
    "prefill_vs_padded": "prefill, times padded",
    "prefill_vs_sorted": "prefill, times sorted and padded",
    "prefill_vs_one_by_one": "prefill, times one by one",
    "prefill_vs_bins": "prefill, times bins",
    "prefill_share_of_linear_limit": "prefill, share of the linear limit",
    "generate_vs_generate_batch": "end to end, times generate_batch",
    "invariant_mode_cost": "throughput that the invariant mode costs",
    "default_mode_argmax_flips": "default mode: argmax flips",
    "default_mode_largest_difference": "default mode: largest difference of a logit",
    "invariant_mode_argmax_flips": "invariant mode: argmax flips",
    "invariant_mode_largest_difference": "invariant mode: largest difference of a logit",
    "bfloat16_vs_float32": "bf16, times fp32",
    "generate_vs_generate_batch_bfloat16": "end to end in bf16, times generate_batch",
    "bfloat16_equal_completions": "bf16: share of atlas's completions that are equal",
    "mixed64_vs_base": "64 versions, share of base only",
    "mixed64_vs_peft": "64 versions, times peft's mixed batch",
    "mixed64_vs_peft_equal_lengths": "  on prompts of equal length",
    "mixed8_dense_vs_base": "8 dense versions, share of base only",
    "memory_overhead_256": "256 versions: memory beyond their tensors",
    "http_vs_engine_64": "64 streams over HTTP, share of the engine",
    "http_vs_engine_64_atlas": "  on atlas",
    "swap_failed": "swaps: failed requests",
    "swap_effect_p99_ms": "swaps: p99 of taking effect, ms",
    "swap_intertoken_p99_ratio": "swaps: p99 between tokens, times undisturbed",
}
_BINS = re.compile(r"prefill_vs_bins_(\d+)")


def table(figures: dict[str, float], detail: dict[str, Any]) -> Table:
    """Figures, and the prompts whose greedy tokens were equal."""
    shown = Table("", "", "equal prompts", title="Serving")
    shown.columns[1].justify = shown.columns[2].justify = "right"
    for name in [*FIGURES, *(name for name in figures if name not in FIGURES)]:
        if name in figures:
            title = FIGURES.get(name, name.replace("_", " "))
            shown.add_row(title, f"{figures[name]:.4g}", _equal(detail.get(name)))
    return shown


def _equal(detail: Any) -> str:
    if not isinstance(detail, dict) or not detail.get("compared_prompts"):
        return ""
    return f"{detail['equal_prompts']}/{detail['compared_prompts']}"


def plot(file: Path, figures: dict[str, float], detail: dict[str, Any]) -> None:
    """Ratios to peers as bars, bins by length, and the time between tokens under swaps."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 7), layout="constrained")
    grid = page.add_gridspec(2, 2, width_ratios=(3, 2))
    _bars(page.add_subplot(grid[:, 0]), figures)
    _by_length(page.add_subplot(grid[0, 1]), figures)
    _between_tokens(page.add_subplot(grid[1, 1]), detail)
    page.savefig(file, dpi=150)


def _bars(axes: Any, figures: dict[str, float]) -> None:
    names = [name for name in FIGURES if name in figures and re.search("_vs_|_share_", name)]
    values = [figures[name] for name in reversed(names)]
    bars = axes.barh([name.replace("_", " ") for name in reversed(names)], values)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_title("Throughput against each rival")
    axes.spines[["top", "right"]].set_visible(False)


def _by_length(axes: Any, figures: dict[str, float]) -> None:
    found = {int(m[1]): value for name, value in figures.items() if (m := _BINS.fullmatch(name))}
    axes.plot(list(found), list(found.values()), marker="o")
    axes.set(title="Prefill against bins", xlabel="longest prompt", ylabel="times faster")
    axes.set_xticks(list(found))


def _between_tokens(axes: Any, detail: dict[str, Any]) -> None:
    for name, values in detail.get("intertoken_quantiles_ms", {}).items():
        shares = [(i + 1) / (len(values) + 1) for i in range(len(values))]
        axes.plot(values, shares, label=name)
    axes.set(title="Between two tokens of a stream", xlabel="ms", ylabel="share")
    if axes.lines:
        axes.legend()
