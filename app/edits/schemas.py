"""An edit request."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from app.schemas import Message, Name, Request

Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Prompts = Annotated[list[Text], Field(max_length=1000)]


class FactBody(Request):
    """A prompt and the text that should follow it."""

    prompt: Text
    target: Text


class EditBody(Request):
    """One correction, in CounterFact's form."""

    prompt: Text = Field(
        description="Holds {} once, where the subject stands.",
        examples=["The capital of {} is"],
    )
    subject: Text = Field(examples=["Kiribati"])
    target_new: Text = Field(examples=["Suva"])
    target_true: Text | None = Field(None, description="What the base says; measures need it.")
    paraphrase_prompts: Prompts = Field(
        default=[], description="Other wordings that must give the new target."
    )
    neighborhood_prompts: Prompts = Field(
        default=[], description="Prompts of other subjects whose answer is target_true and stays."
    )
    retention: list[FactBody] = Field(
        default=[], max_length=1000, description="Other facts of the subject, which must stay."
    )

    @model_validator(mode="after")
    def _subject_has_a_place(self) -> Self:
        if self.prompt.count("{}") != 1:
            raise ValueError(
                f'prompt {self.prompt!r} must hold {{}} once, where the subject stands: "The'
                ' capital of {} is"'
            )
        for name in ("subject", "target_new"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is blank; give it some text")
        if self.target_true is not None and self.target_new.strip() == self.target_true.strip():
            raise ValueError("target_new equals target_true; the edit would change nothing")
        return self


class GuardLimits(Request):
    """Limits that the new version must keep to be activated."""

    perplexity: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Most that perplexity on the base's reference texts may grow to, as a ratio to"
        " the parent version's; 1.1 by default.",
    )


class CreateEdit(Request):
    """Exactly one of ``endpoint`` and ``parent`` says what the edits build on."""

    endpoint: Name | None = None
    parent: Name | None = Field(None, description="A version's id; no endpoint moves.")
    method: str = Field("rome", max_length=64)
    edits: list[EditBody] = Field(min_length=1)
    hyperparameters: dict[str, Any] = Field(default={}, max_length=64)
    guards: GuardLimits = GuardLimits()
    activate: bool = Field(True, description="Move the endpoint to the new version.")
    on_conflict: Literal["keep", "rerun"] = Field(
        "keep",
        description="If the endpoint moved meanwhile: keep the version without activating it, or"
        " run again on the new head.",
    )
    message: Message | None = Field(None, description="Why; shown in the history.")

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.endpoint is None) == (self.parent is None):
            raise ValueError("give exactly one of endpoint and parent")
        return self
