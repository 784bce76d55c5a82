"""Every table, constraint and index. `info["owner"]` is the one module of app/services that writes it.

Numbers are unconstrained numerics, so that digits stay as posted; Postgres counts NaN above every number and
Infinity too, so an upper bound on each column keeps both out.
"""

from __future__ import annotations

from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    Numeric,
    Table,
    Text,
    event,
    func,
)
from sqlalchemy.dialects.postgresql import ARRAY

SYMBOL_PATTERN = "[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}"
"""Assets and instruments; read alike by Python's and Postgres's regular expressions."""

OTHER_PAIR = "*"
"""Both halves of the correlation row that stands for every pair that is not listed."""

PARAMETERS = "parameters"
PRICES = "prices"

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)


def _check(name: str, rule: str) -> CheckConstraint:
    return CheckConstraint(rule, name=name)


def _moment(name: str, *, nullable: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


def _created_at() -> Column[object]:
    return Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now())


def _number(name: str, *, nullable: bool = False) -> Column[object]:
    return Column(name, Numeric, nullable=nullable)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _key(name: str) -> Column[str]:
    return Column(name, Text, primary_key=True)


def _symbol(name: str) -> CheckConstraint:
    return _check(name, f"{name} ~ '^{SYMBOL_PATTERN}$'")


def _version() -> Column[int]:
    """Return the second half of a parameter's key; its row in `market_changes` says who and when."""
    return Column("version", BigInteger, ForeignKey("market_changes.version"), primary_key=True)


agents = Table(
    "agents",
    metadata,
    _key("id"),
    _text("name"),
    _created_at(),
    _check("id", "length(id) BETWEEN 1 AND 64"),
    _check("name", "length(name) BETWEEN 1 AND 200"),
    info={"owner": "accounts"},
)

api_keys = Table(
    "api_keys",
    metadata,
    _key("id"),
    Column("agent_id", Text, ForeignKey("agents.id")),  # null: a key of the service, not of one agent
    _text("name"),
    Column("secret_sha256", LargeBinary, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    _created_at(),
    _moment("expires_at", nullable=True),
    _moment("revoked_at", nullable=True),
    _check("id", "length(id) BETWEEN 1 AND 64"),
    _check("name", "length(name) <= 200"),
    _check("secret_sha256", "octet_length(secret_sha256) = 32"),
    _check(
        "scopes",
        "cardinality(scopes) > 0 AND scopes <@ ARRAY['agent', 'coordinator', 'market', 'admin']::text[]",
    ),
    Index("api_keys_agent_id_idx", "agent_id"),
    info={"owner": "accounts"},
)

# Its two rows serialise writers: whoever holds a row's lock has the next version, and nobody sees that
# version before everything under it is committed. Versions are thus monotone in commit order.
market_state = Table(
    "market_state",
    metadata,
    _key("name"),
    Column("version", BigInteger, nullable=False),
    _check("name", "name IN ('parameters', 'prices')"),
    _check("version", "version >= 0"),
    info={"owner": "market"},
)

market_changes = Table(
    "market_changes",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    _moment("changed_at"),
    _text("changed_by"),
    _text("kind"),
    _text("name"),
    _check("kind", "kind IN ('seed', 'asset', 'instrument', 'model', 'correlation')"),
    info={"owner": "market"},
)

asset_parameters = Table(
    "asset_parameters",
    metadata,
    _key("asset"),
    _version(),
    _text("kind"),
    _number("haircut"),
    _number("initial_margin_rate"),
    _number("maintenance_margin_rate"),
    _number("price_range"),
    _number("volatility_range"),
    _number("volatility", nullable=True),
    _number("concentration_limit", nullable=True),
    _symbol("asset"),
    _check("kind", "kind IN ('stable', 'coin')"),
    _check("haircut", "haircut >= 0 AND haircut <= 1"),
    _check(
        "margin_rates",
        "maintenance_margin_rate > 0 AND maintenance_margin_rate <= initial_margin_rate AND initial_margin_rate <= 10",
    ),
    _check("price_range", "price_range > 0 AND price_range < 1"),
    _check("volatility_range", "volatility_range > 0 AND volatility_range <= 10"),
    _check("volatility", "volatility > 0 AND volatility <= 100"),
    _check("concentration_limit", "concentration_limit > 0 AND concentration_limit < 1e15"),
    info={"owner": "market"},
)

instrument_parameters = Table(
    "instrument_parameters",
    metadata,
    _key("symbol"),
    _version(),
    _text("underlying"),
    _text("kind"),
    _number("contract_size"),
    _number("initial_margin_rate", nullable=True),
    _number("maintenance_margin_rate", nullable=True),
    _number("price_range", nullable=True),
    _number("volatility", nullable=True),
    _symbol("symbol"),
    _symbol("underlying"),
    _check("kind", "kind IN ('spot', 'perpetual', 'future')"),
    _check("contract_size", "contract_size > 0 AND contract_size < 1e15"),
    _check("initial_margin_rate", "initial_margin_rate > 0 AND initial_margin_rate <= 10"),
    _check("maintenance_margin_rate", "maintenance_margin_rate > 0 AND maintenance_margin_rate <= 10"),
    # Against the underlying's rates, where one of the two is null: services/market_rules.py.
    _check("margin_rates", "maintenance_margin_rate <= initial_margin_rate"),
    _check("price_range", "price_range > 0 AND price_range < 1"),
    _check("volatility", "volatility > 0 AND volatility <= 100"),
    info={"owner": "market"},
)

model_parameters = Table(
    "model_parameters",
    metadata,
    _key("name"),
    _version(),
    _number("value"),
    _check("value", "value >= 0 AND value < 1e15"),
    info={"owner": "market"},
)

correlation_parameters = Table(
    "correlation_parameters",
    metadata,
    _key("matrix"),
    _key("a"),
    _key("b"),
    _version(),
    _number("value"),
    _check("matrix", "matrix IN ('stress', 'hedge')"),
    # Sorted as Python sorts, by code point; the stars stand for every other pair.
    _check("pair", "a COLLATE \"C\" < b OR a = '*' AND b = '*'"),
    _check("value", "value >= -1 AND value <= 1"),
    info={"owner": "market"},
)

market_prices = Table(
    "market_prices",
    metadata,
    _key("symbol"),
    _number("price"),
    _moment("as_of"),
    _moment("received_at"),
    Column("version", BigInteger, nullable=False),  # of market_state 'prices'; no index, so updates stay HOT
    _symbol("symbol"),
    _check("price", "price > 0 AND price < 1e15 AND scale(price) <= 18"),
    info={"owner": "market"},
)

APPEND_ONLY = (
    market_changes,
    asset_parameters,
    instrument_parameters,
    model_parameters,
    correlation_parameters,
)

event.listen(
    metadata,
    "before_create",
    DDL(  # type: ignore[no-untyped-call]
        """
        CREATE FUNCTION refuse_rewrite() RETURNS trigger LANGUAGE plpgsql AS $body$
        BEGIN
            RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
        END
        $body$
        """
    ),
)
for _table in APPEND_ONLY:
    event.listen(
        _table,
        "after_create",
        DDL(  # type: ignore[no-untyped-call]
            "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %(table)s"
            " FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite()"
        ),
    )
