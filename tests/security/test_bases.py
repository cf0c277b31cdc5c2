"""A base folder may hold anything; only its configuration, tokenizer and safetensors are read."""

import json
import pickle
from pathlib import Path

import pytest

from editing.models.loading import load_model, load_tokenizer
from registry.bases import find_bases, read_base
from registry.errors import UnsupportedModel
from tests.models import save_base


def test_code_beside_a_model_is_never_run(tmp_path: Path) -> None:
    save_base(tmp_path, "llama")
    marker = tmp_path / "ran"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    for file, mapped in (
        ("config.json", {"AutoModelForCausalLM": "modeling_evil.Evil"}),
        ("config.json", {"AutoConfig": "configuration_evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Evil", None]}),
    ):
        path = tmp_path / file
        body = json.loads(path.read_text())
        body["auto_map"] = {**body.get("auto_map", {}), **mapped}
        path.write_text(json.dumps(body))
    base = read_base("mine", tmp_path)
    load_model(base)
    load_tokenizer(base)
    assert not marker.exists()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_base(tmp_path, "llama")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(UnsupportedModel, match="safetensors"):
        read_base("mine", tmp_path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "empty"),
        ("atlas,atlas", "twice"),
        ("../x=/models", "no base name"),
        ("ver_x=/models", "no base name"),
        ("mine=/nowhere/at/all", "config.json"),
    ],
)
def test_a_list_of_bases_that_cannot_work(spec: str, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        find_bases(spec)


def test_another_file_is_another_digest(tmp_path: Path) -> None:
    before = save_base(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert read_base("llama", tmp_path).digest != before.digest
