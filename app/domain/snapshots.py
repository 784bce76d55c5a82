"""What many accounts are worth at once, the loss that is forecast of the next day, and whether that held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from itertools import pairwise

import numpy as np
from scipy.special import ndtri

from app.domain.backtest import Coverage, coverage
from app.domain.black76 import Floats
from app.domain.book_columns import BookColumns
from app.domain.covariance import Covariance, estimate
from app.domain.panel import HISTORY_DAYS_MIN, Panel
from app.domain.parameters import MarketParameters
from app.domain.portfolio import Rows, sums
from app.domain.var.tail import YEAR_DAYS

FORECASTS = (0.95, 0.99)
"""The confidences of the forecasts that are kept."""
UNDERLYINGS_MAX = 500
"""Assets that a forecast covers, those with the largest exposures: a covariance grows with their square."""
APART_MIN = timedelta(hours=12)
"""Snapshots closer than this are no day apart: an account's first may be taken late in the day."""


@dataclass(frozen=True, slots=True)
class Worth:
    """Accounts at their prices, USD, each (A,); NaN where a price lacks. `exposures` (A, J) are of `names`.

    `equity` is after haircut, `value` without: positions' profit and loss, holdings less debts. Coins held and owed are
    exposures too.
    """

    equity: Floats
    value: Floats
    gross: Floats
    names: tuple[str, ...]
    exposures: Floats


def worth(columns: BookColumns, prices: Mapping[str, float], parameters: MarketParameters) -> Worth:
    """Return what accounts come to at these prices, at which a symbol without its own takes its underlying's."""
    count, positions, holdings = len(columns.agents), columns.positions, columns.holdings
    # the columns may name every listed symbol
    used = np.unique(positions.symbol)
    symbols = [columns.symbols[k] for k in used.tolist()]
    symbol = np.searchsorted(used, positions.symbol)
    under = [parameters.underlying_of(s) for s in symbols]
    names = tuple(sorted({*under, *columns.assets}))
    row = {name: j for j, name in enumerate(names)}
    size = positions.size * _column(
        [parameters.market(s, u).contract_size for s, u in zip(symbols, under, strict=True)], symbol
    )
    marks = [prices.get(s, _price(u, prices, parameters)) for s, u in zip(symbols, under, strict=True)]
    mark = _column(marks, symbol)
    profit = sums(positions.account, size * (mark - positions.entry_price), count)
    price = _column([_price(asset, prices, parameters) for asset in columns.assets], holdings.asset)
    kept = _column([1.0 - parameters.asset(asset).haircut for asset in columns.assets], holdings.asset)
    held, owed = holdings.held * price, holdings.owed * price
    recall = holdings.lent * price * parameters.models.recall_haircut
    open_usd = size * mark
    exposures = np.zeros((count, len(names)))
    np.add.at(exposures, (positions.account, _rows(under, row, symbol)), open_usd)
    np.add.at(exposures, (holdings.account, _rows(columns.assets, row, holdings.asset)), held - owed)
    return Worth(
        equity=profit + sums(holdings.account, held * kept - owed - recall, count),
        value=profit + sums(holdings.account, held - owed, count),
        gross=sums(positions.account, np.abs(open_usd), count),
        names=names,
        exposures=exposures,
    )


def _price(asset: str, prices: Mapping[str, float], parameters: MarketParameters) -> float:
    return prices.get(asset, 1.0 if parameters.asset(asset).kind == "stable" else np.nan)


def _column(values: Sequence[float], index: Rows) -> Floats:
    found: Floats = np.array(values, dtype=np.float64)[index]
    return found


def _rows(names: Sequence[str], row: Mapping[str, int], index: Rows) -> Rows:
    found: Rows = np.array([row[name] for name in names], dtype=np.intp)[index]
    return found


def forecast(book: Worth, panel: Panel, parameters: MarketParameters) -> Floats:
    """Return the parametric VaR (A, 2) of the next day at FORECASTS, USD, NaN where an exposure has no volatility.

    Of the sample covariance; what history does not show is the parameters'. Source: docs/value-at-risk.md.
    """
    days = np.isfinite(panel.of(book.names)).sum(axis=0)
    size = np.abs(np.nan_to_num(book.exposures)).sum(axis=0)
    largest = set(np.argsort(-size, kind="stable")[:UNDERLYINGS_MAX].tolist())
    known = [
        j
        for j, name in enumerate(book.names)
        if j in largest and (days[j] >= HISTORY_DAYS_MIN or parameters.asset(name).volatility is not None)
    ]
    still = [j for j, name in enumerate(book.names) if days[j] < HISTORY_DAYS_MIN and _stands_still(name, parameters)]
    unknown = np.setdiff1d(np.arange(len(book.names)), [*known, *still])
    deviation = np.zeros(len(book.exposures))
    if known:
        deviation = _deviations(book.exposures[:, known], [book.names[j] for j in known], panel, parameters)
    deviation[(book.exposures[:, unknown] != 0.0).any(axis=1)] = np.nan
    return deviation[:, None] * -ndtri(1.0 - np.array(FORECASTS))


def _deviations(exposures: Floats, names: Sequence[str], panel: Panel, parameters: MarketParameters) -> Floats:
    """Return each account's σ (A,): by one matrix for all, or where that needs a repair by one of its own assets alone.

    A repair of the whole would make an account's forecast depend on what others hold.
    """
    whole = estimate(panel, names, parameters)
    if whole.repair_distance == 0.0:
        return deviations(exposures, whole)
    found = np.zeros(len(exposures))
    sets, group = np.unique(exposures != 0.0, axis=0, return_inverse=True)
    for k, own in enumerate(sets):
        rows, columns = np.flatnonzero(group.ravel() == k), np.flatnonzero(own)
        if len(columns):
            covariance = estimate(panel, [names[j] for j in columns.tolist()], parameters)
            found[rows] = deviations(exposures[np.ix_(rows, columns)], covariance)
    return found


def _stands_still(name: str, parameters: MarketParameters) -> bool:
    asset = parameters.asset(name)
    return asset.volatility is None and asset.kind == "stable"


def deviations(exposures: Floats, covariance: Covariance, days: float = 1.0) -> Floats:
    """Return √(x'Σx)·√(days/365) (A,), USD, of the exposures (A, J) of many books, USD."""
    x = exposures * covariance.volatility
    variance = np.einsum("aj,aj->a", x @ covariance.correlation, x)
    found: Floats = np.sqrt(np.maximum(variance, 0.0) * days / YEAR_DAYS)
    return found


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An account on a UTC day, USD. `flows` since the snapshot before are None where there is none."""

    day: date
    taken_at: datetime
    equity: float
    value: float
    flows: float | None
    gross: float
    var_95: float | None
    var_99: float | None

    def forecast(self, confidence: float) -> float | None:
        """Return the VaR of the day that follows, None where none could be told."""
        return {FORECASTS[0]: self.var_95, FORECASTS[1]: self.var_99}[confidence]


@dataclass(frozen=True, slots=True)
class ComparedDay:
    """A day's profit and loss, from its snapshot to the next day's, with the VaR that was forecast of it, USD."""

    day: date
    pnl: float
    value_at_risk: float

    @property
    def is_exception(self) -> bool:
        """Whether more was lost than VaR."""
        return -self.pnl > self.value_at_risk


@dataclass(frozen=True, slots=True)
class AccountBacktest:
    """The days that can be compared, oldest first; `missing` lack a snapshot, `uncompared` a forecast or a whole day.

    `coverage` is None where no day can be compared.
    """

    days: tuple[ComparedDay, ...]
    missing: tuple[date, ...]
    uncompared: tuple[date, ...]
    coverage: Coverage | None


def backtest_snapshots(snapshots: Sequence[Snapshot], confidence: float) -> AccountBacktest:
    """Return how an account's forecasts held, by its snapshots in the order of their days.

    P&L is the change of value less what was paid in and out. A day without a snapshot leaves two days out: the one that
    begins with it and the one that ends with it.
    """
    days: list[ComparedDay] = []
    missing: list[date] = []
    uncompared: list[date] = []
    for before, after in pairwise(snapshots):
        missing += [before.day + timedelta(days=k) for k in range(1, (after.day - before.day).days)]
        limit = before.forecast(confidence)
        whole = (after.day - before.day).days == 1 and after.taken_at - before.taken_at >= APART_MIN
        if limit is None or after.flows is None or not whole:
            uncompared.append(before.day)
            continue
        days.append(ComparedDay(before.day, after.value - before.value - after.flows, limit))
    flags = np.array([day.is_exception for day in days], dtype=np.bool_)
    tests = coverage(flags, confidence) if days else None
    return AccountBacktest(tuple(days), tuple(missing), tuple(uncompared), tests)
