"""Portfolio margin of many linear books at once: `portfolio_margin` without options and greeks, as columns of lanes.

A lane is what one account holds on one underlying. Without options the two-sided losses are zero, so that the joined
loss is √(d'ρ'd) alone; ρ' differs from its `other` entries only in the pairs that are listed, so that the form is a few
sums by account and one more over those pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.domain.black76 import Floats
from app.domain.computed import computed
from app.domain.correlation import correlation_matrix
from app.domain.margin.portfolio import Sides, floor_by_underlying, join
from app.domain.parameters import CorrelationTable, MarketParameters
from app.domain.portfolio import Flags, Rows, sums, underlying_table
from app.domain.scenarios import floored
from app.errors import InvalidError

PSD_TOLERANCE = 1e-10
"""As `is_positive_semidefinite` has it."""
CELLS_MAX = 1_000_000
"""Cells of correlation matrices that are checked at once."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """L lanes of n accounts, each account's side by side: `owner` (L,) ascending, the others (L,), USD.

    `net` signed, `gross` >= 0, `price_range` the R of the scans, `price` the underlying's, `limit` its concentration
    limit in units, NaN where there is none.
    """

    owner: Rows
    net: Floats
    gross: Floats
    price_range: Floats
    price: Floats
    limit: Floats


@dataclass(frozen=True, slots=True)
class Pairs:
    """P pairs of lanes of one account whose correlation is listed: rows of lanes and what they add to `other`, (P,)."""

    owner: Rows
    first: Rows
    second: Rows
    stress: Floats
    hedge: Floats


def directional(lanes: Lanes, parameters: MarketParameters) -> Floats:
    """Return d = D - U by lane, USD (L,): the worst loss over the weighted cells, negative where a rise brings it."""
    models = parameters.models
    multiple, weight = models.portfolio_tail_multiple, models.portfolio_tail_weight
    fall = np.maximum(-floored(-lanes.price_range), -floored(-multiple * lanes.price_range) * weight)
    rise = lanes.price_range * max(1.0, multiple * weight)
    return lanes.net * np.where(lanes.net > 0.0, fall, rise)


def quadratic(d: Floats, owner: Rows, count: int, pairs: Pairs, parameters: MarketParameters) -> Floats:
    """Return d'ρ'd by account (count,), USD², for directional losses d (L,)."""
    stress, hedge = parameters.stress.other, parameters.hedge.other
    up, down = sums(owner, np.maximum(d, 0.0), count), sums(owner, np.maximum(-d, 0.0), count)
    total = stress * (up * up + down * down) + (1.0 - stress) * sums(owner, d * d, count) - 2.0 * hedge * up * down
    if len(pairs.owner):
        product = d[pairs.first] * d[pairs.second]
        total += sums(pairs.owner, 2.0 * product * np.where(product < 0.0, pairs.hedge, pairs.stress), count)
    return total


def parallel(lanes: Lanes, count: int, parameters: MarketParameters) -> Floats:
    """Return the worst loss by account (count,), USD >= 0, where every underlying takes the same cell.

    The cells at a third and two thirds of R never bind: each loses a part of what R itself does.
    """
    models = parameters.models
    multiple, weight = models.portfolio_tail_multiple, models.portfolio_tail_weight
    rise = sums(lanes.owner, lanes.net * lanes.price_range, count)
    fall = sums(lanes.owner, lanes.net * floored(-lanes.price_range), count)
    tail = sums(lanes.owner, lanes.net * floored(-multiple * lanes.price_range), count) * weight
    worst = np.minimum(np.minimum(fall, tail), rise * np.where(rise < 0.0, max(1.0, multiple * weight), 1.0))
    return np.maximum(0.0, -worst)


def add_ons(lanes: Lanes, count: int, parameters: MarketParameters) -> Floats:
    """Return the concentration add-ons by account (count,), USD; NaN where a limit stands and a price lacks."""
    if np.isnan(lanes.limit).all():
        return np.zeros(count)
    ratio = np.where(np.isnan(lanes.limit), 1.0, np.maximum(lanes.gross / lanes.price / lanes.limit, 1.0))
    rate = parameters.models.concentration_rate
    return sums(lanes.owner, rate * lanes.price_range * lanes.gross * (np.sqrt(ratio) - 1.0), count)


def requirement(lanes: Lanes, joint: Floats, parameters: MarketParameters) -> tuple[Floats, Floats]:
    """Return the initial and maintenance margin (n,), USD, of accounts whose joined losses (n,) are known."""
    models, count = parameters.models, len(joint)
    risk = np.maximum(joint, parallel(lanes, count, parameters)) * models.regime_multiplier("normal")
    floor = sums(lanes.owner, floor_by_underlying(lanes.gross, lanes.net, models), count)
    initial = models.portfolio_factor * np.maximum(risk, floor) + add_ons(lanes, count, parameters)
    return initial, models.maintenance_fraction * initial


class Correlations:
    """The listed pairs by asset, and which books' signed matrices are no correlation matrices."""

    def __init__(self, parameters: MarketParameters) -> None:
        self._tables = parameters.stress, parameters.hedge
        listed = sorted({name for table in self._tables for pair in table.pairs for name in pair})
        self._row = {name: k for k, name in enumerate(listed)}
        # one more row for all that is not listed
        self._stress, self._hedge = (_beyond(listed, table) for table in self._tables)

    @computed
    def sound(self) -> bool:
        """Whether a book on unlisted assets alone has a correlation matrix, whatever its signs.

        (1-s)I + a block matrix of s and h, which is positive semidefinite where |h| <= s <= 1.
        """
        stress, hedge = self._tables
        return abs(hedge.other) <= stress.other <= 1.0

    def listed(self, names: Sequence[str]) -> Rows:
        """Return each asset's row among those that are listed in a pair, or the row past them."""
        return np.array([self._row.get(name, len(self._row)) for name in names], dtype=np.intp)

    def pairs(self, owner: Rows, row: Rows) -> Pairs:
        """Return the listed pairs of lanes (L,) of one account each; `row` as `listed` returns it."""
        lanes = np.flatnonzero(row < len(self._row))
        owners = owner[lanes]
        behind = np.searchsorted(owners, owners, side="right") - 1 - np.arange(len(lanes))
        first = np.repeat(np.arange(len(lanes)), behind)
        step = np.arange(len(first)) - np.repeat(np.cumsum(behind) - behind, behind)
        first, second = lanes[first], lanes[first + 1 + step]
        stress, hedge = self._stress[row[first], row[second]], self._hedge[row[first], row[second]]
        kept = (stress != 0.0) | (hedge != 0.0)
        first, second = first[kept], second[kept]
        return Pairs(owner[first], first, second, stress[kept], hedge[kept])

    def unsound(self, row: Rows, sign: Rows) -> Flags:
        """Whether each signed matrix is not positive semidefinite (n,), of books of J lanes: `row`, `sign` (n, J).

        A book's matrix depends on no more than its signs by listed asset, and on how many others it holds either way.
        """
        codes = np.sort(row * 3 + sign + 1, axis=1)
        distinct, which = np.unique(codes, axis=0, return_inverse=True)
        found = np.zeros(len(distinct), dtype=np.bool_)
        block = max(1, CELLS_MAX // max(1, distinct.shape[1]) ** 2)
        for start in range(0, len(distinct), block):
            part = self._signed(*np.divmod(distinct[start : start + block], 3))
            found[start : start + block] = np.linalg.eigvalsh(part)[:, 0] < -PSD_TOLERANCE
        return found[which.reshape(-1)]

    def _signed(self, row: Rows, code: Rows) -> Floats:
        """Return the matrices ρ' (n, J, J); a lane without a loss stands alone."""
        sign = code - 1
        stress, hedge = self._tables
        across = row[:, :, None], row[:, None, :]
        product = sign[:, :, None] * sign[:, None, :]
        matrix = np.where(product < 0, hedge.other + self._hedge[across], stress.other + self._stress[across])
        matrix[product == 0] = 0.0
        lanes = np.arange(row.shape[1])
        matrix[:, lanes, lanes] = 1.0
        return matrix


def repaired_joint(names: Sequence[str], d: Floats, parameters: MarketParameters) -> float:
    """Return √(d'ρ'd) of one book (J,) with ρ' repaired, USD; NaN where it is past repair. Names are sorted."""
    nobody = np.zeros(len(d), dtype=np.intp)
    key = "repaired", tuple(names)
    table = parameters.remembered(key, lambda: underlying_table(names, np.ones(len(names)), parameters))
    try:
        return join(Sides(np.maximum(d, 0.0), np.maximum(-d, 0.0), nobody, nobody), table).value
    except InvalidError:
        return float("nan")


def _beyond(names: Sequence[str], table: CorrelationTable) -> Floats:
    """Return what the listed pairs add to the table's `other`, (T + 1, T + 1), 0 for the last row."""
    beyond = np.zeros((len(names) + 1, len(names) + 1))
    beyond[:-1, :-1] = correlation_matrix(names, table) - table.other
    np.fill_diagonal(beyond, 0.0)
    return beyond
