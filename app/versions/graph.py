"""A lineage as a graph: its edges, and the language of Graphviz."""

from __future__ import annotations

from collections.abc import Sequence

from app.versions.schemas import Edge
from registry.versions import READY, Version

DOT = "text/vnd.graphviz"
#: Characters of an id and of a message that a label shows.
SHORT_ID, SHORT_MESSAGE = 12, 60


def edges(chain: Sequence[Version]) -> list[Edge]:
    return [
        Edge(version=version.id, parent=parent)
        for version in chain
        for parent in version.manifest.parents
    ]


def as_dot(chain: Sequence[Version]) -> str:
    """The graph: a node a version, an arrow to each parent; rejected and deleted ones dashed."""
    lines = ["digraph lineage {", "  rankdir=BT;", "  node [shape=box];"]
    for version in chain:
        style = "" if version.status == READY else ", style=dashed"
        lines.append(f"  {quoted(version.id)} [label={_label(version)}{style}];")
    lines += [f"  {quoted(edge.version)} -> {quoted(edge.parent)};" for edge in edges(chain)]
    return "\n".join([*lines, "}", ""])


def quoted(*lines: str) -> str:
    """Lines of text as one DOT string: what a user wrote cannot end it, nor add markup."""
    safe = (
        "".join(c if c.isprintable() else " " for c in line)
        .replace("\\", "\\\\")
        .replace('"', '\\"')
        for line in lines
    )
    return '"' + "\\n".join(safe) + '"'


def _label(version: Version) -> str:
    recipe = version.manifest.recipe
    said = [str(recipe.get(name) or "") for name in ("kind", "method")]
    what = " ".join(word for word in said if word) or version.manifest.base.name
    message = str(recipe.get("message") or "")
    short = message if len(message) <= SHORT_MESSAGE else message[:SHORT_MESSAGE] + "…"
    return quoted(*filter(None, (version.id[:SHORT_ID], what, short)))
