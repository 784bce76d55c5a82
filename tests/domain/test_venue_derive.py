"""Derive's PM2 against worked figures, a loop written from the published rule, and properties."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.margin.result import MarginResult
from app.domain.margin.venues.derive import DERIVE, DeriveInputs, DeriveParameters
from app.errors import InvalidError
from tests.domain.book import PRICES, Row, greeks, is_greeks, is_option, linear, option
from tests.domain.drawn import between, greeks_rows, linear_rows, option_rows
from tests.domain.venue_books import (
    by_underlying,
    exposure_of,
    margined,
    mark_of,
    marked,
    option_value,
    signed_size,
    straight_pnl,
    unit_figure,
    years_of,
)

DRAWN = settings(max_examples=80, deadline=None, derandomize=True)
CALL = option(
    "BTC", "call", "short", 1.0, 100_000.0, 794_852 / 86_400, 0.453803924321583, rate=0.15, forward=95_776.67392708939
)
CALL_PRICES = {"BTC": 95_663.50604855}


def net(result: MarginResult) -> tuple[float, float]:
    return float(result.notes["net_initial"]), float(result.notes["net_maintenance"])  # type: ignore[arg-type]


def test_worked_perpetual() -> None:
    perp = linear("ETH-PERP", "long", 1.0, mark_price=3_100.0)
    result = margined("derive", perp, prices={"ETH": 3_000.0}, inputs={"ETH": DeriveInputs(funding=10.0)})
    assert unit_figure(result, "worst_scenario") == pytest.approx(-558.0, rel=1e-12)
    assert net(result) == pytest.approx((-608.0, -481.4), rel=1e-12)
    assert result.notes["mark_to_market"] == 10.0
    assert (result.initial_margin, result.maintenance_margin) == pytest.approx((618.0, 491.4), rel=1e-12)


def test_worked_call() -> None:
    result = margined("derive", CALL, prices=CALL_PRICES)
    assert result.notes["mark_to_market"] == pytest.approx(-1_186.4185694588, rel=1e-12)
    assert unit_figure(result, "worst_scenario") == pytest.approx(-12_939.3120204433, rel=1e-12)
    assert net(result) == pytest.approx((-14_604.0481201448, -11_824.8587039591), rel=1e-12)
    assert result.worst is not None
    assert result.scenarios is not None
    index = result.worst.index or 0
    assert (result.scenarios.price_move[index], result.scenarios.vol_move[index]) == (0.18, 1.0)


def test_requirement_is_cash_and_market_value_less_net_margin() -> None:
    inputs = DeriveInputs(cash=5_000.0, funding=-20.0)
    rows = CALL, linear("BTC-PERP", "long", 0.5, entry_price=90_000.0)
    result = margined("derive", *rows, prices=CALL_PRICES, inputs={"BTC": inputs})
    cash, value = float(result.notes["cash"]), float(result.notes["mark_to_market"])  # type: ignore[arg-type]
    assert value == pytest.approx(-1_186.4185694588 - 20.0 + 0.5 * (95_663.50604855 - 90_000.0))
    assert result.initial_margin == pytest.approx(cash + value - net(result)[0])
    assert result.maintenance_margin == pytest.approx(cash + value - net(result)[1])
    assert result.not_modelled == ("confidence", "collateral_initial", "collateral_maintenance")


def test_scenarios_in_order() -> None:
    table = margined("derive", CALL, prices=CALL_PRICES).scenarios
    assert table is not None
    inner = [(m / 1000, v, 1.0) for m in (135, 90, 45, 0, -45, -90, -135) for v in (-1.0, 0.0, 1.0)]
    tails = [(-0.66, 0.054545), (-0.33, 0.109091), (0.5, 0.072), (1.0, 0.036), (2.0, 0.018), (3.0, 0.012)]
    expected = [(0.18, 1.0, 1.0), *inner, (-0.18, 1.0, 1.0), *[(m, 1.0, w) for m, w in tails], *[(0.0, 0.0, 1.0)] * 2]
    found = list(zip(table.price_move, table.vol_move, table.weight, strict=True))
    assert np.array(found) == pytest.approx(np.array(expected))
    assert len(found) == 31


def test_dated_future_pays_for_its_basis() -> None:
    """Against a perpetual of the same size nothing is lost in a scenario: .045·(.5 + 2T) of the future is."""
    rows = linear("BTC-USD-270101", "long", 1.0), linear("BTC-PERP", "short", 1.0)
    result = margined("derive", *rows, expiries={"BTC-USD-270101": 365.0})
    assert unit_figure(result, "worst_scenario") == pytest.approx(0.0, abs=1e-9)
    basis = 60_000.0 * 0.045 * 2.5
    assert unit_figure(result, "basis") == pytest.approx(-basis)
    assert result.worst is not None
    assert (result.worst.rule, result.worst.index) == ("basis", None)
    assert result.worst.pnl == pytest.approx(-basis)
    assert result.initial_margin == pytest.approx(basis + 0.02 * 120_000.0)
    assert result.maintenance_margin == pytest.approx(0.8 * basis + 0.015 * 120_000.0)
    assert result.position_initial == pytest.approx([basis + 1_200.0, 1_200.0])


@pytest.mark.parametrize(
    ("rows", "short"),
    [
        ((("call", "short", 2.0, 30.0), ("put", "long", 1.0, 30.0)), 1.0),
        ((("call", "short", 2.0, 30.0), ("put", "short", 1.0, 30.0)), 3.0),
        ((("call", "short", 2.0, 30.0), ("call", "long", 2.0, 60.0)), 2.0),
        ((("call", "long", 2.0, 30.0), ("put", "short", 1.0, 30.0)), 0.0),
    ],
)
def test_short_options_net_by_strike_and_expiry(rows: Sequence[tuple[str, str, float, float]], short: float) -> None:
    result = margined("derive", *[option("ETH", k, side, size, 3_100.0, days, 0.7) for k, side, size, days in rows])
    assert unit_figure(result, "short_option") == pytest.approx(short * 3_000.0 * 0.003)
    assert unit_figure(result, "short_option_initial") == pytest.approx(short * 3_000.0 * 0.002)


@pytest.mark.parametrize("rate", [-0.2, -0.05, 0.0, 0.05])
def test_a_discount_earns_nothing(rate: float) -> None:
    """Below a rate of 0 as above: a short option in the money takes nothing off, a long one keeps a loss of 5 %."""
    perpetual = linear("ETH-PERP", "long", 100.0)
    short = option("ETH", "put", "short", 1.0, 30_000.0, 365.0, 0.7, rate=rate)
    assert margined("derive", perpetual, short).initial_margin > margined("derive", perpetual).initial_margin
    long = margined("derive", option("ETH", "call", "long", 1.0, 300.0, 365.0, 0.7, rate=rate))
    assert unit_figure(long, "loss") > 0.05 * unit_figure(long, "mark_to_market")


def test_strikes_do_not_net() -> None:
    rows = option("ETH", "call", "short", 1.0, 3_100.0, 30, 0.7), option("ETH", "call", "long", 1.0, 3_200.0, 30, 0.7)
    assert unit_figure(margined("derive", *rows), "short_option") == pytest.approx(9.0)


@pytest.mark.parametrize(("confidence", "doubt"), [(None, 0.0), (1.0, 0.0), (0.55, 0.0), (0.54, 0.46), (0.0, 1.0)])
def test_confidence(confidence: float | None, doubt: float) -> None:
    rows = linear("ETH-PERP", "short", 2.0), option("ETH", "call", "long", 3.0, 3_000.0, 20.0, 0.7)
    result = margined("derive", *rows, inputs={"ETH": DeriveInputs(confidence=confidence)})
    bare = margined("derive", *rows)
    assert result.initial_margin - bare.initial_margin == pytest.approx(doubt * 15_000.0, abs=1e-6)
    assert result.maintenance_margin == bare.maintenance_margin


@pytest.mark.parametrize(("price", "factor"), [(1.0, 1.0), (0.98, 1.0), (0.97, 1.02), (0.9, 1.16), (1.1, 1.0)])
def test_stable_below_par(price: float, factor: float) -> None:
    result = margined("derive", linear("ETH-PERP", "long", 1.0), prices={"ETH": 3_000.0, "USDC": price})
    assert result.initial_margin == pytest.approx(540.0 * factor + 60.0)
    assert result.maintenance_margin == pytest.approx(0.8 * 540.0 + 45.0)


def test_collateral_haircuts() -> None:
    inputs = DeriveInputs(collateral_initial=300.0, collateral_maintenance=200.0)
    bare, full = (
        margined("derive", linear("ETH-PERP", "long", 1.0), inputs=given) for given in (None, {"ETH": inputs})
    )
    assert full.initial_margin - bare.initial_margin == pytest.approx(300.0)
    assert full.maintenance_margin - bare.maintenance_margin == pytest.approx(200.0)
    assert full.position_initial.sum() == pytest.approx(full.initial_margin)


def test_long_option_loses_by_its_discount_at_least() -> None:
    """Deep in the money and unmoved, 5 % and 8 % a year of its value are gone."""
    deep = option("ETH", "call", "long", 1.0, 1.0, 365.0, 0.5)
    result = margined("derive", deep)
    assert result.scenarios is not None
    assert result.scenarios.pnl[11] == pytest.approx(2_999.0 * (0.95 * math.exp(-0.08) - 1.0), rel=1e-9)


def test_skews_of_two_expiries_do_not_offset() -> None:
    near = option("ETH", "call", "long", 5.0, 4_000.0, 10.0, 0.8)
    far = option("ETH", "call", "short", 5.0, 4_500.0, 200.0, 0.8)
    both = margined("derive", near, far).scenarios
    alone = [margined("derive", row).scenarios for row in (near, far)]
    assert both is not None
    for k in (29, 30):
        assert both.pnl[k] == pytest.approx(sum(table.pnl[k] for table in alone if table is not None))
        assert both.pnl[k] < 0.0


@pytest.mark.parametrize("days", [1 / 86_400, 0.5, 1.0, 29.999, 30.0, 30.001, 365.0, 3_650.0, 36_500.0])
@pytest.mark.parametrize("side", ["long", "short"])
def test_edges_of_time(days: float, side: str) -> None:
    put = option("ETH", "put", side, 1.0, 3_000.0, days, 0.02, rate=0.05)
    result = margined("derive", put)
    initial, maintenance = required([put], PRICES)
    assert result.initial_margin == pytest.approx(initial, rel=1e-6)
    assert result.maintenance_margin == pytest.approx(maintenance, rel=1e-6)
    assert result.scenarios is not None
    assert np.isfinite(result.scenarios.pnl).all()


def test_a_tail_ends_above_zero() -> None:
    own = DeriveParameters(edge_moves=(1.0, -1.0), tails=((-1.0, 0.5),))
    result = margined("derive", CALL, prices=CALL_PRICES, parameters={"BTC": own})
    assert result.scenarios is not None
    assert min(result.scenarios.price_move) == pytest.approx(1e-6 - 1.0)
    assert np.isfinite(result.scenarios.pnl).all()


def test_volatility_down_may_fall_to_nothing() -> None:
    own = DeriveParameters(volatility_down=5.0)
    itm = option("ETH", "call", "long", 1.0, 2_000.0, 5.0, 0.8)
    table = margined("derive", itm, parameters={"ETH": own}).scenarios
    assert table is not None
    years = 5.0 / 365.0
    assert table.pnl[10] == pytest.approx(1_000.0 * 0.95 * math.exp(-0.08 * years) - option_value(itm, PRICES))


def test_greeks_without_a_price_are_a_named_error() -> None:
    with pytest.raises(InvalidError) as caught:
        margined("derive", greeks("TIA", 1_000.0, 1.0), prices={})
    assert caught.value.errors[0].code == "missing_price"


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        (DeriveParameters(loss_factor_maintenance=1.1), "/loss_factor_maintenance"),
        (DeriveParameters(tails=((0.5, -0.1),)), "/tails"),
        (DeriveParameters(skew_cap=2.0), "/skew_cap"),
    ],
)
def test_contradictions_are_named(parameters: DeriveParameters, field: str) -> None:
    assert [fault.pointer for fault in parameters.faults()] == [field]


def test_published_parameters_are_sound() -> None:
    assert not [fault for parameters in DERIVE.published.values() for fault in parameters.faults()]
    assert [f.pointer for f in DeriveInputs(collateral_maintenance=1.0).faults()] == ["/collateral_maintenance"]


# the rule once more, in loops

SHOCKS = (
    [(0.18, "up", 1.0)]
    + [(m, v, 1.0) for m in (0.135, 0.09, 0.045, 0.0, -0.045, -0.09, -0.135) for v in ("down", "none", "up")]
    + [(-0.18, "up", 1.0), (-0.66, "up", 0.054545), (-0.33, "up", 0.109091), (0.5, "up", 0.072)]
    + [(1.0, "up", 0.036), (2.0, "up", 0.018), (3.0, "up", 0.012), (0.0, "linear", 1.0), (0.0, "abs", 1.0)]
)
DAYS = {"BTC-27MAR26": 85.0, "ETH-27MAR26": 85.0, "SOL-27MAR26": 85.0, "DOGE-27MAR26": 85.0}


def shocked_iv(row: Row, prices: Mapping[str, float], vol: str) -> float:
    iv, years = float(row["iv"]), years_of(row)
    days = 365.0 * years
    x = (30.0 / max(days, 1.0)) ** (0.3 if days <= 30.0 else 0.13)
    if vol == "up":
        return float(max(0.45, iv * (1.0 + 0.5 * x)))
    if vol == "down":
        return float(iv * max(0.0, 1.0 - 0.275 * x))
    if vol == "none":
        return iv
    k = math.log(row["strike"] / (row.get("forward") or prices[row["underlying"]]))
    k = abs(k) if vol == "abs" else k
    cap = max(0.0, 0.15 - 0.05 * math.sqrt(years))
    star = max(0.01, 4.0 * math.sqrt(years) * (0.6 - 0.1 * math.sqrt(years)))
    return iv * (1.0 + min(cap, max(-cap, k * cap / star)))


def moved(row: Row, move: float) -> float:
    """Return the move of an option's forward: in the last half hour only what is not settled of it moves."""
    return move * min(1.0, years_of(row) * 31_536_000.0 / 1_800.0)


def expiry_pnl(rows: Sequence[Row], prices: Mapping[str, float], move: float, vol: str) -> float:
    """Return what the options of one expiry gain; their rates may differ."""
    shocked = [option_value(row, prices, moved(row, move), shocked_iv(row, prices, vol)) for row in rows]
    gained = 0.0
    for row, value in zip(rows, shocked, strict=True):
        rate, years = max(0.0, row.get("rate") or 0.0), years_of(row)  # the venue's is never below 0
        if sum(shocked) >= 0.0:
            factor = 0.95 * math.exp(-years * (rate + 0.08))
        else:
            factor = min(math.exp(rate * years), 1.04 * math.exp(years * (0.5 * rate + 0.08)))
        gained += value * factor - option_value(row, prices)
    return -abs(gained) if vol in ("linear", "abs") else gained


def basis(rows: Sequence[Row], prices: Mapping[str, float]) -> float:
    expiries: dict[float, list[Row]] = {}
    for row in rows:
        days = 365.0 * years_of(row) if is_option(row) else DAYS.get(row.get("symbol", ""))
        if days is not None:
            expiries.setdefault(round(days, 6), []).append(row)
    whole = 0.0
    for days, own in expiries.items():
        gains = [
            sum(
                option_value(row, prices, moved(row, m)) - option_value(row, prices)
                if is_option(row)
                else straight_pnl(row, prices, m, 0.0)
                for row in own
            )
            for m in (0.045, -0.045)
        ]
        whole += min(*gains, 0.0) * (0.5 + 2.0 * days / 365.0)
    return whole


def holds_coin(row: Row) -> bool:
    if is_greeks(row) and (abs(row["delta"]) != 1.0 or row.get("gamma") or row.get("vega")):
        return False
    return "-" not in row["symbol"]


def contingency(rows: Sequence[Row], prices: Mapping[str, float]) -> tuple[float, float]:
    symbols: dict[str, float] = {}
    strikes: dict[Any, float] = {}
    for row in rows:
        if is_option(row):
            key = (round(years_of(row), 9), row["strike"])
            strikes[key] = strikes.get(key, 0.0) + signed_size(row)
        elif not holds_coin(row):
            spot = prices[row["symbol"].partition("-")[0]]
            coins = exposure_of(row, prices) * spot / mark_of(row, prices)
            symbols[row["symbol"]] = symbols.get(row["symbol"], 0.0) + coins
    perps = sum(abs(dollars) for dollars in symbols.values())
    spot = prices[rows[0].get("underlying") or rows[0]["symbol"].partition("-")[0]]
    shorts = sum(max(0.0, -net) for net in strikes.values()) * spot
    return 0.02 * perps + 0.005 * shorts, 0.015 * perps + 0.003 * shorts


def required(rows: Sequence[Row], prices: Mapping[str, float]) -> tuple[float, float]:
    """Return the requirement of one underlying, initial and maintenance."""
    expiries: dict[float, list[Row]] = {}
    for row in rows:
        if is_option(row):
            expiries.setdefault(round(years_of(row), 9), []).append(row)
    vols = {"up": 0.5, "down": -0.275}
    worst = 0.0
    for move, vol, weight in SHOCKS:
        gained = sum(straight_pnl(row, prices, move, vols.get(vol, 0.0)) for row in rows if not is_option(row))
        gained += sum(expiry_pnl(own, prices, move, vol) for own in expiries.values())
        worst = min(worst, weight * gained)
    worst = min(worst, basis(rows, prices))
    initial, maintenance = contingency(rows, prices)
    return initial - worst, maintenance - 0.8 * worst


def rows_of() -> st.SearchStrategy[list[Row]]:
    """Return books in which an asset itself is marked at its price: a greeks position takes the mark of its symbol."""
    linears = linear_rows(isolated=False).map(marked)
    return st.lists(st.one_of(linears, greeks_rows(), option_rows(isolated=False)), max_size=6)


@DRAWN
@given(rows=rows_of())
def test_agrees_with_the_loop(rows: list[Row]) -> None:
    result = margined("derive", *rows, expiries=DAYS)
    each = [required(own, PRICES) for own in by_underlying(rows).values()]
    assert result.initial_margin == pytest.approx(sum(x for x, _ in each), rel=1e-6, abs=1e-4)
    assert result.maintenance_margin == pytest.approx(sum(x for _, x in each), rel=1e-6, abs=1e-4)


@DRAWN
@given(rows=rows_of(), order=st.randoms(use_true_random=False), factor=between(0.01, 20.0))
def test_order_does_not_matter_and_size_scales(rows: list[Row], order: random.Random, factor: float) -> None:
    one = margined("derive", *rows, expiries=DAYS).initial_margin
    shuffled = order.sample(rows, len(rows))
    assert margined("derive", *shuffled, expiries=DAYS).initial_margin == pytest.approx(one, rel=1e-9, abs=1e-7)
    sized = [row | {key: row[key] * factor for key in ("size", "notional", "vega") if row.get(key)} for row in rows]
    assert margined("derive", *sized, expiries=DAYS).initial_margin == pytest.approx(factor * one, rel=1e-6, abs=1e-6)


@DRAWN
@given(rows=rows_of())
def test_figures_are_whole(rows: list[Row]) -> None:
    inputs = {name: DeriveInputs(100.0, -5.0, 0.3, 40.0, 20.0) for name in PRICES}
    bare, full = margined("derive", *rows, expiries=DAYS), margined("derive", *rows, expiries=DAYS, inputs=inputs)
    for result in (bare, full):
        assert 0.0 <= result.maintenance_margin <= result.initial_margin < math.inf
        assert result.position_initial.sum() == pytest.approx(result.initial_margin, rel=1e-9, abs=1e-6)
        assert result.position_maintenance.sum() == pytest.approx(result.maintenance_margin, rel=1e-9, abs=1e-6)
    assert full.initial_margin >= bare.initial_margin


def test_nothing_open_needs_nothing() -> None:
    result = margined("derive", linear("BTC-PERP", "long", 0.0))
    assert (result.initial_margin, result.maintenance_margin, result.worst) == (0.0, 0.0, None)
