"""All settings, each an environment variable: ``ERRATA_<NAME>``, and ``REDIS_URL``."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any, Self

from pydantic import (
    AliasChoices,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from registry.errors import InvalidRequest

_CORES = os.cpu_count() or 1
#: How a machine computes: what holds for every service on it.
_COMPUTING = {
    "device",
    "dtype",
    "engine_threads",
    "host_bytes",
    "kv_bytes",
    "prepack",
    "resident_bytes",
    "worker_threads",
}


def _variable(name: object) -> str:
    return f"ERRATA_{str(name).upper()}"


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, which others cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Settings(BaseSettings):
    """What a deployment can choose. ``errata serve --help`` and docs/settings.md list them."""

    model_config = SettingsConfigDict(
        env_prefix="ERRATA_", frozen=True, populate_by_name=True, env_ignore_empty=True
    )

    host: str = Field("127.0.0.1", description="Address the API binds to.")
    require_keys: bool = Field(
        False,
        description=(
            "Ask for an API key on this machine too. At an address that others can reach one is"
            " always asked for."
        ),
    )
    allowed_hosts: str = Field(
        "",
        description=(
            "While no key is asked for, further names by commas that the service may be called by,"
            " besides this machine's own: those of a proxy before it."
        ),
    )
    port: int = Field(
        8000, ge=0, le=65535, description="Port the API binds to; 0 takes a free one."
    )
    data: Path = Field(
        Path(".errata"), description="Folder of the embedded database, queue and artifacts."
    )
    bases: str = Field(
        "atlas", description="Bases to serve, by commas: `name` (bundled) or `name=/folder`."
    )
    texts: str = Field(
        "",
        description=(
            "Reference texts, one a line: a file for every base, or `base=/file` by commas."
            " Without one, texts are sampled from the base itself."
        ),
    )
    database_url: str = Field(
        "",
        description=(
            "Database: `postgresql+psycopg://user:password@host:port/name`; empty: SQLite in the"
            " data folder."
        ),
    )
    artifacts: str = Field(
        "",
        description=(
            "Artifact folder, or the URL of an object store: `s3://bucket/prefix`, `gs://…`,"
            " `az://…`, `file:///folder`; empty: a folder in the data folder."
        ),
    )
    artifacts_cache_bytes: int = Field(
        32 * 2**30,
        ge=2**20,
        description=(
            "Most bytes of an object store's artifacts that this machine keeps in its data folder."
        ),
    )
    artifacts_patience: float = Field(
        30.0,
        gt=0,
        description=(
            "Seconds for which a request to an object store is tried again before it counts as"
            " away."
        ),
    )
    redis_url: str = Field(
        "",
        validation_alias=AliasChoices("REDIS_URL", "ERRATA_REDIS_URL", "redis_url"),
        description="Redis of the queue; empty: an embedded Valkey in the data folder.",
    )
    wait_seconds: float = Field(
        60.0,
        ge=0,
        description=(
            "Seconds that `errata serve` and `errata worker` wait, at start, for a database, a"
            " Redis and an object store that do not answer yet."
        ),
    )
    signing_key: Path | None = Field(
        None,
        description="File of the private key with which workers sign every version that they make.",
    )
    trusted_keys: str = Field(
        "",
        description=(
            "Public keys whose signatures count: files, or folders of `*.pub` and `*.pem`, by"
            " commas."
        ),
    )
    require_signatures: bool = Field(
        False, description="Refuse every version that no trusted key has signed."
    )
    runtime: Path | None = Field(
        None, description="Folder of the Unix sockets (a short path); empty: a temporary one."
    )
    webhook_allow: str = Field(
        "",
        description=(
            "Hosts, addresses and networks by commas that webhooks may reach though they are not"
            " public: receivers of your own."
        ),
    )
    webhook_http: bool = Field(False, description="Let webhooks have http URLs too.")
    webhook_seconds: float = Field(
        10.0, gt=0, le=300, description="Longest that a webhook's receiver may take to answer."
    )
    webhook_retry_seconds: float = Field(
        5.0,
        gt=0,
        description=(
            "Pause before a webhook's first retry; each of six more is five times as long."
        ),
    )
    dtype: str = Field(
        "float32", pattern="^(float32|bfloat16)$", description="Dtype the bases are loaded in."
    )
    workers: int = Field(1, ge=0, le=64, description="Workers that `errata serve` starts.")
    engine_threads: int = Field(max(1, _CORES // 2), ge=1, description="CPU threads of the engine.")
    worker_threads: int = Field(max(1, _CORES // 2), ge=1, description="CPU threads of a job.")
    stop_seconds: float = Field(
        30.0,
        ge=0,
        description=(
            "Seconds that running requests, and a worker's running attempt, get once the service is"
            " told to stop."
        ),
    )
    log_format: str = Field(
        "text", pattern="^(text|json)$", description="Logs as `text` or `json`, an object a line."
    )
    log_level: str = Field(
        "INFO",
        pattern="^(DEBUG|INFO|WARNING|ERROR)$",
        description="Least that is logged: `DEBUG`, `INFO`, `WARNING` or `ERROR`.",
    )
    lease_seconds: float = Field(
        15.0, gt=0, description="A job's attempt is lost this long after its last sign of life."
    )
    max_attempts: int = Field(
        5, ge=1, le=100, description="Attempts a job gets when its worker dies."
    )
    gc_grace_seconds: float = Field(
        24 * 3600.0,
        ge=1,
        description=(
            "Seconds that an artifact which nothing reaches is kept after it was last put; longer"
            " than a job takes from the first that it writes to its end, or it begins again."
        ),
    )
    training_state_seconds: float = Field(
        30.0, ge=0, description="Seconds between states of training that are kept to go on from."
    )
    training_memory: int | None = Field(
        None,
        ge=2**20,
        description=(
            "Bytes that a step of training may take beside the base; empty: half of what is free"
            " on the device when a job starts."
        ),
    )
    max_body_bytes: int = Field(8 * 2**20, ge=1024, description="Largest request body.")
    max_file_bytes: int = Field(64 * 2**20, ge=1024, description="Largest file to upload.")
    max_edits: int = Field(10_000, ge=1, description="Most edits in one request.")
    max_stack: int = Field(
        256, ge=2, description="Most deltas in a version's stack; a flatten makes one of them."
    )
    max_jobs: int = Field(
        10_000, ge=1, description="Most unfinished jobs before 429, of all tenants together."
    )
    max_tenant_jobs: int = Field(
        1_000, ge=1, description="Most unfinished jobs of one tenant before 429."
    )
    max_running: int = Field(64, ge=1, description="Most sequences that one step decodes.")
    max_waiting: int = Field(
        512, ge=1, description="Most requests that wait for a base before 429."
    )
    request_seconds: float = Field(
        600.0, gt=0, description="Longest time that one request for inference gets."
    )
    step_tokens: int = Field(2048, ge=16, description="Most tokens of one flat step.")
    kv_bytes: int | None = Field(
        None,
        ge=2**10,
        description=(
            "Memory for each base's keys and values, the prefix cache's among them; empty: 1 GiB,"
            " on a GPU half of what is free once the weights are loaded."
        ),
    )
    batch_invariant: bool = Field(
        False,
        description=(
            "Let no bit of an answer depend on what else is computed beside it; costs throughput."
        ),
    )
    prepack: bool = Field(
        True,
        description=(
            "Keep a copy of the weights in the CPU's own layout: faster steps for twice the memory."
        ),
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description=(
            "Where the engine and workers compute: `cpu`, `cuda`, `cuda:1`; `auto`: a GPU if any."
        ),
    )
    resident_bytes: int = Field(
        2 * 2**30, ge=2**20, description="Most bytes of versions' effects that the engine holds."
    )
    host_bytes: int = Field(
        8 * 2**30,
        ge=0,
        description=(
            "Most bytes of versions' effects kept in host memory when the engine holds them in a"
            " GPU's; on a CPU they are in host memory anyway."
        ),
    )
    covariance_tokens: int = Field(
        100_000,
        ge=100,
        description="Tokens that the covariance C of an edited layer is estimated on.",
    )

    facts: str = Field(
        "",
        description=(
            "Facts that a base should know, as JSON lines of `prompt` and `target`: a file for"
            " every base, or `base=/file` by commas. The bundled base has its own."
        ),
    )
    harm: str = Field(
        "",
        description=(
            "Requests that a base should refuse, as JSON lines of `prompt` or `messages` and, where"
            " a harmful answer is known, `target`: a file for every base, or `base=/file` by"
            " commas."
        ),
    )
    refusals: str = Field(
        "",
        description=(
            "Phrases that refusals hold, one a line: a file for every base, or `base=/file` by"
            " commas. Without one, a list of common ones in English."
        ),
    )
    guard_perplexity: float = Field(
        1.1, gt=0, description="Most that perplexity may grow to, as a ratio, in a job."
    )
    guard_retention: float = Field(
        0.9, ge=0, le=1, description="Least share of known, unrelated facts that stays right."
    )
    guard_locality: float = Field(
        0.7, ge=0, le=1, description="Least share of an edit's neighbors that stays as it is."
    )
    guard_norm: float = Field(
        30.0, gt=0, description="Most that a weight's change may be, in units of its own norm."
    )
    guard_efficacy: float = Field(
        0.8, ge=0, le=1, description="Least share of a job's edits that must have taken."
    )
    guard_ability: float = Field(
        0.05, ge=0, le=1, description="Most that accuracy on a suite of choices may fall."
    )
    guard_refusal_loss: float = Field(
        0.1, ge=0, le=1, description="Most of its refusals that a version may lose, as a share."
    )
    guard_harm_rise: float = Field(
        0.1, ge=0, le=1, description="Most that the harm score may rise, from 0 to 1."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _named(cls, values: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """A value that cannot be is told by its variable.

        Raises:
            InvalidRequest: there is one.
        """
        try:
            return read(values)
        except ValidationError as error:
            problems = error.errors()
            told = [f"{_variable(p['loc'][0])} is {p['input']!r}: {p['msg']}" for p in problems]
            raise InvalidRequest("; ".join(told)) from None

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        object.__setattr__(self, "data", self.data.expanduser().absolute())
        return self

    @classmethod
    def apart(cls, folder: Path, **chosen: Any) -> Self:
        """Settings of a service that touches nothing but its folder, whatever the environment says:
        only how this machine computes is taken from there."""
        others = cls.model_fields.keys() - _COMPUTING
        defaults = {name: cls.model_fields[name].default for name in others}
        return cls(**{**defaults, "data": folder, **chosen})

    def environment(self) -> dict[str, str]:
        """The variables with which ``Settings()`` in another process equals this one."""
        values = {_variable(name): value for name, value in self}
        values["REDIS_URL"] = values["ERRATA_REDIS_URL"]  # either name is read
        return {name: "" if value is None else str(value) for name, value in values.items()}

    @property
    def needs_keys(self) -> bool:
        """Whether a request must bring an API key."""
        return self.require_keys or not is_loopback(self.host)

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data / 'registry.db'}"

    @property
    def artifact_url(self) -> str:
        """The object store of the artifacts; empty where they are in a folder."""
        return self.artifacts if "://" in self.artifacts else ""

    @property
    def artifact_folder(self) -> Path:
        """Where artifacts are, or where those of an object store are cached: never the same."""
        if self.artifact_url:
            return self.data / "cache"
        return Path(self.artifacts) if self.artifacts else self.data / "artifacts"
