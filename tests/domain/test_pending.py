"""What the gates count of pending orders, against every way in which they may be filled."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from decimal import Decimal
from itertools import chain, combinations, product
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.book import Book, PendingOrder
from app.domain.pending import gross_reached
from app.domain.quote import AccountFigures
from tests.domain.test_gates import book, scene

RATE, MARK = 0.3, 100.0
UNDERLYING = {"BTC-PERP": "BTC", "BTC-Q": "BTC", "ETH-PERP": "ETH"}
Signed = tuple[str, int]
SIGNED = st.tuples(st.sampled_from(sorted(UNDERLYING)), st.integers(-9, 9).filter(bool))


def pending(number: int, symbol: str, size: int, *, reduce_only: bool = False) -> PendingOrder:
    side: Literal["buy", "sell"] = "buy" if size > 0 else "sell"
    return PendingOrder(f"o{number}", symbol, side, Decimal(abs(size)), reduce_only, None, None)


def with_pending(held: Book, orders: list[Signed], *, reduce_only: bool = False) -> Book:
    made = [pending(n, symbol, size, reduce_only=reduce_only) for n, (symbol, size) in enumerate(orders)]
    return replace(held, pending=made)


def exposed(held: Book) -> AccountFigures:
    return scene().figures(scene().exposed(held))


def margin(lots: list[Signed]) -> float:
    """Return the margin of lots that net by underlying, in plain sums."""
    net: dict[str, int] = {}
    for symbol, size in lots:
        net[UNDERLYING[symbol]] = net.get(UNDERLYING[symbol], 0) + size
    return sum(abs(size) * MARK * RATE for size in net.values())


@given(
    held=st.dictionaries(st.sampled_from(["BTC_PERP", "ETH_PERP"]), st.integers(-9, 9).filter(bool), max_size=2),
    orders=st.lists(SIGNED, max_size=6),
)
def test_it_is_the_worst_of_all_subsets(held: dict[str, int], orders: list[Signed]) -> None:
    """Whichever of the orders are filled, the margin is no higher than what the gates count; and one way it is that."""
    before = book(100_000, **held)
    lots = [(name.replace("_", "-"), size) for name, size in held.items()]
    subsets = chain.from_iterable(combinations(orders, n) for n in range(len(orders) + 1))
    worst = max(margin([*lots, *subset]) for subset in subsets)
    after = exposed(with_pending(before, orders))
    assert after.health.required_initial == pytest.approx(worst, rel=1e-12)
    assert after.equity == pytest.approx(100_000)  # at the mark nothing is gained
    assert scene().exposed(with_pending(before, orders)).pending in ((), [])


@given(
    held=st.dictionaries(st.sampled_from(["BTC_PERP", "ETH_PERP"]), st.integers(-9, 9).filter(bool), max_size=2),
    orders=st.lists(SIGNED, max_size=6),
)
def test_the_gross_that_is_reached_is_that_of_the_worst_subset(held: dict[str, int], orders: list[Signed]) -> None:
    """For the leverage cap nothing nets but on one symbol: hedges on two contracts may both fill."""
    subsets = chain.from_iterable(combinations(orders, n) for n in range(len(orders) + 1))
    grosses = []
    for subset in subsets:
        lots = Counter({name.replace("_", "-"): size for name, size in held.items()})
        for symbol, size in subset:
            lots[symbol] += size
        grosses.append(sum(abs(size) * MARK for size in lots.values()))
    market = scene().market
    waiting = with_pending(book(100_000, **held), orders)
    assert gross_reached(waiting, market.parameters, market.prices) == pytest.approx(max(grosses), rel=1e-12)
    only_reducing = with_pending(book(100_000, **held), orders, reduce_only=True)
    now = sum(abs(size) * MARK for size in held.values())
    assert gross_reached(only_reducing, market.parameters, market.prices) == pytest.approx(now)


@given(orders=st.lists(SIGNED, min_size=1, max_size=4))
def test_reduce_only_orders_count_nothing(orders: list[Signed]) -> None:
    before = book(1_000, BTC_PERP=5, ETH_PERP=-5)
    waiting = with_pending(before, orders, reduce_only=True)
    assert exposed(waiting).health == scene().figures(before).health


@pytest.mark.parametrize(("size", "left"), [(3, 2), (5, 0), (9, 0)])
def test_reduce_only_orders_fill_as_far_as_there_is_something(size: int, left: int) -> None:
    waiting = with_pending(book(1_000, BTC_PERP=5), [("BTC-PERP", -size)], reduce_only=True)
    after = scene().filled(waiting, waiting.pending)
    assert [p.size for p in after.positions] == ([left] if left else [])
    same_side = with_pending(book(1_000, BTC_PERP=5), [("BTC-PERP", size)], reduce_only=True)
    assert [p.size for p in scene().filled(same_side, same_side.pending).positions] == [5]


@pytest.mark.parametrize("sizes", list(product((3, -3), repeat=2)))
def test_an_isolated_order_weighs_by_what_it_takes(sizes: tuple[int, int]) -> None:
    orders = [replace(pending(n, "BTC-PERP", s), margin_mode="isolated") for n, s in enumerate(sizes)]
    waiting = replace(book(150), pending=orders)
    after = scene().exposed(waiting)
    # 90 each of 150 are free: both on one side take more than there is
    assert after.holding("USDC").free == (-30 if sizes[0] == sizes[1] else 60)
    refused = scene().refusal(book(150), after)
    assert (refused is None) == (sizes[0] != sizes[1])


def test_without_pending_orders_it_is_the_book_itself() -> None:
    held = book(1_000, BTC_PERP=5)
    assert scene().exposed(held) is held
