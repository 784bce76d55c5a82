"""A fleet's risk as one: VaR and ES with a component a member, margin netted, concentration, drift, Sharpe. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri

from app.domain.black76 import Floats
from app.domain.correlation import correlation_matrix, repaired
from app.domain.covariance import Covariance
from app.domain.margin.registry import MODELS
from app.domain.margin.result import MarginTerms
from app.domain.parameters import MarketParameters
from app.domain.portfolio import Portfolio, Rows, sums
from app.domain.regimes import Drift, drift
from app.domain.var.tail import YEAR_DAYS
from app.errors import InvalidError

MODELS_SHOWN: tuple[str, ...] = ("isolated", "cross", "scenario", "portfolio", "span")
SHARPE_DAYS_MIN = 20
"""Daily returns below which a Sharpe ratio says nothing."""


@dataclass(frozen=True, slots=True)
class FleetTail:
    """VaR and ES of a fleet and of its parties (K,), USD; components (K,) sum to the fleet's.

    `diversified` is what the parties' own VaR sum to above the fleet's.
    """

    confidence: float
    value_at_risk: float
    expected_shortfall: float
    own: Floats
    component: Floats
    component_es: Floats

    @property
    def diversified(self) -> float:
        """The sum of the parties' own VaR less the fleet's, USD."""
        return float(self.own.sum()) - self.value_at_risk


def fleet_tail(exposures: Floats, covariance: Covariance, confidence: float, horizon_days: float = 1.0) -> FleetTail:
    """Return parametric VaR and ES of K parties' signed exposures (K, J), USD, under one covariance.

    With x = Σ x_k, VaR = -z√(x'Σx)·√(h/365), and party k's component -z·x_k'Σx/√(x'Σx)·√(h/365): Euler's shares of a
    homogeneous function. ES the same with φ(z)/(1-c) for -z. Source: Jorion, "Value at Risk", ch. 7.
    """
    z = -float(ndtri(1.0 - confidence))
    shortfall = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi) / (1.0 - confidence)
    scaled = exposures * covariance.volatility * math.sqrt(horizon_days / YEAR_DAYS)
    together = scaled.sum(axis=0) @ covariance.correlation
    deviation = math.sqrt(max(0.0, float(together @ scaled.sum(axis=0))))
    own = np.sqrt(np.maximum(0.0, np.einsum("kj,kj->k", scaled @ covariance.correlation, scaled)))
    share = scaled @ together / deviation if deviation > 0.0 else np.zeros(len(exposures))
    return FleetTail(confidence, z * deviation, shortfall * deviation, z * own, z * share, shortfall * share)


@dataclass(frozen=True, slots=True)
class FleetDrift:
    """How far recent correlations are from calm ones, and the fleet's VaR under either and at stress, USD."""

    found: Drift
    stressed: float

    @property
    def mean_distance(self) -> float:
        """The root mean square over pairs of assets of how far their correlation is off; 0 where there is no pair."""
        ordered = len(self.found.names) * (len(self.found.names) - 1)
        return self.found.distance / math.sqrt(ordered) if ordered else 0.0


def fleet_drift(exposures: Floats, recent: Covariance, confidence: float, parameters: MarketParameters) -> FleetDrift:
    """Return recent correlations against those of the normal regime, with VaR of the fleet's exposures (J,), one day.

    Volatilities are the recent ones under every matrix.
    """
    z = -float(ndtri(1.0 - confidence))

    def measure(covariance: Covariance) -> float:
        return z * covariance.deviation(exposures)

    stress = repaired(correlation_matrix(recent.names, parameters.stress)).matrix
    found = drift(recent, "normal", parameters, measure)
    return FleetDrift(found, measure(replace(recent, correlation=stress)))


@dataclass(frozen=True, slots=True)
class FleetMargin:
    """Initial margin of a model, USD: of the fleet as one book, of its parties each alone (K,), and at the edge (K,).

    `edge` are the parties' shares of the fleet's margin by their positions' marginal contributions: they sum to it, but
    for rules on the whole book, and are negative for who hedges the others.
    """

    model: str
    fleet: float
    alone: Floats
    edge: Floats
    reason: str | None = None
    """Why the model can't tell of the fleet as one, where its figures are NaN: an underlying that a venue does not
    know, or too many of them for a correlation matrix to be repaired.
    """

    @property
    def freed(self) -> float:
        """What netting across members spares, as a share of what they need each alone; 0 where that is nothing."""
        alone = float(self.alone.sum())
        return 1.0 - self.fleet / alone if alone > 0.0 else 0.0


def fleet_margins(
    portfolio: Portfolio, owner: Rows, count: int, terms: MarginTerms, models: Sequence[str] = MODELS_SHOWN
) -> list[FleetMargin]:
    """Return the margin of positions (n,), `owner` (n,) ascending, as one book and party by party."""
    bounds = np.searchsorted(owner, np.arange(count + 1))
    parts = [_rows(portfolio, int(bounds[k]), int(bounds[k + 1])) for k in range(count)]
    found = []
    for name in models:
        alone = np.array([0.0 if part is None else _initial(name, part, terms) for part in parts])
        try:
            whole = MODELS[name](portfolio, terms)
        except InvalidError as error:
            nothing = np.full(count, np.nan)
            found.append(FleetMargin(name, np.nan, alone, nothing, str(error)))
        else:
            edge = sums(owner, whole.position_initial, count)
            found.append(FleetMargin(name, whole.initial_margin, alone, edge))
    return found


def _initial(model: str, part: Portfolio, terms: MarginTerms) -> float:
    """Return a party's own margin; NaN where the model can't tell."""
    try:
        return MODELS[model](part, terms).initial_margin
    except InvalidError:
        return float("nan")


def _rows(portfolio: Portfolio, start: int, stop: int) -> Portfolio | None:
    """Return the positions from one row to another, None where there are none."""
    if start == stop:
        return None
    keep = np.zeros(len(portfolio), dtype=np.bool_)
    keep[start:stop] = True
    return portfolio.take(keep)


def herfindahl(sizes: Floats) -> float | None:
    """Return Σ share² of absolute sizes (J,), 1/J where all are alike, 1 where there is one; None of nothing."""
    whole = float(np.abs(sizes).sum())
    return float(((np.abs(sizes) / whole) ** 2).sum()) if whole > 0.0 else None


def sharpe(returns: Sequence[float]) -> float | None:
    """Return the mean of daily returns over their standard deviation, times √365; None of too few, or where none moves.

    No risk-free rate is taken off. Source: Sharpe 1994, "The Sharpe Ratio".
    """
    if len(returns) < SHARPE_DAYS_MIN:
        return None
    column = np.array(returns)
    deviation = float(column.std(ddof=1))
    if deviation <= 1e-12 * max(1.0, float(np.abs(column).max())):
        return None
    return float(column.mean()) / deviation * math.sqrt(YEAR_DAYS)


def shares(sizes: Mapping[str, float]) -> dict[str, float]:
    """Return each size as a share of the sum of their absolute values; nothing of nothing."""
    whole = sum(abs(size) for size in sizes.values())
    return {name: abs(size) / whole for name, size in sizes.items()} if whole > 0.0 else {}
