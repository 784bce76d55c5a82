"""The pool of a fleet, by its sums: one in breach has an account in breach, whatever its accounts are like."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.book import AccountSettings
from app.domain.fleet import Part, pool_health, pool_policy, total_of
from app.domain.health import Health, scales
from app.domain.margin_calls import Call, situation, step
from app.domain.parameters import HealthPolicy
from tests.domain.test_gates import NOW

MARKET = HealthPolicy()
EMPTY = pool_health(Part(), MARKET)
LEVELS = st.none() | st.floats(0.05, 0.85)


def health(equity: float, initial: float, maintenance: float, policy: HealthPolicy = MARKET) -> Health:
    found = scales(equity, initial, maintenance, policy)
    return replace(
        EMPTY,
        equity=equity,
        required_initial=initial,
        required_maintenance=maintenance,
        utilization=found.utilization,
        margin_ratio=found.margin_ratio,
        insolvent=found.insolvent,
    )


@st.composite
def accounts(draw: st.DrawFn) -> tuple[Health, bool, HealthPolicy]:
    """One account: in debt or not, leveraged or with reservations alone, with levels of its own or the market's."""
    leveraged = draw(st.booleans())
    equity = draw(st.floats(-1e6, 1e6) | st.just(0.0))
    initial = draw(st.floats(0.0, 1e6) | st.just(0.0))
    if not leveraged:  # it owes nothing and has set aside no more than there is
        equity = abs(equity)
        initial = min(initial, equity)
    maintenance = initial * draw(st.floats(0.0, 1.0))
    policy = AccountSettings(breach_utilization=draw(LEVELS)).policy(MARKET)
    return health(equity, initial, maintenance, policy), leveraged, policy


@given(st.lists(accounts(), min_size=1, max_size=8), st.floats(0.05, 0.85))
def test_a_pool_in_breach_has_an_account_in_breach(
    fleet: list[tuple[Health, bool, HealthPolicy]], of_master: float
) -> None:
    own = AccountSettings(breach_utilization=of_master, cure_utilization=of_master).policy(MARKET)
    pool = pool_health(total_of(Part.of(h, leveraged=lev) for h, lev, _ in fleet), pool_policy(MARKET, own))
    called = situation(pool, pool_policy(MARKET, own), isolated_breached=False, anything_left=True)
    if called.pool is None:
        return
    causes = [
        situation(h, replace(policy, breach_utilization=policy.breach_utilization * (1 - 1e-9)), leveraged=lev,
                  isolated_breached=False, anything_left=True).cause
        for h, lev, policy in fleet
    ]  # fmt: skip
    assert any(causes)


def test_sums_by_hand() -> None:
    """A member at 900 of 1,000, one with a hole, one that has only set aside, a master with cash: .60 in all."""
    parts = [
        Part.of(health(1_000.0, 900.0, 450.0), leveraged=True),
        Part.of(health(-200.0, 300.0, 150.0), leveraged=True),  # nobody else's hole
        Part.of(health(500.0, 400.0, 400.0), leveraged=False),  # 100 of it are free
        Part.of(health(900.0, 0.0, 0.0), leveraged=False),
    ]
    found = pool_health(total_of(parts), MARKET)
    assert (found.equity, found.required_initial, found.required_maintenance) == (2_000.0, 1_200.0, 600.0)
    assert found.utilization == pytest.approx(0.6)
    assert found.shortfall == 0.0


@pytest.mark.parametrize("state", ["open", "expired", "liquidating"])
def test_a_breach_of_the_fleets_pool_takes_over_a_call_of_the_masters_own(state: str) -> None:
    now_is = situation(health(100.0, 90.0, 45.0), MARKET, isolated_breached=False, anything_left=True)
    own = Call(state, NOW, NOW, NOW, cause="utilization")  # type: ignore[arg-type]
    settings = AccountSettings(grace_period_seconds=60)
    taken = step(own, replace(now_is, of_fleet=True), settings, NOW)
    assert type(taken).__name__ == "Open"
    again = step(replace(own, cause="fleet"), replace(now_is, of_fleet=True), settings, NOW)
    assert type(again).__name__ != "Open"


def test_a_call_that_is_held_back_closes_nothing() -> None:
    now_is = situation(health(100.0, 90.0, 45.0), MARKET, isolated_breached=False, anything_left=True)
    for state in ("expired", "liquidating"):
        call = Call(state, NOW, NOW, NOW, slices=1)
        waits = step(call, replace(now_is, held_back=True), AccountSettings(), NOW)
        assert type(waits).__name__ == "Wait"
        assert type(step(call, now_is, AccountSettings(), NOW)).__name__ in ("Become", "Liquidate")
