"""A run's curves as one SVG image, drawn by hand: no library, no script, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from registry.curves import Measured

Point = tuple[float, float]

#: What each panel shows, and the names that are drawn in it where they were measured.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("train_loss", "valid_loss")),
    ("accuracy", ("train_mean_token_accuracy", "valid_mean_token_accuracy")),
    ("reward", ("rewards/margins", "rewards/chosen", "rewards/rejected", "reward")),
    ("learning rate", ("learning_rate",)),
)
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")
#: Curves of more points are thinned to so many.
POINTS = 600
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 220, 70, 20, 34, 34


def draw(steps: Mapping[int, Measured], title: str) -> str:
    """Curves by step, as ``registry.curves.curves`` gives them -> an SVG document."""
    panels = []
    for label, names in PANELS:
        lines = {name: _points(steps, name) for name in names}
        if any(lines.values()):
            panels.append((label, {name: line for name, line in lines.items() if line}))
    last = max(steps, default=1)
    drawn = [_panel(i, label, lines, last) for i, (label, lines) in enumerate(panels)]
    height = HEIGHT * max(1, len(panels)) + 30
    nothing = '<text x="20" y="60">No step was measured yet.</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        ' font-family="system-ui, sans-serif" font-size="12">'
        f"<title>{escape(title)}</title>"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
        f'<text x="20" y="20" font-weight="bold">{escape(title)}</text>'
        f"{''.join(drawn) or nothing}</svg>\n"
    )


def _points(steps: Mapping[int, Measured], name: str) -> list[Point]:
    found = [(float(step), row.get(name)) for step, row in steps.items()]
    finite = [(step, value) for step, value in found if value is not None and math.isfinite(value)]
    every = -(-len(finite) // POINTS) or 1
    return finite[::every] if len(finite) < 2 else [*finite[:-1:every], finite[-1]]


def _panel(place: int, label: str, lines: Mapping[str, Sequence[Point]], last: float) -> str:
    values = [y for line in lines.values() for _, y in line]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1
    top, bottom = 30 + HEIGHT * place + TOP, 30 + HEIGHT * (place + 1) - BOTTOM
    right = WIDTH - RIGHT

    def at(x: float, y: float) -> str:
        across = LEFT + (right - LEFT) * x / last
        return f"{across:.1f},{bottom - (bottom - top) * (y - low) / (high - low):.1f}"

    parts = [f'<text x="{LEFT}" y="{top - 12}" font-weight="bold">{escape(label)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = bottom - (bottom - top) * share
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#d0d7de"/>')
        told = f"{low + (high - low) * share:.3g}"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{told}</text>')
    for share, anchor in ((0.0, "start"), (1.0, "end")):
        x, step = LEFT + (right - LEFT) * share, round(last * share)
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="{anchor}">{step}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 16}" text-anchor="middle">step</text>')
    legend = right
    for (name, line), color in zip(lines.items(), COLORS, strict=False):
        where = " ".join(at(*point) for point in line)
        parts.append(f'<polyline points="{where}" fill="none" stroke="{color}"/>')
        end_x, end_y = at(*line[-1]).split(",")
        parts.append(f'<circle cx="{end_x}" cy="{end_y}" r="2.5" fill="{color}"/>')
        parts.append(
            f'<text x="{legend}" y="{top - 12}" fill="{color}" text-anchor="end">'
            f"{escape(name)}</text>"
        )
        legend -= 8 * len(name)
    return "".join(parts)
