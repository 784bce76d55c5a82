"""The buffer before an event: what is sold and cut, by hand, and what holds for any book."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.book import Book, Holding
from app.domain.sizing.event_buffer import EventBuffer, EventTerms, plan_event_buffer
from app.errors import InvalidError
from tests.domain.deleveraged import NOW, Floor, book, position

FLOOR = Floor()
DRAWN = settings(max_examples=60, deadline=None, derandomize=True)
LATER = NOW + timedelta(hours=6)


def planned(held: Book, **terms: Any) -> Any:
    plan: EventBuffer = plan_event_buffer(held, FLOOR.assess, FLOOR.reduce, EventTerms(NOW, LATER, **terms))
    return plan


PAIR = (position("BTC-PERP", 20_000, 1), position("ETH-PERP", -10_000, 2))


def test_by_hand() -> None:
    """10,000 USDC beside 20,000 of BTC and 10,000 of SOL: half of 40,000 is 10,000 more, and SOL has the haircut."""
    plan = planned(book(*PAIR, usdc=10_000, BTC=0.4, SOL=100))
    assert [(c.asset, c.amount, c.proceeds) for c in plan.conversions] == [("SOL", 100, 10_000)]
    assert (plan.stable_share_before, plan.stable_share) == (0.25, 0.5)
    assert [(o.order.symbol, o.order.side, o.order.reduce_only, o.notional) for o in plan.orders] == [
        ("BTC-PERP", "sell", True, 5_000),
        ("ETH-PERP", "buy", True, 2_500),
    ]
    assert (plan.gross_before, plan.gross) == (30_000, 22_500)
    assert [(o.symbol, o.side, o.size, o.reduce_only) for o in plan.reopening] == [
        ("BTC-PERP", "buy", Decimal("0.1"), False),
        ("ETH-PERP", "sell", 1, False),
    ]
    # no haircut of .15 on 10,000 any more
    assert plan.after.equity - plan.before.equity == pytest.approx(1_500)
    assert plan.after.required_initial == pytest.approx(plan.before.required_initial * 0.75)
    assert (plan.terms.starts_at, plan.terms.ends_at) == (NOW, LATER)


def test_the_highest_haircut_goes_first() -> None:
    plan = planned(book(usdc=0, BTC=0.4, SOL=100), stable_share=0.5)
    assert [(c.asset, c.proceeds) for c in plan.conversions] == [("SOL", 10_000), ("BTC", 5_000)]


def test_what_is_not_free_stays() -> None:
    held = book(usdc=0)
    money = {"BTC": Holding(free=Decimal("0.1"), reserved=Decimal("0.3"))}
    plan = planned(Book(held.agent_id, held.settings, 1, money, [], []))
    assert [(c.asset, c.amount) for c in plan.conversions] == [("BTC", Decimal("0.1"))]
    assert plan.stable_share == pytest.approx(0.25)


def test_others_are_cut_for_what_can_not_be() -> None:
    fixed = position("ETH-PERP", -10_000, 2, reducible=False)
    plan = planned(book(PAIR[0], fixed, usdc=50_000))
    assert [(o.order.symbol, o.notional) for o in plan.orders] == [("BTC-PERP", pytest.approx(7_500))]
    assert plan.gross == pytest.approx(22_500)
    most = planned(book(PAIR[0], fixed, usdc=50_000), gross_cut=1.0)
    assert (most.orders[0].is_whole, most.gross) == (True, 10_000)


def test_nothing_to_do() -> None:
    plan = planned(book(*PAIR, usdc=50_000), gross_cut=0.0)
    assert (plan.conversions, plan.orders, plan.reopening) == ([], [], [])
    assert plan.after == plan.before
    assert planned(book(usdc=0)).stable_share == 1.0


@pytest.mark.parametrize(
    "terms",
    [{"stable_share": 1.1}, {"stable_share": float("nan")}, {"gross_cut": -0.1}, {"ends_at": NOW}],
)
def test_what_is_no_buffer(terms: Any) -> None:
    known = {"starts_at": NOW, "ends_at": LATER}
    with pytest.raises(InvalidError):
        plan_event_buffer(book(usdc=1), FLOOR.assess, FLOOR.reduce, EventTerms(**(known | terms)))


@given(
    usdc=st.integers(0, 50_000),
    coins=st.tuples(*[st.integers(0, 10_000) for _ in range(3)]),
    share=st.floats(0.0, 1.0),
    cut=st.floats(0.0, 1.0),
)
@DRAWN
def test_any_book(usdc: int, coins: tuple[int, int, int], share: float, cut: float) -> None:
    held = book(*PAIR, usdc=usdc, BTC=coins[0] / 50_000, ETH=coins[1] / 2_500, SOL=coins[2] / 100)
    plan = planned(held, stable_share=share, gross_cut=cut)
    assert plan.stable_share >= min(share, 1.0) - 1e-6
    assert plan.stable_share <= max(share, plan.stable_share_before) + 1e-6
    assert plan.gross == pytest.approx(30_000 * (1 - cut), abs=1e-3)
    assert plan.after.equity >= plan.before.equity - 1e-4
    again = planned(plan.book, stable_share=share, gross_cut=0.0)
    assert sum(c.proceeds for c in again.conversions) < Decimal("0.01")
