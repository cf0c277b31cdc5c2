"""Failures that pass: of what was away for a moment, or had no room left."""

from __future__ import annotations

import errno

from registry.errors import Unavailable, VersionUnavailable

#: Of files: no room, too much open at once, a file system that does not answer.
_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EMFILE,
        errno.ENFILE,
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    }
)


def passes(error: BaseException) -> bool:
    """Whether the same may succeed in a moment, without anybody's doing."""
    if isinstance(error, OSError):
        return error.errno in _ERRNOS or isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, Unavailable) and not isinstance(error, VersionUnavailable)


def reason(error: BaseException) -> str:
    """What was away, as a log or a job tells it."""
    detail = error.__cause__ if isinstance(error, Unavailable) and error.__cause__ else error
    return (str(detail).strip().splitlines() or [type(detail).__name__])[0]
