"""Many accounts valued at once are each what the book by itself comes to; backtests of snapshots by hand."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.book import AccountSettings, Book, Holding, OpenPosition, Side
from app.domain.book_columns import book_columns
from app.domain.panel import Panel
from app.domain.parameters import MarketParameters
from app.domain.prices import StoredPrice
from app.domain.quote import account_figures
from app.domain.snapshots import FORECASTS, Snapshot, backtest_snapshots, forecast, worth
from app.domain.var.exposures import exposed
from app.domain.var.quote import VarTerms, var_quote

NOW = datetime(2026, 1, 2, tzinfo=UTC)
PARAMETERS = MarketParameters()
PRICES = {"BTC": 60_000.0, "BTC-PERP": 60_100.0, "ETH": 3_000.0, "SOL": 150.0}
STORED = {symbol: StoredPrice(price, NOW) for symbol, price in PRICES.items()}
PANEL = Panel(
    ("BTC", "ETH"),
    np.datetime64("2025-01-01") + np.arange(200),
    np.clip(np.random.default_rng(3).normal(0.0, 0.03, (200, 2)), -0.5, 0.5),
)

units = st.decimals(Decimal("0.001"), Decimal(50), places=3)
entries = st.decimals(Decimal(50), Decimal(90_000), places=2)
held = st.dictionaries(
    st.sampled_from(("BTC", "ETH", "SOL", "USDC", "USDT")), st.builds(Holding, free=units, owed=units), max_size=4
)
sides: st.SearchStrategy[Side] = st.sampled_from(("long", "short"))
markets = st.lists(st.sampled_from(("BTC-PERP", "ETH-PERP", "SOL-PERP", "BTC")), unique=True, max_size=4)


@st.composite
def books(draw: st.DrawFn) -> list[Book]:
    def position(symbol: str) -> OpenPosition:
        return OpenPosition(
            symbol, symbol, draw(sides), draw(units), draw(entries), None, "pooled", Decimal(0), Decimal(0), True, NOW
        )

    return [
        Book(f"agent {k}", AccountSettings(), 1, draw(held), [position(s) for s in draw(markets)], [])
        for k in range(draw(st.integers(1, 4)))
    ]


@given(drawn=books())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_all_at_once_are_each_by_itself(drawn: list[Book]) -> None:
    found = worth(book_columns(drawn), PRICES, PARAMETERS)
    limits = forecast(found, PANEL, PARAMETERS)
    for a, book in enumerate(drawn):
        terms = book.quote_terms(PARAMETERS, STORED)
        figures = account_figures(terms, STORED, NOW)
        assert found.equity[a] == pytest.approx(figures.equity, abs=1e-6)
        assert found.gross[a] == pytest.approx(sum(figures.portfolio.notional), abs=1e-6)
        whole = exposed(terms, STORED, NOW)
        net = dict(zip(whole.portfolio.underlyings.names, whole.portfolio.net, strict=True))
        for name, usd in zip(found.names, found.exposures[a], strict=True):
            if name not in ("USDC", "USDT"):
                assert usd == pytest.approx(net.get(name, 0.0), abs=1e-6)
        quote = var_quote(whole.portfolio, PANEL, PARAMETERS, VarTerms(confidences=FORECASTS))
        assert limits[a] == pytest.approx([tail.value_at_risk for tail in quote.risk.tails], rel=1e-9, abs=1e-6)


def test_what_can_t_be_valued_or_forecast_is_nan() -> None:
    unpriced = Book("a", AccountSettings(), 1, {"XYZ": Holding(free=Decimal(1))}, [], [])
    sound = Book("b", AccountSettings(), 1, {"BTC": Holding(free=Decimal(1))}, [], [])
    found = worth(book_columns([unpriced, sound]), PRICES, PARAMETERS)
    assert math.isnan(found.value[0])
    assert found.value[1] == 60_000.0
    priced = worth(book_columns([unpriced, sound]), PRICES | {"XYZ": 5.0}, PARAMETERS)
    limits = forecast(priced, PANEL, PARAMETERS)
    assert np.isnan(limits[0]).all()
    assert limits[1][1] > limits[1][0] > 0.0


def taken(day: int, value: float, flows: float | None = 0.0, **more: Any) -> Snapshot:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day, hours=more.pop("hours", 0))
    known = {"var_95": 80.0, "var_99": 100.0} | more
    return Snapshot(date(2026, 1, 1) + timedelta(days=day), at, value, value, flows, 0.0, **known)


def test_profits_are_compared_with_the_forecast_of_the_day_before() -> None:
    rows = [
        taken(0, 1_000.0, None),
        taken(1, 1_450.0, 500.0),  # -50
        taken(2, 1_349.9, 0.0, var_95=None, var_99=None),  # -100.1
        taken(3, 1_349.9),  # no forecast
        taken(6, 1_000.0),  # after two days without
        taken(7, 920.0),  # -80
    ]
    found = backtest_snapshots(rows, 0.99)
    assert [(d.day.day, d.is_exception) for d in found.days] == [(1, False), (2, True), (7, False)]
    assert [d.pnl for d in found.days] == pytest.approx([-50.0, -100.1, -80.0])
    assert [d.day for d in found.missing] == [5, 6]
    assert [d.day for d in found.uncompared] == [3, 4]
    assert found.coverage is not None
    assert (found.coverage.observations, found.coverage.exceptions) == (3, 1)
    assert [d.is_exception for d in backtest_snapshots(rows, 0.95).days] == [False, True, False]


def test_a_first_snapshot_late_in_the_day_begins_no_day() -> None:
    found = backtest_snapshots([taken(0, 1.0, None, hours=23), taken(1, 1.0)], 0.95)
    assert found.days == ()
    assert found.coverage is None
    assert len(found.uncompared) == 1
