"""Replays of the past: on a hand-made panel, and on real closes against plain Python."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest

from app.domain.panel import Panel, panel_of_closes
from app.domain.quote import account_figures
from app.domain.replay import replay
from app.errors import InvalidError
from tests.domain.book import NOW, Book, book, linear, option
from tests.domain.test_stress import P, account_of, terms_of

CLOSES = Path(__file__).resolve().parents[2] / "../shared/data/crypto_daily_closes.csv"
FIRST = date(2024, 1, 1)


def panel(names: Sequence[str], rows: Sequence[Sequence[float]]) -> Panel:
    return Panel(tuple(names), np.datetime64(FIRST) + np.arange(len(rows)), np.array(rows))


def day(t: int) -> date:
    return FIRST + timedelta(days=t)


def test_the_worst_days_come_first_and_are_the_account_at_them() -> None:
    whole = book(
        linear("BTC-PERP", "long", 1.0),
        option("ETH", "call", "short", 10.0, 3_000.0, 20, 0.7),
        held={"USDC": 40_000.0, "SOL": 100.0},
        prices=P,
    )
    rows = [[0.01, 0.0, 0.05], [-0.10, -0.08, 0.0], [0.0, 0.30, 0.10], [-0.02, 0.01, -0.30]]
    found = replay(account_of(whole), panel(("BTC", "ETH", "SOL"), rows), count=4)
    equity = {}
    for t, moves in enumerate(rows):
        at = whole.moved(dict(zip(("BTC", "ETH", "SOL"), moves, strict=True)))
        equity[day(t)] = account_figures(terms_of(at), {}, NOW).equity
    assert found.first == found.last == tuple(sorted(equity, key=lambda d: equity[d]))
    assert found.stressed.equity == pytest.approx([equity[d] for d in found.first])


def test_weeks_compound_seven_days_and_share_none() -> None:
    returns = np.random.default_rng(8).normal(0, 0.04, 40).tolist()
    whole = book(linear("BTC-PERP", "short", 1.0), held={"USDC": 100_000.0}, prices=P)
    found = replay(account_of(whole), panel(("BTC",), [[r] for r in returns]), window_days=7, count=3)
    weeks = {t: math.prod(1 + r for r in returns[t : t + 7]) - 1 for t in range(34)}
    expected: list[int] = []
    for t in sorted(weeks, key=lambda t: -weeks[t]):
        if all(abs(t - other) >= 7 for other in expected):
            expected.append(t)
    assert found.first == tuple(day(t) for t in expected[:3])
    assert found.last == tuple(day(t + 6) for t in expected[:3])
    btc = found.stressed.names.index("BTC")
    assert found.moves[btc] == pytest.approx([weeks[t] for t in expected[:3]])
    assert found.stressed.pnl == pytest.approx([-60_000 * weeks[t] for t in expected[:3]])


def test_an_asset_without_that_days_history_is_named_and_stands_still() -> None:
    nan = math.nan
    whole = book(linear("BTC-PERP", "long", 1.0), held={"USDC": 9_000.0, "SOL": 100.0, "ETH": 1.0}, prices=P)
    found = replay(account_of(whole), panel(("SOL", "BTC"), [[nan, -0.2], [-0.1, -0.1], [-0.3, nan], [nan, nan]]))
    assert found.first == (day(0), day(1), day(2))
    assert found.missing == (("ETH", "SOL"), ("ETH",), ("BTC", "ETH"))
    assert found.stressed.pnl == pytest.approx([-12_000.0, -6_000.0, 0.0])
    assert found.stressed.collateral_change == pytest.approx([0.0, -100 * 150 * 0.85 * 0.1, -100 * 150 * 0.85 * 0.3])


def test_a_stablecoin_moves_as_it_did_where_its_history_is_known() -> None:
    whole = book(linear("BTC-PERP", "long", 0.1), held={"USDC": 9_000.0, "USDT": 1_000.0}, prices=P)
    found = replay(account_of(whole), panel(("BTC", "USDC"), [[-0.01, 0.0], [0.0, -0.12]]), count=1)
    assert found.first == (day(1),)
    assert found.missing == ((),)
    assert found.stressed.collateral_change == pytest.approx([-1_080.0])


@pytest.mark.parametrize(
    ("rows", "window"), [([[math.nan]], 1), ([[0.01]] * 6, 7), ([[0.01]] * 6 + [[math.nan]] + [[0.01]] * 6, 7)]
)
def test_no_history_at_all_is_an_error_that_names_the_assets(rows: list[list[float]], window: int) -> None:
    whole = book(linear("BTC-PERP", "long", 1.0), held={"USDC": 1.0, "SOL": 1.0}, prices=P)
    with pytest.raises(InvalidError) as error:
        replay(account_of(whole), panel(("BTC",), rows), window_days=window)
    assert error.value.code == "missing_history"
    assert "BTC, SOL" in error.value.detail


@pytest.mark.skipif(not CLOSES.exists(), reason=f"no closes at {CLOSES}")
@pytest.mark.parametrize("window", [1, 7])
@pytest.mark.parametrize(
    "exposures",
    [{"BTC": 1e5}, {"SOL": -1e4}, {"BTC": 1e4, "ETH": -8e3}, {"BTC": 1e4, "ETH": 1e4, "SOL": 1e4, "BNB": 1e4}],
)
def test_the_worst_of_real_history(exposures: dict[str, float], window: int) -> None:
    with CLOSES.open() as lines:
        rows = list(csv.DictReader(lines))
    closes = {name: {date.fromisoformat(r["date"]): float(r[name]) for r in rows} for name in exposures}
    days = [date.fromisoformat(r["date"]) for r in rows]
    profit = {
        days[t + window]: sum(
            usd * (closes[n][days[t + window]] / closes[n][days[t]] - 1) for n, usd in exposures.items()
        )
        for t in range(len(days) - window)
    }
    ends = sorted(profit, key=lambda d: profit[d])
    expected = [ends[0]]
    for end in ends:
        if all(abs((end - other).days) >= window for other in expected):
            expected.append(end)
    whole = Book(
        rows=tuple(linear(f"{n}-PERP", "long" if x > 0 else "short", abs(x)) for n, x in exposures.items()),
        prices=dict.fromkeys(exposures, 1.0),
    )
    found = replay(account_of(whole), panel_of_closes(closes), window_days=window, count=10)
    assert found.last == tuple(expected[:10])
    assert found.stressed.pnl == pytest.approx([profit[d] for d in expected[:10]], rel=1e-9)
    if window == 1 and exposures == {"BTC": 1e5}:
        assert found.last[0] == date(2022, 6, 13)
