"""Levels that do not tremble, and drawdown. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.domain.black76 import Floats
from app.domain.portfolio import Flags

Ranks = NDArray[np.int8]

HYSTERESIS = 0.02
"""A level is left downwards only when the figure is this far below its bound: .02 of utilization or margin ratio."""
PEAK_STEP = 1e-4
"""A peak is written down when it has risen by this share of itself: one basis point."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Named levels from good to bad, and the inclusive lower bounds of all but the first."""

    names: Sequence[str]
    bounds: Sequence[float]

    def rank(self, value: float | None) -> int:
        """Return the level of a figure; one that is not defined is the worst."""
        if value is None:
            return len(self.bounds)
        return sum(1 for bound in self.bounds if value >= bound)


def settled_level(scale: Scale, before: str, value: float | None) -> str:
    """Return the level to tell: worse at once, better only when clear of the bound."""
    then = scale.names.index(before)
    now = scale.rank(value)
    if now >= then or value is None:
        return scale.names[now]
    return scale.names[min(then, scale.rank(value + HYSTERESIS))]


def levels_moved(scale: Scale, told: Ranks, values: Floats) -> Flags:
    """Return for whom (k,) `settled_level` is no longer the level told, given as its rank; NaN: nothing is known."""
    bounds = np.array(scale.bounds)
    worse = np.searchsorted(bounds, values, side="right") > told
    better = np.searchsorted(bounds, values + HYSTERESIS, side="right") < told
    return (worse | better) & ~np.isnan(values)


def drawdown(peak: float, equity: float) -> float:
    """Return how far equity has fallen from its peak, a fraction; 0 where there was no peak."""
    return 0.0 if peak <= 0.0 else max(0.0, (peak - equity) / peak)


def clear_level(bound: float) -> float:
    """Return the drawdown below which one that had reached the bound is over, so that the next is a new one."""
    return max(bound - HYSTERESIS, bound / 2.0)


@dataclass(frozen=True, slots=True)
class Band:
    """Equity, USD, between `low` and `high`: there is nothing to tell of an account's drawdown."""

    low: float
    high: float


def quiet_band(peak: float, falls: Sequence[float], recoveries: Sequence[float]) -> Band:
    """Return the band of equity below a peak, USD, that ends at the next of drawdowns to fall to or to recover from.

    Without a peak there is none: the account is to be looked at.
    """
    if peak <= 0.0:
        return Band(math.inf, -math.inf)
    low = max((peak * (1.0 - fall) for fall in falls), default=-math.inf)
    return Band(low, min(peak * (1.0 + PEAK_STEP), *(peak * (1.0 - r) for r in recoveries), math.inf))
