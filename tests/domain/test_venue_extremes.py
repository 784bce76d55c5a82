"""No venue's model gives anything but a number, whatever within their bounds positions, parameters and inputs are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from app.domain.margin.result import MarginResult
from app.domain.margin.venues import deribit, derive, okx
from app.domain.margin.venues.derive import DeriveParameters
from app.domain.margin.venues.registry import VENUES
from app.domain.margin.venues.terms import VenueInputs, VenueParameters
from app.domain.margin.venues.venue import Venue
from app.domain.parameters import DEFAULT_ASSET
from app.errors import InvalidError
from tests.domain.book import NOW, Book, Row, greeks, linear, option

SIZES = st.sampled_from([1e-12, 1e-3, 1.0, 1e6, 1e15])
SIDES = st.sampled_from(["long", "short"])
GREEK = st.sampled_from([0.0, 0.1, 1e15, -1e15])
ROWS = st.one_of(
    st.builds(lambda side, size, mark: linear("BTC-PERP", side, size, mark_price=mark), SIDES, SIZES, SIZES),
    st.builds(lambda side, size, mark: linear("BTC-FUT", side, size, mark_price=mark), SIDES, SIZES, SIZES),
    st.builds(
        lambda notional, delta, gamma, vega: greeks("BTC-X", notional, delta, gamma=gamma, vega=vega),
        SIZES,
        st.sampled_from([-1_000.0, -1.0, 0.0, 1_000.0]),
        GREEK,
        GREEK,
    ),
    st.builds(
        lambda kind, side, size, strike, days, iv, rate: option("BTC", kind, side, size, strike, days, iv, rate=rate),
        st.sampled_from(["call", "put"]),
        SIDES,
        SIZES,
        SIZES,
        st.sampled_from([1e-6, 0.01, 1.0, 29.999, 30.0, 400.0, 18_000.0]),
        st.sampled_from([0.0001, 0.5, 50.0]),
        st.sampled_from([0.0, -1.0, 1.0]),
    ),
)


@st.composite
def own_parameters(draw: st.DrawFn, venue: Venue[Any, Any]) -> VenueParameters:
    """Draw parameters of which some stand at a bound, or between."""
    known: VenueParameters = venue.published.get("BTC") or venue.published[DEFAULT_ASSET]
    changes: dict[str, Any] = {}
    for one in fields(known):
        if draw(st.integers(0, 4)) == 0:
            low, high = one.metadata["bounds"]
            number = st.sampled_from([low, high, (low + high) / 2, min(max(low, 0.0), high), min(max(low, 1.0), high)])
            changes[one.name] = _like(draw, getattr(known, one.name), number)
    own = replace(known, **changes)
    assume(not list(own.faults()))
    return own


def _like(draw: st.DrawFn, value: Any, number: st.SearchStrategy[float]) -> Any:
    if isinstance(value, tuple):
        return tuple(_like(draw, item, number) for item in value)
    return int(draw(number)) if isinstance(value, int) else draw(number)


@st.composite
def own_inputs(draw: st.DrawFn, venue: Venue[Any, Any]) -> VenueInputs:
    known = {one.name: draw(st.sampled_from([None, *one.metadata["bounds"]])) for one in fields(venue.inputs)}
    inputs: VenueInputs = venue.inputs(**known)
    assume(not list(inputs.faults()))
    return inputs


def margin(name: str, rows: list[Row], prices: Mapping[str, float], **venue: Any) -> MarginResult:
    far = {"BTC-FUT": {"kind": "future", "expiry": NOW + timedelta(days=60_000)}}
    whole = Book(rows=tuple(rows), prices=prices, instruments=far, **venue)
    return whole.quote(models=[name]).models[name]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", VENUES)
def test_figures_are_numbers(name: str) -> None:
    venue = VENUES[name]

    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
    @given(st.lists(ROWS, min_size=1, max_size=4), own_parameters(venue), own_inputs(venue), SIZES)
    def check(rows: list[Row], parameters: VenueParameters, inputs: VenueInputs, price: float) -> None:
        own = {"venues": {name: {"BTC": parameters}}, "venue_inputs": {name: {"BTC": inputs}}}
        try:
            result = margin(name, rows, {"BTC": price}, **own)
        except InvalidError:
            assume(False)
        assert math.isfinite(result.initial_margin)
        assert 0.0 <= result.maintenance_margin <= result.initial_margin * (1.0 + 1e-9)
        assert np.isfinite(result.position_initial).all()
        assert np.isfinite(result.per_underlying["scenario_pnl"]).all()
        of_positions = result.initial_margin - result.add_ons.get("mr8_initial", 0.0)  # the account's
        # the scenario that is shared out is the first of those alike, to rounding of the largest figure
        largest = float(np.abs(result.per_underlying["scenario_pnl"]).max(initial=0.0))
        scale = result.initial_margin + largest + float(np.abs(result.position_initial).sum())
        assert result.position_initial.sum() == pytest.approx(of_positions, rel=1e-6, abs=1e-9 * scale)

    check()


def test_a_zero_of_either_sign_is_shown_as_the_same() -> None:
    """Both are one set of parameters, so that whoever asks first would choose what all others are shown."""
    for zero in (-0.0, 0.0):
        tables = [
            deribit.matrix(deribit.DeribitParameters(extended_moves=(zero,))).labels,
            okx.scenarios(okx.OkxParameters(extreme_move=zero)).labels,
            derive.scenarios(derive.DeriveParameters(edge_moves=(zero,), tails=((zero, zero),))).labels,
        ]
        assert all(
            math.copysign(1.0, figure) == 1.0 for table in tables for label in table for figure in label if not figure
        )


def test_scenarios_of_all_underlyings_are_limited() -> None:
    """Each is a column of every underlying, so that tables of their own would grow a reply by the square."""
    moves = [tuple((k + j / 10) / 1_000 for k in range(100)) for j in range(4)]
    own = {f"X{j}": DeriveParameters(moves=each, tails=((0.5, 0.1),)) for j, each in enumerate(moves)}

    def quote(count: int) -> MarginResult:
        rows = tuple(linear(f"X{j}-PERP", "long", 1.0, mark_price=10.0) for j in range(count))
        return Book(rows=rows, venues={"derive": own}).quote(models=["derive"]).models["derive"]

    kept = quote(3).scenarios
    assert kept is not None
    assert len(kept.pnl) == 3 * (2 + 300 + 1 + 2)
    with pytest.raises(InvalidError) as refused:
        quote(4)
    assert (refused.value.code, refused.value.errors[0].pointer) == ("too_many_items", "/market/venues/derive")
