"""The portfolio that VaR is of: positions, and with them the coins that are held and owed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Literal

from app.domain.collateral import Collateral
from app.domain.parameters import MarketParameters
from app.domain.portfolio import Portfolio
from app.domain.prices import Price, PriceFinder, StoredPrice
from app.domain.quote import QuoteTerms, read_account
from app.domain.terms import PositionTerms, build_portfolio

RowKind = Literal["position", "collateral", "liability"]


@dataclass(frozen=True, slots=True)
class Exposed:
    """A book with what it holds as exposures: row i of the portfolio is number `index[i]` among those of its `kind`."""

    portfolio: Portfolio
    kind: Sequence[RowKind]
    index: Sequence[int]
    standing_still: tuple[str, ...]
    prices: Mapping[str, Price]


def exposed(
    terms: QuoteTerms, stored: Mapping[str, StoredPrice], now: datetime, moving: Collection[str] = ()
) -> Exposed:
    """Return the positions, and holdings and debts as longs and shorts at their price, no haircut taken.

    A stablecoin is held at its price: it is an exposure only where it is named in `moving`. Raises InvalidError for a
    missing price.
    """
    account = read_account(terms, stored, now)
    parameters, held = terms.margin.parameters, account.collateral
    still = [name for name in dict.fromkeys(held.assets) if _stands_still(name, parameters, moving)]
    chosen = [k for k, name in enumerate(held.assets) if name not in still and held.amount[k]]
    rows = _at_marks(terms.positions, account.portfolio), _rows_of(held, chosen)
    whole = PositionTerms(**{f.name: [*getattr(rows[0], f.name), *getattr(rows[1], f.name)] for f in fields(rows[0])})
    # each price once and for all: a holding's row is no reason for another mark elsewhere
    finder = PriceFinder(parameters, {name: price.value for name, price in account.prices.items()}, stored)
    positions, owed_from = len(terms.positions), len(terms.collateral)
    return Exposed(
        portfolio=build_portfolio(whole, parameters, finder, now),
        kind=[_kind(k, owed_from) for k in [*[-1] * positions, *chosen]],
        index=[*range(positions), *(k if k < owed_from else k - owed_from for k in chosen)],
        standing_still=tuple(still),
        prices=account.prices,
    )


def _kind(row: int, owed_from: int) -> RowKind:
    """Return what a row of collateral is: a debt from `owed_from` on, a position before the first."""
    if row < 0:
        return "position"
    return "collateral" if row < owed_from else "liability"


def _stands_still(name: str, parameters: MarketParameters, moving: Collection[str]) -> bool:
    return parameters.asset(name).kind == "stable" and name not in moving


def _at_marks(positions: PositionTerms, portfolio: Portfolio) -> PositionTerms:
    """Return the positions with their marks filled in, as far as they have any."""
    rows = zip(portfolio.mark.tolist(), portfolio.is_option.tolist(), strict=True)
    # a NaN is not itself: a greeks position without a mark
    return replace(positions, mark_price=[None if option or mark != mark else mark for mark, option in rows])  # noqa: PLR0124


def _rows_of(held: Collateral, chosen: Sequence[int]) -> PositionTerms:
    columns: dict[str, Sequence[object]] = {f.name: [None] * len(chosen) for f in fields(PositionTerms)}
    columns["symbol"] = [held.assets[k] for k in chosen]
    columns["side"] = ["long" if held.amount[k] > 0.0 else "short" for k in chosen]
    columns["size"] = [abs(float(held.amount[k])) for k in chosen]
    columns["mark_price"] = [float(held.price[k]) for k in chosen]
    columns["contract_size"] = [1.0] * len(chosen)
    return PositionTerms(**columns)  # type: ignore[arg-type]
