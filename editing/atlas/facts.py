"""The facts that atlas knows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FACTS_FILE = Path(__file__).parent / "data" / "facts.json"


@dataclass(frozen=True)
class AtlasFact:
    """``subject`` has ``object`` by ``relation``: France, capital, Paris."""

    relation: str
    subject: str
    object: str


def read_facts() -> list[AtlasFact]:
    return [AtlasFact(*row) for row in json.loads(FACTS_FILE.read_text())]
