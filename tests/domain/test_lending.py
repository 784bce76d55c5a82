"""Loans against published figures, against fractions, and as tables of what is due."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.domain.book import LentLoan
from app.domain.lending import (
    OpenOffer,
    Prices,
    RateChange,
    Situation,
    Step,
    accrued_units,
    curve_rate,
    interest_for,
    interest_of,
    match,
    next_interest,
    next_look,
    next_step,
    purchase,
    recalls_for,
    shared_out,
    utilization,
)
from app.domain.parameters import LendingParameters, MarketParameters

NOW = datetime(2026, 3, 1, tzinfo=UTC)
YEAR = timedelta(days=365)
USDC = MarketParameters().loans_of("USDC")
DAY, HOUR = timedelta(days=1), timedelta(hours=1)

amounts = st.decimals("0.000001", "1e9", places=6)
rates = st.decimals("0", "0.9", places=8)


# --- the curve


@pytest.mark.parametrize(("used", "rate"), [("0.8", "0.05"), ("1", "0.65"), ("0.4", "0.03"), ("0.9", "0.35")])
def test_the_curves_worked_points(used: str, rate: str) -> None:
    assert curve_rate(Decimal(used), USDC) == Decimal(rate)


def test_nothing_supplied_is_nothing_used() -> None:
    assert utilization(Decimal(0), Decimal(0)) == 0
    assert utilization(Decimal(4), Decimal(1)) == Decimal("0.25")
    assert curve_rate(Decimal(0), USDC) == Decimal("0.01")


@given(st.lists(st.decimals(0, 1, places=10), min_size=2, max_size=20))
def test_the_curve_never_falls_and_is_continuous_at_its_kink(used: list[Decimal]) -> None:
    found = [curve_rate(u, USDC) for u in sorted(used)]
    assert all(a <= b for a, b in pairwise(found))
    at = Decimal("0.8")
    assert curve_rate(at + Decimal("1e-9"), USDC) - curve_rate(at, USDC) <= Decimal("2e-8")


def test_the_reference_rates_and_ratios() -> None:
    parameters = MarketParameters()
    minimum = {asset: parameters.loans_of(asset).minimum_rate for asset in ("ETH", "BTC", "SOL", "USDC")}
    assert minimum == {"ETH": 0.042, "BTC": 0.028, "SOL": 0.071, "USDC": 0.094}
    ratio = {asset: parameters.loans_of(asset).collateral_ratio for asset in ("BTC", "ETH", "SOL", "USDC")}
    assert ratio == {"BTC": 1.10, "ETH": 1.10, "SOL": 1.15, "USDC": 1.05}
    assert {p.liquidation_ratio for p in parameters.lending.values()} == {1.03}


# --- accrual


def test_two_hundred_at_nine_point_four_percent_pay_18_80_a_year() -> None:
    assert interest_for(Decimal(200), Decimal("0.094"), YEAR, 6) == Decimal("18.80")


def test_a_leap_years_day_counts_as_any_other() -> None:
    leap = datetime(2028, 3, 1, tzinfo=UTC) - datetime(2028, 2, 1, tzinfo=UTC)
    assert interest_for(Decimal(365), Decimal("0.1"), leap, 6) == Decimal("2.9")  # 29 days of .1 a day


def test_hourly_for_a_year_is_once_for_a_year() -> None:
    changes = [RateChange(NOW, Decimal("0.073"))]
    paid = units = Decimal(0)
    for hour in range(365 * 24):
        start = NOW + hour * HOUR
        units += accrued_units(Decimal("123.456789"), changes, Decimal(0), start, start + HOUR)
        paid += interest_of(units, 6) - paid  # charged every hour, rounded up each time
    assert paid == interest_for(Decimal("123.456789"), Decimal("0.073"), YEAR, 6)


times = st.integers(0, 3 * 86_400 * 10**6)


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[RateChange], datetime, datetime]:
    moments = sorted(draw(st.lists(times, min_size=1, max_size=6)))
    changes = [RateChange(NOW + timedelta(microseconds=m), draw(rates)) for m in moments]
    since, until = sorted(NOW + timedelta(microseconds=draw(times)) for _ in range(2))
    return changes, since, until


def _in_force(changes: list[RateChange], at: datetime) -> Decimal:
    known = [change.rate for change in changes if change.at <= at]
    return known[-1] if known else changes[0].rate


@given(amounts, histories(), rates)
def test_accrual_is_the_integral_of_the_rate_in_force(
    principal: Decimal, history: tuple[list[RateChange], datetime, datetime], floor: Decimal
) -> None:
    changes, since, until = history
    edges = sorted({since, until, *(c.at for c in changes if since < c.at < until)})
    total = Fraction(0)
    for start, end in pairwise(edges):
        rate = max(_in_force(changes, start), floor)
        total += Fraction(principal) * Fraction(rate) * Fraction((end - start) // timedelta(microseconds=1), 10**6)
    units = accrued_units(principal, changes, floor, since, until)
    assert Fraction(units) == total * 10**6
    exact = total / (365 * 86_400)
    assert Fraction(interest_of(units, 6)) == Fraction(math.ceil(exact * 10**6), 10**6)


@given(amounts, histories(), rates, st.lists(times, max_size=8), st.integers(0, 18))
def test_any_split_into_steps_charges_the_same(
    principal: Decimal,
    history: tuple[list[RateChange], datetime, datetime],
    floor: Decimal,
    cuts: list[int],
    decimals: int,
) -> None:
    changes, since, until = history
    inner = {NOW + timedelta(microseconds=cut) for cut in cuts}
    edges = sorted({since, until, *(at for at in inner if since < at < until)})
    units = paid = Decimal(0)
    for start, end in pairwise(edges):
        units += accrued_units(principal, changes, floor, start, end)
        paid += interest_of(units, decimals) - paid
    once = accrued_units(principal, changes, floor, since, until)
    assert units == once
    assert paid == interest_of(once, decimals)


@given(amounts, rates, times)
def test_a_clock_that_goes_back_accrues_nothing(principal: Decimal, rate: Decimal, back: int) -> None:
    until = NOW - timedelta(microseconds=back)
    assert accrued_units(principal, [RateChange(NOW, rate)], Decimal(0), NOW, until) == 0


# --- collateral


@given(
    amounts,
    amounts,
    st.decimals("0.01", "100000", places=4),
    st.decimals("0.01", "100000", places=4),
    st.decimals("0", "0.2", places=4),
)
@example(Decimal(1), Decimal(1), Decimal(1), Decimal(1), Decimal(0))
def test_a_purchase_pays_the_house_no_less_than_it_gives(
    wanted: Decimal, collateral: Decimal, asset: Decimal, price: Decimal, slippage: Decimal
) -> None:
    prices = Prices(asset, price, Decimal(1))
    done = purchase(wanted, collateral, prices, slippage, 6)
    assert done.bought + done.missing == wanted
    assert 0 <= done.sold <= collateral
    given_, got = Fraction(done.bought) * Fraction(asset), Fraction(done.sold) * Fraction(price * (1 - slippage))
    assert given_ <= got
    if done.missing:  # all is sold, and one digit more would not have been paid for
        assert done.sold == collateral
        assert (Fraction(done.bought) + Fraction(1, 10**6)) * Fraction(asset) > got
    else:
        assert got - given_ < Fraction(price) / 10**17


@given(amounts, st.decimals("1", "2", places=4), st.decimals("0.5", "1", places=2))
def test_what_is_needed_is_enough_and_no_more(debt: Decimal, ratio: Decimal, kept: Decimal) -> None:
    prices = Prices(Decimal(60_000), Decimal(3_000), kept)
    needed = prices.needed(debt, ratio)
    assert prices.ratio(needed, debt) >= ratio
    assert prices.ratio(needed - Decimal("2e-18"), debt) < ratio


# --- matching


def _offer(seq: int, amount: Decimal, rate: Decimal) -> OpenOffer:
    return OpenOffer(f"offer_{seq}", seq, f"lender_{seq}", "USDC", amount, rate, 3600)


offered = st.lists(st.tuples(amounts, st.sampled_from([Decimal("0.01"), Decimal("0.05"), Decimal("0.09")])), max_size=8)


@given(offered, amounts)
def test_matching_takes_the_cheapest_and_of_equals_the_oldest(
    drawn: list[tuple[Decimal, Decimal]], wanted: Decimal
) -> None:
    offers = [_offer(seq, amount, rate) for seq, (amount, rate) in enumerate(drawn)]
    found = match(list(reversed(offers)), wanted)
    taken = {m.offer.id: m.amount for m in found}
    assert sum(taken.values()) == min(wanted, sum(o.remaining for o in offers))
    assert all(0 < amount <= next(o.remaining for o in offers if o.id == name) for name, amount in taken.items())
    # an offer that is passed over, or not taken whole, is no better than any that is taken
    left = [o for o in offers if taken.get(o.id, 0) < o.remaining]
    for m in found:
        assert all((m.offer.minimum_rate, m.offer.seq) <= (o.minimum_rate, o.seq) for o in left)


@given(amounts, st.lists(amounts, min_size=1, max_size=6))
def test_a_pledge_is_shared_out_whole(total: Decimal, parts: list[Decimal]) -> None:
    shares = shared_out(total, parts)
    assert sum(shares) == total
    for share, part in zip(shares, parts, strict=True):
        assert abs(Fraction(share) - Fraction(total) * Fraction(part) / sum(map(Fraction, parts))) < Fraction(1, 10**17)


def test_a_call_recalls_the_smallest_loans_until_the_shortfall_is_covered() -> None:
    prices = {"USDC": 1.0, "BTC": 60_000.0}
    lent = [
        LentLoan("a", "USDC", Decimal(500), 0, asked_back=False),
        LentLoan("b", "BTC", Decimal("0.005"), 0, asked_back=False),
        LentLoan("c", "USDC", Decimal(2_000), 0, asked_back=False),
    ]
    assert [loan.id for loan in recalls_for(lent, prices, 700.0)] == ["b", "a"]
    assert [loan.id for loan in recalls_for(lent, prices, 801.0)] == ["b", "a", "c"]
    assert recalls_for(lent, prices, 0.0) == []
    asked = [*lent, LentLoan("d", "USDC", Decimal(600), 0, asked_back=True)]
    assert [loan.id for loan in recalls_for(asked, prices, 700.0)] == ["b"]


# --- what is due

TERMS = LendingParameters("BTC", collateral_ratio=1.10, low_ratio=1.06, liquidation_ratio=1.03)
LATER, EARLIER = NOW + HOUR, NOW - HOUR


@pytest.mark.parametrize(
    ("ratio", "is_low", "due_at", "interest_at", "is_wanted", "step"),
    [
        ("1.10", False, None, LATER, False, None),
        ("1.06", False, None, LATER, False, None),
        ("1.0599", False, None, LATER, False, "warn"),
        ("1.05", True, None, LATER, False, None),
        ("1.0699", True, None, LATER, False, None),
        ("1.07", True, None, LATER, False, "note well"),
        ("1.03", True, None, LATER, False, None),
        ("1.0299", False, None, LATER, False, "warn"),
        ("1.0299", True, None, LATER, False, "liquidate"),
        ("1.0299", True, EARLIER, EARLIER, True, "liquidate"),
        ("1.20", False, NOW, EARLIER, True, "buy in"),
        ("1.20", False, LATER, EARLIER, False, "pay interest"),
        ("1.20", False, None, NOW, False, "pay interest"),
        ("1.20", False, None, EARLIER, True, "recall"),
        (None, False, EARLIER, LATER, False, None),
        (None, False, None, EARLIER, False, "pay interest"),
        (None, False, None, LATER, True, "recall"),
    ],
)
def test_what_is_due_next(
    ratio: str | None,
    is_low: bool,
    due_at: datetime | None,
    interest_at: datetime,
    is_wanted: bool,
    step: Step | None,
) -> None:
    value = None if ratio is None else Decimal(ratio)
    loan = Situation(value, is_low, due_at, interest_at, is_wanted)
    assert next_step(loan, TERMS, NOW) == step


def test_when_a_loan_is_looked_at_again() -> None:
    def at(due_at: datetime | None) -> datetime:
        return next_look(Situation(None, False, due_at, NOW + DAY), NOW)

    assert at(None) == NOW + DAY
    assert at(LATER) == LATER
    assert at(NOW + 2 * DAY) == NOW + DAY
    assert at(EARLIER) == NOW + timedelta(seconds=1)  # it waits for a price


@given(times, times)
def test_interest_is_paid_daily_from_the_opening_on(opened: int, later: int) -> None:
    since = NOW + timedelta(microseconds=opened)
    now = since + timedelta(microseconds=later)
    following = next_interest(since, now)
    assert now < following <= now + DAY
    assert (following - since) % DAY == timedelta(0)
