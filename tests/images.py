"""What docker/Dockerfile makes of its stages, read without a container engine."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

DOCKER = Path(__file__).parents[1] / "docker"


@dataclass(frozen=True)
class Image:
    """A stage as it ends."""

    base: str
    user: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)


def images() -> dict[str, Image]:
    """The stages by name, each with what it has of the one that it is made from."""
    found: dict[str, Image] = {}
    name = ""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            inherited = found.get(base)
            found[name] = Image(base) if inherited is None else replace(inherited, base=base)
            continue
        if not word:
            continue
        now = found[name]
        if word == "ENV":
            pairs = dict(part.split("=", 1) for part in shlex.split(rest))
            found[name] = replace(now, environment={**now.environment, **pairs})
        elif word == "USER":
            found[name] = replace(now, user=rest)
        elif word == "CMD":
            found[name] = replace(now, command=json.loads(rest))
        elif word == "HEALTHCHECK":
            found[name] = replace(now, health=json.loads(rest[rest.index("[") :]))
        elif word == "COPY" and not rest.startswith("--from"):
            found[name] = replace(now, copied=[*now.copied, *rest.split()[:-1]])
    return found
