"""The engine's Unix socket: only its owner may open it, and it appears when the engine is ready."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from registry.errors import InvalidRequest

_PATH_BYTES = 107


class SocketFile:
    """A bound socket that ``publish`` puts at ``path``, in place of whatever was left there.

    Raises:
        InvalidRequest: the path is too long for a Unix socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}")
        if len(os.fsencode(self._temporary)) > _PATH_BYTES:
            raise InvalidRequest(
                f"socket path {path} is too long for a Unix socket; set ERRATA_RUNTIME to a short"
                " path"
            )
        self.socket = socket.socket(socket.AF_UNIX)
        self._temporary.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self.socket.bind(str(self._temporary))
        finally:
            os.umask(mask)
        self._inode = self._temporary.stat().st_ino

    def publish(self) -> None:
        """Listen, and be found at the path from now on."""
        self.socket.listen(128)
        self._temporary.replace(self._path)

    def remove(self) -> None:
        """Take the file away, unless another engine has taken the place."""
        for path in (self._temporary, self._path):
            if path.exists() and path.stat().st_ino == self._inode:
                path.unlink()
        self.socket.close()
