from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from registry.bases import Base
from tests.models import save_base


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Bases on disk by family, made once."""
    made: dict[str, Base] = {}

    def base(family: str) -> Base:
        if family not in made:
            folder: Path = tmp_path_factory.mktemp(family)
            made[family] = save_base(folder, family, chat=family == "llama")
        return made[family]

    return base
