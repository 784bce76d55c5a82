"""The tables of positions, orders and fills; see `tables` for how all of them are written."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Numeric,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from app.db.columns import check, moment, number, string
from app.db.tables import SYMBOL_PATTERN, metadata

PENDING_STATES = ("pending", "partially_filled")
"""Of orders that wait for fills."""


def _owner() -> Column[str]:
    return Column("agent_id", Text, ForeignKey("accounts.agent_id"), nullable=False)


# One position a symbol while it is open; entry_price is the average over what was opened.
positions = Table(
    "positions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    _owner(),
    string("symbol"),
    string("side"),
    number("size"),
    number("entry_price"),
    number("leverage", nullable=True),
    string("margin_mode"),
    number("allocated"),
    number("realized_pnl"),
    Column("reducible", Boolean, nullable=False, server_default=text("true")),
    moment("opened_at"),
    moment("updated_at"),
    moment("closed_at", nullable=True),
    check("symbol", f"symbol ~ '^{SYMBOL_PATTERN}$'"),
    check("side", "side IN ('long', 'short')"),
    check("size", "size >= 0 AND size < 1e15 AND scale(size) <= 18 AND (size > 0) = (closed_at IS NULL)"),
    check("entry_price", "entry_price > 0 AND entry_price < 1e15"),
    check("leverage", "leverage >= 1 AND leverage <= 1000"),
    check("margin_mode", "margin_mode IN ('pooled', 'isolated')"),
    check(
        "allocated",
        "allocated >= 0 AND allocated < 1e15 AND (margin_mode = 'isolated' AND size > 0 OR allocated = 0)",
    ),
    Index("positions_open_idx", "agent_id", "symbol", unique=True, postgresql_where=text("closed_at IS NULL")),
    Index("positions_agent_id_idx", "agent_id", "seq"),
    info={"owner": "positions"},
)

# An order of a book account is filled as it is written; one of a venue account waits for its fills. What a margin call
# asked a venue for carries the call.
orders = Table(
    "orders",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    _owner(),
    string("symbol"),
    string("side"),
    number("size"),
    string("order_type"),
    Column("reduce_only", Boolean, nullable=False),
    number("leverage", nullable=True),
    Column("meta", JSONB),
    string("reason"),
    string("status"),
    number("fill_price", nullable=True),
    number("filled_size"),
    number("realized_pnl"),
    Column("position_id", Text, ForeignKey("positions.id")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("margin_mode", Text),
    Column("fees", Numeric, nullable=False, server_default=text("0")),
    Column("margin_call_id", Text, ForeignKey("margin_calls.id")),
    moment("closed_at", nullable=True),
    check("symbol", f"symbol ~ '^{SYMBOL_PATTERN}$'"),
    check("side", "side IN ('buy', 'sell')"),
    check("size", "size > 0 AND size < 1e15 AND scale(size) <= 18"),
    check("order_type", "order_type IN ('market')"),
    check("margin_mode", "margin_mode IN ('pooled', 'isolated')"),
    check("status", "status IN ('pending', 'partially_filled', 'filled', 'cancelled')"),
    check("fill", "filled_size >= 0 AND filled_size <= size AND fill_price > 0 AND fill_price < 1e15"),
    check(
        "filled",
        "(status = 'filled') = (filled_size = size)"
        " AND (status <> 'pending' OR filled_size = 0) AND (status <> 'partially_filled' OR filled_size > 0)",
    ),
    check("closed", "(status IN ('filled', 'cancelled')) = (closed_at IS NOT NULL)"),
    check("fees", "fees >= 0 AND fees < 1e15"),
    Index("orders_agent_id_idx", "agent_id", "seq"),
    Index("orders_pending_idx", "agent_id", "seq", postgresql_where=text("status IN ('pending', 'partially_filled')")),
    info={"owner": "orders"},
)

# What a venue reported, under its own name for it; with what the order had come to, which is answered again.
order_fills = Table(
    "order_fills",
    metadata,
    Column("order_id", Text, ForeignKey("orders.id"), primary_key=True),
    Column("fill_id", Text, primary_key=True),
    number("size"),
    number("price"),
    number("fee"),
    number("realized_pnl"),
    Column("position_id", Text, ForeignKey("positions.id")),
    number("filled_size"),
    string("status"),
    moment("recorded_at"),
    check("fill_id", "length(fill_id) BETWEEN 1 AND 100"),
    check("size", "size > 0 AND size <= filled_size AND filled_size < 1e15"),
    check("price", "price > 0 AND price < 1e15"),
    check("fee", "fee >= 0 AND fee < 1e15"),
    check("status", "status IN ('partially_filled', 'filled', 'cancelled')"),
    info={"owner": "orders"},
)
