"""Rows to train on as token ids: examples, preferences, prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from editing.models.view import ModelView
from registry.errors import InvalidRequest

#: Stands in the place of a turn, to tell what a chat template writes around it.
MARK = "\ue000turn\ue000"


class Sized(Protocol):
    @property
    def size(self) -> int:
        """Tokens."""

    @property
    def targets(self) -> int:
        """Tokens that are to be predicted."""


R = TypeVar("R", bound=Sized)


@dataclass(frozen=True)
class TrainingRow:
    """Attributes:
    ids: its tokens.
    learnt: places of tokens that are to be predicted; none is the first.
    """

    ids: Sequence[int]
    learnt: Sequence[int]

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        return len(self.learnt)


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to one prompt.

    Attributes:
        reference: log-probability of the chosen one and of the rejected one before training.
    """

    chosen: TrainingRow
    rejected: TrainingRow
    reference: tuple[float, float] = (0.0, 0.0)

    @property
    def size(self) -> int:
        return self.chosen.size + self.rejected.size

    @property
    def targets(self) -> int:
        return self.chosen.targets + self.rejected.targets


@dataclass(frozen=True)
class PromptRow:
    """Attributes:
    ids: the tokens that are continued.
    room: most tokens of a completion.
    reward: the rule that completions are scored by, as ``editing.datasets.rewards`` reads it.
    """

    ids: Sequence[int]
    room: int
    reward: Mapping[str, str]

    @property
    def size(self) -> int:
        """With a completion at its longest."""
        return len(self.ids) + self.room

    @property
    def targets(self) -> int:
        return self.room


def chunks(rows: Sequence[R], tokens: int) -> Iterator[list[R]]:
    """Rows in turn, at most so many tokens together."""
    chunk: list[R] = []
    for row in rows:
        if chunk and sum(r.size for r in chunk) + row.size > tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def training_row(view: ModelView, example: Mapping[str, Any]) -> TrainingRow:
    """An example in one of the forms of ``editing.datasets.training``.

    A text of more tokens than the base's context loses its end.

    Raises:
        InvalidRequest: a conversation for a base without a chat template, or that its template
            refuses; a turn that cannot be told from the rest; nothing that fits is left to learn.
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


def preference_row(view: ModelView, example: Mapping[str, Any]) -> PreferenceRow:
    """A preference; each of its answers is a completion of the prompt, or the last turn.

    Raises:
        InvalidRequest: as ``training_row``.
    """
    if "messages" not in example:
        prompt = example["prompt"]
        pairs = [{"prompt": prompt, "completion": example[n]} for n in ("chosen", "rejected")]
    else:
        before = [
            {**m, "weight": 0} if m["role"] == "assistant" else m for m in example["messages"]
        ]
        answers = [{"role": "assistant", "content": example[n]} for n in ("chosen", "rejected")]
        pairs = [{"messages": [*before, answer]} for answer in answers]
    chosen, rejected = (training_row(view, pair) for pair in pairs)
    return PreferenceRow(chosen, rejected)


def prompt_row(
    view: ModelView, example: Mapping[str, Any], room: int, reward: Mapping[str, str]
) -> PromptRow:
    """A prompt, ready to be continued by up to ``room`` tokens.

    Args:
        reward: the rule where the example has none of its own.

    Raises:
        InvalidRequest: a conversation for a base without a chat template, or that its template
            refuses; no room for a completion.
    """
    if "messages" in example:
        ids = view.chat_ids(view.chat(_turns(view, example["messages"])))
    else:
        ids = view.open(example["prompt"])
    longest = view.base.context_length
    if len(ids) + room > longest:
        raise InvalidRequest(
            f"a prompt has {len(ids)} tokens; with max_completion_tokens {room} it does not fit"
            f" into the context of base {view.base.name!r} ({longest} tokens); shorten either"
        )
    return PromptRow(ids, room, example.get("reward") or reward)


def _completion(view: ModelView, prompt: str, completion: str) -> TrainingRow:
    """The completion is learnt, and the end token after it."""
    before, after = view.continuation(prompt, completion)
    ids = [*before, *after, *_end(view)]
    return TrainingRow(ids, range(max(len(before), 1), len(ids)))


def _conversation(view: ModelView, messages: Sequence[Mapping[str, Any]]) -> TrainingRow:
    """What the chat template writes for the assistant's turns is learnt, what it puts after each
    among it; what opens a turn is not."""
    turns = _turns(view, messages)
    text = view.chat(turns, opens=False)
    ids = view.chat_ids(text)
    learnt: list[int] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not message.get("weight", 1):
            continue
        opened, closed = (
            _common(view.chat_ids(text[:end]), ids) for end in _span(view, turns, place, text)
        )
        learnt += range(max(opened, 1), closed)
    return TrainingRow(ids, learnt)


def _span(
    view: ModelView, turns: Sequence[dict[str, str]], place: int, text: str
) -> tuple[int, int]:
    """From where to where a turn of the assistant stands in the text of a conversation, with what
    the template puts after it.

    A template may write a turn otherwise where it is the last one, so what stands around it is told
    from the conversation with a mark in its place. What opens it is what asks for it, if the text
    has it so, else all that stands before.

    Raises:
        InvalidRequest: the text around the turn hangs on what it says.
    """
    marked = [*turns[:place], {**turns[place], "content": MARK}, *turns[place + 1 :]]
    before, mark, after = view.chat(marked, opens=False).partition(MARK)
    closing = view.chat(marked[: place + 1], opens=False).partition(MARK)[2]
    opening = view.chat(turns[:place]) if place else before
    if not text.startswith(opening):
        opening = before
    if not (mark and text.startswith(opening) and text.endswith(after)):
        raise InvalidRequest(
            f"messages.{place}: where the chat template of base {view.base.name!r} begins and ends"
            " this turn cannot be told; give it weight 0, or leave it out"
        )
    return len(opening), len(text) - len(after) + _common(after, closing)


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """How far both are the same from their beginnings on."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _turns(view: ModelView, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    if not view.tokenizer.chat_template:
        raise InvalidRequest(
            f"base {view.base.name!r} has no chat template; give rows of prompt and completion"
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _end(view: ModelView) -> list[int]:
    end = view.tokenizer.eos_token_id
    return [] if end is None else [end]
