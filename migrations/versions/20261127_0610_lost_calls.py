"""An index of the margin calls that lost money, built while calls go on."""

from __future__ import annotations

from alembic import op

revision = "20261127_0610"
down_revision: str | None = "20261127_0600"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS margin_calls_lost_idx")  # one that was broken off half-way
        op.execute(
            "CREATE INDEX CONCURRENTLY margin_calls_lost_idx ON margin_calls (deficit, uncovered)"
            " WHERE deficit + uncovered > 0"
        )
