"""Real engine processes for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from registry.artifacts import ArtifactStore


@dataclass
class EngineProcess:
    """``python -m serving`` on a folder of its own."""

    folder: Path
    bases: str
    settings: dict[str, str] = field(default_factory=dict)
    program: tuple[str, ...] = ("-m", "serving")
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "engine.sock"

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.folder / "data" / "artifacts")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self, *arguments: str) -> None:
        """Start it and return at once."""
        environment = {
            **os.environ,
            "ERRATA_BASES": self.bases,
            "ERRATA_DATA": str(self.folder / "data"),
            "ERRATA_ENGINE_THREADS": "1",
            "ERRATA_KV_BYTES": str(2**22),
            **self.settings,
        }
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, "--socket", str(self.socket), *arguments],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def wait_ready(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        inode = self.socket.stat().st_ino if self.socket.exists() else None
        while not self.socket.exists() or self.socket.stat().st_ino == inode:
            if self.process is None or self.process.poll() is not None:
                raise AssertionError(f"the engine ended: {self.log}")
            if time.monotonic() > end:
                raise AssertionError(f"the engine is not ready: {self.log}")
            time.sleep(0.05)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it; its exit status."""
        if self.process is None:
            raise AssertionError("not started")
        self.process.send_signal(number)
        status = self.process.wait(20)
        self.process = None
        return status
