"""How much of each asset: volatility of a portfolio, risk parity, a volatility target, leverage by volatility.

Covariances are annualised, (n, n); weights are exposures by asset (n,), as fractions of equity or in USD, as the caller
has them. Nothing is estimated here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg.lapack import dposv

from app.domain.black76 import Floats
from app.errors import invalid

SYMMETRY_TOLERANCE = 1e-9
NEWTON_STEPS_MAX = 200
NEWTON_CHANGE = 1e-10
"""Relative change of a weight by a full step that is the last one: the steps converge quadratically."""
PARITY_GAP_MAX = 1e-8
"""Distance past which the weights are no answer."""
_FULL_STEP_MAX = 0.5
"""Largest relative change of a weight for which a full Newton step is sure to descend."""
_RISK_FREE = 1e-12
"""Share of the undiversified variance below which a portfolio counts as free of risk."""
_VOLATILITY_FLOOR = 0.01


@dataclass(frozen=True, slots=True)
class RiskParity:
    """Long-only weights (n,) that sum to 1, and what each adds to the volatility (n,): its budget's share of it."""

    weights: Floats
    contributions: Floats
    volatility: float
    steps: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """Weights (n,) scaled to a volatility, by what factor, and what held it there."""

    weights: Floats
    factor: float
    volatility: float
    binding: Literal["volatility", "leverage"]


def portfolio_volatility(weights: Floats, covariance: Floats) -> float:
    """Return √(w'Σw), in the unit of the weights per √year (Markowitz 1952)."""
    return math.sqrt(max(0.0, float(weights @ covariance @ weights)))


def undiversified_volatility(weights: Floats, covariance: Floats) -> float:
    """Return Σ |w| σ: the volatility as if everything moved together, the naive mean where weights sum to 1."""
    return float(np.abs(weights) @ np.sqrt(np.diagonal(covariance)))


def risk_contributions(weights: Floats, covariance: Floats) -> Floats:
    """Return w × Σw / √(w'Σw) (n,), which sum to the volatility (Euler); zeros where there is no risk."""
    volatility = portfolio_volatility(weights, covariance)
    if volatility == 0.0:
        return np.zeros_like(weights)
    contributions: Floats = weights * (covariance @ weights) / volatility
    return contributions


def check_covariance(covariance: Floats) -> None:
    """Refuse what is no covariance matrix of assets with risk. Raises InvalidError `not_a_covariance`.

    Whether it is positive semi-definite is not asked: every use of it finds out where that matters.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not len(covariance):
        raise _not_a_covariance("it is not square")
    if not np.isfinite(covariance).all():
        raise _not_a_covariance("it holds a figure that is not finite")
    variances = np.diagonal(covariance)
    if not (variances > 0.0).all():
        raise _not_a_covariance("an asset has no variance")
    # of correlations, so that the tolerance means the same whatever the unit
    scale = np.sqrt(variances)
    if (np.abs(covariance - covariance.T) > SYMMETRY_TOLERANCE * np.outer(scale, scale)).any():
        raise _not_a_covariance("it is not symmetric")


def _not_a_covariance(why: str) -> Exception:
    return invalid("/covariance", "not_a_covariance", f"no covariance matrix: {why}")


def risk_parity(covariance: Floats, budgets: Floats | None = None) -> RiskParity:
    """Return the long-only weights whose risk contributions are in proportion to the budgets (n,), equal where None.

    Newton's method on ½x'Cx − Σ b ln x over the correlations C, with steps that are cut to 1/(1 + δ) while the largest
    relative change δ of a weight is big, so that each of them descends (Spinu 2013, "An algorithm for computing risk
    parity weights"); w = x/σ, made to sum to 1. Raises InvalidError: `not_a_covariance`, `out_of_range` for budgets
    that are not positive, `no_risk_parity` where a long-only portfolio has no risk to share out.
    """
    check_covariance(covariance)
    shares = _shares(budgets, len(covariance))
    scale = np.sqrt(np.diagonal(covariance))
    correlation = covariance / np.outer(scale, scale)
    x, steps = _barrier_minimum(correlation, shares)
    weights = x / scale
    weights /= weights.sum()
    volatility = portfolio_volatility(weights, covariance)
    contributions = risk_contributions(weights, covariance)
    # rounding of a sum of opposite parts aside, the gap is what the steps have left
    if volatility <= 0.0 or float(np.abs(contributions / volatility - shares).max()) > PARITY_GAP_MAX:
        raise _no_risk_parity()
    return RiskParity(weights, contributions, volatility, steps)


def _shares(budgets: Floats | None, count: int) -> Floats:
    if budgets is None:
        return np.full(count, 1.0 / count)
    if budgets.shape != (count,) or not np.isfinite(budgets).all() or not (budgets > 0.0).all():
        raise invalid("/budgets", "out_of_range", f"a risk budget > 0 is needed for each of the {count} assets")
    shares: Floats = budgets / budgets.sum()
    return shares


def _barrier_minimum(correlation: Floats, shares: Floats) -> tuple[Floats, int]:
    """Return the minimiser x (n,) of ½x'Cx − Σ b ln x, and the steps that it took. Raises InvalidError."""
    x = np.sqrt(shares)
    start = float(x @ correlation @ x)
    if start > _RISK_FREE * float(x.sum()) ** 2:
        x /= math.sqrt(start)
    identity = np.eye(len(x))
    for step in range(NEWTON_STEPS_MAX):
        risk = x * (correlation @ x)
        # in units of x/√b the Hessian is I + a positive semi-definite matrix: well conditioned, however small b is
        unit = x / np.sqrt(shares)
        hessian = identity + unit[:, None] * correlation * unit
        _, change, failed = dposv(hessian, (shares - risk) / np.sqrt(shares))
        if failed:
            raise _no_risk_parity()
        relative = change / np.sqrt(shares)
        largest = float(np.abs(relative).max())
        if not math.isfinite(largest):
            raise _no_risk_parity()
        x = x * (1.0 + relative * (1.0 if largest <= _FULL_STEP_MAX else 1.0 / (1.0 + largest)))
        if largest <= NEWTON_CHANGE:
            return x, step + 1
    return x, NEWTON_STEPS_MAX


def _no_risk_parity() -> Exception:
    detail = "a long-only portfolio of these assets can be free of risk: there is none to share out"
    return invalid("/covariance", "no_risk_parity", detail)


def scale_to_volatility(
    weights: Floats, covariance: Floats, target: float, leverage_cap: float | None = None
) -> Scaled:
    """Return the weights times target/volatility, or times what Σ|w| ≤ leverage_cap leaves of that.

    Raises InvalidError `no_volatility` for weights without risk where no cap limits them.
    """
    volatility = portfolio_volatility(weights, covariance)
    gross = float(np.abs(weights).sum())
    by_risk = target / volatility if volatility > 0.0 else math.inf
    by_cap = leverage_cap / gross if leverage_cap is not None and gross > 0.0 else math.inf
    factor = min(by_risk, by_cap)
    if math.isinf(factor):
        raise invalid("/weights", "no_volatility", "the weights have no volatility: no factor gives them one")
    return Scaled(weights * factor, factor, volatility * factor, "volatility" if by_risk <= by_cap else "leverage")


def volatility_adjusted_leverage(leverage: float, volatility: float, base: float = 0.20) -> float:
    """Return min(L·base/max(vol, .01), L): full leverage up to the base volatility, less in proportion past it."""
    return min(leverage * base / max(volatility, _VOLATILITY_FLOOR), leverage)
