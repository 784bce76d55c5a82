"""Priorities of webhook deliveries, the way from endpoint to endpoint among those that wait, a call's own events."""

from __future__ import annotations

from alembic import op

revision = "20261122_0520"
down_revision: str | None = "20261122_0510"

PRIORITY = """
ALTER TABLE webhook_deliveries ADD COLUMN priority SMALLINT DEFAULT 1 NOT NULL,
    ADD CONSTRAINT webhook_deliveries_priority_check CHECK (priority BETWEEN 0 AND 2);
UPDATE webhook_deliveries d SET priority = CASE WHEN v.type = 'webhook.test' THEN 2 ELSE 0 END
    FROM events v
    WHERE v.id = d.event AND d.state = 'pending'
        AND (v.type = 'webhook.test' OR split_part(v.type, '.', 1) IN ('margin_call', 'liquidation'));
CREATE INDEX webhook_deliveries_lanes_idx ON webhook_deliveries (endpoint_id, priority, next_attempt_at)
    WHERE state = 'pending';
"""

CALLS = """
CREATE INDEX events_margin_call_idx ON events ((data ->> 'margin_call_id'), sequence)
    WHERE (data ->> 'margin_call_id') IS NOT NULL;
"""


def upgrade() -> None:
    for statement in (PRIORITY + CALLS).split(";\n"):
        if statement.strip():
            op.execute(statement)
