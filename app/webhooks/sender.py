"""Sends what is to be delivered: in every replica, several at once, each by one of them."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import Counter
from contextlib import suppress
from urllib.parse import urlsplit

import httpcore
import httpx
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from app.webhooks.addresses import Addresses, GuardedBackend, NotReachable
from app.webhooks.signing import signed_headers
from registry import __version__, deliveries
from registry.database import Database
from registry.deliveries import Try
from registry.errors import Unavailable
from registry.settings import Settings
from telemetry.logs import describe

logger = logging.getLogger("errata.webhooks")
POLL_SECONDS = 0.5
AWAY_SECONDS = 1.0
FORGET_SECONDS = 3600.0
#: Deliveries to one webhook at once. There is no other limit: no receiver waits for another's.
EACH = 4
#: How much longer than a try may take its lease is.
LEASE_MARGIN = 20.0


class Sender:
    """Delivers to webhooks for as long as the service runs.

    A connection is made for each try, to an address looked up and checked for it. Redirects are
    not followed, no proxy is asked, no cookie kept, and of an answer nothing but the status read.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._seconds = settings.webhook_seconds
        self._first_pause = settings.webhook_retry_seconds
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=None,
            max_keepalive_connections=0,
            network_backend=GuardedBackend(Addresses.of(settings)),
        )
        self._busy: Counter[str] = Counter()  # tries under way by webhook
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Until it is cancelled; tries that this breaks off are made again elsewhere or later."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forget())
            while True:
                self._ended.clear()
                try:
                    claimed = await run_in_threadpool(self._claim)
                except (Unavailable, SQLAlchemyError) as error:
                    _tell_away(error)
                    await asyncio.sleep(AWAY_SECONDS)
                    continue
                for tried in claimed:
                    self._busy[tried.delivery.webhook_id] += 1
                    group.create_task(self._deliver(tried))
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._ended.wait()

    def _claim(self) -> list[Try]:
        """As many of the due deliveries as their webhooks have room for.

        Where the database goes away midway, those that were claimed until then.
        """
        with self._database.read() as connection:
            due = deliveries.due(connection, each=EACH)
        room = {delivery.webhook_id: EACH for delivery in due}
        claimed: list[Try] = []
        for delivery in due:
            name = delivery.webhook_id
            if room[name] > self._busy[name]:
                room[name] -= 1
                try:
                    with self._database.write() as connection:
                        tried = deliveries.claim(connection, delivery, self._seconds + LEASE_MARGIN)
                except (Unavailable, SQLAlchemyError):
                    if not claimed:
                        raise
                    break
                if tried is not None:
                    claimed.append(tried)
        return claimed

    async def _deliver(self, tried: Try) -> None:
        delivery = tried.delivery
        answered, error = None, None
        try:
            answered = await self._post(tried)
        except TimeoutError:
            error = f"no answer within {self._seconds:g} s"
        except Exception as problem:  # whatever a receiver does must not end the loop
            error = _why(problem)
        try:
            status = await run_in_threadpool(self._settle, tried, answered, error)
        except (Unavailable, SQLAlchemyError) as problem:  # its lease runs out
            _tell_away(problem)
            status = None
        if status == deliveries.GIVEN_UP:
            logger.warning(
                "webhook %s: %s was given up after %d tries (%s)",
                delivery.webhook_id,
                delivery.id,
                delivery.tries,
                "no answer" if answered is None else f"status {answered}",
            )
        self._busy[delivery.webhook_id] -= 1
        self._ended.set()

    async def _post(self, tried: Try) -> int:
        """The status of the answer."""
        payload = tried.delivery.payload.encode()
        headers = {
            "Host": urlsplit(tried.url).netloc,
            "Content-Type": "application/json",
            "User-Agent": f"errata/{__version__}",
            **signed_headers(tried.delivery.id, int(time.time()), payload, tried.secret),
        }
        sent = list(headers.items())
        async with (
            asyncio.timeout(self._seconds),
            self._pool.stream("POST", tried.url, headers=sent, content=payload) as response,
        ):
            status: int = response.status
        return status

    def _settle(self, tried: Try, answered: int | None, error: str | None) -> str | None:
        with self._database.write() as connection:
            return deliveries.settle(
                connection,
                tried,
                answered=answered,
                error=error,
                first_pause=self._first_pause,
            )

    async def _forget(self) -> None:
        while True:
            with suppress(Unavailable, SQLAlchemyError):
                await run_in_threadpool(self._forget_old)
            await asyncio.sleep(FORGET_SECONDS)

    def _forget_old(self) -> None:
        with self._database.write() as connection:
            deliveries.forget(connection, time.time() - deliveries.KEPT_SECONDS)


def _why(problem: Exception) -> str:
    """Why there was no answer that counts: in words of this program and of TLS, none of the
    receiver's."""
    if isinstance(problem, NotReachable):
        return str(problem)
    if isinstance(problem, httpcore.RemoteProtocolError):
        return "the answer is not HTTP"
    cause: BaseException | None = problem
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__context__  # the pool takes away what is named as the cause
    kind = type(problem).__name__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{kind}: {cause.reason}: {cause.verify_message}"
    return kind if cause is None else f"{kind}: {cause.reason}"


def _tell_away(error: Exception) -> None:
    logger.warning("webhooks: the database does not answer: %s", describe(error.__cause__ or error))
