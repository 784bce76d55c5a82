"""Lending among agents who mean ill: the market stays open, gates hold, and nobody grows by lending in a circle."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import URL, text

from app.errors import ConflictError
from app.services import holdings, loan_steps, loans
from app.services.holdings import HoldingSettings
from app.services.lending import OFFERS_A_BORROW_MAX
from tests.services.calls import Calls
from tests.services.lenders import Lenders, lenders_on

D = Decimal


@pytest.fixture
async def lenders(database_url: URL) -> AsyncIterator[Lenders]:
    async with lenders_on(database_url) as made:
        yield made


async def holder(lenders: Lenders, **amounts: int | str) -> str:
    agent_id = await lenders.desk.agent()
    for asset, amount in amounts.items():
        await lenders.desk.deposit(agent_id, asset, amount)
    return agent_id


# --- the market stays open


async def test_cheap_dust_hides_no_offer(lenders: Lenders) -> None:
    mallory, alice = await holder(lenders, USDC=1000), await holder(lenders, USDC=100_000)
    for _ in range(OFFERS_A_BORROW_MAX):
        await lenders.offer(mallory, "0.000001", rate=0)
    await lenders.offer(alice, 10_000, rate="0.05")
    await lenders.offer(alice, 10_000, rate="0.06")
    bob = await holder(lenders, BTC=1)
    made = await lenders.borrow(bob, 15_000)
    assert {loan.lender_id for loan in made} == {alice}
    assert [loan.principal for loan in made] == [10_000, 5_000]
    await lenders.borrow(bob, "0.000002")  # who wants little still has the cheapest


async def test_many_small_offers_fill_what_a_large_one_leaves(lenders: Lenders) -> None:
    mallory, alice = await holder(lenders, USDC=1000), await holder(lenders, USDC=100_000)
    for _ in range(OFFERS_A_BORROW_MAX):
        await lenders.offer(mallory, "0.000001", rate=0)
    await lenders.offer(alice, 1_000, rate="0.06")
    for _ in range(20):
        await lenders.offer(alice, 19, rate="0.05")  # less than a 50th
    bob = await holder(lenders, BTC=1)
    made = await lenders.borrow(bob, 1_300)
    made = [loan for loan in made if loan.lender_id == alice]
    assert [loan.principal for loan in made] == [19] * 20 + [1_300 - 380 - D("0.000029")]
    with pytest.raises(ConflictError) as refused:
        await lenders.borrow(bob, 90)
    assert refused.value.code == "not_enough_offered"


async def test_loans_of_a_trifle_close_no_offer_to_others(lenders: Lenders) -> None:
    alice, mallory, bob = [await holder(lenders, **what) for what in ({"USDC": 1000}, {"BTC": 1}, {"BTC": 1})]
    await lenders.offer(alice, 400)
    for _ in range(20):
        await lenders.borrow(mallory, "0.000001")
    with pytest.raises(ConflictError) as refused:
        await lenders.borrow(mallory, "0.000001")
    assert refused.value.code == "not_enough_offered"
    await lenders.borrow(bob, 300)


async def test_lenders_who_may_lend_no_more_do_not_close_the_market(lenders: Lenders) -> None:
    for _ in range(7):
        trader = await holder(lenders, USDC=10_000)
        await lenders.offer(trader, 1_000, rate=0)
        await lenders.desk.order(trader, "buy", "0.444")  # 7,992 of margin: .80 of it if the offer were lent
    alice, bob = await holder(lenders, USDC=10_000), await holder(lenders, BTC=1)
    await lenders.offer(alice, 1_000, rate="0.05")
    [loan] = await lenders.borrow(bob, 500)
    assert loan.lender_id == alice


async def test_loans_that_fail_do_not_hide_others_from_the_watch(lenders: Lenders) -> None:
    alice, bob = await holder(lenders, USDC=100_000), await holder(lenders, BTC=2)
    await lenders.offer(alice, 40_000)
    worst, other = [(await lenders.borrow(bob, 10_000, pledge))[0].id for pledge in ("0.21", "0.22")]
    await lenders.desk.prices({"BTC": 50_000})
    async with lenders.desk.database.transaction("test") as tx:
        view = await lenders.desk.market.current(tx)
        assert await loan_steps.named_by_prices(tx, view, timedelta(hours=1), range(64), 1) == [worst]
        assert await loan_steps.named_by_prices(tx, view, timedelta(hours=1), range(64), 1, [worst]) == [other]


async def test_the_watch_counts_interest_that_a_top_up_has_accrued(lenders: Lenders) -> None:
    alice, bob = await holder(lenders, USDC=100_000), await holder(lenders, BTC=1)
    await lenders.offer(alice, 10_000, rate=10)
    [loan] = await lenders.borrow(bob, 10_000, "0.197")  # at 60,000: 1.064 of the debt after haircut
    lenders.pass_time(hours=23)
    await lenders.top_up(loan, "0.000000000000000001")
    accrued = (await lenders.loan(loan.id)).accrued
    assert accrued > 0
    async with lenders.desk.database.transaction("test") as tx:
        view = await lenders.desk.market.current(tx)
        await tx.connection.execute(text("UPDATE loans SET accrued_to = clock_timestamp()"))
        named = await loan_steps.named_by_prices(tx, view, timedelta(hours=1), range(64), 10)
    assert named == [loan.id]  # 262 USDC of interest: 1.037


_MANY = text(
    """
    INSERT INTO loans (id, offer_id, lender_id, borrower_id, asset, amount, principal, rate_kind, rate, notice_seconds,
        collateral_asset, collateral, accrued, accrued_to, interest_paid, interest_booked, next_interest_at, recalled,
        status, deficit, opened_at, next_action_at)
    SELECT o.id || i, o.id, o.lender_id, :borrower, 'USDC', 1, 1, 'fixed', 0, 0, 'BTC', 1, 0, now(), 0, 0, now(), 0,
        'active', 0, now(), now()
    FROM loan_offers o, generate_series(1, 100) i
    """
)


async def test_a_page_of_offers_ends_before_its_loans_are_too_many(lenders: Lenders) -> None:
    alice, bob = await holder(lenders, USDC=1_000), await holder(lenders, BTC=1)
    made = [(await lenders.offer(alice, 1)).id for _ in range(7)][::-1]
    async with lenders.desk.database.transaction("test") as tx:
        await tx.connection.execute(_MANY, {"borrower": bob})
        first, below = await loans.list_offers(tx, alice, 200)
        second, end = await loans.list_offers(tx, alice, 200, below)
        assert [[offer.id for offer in page] for page in (first, second)] == [made[:5], made[5:]]
        assert (below, end) == (first[-1].seq, None)
        await tx.connection.execute(text("DELETE FROM loans"))


# --- gates and ceilings


async def test_offers_pass_the_gate_together(lenders: Lenders) -> None:
    alice = await holder(lenders, USDC=10_000)
    await lenders.desk.order(alice, "buy", "0.44")  # utilization .792
    await lenders.offer(alice, 1_000)
    with pytest.raises(ConflictError) as refused:
        await lenders.offer(alice, 1_500)  # 5 % of 2,500 would be 125: .802
    assert refused.value.code == "insufficient_margin"


async def test_a_lenders_offers_pass_its_gate_together_when_they_are_taken(lenders: Lenders) -> None:
    trader, alice, bob = [await holder(lenders, **what) for what in ({"USDC": 10_000}, {"USDC": 10_000}, {"BTC": 1})]
    for _ in range(2):
        await lenders.offer(trader, 500, rate=0)
    await lenders.desk.order(trader, "buy", "0.443")  # 7,974 of margin: .7994 with one of them lent, .8014 with both
    await lenders.offer(alice, 1_000, rate="0.05")
    [loan] = await lenders.borrow(bob, 1_000)
    assert loan.lender_id == alice
    [loan] = await lenders.borrow(bob, 500)
    assert loan.lender_id == trader
    figures = await lenders.desk.figures(trader)
    assert figures.health.required_initial <= 0.8 * figures.equity


async def test_what_is_offered_lent_or_pledged_is_not_spent_twice(lenders: Lenders) -> None:
    alice, bob = await holder(lenders, USDC=1_000, BTC=1), await holder(lenders, USDC=1_000)
    await lenders.offer(alice, 400)
    await lenders.offer(bob, 400)
    await lenders.borrow(alice, 100, "0.5")
    await lenders.borrow(bob, 100, 600, of="USDC")  # each of the other: 600 + 100 free, 100 free
    for who, asset, free in ((alice, "USDC", 700), (alice, "BTC", "0.5"), (bob, "USDC", 100)):
        assert (await lenders.money(who, asset))["free"] == D(free)
        more = D(free) + D("0.000001")
        for step in (lenders.desk.withdraw(who, asset, more), lenders.desk.reserve(who, more, asset)):
            with pytest.raises(ConflictError) as refused:
                await step
            assert refused.value.code == "insufficient_funds"
    async with lenders.desk.locked(bob) as (tx, _, _held):
        await holdings.put(tx, bob, "USDC", HoldingSettings(long_term=True))
    for again in (lenders.offer(bob, "100.000001"), lenders.borrow(bob, 20, "100.000001", of="USDC")):
        with pytest.raises(ConflictError) as refused:
            await again
        assert refused.value.code == "insufficient_funds"


async def test_what_is_borrowed_raises_no_ceiling(lenders: Lenders) -> None:
    alice, bob = await holder(lenders, USDC=100_000), await holder(lenders, USDC=1_000, BTC=1)
    await lenders.offer(alice, 40_000)
    await lenders.borrow(bob, 1_000)
    with pytest.raises(ConflictError) as refused:
        await lenders.offer(bob, "400.01")
    assert (refused.value.code, refused.value.figures) == ("lent_share_above_ceiling", {"available": 400})
    await lenders.offer(bob, 400)


async def test_lending_in_a_circle_makes_nobody_richer(lenders: Lenders) -> None:
    """Two agents lend the same units to and fro, each time against what they have just borrowed."""
    circle = [await holder(lenders, USDC=10_000), await holder(lenders, USDC=10_000)]
    before = sum([(await lenders.desk.figures(who)).equity for who in circle])
    amount = D(4_000)
    for turn in range(6):
        lender, borrower = circle[turn % 2], circle[1 - turn % 2]
        try:
            await lenders.offer(lender, amount, rate=0)
            await lenders.borrow(borrower, amount, of="USDC")
        except ConflictError:
            amount = (amount / 2).quantize(D(1))
    figures = [await lenders.desk.figures(who) for who in circle]
    assert sum(f.equity for f in figures) <= before
    assert all(f.equity <= 10_000 for f in figures)
    held = [await lenders.money(who) for who in circle]
    assert sum(h.get("lent", 0) for h in held) == sum(h.get("borrowed", 0) for h in held) > 4_000
    # whoever wants out takes no more than was brought in, however the units went round
    taken = D(0)
    for who in circle:
        for part in (D(6_000), D(3_000), D(1_000), D(100), D(10), D(1)):
            for _ in range(10):
                try:
                    await lenders.desk.withdraw(who, "USDC", part)
                except ConflictError:
                    break
                taken += part
    assert taken <= 20_000
    assert min([(await lenders.desk.figures(who)).equity for who in circle]) >= 0


# --- margin calls


async def _caller(lenders: Lenders, notice: float) -> tuple[str, str]:
    """Make a trader whose grace is nothing, with 6,000 USDC on loan, and let the price fall past its breach."""
    trader = await lenders.desk.agent("20000", grace_period_seconds=0)
    bob = await holder(lenders, BTC=1)
    await lenders.offer(trader, 6_000, hours=notice)
    [loan] = await lenders.borrow(bob, 6_000, "0.24")
    await lenders.desk.order(trader, "buy", "0.8")
    return trader, loan.id


async def test_without_grace_loans_are_recalled_before_a_position_is_touched_too(lenders: Lenders) -> None:
    trader, loan_id = await _caller(lenders, 0)
    await lenders.desk.prices({"BTC": 54_500})
    calls = Calls(lenders.desk)
    told = (await calls.decide(trader)).told
    assert told == ("margin_call.opened", "margin_call.expired")
    assert await calls.sizes(trader) == {"BTC-PERP": D("0.8")}
    await lenders.decide(loan_id)
    assert (await lenders.loan(loan_id)).status == "liquidated"
    assert (await calls.decide(trader)).told == ("liquidation.executed",)


async def test_a_part_recalled_before_does_not_keep_a_loan_from_a_call(lenders: Lenders) -> None:
    trader, loan_id = await _caller(lenders, 24)
    await lenders.recall(trader, loan_id, 1)
    await lenders.desk.prices({"BTC": 54_500})
    await Calls(lenders.desk).decide(trader)
    await lenders.decide(loan_id)
    assert (await lenders.loan(loan_id)).recalled == 6_000
