"""Who may call a service that asks for no key: this machine, and no page of another's."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import error_response
from registry.errors import Forbidden, InvalidRequest
from registry.settings import Settings, is_loopback


class Door:
    """Refuses what a browser may be made to send to this machine by a page from elsewhere.

    Such a page may let a name of its own point here (DNS rebinding), which shows in ``Host``, or
    send a request across origins, which shows in ``Origin``. Where keys are asked for there is no
    door: no page has the key.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._open = settings.needs_keys
        self._named = frozenset(
            name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip()
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None if self._open or scope["type"] != "http" else self._refusal(scope)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Forbidden | InvalidRequest | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_known(f"//{host}"):
            return InvalidRequest(
                f"this service does not answer to the name {host!r}; call it by a name of this"
                " machine, or list that one in ERRATA_ALLOWED_HOSTS",
                code="unknown_host",
            )
        origin = headers.get(b"origin")
        if origin is not None and not self._is_known(origin.decode("latin-1")):
            return Forbidden(
                f"a page from {origin.decode('latin-1')!r} may not call a service that asks for no"
                " key; list its host in ERRATA_ALLOWED_HOSTS, or set ERRATA_REQUIRE_KEYS",
                code="origin_not_allowed",
            )
        return None

    def _is_known(self, url: str) -> bool:
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            return False
        return is_loopback(host) or host in self._named
