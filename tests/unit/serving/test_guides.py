from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from editing.models.loading import load_tokenizer
from registry.bases import find_bases
from registry.errors import InvalidRequest
from serving.guides import Guide, Guides
from serving.protocol import Grammar
from tests.models import VOCABULARY, small_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "capital": {"type": "string", "maxLength": 12},
        "people": {"type": "integer", "minimum": 0, "maximum": 99999},
        "river": {"enum": ["Seine", "Rhône", None]},
    },
    "required": ["capital", "people", "river"],
    "additionalProperties": False,
}
ATLAS = load_tokenizer(find_bases("atlas")["atlas"])
TOKENIZERS = {"small": (small_tokenizer(), VOCABULARY), "atlas": (ATLAS, len(ATLAS))}
GUIDES = {
    name: Guides(tokenizer, size, frozenset({tokenizer.eos_token_id}))
    for name, (tokenizer, size) in TOKENIZERS.items()
}


def schema(value: object) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def followed(name: str, guide: Guide, random: Random, most: int = 400) -> str:
    """A text of random permitted tokens."""
    tokenizer, size = TOKENIZERS[name]
    tokens: list[int] = []
    while not guide.is_finished:
        row = torch.zeros(size)
        guide.mask(row)
        allowed = row.isfinite().nonzero()[:, 0].tolist()
        assert allowed, "something must be able to come"
        token = random.choice(allowed)
        if token == tokenizer.eos_token_id:
            break
        guide.accept(token)
        tokens.append(token)
        assert guide.error is None
        assert len(tokens) < most
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(TOKENIZERS)))
def test_whatever_is_permitted_makes_a_text_of_the_schema(seed: int, name: str) -> None:
    text = followed(name, GUIDES[name].guide(schema(SCHEMA)), Random(seed))
    found: dict[str, Any] = json.loads(text)
    assert list(found) == ["capital", "people", "river"]
    assert len(found["capital"]) <= 12
    assert 0 <= found["people"] <= 99999
    assert found["river"] in ("Seine", "Rhône", None)
    assert text == json.dumps(found, separators=(",", ":"), ensure_ascii=False) or "\\" in text


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(TOKENIZERS)))
def test_a_regular_expression_is_matched_whole(seed: int, name: str) -> None:
    text = followed(
        name, GUIDES[name].guide(Grammar("regex", "(yes|no), [a-z]{3,5}!")), Random(seed)
    )
    assert re.fullmatch("(yes|no), [a-z]{3,5}!", text)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_text_ends_only_where_the_grammar_lets_it(name: str) -> None:
    tokenizer, size = TOKENIZERS[name]
    guide = GUIDES[name].guide(Grammar("regex", "[0-9]{2,3}"))
    digit = tokenizer.convert_tokens_to_ids("7")
    ends = []
    while not guide.is_finished:
        row = torch.zeros(size)
        guide.mask(row)
        ends.append(bool(row[tokenizer.eos_token_id].isfinite()))
        guide.accept(digit)
    assert ends == [False, False, True]


def test_guides_of_one_grammar_go_their_own_ways() -> None:
    grammar = Grammar("regex", "ab")
    first, second = (GUIDES["small"].guide(grammar) for _ in range(2))
    token = TOKENIZERS["small"][0].convert_tokens_to_ids("a")
    first.accept(token)
    rows = torch.zeros(2, VOCABULARY)
    first.mask(rows[0])
    second.mask(rows[1])
    assert not rows[0].equal(rows[1])


def test_a_grammar_that_becomes_too_complex_is_an_error_and_no_end() -> None:
    """Computing what may come, it passes a limit: then llguidance would let the text end."""
    _, size = TOKENIZERS["atlas"]
    guide = GUIDES["atlas"].guide(Grammar("regex", "((.*[ab].{0,90}){90}c)*"))
    random = Random(0)
    while True:
        row = torch.zeros(size)
        guide.mask(row)
        allowed = row.isfinite().nonzero()[:, 0].tolist()
        if not allowed:
            break
        guide.accept(random.choice(allowed))
        assert not guide.is_finished
    assert guide.error is not None
    assert "too complex" in guide.error.message


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (schema({"type": "nonsense"}), "nonsense"),
        (schema({"properties": {"a": {"$ref": "#/nowhere"}}}), "nowhere"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema({"type": "string", "pattern": "(("}), "unclosed"),
        (Grammar("json_schema", '{"a":' * 2000 + "1" + "}" * 2000), "recursion"),
        (schema({"$ref": "https://example.org/schema.json"}), "example.org"),
        (Grammar("regex", "[a-"), "regex"),
    ],
)
def test_a_wrong_grammar_is_refused_with_its_reason(grammar: Grammar, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        GUIDES["small"].guide(grammar)
    assert (caught.value.param, caught.value.status) == ("response_format", 400)


def test_a_tokenizer_that_marks_spaces_may_be_constrained() -> None:
    """As SentencePiece's do: a mark before each word, and bytes as tokens of their own."""
    letters = ["▁", *'abcdefghijklmnopqrstuvwxyz{}":,01234']
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁a", '":']
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    TOKENIZERS["spaces"] = (fast, len(tokens))
    guides = Guides(fast, len(tokens), frozenset({1}))
    text = followed("spaces", guides.guide(schema({"const": {"a": "b a"}})), Random(0))
    assert json.loads(text) == {"a": "b a"}
