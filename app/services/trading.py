"""Orders: checked against the margin that they would leave, filled at the stored mark, booked at once."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

from sqlalchemy import insert, select

from app.db.session import Tx
from app.db.tables import orders
from app.domain.book import Book, OpenPosition, OpenReservation
from app.domain.gates import Refusal
from app.domain.money import DECIMALS_MAX, checked_amount, plain, round_owed, to_decimal, to_float
from app.domain.moves import SETTLEMENT_ASSET
from app.domain.quote import AccountFigures
from app.domain.trade import Contract, Order, OrderSide, Trade, plan
from app.errors import ConflictError, NotFoundError, conflict, invalid
from app.services import audit, ledger, market, market_rules, positions, wallet
from app.services.margin import Scene, by_mark, refusal_error
from app.services.wallet import Names, Reservation

ORDERS_A_PAGE_MAX = 200
SIZE_SEARCH_STEPS = 24
SIZE_SEARCH_POSITIONS_MAX = 50
"""Larger books are told no largest size: each step of the search assesses the whole book."""
_SIZE_DIGITS = Context(prec=8, rounding=ROUND_FLOOR)


@dataclass(frozen=True, slots=True)
class StoredOrder:
    """An order as booked; `fill_price` is the mark it was filled at."""

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


@dataclass(frozen=True, slots=True)
class Filled:
    """An order, the position that is then open in its symbol, and the book that it left."""

    order: StoredOrder
    position: OpenPosition | None
    book: Book


async def submit(
    tx: Tx, scene: Scene, held: Book, order: Order, named: Names, reason: str = "", meta: Any = None
) -> Filled:
    """Fill an order at the mark. What opens must pass the gates; what only reduces always may. The book is locked.

    Raises ConflictError with the shortfall and the largest size that would pass, or for a stale mark; InvalidError
    for a symbol that is not traded here, or without a price.
    """
    market_rules.check_symbol("/symbol", order.symbol)
    order = replace(order, size=checked_amount("/size", order.size))
    contract, mark = by_mark(scene.market, order.symbol)
    trade = plan(held, order, contract, mark.exact, f"pos_{secrets.token_hex(10)}", tx.now)
    if trade.is_opening:
        await _check_traded(tx, scene, order.symbol)
        _check_opening(scene, held, order, contract, trade)
    return await fill(tx, held, order, trade, named, reason, meta)


async def reduce(
    tx: Tx, scene: Scene, held: Book, target_id: str, fraction: Decimal, named: Names, reason: str
) -> Filled | tuple[Reservation, Book]:
    """Reduce an open position, or release a reducible reservation, by a fraction of what there is."""
    position = next((p for p in held.positions if p.id == target_id), None)
    if position is not None:
        _check_reducible(position)
        side: OrderSide = "sell" if position.side == "long" else "buy"
        order = Order(position.symbol, side, _part(position.size, fraction), reduce_only=True)
        contract, mark = by_mark(scene.market, order.symbol)
        trade = plan(held, order, contract, mark.exact, "", tx.now)
        return await fill(tx, held, order, trade, named, reason, None)
    reservation = next((r for r in held.reservations if r.id == target_id), None)
    if reservation is None:
        raise await _gone(tx, held.agent_id, target_id)
    _check_reducible(reservation)
    return await wallet.release(tx, held, target_id, _part(reservation.remaining, fraction), named)


async def get_order(tx: Tx, agent_id: str, order_id: str) -> StoredOrder:
    """Return an order of the agent. Raises NotFoundError."""
    query = select(orders).where(orders.c.agent_id == agent_id, orders.c.id == order_id)
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such order.", code="order_not_found")
    return StoredOrder(**row)


async def list_orders(tx: Tx, agent_id: str, limit: int, before: int | None = None) -> list[StoredOrder]:
    """Return an agent's orders, newest first, from below the number `before`."""
    query = select(orders).where(orders.c.agent_id == agent_id).order_by(orders.c.seq.desc())
    if before is not None:
        query = query.where(orders.c.seq < before)
    rows = await tx.connection.execute(query.limit(min(limit, ORDERS_A_PAGE_MAX)))
    return [StoredOrder(**row) for row in rows.mappings()]


async def _check_traded(tx: Tx, scene: Scene, symbol: str) -> None:
    """Refuse to open what is neither a listed instrument nor the one perpetual that an asset's name implies.

    While the latter is opened nobody lists the symbol as another contract.
    """
    parameters = scene.market.parameters
    if symbol in parameters.instruments:
        return
    if symbol == f"{parameters.underlying_of(symbol)}-PERP":
        await market.hold_parameters(tx, parameters.version)
        return
    detail = f"{symbol} is not listed: orders open listed instruments, or ASSET-PERP"
    raise invalid("/symbol", "not_listed", detail)


def _check_opening(scene: Scene, held: Book, order: Order, contract: Contract, trade: Trade) -> None:
    """Refuse an opening order that the account can't carry. Raises ConflictError."""
    scene.require_room(trade.book)
    after = scene.figures(trade.book)
    scene.require_fresh(after)
    if held.opens_nothing is not None:
        raise conflict("/reduce_only", "reduce_only", held.opens_nothing)
    figures = scene.figures(_after_closing(held, order, contract, trade, scene))
    if held.settings.margin_mode == "portfolio" and not figures.eligible:
        least = scene.market.parameters.models.portfolio_minimum_equity
        detail = f"equity is below the {least:,.0f} USD that portfolio margin asks for: reduce only"
        raise conflict("/reduce_only", "reduce_only", detail)
    refused = _refusal(scene, figures, after, trade)
    if refused is not None:
        small = len(held.positions) <= SIZE_SEARCH_POSITIONS_MAX
        largest = _largest_size(scene, held, figures, order, contract, trade) if small else None
        raise refusal_error(refused, "/size", size_max=largest)


def _after_closing(held: Book, order: Order, contract: Contract, trade: Trade, scene: Scene) -> Book:
    """Return the book that what the order opens is judged against: what it closes first is no credit to it."""
    if trade.closed == 0:
        return held
    return plan(held, replace(order, size=trade.closed), contract, trade.price, "", scene.now).book


def _refusal(scene: Scene, before: AccountFigures, after: AccountFigures, trade: Trade) -> Refusal | None:
    free = trade.book.holding(SETTLEMENT_ASSET).free
    if free < 0:
        detail = f"the allocation takes {plain(-free):f} {SETTLEMENT_ASSET} more than are free"
        return Refusal("insufficient_margin", detail, to_float(-free))
    return scene.judge(before, after, trade.book)


def _largest_size(
    scene: Scene, held: Book, figures: AccountFigures, order: Order, contract: Contract, trade: Trade
) -> Decimal:
    """Return the largest size that passes, to eight digits, found by halving: what only closes always passes.

    What opens can't exceed the leverage cap, so that the search starts there.
    """
    cap = scene.market.parameters.policy.leverage_cap * max(figures.equity, 0.0)
    reach = to_decimal(cap) / (contract.contract_size * trade.price)
    low, high = trade.closed, min(order.size, trade.closed + 2 * reach)
    for _ in range(SIZE_SEARCH_STEPS):
        middle = _SIZE_DIGITS.plus((low + high) / 2)
        if not low < middle < high:
            break
        smaller = plan(held, replace(order, size=middle), contract, trade.price, "", scene.now)
        passes = _refusal(scene, figures, scene.figures(smaller.book), smaller) is None
        low, high = (middle, high) if passes else (low, middle)
    return low


async def fill(tx: Tx, held: Book, order: Order, trade: Trade, named: Names, reason: str, meta: Any) -> Filled:
    """Write what a planned trade does to a locked book: money, position, order. Raises ConflictError."""
    agent_id = held.agent_id
    order_id = f"ord_{secrets.token_hex(10)}"
    # money first: a purse that does not cover it refuses before anything else is written
    for posting in trade.postings:
        occasion = named.occasion(agent_id, "trading", posting.kind, order_id)
        await ledger.post(tx, occasion, posting.moves)
    await positions.store(tx, agent_id, trade.before, trade.after, trade.realized_pnl)
    touched = trade.after or trade.before
    row = {
        "id": order_id,
        "agent_id": agent_id,
        "symbol": order.symbol,
        "side": order.side,
        "size": order.size,
        "order_type": "market",
        "reduce_only": order.reduce_only,
        "leverage": order.leverage,
        "meta": meta,
        "reason": reason,
        "status": "filled",
        "fill_price": trade.price,
        "filled_size": trade.closed + trade.opened,
        "realized_pnl": trade.realized_pnl,
        "position_id": None if touched is None else touched.id,
        "created_at": tx.now,
    }
    stored = (await tx.connection.execute(insert(orders).values(row).returning(orders))).mappings().one()
    detail = {"symbol": order.symbol, "side": order.side, "size": str(order.size), "price": str(trade.price)}
    await audit.record(tx, "order.filled", order_id, agent_id, reason=reason, **detail)
    return Filled(StoredOrder(**stored), trade.after, trade.book)


def _check_reducible(target: OpenPosition | OpenReservation) -> None:
    if not target.reducible:
        raise conflict("/id", "not_reducible", "it is not reducible: release or settle it")


def _part(whole: Decimal, fraction: Decimal) -> Decimal:
    """Return the fraction of the whole, rounded up: who asks to reduce is not left with dust."""
    return plain(min(whole, round_owed(whole * fraction, DECIMALS_MAX)))


async def _gone(tx: Tx, agent_id: str, target_id: str) -> ConflictError | NotFoundError:
    """Return why nothing can be reduced: closed already, or none of the agent's."""
    for find in (positions.get, wallet.get_reservation):
        try:
            await find(tx, agent_id, target_id)
        except NotFoundError:
            continue
        return conflict("/id", "already_closed", "it is closed already")
    return NotFoundError("There is no such position or reservation.", code="position_not_found")
