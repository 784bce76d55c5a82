"""Covariances of daily returns: given, or estimated from a panel whose assets need not have the same history.

Variances are annualised at 365 days. What history does not show is taken from the parameters, and said so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal, cast

import numpy as np

from app.domain.black76 import Floats
from app.domain.correlation import Repaired, correlation_matrix, repaired
from app.domain.panel import HISTORY_DAYS_MIN, Panel
from app.domain.parameters import CorrelationTable, MarketParameters
from app.domain.portfolio import Flags, Rows
from app.errors import InvalidError, invalid, pointer_to

YEAR_DAYS = 365.0
_VARIANCE_MIN = 1e-24
"""Daily variance below which a price stands still, and goes with no other."""

Estimator = Literal["sample", "ewma", "ledoit_wolf"]
Pair = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Covariance:
    """Annualised volatilities (J,) and the correlations (J, J), positive semidefinite, of `names`.

    `defaulted_pairs` and `defaulted_volatilities` were taken from the parameters, `too_short` holds the days of the
    assets that have too few, `repair_distance` is the Frobenius distance from the correlations as found, 0 if none.
    """

    names: tuple[str, ...]
    volatility: Floats
    correlation: Floats
    method: str = "given"
    defaulted_pairs: tuple[Pair, ...] = ()
    defaulted_volatilities: tuple[str, ...] = ()
    too_short: Mapping[str, int] = field(default_factory=dict)
    repair_distance: float = 0.0

    @cached_property
    def matrix(self) -> Floats:
        """The covariances vol_i vol_j ρ_ij (J, J), a year."""
        return self.correlation * np.outer(self.volatility, self.volatility)

    def deviation(self, exposures: Floats, days: float = 1.0) -> float:
        """Return √(x'Σx)·√(days/365), USD, of signed exposures x (J,), USD."""
        x = self.volatility * exposures
        return float(np.sqrt(max(0.0, float(x @ self.correlation @ x)) * days / YEAR_DAYS))


@dataclass(frozen=True, slots=True)
class _Moments:
    """Daily variances (J,) and correlations (J, J), and whether each could be told; `days` (J,) each asset has."""

    variance: Floats
    correlation: Floats
    days: Rows
    enough: Flags
    paired: Flags


def covariance_of(
    names: Sequence[str], volatilities: Mapping[str, float], table: CorrelationTable, parameters: MarketParameters
) -> Covariance:
    """Return the covariance of given volatilities and a table; a volatility that is not given is the parameters'.

    Raises InvalidError `missing_volatility` where those have none either. Pairs that the table does not list count as
    defaulted.
    """
    vols = {name: volatilities[name] for name in names if name in volatilities}
    mended = repaired(correlation_matrix(names, table))
    return Covariance(
        names=tuple(names),
        volatility=_volatilities(names, vols, parameters),
        correlation=mended.matrix,
        defaulted_pairs=tuple(pair for pair in pairs_of(names) if pair not in table.pairs),
        defaulted_volatilities=tuple(name for name in names if name not in vols),
        repair_distance=mended.distance,
    )


def estimate(
    panel: Panel,
    names: Sequence[str],
    parameters: MarketParameters,
    method: Estimator = "sample",
    days_min: int = HISTORY_DAYS_MIN,
    volatilities: Mapping[str, float] = MappingProxyType({}),
    decay: float | None = None,
) -> Covariance:
    """Return the covariance of the panel's returns; a volatility that is given goes before what they show.

    `decay` is the λ of `ewma`, the parameters' where it is left out.

    Volatilities are of each asset's own days, correlations of the days that both assets of a pair have, so that a young
    asset shortens nobody else's history; Ledoit-Wolf needs a whole matrix and takes the days common to all assets that
    have enough. Pairs and assets with less than `days_min` days have the stress table's correlation and the parameters'
    volatility. The correlations so put together are repaired where they are no correlation matrix.

    Raises InvalidError `missing_volatility`, and `missing_history` where Ledoit-Wolf has too few days in common.
    """
    kept = parameters.models.covariance_decay if decay is None else decay
    found = _ESTIMATORS[method](panel.of(names), names, kept, days_min)
    known = {n: float(np.sqrt(found.variance[j] * YEAR_DAYS)) for j, n in enumerate(names) if found.enough[j]}
    known |= volatilities
    mended = _completed(names, found, parameters.stress)
    row = {name: j for j, name in enumerate(names)}
    return Covariance(
        names=tuple(names),
        volatility=_volatilities(names, known, parameters),
        correlation=mended.matrix,
        method=method,
        defaulted_pairs=tuple((a, b) for a, b in pairs_of(names) if not found.paired[row[a], row[b]]),
        defaulted_volatilities=tuple(name for name in names if name not in known),
        too_short={name: int(found.days[j]) for j, name in enumerate(names) if not found.enough[j]},
        repair_distance=mended.distance,
    )


def pairs_of(names: Sequence[str]) -> list[Pair]:
    """Return every pair of the names once, sorted within."""
    return [(min(a, b), max(a, b)) for i, a in enumerate(names) for b in names[i + 1 :]]


def ewma(variance: Floats, product: Floats, decay: float) -> Floats:
    """Return λσ² + (1 - λ)r²: the variance (or covariance) after one more day of returns or their products.

    RiskMetrics Technical Document (1996), section 5.2: zero mean. The shape of its inputs.
    """
    return decay * variance + (1.0 - decay) * product


def _volatilities(names: Sequence[str], known: Mapping[str, float], parameters: MarketParameters) -> Floats:
    """Return the volatilities (J,): those known, else the parameters'; a stablecoin without one stands still."""
    found = np.empty(len(names))
    for j, name in enumerate(names):
        asset = parameters.asset(name)
        own = known.get(name, asset.volatility)
        if own is None and asset.kind == "stable":
            own = 0.0
        if own is None:
            detail = f"{name} has no volatility and too little history: give one of them"
            raise invalid(f"/vols{pointer_to(name)}", "missing_volatility", detail)
        found[j] = own
    return found


def _completed(names: Sequence[str], found: _Moments, table: CorrelationTable) -> Repaired:
    """Return the correlations found, the table's where there are none."""
    matrix = np.where(found.paired, found.correlation, correlation_matrix(names, table))
    np.fill_diagonal(matrix, 1.0)
    return repaired(matrix)


@dataclass(frozen=True, slots=True)
class _Pairwise:
    """Moments over the days that both of a pair have (J, J): `own[i, j]` is i's variance on the days that j has too."""

    covariance: Floats
    own: Floats
    days: Rows

    def moments(self, days_min: int) -> _Moments:
        """Return what can be told from at least so many days."""
        days = np.diag(self.days)
        scale = self.own * self.own.T
        moving = scale > _VARIANCE_MIN**2
        rho = np.divide(self.covariance, np.sqrt(scale), out=np.zeros_like(scale), where=moving)
        return _Moments(
            variance=np.diag(self.own),
            correlation=np.clip(rho, -1.0, 1.0),
            days=days,
            enough=days >= days_min,
            paired=self.days >= days_min,
        )


def _pairwise(returns: Floats) -> _Pairwise:
    """Return the sample moments (about the mean, over one less than the days) of returns (T, J), NaN for gaps."""
    here = np.isfinite(returns)
    filled, flags = np.where(here, returns, 0.0), here.astype(np.float64)
    days = flags.T @ flags
    mean = np.divide(filled.T @ flags, days, out=np.zeros_like(days), where=days > 0.0)
    less_one = np.maximum(days - 1.0, 1.0)
    own = ((filled * filled).T @ flags - days * mean * mean) / less_one
    covariance = (filled.T @ filled - days * mean * mean.T) / less_one
    return _Pairwise(covariance, np.maximum(own, 0.0), days.astype(np.intp))


def _sample(returns: Floats, names: Sequence[str], decay: float, days_min: int) -> _Moments:
    del names, decay
    return _pairwise(returns).moments(days_min)


def _ewma(returns: Floats, names: Sequence[str], decay: float, days_min: int) -> _Moments:
    """Return exponentially weighted moments, seeded with the window's own."""
    del names
    seed = _pairwise(returns)
    covariance, own = seed.covariance, seed.own
    for day in returns:
        here = np.isfinite(day)
        both = np.outer(here, here)
        r = np.where(here, day, 0.0)
        covariance = np.where(both, ewma(covariance, np.outer(r, r), decay), covariance)
        own = np.where(both, ewma(own, (r * r)[:, None], decay), own)
    return _Pairwise(covariance, own, seed.days).moments(days_min)


def _ledoit_wolf(returns: Floats, names: Sequence[str], decay: float, days_min: int) -> _Moments:
    """Return the shrunk moments of the days common to all assets that have enough days.

    Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices".
    """
    del decay
    days = np.isfinite(returns).sum(axis=0)
    enough = days >= days_min
    live = np.flatnonzero(enough)
    common = returns[:, live][np.isfinite(returns[:, live]).all(axis=1)]
    count = len(names)
    variance, rho = np.zeros(count), np.eye(count)
    if live.size:
        _check_common(common, [names[j] for j in live.tolist()], days[live].tolist(), days_min)
        covariance = _shrunk(common)
        variance[live] = np.diag(covariance)
        scale = np.sqrt(np.maximum(variance[live], _VARIANCE_MIN))
        rho[np.ix_(live, live)] = covariance / np.outer(scale, scale)
    return _Moments(variance, rho, days, enough, np.outer(enough, enough))


def _check_common(common: Floats, names: Sequence[str], days: list[int], days_min: int) -> None:
    if len(common) >= days_min:
        return
    shortest = names[days.index(min(days))]
    raise InvalidError(
        f"{', '.join(names)} have {len(common)} days in common, {days_min} are needed; {shortest} has the fewest",
        "missing_history",
    )


def _shrunk(returns: Floats) -> Floats:
    # a heavy library for one estimator: loaded by whoever asks for it
    from sklearn.covariance import ledoit_wolf  # noqa: PLC0415

    covariance, _ = ledoit_wolf(returns)
    return cast("Floats", covariance)


_ESTIMATORS: Mapping[Estimator, Callable[[Floats, Sequence[str], float, int], _Moments]] = {
    "sample": _sample,
    "ewma": _ewma,
    "ledoit_wolf": _ledoit_wolf,
}
