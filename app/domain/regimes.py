"""Correlation regimes: their matrices, and how far what was seen of late has drifted from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.domain.black76 import Floats
from app.domain.correlation import Repaired, correlation_matrix, repaired
from app.domain.covariance import Covariance
from app.domain.parameters import REGIMES, CorrelationTable, MarketParameters, Regime

Measure = Callable[[Covariance], float]
"""A figure of a book under a covariance, USD: its deviation, or its VaR."""


def regime_table(regime: Regime, names: Sequence[str], parameters: MarketParameters) -> CorrelationTable:
    """Return the regime's table over the names: its own pairs, others min(stress pair, the regime's largest).

    What it lists are its own pairs and those that the stress table lists.
    """
    own, stress = parameters.regimes[regime], parameters.stress
    largest = max(own.values(), default=1.0)
    listed = {pair: min(rho, largest) for pair, rho in stress.pairs.items() if pair[0] in names and pair[1] in names}
    return CorrelationTable(listed | dict(own), min(stress.other, largest))


def regime_correlation(regime: Regime, names: Sequence[str], parameters: MarketParameters) -> Repaired:
    """Return the regime's correlations (J, J), repaired where they are no correlation matrix."""
    return repaired(correlation_matrix(names, regime_table(regime, names, parameters)))


def stored_regime(regime: Regime, parameters: MarketParameters) -> Regime:
    """Return the regime that margins a stored account: one that would ask less than normal is for quotes alone."""
    return regime if parameters.models.regime_multiplier(regime) >= 1.0 else "normal"


@dataclass(frozen=True, slots=True)
class Drift:
    """How far realised correlations are from the configured regime's, in the Frobenius norm, and what it costs.

    `distances` by regime; `nearest` is the first regime at the least distance. `names` are the assets compared: those
    with history. `realised` and `expected` are the figure under the realised and the configured correlations, USD.
    """

    names: tuple[str, ...]
    distance: float
    distances: Mapping[Regime, float]
    nearest: Regime
    realised: float
    expected: float


def drift(recent: Covariance, configured: Regime | Floats, parameters: MarketParameters, measure: Measure) -> Drift:
    """Return how far `recent` is from `configured`, a regime or a matrix (J, J) over the same names.

    The figure is taken of all names at the recent volatilities, under either matrix.
    """
    seen = [j for j, name in enumerate(recent.names) if name not in recent.too_short]
    square = np.ix_(seen, seen)
    matrices = {regime: regime_correlation(regime, recent.names, parameters).matrix for regime in REGIMES}
    distances = {r: float(np.linalg.norm((recent.correlation - m)[square])) for r, m in matrices.items()}
    expected = matrices[configured] if isinstance(configured, str) else configured
    return Drift(
        names=tuple(recent.names[j] for j in seen),
        distance=float(np.linalg.norm((recent.correlation - expected)[square])),
        distances=distances,
        nearest=min(distances, key=lambda regime: distances[regime]),
        realised=measure(recent),
        expected=measure(replace(recent, correlation=expected)),
    )
