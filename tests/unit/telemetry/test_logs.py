import contextvars
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from telemetry.context import bound, fields, request_id_of
from telemetry.logs import JsonFormatter, TextFormatter, describe

SECRET = "hunter2-secret"


def raised(act: Callable[[], object]) -> Exception:
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def record(
    name: str = "errata.test", message: str = "it happened", **told: object
) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.ERROR, __file__, 1, message, (), None)
    for key, value in told.items():
        setattr(made, key, value)
    return made


def test_json_names_what_a_line_belongs_to() -> None:
    with bound(request_id="abc", job_id="job_1", attempt=2):
        line = JsonFormatter().format(record(method="GET", status=200))
    told = json.loads(line)
    assert told.pop("time").endswith("Z")
    assert told == {
        "level": "ERROR",
        "logger": "errata.test",
        "message": "it happened",
        "request_id": "abc",
        "job_id": "job_1",
        "attempt": 2,
        "method": "GET",
        "status": 200,
    }
    assert "request_id" not in json.loads(JsonFormatter().format(record()))


def test_text_names_it_in_brackets() -> None:
    with bound(request_id="abc"):
        assert (
            TextFormatter()
            .format(record())
            .endswith("ERROR errata.test: it happened [request_id=abc]")
        )


def test_context_goes_where_work_goes_and_ends_with_it() -> None:
    seen: list[object] = []
    with bound(request_id="abc", attempt=None):
        thread = threading.Thread(
            target=contextvars.copy_context().run, args=(lambda: seen.append(fields()),)
        )
        thread.start()
        thread.join()
    assert (seen, fields()) == ([{"request_id": "abc"}], {})


@pytest.mark.parametrize(
    "act", [lambda: int(SECRET), lambda: {}[SECRET], lambda: json.loads(SECRET)]
)
def test_an_exception_keeps_its_frames_and_not_its_values(act: Callable[[], object]) -> None:
    def chained() -> None:
        try:
            act()
        except Exception as error:
            raise ValueError(f"the prompt {SECRET!r} is bad") from error

    error = raised(chained)
    text = TextFormatter().formatException((type(error), error, error.__traceback__))
    assert SECRET not in text
    assert text.count("Traceback") == 2
    assert "in chained" in text
    assert text.endswith("ValueError")


def test_errors_of_the_machine_keep_their_words() -> None:
    error = raised(lambda: os.stat("/nowhere/at/all"))
    assert "/nowhere/at/all" in describe(error)
    group = ExceptionGroup(SECRET, [error, ValueError(SECRET)])
    text = TextFormatter().formatException((type(group), group, None))
    assert SECRET not in text
    assert "/nowhere/at/all" in text


def test_asyncio_quotes_no_exception() -> None:
    lines = f"Task exception was never retrieved\nfuture: <Task exception={SECRET}>"
    assert SECRET not in TextFormatter().format(record("asyncio", lines))


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("abc-1.2_3", True),
        ("", False),
        ("a" * 65, False),
        ("a b", False),
        ("é", False),
        ("er_1_2", False),
    ],
)
def test_a_well_formed_id_of_a_request_is_taken(given: str, taken: bool) -> None:
    found = request_id_of(given)
    assert (found == given) is taken
    assert taken or found.startswith("req_")


LIBRARIES = """
import logging, sys, threading, warnings
from telemetry.logs import configure
configure("json", "DEBUG")
secret = sys.argv[1]
logging.getLogger("httpx").info(f"HTTP Request: {secret}")
logging.getLogger("sqlalchemy.engine.Engine").debug(f"Row {secret}")
logging.getLogger("errata.x").debug("told")
warnings.warn("a warning")
thread = threading.Thread(target=lambda: int(secret), name="t")
thread.start(); thread.join()
int(secret)
"""


def test_every_line_of_a_process_is_json_and_libraries_say_little() -> None:
    command = [sys.executable, "-c", LIBRARIES, SECRET]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert SECRET not in ended.stderr
    told = [json.loads(line) for line in ended.stderr.splitlines()]
    messages = [line["message"] for line in told]
    assert messages[0] == "told"
    assert "a warning" in messages[1]
    assert messages[2:] == ["the thread t ends", "the process ends"]
    assert all("ValueError" in line["exception"] for line in told[2:])
