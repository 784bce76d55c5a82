"""Variance-covariance VaR against published cases, numerical integration and finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import integrate, stats

from app.domain.black76 import Floats
from app.domain.var.contributions import Deviations, VarParts, parametric_parts
from app.domain.var.parametric import Moments, NormalTail, cornish_fisher, is_monotone, parametric
from app.domain.var.volatility import ewma_variance
from app.errors import InvalidError
from tests.domain.book import linear
from tests.domain.var_books import (
    CURVED,
    DRAWN,
    NAMES,
    confidences,
    drawn_covariance,
    exposed,
    exposures,
    portfolio,
    seeds,
)

YEAR = 365.0
JORION = np.diag([0.05**2, 0.12**2])
LEVELS = (0.6, 0.9, 0.95, 0.99, 0.999)


def parts_of(rows: dict[str, float], covariance: Floats, confidence: float = 0.99) -> tuple[VarParts, NormalTail]:
    book = exposed(rows)
    tail = parametric(book.net, covariance, (confidence,)).tails[0]
    return parametric_parts(Deviations(book, covariance, 1.0), tail), tail


def test_jorions_two_currencies() -> None:
    book = exposed({"BTC": 2e6, "ETH": 1e6})  # CAD 2m and EUR 1m
    risk = parametric(book.net, JORION, (0.95,), horizon_days=YEAR, z=(1.65,))
    (tail,) = risk.tails
    assert tail.value_at_risk == pytest.approx(257_738, abs=0.5)
    assert risk.sigma == pytest.approx(156_205, abs=0.5)
    parts = parametric_parts(Deviations(book, JORION, YEAR), tail)
    assert parts.components.var_by_underlying == pytest.approx([105_630, 152_108], abs=0.5)
    assert parts.marginal_var == pytest.approx([0.0528, 0.1521], abs=5e-5)
    # without one currency the other's own VaR is left: 198,000 and 165,000
    assert parts.incremental_var_by_position == pytest.approx([257_738 - 198_000, 257_738 - 165_000], abs=0.5)
    trade = 1.65 * Deviations(book, JORION, YEAR).change(np.array([10_000.0, 0.0]))
    assert trade == pytest.approx(528, abs=2)


def test_published_multiples_of_sigma() -> None:
    # McNeil, Frey & Embrechts: normal ES over sigma; RiskMetrics: 1.645 and 2.326
    tails = parametric(np.array([1.0]), np.array([[1.0]]), (0.95, 0.99), horizon_days=YEAR).tails
    assert [t.value_at_risk for t in tails] == pytest.approx([1.6449, 2.3263], abs=5e-5)
    assert [t.expected_shortfall for t in tails] == pytest.approx([2.0627, 2.6652], abs=5e-5)


def test_ewma() -> None:
    assert math.sqrt(ewma_variance(np.array([0.02]), 0.9, 0.01**2)[-1]) == pytest.approx(0.0114, abs=5e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_quantiles_and_shortfall_are_scipys(level: float) -> None:
    (tail,) = parametric(np.array([3.0]), np.array([[0.5]]), (level,), horizon_days=10).tails
    pnl = stats.norm(scale=3.0 * math.sqrt(0.5 * 10 / YEAR))
    assert tail.value_at_risk == pytest.approx(-pnl.ppf(1 - level), rel=1e-12)
    assert tail.expected_shortfall == pytest.approx(-pnl.expect(ub=pnl.ppf(1 - level), conditional=True), rel=1e-7)


def test_a_given_z_keeps_shortfall_above_var() -> None:
    one = np.array([1.0]), np.array([[1.0]])
    (tail,) = parametric(*one, (0.99,), z=(-2.33,), horizon_days=YEAR).tails
    assert tail.value_at_risk == 2.33
    assert tail.expected_shortfall > tail.value_at_risk
    for z in ((3.7,), (0.0,), (math.nan,), (2.33, 1.65)):
        with pytest.raises(InvalidError, match="z"):
            parametric(*one, (0.99,), z=z)


# Cornish-Fisher


def test_published_cornish_fisher_quantile() -> None:
    assert cornish_fisher(-2.326, Moments(-0.7, 4.5)) == pytest.approx(-3.7074, abs=5e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("moments", [(-0.7, 4.5), (0.5, 2.0), (0.0, 0.0), (0.0, 6.0), (-1.2, 3.0)])
def test_cornish_fisher_shortfall_is_the_integral_of_the_quantile(level: float, moments: tuple[float, float]) -> None:
    given = Moments(*moments)
    (tail,) = parametric(np.array([1.0]), np.array([[1.0]]), (level,), horizon_days=YEAR, moments=given).tails
    assert tail.monotone
    integral, _ = integrate.quad(lambda u: cornish_fisher(stats.norm.ppf(u), given), 0.0, 1.0 - level, limit=400)
    assert tail.expected_shortfall == pytest.approx(-integral / (1.0 - level), rel=1e-6)
    assert tail.value_at_risk == -cornish_fisher(stats.norm.ppf(1.0 - level), given)


@DRAWN
@given(st.floats(-3.0, 3.0), st.floats(-2.0, 15.0), confidences)
def test_monotone_means_that_the_quantile_rises_all_the_way(skew: float, kurtosis: float, level: float) -> None:
    moments, c = Moments(skew, kurtosis), float(stats.norm.ppf(1.0 - level))
    z = np.linspace(-10.0, c, 20_001)
    slope = np.polyval(np.polyder(np.poly1d(_polynomial(moments))), z)
    assume(abs(slope.min()) > 1e-3)
    assert is_monotone(c, moments) == (slope.min() > 0.0)


def _polynomial(moments: Moments) -> list[float]:
    """Return the cubic of the expansion by its values at four points."""
    z = np.array([-2.0, -1.0, 0.5, 3.0])
    return [float(x) for x in np.polyfit(z, [cornish_fisher(float(x), moments) for x in z], 3)]


def test_outside_its_domain_the_flag_is_down_and_shortfall_holds() -> None:
    for moments in (Moments(-3.0, 1.0), Moments(2.5, 0.0), Moments(0.0, -2.0), Moments(1.0, 0.5)):
        tails = parametric(np.array([1.0]), np.array([[1.0]]), LEVELS, moments=moments).tails
        assert not all(t.monotone for t in tails)
        assert all(t.expected_shortfall >= t.value_at_risk for t in tails)


def test_maillards_limits_of_kurtosis() -> None:
    # without skewness the quantile is monotone everywhere for 0 <= K <= 8 (Maillard 2012)
    everywhere = float(stats.norm.ppf(0.499))
    assert all(is_monotone(everywhere, Moments(0.0, k)) for k in (0.0, 4.0, 7.99))
    assert not any(is_monotone(everywhere, Moments(0.0, k)) for k in (-0.5, 8.1, 12.0))
    # the turn at K 12 lies within half a deviation: the far tail is fit for use
    assert is_monotone(-1.6, Moments(0.0, 12.0))


def test_moments_are_scipys() -> None:
    pnl = np.random.default_rng(3).standard_t(6, 400) * 700 - 10
    moments = Moments.of(pnl)
    assert moments.skew == pytest.approx(stats.skew(pnl))
    assert moments.excess_kurtosis == pytest.approx(stats.kurtosis(pnl))
    assert Moments.of(np.full(80, 0.1)) == Moments(0.0, 0.0)
    with pytest.raises(InvalidError) as refused:
        Moments.of(pnl[:59])
    assert refused.value.code == "missing_history"


# parts


@DRAWN
@given(exposures, seeds, confidences)
def test_parts_sum_to_the_total(rows: dict[str, float], seed: int, level: float) -> None:
    parts, tail = parts_of(rows, drawn_covariance(seed, 3), level)
    scale = 1e-9 * (sum(map(abs, rows.values())) + 1e-9)
    for by in ("by_position", "by_underlying"):
        assert getattr(parts.components, f"var_{by}").sum() == pytest.approx(tail.value_at_risk, rel=1e-9, abs=scale)
        assert getattr(parts.components, f"es_{by}").sum() == pytest.approx(
            tail.expected_shortfall, rel=1e-9, abs=scale
        )


@DRAWN
@given(exposures, seeds)
def test_marginal_is_the_slope_and_incremental_the_difference(rows: dict[str, float], seed: int) -> None:
    assume(max(map(abs, rows.values())) > 1_000.0)
    covariance = drawn_covariance(seed, 3)
    parts, tail = parts_of(rows, covariance)

    def var(changed: dict[str, float]) -> float:
        return parametric(exposed(changed).net, covariance, (0.99,)).tails[0].value_at_risk

    for j, name in enumerate(NAMES):
        up, down = (var(rows | {name: rows[name] + step}) for step in (5.0, -5.0))
        assert parts.marginal_var[j] == pytest.approx((up - down) / 10.0, rel=1e-4, abs=1e-6)
        without = tail.value_at_risk - var(rows | {name: 0.0})
        assert parts.incremental_var_by_underlying[j] == pytest.approx(without, rel=1e-6, abs=1e-3)
        assert parts.incremental_var_by_position[j] == pytest.approx(without, rel=1e-6, abs=1e-3)


def test_positions_of_one_underlying_have_parts_of_their_own() -> None:
    book = portfolio(linear("BTC-PERP", "long", 2.0), linear("BTC-27MAR26", "short", 1.5), *CURVED)
    covariance = drawn_covariance(2, 2)
    tail = parametric(book.net, covariance, (0.975,)).tails[0]
    parts = parametric_parts(Deviations(book, covariance, 1.0), tail)
    assert book.by_underlying(parts.components.var_by_position) == pytest.approx(parts.components.var_by_underlying)
    for i in range(len(book)):
        left = book.net.copy()
        left[book.underlying[i]] -= book.exposure[i]
        without = parametric(left, covariance, (0.975,)).tails[0].value_at_risk
        assert parts.incremental_var_by_position[i] == pytest.approx(tail.value_at_risk - without, rel=1e-9)


def test_a_flat_book_has_no_risk_and_no_parts() -> None:
    parts, tail = parts_of({"BTC": 0.0, "ETH": 0.0}, drawn_covariance(1, 2))
    assert tail.value_at_risk == tail.expected_shortfall == 0.0
    assert not parts.marginal_var.any()
    assert not parts.marginal_es.any()
    assert not parts.components.es_by_position.any()


def test_a_book_of_nothing_has_no_risk() -> None:
    assert parametric(np.zeros(0), np.zeros((0, 0))).sigma == 0.0


@DRAWN
@given(exposures, seeds, st.tuples(confidences, confidences), st.tuples(st.floats(0.1, 365), st.floats(0.1, 365)))
def test_monotone_in_confidence_and_horizon(
    rows: dict[str, float], seed: int, levels: tuple[float, float], days: tuple[float, float]
) -> None:
    covariance, net = drawn_covariance(seed, 3), exposed(rows).net
    for (low, high), (short, long) in itertools.product([sorted(levels)], [sorted(days)]):
        tails = parametric(net, covariance, (low, high), horizon_days=short).tails
        later = parametric(net, covariance, (low, high), horizon_days=long).tails
        assert tails[0].value_at_risk <= tails[1].value_at_risk
        assert all(a.value_at_risk <= b.value_at_risk for a, b in zip(tails, later, strict=True))
        assert all(t.expected_shortfall >= t.value_at_risk for t in (*tails, *later))
        grown = math.sqrt(long / short)
        assert later[0].value_at_risk == pytest.approx(grown * tails[0].value_at_risk, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "matrix",
    [
        [[1.0, 2.0], [2.0, 1.0]],
        [[1.0, 0.2], [0.3, 1.0]],
        [[1.0, math.nan], [math.nan, 1.0]],
        [[0.0, 0.1], [0.1, 1.0]],
        [[-1.0, 0.0], [0.0, 1.0]],
    ],
)
def test_no_covariance_is_refused(matrix: list[list[float]]) -> None:
    with pytest.raises(InvalidError) as refused:
        parametric(np.ones(2), np.array(matrix))
    assert refused.value.code == "not_a_covariance"


def test_three_correlations_that_cannot_be_are_refused() -> None:
    matrix = np.array([[1.0, 0.9, 0.9], [0.9, 1.0, -0.9], [0.9, -0.9, 1.0]]) * 1e-8
    with pytest.raises(InvalidError, match="semidefinite"):
        parametric(np.ones(3), matrix)


@pytest.mark.parametrize("levels", [(), (0.5,), (1.0,), (0.99, 99.0), (math.nan,), (0.9,) * 21])
def test_confidences_are_checked(levels: tuple[float, ...]) -> None:
    with pytest.raises(InvalidError) as refused:
        parametric(np.ones(1), np.ones((1, 1)), levels)
    assert refused.value.errors[0].pointer.startswith("/confidences")


@pytest.mark.parametrize("days", [0.0, -1.0, 366.0, math.nan])
def test_horizons_are_checked(days: float) -> None:
    with pytest.raises(InvalidError, match="horizon"):
        parametric(np.ones(1), np.ones((1, 1)), horizon_days=days)
