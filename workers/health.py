"""Whether a worker of this machine lives, for those who restart one that does not."""

from __future__ import annotations

import logging
import socket

from redis.exceptions import RedisError
from rq.worker_registration import get_keys

from registry.errors import Unavailable
from registry.settings import Settings
from workers.connection import connect

logger = logging.getLogger("errata.worker")
PATIENCE = 3.0


def check(settings: Settings) -> None:
    """See that Redis has heard of a worker of this host lately: it forgets one that does not beat.

    While Redis does not answer nothing is known of the worker, which waits for it too and is not to
    be restarted for that.

    Raises:
        Unavailable: Redis answers and knows none.
    """
    host = socket.gethostname()
    client = connect(settings.redis_url, patience=0, timeout=PATIENCE)
    try:
        names = [client.hget(key, "hostname") for key in get_keys(connection=client)]
    except RedisError as error:
        logger.warning("nothing is known: the queue at REDIS_URL does not answer: %s", error)
        return
    finally:
        client.close()
    if host.encode() not in names:
        raise Unavailable(f"no worker of {host!r} is known at REDIS_URL; see its log, restart it")
