"""Margin calls of fleets, and of members that are liquidated by them."""

from __future__ import annotations

from alembic import op

revision = "20261127_0900"
down_revision: str | None = "20261127_0800"

CAUSES = "cause IN ('utilization', 'maintenance', 'isolated', 'fleet')"


def upgrade() -> None:
    op.execute("ALTER TABLE margin_calls ADD COLUMN IF NOT EXISTS fleet_call_id TEXT")
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS margin_calls_fleet_call_idx")  # one that was broken off half-way
        op.execute(
            "CREATE INDEX CONCURRENTLY margin_calls_fleet_call_idx ON margin_calls (fleet_call_id)"
            " WHERE fleet_call_id IS NOT NULL"
        )
    # after what commits: they are made together with the revision, or not
    op.execute("ALTER TABLE margin_calls DROP CONSTRAINT margin_calls_cause_check")
    op.execute(f"ALTER TABLE margin_calls ADD CONSTRAINT margin_calls_cause_check CHECK ({CAUSES})")
    op.execute(
        "ALTER TABLE margin_calls ADD CONSTRAINT margin_calls_fleet_call_id_fkey"
        " FOREIGN KEY (fleet_call_id) REFERENCES margin_calls (id) NOT VALID"
    )
    op.execute("ALTER TABLE margin_calls VALIDATE CONSTRAINT margin_calls_fleet_call_id_fkey")
