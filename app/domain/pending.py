"""Orders that wait at a venue: what they would make of a book, and what the gates must count of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from decimal import Decimal

from app.domain.book import Book, OpenPosition, PendingOrder, PositionMode, Side
from app.domain.money import to_decimal, to_float
from app.domain.parameters import MarketParameters
from app.domain.prices import StoredPrice
from app.domain.quote import account_figures
from app.domain.trade import Contract, Order, plan
from app.errors import invalid

Prices = Mapping[str, StoredPrice]


def at_mark(parameters: MarketParameters, stored: Prices, symbol: str) -> tuple[Contract, StoredPrice]:
    """Return the contract of a symbol and its mark: its own stored price, else its underlying's.

    Raises InvalidError where there is none.
    """
    underlying = parameters.underlying_of(symbol)
    mark = stored.get(symbol) or stored.get(underlying)
    if mark is None:
        raise invalid("/symbol", "missing_price", f"no price for {symbol} nor for {underlying}: post one to the market")
    figures = parameters.market(symbol, underlying)
    return Contract(to_decimal(figures.contract_size), to_decimal(figures.initial_margin_rate)), mark


def mode_at_fill(held: OpenPosition | None, side: Side, asked: PositionMode | None) -> PositionMode | None:
    """Return the mode that a fill goes by: of the position that it adds to, whatever the order asked for then."""
    return held.margin_mode if held is not None and held.side == side else asked


def filled(
    book: Book, orders: Sequence[PendingOrder], parameters: MarketParameters, stored: Prices, now: datetime
) -> Book:
    """Return the book with what remains of these orders filled at the mark, and no longer pending.

    Reduce-only orders fill as far as there is something to reduce. Raises InvalidError for a missing price.
    """
    book = book.without_pending({order.id for order in orders})
    for order in orders:
        held = book.position(order.symbol)
        side: Side = "long" if order.side == "buy" else "short"
        size = order.remaining
        if order.reduce_only:
            size = min(size, Decimal(0) if held is None or held.side == side else held.size)
        if size == 0:
            continue
        contract, mark = at_mark(parameters, stored, order.symbol)
        mode = mode_at_fill(held, side, order.margin_mode)
        asked = Order(order.symbol, order.side, size, order.reduce_only, order.leverage, mode)
        book = plan(book, asked, contract, mark.exact, f"new:{order.id}", now).book
    return book


def gross_reached(book: Book, parameters: MarketParameters, stored: Prices) -> float:
    """Return the gross notional, USD, that pending orders may lead to: the most on each symbol, whatever they hedge.

    On a symbol none of them, all that buy or all that sell are filled. Raises InvalidError for a missing price.
    """
    opening = [order for order in book.pending if not order.reduce_only]
    total = 0.0
    for symbol in {*(p.symbol for p in book.positions), *(order.symbol for order in opening)}:
        held, here = book.position(symbol), [order for order in opening if order.symbol == symbol]
        size = Decimal(0) if held is None else held.size if held.side == "long" else -held.size
        bought = size + sum(order.remaining for order in here if order.side == "buy")
        sold = size - sum(order.remaining for order in here if order.side == "sell")
        contract, mark = at_mark(parameters, stored, symbol)
        total += to_float(max(abs(size), abs(bought), abs(sold)) * contract.contract_size * mark.exact)
    return total


def exposed(book: Book, parameters: MarketParameters, stored: Prices, now: datetime) -> Book:
    """Return the book that the gates judge: with pending orders filled at the mark, as far as that asks for more.

    On each underlying none of them, all that buy or all that sell are taken as filled, whichever needs the most
    collateral: the two sides net, and either may come alone. Reduce-only orders never count. Source: docs/book.md,
    "Orders at a venue". Raises InvalidError for a missing price.
    """
    opening = [order for order in book.pending if not order.reduce_only]
    level = book.settings.policy(parameters.policy).gate_utilization

    def missing(candidate: Book) -> float:
        health = account_figures(candidate.quote_terms(parameters, stored), stored, now).health
        return health.required_initial / level - health.equity

    for underlying in sorted({parameters.underlying_of(order.symbol) for order in opening}):
        here = [order for order in opening if parameters.underlying_of(order.symbol) == underlying]
        sides = ([order for order in here if order.side == side] for side in ("buy", "sell"))
        alone = [filled(book, orders, parameters, stored, now) for orders in sides if orders]
        book = max([book, *alone], key=missing)
    return replace(book, pending=())
