"""Requests to recipes: what can be checked before a job is taken, without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from editing.datasets.rewards import read_reward
from editing.datasets.rows import Row
from editing.datasets.training import EXAMPLES, ONE, PREFERENCES, PROMPTS, serves, told
from editing.finetune.catalogue import OWN_PLACES, REFUSED, TUNINGS, TuningEntry
from editing.finetune.hyperparameters import MOST_RATE, TuningHyperparameters
from editing.finetune.objectives.hyperparameters import BoosterOptions
from editing.merging import MERGES, MergeEntry
from editing.merging.hyperparameters import MergeHyperparameters
from editing.methods import METHODS, MethodEntry
from editing.methods.hyperparameters import Hyperparameters
from registry.bases import Base
from registry.errors import UnprocessableRequest
from registry.settings import Settings

TEXTS = "texts"
M = TypeVar("M", bound=BaseModel)

#: What may stand beside a method's hyperparameters, by the kind of rows that it learns from.
OPTIONS = {EXAMPLES: ("booster",), PROMPTS: ("reward",)}
#: What rows of each kind look like.
FORMS = {
    EXAMPLES: "messages with a turn of the assistant, or prompt and completion",
    PREFERENCES: "input, preferred_output and non_preferred_output, or prompt, chosen and rejected",
    PROMPTS: "a prompt alone, or messages that end with the user's turn",
}


@dataclass(frozen=True)
class EditRecipe:
    """A checked method with its hyperparameters, and the resources of the base that it needs."""

    method: str
    hyperparameters: Hyperparameters
    resources: frozenset[str]


def check_edit(base: Base, method: str, hyperparameters: Mapping[str, Any]) -> EditRecipe:
    """The recipe of an edit.

    Raises:
        UnprocessableRequest: an unknown method, one that cannot edit bases of the family, a
            hyperparameter out of bounds, a layer that the base does not have.
    """
    entry = find_method(method)
    if base.family in entry.unfit:
        raise UnprocessableRequest(
            f"method {method!r} cannot edit a base of the family {base.family!r}, as {base.name!r}"
            " is; take another method",
            param="method",
        )
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
    entry: TuningEntry, hyperparameters: Mapping[str, Any], rows: int
) -> TuningHyperparameters:
    """The hyperparameters of a fine-tuning of so many rows, with a number for every "auto".

    Raises:
        UnprocessableRequest: a hyperparameter out of bounds, also the rate that a multiplier makes;
            targets for a method that tunes no linears.
    """
    checked: TuningHyperparameters = _checked(entry, hyperparameters)
    if checked.target_modules is not None and entry.name in OWN_PLACES:
        param = "hyperparameters.target_modules"
        raise UnprocessableRequest(
            f"{param}: {entry.name} tunes {OWN_PLACES[entry.name]}, not linears by name; leave"
            " it out",
            param=param,
        )
    settled = checked.settled(rows)
    if not 0 < (settled.learning_rate or 0) <= MOST_RATE:
        param = "hyperparameters.learning_rate_multiplier"
        raise UnprocessableRequest(
            f"{param}: times {checked.RATE:g}, the rate of {entry.name}, it is"
            f" {settled.learning_rate:g}; a rate is above 0 and at most {MOST_RATE}",
            param=param,
        )
    return settled


def check_merge(
    entry: MergeEntry,
    hyperparameters: Mapping[str, Any],
    weights: Sequence[Mapping[int | None, float]],
) -> MergeHyperparameters:
    """The hyperparameters of a merge of so many versions.

    Args:
        weights: of each version by layer; None is for all other ones.

    Raises:
        UnprocessableRequest: too few or too many versions, weights that the method does not take,
            a hyperparameter out of bounds.
    """
    if not entry.least <= len(weights) <= entry.most:
        number = f"{entry.least} to {entry.most}" if entry.least < entry.most else str(entry.least)
        raise UnprocessableRequest(
            f"versions: method {entry.name!r} merges {number} versions; there are {len(weights)}",
            param="versions",
        )
    for place, own in enumerate(weights):
        for layer, weight in own.items():
            name = "weight" if layer is None else f"layer_weights.{layer}"
            problem = None
            if not entry.weighted and (layer is not None or weight != 1):
                problem = "finds the weights itself; leave them out"
            elif not entry.negative and weight < 0:
                problem = f"takes no weight below 0; it is {weight:g}"
            if problem is not None:
                field = f"versions.{place}.{name}"
                raise UnprocessableRequest(f"{field}: method {entry.name!r} {problem}", param=field)
    checked: MergeHyperparameters = _checked(entry, hyperparameters)
    return checked


def check_options(entry: TuningEntry, options: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in a method's object beside its hyperparameters: ``booster``, or ``reward``.

    Raises:
        UnprocessableRequest: an option that the method does not take, or that is wrong.
    """
    place = f"method.{entry.name}"
    taken = OPTIONS.get(entry.rows, ())
    for name in options:
        if name not in taken:
            raise UnprocessableRequest(
                f"{place}.{name} does not exist; {entry.name} takes"
                f" {', '.join(('hyperparameters', *taken))}",
                param=f"{place}.{name}",
            )
    found = {name: value for name, value in options.items() if value is not None}
    if "reward" in found:
        found["reward"] = read_reward(Row(found["reward"], f"{place}.reward"))
    if "booster" in found:
        values = Row(found["booster"], f"{place}.booster").fields()
        booster = _validated(BoosterOptions, values, f"{place}.booster", "booster")
        found["booster"] = booster.model_dump(by_alias=True)
    return found


def check_rows(
    field: str,
    rows: Sequence[dict[str, Any]],
    kind: str,
    base: Base,
    reward: Mapping[str, str] | None = None,
) -> None:
    """Refuse rows of another kind than is learnt from, and what the base cannot take.

    Args:
        field: of the request, which names their file.
        reward: the rule for prompts without one of their own.

    Raises:
        UnprocessableRequest: names the row.
    """
    for place, row in enumerate(rows, start=1):
        problem = None
        if not serves(row, kind):
            problem = f"is {told(row)} where {kind} are needed; {ONE[kind]} is {FORMS[kind]}"
        elif "messages" in row and not base.has_chat_template:
            problem = "is a conversation, and the base has no chat template; give a prompt as text"
        elif kind == PROMPTS and "reward" not in row and not reward:
            problem = "has no reward; give one in the row, or one for all in the method's object"
        if problem is not None:
            raise UnprocessableRequest(f"{field}: row {place} {problem}", param=field)


def find_tuning(name: str) -> TuningEntry:
    """The way to fine-tune of that name. Raises UnprocessableRequest, with the reason."""
    entry = TUNINGS.get(name)
    if entry is None:
        reason = REFUSED.get(name, "does not exist")
        raise UnprocessableRequest(
            f"method.type {name!r} {reason}; there is {', '.join(TUNINGS)}",
            param="method.type",
        )
    return entry


def find_merge(name: str) -> MergeEntry:
    """The way to merge of that name. Raises UnprocessableRequest where there is none."""
    entry = MERGES.get(name)
    if entry is None:
        raise UnprocessableRequest(
            f"method {name!r} does not exist; there is {', '.join(MERGES)}", param="method"
        )
    return entry


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


def _checked(entry: MethodEntry | TuningEntry | MergeEntry, values: Mapping[str, Any]) -> Any:
    """The entry's hyperparameters. Raises UnprocessableRequest, which names the one."""
    return _validated(entry.hyperparameters, values, "hyperparameters", entry.name)


def _validated(model: type[M], values: Mapping[str, Any], place: str, owner: str) -> M:
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        # after the name only places in lists: of a union pydantic names the member as well
        path = [str(p) for i, p in enumerate(first["loc"]) if i == 0 or isinstance(p, int)]
        name = ".".join([place, *path])
        known = [field.alias or name for name, field in model.model_fields.items()]
        raise UnprocessableRequest(
            f"{name}: {first['msg']}; {owner} takes {', '.join(known)}", param=name
        ) from error
