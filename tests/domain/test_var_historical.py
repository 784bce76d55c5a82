"""Historical simulation against other libraries, published cases and a second implementation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skfolio.measures import cvar, value_at_risk

from app.domain.black76 import Floats
from app.domain.panel import Panel
from app.domain.var.contributions import historical_components, historical_parts
from app.domain.var.historical import HistoricalMethod, HistoricalRisk, HistoricalTerms, historical
from app.domain.var.tail import age_weights, sample_tails, weighted_tails
from app.domain.var.volatility import rescaled
from app.errors import InvalidError
from tests.domain.book import NOW, PRICES, Book, Row, linear
from tests.domain.closes import needs_closes, panel
from tests.domain.reference import Reference
from tests.domain.var_books import (
    CURVED,
    DRAWN,
    NAMES,
    confidences,
    drawn_history,
    exposed,
    exposures,
    history,
    of_losses,
    portfolio,
    seeds,
)

METHODS: tuple[HistoricalMethod, ...] = ("plain", "age_weighted", "filtered")


@DRAWN
@given(st.integers(60, 700), confidences, seeds)
def test_the_quantile_is_numpys(days: int, level: float, seed: int) -> None:
    losses = np.random.default_rng(seed).standard_t(3, days)
    (tail,) = sample_tails(losses, (level,))
    assert tail.value_at_risk == pytest.approx(-np.quantile(-losses, 1.0 - level), rel=1e-7, abs=1e-7)
    assert tail.expected_shortfall == pytest.approx(losses[losses >= tail.value_at_risk].mean(), rel=1e-9)


@pytest.mark.parametrize(("days", "level"), [(101, 0.99), (501, 0.99), (501, 0.95), (201, 0.975), (1001, 0.9)])
def test_var_at_a_whole_rank_is_skfolios(days: int, level: float) -> None:
    # skfolio takes the lower quantile: the same loss where (n-1)(1-c) is whole and nothing is interpolated
    returns = np.random.default_rng(days).standard_t(4, days) * 0.02
    risk = of_losses(-10_000.0 * returns, confidences=(level,))
    assert risk.tails[0].value_at_risk == pytest.approx(10_000.0 * value_at_risk(returns, level), rel=1e-12)


@pytest.mark.parametrize(("days", "level"), [(100, 0.99), (500, 0.99), (500, 0.95), (200, 0.975), (1000, 0.9)])
def test_shortfall_of_a_whole_number_of_days_is_skfolios(days: int, level: float) -> None:
    returns = np.random.default_rng(days).standard_t(4, days) * 0.02
    risk = of_losses(-10_000.0 * returns, confidences=(level,))
    assert risk.tails[0].expected_shortfall == pytest.approx(10_000.0 * cvar(returns, level), rel=1e-12)


def test_by_hand() -> None:
    losses = np.random.default_rng(1).permutation(np.arange(1.0, 102.0))
    tails = of_losses(losses, confidences=(0.95, 0.975, 0.99)).tails
    assert [t.value_at_risk for t in tails] == pytest.approx([96.0, 98.5, 100.0])
    assert [t.expected_shortfall for t in tails] == pytest.approx([98.5, 100.0, 100.5])  # 96-101, 99-101, 100-101


def test_a_book_of_nothing_loses_nothing() -> None:
    days = closes(100).history(())
    tails = historical(portfolio(), days, HistoricalTerms()).tails
    assert [t.expected_shortfall for t in tails] == [0.0, 0.0]


def test_a_book_that_only_gains_has_a_negative_var() -> None:
    assert of_losses(-np.arange(1.0, 101.0)).tails[0].value_at_risk < 0.0


# age-weighted: Boudoukh, Richardson & Whitelaw 1998; the example of Allen, Boudoukh & Saunders 2004, ch. 2


def published(shift: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return 100 losses in percent: the six worst at their published ages, the others small."""
    losses = np.linspace(-2.0, 2.0, 100)
    for age, loss in ((3, 3.3), (2, 2.9), (65, 2.7), (45, 2.5), (5, 2.4), (30, 2.3)):
        losses[100 - age - shift] = loss
    return losses


def test_published_weights() -> None:
    weights = age_weights(100, 0.98)
    ages = [3, 2, 65, 45, 5, 30]
    assert weights[[100 - age for age in ages]] == pytest.approx(
        [0.0221, 0.0226, 0.0063, 0.0095, 0.0213, 0.0128], abs=5e-5
    )
    assert weights.sum() == pytest.approx(1.0)


def test_published_hybrid_var() -> None:
    tail = of_losses(published(), confidences=(0.95,), method="age_weighted", age_decay=0.98).tails[0]
    # 2.80 - (2.80 - 2.60) x (.05 - .0447)/(.0511 - .0447)
    assert tail.value_at_risk == pytest.approx(2.63, abs=5e-3)
    # the two worst lie beyond it, and 2.70
    weights = np.array([0.02214, 0.02260, 0.00633])
    assert tail.expected_shortfall == pytest.approx(weights @ [3.3, 2.9, 2.7] / weights.sum(), abs=1e-3)


def test_equal_weights_give_the_published_plain_var() -> None:
    losses = published()
    (tail,) = weighted_tails(losses, np.full(100, 0.01), (0.95,))
    assert tail.value_at_risk == pytest.approx(2.35)  # halfway between the fifth and the sixth


@DRAWN
@given(seeds, st.floats(0.9, 0.999), confidences)
def test_the_weighted_quantile_is_linear_between_midpoints(seed: int, decay: float, level: float) -> None:
    losses = np.random.default_rng(seed).standard_t(3, 80)
    (tail,) = weighted_tails(losses, age_weights(80, decay), (level,))
    pairs = sorted(zip(losses, age_weights(80, decay), strict=True), reverse=True)
    points, total = [(0.0, pairs[0][0])], 0.0
    for (here, weight), (after, _) in itertools.pairwise(pairs):
        total += weight
        points.append((total, (here + after) / 2))
    points.append((1.0, pairs[-1][0]))
    weights, midpoints = np.array(points).T
    assert tail.value_at_risk == pytest.approx(np.interp(1.0 - level, weights, midpoints), rel=1e-9, abs=1e-9)
    mixed = tail.var_mix.weights @ losses[tail.var_mix.rows]
    assert mixed == pytest.approx(tail.value_at_risk, rel=1e-9, abs=1e-9)


def test_a_fresh_worst_day_is_the_var_of_the_far_tail() -> None:
    losses = np.linspace(0.0, 1.0, 100)
    losses[-1] = 50.0
    tail = of_losses(losses, confidences=(0.99999,), method="age_weighted").tails[0]
    assert tail.value_at_risk == pytest.approx(50.0, rel=0.02)
    assert tail.expected_shortfall >= tail.value_at_risk


# filtered: Hull & White 1998


def test_filtered_returns_by_hand() -> None:
    rng = np.random.default_rng(8)
    returns = rng.standard_normal(120) * np.linspace(0.01, 0.05, 120)
    variance = np.var(returns, ddof=1)
    seen = []
    for r in returns:
        seen.append(math.sqrt(variance))
        variance = 0.94 * variance + 0.06 * r * r
    expected = [r * math.sqrt(variance) / sigma for r, sigma in zip(returns, seen, strict=True)]
    assert rescaled(returns, 0.94) == pytest.approx(expected, rel=1e-12)
    risk = of_losses(-10_000.0 * returns, method="filtered", confidences=(0.95,))
    assert risk.tails[0].value_at_risk == pytest.approx(-10_000.0 * np.quantile(expected, 0.05), rel=1e-9)
    assert risk.decay == 0.94


def test_filtered_var_is_above_plain_after_a_storm_and_below_in_calm() -> None:
    rng = np.random.default_rng(4)
    calm, storm = 0.01 * rng.standard_normal(400), 0.06 * rng.standard_normal(60)
    for first, second, above in ((calm, storm, True), (storm, calm, False)):
        losses = 10_000.0 * np.concatenate([first, second])
        plain, filtered = (of_losses(losses, method=m).tails[1].value_at_risk for m in ("plain", "filtered"))
        assert (filtered > plain) is above


def test_an_asset_that_never_moves_can_be_filtered() -> None:
    moves = history(np.column_stack([drawn_history(1).returns[:, 0], np.zeros(250)]), "BTC", "ETH")
    risk = historical(exposed({"BTC": 1e4, "ETH": 1e4}), moves, HistoricalTerms(method="filtered"))
    assert np.isfinite(risk.losses).all()


def test_a_rescaled_crash_leaves_a_millionth_of_the_price() -> None:
    returns = np.full(200, 0.001)
    returns[10], returns[-5:] = -0.8, [-0.3, 0.4, -0.3, 0.4, -0.3]
    risk = historical(exposed({"BTC": 1e4}), history(returns, "BTC"), HistoricalTerms(method="filtered"))
    assert risk.losses.max() == pytest.approx(1e4, rel=2e-6)


# the book


@pytest.mark.parametrize("method", METHODS)
def test_every_day_is_a_full_revaluation(method: HistoricalMethod) -> None:
    whole = Book(rows=CURVED)
    days = drawn_history(3, 90, "BTC", "ETH")
    risk = historical(portfolio(*CURVED), days, HistoricalTerms(method=method))
    for move, loss in zip(risk.moves, risk.losses, strict=True):
        by_asset = dict(zip(days.assets, move, strict=True))
        expected = sum(leg.change(by_asset[leg.underlying], 0.0) for leg in Reference(whole, NOW).whole)
        assert loss == pytest.approx(-expected, rel=1e-9, abs=1e-6)


@DRAWN
@given(exposures, seeds, st.sampled_from(METHODS), st.sampled_from([1.0, 10.0]))
def test_parts_sum_to_the_total(rows: dict[str, float], seed: int, method: HistoricalMethod, days: float) -> None:
    book = portfolio(*CURVED, *(linear(f"{n}-PERP", "long", abs(x) / 1e4) for n, x in rows.items()))
    terms = HistoricalTerms((0.9, 0.99), days, method)
    risk = historical(book, drawn_history(seed, 120), terms)
    for tail, parts in zip(risk.tails, historical_components(book, risk), strict=True):
        for by in ("by_position", "by_underlying"):
            assert getattr(parts, f"var_{by}").sum() == pytest.approx(tail.value_at_risk, rel=1e-9, abs=1e-6)
            assert getattr(parts, f"es_{by}").sum() == pytest.approx(tail.expected_shortfall, rel=1e-9, abs=1e-6)


def test_shortfalls_parts_are_the_mean_losses_of_the_tail() -> None:
    whole, days = Book(rows=CURVED), drawn_history(11, 200, "BTC", "ETH")
    book = portfolio(*CURVED)
    risk = historical(book, days, HistoricalTerms((0.95,)))
    worst = np.argsort(-risk.losses)[:10]  # (200-1)(1-.95) = 9.95: ten days
    legs = Reference(whole, NOW).whole
    expected = [
        -np.mean([leg.change(float(risk.moves[t, days.assets.index(leg.underlying)]), 0.0) for t in worst])
        for leg in legs
    ]
    (parts,) = historical_components(book, risk)
    assert parts.es_by_position == pytest.approx(expected, rel=1e-9)


PARTED = (*CURVED, linear("SOL-PERP", "short", 30.0))
FLAT = tuple(linear(f"{name}-PERP", "long", 0.0) for name in NAMES)
"""What keeps every underlying in a book that lost its positions."""


def _risk(method: HistoricalMethod, *rows: Row) -> HistoricalRisk:
    return historical(portfolio(*rows), drawn_history(5, 150), HistoricalTerms((0.9, 0.99), 4.0, method))


def _figures(risk: HistoricalRisk) -> Floats:
    return np.array([(tail.value_at_risk, tail.expected_shortfall) for tail in risk.tails])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_marginal_figures_are_the_slopes(method: HistoricalMethod, name: str) -> None:
    cents = 0.01
    more, less = (
        _figures(_risk(method, *PARTED, linear(f"{name}-PERP", side, cents / PRICES[name])))
        for side in ("long", "short")
    )
    parts = historical_parts(portfolio(*PARTED), _risk(method, *PARTED))
    found = [(part.marginal_var[NAMES.index(name)], part.marginal_es[NAMES.index(name)]) for part in parts]
    assert np.array(found) == pytest.approx((more - less) / (2.0 * cents), abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_incremental_var_is_the_difference_of_two_books(method: HistoricalMethod) -> None:
    risk = _risk(method, *PARTED)
    parts = historical_parts(portfolio(*PARTED), risk)

    def fall(*left: Row) -> Floats:
        return (_figures(risk) - _figures(_risk(method, *left, *FLAT)))[:, 0]

    by_position = [part.incremental_var_by_position for part in parts]
    by_underlying = [part.incremental_var_by_underlying for part in parts]
    falls = [fall(*PARTED[:i], *PARTED[i + 1 :]) for i in range(len(PARTED))]
    assert np.array(by_position) == pytest.approx(np.transpose(falls), rel=1e-9, abs=1e-6)
    # rows 0 and 2 are on BTC, 1 and 3 on ETH, 4 on SOL
    falls = [fall(PARTED[1], PARTED[3], PARTED[4]), fall(PARTED[0], PARTED[2], PARTED[4]), fall(*CURVED)]
    assert np.array(by_underlying) == pytest.approx(np.transpose(falls), rel=1e-9, abs=1e-6)


@DRAWN
@given(exposures, exposures, seeds, confidences)
def test_plain_shortfall_is_subadditive(
    first: dict[str, float], second: dict[str, float], seed: int, level: float
) -> None:
    days, terms = drawn_history(seed, 150), HistoricalTerms((level,))

    def shortfall(rows: dict[str, float]) -> float:
        return historical(exposed(rows), days, terms).tails[0].expected_shortfall

    joined = shortfall({name: first[name] + second[name] for name in NAMES})
    assert joined <= shortfall(first) + shortfall(second) + 1e-6


def test_tied_losses_leave_shortfall_subadditive() -> None:
    # with every loss tied with VaR in the mean, each part's ES would be 1/150 and their sum's 1
    falls = np.zeros((150, 2))
    falls[0, 0] = falls[1, 1] = -1e-4
    days = history(falls, "BTC", "ETH")

    def shortfall(**rows: float) -> float:
        return historical(exposed(rows), days, HistoricalTerms((0.99,))).tails[0].expected_shortfall

    joined = shortfall(BTC=1e4, ETH=1e4)
    assert joined == pytest.approx(1.0)
    assert joined <= shortfall(BTC=1e4, ETH=0.0) + shortfall(BTC=0.0, ETH=1e4) + 1e-9


@DRAWN
@given(seeds, st.sampled_from(METHODS), st.tuples(confidences, confidences), st.floats(0.1, 30.0))
def test_shapes_of_risk(seed: int, method: HistoricalMethod, levels: tuple[float, float], factor: float) -> None:
    days = drawn_history(seed, 100, "BTC", "ETH")
    low, high = sorted(levels)
    terms = HistoricalTerms((low, high), method=method)
    book = {"BTC": 7e3, "ETH": -4e3}
    risk = historical(exposed(book), days, terms)
    assert risk.tails[0].value_at_risk <= risk.tails[1].value_at_risk
    assert all(t.expected_shortfall >= t.value_at_risk for t in risk.tails)
    grown = historical(exposed({k: factor * v for k, v in book.items()}), days, terms)
    assert grown.tails[1].value_at_risk == pytest.approx(factor * risk.tails[1].value_at_risk, rel=1e-9)
    ten = historical(exposed(book), days, replace(terms, horizon_days=10.0))
    assert ten.tails[0].expected_shortfall == pytest.approx(math.sqrt(10) * risk.tails[0].expected_shortfall)
    assert (risk.horizon_rule, ten.horizon_rule) == ("one_day", "square_root_of_time")


# histories


def test_short_histories_are_named() -> None:
    with pytest.raises(InvalidError) as refused:
        historical(exposed({"BTC": 1e4, "ETH": 1e4}), drawn_history(1, 59, "BTC", "ETH"), HistoricalTerms())
    assert refused.value.code == "missing_history"
    assert [e.pointer for e in refused.value.errors] == ["/history/BTC", "/history/ETH"]
    assert refused.value.figures["history"]["BTC"] == {"days": 59, "required": 60}


def closes(days: int, gap: int | None = None) -> Panel:
    dates = np.datetime64("2025-01-01") + np.arange(days + 1)
    prices = np.exp(np.cumsum(0.03 * np.random.default_rng(1).standard_normal((days + 1, 3)), axis=0))
    prices[:150, 2] = np.nan
    if gap is not None:
        prices, dates = np.delete(prices, gap, axis=0), np.delete(dates, gap)
    return Panel.from_closes(NAMES, dates.astype("datetime64[D]"), prices)


def test_only_what_is_short_is_named() -> None:
    known = closes(200)
    assert len(known.history(("ETH", "BTC"), 180)) == 180
    for names, missing in (
        (NAMES, {"SOL": 50}),
        (("BTC", "XRP"), {"XRP": 0}),
        (("DOGE", "SOL"), {"DOGE": 0, "SOL": 50}),
    ):
        with pytest.raises(InvalidError) as refused:
            known.history(names)
        assert {k: v["days"] for k, v in refused.value.figures["history"].items()} == missing


def test_days_in_common_count() -> None:
    full = drawn_history(1, 100, "BTC", "ETH")
    returns = full.returns.copy()
    returns[:30, 0] = returns[70:, 1] = np.nan
    with pytest.raises(InvalidError, match="in common") as refused:
        Panel(full.assets, full.dates, returns).history(full.assets)
    assert {k: v["days"] for k, v in refused.value.figures["history"].items()} == {"BTC": 70, "ETH": 70}


def test_a_window_is_the_last_days_in_the_order_asked_for() -> None:
    known = closes(300)
    window = known.history(("SOL", "BTC"), 100)
    assert window.returns == pytest.approx(known.returns[-100:, [2, 0]])
    assert (window.dates[-1] - window.dates[0]).astype(int) == 99
    assert len(known.history(NAMES)) == 150


def test_a_return_over_a_gap_is_no_daily_return() -> None:
    whole, holed = closes(300), closes(300, gap=250)
    assert np.isnan(holed.returns[249]).all()
    assert len(holed.history(("BTC",), 400)) == len(whole.history(("BTC",), 400)) - 2


def test_bad_panels_and_windows_are_refused() -> None:
    dates = np.datetime64("2025-01-01") + np.arange(3)
    with pytest.raises(InvalidError) as refused:
        Panel.from_closes(("BTC", "ETH"), dates, np.array([[1.0, 1.0], [2.0, 0.0], [3.0, 1.0]]))
    assert refused.value.errors[0].pointer == "/history/ETH"
    with pytest.raises(InvalidError):
        Panel(("BTC",), dates, np.array([[0.1], [-1.0], [0.0]]))
    with pytest.raises(InvalidError, match="window"):
        closes(300).history(("BTC",), 59)
    with pytest.raises(ValueError, match="returns of"):
        historical(exposed({"BTC": 1.0}), drawn_history(1, 100, "ETH"), HistoricalTerms())


@pytest.mark.parametrize(
    "changes", [{"age_decay": 1.0, "method": "age_weighted"}, {"volatility_decay": 0.0, "method": "filtered"}]
)
def test_decays_are_checked(changes: dict[str, float | HistoricalMethod]) -> None:
    with pytest.raises(InvalidError, match="decay"):
        of_losses(np.arange(100.0), **changes)


@needs_closes
@pytest.mark.parametrize("name", ["BTC", "ETH", "SOL"])
def test_real_days_against_numpy_and_skfolio(name: str) -> None:
    days = panel().history((name,), 500)
    (tail,) = historical(exposed({name: 1e4}), days, HistoricalTerms((0.99,))).tails
    assert tail.value_at_risk == pytest.approx(-1e4 * np.quantile(days.returns[:, 0], 0.01), rel=1e-9)
    assert tail.expected_shortfall == pytest.approx(1e4 * cvar(days.returns[:, 0], 0.99), rel=1e-9)
