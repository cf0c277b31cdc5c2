"""What is read of delta files without torch is what is in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editing.deltas import Delta, Effect, Sparse
from registry.artifacts import ArtifactStore
from registry.errors import NotFound
from tests.models import random_effect
from workers import contents
from workers.contents import read_contents

OUT, IN = 24, 36
LOW, SPARSE = random_effect(1, OUT, IN, "rank3"), random_effect(2, OUT, IN, "sparse")
EFFECTS = {
    kind: random_effect(3, OUT, IN, kind)
    for kind in ("rank1", "rank20", "dense", "sparse", "scale", "gated", "replacing", "all")
} | {
    "both": replace(LOW, sparse=SPARSE.sparse),
    "nothing": Effect(sparse=Sparse.of(torch.zeros(OUT, IN))),
}


@pytest.mark.parametrize("kind", EFFECTS)
@pytest.mark.parametrize("piece", [1, 100, 2**22])
def test_modules_kinds_ranks_shapes_and_norms(
    kind: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "PIECE", piece)
    effect, store = EFFECTS[kind], ArtifactStore(tmp_path)
    delta = Delta({"a.b": effect, "c": Effect(shift=torch.ones(3))}, "0" * 64, "rome", {})
    found = read_contents(store, store.put(delta.to_bytes()))
    assert found.method == "rome"
    touched, other = found.modules
    assert (touched.module, other.module, other.kinds) == ("a.b", "c", ("shift",))
    assert (other.shape, other.norm) == ((3, None), None)
    parts = {"low_rank": effect.A, "dense": effect.dense, "sparse": effect.sparse}
    parts |= {"scale": effect.scale, "shift": effect.shift, "gated": effect.gates or None}
    assert set(touched.kinds) == {name for name, part in parts.items() if part is not None}
    assert (touched.rank, touched.replaces) == (effect.rank, effect.replaces)
    assert touched.shape == (OUT, None if kind == "scale" else IN)
    added = replace(effect, scale=None).weight(torch.zeros(OUT, IN))
    if effect.A is None and effect.dense is None and effect.sparse is None:
        assert touched.norm is None
    else:
        assert touched.norm == pytest.approx(float(added.double().norm()), rel=1e-5)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_contents(ArtifactStore(tmp_path), "0" * 64)
