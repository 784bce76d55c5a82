"""Which members were made for their fleet, why dry powder is out, since when correlations have drifted."""

from __future__ import annotations

from alembic import op

revision = "20261127_0910"
down_revision: str | None = "20261127_0800"

ADDED = """
ALTER TABLE fleets ADD COLUMN in_emergency BOOLEAN DEFAULT false NOT NULL;
ALTER TABLE fleets ADD COLUMN drifted_at TIMESTAMP WITH TIME ZONE;
ALTER TABLE fleet_members ADD COLUMN made_for_fleet BOOLEAN DEFAULT false NOT NULL;
UPDATE fleet_members m SET made_for_fleet = true FROM agents a WHERE a.id = m.agent_id AND a.created_at = m.invited_at;
INSERT INTO model_parameters VALUES ('fleet_drift', 1, 0.2) ON CONFLICT DO NOTHING
"""


def upgrade() -> None:
    for statement in ADDED.strip().split(";\n"):
        op.execute(statement)
