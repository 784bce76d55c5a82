"""Profit and loss of options in every scenario, re-derived with QuantLib."""

from __future__ import annotations

import math

import numpy as np
import pytest
import QuantLib

from app.domain.scenarios import Scenario
from tests.domain.book import NOW, Row, book, option

YEAR_SECONDS = 365 * 86_400
PRICE = 60_000.0
ROWS = (
    option("BTC", "call", "long", 1.5, 62_000.0, 20.0, 0.55),
    option("BTC", "put", "short", 2.0, 50_000.0, 75.0, 0.70, rate=0.05, forward=61_000.0),
    option("BTC", "call", "short", 0.7, 20_000.0, 400.0, 0.60, rate=0.12),
    option("BTC", "put", "long", 1.0, 150_000.0, 0.5, 0.012, contract_size=0.1),
    option("BTC", "put", "short", 1.0, 59_000.0, 3.0, 2.4),
)


def value(row: Row, price: float, iv: float) -> float:
    years = (row["expiry"] - NOW).total_seconds() / YEAR_SECONDS
    kind = QuantLib.Option.Call if row["type"] == "call" else QuantLib.Option.Put
    discount = math.exp(-(row.get("rate") or 0.0) * years)
    quantity = row["size"] * (row.get("contract_size") or 1.0) * (1 if row["side"] == "long" else -1)
    forward = (row.get("forward") or PRICE) * price / PRICE
    return float(quantity * QuantLib.blackFormula(kind, row["strike"], forward, iv * math.sqrt(years), discount))


def profit(row: Row, move: float, vol_move: float, *, term: bool = False) -> float:
    days = (row["expiry"] - NOW).total_seconds() / 86_400
    factor = (30 / max(days, 1)) ** (0.30 if days < 30 else 0.13) if term else 1.0
    price = max(PRICE * (1 + move), 1e-6 * PRICE)
    iv = max(row["iv"] * (1 + vol_move * factor), 0.01)
    return value(row, price, iv) - value(row, PRICE, row["iv"])


def close(values: list[float]) -> object:
    return pytest.approx(np.array(values), rel=1e-9, abs=1e-6)


def test_options_value() -> None:
    quote = book(*ROWS).quote()
    assert quote.options_value == pytest.approx(sum(value(row, PRICE, row["iv"]) for row in ROWS), rel=1e-12)
    assert quote.equity == quote.options_value


def test_exposure_is_the_dollar_delta() -> None:
    quote = book(*ROWS).quote()
    step = 1e-6
    for row, exposure in zip(ROWS, quote.portfolio.exposure.tolist(), strict=True):
        slope = (value(row, PRICE * (1 + step), row["iv"]) - value(row, PRICE * (1 - step), row["iv"])) / (2 * step)
        assert exposure == pytest.approx(slope, rel=1e-4, abs=0.05)


def test_notional_is_at_the_underlying() -> None:
    notional = book(*ROWS).quote().portfolio.notional
    assert notional == pytest.approx(np.array([90_000.0, 120_000.0, 42_000.0, 6_000.0, 60_000.0]))


def test_portfolio_cells_scale_volatility_by_term() -> None:
    result = book(*ROWS).quote().models["portfolio"]
    table = result.scenarios
    assert table is not None
    cells = zip(table.price_move, table.vol_move, table.weight, strict=True)
    expected = [w * sum(profit(row, 0.15 * p, 0.25 * v, term=True) for row in ROWS) for p, v, w in cells]
    assert table.pnl == close(expected)


def test_span_scenarios_take_volatility_flat() -> None:
    result = book(*ROWS).quote().models["span"]
    table = result.scenarios
    assert table is not None
    cells = zip(table.price_move, table.vol_move, table.weight, strict=True)
    expected = [w * sum(profit(row, 0.15 * p, 0.25 * v) for row in ROWS) for p, v, w in cells]
    assert table.pnl == close(expected)
    assert result.maintenance_margin == pytest.approx(max(0.0, -min(expected)))
    assert result.notes["net_option_value"] == pytest.approx(sum(value(row, PRICE, row["iv"]) for row in ROWS))


def test_own_scenarios_reach_the_floors() -> None:
    cells = ((-1.0, 0.0), (-0.999_999_9, 5.0), (0.3, -1.0), (0.0, -0.5), (1.0, -0.999), (10.0, 3.0), (0.0, 0.0))
    scenarios = tuple(Scenario(m, v) for m, v in cells)
    result = book(*ROWS, scenarios=scenarios).quote().models["scenario"]
    assert result.scenarios is not None
    expected = [sum(profit(row, m, v) for row in ROWS) for m, v in cells]
    assert result.scenarios.pnl == close(expected)
    assert result.initial_margin == pytest.approx(1.2 * max(0.0, -min(expected)))


def test_own_shocks_of_single_underlyings() -> None:
    rows = ROWS[0], option("ETH", "put", "long", 10.0, 2_900.0, 20.0, 0.8)
    scenarios = (Scenario(-0.1, 0.2, {"ETH": 0.3}), Scenario(0.05, -0.1, {"DOGE": 0.9}))
    result = book(*rows, scenarios=scenarios).quote().models["scenario"]
    assert result.scenarios is not None
    years = 20 / 365

    def eth(move: float, vol_move: float) -> float:
        before, after = (
            QuantLib.blackFormula(QuantLib.Option.Put, 2_900.0, 3_000 * (1 + m), 0.8 * (1 + v) * math.sqrt(years), 1.0)
            for m, v in ((0.0, 0.0), (move, vol_move))
        )
        return 10.0 * float(after - before)

    expected = [profit(ROWS[0], -0.1, 0.2) + eth(0.3, 0.2), profit(ROWS[0], 0.05, -0.1) + eth(0.05, -0.1)]
    assert result.scenarios.pnl == close(expected)


def test_linear_prices_are_floored_too() -> None:
    rows = ({"symbol": "BTC-PERP", "side": "long", "size": 1.0},)
    result = book(*rows, scenarios=(Scenario(-1.0, 0.0),)).quote().models["scenario"]
    assert result.worst is not None
    assert result.worst.pnl == pytest.approx(-PRICE * (1 - 1e-6), rel=1e-12)
