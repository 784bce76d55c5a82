"""Daily simple returns by asset, and the window of them that a book is revalued on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray

from app.domain.black76 import Floats
from app.errors import FieldError, InvalidError, invalid, pointer_to

Dates = NDArray[np.datetime64]

HISTORY_DAYS = 500
HISTORY_DAYS_MIN = 60


@dataclass(frozen=True, slots=True)
class History:
    """The returns (T, J) of J assets on T days, oldest first; `dates` (T,) are those on which each return ended."""

    assets: tuple[str, ...]
    dates: Dates
    returns: Floats

    def __len__(self) -> int:
        return len(self.dates)


@dataclass(frozen=True, eq=False)
class ReturnPanel:
    """Daily simple returns (T, A), oldest first, > -1; NaN where an asset has none that day. `dates` (T,) by day."""

    assets: tuple[str, ...]
    dates: Dates
    returns: Floats

    def __post_init__(self) -> None:
        bad = (self.returns <= -1.0).any(axis=0)
        if bad.any():
            name = self.assets[int(np.argmax(bad))]
            raise invalid(pointer_to("history", name), "out_of_range", f"{name}: a return of -100 % or less")

    @classmethod
    def from_closes(cls, assets: Sequence[str], dates: Dates, closes: Floats) -> ReturnPanel:
        """Return the panel of closes (T + 1, A), USD, NaN where there is none; `dates` (T + 1,) ascend.

        A return over a gap of days is no daily return: it is NaN. Raises InvalidError `not_positive` for a close
        of 0 or less.
        """
        bad = (closes <= 0.0).any(axis=0)
        if bad.any():
            name = assets[int(np.argmax(bad))]
            raise invalid(pointer_to("history", name), "not_positive", f"{name}: a close is above 0")
        returns = closes[1:] / closes[:-1] - 1.0
        returns[np.diff(dates.astype("datetime64[D]")).astype(np.int64) != 1] = np.nan
        return cls(tuple(assets), dates[1:], returns)

    @cached_property
    def _present(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.returns)

    @cached_property
    def _full(self) -> bool:
        return bool(self._present.all())

    def history(self, assets: Sequence[str], days: int = HISTORY_DAYS, days_min: int = HISTORY_DAYS_MIN) -> History:
        """Return the last `days` days on which every asset has a return, in the order of `assets`.

        Fewer are taken where there are no more. Raises InvalidError `missing_history` below `days_min`: its
        `errors` name each asset that is short, its figures the days that each has.
        """
        names = tuple(assets)
        if days < days_min:
            raise invalid("/days", "out_of_range", f"a window is of {days_min} days or more")
        column = {name: a for a, name in enumerate(self.assets)}
        if not all(name in column for name in names):
            raise self._missing(names, days_min)
        columns = [column[name] for name in names]
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
        column = {name: a for a, name in enumerate(self.assets)}
        days = {name: int(self._present[:, column[name]].sum()) if name in column else 0 for name in names}
        short = [name for name in names if days[name] < days_min] or list(names)
        return missing_history({name: days[name] for name in short}, days_min)


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


def ewma_variance(returns: Floats, decay: float, first: Floats | float) -> Floats:
    """Return the variances (T + 1, ...) forecast for each of T days and the day after, from returns (T, ...).

    σ²_{t+1} = λσ²_t + (1-λ)r²_t, σ²_0 = `first`. Source: RiskMetrics Technical Document 1996.
    """
    variance = np.empty((len(returns) + 1, *returns.shape[1:]))
    variance[0] = first
    fresh = (1.0 - decay) * returns**2
    for t, squared in enumerate(fresh):
        variance[t + 1] = decay * variance[t] + squared
    return variance


def rescaled(returns: Floats, decay: float) -> Floats:
    """Return the returns (T, ...) at today's volatility: r_t x σ_{T+1}/σ_t.

    σ are EWMA volatilities seeded with the window's sample variance. An asset that never moved is left as it is.
    Source: Hull & White 1998, "Incorporating volatility updating into the historical simulation method".
    """
    variance = ewma_variance(returns, decay, returns.var(axis=0, ddof=1))
    ratio = np.divide(variance[-1], variance[:-1], out=np.ones_like(returns), where=variance[:-1] > 0.0)
    return cast("Floats", returns * np.sqrt(ratio))
