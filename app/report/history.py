"""Daily history as the report reads it: the one place that knows how the domain lays it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np

from app.domain.panel import HISTORY_DAYS, History, Panel, panel_of_closes
from app.errors import InvalidError


@dataclass(frozen=True, eq=False)
class Daily:
    """Daily returns: `whole` for replays, `recent`, the last days of it, for covariances and VaR."""

    whole: Panel
    recent: Panel

    def days(self, names: Sequence[str]) -> list[int]:
        """Return how many recent returns each of these assets has."""
        found: list[int] = np.isfinite(self.recent.of(names)).sum(axis=0).tolist()
        return found

    def window(self, names: Sequence[str]) -> History | None:
        """Return the recent days on which all of these assets have a return, None where they are too few."""
        try:
            return self.recent.history(names, len(self.recent.dates))
        except InvalidError:
            return None


def daily(panel: Panel, days: int = HISTORY_DAYS) -> Daily:
    """Return the panel with so many of its last days set apart."""
    recent = replace(panel, dates=panel.dates[-days:], returns=panel.returns[-days:])
    return Daily(panel, recent)


def daily_of(found: Mapping[str, Mapping[date, float]]) -> Daily:
    """Return the daily returns of positive closes by asset and day."""
    return daily(panel_of_closes(found))
