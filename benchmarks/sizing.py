"""Is sizing fast? Risk parity of 50 assets beside a general optimiser and a cone solver, in one run.

Run with `python -m benchmarks.sizing`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

from app.domain.black76 import Floats
from app.domain.sizing.programme import Programme, allocate
from app.domain.sizing.weights import risk_contributions, risk_parity
from benchmarks.timing import best_seconds

ASSETS, DAYS = 50, 500
TARGET_MS = 3.0

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports warns of its own future
    try:
        from skfolio.optimization import RiskBudgeting
    except ImportError:  # of the tools for tests, not of the service
        RiskBudgeting = None


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(7)
    returns = rng.normal(0.0, 0.03, (DAYS, 1)) + rng.normal(0.0, 0.02, (DAYS, ASSETS)) * rng.uniform(0.5, 3.0, ASSETS)
    covariance = np.cov(returns.T)
    budgets = rng.uniform(0.2, 1.0, ASSETS)
    rivals: dict[str, Callable[[], Floats]] = {
        "risk parity": lambda: risk_parity(covariance).weights,
        "risk budgets": lambda: risk_parity(covariance, budgets).weights,
        "scipy, L-BFGS-B on the same barrier": lambda: _scipy(covariance),
    }
    if RiskBudgeting is not None:
        rivals["skfolio, cone solver"] = lambda: RiskBudgeting().fit(returns).weights_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = best_seconds(rivals)
        gaps = {name: _gap(call(), covariance, budgets if "budgets" in name else None) for name, call in rivals.items()}
    own = seconds["risk parity"]
    table = Table("work", "ms", "ratio", "gap of the contributions", "target, ms", title=f"{ASSETS} assets")
    for name, spent in seconds.items():
        target = f"<= {TARGET_MS:g}" if name.startswith("risk") else ""
        table.add_row(name, f"{spent * 1e3:.3f}", f"{spent / own:.1f}", f"{gaps[name]:.0e}", target)
    programme = _programme(rng)
    table.add_row("linear programme", f"{best_seconds({'': lambda: allocate(programme)})[''] * 1e3:.3f}", "", "", "")
    Console(width=120).print(table)


def _scipy(covariance: Floats) -> Floats:
    scale = np.sqrt(np.diagonal(covariance))
    correlation, share = covariance / np.outer(scale, scale), 1.0 / len(covariance)

    def barrier(y: Floats) -> tuple[float, Floats]:
        x = np.exp(y)
        risk = x * (correlation @ x)
        return float(0.5 * risk.sum() - share * y.sum()), risk - share

    found = minimize(barrier, np.zeros(len(covariance)), jac=True, method="L-BFGS-B", tol=1e-16)
    weights: Floats = np.exp(found.x) / scale
    weights /= weights.sum()
    return weights


def _gap(weights: Floats, covariance: Floats, budgets: Floats | None) -> float:
    """Return the largest difference of a share of the risk from its budget."""
    contributions = risk_contributions(weights, covariance)
    wanted = np.ones(len(weights)) if budgets is None else budgets
    return float(np.abs(contributions / contributions.sum() - wanted / wanted.sum()).max())


def _programme(rng: np.random.Generator) -> Programme:
    names = [f"A{i}" for i in range(ASSETS)]
    edges, daily = rng.normal(0.0, 0.2, ASSETS), rng.uniform(0.01, 0.08, ASSETS)
    return Programme(names, edges, np.full(ASSETS, 0.3), daily)


if __name__ == "__main__":
    main()
