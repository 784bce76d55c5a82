"""The count of all accounts against the accounts one by one, each assessed by itself."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.book import Book, Holding
from app.domain.book_columns import book_columns
from app.domain.screen import Screen
from app.domain.tally import BANDS, tally
from app.errors import InvalidError
from tests.domain.test_screen import PARAMETERS, PRICES, books, oracle

ZONES = ("GREEN", "YELLOW", "ORANGE", "RED")


def _band(ratio: float) -> str:
    for name in BANDS[:-1]:
        low, high = map(float, name.split("-"))
        if low <= ratio < high:
            return name
    return BANDS[-1]


def _ratio(book: Book) -> float | None:
    """Return the margin ratio of a book by itself, None where a price lacks."""
    try:
        ratio = oracle(book, PARAMETERS, PRICES).health.margin_ratio
    except InvalidError:
        return None
    return math.inf if ratio is None else ratio


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_accounts_are_counted_as_each_is_assessed(data: st.DataObject) -> None:
    fleet = [data.draw(books(f"agent_{k}")) for k in range(data.draw(st.integers(0, 6)))]
    screen = Screen(PARAMETERS, PRICES)
    screen.update(book_columns(fleet, frozenset()))
    ranks = np.array([data.draw(st.integers(0, 3)) for _ in fleet], dtype=np.int8)
    found = tally(screen, (ZONES, ranks), (ZONES, ranks))
    ratios = {book.agent_id: _ratio(book) for book in fleet}
    known = {agent: ratio for agent, ratio in ratios.items() if ratio is not None}
    assert found.accounts == len(fleet)
    assert found.unpriced == len(fleet) - len(known)
    assert found.bands == {band: Counter(map(_band, known.values()))[band] for band in BANDS}
    assert found.zones == found.alert_levels == {z: Counter(ranks.tolist())[k] for k, z in enumerate(ZONES)}
    told = [math.inf if row.margin_ratio is None else row.margin_ratio for row in found.worst]
    assert told == sorted(told, reverse=True)
    assert {row.agent_id for row in found.worst} == {agent for agent, ratio in known.items() if ratio > 0.0}
    np.testing.assert_allclose(told, [known[row.agent_id] for row in found.worst], rtol=1e-9)
    held = {a for book in fleet for a, h in book.holdings.items() if h != Holding()}
    used = held | {p.symbol for book in fleet for p in book.positions}
    under = {PARAMETERS.underlying_of(p.symbol) for b in fleet for p in b.positions if p.symbol not in PRICES}
    assert found.prices.keys() == {name for name in used | under if name in PRICES}
