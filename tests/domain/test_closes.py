"""Which closes look wrong: planted errors in real and drawn series, and the deviation against scipy's."""

from __future__ import annotations

import csv
import math
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from app.domain.closes import Gap, missing_days, outliers, robust_deviation

CLOSES = Path(__file__).resolve().parents[2] / "../shared/data/crypto_daily_closes.csv"
DRAWN = settings(max_examples=100, deadline=None, derandomize=True)
START = date(2024, 1, 1)


def rows(closes: np.ndarray, known: int = 0, **terms: float) -> list[int]:
    """Return which closes of consecutive days are off; the first `known` are stored."""
    days, stored = np.arange(float(len(closes))), np.arange(len(closes)) < known
    return [o.row for o in outliers(days, closes, stored, **terms)]


def walk(count: int, seed: int = 0, daily: float = 0.02) -> np.ndarray:
    moves = np.random.default_rng(seed).normal(0.0, daily, count)
    path: np.ndarray = 100.0 * np.exp(np.cumsum(moves))
    return path


@given(closes=st.lists(st.floats(0.5, 2.0), min_size=21, max_size=60))
@DRAWN
def test_the_deviation_is_scipys(closes: list[float]) -> None:
    days, prices = np.arange(float(len(closes))), np.array(closes)
    moves = np.diff(np.log(prices))
    expected = median_abs_deviation(np.concatenate([moves, -moves]), scale=1 / 1.4826)  # about a median of 0
    assert robust_deviation(days, prices) == pytest.approx(max(0.002, expected), rel=1e-9)
    assert robust_deviation(days[:20], prices[:20]) is None


def test_returns_over_several_days_count_by_the_root() -> None:
    closes = walk(400)
    every = np.arange(0.0, 1_600.0, 4.0)
    assert robust_deviation(every, closes) == pytest.approx((robust_deviation(np.arange(400.0), closes) or 0) / 2)


@given(seed=st.integers(0, 999), row=st.integers(1, 118), factor=st.sampled_from((0.01, 0.1, 0.5, 2.0, 10.0)))
@DRAWN
def test_one_wrong_close_is_found_and_nothing_else(seed: int, row: int, factor: float) -> None:
    closes = walk(120, seed)
    assert rows(closes) == []
    closes[row] *= factor
    assert rows(closes) == [row]
    assert rows(closes, known=row) == [row]


def test_of_a_new_level_only_the_first_day_is_off() -> None:
    closes = walk(100)
    closes[50:] *= 3.0
    assert rows(closes) == [50]
    closes[80:] /= 3.0
    assert rows(closes) == [50, 80]


def test_wrong_closes_in_a_row_at_different_levels() -> None:
    closes = walk(60)
    closes[30:33] *= [10.0, 0.1, 10.0]
    assert rows(closes) == [30, 31, 32]


def test_what_is_stored_is_never_off() -> None:
    closes = walk(60)
    closes[30] *= 10.0
    assert rows(closes, known=60) == []
    assert rows(closes, known=30) == [30]


def test_a_close_before_what_is_stored_is_held_against_it() -> None:
    closes = walk(60)
    days = np.arange(60.0)
    closes[:10] /= 100.0
    assert [o.row for o in outliers(days, closes, days >= 10)] == [9]


def test_the_first_closes_of_an_asset() -> None:
    assert rows(np.array([5.0])) == []
    assert rows(np.array([100.0, 161.0])) == []  # ln 1.61 = .476 of .48
    assert rows(np.array([100.0, 162.0])) == [1]
    assert rows(np.array([100.0, 162.0]), deviations_max=13.0) == []
    far = outliers(np.array([0.0, 4.0]), np.array([100.0, 300.0]), np.array([True, False]))
    assert [o.row for o in far] == [1]
    assert far[0].deviations == pytest.approx(math.log(3) / (0.04 * 2))


@pytest.mark.parametrize(
    "closes", [100.0 + np.arange(60.0), 100.0 + np.arange(60.0) % 3, 100.0 * 1.05 ** np.arange(60.0), 1 + np.ones(60)]
)
def test_regular_series_are_not_off(closes: np.ndarray) -> None:
    assert rows(closes) == []


def test_a_coin_that_stands_still_may_move_a_little() -> None:
    closes = np.ones(60)
    closes[-1] = 0.99
    assert rows(closes) == []
    closes[-1] = 0.97
    assert rows(closes) == [59]


@given(seed=st.integers(0, 99), low=st.floats(1.0, 20.0), high=st.floats(1.0, 20.0))
@DRAWN
def test_more_deviations_flag_no_more_of_a_day_after_good_ones(seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    closes = walk(80, seed)
    closes[-1] *= 1.2
    assert set(rows(closes, known=79, deviations_max=high)) <= set(rows(closes, known=79, deviations_max=low))


@pytest.mark.skipif(not CLOSES.exists(), reason=f"no closes at {CLOSES}")
@pytest.mark.parametrize("asset", ["BTC", "ETH", "SOL", "BNB"])
def test_real_closes(asset: str) -> None:
    """All of them pass at once, and so does each day after the half year before it; errors of a factor 2 do not."""
    with CLOSES.open() as lines:
        closes = np.array([float(row[asset]) for row in csv.DictReader(lines)])
    assert rows(closes) == []
    asked = [t for t in range(180, len(closes)) if rows(closes[t - 180 : t + 1], known=180)]
    assert len(asked) <= 1
    for row in range(100, len(closes) - 1, 97):
        wrong = closes.copy()
        wrong[row] *= 2.0
        assert rows(wrong) in ([row], [row, row + 1])


def test_gaps() -> None:
    days = [START + timedelta(days=k) for k in (0, 1, 3, 4, 9)]
    assert missing_days("X", days) == [
        Gap("X", date(2024, 1, 3), date(2024, 1, 3)),
        Gap("X", date(2024, 1, 6), date(2024, 1, 9)),
    ]
    assert [gap.days for gap in missing_days("X", days)] == [1, 4]
    assert missing_days("X", []) == []
