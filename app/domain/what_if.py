"""What a change would make of a book: positions closed, added or replaced, judged as an order would be. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime

from app.domain.book import Book, OpenPosition
from app.domain.gates import Refusal, refusal, stale_symbols
from app.domain.money import to_decimal
from app.domain.parameters import MarketParameters
from app.domain.prices import PriceFinder, StoredPrice
from app.domain.quote import AccountFigures, MarginQuote, account_figures, margin_quote
from app.domain.terms import PositionTerms
from app.domain.trade import Contract, Order, plan
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
    before = book.quote_terms(parameters, stored)
    kept = left.quote_terms(parameters, stored)
    after = replace(kept, positions=_joined(kept.positions, change.replace, change.add))
    then = account_figures(before, stored, now)
    with pointers_by(_renamed(len(left.positions), len(change.replace))):
        quoted, figures = margin_quote(after, stored, now), account_figures(after, stored, now)
    refused = None
    if len(change.add) + len(change.replace):
        refused = _never_opens(book, then, figures, now, price_seconds_max)
    refused = refused or refusal(then, figures, before.margin.parameters.policy)
    return WhatIf(margin_quote(before, stored, now), quoted, refused)


def _never_opens(
    book: Book, then: AccountFigures, after: AccountFigures, now: datetime, price_seconds_max: float
) -> Refusal | None:
    """Return why nothing may be opened at all, whatever it comes to."""
    if stale := stale_symbols(after, now, price_seconds_max):
        return Refusal("stale_price", f"the price of {stale[0]} is over {price_seconds_max:g} s old", 0.0)
    if book.settings.margin_mode == "portfolio" and not then.eligible:
        return Refusal("reduce_only", "equity is below what portfolio margin asks for: reduce only", 0.0)
    return None


def _renamed(kept: int, replacing: int) -> Callable[[str], str]:
    """Return what turns the pointer of a row of the whole into that of the caller's own list."""

    def name(pointer: str) -> str:
        match = re.fullmatch(r"/positions/(\d+)(/.*)?", pointer)
        if match is None or int(match[1]) < kept:
            return pointer
        row = int(match[1]) - kept
        where = f"/replace/{row}" if row < replacing else f"/add/{row - replacing}"
        return where + (match[2] or "")

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
    underlying = parameters.underlying_of(position.symbol)
    market = parameters.market(position.symbol, underlying)
    mark = PriceFinder(parameters, {}, stored).mark(position.symbol, underlying, "/close")
    order = Order(position.symbol, "sell" if position.side == "long" else "buy", position.size, reduce_only=True)
    contract = Contract(to_decimal(market.contract_size), to_decimal(market.initial_margin_rate))
    return plan(book, order, contract, to_decimal(mark), "", now).book


def _joined(*parts: PositionTerms) -> PositionTerms:
    columns = {name: [value for part in parts for value in getattr(part, name)] for name in _COLUMNS}
    return PositionTerms(**columns)
