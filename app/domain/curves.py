"""An account's figures along moves of prices: equity and requirements, in the account's margin mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from app.domain.black76 import PRICE_FACTOR_MIN, Floats
from app.domain.collateral import CollateralSplit
from app.domain.computed import computed
from app.domain.margin.portfolio import portfolio_margin
from app.domain.margin.result import MarginTerms
from app.domain.parameters import MarginMode
from app.domain.portfolio import Portfolio
from app.domain.record import record
from app.domain.revalue import sum_by_underlying

MOVE_MIN = PRICE_FACTOR_MIN - 1.0
MOVE_MAX = 1_000.0
"""Prices past a thousandfold are not searched for a root, where no closed form gives one."""

_UP = np.expm1(np.linspace(0.0, 1.0, 41) ** 2 * np.log1p(MOVE_MAX))
_DOWN = np.expm1(np.linspace(0.0, 1.0, 41) ** 2 * np.log(PRICE_FACTOR_MIN))
SEARCH_GRID = np.concatenate([_DOWN[:0:-1], _UP])
ENDS = np.array([MOVE_MIN, 0.0, MOVE_MAX])
"""Enough of a grid where the surplus is concave: one root at most on either side."""
OPTIONS_AT_ONCE_MAX = 40
"""Options up to which thirty moves at once cost hardly more than one."""


@record(frozen=True, slots=True)
class Figures:
    """Equity, required initial and required maintenance margin, USD, at each of K moves."""

    equity: Floats
    initial: Floats
    maintenance: Floats


@record(frozen=True, slots=True)
class Point:
    """Equity, required initial and required maintenance margin at one move, or what a move adds to each, USD."""

    equity: float
    initial: float
    maintenance: float


Line = Callable[[Floats], Figures]


class AccountCurve(Protocol):
    """An account's figures as prices move; volatility stays.

    `concave` says that every surplus of equity over requirement is concave in a move, `one_by_one` that many moves at
    once cost as much as each alone.
    """

    @property
    def concave(self) -> bool:
        """Whether a surplus has one root at most on either side of a positive value."""
        ...

    @property
    def one_by_one(self) -> bool:
        """Whether each move is paid for on its own."""
        ...

    def common(self, moves: Floats) -> Figures:
        """Return the figures where every non-stable price makes the same move (K,)."""
        ...

    def points(self, moves: Sequence[float]) -> list[Point]:
        """Return the figures, one by one, where every non-stable price makes the moves."""
        ...

    def single(self, underlying: int) -> Line:
        """Return the figures as a function of one underlying's move, with all positions and collateral on it."""
        ...


@record(frozen=True, slots=True)
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
        return self.backing.stable + self.portfolio.profit

    def curve(self) -> AccountCurve:
        """Return the curve of the pool's margin mode."""
        if self.mode == "portfolio":
            return PortfolioCurve(self)
        return AdditiveCurve.of(self)


def weights(book: Portfolio, mode: MarginMode) -> tuple[Floats, Floats]:
    """Return what initial and maintenance margin weigh `rated` with, (J,): rates in cross mode, else Σ rate x notional.

    Options aside.
    """
    if mode == "cross":
        return book.highest_rates
    notional = np.where(book.is_option, 0.0, book.notional)
    return book.by_underlying(book.initial_rate * notional), book.by_underlying(book.maintenance_rate * notional)


def rated(book: Portfolio, mode: MarginMode, moves: Floats) -> Floats:
    """Return what `weights` apply to after moves (K,) or (J, K): |net exposure| in cross mode, else 1 + m."""
    factor: Floats = 1.0 + moves
    if mode != "cross":
        return factor
    return np.abs((book.taylor_delta[:, None] + book.taylor_gamma[:, None] * moves) * factor)


def option_margins(book: Portfolio, moves: Floats, value: Floats) -> tuple[Floats, Floats]:
    """Return initial and maintenance margin (J, K) of options worth `value` (O, K) after their moves (K,) or (O, K)."""
    options = book.options
    short = (options.quantity < 0.0)[:, None]
    underlying = book.notional[options.row][:, None] * (1.0 + moves)
    initial, maintenance = (
        sum_by_underlying(
            options,
            np.where(short, rate[options.row][:, None] * underlying - value, value),
            len(book.underlyings.names),
        )
        for rate in (book.initial_rate, book.maintenance_rate)
    )
    return initial, maintenance


@record(frozen=True, eq=False)
class AdditiveCurve:
    """Cross and isolated margin add up over underlyings, so each is a lane of its own; arrays (J,)."""

    pool: Pool
    initial_weight: Floats
    maintenance_weight: Floats
    concave: bool = False

    @property
    def one_by_one(self) -> bool:
        """See AccountCurve. Past some options the arithmetic outweighs the calls."""
        return len(self.pool.portfolio.options) > OPTIONS_AT_ONCE_MAX

    @classmethod
    def of(cls, pool: Pool) -> AdditiveCurve:
        """Return the curve: rates by underlying in cross mode, Σ rate x notional in isolated mode."""
        return cls(pool, *weights(pool.portfolio, pool.mode))

    def lanes(self, moves: Floats) -> Figures:
        """Return the parts (J, K) that each underlying adds to the figures when it makes the moves (K,)."""
        book, factor = self.pool.portfolio, 1.0 + moves
        delta, gamma = book.taylor_delta[:, None], book.taylor_gamma[:, None]
        equity = self.pool.backing.on_underlying[:, None] * factor + delta * moves
        if book.has_gamma:
            equity = equity + 0.5 * gamma * moves * moves
        base = rated(book, self.pool.mode, moves)
        initial, maintenance = self.initial_weight[:, None] * base, self.maintenance_weight[:, None] * base
        if book.has_options:
            options = book.options
            value = options.values(moves)
            opening, keeping = option_margins(book, moves, value)
            held = sum_by_underlying(options, value, len(book.underlyings.names))
            equity, initial, maintenance = equity + held, initial + opening, maintenance + keeping
        return Figures(equity, initial, maintenance)

    @computed
    def lines(self) -> tuple[Point, Point]:
        """Of a book without options and gamma: the figures now, and their slopes in a common move."""
        pool, book = self.pool, self.pool.portfolio
        held = pool.backing.on_underlying
        rows = np.array([held, held + book.taylor_delta, *self.straight_margins])
        now = slope = np.add.reduce(rows, axis=1).tolist()
        if book.underlyings.any_stable:
            slope = rows[:, ~book.underlyings.stable].sum(axis=1).tolist()
        base = pool.fixed_equity + pool.backing.other
        return (
            Point(base + now[0], pool.reserved + now[2], pool.reserved + now[3]),
            Point(pool.backing.other + slope[1], slope[2], slope[3]),
        )

    @computed
    def straight_margins(self) -> tuple[Floats, Floats]:
        """Return initial and maintenance margin (J,) of the underlyings without options."""
        if self.pool.mode != "cross":
            return self.initial_weight, self.maintenance_weight
        exposure = np.abs(self.pool.portfolio.taylor_delta)
        return self.initial_weight * exposure, self.maintenance_weight * exposure

    def common(self, moves: Floats) -> Figures:
        """See AccountCurve."""
        if self.pool.portfolio.is_linear:
            now, slope = self.lines
            return Figures(
                now.equity + slope.equity * moves,
                now.initial + slope.initial * moves,
                now.maintenance + slope.maintenance * moves,
            )
        lanes, still = self.lanes(moves), self.pool.portfolio.underlyings.stable
        if self.pool.portfolio.underlyings.any_stable:
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

    def points(self, moves: Sequence[float]) -> list[Point]:
        """See AccountCurve. Of straight lines, without the arrays, which cost more than a few points do."""
        if not self.pool.portfolio.is_linear:
            return _points(self, moves)
        now, slope = self.lines
        return [
            Point(
                now.equity + slope.equity * m, now.initial + slope.initial * m, now.maintenance + slope.maintenance * m
            )
            for m in moves
        ]

    @property
    def has_options(self) -> bool:
        """Whether some underlyings have no closed form."""
        return self.pool.portfolio.has_options

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


def _points(curve: AccountCurve, moves: Sequence[float]) -> list[Point]:
    columns = _columns(curve.common(np.array(moves)))
    return list(map(Point, *(column.tolist() for column in columns)))


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
    def concave(self) -> bool:
        """See AccountCurve."""
        return self.pool.portfolio.is_linear and not self.pool.portfolio.has_vega

    def common(self, moves: Floats) -> Figures:
        """See AccountCurve."""
        loose = np.where(self.pool.portfolio.underlyings.stable, 0.0, 1.0)
        return self._at(moves, loose, 1.0)

    def points(self, moves: Sequence[float]) -> list[Point]:
        """See AccountCurve."""
        return _points(self, moves)

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
            + book.profit
            + book.options_value
        )
        return equity, margin.initial_margin + pool.reserved, margin.maintenance_margin + pool.reserved
