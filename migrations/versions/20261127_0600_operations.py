"""What operators are shown: figures of the service and of each worker, and two views to read them by."""

from __future__ import annotations

from alembic import op

revision = "20261127_0600"
down_revision: str | None = "20261127_0500"

TABLES = """
ALTER TABLE workers ADD COLUMN figures JSONB;
CREATE TABLE service_figures (
    name TEXT NOT NULL,
    taken_at TIMESTAMP WITH TIME ZONE NOT NULL,
    seconds DOUBLE PRECISION NOT NULL,
    figures JSONB NOT NULL,
    PRIMARY KEY (name),
    CONSTRAINT service_figures_seconds_check CHECK (seconds >= 0)
);
"""

CALLS = """
CREATE VIEW operator_calls AS
SELECT c.id AS margin_call_id, c.agent_id, a.name, c.state, c.cause, c.noticed_at, c.opened_at, c.deadline_at,
       c.acknowledged_at, c.slices, c.deficit + c.uncovered AS deficit,
       (c.figures ->> 'utilization')::float8 AS utilization, (c.figures ->> 'equity')::float8 AS equity,
       (c.figures ->> 'shortfall')::float8 AS shortfall
FROM margin_calls c JOIN agents a ON a.id = c.agent_id
WHERE c.state IN ('noticed', 'open', 'expired', 'liquidating')
"""

ACCOUNTS = """
CREATE VIEW operator_accounts AS
SELECT worst.agent_id, a.name, worst.margin_ratio, worst.utilization, worst.equity,
       coalesce(told.zone, 'GREEN') AS zone, coalesce(told.alert_level, 'OK') AS alert_level,
       coalesce(told.stale, false) AS stale, c.state AS margin_call, c.deadline_at, w.seen_at
FROM workers w
CROSS JOIN LATERAL jsonb_to_recordset(w.figures -> 'worst')
    AS worst (agent_id text, margin_ratio float8, utilization float8, equity float8)
JOIN agents a ON a.id = worst.agent_id
LEFT JOIN account_watch told ON told.agent_id = worst.agent_id
LEFT JOIN margin_calls c
    ON c.agent_id = worst.agent_id AND c.state IN ('noticed', 'open', 'expired', 'liquidating')
WHERE w.seen_at > now() - interval '3 s'
"""


def upgrade() -> None:
    for statement in (*TABLES.split(";\n"), CALLS, ACCOUNTS):
        if statement.strip():
            op.execute(statement)
