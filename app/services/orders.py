"""Orders and the fills that a venue reported of them, as stored; what either does to a book is decided elsewhere."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import func, insert, select, update

from app.db.session import Tx
from app.db.trading_tables import PENDING_STATES, order_fills, orders
from app.domain.book import ZERO, PendingOrder
from app.domain.money import round_owned
from app.domain.trade import PRICE_DECIMALS, Order, Trade
from app.errors import NotFoundError

ORDERS_A_PAGE_MAX = 200


@dataclass(frozen=True, slots=True)
class StoredOrder:
    """An order as booked; `fill_price` is the mark it was filled at, or the average of its venue's fills."""

    id: str
    seq: int
    agent_id: str
    symbol: str
    side: str
    size: Decimal
    order_type: str
    reduce_only: bool
    leverage: Decimal | None
    meta: Mapping[str, Any] | None
    reason: str
    status: str
    fill_price: Decimal | None
    filled_size: Decimal
    realized_pnl: Decimal
    position_id: str | None
    created_at: datetime
    margin_mode: str | None
    fees: Decimal
    margin_call_id: str | None
    closed_at: datetime | None

    @property
    def remaining(self) -> Decimal:
        """Contracts that no fill has been reported of."""
        return self.size - self.filled_size

    def pending(self) -> PendingOrder:
        """Return what a book holds of an order that waits for fills."""
        return PendingOrder(
            self.id,
            self.symbol,
            self.side,  # type: ignore[arg-type]  # the table's CHECK
            self.remaining,
            self.reduce_only,
            self.leverage,
            self.margin_mode,  # type: ignore[arg-type]
            self.margin_call_id,
        )


@dataclass(frozen=True, slots=True)
class StoredFill:
    """A venue's fill; `filled_size` and `status` are what the order had come to with it."""

    order_id: str
    fill_id: str
    size: Decimal
    price: Decimal
    fee: Decimal
    realized_pnl: Decimal
    position_id: str | None
    filled_size: Decimal
    status: str
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class Labels:
    """What an order carries beside its terms: why it is there, the caller's own words, the call that asked for it."""

    reason: str = ""
    meta: Any = None
    margin_call_id: str | None = None


def new_id() -> str:
    """Return the id of a new order."""
    return f"ord_{secrets.token_hex(10)}"


async def add(
    tx: Tx, agent_id: str, order_id: str, order: Order, labels: Labels, trade: Trade | None = None
) -> StoredOrder:
    """Write an order: filled by the trade, or (None) waiting for fills."""
    row = {
        "id": order_id,
        "agent_id": agent_id,
        "symbol": order.symbol,
        "side": order.side,
        "size": order.size,
        "order_type": "market",
        "reduce_only": order.reduce_only,
        "leverage": order.leverage,
        "margin_mode": order.margin_mode,
        "meta": labels.meta,
        "reason": labels.reason,
        "margin_call_id": labels.margin_call_id,
        "status": "pending",
        "filled_size": ZERO,
        "realized_pnl": ZERO,
        "created_at": tx.now,
    }
    if trade is not None:
        row |= {
            "status": "filled",
            "fill_price": trade.price,
            "filled_size": trade.closed + trade.opened,
            "realized_pnl": trade.realized_pnl,
            "position_id": position_of(trade),
            "closed_at": tx.now,
        }
    stored = (await tx.connection.execute(insert(orders).values(row).returning(orders))).mappings().one()
    return StoredOrder(**stored)


def position_of(trade: Trade) -> str | None:
    """Return the id of the position that a trade made, changed or closed."""
    touched = trade.after or trade.before
    return None if touched is None else touched.id


async def add_fill(
    tx: Tx, order: StoredOrder, fill_id: str, fee: Decimal, trade: Trade
) -> tuple[StoredOrder, StoredFill]:
    """Write a venue's fill and what it makes of its order; one that is cancelled stays so until it is whole."""
    size = trade.closed + trade.opened
    filled = order.filled_size + size
    status = "filled" if filled == order.size else "cancelled" if order.status == "cancelled" else "partially_filled"
    fill = StoredFill(
        order.id, fill_id, size, trade.price, fee, trade.realized_pnl, position_of(trade), filled, status, tx.now
    )
    row = {name: getattr(fill, name) for name in StoredFill.__slots__}
    await tx.connection.execute(insert(order_fills).values(row))
    columns = order_fills.c
    value = select(func.sum(columns.size * columns.price)).where(columns.order_id == order.id)
    change = {
        "status": status,
        "fill_price": round_owned((await tx.connection.execute(value)).scalar_one() / filled, PRICE_DECIMALS),
        "filled_size": filled,
        "realized_pnl": order.realized_pnl + trade.realized_pnl,
        "fees": order.fees + fee,
        "position_id": fill.position_id,
        "closed_at": order.closed_at or (tx.now if status == "filled" else None),
    }
    statement = update(orders).where(orders.c.id == order.id).values(change).returning(orders)
    return StoredOrder(**(await tx.connection.execute(statement)).mappings().one()), fill


async def cancel(tx: Tx, ids: Collection[str]) -> None:
    """Cancel what remains of orders that wait for fills."""
    if ids:
        change = {"status": "cancelled", "closed_at": tx.now}
        await tx.connection.execute(update(orders).where(orders.c.id.in_(ids)).values(change))


async def get(tx: Tx, agent_id: str, order_id: str) -> StoredOrder:
    """Return an order of the agent. Raises NotFoundError."""
    query = select(orders).where(orders.c.agent_id == agent_id, orders.c.id == order_id)
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such order.", code="order_not_found")
    return StoredOrder(**row)


async def find_fill(tx: Tx, order_id: str, fill_id: str) -> StoredFill | None:
    """Return the fill that a venue reported under this id, or None."""
    columns = order_fills.c
    query = select(order_fills).where(columns.order_id == order_id, columns.fill_id == fill_id)
    row = (await tx.connection.execute(query)).mappings().first()
    return None if row is None else StoredFill(**row)


async def list_fills(tx: Tx, order_id: str, limit: int) -> list[StoredFill]:
    """Return an order's fills in the order in which they were recorded."""
    query = select(order_fills).where(order_fills.c.order_id == order_id).order_by(order_fills.c.filled_size)
    return [StoredFill(**row) for row in (await tx.connection.execute(query.limit(limit))).mappings()]


async def list_orders(
    tx: Tx, agent_id: str, limit: int, before: int | None = None, *, pending: bool = False
) -> list[StoredOrder]:
    """Return an agent's orders, newest first, from below the number `before`; or those alone that wait for fills."""
    query = select(orders).where(orders.c.agent_id == agent_id).order_by(orders.c.seq.desc())
    if pending:
        query = query.where(orders.c.status.in_(PENDING_STATES))
    if before is not None:
        query = query.where(orders.c.seq < before)
    rows = await tx.connection.execute(query.limit(min(limit, ORDERS_A_PAGE_MAX)))
    return [StoredOrder(**row) for row in rows.mappings()]
