"""The worked margins of RISK.md sections 2, 2.1 and 2.2."""

from __future__ import annotations

import numpy as np
import pytest

from app.domain.margin.result import SpanCharges
from app.domain.margin.span import requirement, scan_risk
from tests.domain.book import book, greeks, linear

FUTURE = [0, 0, 3330, 3330, -3330, -3330, 6670, 6670, -6670, -6670, 10000, 10000, -10000, -10000, 7000, -7000]
CALL = [460, -610, 2640, 1730, -1270, -2340, 5210, 4540, -2540, -3430, 8060, 7640, -3380, -3990, 3130, -1500]


def test_scenario() -> None:
    positions = greeks("BTC", 10_000.0, 1.0, gamma=0.001), greeks("ETH", 8_000.0, -0.8, gamma=0.001)
    result = book(*positions).quote().models["scenario"]
    assert result.initial_margin == pytest.approx(647.757, abs=1e-9)
    assert result.maintenance_margin == pytest.approx(0.8 * 647.757, abs=1e-9)
    assert result.worst is not None
    assert result.scenarios is not None
    assert result.worst.pnl == pytest.approx(-539.7975, abs=1e-9)
    index = result.worst.index
    assert index is not None
    assert (result.scenarios.price_move[index], result.scenarios.vol_move[index]) == (-0.15, 0.35)
    assert result.parameters["scenario_set"] == "moderate"


def test_first_of_tied_scenarios_binds() -> None:
    result = book(greeks("BTC", 1_000.0, 0.0, gamma=-1.0), scenario_set="wide").quote().models["scenario"]
    assert result.worst is not None
    assert result.worst.index == 0  # -20 % before +20 %


@pytest.mark.parametrize(
    ("other", "initial"), [(("ETH-PERP", -8_000.0), 1_484.318), (("SOL-PERP", -10_000.0), 2_163.331), (None, 1_800.0)]
)
def test_portfolio(other: tuple[str, float] | None, initial: float) -> None:
    rows = [linear("BTC-PERP", "long", 10_000.0, mark_price=1.0)]
    if other is not None:
        rows.append(linear(other[0], "short", -other[1], mark_price=1.0))
    result = book(*rows, prices={}).quote().models["portfolio"]
    assert result.initial_margin == pytest.approx(initial, abs=5e-4)
    assert result.maintenance_margin == pytest.approx(0.8 * initial, abs=5e-4)
    assert not result.notes["correlation_repaired"]


def test_portfolio_cells_are_named_as_specified() -> None:
    table = book(linear("BTC-PERP", "long", 1.0)).quote().models["portfolio"].scenarios
    assert table is not None
    thirds = (-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1)
    expected = {(round(p, 9), v, 1.0) for p in thirds for v in (-1, 0, 1)} | {(-2, 1, 0.5), (2, 1, 0.5)}
    shown = zip(table.price_move, table.vol_move, table.weight, strict=True)
    assert {(round(p, 9), v, w) for p, v, w in shown} == expected
    assert len(table.price_move) == 23
    assert all(table.in_ranges)


@pytest.mark.parametrize(
    ("gains", "risk", "binding"),
    [
        (np.array(FUTURE), 10_000, 13),
        (np.array(CALL), 3_990, 14),
        (np.array(FUTURE) - np.array(CALL), 6_620, 13),
        (np.abs(CALL), 0, 1),
    ],
)
def test_span_scan_risk(gains: np.ndarray[tuple[int], np.dtype[np.float64]], risk: float, binding: int) -> None:
    risks, scenario = scan_risk(gains.astype(np.float64))
    assert float(risks) == risk
    if risk:
        assert int(scenario) == binding


def test_span_requirement() -> None:
    charges = [
        SpanCharges(),
        SpanCharges(intra_commodity=10, delivery=5, inter_commodity_credit=40),
        SpanCharges(inter_commodity_credit=500),
        SpanCharges(short_option_minimum=150),
    ]
    assert requirement(np.array([100.0, 100.0, 100.0, 100.0]), charges).tolist() == [100, 75, 0, 150]


def test_span_order_and_factors() -> None:
    result = book(linear("SOL-PERP", "long", 1_000.0, mark_price=1.0), prices={}).quote().models["span"]
    table = result.scenarios
    assert table is not None
    third = 1 / 3
    moves = [0, 0, third, third, -third, -third, 2 * third, 2 * third, -2 * third, -2 * third, 1, 1, -1, -1, 2, -2]
    assert table.price_move == pytest.approx(moves)
    assert list(table.vol_move) == [1, -1] * 7 + [0, 0]
    assert list(table.weight) == [1.0] * 14 + [0.35] * 2
    assert result.maintenance_margin == pytest.approx(200.0)
    assert result.initial_margin == pytest.approx(220.0)
    assert result.per_underlying["binding_scenario"].tolist() == [13]
    for charge in ("intra_commodity", "delivery", "inter_commodity_credit", "short_option_minimum"):
        assert result.add_ons[charge] == 0.0


def test_a_fully_hedged_book_keeps_the_floor() -> None:
    rows = linear("BTC-PERP", "long", 1.0), linear("BTC-PERP", "short", 1.0)
    models = book(*rows, held={"USDC": 1_000.0}, prices={"BTC": 50_000.0}).quote().models
    # 1 % of gross 100,000 and 1 % of hedged 100,000
    assert models["portfolio"].initial_margin == pytest.approx(1.2 * 2_000)
    assert models["cross"].initial_margin == 0.0
    assert models["isolated"].initial_margin == pytest.approx(30_000)


def test_concentration_add_on() -> None:
    limits = {"BTC": {"concentration_limit": 1.0}}
    row = linear("BTC-PERP", "long", 4.0)
    with_limit = book(row, prices={"BTC": 50_000.0}, assets=limits).quote().models["portfolio"]
    without = book(row, prices={"BTC": 50_000.0}).quote().models["portfolio"]
    add_on = 0.10 * 0.15 * 200_000 * (2 - 1)
    assert with_limit.add_ons["concentration"] == pytest.approx(add_on)
    assert with_limit.initial_margin == pytest.approx(without.initial_margin + add_on)
    assert np.isnan(without.per_underlying["concentration_limit"]).all()
    at_limit = book(linear("BTC-PERP", "long", 1.0), prices={"BTC": 50_000.0}, assets=limits).quote()
    assert at_limit.models["portfolio"].add_ons["concentration"] == 0.0
