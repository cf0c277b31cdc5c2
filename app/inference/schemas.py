"""OpenAI's requests, as far as this engine answers them; the rest is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.schemas import BEYOND, unsupported
from registry.errors import UnprocessableRequest
from serving.protocol import (
    MAX_BIAS,
    MAX_BIASES,
    MAX_CHOICES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    Grammar,
    SamplingParams,
)

Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=1_000_000)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
#: What pydantic leaves out of the schema of such keys: that there are no others.
NAMED: dict[str, Any] = {"propertyNames": {"pattern": "^[0-9]{1,9}$"}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    include_usage: bool = False


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    name: Annotated[str, Field(max_length=64)] = "schema"
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class PlainFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "json_object"]

    def grammar(self) -> Grammar | None:
        return None if self.type == "text" else Grammar("json_schema", '{"type": "object"}')


class SchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def grammar(self) -> Grammar:
        text = json.dumps(self.json_schema.json_schema, ensure_ascii=False)
        return Grammar("json_schema", text)


class RegexFormat(BaseModel):
    """This service's own: the whole text matches the regular expression."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1)]

    def grammar(self) -> Grammar:
        return Grammar("regex", self.regex)


ResponseFormat = Annotated[PlainFormat | SchemaFormat | RegexFormat, Field(discriminator="type")]


class ProxyBody(BaseModel):
    """Proxy decoding: logits + alpha (expert - anti-expert), all three on one base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: Annotated[str, Field(min_length=1, max_length=256)]
    anti_expert: Annotated[str, Field(min_length=1, max_length=256)]
    alpha: Annotated[float, Field(ge=-100, le=100)] = 1.0


def _described(schema: dict[str, Any], model: type[InferenceRequest]) -> None:
    """Say in the document which values the neutral parameters may have, and that no others are."""
    neutral = {name: {"enum": list(values)} for name, values in model.neutral.items()}
    schema["properties"] |= neutral
    schema["additionalProperties"] = False


class InferenceRequest(BaseModel):
    """What both kinds of completion take. Other parameters may be sent at their defaults only."""

    model_config = ConfigDict(extra="allow", frozen=True, json_schema_extra=_described)

    #: Parameters of OpenAI's that change nothing here when they have one of these values.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "metadata": (None, {}),
        "prompt_cache_key": (None, ""),
    }

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: (
        Annotated[dict[TokenName, Bias], Field(max_length=MAX_BIASES, json_schema_extra=NAMED)]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-BEYOND, lt=BEYOND)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    response_format: ResponseFormat | None = None
    proxy: ProxyBody | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = None

    def check_unsupported(self) -> None:
        """Raises UnsupportedParameter for what this engine would have to ignore."""
        for name, value in (self.model_extra or {}).items():
            if value not in self.neutral.get(name, ()):
                raise unsupported(name, neutral=name in self.neutral)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def samples(self) -> int:
        """How many completions of a prompt are computed, of which ``choices`` are answered."""
        return self.best_of or self.choices

    def seconds(self, most: float) -> float:
        """The time the answer may take. Raises UnprocessableRequest for more than ``most``."""
        if self.timeout is None:
            return most
        if self.timeout > most:
            raise UnprocessableRequest(
                f"timeout is {self.timeout:g} s; the most is {most:g} (ERRATA_REQUEST_SECONDS)",
                param="timeout",
            )
        return self.timeout

    def check_samples(self, prompts: int) -> None:
        """Raises UnprocessableRequest for too many completions, or too few to choose from."""
        if self.samples < self.choices:
            raise UnprocessableRequest(
                f"best_of is {self.best_of}; it must be at least n, {self.choices}", param="best_of"
            )
        if self.samples > self.choices and self.stream:
            raise UnprocessableRequest(
                "best_of chooses among whole completions: leave out stream or best_of",
                param="best_of",
            )
        if prompts * self.samples > MAX_CHOICES:
            param = "n" if self.best_of is None else "best_of"
            raise UnprocessableRequest(
                f"{prompts} prompts with {param}={self.samples} make more than {MAX_CHOICES}"
                " completions; send fewer in one request",
                param=param,
            )

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """How the completions are sampled."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if logprobs is None and self.samples > self.choices:
            logprobs = 0  # the samples are ranked by them
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            stop=tuple(stops),
            seed=self.seed,
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(t), bias) for t, bias in (self.logit_bias or {}).items()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            min_tokens=self.min_tokens,
            grammar=None if self.response_format is None else self.response_format.grammar(),
        )


class CompletionRequest(InferenceRequest):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **InferenceRequest.neutral,
        "suffix": (None, ""),
    }

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128, fail_fast=True)]
        | Annotated[list[Token], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=128, fail_fast=True),
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = False

    def prompts(self) -> list[dict[str, Any]]:
        """Each prompt as GenerateRequest's ``prompt`` or ``prompt_tokens``."""
        if isinstance(self.prompt, str):
            prompts: list[dict[str, Any]] = [{"prompt": self.prompt}]
        elif isinstance(self.prompt[0], int):
            prompts = [{"prompt_tokens": tuple(self.prompt)}]
        else:
            prompts = [
                {"prompt": p} if isinstance(p, str) else {"prompt_tokens": tuple(p)}
                for p in self.prompt
            ]
        self.check_samples(len(prompts))
        return prompts


#: What a message's further fields, such as ``tool_calls``, may hold.
NOTHING: tuple[Any, ...] = (None, "", [], {})


class ChatMessage(BaseModel):
    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        json_schema_extra={"additionalProperties": {"enum": list(NOTHING)}},
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[dict[str, Any]], Field(max_length=1000)]
    name: str | None = None
    refusal: Any = None
    annotations: Any = None

    def as_text(self, index: int) -> dict[str, str]:
        """The message as chat templates take it; content parts must be text.

        Raises:
            UnprocessableRequest: they are not.
            UnsupportedParameter: the message has more than text, such as calls of tools.
        """
        for name, value in (self.model_extra or {}).items():
            if value not in NOTHING:
                raise unsupported(f"messages.{index}.{name}")
        if isinstance(self.content, str):
            text = self.content
        else:
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise UnprocessableRequest(
                        f"messages.{index}.content: only parts of type text are supported",
                        param=f"messages.{index}.content",
                    )
            text = "".join(part["text"] for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text}


class ChatRequest(InferenceRequest):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **InferenceRequest.neutral,
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise UnprocessableRequest(
                    "top_logprobs needs logprobs: true", param="top_logprobs"
                )
            return None
        return self.top_logprobs or 0
