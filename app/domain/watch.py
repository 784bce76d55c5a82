"""Levels that do not tremble, and drawdown. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def drawdown(peak: float, equity: float) -> float:
    """Return how far equity has fallen from its peak, a fraction; 0 where there was no peak."""
    return 0.0 if peak <= 0.0 else max(0.0, 1.0 - equity / peak)
