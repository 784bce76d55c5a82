"""Levels that do not tremble, and drawdown. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.domain.black76 import Floats
from app.domain.portfolio import Flags

Ranks = NDArray[np.int8]

HYSTERESIS = 0.02
"""A level is left downwards only when the figure is this far below its bound: .02 of utilization or margin ratio."""


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
    return 0.0 if peak <= 0.0 else max(0.0, 1.0 - equity / peak)
