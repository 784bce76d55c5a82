"""Historical replay: the days or weeks of the past that would hurt this account most, and what they leave of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np

from app.domain.black76 import Floats
from app.domain.panel import Panel
from app.domain.portfolio import Flags, Rows
from app.domain.revalue import pnl_by_underlying
from app.domain.stress import StressAccount, Stressed, price_shocks, stress
from app.errors import InvalidError

WEEK_DAYS = 7
ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Replay:
    """The worst windows of the past, worst first, and the account after each.

    `first` and `last` are the days whose returns a window compounds; `moves` (J, S) in the order of the account's
    names; `missing` the assets without the whole window's history, by window: their prices stand still in it.
    """

    first: tuple[date, ...]
    last: tuple[date, ...]
    moves: Floats
    missing: tuple[tuple[str, ...], ...]
    stressed: Stressed


def replay(account: StressAccount, panel: Panel, window_days: int = 1, count: int = 5) -> Replay:
    """Return the account after the `count` windows that leave it the least equity; windows share no day.

    Stablecoins move where the panel has their returns. A window in which none of the account's other assets has
    returns is left out. Raises InvalidError `missing_history` where no window is left.
    """
    returns = panel.of(account.names)
    moves = compounded(returns, window_days)
    loose = ~account.table.stable
    seen = np.flatnonzero(np.isfinite(moves[:, loose]).any(axis=1))
    if not seen.size:
        names = ", ".join(n for n, coin in zip(account.names, loose.tolist(), strict=True) if coin)
        raise InvalidError(
            f"no {window_days} days in a row of the history of {names or 'any asset'}", "missing_history"
        )
    chosen = _apart(seen, _equity_changes(account, np.nan_to_num(moves[seen])), window_days, count)
    gaps = np.isnan(moves[chosen]) & loose
    known = np.nan_to_num(moves[chosen]).T
    return Replay(
        first=tuple(panel.dates[chosen].tolist()),
        last=tuple(panel.dates[chosen + window_days - 1].tolist()),
        moves=known,
        missing=tuple(_named(account, row) for row in gaps),
        stressed=stress(account, price_shocks(known)),
    )


def compounded(returns: Floats, window_days: int) -> Floats:
    """Return Π(1 + r) - 1 over each run of so many consecutive days (T - days + 1, J), NaN where one of them lacks."""
    if len(returns) < window_days:
        return np.empty((0, returns.shape[1]))
    runs = np.lib.stride_tricks.sliding_window_view(1.0 + returns, window_days, axis=0)
    product: Floats = runs.prod(axis=-1)
    return product - 1.0


def _equity_changes(account: StressAccount, moves: Floats) -> Floats:
    """Return the change of the whole account's equity (T,) after moves (T, J)."""
    change: Floats = moves @ account.backing
    for start in range(0, len(moves), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        change[part] += pnl_by_underlying(account.whole, price_shocks(moves[part].T))[0].sum(axis=0)
    return change


def _apart(windows: Rows, change: Floats, window_days: int, count: int) -> Rows:
    """Return the windows with the lowest change, lowest first, each at least a window's length from the others."""
    chosen: list[int] = []
    for k in np.argsort(change, kind="stable").tolist():
        if len(chosen) == count:
            break
        window = int(windows[k])
        if all(abs(window - other) >= window_days for other in chosen):
            chosen.append(window)
    return np.array(chosen, dtype=np.intp)


def _named(account: StressAccount, flags: Flags) -> tuple[str, ...]:
    return tuple(name for name, flag in zip(account.names, flags.tolist(), strict=True) if flag)
