"""An edit request."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from app.schemas import Message, Name, Request

_TEXT = {"type": "string", "minLength": 1, "maxLength": 10_000}
_TEXTS = {"type": "array", "items": _TEXT, "maxItems": 1000}
_FACT = {
    "type": "object",
    "properties": {"prompt": _TEXT, "target": _TEXT},
    "required": ["prompt", "target"],
}
_FACTS = {"type": "array", "items": _FACT, "maxItems": 1000}


def _told(schema: dict[str, Any], description: str, *examples: str) -> dict[str, Any]:
    return {**schema, "description": description, **({"examples": examples} if examples else {})}


#: One correction in this service's own form. Rows are read by ``editing.datasets``, which knows
#: the published forms too; this describes them in the OpenAPI document.
EDIT = {
    "type": "object",
    "properties": {
        "prompt": _told(_TEXT, "Holds {} once, where the subject stands.", "The capital of {} is"),
        "subject": _told(
            _TEXT, "May be left out, with its {}, where the method needs none.", "Kiribati"
        ),
        "target_new": _told(_TEXT, "What should follow the prompt.", "Suva"),
        "target_true": _told(_TEXT, "What the base says; measures need it."),
        "paraphrase_prompts": _told(_TEXTS, "Other wordings that must give the new target."),
        "neighborhood_prompts": _told(
            _TEXTS, "Prompts of other subjects whose answer is target_true and stays."
        ),
        "locality": _told(_FACTS, "Prompts and what should follow them, whatever is edited."),
        "retention": _told(_FACTS, "Other facts of the subject, which must stay."),
        "guide_prompt": _told(
            _TEXT, "A prompt that the model answers as this one should be (creme)."
        ),
        "redirect_to": _told(_TEXT, "What is to stand in the subject's place (rocr)."),
    },
    "required": ["prompt"],
}
EXAMPLE = {
    "type": "object",
    "properties": {
        "text": _TEXT,
        "label": {"type": "boolean", "description": "Whether it shows the behaviour that goes."},
        "setting": _told(_TEXT, "Examples of one setting are compared with each other alone."),
    },
    "required": ["text", "label"],
}

Edits = Annotated[
    list[dict[str, Any]],
    Field(
        fail_fast=True,
        description="Corrections, in the form shown, or as CounterFact or EasyEdit's zsRE and"
        " CounterFact have them.",
        json_schema_extra={"items": EDIT},
    ),
]
Examples = Annotated[
    list[dict[str, Any]],
    Field(
        fail_fast=True,
        description="Labelled texts, for methods that learn a behaviour from them.",
        json_schema_extra={"items": EXAMPLE},
    ),
]
#: Not blank. Dialects disagree whether NEL and the byte order mark are space: here they are.
Phrase = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"[^\s\x85\ufeff]")]
Share = Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)]
Ratio = Annotated[float | None, Field(gt=0, le=1e6, allow_inf_nan=False)]


class Guards(Request):
    """Limits that the new version must keep to be activated, and what they are measured on.

    The service's settings hold for what is left out.
    """

    perplexity: Ratio = Field(
        None,
        description="Most that perplexity on the reference texts may grow to, as a ratio to the"
        " parent version's.",
    )
    retention: Share = Field(
        None, description="Least share of unrelated facts that the parent knew and it knows still."
    )
    locality: Share = Field(
        None, description="Least share of the edits' neighborhood and locality prompts kept."
    )
    norm: Ratio = Field(
        None, description="Most that a weight's change may be, as a share of the weight's norm."
    )
    ability: Share = Field(
        None, description="Most that accuracy on the suite may fall by, from 0 to 1."
    )
    efficacy: Share = Field(
        None, description="Least share of the edits whose target is what the version answers."
    )
    refusal_loss: Share = Field(
        None, description="Most of the parent's refusals of the harm prompts that it may lose."
    )
    harm_rise: Share = Field(
        None, description="Most that the probability of the harm prompts' targets may rise by."
    )
    texts: Name | None = Field(None, description="A file of reference texts.")
    facts: Name | None = Field(None, description="A file of facts that must stay.")
    suite: Name | None = Field(None, description="A file of multiple-choice questions.")
    harm: Name | None = Field(None, description="A file of requests that must be refused.")
    refusals: list[Phrase] | None = Field(
        None, min_length=1, max_length=1000, description="Phrases by which a refusal is known."
    )


class CreateEdit(Request):
    """Exactly one of ``endpoint`` and ``parent`` says what the edits build on."""

    endpoint: Name | None = None
    parent: Name | None = Field(None, description="A version's id; no endpoint moves.")
    method: str = Field("rome", max_length=64)
    edits: Edits | None = None
    file: Name | None = Field(None, description="A file of edits, in their place.")
    examples: Examples | None = None
    examples_file: Name | None = Field(None, description="A file of examples, in their place.")
    texts: Name | None = Field(
        None,
        description="A file of texts, for methods that look at some (wanda); by default the"
        " base's own.",
    )
    hyperparameters: dict[str, Any] = Field(default={}, max_length=64)
    guards: Guards = Guards()
    batch_size: int | None = Field(
        None, ge=1, le=10_000, description="Edits made at once; all of them by default."
    )
    check_every: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Check the guards whenever this many edits more are made, at the end of a batch"
        " (none is larger), and stop at the last good point; at the end alone by default.",
    )
    activate: bool = Field(True, description="Move the endpoint to the new version.")
    on_conflict: Literal["keep", "rerun"] = Field(
        "keep",
        description="If the endpoint moved meanwhile: keep the version without activating it, or"
        " run again on the new head.",
    )
    message: Message | None = Field(None, description="Why; shown in the history.")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.endpoint is None) == (self.parent is None):
            raise ValueError("give exactly one of endpoint and parent")
        for inline, file in (("edits", "file"), ("examples", "examples_file")):
            if getattr(self, inline) is not None and getattr(self, file) is not None:
                raise ValueError(f"give {inline} or {file}, not both")
        return self
