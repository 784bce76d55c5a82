"""Delegations are held to what the master can reach, but in a fleet that says otherwise."""

from __future__ import annotations

from alembic import op

revision = "20261127_1100"
down_revision: str | None = "20261127_1000"


def upgrade() -> None:
    op.execute("ALTER TABLE fleets ADD COLUMN over_delegation BOOLEAN NOT NULL DEFAULT false")
    op.execute("ALTER TABLE fleet_members ADD COLUMN capped_drawn NUMERIC")
