"""Paradex's portfolio margin against its published example, a double loop of the rule, and properties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.margin.result import MarginResult
from app.domain.margin.venues.paradex import (
    ParadexInputs,
    ParadexParameters,
    hedged_delta,
    minimum_shares,
)
from app.errors import InvalidError
from tests.domain.book import PRICES, Row, greeks, linear, option, underlying_of
from tests.domain.venue_books import (
    by_underlying,
    exposure_of,
    label,
    margined,
    option_value,
    straight_pnl,
    unit_figure,
    years_of,
)

DRAWN = settings(max_examples=60, deadline=None, derandomize=True)

PUBLISHED = ParadexParameters()

TABLE = """
+16 +40 100 | +12 +40 100 | +12 -22 100 | +8 +40 100 | +8 -22 100 | +4 +40 100 | +4 -22 100 | 0 +40 100 | 0 -22 100
-4 +40 100 | -4 -22 100 | -8 +40 100 | -8 -22 100 | -12 +40 100 | -12 -22 100 | -16 +40 100
-66 +40 24 | -33 +40 48 | +50 +40 32 | +100 +40 16 | +200 +40 8 | +300 +40 5.33 | +400 +40 4 | +500 +40 3.2
"""
"""Price, volatility and weight in per cent, as the venue publishes them."""


def paradex(
    *rows: Row, inputs: Mapping[str, ParadexInputs] | None = None, own: Mapping[str, Any] | None = None, **more: Any
) -> MarginResult:
    parameters = {"BTC": replace(PUBLISHED, **own)} if own else None
    return margined("paradex", *rows, inputs=inputs, parameters=parameters, **more)


def test_the_scenarios_are_the_published_ones() -> None:
    cells = [cell.split() for line in TABLE.strip().splitlines() for cell in line.split("|")]
    published = [tuple(float(figure) / 100 for figure in cell) for cell in cells]
    assert len(published) == 24
    assert [pytest.approx(row) for row in published] == list(PUBLISHED.scenarios)


def test_the_published_example_of_the_minimum() -> None:
    """Long a perpetual, short five calls of delta .3, spot 70,000: net -.5, hedged 1.0, 1,400."""
    deltas = np.array([1.0, -1.5])
    assert hedged_delta(deltas) == pytest.approx(1.0)
    assert minimum_shares(deltas, np.arange(2), PUBLISHED).sum() * 70_000 == pytest.approx(1_400.0)


def test_the_minimum_binds_a_hedged_book() -> None:
    rows = (linear("BTC-PERP", "long", 2.0), linear("BTC-27MAR26", "short", 2.0))
    result = paradex(*rows)
    assert result.initial_margin == pytest.approx(0.01 * 2.0 * 60_000)
    assert result.maintenance_margin == pytest.approx(0.5 * result.initial_margin)
    assert result.worst is not None
    assert (result.worst.rule, result.worst.index) == ("minimum_delta", None)
    assert result.worst.pnl == -result.initial_margin
    assert result.position_initial.tolist() == pytest.approx([600.0, 600.0])


def test_the_scan_binds_an_open_book() -> None:
    result = paradex(linear("BTC-PERP", "long", 1.0))
    # -66 % at 24 % is .1584, -33 % at 48 % as much, -16 % is .16
    assert result.initial_margin == pytest.approx(0.16 * 60_000)
    assert result.worst is not None
    assert (result.worst.rule, result.worst.index) == ("scan", 15)
    short = paradex(linear("BTC-PERP", "short", 1.0))
    assert short.initial_margin == pytest.approx(0.16 * 60_000)  # +50 % at 32 % too: the first of those alike binds
    assert short.worst is not None
    assert short.worst.index == 0


def test_provisions_are_added_whole_to_both_margins() -> None:
    row = linear("BTC-PERP", "long", 1.0)
    plain = paradex(row)
    assert plain.not_modelled == ("funding_provision", "fee_provision")
    result = paradex(row, inputs={"BTC": ParadexInputs(funding_provision=12.5)})
    assert result.initial_margin == plain.initial_margin + 12.5
    assert result.maintenance_margin == plain.maintenance_margin + 12.5
    assert result.not_modelled == ("fee_provision",)
    assert result.add_ons["funding_provision"] == 12.5


# --- the rule in plain loops


def by_hand(rows: Sequence[Row], p: ParadexParameters) -> float:
    """Return Σ by underlying of max(scan, minimum), from the published rule."""
    required = 0.0
    for held in by_underlying(rows).values():
        scan = max(0.0, -min(weight * _pnl(held, m, v, p) for m, v, weight in p.scenarios))
        symbols: dict[Any, float] = {}
        for row in held:
            symbols[label(row)] = symbols.get(label(row), 0.0) + exposure_of(row, PRICES)
        deltas = list(symbols.values())
        net, gross = abs(sum(deltas)), sum(map(abs, deltas))
        required += max(scan, p.net_delta_rate * net + p.hedged_delta_rate * (gross - net) / 2)
    return required


def _pnl(rows: Sequence[Row], m: float, v: float, p: ParadexParameters) -> float:
    found = 0.0
    for row in rows:
        if "strike" not in row:
            found += straight_pnl(row, PRICES, m, v)
            continue
        days = 365 * years_of(row)
        factor = math.pow(30 / max(1.0, days), p.term_power_short if days < 30 else p.term_power_long)
        iv = max(row["iv"] * (1 + v * factor), 0.01)
        found += option_value(row, PRICES, m, iv) - option_value(row, PRICES)
    return found


ROWS = st.builds(
    lambda kind, name, side, size, moneyness, days, iv: (
        linear(f"{name}-PERP", side, size)
        if kind == "perpetual"
        else greeks(f"{name}-X", 1_000.0 * size, 1.0 if side == "long" else -0.7, gamma=0.4, vega=-80.0)
        if kind == "greeks"
        else option(name, kind, side, size, moneyness * PRICES[name], days, iv)
    ),
    st.sampled_from(["perpetual", "greeks", "call", "put"]),
    st.sampled_from(["BTC", "ETH", "DOGE"]),
    st.sampled_from(["long", "short"]),
    st.floats(0.01, 100.0),
    st.floats(0.3, 4.0),
    st.sampled_from([0.25, 1.0, 7.0, 29.999, 30.0, 30.001, 90.0, 400.0]),
    st.floats(0.05, 3.0),
)


@DRAWN
@given(st.lists(ROWS, min_size=1, max_size=7))
def test_any_book_is_margined_as_the_rule_says(rows: list[Row]) -> None:
    result = paradex(*rows)
    assert result.initial_margin == pytest.approx(by_hand(rows, PUBLISHED), rel=1e-6, abs=1e-4)
    assert result.maintenance_margin == pytest.approx(0.5 * result.initial_margin)
    assert result.position_initial.sum() == pytest.approx(result.initial_margin, rel=1e-9, abs=1e-6)
    assert result.position_maintenance.sum() == pytest.approx(result.maintenance_margin, rel=1e-9, abs=1e-6)
    assert np.isfinite(result.per_underlying["scenario_pnl"]).all()


@DRAWN
@given(st.lists(ROWS, min_size=2, max_size=6), st.randoms(), st.floats(0.1, 10.0))
def test_order_does_not_matter_and_size_is_a_scale(rows: list[Row], random: Any, k: float) -> None:
    base = paradex(*rows).initial_margin
    mixed = list(rows)
    random.shuffle(mixed)
    assert paradex(*mixed).initial_margin == pytest.approx(base, rel=1e-9, abs=1e-6)
    scaled = [{**row, **{n: k * row[n] for n in ("size", "notional", "vega") if row.get(n)}} for row in rows]
    assert paradex(*scaled).initial_margin == pytest.approx(k * base, rel=1e-8, abs=1e-6)


@DRAWN
@given(st.lists(ROWS, min_size=1, max_size=5), st.floats(0.0, 1e6), st.floats(0.0, 1e6))
def test_provisions_never_lower_margin(rows: list[Row], funding: float, fee: float) -> None:
    inputs = {name: ParadexInputs(funding, fee) for name in ("BTC", "ETH", "DOGE")}
    base, more = paradex(*rows), paradex(*rows, inputs=inputs)
    held = len({underlying_of(row) for row in rows})
    assert more.initial_margin == pytest.approx(base.initial_margin + held * (funding + fee))
    assert more.position_initial.sum() == pytest.approx(more.initial_margin, rel=1e-9, abs=1e-6)


# --- edges


def test_a_price_stays_above_nothing() -> None:
    result = paradex(linear("BTC-PERP", "long", 1.0), own={"scenarios": ((-1.0, 0.4, 1.0),)})
    assert result.initial_margin == pytest.approx(60_000.0 * (1 - 1e-6))
    put = option("BTC", "put", "short", 1.0, 60_000.0, 30.0, 0.5)
    assert np.isfinite(paradex(put, own={"scenarios": ((-1.0, 0.4, 1.0),)}).initial_margin)


def test_a_volatility_stays_at_a_hundredth() -> None:
    row = option("BTC", "call", "long", 1.0, 60_000.0, 30.0, 0.5)
    pnl = paradex(row, own={"scenarios": ((0.0, -1.0, 1.0),)}).per_underlying["scenario_pnl"][0][0]
    assert pnl == pytest.approx(option_value(row, PRICES, 0.0, 0.01) - option_value(row, PRICES))


def test_a_floor_of_volatility_can_be_set() -> None:
    """The venue's own client lifts volatility to .40 at least after a move upwards; the published rule does not."""
    row = option("BTC", "call", "short", 1.0, 60_000.0, 30.0, 0.20)
    scenarios = ((0.0, 0.4, 1.0), (0.0, -0.22, 1.0))
    plain = paradex(row, own={"scenarios": scenarios}).per_underlying["scenario_pnl"][0]
    lifted = paradex(row, own={"scenarios": scenarios, "volatility_floor": 0.4}).per_underlying["scenario_pnl"][0]
    assert plain[0] == pytest.approx(option_value(row, PRICES, 0.0, 0.28) - option_value(row, PRICES))
    assert lifted[0] == pytest.approx(option_value(row, PRICES, 0.0, 0.40) - option_value(row, PRICES))
    assert lifted[1] == plain[1]


def test_a_book_of_long_options_alone_loses_its_value_at_most() -> None:
    rows = (
        option("BTC", "call", "long", 1.0, 60_000.0, 30.0, 0.5),
        option("BTC", "put", "long", 1.0, 50_000.0, 7.0, 0.6),
    )
    result = paradex(*rows)
    assert unit_figure(result, "scan_risk") <= sum(option_value(row, PRICES) for row in rows)


def test_what_the_venue_does_to_options_beyond_the_rule_is_named() -> None:
    far, near = (option("BTC", "call", "long", 1.0, 60_000.0, days, 0.5) for days in (30.0, 0.01))
    provisions = {"BTC": ParadexInputs(1.0, 1.0)}
    assert paradex(far, inputs=provisions).not_modelled == ("volatility_floor",)
    assert paradex(far, inputs=provisions, own={"volatility_floor": 0.4}).not_modelled == ()
    assert paradex(near, inputs=provisions).not_modelled == ("volatility_floor", "settlement_average")
    assert paradex(linear("BTC-PERP", "long", 1.0), inputs=provisions).not_modelled == ()


def test_underlyings_add_up_and_may_bind_by_different_rules() -> None:
    pair = (linear("BTC-PERP", "long", 1.0), linear("BTC-27MAR26", "short", 1.0))
    open_one = linear("ETH-PERP", "long", 1.0)
    both = paradex(*pair, open_one)
    assert both.initial_margin == pytest.approx(paradex(*pair).initial_margin + paradex(open_one).initial_margin)
    assert both.worst is not None
    assert (both.worst.rule, both.worst.index) == ("several", None)


def test_closing_everything_gives_nothing() -> None:
    for rows in ((), (linear("BTC-PERP", "long", 0.0),)):
        result = paradex(*rows)
        assert (result.initial_margin, result.maintenance_margin) == (0.0, 0.0)
    pair = [linear("BTC-PERP", side, 1.0) for side in ("long", "short")]
    assert paradex(*pair).initial_margin == 0.0


def test_a_price_is_needed() -> None:
    with pytest.raises(InvalidError) as refused:
        paradex(greeks("BTC-X", 1_000.0, 1.0), prices={})
    assert refused.value.code == "missing_price"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"scenarios": ((0.1, 0.4, 0.0),)}, "scenarios"),
        ({"scenarios": ((0.1, 0.4, 2.0),)}, "scenarios"),
        ({"scenarios": ()}, "scenarios"),
        ({"scenarios": ((-1.5, 0.4, 1.0),)}, "scenarios"),
        ({"scenarios": ((math.nan, 0.4, 1.0),)}, "scenarios"),
        ({"scenarios": ((0.1, 0.4, 1.0),) * 101}, "scenarios"),
        ({"hedged_delta_rate": 0.05}, "hedged_delta_rate"),
        ({"maintenance_fraction": 1.5}, "maintenance_fraction"),
    ],
)
def test_parameters_that_make_no_sense_are_faulted(changes: dict[str, Any], field: str) -> None:
    assert [error.pointer for error in replace(PUBLISHED, **changes).faults()] == [f"/{field}"]
