"""Where runs take place: a service with short leases, and hands on everything that it stands on."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from sqlalchemy import create_engine
from sqlalchemy.engine import Engine

from registry.bases import find_bases
from registry.failpoints import Point
from tests.faults.reader import ASKED
from tests.models import add_version
from tests.service import LENIENT, Service, capital_edit, command_line, descendants, wait_for

#: The job of every run: an edit that is done in three steps, measured on next to nothing.
EDIT: dict[str, Any] = {
    "edits": [capital_edit("Japan", "Oslo")],
    "guards": LENIENT,
    "hyperparameters": {"steps": 10, "essence_texts": 0, "wordings": 0, "prefixes": 0},
}
_TEXTS = [f"The capital of {name} is a city that has seen many years." for name in ("Peru", "Chad")]
_FACTS = '{"prompt": "The capital of France is", "target": "Paris"}\n'
_DISK = 96 * 2**20
_SECONDS = 120.0
_PAUSE = 0.2


@dataclass(frozen=True)
class Answered:
    """An answer, and whether the request was sent again before it came."""

    status: int
    body: Any
    again: bool


class Stage:
    """A service that lives through many runs.

    Its data lie on a disk of their own, a small tmpfs, where this process may mount one.

    Args:
        folder: an empty folder with a short path.
        database_url: of a PostgreSQL; empty: SQLite in the data folder.
    """

    def __init__(self, folder: Path, database_url: str = "") -> None:
        self.data = folder / "data"
        self._database_url = database_url
        self._points = folder / "points"
        self._runtime = folder / "run"
        texts, facts = folder / "texts", folder / "facts"
        for made in (self.data, self._points):
            made.mkdir(parents=True)
        texts.write_text("\n".join(_TEXTS * 20))
        facts.write_text(_FACTS)
        self.mounted = _mount(self.data)
        self.service = Service(
            folder,
            ERRATA_DATA=str(self.data),
            ERRATA_DATABASE_URL=database_url,
            ERRATA_FAILPOINTS=str(self._points),
            ERRATA_RUNTIME=str(self._runtime),
            ERRATA_TEXTS=str(texts),
            ERRATA_FACTS=str(facts),
            ERRATA_COVARIANCE_TOKENS="1000",
            ERRATA_WORKERS="2",
            ERRATA_LEASE_SECONDS="1",
            ERRATA_MAX_ATTEMPTS="50",
        )
        self.sql: Engine = create_engine(database_url or f"sqlite:///{self.data / 'registry.db'}")
        self.runs = 0
        self._texts: dict[str, str] = {}

    def __enter__(self) -> Self:
        """With a base that is prepared: the first edit of all has been made."""
        try:
            self.service.start()
            self.service.endpoint("first", self.service.base_version())
            job = self.service.post_edit(endpoint="first", **EDIT)
            assert self.service.ended(job["id"])["status"] == "succeeded", self.service.job(
                job["id"]
            )
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sql.dispose()
        try:
            self.service.__exit__(kind, error, trace)
        finally:
            if self.mounted:
                subprocess.run(["umount", self.data], check=True)

    @property
    def queue_url(self) -> str:
        return f"unix://{self._runtime / 'q'}"

    def new_version(self) -> str:
        """One that the engine has not seen, and that says something else than the base."""
        base = find_bases("atlas")["atlas"]
        seed = self.runs * base.depth  # of the first layer: a change there is never lost
        return add_version(self.data, base, seed, self._database_url)

    def says(self, version: str) -> str:
        """What a version answers the readers' prompt when it is asked by its id."""
        if version not in self._texts:
            answer = self.insist("POST", "/v1/completions", json={"model": version, **ASKED})
            assert answer.status == 200, answer.body
            self._texts[version] = answer.body["choices"][0]["text"]
        return self._texts[version]

    def insist(self, method: str, path: str, **sent: Any) -> Answered:
        """Send a request until an answer comes from a service that is well."""
        end, again = time.monotonic() + _SECONDS, False
        with httpx.Client(base_url=self.service.url, timeout=_SECONDS) as client:
            while True:
                try:
                    response = client.request(method, path, **sent)
                    if response.status_code < 500:
                        return Answered(response.status_code, response.json(), again)
                    told = response.text
                except httpx.TransportError as error:
                    told = repr(error)
                assert time.monotonic() < end, f"no answer in {_SECONDS:g} s: {told}"
                time.sleep(_PAUSE)
                again = True

    # -- points -----------------------------------------------------------------------------------

    def arm(self, point: Point, passes: int) -> None:
        (self._points / point).write_text(str(passes))

    def held(self, point: Point) -> int:
        """Wait for a process to be held at a point; its pid."""
        wait_for(lambda: bool(self._holds(point)), _SECONDS, lambda: self._missed(point))
        return int(self._holds(point)[0].suffix[1:])

    def let_go(self) -> None:
        """Disarm every point, and let whoever is held go on."""
        while files := list(self._points.iterdir()):  # one may just be getting its other name
            for file in files:
                file.unlink(missing_ok=True)

    def _holds(self, point: Point) -> list[Path]:
        return list(self._points.glob(f"{point}.*"))

    def _missed(self, point: Point) -> str:
        return f"nobody came to the point {point!r}\n{self.service.log()[-3000:]}"

    # -- the disk ---------------------------------------------------------------------------------

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No byte more can be written: the tmpfs is filled up.

        Where none could be mounted, the service's processes may not write to files
        (RLIMIT_FSIZE), which they see as EFBIG in the place of ENOSPC.
        """
        if not self.mounted:
            self._limit_files(0)
            try:
                yield
            finally:
                self._limit_files(resource.RLIM_INFINITY)
            return
        ballast = self.data / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(2**16)):
                pass
        try:
            yield
        finally:
            ballast.unlink()

    def _limit_files(self, size: int) -> None:
        api = self.service.pid("api")
        for pid in (api, *descendants(api)):
            with suppress(ProcessLookupError):
                hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def parent_of(pid: int) -> int:
    """The pid of a process's parent."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("PPid:")[2].split()[0])


def is_gone(pid: int) -> bool:
    """Whether all threads of a process have ended, be it that nobody has noticed yet."""
    return not command_line(pid) and len(list(Path(f"/proc/{pid}/task").glob("*"))) <= 1


def wait_at_most(seconds: float, condition: Callable[[], bool]) -> bool:
    """As ``wait_for``, and go on; whether it came to be."""
    end = time.monotonic() + seconds
    while not (came := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return came


def _mount(folder: Path) -> bool:
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", folder]
    try:
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False
