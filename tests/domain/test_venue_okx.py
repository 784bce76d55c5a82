"""OKX portfolio margin against worked figures, a loop written from the published rule, and properties."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.margin.result import Worst
from app.domain.margin.venues.okx import OKX, OkxInputs, OkxParameters, minimum_charge
from app.domain.parameters import InstrumentParameters, MarketParameters
from app.errors import InvalidError
from tests.domain.book import PRICES, Row, greeks, is_option, linear, option
from tests.domain.drawn import between, greeks_rows, linear_rows, option_rows
from tests.domain.venue_books import (
    by_underlying,
    exposure_of,
    label,
    margined,
    marked,
    option_value,
    signed_size,
    straight_pnl,
    unit_figure,
    years_of,
)

DRAWN = settings(max_examples=80, deadline=None, derandomize=True)
SWAP = linear("BTC-USDT-SWAP", "short", 10.0, contract_size=0.01, mark_price=97_093.7)
WORKED = {"BTC": 97_078.9, "USDT": 0.99954}


def test_worked_unit() -> None:
    result = margined("okx", SWAP, prices=WORKED)
    digits = {
        "delta": -9_704.9036898,
        "mr1": 1_164.410924472,
        "mr4": 19.4098073796,
        "mr6": 2_328.821848944 / 2,
        "mr7": 43.6720666041,
    }
    for name, expected in digits.items():
        assert unit_figure(result, name) == pytest.approx(expected, rel=1e-12), name
    assert result.maintenance_margin == pytest.approx(1_183.8207318516, rel=1e-12)
    assert result.initial_margin == pytest.approx(1_538.9669514071, rel=1e-12)
    assert result.worst is not None
    assert result.scenarios is not None
    assert result.scenarios.price_move[result.worst.index or 0] == 0.12
    assert result.worst.rule == "mr1"
    assert result.not_modelled == ("mr2", "mr3", "mr5", "mr8", "mr9")


LTC = linear("LTC-USDT-SWAP", "long", 10.0, mark_price=102.0)
BORROWED = OkxInputs(mr8=1_571.064377796, mr8_initial=7_855.32188898)


def test_the_published_account() -> None:
    """The response of the position builder (docs of the API v5): units of BTC and LTC, and USDT borrowed."""
    prices = WORKED | {"LTC": 101.9951}  # from its MR1
    result = margined("okx", SWAP, LTC, prices=prices, inputs={"USDT": BORROWED})
    ltc = {"delta": 1_019.5308, "mr1": 183.5067280572, "mr4": 8.1562464, "mr6": 183.5067280572, "mr7": 7.1367156}
    for name, expected in ltc.items():
        assert unit_figure(result, name, 1) == pytest.approx(expected, rel=1e-12), name
    assert unit_figure(result, "maintenance_margin", 1) == pytest.approx(191.6629744572, rel=1e-12)
    assert unit_figure(result, "initial_margin", 1) == pytest.approx(249.16186679436, rel=1e-12)
    assert result.maintenance_margin == pytest.approx(2_946.5480841048, rel=1e-12)
    assert result.initial_margin == pytest.approx(9_643.45070718144, rel=1e-12)
    assert result.not_modelled == ("mr2", "mr3", "mr5", "mr9")


@pytest.mark.parametrize("inputs", [OkxInputs(mr8_initial=5.0), OkxInputs(mr8=5.0, mr8_initial=4.0)])
def test_borrowing_costs_no_less_at_first(inputs: OkxInputs) -> None:
    assert [fault.pointer for fault in inputs.faults()] == ["/mr8_initial"]
    assert not list(BORROWED.faults())


def test_index_may_be_supplied() -> None:
    prices = {"BTC": 50_000.0, "USDT": 0.99954}
    result = margined("okx", SWAP, prices=prices, inputs={"BTC": OkxInputs(index_price=97_078.9)})
    assert result.maintenance_margin == pytest.approx(1_183.8207318516, rel=1e-12)


def test_without_an_index_the_mark_is_shocked() -> None:
    result = margined("okx", SWAP, prices={})
    assert unit_figure(result, "index_price") == 97_093.7
    assert unit_figure(result, "mr1") == pytest.approx(0.1 * 97_093.7 * 0.12, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "spot", "extreme", "basis", "minimum"),
    [
        ("BTC", 0.12, 0.24, 0.002, 0.0045),
        ("ETH", 0.12, 0.24, 0.002, 0.0045),
        ("LTC", 0.18, 0.36, 0.008, 0.007),
        ("XRP", 0.18, 0.36, 0.008, 0.007),
        ("LINK", 0.18, 0.50, 0.008, 0.007),
        ("SOL", 0.25, 0.36, 0.008, 0.007),
        ("TIA", 0.25, 0.50, 0.008, 0.007),
    ],
)
def test_published_groups(name: str, spot: float, extreme: float, basis: float, minimum: float) -> None:
    """Moves by group of assets; the rates are published of BTC and LTC."""
    result = margined("okx", linear(f"{name}-USDT-SWAP", "long", 1_000.0), prices={name: 1.0})
    found = [unit_figure(result, mr) for mr in ("mr1", "mr6", "mr4", "mr7")]
    assert found == pytest.approx([1_000 * x for x in (spot, extreme / 2, basis, minimum)], rel=1e-12)


@pytest.mark.parametrize(
    ("raw", "charge"),
    [
        (0.0, 0.0),
        (250_000.0, 250_000.0),
        (250_001.0, 250_002.0),
        (500_000.0, 750_000.0),
        (1_000_000.0, 2_750_000.0),
        (2_000_000.0, 8_750_000.0),
        (3_000_000.0, 16_750_000.0),
        (4_000_000.0, 26_750_000.0),
        (5_000_000.0, 38_750_000.0),
    ],
)
def test_tiers_are_marginal(raw: float, charge: float) -> None:
    """250k at 1, then 250k at 2, 500k at 4, 1M at 6, 1M at 8, 1M at 10, what is above at 12."""
    assert minimum_charge(raw, OkxParameters().minimum_tiers) == pytest.approx(charge, rel=1e-12)


def test_minimum_charge_binds_on_a_hedged_unit() -> None:
    """Long and short contracts of one size lose nothing under stress, and are to be closed all the same."""
    rows = linear("BTC-USD-SWAP", "long", 1_000.0), linear("BTC-USDC-SWAP", "short", 1_000.0)
    result = margined("okx", *rows, prices={"BTC": 60_000.0})
    assert unit_figure(result, "mr1") == unit_figure(result, "mr4") == 0.0
    # .45 % of 120M is 540,000: 250k x 1 + 250k x 2 + 40k x 4
    assert result.maintenance_margin == pytest.approx(910_000.0, rel=1e-12)
    assert result.position_maintenance == pytest.approx([455_000.0, 455_000.0])
    assert result.worst is not None
    assert (result.worst.rule, result.worst.index) == ("mr7", None)
    assert result.worst.pnl == pytest.approx(-910_000.0)


def test_sides_of_one_contract_net() -> None:
    rows = linear("BTC-USD-SWAP", "long", 3.0), linear("BTC-USD-SWAP", "short", 3.0)
    assert margined("okx", *rows).maintenance_margin == 0.0


def test_depeg_moves_only_what_is_quoted_in_the_coin() -> None:
    rows = linear("BTC-USDT-SWAP", "long", 1.0), linear("BTC-USD-SWAP", "short", 1.0)
    prices = {"BTC": 60_000.0, "USDT": 0.9}
    result = margined("okx", *rows, prices=prices)
    assert unit_figure(result, "delta") == pytest.approx(-6_000.0)
    assert unit_figure(result, "mr1") == pytest.approx(6_000.0 * 0.12)
    assert unit_figure(result, "mr7") == pytest.approx(114_000.0 * 0.0045)


def test_basis_by_expiry() -> None:
    """A calendar spread pays MR4 on both legs, the far one for its year: 5 % against .2 %."""
    rows = linear("BTC-USD-SWAP", "long", 1.0), linear("BTC-USD-270101", "short", 1.0)
    result = margined("okx", *rows, expiries={"BTC-USD-270101": 365.0})
    assert unit_figure(result, "mr4") == pytest.approx(60_000.0 * (0.002 + 0.05), rel=1e-12)
    assert result.maintenance_margin == pytest.approx(60_000.0 * 0.052, rel=1e-12)


def test_options_hedge_the_future_of_their_expiry() -> None:
    far = option("BTC", "call", "short", 2.0, 60_000.0, 90.0, 0.6)
    delta = -exposure_of(far, PRICES) / 60_000.0
    future = linear("BTC-USD-260401", "long", delta)
    result = margined("okx", far, future, expiries={"BTC-USD-260401": 90.0})
    assert unit_figure(result, "mr4") == pytest.approx(0.0, abs=1e-3)
    later = margined("okx", far, future, expiries={"BTC-USD-260401": 90.5})
    assert unit_figure(later, "mr4") > 2 * 0.05 * 90 / 365 * delta * 60_000.0 * 0.99


def test_supplied_charges() -> None:
    bare = margined("okx", SWAP, prices=WORKED)
    inputs = OkxInputs(mr2=2_000.0, mr3=10.0, mr5=20.0, mr8=500.0, mr9=30.0)
    full = margined("okx", SWAP, prices=WORKED, inputs={"BTC": inputs})
    unit = 2_000.0 + 10.0 + 19.4098073796 + 20.0 + 30.0
    assert full.maintenance_margin == pytest.approx(unit + 500.0, rel=1e-12)
    assert full.initial_margin == pytest.approx(1.3 * unit + 500.0, rel=1e-12)
    assert full.not_modelled == ("mr8_initial",)
    assert full.add_ons["mr8"] == 500.0
    assert full.position_maintenance.sum() == pytest.approx(unit)
    assert full.maintenance_margin > bare.maintenance_margin
    assert full.worst == Worst("mr2", None, -2_000.0)


def test_borrowing_counts_for_an_asset_without_positions() -> None:
    inputs = {"USDT": OkxInputs(mr8=70.0), "SOL": OkxInputs(mr9=1.0)}
    result = margined("okx", SWAP, prices=WORKED, inputs=inputs)
    assert "mr8" not in result.not_modelled
    assert result.notes["unused_inputs"] == "SOL"
    assert result.maintenance_margin == pytest.approx(1_183.8207318516 + 70.0, rel=1e-12)


def test_a_fall_ends_above_zero() -> None:
    """A move of -150 % is one to a millionth of the price, also for an option."""
    wide = OkxParameters(spot_moves=(0.5, 1.0, 1.5), extreme_move=2.0)
    rows = linear("DOGE-USDT-SWAP", "long", 100.0), option("DOGE", "put", "short", 100.0, 0.2, 10.0, 0.9)
    result = margined("okx", *rows, parameters={"DOGE": wide})
    assert result.scenarios is not None
    assert min(result.scenarios.price_move) == pytest.approx(1e-6 - 1.0)
    assert np.isfinite(result.scenarios.pnl).all()


def test_published_hedge_of_spot() -> None:
    """OKX's notice of 31 May 2024, at the rates of then: 10 BTC against -1,000 swaps of .01."""
    then = OkxParameters(basis_rate=0.006, minimum_rate=0.0045)
    rows = linear("BTC-USDT", "long", 10.0), linear("BTC-USDT-SWAP", "short", 1_000.0, contract_size=0.01)
    result = margined("okx", *rows, prices={"BTC": 67_111.0, "USDT": 1.0}, parameters={"BTC": then})
    assert [unit_figure(result, mr) for mr in ("mr1", "mr6")] == [0.0, 0.0]
    assert unit_figure(result, "mr4") == pytest.approx(8_053.32, abs=0.005)
    assert unit_figure(result, "mr7") == pytest.approx(3_020.17, rel=1e-4)  # at a mark of its own
    assert result.maintenance_margin == pytest.approx(8_053.32, abs=0.005)


def test_greeks_are_shocked_at_the_index_whole() -> None:
    row = greeks("BTC-X", 100_000.0, 0.5, gamma=4.0) | {"mark_price": 50_000.0}
    plain = margined("okx", row, prices={"BTC": 50_000.0})
    above = margined("okx", row, prices={"BTC": 50_000.0}, inputs={"BTC": OkxInputs(index_price=55_000.0)})
    shocked = above.per_underlying["scenario_pnl"][0]
    assert shocked == pytest.approx(1.1 * plain.per_underlying["scenario_pnl"][0], rel=1e-12)


def test_greeks_of_the_coin_are_contracts() -> None:
    result = margined("okx", greeks("BTC", 100_000.0, 0.5, gamma=0.1))
    assert unit_figure(result, "mr7") == pytest.approx(50_000.0 * 0.0045)


@pytest.mark.parametrize(
    ("spot", "basis"), [("BTC", 240.0), ("BTC-USDT", 240.0), ("BTC/USD", 240.0), ("BTC-PERP", 0.0)]
)
def test_spot_is_hedged_by_no_contract(spot: str, basis: float) -> None:
    """Spot against a perpetual pays MR4 on both, two perpetuals on what is left."""
    result = margined("okx", linear(spot, "long", 1.0), linear("BTC-USDT-SWAP", "short", 1.0))
    assert unit_figure(result, "mr4") == pytest.approx(0.0 if spot == "BTC-PERP" else 240.0)


@pytest.mark.parametrize(
    ("tiers", "is_refused"),
    [(((0.0, 1.0),), False), (((1.0, 1.0),), True), (((0.0, 1.0), (5.0, 2.0), (5.0, 3.0)), True)],
)
def test_tiers_begin_at_zero_and_rise(tiers: tuple[tuple[float, float], ...], is_refused: bool) -> None:
    assert bool(list(OkxParameters(minimum_tiers=tiers).faults())) is is_refused


@pytest.mark.parametrize("venue", ["okx", "derive"])
def test_a_future_that_never_expires_is_a_named_error(venue: str) -> None:
    """Taken for a perpetual it would pay too little for its basis."""
    future = InstrumentParameters("BTC-LATER", "BTC", kind="future")
    row = linear("BTC-LATER", "long", 1.0, mark_price=60_000.0)
    with pytest.raises(InvalidError) as caught:
        margined(venue, row, listed=[future])
    assert (caught.value.errors[0].code, caught.value.errors[0].pointer) == (
        "missing_expiry",
        "/market/instruments/BTC-LATER/expiry",
    )


def test_published_parameters_are_sound() -> None:
    assert not [fault for parameters in OKX.published.values() for fault in parameters.faults()]


# the rule once more, in loops

SPOT = {"BTC": (0.04, 0.08, 0.12), "ETH": (0.04, 0.08, 0.12), "SOL": (0.08, 0.16, 0.25), "DOGE": (0.08, 0.16, 0.25)}
EXTREME = {"BTC": 0.24, "ETH": 0.24, "SOL": 0.36, "DOGE": 0.36}
ANNUAL = {"BTC": 0.05, "ETH": 0.05, "SOL": 0.15, "DOGE": 0.15}
RATES = {"BTC": (0.002, 0.0045), "ETH": (0.002, 0.0045), "SOL": (0.008, 0.007), "DOGE": (0.008, 0.007)}
DAYS = {"BTC-27MAR26": 85.0, "ETH-27MAR26": 85.0, "SOL-27MAR26": 85.0, "DOGE-27MAR26": 85.0}


def loss(rows: Sequence[Row], prices: Mapping[str, float], index: float, move: float, vol: float) -> float:
    gained = 0.0
    for row in rows:
        if is_option(row):
            days = max(365.0 * years_of(row), 1.0)
            scale = (30.0 / days) ** (0.30 if days < 30.0 else 0.13)
            iv = max(row["iv"] * (1.0 + vol * scale), 0.01) if vol else row["iv"]
            gained += option_value(row, prices, move, iv) - option_value(row, prices)
        elif row.get("notional") is None:
            gained += signed_size(row) * index * move
        else:
            gained += straight_pnl(row, prices, move, vol)
    return -gained


def row_is_plain(row: Row) -> bool:
    return abs(row["delta"]) == 1.0 and not row.get("gamma") and not row.get("vega")


def unit_margin(name: str, rows: Sequence[Row], prices: Mapping[str, float]) -> float:
    index = prices[name]
    moves = [sign * size for size in (*SPOT[name], 0.0) for sign in (1, -1)]
    mr1 = max(0.0, *(loss(rows, prices, index, m, v) for m in moves for v in (0.25, 0.0, -0.25)))
    mr6 = max(0.0, *(loss(rows, prices, index, m, 0.0) / 2 for m in (EXTREME[name], -EXTREME[name])))
    net: dict[float | str, float] = {}
    instruments: dict[object, float] = {}
    for row in rows:
        symbol = row.get("symbol") or ""
        days = round(365.0 * years_of(row), 6) if is_option(row) else DAYS.get(symbol)
        is_spot = symbol == name and (row.get("notional") is None or row_is_plain(row))
        bucket: float | str = days or ("spot" if is_spot else "perpetual")
        net[bucket] = net.get(bucket, 0.0) + exposure_of(row, prices)
        if bucket != "spot":
            instruments[label(row)] = instruments.get(label(row), 0.0) + exposure_of(row, prices)
    basis, minimum = RATES[name]
    mr4 = 0.0
    for term, amount in net.items():
        years = term / 365.0 if isinstance(term, float) else 0.0
        mr4 += abs(amount) * max(basis, ANNUAL[name] * years)
    raw = minimum * sum(abs(amount) for amount in instruments.values())
    starts = [0.0, 250e3, 500e3, 1e6, 2e6, 3e6, 4e6, math.inf]
    mr7 = sum(
        x * max(0.0, min(raw, b) - a) for x, a, b in zip((1, 2, 4, 6, 8, 10, 12), starts, starts[1:], strict=False)
    )
    return max(max(mr1, mr6) + mr4, mr7)


def rows_of() -> st.SearchStrategy[list[Row]]:
    """Return books in which an asset itself is marked at its price: a greeks position takes the mark of its symbol."""
    linears = linear_rows(isolated=False).map(marked)
    return st.lists(st.one_of(linears, greeks_rows(), option_rows(isolated=False)), max_size=6)


@DRAWN
@given(rows=rows_of())
def test_agrees_with_the_loop(rows: list[Row]) -> None:
    result = margined("okx", *rows, expiries=DAYS)
    expected = sum(unit_margin(name, own, PRICES) for name, own in by_underlying(rows).items())
    assert result.maintenance_margin == pytest.approx(expected, rel=1e-6, abs=1e-4)
    assert result.initial_margin == pytest.approx(1.3 * expected, rel=1e-6, abs=1e-4)


@DRAWN
@given(rows=rows_of(), order=st.randoms(use_true_random=False))
def test_order_of_positions_does_not_matter(rows: list[Row], order: random.Random) -> None:
    shuffled = order.sample(rows, len(rows))
    one, other = margined("okx", *rows, expiries=DAYS), margined("okx", *shuffled, expiries=DAYS)
    assert one.maintenance_margin == pytest.approx(other.maintenance_margin, rel=1e-9, abs=1e-9)


@DRAWN
@given(rows=rows_of(), factor=between(0.01, 20.0))
def test_scales_below_the_first_tier(rows: list[Row], factor: float) -> None:
    flat = {name: replace(p, minimum_tiers=((0.0, 1.0),)) for name, p in OKX.listed(MarketParameters()).items()}
    sized = [row | {key: row[key] * factor for key in ("size", "notional", "vega") if row.get(key)} for row in rows]
    one, other = (margined("okx", *book, expiries=DAYS, parameters=flat) for book in (rows, sized))
    assert other.initial_margin == pytest.approx(factor * one.initial_margin, rel=1e-6, abs=1e-4)


@DRAWN
@given(rows=rows_of())
def test_figures_are_whole(rows: list[Row]) -> None:
    result = margined("okx", *rows, expiries=DAYS)
    assert 0.0 <= result.maintenance_margin <= result.initial_margin < math.inf
    assert result.position_initial.sum() == pytest.approx(result.initial_margin, rel=1e-9, abs=1e-7)
    assert result.position_maintenance.sum() == pytest.approx(result.maintenance_margin, rel=1e-9, abs=1e-7)
    assert all(value >= 0.0 for value in result.add_ons.values())


@DRAWN
@given(rows=rows_of(), extra=st.tuples(*[between(0.0, 1e6)] * 4))
def test_more_charges_never_lower_it(rows: list[Row], extra: tuple[float, ...]) -> None:
    inputs = {name: OkxInputs(mr2=extra[0], mr3=extra[1], mr5=extra[2], mr9=extra[3]) for name in PRICES}
    bare = margined("okx", *rows, expiries=DAYS)
    assert margined("okx", *rows, expiries=DAYS, inputs=inputs).initial_margin >= bare.initial_margin * (1 - 1e-12)


def test_nothing_open_needs_nothing() -> None:
    result = margined("okx", linear("BTC-PERP", "long", 0.0), greeks("ETH", 0.0, 1.0))
    assert (result.initial_margin, result.maintenance_margin, result.worst) == (0.0, 0.0, None)
    assert margined("okx").initial_margin == 0.0


@pytest.mark.parametrize(("days", "binding"), [(90.0, (-0.12, 0.25)), (5.0, (-0.24, 0.0))])
def test_short_options_alone(days: float, binding: tuple[float, float]) -> None:
    """With time left MR1 binds with volatility up, near expiry half of MR6's fall costs more."""
    put = option("ETH", "put", "short", 10.0, 3_000.0, days, 0.8)
    result = margined("okx", put)
    assert result.worst is not None
    assert result.scenarios is not None
    index = result.worst.index or 0
    assert (result.scenarios.price_move[index], result.scenarios.vol_move[index]) == binding
    assert "mr1_volatility_table" in result.not_modelled
    assert result.maintenance_margin == pytest.approx(unit_margin("ETH", [put], PRICES), rel=1e-6)
