import asyncio
import threading

import pytest

from app import probes
from app.probes import Probe


def test_a_question_that_hangs_is_asked_once_and_answers_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "PROBE_SECONDS", 0.05)
    free = threading.Event()
    asked: list[int] = []

    def ask() -> str:
        asked.append(1)
        free.wait(30)
        return "here"

    async def talk() -> None:
        probe = Probe("part", ask)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await probe.answer()
        assert len(asked) == 1
        free.set()
        monkeypatch.setattr(probes, "PROBE_SECONDS", 30.0)
        assert await probe.answer() == "here"
        assert await probe.answer() == "here"

    asyncio.run(talk())


def test_an_error_is_raised_and_the_next_question_is_a_new_one() -> None:
    answers: list[object] = [OSError("gone"), "back"]

    def ask() -> object:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def talk() -> None:
        probe = Probe("part", ask)
        with pytest.raises(OSError, match="gone"):
            await probe.answer()
        assert await probe.answer() == "back"

    asyncio.run(talk())


def test_an_answer_is_good_for_a_while() -> None:
    asked: list[int] = []

    async def talk() -> None:
        probe = Probe("part", lambda: asked.append(1), keep=60.0)
        await asyncio.gather(*(probe.answer() for _ in range(5)))
        await probe.answer()

    asyncio.run(talk())
    assert len(asked) == 1
