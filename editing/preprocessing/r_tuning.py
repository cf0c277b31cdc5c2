"""R-Tuning (arXiv:2311.09677): rows that say whether the version knew their answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from editing.metrics.chat import TOKENS_AROUND, chat_row, states
from editing.metrics.targets import TOKENS_MORE, begins_with
from editing.models.generation import ROWS, greedy
from editing.models.view import ModelView
from editing.preprocessing.hyperparameters import RTuningHyperparameters
from editing.preprocessing.interface import Example, Placed, Preprocessor
from editing.preprocessing.rows import answer_place, completion_of, with_completion
from registry.errors import InvalidRequest, UnprocessableRequest


class RTuning(Preprocessor):
    """The version answers each prompt greedily; where it is right the row belongs to the certain
    set D_1, else to the uncertain set D_0. ``padding``:

        D_1: prompt -> completion + sure      D_0: prompt -> completion + unsure

    ``replacement`` leaves D_1 as it is and puts the refusal in the place of D_0's completions. In a
    conversation this is the assistant's last turn that is learnt.

    An answer is right if it begins with the completion or, in a conversation, holds it, as whole
    words and up to the sign that ends its last sentence.

    Args:
        view: the version, active; what ``view`` computes is what is asked.
    """

    def __init__(self, hyperparameters: RTuningHyperparameters, view: ModelView) -> None:
        super().__init__()
        self._hyperparameters, self._view = hyperparameters, view

    def __call__(self, rows: Iterable[Placed]) -> Iterator[Placed]:
        rest = iter(rows)
        while batch := list(islice(rest, ROWS)):
            knows = known(self._view, batch)
            for (place, row), is_sure in zip(batch, knows, strict=True):
                self.counts["sure" if is_sure else "unsure"] += 1
                yield place, with_completion(row, self._said(completion_of(row), is_sure))

    def _said(self, completion: str, is_sure: bool) -> str:
        given = self._hyperparameters
        if given.mode == "padding":
            return completion.rstrip() + (given.sure if is_sure else given.unsure)
        return completion if is_sure else given.refusal


def known(view: ModelView, rows: Sequence[Placed]) -> list[bool]:
    """Whether the greedy answer to each row is right.

    Raises:
        UnprocessableRequest: names the row whose conversation the chat template refuses.
    """
    prompts, lengths = [], []
    for place, row in rows:
        completion = completion_of(row)
        if "messages" in row:
            try:
                prompts.append(chat_row(view, row["messages"][: answer_place(row)]))
            except InvalidRequest as error:
                raise UnprocessableRequest(f"row {place}: {error.message}") from None
            lengths.append(len(view.encode(completion)) + TOKENS_AROUND)
        else:
            before, target = view.continuation(row["prompt"], completion)
            prompts.append(before)
            lengths.append(len(target) + TOKENS_MORE)
    answers = map(view.decode, greedy(view, prompts, lengths))
    return [_is_right(row, answer) for (_, row), answer in zip(rows, answers, strict=True)]


def _is_right(row: Example, answer: str) -> bool:
    target = completion_of(row).strip()
    target = target.rstrip(".!?") or target
    return states(answer, target) if "messages" in row else begins_with(answer, target)
