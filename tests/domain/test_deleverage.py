"""Plans to deleverage: what each policy closes, by hand; and the cheapest cure against the exact optimum."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from app.domain.book import Book, Holding, OpenReservation
from app.domain.deleverage import DeleveragePlan, cheapest_cure, keep_top_n, smallest_first
from app.domain.liquidate import Target
from tests.domain.deleveraged import NOW, Floor, book, position

FLOOR = Floor()
DRAWN = settings(max_examples=25, deadline=None, derandomize=True)


def sizes(plan: DeleveragePlan) -> Any:
    return [(o.order.symbol, o.order.side, round(o.notional, 4)) for o in plan.orders]


def replayed(held: Book, plan: DeleveragePlan, floor: Floor = FLOOR) -> Any:
    """Return the figures of the book after sending the plan's orders one by one."""
    for planned in plan.orders:
        assert planned.order.reduce_only
        found = held.position(planned.order.symbol)
        assert found is not None
        held = floor.reduce(held, Target(found, found.size, 0.0), planned.order.size)
    return floor.assess(held)


THREE = book(
    position("BTC-PERP", 20_000, 1), position("ETH-PERP", -6_000, 2), position("SOL-PERP", 3_000, 3), usdc=10_000
)
"""Initial margin 8,700 of 29,000 gross; 5,500 is what a target of .55 leaves: 10,666.67 of notional has to go."""


def test_smallest_first() -> None:
    plan = smallest_first(THREE, FLOOR.assess, FLOOR.reduce)
    expected = [("SOL-PERP", "sell", 3_000), ("ETH-PERP", "buy", 6_000), ("BTC-PERP", "sell", 1_666.6667)]
    assert sizes(plan) == [(s, d, pytest.approx(n, abs=0.05)) for s, d, n in expected]
    assert [o.is_whole for o in plan.orders] == [True, True, False]
    assert plan.reached
    assert plan.dollars_traded == pytest.approx(10_666.67, abs=0.05)
    assert plan.margin_freed == pytest.approx(3_200, abs=0.05)
    assert plan.before.utilization == pytest.approx(0.87)
    assert plan.after.utilization == pytest.approx(0.55, abs=1e-6)
    assert plan.after == replayed(THREE, plan).health


def test_the_target_is_met_from_within() -> None:
    for target in (0.8, 0.55, 0.3, 0.01):
        for planned in (smallest_first, cheapest_cure):
            plan = planned(THREE, FLOOR.assess, FLOOR.reduce, target)
            assert plan.after.utilization is not None
            assert target - 1e-5 < plan.after.utilization <= target


def test_nothing_to_do() -> None:
    for planned in (smallest_first, cheapest_cure):
        plan = planned(THREE, FLOOR.assess, FLOOR.reduce, 0.9)
        assert (plan.orders, plan.reached, plan.dollars_traded, plan.margin_freed) == ([], True, 0, 0)
    assert keep_top_n(THREE, FLOOR.assess, FLOOR.reduce, 3).orders == []


@pytest.mark.parametrize(("count", "closed"), [(2, ["SOL"]), (1, ["SOL", "ETH"]), (0, ["SOL", "ETH", "BTC"])])
def test_keep_the_largest(count: int, closed: list[str]) -> None:
    plan = keep_top_n(THREE, FLOOR.assess, FLOOR.reduce, count)
    assert [o.order.symbol.removesuffix("-PERP") for o in plan.orders] == closed
    assert plan.reached
    assert len(plan.book.positions) == count


def test_what_is_not_reducible_stays() -> None:
    held = book(position("BTC-PERP", 20_000, 1), position("SOL-PERP", 3_000, 2, reducible=False), usdc=7_000)
    assert [o.order.symbol for o in smallest_first(held, FLOOR.assess, FLOOR.reduce).orders] == ["BTC-PERP"]
    assert [o.order.symbol for o in cheapest_cure(held, FLOOR.assess, FLOOR.reduce).orders] == ["BTC-PERP"]
    kept = keep_top_n(held, FLOOR.assess, FLOOR.reduce, 1)
    assert (kept.orders, kept.reached) == ([], False)


def test_isolated_positions_are_outside_the_pool() -> None:
    alone = position("SOL-PERP", 1_000, 2, margin_mode="isolated", allocated=Decimal(500))
    held = book(position("BTC-PERP", 20_000, 1), alone, usdc=7_500)
    money = {"USDC": Holding(free=Decimal(7_000), allocated=Decimal(500))}
    held = Book(held.agent_id, held.settings, 1, money, held.positions, [])
    for planned in (smallest_first, cheapest_cure):
        assert [o.order.symbol for o in planned(held, FLOOR.assess, FLOOR.reduce).orders] == ["BTC-PERP"]
    assert [o.order.symbol for o in keep_top_n(held, FLOOR.assess, FLOOR.reduce, 1).orders] == ["SOL-PERP"]


def test_what_no_order_cures() -> None:
    reserved = OpenReservation(
        "r", "casino", "USDC", Decimal(9_000), Decimal(9_000), Decimal(0), None, reducible=False, created_at=NOW
    )
    held = book(position("BTC-PERP", 5_000, 1), usdc=1_000)
    money = {"USDC": Holding(free=Decimal(1_000), reserved=Decimal(9_000))}
    held = Book(held.agent_id, held.settings, 1, money, held.positions, [reserved])
    insolvent = book(position("BTC-PERP", 5_000, 1, entry_price=Decimal(100_000)), usdc=1_000)
    for case in (held, insolvent):
        for planned in (smallest_first, cheapest_cure):
            plan = planned(case, FLOOR.assess, FLOOR.reduce)
            assert not plan.reached
            assert [o.is_whole for o in plan.orders] == [True]


def test_slippage_costs_equity() -> None:
    floor = Floor(slippage=0.02)
    for planned in (smallest_first, cheapest_cure):
        plan = planned(THREE, floor.assess, floor.reduce)
        assert plan.reached
        assert plan.dollars_traded > 10_900
        assert plan.after == replayed(THREE, plan, floor).health


# --- the cheapest cure


def test_the_highest_rate_goes_first() -> None:
    held = book(position("BTC-PERP", 10_000, 1), position("ETH-PERP", 10_000, 2, leverage=Decimal(2)), usdc=10_000)
    plan = cheapest_cure(held, FLOOR.assess, FLOOR.reduce)
    assert sizes(plan) == [("ETH-PERP", "sell", pytest.approx(5_000, abs=0.01))]


def test_a_small_position_may_hold_the_rate_of_a_large_one() -> None:
    """500 at leverage 1 makes the whole underlying cost its rate: closing it frees 8,000 of 11,500."""
    held = book(position("BTC-PERP", 11_000, 1), position("BTC-29MAY26", 500, 2, leverage=Decimal(1)), usdc=11_000)
    plan = cheapest_cure(held, FLOOR.assess, FLOOR.reduce)
    assert sizes(plan) == [("BTC-29MAY26", "sell", 500)]
    assert plan.margin_freed == pytest.approx(8_200)


def test_a_hedge_is_left_alone() -> None:
    held = book(position("BTC-PERP", 30_000, 1), position("BTC-29MAY26", -5_000, 2), usdc=10_000)
    cheap = cheapest_cure(held, FLOOR.assess, FLOOR.reduce)
    assert sizes(cheap) == [("BTC-PERP", "sell", pytest.approx(6_666.67, abs=0.01))]
    dear = smallest_first(held, FLOOR.assess, FLOOR.reduce)
    assert dear.reached
    assert dear.dollars_traded == pytest.approx(16_666.67, abs=0.05)


def optimum(held: Book, rates: Sequence[float], signed: Sequence[float], target: float) -> float:
    """Return the fewest dollars in cross margin, exactly: for each set closed whole the rates are fixed, and a
    linear programme finds the rest.

    Its variables are what is closed and, for each underlying, the size of what is left net.
    """
    equity = float(held.holding("USDC").free)
    names = sorted({p.symbol.partition("-")[0] for p in held.positions})
    under = [names.index(p.symbol.partition("-")[0]) for p in held.positions]
    count, best = len(signed), float("inf")
    for whole in itertools.product((False, True), repeat=count):
        top = [
            max((r for r, u, gone in zip(rates, under, whole, strict=True) if u == j and not gone), default=0.0)
            for j in range(len(names))
        ]
        cost = np.array([1.0] * count + [0.0] * len(names))
        rows, limits = [[0.0] * count + top], [target * equity]
        for j in range(len(names)):
            for sign in (1.0, -1.0):  # |net| ≥ ± (net − what is closed of it)
                parts = [-sign * np.sign(x) if u == j else 0.0 for x, u in zip(signed, under, strict=True)]
                rows.append([*parts, *[-1.0 if k == j else 0.0 for k in range(len(names))]])
                limits.append(-sign * sum(x for x, u in zip(signed, under, strict=True) if u == j))
        bounds = [(abs(x) if gone else 0.0, abs(x)) for x, gone in zip(signed, whole, strict=True)]
        found = linprog(cost, A_ub=rows, b_ub=limits, bounds=bounds + [(0.0, None)] * len(names))
        if found.fun is not None:
            best = min(best, found.fun)
    return best


SYMBOLS = ("BTC-PERP", "BTC-29MAY26", "BTC-25DEC26", "ETH-PERP", "ETH-29MAY26", "SOL-PERP")


@st.composite
def cross_books(draw: st.DrawFn) -> tuple[Book, list[float], list[float]]:
    symbols = draw(st.lists(st.sampled_from(SYMBOLS), min_size=2, max_size=5, unique=True))
    signed = [draw(st.sampled_from((-1, 1))) * draw(st.integers(1, 60)) * 250.0 for _ in symbols]
    leverage = [draw(st.sampled_from((None, 1, 2, 3))) for _ in symbols]
    positions = [
        position(s, x, i, leverage=None if lev is None else Decimal(lev))
        for i, (s, x, lev) in enumerate(zip(symbols, signed, leverage, strict=True))
    ]
    held = book(*positions, usdc=draw(st.integers(4, 80)) * 250.0)
    return held, [max(0.30, 1.0 / lev if lev else 0.0) for lev in leverage], signed


def gap(case: tuple[Book, list[float], list[float]], target: float = 0.55) -> float:
    """Return how much more than the optimum is traded, as a fraction of the gross notional."""
    held, rates, signed = case
    plan = cheapest_cure(held, FLOOR.assess, FLOOR.reduce, target)
    assert plan.reached
    least = optimum(held, rates, signed, target)
    assert plan.dollars_traded >= least - 1e-3  # the oracle's optimum is one
    return (plan.dollars_traded - least) / sum(map(abs, signed))


@given(case=cross_books())
@DRAWN
def test_the_cheapest_cure_is_near_the_optimum(case: tuple[Book, list[float], list[float]]) -> None:
    assert gap(case) <= 0.02


@given(case=cross_books(), target=st.sampled_from((0.2, 0.4, 0.7)), mode=st.sampled_from(("cross", "portfolio")))
@DRAWN
def test_no_plan_is_cheaper_than_the_cheapest(
    case: tuple[Book, list[float], list[float]], target: float, mode: Any
) -> None:
    held = case[0]
    held = book(*held.positions, usdc=float(held.holding("USDC").free), mode=mode)
    cheap = cheapest_cure(held, FLOOR.assess, FLOOR.reduce, target)
    plain = smallest_first(held, FLOOR.assess, FLOOR.reduce, target)
    assert cheap.reached
    assert not plain.reached or cheap.dollars_traded <= plain.dollars_traded * (1 + 1e-6) + 1e-3
    assert cheap.after == replayed(held, cheap).health


@given(case=cross_books(), low=st.floats(0.05, 0.9), high=st.floats(0.05, 0.9))
@DRAWN
def test_a_lower_target_costs_no_less(case: tuple[Book, list[float], list[float]], low: float, high: float) -> None:
    low, high = sorted((low, high))
    held = case[0]
    costs = [cheapest_cure(held, FLOOR.assess, FLOOR.reduce, t).dollars_traded for t in (low, high)]
    gross = sum(map(abs, case[2]))
    assert costs[0] >= costs[1] - 0.02 * gross


@pytest.mark.parametrize(
    "signed", [(20_000, -16_000, 0), (20_000, -12_000, 9_000), (15_000, 10_000, -20_000), (9_000, 9_000, 9_000)]
)
def test_portfolio_margin_against_a_grid(signed: tuple[int, ...]) -> None:
    """Every twentieth of every position: none of them is enough and cheaper by more than the grid's step."""
    symbols = ("BTC-PERP", "ETH-PERP", "SOL-PERP")
    rows = [position(s, x, i) for i, (s, x) in enumerate(zip(symbols, signed, strict=True)) if x]
    held = book(*rows, usdc=4_000, mode="portfolio")
    plan = cheapest_cure(held, FLOOR.assess, FLOOR.reduce, 0.5)
    assert plan.reached
    each = [x for x in map(abs, signed) if x]
    cheaper = (
        shares
        for shares in itertools.product(np.linspace(0.0, 1.0, 21), repeat=len(each))
        if float(np.dot(shares, each)) < plan.dollars_traded * (1 - 1e-6)
    )
    for shares in cheaper:
        left = [
            position(r.symbol, x * (1 - s), i)
            for i, (r, x, s) in enumerate(zip(rows, [x for x in signed if x], shares, strict=True))
            if s < 1.0
        ]
        utilization = FLOOR.assess(book(*left, usdc=4_000, mode="portfolio")).health.utilization
        assert utilization is not None
        assert utilization > 0.5
