"""Grammars that constrain a completion: JSON schemas and regular expressions, by llguidance."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from registry.errors import ErrataError, InvalidRequest
from serving.protocol import Grammar

#: Compiled grammars that are kept.
MOST_KEPT = 128


class Guide:
    """One completion's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> ErrataError | None:
        """Why nothing can follow at all."""
        if not self._matcher.is_error():
            return None
        return InvalidRequest(
            f"response_format is too complex to follow: {_first_line(self._matcher.get_error())};"
            " simplify it",
            param="response_format",
        )

    def mask(self, row: Tensor) -> None:
        """-inf for the tokens that may not come; row [vocabulary], in place."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():  # maybe only now; what it allows then is an end
            row.fill_(-torch.inf)
            return
        row.masked_fill_(allowed[: len(row)].to(row.device) == 0, -torch.inf)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


class Guides:
    """Compiles grammars for one base; those it has seen last are kept.

    Args:
        tokenizer: the base's.
        vocab_size: entries of a row of logits.
        eos: tokens that end a completion.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos: frozenset[int]
    ) -> None:
        self._tokenizer = _adapted(tokenizer, vocab_size, eos)
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def guide(self, grammar: Grammar) -> Guide:
        """A guide at the grammar's start; one thread at a time.

        Raises:
            InvalidRequest: the grammar is wrong or too large, or the base's tokenizer cannot be
                constrained.
        """
        if self._tokenizer is None:
            raise InvalidRequest(
                "this base cannot be constrained by a grammar: its tokenizer has no fast form or"
                " no end-of-sequence token",
                param="response_format",
            )
        if (matcher := self._kept.pop(grammar, None)) is None:
            matcher = _compiled(self._tokenizer, grammar)
        self._kept[grammar] = matcher
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return Guide(matcher.deep_copy())


def _compiled(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    try:
        if grammar.kind == "regex":
            source = LLMatcher.grammar_from_regex(grammar.text)
        else:  # without free whitespace, of which a small model finds no end
            source = LLMatcher.grammar_from_json_schema(
                grammar.text, overrides={"whitespace_flexible": False}
            )
        matcher = LLMatcher(tokenizer, source, log_level=0)
        problem = matcher.get_error()
    except ValueError as error:
        problem = str(error)
    if problem:
        raise InvalidRequest(
            f"response_format: the {grammar.kind} cannot be followed: {_first_line(problem)}",
            param="response_format",
        )
    return matcher


def _adapted(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos: frozenset[int]
) -> LLTokenizer | None:
    """The tokenizer as llguidance takes it: its bare vocabulary.

    Neither a space before the text nor special tokens around it may come into what a grammar
    forces in the middle of a text.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not eos:
        return None
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    spec.update(post_processor=None, truncation=None, padding=None)
    _without_prefix_space(spec["pre_tokenizer"])
    return LLTokenizer(json.dumps(spec), n_vocab=vocab_size, eos_token=sorted(eos))


def _without_prefix_space(part: dict[str, Any] | None) -> None:
    if part is None:
        return
    if "add_prefix_space" in part:
        part["add_prefix_space"] = False
    if "prepend_scheme" in part:
        part["prepend_scheme"] = "never"
    for inner in part.get("pretokenizers", ()):
        _without_prefix_space(inner)


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]
