"""What reservations that a contract holds are held to: checked, and indexed, while they come and go."""

from __future__ import annotations

from alembic import op

revision = "20261127_0710"
down_revision: str | None = "20261127_0700"


def upgrade() -> None:
    op.execute("ALTER TABLE reservations VALIDATE CONSTRAINT reservations_bound_check")
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS reservations_bound_idx")  # one that was broken off half-way
        op.execute(
            "CREATE UNIQUE INDEX CONCURRENTLY reservations_bound_idx ON reservations (bound_to, agent_id, asset)"
            " WHERE status = 'open' AND bound_to IS NOT NULL"
        )
