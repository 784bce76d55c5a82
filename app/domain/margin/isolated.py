"""Isolated margin: every position on its own, no netting at all."""

from __future__ import annotations

import numpy as np

from app.domain.black76 import Floats
from app.domain.margin.result import MarginResult, MarginTerms
from app.domain.portfolio import Portfolio, total


def position_margin(portfolio: Portfolio, rate: Floats) -> Floats:
    """Return the stand-alone margin of each position (n,), USD.

    Linear and greeks: rate x notional. A long option: its premium, the most it can lose. A short option: rate x
    size x underlying price + its value.
    """
    margin = rate * portfolio.notional
    if portfolio.has_options:
        options = portfolio.options
        short = margin[options.row] - options.value
        margin[options.row] = np.where(options.quantity >= 0.0, options.value, short)
    return margin


def isolated(portfolio: Portfolio, terms: MarginTerms) -> MarginResult:
    """Return Σ rate x notional, initial and maintenance, options as in `position_margin`."""
    del terms  # the rates are columns of the portfolio already
    initial = position_margin(portfolio, portfolio.initial_rate)
    maintenance = position_margin(portfolio, portfolio.maintenance_rate)
    return MarginResult(
        model="isolated",
        initial_margin=total(initial),
        maintenance_margin=total(maintenance),
        position_initial=initial,
        position_maintenance=maintenance,
        per_underlying={
            "net_exposure": portfolio.net,
            "gross_exposure": portfolio.gross,
            "initial_margin": portfolio.by_underlying(initial),
            "maintenance_margin": portfolio.by_underlying(maintenance),
        },
        parameters={},
    )
