"""Simulated VaR against closed forms, scipy, and a second implementation that revalues path by path."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from app.domain.var.contributions import Deviations, monte_carlo_components, monte_carlo_parts, parametric_parts
from app.domain.var.monte_carlo import (
    Distribution,
    MonteCarloRisk,
    MonteCarloTerms,
    monte_carlo,
    moves_of,
    simulated_tails,
)
from app.domain.var.parametric import parametric
from app.domain.var.revalue import mixed_losses
from app.errors import InvalidError
from tests.domain.book import NOW, PRICES, Book, linear, option
from tests.domain.reference import Reference
from tests.domain.var_books import CURVED, DRAWN, NAMES, drawn_covariance, exposed, exposures, portfolio, seeds

BOOK = {"BTC": 30_000.0, "ETH": -12_000.0, "SOL": 8_000.0}
COVARIANCE = drawn_covariance(9, 3)
TWO = COVARIANCE[:2, :2]
DISTRIBUTIONS: tuple[Distribution, ...] = ("normal", "student_t")


def simulated(terms: MonteCarloTerms, **rows: float) -> MonteCarloRisk:
    return monte_carlo(exposed(rows or BOOK), COVARIANCE, terms)


@pytest.mark.parametrize("seed", range(25))
def test_a_linear_book_is_within_three_standard_errors_of_parametric(seed: int) -> None:
    """On fixed books: one in two hundred of ever new ones would lie beyond, and be right."""
    drawn = np.random.default_rng(seed)
    book, covariance = exposed(dict(zip(NAMES, drawn.normal(0.0, 40_000.0, 3), strict=True))), drawn_covariance(seed, 3)
    level, days = drawn.uniform(0.6, 0.995), float(drawn.choice([1.0, 10.0]))
    terms = MonteCarloTerms(seed, paths=20_000, confidences=(level,), horizon_days=days)
    ours = monte_carlo(book, covariance, terms).tails[0]
    exact = parametric(book.net, covariance, (level,), horizon_days=days).tails[0]
    assert abs(ours.value_at_risk - exact.value_at_risk) <= 3.0 * ours.var_standard_error
    assert abs(ours.expected_shortfall - exact.expected_shortfall) <= 3.0 * ours.es_standard_error


@pytest.mark.parametrize("degrees", [3.0, 5.0, 12.5])
def test_student_t_is_scipys_at_unit_variance(degrees: float) -> None:
    levels = (0.9, 0.95, 0.99)
    risk = simulated(MonteCarloTerms(4, 400_000, "student_t", degrees, levels))
    net = exposed(BOOK).net
    sigma = np.sqrt(net @ COVARIANCE @ net / 365.0)
    pnl = stats.t(degrees, scale=sigma * np.sqrt((degrees - 2.0) / degrees))
    for tail in risk.tails:
        quantile = pnl.ppf(tail.confidence)
        shortfall = pnl.expect(lambda x: x, lb=quantile, conditional=True)
        assert abs(tail.value_at_risk - quantile) <= 3.0 * tail.var_standard_error
        assert abs(tail.expected_shortfall - shortfall) <= 3.0 * tail.es_standard_error
    assert risk.degrees == degrees


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_standard_errors_are_the_deviations_of_many_runs(distribution: Distribution) -> None:
    terms = MonteCarloTerms(0, 10_000, distribution, confidences=(0.95,))
    runs = [simulated(replace(terms, seed=seed)).tails[0] for seed in range(200)]
    for figure, error in (("value_at_risk", "var_standard_error"), ("expected_shortfall", "es_standard_error")):
        seen = np.std([getattr(run, figure) for run in runs], ddof=1)
        assert np.mean([getattr(run, error) for run in runs]) == pytest.approx(seen, rel=0.15)


def test_normal_standard_error_of_var_is_the_asymptotic_one() -> None:
    tail = simulated_tails(np.random.default_rng(2).standard_normal(1_000_000), (0.99,))[0]
    assert tail.var_standard_error == pytest.approx(np.sqrt(0.99 * 0.01 / 1e6) / stats.norm.pdf(2.3263), rel=0.1)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("rows", [(), CURVED])
def test_a_seed_fixes_every_loss_whatever_the_threads(
    distribution: Distribution, rows: tuple[dict[str, float], ...]
) -> None:
    book = portfolio(*rows) if rows else exposed({"BTC": 3e4, "ETH": -1e4})
    terms = MonteCarloTerms(77, 150_000 if not rows else 90_000, distribution, threads=1)
    one, two = (monte_carlo(book, TWO, replace(terms, threads=n)) for n in (1, 2))
    assert np.array_equal(one.losses, two.losses)
    assert one.tails[0].value_at_risk == two.tails[0].value_at_risk
    other = monte_carlo(book, TWO, replace(terms, seed=78))
    assert not np.array_equal(one.losses, other.losses)
    assert (one.seed, one.paths, one.distribution) == (77, terms.paths, distribution)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_path_is_a_full_revaluation(distribution: Distribution) -> None:
    terms = MonteCarloTerms(5, 80_000, distribution, horizon_days=30.0)
    book, legs = portfolio(*CURVED), Reference(Book(rows=CURVED), NOW).whole
    risk = monte_carlo(book, TWO, terms)
    paths = np.concatenate([np.arange(0, 80_000, 1_999), np.argsort(-risk.losses)[:20]])
    for path, move in zip(paths, moves_of(TWO, paths, terms), strict=True):
        by_asset = dict(zip(("BTC", "ETH"), move, strict=True))
        expected = -sum(leg.change(by_asset[leg.underlying], 0.0) for leg in legs)
        assert risk.losses[path] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_many_options_are_revalued_in_parts() -> None:
    rows = tuple(
        option(name, "put", "short", 1.0, strike=PRICES[name] * (0.8 + i / 50), days=5 + i, iv=0.7)
        for i in range(20)
        for name in ("BTC", "ETH")
    )
    book, legs, terms = portfolio(*rows), Reference(Book(rows=rows), NOW).whole, MonteCarloTerms(9, 60_000)
    risk, moves = monte_carlo(book, TWO, terms), moves_of(TWO, np.arange(60_000), terms)
    for path in range(0, 60_000, 2_999):
        by_asset = dict(zip(("BTC", "ETH"), moves[path], strict=True))
        expected = -sum(leg.change(by_asset[leg.underlying], 0.0) for leg in legs)
        assert risk.losses[path] == pytest.approx(expected, rel=1e-9, abs=1e-6)
    weights = np.linspace(0.0, 1.0, 60_000)
    parts = [mixed_losses(book, moves[i : i + 6_000], weights[i : i + 6_000]) for i in range(0, 60_000, 6_000)]
    assert mixed_losses(book, moves, weights) == pytest.approx(sum(parts), rel=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_moves_have_the_covariance_that_was_asked_for(distribution: Distribution) -> None:
    terms = MonteCarloTerms(6, 300_000, distribution, horizon_days=10.0)
    moves = moves_of(COVARIANCE, np.arange(300_000), terms)
    assert moves.mean(axis=0) == pytest.approx(np.zeros(3), abs=5e-4)
    assert np.cov(moves.T) == pytest.approx(COVARIANCE * 10.0 / 365.0, rel=0.04)


def test_a_linear_book_and_its_paths_agree() -> None:
    terms = MonteCarloTerms(8, 50_000, "student_t")
    risk, moves = simulated(terms), moves_of(COVARIANCE, np.arange(50_000), terms)
    assert np.allclose(risk.losses, -moves @ exposed(BOOK).net, rtol=1e-4, atol=1e-2)


def test_options_of_a_small_book_lose_what_their_closed_form_says() -> None:
    # one long call loses most at the VaR quantile of its underlying, which is monotone in it
    call = option("BTC", "call", "long", 1.0, strike=60_000.0, days=30, iv=0.6)
    (leg,) = Reference(Book(rows=(call,)), NOW).whole
    covariance = np.array([[0.36]])
    tail = monte_carlo(portfolio(call), covariance, MonteCarloTerms(3, 400_000, confidences=(0.99,))).tails[0]
    exact = -leg.change(float(stats.norm.ppf(0.01)) * 0.6 / np.sqrt(365.0), 0.0)
    assert abs(tail.value_at_risk - exact) <= 3.0 * tail.var_standard_error
    # and an upper bound that no move can pass
    assert tail.expected_shortfall < leg.value()


def test_a_book_of_nothing_loses_nothing() -> None:
    tails = monte_carlo(portfolio(), np.zeros((0, 0)), MonteCarloTerms(1, 10_000)).tails
    assert {t.value_at_risk for t in tails} == {t.es_standard_error for t in tails} == {0.0}


def test_singular_covariances_can_be_drawn() -> None:
    twins = np.array([[0.25, 0.25], [0.25, 0.25]])
    flat = monte_carlo(exposed({"BTC": 1e4, "ETH": -1e4}), twins, MonteCarloTerms(1, 10_000))
    assert np.abs(flat.losses).max() < 1.0
    still = monte_carlo(exposed({"BTC": 1e4, "ETH": 1e4}), np.zeros((2, 2)), MonteCarloTerms(1, 10_000))
    assert still.tails[0].expected_shortfall == 0.0


def test_what_is_left_out_is_said() -> None:
    terms = MonteCarloTerms(1, 1_000)
    assert simulated(terms).not_modelled == ()
    assert monte_carlo(portfolio(*CURVED), TWO, terms).not_modelled == ("implied_volatility_moves", "passage_of_time")


# parts


@DRAWN
@given(exposures, seeds, st.sampled_from(DISTRIBUTIONS), st.booleans())
def test_parts_sum_to_the_total(rows: dict[str, float], seed: int, distribution: Distribution, curved: bool) -> None:
    lines = [linear(f"{n}-PERP", "long" if x > 0 else "short", abs(x) / 1e4) for n, x in rows.items()]
    book = portfolio(*lines, *(CURVED if curved else ()))
    covariance, terms = drawn_covariance(seed, 3), MonteCarloTerms(seed, 3_000, distribution)
    risk = monte_carlo(book, covariance, terms)
    for tail, parts in zip(risk.tails, monte_carlo_components(book, covariance, risk, terms), strict=True):
        for by in ("by_position", "by_underlying"):
            assert getattr(parts, f"var_{by}").sum() == pytest.approx(tail.value_at_risk, rel=1e-9, abs=1e-6)
            assert getattr(parts, f"es_{by}").sum() == pytest.approx(tail.expected_shortfall, rel=1e-9, abs=1e-6)


def test_parts_of_a_nearly_linear_book_are_parametric_ones() -> None:
    # a speck of gamma sends the book down the road of revaluation and of kernels
    book = portfolio(
        linear("BTC-PERP", "long", 0.5),
        linear("ETH-PERP", "short", 4.0),
        {"symbol": "SOL", "notional": 8_000.0, "delta": 1.0, "gamma": 1e-9},
    )
    terms = MonteCarloTerms(12, 400_000, confidences=(0.95,))
    risk = monte_carlo(book, COVARIANCE, terms)
    (parts,) = monte_carlo_components(book, COVARIANCE, risk, terms)
    exact = parametric(book.net, COVARIANCE, (0.95,)).tails[0]
    expected = parametric_parts(Deviations(book, COVARIANCE, 1.0), exact).components
    assert parts.rule == "kernel"
    near = 0.02 * exact.value_at_risk
    assert parts.es_by_position == pytest.approx(expected.es_by_position, abs=near)
    assert parts.var_by_underlying == pytest.approx(expected.var_by_underlying, abs=2.0 * near)
    (whole,) = monte_carlo_parts(book, COVARIANCE, risk, terms)
    exactly = parametric_parts(Deviations(book, COVARIANCE, 1.0), exact)
    assert whole.marginal_es * book.net == pytest.approx(exactly.marginal_es * book.net, abs=near)
    assert whole.marginal_var * book.net == pytest.approx(exactly.marginal_var * book.net, abs=2.0 * near)
    assert np.isnan(whole.incremental_var_by_position).all()


def test_shortfalls_parts_are_the_mean_losses_of_the_tail() -> None:
    book, legs = portfolio(*CURVED), Reference(Book(rows=CURVED), NOW).whole
    terms = MonteCarloTerms(2, 2_000, confidences=(0.99,))
    risk = monte_carlo(book, TWO, terms)
    (parts,) = monte_carlo_components(book, TWO, risk, terms)
    worst = moves_of(TWO, np.argsort(-risk.losses)[:20], terms)
    column = {"BTC": 0, "ETH": 1}
    expected = [-np.mean([leg.change(float(m[column[leg.underlying]]), 0.0) for m in worst]) for leg in legs]
    assert parts.es_by_position == pytest.approx(expected, rel=1e-9)


# shapes


@DRAWN
@given(exposures, exposures, seeds, st.sampled_from(DISTRIBUTIONS), st.floats(0.55, 0.99))
def test_shortfall_is_subadditive_on_the_same_draws(
    first: dict[str, float], second: dict[str, float], seed: int, distribution: Distribution, level: float
) -> None:
    terms = MonteCarloTerms(seed, 4_000, distribution, confidences=(level,))
    whole, one, other = (
        simulated(terms, **rows).tails[0].expected_shortfall
        for rows in ({n: first[n] + second[n] for n in NAMES}, first, second)
    )
    assert whole <= one + other + 1e-6 * (1.0 + abs(one) + abs(other))


@DRAWN
@given(seeds, st.sampled_from(DISTRIBUTIONS), st.tuples(st.floats(0.51, 0.999), st.floats(0.51, 0.999)))
def test_shapes_of_risk(seed: int, distribution: Distribution, levels: tuple[float, float]) -> None:
    terms = MonteCarloTerms(seed, 5_000, distribution, confidences=sorted(levels))
    low, high = simulated(terms).tails
    assert low.value_at_risk <= high.value_at_risk
    assert all(t.expected_shortfall >= t.value_at_risk for t in (low, high))
    later = simulated(replace(terms, horizon_days=4.0)).tails
    assert later[1].value_at_risk == pytest.approx(2.0 * high.value_at_risk, rel=1e-5)
    double = simulated(terms, **{name: 2.0 * usd for name, usd in BOOK.items()}).tails
    assert double[0].expected_shortfall == pytest.approx(2.0 * low.expected_shortfall, rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"paths": 999},
        {"paths": 1_000_001},
        {"seed": -1},
        {"seed": 2**63},
        {"distribution": "student_t", "degrees": 2.0},
        {"confidences": (0.4,)},
        {"horizon_days": 0.0},
    ],
)
def test_terms_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidError) as refused:
        simulated(replace(MonteCarloTerms(1), **changes))
    assert refused.value.errors[0].pointer.split("/")[1] in changes
