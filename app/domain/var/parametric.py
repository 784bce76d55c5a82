"""Variance-covariance VaR: normal, and Cornish-Fisher where the tails are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtri

from app.domain.black76 import Floats
from app.domain.correlation import is_positive_semidefinite
from app.domain.panel import HISTORY_DAYS_MIN, missing_history
from app.domain.var.tail import YEAR_DAYS, checked_confidences, checked_horizon
from app.errors import invalid

CONFIDENCES = (0.95, 0.99)
TAIL_END = -10.0
"""Where a tail is taken to end, in deviations: one day in 10²³."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Skewness and excess kurtosis of the profit and loss."""

    skew: float
    excess_kurtosis: float

    @classmethod
    def of(cls, pnl: Floats) -> Moments:
        """Return the sample moments m3/m2^1.5 and m4/m2² - 3 of a P&L (T,); zero where it never changes.

        Raises InvalidError `missing_history` below 60 days.
        """
        if len(pnl) < HISTORY_DAYS_MIN:
            raise missing_history({"pnl": len(pnl)}, HISTORY_DAYS_MIN)
        centred = pnl - pnl.mean()
        deviation = math.sqrt(float((centred**2).mean()))
        if deviation <= 1e-12 * float(np.abs(pnl).max()):
            return cls(0.0, 0.0)
        standard = centred / deviation
        return cls(float((standard**3).mean()), float((standard**4).mean()) - 3.0)


@dataclass(frozen=True, slots=True)
class NormalTail:
    """One confidence's figures, USD. `z` is the quantile of the standardised P&L that VaR stands on, as a rule < 0.

    `monotone` is false where the Cornish-Fisher quantile turns somewhere beyond this confidence: the expansion is
    no distribution there, VaR is still the formula's, and ES no less than VaR.
    """

    confidence: float
    z: float
    value_at_risk: float
    expected_shortfall: float
    monotone: bool = True


@dataclass(frozen=True, slots=True)
class ParametricRisk:
    """VaR and ES of exposures; `sigma` is the standard deviation of the horizon's P&L, USD."""

    method: Literal["normal", "cornish_fisher"]
    tails: tuple[NormalTail, ...]
    sigma: float
    horizon_days: float
    moments: Moments | None = None


def checked_covariance(covariance: Floats, size: int) -> Floats:
    """Return the annualised covariance (J, J).

    Raises InvalidError `not_a_covariance` unless it is finite, symmetric and positive semidefinite.
    """
    if covariance.shape != (size, size):
        raise ValueError(f"a covariance of shape {covariance.shape} for {size} underlyings")
    deviations = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    scale = np.outer(deviations, deviations)
    if not np.isfinite(covariance).all() or not np.allclose(covariance, covariance.T, rtol=1e-9, atol=0.0):
        raise invalid("/covariance", "not_a_covariance", "a covariance is finite and symmetric")
    if (np.abs(covariance) > scale * (1.0 + 1e-9)).any():
        raise invalid("/covariance", "not_a_covariance", "no correlation of a covariance is beyond -1 and 1")
    correlation = np.divide(covariance, scale, out=np.eye(size), where=scale > 0.0)
    if not is_positive_semidefinite(correlation, 1e-8):
        raise invalid("/covariance", "not_a_covariance", "the covariance is not positive semidefinite")
    return covariance


def sigma_of(exposures: Floats, covariance: Floats, horizon_days: float) -> float:
    """Return √(x'Σx)·√(h/365), USD, for signed exposures x (J,) and an annualised covariance Σ (J, J)."""
    variance = float(exposures @ covariance @ exposures)
    return math.sqrt(max(variance, 0.0) * horizon_days / YEAR_DAYS)


def parametric(
    exposures: Floats,
    covariance: Floats,
    confidences: Sequence[float] = CONFIDENCES,
    *,
    horizon_days: float = 1.0,
    z: Sequence[float] | None = None,
    moments: Moments | None = None,
) -> ParametricRisk:
    """Return VaR = -zσ and ES of signed exposures (J,) USD under an annualised covariance (J, J).

    At confidence c z = Φ⁻¹(1-c), or the one given, of either sign; ES = φ(z)/(1-c)·σ. With moments, those of the
    horizon's P&L, both are of the Cornish-Fisher quantile. Options and Greeks count with their delta alone.
    Raises InvalidError for a confidence, a horizon or a z that can't be.
    Source: Jorion, "Value at Risk", ch. 5 and 7; RiskMetrics Technical Document 1996.
    """
    levels, horizon = checked_confidences(confidences), checked_horizon(horizon_days)
    sigma = sigma_of(exposures, checked_covariance(covariance, len(exposures)), horizon)
    quantiles = _quantiles(levels, z)
    tails = tuple(_tail(level, c, sigma, moments) for level, c in zip(levels, quantiles, strict=True))
    return ParametricRisk("normal" if moments is None else "cornish_fisher", tails, sigma, horizon, moments)


def _quantiles(levels: Sequence[float], given: Sequence[float] | None) -> list[float]:
    if given is None:
        return [float(ndtri(1.0 - level)) for level in levels]
    if len(given) != len(levels):
        raise invalid("/z", "out_of_range", f"{len(given)} values of z for {len(levels)} confidences")
    for i, (value, level) in enumerate(zip(given, levels, strict=True)):
        if not 0.0 < abs(value) <= _density(value) / (1.0 - level):
            detail = f"z {value} does not belong to {level}: expected shortfall would lie below VaR"
            raise invalid(f"/z/{i}", "out_of_range", detail)
    return [-abs(float(value)) for value in given]


def _tail(confidence: float, c: float, sigma: float, moments: Moments | None) -> NormalTail:
    shortfall = _density(c) / (1.0 - confidence)
    if moments is None:
        return NormalTail(confidence, c, -c * sigma, shortfall * sigma)
    z = cornish_fisher(c, moments)
    shortfall *= _shortfall_factor(c, moments)
    return NormalTail(confidence, z, -z * sigma, max(shortfall, -z) * sigma, is_monotone(c, moments))


def _density(z: float) -> float:
    return math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def cornish_fisher(z: float, moments: Moments) -> float:
    """Return z + (z²-1)S/6 + (z³-3z)K/24 - (2z³-5z)S²/36, the quantile of a standardised P&L, K in excess.

    S and K are the expansion's coefficients, those of the P&L only while they are small.
    Source: Cornish & Fisher 1937; Maillard 2012, "A user's guide to the Cornish Fisher expansion".
    """
    s, k = moments.skew, moments.excess_kurtosis
    return z + (z * z - 1.0) * s / 6.0 + (z**3 - 3.0 * z) * k / 24.0 - (2.0 * z**3 - 5.0 * z) * s * s / 36.0


def _shortfall_factor(c: float, moments: Moments) -> float:
    """Return ES over the normal one: -(1/p)∫w(z)φ(z)dz below c, in closed form.

    ∫zφ = -φ(c), ∫(z²-1)φ = -cφ(c), ∫(z³-3z)φ = (1-c²)φ(c), ∫(2z³-5z)φ = (1-2c²)φ(c).
    """
    s, k = moments.skew, moments.excess_kurtosis
    return 1.0 + c * s / 6.0 + (c * c - 1.0) * k / 24.0 - (2.0 * c * c - 1.0) * s * s / 36.0


def is_monotone(c: float, moments: Moments) -> bool:
    """Return whether the Cornish-Fisher quantile rises over the tail, az² + bz + d > 0 from z = -10 to c.

    a = K/8 - S²/6, b = S/3, d = 1 - K/8 + 5S²/36: the slope of the expansion. Source: Maillard 2012, section 3.
    """
    s, k = moments.skew, moments.excess_kurtosis
    a, b, d = k / 8.0 - s * s / 6.0, s / 3.0, 1.0 - k / 8.0 + 5.0 * s * s / 36.0
    turns = (TAIL_END, c) if a <= 0.0 else (min(c, max(TAIL_END, -b / (2.0 * a))),)
    return all((a * z + b) * z + d > 0.0 for z in turns)
