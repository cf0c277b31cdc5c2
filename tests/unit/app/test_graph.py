"""The graph of a lineage in Graphviz's language."""

from __future__ import annotations

import re

from app.versions.graph import as_dot, edges, quoted
from registry.manifests import BaseRef, VersionManifest
from registry.versions import Version, in_order

BASE = BaseRef("atlas", "0" * 64)


def version(*parents: Version, status: str = "ready", **recipe: object) -> Version:
    manifest = VersionManifest(BASE, (), tuple(parent.id for parent in parents), recipe)
    return Version("default", manifest, status, None, 0.0)


def test_a_diamond() -> None:
    base = version()
    left = version(base, kind="edit", method="rome", message='say "no"; }\n-> \\')
    right = version(base, kind="fine_tune", method="lora", message="x" * 100, status="rejected")
    head = version(left, right, kind="merge", method="ties")
    chain = in_order([base, left, right, head])
    dot = as_dot(chain)
    arrows = set(re.findall(r'^  "(ver_\w+)" -> "(ver_\w+)";$', dot, re.MULTILINE))
    assert arrows == {(head.id, left.id), (head.id, right.id), (left.id, base.id)} | {
        (right.id, base.id)
    }
    assert {(edge.version, edge.parent) for edge in edges(chain)} == arrows
    nodes = re.findall(r'^  "(ver_\w+)" \[label="(.*)"(, style=dashed)?\];$', dot, re.MULTILINE)
    labels = {node: label for node, label, _ in nodes}
    assert labels[base.id] == f"{base.id[:12]}\\natlas"
    assert labels[left.id] == f'{left.id[:12]}\\nedit rome\\nsay \\"no\\"; }} -> \\\\'
    assert labels[right.id].endswith("x" * 60 + "…")
    assert [node for node, _, dashed in nodes if dashed] == [right.id]
    assert len(dot.splitlines()) == 3 + 4 + 4 + 1


def test_what_users_write_stays_inside_its_quotes() -> None:
    assert quoted('"];evil[label="') == '"\\"];evil[label=\\""'
    assert quoted("a\nb", "c\\") == '"a b\\nc\\\\"'
