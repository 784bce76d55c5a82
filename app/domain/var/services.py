"""VaR across services: one figure for what an agent does in trading, casino, escrow, domains and lending."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from app.domain.black76 import Floats
from app.domain.correlation import correlation_matrix, is_positive_semidefinite, nearest_correlation
from app.domain.parameters import CorrelationTable
from app.errors import FieldError, InvalidError, pointer_to

SERVICE_CORRELATIONS = CorrelationTable(
    MappingProxyType(
        {
            ("casino", "trading"): 0.42,
            ("domains", "trading"): 0.08,
            ("escrow", "trading"): 0.11,
            ("casino", "escrow"): 0.06,
            ("lending", "trading"): -0.31,
        }
    ),
    other=0.0,
)
"""A pair that is not listed, known or not, is taken for uncorrelated."""


@dataclass(frozen=True, slots=True)
class ServiceRisk:
    """`value_at_risk` USD of all services; `components` (K,) in the order of `services` sum to it.

    `repaired`: the correlations given were none, and the nearest that are were used.
    """

    services: tuple[str, ...]
    value_at_risk: float
    components: Floats
    correlation: Floats
    repaired: bool


def service_value_at_risk(
    value_at_risk: Mapping[str, float], table: CorrelationTable = SERVICE_CORRELATIONS
) -> ServiceRisk:
    """Return √(v'ρv) of the services' own VaR v >= 0, USD, and Euler's components v·(ρv)/√(v'ρv).

    Raises InvalidError for a VaR below zero or not finite. Source: RiskMetrics Technical Document 1996.
    """
    wrong = [name for name, own in value_at_risk.items() if not 0.0 <= own < math.inf]
    if wrong:
        errors = tuple(FieldError(pointer_to("services", name), "out_of_range", "a VaR is 0 or more") for name in wrong)
        raise InvalidError("a service's VaR is 0 or more", code="out_of_range", errors=errors)
    names = tuple(value_at_risk)
    v = np.array([value_at_risk[name] for name in names], dtype=np.float64)
    correlation = correlation_matrix(names, table)
    repaired = not is_positive_semidefinite(correlation)
    if repaired:
        correlation = nearest_correlation(correlation)
    product = correlation @ v
    total = math.sqrt(max(0.0, float(v @ product)))
    components = v * product / total if total > 0.0 else np.zeros_like(v)
    return ServiceRisk(names, total, components, correlation, repaired)
