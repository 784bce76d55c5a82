"""How the screened accounts stand, counted: what an operator sees of all of them at once. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from app.domain.screen import Screen, ScreenFigures
from app.domain.watch import Ranks

BANDS = ("0.00-0.25", "0.25-0.50", "0.50-0.70", "0.70-0.85", "0.85-1.00", "1.00+")
"""Bands of the margin ratio, each from its lower bound to below the next; without equity it is the last."""
_EDGES = (0.25, 0.50, 0.70, 0.85, 1.00)
WORST_MAX = 100
"""Accounts that are named, those with the highest margin ratio."""
PRICES_MAX = 100
"""Prices that are named, those on which most accounts depend."""


@dataclass(frozen=True, slots=True)
class Endangered:
    """One account near its liquidation: ratios are None without equity; equity in USD."""

    agent_id: str
    margin_ratio: float | None
    utilization: float | None
    equity: float


@dataclass(frozen=True, slots=True)
class Tally:
    """Accounts counted by zone and alert level as last told, and by band of the margin ratio as last assessed.

    `unpriced` ones can't be assessed, and are in no band. `prices`: how many accounts hold what each stored price
    values, of the prices in use.
    """

    accounts: int
    zones: Mapping[str, int]
    alert_levels: Mapping[str, int]
    bands: Mapping[str, int]
    unpriced: int
    worst: Sequence[Endangered]
    prices: Mapping[str, int]


def tally(screen: Screen, zones: tuple[Sequence[str], Ranks], alert_levels: tuple[Sequence[str], Ranks]) -> Tally:
    """Count all accounts of a screen; zones and alert levels are names, and ranks among them by account (n,)."""
    figures = screen.figures()
    ratio = figures.margin_ratio
    known = ~np.isnan(ratio)
    bands = np.bincount(np.searchsorted(_EDGES, ratio[known], side="right"), minlength=len(BANDS))
    used = sorted(screen.prices_used().items(), key=lambda item: (-item[1], item[0]))
    return Tally(
        len(screen),
        _counted(*zones),
        _counted(*alert_levels),
        dict(zip(BANDS, bands.tolist(), strict=True)),
        int(len(ratio) - known.sum()),
        _worst(screen, figures),
        dict(used[:PRICES_MAX]),
    )


def _counted(names: Sequence[str], ranks: Ranks) -> dict[str, int]:
    return dict(zip(names, np.bincount(ranks, minlength=len(names)).tolist(), strict=True))


def _worst(screen: Screen, figures: ScreenFigures) -> list[Endangered]:
    """Return the accounts with the highest margin ratio, worst first, those that need no margin left out."""
    ratio = np.nan_to_num(figures.margin_ratio, nan=0.0, posinf=np.inf)
    count = min(WORST_MAX, len(ratio))
    rows = np.argpartition(-ratio, count - 1)[:count] if count else np.zeros(0, dtype=np.intp)
    rows = rows[ratio[rows] > 0.0]
    rows = rows[np.lexsort((figures.equity[rows], -ratio[rows]))]
    used = figures.utilization
    return [
        Endangered(screen.agents[row], _finite(ratio[row]), _finite(used[row]), float(figures.equity[row]))
        for row in rows.tolist()
    ]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
