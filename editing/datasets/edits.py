"""Edits from rows of JSON: this service's own form, CounterFact's, and the flat one of EasyEdit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from registry.errors import InvalidRequest
from registry.manifests import EditRequest, Fact


def read_edits(rows: Iterable[Mapping[str, Any]]) -> list[EditRequest]:
    """Read each row by the form it has.

    - ``{"prompt": "… {} …", "subject", "target_new", …}``: fields of ``EditRequest``;
    - CounterFact: ``{"requested_rewrite": {"prompt", "subject", "target_new": {"str"}, …}, …}``;
    - EasyEdit: ``{"prompt": "… France …", "subject": "France", "target_new", "ground_truth",
      "rephrase_prompt", "locality_prompt"}``; a locality prompt becomes a neighbor only where its
      answer is the true target, as neighbors' are.

    Raises:
        InvalidRequest: a row lacks a field or holds one of another type; names it.
    """
    return [_read(row, f"edits.{i}") for i, row in enumerate(rows)]


def _read(row: Mapping[str, Any], where: str) -> EditRequest:
    if not isinstance(row, Mapping):
        raise InvalidRequest(f"{where} is no object", param=where)
    if "requested_rewrite" in row:
        return _read_counterfact(row, where)
    prompt, subject = _text(row, "prompt", where), _text(row, "subject", where)
    if "{}" in prompt:
        return EditRequest(
            prompt=prompt,
            subject=subject,
            target_new=_text(row, "target_new", where),
            target_true=_optional(row, "target_true", where),
            paraphrase_prompts=_texts(row, "paraphrase_prompts", where),
            neighborhood_prompts=_texts(row, "neighborhood_prompts", where),
            retention=tuple(
                Fact(_text(fact, "prompt", where), _text(fact, "target", where))
                for fact in row.get("retention") or ()
            ),
        )
    if subject not in prompt:
        raise InvalidRequest(
            f"{where}.prompt: {prompt!r} holds neither {{}} nor the subject {subject!r}",
            param=f"{where}.prompt",
        )
    true = _optional(row, "ground_truth", where)
    rephrased = _optional(row, "rephrase_prompt", where)
    local = _optional(row, "locality_prompt", where)
    is_neighbor = true is not None and row.get("locality_ground_truth") == true
    return EditRequest(
        prompt=prompt.replace(subject, "{}", 1),
        subject=subject,
        target_new=_text(row, "target_new", where),
        target_true=true,
        paraphrase_prompts=(rephrased,) if rephrased else (),
        neighborhood_prompts=(local,) if local and is_neighbor else (),
    )


def _read_counterfact(row: Mapping[str, Any], where: str) -> EditRequest:
    rewrite = row["requested_rewrite"]
    inner = f"{where}.requested_rewrite"
    if not isinstance(rewrite, Mapping):
        raise InvalidRequest(f"{inner} is no object", param=inner)
    targets = {}
    for name in ("target_new", "target_true"):
        target = rewrite.get(name)
        if not isinstance(target, Mapping):
            raise InvalidRequest(f"{inner}.{name} is no object", param=f"{inner}.{name}")
        targets[name] = _text(target, "str", f"{inner}.{name}")
    return EditRequest(
        prompt=_text(rewrite, "prompt", inner),
        subject=_text(rewrite, "subject", inner),
        target_new=targets["target_new"],
        target_true=targets["target_true"],
        paraphrase_prompts=_texts(row, "paraphrase_prompts", where),
        neighborhood_prompts=_texts(row, "neighborhood_prompts", where),
    )


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(f"{where}.{name} must be a text", param=f"{where}.{name}")
    return value


def _optional(row: Mapping[str, Any], name: str, where: str) -> str | None:
    return None if row.get(name) is None else _text(row, name, where)


def _texts(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    values = row.get(name) or ()
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
        raise InvalidRequest(f"{where}.{name} must be a list of texts", param=f"{where}.{name}")
    return tuple(values)
