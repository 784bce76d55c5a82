"""Where a surplus of an account turns: in closed form where there is one, else searched along its curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from app.domain.black76 import Floats
from app.domain.curves import MOVE_MAX, AccountCurve, AdditiveCurve
from app.domain.portfolio import Flags
from app.domain.record import record

_REFINE_POINTS = 65
_REFINE_ROUNDS, _REFINE_ROUNDS_MAX = 2, 5
_STRAIGHT = 1e-5
"""Of the price at the root: how wide a bracket may be for the curve within it to pass for a line."""


def closed_form(curve: AdditiveCurve) -> Lines | Polynomials:
    """Return the roots of the underlyings without options."""
    return Polynomials(curve) if curve.pool.portfolio.has_gamma else Lines(curve)


@record(frozen=True, slots=True)
class Lines:
    """A book without options and gamma: surpluses are straight lines for every move above -1."""

    curve: AdditiveCurve

    def common_roots(self, breach_utilization: float) -> tuple[float | None, float | None]:
        """Return the roots, under a common move, of breach x equity - initial and of equity - maintenance."""
        now, slope = self.curve.lines
        return (
            _line_root(
                breach_utilization * now.equity - now.initial, breach_utilization * slope.equity - slope.initial
            ),
            _line_root(now.equity - now.maintenance, slope.equity - slope.maintenance),
        )

    def single_roots(self, surplus: float) -> Floats:
        """Return the root (J,) of equity - maintenance, now `surplus`, where one underlying moves alone; NaN: none."""
        curve = self.curve
        slopes = curve.pool.portfolio.taylor_delta + curve.pool.backing.on_underlying - curve.straight_margins[1]
        # underlyings are few: less than what leaving out the zeros costs in arrays
        return np.array([_line_root(surplus, slope) for slope in slopes.tolist()], dtype=np.float64)


def _line_root(here: float, slope: float) -> float | None:
    if slope == 0.0:
        return None
    root = -here / slope
    return root if -1.0 < root < math.inf else None


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
        weights = np.array([curve.initial_weight, curve.maintenance_weight])
        rows = np.outer((breach_utilization, 1.0), equity)[:, None] - self._margins(
            weights, delta, gamma, middles, loose
        )
        rows[..., 0] -= pool.reserved
        found = quadratic_roots(rows[..., 2], rows[..., 1], rows[..., 0])
        inside = (found >= edges[:-1, None] - _EDGE) & (found <= edges[1:, None] + _EDGE) & (found > -1.0)
        return _nearest(found[0][inside[0]]), _nearest(found[1][inside[1]])

    def _turns(self, loose: Flags) -> list[float]:
        """Return the moves, ascending, at which the net exposure of an underlying changes its sign."""
        book = self.curve.pool.portfolio
        if self.curve.pool.mode != "cross" or not book.has_gamma:
            return []
        bent = loose & (book.taylor_gamma != 0.0)
        turns = -book.taylor_delta[bent] / book.taylor_gamma[bent]
        return sorted({float(turn) for turn in turns[(turns > -1.0) & (turns < MOVE_MAX)]})

    def _margins(self, weights: Floats, delta: Floats, gamma: Floats, middles: Floats, loose: Flags) -> Floats:
        """Return both margins' coefficients of 1, m, m² (2, K, 3) in each interval, named by its middle."""
        book, mode = self.curve.pool.portfolio, self.curve.pool.mode
        fixed = weights * (np.abs(book.taylor_delta) if mode == "cross" else 1.0) * ~loose
        if mode == "cross":
            signs: Floats = np.sign(delta + gamma * middles[:, None])
            parts = weights[:, None] * np.array([delta, delta + gamma, gamma])
            margins: Floats = signs @ parts.transpose(0, 2, 1)
        else:
            total = weights[:, loose].sum(axis=1)
            margins = np.array([total, total, np.zeros(2)]).T[:, None]
        margins[..., 0] += fixed.sum(axis=1)[:, None]
        return margins

    def single_roots(self, surplus: float) -> Floats:
        """Return the nearest root (J,) of equity - maintenance, now `surplus`, in each underlying's move; NaN: none."""
        curve = self.curve
        book, weight = curve.pool.portfolio, curve.maintenance_weight
        delta, gamma, held = book.taylor_delta, book.taylor_gamma, curve.pool.backing.on_underlying
        if curve.pool.mode != "cross":
            return nearest_of(quadratic_roots(0.5 * gamma, delta + held - weight, np.full_like(delta, surplus)))
        # the margin of the lane leaves the surplus, and comes back on either branch of the sign
        base = surplus + weight * np.abs(delta)
        sign = np.array([[1.0], [-1.0]])
        signed = sign * weight
        roots = quadratic_roots(
            0.5 * gamma - signed * gamma, delta + held - signed * (delta + gamma), base - signed * delta
        )
        with np.errstate(invalid="ignore"):
            exposure = sign[..., None] * (delta[:, None] + gamma[:, None] * roots)
        slack = _EDGE * (np.abs(delta) + np.abs(gamma))[:, None]
        roots[exposure < -slack] = np.nan
        return nearest_of(np.concatenate([roots[0], roots[1]], axis=1))


_EDGE = 1e-12


def quadratic_roots(a: Floats, b: Floats, c: Floats) -> Floats:
    """Return both roots (..., 2) of a·x² + b·x + c, NaN where there is none; a may be 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        q = -0.5 * (b + np.copysign(np.sqrt(b * b - 4.0 * a * c), b))
        roots = np.empty((*q.shape, 2))
        np.divide(q, a, out=roots[..., 0])
        np.divide(c, q, out=roots[..., 1])
        return roots


def _nearest(roots: Floats) -> float | None:
    finite = roots[np.isfinite(roots)]
    return float(finite[np.argmin(np.abs(finite))]) if finite.size else None


def nearest_of(roots: Floats) -> Floats:
    """Return the root (J,) nearest to 0 and above -1 of those (J, R) given; NaN where there is none."""
    distance = np.where((roots > -1.0) & (roots < np.inf), np.abs(roots), np.inf)
    lanes, nearest = np.arange(len(roots)), distance.argmin(axis=1)
    found: Floats = roots[lanes, nearest]
    found[distance[lanes, nearest] == np.inf] = np.nan
    return found


def nearest_root(
    curve: AccountCurve, surplus: Callable[[Floats], Floats], grid: Floats, values: Floats
) -> float | None:
    """Return the root of `surplus` nearest to no move, or None; `values` are those on the grid.

    Two roots closer together than the grid (half a percent near zero, coarser far out) are not seen.
    """
    # a surplus that is nothing but rounding has no root
    noise = 1e-13 * float(np.abs(values).max())
    signs = values < -noise
    crossing = np.flatnonzero(signs[:-1] != signs[1:])
    if not crossing.size:
        return None
    below, above = crossing[grid[crossing] < 0.0][-1:], crossing[grid[crossing] >= 0.0][:1]
    # where the surplus itself turns, its root is meant: far out, noise on the grid's scale is many ticks of a price
    turns = np.signbit(values[:-1]) != np.signbit(values[1:])
    brackets = [(float(grid[i]), float(grid[i + 1]), 0.0 if turns[i] else noise) for i in (*below, *above)]
    if len(brackets) == 2:
        # where one bracket lies wholly nearer than the other, the other need not be refined
        (far_low, near_low, _), (near_high, far_high, _) = brackets
        if far_high <= -near_low:
            brackets = brackets[1:]
        elif -far_low <= near_high:
            brackets = brackets[:1]
    refine = _refine_one_by_one if curve.one_by_one else _refine_at_once
    return min((refine(_lifted(surplus, by), low, high) for low, high, by in brackets), key=abs)


def _lifted(surplus: Callable[[Floats], Floats], by: float) -> Callable[[Floats], Floats]:
    return lambda moves: surplus(moves) + by


def _refine_one_by_one(surplus: Callable[[Floats], Floats], low: float, high: float) -> float:
    ends = [float(surplus(np.array([x]))[0]) for x in (low, high)]
    if (ends[0] < 0.0) == (ends[1] < 0.0):
        return _flat_root(low, high, *ends)
    return brentq(lambda x: float(surplus(np.array([x]))[0]), low, high, xtol=1e-14, rtol=1e-14)


def _refine_at_once(surplus: Callable[[Floats], Floats], low: float, high: float) -> float:
    """Narrow the bracket 64-fold a round; within the last, no wider than 1e-5 of the price, the line is straight."""
    left = right = 0.0
    for done in range(_REFINE_ROUNDS_MAX):
        if done >= _REFINE_ROUNDS and high - low <= _STRAIGHT * (1.0 + low):
            break
        points = np.linspace(low, high, _REFINE_POINTS)
        values = surplus(points)
        signs = np.signbit(values)
        crossing = np.flatnonzero(signs[:-1] != signs[1:])
        if not crossing.size:
            return _flat_root(low, high, float(values[0]), float(values[-1]))
        i = int(crossing[0])
        low, high, left, right = (float(v) for v in (points[i], points[i + 1], values[i], values[i + 1]))
    return low - left * (high - low) / (right - left)


def _flat_root(low: float, high: float, left: float, right: float) -> float:
    """Return the end nearer to zero: where the grid saw a crossing that is gone here, rounding made it."""
    return low if abs(left) <= abs(right) else high
