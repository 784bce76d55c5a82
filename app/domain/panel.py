"""Daily returns of several assets side by side: the history that covariances and replays are read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np

from app.domain.black76 import Floats


@dataclass(frozen=True, eq=False)
class Panel:
    """Simple daily returns (T, K), NaN where an asset has none: day t's is close t / close t-1 - 1.

    `days` (T,) are consecutive, so that rows next to each other are days next to each other.
    """

    days: tuple[date, ...]
    assets: tuple[str, ...]
    returns: Floats

    def of(self, names: Sequence[str]) -> Floats:
        """Return the returns (T, J) of these assets, a column of NaN for one that has none."""
        column = {asset: k for k, asset in enumerate(self.assets)}
        found = np.full((len(self.days), len(names)), np.nan)
        for j, name in enumerate(names):
            if name in column:
                found[:, j] = self.returns[:, column[name]]
        return found


def panel_of_closes(closes: Mapping[str, Mapping[date, float]]) -> Panel:
    """Return the panel of closes by asset and day, from the first day to the last; a gap has no return on either side.

    Closes are positive USD prices.
    """
    assets = tuple(closes)
    known = [day for series in closes.values() for day in series]
    if not known:
        return Panel((), assets, np.empty((0, len(assets))))
    first = min(known)
    levels = np.full(((max(known) - first).days + 1, len(assets)), np.nan)
    for k, series in enumerate(closes.values()):
        levels[[(day - first).days for day in series], k] = list(series.values())
    days = tuple(first + timedelta(days=t) for t in range(1, len(levels)))
    return Panel(days, assets, levels[1:] / levels[:-1] - 1.0)
