"""An adapter's configuration, read for what it does to the arithmetic. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from editing.exchange.names import ADAPTER_CONFIG
from editing.headers import without_duplicates
from registry.errors import UnprocessableRequest

T = TypeVar("T")

#: Options that decide how an adapter is trained, found or described, never what it computes.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # a layer of peft sets it by the kind of the base's module
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)
_READ = frozenset(
    {
        "alpha_pattern",
        "init_lora_weights",
        "layers_to_transform",
        "lora_alpha",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
#: Ways to begin training that leave the base's weights as they are.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
_NEUTRAL = {"bias": "none"}
_PATTERN = re.compile(r"\^?[\w.]+")
LARGEST_ALPHA = 1e6
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class LoraForm:
    """What scales an adapter's B A, module by module.

    Attributes:
        layers: those that the adapter is of; None where it may be of any.
        targets: modules, or ends of their paths, that it is of; None where a rule picks them.
    """

    r: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    is_rank_stabilised: bool
    layers: frozenset[int] | None
    targets: tuple[str, ...] | None

    def scaling(self, path: str) -> float:
        """alpha / r, or alpha / √r (rsLoRA, Kalajdzievski 2023)."""
        alpha, r = _matched(self.alphas, path, self.alpha), self.rank(path)
        return alpha / (math.sqrt(r) if self.is_rank_stabilised else r)

    def rank(self, path: str) -> int:
        return _matched(self.ranks, path, self.r)

    def is_of(self, path: str) -> bool:
        """Whether peft would wrap the module, as far as the configuration lists what it wraps."""
        found = _LAYER.search(path)
        if self.layers is not None and (found is None or int(found[1]) not in self.layers):
            return False
        return self.targets is None or any(_ends(path, target) for target in self.targets)


def read_config(data: bytes) -> LoraForm:
    """Read ``adapter_config.json``.

    Raises:
        UnprocessableRequest: it is no LoRA's, or an option changes the arithmetic in a way that a
            low-rank effect does not hold; names the option.
    """
    try:
        config = json.loads(data, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _refused(f"is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise _refused("is no JSON object")
    if config.get("peft_type") != "LORA":
        raise _refused(f"peft_type is {config.get('peft_type')!r}; only LORA adapters are imported")
    for name, value in config.items():
        if name in _HARMLESS or name in _READ or not value or value == _NEUTRAL.get(name):
            continue
        raise _refused(
            f"{name} is {_short(value)}, which changes what the adapter computes beyond"
            " W + B A; train or convert it without, then import it"
        )
    beginning = config.get("init_lora_weights")
    if not any(beginning is known or beginning == known for known in _BEGINNINGS):
        raise _refused(
            f"init_lora_weights is {beginning!r}, which changes the base's own weights; convert the"
            " adapter to a plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    return LoraForm(
        r=_rank("r", config.get("r", 8)),
        alpha=_alpha("lora_alpha", config.get("lora_alpha", 8)),
        ranks=_patterns(config, "rank_pattern", _rank),
        alphas=_patterns(config, "alpha_pattern", _alpha),
        is_rank_stabilised=bool(config.get("use_rslora")),
        layers=_layers(config.get("layers_to_transform")),
        targets=_targets(config.get("target_modules")),
    )


def _short(value: Any) -> str:
    return "given" if isinstance(value, dict | list) else json.dumps(value)[:80]


def _patterns(config: Mapping[str, Any], name: str, read: Callable[[str, Any], T]) -> dict[str, T]:
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise _refused(f"{name} is no object")
    for pattern in found:
        if not _PATTERN.fullmatch(pattern):
            raise _refused(
                f"{name} has the pattern {pattern!r}; only plain module paths or their ends are"
                " read, so write each module out"
            )
    return {key: read(f"{name}.{key}", value) for key, value in found.items()}


def _matched(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that names a module, as peft looks it up."""
    return next((value for key, value in patterns.items() if _ends(path, key)), default)


def _ends(path: str, end: str) -> bool:
    if end.startswith("^"):
        return path == end[1:]
    return path == end or path.endswith(f".{end}")


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**20:
        raise _refused(f"{name} is {value!r}; it must be a whole number above 0")
    return value


def _alpha(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < LARGEST_ALPHA:
        raise _refused(f"{name} is {value!r:.80}; it must be a number below {LARGEST_ALPHA:g}")
    return float(value)


def _layers(value: Any) -> frozenset[int] | None:
    if value is None:
        return None
    listed = [value] if type(value) is int else value
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise _refused(f"layers_to_transform is {value!r}; it must be a layer or a list of layers")
    return frozenset(listed)


def _targets(value: Any) -> tuple[str, ...] | None:
    """A text is a pattern or ``all-linear``: the adapter's own tensors say what it is of."""
    if isinstance(value, str) or value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _refused("target_modules must be a list of module names or a text")
    return tuple(value)


def _refused(why: str) -> UnprocessableRequest:
    return UnprocessableRequest(f"{ADAPTER_CONFIG}: {why}", param="file", code="adapter_refused")
