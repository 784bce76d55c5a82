"""Where an account breaches and where it is liquidated: its figures along moves of prices, and their roots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from scipy.optimize import brentq

from app.domain.black76 import PRICE_FACTOR_MIN, Floats
from app.domain.collateral import CollateralSplit
from app.domain.margin.isolated import position_margin
from app.domain.margin.portfolio import portfolio_margin
from app.domain.margin.result import MarginTerms
from app.domain.parameters import MarginMode
from app.domain.portfolio import Flags, Portfolio
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
OPTIONS_AT_ONCE_MAX = 40
"""Options up to which thirty moves at once cost hardly more than one."""


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
        return AdditiveCurve.of(self)


@dataclass(frozen=True, slots=True)
class AdditiveCurve:
    """Cross and isolated margin add up over underlyings, so each is a lane of its own; arrays (J,)."""

    pool: Pool
    initial_weight: Floats
    maintenance_weight: Floats
    grid: Floats = field(default_factory=lambda: SEARCH_GRID)

    @property
    def one_by_one(self) -> bool:
        """See AccountCurve. Past some options the arithmetic outweighs the calls."""
        return len(self.pool.portfolio.options) > OPTIONS_AT_ONCE_MAX

    @classmethod
    def of(cls, pool: Pool) -> AdditiveCurve:
        """Return the curve: rates by underlying in cross mode, Σ rate x notional in isolated mode."""
        book = pool.portfolio
        if pool.mode == "cross":
            return cls(pool, *book.highest_rates)
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
        if book.has_gamma:
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

    @property
    def has_options(self) -> bool:
        """Whether some underlyings have no closed form."""
        return len(self.pool.portfolio.options) > 0

    @property
    def closed_form(self) -> Lines | Polynomials:
        """The roots of the underlyings without options."""
        return Polynomials(self) if self.pool.portfolio.has_gamma else Lines(self)

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
        lane = replace(
            lane,
            underlying=np.zeros(len(lane), dtype=np.intp),
            underlyings=lane.underlyings.take(alone),
            prices=lane.prices[alone],
            options=replace(lane.options, underlying=np.zeros(len(lane.options), dtype=np.intp)),
        )
        backing = CollateralSplit(self.pool.backing.on_underlying[alone], 0.0, 0.0)
        pool = replace(self.pool, portfolio=lane, backing=backing)
        return AdditiveCurve(pool, self.initial_weight[alone], self.maintenance_weight[alone])


@dataclass(frozen=True, slots=True)
class Lines:
    """A book without options and gamma: surpluses are straight lines for every move above -1."""

    curve: AdditiveCurve

    def common_roots(self, breach_utilization: float) -> tuple[float | None, float | None]:
        """Return the roots, under a common move, of breach x equity - initial and of equity - maintenance."""
        curve = self.curve
        pool, book = curve.pool, curve.pool.portfolio
        held = pool.backing.on_underlying
        rows = np.array([held, held + book.taylor_delta, *self._margins()])
        now = rows.sum(axis=1).tolist()
        stable = book.underlyings.stable
        slope = rows[:, ~stable].sum(axis=1).tolist() if stable.any() else now
        equity, equity_slope = pool.fixed_equity + pool.backing.other + now[0], pool.backing.other + slope[1]
        return (
            _line_root(
                breach_utilization * equity - now[2] - pool.reserved, breach_utilization * equity_slope - slope[2]
            ),
            _line_root(equity - now[3] - pool.reserved, equity_slope - slope[3]),
        )

    def single_roots(self, surplus: float) -> Floats:
        """Return the root (J,) of equity - maintenance, now `surplus`, where one underlying moves alone; NaN: none."""
        curve, book = self.curve, self.curve.pool.portfolio
        slopes = book.taylor_delta + curve.pool.backing.on_underlying - self._margins()[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            roots: Floats = -surplus / slopes
        roots[~((roots > -1.0) & (roots < np.inf))] = np.nan
        return roots

    def _margins(self) -> tuple[Floats, Floats]:
        curve = self.curve
        if curve.pool.mode != "cross":
            return curve.initial_weight, curve.maintenance_weight
        exposure = np.abs(curve.pool.portfolio.taylor_delta)
        return curve.initial_weight * exposure, curve.maintenance_weight * exposure


def _line_root(here: float, slope: float) -> float | None:
    if slope == 0.0:
        return None
    root = -here / slope
    return root if root > -1.0 else None


@dataclass(frozen=True, slots=True)
class Polynomials:
    """A book without options: surpluses are quadratics between the moves at which a net exposure turns.

    An underlying with net exposure A and gamma G adds A·m + ½G·m² to equity and, in cross mode, rate x
    |(1+m)(A + G·m)| to margin, so that every root has a closed form. Arrays (J,).
    """

    curve: AdditiveCurve

    def common_roots(self, breach_utilization: float) -> tuple[float | None, float | None]:
        """Return the nearest roots, under a common move, of breach x equity - initial and of equity - maintenance."""
        curve = self.curve
        pool, book = curve.pool, curve.pool.portfolio
        loose = ~book.underlyings.stable
        held = pool.backing.on_underlying
        still = float(held[~loose].sum()) if not loose.all() else 0.0
        delta, gamma = book.taylor_delta * loose, book.taylor_gamma * loose
        coins = pool.backing.other + float(held.sum()) - still
        equity = (pool.fixed_equity + still + coins, coins + float(delta.sum()), 0.5 * float(gamma.sum()))
        turns = self._turns(loose)
        edges = np.array([-1.0, *turns, np.inf])
        inner = np.array([-1.0, *turns, (turns[-1] if turns else 0.0) + 2.0])
        middles = 0.5 * (inner[1:] + inner[:-1])
        roots = []
        for weight, scale in ((curve.initial_weight, breach_utilization), (curve.maintenance_weight, 1.0)):
            margins = self._margins(weight, delta, gamma, middles, loose)
            rows = scale * np.array(equity) - margins
            rows[:, 0] -= pool.reserved
            found = _quadratic_roots(rows[:, 2], rows[:, 1], rows[:, 0])
            inside = (found >= edges[:-1, None] - _EDGE) & (found <= edges[1:, None] + _EDGE) & (found > -1.0)
            roots.append(_nearest(found[inside]))
        return roots[0], roots[1]

    def _turns(self, loose: Flags) -> list[float]:
        """Return the moves, ascending, at which the net exposure of an underlying changes its sign."""
        book = self.curve.pool.portfolio
        if self.curve.pool.mode != "cross" or not book.has_gamma:
            return []
        bent = loose & (book.taylor_gamma != 0.0)
        turns = -book.taylor_delta[bent] / book.taylor_gamma[bent]
        return sorted({float(turn) for turn in turns[(turns > -1.0) & (turns < MOVE_MAX)]})

    def _margins(self, weight: Floats, delta: Floats, gamma: Floats, middles: Floats, loose: Flags) -> Floats:
        """Return the margin's coefficients of 1, m, m² (K, 3) in each interval, named by its middle."""
        book, mode = self.curve.pool.portfolio, self.curve.pool.mode
        fixed = weight * (np.abs(book.taylor_delta) if mode == "cross" else 1.0) * ~loose
        if mode == "cross":
            signs: Floats = np.sign(delta + gamma * middles[:, None])
            parts = np.array([weight * delta, weight * (delta + gamma), weight * gamma])
            margins: Floats = signs @ parts.T
        else:
            total = float(weight[loose].sum())
            margins = np.array([[total, total, 0.0]])
        margins[:, 0] += float(fixed.sum())
        return margins

    def single_roots(self, surplus: float) -> Floats:
        """Return the nearest root (J,) of equity - maintenance, now `surplus`, in each underlying's move; NaN: none."""
        curve = self.curve
        book, weight = curve.pool.portfolio, curve.maintenance_weight
        delta, gamma, held = book.taylor_delta, book.taylor_gamma, curve.pool.backing.on_underlying
        if curve.pool.mode != "cross":
            return _nearest_of(_quadratic_roots(0.5 * gamma, delta + held - weight, np.full_like(delta, surplus)))
        # the margin of the lane leaves the surplus, and comes back on either branch of the sign
        base = surplus + weight * np.abs(delta)
        sign = np.array([[1.0], [-1.0]])
        signed = sign * weight
        roots = _quadratic_roots(
            0.5 * gamma - signed * gamma, delta + held - signed * (delta + gamma), base - signed * delta
        )
        with np.errstate(invalid="ignore"):
            exposure = sign[..., None] * (delta[:, None] + gamma[:, None] * roots)
        slack = _EDGE * (np.abs(delta) + np.abs(gamma))[:, None]
        roots[exposure < -slack] = np.nan
        return _nearest_of(np.concatenate([roots[0], roots[1]], axis=1))


_EDGE = 1e-12


def _quadratic_roots(a: Floats, b: Floats, c: Floats) -> Floats:
    """Return both roots (..., 2) of a·x² + b·x + c, NaN where there is none; a may be 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        q = -0.5 * (b + np.copysign(np.sqrt(b * b - 4.0 * a * c), b))
        return np.stack([q / a, c / q], axis=-1)


def _nearest(roots: Floats) -> float | None:
    finite = roots[np.isfinite(roots)]
    return float(finite[np.argmin(np.abs(finite))]) if finite.size else None


def _nearest_of(roots: Floats) -> Floats:
    """Return the root (J,) nearest to 0 and above -1 of those (J, R) given; NaN where there is none."""
    distance = np.where((roots > -1.0) & (roots < np.inf), np.abs(roots), np.inf)
    nearest = np.argmin(distance, axis=1)[:, None]
    found = np.take_along_axis(roots, nearest, axis=1)[:, 0]
    return np.where(np.isfinite(np.take_along_axis(distance, nearest, axis=1)[:, 0]), found, np.nan)


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
    return replace(
        portfolio,
        notional=portfolio.notional * factor,
        delta=delta,
        gamma=portfolio.gamma * factor,
        mark=portfolio.mark * factor,
        unrealized_pnl=portfolio.unrealized_pnl + taylor,
        options=options,
        prices=portfolio.prices * (1.0 + moves),
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


class Here(Protocol):
    """An account's figures now, USD."""

    @property
    def equity(self) -> float:
        """Equity."""
        ...

    @property
    def required_initial(self) -> float:
        """Initial margin and reservations."""
        ...

    @property
    def required_maintenance(self) -> float:
        """Maintenance margin and reservations."""
        ...


Surplus = Callable[[Figures], Floats]


def distances(curve: AccountCurve, here: Here, underlyings: int, breach_utilization: float) -> Distances:
    """Return an account's distances; breach is utilization at the level, or equity below maintenance."""

    def to_liquidation(figures: Figures) -> Floats:
        return figures.equity - figures.maintenance

    def to_breach(figures: Figures) -> Floats:
        return breach_utilization * figures.equity - figures.initial

    liquidatable = here.equity < here.required_maintenance
    surplus = here.equity - here.required_maintenance
    if isinstance(curve, AdditiveCurve) and not curve.has_options:
        breach, liquidation = curve.closed_form.common_roots(breach_utilization)
    else:
        breach, liquidation = _common_roots(curve, (to_breach, to_liquidation))
    singles, open_lanes = _closed_singles(curve, surplus, underlyings)
    for j in open_lanes:
        singles[j] = _single_root(curve, j, to_liquidation)
    known = [root for root in (breach, liquidation) if root is not None]
    return Distances(
        to_breach=min(known, key=abs) if known else None,
        to_liquidation=liquidation,
        by_underlying=singles,
        breached=liquidatable
        or here.required_initial > 0.0 >= breach_utilization * here.equity - here.required_initial,
        liquidatable=liquidatable,
    )


def _closed_singles(curve: AccountCurve, surplus: float, underlyings: int) -> tuple[Floats, Sequence[int]]:
    """Return the roots (J,) that have a closed form, and the underlyings whose roots are to be searched."""
    if not isinstance(curve, AdditiveCurve):
        return np.full(underlyings, np.nan), range(underlyings)
    options = curve.pool.portfolio.options
    return curve.closed_form.single_roots(surplus), sorted(set(options.underlying.tolist()))


def _common_roots(curve: AccountCurve, surpluses: Sequence[Surplus]) -> list[float | None]:
    on_grid = curve.common(curve.grid)
    return [
        nearest_root(curve, lambda moves, s=s: s(curve.common(moves)), s(on_grid))  # type: ignore[misc]
        for s in surpluses
    ]


def _single_root(curve: AccountCurve, underlying: int, surplus: Surplus) -> float:
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
    bend = 0.5 * portfolio.gamma * portfolio.notional
    roots = _nearest_of(_quadratic_roots(bend, portfolio.exposure - keeping, surplus))
    for i in portfolio.options.row[portfolio.isolated[portfolio.options.row]].tolist():
        curve = AdditiveCurve.of(_alone(portfolio, i, terms))
        roots[i] = _single_root(curve, int(portfolio.underlying[i]), lambda f: f.equity - f.maintenance)
    return roots, surplus < 0.0


def _alone(portfolio: Portfolio, row: int, terms: MarginTerms) -> Pool:
    one = portfolio.take(np.arange(len(portfolio)) == row)
    nothing = np.zeros(len(portfolio.underlyings.names))
    return Pool(one, CollateralSplit(nothing, 0.0, float(portfolio.allocated[row])), 0.0, "isolated", terms)
