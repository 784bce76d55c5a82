"""What a fleet in breach does not do: gain time for who is in breach by itself, pay holes, or let money out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.db.session import Database
from app.errors import ConflictError
from app.services import agreements, book, calls, fleet_books, lending, margin_calls, netting
from app.services.agreements import NewAgreement
from app.services.fleet_cascade import Crash
from app.services.fleet_watch import needy
from app.services.lending import NewOffer, Wanted
from app.services.netting import NewObligation
from app.services.wallet import Names
from tests.services.calls import RULES
from tests.services.desk import ACTOR
from tests.services.muster import FALLEN, PRICES, Muster
from tests.services.squadron import Squadron
from tests.services.test_venue import Venue


async def test_a_hole_is_not_filled_by_standing_by(squadron: Squadron) -> None:
    """150 SOL fall from 100 to 10, 13,500 of the 12,375 that the member drew: 8,437.50 more are not drawn."""
    muster = await Muster.gathered(squadron, usdc=300_000, grace=300)
    gone = muster.pooled[1]
    await squadron.change(muster.fleet, gone, max_margin=Decimal(30_000))
    fallen = {"SOL": "10"}
    foretold = await muster.cascade_of(Crash(shock=0.0, shocks={"SOL": -0.9}))
    assert gone in [fall["agent_id"] for fall in foretold["rounds"][0]["liquidated"]]
    assert gone not in [who["agent_id"] for who in foretold["rounds"][0]["stood_by"]]
    await muster.crash(fallen)
    assert (await muster.calls.only(gone)).state == "open"
    async with squadron.desk.scene() as (tx, scene):
        assert gone not in needy(scene, await fleet_books.load(tx, muster.fleet))
    before = (await muster.pool()).health.equity
    await muster.calls.pass_time(gone, 301)
    told = await muster.settle([gone])
    assert ("margin_call.expired") in [kind for _, kind in told]
    assert (await squadron.drawn(muster.fleet))[gone] == Decimal(12_375)
    assert await muster.calls.sizes(gone) == {}
    assert (await muster.pool()).health.equity == pytest.approx(before)


async def _master_in_breach(muster: Muster) -> datetime:
    """Give the master 13 BTC of its own, and a call for them at 55,500; return its deadline."""
    desk, master = muster.squadron.desk, muster.fleet.master_id
    await desk.deposit(master, "USDC", 300_000)
    await desk.deposit(muster.pooled[2], "USDC", 20_000)
    await muster.squadron.order(master, "buy", 13)  # 780,000 of notional, 234,000 of margin
    await muster.crash({"BTC": "55500"})
    call = await muster.calls.only(master)
    assert (call.state, call.cause) == ("open", "utilization")
    assert call.deadline_at is not None
    return call.deadline_at


SAVED = FALLEN | {"SOL": "1100"}
"""Two members gain 185,000 and need 61,000 more: the pool is cured, the master by itself is where it was."""


async def test_a_master_does_not_put_off_its_own_deadline_by_the_fleets_call(muster: Muster) -> None:
    """Its pool is in breach and cured again and again: each time its own call goes on, and in the end it is sold."""
    master, deadline = muster.fleet.master_id, await _master_in_breach(muster)
    await muster.set(master, grace_period_seconds=900)
    for _ in range(2):
        told = await muster.crash()
        assert (await muster.calls.calls(master))[0].cause == "fleet"
        told = await muster.crash(SAVED)
        assert [kind for agent, kind in told if agent == master] == ["margin_call.cured", "margin_call.opened"]
        call = (await muster.calls.calls(master))[0]
        assert (call.state, call.cause, call.deadline_at) == ("open", "utilization", deadline)
        assert (call.own_deadline_at, call.own_cause) == (None, None)
    await muster.crash()
    await muster.calls.pass_time(master, 301)  # of the fleet's 900
    assert await muster.settle([master]) == []
    await muster.squadron.desk.prices(SAVED)
    assert (await muster.decide(master)).told == (
        "margin_call.cured",
        "margin_call.opened",
        "margin_call.expired",
        "liquidation.executed",
    )
    await muster.settle()
    assert (await muster.calls.calls(master))[0].state == "completed"
    assert (await muster.calls.sizes(master))["BTC-PERP"] < 13


async def test_an_own_call_that_is_cured_under_the_fleets_is_over(muster: Muster) -> None:
    master, deadline = muster.fleet.master_id, await _master_in_breach(muster)
    await muster.crash()
    assert (await muster.calls.only(master)).own_deadline_at == deadline
    # 229,320 of 292,750 by itself (.783), and members that need 14,500 more have next to nothing: .82
    await muster.crash({"BTC": "58800", "ETH": "400", "SOL": "30"})
    call = await muster.calls.only(master)
    assert (call.state, call.cause, call.own_deadline_at) == ("open", "fleet", None)
    await muster.crash(SAVED)
    own, _ = await muster.calls.calls(master)
    assert own.deadline_at is not None
    assert own.deadline_at > deadline


@pytest.mark.parametrize("grace", [200, 2_000])
async def test_a_members_own_deadline_stands_though_it_has_had_its_turn(squadron: Squadron, grace: int) -> None:
    """Its turn ends with the pool at its stop level, itself at .966: it has no grace anew, and loses none either."""
    muster = await Muster.gathered(squadron, grace=grace)
    second = muster.pooled[1]
    await muster.crash()
    own = await muster.calls.only(second)
    assert own.deadline_at is not None
    await muster.calls.pass_time(second, 301)
    await muster.settle([second])
    assert (await muster.calls.only(second)).state == ("expired" if grace == 200 else "open")
    told = await muster.expire()
    assert [kind for agent, kind in told if agent == second][-2:] == ["liquidation.completed", "margin_call.opened"]
    again, turn = await muster.calls.calls(second)
    assert (turn.cause, turn.own_cause) == ("fleet", own.cause)
    told = await muster.settle([second])
    sold = [agent for agent, *_ in await muster.sold() if agent == second]
    if grace == 200:
        assert [kind for _, kind in told][:2] == ["margin_call.expired", "liquidation.executed"]
        assert len(sold) > 1
    else:
        assert told == []
        assert again.deadline_at == own.deadline_at - timedelta(seconds=301)
        assert len(sold) == 1


FAILS = "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a fault'; END $$"
FAULT = """
    CREATE TRIGGER fault BEFORE INSERT ON events FOR EACH ROW
    WHEN (NEW.type = 'margin_call.expired' AND NEW.agent_id = '{}') EXECUTE FUNCTION fail()
"""


async def test_a_turn_that_fails_at_once_holds_up_no_other(squadron: Squadron) -> None:
    """Its own deadline is yet to come, so that there is no call of the fleet's that could be put off."""
    muster = await Muster.gathered(squadron, grace=1_000)
    database, master, first = squadron.desk.database, muster.fleet.master_id, muster.pooled[0]
    async with database.transaction(ACTOR) as tx:
        await tx.connection.execute(text(FAILS))
        await tx.connection.execute(text(FAULT.format(first)))
    await muster.crash()
    await muster.calls.pass_time(master, 301)
    turns = (await muster.decide(master)).turns
    assert turns[0] == first
    with pytest.raises(DBAPIError, match="a fault"):
        await muster.take_turns(turns)
    async with database.transaction(ACTOR) as tx:
        await margin_calls.pass_over(tx, squadron.scenes, first, master, muster.rules, 10)
    assert first not in await muster.due()
    turns = (await muster.decide(master)).turns
    assert turns[0] == muster.pooled[1]
    await muster.take_turns(turns)
    assert muster.pooled[1] in {agent for agent, *_ in await muster.sold("fleet")}
    await muster.calls.pass_time(first, 11)
    assert first in await muster.due()


async def test_a_call_that_is_woken_while_it_is_decided_on_stays_awake(muster: Muster) -> None:
    """The fleet's call ends after a member's decision has seen it, and before that says when to look again."""
    database, member = muster.squadron.desk.database, muster.pooled[0]
    await muster.crash()
    async with database.transaction(ACTOR) as deciding:
        await book.hold(deciding, member)
        seen = await calls.live(deciding, member)
        assert seen is not None
        assert seen.next_action_at is not None
        async with database.transaction(ACTOR) as ending:
            await calls.wake(ending, [member], "")
        await calls.save(deciding, seen, replace(seen, next_action_at=seen.next_action_at + timedelta(seconds=30)))
    assert member in await muster.due()


async def test_a_call_that_expires_while_its_fleets_ends_is_looked_at_again(squadron: Squadron) -> None:
    muster = await Muster.gathered(squadron, grace=300)
    database, member = squadron.desk.database, muster.pooled[0]
    await muster.crash()
    await muster.calls.pass_time(member, 301)
    assert (await muster.calls.only(member)).state == "open"

    async def end() -> None:
        async with database.transaction(ACTOR) as ending:
            await calls.wake(ending, [member], "")

    async with database.transaction(ACTOR) as deciding:
        decided = await margin_calls.decide(deciding, squadron.scenes, member, muster.rules)
        assert decided.call is not None
        assert decided.call.state == "expired"  # and waits for its fleet's, as it sees it
        ended = asyncio.create_task(end())
        while not (ended.done() or await _waits_for_a_lock(database)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await ended
    assert member in await muster.due()


async def _about_to_be_called(squadron: Squadron) -> tuple[Muster, str]:
    """A fleet under a call, and a member without grace whose loss, as of now, has not been seen yet."""
    muster = await Muster.gathered(squadron, grace=0)
    late = muster.pooled[2]
    await squadron.desk.deposit(late, "USDC", 2_000)  # 9,720 of 11,900, and of all 26,700 of 30,500
    await muster.crash({"BTC": "48000", "ETH": "2700", "SOL": "55"})
    assert (await muster.calls.only(muster.fleet.master_id)).state == "open"
    assert await muster.calls.calls(late) == []
    await squadron.desk.prices({"ETH": "2550"})  # 9,180 of 10,100
    await squadron.desk.deposit(muster.fleet.master_id, "USDC", 50_000)
    return muster, late


async def _is_soon(muster: Muster, member: str) -> bool:
    """Whether a member's call is looked at within a second, and not after half a minute."""
    await muster.calls.pass_time(member, 1)
    return member in await muster.due()


async def test_a_call_that_is_made_while_its_fleets_ends_is_looked_at_within_a_second(squadron: Squadron) -> None:
    """Its fleet's call is over, and not committed: whoever ends it can't see, nor wake, the one that waits for it."""
    muster, late = await _about_to_be_called(squadron)
    database, rules, master = squadron.desk.database, muster.rules, muster.fleet.master_id
    async with database.transaction(ACTOR) as ending:
        ended = await margin_calls.decide(ending, squadron.scenes, master, rules)
        assert ended.told == ("margin_call.cured",)
        assert (await muster.decide(late)).told == ("margin_call.opened", "margin_call.expired")
    assert (await muster.calls.only(late)).state == "expired"
    assert await _is_soon(muster, late)


async def test_whoever_ends_a_fleets_call_waits_for_those_that_are_about_to_wait_for_it(squadron: Squadron) -> None:
    muster, late = await _about_to_be_called(squadron)
    database, rules, master = squadron.desk.database, muster.rules, muster.fleet.master_id
    async with database.transaction(ACTOR) as waiting:
        decided = await margin_calls.decide(waiting, squadron.scenes, late, rules)
        assert decided.told == ("margin_call.opened", "margin_call.expired")
        ending = asyncio.create_task(muster.decide(master))
        while not (ending.done() or await _waits_for_a_lock(database)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await ending).told == ("margin_call.cured",)
    assert late in await muster.due()


async def test_who_waits_for_a_call_that_is_never_made_is_looked_at_within_a_second(muster: Muster) -> None:
    """The pool is in breach as a member's call runs out, and no more when its master is decided on."""
    master, member = muster.fleet.master_id, muster.pooled[2]
    await muster.squadron.desk.prices(FALLEN)
    decided = await muster.decide(member)
    assert decided.told == ("margin_call.opened", "margin_call.expired")
    assert decided.named == (master,)
    await muster.squadron.desk.deposit(master, "USDC", 50_000)
    assert (await muster.decide(master)).told == ()
    assert await _is_soon(muster, member)


async def _overdue_once(muster: Muster) -> None:
    """Have a master begin to be sold, of two positions, whose own call has waited for one of its fleet's."""
    squadron, master = muster.squadron, muster.fleet.master_id
    await squadron.desk.deposit(master, "USDC", 300_000)
    await squadron.desk.deposit(muster.pooled[2], "USDC", 20_000)
    await squadron.order(master, "buy", "12.6")
    await squadron.order(master, "buy", 10, "ETH-PERP")
    await muster.crash({"BTC": "55500"})
    await muster.set(master, grace_period_seconds=900)
    await muster.crash()
    assert (await muster.calls.only(master)).cause == "fleet"
    await muster.calls.pass_time(master, 301)


async def test_a_master_is_sold_once_its_time_is_over_however_its_pool_trembles(muster: Muster) -> None:
    """Its own call has waited for one of the fleet's: what it began to sell then it sells before the next one."""
    squadron, master = muster.squadron, muster.fleet.master_id
    await _overdue_once(muster)
    await squadron.desk.prices(SAVED)
    assert (await muster.decide(master)).told[-1] == "liquidation.executed"
    assert list(await muster.calls.sizes(master)) == ["BTC-PERP"], "there is more to be sold"
    await squadron.desk.prices(FALLEN)
    assert (await muster.pool()).is_breached
    told = await muster.settle([master])
    assert [kind for agent, kind in told if agent == master][:2] == ["liquidation.executed", "liquidation.completed"]
    assert await muster.calls.utilization(master) <= 0.75 + 1e-9
    assert {call.cause for call in await muster.calls.calls(master) if call.state == "completed"} == {"utilization"}


async def test_a_venue_that_fills_nothing_of_its_master_holds_up_no_fleet(muster: Muster) -> None:
    """As many requests as an operator is spared, 30 s each; then the fleet is called all the same."""
    squadron, master = muster.squadron, muster.fleet.master_id
    await _overdue_once(muster)
    await muster.set(master, execution="venue")
    await squadron.desk.prices(SAVED)
    assert (await muster.decide(master)).told[-1] == "liquidation.requested"
    await squadron.desk.prices(FALLEN)
    told: list[str] = []
    for _ in range(RULES.venue_attempts + 1):
        assert (await muster.calls.calls(master))[0].cause == "utilization"
        await muster.calls.pass_time(master, 31)
        told += (await muster.decide(master)).told
    assert told == [*["liquidation.requested"] * RULES.venue_attempts, "margin_call.opened"]
    assert (await muster.calls.calls(master))[0].cause == "fleet"


async def test_a_venue_that_fills_its_master_at_leisure_holds_up_no_fleet(muster: Muster) -> None:
    """Slice after slice is met, each within its own time; after 90 s of them all the fleet is called all the same."""
    squadron, master = muster.squadron, muster.fleet.master_id
    await _overdue_once(muster)
    await muster.set(master, execution="venue")
    await squadron.desk.prices(SAVED)
    assert (await muster.decide(master)).told[-1] == "liquidation.requested"
    await squadron.desk.prices(FALLEN)
    venue = Venue(muster.calls)
    [asked] = await venue.live(master)
    await venue.fill(master, asked.id, "whole", asked.size, FALLEN["ETH"])
    for seconds, attempt in ((0, 1), (31, 2)):
        await muster.calls.pass_time(master, seconds)
        assert (await muster.decide(master)).told == ("liquidation.requested",)
        call = (await muster.calls.calls(master))[0]
        assert (call.cause, call.attempts) == ("utilization", attempt)
    await muster.calls.pass_time(master, 60)
    assert (await muster.decide(master)).told == ("margin_call.opened",)
    assert (await muster.calls.calls(master))[0].cause == "fleet"


async def test_a_member_that_has_had_its_turn_waits_for_no_other_call(squadron: Squadron) -> None:
    """The pool is cured by a price while its turn goes on at its venue, and in breach again before it is looked at."""
    muster = await Muster.gathered(squadron, grace=200)
    master, first = muster.fleet.master_id, muster.pooled[0]
    await muster.set(first, execution="venue")
    await muster.crash()
    await muster.calls.pass_time(first, 301)
    await muster.settle([first])
    await muster.calls.pass_time(master, 301)
    decided = await muster.decide(master)
    await muster.take_turns(decided.turns[:1])
    assert (await muster.calls.only(first)).cause == "fleet"
    await squadron.desk.prices(SAVED | {"SOL": "3000"})
    assert (await muster.decide(master)).told[-1] in ("margin_call.cured", "liquidation.completed")
    await squadron.desk.prices(FALLEN)
    assert (await muster.decide(first)).told == ("liquidation.completed", "margin_call.opened")
    assert (await muster.decide(master)).told == ("margin_call.opened",)
    assert (await muster.calls.calls(master))[0].cause == "fleet"
    assert (await muster.decide(first)).told == ("margin_call.expired", "liquidation.requested")


async def test_a_master_that_has_waited_for_no_fleets_call_gives_way_to_it(muster: Muster) -> None:
    """Its own time is over for the first time when the pool is in breach too: members come first."""
    master = muster.fleet.master_id
    await _master_in_breach(muster)
    before = await muster.sold()
    await muster.calls.pass_time(master, 301)
    await muster.squadron.desk.prices(FALLEN)
    await muster.decide(master)
    call = await muster.calls.only(master)
    assert (call.cause, call.state) == ("fleet", "open")
    assert await muster.sold() == before


async def test_a_member_waits_for_one_call_of_its_fleet_and_for_no_other(squadron: Squadron) -> None:
    """It is past its own deadline when its fleet's call is cured, and the pool is in breach again at once."""
    muster = await Muster.gathered(squadron, grace=200)
    master, [waited, other] = muster.fleet.master_id, muster.pooled[2:]
    await squadron.desk.deposit(other, "USDC", 3_000)  # 6,480 of 7,725
    await muster.crash()
    for agent_id in muster.everybody:
        await muster.calls.pass_time(agent_id, 201)
    told = [(agent, kind) for agent, kind in await muster.settle() if agent in muster.pooled]
    assert told == [(agent, "margin_call.expired") for agent in muster.pooled[:3]]
    await squadron.desk.prices(SAVED)
    assert (await muster.decide(master)).told == ("margin_call.cured",)
    await squadron.desk.prices(FALLEN | {"BTC": "34000"})  # 23,880 of 22,200, and 19,965 when one is sold
    assert (await muster.pool()).is_breached
    told = await muster.settle([waited])
    assert [kind for agent, kind in told if agent == waited][-1] == "liquidation.completed"
    assert {agent for agent, *_ in await muster.sold()} == {waited, muster.isolated}
    # who comes into breach only now has waited for nobody yet
    assert (await muster.calls.calls(master))[0].state == "open"
    await muster.settle([other])
    await muster.calls.pass_time(other, 201)
    older = "UPDATE margin_calls SET ended_at = ended_at - interval '201 s' WHERE ended_at IS NOT NULL RETURNING 1"
    await squadron.desk.rows(older)
    assert [kind for agent, kind in await muster.settle([other]) if agent == other] == ["margin_call.expired"]
    assert other not in {agent for agent, *_ in await muster.sold()}


async def _waits_for_a_lock(database: Database) -> bool:
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    async with database.transaction(ACTOR) as tx:
        return bool((await tx.connection.execute(waiting)).scalar_one())


async def test_what_was_offered_or_is_owed_leaves_no_called_pool(muster: Muster) -> None:
    """Before the call the master offered a loan, and an admin booked what it owes, for which nothing was free."""
    squadron, desk, master = muster.squadron, muster.squadron.desk, muster.fleet.master_id
    database, scenes = desk.database, squadron.scenes
    creditor, borrower = await desk.agent(1), await desk.agent()
    await desk.deposit(borrower, "BTC", 1)
    async with database.transaction(ACTOR) as tx:
        scene = await scenes.at(tx)
        agreement = await agreements.propose(
            tx, scene, creditor, NewAgreement("n", [master], ["casino"], interval_seconds=None, threshold=None)
        )
        await agreements.accept(tx, master, agreement.id)
        await lending.offer(tx, scenes, master, NewOffer("USDC", Decimal(500)), Names())
    free = (await desk.money(master))["free"]
    async with database.transaction(ACTOR) as tx:
        owed = NewObligation(creditor, "casino", "USDC", free + 100, "a", fact=True)
        await netting.book_obligation(tx, scenes, master, agreement.id, owed)
    await muster.crash()
    assert (await muster.calls.only(master)).cause == "fleet"
    await desk.deposit(master, "USDC", 1_000)

    async def run() -> str:
        async with database.transaction(ACTOR) as tx:
            ran = await netting.run(tx, scenes, agreement.id, creditor)
        assert ran is not None
        return ran.run.outcome

    async def borrow() -> Decimal:
        wanted = Wanted("USDC", Decimal(500), "BTC")
        async with database.transaction(ACTOR) as tx:
            return sum(
                (loan.principal for loan in await lending.borrow(tx, scenes, borrower, wanted, Names())), Decimal(0)
            )

    assert await run() == "defaulted"
    with pytest.raises(ConflictError) as refused:
        await borrow()
    assert refused.value.code == "not_enough_offered"
    await muster.crash(PRICES)
    await desk.deposit(master, "USDC", 100_000)
    await muster.settle([master])
    assert await run() == "settled"
    assert await borrow() == Decimal(500)
