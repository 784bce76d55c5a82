"""The margin quote: a book, its margin under several models, its health, and where it is liquidated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from datetime import datetime

import numpy as np

from app.domain.black76 import Floats
from app.domain.collateral import Collateral, CollateralTerms, value_collateral
from app.domain.curves import AccountCurve, Pool
from app.domain.health import Advisory, Health, Standing, advisories, assess
from app.domain.liquidation import Distances, distances, isolated_roots
from app.domain.margin.isolated import position_margin
from app.domain.margin.registry import MODELS
from app.domain.margin.result import MarginResult, MarginTerms
from app.domain.margin.venues.registry import VENUES
from app.domain.parameters import MarginMode
from app.domain.portfolio import Flags, Portfolio, total
from app.domain.prices import Price, PriceFinder, StoredPrice, conflicting_price
from app.domain.record import record
from app.domain.terms import PositionTerms, build_portfolio

_OF_VENUES = frozenset(VENUES)


@record(frozen=True, slots=True)
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


@record(frozen=True, slots=True)
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

    @property
    def gross_notional(self) -> float:
        """Sum of absolute exposures of all positions, isolated ones too, USD."""
        return total(self.portfolio.gross)


@record(frozen=True, slots=True)
class AccountFigures:
    """What an account comes to now, USD: a quote without other models and without liquidation prices."""

    as_of: datetime
    portfolio: Portfolio
    collateral: Collateral
    equity: float
    unrealized_pnl: float
    allocated: float
    isolated: MarginResult
    health: Health
    eligible: bool
    prices: Mapping[str, Price]

    @property
    def gross_notional(self) -> float:
        """Sum of absolute exposures of all positions, isolated ones too, USD."""
        return total(self.portfolio.gross)


def account_figures(terms: QuoteTerms, stored: Mapping[str, StoredPrice], now: datetime) -> AccountFigures:
    """Return an account's figures at the stored prices. Raises InvalidError for a missing price."""
    found = _assess(terms, stored, now, ())
    return AccountFigures(
        as_of=now,
        portfolio=found.portfolio,
        collateral=found.collateral,
        equity=found.equity,
        unrealized_pnl=found.unrealized_pnl,
        allocated=_allocated(found.portfolio),
        isolated=found.results["isolated"],
        health=assess(found.standing, found.curve, terms.margin.parameters.policy),
        eligible=found.equity >= terms.margin.parameters.models.portfolio_minimum_equity,
        prices=found.prices,
    )


@record(frozen=True, slots=True)
class Account:
    """What an account holds at its prices: positions, isolated ones with their allocations, and collateral.

    `stable_prices` are those of the listed stablecoins where a venue's model is asked for.
    """

    portfolio: Portfolio
    collateral: Collateral
    prices: Mapping[str, Price]
    stable_prices: Mapping[str, float]


def read_account(terms: QuoteTerms, stored: Mapping[str, StoredPrice], now: datetime) -> Account:
    """Return the account of the terms at the stored and given prices. Raises InvalidError for a missing price."""
    parameters = terms.margin.parameters
    finder = PriceFinder(parameters, _requested(terms), stored)
    portfolio = build_portfolio(terms.positions, parameters, finder, now)
    if portfolio.any_isolated:
        portfolio = replace(portfolio, allocated=_allocations(portfolio))
    collateral = value_collateral(terms.collateral, terms.liabilities, parameters, finder)
    stable_prices = {} if _OF_VENUES.isdisjoint(terms.models) else finder.stable_prices()
    return Account(portfolio, collateral, finder.used, stable_prices)


@record(frozen=True, slots=True)
class _Assessed:
    """The common part of a quote and of an account's figures."""

    portfolio: Portfolio
    collateral: Collateral
    results: Mapping[str, MarginResult]
    curve: AccountCurve
    standing: Standing
    unrealized_pnl: float
    equity: float
    prices: Mapping[str, Price]


def _assess(terms: QuoteTerms, stored: Mapping[str, StoredPrice], now: datetime, models: Sequence[str]) -> _Assessed:
    account = read_account(terms, stored, now)
    portfolio, collateral = account.portfolio, account.collateral
    wanted = dict.fromkeys([*models, "isolated"])
    margin = replace(terms.margin, stable_prices=account.stable_prices) if account.stable_prices else terms.margin
    results = {name: MODELS[name](portfolio, margin) for name in wanted}
    pool = pool_of(portfolio, collateral, terms)
    return _Assessed(
        portfolio=portfolio,
        collateral=collateral,
        results=results,
        curve=pool.curve(),
        standing=_standing(pool, results, portfolio),
        unrealized_pnl=portfolio.profit,
        equity=collateral.collateral_value - collateral.liabilities + portfolio.profit + portfolio.options_value,
        prices=account.prices,
    )


def margin_quote(terms: QuoteTerms, stored: Mapping[str, StoredPrice], now: datetime) -> MarginQuote:
    """Return the quote at the stored and given prices. Raises InvalidError with pointers into the request."""
    found = _assess(terms, stored, now, terms.models)
    portfolio, policy = found.portfolio, terms.margin.parameters.policy
    distance = distances(found.curve, found.standing, len(portfolio.prices), policy.breach_utilization)
    health = assess(found.standing, found.curve, policy)
    moves, breached = _position_moves(portfolio, distance, terms.margin)
    allocated = _allocated(portfolio)
    worth_a_look = advisories(found.collateral, allocated, health.gross_leverage, policy)
    return MarginQuote(
        as_of=now,
        portfolio=portfolio,
        collateral=found.collateral,
        equity=found.equity,
        unrealized_pnl=found.unrealized_pnl,
        options_value=portfolio.options_value,
        allocated=allocated,
        models={name: found.results[name] for name in terms.models},
        isolated=found.results["isolated"],
        capital_freed=_capital_freed(found.results, terms.models),
        health=health,
        distances=distance,
        liquidation_move=moves,
        breached=breached,
        eligible=found.equity >= terms.margin.parameters.models.portfolio_minimum_equity,
        advisories=[*worth_a_look, *_mark_advisories(portfolio)],
        prices=found.prices,
    )


def _mark_advisories(portfolio: Portfolio) -> list[Advisory]:
    """Return the symbols that the request marks at two prices: each position keeps its own."""
    by_underlying = np.empty(len(portfolio.prices))
    by_underlying[portfolio.underlying] = portfolio.mark
    if not np.count_nonzero(by_underlying[portfolio.underlying] != portfolio.mark):
        return []  # all that stand on one underlying have one mark, as in most books: no symbol has two
    first: dict[str, float] = {}
    found: dict[str, Advisory] = {}
    for symbol, mark in zip(portfolio.symbols, portfolio.mark.tolist(), strict=True):
        other = first.setdefault(symbol, mark)
        if mark != other and mark == mark and other == other:  # noqa: PLR0124  NaN: a greeks position without a mark
            detail = f"{symbol} is marked at {other:.15g} and at {mark:.15g}"
            found.setdefault(symbol, Advisory("conflicting_marks", detail, mark, other))
    return list(found.values())


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


def pool_of(portfolio: Portfolio, collateral: Collateral, terms: QuoteTerms) -> Pool:
    """Return the pooled positions with what backs them: collateral less what isolated positions have allocated."""
    split = collateral.split(portfolio.underlyings)
    if portfolio.any_isolated:
        split = replace(split, stable=split.stable - _allocated(portfolio))
        portfolio = portfolio.take(~portfolio.isolated)
    return Pool(portfolio, split, terms.reserved, terms.margin_mode, terms.margin)


def _allocated(portfolio: Portfolio) -> float:
    """Return what isolated positions hold for themselves, USD."""
    return total(portfolio.allocated[portfolio.isolated]) if portfolio.any_isolated else 0.0


def _standing(pool: Pool, results: Mapping[str, MarginResult], whole: Portfolio) -> Standing:
    book = pool.portfolio
    known = results.get(pool.mode) if book is whole else None
    margin = known or MODELS[pool.mode](book, pool.terms)
    backing = pool.backing
    equity = pool.fixed_equity + backing.other + total(backing.on_underlying) + book.options_value
    return Standing(
        model=pool.mode,
        equity=equity,
        required_initial=margin.initial_margin + pool.reserved,
        required_maintenance=margin.maintenance_margin + pool.reserved,
        reserved=pool.reserved,
        net_exposure=total(book.net),
        gross_exposure=total(book.gross),
    )


def _capital_freed(results: Mapping[str, MarginResult], models: Sequence[str]) -> dict[str, float]:
    """Return 1 - IM(model) / IM(isolated); 0 where isolated margin is 0."""
    base = results["isolated"].initial_margin
    return {name: 1.0 - results[name].initial_margin / base if base > 0.0 else 0.0 for name in models}


def _position_moves(portfolio: Portfolio, distance: Distances, margin: MarginTerms) -> tuple[Floats, Flags]:
    """Return the move to liquidation (n,) of each position's price, and whether it is there already (n,)."""
    moves = distance.by_underlying[portfolio.underlying]
    breached = np.array([distance.liquidatable]).repeat(len(portfolio))
    if portfolio.any_isolated:
        own, beyond = isolated_roots(portfolio, margin)
        moves = np.where(portfolio.isolated, own, moves)
        breached = np.where(portfolio.isolated, beyond, breached)
    # a flat position has no price at which anything happens to it
    if portfolio.any_flat:
        moves[portfolio.notional == 0.0] = np.nan
    return moves, breached
