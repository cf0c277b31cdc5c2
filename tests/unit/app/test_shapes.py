"""Log-probabilities as OpenAI's client reads them."""

from app.inference.resolve import Admitted, Resolved
from app.inference.shapes import ChatShape, TextShape
from registry.manifests import BaseRef, VersionManifest
from serving.protocol import TokenLogprob, TopLogprob

MANIFEST = VersionManifest(BaseRef("atlas", "0" * 64), ())
ADMITTED = Admitted(Resolved("atlas", MANIFEST, 1, 0.0), None)
#: The first byte of a character after a space; two tokens of one text.
TOP = (TopLogprob(7, " \udce6", -0.5), TopLogprob(8, "P", -1.0), TopLogprob(9, "P", -2.0))
ENTRY = TokenLogprob(7, " \udce6", -0.5, TOP, 3)


def test_a_part_of_a_character_is_named_by_its_bytes() -> None:
    (choice,) = TextShape(ADMITTED).chunk(0, "", [ENTRY], None)["choices"]
    assert choice["logprobs"]["tokens"] == ["bytes: \\xe6"]
    (content,) = ChatShape(ADMITTED).chunk(0, "", [ENTRY], None)["choices"][0]["logprobs"][
        "content"
    ]
    assert (content["token"], content["bytes"]) == ("bytes: \\xe6", [0x20, 0xE6])
    assert [t["bytes"] for t in content["top_logprobs"]] == [[0x20, 0xE6], [0x50], [0x50]]


def test_of_tokens_with_one_name_the_likeliest_is_listed() -> None:
    (choice,) = TextShape(ADMITTED).chunk(0, "", [ENTRY], None)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"bytes: \\xe6": -0.5, "P": -1.0}]
