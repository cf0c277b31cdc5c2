"""A second host: a network namespace of its own, joined to this machine by a cable."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self


class SecondHost:
    """A namespace with one end of a virtual cable; ``address`` is this machine's end.

    What runs there reaches nothing but this machine, and nothing at all while the cable is pulled.
    Needs ``ip`` (iproute2) and the right to make namespaces, which not every root has.

    Raises:
        OSError: there is none of the two.
    """

    def __init__(self) -> None:
        # Another of its kind may run beside it.
        first, second = random.SystemRandom().randrange(64, 128), os.getpid() % 256
        self._name = f"errata-{os.getpid()}"
        self._cable = f"er{os.getpid()}"
        self.address = f"100.{first}.{second}.1"
        self._far = f"100.{first}.{second}.2"

    @staticmethod
    def can_be_had() -> bool:
        """Whether this process may make one."""
        try:
            with SecondHost() as host:
                subprocess.run(host.there(["true"]), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return False
        return True

    def __enter__(self) -> Self:
        name, near, far = self._name, self._cable, f"{self._cable}f"
        with ExitStack() as made:
            _ip("netns", "add", name)
            made.callback(_ip, "netns", "delete", name)
            _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
            made.callback(_ip, "link", "delete", near)
            _ip("address", "add", f"{self.address}/24", "dev", near)
            _ip("-n", name, "address", "add", f"{self._far}/24", "dev", far)
            _ip("-n", name, "link", "set", far, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            self.plug()
            self._made = made.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    def there(self, command: Sequence[str]) -> list[str]:
        """The command, run on the second host."""
        return ["ip", "netns", "exec", self._name, *command]

    def pull(self) -> None:
        """Cut the cable: no packet passes, and nobody is told."""
        _ip("link", "set", self._cable, "down")

    def plug(self) -> None:
        _ip("link", "set", self._cable, "up")


def _ip(*words: str) -> None:
    ended = subprocess.run(["ip", *words], capture_output=True, text=True)
    if ended.returncode:
        raise OSError(f"ip {' '.join(words)}: {ended.stderr.strip()}")
