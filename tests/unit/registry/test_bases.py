"""What is read of a base's folder, and what is refused there."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from editing.models.loading import load_model
from registry.bases import read_base
from registry.errors import UnsupportedModel
from tests.models import CONTEXT, MODELS, save_base


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", MODELS)
def test_depth_and_context_are_read_for_every_family(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path, name)
    assert (base.family, base.depth, base.context_length) == (name.partition("-")[0], 2, CONTEXT)
    assert load_model(base).config.model_type == base.family


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bloom"}, "family 'bloom' is not supported"),
        ({"model_type": "gemma3"}, "save its text model alone"),
        ({"rope_scaling": {"type": "longrope"}, "rope_parameters": None}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save_base(tmp_path, "llama")
    change_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModel, match=f"'mine'.*{said}"):
        read_base("mine", tmp_path)


def test_a_base_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.down_proj"):
        load_model(base)
