"""Does VaR hold? Exceptions of a rolling forecast, and the tests of their number and of their clustering.

An exception is a loss > VaR. Likelihoods follow the convention 0·ln 0 = 0, so no exceptions, nothing but exceptions
and no exception after another are cases like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.special import bdtr, chdtrc, ndtri, xlogy

from app.domain.black76 import Floats
from app.domain.panel import HISTORY_DAYS, HISTORY_DAYS_MIN, Dates, History, missing_history
from app.domain.scenarios import floored
from app.domain.var.historical import AGE_DECAY, VOLATILITY_DECAY, HistoricalMethod
from app.domain.var.tail import age_weights, checked_confidences, quantiles, weighted_quantiles
from app.domain.var.volatility import rescaled
from app.errors import invalid

BacktestMethod = Literal["normal"] | HistoricalMethod
Zone = Literal["green", "yellow", "red"]
Flags = NDArray[np.bool_]

TEST_SIZE = 0.05
YELLOW, RED = 0.95, 0.9999
CELLS_MAX = 4_000_000
"""Window x day x asset returns held at once: 32 MB."""


@dataclass(frozen=True, slots=True)
class LikelihoodRatio:
    """A likelihood ratio test: rejected where its χ² p-value is below the test size."""

    statistic: float
    degrees: int
    p_value: float
    rejected: bool


@dataclass(frozen=True, slots=True)
class Transitions:
    """Days that follow one another: `n01` is a day without exception, then one with."""

    n00: int
    n10: int
    n01: int
    n11: int


@dataclass(frozen=True, slots=True)
class TrafficLight:
    """`probability` is P(X <= exceptions) under the model; green below .95, yellow below .9999, else red."""

    zone: Zone
    probability: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """All tests of one series of `observations` days with `exceptions`."""

    observations: int
    exceptions: int
    expected: float
    test_size: float
    transitions: Transitions
    kupiec: LikelihoodRatio
    independence: LikelihoodRatio
    conditional: LikelihoodRatio
    traffic_light: TrafficLight


@dataclass(frozen=True, slots=True)
class Backtest:
    """A rolling forecast against what came: one row a day tested, losses and VaR in USD."""

    method: BacktestMethod
    confidence: float
    window: int
    dates: Dates
    losses: Floats
    value_at_risk: Floats
    exceptions: Flags
    coverage: Coverage

    @property
    def exception_dates(self) -> Dates:
        """The days of the exceptions."""
        return self.dates[self.exceptions]


def _ratio(statistic: float, degrees: int, test_size: float) -> LikelihoodRatio:
    statistic = max(0.0, statistic)
    p_value = float(chdtrc(degrees, statistic))
    return LikelihoodRatio(statistic, degrees, p_value, p_value < test_size)


def _log_likelihood(hits: int, misses: int, probability: float) -> float:
    return float(xlogy(hits, probability) + xlogy(misses, 1.0 - probability))


def _estimated(hits: int, misses: int) -> float:
    """Return the log-likelihood at the observed share; where there was no day to observe, zero."""
    return _log_likelihood(hits, misses, hits / (hits + misses)) if hits + misses else 0.0


def _check(exceptions: int, observations: int, confidence: float, test_size: float) -> float:
    (confidence,) = checked_confidences((confidence,))
    if not 0 <= exceptions <= observations or observations < 1:
        raise invalid("/exceptions", "out_of_range", f"{exceptions} exceptions in {observations} days")
    if not 0.0 < test_size < 1.0:
        raise invalid("/test_size", "out_of_range", "a test size lies between 0 and 1")
    return 1.0 - confidence


def kupiec(exceptions: int, observations: int, confidence: float, test_size: float = TEST_SIZE) -> LikelihoodRatio:
    """Return the proportion-of-failures test: 2 ln[(x/n)^x (1-x/n)^(n-x) / (p^x (1-p)^(n-x))], χ²(1).

    Raises InvalidError for counts that can't be. Source: Kupiec 1995, "Techniques for verifying the accuracy of risk
    measurement models".
    """
    p = _check(exceptions, observations, confidence, test_size)
    misses = observations - exceptions
    likelihood = _estimated(exceptions, misses) - _log_likelihood(exceptions, misses, p)
    return _ratio(2.0 * likelihood, 1, test_size)


def transitions_of(exceptions: Flags) -> Transitions:
    """Return the counts of consecutive days (T,) by what happened on either."""
    before, after = exceptions[:-1], exceptions[1:]
    n11 = int((before & after).sum())
    n10, n01 = int(before.sum()) - n11, int(after.sum()) - n11
    return Transitions(len(before) - n11 - n10 - n01, n10, n01, n11)


def independence(counts: Transitions, test_size: float = TEST_SIZE) -> LikelihoodRatio:
    """Return the test that an exception is as likely after an exception as after none, χ²(1).

    2 [ln L(π01, π11) - ln L(π)], π01 = n01/(n00+n01), π11 = n11/(n10+n11), π = (n01+n11)/all.
    Source: Christoffersen 1998, "Evaluating interval forecasts".
    """
    free = _estimated(counts.n01, counts.n00) + _estimated(counts.n11, counts.n10)
    tied = _estimated(counts.n01 + counts.n11, counts.n00 + counts.n10)
    return _ratio(2.0 * (free - tied), 1, test_size)


def conditional_coverage(
    proportion: LikelihoodRatio, clustering: LikelihoodRatio, test_size: float = TEST_SIZE
) -> LikelihoodRatio:
    """Return the joint test of number and clustering: the sum of both statistics, χ²(2).

    Source: Christoffersen 1998.
    """
    return _ratio(proportion.statistic + clustering.statistic, 2, test_size)


def traffic_light(exceptions: int, observations: int, confidence: float) -> TrafficLight:
    """Return the zone of P(X <= exceptions), X binomial.

    Source: Basel Committee 1996, "Supervisory framework for the use of backtesting".
    """
    p = _check(exceptions, observations, confidence, TEST_SIZE)
    probability = float(bdtr(exceptions, observations, p))
    zone: Zone = "green" if probability < YELLOW else "yellow" if probability < RED else "red"
    return TrafficLight(zone, probability)


def coverage(exceptions: Flags, confidence: float, test_size: float = TEST_SIZE) -> Coverage:
    """Return every test of a series of exceptions (T,), oldest first. Raises InvalidError where it is empty."""
    observations, count = len(exceptions), int(exceptions.sum())
    proportion = kupiec(count, observations, confidence, test_size)
    counts = transitions_of(exceptions)
    clustering = independence(counts, test_size)
    return Coverage(
        observations=observations,
        exceptions=count,
        expected=observations * (1.0 - confidence),
        test_size=test_size,
        transitions=counts,
        kupiec=proportion,
        independence=clustering,
        conditional=conditional_coverage(proportion, clustering, test_size),
        traffic_light=traffic_light(count, observations, confidence),
    )


@dataclass(frozen=True, slots=True)
class BacktestTerms:
    """How each day's VaR is forecast: from the `window` days before it, by the method.

    `normal` takes the window's standard deviation and mean 0, the others are those of historical simulation.
    """

    confidence: float = 0.99
    window: int = HISTORY_DAYS
    method: BacktestMethod = "plain"
    age_decay: float = AGE_DECAY
    volatility_decay: float = VOLATILITY_DECAY
    test_size: float = TEST_SIZE


def backtest_pnl(dates: Dates, pnl: Floats, terms: BacktestTerms) -> Backtest:
    """Return the backtest of a daily profit and loss (T,), USD: that of an account, or of a book held fixed.

    `filtered` rescales the profit and loss itself. Raises InvalidError `missing_history` unless a day is left after
    the window.
    """

    def losses_of(windows: Floats) -> Floats:
        series = windows[:, 0, :]
        return -rescaled(series.T, terms.volatility_decay).T if terms.method == "filtered" else -series

    return _rolling(dates, pnl[:, None], -pnl, losses_of, terms, ("pnl",))


def backtest_book(history: History, exposures: Floats, terms: BacktestTerms) -> Backtest:
    """Return the backtest of signed exposures (J,), USD, held fixed over returns of the underlyings.

    `filtered` rescales each underlying's own returns. Raises InvalidError `missing_history` unless a day is left
    after the window.
    """
    pnl = history.returns @ exposures

    def losses_of(windows: Floats) -> Floats:
        if terms.method != "filtered":
            return -windows[:, 0, :]
        moves = floored(rescaled(np.moveaxis(windows, -1, 0), terms.volatility_decay))
        losses: Floats = np.einsum("twj,j->wt", moves, -exposures)
        return losses

    series = history.returns if terms.method == "filtered" else pnl[:, None]
    return _rolling(history.dates, series, -pnl, losses_of, terms, history.assets)


def _rolling(
    dates: Dates,
    series: Floats,
    losses: Floats,
    losses_of: Callable[[Floats], Floats],
    terms: BacktestTerms,
    names: Sequence[str],
) -> Backtest:
    """Forecast each day from the windows (W, A, window) of a series (T, A) before it, many windows at once."""
    if terms.window < HISTORY_DAYS_MIN:
        raise invalid("/window", "out_of_range", f"a window is of {HISTORY_DAYS_MIN} days or more")
    if len(series) <= terms.window:
        raise missing_history(dict.fromkeys(names, len(series)), terms.window + 1)
    windows = sliding_window_view(series[:-1], terms.window, axis=0)
    size = max(1, CELLS_MAX // (terms.window * max(1, series.shape[1])))
    parts = [losses_of(windows[start : start + size]) for start in range(0, len(windows), size)]
    value_at_risk = np.concatenate([_value_at_risk(part, terms) for part in parts])
    exceptions = losses[terms.window :] > value_at_risk
    return Backtest(
        method=terms.method,
        confidence=terms.confidence,
        window=terms.window,
        dates=dates[terms.window :],
        losses=losses[terms.window :],
        value_at_risk=value_at_risk,
        exceptions=exceptions,
        coverage=coverage(exceptions, terms.confidence, terms.test_size),
    )


def _value_at_risk(losses: Floats, terms: BacktestTerms) -> Floats:
    """Return the VaR (W,) of each window of losses (W, window)."""
    if terms.method == "normal":
        deviation: Floats = losses.std(axis=1, ddof=1)
        return float(-ndtri(1.0 - terms.confidence)) * deviation
    confidences = (terms.confidence,)
    if terms.method == "age_weighted":
        found = weighted_quantiles(losses, age_weights(terms.window, terms.age_decay), confidences)
    else:
        found = quantiles(losses, confidences)
    return cast("Floats", found[0])
