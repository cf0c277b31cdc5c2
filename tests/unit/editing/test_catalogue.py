"""The catalogue is light, and its hyperparameters are strict."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from editing.methods import METHODS


def test_the_catalogue_imports_no_torch() -> None:
    code = "import sys, editing.methods, editing.datasets, editing.atlas.evaluation;"
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", METHODS)
def test_hyperparameters_are_strict(name: str) -> None:
    entry = METHODS[name]
    defaults = entry.hyperparameters()
    with pytest.raises(ValidationError):
        entry.hyperparameters.model_validate({"stepz": 3})
    with pytest.raises(ValidationError):
        entry.hyperparameters.model_validate({"steps": 0})
    with pytest.raises(ValidationError):
        defaults.steps = 3
    for field in entry.hyperparameters.model_fields.values():
        assert field.description
    for depth in (1, 6, 32):
        assert all(0 <= layer < depth for layer in defaults.edited_layers(depth))
