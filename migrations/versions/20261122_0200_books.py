"""Accounts, the ledger, reservations, positions, orders, price bars, idempotency keys, the audit log."""

from __future__ import annotations

from alembic import op

revision = "20261122_0200"
down_revision: str | None = "20261121_2300"

PRICE_BARS = """
CREATE TABLE price_bars (
    symbol TEXT NOT NULL,
    minute TIMESTAMP WITH TIME ZONE NOT NULL,
    open NUMERIC NOT NULL,
    high NUMERIC NOT NULL,
    low NUMERIC NOT NULL,
    close NUMERIC NOT NULL,
    opened_at TIMESTAMP WITH TIME ZONE NOT NULL,
    closed_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT price_bars_pkey PRIMARY KEY (symbol, minute),
    CONSTRAINT price_bars_prices_check
        CHECK (low > 0 AND low <= open AND low <= close AND open <= high AND close <= high AND high < 1e15),
    CONSTRAINT price_bars_times_check CHECK (minute <= opened_at AND opened_at <= closed_at)
);
"""

ACCOUNTS = """
CREATE TABLE accounts (
    agent_id TEXT NOT NULL,
    margin_mode TEXT DEFAULT 'cross' NOT NULL,
    execution TEXT DEFAULT 'book' NOT NULL,
    auto_liquidate BOOLEAN DEFAULT true NOT NULL,
    notice_delay_seconds INTEGER DEFAULT 0 NOT NULL,
    grace_period_seconds INTEGER DEFAULT 300 NOT NULL,
    trailing_stop NUMERIC,
    target_utilization NUMERIC,
    gate_utilization NUMERIC,
    breach_utilization NUMERIC,
    cure_utilization NUMERIC,
    stop_utilization NUMERIC,
    shortfall_utilization NUMERIC,
    version BIGINT DEFAULT 0 NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT accounts_pkey PRIMARY KEY (agent_id),
    CONSTRAINT accounts_margin_mode_check CHECK (margin_mode IN ('cross', 'isolated', 'portfolio')),
    CONSTRAINT accounts_execution_check CHECK (execution IN ('book', 'venue')),
    CONSTRAINT accounts_delays_check
        CHECK (notice_delay_seconds BETWEEN 0 AND 86400 AND grace_period_seconds BETWEEN 0 AND 86400),
    CONSTRAINT accounts_trailing_stop_check CHECK (trailing_stop > 0 AND trailing_stop < 1),
    CONSTRAINT accounts_target_utilization_check CHECK (target_utilization > 0 AND target_utilization <= 1),
    CONSTRAINT accounts_gate_utilization_check CHECK (gate_utilization > 0 AND gate_utilization <= 1),
    CONSTRAINT accounts_breach_utilization_check CHECK (breach_utilization > 0 AND breach_utilization <= 1),
    CONSTRAINT accounts_cure_utilization_check CHECK (cure_utilization > 0 AND cure_utilization <= 1),
    CONSTRAINT accounts_stop_utilization_check CHECK (stop_utilization > 0 AND stop_utilization <= 1),
    CONSTRAINT accounts_shortfall_utilization_check
        CHECK (shortfall_utilization > 0 AND shortfall_utilization <= 1),
    CONSTRAINT accounts_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES agents (id)
);
"""

BALANCES = """
CREATE TABLE balances (
    agent_id TEXT NOT NULL,
    asset TEXT NOT NULL,
    bucket TEXT NOT NULL,
    amount NUMERIC NOT NULL,
    CONSTRAINT balances_pkey PRIMARY KEY (agent_id, asset, bucket),
    CONSTRAINT balances_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT balances_bucket_check CHECK (bucket IN ('free', 'reserved', 'allocated', 'owed')),
    CONSTRAINT balances_amount_check CHECK (amount >= 0 AND amount < 1e15 AND scale(amount) <= 18),
    CONSTRAINT balances_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES accounts (agent_id)
);
"""

LEDGER_ENTRIES = """
CREATE TABLE ledger_entries (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    batch BIGINT NOT NULL,
    agent_id TEXT NOT NULL,
    service TEXT NOT NULL,
    kind TEXT NOT NULL,
    reference TEXT,
    idempotency_key TEXT,
    actor TEXT NOT NULL,
    posted_at TIMESTAMP WITH TIME ZONE NOT NULL,
    asset TEXT NOT NULL,
    amount NUMERIC NOT NULL,
    from_owner TEXT NOT NULL,
    from_bucket TEXT NOT NULL,
    to_owner TEXT NOT NULL,
    to_bucket TEXT NOT NULL,
    CONSTRAINT ledger_entries_pkey PRIMARY KEY (id),
    CONSTRAINT ledger_entries_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT ledger_entries_amount_check CHECK (amount > 0 AND amount < 1e15 AND scale(amount) <= 18),
    CONSTRAINT ledger_entries_sides_check CHECK (from_owner <> to_owner OR from_bucket <> to_bucket),
    CONSTRAINT ledger_entries_service_check CHECK (service ~ '^[a-z][a-z0-9_]{0,31}$')
);
CREATE INDEX ledger_entries_from_owner_idx ON ledger_entries (from_owner, id);
CREATE INDEX ledger_entries_to_owner_idx ON ledger_entries (to_owner, id);
"""

RESERVATIONS = """
CREATE TABLE reservations (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    agent_id TEXT NOT NULL,
    service TEXT NOT NULL,
    asset TEXT NOT NULL,
    amount NUMERIC NOT NULL,
    remaining NUMERIC NOT NULL,
    settled NUMERIC NOT NULL,
    reference TEXT,
    reducible BOOLEAN NOT NULL,
    status TEXT NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    closed_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT reservations_pkey PRIMARY KEY (id),
    CONSTRAINT reservations_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT reservations_service_check CHECK (service ~ '^[a-z][a-z0-9_]{0,31}$'),
    CONSTRAINT reservations_amount_check CHECK (amount > 0 AND amount < 1e15 AND scale(amount) <= 18),
    CONSTRAINT reservations_remaining_check
        CHECK (remaining >= 0 AND settled >= 0 AND remaining + settled <= amount),
    CONSTRAINT reservations_status_check CHECK (status IN ('open', 'settled', 'released')),
    CONSTRAINT reservations_closed_check
        CHECK ((status = 'open') = (remaining > 0) AND (status = 'open') = (closed_at IS NULL)),
    CONSTRAINT reservations_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES accounts (agent_id)
);
CREATE INDEX reservations_agent_id_idx ON reservations (agent_id, seq);
CREATE INDEX reservations_open_idx ON reservations (agent_id) WHERE status = 'open';
"""

POSITIONS = """
CREATE TABLE positions (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    agent_id TEXT NOT NULL,
    symbol TEXT NOT NULL,
    side TEXT NOT NULL,
    size NUMERIC NOT NULL,
    entry_price NUMERIC NOT NULL,
    leverage NUMERIC,
    margin_mode TEXT NOT NULL,
    allocated NUMERIC NOT NULL,
    realized_pnl NUMERIC NOT NULL,
    reducible BOOLEAN DEFAULT true NOT NULL,
    opened_at TIMESTAMP WITH TIME ZONE NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE NOT NULL,
    closed_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT positions_pkey PRIMARY KEY (id),
    CONSTRAINT positions_symbol_check CHECK (symbol ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT positions_side_check CHECK (side IN ('long', 'short')),
    CONSTRAINT positions_size_check
        CHECK (size >= 0 AND size < 1e15 AND scale(size) <= 18 AND (size > 0) = (closed_at IS NULL)),
    CONSTRAINT positions_entry_price_check CHECK (entry_price > 0 AND entry_price < 1e15),
    CONSTRAINT positions_leverage_check CHECK (leverage >= 1 AND leverage <= 1000),
    CONSTRAINT positions_margin_mode_check CHECK (margin_mode IN ('pooled', 'isolated')),
    CONSTRAINT positions_allocated_check
        CHECK (allocated >= 0 AND allocated < 1e15 AND (margin_mode = 'isolated' AND size > 0 OR allocated = 0)),
    CONSTRAINT positions_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES accounts (agent_id)
);
CREATE INDEX positions_agent_id_idx ON positions (agent_id, seq);
CREATE UNIQUE INDEX positions_open_idx ON positions (agent_id, symbol) WHERE closed_at IS NULL;
"""

ORDERS = """
CREATE TABLE orders (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    agent_id TEXT NOT NULL,
    symbol TEXT NOT NULL,
    side TEXT NOT NULL,
    size NUMERIC NOT NULL,
    order_type TEXT NOT NULL,
    reduce_only BOOLEAN NOT NULL,
    leverage NUMERIC,
    meta JSONB,
    reason TEXT NOT NULL,
    status TEXT NOT NULL,
    fill_price NUMERIC,
    filled_size NUMERIC NOT NULL,
    realized_pnl NUMERIC NOT NULL,
    position_id TEXT,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT orders_pkey PRIMARY KEY (id),
    CONSTRAINT orders_symbol_check CHECK (symbol ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT orders_side_check CHECK (side IN ('buy', 'sell')),
    CONSTRAINT orders_size_check CHECK (size > 0 AND size < 1e15 AND scale(size) <= 18),
    CONSTRAINT orders_order_type_check CHECK (order_type IN ('market')),
    CONSTRAINT orders_status_check CHECK (status IN ('filled')),
    CONSTRAINT orders_fill_check
        CHECK (filled_size >= 0 AND filled_size <= size AND fill_price > 0 AND fill_price < 1e15),
    CONSTRAINT orders_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES accounts (agent_id),
    CONSTRAINT orders_position_id_fkey FOREIGN KEY(position_id) REFERENCES positions (id)
);
CREATE INDEX orders_agent_id_idx ON orders (agent_id, seq);
"""

IDEMPOTENCY_KEYS = """
CREATE TABLE idempotency_keys (
    caller TEXT NOT NULL,
    key TEXT NOT NULL,
    request TEXT NOT NULL,
    body_sha256 BYTEA NOT NULL,
    status INTEGER,
    reply BYTEA,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL,
    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (caller, key),
    CONSTRAINT idempotency_keys_key_check CHECK (length(key) BETWEEN 1 AND 255)
);
CREATE INDEX idempotency_keys_created_at_idx ON idempotency_keys (created_at);
"""

AUDIT_LOG = """
CREATE TABLE audit_log (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    at TIMESTAMP WITH TIME ZONE NOT NULL,
    actor TEXT NOT NULL,
    agent_id TEXT,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail JSONB NOT NULL,
    CONSTRAINT audit_log_pkey PRIMARY KEY (id)
);
CREATE INDEX audit_log_agent_id_idx ON audit_log (agent_id, id);
"""

APPEND_ONLY = ("ledger_entries", "audit_log")


def upgrade() -> None:
    op.execute("CREATE SEQUENCE ledger_batches")
    _run(PRICE_BARS + ACCOUNTS + BALANCES + LEDGER_ENTRIES + RESERVATIONS)
    _run(POSITIONS + ORDERS + IDEMPOTENCY_KEYS + AUDIT_LOG)
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite()"
        )
    op.execute("INSERT INTO accounts (agent_id) SELECT id FROM agents")


def _run(script: str) -> None:
    """Execute statement by statement: the driver prepares each, and a prepared statement is a single one."""
    for statement in script.split(";\n"):
        if statement.strip():
            op.execute(statement)
