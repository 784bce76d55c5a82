"""Orders: checked against the margin that they would leave, then filled at the stored mark, or sent to wait for fills.

An account of `book` execution is filled at once. One of `venue` execution trades elsewhere: what is booked here waits
for the fills that are reported of it, see `venue`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Context, Decimal

from app.db.session import Tx
from app.domain.book import Book, OpenPosition, OpenReservation
from app.domain.money import DECIMALS_MAX, checked_amount, plain, round_owed, to_decimal
from app.domain.quote import AccountFigures
from app.domain.trade import Contract, Order, OrderSide, Trade, plan
from app.errors import ConflictError, NotFoundError, conflict, invalid
from app.services import audit, ledger, market, market_rules, orders, positions, wallet
from app.services.margin import Scene, by_mark, refusal_error
from app.services.orders import Labels, StoredOrder
from app.services.wallet import Names, Reservation

SERVICE = "trading"
SIZE_SEARCH_STEPS = 24
SIZE_SEARCH_POSITIONS_MAX = 50
"""Larger books are told no largest size: each step of the search assesses the whole book."""
SIZE_SEARCH_PENDING_MAX = 10
_UNLABELLED = Labels()
_SIZE_DIGITS = Context(prec=8, rounding=ROUND_FLOOR)


@dataclass(frozen=True, slots=True)
class Filled:
    """An order, filled or waiting, the position that is then open in its symbol, and the book that it left."""

    order: StoredOrder
    position: OpenPosition | None
    book: Book


async def submit(tx: Tx, scene: Scene, held: Book, order: Order, named: Names, labels: Labels = _UNLABELLED) -> Filled:
    """Fill an order at the mark, or let it wait for its venue. What opens must pass the gates. The book is locked.

    It is judged on top of the orders that wait on its side of its symbol, so that many pass no more than one.

    Raises ConflictError with the shortfall and the largest size that would pass, or for a stale mark; InvalidError
    for a symbol that is not traded here, or without a price.
    """
    market_rules.check_symbol("/symbol", order.symbol)
    order = replace(order, size=checked_amount("/size", order.size))
    contract, mark = by_mark(scene.market, order.symbol)
    base = _behind(scene, held, order)
    trade = plan(base, order, contract, mark.exact, f"pos_{secrets.token_hex(10)}", tx.now)
    if trade.is_opening:
        await _check_traded(tx, scene, order.symbol)
        _check_opening(scene, base, order, contract, trade)
    if held.settings.execution == "book":
        return await fill(tx, held, order, trade, named, labels)
    waiting = await wait(tx, held, order, labels)
    scene.require_room(waiting.book)
    return waiting


async def reduce(
    tx: Tx, scene: Scene, held: Book, target_id: str, fraction: Decimal, named: Names, reason: str
) -> Filled | tuple[Reservation, Book]:
    """Reduce an open position, or release a reducible reservation, by a fraction of what there is."""
    position = next((p for p in held.positions if p.id == target_id), None)
    if position is not None:
        _check_reducible(position)
        side: OrderSide = "sell" if position.side == "long" else "buy"
        order = Order(position.symbol, side, _part(position.size, fraction), reduce_only=True)
        return await submit(tx, scene, held, order, named, Labels(reason))
    reservation = next((r for r in held.reservations if r.id == target_id), None)
    if reservation is None:
        raise await _gone(tx, held.agent_id, target_id)
    _check_reducible(reservation)
    return await wallet.release(tx, held, target_id, _part(reservation.remaining, fraction), named)


def _behind(scene: Scene, held: Book, order: Order) -> Book:
    """Return the book after the orders that wait on the same side of the symbol."""
    ahead = [o for o in held.pending if (o.symbol, o.side) == (order.symbol, order.side)]
    return scene.filled(held, ahead)


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
    exposed = scene.exposed(trade.book)
    after = scene.figures(exposed)
    scene.require_fresh(after)
    wallet.require_delegated(held, SERVICE)
    if held.opens_nothing is not None:
        raise conflict("/reduce_only", "reduce_only", held.opens_nothing)
    figures = scene.figures(scene.exposed(_after_closing(held, order, contract, trade, scene)))
    if held.settings.margin_mode == "portfolio" and not figures.eligible:
        least = scene.market.parameters.models.portfolio_minimum_equity
        detail = f"equity is below the {least:,.0f} USD that portfolio margin asks for: reduce only"
        raise conflict("/reduce_only", "reduce_only", detail)
    refused = scene.judge(figures, after, exposed) or scene.crowding(held, trade.book, figures, after)
    if refused is not None:
        small = len(held.positions) <= SIZE_SEARCH_POSITIONS_MAX and len(held.pending) <= SIZE_SEARCH_PENDING_MAX
        largest = _largest_size(scene, held, figures, order, contract, trade) if small else None
        raise refusal_error(refused, "/size", size_max=largest)


def _after_closing(held: Book, order: Order, contract: Contract, trade: Trade, scene: Scene) -> Book:
    """Return the book that what the order opens is judged against: what it closes first is no credit to it."""
    if trade.closed == 0:
        return held
    return plan(held, replace(order, size=trade.closed), contract, trade.price, "", scene.now).book


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
        smaller = plan(held, replace(order, size=middle), contract, trade.price, "", scene.now).book
        exposed = scene.exposed(smaller)
        after = scene.figures(exposed)
        passes = scene.judge(figures, after, exposed) is None and scene.crowding(held, smaller, figures, after) is None
        low, high = (middle, high) if passes else (low, middle)
    return low


async def fill(tx: Tx, held: Book, order: Order, trade: Trade, named: Names, labels: Labels) -> Filled:
    """Write what a planned trade does to a locked book: money, position, order. Raises ConflictError."""
    order_id = orders.new_id()
    await post(tx, held.agent_id, trade, named, order_id)
    stored = await orders.add(tx, held.agent_id, order_id, order, labels, trade)
    detail = {"symbol": order.symbol, "side": order.side, "size": str(order.size), "price": str(trade.price)}
    await audit.record(tx, "order.filled", order_id, held.agent_id, reason=labels.reason, **detail)
    return Filled(stored, trade.after, trade.book)


async def post(tx: Tx, agent_id: str, trade: Trade, named: Names, order_id: str) -> None:
    """Write the money and the position of a trade. Raises ConflictError."""
    # money first: a purse that does not cover it refuses before anything else is written
    for posting in trade.postings:
        await ledger.post(tx, named.occasion(agent_id, SERVICE, posting.kind, order_id), posting.moves)
    await positions.store(tx, agent_id, trade.before, trade.after, trade.realized_pnl)


async def wait(tx: Tx, held: Book, order: Order, labels: Labels) -> Filled:
    """Book an order that waits for the fills of its venue."""
    stored = await orders.add(tx, held.agent_id, orders.new_id(), order, labels)
    detail = {"symbol": order.symbol, "side": order.side, "size": str(order.size)}
    await audit.record(tx, "order.pending", stored.id, held.agent_id, reason=labels.reason, **detail)
    waiting = replace(held, pending=[*held.pending, stored.pending()])
    return Filled(stored, held.position(order.symbol), waiting)


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
