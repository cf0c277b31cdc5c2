from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from serving.text import Decoder, Detokenizer, StopStrings
from tests.models import EOS, small_tokenizer

TEXT = "The city’s name — 東京, Zürich, Αθήνα, 👩‍🚀 and ‹é› — is  spaced .  Really ?\n\tYes � !"


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """The shape of Llama 2's: spaces as ▁, unknown characters as runs of byte tokens."""
    vocabulary = {"<unk>": 0, EOS: 1}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in "▁abcdefghijklmnopqrstuvwxyz.,":
        vocabulary[character] = len(vocabulary)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(
        tokenizer_models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False
    )


TOKENIZERS = {"byte_level": small_tokenizer(), "byte_fallback": fallback_tokenizer()}
DECODERS = {name: Decoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def streamed(name: str, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(DECODERS[name])
    return [*(detokenizer.add(token) for token in tokens), detokenizer.finish()]


def decoded(name: str, tokens: list[int]) -> str:
    return str(
        TOKENIZERS[name].decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_streams_in_whole_characters(name: str) -> None:
    text = TEXT.replace("�", "")
    tokens = TOKENIZERS[name](text)["input_ids"]
    pieces = streamed(name, tokens)
    assert "".join(pieces) == decoded(name, tokens) == text
    assert not any("�" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 20, "it must stream, not come at the end"


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=200)
def test_any_tokens_stream_to_exactly_their_text(name: str, data: st.DataObject) -> None:
    size = len(TOKENIZERS[name])
    words = st.lists(st.integers(0, size - 1), max_size=30)
    known = st.sampled_from(["🙂", " the", "é", EOS, "  ", "�"]).map(
        lambda text: TOKENIZERS[name](text)["input_ids"]
    )
    tokens = [token for part in data.draw(st.lists(words | known, max_size=6)) for token in part]
    assert "".join(streamed(name, tokens)) == decoded(name, tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_own_texts_are_all_of_the_text(name: str) -> None:
    text = TEXT.replace("�", "")
    texts = [DECODERS[name].token_text(token) for token in TOKENIZERS[name](text)["input_ids"]]
    whole = b"".join(part.encode(errors="surrogateescape") for part in texts).decode()
    assert whole.removeprefix(" ") == text
    assert not any("�" in part for part in texts)


def test_a_token_that_begins_with_a_space_shows_it() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.convert_tokens_to_ids(["▁the", "the"[:1], "▁", "<0xE6>", "<0x0A>"])
    texts = [DECODERS["byte_fallback"].token_text(id) for id in ids]
    assert texts == [" the", "t", " ", "\udce6", "\n"]


def test_where_the_kind_is_unknown_a_token_is_decoded_alone() -> None:
    words = Tokenizer(tokenizer_models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}))
    words.decoder = decoders.WordPiece()
    decoder = Decoder(PreTrainedTokenizerFast(tokenizer_object=words))
    assert [decoder.token_text(id) for id in (1, 2, 99)] == ["play", "##ing", ""]


def test_a_tokens_own_text_shows_special_tokens() -> None:
    assert DECODERS["byte_fallback"].token_text(1) == EOS
    assert DECODERS["byte_level"].token_text(0) == EOS
    assert DECODERS["byte_level"].decode([0]) == ""


def cut(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    watch = StopStrings(stops)
    text = ""
    for piece in pieces:
        text += watch.add(piece)
        if watch.found:
            return text, True
    return text + watch.finish(), False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["\n"], ["one", " two\nthree"], ("one two", True)),
        (["END"], ["aE", "N", "Db"], ("a", True)),
        (["END"], ["aE", "N", "C"], ("aENC", False)),
        (["aab"], ["a", "a", "a", "b"], ("a", True)),
        (["xyz", "b"], ["ax", "yb"], ("axy", True)),
        ([], ["a", "b"], ("ab", False)),
    ],
)
def test_text_is_cut_before_a_stop_string(
    stops: list[str], pieces: list[str], expected: tuple[str, bool]
) -> None:
    assert cut(stops, pieces) == expected


def test_only_a_possible_beginning_is_held_back() -> None:
    watch = StopStrings(["###"])
    assert [watch.add("a#"), watch.add("#b"), watch.add("c#")] == ["a", "##b", "c"]


@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
)
def test_stop_strings_cut_like_a_search_after_each_piece(
    stops: list[str], pieces: list[str]
) -> None:
    text = ""
    expected: tuple[str, bool] | None = None
    for piece in pieces:
        text += piece
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if places:
            expected = text[: min(places)], True
            break
    assert cut(stops, pieces) == (expected or (text, False))
