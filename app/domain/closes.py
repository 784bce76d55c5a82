"""Daily closes: which of them look wrong, and where days are missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from itertools import pairwise

import numpy as np

from app.domain.black76 import Floats
from app.domain.portfolio import Flags

DEVIATIONS_MAX = 12.0
"""Robust deviations of a daily log return past which a close asks to be confirmed."""
BORNE_OUT = 2.0
"""How many times as far a close may be off that the next one stands by."""
RETURNS_MIN = 20
"""Returns from which an asset's own deviation is taken."""
DEVIATION_UNKNOWN = 0.04
"""Deviation of a day where there are fewer returns: that of a volatility of 76 % a year."""
DEVIATION_MIN = 0.002
"""Least deviation: a stablecoin stands still for weeks, and may then move by a per cent."""
_NORMAL = 1.4826
"""1/Φ⁻¹(¾), which makes the median absolute deviation that of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Close:
    """The last price of an asset on a UTC day, USD."""

    asset: str
    day: date
    close: Decimal


@dataclass(frozen=True, slots=True)
class Gap:
    """Days of an asset without a close, or without a return, both ends included."""

    asset: str
    first: date
    last: date

    @property
    def days(self) -> int:
        """How many days are missing."""
        return (self.last - self.first).days + 1


@dataclass(frozen=True, slots=True)
class Outlier:
    """A close that is off another one of its asset, by so many robust deviations of a daily log return."""

    row: int
    other: int
    deviations: float
    daily_deviation: float


def robust_deviation(days: Floats, closes: Floats) -> float | None:
    """Return 1.4826 × the median absolute deviation of daily log returns from 0, None of fewer than 20 returns.

    `days` (n,) are day numbers in order; a return over several days counts by the root of their number. From 0 and not
    from their median, so that a steady trend is not all deviation. Leys et al. 2013, "Detecting outliers".
    """
    if len(closes) <= RETURNS_MIN:
        return None
    returns = np.diff(np.log(closes)) / np.sqrt(np.diff(days))
    return max(DEVIATION_MIN, _NORMAL * float(np.median(np.abs(returns))))


def outliers(days: Floats, closes: Floats, known: Flags, deviations_max: float = DEVIATIONS_MAX) -> list[Outlier]:
    """Return the closes (n,) of one asset, in the order of their days, that are off the last good one before them.

    What is `known` is good, and says by itself how far is far where it is enough. A close that the one after it stands
    by may be twice as far off: markets do leap. Past that the first day of a new level is off, and only that; one
    close that is wrong does not put off the next, which is back at the level before it. A new close is also held
    against a known one right after it.
    """
    scale = robust_deviation(days[known], closes[known]) or robust_deviation(days, closes) or DEVIATION_UNKNOWN
    logs, numbers, is_known = np.log(closes).tolist(), days.tolist(), known.tolist()

    def apart(i: int, j: int) -> float:
        return float(abs(logs[j] - logs[i]) / (scale * math.sqrt(numbers[j] - numbers[i])))

    found: list[Outlier] = []
    good, flagged = 0, -1
    for i in range(1, len(logs)):
        far = apart(good, i)
        borne_out = i + 1 < len(logs) and apart(i, i + 1) <= deviations_max
        near = far <= deviations_max * (BORNE_OUT if borne_out else 1.0)
        if is_known[i] or near or (flagged == i - 1 and apart(flagged, i) <= deviations_max):
            good = i
            continue
        found.append(Outlier(i, good, far, scale))
        flagged = i
    found += [
        Outlier(i, i + 1, apart(i, i + 1), scale)
        for i in range(len(logs) - 1)
        if not is_known[i] and is_known[i + 1] and apart(i, i + 1) > deviations_max
    ]
    first = {outlier.row: outlier for outlier in reversed(found)}
    return [first[row] for row in sorted(first)]


def missing_days(asset: str, days: Sequence[date]) -> list[Gap]:
    """Return the gaps between days in order."""
    day = timedelta(days=1)
    return [Gap(asset, a + day, b - day) for a, b in pairwise(days) if b - a > day]
