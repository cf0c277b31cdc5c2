"""OpenAI's requests, as far as this engine answers them; the rest is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.errors import UnprocessableRequest, UnsupportedParameter
from serving.protocol import SamplingParams

MAX_CHOICES = 128

Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=1_000_000)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    include_usage: bool = False


class InferenceRequest(BaseModel):
    """What both kinds of completion take. Other parameters may be sent at their defaults only."""

    model_config = ConfigDict(extra="allow", frozen=True)

    #: Parameters of OpenAI's that change nothing here when they have one of these values.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0, None),
        "presence_penalty": (0, None),
        "logit_bias": (None, {}),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "metadata": (None, {}),
        "prompt_cache_key": (None, ""),
    }

    model: Annotated[str, Field(min_length=1, max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1000)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)
        ]
        | None
    ) = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = None

    def check_unsupported(self) -> None:
        """Raises UnsupportedParameter for what this engine would have to ignore."""
        for name, value in (self.model_extra or {}).items():
            if value not in self.neutral.get(name, ()):
                raise UnsupportedParameter(
                    f"{name} is not supported here"
                    + (" at other values than its default" if name in self.neutral else "")
                    + "; leave it out",
                    param=name,
                )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def choices(self) -> int:
        return self.n or 1

    def sampling(self, index: int, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The parameters of choice ``index``; choices of one seeded request differ."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            stop=tuple(stops),
            seed=seed,
            logprobs=logprobs,
        )


class CompletionRequest(InferenceRequest):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **InferenceRequest.neutral,
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
    }

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[Token], Field(min_length=1, max_length=1_000_000)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=128)
        ]
    )
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

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
        if len(prompts) * self.choices > MAX_CHOICES:
            raise UnprocessableRequest(
                f"{len(prompts)} prompts with n={self.choices} make more than {MAX_CHOICES}"
                " completions; send fewer in one request",
                param="n",
            )
        return prompts


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[dict[str, Any]]
    name: str | None = None

    def as_text(self, index: int) -> dict[str, str]:
        """The message as chat templates take it; content parts must be text."""
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
        "response_format": (None, {"type": "text"}),
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
