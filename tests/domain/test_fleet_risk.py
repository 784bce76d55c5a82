"""A fleet's VaR, its parts and its plans, against figures worked by hand and the identities that they keep."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from app.domain.covariance import Covariance
from app.domain.fleet_plan import Bounds, Share, filled, plan
from app.domain.fleet_risk import fleet_drift, fleet_tail, herfindahl, sharpe
from app.domain.parameters import MarketParameters
from app.errors import ConflictError

DAYS = math.sqrt(365.0)


def covariance(correlation: list[list[float]], daily: tuple[float, ...] = (0.01, 0.02, 0.03)) -> Covariance:
    names = tuple("ABC"[: len(daily)])
    return Covariance(names, np.array(daily) * DAYS, np.array(correlation))


def test_three_members_by_hand() -> None:
    """100 of A at 1 % a day, 200 of B at 2 %, -100 of C at 3 %: deviations 1, 4 and -3 USD.

    With ρ .5, .2 and -.4 the variance is 1 + 16 + 9 + 2·.5·4 - 2·.2·3 + 2·.4·12 = 38.4, of which A has 1·(1 + 2 - .6)
    = 2.4, B 4·(.5 + 4 + 1.2) = 22.8 and C -3·(.2 - 1.6 - 3) = 13.2.
    """
    given_ = covariance([[1, 0.5, 0.2], [0.5, 1, -0.4], [0.2, -0.4, 1]])
    tail = fleet_tail(np.diag([100.0, 200.0, -100.0]), given_, 0.99)
    deviation = math.sqrt(38.4)
    assert tail.value_at_risk == pytest.approx(2.326347874 * deviation, rel=1e-9)
    assert tail.own / 2.326347874 == pytest.approx([1, 4, 3], rel=1e-9)
    assert tail.component / 2.326347874 == pytest.approx(np.array([2.4, 22.8, 13.2]) / deviation, rel=1e-9)
    # ES of a normal loss at 99 %: 2.6652 deviations
    assert tail.expected_shortfall / deviation == pytest.approx(2.665214, rel=1e-6)
    assert tail.component_es / deviation**-1 == pytest.approx(np.array([2.4, 22.8, 13.2]) * 2.665214, rel=1e-6)


def test_at_one_it_is_the_sum_at_zero_the_root_of_squares() -> None:
    exposures = np.diag([100.0, 200.0, 400.0])
    one = fleet_tail(exposures, covariance([[1.0] * 3] * 3), 0.95)
    assert one.value_at_risk == pytest.approx(one.own.sum())
    assert one.diversified == pytest.approx(0.0, abs=1e-12)
    nought = fleet_tail(exposures, covariance(np.eye(3).tolist()), 0.95)
    assert nought.value_at_risk == pytest.approx(math.sqrt((nought.own**2).sum()))
    assert nought.own == pytest.approx(norm.ppf(0.95) * np.array([1.0, 4.0, 12.0]))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_components_sum_and_are_derivatives(members: int, assets: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(assets, assets + 2))
    whole = factors @ factors.T
    deviation = np.sqrt(np.diag(whole))
    found = Covariance(
        tuple(map(str, range(assets))), rng.uniform(0.1, 2.0, assets), whole / np.outer(deviation, deviation)
    )
    exposures = rng.normal(size=(members, assets)) * 1_000.0
    tail = fleet_tail(exposures, found, 0.99, 10.0)
    assert tail.component.sum() == pytest.approx(tail.value_at_risk)
    assert tail.component_es.sum() == pytest.approx(tail.expected_shortfall)
    assert tail.value_at_risk <= tail.own.sum() * (1 + 1e-12)
    # the first member, a little larger or smaller: Euler's share is its derivative
    step = 1e-5

    def scaled(factor: float) -> float:
        other = exposures.copy()
        other[0] *= factor
        return fleet_tail(other, found, 0.99, 10.0).value_at_risk

    slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
    assert slope == pytest.approx(tail.component[0], rel=1e-4, abs=1e-4 * tail.own.sum())


def test_drift_costs_what_the_correlations_say() -> None:
    """Two equal longs: at correlation ρ their VaR is z·σ·√(2 + 2ρ)."""
    parameters = MarketParameters()
    calm = parameters.regimes["normal"][("BTC", "ETH")]
    recent = Covariance(("BTC", "ETH"), np.array([0.5, 0.5]) * DAYS, np.array([[1, 0.95], [0.95, 1]]))
    got = fleet_drift(np.array([1_000.0, 1_000.0]), recent, 0.99, parameters)
    each = 2.326347874 * 500.0
    assert got.found.realised == pytest.approx(each * math.sqrt(2 + 2 * 0.95), rel=1e-9)
    assert got.found.expected == pytest.approx(each * math.sqrt(2 + 2 * calm), rel=1e-9)
    assert got.found.distance == pytest.approx(math.sqrt(2) * abs(0.95 - calm))
    stress = parameters.stress.pairs.get(("BTC", "ETH"), parameters.stress.other)
    assert got.stressed == pytest.approx(each * math.sqrt(2 + 2 * stress), rel=1e-9)


def test_concentration_and_sharpe() -> None:
    assert herfindahl(np.array([3.0, -3.0, 3.0, 3.0])) == pytest.approx(0.25)
    assert herfindahl(np.array([5.0, 0.0])) == pytest.approx(1.0)
    assert herfindahl(np.zeros(2)) is None
    # mean .01, deviation √(20/19)·.02 around it
    returns = [0.03, -0.01] * 10
    assert sharpe(returns) == pytest.approx(0.01 / (0.02 * math.sqrt(20 / 19)) * DAYS)
    assert sharpe(returns[:-1]) is None
    assert sharpe([0.01] * 30) is None


def member(name: str, drawn: str = "0", used: float = 0.0, var: float = 0.0, ratio: float | None = None) -> Share:
    return Share(name, Decimal(100), Decimal(drawn), used, var, ratio)


def test_equal_risk_by_hand() -> None:
    """B loses twice as much on a dollar as A: it has half as much of 900."""
    members = [member("A", used=100, var=10), member("B", used=50, var=10)]
    assert plan(members, Decimal(900), "equal_risk", Bounds()) == [600, 300]
    # within bounds, and C, which has nothing open, stands at the mean of the two, .15
    wide = [*members, member("C")]
    assert plan(wide, Decimal(1_300), "equal_risk", Bounds()) == [600, 300, 400]
    assert plan(wide, Decimal(1_000), "equal_risk", Bounds(0.3, 0.4)) == [400, 300, 300]


def test_sharpe_weights_within_bounds_and_above_what_is_drawn() -> None:
    members = [member("A", ratio=3.0), member("B", ratio=1.0), member("C", drawn="50", ratio=-1.0), member("D")]
    assert plan(members, Decimal(450), "sharpe", Bounds()) == [300, 100, 50, 0]
    assert plan(members, Decimal(1_000), "sharpe", Bounds(0.1, 0.5)) == [500, 300, 100, 100]


def test_to_need_by_hand() -> None:
    members = [member("A", drawn="100", used=80.0), member("B", used=40.0)]
    assert plan(members, Decimal(1_000), "to_need", Bounds()) == [100, 50]
    with pytest.raises(ConflictError) as refused:
        plan(members, Decimal(99), "to_need", Bounds())
    assert refused.value.code == "fleet_exhausted"


@given(st.lists(st.tuples(*[st.floats(0, 10)] * 3), min_size=1, max_size=8), st.floats(0, 50))
def test_filling_never_passes_the_whole(rows: list[tuple[float, float, float]], spare: float) -> None:
    weights, low, room = (np.array(column) for column in zip(*rows, strict=True))
    whole = float(low.sum()) + spare
    found = filled(weights, low, low + room, whole)
    assert (found >= low).all()
    assert (found <= low + room).all()
    assert found.sum() <= whole * (1 + 1e-9)


def test_a_volatility_scales_all() -> None:
    calm = covariance(np.eye(3).tolist())
    wild = replace(calm, volatility=calm.volatility * 2)
    exposures = np.ones((2, 3))
    assert fleet_tail(exposures, wild, 0.99).component == pytest.approx(2 * fleet_tail(exposures, calm, 0.99).component)
