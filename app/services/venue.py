"""Orders of accounts that trade at a venue: the fills that are reported of them, and their end.

A fill is a fact. It is booked at the venue's price whatever the account then looks like, on stale prices too, and on an
order that was cancelled here too late.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from app.db.session import Tx
from app.domain.book import ZERO, Book, PendingOrder, Side
from app.domain.money import checked_amount, plain
from app.domain.moves import SETTLEMENT_DECIMALS
from app.domain.pending import mode_at_fill
from app.domain.trade import Order, Trade, charged, plan
from app.errors import conflict
from app.services import audit, orders, trading
from app.services.margin import Scene, by_mark
from app.services.orders import StoredFill, StoredOrder
from app.services.wallet import Names


@dataclass(frozen=True, slots=True)
class Fill:
    """What a venue reports: contracts of an order, the price, the fee in USDC; `confirm`: however odd the price."""

    fill_id: str
    size: Decimal
    price: Decimal
    fee: Decimal = ZERO
    confirm: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """A fill as stored, its order, the book that it left; `trade` is None for one that was recorded before."""

    order: StoredOrder
    fill: StoredFill
    book: Book
    trade: Trade | None


async def record(
    tx: Tx, scene: Scene, held: Book, order_id: str, reported: Fill, named: Names, distance_max: Decimal
) -> Recorded:
    """Book a fill of an order. The book is locked; the same fill again changes nothing.

    Raises NotFoundError, InvalidError, and ConflictError: `fill_conflict` for another fill under a known id,
    `fill_above_order`, `price_off_mark` further than `distance_max` (a fraction) from the mark, and `would_flip` or
    `nothing_to_reduce` where a reduce-only order meets less than it fills: another fill has not been reported yet.
    """
    reported = _checked(reported)
    order = await orders.get(tx, held.agent_id, order_id)
    known = await orders.find_fill(tx, order_id, reported.fill_id)
    if known is not None:
        _check_same(known, reported)
        return Recorded(order, known, held, None)
    if reported.size > order.remaining:
        detail = f"{plain(order.remaining):f} contracts of the order are not filled yet"
        raise conflict("/size", "fill_above_order", detail)
    trade = _trade(tx, scene, held, order, reported, distance_max)
    await trading.post(tx, held.agent_id, trade, named, order.id)
    stored, fill = await orders.add_fill(tx, order, reported.fill_id, reported.fee, trade)
    shown = {name: str(getattr(fill, name)) for name in ("fill_id", "size", "price", "fee")}
    await audit.record(tx, "order.fill", order.id, held.agent_id, confirmed=str(reported.confirm), **shown)
    return Recorded(stored, fill, _still_pending(trade.book, stored), trade)


async def cancel(tx: Tx, held: Book, order_id: str, reason: str = "") -> tuple[StoredOrder, Book]:
    """Cancel what remains of an order; again does nothing. The book is locked.

    Raises NotFoundError, and ConflictError: `order_closed` for one that is filled, `liquidation_order`.
    """
    order = await orders.get(tx, held.agent_id, order_id)
    if order.status == "cancelled":
        return order, held
    if order.status == "filled":
        raise conflict("/status", "order_closed", "the order is filled")
    if order.margin_call_id is not None:
        raise conflict("/id", "liquidation_order", "a margin call asked for it: its cure or its end cancels it")
    left = await withdraw(tx, held, [order.pending()], reason)
    return replace(order, status="cancelled", closed_at=tx.now), left


async def withdraw(tx: Tx, held: Book, pending: Sequence[PendingOrder], reason: str) -> Book:
    """Cancel orders that wait for fills, and return the book without them."""
    ids = [order.id for order in pending]
    await orders.cancel(tx, ids)
    for order_id in ids:
        await audit.record(tx, "order.cancelled", order_id, held.agent_id, reason=reason)
    return held.without_pending(ids)


def _checked(reported: Fill) -> Fill:
    fee = ZERO if reported.fee == 0 else checked_amount("/fee", reported.fee, SETTLEMENT_DECIMALS)
    size, price = checked_amount("/size", reported.size), checked_amount("/price", reported.price)
    return replace(reported, size=size, price=price, fee=fee)


def _check_same(known: StoredFill, reported: Fill) -> None:
    for name in ("size", "price", "fee"):
        was = getattr(known, name)
        if was != getattr(reported, name):
            detail = f"this fill was recorded with a {name} of {plain(was):f}"
            raise conflict(f"/{name}", "fill_conflict", detail)


def _trade(tx: Tx, scene: Scene, held: Book, order: StoredOrder, reported: Fill, distance_max: Decimal) -> Trade:
    contract, mark = by_mark(scene.market, order.symbol)
    if not reported.confirm and abs(reported.price - mark.exact) > distance_max * mark.exact:
        detail = f"further than {distance_max:%} from the mark of {plain(mark.exact):f}: if it is so, send confirm"
        raise conflict("/price", "price_off_mark", detail)
    pending = order.pending()
    side: Side = "long" if pending.side == "buy" else "short"
    mode = mode_at_fill(held.position(order.symbol), side, pending.margin_mode)
    asked = Order(order.symbol, pending.side, reported.size, order.reduce_only, order.leverage, mode, executed=True)
    trade = plan(held, asked, contract, reported.price, f"pos_{secrets.token_hex(10)}", tx.now)
    return charged(trade, reported.fee)


def _still_pending(book: Book, order: StoredOrder) -> Book:
    """Return the book with what now remains of an order, where it waits for more."""
    left = book.without_pending([order.id])
    if order.status != "partially_filled":
        return left
    return replace(left, pending=[*left.pending, order.pending()])
