"""Margin calls, and what was last told of each account."""

from __future__ import annotations

from alembic import op

revision = "20261122_0330"
down_revision: str | None = "20261122_0310"

MARGIN_CALLS = """
CREATE TABLE margin_calls (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    agent_id TEXT NOT NULL,
    state TEXT NOT NULL,
    cause TEXT NOT NULL,
    noticed_at TIMESTAMP WITH TIME ZONE NOT NULL,
    opened_at TIMESTAMP WITH TIME ZONE,
    deadline_at TIMESTAMP WITH TIME ZONE,
    expired_at TIMESTAMP WITH TIME ZONE,
    ended_at TIMESTAMP WITH TIME ZONE,
    acknowledged_at TIMESTAMP WITH TIME ZONE,
    next_action_at TIMESTAMP WITH TIME ZONE,
    reminders INTEGER DEFAULT 0 NOT NULL,
    slices INTEGER DEFAULT 0 NOT NULL,
    deficit NUMERIC NOT NULL,
    figures JSONB NOT NULL,
    CONSTRAINT margin_calls_pkey PRIMARY KEY (id),
    CONSTRAINT margin_calls_state_check
        CHECK (state IN ('noticed', 'open', 'expired', 'liquidating', 'lapsed', 'cured', 'completed')),
    CONSTRAINT margin_calls_cause_check CHECK (cause IN ('utilization', 'maintenance', 'isolated')),
    CONSTRAINT margin_calls_ended_check
        CHECK ((state IN ('lapsed', 'cured', 'completed')) = (ended_at IS NOT NULL)),
    CONSTRAINT margin_calls_opened_check
        CHECK (state IN ('noticed', 'lapsed') OR opened_at IS NOT NULL AND deadline_at IS NOT NULL),
    CONSTRAINT margin_calls_deadline_check CHECK (deadline_at >= opened_at),
    CONSTRAINT margin_calls_deficit_check CHECK (deficit >= 0),
    CONSTRAINT margin_calls_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES accounts (agent_id)
);
CREATE INDEX margin_calls_agent_id_idx ON margin_calls (agent_id, seq);
CREATE INDEX margin_calls_due_idx ON margin_calls (next_action_at)
    WHERE state IN ('noticed', 'open', 'expired', 'liquidating');
CREATE UNIQUE INDEX margin_calls_live_idx ON margin_calls (agent_id)
    WHERE state IN ('noticed', 'open', 'expired', 'liquidating');
"""

WORKERS = """
CREATE TABLE workers (
    id TEXT NOT NULL,
    started_at TIMESTAMP WITH TIME ZONE NOT NULL,
    seen_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT workers_pkey PRIMARY KEY (id)
);
"""

ACCOUNT_WATCH = """
CREATE TABLE account_watch (
    agent_id TEXT NOT NULL,
    zone TEXT NOT NULL,
    alert_level TEXT NOT NULL,
    stale BOOLEAN DEFAULT false NOT NULL,
    peak_equity NUMERIC NOT NULL,
    stopped BOOLEAN DEFAULT false NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT account_watch_pkey PRIMARY KEY (agent_id),
    CONSTRAINT account_watch_zone_check CHECK (zone IN ('GREEN', 'YELLOW', 'ORANGE', 'RED')),
    CONSTRAINT account_watch_alert_level_check
        CHECK (alert_level IN ('OK', 'WARNING', 'DANGER', 'EMERGENCY')),
    CONSTRAINT account_watch_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES accounts (agent_id)
);
"""


def upgrade() -> None:
    for statement in (MARGIN_CALLS + WORKERS + ACCOUNT_WATCH).split(";\n"):
        if statement.strip():
            op.execute(statement)
