"""One VaR quote: the book, what it covaries with, the method, its figures and what they stand on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, get_args

import numpy as np

from app.domain.covariance import Covariance, Estimator, Pair, covariance_of, estimate, pairs_of
from app.domain.panel import HISTORY_DAYS, HISTORY_DAYS_MIN, History, Panel
from app.domain.parameters import CorrelationTable, MarketParameters, Regime
from app.domain.portfolio import Portfolio
from app.domain.prices import StoredPrice
from app.domain.quote import QuoteTerms
from app.domain.regimes import regime_correlation
from app.domain.var.contributions import (
    Deviations,
    VarParts,
    historical_parts,
    monte_carlo_parts,
    parametric_parts,
)
from app.domain.var.exposures import Exposed, exposed
from app.domain.var.historical import (
    AGE_DECAY,
    VOLATILITY_DECAY,
    HistoricalMethod,
    HistoricalRisk,
    HistoricalTerms,
    historical,
)
from app.domain.var.monte_carlo import DEGREES, Distribution, MonteCarloRisk, MonteCarloTerms, monte_carlo
from app.domain.var.parametric import Moments, ParametricRisk, parametric
from app.domain.var.revalue import losses_at

VarMethod = Literal["parametric", "cornish_fisher", "historical", "monte_carlo"]
CovarianceChoice = Literal["sample", "ewma", "ledoit_wolf", "regime", "given"]

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


@dataclass(frozen=True, slots=True)
class VarTerms:
    """What is asked. `volatilities` go before what history shows; `correlations` are those of the choice `given`.

    `covariance_decay` is the λ of the choice `ewma`, None for the parameters' own.
    """

    method: VarMethod = "parametric"
    confidences: Sequence[float] = (0.95, 0.99)
    horizon_days: float = 1.0
    window_days: int = HISTORY_DAYS
    weighting: HistoricalMethod = "plain"
    age_decay: float = AGE_DECAY
    volatility_decay: float = VOLATILITY_DECAY
    distribution: Distribution = "normal"
    degrees: float = DEGREES
    paths: int = 100_000
    seed: int = 0
    z: Sequence[float] | None = None
    moments: Moments | None = None
    covariance: CovarianceChoice = "sample"
    covariance_decay: float | None = None
    regime: Regime = "normal"
    volatilities: Mapping[str, float] = field(default_factory=dict)
    correlations: Mapping[Pair, float] = field(default_factory=dict)

    @property
    def needs_history(self) -> bool:
        """Whether anything is read from daily returns."""
        if self.method == "historical" or (self.method == "cornish_fisher" and self.moments is None):
            return True
        return self.covariance != "given"


@dataclass(frozen=True, slots=True)
class VarQuote:
    """The figures and their parts, by confidence, and what they stand on."""

    risk: ParametricRisk | HistoricalRisk | MonteCarloRisk
    parts: Sequence[VarParts]
    covariance: Covariance | None = None
    history: History | None = None


def moving_stablecoins(names: Sequence[str], panel: Panel, terms: VarTerms, parameters: MarketParameters) -> list[str]:
    """Return which of these stablecoins move: those with enough history, or for a covariance with a volatility."""
    days = np.isfinite(panel.of(names)).sum(axis=0)
    shown = {name for name, count in zip(names, days.tolist(), strict=True) if count >= HISTORY_DAYS_MIN}
    if terms.method == "historical":
        return [name for name in names if name in shown]
    given = {name for name in names if name in terms.volatilities or parameters.asset(name).volatility is not None}
    return [name for name in names if name in shown | given]


def risk_taken(
    terms: QuoteTerms, stored: Mapping[str, StoredPrice], now: datetime, panel: Panel, asked: VarTerms
) -> Exposed:
    """Return the positions with the coins held and owed, and those stablecoins that move. Raises InvalidError."""
    parameters = terms.margin.parameters
    held = dict.fromkeys(item.asset for item in (*terms.collateral, *terms.liabilities))
    stable = [name for name in held if parameters.asset(name).kind == "stable"]
    return exposed(terms, stored, now, moving_stablecoins(stable, panel, asked, parameters))


def var_quote(portfolio: Portfolio, panel: Panel, parameters: MarketParameters, terms: VarTerms) -> VarQuote:
    """Return VaR and ES by the method. Raises InvalidError, `missing_history` where there is too little of it."""
    if terms.method == "historical":
        return _historical(portfolio, panel, terms)
    covariance = chosen_covariance(portfolio.underlyings.names, panel, parameters, terms)
    if terms.method == "monte_carlo":
        return _monte_carlo(portfolio, covariance, terms)
    history = None
    moments = None
    if terms.method == "cornish_fisher":
        moments = terms.moments
        if moments is None:
            history = panel.history(portfolio.underlyings.names, terms.window_days)
            moments = _of_horizon(Moments.of(-losses_at(portfolio, history.returns)), terms.horizon_days)
    risk = parametric(
        portfolio.net,
        covariance.matrix,
        terms.confidences,
        horizon_days=terms.horizon_days,
        z=terms.z,
        moments=moments,
    )
    deviations = Deviations(portfolio, covariance.matrix, risk.horizon_days)
    parts = [parametric_parts(deviations, tail) for tail in risk.tails]
    return VarQuote(risk, parts, covariance, history)


def chosen_covariance(names: Sequence[str], panel: Panel, parameters: MarketParameters, terms: VarTerms) -> Covariance:
    """Return the covariance of the terms' choice. Raises InvalidError `missing_volatility`, `missing_history`.

    `given` takes a pair that is not given from the stress table, and a volatility from the parameters; `regime` takes
    volatilities from history as `sample` does.
    """
    vols = {name: terms.volatilities[name] for name in names if name in terms.volatilities}
    if terms.covariance == "given":
        table = CorrelationTable({**parameters.stress.pairs, **terms.correlations}, parameters.stress.other)
        defaulted = tuple(pair for pair in pairs_of(names) if pair not in terms.correlations)
        return replace(covariance_of(names, vols, table, parameters), defaulted_pairs=defaulted)
    if terms.covariance == "regime":
        seen = estimate(panel, names, parameters, "sample", volatilities=vols)
        mended = regime_correlation(terms.regime, names, parameters)
        listed = parameters.regimes[terms.regime]
        return replace(
            seen,
            correlation=mended.matrix,
            method="regime",
            defaulted_pairs=tuple(pair for pair in pairs_of(names) if pair not in listed),
            repair_distance=mended.distance,
        )
    return estimate(panel, names, parameters, terms.covariance, volatilities=vols, decay=terms.covariance_decay)


def _of_horizon(moments: Moments, days: float) -> Moments:
    """Return the moments of the sum of so many independent days: skewness falls by √h, excess kurtosis by h."""
    return Moments(moments.skew / math.sqrt(days), moments.excess_kurtosis / days)


def _historical(portfolio: Portfolio, panel: Panel, terms: VarTerms) -> VarQuote:
    history = panel.history(portfolio.underlyings.names, terms.window_days)
    asked = HistoricalTerms(
        terms.confidences, terms.horizon_days, terms.weighting, terms.age_decay, terms.volatility_decay
    )
    risk = historical(portfolio, history, asked)
    return VarQuote(risk, historical_parts(portfolio, risk), None, history)


def _monte_carlo(portfolio: Portfolio, covariance: Covariance, terms: VarTerms) -> VarQuote:
    asked = MonteCarloTerms(
        terms.seed, terms.paths, terms.distribution, terms.degrees, terms.confidences, terms.horizon_days
    )
    risk = monte_carlo(portfolio, covariance.matrix, asked)
    return VarQuote(risk, monte_carlo_parts(portfolio, covariance.matrix, risk, asked), covariance)
