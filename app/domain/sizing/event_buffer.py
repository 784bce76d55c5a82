"""The buffer before an event: more stablecoins among the collateral, less gross exposure, while it lasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import ROUND_CEILING, Context, Decimal

import numpy as np

from app.domain.book import Book
from app.domain.deleverage import PlannedOrder, planned_order
from app.domain.health import Health
from app.domain.liquidate import Assess, Reduce, Slice, Target
from app.domain.money import round_owned, to_decimal
from app.domain.moves import SETTLEMENT_ASSET, SETTLEMENT_DECIMALS
from app.domain.quote import AccountFigures
from app.domain.trade import Order
from app.errors import invalid

_DIGITS = Context(prec=10, rounding=ROUND_CEILING)


@dataclass(frozen=True, slots=True)
class EventTerms:
    """The least share of stablecoins in the collateral's market value, the fraction of gross to cut, and the window."""

    starts_at: datetime
    ends_at: datetime
    stable_share: float = 0.50
    gross_cut: float = 0.25


@dataclass(frozen=True, slots=True)
class Conversion:
    """Units of a coin to sell for USDC, which has `proceeds` of it at the stored price."""

    asset: str
    amount: Decimal
    proceeds: Decimal


@dataclass(frozen=True, slots=True)
class EventBuffer:
    """What to do at the window's start, what takes the cut back at its end, and what it comes to.

    Where free coins or reducible positions do not suffice the plan goes as far as they do: `stable_share` and `gross`
    say how far. Conversions are not taken back: at what price is for the owner to judge.
    """

    terms: EventTerms
    conversions: Sequence[Conversion]
    orders: Sequence[PlannedOrder]
    reopening: Sequence[Order]
    stable_share_before: float
    stable_share: float
    gross_before: float
    gross: float
    before: Health
    after: Health
    book: Book


def plan_event_buffer(held: Book, assess: Assess, reduce: Reduce, terms: EventTerms) -> EventBuffer:
    """Return the plan that puts the buffer up.

    Coins are sold in the order of their haircuts, the highest first, as far as they are free. Every reducible position
    is cut by one fraction, so that hedges stay hedges; where others can't be reduced it is the larger for it. Raises
    InvalidError `out_of_range`, `out_of_order` for a window that ends before it starts.
    """
    _check(terms)
    before = assess(held)
    conversions = _conversions(held, before, terms.stable_share)
    left = _converted(held, conversions)
    orders: list[PlannedOrder] = []
    for target, size in _cuts(held, before, terms.gross_cut):
        left = reduce(left, target, size)
        orders.append(planned_order(Slice(target, size)))
    after = assess(left)
    return EventBuffer(
        terms=terms,
        conversions=conversions,
        orders=orders,
        reopening=[_reopened(planned.order) for planned in orders],
        stable_share_before=_stable_share(before),
        stable_share=_stable_share(after),
        gross_before=before.gross_notional,
        gross=after.gross_notional,
        before=before.health,
        after=after.health,
        book=left,
    )


def _check(terms: EventTerms) -> None:
    for name in ("stable_share", "gross_cut"):
        if not 0.0 <= getattr(terms, name) <= 1.0:
            raise invalid(f"/{name}", "out_of_range", "a fraction is 0 to 1")
    if terms.ends_at <= terms.starts_at:
        raise invalid("/ends_at", "out_of_order", "the window ends before it starts")


def _stable_share(figures: AccountFigures) -> float:
    """Return the stablecoins' share of the market value of what is held, 1 where nothing is."""
    table = figures.collateral
    worth = np.where(table.amount > 0.0, table.amount * table.price, 0.0)
    total = float(worth.sum())
    return float(worth[table.stable].sum()) / total if total > 0.0 else 1.0


def _conversions(held: Book, figures: AccountFigures, share: float) -> list[Conversion]:
    table = figures.collateral
    worth = np.where(table.amount > 0.0, table.amount * table.price, 0.0)
    missing = to_decimal(share * float(worth.sum()) - float(worth[table.stable].sum()))
    rows = [k for k in range(len(table.assets)) if worth[k] > 0.0 and not table.stable[k]]
    found = []
    for k in sorted(rows, key=lambda k: (-table.haircut[k], table.assets[k])):
        free, price = held.holding(table.assets[k]).free, to_decimal(float(table.price[k]))
        if missing <= 0 or free <= 0:
            continue
        amount = min(free, _DIGITS.divide(missing, price))
        found.append(Conversion(table.assets[k], amount, round_owned(amount * price, SETTLEMENT_DECIMALS)))
        missing -= amount * price
    return found


def _converted(held: Book, conversions: Sequence[Conversion]) -> Book:
    """Return the book with coins sold at their prices; a debt of USDC stays, and weighs as much as before."""
    holdings = dict(held.holdings)
    for sold in conversions:
        coin, money = held.holding(sold.asset), holdings.get(SETTLEMENT_ASSET, held.holding(SETTLEMENT_ASSET))
        holdings[sold.asset] = replace(coin, free=coin.free - sold.amount)
        holdings[SETTLEMENT_ASSET] = replace(money, free=money.free + sold.proceeds)
    return replace(held, holdings=holdings)


def _cuts(held: Book, figures: AccountFigures, cut: float) -> list[tuple[Target, Decimal]]:
    """Return how much of each reducible position to close, so that gross notional falls by the fraction."""
    gross = figures.portfolio.notional.tolist()
    targets = [Target(p, p.size, n) for p, n in zip(held.positions, gross, strict=True) if p.reducible]
    reducible = sum(target.notional for target in targets)
    share = min(1.0, cut * sum(gross) / reducible) if reducible > 0.0 else 0.0
    if share <= 0.0:
        return []
    return [(t, t.size if share >= 1.0 else min(t.size, _DIGITS.multiply(t.size, to_decimal(share)))) for t in targets]


def _reopened(order: Order) -> Order:
    return Order(order.symbol, "buy" if order.side == "sell" else "sell", order.size)
