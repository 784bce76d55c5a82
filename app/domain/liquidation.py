"""Where an account breaches and where it is liquidated: its figures along moves of prices, and their roots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from scipy.optimize import brentq

from app.domain.black76 import PRICE_FACTOR_MIN, Floats
from app.domain.collateral import CollateralSplit
from app.domain.margin.cross import underlying_rates
from app.domain.margin.isolated import position_margin
from app.domain.margin.portfolio import portfolio_margin
from app.domain.margin.result import MarginTerms
from app.domain.parameters import MarginMode
from app.domain.portfolio import Flags, Portfolio, with_sums
from app.domain.revalue import sum_by_underlying

MOVE_MIN = PRICE_FACTOR_MIN - 1.0
MOVE_MAX = 1_000.0
"""Prices past a thousandfold are not searched for a root, where no closed form gives one."""

_UP = np.expm1(np.linspace(0.0, 1.0, 41) ** 2 * np.log1p(MOVE_MAX))
_DOWN = np.expm1(np.linspace(0.0, 1.0, 41) ** 2 * np.log(PRICE_FACTOR_MIN))
SEARCH_GRID = np.concatenate([_DOWN[:0:-1], _UP])
_GRID_ZERO = len(_DOWN) - 1


@dataclass(frozen=True, slots=True)
class Figures:
    """Equity, required initial and required maintenance margin, USD, at each of K moves."""

    equity: Floats
    initial: Floats
    maintenance: Floats


Line = Callable[[Floats], Figures]


class AccountCurve(Protocol):
    """An account's figures as prices move; volatility stays."""

    @property
    def is_affine(self) -> bool:
        """Whether every figure is a straight line in the move, for moves above -1."""
        ...

    def common(self, moves: Floats) -> Figures:
        """Return the figures where every non-stable price makes the same move (K,)."""
        ...

    def is_affine_in(self, underlying: int) -> bool:
        """Whether every figure is a straight line in the move of this underlying alone."""
        ...

    def single(self, underlying: int) -> Line:
        """Return the figures as a function of one underlying's move, with all positions and collateral on it."""
        ...


@dataclass(frozen=True, slots=True)
class Pool:
    """Positions that share one collateral: their split, the open reservations of other services, the mode."""

    portfolio: Portfolio
    backing: CollateralSplit
    reserved: float
    mode: MarginMode
    terms: MarginTerms

    @property
    def fixed_equity(self) -> float:
        """What no price moves: stable collateral and profit booked so far."""
        return self.backing.stable + float(self.portfolio.unrealized_pnl.sum())

    def curve(self) -> AccountCurve:
        """Return the curve of the pool's margin mode."""
        if self.mode == "portfolio":
            return PortfolioCurve(self)
        return AdditiveCurve.of(self)


@dataclass(frozen=True, slots=True)
class AdditiveCurve:
    """Cross and isolated margin add up over underlyings, so each is a lane of its own; arrays (J,)."""

    pool: Pool
    initial_weight: Floats
    maintenance_weight: Floats

    @classmethod
    def of(cls, pool: Pool) -> AdditiveCurve:
        """Return the curve: rates by underlying in cross mode, Σ rate x notional in isolated mode."""
        book = pool.portfolio
        if pool.mode == "cross":
            rates = (underlying_rates(book, r) for r in (book.initial_rate, book.maintenance_rate))
            return cls(pool, *rates)
        notional = np.where(book.is_option, 0.0, book.notional)
        weights = (book.by_underlying(r * notional) for r in (book.initial_rate, book.maintenance_rate))
        return cls(pool, *weights)

    @property
    def is_affine(self) -> bool:
        """See AccountCurve."""
        return self.pool.portfolio.is_linear

    def lanes(self, moves: Floats) -> Figures:
        """Return the parts (J, K) that each underlying adds to the figures when it makes the moves (K,)."""
        book, factor = self.pool.portfolio, 1.0 + moves
        delta, gamma = book.taylor_delta[:, None], book.taylor_gamma[:, None]
        equity = self.pool.backing.on_underlying[:, None] * factor + delta * moves
        base: Floats = factor
        if book.taylor_gamma.any():
            equity = equity + 0.5 * gamma * moves * moves
        if self.pool.mode == "cross":
            base = np.abs((delta + gamma * moves) * factor)
        initial, maintenance = self.initial_weight[:, None] * base, self.maintenance_weight[:, None] * base
        if len(book.options):
            value, opening, keeping = self._options(moves)
            equity, initial, maintenance = equity + value, initial + opening, maintenance + keeping
        return Figures(equity, initial, maintenance)

    def _options(self, moves: Floats) -> tuple[Floats, Floats, Floats]:
        """Return value, initial and maintenance margin (J, K) of the options at the moves."""
        book, options = self.pool.portfolio, self.pool.portfolio.options
        value = options.values(moves)
        short = (options.quantity < 0.0)[:, None]
        underlying = book.notional[options.row][:, None] * (1.0 + moves)

        def total(each: Floats) -> Floats:
            return sum_by_underlying(options, each, len(book.underlyings.names))

        rates = (r[options.row][:, None] for r in (book.initial_rate, book.maintenance_rate))
        opening, keeping = (total(np.where(short, rate * underlying - value, value)) for rate in rates)
        return total(value), opening, keeping

    def common(self, moves: Floats) -> Figures:
        """See AccountCurve."""
        lanes, still = self.lanes(moves), self.pool.portfolio.underlyings.stable
        if still.any():
            here = self.lanes(np.zeros(1))
            lanes = Figures(
                *(np.where(still[:, None], h, m) for m, h in zip(_columns(lanes), _columns(here), strict=True))
            )
        pool = self.pool
        return Figures(
            pool.fixed_equity + pool.backing.other * (1.0 + moves) + lanes.equity.sum(axis=0),
            pool.reserved + lanes.initial.sum(axis=0),
            pool.reserved + lanes.maintenance.sum(axis=0),
        )

    def is_affine_in(self, underlying: int) -> bool:
        """See AccountCurve."""
        book = self.pool.portfolio
        return book.taylor_gamma[underlying] == 0.0 and underlying not in book.options.underlying

    def single(self, underlying: int) -> Line:
        """See AccountCurve."""
        here, lane = self.common(np.zeros(1)), self._lane(underlying)
        still = lane.lanes(np.zeros(1))
        rest = Figures(*(h - s[0] for h, s in zip(_columns(here), _columns(still), strict=True)))

        def at(moves: Floats) -> Figures:
            own = lane.lanes(moves)
            return Figures(*(r + m[0] for r, m in zip(_columns(rest), _columns(own), strict=True)))

        return at

    def _lane(self, underlying: int) -> AdditiveCurve:
        """Return the curve of one underlying alone, so that its cost does not grow with the book's others."""
        book = self.pool.portfolio
        names = book.underlyings.names
        alone = np.arange(len(names)) == underlying
        lane = book.take(book.underlying == underlying)
        lane = with_sums(
            replace(
                lane,
                underlying=np.zeros(len(lane), dtype=np.intp),
                underlyings=lane.underlyings.take(alone),
                options=replace(lane.options, underlying=np.zeros(len(lane.options), dtype=np.intp)),
            )
        )
        backing = CollateralSplit(self.pool.backing.on_underlying[alone], 0.0, 0.0)
        pool = replace(self.pool, portfolio=lane, backing=backing)
        return AdditiveCurve(pool, self.initial_weight[alone], self.maintenance_weight[alone])


def _columns(figures: Figures) -> tuple[Floats, Floats, Floats]:
    return figures.equity, figures.initial, figures.maintenance


def moved(portfolio: Portfolio, moves: Floats) -> Portfolio:
    """Return the portfolio marked at prices moved by `moves` (J,), volatilities unchanged.

    A greeks position's value changes by notional·(delta·m + ½·gamma·m²); its delta and gamma after are those of
    that parabola, per unit of the moved notional.
    """
    m = moves[portfolio.underlying]
    factor = 1.0 + m
    taylor = portfolio.notional * (portfolio.delta + 0.5 * portfolio.gamma * m) * m
    options = portfolio.options
    delta = portfolio.delta + portfolio.gamma * m
    if len(options):
        taylor = np.where(portfolio.is_option, 0.0, taylor)
        options = replace(options, forward=options.forward * (1.0 + moves[options.underlying]))
        options = replace(options, value=options.values(np.zeros(1))[:, 0])
        dollars = options.dollar_delta()
        delta[options.row] = dollars / np.maximum(portfolio.notional[options.row] * factor[options.row], 1e-300)
    return with_sums(
        replace(
            portfolio,
            notional=portfolio.notional * factor,
            delta=delta,
            gamma=portfolio.gamma * factor,
            mark=portfolio.mark * factor,
            unrealized_pnl=portfolio.unrealized_pnl + taylor,
            options=options,
            underlyings=replace(portfolio.underlyings, price=portfolio.underlyings.price * (1.0 + moves)),
        )
    )


@dataclass(frozen=True, slots=True)
class PortfolioCurve:
    """Portfolio margin does not add up over underlyings: each move is assessed anew by the model itself."""

    pool: Pool
    is_affine: bool = False

    def common(self, moves: Floats) -> Figures:
        """See AccountCurve."""
        loose = np.where(self.pool.portfolio.underlyings.stable, 0.0, 1.0)
        return self._at(moves, loose, 1.0)

    def is_affine_in(self, underlying: int) -> bool:
        """See AccountCurve."""
        del underlying
        return False

    def single(self, underlying: int) -> Line:
        """See AccountCurve."""
        alone = np.zeros(len(self.pool.portfolio.underlyings.names))
        alone[underlying] = 1.0
        return lambda moves: self._at(moves, alone, 0.0)

    def _at(self, moves: Floats, direction: Floats, other: float) -> Figures:
        rows = [self._assess(float(move) * direction, float(move) * other) for move in moves]
        equity, initial, maintenance = np.array(rows).reshape(-1, 3).T
        return Figures(equity, initial, maintenance)

    def _assess(self, moves: Floats, other: float) -> tuple[float, float, float]:
        pool = self.pool
        book = moved(pool.portfolio, moves)
        margin = portfolio_margin(book, pool.terms)
        backing = pool.backing
        equity = (
            backing.stable
            + backing.other * (1.0 + other)
            + float((backing.on_underlying * (1.0 + moves)).sum())
            + float(book.unrealized_pnl.sum())
            + book.options_value
        )
        return equity, margin.initial_margin + pool.reserved, margin.maintenance_margin + pool.reserved


def nearest_root(surplus: Callable[[Floats], Floats]) -> float | None:
    """Return the root of `surplus` nearest to no move, or None. Searched on a grid, then by Brent's method.

    Two roots closer together than the grid (half a percent near zero, coarser far out) are not seen.
    """
    values = surplus(SEARCH_GRID)
    crossing = np.flatnonzero(np.signbit(values[:-1]) != np.signbit(values[1:]))
    if not crossing.size:
        return None
    sides = (crossing[crossing < _GRID_ZERO][-1:], crossing[crossing >= _GRID_ZERO][:1])
    roots = [_refine(surplus, int(i)) for side in sides for i in side]
    return min(roots, key=abs)


def _refine(surplus: Callable[[Floats], Floats], left: int) -> float:
    low, high = float(SEARCH_GRID[left]), float(SEARCH_GRID[left + 1])
    return brentq(lambda x: float(surplus(np.array([x]))[0]), low, high, xtol=1e-14, rtol=1e-14)


def line_roots(at_zero: Floats, at_one: Floats) -> Floats:
    """Return the roots of straight lines given at moves 0 and 1; NaN where there is none above -1."""
    slope = at_one - at_zero
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = -at_zero / slope
    return np.where(np.isfinite(roots) & (roots > -1.0), roots, np.nan)


@dataclass(frozen=True, slots=True)
class Distances:
    """Relative moves to breach and to liquidation: of all non-stable prices, and (J,) of each underlying alone.

    None and NaN: no price above zero gets there. `breached` and `liquidatable` say that it is so already.
    """

    to_breach: float | None
    to_liquidation: float | None
    by_underlying: Floats
    breached: bool
    liquidatable: bool


def distances(pool: Pool, breach_utilization: float) -> Distances:
    """Return the account's distances; breach is utilization at the level, or equity below maintenance."""
    curve = pool.curve()

    def to_liquidation(figures: Figures) -> Floats:
        return figures.equity - figures.maintenance

    def to_breach(figures: Figures) -> Floats:
        return breach_utilization * figures.equity - figures.initial

    here = curve.common(np.zeros(1))
    liquidatable = bool(to_liquidation(here)[0] < 0.0)
    breach = [_common_root(curve, to_breach), liquidation := _common_root(curve, to_liquidation)]
    known = [root for root in breach if root is not None]
    return Distances(
        to_breach=min(known, key=abs) if known else None,
        to_liquidation=liquidation,
        by_underlying=_single_roots(pool, curve, to_liquidation),
        breached=liquidatable or bool(to_breach(here)[0] <= 0.0 < here.initial[0]),
        liquidatable=liquidatable,
    )


Surplus = Callable[[Figures], Floats]


def _common_root(curve: AccountCurve, surplus: Surplus) -> float | None:
    if not curve.is_affine:
        return nearest_root(lambda moves: surplus(curve.common(moves)))
    at = surplus(curve.common(np.array([0.0, 1.0])))
    root = float(line_roots(at[:1], at[1:])[0])
    return None if np.isnan(root) else root


def _single_roots(pool: Pool, curve: AccountCurve, surplus: Surplus) -> Floats:
    lanes = range(len(pool.portfolio.underlyings.names))
    roots = np.full(len(lanes), np.nan)
    if isinstance(curve, AdditiveCurve):
        here = surplus(curve.common(np.zeros(1)))[0]
        by_lane = surplus(curve.lanes(np.array([0.0, 1.0])))
        roots = line_roots(np.full(len(lanes), here), here + by_lane[:, 1] - by_lane[:, 0])
    for j in lanes:
        if not curve.is_affine_in(j):
            roots[j] = _curved_root(curve.single(j), surplus)
    return roots


def _curved_root(line: Line, surplus: Surplus) -> float:
    root = nearest_root(lambda moves: surplus(line(moves)))
    return np.nan if root is None else root


def isolated_roots(portfolio: Portfolio, terms: MarginTerms) -> tuple[Floats, Flags]:
    """Return the move (n,) at which each position, alone with its allocation, is liquidated (NaN: none).

    And whether it is so already (n,).
    """
    keeping = position_margin(portfolio, portfolio.maintenance_rate)
    surplus = portfolio.allocated + portfolio.unrealized_pnl - keeping
    surplus[portfolio.options.row] += portfolio.options.value
    roots = line_roots(surplus, surplus + portfolio.exposure - keeping)
    curved = portfolio.is_option | (portfolio.gamma != 0.0)
    for i in np.flatnonzero(curved & portfolio.isolated):
        line = _alone(portfolio, int(i), terms).curve().single(int(portfolio.underlying[i]))
        roots[i] = _curved_root(line, lambda figures: figures.equity - figures.maintenance)
    return roots, surplus < 0.0


def _alone(portfolio: Portfolio, row: int, terms: MarginTerms) -> Pool:
    one = portfolio.take(np.arange(len(portfolio)) == row)
    nothing = np.zeros(len(portfolio.underlyings.names))
    return Pool(one, CollateralSplit(nothing, 0.0, float(portfolio.allocated[row])), 0.0, "isolated", terms)
