"""What users hand in, checked before a job is taken, without torch: files, edits, examples."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, islice
from pathlib import Path

from tokenizers import Tokenizer

from editing.datasets import PURPOSES, read_edits, read_examples, read_file
from editing.headers import read_header
from editing.methods import MethodEntry
from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.errors import UnprocessableRequest
from registry.manifests import EditRequest, Example, Fact, HarmPrompt, Question

__all__ = [
    "PURPOSES",
    "check_edits",
    "check_examples",
    "check_harm",
    "check_measured",
    "check_mergeable",
    "check_suite",
    "check_texts",
    "read_edits",
    "read_examples",
    "read_file",
]

LISTED_PAIRS = 20
#: Most tokens that a tokenizer puts around a text.
AROUND = 16


def check_edits(entry: MethodEntry, base: Base, edits: Sequence[EditRequest]) -> None:
    """Refuse edits that the method or the base's tokenizer cannot take, or that contradict.

    Raises:
        UnprocessableRequest: names the edit's field, or lists the pairs that do not go together.
    """
    if not entry.takes_edits:
        if edits:
            (needed,) = entry.needs
            raise UnprocessableRequest(
                f"method {entry.name!r} learns from {needed} and takes no edits", param="edits"
            )
        return
    if not edits:
        raise UnprocessableRequest(
            "edits is empty; give edits, or file, a file of them", param="edits"
        )
    for i, edit in enumerate(edits):
        _check_needs(entry, edit, f"edits.{i}")
    _check_pairs(edits)
    _check_tokens(base, edits)


def check_measured(base: Base, edits: Sequence[EditRequest]) -> None:
    """Refuse edits that cannot be measured: the same facts may come twice, a target must be there.

    Raises:
        UnprocessableRequest
    """
    if not edits:
        raise UnprocessableRequest(
            "edits is empty; give edits, or file, a file of them", param="edits"
        )
    for i, edit in enumerate(edits):
        if not edit.target_new:
            raise UnprocessableRequest(
                f"edits.{i}.target_new is missing; measures need it", param=f"edits.{i}.target_new"
            )
    _check_tokens(base, edits)


def check_examples(entry: MethodEntry, examples: Sequence[Example]) -> None:
    """Refuse examples that the method does not learn from, and too few where it does.

    Raises:
        UnprocessableRequest
    """
    if "examples" not in entry.needs:
        if examples:
            raise UnprocessableRequest(
                f"method {entry.name!r} takes no examples; leave them out", param="examples"
            )
        return
    if len({example.label for example in examples}) < 2:
        raise UnprocessableRequest(
            f"method {entry.name!r} needs examples with the behaviour (label true) and without"
            " (label false): give examples, or examples_file, a file of them",
            param="examples",
        )


def check_texts(entry: MethodEntry, file: str | None) -> None:
    """Refuse a file of texts for a method that looks at none.

    Raises:
        UnprocessableRequest
    """
    if file is not None and "texts" not in entry.needs:
        raise UnprocessableRequest(
            f"method {entry.name!r} takes no texts; leave them out (guards.texts are those of the"
            " guards)",
            param="texts",
        )


def check_harm(field: str, base: Base, prompts: Sequence[HarmPrompt]) -> None:
    """Refuse requests that the base cannot be asked: conversations without a chat template, and
    what its context cannot hold.

    Raises:
        UnprocessableRequest
    """
    tokenizer = _tokenizer(base.folder, base.digest)
    for place, prompt in enumerate(prompts, start=1):
        if prompt.messages and not base.has_chat_template:
            raise UnprocessableRequest(
                f"{field}: row {place} is a conversation, and base {base.name!r} has no chat"
                " template; give prompts",
                param=field,
            )
        texts = [prompt.prompt, *(m["content"] for m in prompt.messages), prompt.target]
        count = len(tokenizer.encode("\n".join(texts)).ids)
        if count > base.context_length:
            raise UnprocessableRequest(
                f"{field}: row {place} has {count} tokens; the context of base {base.name!r}"
                f" holds {base.context_length}",
                param=field,
            )


def check_suite(field: str, base: Base, questions: Sequence[Question]) -> None:
    """Refuse questions that do not fit into the base's context together with a choice.

    Raises:
        UnprocessableRequest
    """
    for place, question in enumerate(questions, start=1):
        for choice in question.choices:
            _check_room(base, f"{field}: row {place}", field, Fact(question.context, choice))


def check_mergeable(field: str, version: str, stack: Sequence[str], store: ArtifactStore) -> None:
    """Refuse a version with gated effects, which are no change of a weight that could be merged.

    Raises:
        UnprocessableRequest: ``field`` is the one that names the version.
        NotFound, ArtifactCorrupt: a delta is not there, or its file no delta.
    """
    for digest in stack:
        with store.opened(digest) as stream:
            header = read_header(stream, os.fstat(stream.fileno()).st_size)
        if header.gated:
            raise UnprocessableRequest(
                f"{field}: version {version!r} has gated effects (method"
                f" {header.about.get('method')!r}, at {header.gated[0]}), which cannot be merged;"
                " merge versions without them, and edit the result by that method again",
                param=field,
                code="gated_version",
            )


def _check_needs(entry: MethodEntry, edit: EditRequest, place: str) -> None:
    redirects = "redirect_to" in entry.needs
    for name in entry.needs if redirects else ("target_new", *entry.needs):
        if not getattr(edit, name):
            raise UnprocessableRequest(
                f"{place}.{name} is missing; method {entry.name!r} needs it",
                param=f"{place}.{name}",
            )


def _check_pairs(edits: Sequence[EditRequest]) -> None:
    """List the pairs of edits of one prompt: duplicates, and targets that contradict."""
    same: dict[str, list[int]] = {}
    for i, edit in enumerate(edits):
        same.setdefault(edit.rewrite_prompt.strip(), []).append(i)
    groups = [places for places in same.values() if len(places) > 1]
    count = sum(len(places) * (len(places) - 1) // 2 for places in groups)
    if not count:
        return
    listed = [_told(edits, i, j) for i, j in islice(_pairs(groups), LISTED_PAIRS)]
    more = f"; and {count - len(listed)} more" if count > len(listed) else ""
    raise UnprocessableRequest(
        f"{count} pair(s) of edits are of one prompt; keep one of each: {'; '.join(listed)}{more}",
        param="edits",
        code="conflicting_edits",
    )


def _pairs(groups: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    for places in groups:
        yield from combinations(places, 2)


def _told(edits: Sequence[EditRequest], i: int, j: int) -> str:
    prompt = _short(edits[i].rewrite_prompt)
    first, second = (_short(e.target_new or e.redirect_to or "") for e in (edits[i], edits[j]))
    if first == second:
        return f"edits.{j} repeats edits.{i} ({prompt} -> {first})"
    return f"edits.{i} and edits.{j} contradict ({prompt} -> {first} or {second})"


def _short(text: str, most: int = 80) -> str:
    return repr(text.strip() if len(text) <= most else text[:most] + "…")


def _check_tokens(base: Base, edits: Sequence[EditRequest]) -> None:
    """Refuse a target that cannot be taught token by token, and what the context cannot hold.

    A target must come back whole from its own tokens, hold no special token, and have a token of
    its own after the prompt.
    """
    tokenizer = _tokenizer(base.folder, base.digest)
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    targets = [edit.target_new for edit in edits]
    alone = tokenizer.encode_batch(targets, add_special_tokens=False)
    back = tokenizer.decode_batch([found.ids for found in alone], skip_special_tokens=False)
    texts = [f"{edit.rewrite_prompt.rstrip()} {edit.target_new.lstrip()}" for edit in edits]
    whole = tokenizer.encode_batch(texts)
    for i, (edit, target) in enumerate(zip(edits, targets, strict=True)):
        for name, fact in _asked(edit):
            _check_room(base, f"edits.{i}.{name}", f"edits.{i}.{name}", fact)
        if not target:
            continue
        found = next((token for token in special if token in target), None)
        begin = len(edit.rewrite_prompt.rstrip())
        problem = None
        if found is not None:
            problem = f"it holds the special token {found!r}"
        elif _plain(back[i]) != _plain(target):
            problem = f"its tokens say {back[i].strip()!r}"
        elif not any(begin <= start < end for start, end in whole[i].offsets):
            problem = "it has no token of its own after the prompt"
        if problem is not None:
            raise UnprocessableRequest(
                f"edits.{i}.target_new: the tokenizer of base {base.name!r} splits {target!r}"
                f" oddly: {problem}; give plain text that it can write",
                param=f"edits.{i}.target_new",
            )


def _asked(edit: EditRequest) -> Iterator[tuple[str, Fact]]:
    """What a model is asked of an edit, with what it is to say there, by field."""
    new, true = edit.target_new, edit.target_true or ""
    yield "prompt", Fact(edit.rewrite_prompt, new)
    yield "target_true", Fact(edit.rewrite_prompt, true)
    for name in ("paraphrase_prompts", "neighborhood_prompts"):
        for j, prompt in enumerate(getattr(edit, name)):
            yield f"{name}.{j}", Fact(prompt, new)
            yield f"{name}.{j}", Fact(prompt, true)
    for name in ("locality", "retention"):
        for j, fact in enumerate(getattr(edit, name)):
            yield f"{name}.{j}", fact
    if edit.guide_prompt:
        yield "guide_prompt", Fact(edit.guide_prompt, "")
    if edit.redirect_to:
        yield "redirect_to", Fact(edit.prompt.replace("{}", edit.redirect_to, 1), new)


def _check_room(base: Base, place: str, param: str, fact: Fact) -> None:
    """Refuse a prompt that does not fit into the context together with its target."""
    gap = "" if fact.prompt[-1:].isspace() or fact.target[:1].isspace() else " "
    text = fact.prompt + gap + fact.target if fact.target else fact.prompt
    if len(text.encode()) + AROUND <= base.context_length:  # a token is a byte of it at least
        return
    count = len(_tokenizer(base.folder, base.digest).encode(text).ids)
    if count > base.context_length:
        raise UnprocessableRequest(
            f"{place}: prompt and target have {count} tokens; the context of base {base.name!r}"
            f" holds {base.context_length}",
            param=param,
        )


def _plain(text: str) -> str:
    """Composed characters without white space around: forms that mean the same compare equal."""
    return unicodedata.normalize("NFC", text).strip()


@lru_cache(maxsize=16)
def _tokenizer(folder: Path, digest: str) -> Tokenizer:
    """By the base's digest too, since its folder may come to hold other files."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
