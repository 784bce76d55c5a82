"""The tables of events and webhooks; see `tables` for how all of them are written.

An event and its deliveries are rows of the transaction that made the event true: there is no queue beside Postgres.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from app.db.columns import moment
from app.db.tables import append_only, metadata


def _owner() -> Column[str]:
    """Return whose it is: null for what concerns the service itself and no agent."""
    return Column("agent_id", Text, ForeignKey("agents.id"))


# The last number given to an event of each agent. Its row lock makes numbers gapless, and follow commits.
event_sequences = Table(
    "event_sequences",
    metadata,
    _owner(),
    Column("last", BigInteger, nullable=False),
    CheckConstraint("last > 0", name="last"),
    UniqueConstraint("agent_id", name="event_sequences_agent_id_key", postgresql_nulls_not_distinct=True),
    info={"owner": "events"},
)

# What has happened, once and for all. `data` is the whole object that a webhook carries.
events = Table(
    "events",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("event_id", Text, nullable=False),
    _owner(),
    Column("sequence", BigInteger, nullable=False),
    Column("type", Text, nullable=False),
    moment("timestamp"),
    Column("data", JSONB, nullable=False),
    UniqueConstraint("event_id", name="events_event_id_key"),
    UniqueConstraint("agent_id", "sequence", name="events_sequence_key", postgresql_nulls_not_distinct=True),
    CheckConstraint("event_id ~ '^evt_[0-9a-f]{32}$'", name="event_id"),
    CheckConstraint("sequence > 0", name="sequence"),
    CheckConstraint("type ~ '^[a-z_]{1,32}[.][a-z_]{1,32}$'", name="type"),
    Index("events_timestamp_idx", "agent_id", "timestamp"),
    Index(
        "events_margin_call_idx",
        text("(data ->> 'margin_call_id')"),
        "sequence",
        postgresql_where=text("(data ->> 'margin_call_id') IS NOT NULL"),
    ),
    info={"owner": "events"},
)

# Secrets are stored as they are: a signature is made with the secret itself, so that a hash would not do.
webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    _owner(),
    Column("url", Text, nullable=False),
    Column("filters", ARRAY(Text), nullable=False),  # none: every type
    Column("secret", Text),
    Column("secret_before", Text),
    moment("secret_before_until", nullable=True),
    Column("status", Text, nullable=False),
    Column("reason", Text),
    moment("failing_since", nullable=True),
    moment("created_at"),
    CheckConstraint("length(url) BETWEEN 1 AND 2000", name="url"),
    CheckConstraint("cardinality(filters) <= 50", name="filters"),
    CheckConstraint("status IN ('enabled', 'disabled', 'deleted')", name="status"),
    CheckConstraint("(status = 'deleted') = (secret IS NULL)", name="secret"),
    CheckConstraint("(secret_before IS NULL) = (secret_before_until IS NULL)", name="secret_before"),
    CheckConstraint("(status = 'disabled') = (reason IS NOT NULL)", name="reason"),
    Index("webhook_endpoints_agent_id_idx", "agent_id", "seq", postgresql_where=text("status <> 'deleted'")),
    info={"owner": "webhooks"},
)

# One row an endpoint and event. While a worker sends it, it holds the lease, and its token is what it writes with.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("endpoint_id", Text, ForeignKey("webhook_endpoints.id"), nullable=False),
    Column("event", BigInteger, ForeignKey("events.id"), nullable=False),
    Column("state", Text, nullable=False, server_default="pending"),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("slow_retries", Integer, nullable=False, server_default=text("0")),
    moment("urgent_until", nullable=True),
    moment("created_at"),
    moment("next_attempt_at", nullable=True),
    moment("lease_until", nullable=True),
    Column("lease_token", Text),
    moment("delivered_at", nullable=True),
    Column("last_status", Integer),
    Column("last_error", Text),
    Column("priority", SmallInteger, nullable=False, server_default=text("1")),
    UniqueConstraint("endpoint_id", "event", name="webhook_deliveries_endpoint_event_key"),
    CheckConstraint("state IN ('pending', 'delivered', 'failed')", name="state"),
    CheckConstraint("attempts >= 0 AND slow_retries >= 0 AND slow_retries <= attempts", name="attempts"),
    CheckConstraint("(state = 'pending') = (next_attempt_at IS NOT NULL)", name="next_attempt_at"),
    CheckConstraint("(state = 'delivered') = (delivered_at IS NOT NULL)", name="delivered_at"),
    CheckConstraint(
        "(lease_until IS NULL) = (lease_token IS NULL) AND (state = 'pending' OR lease_token IS NULL)", name="lease"
    ),
    CheckConstraint("priority BETWEEN 0 AND 2", name="priority"),
    Index("webhook_deliveries_due_idx", "next_attempt_at", postgresql_where=text("state = 'pending'")),
    Index(
        "webhook_deliveries_lanes_idx",
        "endpoint_id",
        "priority",
        "next_attempt_at",
        postgresql_where=text("state = 'pending'"),
    ),
    Index("webhook_deliveries_endpoint_id_idx", "endpoint_id", "id"),
    Index("webhook_deliveries_event_idx", "event"),
    info={"owner": "outbox"},
)

webhook_attempts = Table(
    "webhook_attempts",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("delivery_id", BigInteger, ForeignKey("webhook_deliveries.id"), nullable=False),
    moment("at"),
    Column("milliseconds", Integer, nullable=False),
    Column("status", Integer),
    Column("error", Text),
    CheckConstraint("milliseconds >= 0", name="milliseconds"),
    CheckConstraint("num_nonnulls(status, error) > 0", name="outcome"),
    Index("webhook_attempts_delivery_id_idx", "delivery_id", "id"),
    info={"owner": "outbox"},
)

APPEND_ONLY = (events, webhook_attempts)

for _table in APPEND_ONLY:
    append_only(_table)
