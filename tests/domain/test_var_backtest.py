"""Backtests against published cases, other libraries, tables of Basel, and a plain loop on the real closes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from vartests import kupiec_test

from app.domain.backtest import (
    BacktestMethod,
    BacktestTerms,
    Transitions,
    backtest_book,
    backtest_pnl,
    conditional_coverage,
    coverage,
    independence,
    kupiec,
    traffic_light,
    transitions_of,
)
from app.domain.panel import History
from app.domain.var.historical import HistoricalMethod, HistoricalTerms, historical
from app.errors import InvalidError
from tests.domain.closes import needs_closes, panel
from tests.domain.var_books import DRAWN, drawn_history, exposed, seeds

PUBLISHED = Transitions(n00=932, n10=53, n01=53, n11=4)


def test_published_case() -> None:
    proportion, clustering = kupiec(57, 1043, 0.95), independence(PUBLISHED)
    joint = conditional_coverage(proportion, clustering)
    found = [(t.statistic, t.p_value) for t in (proportion, clustering, joint)]
    expected = [(0.46147, 0.49694), (0.25866, 0.61104), (0.72013, 0.69763)]
    assert np.array(found) == pytest.approx(np.array(expected), abs=5e-6)
    assert not any(t.rejected for t in (proportion, clustering, joint))
    light = traffic_light(57, 1043, 0.95)
    assert light.zone == "green"
    assert light.probability == pytest.approx(0.77913, abs=5e-6)


def test_published_counts_of_a_year() -> None:
    assert kupiec(3, 250, 0.95).statistic == pytest.approx(10.81233, abs=5e-6)
    assert kupiec(3, 250, 0.95).rejected
    assert kupiec(3, 250, 0.99).statistic == pytest.approx(0.09494, abs=5e-6)
    assert not kupiec(3, 250, 0.99).rejected


@pytest.mark.parametrize(
    ("days", "confidence", "accepted"),
    [  # Kupiec 1995, table of non-rejection regions at test size 5 %, as in Jorion's Value at Risk, ch. 6
        (255, 0.99, range(1, 7)),  # printed as N < 7, yet none in 255 days gives 5.13, past 3.84
        (510, 0.99, range(2, 11)),
        (1000, 0.99, range(5, 17)),
        (255, 0.975, range(3, 12)),
        (510, 0.975, range(7, 21)),
        (1000, 0.975, range(16, 36)),
        (255, 0.95, range(7, 21)),
        (510, 0.95, range(17, 36)),
        (1000, 0.95, range(38, 65)),
        (255, 0.925, range(12, 28)),
        (1000, 0.90, range(82, 120)),
    ],
)
def test_kupiecs_regions(days: int, confidence: float, accepted: range) -> None:
    found = {x for x in range(days + 1) if not kupiec(x, days, confidence).rejected}
    assert found == set(accepted)


@pytest.mark.parametrize("days", [1, 60, 250, 1_226])
@pytest.mark.parametrize("confidence", [0.95, 0.975, 0.99])
def test_kupiec_is_vartests(days: int, confidence: float) -> None:
    for x in {0, 1, 2, days // 20, days // 2, days - 1, days}:
        if x > days:
            continue
        theirs = kupiec_test(x=x, n=days, risk_conf_level=confidence)
        ours = kupiec(x, days, confidence)
        assert ours.statistic == pytest.approx(theirs["statistic"], rel=1e-9, abs=1e-9)
        assert ours.p_value == pytest.approx(theirs["p-value"], rel=1e-9, abs=1e-12)
        assert ours.rejected == (theirs["decision"] == "Reject H0")


@DRAWN
@given(seeds, st.integers(80, 600), st.floats(0.05, 0.4), st.floats(0.05, 0.6))
def test_independence_is_the_likelihood_ratio_of_a_logit(seed: int, days: int, first: float, again: float) -> None:
    rng = np.random.default_rng(seed)
    hits = [False]
    for u in rng.random(days):
        hits.append(bool(u < (again if hits[-1] else first)))
    flags = np.array(hits)
    counts = transitions_of(flags)
    assume(min(counts.n00, counts.n01, counts.n10, counts.n11) > 0)
    after, before = flags[1:].astype(float), sm.add_constant(flags[:-1].astype(float))
    free = sm.GLM(after, before, family=sm.families.Binomial()).fit()
    assert independence(counts).statistic == pytest.approx(free.null_deviance - free.deviance, rel=1e-6, abs=1e-7)


def test_no_exceptions() -> None:
    found = coverage(np.zeros(250, dtype=np.bool_), 0.99)
    assert found.kupiec.statistic == pytest.approx(-500.0 * math.log(0.99))
    assert found.kupiec.rejected  # 5.025 > 3.841: one in a hundred is not what was seen
    assert (found.independence.statistic, found.independence.p_value) == (0.0, 1.0)
    assert found.conditional.statistic == found.kupiec.statistic
    assert found.traffic_light.probability == pytest.approx(0.99**250)
    assert found.transitions == Transitions(249, 0, 0, 0)


def test_nothing_but_exceptions() -> None:
    found = coverage(np.ones(60, dtype=np.bool_), 0.95)
    assert found.kupiec.statistic == pytest.approx(-120.0 * math.log(0.05))
    assert found.independence.statistic == 0.0
    assert (found.traffic_light.zone, found.traffic_light.probability) == ("red", 1.0)


def test_no_exception_after_another() -> None:
    # π11 = 0: only the days after none, 7 in 92, and after one, 0 in 7, against 7 in 99
    flags = np.zeros(100, dtype=np.bool_)
    flags[[5, 20, 33, 47, 60, 71, 88]] = True
    free = 7 * math.log(7 / 92) + 85 * math.log(85 / 92)
    tied = 7 * math.log(7 / 99) + 92 * math.log(92 / 99)
    assert independence(transitions_of(flags)).statistic == pytest.approx(2.0 * (free - tied))


def test_an_exception_on_the_first_or_the_last_day_alone() -> None:
    for day, counts in ((0, Transitions(98, 1, 0, 0)), (99, Transitions(98, 0, 1, 0))):
        flags = np.zeros(100, dtype=np.bool_)
        flags[day] = True
        assert transitions_of(flags) == counts
        assert independence(counts).statistic == pytest.approx(0.0, abs=1e-12)


def test_one_day() -> None:
    found = coverage(np.array([True]), 0.99)
    assert found.transitions == Transitions(0, 0, 0, 0)
    assert found.kupiec.p_value == pytest.approx(stats.chi2.sf(-2.0 * math.log(0.01), 1))


def test_clusters_are_seen() -> None:
    flags = np.zeros(500, dtype=np.bool_)
    flags[200:215] = True
    spread = np.zeros(500, dtype=np.bool_)
    spread[::33] = True
    assert coverage(flags, 0.97).independence.rejected
    assert not coverage(spread, 0.97).independence.rejected
    assert coverage(flags, 0.97).kupiec == coverage(np.roll(flags, 7), 0.97).kupiec


@pytest.mark.parametrize(
    ("exceptions", "zone", "cumulative"),
    [  # Basel Committee 1996, table 2: 250 days at 99 %
        (0, "green", 0.0811),
        (4, "green", 0.8922),
        (5, "yellow", 0.9588),
        (9, "yellow", 0.9997),
        (10, "red", 0.9999),
        (15, "red", 1.0),
    ],
)
def test_basels_zones(exceptions: int, zone: str, cumulative: float) -> None:
    light = traffic_light(exceptions, 250, 0.99)
    assert light.zone == zone
    assert light.probability == pytest.approx(cumulative, abs=6e-5)


@pytest.mark.parametrize(
    ("x", "n", "level", "size"),
    [(-1, 9, 0.99, 0.05), (3, 2, 0.99, 0.05), (0, 0, 0.99, 0.05), (1, 9, 0.4, 0.05), (1, 9, 0.99, 0.0)],
)
def test_counts_are_checked(x: int, n: int, level: float, size: float) -> None:
    with pytest.raises(InvalidError):
        kupiec(x, n, level, size)


def test_the_test_size_is_a_parameter() -> None:
    assert kupiec(7, 1226, 0.99, test_size=0.15).rejected
    assert not kupiec(7, 1226, 0.99).rejected


# rolling


@needs_closes
@pytest.mark.parametrize(
    ("weights", "exceptions", "p_value"),
    [
        ({"BTC": 1.0}, 12, 0.94),
        ({"ETH": 1.0}, 15, 0.45),
        ({"SOL": 1.0}, 7, 0.10),
        ({"BNB": 1.0}, 7, 0.10),
        ({"BTC": 0.25, "ETH": 0.25, "SOL": 0.25, "BNB": 0.25}, 11, 0.71),
    ],
)
def test_real_days(weights: dict[str, float], exceptions: int, p_value: float) -> None:
    days = panel().history(tuple(weights), 2_000)
    found = backtest_book(days, np.array(list(weights.values())), BacktestTerms())
    assert found.coverage.observations == 1_226
    assert found.coverage.exceptions == len(found.exception_dates) == exceptions
    assert found.coverage.kupiec.p_value == pytest.approx(p_value, abs=5e-3)
    pnl = days.returns @ np.array(list(weights.values()))
    loop = [days.dates[t] for t in range(500, len(pnl)) if pnl[t] < np.quantile(pnl[t - 500 : t], 0.01)]
    assert list(found.exception_dates) == loop


METHODS: tuple[HistoricalMethod, ...] = ("plain", "age_weighted", "filtered")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_each_forecast_is_that_of_the_window_before(method: HistoricalMethod, confidence: float) -> None:
    days, net = drawn_history(21, 150, "BTC", "ETH"), exposed({"BTC": 9e3, "ETH": -4e3}).net
    found = backtest_book(days, net, BacktestTerms(confidence, 100, method))
    assert len(found.value_at_risk) == 50
    for i in (0, 1, 17, 49):
        window = History(days.assets, days.dates[i : i + 100], days.returns[i : i + 100])
        (tail,) = historical(
            exposed({"BTC": 9e3, "ETH": -4e3}), window, HistoricalTerms((confidence,), method=method)
        ).tails
        assert found.value_at_risk[i] == pytest.approx(tail.value_at_risk, rel=1e-9)
    assert found.losses == pytest.approx(-(days.returns[100:] @ net))
    assert found.dates[0] == days.dates[100]


@pytest.mark.parametrize("method", [*METHODS, "normal"])
def test_a_profit_and_loss_scales(method: BacktestMethod) -> None:
    dates = np.datetime64("2025-01-01") + np.arange(400)
    pnl = np.random.default_rng(3).standard_t(5, 400)
    terms = BacktestTerms(0.95, 120, method)
    small, large = backtest_pnl(dates, pnl, terms), backtest_pnl(dates, 5_000.0 * pnl, terms)
    assert large.value_at_risk == pytest.approx(5_000.0 * small.value_at_risk)
    assert np.array_equal(small.exceptions, large.exceptions)


def test_normal_is_the_windows_deviation() -> None:
    dates, pnl = np.datetime64("2025-01-01") + np.arange(101), np.random.default_rng(3).standard_normal(101)
    found = backtest_pnl(dates, pnl, BacktestTerms(0.99, 100, "normal"))
    assert found.value_at_risk == pytest.approx([2.3263479 * np.std(pnl[:100], ddof=1)])


def test_many_windows_are_taken_in_parts() -> None:
    days = drawn_history(2, 1_400, *(f"A{i:02d}" for i in range(60)))
    net = np.linspace(-1.0, 2.0, 60)
    found = backtest_book(days, net, BacktestTerms(0.99, 200, "filtered"))
    last = backtest_book(
        History(days.assets, days.dates[-201:], days.returns[-201:]), net, BacktestTerms(0.99, 200, "filtered")
    )
    assert found.value_at_risk[-1] == pytest.approx(last.value_at_risk[0], rel=1e-12)
    assert len(found.value_at_risk) == 1_200


def test_a_loss_equal_to_var_is_no_exception() -> None:
    dates = np.datetime64("2025-01-01") + np.arange(61)
    assert not backtest_pnl(dates, np.full(61, -5.0), BacktestTerms(0.95, 60)).exceptions.any()


def test_too_short_a_history_is_named() -> None:
    dates = np.datetime64("2025-01-01") + np.arange(500)
    with pytest.raises(InvalidError) as refused:
        backtest_pnl(dates, np.ones(500), BacktestTerms())
    assert refused.value.code == "missing_history"
    assert refused.value.figures["history"] == {"pnl": {"days": 500, "required": 501}}
    with pytest.raises(InvalidError, match="window"):
        backtest_pnl(dates, np.ones(500), BacktestTerms(window=59))
