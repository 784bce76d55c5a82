"""The margin quote: a book, its margin under several models, its health, and where it is liquidated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import numpy as np

from app.domain.black76 import Floats
from app.domain.collateral import Collateral, CollateralTerms, value_collateral
from app.domain.curves import Pool
from app.domain.health import Advisory, Health, Standing, advisories, assess
from app.domain.liquidation import Distances, distances, isolated_roots
from app.domain.margin.isolated import position_margin
from app.domain.margin.registry import MODELS
from app.domain.margin.result import MarginResult, MarginTerms
from app.domain.parameters import MarginMode
from app.domain.portfolio import Flags, Portfolio
from app.domain.prices import Price, PriceFinder, StoredPrice, conflicting_price
from app.domain.terms import PositionTerms, build_portfolio


@dataclass(frozen=True, slots=True)
class QuoteTerms:
    """What is to be quoted. `reserved` is the sum of other services' open reservations, USD."""

    positions: PositionTerms
    margin: MarginTerms
    collateral: Sequence[CollateralTerms] = ()
    liabilities: Sequence[CollateralTerms] = ()
    models: Sequence[str] = ("isolated", "cross", "portfolio")
    margin_mode: MarginMode = "cross"
    reserved: float = 0.0
    prices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MarginQuote:
    """A quote, USD. `liquidation_move` (n,) is NaN where there is none.

    `equity` and the collateral are of the whole book; `health` is of the pooled positions, with the collateral
    that isolated positions have allocated taken out.
    """

    as_of: datetime
    portfolio: Portfolio
    collateral: Collateral
    equity: float
    unrealized_pnl: float
    options_value: float
    allocated: float
    models: Mapping[str, MarginResult]
    isolated: MarginResult
    capital_freed: Mapping[str, float]
    health: Health
    distances: Distances
    liquidation_move: Floats
    breached: Flags
    eligible: bool
    advisories: Sequence[Advisory]
    prices: Mapping[str, Price]


def margin_quote(terms: QuoteTerms, stored: Mapping[str, StoredPrice], now: datetime) -> MarginQuote:
    """Return the quote at the stored and given prices. Raises InvalidError with pointers into the request."""
    parameters = terms.margin.parameters
    finder = PriceFinder(parameters, _requested(terms), stored)
    portfolio = build_portfolio(terms.positions, parameters, finder, now)
    if portfolio.any_isolated:
        portfolio = replace(portfolio, allocated=_allocations(portfolio))
    collateral = value_collateral(terms.collateral, terms.liabilities, parameters, finder)
    wanted = dict.fromkeys([*terms.models, "isolated"])
    results = {name: MODELS[name](portfolio, terms.margin) for name in wanted}
    pool = _pool(portfolio, collateral, terms)
    curve = pool.curve()
    standing = _standing(pool, results, portfolio)
    policy = parameters.policy
    distance = distances(curve, standing, len(portfolio.prices), policy.breach_utilization)
    health = assess(standing, curve, policy)
    unrealized = float(portfolio.unrealized_pnl.sum())
    equity = collateral.collateral_value - collateral.liabilities + unrealized + portfolio.options_value
    allocated = _allocated(portfolio)
    moves, breached = _position_moves(portfolio, distance, terms.margin)
    return MarginQuote(
        as_of=now,
        portfolio=portfolio,
        collateral=collateral,
        equity=equity,
        unrealized_pnl=unrealized,
        options_value=portfolio.options_value,
        allocated=allocated,
        models={name: results[name] for name in terms.models},
        isolated=results["isolated"],
        capital_freed=_capital_freed(results, terms.models),
        health=health,
        distances=distance,
        liquidation_move=moves,
        breached=breached,
        eligible=equity >= parameters.models.portfolio_minimum_equity,
        advisories=advisories(collateral, allocated, health.gross_leverage, policy),
        prices=finder.used,
    )


def _requested(terms: QuoteTerms) -> dict[str, float]:
    """Return the request's own prices: its market's, and those given beside a holding or a debt.

    Raises InvalidError where they differ.
    """
    requested = dict(terms.prices)
    for pointer, holdings in (("/collateral", terms.collateral), ("/liabilities", terms.liabilities)):
        for i, holding in enumerate(holdings):
            price = holding.price
            if price is not None and (other := requested.setdefault(holding.asset, price)) != price:
                raise conflicting_price(f"{pointer}/{i}/price", holding.asset, price, other)
    return requested


def _allocations(portfolio: Portfolio) -> Floats:
    """Return each isolated position's allocation (n,), 0 for pooled ones.

    One that is not given is the initial margin at entry, as a venue would have posted it; an option's is its initial
    margin now, since its premium is not part of a profit and loss.
    """
    at_entry = portfolio.notional - np.sign(portfolio.delta) * portfolio.unrealized_pnl
    now = position_margin(portfolio, portfolio.initial_rate)
    posted = np.where(portfolio.is_option, now, portfolio.initial_rate * at_entry)
    given = np.where(np.isnan(portfolio.allocated), posted, portfolio.allocated)
    return np.where(portfolio.isolated, given, 0.0)


def _pool(portfolio: Portfolio, collateral: Collateral, terms: QuoteTerms) -> Pool:
    split = collateral.split(portfolio.underlyings)
    if portfolio.any_isolated:
        split = replace(split, stable=split.stable - _allocated(portfolio))
        portfolio = portfolio.take(~portfolio.isolated)
    return Pool(portfolio, split, terms.reserved, terms.margin_mode, terms.margin)


def _allocated(portfolio: Portfolio) -> float:
    """Return what isolated positions hold for themselves, USD."""
    return float(portfolio.allocated[portfolio.isolated].sum()) if portfolio.any_isolated else 0.0


def _standing(pool: Pool, results: Mapping[str, MarginResult], whole: Portfolio) -> Standing:
    book = pool.portfolio
    known = results.get(pool.mode) if book is whole else None
    margin = known or MODELS[pool.mode](book, pool.terms)
    backing = pool.backing
    equity = pool.fixed_equity + backing.other + float(backing.on_underlying.sum()) + book.options_value
    return Standing(
        model=pool.mode,
        equity=equity,
        required_initial=margin.initial_margin + pool.reserved,
        required_maintenance=margin.maintenance_margin + pool.reserved,
        reserved=pool.reserved,
        net_exposure=float(book.net.sum()),
        gross_exposure=float(book.gross.sum()),
    )


def _capital_freed(results: Mapping[str, MarginResult], models: Sequence[str]) -> dict[str, float]:
    """Return 1 - IM(model) / IM(isolated); 0 where isolated margin is 0."""
    base = results["isolated"].initial_margin
    return {name: 1.0 - results[name].initial_margin / base if base > 0.0 else 0.0 for name in models}


def _position_moves(portfolio: Portfolio, distance: Distances, margin: MarginTerms) -> tuple[Floats, Flags]:
    """Return the move to liquidation (n,) of each position's price, and whether it is there already (n,)."""
    moves = distance.by_underlying[portfolio.underlying]
    breached = np.full(len(portfolio), distance.liquidatable)
    if portfolio.any_isolated:
        own, beyond = isolated_roots(portfolio, margin)
        moves = np.where(portfolio.isolated, own, moves)
        breached = np.where(portfolio.isolated, beyond, breached)
    # a flat position has no price at which anything happens to it
    return np.where(portfolio.notional > 0.0, moves, np.nan), breached
