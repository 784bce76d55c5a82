"""Cross margin: positions on one underlying net, underlyings do not."""

from __future__ import annotations

import numpy as np

from app.domain.margin.isolated import position_margin
from app.domain.margin.result import MarginResult, MarginTerms
from app.domain.portfolio import Portfolio, total


def cross(portfolio: Portfolio, terms: MarginTerms) -> MarginResult:
    """Return Σ over underlyings of the highest rate x |net exposure|, options one by one as in `isolated`.

    A position's share of its underlying's margin is signed: one that reduces the net exposure has a negative
    share, and the shares sum to the requirement.
    """
    del terms
    initial_rate, maintenance_rate = portfolio.highest_rates
    u = portfolio.underlying
    directed = np.sign(portfolio.taylor_delta)[u] * portfolio.exposure
    initial, maintenance = initial_rate[u] * directed, maintenance_rate[u] * directed
    if portfolio.has_options:
        initial = np.where(portfolio.is_option, position_margin(portfolio, portfolio.initial_rate), initial)
        maintenance = np.where(portfolio.is_option, position_margin(portfolio, portfolio.maintenance_rate), maintenance)
    return MarginResult(
        model="cross",
        initial_margin=total(initial),
        maintenance_margin=total(maintenance),
        position_initial=initial,
        position_maintenance=maintenance,
        per_underlying={
            "net_exposure": portfolio.net,
            "gross_exposure": portfolio.gross,
            "initial_rate": initial_rate,
            "maintenance_rate": maintenance_rate,
            "initial_margin": portfolio.by_underlying(initial),
            "maintenance_margin": portfolio.by_underlying(maintenance),
        },
        parameters={},
    )
