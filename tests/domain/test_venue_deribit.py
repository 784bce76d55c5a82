"""Deribit's X:PM against the two cases that the venue publishes, a double loop of the rule, and properties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.margin.result import MarginResult
from app.domain.margin.venues.deribit import PUBLISHED, DeribitInputs, DeribitParameters, matrix
from app.errors import InvalidError
from tests.domain.book import NOW, Book, Row, greeks, linear, option
from tests.domain.reference import normal

DRAWN = settings(max_examples=60, deadline=None, derandomize=True)

BTC, ETH = PUBLISHED["BTC"], PUBLISHED["ETH"]

Terms = Mapping[str, DeribitInputs]


def deribit(*rows: Row, inputs: Terms | None = None, own: Mapping[str, Any] | None = None, **book: Any) -> MarginResult:
    venues = {"deribit": {name: PUBLISHED.get(name, BTC) for name in own}} if own else {}
    for name, changes in (own or {}).items():
        venues["deribit"][name] = replace(venues["deribit"][name], **changes)
    whole = Book(rows=rows, venues=venues, venue_inputs={"deribit": inputs or {}}, **book)
    return whole.quote(models=["deribit"]).models["deribit"]


def coin(result: MarginResult, name: str, underlying: int = 0) -> float:
    return float(result.per_underlying[f"{name}_coin"][underlying])


# --- published cases


WORKED = (
    linear("BTC-PERP", "long", 0.314538364, mark_price=65_910.57),
    linear("BTC-28JUN24", "short", 0.001187534, mark_price=67_371.75),
)


def test_the_published_case_of_btc() -> None:
    inputs = DeribitInputs(mmp=0.06, open_orders=0.000018212)
    result = deribit(*WORKED, inputs={"BTC": inputs}, prices={"BTC": 65_666.19}, own={"BTC": {"minimum_roll": 0.01}})
    pnl = result.per_underlying["scenario_pnl"][0] / 65_666.19
    losses = [0.05968587238, 0.04272965864, 0.02724789826, 0.01305628458]
    assert -pnl[:12] == pytest.approx(np.repeat(losses, 3), abs=1e-11)
    assert (pnl[12:] == 0.0).all()  # gains do not count at an offset of 0, and the dampener takes the rest
    assert coin(result, "worst_loss") == pytest.approx(0.05968587238, abs=1e-11)
    assert coin(result, "roll_shock") == pytest.approx(0.00315725898, abs=1e-11)
    assert coin(result, "matrix_margin") == pytest.approx(0.06284313, abs=1e-8)
    assert coin(result, "initial_margin") == pytest.approx(0.122861343, abs=1e-8)
    assert coin(result, "maintenance_margin") == pytest.approx(0.050274505, abs=1e-8)
    assert result.initial_margin == pytest.approx(65_666.19 * coin(result, "initial_margin"))
    assert result.worst is not None
    assert (result.worst.rule, result.worst.index) == ("matrix", 0)
    assert result.not_modelled == ("delta_shock", "correlation_contingency")


def test_the_published_case_of_eth() -> None:
    """The response of private/pme/simulate for a short perpetual, with a pnl_offset of .6."""
    row = linear("ETH-PERP", "short", 0.999487053, mark_price=1_949.49)
    result = deribit(row, prices={"ETH": 1_949.34}, own={"ETH": {"pnl_offset": 0.6}})
    published = [
        0.13163975819999998, 0.09359358530982659, 0.05931022072747252, 0.028257749142408375, 0.0,
        -0.04304011233014354, -0.08252645391743119, -0.11888171996035243, -0.15246412672881357,
    ]  # fmt: skip
    pnl = result.per_underlying["scenario_pnl"][0] / 1_949.34
    assert pnl[:27] == pytest.approx(np.repeat(published, 3), abs=1e-14)
    assert (pnl[27:] == 0.0).all()  # the dampener takes gains as well as losses
    assert coin(result, "roll_shock") == pytest.approx(0.004997435265, abs=1e-15)
    assert coin(result, "matrix_margin") == pytest.approx(0.157461562265, abs=1e-9)
    assert coin(result, "initial_margin") == pytest.approx(0.157461562, abs=1e-9)
    assert coin(result, "maintenance_margin") == pytest.approx(0.125969249812, abs=1e-9)
    assert result.worst is not None
    assert result.worst.index == 24  # the first of three alike; the venue counts them from 1


def test_the_extended_table_is_that_of_the_response() -> None:
    """Before the dampener: 0.2194 in falls, -0.1525 in rises, as if the market stopped at the edge of the range."""
    row = linear("ETH-PERP", "short", 0.999487053, mark_price=1_949.34)
    own = {"ETH": {"extended_dampener": 0.0, "pnl_offset": 1.0}}
    pnl = deribit(row, prices={"ETH": 1_949.34}, own=own).per_underlying["scenario_pnl"][0][27:] / 1_949.34
    assert pnl == pytest.approx([0.21939959699999997] * 2 + [-0.15246412672881357] * 6, abs=1e-14)


# --- the rule in plain loops


def black(sign: float, forward: float, strike: float, years: float, iv: float, rate: float) -> float:
    if iv <= 0.0:
        return math.exp(-rate * years) * max(sign * (forward - strike), 0.0)
    width = iv * math.sqrt(years)
    d1 = math.log(forward / strike) / width + width / 2.0
    value = sign * (forward * normal(sign * d1) - strike * normal(sign * (d1 - width)))
    return math.exp(-rate * years) * value


@dataclass(frozen=True)
class Hand:
    """The published rule, row by row and scenario by scenario, in coin."""

    rows: Sequence[Row]
    p: DeribitParameters
    index: float

    def years(self, row: Row) -> float:
        return float((row["expiry"] - NOW).total_seconds()) / 31_536_000 if "expiry" in row else 0.0

    def size(self, row: Row) -> float:
        return float(row["size"]) * (1.0 if row["side"] == "long" else -1.0)

    def value(self, row: Row, forward: float, iv: float) -> float:
        phi = 1.0 if row["type"] == "call" else -1.0
        return black(phi, forward, row["strike"], self.years(row), iv, row.get("rate", 0.0))

    def volatility(self, row: Row, side: int) -> float:
        days, iv = 365 * self.years(row), float(row["iv"])
        power = self.p.term_power_short if days < 30 else self.p.term_power_long
        factor = math.pow(30 / max(days, 1), power)
        if side > 0:
            return max(iv * (1 + self.p.volatility_up * factor), self.p.volatility_floor)
        return max(iv * (1 - self.p.volatility_down * factor), 0.0) if side < 0 else iv

    def pnl(self, row: Row, m: float, side: int) -> float:
        if "strike" not in row:
            return self.size(row) * (1 - 1 / (1 + m))
        after = self.value(row, self.index * (1 + m), self.volatility(row, side)) / (self.index * (1 + m))
        return self.size(row) * (after - self.value(row, self.index, row["iv"]) / self.index)

    def extended(self, m: float) -> float:
        p, edge = self.p, 1 + math.copysign(self.p.price_range, m)
        value = sum(self.pnl(row, m, 1) for row in self.rows) * p.extended_factor
        value *= min(1, p.price_range / abs(m)) * (1 + m) / edge
        relief = max(abs(m) / p.price_range - 1, 0) * p.extended_dampener / (edge * self.index)
        return value + min(relief, -value) if value < 0 else 0.0

    def worst(self) -> float:
        steps = [self.p.price_range * k / 4 for k in range(-4, 5)]
        inner = [sum(self.pnl(row, m, side) for row in self.rows) for m in steps for side in (1, 0, -1)]
        return max(0.0, -min(inner + [self.extended(m) for m in self.p.extended_moves]))

    def delta(self, row: Row) -> float:
        if "strike" not in row:
            return self.size(row)
        step = 1e-4 * self.index
        up, down = (self.value(row, self.index + h, row["iv"]) for h in (step, -step))
        return self.size(row) * (up - down) / (2 * step)

    def roll(self) -> float:
        found: dict[float, float] = {}
        for row in self.rows:
            found[self.years(row)] = found.get(self.years(row), 0.0) + self.delta(row)
        rate = self.p.annual_roll
        return sum(abs(net) * max(math.exp(rate * years) - 1, self.p.minimum_roll) for years, net in found.items())


def by_hand(rows: Sequence[Row], p: DeribitParameters, index: float, inputs: DeribitInputs) -> tuple[float, float]:
    """Return IM and MM in coin of rows on one currency."""
    hand = Hand(rows, p, index)
    risk = hand.worst() + hand.roll() + (inputs.delta_shock or 0.0) + (inputs.correlation_contingency or 0.0)
    return risk + (inputs.mmp or 0.0) + (inputs.open_orders or 0.0), p.maintenance_fraction * risk


HELD = st.builds(
    lambda kind, side, size, strike, days, iv, rate: (
        linear("BTC-PERP", side, size, mark_price=60_000.0)
        if kind == "perpetual"
        else option("BTC", kind, side, size, strike, days, iv, rate=rate)
    ),
    st.sampled_from(["perpetual", "call", "put"]),
    st.sampled_from(["long", "short"]),
    st.floats(0.01, 50.0),
    st.floats(20_000.0, 200_000.0),
    st.sampled_from([0.25, 0.5, 1.0, 7.0, 29.999, 30.0, 30.001, 90.0, 400.0]),
    st.floats(0.05, 3.0),
    st.sampled_from([0.0, 0.05]),
)


@DRAWN
@given(st.lists(HELD, min_size=1, max_size=6), st.sampled_from([BTC, ETH, replace(BTC, price_range=0.7)]))
def test_any_book_is_margined_as_the_rule_says(rows: list[Row], p: DeribitParameters) -> None:
    inputs = DeribitInputs(mmp=0.01, delta_shock=0.02, correlation_contingency=0.03)
    whole = Book(rows=tuple(rows), venues={"deribit": {"BTC": p}}, venue_inputs={"deribit": {"BTC": inputs}})
    result = whole.quote(models=["deribit"]).models["deribit"]
    initial, maintenance = by_hand(rows, p, 60_000.0, inputs)
    assert coin(result, "initial_margin") == pytest.approx(initial, rel=1e-6, abs=1e-6)
    assert coin(result, "maintenance_margin") == pytest.approx(maintenance, rel=1e-6, abs=1e-6)
    assert result.position_initial.sum() == pytest.approx(result.initial_margin, rel=1e-9, abs=1e-6)
    assert result.position_maintenance.sum() == pytest.approx(result.maintenance_margin, rel=1e-9, abs=1e-6)
    assert np.isfinite(result.per_underlying["scenario_pnl"]).all()


@DRAWN
@given(st.lists(HELD, min_size=2, max_size=6), st.randoms())
def test_the_order_of_positions_does_not_matter(rows: list[Row], random: Any) -> None:
    mixed = list(rows)
    random.shuffle(mixed)
    assert deribit(*mixed).initial_margin == pytest.approx(deribit(*rows).initial_margin, rel=1e-9, abs=1e-6)


@DRAWN
@given(st.lists(HELD, min_size=1, max_size=5), st.floats(0.1, 10.0))
def test_without_a_dampener_margin_is_homogeneous(rows: list[Row], k: float) -> None:
    scaled = [row | {"size": k * row["size"]} for row in rows]
    own = {"BTC": {"extended_dampener": 0.0}}
    assert deribit(*scaled, own=own).initial_margin == pytest.approx(
        k * deribit(*rows, own=own).initial_margin, rel=1e-8, abs=1e-6
    )


@DRAWN
@given(st.lists(HELD, min_size=1, max_size=5), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_inputs_and_a_smaller_dampener_never_lower_margin(rows: list[Row], shock: float, mmp: float) -> None:
    base = deribit(*rows)
    more = deribit(*rows, inputs={"BTC": DeribitInputs(mmp=mmp, delta_shock=shock)})
    harsher = deribit(*rows, own={"BTC": {"extended_dampener": 0.0}})
    assert more.initial_margin >= base.initial_margin
    assert more.maintenance_margin >= base.maintenance_margin
    assert harsher.initial_margin >= base.initial_margin - 1e-9


# --- edges


def test_the_dampener_is_worth_d_a_range() -> None:
    """A short strangle far out: the loss beyond the range counts less what D relieves, never below nothing."""
    rows = (option("BTC", "call", "short", 400.0, 150_000.0, 20.0, 0.6),)
    own = {"extended_moves": (1.0,), "price_range": 0.2}
    raw, soft = (deribit(*rows, own={"BTC": own | {"extended_dampener": d}}) for d in (0.0, 10_000.0))
    # (1.0/.2 - 1) x 10,000 at the edge of 1.2 S, back in coin at the index
    relief = 4.0 * 10_000.0 / 1.2
    before, after = (float(r.per_underlying["scenario_pnl"][0][-1]) for r in (raw, soft))
    assert after - before == pytest.approx(relief)


def test_an_extended_move_within_the_range_counts_whole() -> None:
    table = matrix(replace(BTC, price_range=0.7, extended_moves=(-0.66, 0.5, 0.0)))
    assert table.scale[-3:] == pytest.approx([(1 - 0.66) / 0.3, 1.5 / 1.7, 1.0])
    assert (table.relief[-3:] == 0.0).all()


def test_prices_stay_above_nothing() -> None:
    table = matrix(replace(BTC, price_range=0.99, extended_moves=(-0.99,)))
    assert (1.0 + table.moves > 0.0).all()


def test_volatility_falls_to_nothing_at_most() -> None:
    """Down by b (30/DTE)^p of 1 or more an option is worth what it would be if it were exercised."""
    row = option("BTC", "call", "long", 1.0, 50_000.0, 0.5, 1.5)
    result = deribit(row, own={"BTC": {"volatility_down": 0.5}})
    pnl = result.per_underlying["scenario_pnl"][0]
    assert np.isfinite(pnl).all()
    value = black(1.0, 60_000.0, 50_000.0, 0.5 / 365, 1.5, 0.0)
    assert pnl[14] == pytest.approx(-(value - 10_000.0), abs=1e-6)  # price unchanged, volatility down


def test_volatility_up_has_a_floor() -> None:
    row = option("BTC", "put", "short", 1.0, 60_000.0, 30.0, 0.10)
    lifted = black(-1.0, 60_000.0, 60_000.0, 30 / 365, 0.50, 0.0) - black(-1.0, 60_000.0, 60_000.0, 30 / 365, 0.10, 0.0)
    assert deribit(row).per_underlying["scenario_pnl"][0][12] == pytest.approx(-lifted, rel=1e-9)


@pytest.mark.parametrize(
    ("days", "factor"), [(0.2, 30**0.3), (1.0, 30**0.3), (29.99, (30 / 29.99) ** 0.3), (30.0, 1.0)]
)
def test_the_term_of_an_option_scales_its_volatility(days: float, factor: float) -> None:
    row = option("BTC", "call", "short", 1.0, 60_000.0, days, 0.60)
    years = days / 365
    up = black(1.0, 60_000.0, 60_000.0, years, 0.6 * (1 + 0.5 * factor), 0.0)
    pnl = deribit(row).per_underlying["scenario_pnl"][0][12]
    assert pnl == pytest.approx(-(up - black(1.0, 60_000.0, 60_000.0, years, 0.6, 0.0)), rel=1e-9)


def test_each_expiry_rolls_by_itself() -> None:
    """Long a perpetual, short a future of a year: 1 % of one, e^.075 - 1 of the other, nothing nets."""
    expiry = NOW + timedelta(days=365)
    rows = (linear("BTC-PERP", "long", 2.0, mark_price=60_000.0), linear("BTC-YEAR", "short", 1.0, mark_price=62_000.0))
    instruments = {"BTC-YEAR": {"kind": "future", "expiry": expiry}}
    result = deribit(*rows, instruments=instruments)
    assert coin(result, "roll_shock") == pytest.approx(2.0 * 0.01 + (math.exp(0.075) - 1))
    same = deribit(*rows, option("BTC", "call", "long", 1.0, 1.0, 365.0, 0.5), instruments=instruments)
    assert coin(same, "roll_shock") == pytest.approx(2.0 * 0.01, abs=1e-9)  # a call of delta 1 at the future's expiry


def test_a_future_past_its_expiry_rolls_at_the_minimum() -> None:
    row = linear("BTC-PAST", "long", 1.0, mark_price=60_000.0)
    past = {"BTC-PAST": {"kind": "future", "expiry": NOW - timedelta(days=3)}}
    assert coin(deribit(row, instruments=past), "roll_shock") == pytest.approx(0.01)


def test_a_symbol_says_when_it_expires() -> None:
    row = linear("BTC-27JUN31", "long", 1.0, mark_price=60_000.0)
    years = (datetime(2031, 6, 27, 8, tzinfo=UTC) - NOW).total_seconds() / 31_536_000
    for symbol in ("BTC-27JUN31", "BTC-USD-310627"):
        assert coin(deribit(row | {"symbol": symbol}), "roll_shock") == pytest.approx(math.exp(0.075 * years) - 1)
    assert coin(deribit(row | {"symbol": "BTC-31FEB31"}), "roll_shock") == pytest.approx(0.01)  # no day: a perpetual


def test_a_future_needs_an_expiry() -> None:
    row = linear("BTC-SOMEDAY", "long", 1.0, mark_price=60_000.0)
    with pytest.raises(InvalidError) as refused:
        deribit(row, instruments={"BTC-SOMEDAY": {"kind": "future"}})
    assert refused.value.code == "missing_expiry"
    assert refused.value.errors[0].pointer == "/market/instruments/BTC-SOMEDAY/expiry"


def test_an_underlying_without_parameters_is_an_error() -> None:
    row = linear("SOL-PERP", "long", 1.0, mark_price=150.0)
    with pytest.raises(InvalidError) as refused:
        deribit(row)
    assert refused.value.code == "missing_parameters"
    assert refused.value.errors[0].pointer == "/market/venues/deribit/SOL/parameters"
    assert deribit(row, own={"SOL": {}}).initial_margin > 0.0


def test_a_closed_position_needs_none() -> None:
    result = deribit(linear("SOL-PERP", "long", 0.0, mark_price=150.0))
    assert (result.initial_margin, result.maintenance_margin, result.worst) == (0.0, 0.0, None)


def test_closing_everything_gives_nothing() -> None:
    result = deribit()
    assert (result.initial_margin, result.maintenance_margin) == (0.0, 0.0)
    pair = deribit(*(linear("BTC-PERP", side, 1.0, mark_price=60_000.0) for side in ("long", "short")))
    assert pair.initial_margin == 0.0


def test_an_input_for_an_underlying_that_is_not_held_is_told() -> None:
    row = linear("BTC-PERP", "long", 1.0, mark_price=60_000.0)
    result = deribit(row, inputs={"ETH": DeribitInputs(mmp=1.0)})
    assert result.notes["unused_inputs"] == "ETH"


def test_a_greeks_position_needs_a_price() -> None:
    row = greeks("BTC-PERP", 60_000.0, 1.0)
    priced = deribit(row)
    assert priced.initial_margin == pytest.approx(deribit(linear("BTC-PERP", "long", 1.0)).initial_margin)
    with pytest.raises(InvalidError) as refused:
        deribit(row, prices={})
    assert refused.value.code == "missing_price"


def test_currencies_add_up() -> None:
    btc = linear("BTC-PERP", "long", 1.0, mark_price=60_000.0)
    eth = linear("ETH-PERP", "short", 20.0, mark_price=3_000.0)
    both, alone = deribit(btc, eth), [deribit(btc), deribit(eth)]
    assert both.initial_margin == pytest.approx(sum(r.initial_margin for r in alone))
    assert both.scenarios is not None
    assert len(both.scenarios.pnl) == 70  # the extended moves weigh another R/|m|
    assert both.per_underlying["worst_index"].tolist() == [0.0, 35.0 + 24.0]
    assert both.worst is not None
    assert both.worst.index is None


def test_currencies_of_other_scenarios_are_listed_one_after_the_other() -> None:
    rows = (linear("BTC-PERP", "long", 1.0, mark_price=60_000.0), linear("ETH-PERP", "long", 1.0, mark_price=3_000.0))
    result = deribit(*rows, own={"ETH": {"price_buckets": 1, "extended_moves": (1.0,)}})
    assert result.scenarios is not None
    assert len(result.scenarios.pnl) == 35 + 10
    assert np.isnan(result.per_underlying["scenario_pnl"][1][:35]).all()
    assert result.per_underlying["worst_index"].tolist() == [0.0, 35.0]


def test_no_loss_is_shown_as_minus_nothing() -> None:
    """The dampener takes a loss to 0, not to -0."""
    pnl = deribit(linear("BTC-PERP", "long", 0.1)).per_underlying["scenario_pnl"][0]
    assert (pnl == 0.0).any()
    assert not np.signbit(pnl[pnl == 0.0]).any()
