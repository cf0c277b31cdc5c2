from __future__ import annotations

from typing import Any

import pytest

from registry.errors import InvalidRequest
from serving.prompts import PromptReader
from serving.protocol import GenerateRequest, VersionRef
from tests.models import CHAT, VOCABULARY, small_tokenizer

VERSION = VersionRef("ver_1", "atlas", (), "0" * 64)
TOKENIZER = small_tokenizer()
READER = PromptReader(TOKENIZER, VOCABULARY, most_tokens=100)


def refused(reader: PromptReader, **prompt: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        reader.read(GenerateRequest(VERSION, **prompt))
    return caught.value


def chat_reader() -> PromptReader:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = CHAT
    return PromptReader(tokenizer, VOCABULARY, most_tokens=100)


def test_a_text_becomes_its_tokens() -> None:
    tokens = READER.read(GenerateRequest(VERSION, prompt="the capital"))
    assert TOKENIZER.decode(tokens) == "the capital"


def test_messages_go_through_the_bases_template() -> None:
    messages = ({"role": "user", "content": "the city"},)
    tokens = chat_reader().read(GenerateRequest(VERSION, messages=messages))
    assert TOKENIZER.decode(tokens) == "user: the city\nassistant:"


def test_a_base_without_template_takes_no_messages() -> None:
    error = refused(READER, messages=({"role": "user", "content": "x"},))
    assert "atlas" in error.message
    assert error.param == "messages"


def test_what_the_template_refuses_is_the_clients_error() -> None:
    error = refused(chat_reader(), messages=({"role": "tool", "content": "x"},))
    assert "no tools here" in error.message


def test_an_empty_prompt_is_refused_unless_the_tokenizer_begins_it() -> None:
    assert "empty" in refused(READER, prompt="").message
    assert "empty" in refused(READER, prompt_tokens=()).message


def test_token_ids_are_checked() -> None:
    assert READER.read(GenerateRequest(VERSION, prompt_tokens=(0, 319))) == (0, 319)
    for bad in (-1, 320, 2**40, 1.5, "1", None, True):
        assert "prompt token 1" in refused(READER, prompt_tokens=(0, bad)).message


def test_a_token_that_only_the_tokenizer_knows_is_refused() -> None:
    """As Gemma 3's smallest, whose tokenizer knows images."""
    tokenizer = small_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens("<image>")
    tokenizer.chat_template = CHAT
    reader = PromptReader(tokenizer, rows, most_tokens=100)
    error = refused(reader, prompt="the <image> city")
    assert ("'<image>'" in error.message, error.param) == (True, "prompt")
    error = refused(reader, messages=({"role": "user", "content": "<image>"},))
    assert ("'<image>'" in error.message, error.param) == (True, "messages")
    assert reader.read(GenerateRequest(VERSION, prompt="the city"))


def test_a_text_far_too_long_is_refused_unread() -> None:
    error = refused(READER, prompt="a" * 10**6)
    assert error.code == "context_length_exceeded"


def test_half_a_surrogate_is_refused() -> None:
    assert "Unicode" in refused(READER, prompt="a\ud800").message
    lone = ({"role": "user", "content": "\udfff"},)
    assert "Unicode" in refused(chat_reader(), messages=lone).message
