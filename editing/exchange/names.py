"""The names of what is exchanged: formats that come back, and the files of each. No torch."""

from __future__ import annotations

from collections.abc import Collection

PEFT, ERRATA = "peft", "errata"

#: What an adapter's folder holds: its configuration and its weights.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: What this project writes beside whatever it exports; an archive's list of contents.
MANIFEST = "errata.json"
#: Where an archive keeps artifacts, each under its digest.
ARTIFACTS = "artifacts/"

#: Ranks that vLLM takes.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def kind_of(names: Collection[str]) -> str | None:
    """What an archive with these members is, ``peft`` or ``errata``; None if neither."""
    if ADAPTER_CONFIG in names or ADAPTER_WEIGHTS in names:
        return PEFT
    return ERRATA if MANIFEST in names else None
