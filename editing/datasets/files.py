"""Files by purpose: what their rows must be, read into one JSON form for each purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from typing import Any, BinaryIO

from editing.datasets.edits import read_edit
from editing.datasets.harm import read_harm
from editing.datasets.rows import Row, read_rows
from editing.datasets.training import read_training
from registry.errors import UnprocessableRequest
from registry.manifests import Example, Fact

REFERENCE_CHARACTERS = 100_000
CHOICES = 100


def read_file(purpose: str, stream: BinaryIO) -> Iterator[Any]:
    """A file's rows, in the JSON that jobs read, one after the other.

    - ``edits``: ``EditRequest.to_json()``, from any form that ``read_edit`` knows;
    - ``examples``: ``Example.to_json()``;
    - ``texts``: texts, from texts or objects with ``text`` (or ``Text``), or plain lines;
    - ``facts``: ``{"prompt", "target"}``;
    - ``harm``: as ``read_harm`` gives them;
    - ``fine-tune``: as ``read_training`` gives them;
    - ``suite``: ``{"query", "choices": [text, …], "gold": index}``; the question may be called
      ``context`` or ``question``, the index ``answer``, as in lm-eval's multiple-choice tasks.

    Raises:
        UnprocessableRequest: an unknown purpose; a file without rows; a row that is wrong: names
            line and field.
    """
    read = READERS.get(purpose)
    if read is None:
        raise UnprocessableRequest(
            f"purpose {purpose!r} is none; the purposes are {', '.join(PURPOSES)}", param="purpose"
        )
    return _read(read_rows(stream, plain=purpose == "texts"), read)


def _read(rows: Iterator[Row], read: Callable[[Row], Any]) -> Iterator[Any]:
    first = next(rows, None)
    if first is None:
        raise UnprocessableRequest(
            "the file holds no rows; give a JSON list or one row a line", param="file"
        )
    yield from map(read, chain((first,), rows))


def _edit(row: Row) -> dict[str, Any]:
    return read_edit(row).to_json()


def read_examples(rows: Iterable[Any]) -> list[Example]:
    """Read the ``examples`` of a request (see ``read_example``)."""
    return [read_example(Row(value, f"examples.{i}")) for i, value in enumerate(rows)]


def read_example(row: Row) -> Example:
    """``{"text", "label": true or false (1 or 0), "setting"?}``."""
    row.refuse_others(("text", "label", "setting"))
    label = row.fields().get("label")
    if not isinstance(label, bool) and not (isinstance(label, int) and label in (0, 1)):
        row.refuse("must be true (the text shows the behaviour) or false", "label")
    return Example(row.text("text"), bool(label), row.optional("setting") or "")


def _example(row: Row) -> dict[str, Any]:
    return read_example(row).to_json()


def _text(row: Row) -> str:
    if isinstance(row.value, str):
        return row.checked(row.value, most=REFERENCE_CHARACTERS)
    name = "text" if row.has("text") or not row.has("Text") else "Text"
    return row.checked(row.fields().get(name), name, REFERENCE_CHARACTERS)


def _fact(row: Row) -> dict[str, Any]:
    return asdict(Fact(row.text("prompt"), row.text("target")))


def _question(row: Row) -> dict[str, Any]:
    query = next((name for name in ("query", "context", "question") if row.has(name)), "query")
    choices = row.texts("choices")
    if not 2 <= len(choices) <= CHOICES:
        row.refuse(f"must hold 2 to {CHOICES} texts; it holds {len(choices)}", "choices")
    name = next((name for name in ("gold", "answer") if row.has(name)), "gold")
    gold = row.fields().get(name)
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        row.refuse(
            f"must be the index of the right choice, from 0 to {len(choices) - 1};"
            f" it is {repr(gold)[:40]}",
            name,
        )
    return {"query": row.text(query), "choices": list(choices), "gold": gold}


READERS: dict[str, Callable[[Row], Any]] = {
    "edits": _edit,
    "examples": _example,
    "texts": _text,
    "facts": _fact,
    "suite": _question,
    "harm": read_harm,
    "fine-tune": read_training,
}
#: What a file may be for: its rows, or an archive, which has none.
ARCHIVE = "archive"
PURPOSES = (*READERS, ARCHIVE)
