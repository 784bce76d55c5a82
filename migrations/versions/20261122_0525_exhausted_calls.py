"""What a margin call could not cover, apart from what the house lost on the way, and since when nothing is left."""

from __future__ import annotations

from alembic import op

revision = "20261122_0525"
down_revision: str | None = "20261122_0520"


def upgrade() -> None:
    op.execute("ALTER TABLE margin_calls ADD COLUMN uncovered NUMERIC DEFAULT 0 NOT NULL")
    op.execute("ALTER TABLE margin_calls ADD COLUMN exhausted_at TIMESTAMP WITH TIME ZONE")
    op.execute("ALTER TABLE margin_calls ADD CONSTRAINT margin_calls_uncovered_check CHECK (uncovered >= 0)")
