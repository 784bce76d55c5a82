"""What an order does to a book at a price: positions, realised profit and loss, the money that moves. Pure.

Profit and loss is paid in USDC, rounded down, so that dust is never in the agent's favour. A loss beyond what is free
is owed from then on; that of an isolated position stops at its allocation, and what lies beyond is the house's deficit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Literal

from app.domain.book import ZERO, Book, OpenPosition, PositionMode, Side
from app.domain.money import AMOUNT_MAX, plain, round_owed, round_owned
from app.domain.moves import (
    SETTLEMENT_ASSET,
    SETTLEMENT_DECIMALS,
    Move,
    agent,
    house,
    pay_in,
    take_out,
)
from app.errors import conflict, invalid

OrderSide = Literal["buy", "sell"]
MoveKind = Literal["realized_pnl", "deficit", "allocate", "deallocate", "fee"]

PRICE_DECIMALS = 18


@dataclass(frozen=True, slots=True)
class Order:
    """A market order for `size` contracts. Leverage and mode None: the position's, else the market's and account's.

    One that is `executed` has happened at a venue: an isolated position then takes what is free, where that is less
    than it should have.
    """

    symbol: str
    side: OrderSide
    size: Decimal
    reduce_only: bool = False
    leverage: Decimal | None = None
    margin_mode: PositionMode | None = None
    executed: bool = False


@dataclass(frozen=True, slots=True)
class Contract:
    """What an order needs of its market: contract size, and the initial margin rate without leverage."""

    contract_size: Decimal
    initial_rate: Decimal


@dataclass(frozen=True, slots=True)
class Posting:
    """Moves of one kind, for one ledger batch."""

    kind: MoveKind
    moves: Sequence[Move]


@dataclass(frozen=True, slots=True)
class Trade:
    """What an order comes to. `before` and `after` are the position that it meets and what is then open in the symbol.

    `closed` and `opened` are contracts, `realized_pnl` USDC. After a flip `after` is another position than `before`.
    """

    before: OpenPosition | None
    after: OpenPosition | None
    price: Decimal
    closed: Decimal
    opened: Decimal
    realized_pnl: Decimal
    postings: Sequence[Posting]
    book: Book

    @property
    def is_opening(self) -> bool:
        """Whether it adds to a position or opens one."""
        return self.opened > 0

    @property
    def deficit(self) -> Decimal:
        """USDC of loss beyond an isolated position's allocation, which is the house's."""
        moves = (move for posting in self.postings if posting.kind == "deficit" for move in posting.moves)
        return sum((move.amount for move in moves), ZERO)


def plan(book: Book, order: Order, contract: Contract, price: Decimal, new_id: str, now: datetime) -> Trade:
    """Return what the order does at the price.

    Raises ConflictError where reduce_only or the margin mode forbids it, InvalidError for a position too large to book.
    """
    held = book.position(order.symbol)
    side: Side = "long" if order.side == "buy" else "short"
    closing = min(order.size, held.size) if held is not None and held.side != side else ZERO
    opening = order.size - closing
    _check_reduce_only(order, held, closing)
    postings: list[Posting] = []
    left, realized = held, ZERO
    if held is not None and closing > 0:
        left, realized, postings = _close(book, held, closing, contract, price)
        book = _applied(book, postings).with_position(held, left)
    after = left
    if opening > 0:
        after, added = _open(book, left, order, opening, contract, price, new_id, now)
        postings = [*postings, *added]
        book = _applied(book, added).with_position(left, after)
    return Trade(held, after, price, closing, opening, realized, postings, book)


def charged(trade: Trade, fee: Decimal) -> Trade:
    """Return the trade with a fee in USDC >= 0 paid: out of what is free, the rest is owed."""
    if fee == 0:
        return trade
    free = trade.book.holding(SETTLEMENT_ASSET).free
    moves = take_out(trade.book.agent_id, SETTLEMENT_ASSET, fee, house("trading"), free)
    paid = Posting("fee", moves)
    return replace(trade, postings=[*trade.postings, paid], book=_applied(trade.book, [paid]))


def _check_reduce_only(order: Order, held: OpenPosition | None, closing: Decimal) -> None:
    if not order.reduce_only:
        return
    if closing == 0:
        what = "there is no position" if held is None else f"the position is {held.side} too"
        raise conflict("/reduce_only", "nothing_to_reduce", f"{what}: a reduce-only order has nothing to reduce")
    if order.size > closing:
        detail = f"a reduce-only order never flips: the position has {plain(closing):f} contracts"
        raise conflict("/size", "would_flip", detail)


def _applied(book: Book, postings: Sequence[Posting]) -> Book:
    return book.after_moves([move for posting in postings for move in posting.moves])


def _gain(held: OpenPosition, size: Decimal, contract: Contract, price: Decimal) -> Decimal:
    """Return the profit or loss of contracts of a position at a price, rounded down."""
    direction = 1 if held.side == "long" else -1
    return round_owned(size * contract.contract_size * direction * (price - held.entry_price), SETTLEMENT_DECIMALS)


def _close(
    book: Book, held: OpenPosition, size: Decimal, contract: Contract, price: Decimal
) -> tuple[OpenPosition | None, Decimal, list[Posting]]:
    """Return what is left of a position, the profit or loss of what is closed, and the money that moves."""
    pnl = _gain(held, size, contract, price)
    remaining = held.size - size
    if held.margin_mode == "isolated":
        allocated, postings = _isolated_close(book, held, size, pnl)
    else:
        allocated, postings = ZERO, _pooled_close(book, pnl)
    if remaining == 0:
        return None, pnl, postings
    left = replace(held, size=remaining, allocated=allocated, realized_pnl=held.realized_pnl + pnl)
    return left, pnl, postings


def _pooled_close(book: Book, pnl: Decimal) -> list[Posting]:
    money = book.holding(SETTLEMENT_ASSET)
    if pnl > 0:
        moves = pay_in(book.agent_id, SETTLEMENT_ASSET, pnl, house("trading"), money.owed)
    else:
        moves = take_out(book.agent_id, SETTLEMENT_ASSET, -pnl, house("trading"), money.free)
    return [Posting("realized_pnl", moves)] if moves else []


def _isolated_close(book: Book, held: OpenPosition, size: Decimal, pnl: Decimal) -> tuple[Decimal, list[Posting]]:
    """Return the allocation that stays, and the moves.

    The closed part's loss comes out of its own share of the allocation, then out of the rest, and is the house's beyond
    that; only what its share has left is given back, so that closing in parts gives no more than closing at once.
    """
    own = agent(book.agent_id, "allocated")
    owed = book.holding(SETTLEMENT_ASSET).owed
    whole = size == held.size
    share = held.allocated if whole else round_owned(held.allocated * size / held.size, SETTLEMENT_DECIMALS)
    postings = []
    loss = min(max(-pnl, ZERO), held.allocated)
    if loss > 0:
        postings.append(Posting("realized_pnl", [Move(SETTLEMENT_ASSET, loss, own, house("trading"))]))
    if -pnl > loss:
        beyond = Move(SETTLEMENT_ASSET, -pnl - loss, house("deficit"), house("trading"))
        postings.append(Posting("deficit", [beyond]))
    if pnl > 0:
        postings.append(Posting("realized_pnl", pay_in(book.agent_id, SETTLEMENT_ASSET, pnl, house("trading"), owed)))
        owed -= min(owed, pnl)
    given_back = max(ZERO, share - loss)
    if given_back > 0:
        postings.append(Posting("deallocate", pay_in(book.agent_id, SETTLEMENT_ASSET, given_back, own, owed)))
    return held.allocated - loss - given_back, postings


def _open(
    book: Book,
    held: OpenPosition | None,
    order: Order,
    size: Decimal,
    contract: Contract,
    price: Decimal,
    new_id: str,
    now: datetime,
) -> tuple[OpenPosition, list[Posting]]:
    mode = _mode(book, held, order)
    side: Side = "long" if order.side == "buy" else "short"
    leverage = order.leverage if order.leverage is not None or held is None else held.leverage
    total = size if held is None else held.size + size
    if total >= AMOUNT_MAX:
        raise invalid("/size", "number_out_of_range", f"a position stays below {AMOUNT_MAX:f} contracts")
    allocation, postings = ZERO, []
    if mode == "isolated":
        allocation = _allocation(held, size, contract, price, _rate(contract, leverage))
        if order.executed:
            allocation = min(allocation, book.holding(SETTLEMENT_ASSET).free)
        moves = [Move(SETTLEMENT_ASSET, allocation, agent(book.agent_id, "free"), agent(book.agent_id, "allocated"))]
        postings = [Posting("allocate", moves)] if allocation > 0 else []
    if held is None:
        opened = OpenPosition(
            new_id, order.symbol, side, size, price, leverage, mode, allocation, ZERO, reducible=True, opened_at=now
        )
        return opened, postings
    grown = replace(
        held,
        size=total,
        entry_price=_average(held, size, price),
        leverage=leverage,
        allocated=held.allocated + allocation,
    )
    return grown, postings


def _allocation(held: OpenPosition | None, size: Decimal, contract: Contract, price: Decimal, rate: Decimal) -> Decimal:
    """Return what an isolated position takes for further contracts, rounded up.

    Their initial margin, or more where the position as a whole, its loss so far paid, would have less than its own.
    """
    each = contract.contract_size * price * rate
    added = size * each
    if held is None:
        return round_owed(added, SETTLEMENT_DECIMALS)
    loss = max(ZERO, -_gain(held, held.size, contract, price))
    whole = (held.size + size) * each + loss - held.allocated
    return round_owed(max(added, whole), SETTLEMENT_DECIMALS)


def _mode(book: Book, held: OpenPosition | None, order: Order) -> PositionMode:
    if held is None:
        return order.margin_mode or ("isolated" if book.settings.margin_mode == "isolated" else "pooled")
    if order.margin_mode is not None and order.margin_mode != held.margin_mode:
        detail = f"the open position in {held.symbol} is {held.margin_mode}: close it first"
        raise conflict("/margin_mode", "margin_mode_conflict", detail)
    return held.margin_mode


def _rate(contract: Contract, leverage: Decimal | None) -> Decimal:
    """Return max(market rate, 1/leverage): a position's own leverage only raises it."""
    return contract.initial_rate if leverage is None else max(contract.initial_rate, 1 / leverage)


def _average(held: OpenPosition, size: Decimal, price: Decimal) -> Decimal:
    """Return the average entry price, rounded against the agent: up for a long, down for a short."""
    average = (held.size * held.entry_price + size * price) / (held.size + size)
    return round_owed(average, PRICE_DECIMALS) if held.side == "long" else round_owned(average, PRICE_DECIMALS)
