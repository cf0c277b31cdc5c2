"""Augmentation: other wordings of prompts, made without another model."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator

from editing.preprocessing.hyperparameters import PLACE, AugmentationHyperparameters
from editing.preprocessing.interface import Placed, Preprocessor
from editing.preprocessing.rows import prompt_of, with_prompt

Perturb = Callable[[random.Random, list[str], int], None]


class Augmentation(Preprocessor):
    """Each row as it is, then its prompt in each template, then perturbed copies of it.

    A perturbation changes ``n = max(1, round(alpha · words))`` words of a prompt, as EDA does
    (arXiv:1901.11196). ``swap``: n times two words change places. ``deletion``: n words go, never
    all. ``typo``: in n words two neighboring letters change places. ``case``: n words change to
    capitals, or to small letters where they are capitals. A copy that comes out as the prompt
    itself is left out.
    """

    def __init__(self, hyperparameters: AugmentationHyperparameters) -> None:
        super().__init__()
        self._hyperparameters = hyperparameters

    def __call__(self, rows: Iterable[Placed]) -> Iterator[Placed]:
        for place, row in rows:
            self.counts["kept"] += 1
            yield place, row
            prompt = prompt_of(row)
            if prompt is None:
                continue
            for template in self._hyperparameters.templates:
                self.counts["template"] += 1
                yield place, with_prompt(row, template.replace(PLACE, prompt))
            for name, text in self._copies(place, prompt):
                if text != prompt:
                    self.counts[name] += 1
                    yield place, with_prompt(row, text)

    def _copies(self, place: int, prompt: str) -> Iterator[tuple[str, str]]:
        given = self._hyperparameters
        source = random.Random(f"{given.seed}/{place}/{prompt}")
        for _ in range(given.copies if given.perturbations else 0):
            name = source.choice(given.perturbations)
            yield name, perturbed(prompt, name, given.alpha, source)


def perturbed(text: str, name: str, alpha: float, source: random.Random) -> str:
    """A text, which is not blank, after one perturbation."""
    parts = re.split(r"(\s+)", text)  # words and what is between them, by turns
    PERTURBATIONS[name](source, parts, max(1, round(alpha * len(_words(parts)))))
    return "".join(parts)


def _words(parts: list[str], shortest: int = 1) -> list[int]:
    return [i for i, part in enumerate(parts) if len(part.strip()) >= shortest]


def _swap(source: random.Random, parts: list[str], times: int) -> None:
    words = _words(parts)
    for _ in range(times if len(words) > 1 else 0):
        a, b = source.sample(words, 2)
        parts[a], parts[b] = parts[b], parts[a]


def _delete(source: random.Random, parts: list[str], times: int) -> None:
    words = _words(parts)
    gone = set(source.sample(words, min(times, len(words) - 1)))
    *kept, last = (i for i in words if i not in gone)
    between = [part for i in kept for part in parts[i : i + 2]]
    parts[:] = [*parts[: words[0]], *between, parts[last], *parts[words[-1] + 1 :]]


def _mistype(source: random.Random, parts: list[str], times: int) -> None:
    words = _words(parts, shortest=2)
    for i in source.sample(words, min(times, len(words))):
        word = parts[i]
        at = source.randrange(len(word) - 1)
        parts[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _recase(source: random.Random, parts: list[str], times: int) -> None:
    words = _words(parts)
    for i in source.sample(words, min(times, len(words))):
        parts[i] = parts[i].lower() if parts[i].isupper() else parts[i].upper()


PERTURBATIONS: dict[str, Perturb] = {
    "swap": _swap,
    "deletion": _delete,
    "typo": _mistype,
    "case": _recase,
}
