"""A delta whose file is right, but not for the base: refused by engine and workers alike."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from editing.deltas import Delta, DeltaFile, Effect, Gate, Sparse
from editing.deltas.fit import check_file, read_fitting
from editing.models.loading import load_model
from registry.artifacts import ArtifactStore
from registry.bases import Base, find_bases
from registry.errors import ArtifactCorrupt, VersionUnavailable
from registry.manifests import VersionManifest
from serving.protocol import VersionRef
from serving.versions import Versions
from tests.security.attacks import tried

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def base() -> Base:
    return find_bases("atlas")["atlas"]


@pytest.fixture(scope="module")
def model(base: Base) -> torch.nn.Module:
    return load_model(base)


def gate(width: int, out: int) -> Gate:
    return Gate(torch.ones(1, width), torch.ones(1), torch.ones(1, out))


def sparse(out: int, width: int) -> Sparse:
    dense = torch.zeros(out, width)
    dense[0, 0] = 1
    return Sparse.of(dense)


#: By what is wrong: the module, and its effect for inputs and outputs of the module's own sizes.
WRONG: dict[str, tuple[str, Callable[[int, int], Effect]]] = {
    "scale of another length": (DOWN, lambda i, o: Effect(scale=torch.ones(o + 1))),
    "scale of one number": (DOWN, lambda i, o: Effect(scale=torch.ones(1))),
    "shift of another length": (DOWN, lambda i, o: Effect(shift=torch.ones(o - 1))),
    "shift of none": (DOWN, lambda i, o: Effect(shift=torch.ones(0))),
    "A too wide": (DOWN, lambda i, o: Effect(A=torch.ones(1, i + 1), B=torch.ones(o, 1))),
    "B too high": (DOWN, lambda i, o: Effect(A=torch.ones(1, i), B=torch.ones(o + 1, 1))),
    "low rank the wrong way": (DOWN, lambda i, o: Effect(A=torch.ones(1, o), B=torch.ones(i, 1))),
    "dense the wrong way": (DOWN, lambda i, o: Effect(dense=torch.ones(i, o))),
    "dense of one number": (DOWN, lambda i, o: Effect(dense=torch.ones(1, 1))),
    "sparse too wide": (DOWN, lambda i, o: Effect(sparse=sparse(o, i + 1))),
    "sparse too high": (DOWN, lambda i, o: Effect(sparse=sparse(o + 1, i))),
    "keys too wide": (DOWN, lambda i, o: Effect(gates=(gate(i + 1, o),))),
    "values too long": (DOWN, lambda i, o: Effect(gates=(gate(i, o + 1),))),
    "a layer that is none": (
        "model.layers.99.mlp.down_proj",
        lambda i, o: Effect(scale=torch.ones(o)),
    ),
    "a list of layers": ("model.layers", lambda i, o: Effect(scale=torch.ones(o))),
    "the model": ("model", lambda i, o: Effect(scale=torch.ones(o))),
    "an attention": ("model.layers.0.self_attn", lambda i, o: Effect(scale=torch.ones(o))),
    "a weight": (f"{DOWN}.weight", lambda i, o: Effect(scale=torch.ones(o))),
    "a method": (f"{DOWN}.forward", lambda i, o: Effect(scale=torch.ones(o))),
    "a path upwards": ("../../etc/passwd", lambda i, o: Effect(scale=torch.ones(o))),
    "a name of Python's": ("__class__", lambda i, o: Effect(scale=torch.ones(o))),
    "a gate on ids": ("model.embed_tokens", lambda i, o: Effect(gates=(gate(o, o),))),
    "a norm as a matrix": ("model.norm", lambda i, o: Effect(dense=torch.ones(o, o + 1))),
}


def delta(model: torch.nn.Module, base: Base, name: str) -> bytes:
    path, made = WRONG[name]
    linear = model.get_submodule(DOWN)
    assert isinstance(linear, torch.nn.Linear)
    effect = made(linear.in_features, linear.out_features)
    return Delta({path: effect}, base.digest, "rome").to_bytes()


@pytest.mark.parametrize("name", WRONG)
def test_a_delta_that_does_not_fit(
    model: torch.nn.Module, base: Base, name: str, tmp_path: Path
) -> None:
    tried["deltas that do not fit"] = tried.get("deltas that do not fit", 0) + 1
    data = delta(model, base, name)
    with pytest.raises(ArtifactCorrupt, match="does not fit the base"):
        read_fitting(data, model, base.digest)
    store = ArtifactStore(tmp_path)
    digest = store.put(data)
    with pytest.raises(ArtifactCorrupt, match="does not fit the base"):
        check_file(DeltaFile(store.file(digest)), model, base.digest)
    ref = VersionRef.of(VersionManifest(base.ref, (digest,)))
    with pytest.raises(VersionUnavailable, match="does not fit the base"):
        asyncio.run(Versions(store).acquire(ref, base, model))


@pytest.mark.parametrize("modules", [(DOWN,), ()], ids=["one module", "none"])
def test_a_delta_of_another_base(
    model: torch.nn.Module, base: Base, modules: tuple[str, ...], tmp_path: Path
) -> None:
    good = Effect(scale=torch.ones(model.get_submodule(DOWN).out_features))
    data = Delta(dict.fromkeys(modules, good), "0" * 64, "rome").to_bytes()
    with pytest.raises(ArtifactCorrupt, match="made on a base with digest 0000"):
        read_fitting(data, model, base.digest)
    assert read_fitting(data, model, "0" * 64).effects.keys() == set(modules)
    store = ArtifactStore(tmp_path)
    file = DeltaFile(store.file(store.put(data)))
    with pytest.raises(ArtifactCorrupt, match="made on a base with digest 0000"):
        check_file(file, model, base.digest)
    check_file(file, model, "0" * 64)


def test_a_bit_that_was_lost_is_noticed(model: torch.nn.Module, base: Base, tmp_path: Path) -> None:
    good = Effect(scale=torch.ones(model.get_submodule(DOWN).out_features))
    store = ArtifactStore(tmp_path)
    digest = store.put(Delta({DOWN: good}, base.digest, "rome").to_bytes())
    path = store.file(digest)
    ref = VersionRef.of(VersionManifest(base.ref, (digest,)))
    asyncio.run(Versions(store).acquire(ref, base, model))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(VersionUnavailable, match="have digest"):
        asyncio.run(Versions(store).acquire(ref, base, model))
