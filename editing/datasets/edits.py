"""Edits from rows of JSON: this service's own form and those in which others publish them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from editing.datasets.rows import Row
from registry.manifests import EditRequest, Fact

FIELDS = tuple(field.name for field in fields(EditRequest))
_FLAT = ("ground_truth", "rephrase_prompt", "locality_prompt")


def read_edits(rows: Iterable[Mapping[str, Any]]) -> list[EditRequest]:
    """Read the ``edits`` of a request, each row by the form it has (see ``read_edit``)."""
    return [read_edit(Row(value, f"edits.{i}")) for i, value in enumerate(rows)]


def read_edit(row: Row) -> EditRequest:
    """Read a row by the form it has.

    - own: ``{"prompt": "… {} …", "subject", "target_new", …}``, the fields of ``EditRequest``. The
      subject may also stand in the prompt itself, or be left out together with its {};
    - CounterFact: ``{"requested_rewrite": {"prompt", "subject", "target_new": {"str"}, …}, …}``;
    - CounterFact made flat: ``{"prompt": "… France …", "subject": "France", "target_new",
      "ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth"}``. A locality
      prompt whose answer is the true target is a neighborhood prompt; another is locality;
    - zsRE as EasyEdit has it: ``{"src", "subject", "alt", "answers", "rephrase", "loc",
      "loc_ans"}``. The true target is the first answer that is not ``alt``, if there is one.

    Raises:
        UnprocessableRequest: a field is missing, of another type, or unknown in the own form; the
            subject is not in the prompt; nothing would change.
    """
    if row.has("requested_rewrite"):
        return _read_counterfact(row)
    if row.has("src"):
        return _read_zsre(row)
    if row.has(*_FLAT):
        return _read_flat(row)
    row.refuse_others(FIELDS)
    prompt, subject = row.text("prompt"), row.optional("subject")
    redirect_to = row.optional("redirect_to")
    target_true = row.optional("target_true")
    has_target = redirect_to is None or row.has("target_new")
    target_new = row.text("target_new") if has_target else ""
    if target_true is not None and target_new.strip() == target_true.strip():
        row.refuse("equals target_true; the edit would change nothing", "target_new")
    return EditRequest(
        prompt=_with_place(row, "prompt", prompt, subject),
        subject=subject or "",
        target_new=target_new,
        target_true=target_true,
        paraphrase_prompts=row.texts("paraphrase_prompts"),
        neighborhood_prompts=row.texts("neighborhood_prompts"),
        locality=row.facts("locality"),
        retention=row.facts("retention"),
        guide_prompt=row.optional("guide_prompt"),
        redirect_to=redirect_to,
    )


def _read_counterfact(row: Row) -> EditRequest:
    rewrite = row.inner("requested_rewrite")
    prompt, subject = rewrite.text("prompt"), rewrite.text("subject")
    return EditRequest(
        prompt=_with_place(rewrite, "prompt", prompt, subject),
        subject=subject,
        target_new=rewrite.inner("target_new").text("str"),
        target_true=rewrite.inner("target_true").text("str"),
        paraphrase_prompts=row.texts("paraphrase_prompts"),
        neighborhood_prompts=row.texts("neighborhood_prompts"),
    )


def _read_flat(row: Row) -> EditRequest:
    subject, true = row.text("subject"), row.optional("ground_truth")
    rephrased, local = row.optional("rephrase_prompt"), row.optional("locality_prompt")
    answer = row.optional("locality_ground_truth")
    is_neighbor = local is not None and true is not None and answer == true
    return EditRequest(
        prompt=_with_place(row, "prompt", row.text("prompt"), subject),
        subject=subject,
        target_new=row.text("target_new"),
        target_true=true,
        paraphrase_prompts=(rephrased,) if rephrased else (),
        neighborhood_prompts=(local,) if local and is_neighbor else (),
        locality=(Fact(local, answer),) if local and answer and not is_neighbor else (),
    )


def _read_zsre(row: Row) -> EditRequest:
    subject, target = row.text("subject"), row.text("alt")
    rephrased, local, answer = (row.optional(name) for name in ("rephrase", "loc", "loc_ans"))
    true = [text for text in row.texts("answers") if text.strip() != target.strip()]
    return EditRequest(
        prompt=_with_place(row, "src", row.text("src"), subject),
        subject=subject,
        target_new=target,
        target_true=true[0] if true else None,
        paraphrase_prompts=(rephrased,) if rephrased else (),
        locality=(Fact(local, answer),) if local and answer else (),
    )


def _with_place(row: Row, name: str, prompt: str, subject: str | None) -> str:
    """The prompt with {} where the subject stands; as it is where there is no subject."""
    if subject is None:
        if "{}" in prompt:
            row.refuse(f"{prompt!r} holds {{}}, but no subject is given to stand there", name)
        return prompt
    if "{}" not in prompt:
        if subject not in prompt:
            row.refuse(
                f"{prompt!r} holds neither {{}} nor the subject {subject!r}; write {{}} where the"
                ' subject stands: "The capital of {} is"',
                name,
            )
        return prompt.replace(subject, "{}", 1)
    if prompt.count("{}") != 1:
        row.refuse(f"{prompt!r} must hold {{}} once, where the subject stands", name)
    return prompt
