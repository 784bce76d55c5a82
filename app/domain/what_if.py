"""What a change would make of a book: positions closed, added or replaced, judged as an order would be. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime

from app.domain.book import Book, OpenPosition
from app.domain.gates import Refusal, capped, refusal, stale_symbols
from app.domain.money import plain, to_decimal, to_float
from app.domain.moves import SETTLEMENT_ASSET
from app.domain.parameters import MarketParameters
from app.domain.pending import exposed, gross_reached
from app.domain.prices import StoredPrice
from app.domain.quote import MarginQuote, margin_quote
from app.domain.terms import PositionTerms
from app.domain.trade import Contract, Order, OrderSide, plan
from app.errors import invalid, pointers_by

_COLUMNS = tuple(field.name for field in fields(PositionTerms))


@dataclass(frozen=True, slots=True)
class Change:
    """Positions to close by id or symbol, rows to add, and rows that replace what is open in their symbols."""

    close: Sequence[str]
    add: PositionTerms
    replace: PositionTerms


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A book's quotes before and after a change, and why an order for it would be refused (None: it would not)."""

    before: MarginQuote
    after: MarginQuote
    refusal: Refusal | None


def what_if(
    book: Book,
    change: Change,
    parameters: MarketParameters,
    stored: Mapping[str, StoredPrice],
    now: datetime,
    price_seconds_max: float,
) -> WhatIf:
    """Return what the change would come to at stored prices.

    What is closed is closed at the mark, its profit or loss paid. Raises InvalidError with pointers under /close,
    /add and /replace.
    """
    replaced = [symbol for symbol in change.replace.symbol if symbol is not None and book.position(symbol)]
    closing = [_find(book, i, name) for i, name in enumerate(change.close)]
    closing += [p for p in book.positions if p.symbol in replaced and p not in closing]
    left = book
    for position in closing:
        left = _closed(left, position, parameters, stored, now)
    added = _joined(change.replace, change.add)
    orders = [_as_order(added, row) for row in range(len(added))]
    for row, order in enumerate(orders):
        if order is not None:
            with pointers_by(_in_row(row, len(change.replace))):
                left = _traded(left, order, parameters, stored, now)
    before = book.quote_terms(parameters, stored)
    kept = left.quote_terms(parameters, stored)
    other = [row for row, order in enumerate(orders) if order is None]
    after = replace(kept, positions=_joined(kept.positions, _rows(added, other)))
    then = margin_quote(before, stored, now)
    with pointers_by(_renamed(len(left.positions), other, len(change.replace))):
        quoted = margin_quote(after, stored, now)
    refused = None
    if len(change.add) + len(change.replace):
        refused = _never_opens(book, then, quoted, now, price_seconds_max) or _uncovered(left)
    judged = then, quoted
    if book.pending:  # judged with what waits at a venue, as an order would be, and shown without it
        waiting = exposed(left, parameters, stored, now).quote_terms(parameters, stored)
        joined = replace(waiting, positions=_joined(waiting.positions, _rows(added, other)))
        still = exposed(book, parameters, stored, now).quote_terms(parameters, stored)
        judged = margin_quote(still, stored, now), margin_quote(joined, stored, now)
    policy = before.margin.parameters.policy
    refused = refused or refusal(*judged, policy)
    if book.pending and refused is None:
        then_gross, gross = (gross_reached(b, parameters, stored) for b in (book, left))
        refused = capped((then_gross, judged[0].equity), (gross, judged[1].equity), policy)
    return WhatIf(then, quoted, refused)


def _never_opens(
    book: Book, then: MarginQuote, after: MarginQuote, now: datetime, price_seconds_max: float
) -> Refusal | None:
    """Return why nothing may be opened at all, whatever it comes to."""
    if stale := stale_symbols(after, now, price_seconds_max):
        return Refusal("stale_price", f"the price of {stale[0]} is over {price_seconds_max:g} s old", 0.0)
    if book.opens_nothing is not None:
        return Refusal("reduce_only", book.opens_nothing, 0.0)
    if book.settings.margin_mode == "portfolio" and not then.eligible:
        return Refusal("reduce_only", "equity is below what portfolio margin asks for: reduce only", 0.0)
    return None


def _uncovered(left: Book) -> Refusal | None:
    free = left.holding(SETTLEMENT_ASSET).free
    if free >= 0:
        return None
    detail = f"the allocation takes {plain(-free):f} {SETTLEMENT_ASSET} more than are free"
    return Refusal("insufficient_margin", detail, to_float(-free))


def _as_order(rows: PositionTerms, row: int) -> Order | None:
    """Return the order that a row stands for, None for one that no order makes: an option, or one at a price."""
    of_orders = ("symbol", "side", "size", "leverage", "margin_mode")
    if any(getattr(rows, name)[row] is not None for name in _COLUMNS if name not in of_orders):
        return None
    symbol, side, size = rows.symbol[row], rows.side[row], rows.size[row]
    if symbol is None or side is None or not size:
        return None
    leverage, mode = rows.leverage[row], rows.margin_mode[row]
    return Order(
        symbol,
        "buy" if side == "long" else "sell",
        to_decimal(size),
        leverage=None if leverage is None else to_decimal(leverage),
        margin_mode=None if mode is None else "isolated" if mode == "isolated" else "pooled",
    )


def _in_row(row: int, replacing: int) -> Callable[[str], str]:
    where = f"/replace/{row}" if row < replacing else f"/add/{row - replacing}"
    return lambda pointer: where + pointer


def _renamed(kept: int, other: Sequence[int], replacing: int) -> Callable[[str], str]:
    """Return what turns the pointer of a row of the whole into that of the caller's own list."""

    def name(pointer: str) -> str:
        match = re.fullmatch(r"/positions/(\d+)(/.*)?", pointer)
        if match is None or int(match[1]) < kept:
            return pointer
        row = other[int(match[1]) - kept]
        return _in_row(row, replacing)(match[2] or "")

    return name


def _find(book: Book, index: int, name: str) -> OpenPosition:
    for position in book.positions:
        if name in (position.id, position.symbol):
            return position
    raise invalid(f"/close/{index}", "not_open", "no open position has this id or symbol")


def _closed(
    book: Book,
    position: OpenPosition,
    parameters: MarketParameters,
    stored: Mapping[str, StoredPrice],
    now: datetime,
) -> Book:
    side: OrderSide = "sell" if position.side == "long" else "buy"
    return _traded(book, Order(position.symbol, side, position.size, reduce_only=True), parameters, stored, now)


def _traded(
    book: Book, order: Order, parameters: MarketParameters, stored: Mapping[str, StoredPrice], now: datetime
) -> Book:
    """Return the book after an order at the mark. Raises InvalidError where there is none."""
    underlying = parameters.underlying_of(order.symbol)
    mark = stored.get(order.symbol) or stored.get(underlying)
    if mark is None:
        raise invalid("/mark_price", "missing_price", f"no price for {order.symbol} nor for {underlying}")
    market = parameters.market(order.symbol, underlying)
    contract = Contract(to_decimal(market.contract_size), to_decimal(market.initial_margin_rate))
    return plan(book, order, contract, mark.exact, f"new:{order.symbol}", now).book


def _rows(terms: PositionTerms, rows: Sequence[int]) -> PositionTerms:
    return PositionTerms(**{name: [getattr(terms, name)[row] for row in rows] for name in _COLUMNS})


def _joined(*parts: PositionTerms) -> PositionTerms:
    columns = {name: [value for part in parts for value in getattr(part, name)] for name in _COLUMNS}
    return PositionTerms(**columns)
