"""The distribution of the book's profit and loss over a day, with VaR, ES and who makes them.

From history where every underlying has enough of it, else simulated, from what history there is and the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Literal

import numpy as np

from app.domain.black76 import Floats
from app.domain.covariance import Covariance, covariance_of, estimate
from app.domain.margin.result import MarginTerms
from app.domain.panel import HISTORY_DAYS_MIN
from app.domain.portfolio import Portfolio
from app.domain.regimes import regime_table
from app.domain.var.contributions import Components, historical_components, monte_carlo_components
from app.domain.var.historical import HistoricalTerms, historical
from app.domain.var.monte_carlo import PATHS_MIN, MonteCarloTerms, monte_carlo
from app.domain.var.parametric import ParametricRisk, parametric
from app.report.history import Daily

CONFIDENCES = (0.95, 0.99)
PATHS = 100_000
OPTION_PATHS_MAX = 10_000_000
"""Options times paths: a simulated book of options is revalued in full, and takes fewer paths for it."""
VOLATILITY_UNKNOWN = 1.0
"""A year's volatility where no parameter and no history tells one of any asset."""


@dataclass(frozen=True, slots=True)
class Tail:
    """VaR and ES at one confidence, USD, and the standard errors of simulated ones."""

    confidence: float
    value_at_risk: float
    expected_shortfall: float
    var_error: float | None = None
    es_error: float | None = None


@dataclass(frozen=True, eq=False)
class Risk:
    """A day's risk of the positions and of the coins held and owed, USD, without haircut.

    `pnl` (T,) in days or paths. `components` are those of the highest confidence. `first` and `last` bound the days of
    a historical one, `seed` and `paths` repeat a simulated one.
    """

    method: Literal["historical", "monte_carlo"]
    pnl: Floats
    tails: tuple[Tail, ...]
    components: Components
    parametric: ParametricRisk
    not_modelled: tuple[str, ...]
    first: date | None = None
    last: date | None = None
    paths: int = 0
    degrees: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Believed:
    """The covariance that the report believes in; `assumed` has the volatility of the most volatile listed asset."""

    covariance: Covariance
    assumed: tuple[str, ...]


def believed(book: Portfolio, margin: MarginTerms, daily: Daily) -> Believed:
    """Return the covariance of the book's underlyings: estimated where there is history, else the parameters'.

    Without any history the correlations are those of the regime.
    """
    names, parameters = book.underlyings.names, margin.parameters
    short = [name for name, days in zip(names, daily.days(names), strict=True) if days < HISTORY_DAYS_MIN]
    unknown = tuple(name for name in short if _is_unknown(name, margin))
    listed = [asset.volatility for asset in parameters.assets.values() if asset.volatility is not None]
    assumed = dict.fromkeys(unknown, max(listed, default=VOLATILITY_UNKNOWN))
    if len(short) == len(names):
        found = covariance_of(names, assumed, regime_table(margin.regime, names, parameters), parameters)
    else:
        found = estimate(daily.recent, names, parameters, volatilities=assumed)
    return Believed(found, unknown)


def _is_unknown(name: str, margin: MarginTerms) -> bool:
    asset = margin.parameters.asset(name)
    return asset.volatility is None and asset.kind != "stable"


def day_risk(book: Portfolio, covariance: Covariance, daily: Daily, seed: int) -> Risk:
    """Return the risk of a book that holds something: historical where all its underlyings have 60 days in common."""
    window = daily.window(book.underlyings.names)
    plain = parametric(book.net, covariance.matrix, CONFIDENCES)
    if window is None:
        return _simulated(book, covariance, plain, seed)
    found = historical(book, window, HistoricalTerms(CONFIDENCES))
    return Risk(
        method="historical",
        pnl=-found.losses,
        tails=tuple(Tail(t.confidence, t.value_at_risk, t.expected_shortfall) for t in found.tails),
        components=historical_components(book, found)[-1],
        parametric=plain,
        not_modelled=found.not_modelled,
        first=found.first,
        last=found.last,
    )


def simulation(book: Portfolio, seed: int) -> MonteCarloTerms:
    """Return what is simulated of a book: Student-t moves, on one thread, which leaves others theirs."""
    paths = PATHS if book.is_linear else max(PATHS_MIN, min(PATHS, OPTION_PATHS_MAX // max(1, len(book.options))))
    return MonteCarloTerms(seed, paths, distribution="student_t", confidences=CONFIDENCES, threads=1)


def _simulated(book: Portfolio, covariance: Covariance, plain: ParametricRisk, seed: int) -> Risk:
    terms = simulation(book, seed)
    found = monte_carlo(book, covariance.matrix, terms)
    return Risk(
        method="monte_carlo",
        pnl=-found.losses.astype(np.float64),
        tails=tuple(
            Tail(t.confidence, t.value_at_risk, t.expected_shortfall, t.var_standard_error, t.es_standard_error)
            for t in found.tails
        ),
        components=monte_carlo_components(book, covariance.matrix, found, terms)[-1],
        parametric=plain,
        not_modelled=found.not_modelled,
        paths=found.paths,
        degrees=found.degrees,
        seed=found.seed,
    )
