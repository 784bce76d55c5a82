"""Daily returns of several assets side by side: the history that covariances, replays and VaR are read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from app.domain.black76 import Floats
from app.domain.closes import Gap
from app.errors import FieldError, InvalidError, invalid, pointer_to

Dates = NDArray[np.datetime64]

HISTORY_DAYS = 500
HISTORY_DAYS_MIN = 60
"""Days below which an asset, or what two assets have in common, counts as without history."""


@dataclass(frozen=True, slots=True)
class History:
    """The returns (T, J) of J assets on T days, oldest first; `dates` (T,) are those on which each return ended."""

    assets: tuple[str, ...]
    dates: Dates
    returns: Floats

    def __len__(self) -> int:
        return len(self.dates)


@dataclass(frozen=True, eq=False)
class Panel:
    """Simple daily returns (T, A) > -1, oldest first, NaN where an asset has none: day t's is close t / close t-1 - 1.

    `dates` (T,), by day, are consecutive, so that rows next to each other are days next to each other. Raises
    InvalidError `out_of_range` for a return of -100 % or less.
    """

    assets: tuple[str, ...]
    dates: Dates
    returns: Floats

    def __post_init__(self) -> None:
        bad = (self.returns <= -1.0).any(axis=0)
        if bad.any():
            name = self.assets[int(np.argmax(bad))]
            raise invalid(pointer_to("history", name), "out_of_range", f"{name}: a return of -100 % or less")

    @classmethod
    def from_closes(cls, assets: Sequence[str], dates: Dates, closes: Floats) -> Panel:
        """Return the panel of closes (D, A), USD, NaN where there is none; `dates` (D,) ascend, days may lack.

        A day without a close has no return, nor has the day after it. Raises InvalidError `not_positive` for a close of
        0 or less.
        """
        bad = (closes <= 0.0).any(axis=0)
        if bad.any():
            name = assets[int(np.argmax(bad))]
            raise invalid(pointer_to("history", name), "not_positive", f"{name}: a close is above 0")
        days = dates.astype("datetime64[D]")
        if not len(days):
            return cls(tuple(assets), days, np.empty((0, len(assets))))
        levels = np.full((int((days[-1] - days[0]).astype(np.int64)) + 1, len(assets)), np.nan)
        levels[(days - days[0]).astype(np.int64)] = closes
        return cls(tuple(assets), days[0] + np.arange(1, len(levels)), levels[1:] / levels[:-1] - 1.0)

    @cached_property
    def _column(self) -> dict[str, int]:
        return {asset: a for a, asset in enumerate(self.assets)}

    @cached_property
    def _present(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.returns)

    @cached_property
    def _full(self) -> bool:
        return bool(self._present.all())

    @cached_property
    def gaps(self) -> list[Gap]:
        """Days without a return, by asset, at the ends of the panel too."""
        found = []
        for name, present in zip(self.assets, self._present.T, strict=True):
            # +1 where a gap begins, -1 one past its end
            edges = np.diff((~present).astype(np.intp), prepend=0, append=0)
            begins, ends = self.dates[edges[:-1] == 1], self.dates[edges[1:] == -1]
            found += [Gap(name, a, b) for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
        return found

    def of(self, names: Sequence[str]) -> Floats:
        """Return the returns (T, J) of these assets, a column of NaN for one that has none."""
        found = np.full((len(self.dates), len(names)), np.nan)
        for j, name in enumerate(names):
            if name in self._column:
                found[:, j] = self.returns[:, self._column[name]]
        return found

    def history(self, assets: Sequence[str], days: int = HISTORY_DAYS, days_min: int = HISTORY_DAYS_MIN) -> History:
        """Return the last `days` days on which every asset has a return, in the order of `assets`.

        Fewer are taken where there are no more. Raises InvalidError `missing_history` below `days_min`: its
        `errors` name each asset that is short, its figures the days that each has.
        """
        names = tuple(assets)
        if days < days_min:
            raise invalid("/days", "out_of_range", f"a window is of {days_min} days or more")
        if not all(name in self._column for name in names):
            raise self._missing(names, days_min)
        columns = [self._column[name] for name in names]
        if self._full:
            rows: slice | NDArray[np.intp] = slice(-days, None)
        else:
            rows = np.flatnonzero(self._present[:, columns].all(axis=1))[-days:]
        dates = self.dates[rows]
        if len(dates) < days_min:
            raise self._missing(names, days_min)
        same = names == self.assets
        returns = self.returns[rows] if same else self.returns[rows][:, columns]
        return History(names, dates, returns)

    def _missing(self, names: Sequence[str], days_min: int) -> InvalidError:
        days = {n: int(self._present[:, self._column[n]].sum()) if n in self._column else 0 for n in names}
        short = [name for name in names if days[name] < days_min] or list(names)
        return missing_history({name: days[name] for name in short}, days_min)


def panel_of_closes(
    closes: Mapping[str, Mapping[date, float]], first: date | None = None, last: date | None = None
) -> Panel:
    """Return the panel of positive USD closes by asset and day, of the days from `first` to `last`.

    Left out, these are the first and the last day of any asset.
    """
    known = [day for series in closes.values() for day in series]
    first, last = first or min(known, default=None), last or max(known, default=None)
    if first is None or last is None:
        return Panel(tuple(closes), np.empty(0, dtype="datetime64[D]"), np.empty((0, len(closes))))
    levels = np.full(((last - first) // timedelta(days=1) + 1, len(closes)), np.nan)
    for a, series in enumerate(closes.values()):
        within = {(day - first).days: close for day, close in series.items() if first <= day <= last}
        levels[list(within), a] = list(within.values())
    return Panel.from_closes(tuple(closes), np.datetime64(first, "D") + np.arange(len(levels)), levels)


def missing_history(days: dict[str, int], days_min: int) -> InvalidError:
    """Return the error that names each asset, or series, and the days it has; all named have too few in common."""
    shown = ", ".join(f"{name} ({count})" for name, count in days.items())
    in_common = " in common" if all(count >= days_min for count in days.values()) else ""
    detail = f"at least {days_min} daily returns are needed{in_common}; missing history of {shown}"
    errors = tuple(
        FieldError(pointer_to("history", name), "missing_history", f"{name} has {count} of {days_min} days{in_common}")
        for name, count in days.items()
    )
    figures = {"history": {name: {"days": count, "required": days_min} for name, count in days.items()}}
    return InvalidError(detail, code="missing_history", errors=errors, figures=figures)
