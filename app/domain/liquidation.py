"""Where an account breaches and where it is liquidated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from app.domain.black76 import Floats
from app.domain.collateral import CollateralSplit
from app.domain.curves import ENDS, SEARCH_GRID, AccountCurve, AdditiveCurve, Figures, Pool
from app.domain.margin.isolated import position_margin
from app.domain.margin.result import MarginTerms
from app.domain.portfolio import Flags, Portfolio
from app.domain.record import record
from app.domain.roots import closed_form, nearest_of, nearest_root, quadratic_roots


@record(frozen=True, slots=True)
class Distances:
    """Relative moves to breach and to liquidation: of all non-stable prices, and (J,) of each underlying alone.

    None and NaN: no price above zero gets there. `breached` and `liquidatable` say that it is so already; then
    the distance to breach is 0, and those to liquidation are the moves that would end it.
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

    surplus = here.equity - here.required_maintenance
    spare = breach_utilization * here.equity - here.required_initial
    grid = ENDS if curve.concave and min(surplus, spare) >= 0.0 else SEARCH_GRID
    if isinstance(curve, AdditiveCurve) and not curve.has_options:
        breach, liquidation = closed_form(curve).common_roots(breach_utilization)
    else:
        breach, liquidation = _common_roots(curve, (to_breach, to_liquidation), grid)
    if isinstance(curve, AdditiveCurve):
        singles = _additive_singles(curve, surplus, to_liquidation, grid)
    else:
        singles = np.array([_single_root(curve, j, to_liquidation, grid) for j in range(underlyings)])
    known = [root for root in (breach, liquidation) if root is not None]
    breached = surplus < 0.0 or here.required_initial > 0.0 >= spare
    return Distances(
        to_breach=0.0 if breached else min(known, key=abs, default=None),
        to_liquidation=liquidation,
        by_underlying=singles,
        breached=breached,
        liquidatable=surplus < 0.0,
    )


def _additive_singles(curve: AdditiveCurve, here: float, surplus: Surplus, grid: Floats) -> Floats:
    """Return the roots (J,) of each underlying alone: closed forms, but for underlyings with options."""
    roots = closed_form(curve).single_roots(here)
    if not curve.has_options:
        return roots
    optioned = sorted(set(curve.pool.portfolio.options.underlying.tolist()))
    # all lanes at once: one revaluation of every option on the grid serves them all
    lanes = surplus(curve.lanes(grid))
    still = int(np.argmin(np.abs(grid)))
    for j in optioned:
        roots[j] = _single_root(curve, j, surplus, grid, here + lanes[j] - lanes[j, still])
    return roots


def _common_roots(curve: AccountCurve, surpluses: Sequence[Surplus], grid: Floats) -> list[float | None]:
    on_grid = curve.common(grid)
    return [
        nearest_root(curve, lambda moves, s=s: s(curve.common(moves)), grid, s(on_grid))  # type: ignore[misc]
        for s in surpluses
    ]


def _single_root(
    curve: AccountCurve, underlying: int, surplus: Surplus, grid: Floats, on_grid: Floats | None = None
) -> float:
    line = curve.single(underlying)
    values = surplus(line(grid)) if on_grid is None else on_grid
    root = nearest_root(curve, lambda moves: surplus(line(moves)), grid, values)
    return np.nan if root is None else root


def isolated_roots(portfolio: Portfolio, terms: MarginTerms) -> tuple[Floats, Flags]:
    """Return the move (n,) at which each position, alone with its allocation, is liquidated (NaN: none).

    And whether it is so already (n,).
    """
    keeping = position_margin(portfolio, portfolio.maintenance_rate)
    surplus = portfolio.allocated + portfolio.unrealized_pnl - keeping
    surplus[portfolio.options.row] += portfolio.options.value
    bend = 0.5 * portfolio.gamma * portfolio.notional
    roots = nearest_of(quadratic_roots(bend, portfolio.exposure - keeping, surplus))
    for i in portfolio.options.row[portfolio.isolated[portfolio.options.row]].tolist():
        curve = AdditiveCurve.of(_alone(portfolio, i, terms))
        roots[i] = _single_root(curve, int(portfolio.underlying[i]), lambda f: f.equity - f.maintenance, SEARCH_GRID)
    return roots, surplus < 0.0


def _alone(portfolio: Portfolio, row: int, terms: MarginTerms) -> Pool:
    one = portfolio.take(np.arange(len(portfolio)) == row)
    nothing = np.zeros(len(portfolio.underlyings.names))
    return Pool(one, CollateralSplit(nothing, 0.0, float(portfolio.allocated[row])), 0.0, "isolated", terms)
