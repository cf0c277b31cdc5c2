"""Many dense versions merge in little more memory than two: one module of each at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

#: Versions that change every linear of a model of many layers, merged in a process of its own: the
#: model's size, and what the merge took beyond it.
MERGE = """
import json, sys
import torch
from pathlib import Path
from benchmarks.finetuning.memory import PeakMemory
from editing.deltas import DeltaFile, DeltaWriter, Effect
from editing.finetune.adapter import linears
from editing.merging import MERGES
from editing.merging.changes import Input
from editing.merging.merge import Plan, merge
from editing.models import ModelView
from registry.artifacts import ArtifactStore
from registry.bases import Base
from tests.models import random_model

torch.set_num_threads(1)
name, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
model = random_model(
    "llama", vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=24,
).requires_grad_(False)
view = ModelView(model, None, Base("x", Path("unused"), "0" * 64, "llama", 24, 512, False))
store = ArtifactStore(folder)
size = sum(p.numel() for p in model.parameters()) * 4


def version(seed):
    generator = torch.Generator().manual_seed(seed)
    with store.scratch() as own, (own / "numbers").open("w+b") as scratch:
        writer = DeltaWriter(scratch, "0" * 64, "test")
        for path in linears(view):
            numbers = torch.randn(view.weight(path).shape, generator=generator)
            writer.add(path, Effect(dense=numbers))
        return Input(f"ver_{seed}", [DeltaFile(store.file(store.put_chunks(writer.chunks())))])


def run(inputs):
    entry = MERGES[name]
    with store.scratch() as own, (own / "numbers").open("w+b") as scratch:
        writer = DeltaWriter(scratch, "0" * 64, "merge")
        for _ in merge(view, inputs, Plan(entry, entry.hyperparameters()), writer):
            pass
        store.put_chunks(writer.chunks())


inputs = [version(seed) for seed in range(count)]
with PeakMemory(torch.device("cpu")) as memory:
    run(inputs)
print(json.dumps([size, memory.bytes]))
"""


def measured(name: str, count: int, folder: Path) -> tuple[float, float]:
    # every large tensor is then given back at once: what is resident is what is in use
    allocator = {f"MALLOC_{name}_THRESHOLD_": str(2**16) for name in ("MMAP", "TRIM")}
    out = subprocess.run(
        [sys.executable, "-c", MERGE, name, str(count), str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **allocator},
        cwd=Path(__file__).parents[3],
    )
    size, grown = json.loads(out.stdout)
    return size, grown


def test_ten_versions_take_little_more_than_two(tmp_path: Path) -> None:
    size, two = measured("ties", 2, tmp_path)
    size, ten = measured("ties", 10, tmp_path)
    assert ten < size  # of ten deltas that are each as large as the model
    assert size + ten <= 1.3 * (size + two)
