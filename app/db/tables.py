"""Every table, constraint and index. `info["owner"]` is the one module of app/services that writes it.

Numbers are unconstrained numerics, so that digits stay as posted; Postgres counts NaN above every number and
Infinity too, so an upper bound on each column keeps both out.
"""

from __future__ import annotations

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    Table,
    Text,
    event,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from app.db.columns import check, moment, number, string

SYMBOL_PATTERN = "[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}"
"""Assets and instruments; read alike by Python's and Postgres's regular expressions."""

OTHER_PAIR = "*"
"""Both halves of the correlation row that stands for every pair that is not listed."""

SERVICE_PATTERN = "[a-z][a-z0-9_]{0,31}"
"""Services that book against an agent's wallet: trading, escrow, casino, domains and others."""

PARAMETERS = "parameters"
PRICES = "prices"
HISTORY = "history"

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)


def _created_at() -> Column[object]:
    return Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now())


def _key(name: str) -> Column[str]:
    return Column(name, Text, primary_key=True)


def _symbol(name: str) -> CheckConstraint:
    return check(name, f"{name} ~ '^{SYMBOL_PATTERN}$'")


def _version() -> Column[int]:
    """Return the second half of a parameter's key; its row in `market_changes` says who and when."""
    return Column("version", BigInteger, ForeignKey("market_changes.version"), primary_key=True)


agents = Table(
    "agents",
    metadata,
    _key("id"),
    string("name"),
    _created_at(),
    check("id", "length(id) BETWEEN 1 AND 64"),
    check("name", "length(name) BETWEEN 1 AND 200"),
    info={"owner": "accounts"},
)

api_keys = Table(
    "api_keys",
    metadata,
    _key("id"),
    Column("agent_id", Text, ForeignKey("agents.id")),  # null: a key of the service, not of one agent
    string("name"),
    Column("secret_sha256", LargeBinary, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    _created_at(),
    moment("expires_at", nullable=True),
    moment("revoked_at", nullable=True),
    check("id", "length(id) BETWEEN 1 AND 64"),
    check("name", "length(name) <= 200"),
    check("secret_sha256", "octet_length(secret_sha256) = 32"),
    check(
        "scopes",
        "cardinality(scopes) > 0 AND scopes <@ ARRAY['agent', 'coordinator', 'market', 'admin']::text[]",
    ),
    Index("api_keys_agent_id_idx", "agent_id"),
    info={"owner": "accounts"},
)

# Its rows serialise writers: whoever holds a row's lock has the next version, and nobody sees that
# version before everything under it is committed. Versions are thus monotone in commit order.
market_state = Table(
    "market_state",
    metadata,
    _key("name"),
    Column("version", BigInteger, nullable=False),
    check("name", "name IN ('parameters', 'prices', 'history')"),
    check("version", "version >= 0"),
    info={"owner": "parameter_versions"},
)

market_changes = Table(
    "market_changes",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    moment("changed_at"),
    string("changed_by"),
    string("kind"),
    string("name"),
    check("kind", "kind IN ('seed', 'asset', 'instrument', 'model', 'correlation', 'lending', 'venue')"),
    info={"owner": "parameter_versions"},
)

asset_parameters = Table(
    "asset_parameters",
    metadata,
    _key("asset"),
    _version(),
    string("kind"),
    number("haircut"),
    number("initial_margin_rate"),
    number("maintenance_margin_rate"),
    number("price_range"),
    number("volatility_range"),
    number("volatility", nullable=True),
    number("concentration_limit", nullable=True),
    _symbol("asset"),
    check("kind", "kind IN ('stable', 'coin')"),
    check("haircut", "haircut >= 0 AND haircut <= 1"),
    check(
        "margin_rates",
        "maintenance_margin_rate > 0 AND maintenance_margin_rate <= initial_margin_rate AND initial_margin_rate <= 10",
    ),
    check("price_range", "price_range > 0 AND price_range < 1"),
    check("volatility_range", "volatility_range > 0 AND volatility_range <= 10"),
    check("volatility", "volatility > 0 AND volatility <= 100"),
    check("concentration_limit", "concentration_limit > 0 AND concentration_limit < 1e15"),
    info={"owner": "market"},
)

instrument_parameters = Table(
    "instrument_parameters",
    metadata,
    _key("symbol"),
    _version(),
    string("underlying"),
    string("kind"),
    number("contract_size"),
    number("initial_margin_rate", nullable=True),
    number("maintenance_margin_rate", nullable=True),
    number("price_range", nullable=True),
    number("volatility", nullable=True),
    moment("expiry", nullable=True),
    _symbol("symbol"),
    _symbol("underlying"),
    check("kind", "kind IN ('spot', 'perpetual', 'future')"),
    check("contract_size", "contract_size > 0 AND contract_size < 1e15"),
    check("initial_margin_rate", "initial_margin_rate > 0 AND initial_margin_rate <= 10"),
    check("maintenance_margin_rate", "maintenance_margin_rate > 0 AND maintenance_margin_rate <= 10"),
    # Against the underlying's rates, where one of the two is null: services/market_rules.py.
    check("margin_rates", "maintenance_margin_rate <= initial_margin_rate"),
    check("price_range", "price_range > 0 AND price_range < 1"),
    check("volatility", "volatility > 0 AND volatility <= 100"),
    check("expiry", "expiry IS NULL OR kind = 'future'"),
    info={"owner": "market"},
)

# One document a venue and underlying: what a venue publishes has tables in it, and another form at each venue.
venue_parameters = Table(
    "venue_parameters",
    metadata,
    _key("venue"),
    _key("underlying"),
    _version(),
    Column("parameters", JSONB, nullable=False),
    check("venue", "venue ~ '^[a-z][a-z0-9_]{0,31}$'"),
    _symbol("underlying"),
    check("parameters", "jsonb_typeof(parameters) = 'object' AND length(parameters::text) <= 100000"),
    info={"owner": "venue_parameters"},
)

model_parameters = Table(
    "model_parameters",
    metadata,
    _key("name"),
    _version(),
    number("value"),
    check("value", "value >= 0 AND value < 1e15"),
    info={"owner": "market"},
)

correlation_parameters = Table(
    "correlation_parameters",
    metadata,
    _key("matrix"),
    _key("a"),
    _key("b"),
    _version(),
    number("value"),
    check("matrix", "matrix IN ('stress', 'hedge', 'normal', 'sideways', 'sell_off', 'liquidity_crisis')"),
    # Sorted as Python sorts, by code point; the stars stand for every other pair.
    check("pair", "a COLLATE \"C\" < b OR a = '*' AND b = '*'"),
    check("value", "value >= -1 AND value <= 1"),
    info={"owner": "market"},
)

market_prices = Table(
    "market_prices",
    metadata,
    _key("symbol"),
    number("price"),
    moment("as_of"),
    moment("received_at"),
    Column("version", BigInteger, nullable=False),  # of market_state 'prices'; no index, so updates stay HOT
    _symbol("symbol"),
    check("price", "price > 0 AND price < 1e15 AND scale(price) <= 18"),
    info={"owner": "prices"},
)

# One minute of a symbol's posted prices, by the time that they are dated.
price_bars = Table(
    "price_bars",
    metadata,
    _key("symbol"),
    Column("minute", DateTime(timezone=True), primary_key=True),
    number("open"),
    number("high"),
    number("low"),
    number("close"),
    moment("opened_at"),
    moment("closed_at"),
    check("prices", "low > 0 AND low <= open AND low <= close AND open <= high AND close <= high AND high < 1e15"),
    check("times", "minute <= opened_at AND opened_at <= closed_at"),
    info={"owner": "price_history"},
)

# The last price of an asset on a UTC day; another one for the day takes its place, under a later version.
daily_closes = Table(
    "daily_closes",
    metadata,
    _key("asset"),
    Column("day", Date, primary_key=True),
    number("close"),
    Column("version", BigInteger, nullable=False),  # of market_state 'history'
    moment("stored_at"),
    _symbol("asset"),
    check("day", "day >= '1970-01-01'"),
    check("close", "close > 0 AND close < 1e15 AND scale(close) <= 18"),
    info={"owner": "closes"},
)

# The row of an agent's book that whoever changes the book locks first; `version` counts the changes.
accounts = Table(
    "accounts",
    metadata,
    Column("agent_id", Text, ForeignKey("agents.id"), primary_key=True),
    Column("margin_mode", Text, nullable=False, server_default="cross"),
    Column("execution", Text, nullable=False, server_default="book"),
    Column("auto_liquidate", Boolean, nullable=False, server_default=text("true")),
    Column("notice_delay_seconds", Integer, nullable=False, server_default=text("0")),
    Column("grace_period_seconds", Integer, nullable=False, server_default=text("300")),
    number("trailing_stop", nullable=True),
    number("target_utilization", nullable=True),
    number("gate_utilization", nullable=True),
    number("breach_utilization", nullable=True),
    number("cure_utilization", nullable=True),
    number("stop_utilization", nullable=True),
    number("shortfall_utilization", nullable=True),
    Column("version", BigInteger, nullable=False, server_default=text("0")),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("drawdown_ladder", Text, nullable=False, server_default="off"),
    check("margin_mode", "margin_mode IN ('cross', 'isolated', 'portfolio')"),
    check("execution", "execution IN ('book', 'venue')"),
    check("delays", "notice_delay_seconds BETWEEN 0 AND 86400 AND grace_period_seconds BETWEEN 0 AND 86400"),
    check("trailing_stop", "trailing_stop > 0 AND trailing_stop < 1"),
    check("drawdown_ladder", "drawdown_ladder IN ('off', 'notify', 'apply')"),
    check("target_utilization", "target_utilization > 0 AND target_utilization <= 1"),
    check("gate_utilization", "gate_utilization > 0 AND gate_utilization <= 1"),
    check("breach_utilization", "breach_utilization > 0 AND breach_utilization <= 1"),
    check("cure_utilization", "cure_utilization > 0 AND cure_utilization <= 1"),
    check("stop_utilization", "stop_utilization > 0 AND stop_utilization <= 1"),
    check("shortfall_utilization", "shortfall_utilization > 0 AND shortfall_utilization <= 1"),
    info={"owner": "accounts"},
)

# An agent's units of each asset: free to spend, reserved by a service, allocated to an isolated position, on offer to
# borrowers, lent, securing own loans; and what is owed to the house, and to lenders.
balances = Table(
    "balances",
    metadata,
    Column("agent_id", Text, ForeignKey("accounts.agent_id"), primary_key=True),
    _key("asset"),
    _key("bucket"),
    number("amount"),
    _symbol("asset"),
    check("bucket", "bucket IN ('free', 'reserved', 'allocated', 'owed', 'offered', 'lent', 'pledged', 'borrowed')"),
    check("amount", "amount >= 0 AND amount < 1e15 AND scale(amount) <= 18"),
    info={"owner": "ledger"},
)

# Every move of money, out of one bucket into another: each row balances by itself. What is owed or borrowed is a claim
# on the agent: those buckets grow by what leaves them.
ledger_entries = Table(
    "ledger_entries",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("batch", BigInteger, nullable=False),
    string("agent_id"),
    string("service"),
    string("kind"),
    Column("reference", Text),
    Column("idempotency_key", Text),
    string("actor"),
    moment("posted_at"),
    string("asset"),
    number("amount"),
    string("from_owner"),
    string("from_bucket"),
    string("to_owner"),
    string("to_bucket"),
    _symbol("asset"),
    check("amount", "amount > 0 AND amount < 1e15 AND scale(amount) <= 18"),
    check("sides", "from_owner <> to_owner OR from_bucket <> to_bucket"),
    check("service", f"service ~ '^{SERVICE_PATTERN}$'"),
    Index("ledger_entries_from_owner_idx", "from_owner", "id"),
    Index("ledger_entries_to_owner_idx", "to_owner", "id"),
    info={"owner": "ledger"},
)

reservations = Table(
    "reservations",
    metadata,
    _key("id"),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    Column("agent_id", Text, ForeignKey("accounts.agent_id"), nullable=False),
    string("service"),
    string("asset"),
    number("amount"),
    number("remaining"),
    number("settled"),
    Column("reference", Text),
    Column("reducible", Boolean, nullable=False),
    string("status"),
    _created_at(),
    moment("closed_at", nullable=True),
    Column("bound_to", Text),  # the contract that alone may use it: an escrow, a netting agreement
    _symbol("asset"),
    check("service", f"service ~ '^{SERVICE_PATTERN}$'"),
    check("bound", "bound_to IS NULL OR NOT reducible"),
    check("amount", "amount > 0 AND amount < 1e15 AND scale(amount) <= 18"),
    check("remaining", "remaining >= 0 AND settled >= 0 AND remaining + settled <= amount"),
    check("status", "status IN ('open', 'settled', 'released')"),
    check("closed", "(status = 'open') = (remaining > 0) AND (status = 'open') = (closed_at IS NULL)"),
    Index("reservations_agent_id_idx", "agent_id", "seq"),
    Index("reservations_open_idx", "agent_id", postgresql_where=text("status = 'open'")),
    Index(
        "reservations_bound_idx",
        "bound_to",
        "agent_id",
        "asset",
        unique=True,
        postgresql_where=text("status = 'open' AND bound_to IS NOT NULL"),
    ),
    info={"owner": "wallet"},
)

# The answer to each request that a caller named with a key, stored with its effect.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    _key("caller"),
    _key("key"),
    string("request"),
    Column("body_sha256", LargeBinary, nullable=False),
    Column("status", Integer),
    Column("reply", LargeBinary),
    _created_at(),
    check("key", "length(key) BETWEEN 1 AND 255"),
    Index("idempotency_keys_created_at_idx", "created_at"),
    info={"owner": "idempotency"},
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    moment("at"),
    string("actor"),
    Column("agent_id", Text),
    string("action"),
    string("subject"),
    Column("detail", JSONB, nullable=False),
    Index("audit_log_agent_id_idx", "agent_id", "id"),
    info={"owner": "audit"},
)

# One row a call: its state is the whole of its memory, next_action_at its timer.
margin_calls = Table(
    "margin_calls",
    metadata,
    _key("id"),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    Column("agent_id", Text, ForeignKey("accounts.agent_id"), nullable=False),
    string("state"),
    string("cause"),
    moment("noticed_at"),
    moment("opened_at", nullable=True),
    moment("deadline_at", nullable=True),
    moment("expired_at", nullable=True),
    moment("ended_at", nullable=True),
    moment("acknowledged_at", nullable=True),
    moment("next_action_at", nullable=True),
    Column("reminders", Integer, nullable=False, server_default=text("0")),
    Column("slices", Integer, nullable=False, server_default=text("0")),
    number("deficit"),
    Column("figures", JSONB, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),  # of the request that waits at a venue
    moment("respond_by", nullable=True),
    Column("uncovered", Numeric, nullable=False, server_default=text("0")),
    moment("exhausted_at", nullable=True),
    Column("fleet_call_id", Text, ForeignKey("margin_calls.id")),  # the fleet's, that liquidates a member by this one
    Column("own_cause", Text),  # what it was before it became one of the fleet's
    moment("own_deadline_at", nullable=True),
    check("uncovered", "uncovered >= 0"),
    check("state", "state IN ('noticed', 'open', 'expired', 'liquidating', 'lapsed', 'cured', 'completed')"),
    check("cause", "cause IN ('utilization', 'maintenance', 'isolated', 'fleet')"),
    check("ended", "(state IN ('lapsed', 'cured', 'completed')) = (ended_at IS NOT NULL)"),
    check("opened", "state IN ('noticed', 'lapsed') OR opened_at IS NOT NULL AND deadline_at IS NOT NULL"),
    check("deadline", "deadline_at >= opened_at"),
    check(
        "own",
        "(own_cause IS NULL) = (own_deadline_at IS NULL) AND own_cause IN ('utilization', 'maintenance', 'isolated')",
    ),
    check("deficit", "deficit >= 0"),
    check("attempts", "attempts >= 0 AND (attempts = 0) = (respond_by IS NULL)"),
    Index(
        "margin_calls_live_idx",
        "agent_id",
        unique=True,
        postgresql_where=text("state IN ('noticed', 'open', 'expired', 'liquidating')"),
    ),
    Index(
        "margin_calls_due_idx",
        "next_action_at",
        postgresql_where=text("state IN ('noticed', 'open', 'expired', 'liquidating')"),
    ),
    Index("margin_calls_agent_id_idx", "agent_id", "seq"),
    Index("margin_calls_fleet_call_idx", "fleet_call_id", postgresql_where=text("fleet_call_id IS NOT NULL")),
    Index("margin_calls_lost_idx", "deficit", "uncovered", postgresql_where=text("deficit + uncovered > 0")),
    info={"owner": "calls"},
)

workers = Table(
    "workers",
    metadata,
    _key("id"),
    moment("started_at"),
    moment("seen_at"),
    Column("figures", JSONB),  # how the accounts stand that it screens
    info={"owner": "heartbeat"},
)

# What operators are shown of the whole service, by kind: taken by one process at a time, shown by every one.
service_figures = Table(
    "service_figures",
    metadata,
    _key("name"),
    moment("taken_at"),
    Column("seconds", Double, nullable=False),  # that it took
    Column("figures", JSONB, nullable=False),
    check("seconds", "seconds >= 0"),
    info={"owner": "keep"},
)

# What was last told of an account, so that only a change is told again; its highest equity, for the trailing stop and
# the drawdown ladder, and the deepest rung that was acted on.
account_watch = Table(
    "account_watch",
    metadata,
    Column("agent_id", Text, ForeignKey("accounts.agent_id"), primary_key=True),
    string("zone"),
    string("alert_level"),
    Column("stale", Boolean, nullable=False, server_default=text("false")),
    number("peak_equity"),
    Column("stopped", Boolean, nullable=False, server_default=text("false")),
    moment("updated_at"),
    Column("rung", Integer, nullable=False, server_default=text("0")),
    Column("rung_applied", Integer, nullable=False, server_default=text("0")),
    check("zone", "zone IN ('GREEN', 'YELLOW', 'ORANGE', 'RED')"),
    check("alert_level", "alert_level IN ('OK', 'WARNING', 'DANGER', 'EMERGENCY')"),
    check("rungs", "rung BETWEEN 0 AND 4 AND rung_applied BETWEEN 0 AND 4"),
    info={"owner": "watch"},
)

# Shares of the accounts, by the hash of the agent's id: who screens one holds its lease.
screen_shards = Table(
    "screen_shards",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("worker_id", Text),
    moment("lease_until", nullable=True),
    check("shard", "shard >= 0"),
    check("lease", "(worker_id IS NULL) = (lease_until IS NULL)"),
    info={"owner": "shards"},
)

# What an account was worth once a UTC day, and the loss of the next day that was then forecast of it, USD.
account_snapshots = Table(
    "account_snapshots",
    metadata,
    Column("agent_id", Text, ForeignKey("accounts.agent_id"), primary_key=True),
    Column("day", Date, primary_key=True),
    moment("taken_at"),
    Column("equity", Double, nullable=False),
    Column("value", Double, nullable=False),  # as equity, no haircut taken: what profit and loss is measured in
    Column("flows", Double),  # what came in less what went out since the snapshot before; null: there is none
    Column("gross", Double, nullable=False),
    Column("var_95", Double),
    Column("var_99", Double),
    Column("ledger_id", BigInteger, nullable=False),  # the last entry that is counted; 0: there is none
    check("forecast", "(var_95 IS NULL) = (var_99 IS NULL) AND var_95 >= 0 AND var_99 >= 0"),
    Index("account_snapshots_day_idx", "day"),
    info={"owner": "snapshots"},
)

APPEND_ONLY = (
    market_changes,
    asset_parameters,
    instrument_parameters,
    model_parameters,
    correlation_parameters,
    venue_parameters,
    ledger_entries,
    audit_log,
)

event.listen(
    metadata,
    "before_create",
    DDL("CREATE SEQUENCE ledger_batches"),  # type: ignore[no-untyped-call]
)
event.listen(
    metadata,
    "before_create",
    DDL(  # type: ignore[no-untyped-call]
        """
        CREATE FUNCTION refuse_rewrite() RETURNS trigger LANGUAGE plpgsql AS $body$
        BEGIN
            IF TG_OP = 'DELETE' AND TG_TABLE_NAME IN ('events', 'webhook_attempts')
               AND current_setting('primerisk.past_its_time', true) = 'yes' THEN
                RETURN NULL;
            END IF;
            RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
        END
        $body$
        """
    ),
)


def append_only(table: Table) -> None:
    """Give the table the trigger that refuses to change or delete what is in it."""
    event.listen(
        table,
        "after_create",
        DDL(  # type: ignore[no-untyped-call]
            "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %(table)s"
            " FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite()"
        ),
    )


for _table in APPEND_ONLY:
    append_only(_table)
