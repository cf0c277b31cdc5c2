"""The SQL schema. Every table that holds something of a user carries the tenant."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_N_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

identity = Table(
    "identity",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("created_at", Float, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("created_at", Float, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", String(64), nullable=False),
    Column("name", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
    Index("ix_api_keys_tenant", "tenant", "seq"),
)

versions = Table(
    "versions",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("tenant", String(64), nullable=False),
    Column("id", String(64), nullable=False),
    Column("base", String(64), nullable=False),
    Column("base_digest", String(64), nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("job_id", String(64), unique=True),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("tenant", "id"),
)

reports = Table(
    "reports",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("tenant", String(64), nullable=False),
    Column("version_id", String(64), nullable=False),
    Column("job_id", String(64)),
    Column("body", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    ForeignKeyConstraint(["tenant", "version_id"], ["versions.tenant", "versions.id"]),
    Index("ix_reports_version", "tenant", "version_id"),
)

signatures = Table(
    "signatures",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("tenant", String(64), nullable=False),
    Column("version_id", String(64), nullable=False),
    Column("keyid", String(64), nullable=False),
    Column("sig", String(128), nullable=False),
    Column("created_at", Float, nullable=False),
    ForeignKeyConstraint(["tenant", "version_id"], ["versions.tenant", "versions.id"]),
    Index("ix_signatures_version", "tenant", "version_id"),
)

endpoints = Table(
    "endpoints",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("generation", Integer, nullable=False),
    Column("state", JSON, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
)

moves = Table(
    "moves",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("endpoint", String(64), primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("before", JSON),
    Column("after", JSON),
    Column("origin", Integer, nullable=False),
    Column("previous", Integer),
    Column("job_id", String(64)),
    Column("actor", String(64), nullable=False),
    Column("message", Text),
    Column("created_at", Float, nullable=False),
    ForeignKeyConstraint(["tenant", "endpoint"], ["endpoints.tenant", "endpoints.name"]),
)

jobs = Table(
    "jobs",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("base", String(64), nullable=False),
    Column("endpoint", String(64)),
    Column("parent", String(64)),
    Column("after", String(64)),
    Column("request", JSON, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("done", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("message", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("lease_until", Float),
    Column("dispatched_at", Float),
    Column("claimed_generation", Integer),
    Column("cancel_requested", Boolean, nullable=False),
    Column("pause_requested", Boolean, nullable=False, server_default=false()),
    Column("version_id", String(64)),
    Column("activated", Boolean, nullable=False),
    Column("reason", String(64)),
    Column("metrics", JSON),
    Column("guards", JSON),
    Column("error", JSON),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("finished_at", Float),
    Index("ix_jobs_status", "status"),
    Index("ix_jobs_endpoint", "tenant", "endpoint", "status"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("worker", String(128), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float),
)

events = Table(
    "events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("job_id", String(64), nullable=False),
    Column("type", String(16), nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("ix_events_job", "job_id", "seq"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("job_id", String(64), nullable=False),
    Column("step", Integer, nullable=False),
    Column("state", String(64), nullable=False),
    Column("version_id", String(64)),
    Column("metrics", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("ix_checkpoints_job", "job_id", "step"),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("tenant", String(64), nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("object", String(64), nullable=False),
    Column("before", JSON),
    Column("after", JSON),
    Column("created_at", Float, nullable=False),
    Index("ix_audit_tenant", "tenant", "seq"),
    Index("ix_audit_object", "tenant", "object", "seq"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("body_digest", String(64), nullable=False),
    Column("job_id", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
)

resources = Table(
    "resources",
    metadata,
    Column("base_digest", String(64), primary_key=True),
    Column("source", String(80), primary_key=True),
    Column("name", String(80), primary_key=True),
    Column("artifact", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", String(64), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("content", String(64), nullable=False),
    Column("rows", String(64), nullable=False),
    Column("row_count", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("ix_files_tenant", "tenant", "seq"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", String(64), nullable=False),
    Column("url", Text, nullable=False),
    Column("events", JSON, nullable=False),
    Column("secret", String(80), nullable=False),
    Column("created_at", Float, nullable=False),
    Index("ix_webhooks_tenant", "tenant", "seq"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("tenant", String(64), nullable=False),
    Column("webhook_id", String(64), nullable=False),
    Column("type", String(32), nullable=False),
    Column("payload", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("tries", Integer, nullable=False),
    Column("next_at", Float),
    Column("answered", Integer),
    Column("error", Text),
    Column("created_at", Float, nullable=False),
    Column("ended_at", Float),
    Index("ix_deliveries_webhook", "webhook_id", "seq"),
    Index("ix_deliveries_due", "status", "next_at"),
)

#: What a backup holds, in an order in which it may be filled: all but which registry it was.
CARRIED = tuple(table for table in metadata.sorted_tables if table is not identity)
