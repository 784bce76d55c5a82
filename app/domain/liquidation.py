"""Where an account breaches and where it is liquidated: its figures along moves of prices, and their roots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
ENDS = np.array([MOVE_MIN, 0.0, MOVE_MAX])
"""Enough of a grid where the surplus is concave: one root at most on either side."""
_REFINE_POINTS = 33
_REFINE_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Figures:
    """Equity, required initial and required maintenance margin, USD, at each of K moves."""

    equity: Floats
    initial: Floats
    maintenance: Floats


Line = Callable[[Floats], Figures]


class AccountCurve(Protocol):
    """An account's figures as prices move; volatility stays.

    `grid` are the moves, ascending and with 0, between which a root is looked for. `one_by_one` says that many
    moves at once cost as much as each alone.
    """

    @property
    def grid(self) -> Floats:
        """The moves of the search."""
        ...

    @property
    def one_by_one(self) -> bool:
        """Whether each move is paid for on its own."""
        ...

    def common(self, moves: Floats) -> Figures:
        """Return the figures where every non-stable price makes the same move (K,)."""
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
        additive = AdditiveCurve.of(self)
        return AffineCurve.of(additive) if self.portfolio.is_linear else additive


@dataclass(frozen=True, slots=True)
class AdditiveCurve:
    """Cross and isolated margin add up over underlyings, so each is a lane of its own; arrays (J,)."""

    pool: Pool
    initial_weight: Floats
    maintenance_weight: Floats
    grid: Floats = field(default_factory=lambda: SEARCH_GRID)
    one_by_one: bool = False

    @classmethod
    def of(cls, pool: Pool) -> AdditiveCurve:
        """Return the curve: rates by underlying in cross mode, Σ rate x notional in isolated mode."""
        book = pool.portfolio
        if pool.mode == "cross":
            return cls(pool, underlying_rates(book, book.initial_rate), underlying_rates(book, book.maintenance_rate))
        notional = np.where(book.is_option, 0.0, book.notional)
        return cls(
            pool,
            book.by_underlying(book.initial_rate * notional),
            book.by_underlying(book.maintenance_rate * notional),
        )

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
        """Whether every figure is a straight line in the move of this underlying alone."""
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
                prices=lane.prices[alone],
                options=replace(lane.options, underlying=np.zeros(len(lane.options), dtype=np.intp)),
            )
        )
        backing = CollateralSplit(self.pool.backing.on_underlying[alone], 0.0, 0.0)
        pool = replace(self.pool, portfolio=lane, backing=backing)
        return AdditiveCurve(pool, self.initial_weight[alone], self.maintenance_weight[alone])


@dataclass(frozen=True, slots=True)
class AffineCurve:
    """A linear book under cross or isolated margin: every figure is a straight line in moves above -1.

    `here` and `slope` are (equity, initial, maintenance) now and per unit of the common move, `surplus_slopes`
    (J,) what one underlying's move alone adds to equity less maintenance.
    """

    here: tuple[float, float, float]
    slope: tuple[float, float, float]
    surplus_slopes: Floats
    additive: AdditiveCurve
    grid: Floats = field(default_factory=lambda: ENDS)
    one_by_one: bool = False

    @classmethod
    def of(cls, additive: AdditiveCurve) -> AffineCurve:
        """Return the lines of an additive curve without gamma and options."""
        pool, book = additive.pool, additive.pool.portfolio
        base: Floats = np.abs(book.taylor_delta) if pool.mode == "cross" else np.ones(1)
        held = pool.backing.on_underlying
        equity = held + book.taylor_delta
        initial, maintenance = additive.initial_weight * base, additive.maintenance_weight * base
        rows = np.array([held, initial, maintenance, equity, initial, maintenance])
        if book.underlyings.stable.any():
            rows[3:, book.underlyings.stable] = 0.0
        now_equity, now_initial, now_maintenance, *slope = rows.sum(axis=1).tolist()
        other = pool.backing.other
        return cls(
            here=(
                pool.fixed_equity + other + now_equity,
                pool.reserved + now_initial,
                pool.reserved + now_maintenance,
            ),
            slope=(other + slope[0], slope[1], slope[2]),
            surplus_slopes=equity - maintenance,
            additive=additive,
        )

    def common(self, moves: Floats) -> Figures:
        """See AccountCurve."""
        lines = (here + slope * moves for here, slope in zip(self.here, self.slope, strict=True))
        return Figures(*lines)

    def single(self, underlying: int) -> Line:
        """See AccountCurve."""
        return self.additive.single(underlying)


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
            prices=portfolio.prices * (1.0 + moves),
        )
    )


@dataclass(frozen=True, slots=True)
class PortfolioCurve:
    """Portfolio margin does not add up over underlyings: each move is assessed anew by the model itself.

    The margin of a linear book is convex in a move (a maximum of norms of straight lines), so that its surplus is
    concave.
    """

    pool: Pool
    one_by_one: bool = True

    @property
    def grid(self) -> Floats:
        """See AccountCurve."""
        return ENDS if self.pool.portfolio.is_linear else SEARCH_GRID

    def common(self, moves: Floats) -> Figures:
        """See AccountCurve."""
        loose = np.where(self.pool.portfolio.underlyings.stable, 0.0, 1.0)
        return self._at(moves, loose, 1.0)

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


def nearest_root(curve: AccountCurve, surplus: Callable[[Floats], Floats], values: Floats) -> float | None:
    """Return the root of `surplus` nearest to no move, or None; `values` are those on the curve's grid.

    Two roots closer together than the grid (half a percent near zero, coarser far out) are not seen.
    """
    grid = curve.grid
    signs = np.signbit(values)
    crossing = np.flatnonzero(signs[:-1] != signs[1:])
    if not crossing.size:
        return None
    below, above = crossing[grid[crossing] < 0.0][-1:], crossing[grid[crossing] >= 0.0][:1]
    brackets = [(float(grid[i]), float(grid[i + 1])) for i in (*below, *above)]
    if len(brackets) == 2:
        # where one bracket lies wholly nearer than the other, the other need not be refined
        (far_low, near_low), (near_high, far_high) = brackets
        if far_high <= -near_low:
            brackets = brackets[1:]
        elif -far_low <= near_high:
            brackets = brackets[:1]
    refine = _refine_one_by_one if curve.one_by_one else _refine_at_once
    return min((refine(surplus, low, high) for low, high in brackets), key=abs)


def _refine_one_by_one(surplus: Callable[[Floats], Floats], low: float, high: float) -> float:
    return brentq(lambda x: float(surplus(np.array([x]))[0]), low, high, xtol=1e-14, rtol=1e-14)


def _refine_at_once(surplus: Callable[[Floats], Floats], low: float, high: float) -> float:
    """Narrow the bracket 32-fold a round; within the last, which is some 1e-6 wide, the line is straight."""
    left = right = 0.0
    for _ in range(_REFINE_ROUNDS):
        points = np.linspace(low, high, _REFINE_POINTS)
        values = surplus(points)
        signs = np.signbit(values)
        i = int(np.argmax(signs[:-1] != signs[1:]))
        low, high, left, right = (float(v) for v in (points[i], points[i + 1], values[i], values[i + 1]))
    return low - left * (high - low) / (right - left)


def line_roots(here: Floats | float, slopes: Floats) -> Floats:
    """Return the roots of straight lines from their values now and slopes; NaN where there is none above -1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        roots = -here / slopes
    roots[~((roots > -1.0) & (roots < np.inf))] = np.nan
    return roots


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


Surplus = Callable[[Figures], Floats]


def distances(curve: AccountCurve, underlyings: int, breach_utilization: float) -> Distances:
    """Return an account's distances; breach is utilization at the level, or equity below maintenance."""

    def to_liquidation(figures: Figures) -> Floats:
        return figures.equity - figures.maintenance

    def to_breach(figures: Figures) -> Floats:
        return breach_utilization * figures.equity - figures.initial

    here = curve.common(np.zeros(1))
    liquidatable = bool(to_liquidation(here)[0] < 0.0)
    breach, liquidation = _common_roots(curve, (to_breach, to_liquidation))
    known = [root for root in (breach, liquidation) if root is not None]
    return Distances(
        to_breach=min(known, key=abs) if known else None,
        to_liquidation=liquidation,
        by_underlying=_single_roots(curve, underlyings, to_liquidation),
        breached=liquidatable or bool(to_breach(here)[0] <= 0.0 < here.initial[0]),
        liquidatable=liquidatable,
    )


_NOW_AND_ONE = np.array([0.0, 1.0])


def _common_roots(curve: AccountCurve, surpluses: Sequence[Surplus]) -> list[float | None]:
    if isinstance(curve, AffineCurve):
        at = curve.common(_NOW_AND_ONE)
        return [_line_root(*surplus(at).tolist()) for surplus in surpluses]
    on_grid = curve.common(curve.grid)
    return [
        nearest_root(curve, lambda moves, s=s: s(curve.common(moves)), s(on_grid))  # type: ignore[misc]
        for s in surpluses
    ]


def _line_root(now: float, one: float) -> float | None:
    root = now / (now - one) if one != now else np.nan
    return root if root > -1.0 else None


def _single_roots(curve: AccountCurve, underlyings: int, surplus: Surplus) -> Floats:
    """Return the root (J,) of each underlying's own move: in closed form where the lane is a straight line."""
    if isinstance(curve, AffineCurve):
        return line_roots(curve.here[0] - curve.here[2], curve.surplus_slopes)
    roots = np.full(underlyings, np.nan)
    curved: Sequence[int] = range(underlyings)
    if isinstance(curve, AdditiveCurve):
        here = surplus(curve.common(np.zeros(1)))[0]
        by_lane = surplus(curve.lanes(_NOW_AND_ONE))
        roots = line_roots(here, by_lane[:, 1] - by_lane[:, 0])
        curved = [j for j in curved if not curve.is_affine_in(j)]
    for j in curved:
        roots[j] = _curved_root(curve, j, surplus)
    return roots


def _curved_root(curve: AccountCurve, underlying: int, surplus: Surplus) -> float:
    line = curve.single(underlying)
    root = nearest_root(curve, lambda moves: surplus(line(moves)), surplus(line(curve.grid)))
    return np.nan if root is None else root


def isolated_roots(portfolio: Portfolio, terms: MarginTerms) -> tuple[Floats, Flags]:
    """Return the move (n,) at which each position, alone with its allocation, is liquidated (NaN: none).

    And whether it is so already (n,).
    """
    keeping = position_margin(portfolio, portfolio.maintenance_rate)
    surplus = portfolio.allocated + portfolio.unrealized_pnl - keeping
    surplus[portfolio.options.row] += portfolio.options.value
    roots = line_roots(surplus, portfolio.exposure - keeping)
    curved = portfolio.is_option | (portfolio.gamma != 0.0)
    for i in np.flatnonzero(curved & portfolio.isolated):
        curve = AdditiveCurve.of(_alone(portfolio, int(i), terms))
        roots[i] = _curved_root(curve, int(portfolio.underlying[i]), lambda f: f.equity - f.maintenance)
    return roots, surplus < 0.0


def _alone(portfolio: Portfolio, row: int, terms: MarginTerms) -> Pool:
    one = portfolio.take(np.arange(len(portfolio)) == row)
    nothing = np.zeros(len(portfolio.underlyings.names))
    return Pool(one, CollateralSplit(nothing, 0.0, float(portfolio.allocated[row])), 0.0, "isolated", terms)
