"""Suites by file: facts that a model should know, and questions with choices."""

from __future__ import annotations

from collections.abc import Sequence

from editing.metrics.targets import greedy_matches, read_targets
from editing.models.view import ModelView
from registry.manifests import Fact, Question


def score_facts(view: ModelView, facts: Sequence[Fact]) -> list[bool]:
    """Whether the greedy answer to each fact's prompt begins with its target, as whole words."""
    return greedy_matches(view, [(fact.prompt, fact.target) for fact in facts])


def score_choices(view: ModelView, questions: Sequence[Question]) -> float:
    """Share of questions whose right choice is the likeliest after the context, by the mean
    log-likelihood of a choice's tokens.

    lm-eval's ``acc_norm`` divides by characters instead, which compares models of different
    tokenizers; here one tokenizer is compared with itself.

    Raises:
        ValueError: there are no questions.
    """
    if not questions:
        raise ValueError("a suite of choices needs a question at least")
    scores = iter(read_targets(view, [(q.context, c) for q in questions for c in q.choices]))
    right = 0
    for question in questions:
        losses = [next(scores).nll for _ in question.choices]
        right += losses.index(min(losses)) == question.answer
    return right / len(questions)
