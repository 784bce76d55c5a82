"""The rules of an escrow: who receives what, to the last digit, and what may still be done to it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.escrow import Action, Contract, FeePayer, Kind, Leg, OnTimeout, Role, Terms, step, time_out
from app.domain.fees import decimals_of
from app.errors import ConflictError, ForbiddenError

DEADLINE = datetime(2026, 12, 1, tzinfo=UTC)
BEFORE = DEADLINE - timedelta(microseconds=1)


def numbers(*given: int) -> tuple[Decimal, ...]:
    return tuple(map(Decimal, given))


def terms(amount: Any = 10_000, asset: str = "USDC", **more: Any) -> Terms:
    given_: dict[str, Any] = {
        "leg": Leg(asset, Decimal(amount)),
        "counter": None,
        "fee_rate": Decimal("0.01"),
        "referral_share": Decimal("0.15"),
        "fee_payer": "payer",
        "on_timeout": "refund",
        "deadline_at": DEADLINE,
    }
    return Terms(**given_ | more)


def contract(state: Any = "funded", *, payer: bool = False, payee: bool = False, **more: Any) -> Contract:
    return Contract(terms(**more), state, payer, payee)


def test_the_published_example() -> None:
    """10,000 through escrow: fee 100, of which 15 to the referrer and 85 to the platform."""
    by_payer = terms()
    assert by_payer.reserved == 10_100
    out = by_payer.payout(Decimal(10_000))
    assert (out.payee, out.fee, out.referrer, out.platform, out.payer) == numbers(10_000, 100, 15, 85, 0)
    out = terms(fee_payer="payee").payout(Decimal(10_000))
    assert (out.payee, out.fee, out.referrer, out.platform, out.payer) == numbers(9_900, 100, 15, 85, 0)
    split = terms(fee_payer="split")
    assert split.reserved == 10_050
    out = split.payout(Decimal(10_000))
    assert (out.payee, out.fee, out.referrer, out.platform, out.payer) == numbers(9_950, 100, 15, 85, 0)


ASSETS = st.sampled_from(["USDC", "USDT", "BTC", "ETH", "DOGE"])
RATES = st.decimals(0, 1, places=6)


@st.composite
def escrows(draw: st.DrawFn) -> tuple[Terms, Decimal]:
    asset, other = draw(ASSETS), "SOL"
    unit = Decimal(1).scaleb(-decimals_of(asset))
    digits = draw(st.integers(1, 33 if asset != "USDC" else 21))
    amount = Decimal(draw(st.integers(1, 10**digits - 1))) * unit
    counter = draw(st.none() | st.integers(1, 10**20).map(lambda n: Leg(other, Decimal(n).scaleb(-18))))
    agreed = terms(
        amount,
        asset,
        counter=counter,
        fee_rate=draw(st.just(Decimal("0.01")) | RATES),
        referral_share=draw(st.just(Decimal("0.15")) | RATES),
        fee_payer=draw(st.sampled_from(["payer", "payee", "split"])),
    )
    share = draw(st.just(Fraction(1)) | st.fractions(0, 1, max_denominator=10**9))
    part = Decimal(int(share * int(amount / unit))) * unit
    return agreed, part


@given(escrows())
def test_splits_lose_nothing(drawn: tuple[Terms, Decimal]) -> None:
    agreed, to_payee = drawn
    out = agreed.payout(to_payee)
    unit = Decimal(1).scaleb(-decimals_of(agreed.leg.asset))
    parts = (out.payee, out.referrer, out.platform, out.payer)
    assert sum(parts) == agreed.reserved
    assert all(part >= 0 and part % unit == 0 for part in parts)
    # the fee is the exact one rounded up, the referrer's share the exact one rounded down
    fee = Fraction(to_payee) * Fraction(agreed.fee_rate)
    assert 0 <= Fraction(out.fee) - fee < Fraction(unit)
    assert 0 <= Fraction(out.fee) * Fraction(agreed.referral_share) - Fraction(out.referrer) < Fraction(unit)
    # who pays the fee, and nobody else, has less for it
    by_payer, by_payee = agreed.reserved - out.payer - to_payee, to_payee - out.payee
    assert by_payer + by_payee == out.fee
    if agreed.fee_payer == "split":
        assert 0 <= by_payer - by_payee <= unit
    else:
        assert (by_payer if agreed.fee_payer == "payee" else by_payee) == 0
    if agreed.counter is not None:
        assert out.counter_to_payer + out.counter_to_payee == agreed.counter.amount
        exact = Fraction(agreed.counter.amount) * Fraction(to_payee) / Fraction(agreed.leg.amount)
        assert 0 <= exact - Fraction(out.counter_to_payer) < Fraction(1, 10**18)


@pytest.mark.parametrize("wrong", ["-1", "10000.000001"])
def test_no_more_is_paid_than_there_is(wrong: str) -> None:
    with pytest.raises(ValueError, match="of an escrow of"):
        terms().payout(Decimal(wrong))


# --- the states, as a table: state, who confirmed, action, role -> the state after, or the refusal

MOVES: list[tuple[str, str, Kind, Role, str]] = [
    ("funded", "", "confirm", "payer", "funded"),
    ("funded", "", "confirm", "payee", "accepted"),
    ("funded", "payer", "confirm", "payee", "released"),
    ("accepted", "payee", "confirm", "payer", "released"),
    ("accepted", "payee", "confirm", "payee", "accepted"),
    ("funded", "", "cancel", "payer", "cancelled"),
    ("funded", "payer", "cancel", "payer", "cancelled"),
    ("funded", "", "cancel", "payee", "cancelled"),
    ("accepted", "payee", "cancel", "payer", "escrow_accepted"),
    ("accepted", "payee", "cancel", "payee", "escrow_accepted"),
    ("funded", "", "dispute", "payer", "not_accepted"),
    ("funded", "", "dispute", "payee", "not_accepted"),
    ("accepted", "payee", "dispute", "payer", "disputed"),
    ("accepted", "payee", "dispute", "payee", "disputed"),
    ("disputed", "payee", "confirm", "payer", "escrow_disputed"),
    ("disputed", "payee", "cancel", "payer", "escrow_disputed"),
    ("disputed", "payee", "dispute", "payer", "escrow_disputed"),
    ("disputed", "payee", "resolve", "arbiter", "resolved"),
    ("disputed", "payee", "resolve", "admin", "resolved"),
    ("disputed", "payee", "resolve", "payer", "not_your_part"),
    ("disputed", "payee", "resolve", "payee", "not_your_part"),
    ("accepted", "payee", "resolve", "admin", "not_disputed"),
    ("funded", "", "resolve", "arbiter", "not_disputed"),
    ("funded", "", "confirm", "arbiter", "not_your_part"),
    ("funded", "", "cancel", "admin", "not_your_part"),
    ("accepted", "payee", "dispute", "arbiter", "not_your_part"),
]


@pytest.mark.parametrize(("state", "confirmed", "kind", "role", "expected"), MOVES)
def test_what_may_be_done(state: str, confirmed: str, kind: Kind, role: Role, expected: str) -> None:
    held = contract(state, payer=confirmed == "payer", payee=confirmed == "payee")
    action = Action(kind, role, Decimal(4_000))
    if "_" in expected:
        with pytest.raises((ConflictError, ForbiddenError)) as refused:
            step(held, action, BEFORE)
        assert refused.value.code == expected
        return
    after = step(held, action, BEFORE)
    assert after.state == expected
    paid = {"released": 10_000, "cancelled": 0, "resolved": 4_000}
    assert after.to_payee == paid.get(expected)


@pytest.mark.parametrize("state", ["released", "refunded", "cancelled", "resolved"])
@pytest.mark.parametrize("kind", ["confirm", "cancel", "dispute", "resolve"])
def test_what_is_over_is_over(state: str, kind: Kind) -> None:
    role: Role = "admin" if kind == "resolve" else "payer"
    with pytest.raises(ConflictError) as refused:
        step(contract(state), Action(kind, role), BEFORE)
    assert refused.value.code == "escrow_closed"
    assert time_out(contract(state), DEADLINE) == contract(state)


@pytest.mark.parametrize("kind", ["confirm", "cancel", "dispute"])
@pytest.mark.parametrize("late", [timedelta(0), timedelta(days=3)])
def test_from_the_deadline_on_only_the_time_out_is_left(kind: Kind, late: timedelta) -> None:
    held = contract("accepted", payee=True)
    with pytest.raises(ConflictError) as refused:
        step(held, Action(kind, "payer"), DEADLINE + late)
    assert refused.value.code == "escrow_expired"
    assert time_out(held, DEADLINE + late).state == "refunded"
    assert time_out(held, BEFORE) == held


@pytest.mark.parametrize(
    ("on_timeout", "state", "to_payee"), [("release", "released", 10_000), ("refund", "refunded", 0)]
)
def test_a_time_out_does_what_was_agreed(on_timeout: OnTimeout, state: str, to_payee: int) -> None:
    for held in (contract(on_timeout=on_timeout), contract("accepted", payee=True, on_timeout=on_timeout)):
        after = time_out(held, DEADLINE)
        assert (after.state, after.to_payee) == (state, Decimal(to_payee))


def test_two_legs_are_released_both_or_not_at_all() -> None:
    counter = Leg("BTC", Decimal(1))
    undelivered = contract(on_timeout="release", counter=counter)
    assert time_out(undelivered, DEADLINE).state == "refunded"
    delivered = contract("accepted", payee=True, on_timeout="release", counter=counter)
    assert time_out(delivered, DEADLINE).state == "released"


def test_a_dispute_stops_the_clock() -> None:
    held = contract("disputed", payee=True, on_timeout="release")
    assert time_out(held, DEADLINE + timedelta(days=900)) == held
    after = step(held, Action("resolve", "admin", Decimal("0.000001")), DEADLINE + timedelta(days=900))
    assert after.to_payee == Decimal("0.000001")
    with pytest.raises(ConflictError) as refused:
        step(held, Action("resolve", "admin", Decimal("10000.000001")), DEADLINE)
    assert refused.value.code == "amount_above_escrow"


@pytest.mark.parametrize("fee_payer", ["payer", "payee", "split"])
def test_what_is_refunded_costs_nothing(fee_payer: FeePayer) -> None:
    agreed = terms("0.000001", fee_payer=fee_payer)
    out = agreed.payout(Decimal(0))
    assert (out.payer, out.fee, out.payee) == (agreed.reserved, *numbers(0, 0))
