"""Events with their sequences, webhook endpoints, deliveries and the log of attempts."""

from __future__ import annotations

from alembic import op

revision = "20261122_0310"
down_revision: str | None = "20261122_0200"

EVENT_SEQUENCES = """
CREATE TABLE event_sequences (
    agent_id TEXT,
    last BIGINT NOT NULL,
    CONSTRAINT event_sequences_last_check CHECK (last > 0),
    CONSTRAINT event_sequences_agent_id_key UNIQUE NULLS NOT DISTINCT (agent_id),
    CONSTRAINT event_sequences_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES agents (id)
);
"""

EVENTS = """
CREATE TABLE events (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    event_id TEXT NOT NULL,
    agent_id TEXT,
    sequence BIGINT NOT NULL,
    type TEXT NOT NULL,
    timestamp TIMESTAMP WITH TIME ZONE NOT NULL,
    data JSONB NOT NULL,
    CONSTRAINT events_pkey PRIMARY KEY (id),
    CONSTRAINT events_event_id_key UNIQUE (event_id),
    CONSTRAINT events_sequence_key UNIQUE NULLS NOT DISTINCT (agent_id, sequence),
    CONSTRAINT events_event_id_check CHECK (event_id ~ '^evt_[0-9a-f]{32}$'),
    CONSTRAINT events_sequence_check CHECK (sequence > 0),
    CONSTRAINT events_type_check CHECK (type ~ '^[a-z_]{1,32}[.][a-z_]{1,32}$'),
    CONSTRAINT events_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES agents (id)
);
CREATE INDEX events_timestamp_idx ON events (agent_id, timestamp);
"""

WEBHOOK_ENDPOINTS = """
CREATE TABLE webhook_endpoints (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    agent_id TEXT,
    url TEXT NOT NULL,
    filters TEXT[] NOT NULL,
    secret TEXT,
    secret_before TEXT,
    secret_before_until TIMESTAMP WITH TIME ZONE,
    status TEXT NOT NULL,
    reason TEXT,
    failing_since TIMESTAMP WITH TIME ZONE,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT webhook_endpoints_pkey PRIMARY KEY (id),
    CONSTRAINT webhook_endpoints_url_check CHECK (length(url) BETWEEN 1 AND 2000),
    CONSTRAINT webhook_endpoints_filters_check CHECK (cardinality(filters) <= 50),
    CONSTRAINT webhook_endpoints_status_check CHECK (status IN ('enabled', 'disabled', 'deleted')),
    CONSTRAINT webhook_endpoints_secret_check CHECK ((status = 'deleted') = (secret IS NULL)),
    CONSTRAINT webhook_endpoints_secret_before_check
        CHECK ((secret_before IS NULL) = (secret_before_until IS NULL)),
    CONSTRAINT webhook_endpoints_reason_check CHECK ((status = 'disabled') = (reason IS NOT NULL)),
    CONSTRAINT webhook_endpoints_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES agents (id)
);
CREATE INDEX webhook_endpoints_agent_id_idx ON webhook_endpoints (agent_id, seq) WHERE status <> 'deleted';
"""

WEBHOOK_DELIVERIES = """
CREATE TABLE webhook_deliveries (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    endpoint_id TEXT NOT NULL,
    event BIGINT NOT NULL,
    state TEXT DEFAULT 'pending' NOT NULL,
    attempts INTEGER DEFAULT 0 NOT NULL,
    slow_retries INTEGER DEFAULT 0 NOT NULL,
    urgent_until TIMESTAMP WITH TIME ZONE,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    next_attempt_at TIMESTAMP WITH TIME ZONE,
    lease_until TIMESTAMP WITH TIME ZONE,
    lease_token TEXT,
    delivered_at TIMESTAMP WITH TIME ZONE,
    last_status INTEGER,
    last_error TEXT,
    CONSTRAINT webhook_deliveries_pkey PRIMARY KEY (id),
    CONSTRAINT webhook_deliveries_endpoint_event_key UNIQUE (endpoint_id, event),
    CONSTRAINT webhook_deliveries_state_check CHECK (state IN ('pending', 'delivered', 'failed')),
    CONSTRAINT webhook_deliveries_attempts_check
        CHECK (attempts >= 0 AND slow_retries >= 0 AND slow_retries <= attempts),
    CONSTRAINT webhook_deliveries_next_attempt_at_check
        CHECK ((state = 'pending') = (next_attempt_at IS NOT NULL)),
    CONSTRAINT webhook_deliveries_delivered_at_check CHECK ((state = 'delivered') = (delivered_at IS NOT NULL)),
    CONSTRAINT webhook_deliveries_lease_check
        CHECK ((lease_until IS NULL) = (lease_token IS NULL) AND (state = 'pending' OR lease_token IS NULL)),
    CONSTRAINT webhook_deliveries_endpoint_id_fkey FOREIGN KEY(endpoint_id) REFERENCES webhook_endpoints (id),
    CONSTRAINT webhook_deliveries_event_fkey FOREIGN KEY(event) REFERENCES events (id)
);
CREATE INDEX webhook_deliveries_due_idx ON webhook_deliveries (next_attempt_at) WHERE state = 'pending';
CREATE INDEX webhook_deliveries_endpoint_id_idx ON webhook_deliveries (endpoint_id, id);
"""

WEBHOOK_ATTEMPTS = """
CREATE TABLE webhook_attempts (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    delivery_id BIGINT NOT NULL,
    at TIMESTAMP WITH TIME ZONE NOT NULL,
    milliseconds INTEGER NOT NULL,
    status INTEGER,
    error TEXT,
    CONSTRAINT webhook_attempts_pkey PRIMARY KEY (id),
    CONSTRAINT webhook_attempts_milliseconds_check CHECK (milliseconds >= 0),
    CONSTRAINT webhook_attempts_outcome_check CHECK (num_nonnulls(status, error) > 0),
    CONSTRAINT webhook_attempts_delivery_id_fkey FOREIGN KEY(delivery_id) REFERENCES webhook_deliveries (id)
);
CREATE INDEX webhook_attempts_delivery_id_idx ON webhook_attempts (delivery_id, id);
"""

APPEND_ONLY = ("events", "webhook_attempts")


def upgrade() -> None:
    for script in (EVENT_SEQUENCES, EVENTS, WEBHOOK_ENDPOINTS, WEBHOOK_DELIVERIES, WEBHOOK_ATTEMPTS):
        for statement in script.split(";\n"):  # the driver prepares each, and a prepared statement is a single one
            if statement.strip():
                op.execute(statement)
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite()"
        )
