"""Covariances against numpy, pandas, scikit-learn and plain loops; panels with gaps; what was defaulted is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.domain.black76 import Floats
from app.domain.correlation import repaired
from app.domain.covariance import Estimator, covariance_of, estimate, ewma, pairs_of
from app.domain.panel import Panel, panel_of_closes
from app.domain.parameters import CorrelationTable, MarketParameters
from app.errors import InvalidError

NAMES = ("BTC", "ETH", "SOL")
METHODS: tuple[Estimator, ...] = ("sample", "ewma", "ledoit_wolf")
PARAMETERS = MarketParameters()
FIRST = date(2024, 1, 1)


def panel(returns: Floats, names: Sequence[str] = NAMES) -> Panel:
    return Panel(tuple(names), np.datetime64(FIRST) + np.arange(len(returns)), returns)


def drawn(days: int, seed: int = 5, assets: int = 3) -> Floats:
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((assets, assets)) + 2.0
    return rng.standard_normal((days, assets)) @ mix * 0.01 + 0.001


def table(**pairs: float) -> CorrelationTable:
    sorted_pairs = {(min(a, b), max(a, b)): rho for (a, b), rho in ((k.split("_"), v) for k, v in pairs.items())}
    return CorrelationTable(MappingProxyType(sorted_pairs), other=0.8)


def test_ewma_worked_example() -> None:
    assert math.sqrt(float(ewma(np.array(0.01**2), np.array(0.02**2), 0.9))) == pytest.approx(0.0114, abs=5e-5)


def test_portfolio_volatility_of_given_volatilities_and_correlations() -> None:
    given_table = table(BTC_ETH=0.82, BTC_SOL=0.71, ETH_SOL=0.78)
    found = covariance_of(NAMES, {"BTC": 0.65, "ETH": 0.80, "SOL": 1.20}, given_table, PARAMETERS)
    assert found.deviation(np.full(3, 1 / 3), days=365) == pytest.approx(0.8138, abs=5e-5)
    assert (found.defaulted_pairs, found.defaulted_volatilities, found.repair_distance) == ((), (), 0.0)


def test_two_currencies_uncorrelated() -> None:
    found = covariance_of(("CAD", "EUR"), {"CAD": 0.05, "EUR": 0.12}, table(CAD_EUR=0.0), PARAMETERS)
    assert 1.65 * found.deviation(np.array([2e6, 1e6]), days=365) == pytest.approx(257_738, abs=0.5)


def test_a_horizon_scales_with_the_root_of_time() -> None:
    found = covariance_of(("BTC",), {"BTC": 0.73}, table(), PARAMETERS)
    assert found.deviation(np.array([-1e4])) == pytest.approx(1e4 * 0.73 / math.sqrt(365))
    assert found.deviation(np.array([-1e4]), days=4) == pytest.approx(2e4 * 0.73 / math.sqrt(365))


def test_sample_of_a_whole_panel_is_numpys() -> None:
    returns = drawn(250)
    found = estimate(panel(returns), NAMES, PARAMETERS)
    assert found.matrix == pytest.approx(np.cov(returns, rowvar=False) * 365, rel=1e-10)
    assert (found.defaulted_pairs, found.defaulted_volatilities, dict(found.too_short)) == ((), (), {})
    assert found.repair_distance == 0.0


def test_sample_of_a_panel_with_gaps_is_pandas_pair_by_pair() -> None:
    pandas = pytest.importorskip("pandas")
    returns = drawn(400)
    returns[:250, 1] = np.nan
    returns[::7, 0] = np.nan
    returns[390:, 2] = np.nan
    frame = pandas.DataFrame(returns, columns=NAMES)
    found = estimate(panel(returns), NAMES, PARAMETERS)
    assert found.repair_distance == 0.0
    assert found.correlation == pytest.approx(frame.corr().to_numpy(), abs=1e-12)
    assert found.volatility == pytest.approx(frame.std().to_numpy() * math.sqrt(365), rel=1e-12)


def test_ewma_is_the_recursion_in_plain_python() -> None:
    returns = drawn(120)
    returns[10:25, 1] = np.nan
    returns[100, 2] = np.nan
    found = estimate(panel(returns), NAMES, PARAMETERS, "ewma")
    for a in range(3):
        own = [r for r in returns[:, a].tolist() if not math.isnan(r)]
        mean = sum(own) / len(own)
        variance = sum((r - mean) ** 2 for r in own) / (len(own) - 1)
        for r in own:
            variance = 0.94 * variance + 0.06 * r * r
        assert found.volatility[a] == pytest.approx(math.sqrt(365 * variance), rel=1e-10)
        for b in range(a):
            both = [(x, y) for x, y in returns[:, [a, b]].tolist() if not math.isnan(x + y)]
            n, mx, my = len(both), sum(x for x, _ in both) / len(both), sum(y for _, y in both) / len(both)
            xx, yy, xy = (
                sum((p[i] - m) * (p[j] - k) for p in both) / (n - 1)
                for i, j, m, k in ((0, 0, mx, mx), (1, 1, my, my), (0, 1, mx, my))
            )
            for x, y in both:
                xx, yy, xy = (0.94 * v + 0.06 * p for v, p in ((xx, x * x), (yy, y * y), (xy, x * y)))
            assert found.correlation[a, b] == pytest.approx(xy / math.sqrt(xx * yy), rel=1e-10)


def test_ewma_decay_is_a_parameter() -> None:
    returns = drawn(100)
    returns[-1] = 0.5
    slow, quick = (estimate(panel(returns), NAMES, _with_decay(decay), "ewma").volatility for decay in (0.99, 0.80))
    assert (quick > slow).all()


def _with_decay(decay: float) -> MarketParameters:
    return replace(PARAMETERS, models=replace(PARAMETERS.models, covariance_decay=decay))


def test_ledoit_wolf_is_scikit_learns() -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    returns = drawn(80, assets=3)
    found = estimate(panel(returns), NAMES, PARAMETERS, "ledoit_wolf")
    assert found.matrix == pytest.approx(covariance.LedoitWolf().fit(returns).covariance_ * 365, rel=1e-10)


def test_ledoit_wolf_takes_the_days_common_to_assets_with_enough() -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    returns = drawn(200)
    returns[:40, 0] = np.nan
    returns[:170, 2] = np.nan
    found = estimate(panel(returns), NAMES, PARAMETERS, "ledoit_wolf")
    common = covariance.LedoitWolf().fit(returns[40:, :2]).covariance_ * 365
    assert found.matrix[:2, :2] == pytest.approx(common, rel=1e-10)
    assert dict(found.too_short) == {"SOL": 30}
    assert found.volatility[2] == 1.20
    assert found.correlation[2, :2].tolist() == [0.90, 0.92]


def test_ledoit_wolf_names_the_missing_history() -> None:
    returns = drawn(140)
    returns[:70, 0] = np.nan
    returns[70:, 1] = np.nan
    with pytest.raises(InvalidError) as error:
        estimate(panel(returns), NAMES, PARAMETERS, "ledoit_wolf")
    assert error.value.code == "missing_history"
    assert "0 days in common" in error.value.detail


@pytest.mark.parametrize("method", METHODS)
def test_assets_without_history_take_the_stated_defaults_and_are_named(method: Estimator) -> None:
    names = ("BTC", "SOL", "DOGE", "USDC")
    assets = dict(PARAMETERS.assets)
    assets["DOGE"] = replace(PARAMETERS.default_asset, asset="DOGE", volatility=1.5)
    parameters = replace(PARAMETERS, assets=assets)
    returns = drawn(120, assets=2)
    returns[:61, 1] = np.nan
    found = estimate(panel(returns, ("BTC", "SOL")), names, parameters, method)
    assert dict(found.too_short) == {"SOL": 59, "DOGE": 0, "USDC": 0}
    assert found.defaulted_volatilities == ("SOL", "DOGE", "USDC")
    assert set(found.defaulted_pairs) == set(pairs_of(names))
    assert found.volatility[1:].tolist() == [1.20, 1.5, 0.0]
    expected = [[1, 0.90, 0.8, 0.8], [0.90, 1, 0.8, 0.8], [0.8, 0.8, 1, 0.8], [0.8, 0.8, 0.8, 1]]
    assert found.correlation.tolist() == expected


def test_sixty_days_are_enough() -> None:
    found = estimate(panel(drawn(60)), NAMES, PARAMETERS)
    assert (dict(found.too_short), found.defaulted_pairs) == ({}, ())


def test_two_assets_that_hardly_met_take_the_stress_pair() -> None:
    returns = drawn(200)
    returns[:80, 0] = np.nan
    returns[120:, 1] = np.nan
    found = estimate(panel(returns), NAMES, PARAMETERS)
    assert found.defaulted_pairs == (("BTC", "ETH"),)
    assert found.defaulted_volatilities == ()


def test_a_volatility_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(InvalidError) as error:
        covariance_of(("BTC", "BNB"), {"BTC": 0.5}, PARAMETERS.stress, PARAMETERS)
    assert (error.value.code, error.value.errors[0].pointer) == ("missing_volatility", "/vols/BNB")
    assert "BNB" in error.value.detail


def test_given_volatilities_go_before_the_parameters() -> None:
    found = covariance_of(("BTC", "ETH", "PEPE"), {"BTC": 0.5, "PEPE": 2.0}, PARAMETERS.stress, PARAMETERS)
    assert found.volatility.tolist() == [0.5, 0.80, 2.0]
    assert found.defaulted_volatilities == ("ETH",)
    assert set(found.defaulted_pairs) == {("BTC", "PEPE"), ("ETH", "PEPE")}


def test_a_given_volatility_goes_before_what_the_panel_shows() -> None:
    returns = drawn(100)
    returns[:50, 2] = np.nan
    shown, found = (estimate(panel(returns), NAMES, PARAMETERS, volatilities=v) for v in ({}, {"BTC": 0.4, "SOL": 3.0}))
    assert found.volatility.tolist() == [0.4, shown.volatility[1], 3.0]
    assert (shown.defaulted_volatilities, found.defaulted_volatilities) == (("SOL",), ())
    assert found.correlation.tolist() == shown.correlation.tolist()


def test_a_price_that_stands_still_goes_with_nothing() -> None:
    returns = drawn(100)
    returns[:, 2] = 0.0
    for method in METHODS[:2]:
        found = estimate(panel(returns), NAMES, PARAMETERS, method)
        assert found.volatility[2] == 0.0
        assert found.correlation[2].tolist() == [0.0, 0.0, 1.0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(gaps=hnp.arrays(np.bool_, (90, 5)), method=st.sampled_from(METHODS[:2]), seed=st.integers(0, 99))
def test_a_panel_with_any_gaps_ends_semidefinite(gaps: Floats, method: Estimator, seed: int) -> None:
    returns = drawn(90, seed=seed, assets=5)
    returns[gaps.astype(bool)] = np.nan
    names = ("BTC", "ETH", "SOL", "X", "Y")
    assets = {n: replace(PARAMETERS.asset(n), asset=n, volatility=0.5) for n in names}
    found = estimate(panel(returns, names), names, replace(PARAMETERS, assets=assets), method, days_min=5)
    assert np.linalg.eigvalsh(found.correlation).min() > -1e-9
    assert np.diag(found.correlation).tolist() == [1.0] * 5
    assert (np.abs(found.correlation) <= 1 + 1e-12).all()


def test_pairs_that_contradict_each_other_are_repaired_and_said_so() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 100)) * 0.02
    # three pieces of history: X with Y, Y with Z, and X against Z
    parts = [np.array([a, a, np.full(100, np.nan)]), np.array([np.full(100, np.nan), b, b]), np.array([b, 0 * b, -b])]
    parts[2][1] = np.nan
    returns = np.concatenate([part.T for part in parts])
    found = estimate(panel(returns), NAMES, PARAMETERS)
    assert found.repair_distance == pytest.approx(
        np.linalg.norm(found.correlation - [[1, 1, -1], [1, 1, 1], [-1, 1, 1]])
    )
    assert found.repair_distance > 0.5
    assert np.linalg.eigvalsh(found.correlation).min() > -1e-12


@pytest.mark.parametrize("size", [3, 12, 41])
def test_a_repair_leaves_no_negative_eigenvalue(size: int) -> None:
    rng = np.random.default_rng(size)
    upper = np.triu(rng.uniform(-1, 1, (size, size)), 1)
    found = repaired(upper + upper.T + np.eye(size))
    assert np.linalg.eigvalsh(found.matrix).min() > -1e-12
    assert np.diag(found.matrix).tolist() == [1.0] * size
    assert found.distance == pytest.approx(np.linalg.norm(found.matrix - upper - upper.T - np.eye(size)))


def test_closes_become_returns_and_a_gap_has_none_on_either_side() -> None:
    day = [FIRST + timedelta(days=t) for t in range(5)]
    made = panel_of_closes(
        {"BTC": dict(zip(day, (100.0, 110.0, 99.0, 99.0, 120.0), strict=True)), "NEW": {day[4]: 5.0}}
    )
    assert made.dates.tolist() == day[1:]
    assert made.of(("BTC",))[:, 0] == pytest.approx([0.1, -0.1, 0.0, 120 / 99 - 1])
    holed = panel_of_closes({"BTC": {day[0]: 1.0, day[1]: 2.0, day[3]: 3.0, day[4]: 6.0}})
    assert holed.returns[:, 0].tolist() == pytest.approx([1.0, math.nan, math.nan, 1.0], nan_ok=True)
    assert np.isnan(made.of(("NEW", "UNKNOWN"))).all()
    assert panel_of_closes({}).returns.shape == (0, 0)
