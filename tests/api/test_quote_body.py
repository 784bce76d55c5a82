"""A key that stands twice is found in any book, wherever it hides."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.quote_request import MARGIN_QUOTE
from app.errors import InvalidError
from tests.api.bodies import GREEKS, LINEAR, OPTION

NAMES = st.sampled_from(["BTC-PERP", "perp:BTC", "a:b:c", "BTC/USDC:USDC", "X"])
IDS = st.sampled_from(["", ":", "one", "2026-12-25T08:00:00Z", '","size":'])


@st.composite
def positions(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a position of any kind, with some of its fields, in any order."""
    whole = draw(st.sampled_from([LINEAR, GREEKS, OPTION])) | {"symbol": draw(NAMES), "id": draw(IDS)}
    if draw(st.booleans()):
        whole["size"] = 0
    kept = draw(st.lists(st.sampled_from(sorted(whole)), unique=True, min_size=1))
    return {name: whole[name] for name in kept}


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[str, str, str]:
    """Draw a body, the same with a key of one of its positions given twice, and where that stands."""
    book = draw(st.lists(positions(), min_size=1, max_size=6))
    at = draw(st.integers(0, len(book) - 1))
    name = draw(st.sampled_from(sorted(book[at])))
    again = draw(st.sampled_from([book[at], *(other for other in book if name in other)]))[name]
    texts = [json.dumps(position) for position in book]
    plain = '{"positions":[' + ",".join(texts) + '],"market":{"prices":{"perp:BTC":1}}}'
    texts[at] = f'{{"{name}":{json.dumps(again)},{texts[at][1:]}'
    return (
        plain,
        '{"positions":[' + ",".join(texts) + '],"market":{"prices":{"perp:BTC":1}}}',
        f"/positions/{at}/{name}",
    )


@given(spoiled())
def test_a_key_given_twice_is_found(bodies: tuple[str, str, str]) -> None:
    """Whatever else the body holds: colons in names, fields that others leave out, sizes of 0."""
    plain, twice, pointer = bodies
    assert MARGIN_QUOTE.decode(plain.encode()).positions
    with pytest.raises(InvalidError) as refused:
        MARGIN_QUOTE.decode(twice.encode())
    assert [(error.pointer, error.code) for error in refused.value.errors] == [(pointer, "duplicate_key")]


@pytest.mark.parametrize("kept", [{}, {"strike": None, "iv": None}])
def test_an_empty_expiry_is_no_time(kept: dict[str, Any]) -> None:
    """It is a text like any other, not one left out."""
    body = {"positions": [LINEAR, OPTION | {"expiry": ""} | kept]}
    with pytest.raises(InvalidError) as refused:
        assert MARGIN_QUOTE.decode(json.dumps(body).encode()).terms
    assert [(error.pointer, error.code) for error in refused.value.errors] == [("/positions/1/expiry", "invalid_value")]
