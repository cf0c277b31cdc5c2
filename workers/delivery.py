"""Putting attempts on the queue and asking for them; what may be read back from it.

One attempt of a job is one RQ job with the id ``<job id>-<attempt>``. Redis is not trusted: a
record read from it is taken only if it calls the one allowed function with a job id and an attempt,
and of its other fields only times and states are believed (no callbacks, webhooks, dependents).
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from typing import Any, ClassVar, cast

import redis
from redis.exceptions import ResponseError
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.timeouts import BaseDeathPenalty
from rq.worker_registration import get_keys

log = logging.getLogger(__name__)

QUEUE = "errata"
TARGET = "workers.run.run"
WAITING = f"rq:queue:{QUEUE}"
HANDED_OVER = f"{WAITING}:intermediate"
STARTED = f"rq:wip:{QUEUE}"
#: What begins the key of an execution: it expires by Redis's own clock, so that machines whose
#: clocks differ agree on what has no heartbeat any more. The times in STARTED are their worker's.
EXECUTION = "rq:execution:"
STOP_FIELD = "stop_requested"

_FAILURE_TTL = 60
_LARGEST_CALL = 4096  # bytes of a record's function and arguments, far more than they need
_RECORD_ID = re.compile(r"([A-Za-z0-9_-]{1,200})-(0|[1-9][0-9]{0,8})", re.ASCII)
_FIELDS = (
    b"data",
    b"status",
    b"created_at",
    b"enqueued_at",
    b"started_at",
    b"ended_at",
    b"last_heartbeat",
    b"worker_name",
)


class JobRefused(NoSuchJobError):
    """A record in Redis is not one that this service wrote; it must not run."""


class NoDeathPenalty(BaseDeathPenalty):
    """RQ's job timeout, switched off: a job's lease in the registry limits it."""

    def setup_death_penalty(self) -> None:
        """Sets no alarm."""

    def cancel_death_penalty(self) -> None:
        """Has none to cancel."""


class AttemptRecord(Job):
    """An RQ job that can only be one attempt of a registry's job."""

    target: ClassVar[str] = TARGET

    @classmethod
    def fetch(
        cls, id: str, connection: redis.Redis | None = None, serializer: Any = None
    ) -> AttemptRecord:
        """Reads a record; raises JobRefused, a NoSuchJobError, for a forged one."""
        if not _RECORD_ID.fullmatch(id):
            raise JobRefused(f"{id!r} is not the id of an attempt")
        try:
            record = super().fetch(id, connection=connection, serializer=serializer)
        except ResponseError as error:  # the key holds something else than a record
            raise JobRefused(f"{id}: {error}") from error
        return cast(AttemptRecord, record)

    def restore(self, raw_data: dict[bytes, bytes]) -> None:
        """Takes over the believed fields of a record, once its call is the allowed one."""
        fields = {name: raw_data[name] for name in _FIELDS if name in raw_data}
        call = self._allowed_call(fields.get(b"data", b""))
        fields[b"data"] = call
        try:
            super().restore(fields)
        except (ValueError, TypeError, KeyError) as error:
            raise JobRefused(f"{self.id}: a field is malformed: {error}") from error
        self.origin = QUEUE
        self.description = self.id
        self.timeout = -1
        self.result_ttl = 0
        self.failure_ttl = _FAILURE_TTL

    def _allowed_call(self, packed: bytes) -> bytes:
        """The JSON of ``[target, null, [job id, attempt], {}]``, or JobRefused."""
        try:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(packed, _LARGEST_CALL)
        except zlib.error:
            data = packed[:_LARGEST_CALL]
        try:
            call = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise JobRefused(f"{self.id}: its call is not JSON") from error
        allowed: list[Any] = [self.target, None, list(attempt_of(self.id)), {}]
        if call != allowed:
            raise JobRefused(f"{self.id}: {str(call)[:200]} is not a call of {self.target}")
        return json.dumps(allowed).encode()


def record_class(target: str) -> type[AttemptRecord]:
    """The record class whose one allowed function is ``target`` (dotted)."""
    return type("AttemptRecord", (AttemptRecord,), {"target": target})


def record_id(job_id: str, attempt: int) -> str:
    """The RQ id of an attempt; JobRefused if the two cannot be read back from it."""
    identifier = f"{job_id}-{attempt}"
    if attempt_of(identifier) != (job_id, attempt):
        raise JobRefused(f"{identifier!r} is not the id of attempt {attempt} of {job_id!r}")
    return identifier


def attempt_of(identifier: str) -> tuple[str, int]:
    """The job id and the attempt that an RQ id names; JobRefused if it names none."""
    match = _RECORD_ID.fullmatch(identifier)
    if match is None:
        raise JobRefused(f"{identifier!r} is not the id of an attempt")
    return match[1], int(match[2])


def believed(
    connection: redis.Redis, raw: Any, records: type[AttemptRecord]
) -> AttemptRecord | None:
    """The record of an id that was taken off the queue.

    None if there is none or it is forged: both are logged and removed, and nothing is imported.
    """
    try:
        return records.fetch(raw.decode("ascii"), connection, JSONSerializer)
    except (UnicodeDecodeError, JobRefused) as error:
        log.error("refused and removed from the queue %s: %r: %s", QUEUE, raw[:100], error)
        connection.delete(Job.redis_job_namespace_prefix.encode() + raw)
    except NoSuchJobError:
        log.warning("%r is on the queue %s without a record: dropped", raw, QUEUE)
    connection.lrem(HANDED_OVER, 0, raw)
    return None


def queue_of(connection: redis.Redis, records: type[AttemptRecord] = AttemptRecord) -> Queue:
    """The RQ queue as this service uses it: JSON, no time limit."""
    return Queue(
        QUEUE,
        connection=connection,
        default_timeout=-1,
        job_class=records,
        serializer=JSONSerializer,
        death_penalty_class=NoDeathPenalty,
    )


# KEYS: waiting, handed over, started, record; ARGV: id
_KNOWN = f"""
local function known()
    if redis.call('LPOS', KEYS[1], ARGV[1]) or redis.call('LPOS', KEYS[2], ARGV[1]) then
        return redis.call('EXISTS', KEYS[4]) == 1
    end
    local prefix = ARGV[1] .. ':'
    for _, member in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
        if string.sub(member, 1, #prefix) == prefix
            and redis.call('EXISTS', '{EXECUTION}' .. member) == 1 then return true end
    end
    return false
end
"""
_IS_KNOWN = _KNOWN + "return known() and 1 or 0"
# KEYS[5]: the set of queues; ARGV[2…]: the record's fields and values
_ENQUEUE = (
    _KNOWN
    + """
if known() then return 0 end
redis.call('LREM', KEYS[1], 0, ARGV[1])
redis.call('LREM', KEYS[2], 0, ARGV[1])
redis.call('DEL', KEYS[4])
redis.call('HSET', KEYS[4], unpack(ARGV, 2))
redis.call('SADD', KEYS[5], KEYS[1])
redis.call('RPUSH', KEYS[1], ARGV[1])
return 1
"""
)
# KEYS: waiting, handed over, started, record, execution, the record's executions; ARGV: id, member
_FORGET = """
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('DEL', KEYS[5], KEYS[6])
redis.call('LREM', KEYS[2], 0, ARGV[1])
if not redis.call('LPOS', KEYS[1], ARGV[1]) then redis.call('DEL', KEYS[4]) end
return 1
"""
# KEYS: started
_TAKE_LOST = f"""
local lost = {{}}
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    if redis.call('EXISTS', '{EXECUTION}' .. member) == 0 then
        redis.call('ZREM', KEYS[1], member)
        table.insert(lost, member)
    end
end
return lost
"""
_PUT_BACK = """
redis.call('ZREM', KEYS[3], ARGV[2])
redis.call('DEL', KEYS[5], KEYS[6])
if redis.call('LREM', KEYS[2], 0, ARGV[1]) == 0 then return 0 end
if redis.call('EXISTS', KEYS[4]) == 0 then return 0 end
redis.call('HSET', KEYS[4], 'status', 'queued')
redis.call('LPUSH', KEYS[1], ARGV[1])
return 1
"""
_STOP = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], '1')
return 1
"""


def enqueue(connection: redis.Redis, job_id: str, attempt: int, *, target: str = TARGET) -> bool:
    """Puts one attempt on the queue, once: again only after it has ended or was lost.

    Returns:
        Whether it was put there now; False: it is queued or started already.
    """
    identifier = record_id(job_id, attempt)
    record = record_class(target).create(
        target,
        args=[job_id, attempt],
        id=identifier,
        connection=connection,
        origin=QUEUE,
        timeout=-1,
        result_ttl=0,
        failure_ttl=_FAILURE_TTL,
        serializer=JSONSerializer,
        status=JobStatus.QUEUED,
        description=identifier,
    )
    fields = [part for pair in record.to_dict().items() for part in pair]
    keys = [WAITING, HANDED_OVER, STARTED, record.key, Queue.redis_queues_keys]
    answer: Any = connection.eval(_ENQUEUE, len(keys), *keys, identifier, *fields)
    return bool(answer)


def is_known(connection: redis.Redis, job_id: str, attempt: int) -> bool:
    """Whether an attempt waits, is being handed to a worker, or runs under a live heartbeat."""
    identifier = record_id(job_id, attempt)
    keys = [WAITING, HANDED_OVER, STARTED, Job.key_for(identifier)]
    answer: Any = connection.eval(_IS_KNOWN, len(keys), *keys, identifier)
    return bool(answer)


def stop(connection: redis.Redis, job_id: str, attempt: int) -> bool:
    """Asks the worker that runs an attempt to kill it; within half a second ``on_lost`` follows.

    Returns:
        Whether the attempt was on the queue or running.
    """
    key = Job.key_for(record_id(job_id, attempt))
    answer: Any = connection.eval(_STOP, 1, key, STOP_FIELD)
    return bool(answer)


def forget(connection: redis.Redis, identifier: str, execution: str = "") -> None:
    """Removes an ended or lost execution of an attempt, and its record unless it waits again."""
    _finish(connection, _FORGET, identifier, execution)


def take_lost(connection: redis.Redis) -> list[bytes]:
    """Executions without a heartbeat, as STARTED names them; whoever is told of one has it for
    itself."""
    lost: Any = connection.eval(_TAKE_LOST, 1, STARTED)
    return list(lost)


def put_back(connection: redis.Redis, identifier: str, execution: str = "") -> bool:
    """Puts an attempt that was handed over, but never started, at the queue's head again."""
    return bool(_finish(connection, _PUT_BACK, identifier, execution))


def _finish(connection: redis.Redis, script: str, identifier: str, execution: str) -> Any:
    keys = [
        WAITING,
        HANDED_OVER,
        STARTED,
        Job.key_for(identifier),
        f"{EXECUTION}{identifier}:{execution}",
        f"rq:executions:{identifier}",
    ]
    return connection.eval(script, len(keys), *keys, identifier, f"{identifier}:{execution}")


def workers_ready(connection: redis.Redis) -> int:
    """How many registered workers are idle, with a work-horse ready or soon, or busy."""
    keys = get_keys(connection=connection)
    states: list[Any] = [connection.hget(key, "state") for key in keys]
    return sum(state in (b"idle", b"busy") for state in states)
