"""The revisions of the database's schema: which one it has, which there are, and the way up."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring the schema up, within a transaction that may write."""
    config = _migrations()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def schema_of(connection: Connection) -> str | None:
    """The revision that a database's schema is at; None where it has none."""
    return MigrationContext.configure(connection).get_current_revision()


def newest_schema() -> str:
    """The revision of this program's schema."""
    (head,) = ScriptDirectory.from_config(_migrations()).get_heads()
    return head


def knows_schema(revision: str) -> bool:
    """Whether a revision is this program's or an earlier one."""
    scripts = ScriptDirectory.from_config(_migrations()).walk_revisions()
    return revision in {script.revision for script in scripts}


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
