"""What is watched of fleets: members that were made for them, emergencies, drift; and a view to read by."""

from __future__ import annotations

from alembic import op

revision = "20261127_0910"
down_revision: str | None = "20261127_0900"

ADDED = """
ALTER TABLE fleets ADD COLUMN in_emergency BOOLEAN DEFAULT false NOT NULL;
ALTER TABLE fleets ADD COLUMN drifted_at TIMESTAMP WITH TIME ZONE;
ALTER TABLE fleet_members ADD COLUMN made_for_fleet BOOLEAN DEFAULT false NOT NULL;
UPDATE fleet_members m SET made_for_fleet = true FROM agents a WHERE a.id = m.agent_id AND a.created_at = m.invited_at;
INSERT INTO model_parameters VALUES ('fleet_drift', 1, 0.2) ON CONFLICT DO NOTHING
"""

VIEW = """
CREATE VIEW operator_fleets AS
SELECT f.id AS fleet_id, f.name, f.zone, f.drawn, f.dry_powder, f.released_at, f.release_reason, f.drifted_at,
       f.created_at, f.master_id, f.drawn + (
           SELECT coalesce(sum(CASE WHEN b.bucket IN ('owed', 'borrowed') THEN -b.amount ELSE b.amount END), 0)
           FROM balances b WHERE b.agent_id = f.master_id AND b.asset = 'USDC') AS balance,
       m.members, m.reduce_only, m.invited, m.delegated
FROM fleets f CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE joined_at IS NOT NULL) AS members,
           count(*) FILTER (WHERE reduce_only) AS reduce_only,
           count(*) FILTER (WHERE joined_at IS NULL) AS invited,
           coalesce(sum(max_margin) FILTER (WHERE joined_at IS NOT NULL), 0) AS delegated
    FROM fleet_members WHERE fleet_id = f.id) AS m
"""


def upgrade() -> None:
    for statement in ADDED.strip().split(";\n"):
        op.execute(statement)
    op.execute(VIEW)
