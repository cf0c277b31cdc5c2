"""Sizes of files and limits of keys that 32 bits do not hold"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

COLUMNS = (
    ("files", "size", False),
    ("api_keys", "requests_per_minute", True),
    ("api_keys", "tokens_per_minute", True),
)


def change(before: sa.types.TypeEngine[int], after: sa.types.TypeEngine[int]) -> None:
    for table, column, nullable in COLUMNS:
        with op.batch_alter_table(table, schema=None) as batch_op:
            batch_op.alter_column(
                column, existing_type=before, type_=after, existing_nullable=nullable
            )


def upgrade() -> None:
    change(sa.Integer(), sa.BigInteger())


def downgrade() -> None:
    change(sa.BigInteger(), sa.Integer())
