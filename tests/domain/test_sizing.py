"""Sizing against worked figures, skfolio, another formulation of the programme, and brute force."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from app.domain.sizing.position import PositionTerms, size_position
from app.domain.sizing.programme import Allocation, Programme, allocate
from app.domain.sizing.weights import (
    portfolio_volatility,
    risk_contributions,
    risk_parity,
    scale_to_volatility,
    undiversified_volatility,
    volatility_adjusted_leverage,
)
from app.errors import InvalidError

DRAWN = settings(max_examples=100, deadline=None, derandomize=True)
VOLATILITY = np.array([0.65, 0.80, 1.20])
CORRELATION = np.array([[1.0, 0.82, 0.71], [0.82, 1.0, 0.78], [0.71, 0.78, 1.0]])
THREE = np.outer(VOLATILITY, VOLATILITY) * CORRELATION


def covariance(count: int, seed: int, observations: int = 3) -> Any:
    """Return a covariance of so many assets, volatilities of .1 to 2."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(count * observations, 1))
    returns = factor * rng.uniform(-0.5, 1.5, count) + rng.normal(size=(count * observations, count))
    scale = rng.uniform(0.1, 2.0, count)
    correlation = np.corrcoef(returns.T) if count > 1 else np.ones((1, 1))
    return correlation * np.outer(scale, scale)


# --- volatility and risk parity


def test_worked_volatility() -> None:
    equal = np.full(3, 1 / 3)
    assert round(portfolio_volatility(equal, THREE), 4) == 0.8138
    assert round(undiversified_volatility(equal, THREE), 4) == 0.8833


def test_worked_risk_parity() -> None:
    found = risk_parity(THREE)
    assert np.round(found.weights, 4).tolist() == [0.4272, 0.3382, 0.2346]
    assert round(found.volatility, 4) == 0.7633


def test_two_assets_weigh_by_the_inverse_of_their_volatility() -> None:
    """Known in closed form, whatever the correlation (Maillard, Roncalli, Teïletche 2010)."""
    for rho in (-0.99, -0.5, 0.0, 0.7, 1.0):
        matrix = np.outer([0.3, 0.9], [0.3, 0.9]) * np.array([[1, rho], [rho, 1]])
        assert risk_parity(matrix).weights.tolist() == [pytest.approx(0.75, abs=1e-12), pytest.approx(0.25, abs=1e-12)]


def test_budgets_without_correlation() -> None:
    """σ²w² in proportion to b: w ~ √b/σ."""
    budgets = np.array([0.5, 0.3, 0.2])
    expected = np.sqrt(budgets) / VOLATILITY
    found = risk_parity(np.diag(VOLATILITY**2), budgets).weights
    assert np.abs(found - expected / expected.sum()).max() < 1e-12


@given(count=st.integers(1, 60), seed=st.integers(0, 10_000), power=st.sampled_from((0, 1, 4, 12)))
@DRAWN
def test_contributions_are_the_budgets(count: int, seed: int, power: int) -> None:
    matrix = covariance(count, seed)
    budgets = np.random.default_rng(seed).uniform(0.01, 1.0, count) ** power
    found = risk_parity(matrix, None if power == 0 else budgets)
    share = budgets / budgets.sum() if power else np.full(count, 1 / count)
    assert found.weights.min() > 0
    assert found.weights.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.abs(found.contributions / found.volatility - share).max() < 1e-10
    assert found.contributions.sum() == pytest.approx(found.volatility, rel=1e-12)
    assert found.volatility <= undiversified_volatility(found.weights, matrix) * (1 + 1e-12)


@given(seed=st.integers(0, 10_000), scale=st.sampled_from((1e-12, 1e-3, 1e6)))
@DRAWN
def test_neither_unit_nor_leverage_matters(seed: int, scale: float) -> None:
    matrix = covariance(8, seed)
    plain, scaled = risk_parity(matrix), risk_parity(matrix * scale)
    assert np.abs(plain.weights - scaled.weights).max() < 1e-10
    assert scaled.volatility == pytest.approx(plain.volatility * math.sqrt(scale), rel=1e-9)


@pytest.mark.parametrize("count", [3, 12, 50])
@pytest.mark.parametrize("equal", [True, False])
def test_against_skfolio(count: int, equal: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it imports warns of its own future
        from skfolio.optimization import RiskBudgeting  # noqa: PLC0415

        rng = np.random.default_rng(count)
        returns = rng.normal(0.0, 0.03, (400, 1)) + rng.normal(0.0, 0.02, (400, count)) * rng.uniform(0.5, 3, count)
        budgets = None if equal else rng.uniform(0.2, 1.0, count)
        tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-14)
        theirs = RiskBudgeting(risk_budget=budgets, raise_on_failure=True, solver_params=tight).fit(returns).weights_
    ours = risk_parity(np.cov(returns.T), budgets).weights
    assert np.abs(ours - theirs).max() < 1e-6  # what their solver leaves


def test_against_a_direct_minimum() -> None:
    """The weights minimise ½x'Σx − Σ b ln x: a general optimiser finds the same."""
    matrix = covariance(6, 5)
    budgets = np.array([0.3, 0.25, 0.2, 0.1, 0.1, 0.05])

    def barrier(y: Any) -> Any:
        return 0.5 * np.exp(y) @ matrix @ np.exp(y) - budgets @ y

    def slope(y: Any) -> Any:
        return np.exp(y) * (matrix @ np.exp(y)) - budgets

    found = minimize(barrier, np.zeros(6), jac=slope, tol=1e-14)
    expected = np.exp(found.x) / np.exp(found.x).sum()
    assert np.abs(risk_parity(matrix, budgets).weights - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("matrix", "code"),
    [
        (np.ones((2, 3)), "not_a_covariance"),
        (np.empty((0, 0)), "not_a_covariance"),
        (np.array([[1.0, 0.5], [0.4, 1.0]]), "not_a_covariance"),
        (np.array([[1.0, 0.0], [0.0, 0.0]]), "not_a_covariance"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "not_a_covariance"),
        (np.array([[1.0, -1.0], [-1.0, 1.0]]), "no_risk_parity"),
        (np.array([[1.0, -2.0], [-2.0, 1.0]]), "no_risk_parity"),
        (1.5 * np.eye(3) - 0.5, "no_risk_parity"),
    ],
)
def test_matrices_that_share_nothing_out(matrix: Any, code: str) -> None:
    with pytest.raises(InvalidError) as refused:
        risk_parity(matrix)
    assert refused.value.code == code


@pytest.mark.parametrize("budgets", [[1.0, 1.0], [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]])
def test_budgets_that_are_none(budgets: list[float]) -> None:
    with pytest.raises(InvalidError) as refused:
        risk_parity(THREE, np.array(budgets))
    assert refused.value.code == "out_of_range"


# --- volatility target and leverage


@given(seed=st.integers(0, 999), target=st.floats(0.01, 3.0), cap=st.none() | st.floats(0.1, 5.0))
@DRAWN
def test_scaling_ends_at_the_target_or_at_the_cap(seed: int, target: float, cap: float | None) -> None:
    matrix = covariance(5, seed)
    weights = np.random.default_rng(seed).uniform(-1, 1, 5)
    found = scale_to_volatility(weights, matrix, target, cap)
    reached = portfolio_volatility(found.weights, matrix)
    assert found.volatility == pytest.approx(reached, rel=1e-9)
    assert np.abs(found.weights - weights * found.factor).max() == 0
    if found.binding == "volatility":
        assert reached == pytest.approx(target)
        assert cap is None or np.abs(found.weights).sum() <= cap * (1 + 1e-12)
    else:
        assert np.abs(found.weights).sum() == pytest.approx(cap)
        assert reached <= target


def test_scaling_what_has_no_volatility() -> None:
    nothing = np.zeros((1, 1))
    assert scale_to_volatility(np.array([0.5]), nothing, 0.5, leverage_cap=2.0).factor == 4.0
    with pytest.raises(InvalidError):
        scale_to_volatility(np.array([0.5]), nothing, 0.5)


@pytest.mark.parametrize(
    ("leverage", "volatility", "expected"), [(10, 0.8, 2.5), (10, 0.2, 10), (10, 0.1, 10), (5, 0.0, 5), (3, 1.2, 0.5)]
)
def test_leverage_by_volatility(leverage: float, volatility: float, expected: float) -> None:
    assert volatility_adjusted_leverage(leverage, volatility) == pytest.approx(expected)


def test_leverage_by_volatility_has_a_floor() -> None:
    assert volatility_adjusted_leverage(10, 0.001, base=0.005) == pytest.approx(5)  # .005/.01, not .005/.001


# --- the linear programme


def programme(edges: list[float], margin: list[float], daily: list[float], **terms: Any) -> Any:
    names = [f"A{i}" for i in range(len(edges))]
    found: Allocation = allocate(Programme(names, np.array(edges), np.array(margin), np.array(daily), **terms))
    return found


def test_concentration_binds_by_hand() -> None:
    found = programme([0.3, 0.2, -0.1, 0.0], [0.3] * 4, [0.04] * 4)
    assert found.weights.tolist() == [0.25, 0.25, 0.0, 0.0]
    assert found.edge == pytest.approx(0.125)
    binding = {(c.name, c.asset): c.shadow_price for c in found.constraints if c.binding}
    assert binding == {("weight", "A0"): pytest.approx(0.3), ("weight", "A1"): pytest.approx(0.2)}


def test_margin_binds_by_hand() -> None:
    """w(.3 + 2 × .6 × .05) ≤ .6 → Σw ≤ 1.6667: six at .25, the seventh at .1667, priced at its edge per margin."""
    found = programme([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], [0.3] * 8, [0.05] * 8)
    assert found.weights.tolist() == [pytest.approx(w) for w in [0.25] * 6 + [1 / 6, 0.0]]
    margin = next(c for c in found.constraints if c.name == "margin")
    assert (margin.binding, margin.used, margin.limit) == (True, pytest.approx(0.6), 0.6)
    assert margin.shadow_price == pytest.approx(0.3 / 0.36)
    leverage = next(c for c in found.constraints if c.name == "leverage")
    assert (leverage.binding, leverage.shadow_price) == (False, 0)


def test_leverage_binds_by_hand() -> None:
    found = programme([0.3, 0.2], [0.01] * 2, [0.01] * 2, leverage_cap=0.4)
    assert found.weights.tolist() == [0.25, pytest.approx(0.15)]
    assert next(c for c in found.constraints if c.name == "leverage").shadow_price == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("terms", "status", "word"),
    [
        ({"weight_min": 0.3}, "infeasible", "A0"),
        ({"weight_min": 1.0, "weight_max": 1.0}, "infeasible", "margin"),
        ({"weight_min": 0.2, "leverage_cap": 0.5}, "infeasible", "leverage"),
        ({"leverage_cap": -1.0}, "infeasible", "leverage"),
        ({"utilization": -0.1}, "infeasible", "margin"),
        ({"weight_max": None}, "optimal", ""),
    ],
)
def test_what_can_not_be_met(terms: Any, status: str, word: str) -> None:
    found = programme([0.3, 0.2, 0.1], [0.3] * 3, [0.04] * 3, **terms)
    assert found.status == status
    assert word in found.detail
    assert len(found.weights) == (3 if status == "optimal" else 0)


def test_what_nothing_limits() -> None:
    free = {"weight_max": None, "leverage_cap": None}
    found = programme([0.1, 0.2], [0.3, 0.0], [0.04, 0.0], **free)
    assert (found.status, found.edge) == ("unbounded", math.inf)
    assert "A1" in found.detail
    assert programme([0.1, -0.2], [0.3, 0.0], [0.04, 0.0], **free).status == "optimal"
    assert programme([0.1, 0.2], [0.3, 0.0], [0.04, 0.0], weight_max=None).status == "optimal"


@pytest.mark.parametrize(
    "terms",
    [
        {"edges": [math.nan, 1.0]},
        {"margin": [-0.1, 0.3]},
        {"daily": [0.1]},
        {"weight_min": -0.1},
        {"weight_max": math.nan},
        {"utilization": math.nan},
    ],
)
def test_what_is_no_programme(terms: Any) -> None:
    known: dict[str, Any] = {"edges": [0.1, 0.2], "margin": [0.3, 0.3], "daily": [0.04, 0.04]}
    with pytest.raises(InvalidError) as refused:
        programme(**(known | terms))
    assert refused.value.code == "out_of_range"


@st.composite
def programmes(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 8))

    def column(low: float, high: float) -> Any:
        return draw(st.lists(st.floats(low, high).map(lambda x: round(x, 4)), min_size=count, max_size=count))

    return {
        "edges": column(-0.5, 1.0),
        "margin": column(0.01, 1.0),
        "daily": column(0.0, 0.1),
        "leverage_cap": draw(st.floats(0.1, 4.0)),
        "weight_max": draw(st.floats(0.05, 1.0)),
    }


@given(case=programmes())
@DRAWN
def test_duality_proves_the_optimum(case: dict[str, Any]) -> None:
    """The prices are feasible in the dual programme and worth the same, so that no weights do better."""
    found = programme(**case)
    weights, cap = found.weights, case["weight_max"]
    edges, margin, daily = (np.array(case[name]) for name in ("edges", "margin", "daily"))
    assert weights.min() >= 0
    assert weights.max() <= cap
    assert margin @ weights <= 0.6 * (1 - 2 * daily @ weights) + 1e-9
    assert weights.sum() <= case["leverage_cap"] + 1e-9
    assert (weights[edges <= 0] == 0).all()
    prices = {(c.name, c.asset): c.shadow_price for c in found.constraints}
    weight_price = np.array([prices.get(("weight", f"A{i}"), 0.0) for i in range(len(edges))])
    covered = prices["margin", None] * (margin + 1.2 * daily) + prices["leverage", None] + weight_price
    assert (covered >= edges - 1e-7).all()
    worth = prices["margin", None] * 0.6 + prices["leverage", None] * case["leverage_cap"] + weight_price.sum() * cap
    assert worth == pytest.approx(found.edge, abs=1e-7)


@given(case=programmes(), more=st.floats(0.0, 1.0))
@DRAWN
def test_looser_limits_never_gain_less(case: dict[str, Any], more: float) -> None:
    base = programme(**case).edge
    for name in ("leverage_cap", "weight_max"):
        assert programme(**(case | {name: case[name] + more})).edge >= base - 1e-9


# --- one more position


def position(exposures: list[float], asset: int, side: Any, **terms: Any) -> PositionTerms:
    known: dict[str, Any] = {"equity": 100_000.0, "free_margin": 50_000.0, "max_leverage": 10.0}
    return PositionTerms(np.array(exposures), THREE, asset, side, **(known | terms))


def sized(terms: PositionTerms) -> Any:
    return size_position(terms)


def test_a_first_position_by_hand() -> None:
    """.50/.65 of equity; 60 % of what is free at 10x is 300,000."""
    found = sized(position([0.0, 0.0, 0.0], 0, 1))
    assert (found.notional, found.binding) == (pytest.approx(100_000 * 0.5 / 0.65), "volatility")
    assert found.margin_limit == pytest.approx(300_000)
    assert (found.volatility_before, found.volatility_after) == (0, pytest.approx(0.5))


def test_margin_binds() -> None:
    found = sized(position([0.0, 0.0, 0.0], 0, 1, signal=0.2))
    assert (found.notional, found.binding) == (pytest.approx(60_000), "margin")
    rated = sized(position([0.0, 0.0, 0.0], 0, 1, margin_rate=0.6))
    assert (rated.notional, rated.binding) == (pytest.approx(50_000), "margin")
    assert sized(position([0.0, 0.0, 0.0], 0, 1, signal=0.0)).notional == 0
    assert sized(position([0.0, 0.0, 0.0], 0, 1, free_margin=-5.0)).notional == 0


def test_correlation_leaves_less_room() -> None:
    free = sized(position([0.0, 0.0, 0.0], 1, 1)).notional
    held = sized(position([40_000.0, 0.0, 0.0], 1, 1)).notional
    hedge = sized(position([40_000.0, 0.0, 0.0], 1, -1)).notional
    assert free is not None
    assert held is not None
    assert hedge is not None
    assert held < free < hedge


def test_a_hedge_brings_a_portfolio_back() -> None:
    """Past the target: between two sizes the short brings it back; so does none of a long."""
    found = sized(position([100_000.0, 0.0, 0.0], 1, -1))
    assert found.volatility_before == pytest.approx(0.65)
    assert found.volatility_interval is not None
    low, high = found.volatility_interval
    assert 0 < low < found.calmest_notional < high
    assert found.calmest_notional == pytest.approx(0.82 * 0.65 / 0.80 * 100_000)
    assert (found.notional, found.least) == (pytest.approx(high), pytest.approx(low))
    short = sized(position([100_000.0, 0.0, 0.0], 1, -1, free_margin=1_000.0))
    assert (short.notional, short.binding, short.margin_limit) == (None, "margin", pytest.approx(6_000))
    long = sized(position([100_000.0, 0.0, 0.0], 1, 1))
    assert (long.notional, long.volatility_interval, long.calmest_notional) == (None, None, 0)


def test_a_hedge_that_is_not_enough() -> None:
    found = sized(position([100_000.0, 0.0, 0.0], 2, -1, target_volatility=0.2))
    assert (found.notional, found.binding) == (None, "volatility")
    assert 0.2 < found.calmest_volatility < 0.65


def test_what_has_no_risk_of_its_own() -> None:
    matrix = np.zeros((2, 2))
    matrix[0, 0] = 0.25
    terms = PositionTerms(np.array([50_000.0, 0.0]), matrix, 1, 1, 100_000.0, 10_000.0, 5.0)
    assert sized(terms).notional == pytest.approx(30_000)
    past = PositionTerms(np.array([150_000.0, 0.0]), matrix, 1, 1, 100_000.0, 10_000.0, 5.0)
    assert sized(past).notional is None


@pytest.mark.parametrize(
    "terms",
    [{"equity": 0.0}, {"equity": math.nan}, {"signal": 1.1}, {"max_leverage": 0.0}, {"target_volatility": -1.0}],
)
def test_what_is_not_sized(terms: dict[str, float]) -> None:
    with pytest.raises(InvalidError) as refused:
        sized(position([0.0, 0.0, 0.0], 0, 1, **terms))
    assert refused.value.code == "out_of_range"


@given(
    seed=st.integers(0, 9_999),
    asset=st.integers(0, 4),
    side=st.sampled_from((1, -1)),
    target=st.floats(0.05, 1.5),
    free=st.floats(0.0, 2e5),
)
@DRAWN
def test_the_largest_notional_is_the_largest(seed: int, asset: int, side: Any, target: float, free: float) -> None:
    """On a fine grid of notionals: what fits lies within the interval, and what lies within it fits."""
    matrix = covariance(5, seed)
    held = np.random.default_rng(seed).uniform(-8e4, 8e4, 5)
    terms = PositionTerms(held, matrix, asset, side, 1e5, free, 5.0, target_volatility=target)
    found = sized(terms)
    grid = np.linspace(0.0, 0.6 * free * 5.0, 400)
    moved = held[None, :] + side * grid[:, None] * np.eye(5)[asset]
    fits = np.sqrt(np.einsum("ki,ij,kj->k", moved, matrix, moved)) / 1e5 <= target
    if found.notional is None or found.least is None:
        assert not fits[:-1].any()
        return
    slack = 1e-6 * (1.0 + grid)
    inside = (grid >= found.least + slack) & (grid <= found.notional - slack)
    outside = (grid < found.least - slack) | (grid > found.notional + slack)
    assert fits[inside].all()
    assert not fits[outside].any()
    assert found.volatility_after is not None
    assert found.volatility_after <= target * (1 + 1e-9)


@given(seed=st.integers(0, 999), low=st.floats(0.05, 2.0), high=st.floats(0.05, 2.0))
@DRAWN
def test_a_higher_target_leaves_no_less(seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    held = np.random.default_rng(seed).uniform(-5e4, 5e4, 3).tolist()
    small, large = (sized(position(held, 0, 1, target_volatility=t)).notional for t in (low, high))
    assert small is None or (large is not None and large >= small * (1 - 1e-12))


def test_contributions_sum_to_the_volatility() -> None:
    weights = np.array([0.5, -0.3, 0.2])
    assert risk_contributions(weights, THREE).sum() == pytest.approx(portfolio_volatility(weights, THREE), rel=1e-12)
    assert risk_contributions(np.zeros(3), THREE).tolist() == [0, 0, 0]
