"""Requests to recipes: what can be checked before a job is taken, without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from editing.finetune.catalogue import TUNINGS, TuningEntry
from editing.finetune.hyperparameters import TuningHyperparameters
from editing.methods import METHODS, MethodEntry
from editing.methods.hyperparameters import Hyperparameters
from registry.bases import Base
from registry.errors import UnprocessableRequest
from registry.settings import Settings

TEXTS = "texts"


@dataclass(frozen=True)
class EditRecipe:
    """A checked method with its hyperparameters, and the resources of the base that it needs."""

    method: str
    hyperparameters: Hyperparameters
    resources: frozenset[str]


def check_edit(base: Base, method: str, hyperparameters: Mapping[str, Any]) -> EditRecipe:
    """The recipe of an edit.

    Raises:
        UnprocessableRequest: an unknown method, a hyperparameter out of bounds, a layer that the
            base does not have.
    """
    entry = find_method(method)
    checked: Hyperparameters = _checked(entry, hyperparameters)
    layers = checked.edited_layers(base.depth)
    for layer in layers:
        if layer >= base.depth:
            name = "layers" if "layers" in entry.hyperparameters.model_fields else "layer"
            raise UnprocessableRequest(
                f"hyperparameters.{name}: {layer} is out of range; base {base.name!r} has layers 0"
                f" to {base.depth - 1}",
                param=f"hyperparameters.{name}",
            )
    needed = {covariance_of(layer) for layer in layers} if entry.needs_covariance else {TEXTS}
    return EditRecipe(method, checked, frozenset(needed))


def check_tuning(
    base: Base, method: str, hyperparameters: Mapping[str, Any], rows: int
) -> TuningHyperparameters:
    """The hyperparameters of a fine-tuning of so many rows, with a number for every "auto".

    Raises:
        UnprocessableRequest: an unknown method, a hyperparameter out of bounds.
    """
    entry = TUNINGS.get(method)
    if entry is None:
        raise UnprocessableRequest(
            f"method.type {method!r} does not exist; there is {', '.join(TUNINGS)}",
            param="method.type",
        )
    checked: TuningHyperparameters = _checked(entry, hyperparameters)
    return checked.settled(rows)


def find_method(name: str) -> MethodEntry:
    """The method of that name. Raises UnprocessableRequest where there is none."""
    entry = METHODS.get(name)
    if entry is None:
        raise UnprocessableRequest(
            f"method {name!r} does not exist; there is {', '.join(METHODS)}", param="method"
        )
    return entry


def covariance_of(layer: int) -> str:
    """The name of the resource that holds the base's texts and C of a layer's down-projection."""
    return f"covariance/{layer}"


def layer_of(resource: str) -> int | None:
    """The layer whose C a resource holds; None where it holds texts alone."""
    return None if resource == TEXTS else int(resource.removeprefix("covariance/"))


def text_source(settings: Settings, base: Base) -> tuple[str, Path | None]:
    """Where a base's texts come from: a name that changes with them, and the file if there is one.

    Raises:
        UnprocessableRequest: ERRATA_TEXTS names a file that does not exist.
    """
    file = file_for(settings.texts, base.name)
    if file is None:
        return f"sampled/{settings.covariance_tokens}", None
    if not file.is_file():
        raise UnprocessableRequest(f"ERRATA_TEXTS: {file} is not a file")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return f"file/{digest}", file


def file_for(setting: str, base: str) -> Path | None:
    """A base's file by a setting that is one file for every base, or ``base=/file`` by commas."""
    if not setting:
        return None
    if "=" not in setting:
        return Path(setting)
    files = dict(entry.strip().split("=", 1) for entry in setting.split(",") if "=" in entry)
    return Path(files[base]) if base in files else None


def _checked(entry: MethodEntry | TuningEntry, values: Mapping[str, Any]) -> Any:
    """The entry's hyperparameters. Raises UnprocessableRequest, which names the one."""
    model = entry.hyperparameters
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # after the name only places in lists: of a union pydantic names the member as well
        path = [str(p) for i, p in enumerate(first["loc"]) if i == 0 or isinstance(p, int)]
        name = ".".join(["hyperparameters", *path])
        raise UnprocessableRequest(
            f"{name}: {first['msg']}; {entry.name} takes {', '.join(model.model_fields)}",
            param=name,
        ) from error
