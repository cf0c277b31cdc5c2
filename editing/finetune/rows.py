"""Training examples as token ids, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editing.models.view import ModelView
from registry.errors import InvalidRequest


@dataclass(frozen=True)
class TrainingRow:
    """Attributes:
    ids: its tokens.
    learnt: places of tokens that are to be predicted; none is the first.
    """

    ids: Sequence[int]
    learnt: Sequence[int]


def training_row(view: ModelView, example: Mapping[str, Any]) -> TrainingRow:
    """An example in one of the forms of ``editing.datasets.training``, but for preferences.

    A text of more tokens than the base's context loses its end.

    Raises:
        InvalidRequest: a conversation for a base without a chat template; nothing that fits is
            left to learn.
    """
    if "messages" in example:
        row = _conversation(view, example["messages"])
    else:
        row = _completion(view, example["prompt"], example["completion"])
    longest = view.base.context_length
    cut = TrainingRow(row.ids[:longest], [place for place in row.learnt if place < longest])
    if not cut.learnt:
        raise InvalidRequest(
            f"an example has {len(row.ids)} tokens, and none of what is to be learnt stands among"
            f" the first {longest}, the context of base {view.base.name!r}; shorten it"
        )
    return cut


def _completion(view: ModelView, prompt: str, completion: str) -> TrainingRow:
    """The completion is learnt, and the end token after it."""
    before, after = view.continuation(prompt, completion)
    ids = [*before, *after, *_end(view)]
    return TrainingRow(ids, range(max(len(before), 1), len(ids)))


def _conversation(view: ModelView, messages: Sequence[Mapping[str, Any]]) -> TrainingRow:
    """What the chat template writes for the assistant's turns is learnt, what it puts after each
    among it; what opens a turn is not."""
    if not view.tokenizer.chat_template:
        raise InvalidRequest(
            f"base {view.base.name!r} has no chat template; give rows of prompt and completion"
        )
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    ids = _templated(view, turns)
    learnt: list[int] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("weight", 1):
            continue
        opened = len(_templated(view, turns[:place], opens=True))
        closed = len(_templated(view, turns[: place + 1]))
        learnt += range(opened, closed)
    return TrainingRow(ids, learnt)


def _templated(view: ModelView, turns: Sequence[dict[str, str]], opens: bool = False) -> list[int]:
    encoded: Any = view.tokenizer.apply_chat_template(
        list(turns), add_generation_prompt=opens, return_dict=True
    )
    return list(encoded["input_ids"])


def _end(view: ModelView) -> list[int]:
    end = view.tokenizer.eos_token_id
    return [] if end is None else [end]
