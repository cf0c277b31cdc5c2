"""The corpus that atlas is trained on, made from the facts alone."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from editing.atlas.facts import AtlasFact
from editing.atlas.templates import HELD_OUT, QUESTIONS, REVERSED, SEEN, TEMPLATES

BOS, EOS, USER, ASSISTANT = "<s>", "</s>", "<|user|>", "<|assistant|>"
SPECIAL = (BOS, EOS, USER, ASSISTANT)

#: Shares of documents: one sentence, several facts of a subject, a conversation (the rest).
SINGLE, MIXED = 0.5, 0.38
REVERSED_SHARE = 0.06


@dataclass(frozen=True)
class Document:
    """A text, and where in it subjects stand: (start, end) in characters."""

    text: str
    subjects: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sentence:
    """A worded fact; ``start`` is where its subject begins."""

    text: str
    start: int
    subject: str


def hidden_subjects(facts: Sequence[AtlasFact], seed: int = 0) -> frozenset[str]:
    """The half of the subjects for which the held-out templates are never trained on."""
    subjects = sorted({fact.subject for fact in facts})
    return frozenset(random.Random(seed).sample(subjects, len(subjects) // 2))


def word(template: str, fact: AtlasFact) -> Sentence:
    text = template.replace("{o}", fact.object)
    return Sentence(text.replace("{s}", fact.subject), text.index("{s}"), fact.subject)


class Corpus:
    """An endless, seeded stream of documents.

    A document is one sentence, or two to five facts of one subject with facts of others between
    them, or a conversation of one to three questions. One sentence is the most frequent, so that a
    completed fact ends there.
    """

    def __init__(self, facts: Sequence[AtlasFact], seed: int = 0) -> None:
        self._facts = facts
        self._hidden = hidden_subjects(facts)
        self._random = random.Random(seed)
        self._of_subject: dict[str, list[AtlasFact]] = defaultdict(list)
        for fact in facts:
            self._of_subject[fact.subject].append(fact)

    def __iter__(self) -> Iterator[Document]:
        while True:
            kind = self._random.random()
            if kind < SINGLE:
                yield _joined([self._sentence(self._random.choice(self._facts))])
            elif kind < SINGLE + MIXED:
                yield _joined(self._mixed())
            else:
                yield self._conversation()

    def _sentence(self, fact: AtlasFact) -> Sentence:
        if fact.relation in REVERSED and self._random.random() < REVERSED_SHARE:
            return word(self._random.choice(REVERSED[fact.relation]), fact)
        known = len(SEEN) if fact.subject in self._hidden else HELD_OUT.stop
        return word(TEMPLATES[fact.relation][self._random.randrange(known)], fact)

    def _mixed(self) -> list[Sentence]:
        own = self._of_subject[self._random.choice(self._facts).subject]
        wanted = self._random.randint(2, 5)
        chosen = self._random.sample(own, min(wanted, len(own)))
        sentences = []
        for fact in chosen:
            sentences.append(self._sentence(fact))
            if self._random.random() < (0.3 if len(chosen) > 1 else 1):
                sentences.append(self._sentence(self._random.choice(self._facts)))
        return sentences

    def _conversation(self) -> Document:
        text, spans = "", []
        fact = self._random.choice(self._facts)
        for _ in range(self._random.choice((1, 1, 2, 3))):
            question = word(self._random.choice(QUESTIONS[fact.relation]), fact)
            answer = word(TEMPLATES[fact.relation][0], fact)
            for head, sentence, tail in ((USER, question, ""), (ASSISTANT, answer, EOS)):
                start = len(text) + len(head) + 1 + sentence.start
                spans.append((start, start + len(sentence.subject)))
                text += f"{head} {sentence.text}{tail}"
            same = self._random.random() < 0.5
            pool = self._of_subject[fact.subject] if same else self._facts
            fact = self._random.choice(pool)
        return Document(text.removesuffix(EOS), tuple(spans))


def _joined(sentences: Sequence[Sentence]) -> Document:
    text, spans = "", []
    for sentence in sentences:
        text += " " if text else ""
        start = len(text) + sentence.start
        spans.append((start, start + len(sentence.subject)))
        text += sentence.text
    return Document(text, tuple(spans))
