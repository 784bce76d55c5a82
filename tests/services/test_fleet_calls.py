"""The fleet's margin call: the coordinator first, then members by priority, each decided on a real database."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest

from app.db.session import Tx
from app.domain.book import Book
from app.domain.escrow import Leg
from app.errors import ConflictError
from app.services import agreements, book, delegation, escrows, fleet_pool, fleets, lending, netting
from app.services.agreements import NewAgreement
from app.services.delegation import Pair
from app.services.escrows import NewEscrow
from app.services.fleet_terms import Terms
from app.services.lending import NewOffer
from app.services.margin import Scene, Scenes
from app.services.market_cache import MarketCache
from app.services.netting import NewObligation
from app.services.wallet import Names
from tests.services.calls import RULES
from tests.services.desk import ACTOR, ITEMS_MAX
from tests.services.muster import PRICES, Muster
from tests.services.squadron import Squadron

STOP = 0.75


def by_hand(muster: Muster) -> list[tuple[str, str, Decimal]]:
    """What a fleet's call sells: 88,000 x .30 = 26,400 of 27,600; at .75 it may be 20,700, so 19,000 are sold.

    The first member holds 2,800 of SOL, 3,600 of ETH, 4,800 of BTC: sold whole. The second 12,000 of SOL, at 80 each.
    """
    first, second = muster.pooled[:2]
    whole = [("SOL-PERP", "35"), ("ETH-PERP", "1.5"), ("BTC-PERP", "0.1")]
    return [*((first, symbol, Decimal(size)) for symbol, size in whole), (second, "SOL-PERP", Decimal("97.5"))]


async def test_the_coordinator_is_called_and_members_wait(muster: Muster) -> None:
    before = await muster.sizes()
    told = await muster.crash()
    master = await muster.calls.only(muster.fleet.master_id)
    assert (master.state, master.cause) == ("open", "fleet")
    assert master.figures["utilization"] == pytest.approx(26_400 / 27_600)
    assert master.opened_at is not None
    assert master.deadline_at == master.opened_at + timedelta(seconds=300)
    # members have no grace: their own calls have run out, and nothing of theirs is sold
    for member in muster.pooled:
        assert [kind for agent, kind in told if agent == member] == ["margin_call.opened", "margin_call.expired"]
    assert {a: s for a, s in (await muster.sizes()).items() if a != muster.isolated} == {
        a: s for a, s in before.items() if a != muster.isolated
    }
    # who is isolated is liquidated for itself, and by nobody else's call
    own = await muster.calls.only(muster.isolated)
    assert (own.state, own.cause, own.fleet_call_id) == ("completed", "utilization", None)
    assert await muster.called() == [muster.fleet.master_id]
    [[cure]] = await muster.squadron.desk.rows(
        "SELECT data -> 'cure' FROM events WHERE type = 'margin_call.opened' AND agent_id = :master",
        master=muster.fleet.master_id,
    )
    assert cure["deposit"] == {"asset": "USDC", "amount": 5_400}  # 26,400 / .80 less 27,600
    assert [m["agent_id"] for m in cure["members"]] == muster.pooled


async def test_at_the_deadline_members_are_liquidated_by_priority_smallest_first(muster: Muster) -> None:
    foretold = await muster.cascade()
    await muster.crash()
    told = await muster.expire()
    sold = await muster.sold("fleet")
    *whole, part = by_hand(muster)
    assert sold[:3] == whole
    assert [s[:2] for s in sold[3:]] == [part[:2]]
    assert float(sold[3][2]) == pytest.approx(97.5)
    assert 0.7499 < await muster.utilization() <= STOP
    [first, *rest] = foretold["rounds"]
    assert rest == []
    by_fleet = [
        (f["agent_id"], s["symbol"], s["size"]) for f in first["liquidated"] if f["by"] == "fleet" for s in f["slices"]
    ]
    assert by_fleet == sold
    assert first["next"][0] == muster.pooled[1]
    kinds = [kind for agent, kind in told if agent == muster.fleet.master_id]
    assert kinds == ["margin_call.expired", "liquidation.completed"]
    turns = {a: (await muster.calls.calls(a))[-1] for a in muster.pooled[:2]}  # the second then has one of its own
    master = await muster.calls.only(muster.fleet.master_id)
    assert {(c.state, c.cause, c.fleet_call_id) for c in turns.values()} == {("completed", "fleet", master.id)}
    assert (master.state, master.slices) == ("completed", 0)
    assert [c.slices for c in turns.values()] == [3, 1]


@pytest.mark.parametrize("shock", ["-0.12", "-0.2", "-0.25", "-0.45"])
async def test_a_cascade_is_what_is_then_done(squadron: Squadron, shock: str) -> None:
    """Above the pool's breach, past it, and where members lose more than all; what the fleet leaves is their own."""
    muster = await Muster.gathered(squadron)
    muster.rules = replace(RULES, slippage=Decimal("0.005"))
    foretold = await muster.cascade(float(shock))
    falls = foretold["rounds"][0]["liquidated"]
    assert foretold["rounds"][0]["fleet_call"] is (shock != "-0.12")
    await muster.crash({asset: str(Decimal(price) * (1 + Decimal(shock))) for asset, price in PRICES.items()})
    if shock != "-0.12":
        await muster.expire()
    await muster.settle()
    own = [row for row in await muster.sold() if row not in await muster.sold("fleet")]
    for by, sold in (("fleet", await muster.sold("fleet")), ("own", own)):
        for agent_id in muster.everybody:
            expected = [s for f in falls if (f["agent_id"], f["by"]) == (agent_id, by) for s in f["slices"]]
            done = [(symbol, float(size)) for agent, symbol, size in sold if agent == agent_id]
            assert [symbol for symbol, _ in done] == [s["symbol"] for s in expected]
            assert [size for _, size in done] == pytest.approx([float(s["size"]) for s in expected])
    order = list(dict.fromkeys(agent for agent, *_ in await muster.sold("fleet")))
    assert order == [f["agent_id"] for f in falls if f["by"] == "fleet"] == muster.pooled[: len(order)]
    assert foretold["in_breach_after"] == []
    assert foretold["pool_after"]["utilization"] == pytest.approx(await muster.utilization())


# --- before anything is sold


async def test_a_member_without_grace_is_stood_by_before_anything_of_it_is_sold(squadron: Squadron) -> None:
    """27,000 of notional on 10,125: 10 % down it is at .98 and lacks 1,687.50; the master has it to give, or not."""
    muster = await Muster.gathered(squadron, usdc=100_000)
    stood_by, capped = muster.pooled[3], muster.pooled[1]
    await squadron.change(muster.fleet, capped, max_margin=Decimal(12_375))  # what it has drawn
    told = await muster.crash({"BTC": "54000", "ETH": "2700", "SOL": "90"})
    assert [kind for agent, kind in told if agent == stood_by] == ["margin_call.opened", "margin_call.cured"]
    assert (await squadron.drawn(muster.fleet))[stood_by] == Decimal("11812.50")
    assert await muster.calls.utilization(stood_by) == pytest.approx(0.8)
    # the pool is sound, so that its cap is all that stands against it: it is liquidated by its own call
    assert await muster.calls.calls(muster.fleet.master_id) == []
    own = await muster.calls.only(capped)
    assert (own.state, own.cause, own.fleet_call_id) == ("completed", "utilization", None)
    assert {agent for agent, *_ in await muster.sold()} == {capped, muster.isolated}


async def test_money_that_comes_while_members_wait_keeps_them(muster: Muster) -> None:
    """A deposit ends the fleet's call; what members lack then is drawn before their own calls sell anything."""
    await muster.crash()
    desk, master = muster.squadron.desk, muster.fleet.master_id
    await desk.deposit(master, "USDC", 5_399)
    assert ("margin_call.cured") not in [kind for _, kind in await muster.settle([master])]
    await desk.deposit(master, "USDC", 40_000)
    told = await muster.settle([master])
    assert (master, "margin_call.cured") in told
    assert set(await muster.due()) == set(muster.pooled)  # nobody waits for a call that is over
    await muster.settle(muster.pooled)
    assert {(await muster.calls.only(m)).state for m in muster.pooled} == {"cured"}
    assert {agent for agent, *_ in await muster.sold()} == {muster.isolated}


async def test_closing_by_members_cures_the_fleet(muster: Muster) -> None:
    await muster.crash()
    for member in muster.pooled[:2]:
        for symbol, size in (await muster.calls.sizes(member)).items():
            await muster.squadron.order(member, "sell", size, symbol, reduce_only=True)
    told = await muster.settle(muster.pooled[:2])
    assert (muster.fleet.master_id, "margin_call.cured") in told
    assert await muster.utilization() <= 0.8


async def test_a_price_cures_all(muster: Muster) -> None:
    await muster.crash()
    await muster.crash(PRICES)
    calls = [await muster.calls.only(agent) for agent in (muster.fleet.master_id, *muster.pooled)]
    assert {call.state for call in calls} == {"cured"}


# --- whose call it is


async def test_the_notice_delay_is_the_masters_and_maintenance_skips_it(squadron: Squadron) -> None:
    muster = await Muster.gathered(squadron)
    await muster.set(muster.fleet.master_id, notice_delay_seconds=60)
    await muster.crash()
    assert (await muster.calls.only(muster.fleet.master_id)).state == "noticed"
    assert {agent for agent, *_ in await muster.sold()} == {muster.isolated}  # members wait all the same
    # 110,000 x .64 is 70,400, of which 15 % are 10,560; the equity is 49,600 less 39,600
    await muster.crash({"BTC": "38400", "ETH": "1920", "SOL": "64"})
    call = await muster.calls.only(muster.fleet.master_id)
    assert (call.state, call.cause) == ("open", "fleet")


async def test_a_masters_own_call_becomes_the_fleets_with_the_fleets_time(muster: Muster) -> None:
    desk, master = muster.squadron.desk, muster.fleet.master_id
    await desk.deposit(master, "USDC", 300_000)
    await desk.deposit(muster.pooled[2], "USDC", 20_000)
    await muster.squadron.order(master, "buy", 13)  # 780,000 of notional, 234,000 of margin
    await muster.set(master, grace_period_seconds=600)
    await muster.crash({"BTC": "55500"})
    own = await muster.calls.only(master)
    assert (own.state, own.cause) == ("open", "utilization")
    await muster.calls.pass_time(master, 500)
    await muster.crash()
    call = await muster.calls.only(master)
    assert (call.id, call.state, call.cause) == (own.id, "open", "fleet")
    assert call.deadline_at is not None
    assert call.opened_at is not None
    assert call.deadline_at - call.opened_at == timedelta(seconds=600)


async def test_the_masters_own_positions_come_last(muster: Muster) -> None:
    desk, master = muster.squadron.desk, muster.fleet.master_id
    await desk.deposit(master, "USDC", 10_000)
    # 35 % down: of its own 18,350 the master has 1,550 left and needs 9,360, members have nearly nothing
    await muster.squadron.order(master, "buy", "0.8")
    await muster.crash({"BTC": "39000", "ETH": "1950", "SOL": "65"})
    await muster.expire()
    assert list(dict.fromkeys(agent for agent, *_ in await muster.sold("fleet"))) == [*muster.pooled, master]
    *_, call = await muster.calls.calls(master)  # it is in breach by itself after that, and called anew
    assert (call.state, call.cause, call.slices) == ("completed", "fleet", 1)
    assert 0.7499 < await muster.utilization() <= STOP


async def test_a_master_that_is_not_liquidated_leaves_its_members_to_themselves(muster: Muster) -> None:
    await muster.set(muster.fleet.master_id, auto_liquidate=False)
    await muster.crash()
    assert {agent for agent, *_ in await muster.sold()} == {muster.isolated}
    await muster.expire()
    assert (await muster.calls.only(muster.fleet.master_id)).state == "expired"
    assert set(await muster.due()) >= set(muster.pooled)  # they wait no more
    await muster.settle()
    assert {agent for agent, *_ in await muster.sold()} == set(muster.members)
    assert await muster.sold("fleet") == []


async def test_a_member_that_keeps_its_own_positions_is_passed_over(muster: Muster) -> None:
    await muster.set(muster.pooled[0], auto_liquidate=False)
    await muster.crash()
    await muster.expire()
    assert (await muster.sold("fleet"))[0][0] == muster.pooled[1]


async def test_a_pool_is_looked_at_without_a_lock_until_it_is_to_be_called(muster: Muster) -> None:
    """A member's call makes no pool: 12 % down it is sound, 20 % down it is not, and then the timer has it."""
    squadron, master, other = muster.squadron, muster.fleet.master_id, muster.pooled[0]

    async def is_to_be_called() -> bool:
        async with squadron.desk.database.transaction(ACTOR) as holder:
            await book.lock_all(holder, {master, *muster.pooled})
            async with asyncio.timeout(20), squadron.desk.scene() as (tx, scene):
                return await fleet_pool.is_to_be_called(tx, scene, RULES, master)

    await squadron.desk.prices({"BTC": "52800", "ETH": "2640", "SOL": "88"})
    await muster.decide(other)
    assert await muster.called() == [master]
    assert not await is_to_be_called()
    await squadron.desk.prices({"BTC": "48000", "ETH": "2400", "SOL": "80"})
    assert await is_to_be_called()
    await muster.decide(master)
    assert not await is_to_be_called()


# --- at once, and on what is not known


async def test_two_workers_sell_what_one_does(muster: Muster) -> None:
    await muster.crash()
    await muster.calls.pass_time(muster.fleet.master_id, 301)
    master = muster.fleet.master_id

    async def work() -> None:
        for _ in range(3):
            await muster.take_turns((await muster.decide(master)).turns)

    await asyncio.gather(*(work() for _ in range(5)))
    sold = await muster.sold("fleet")
    assert sold[:3] == by_hand(muster)[:3]
    assert [s[:2] for s in sold[3:]] == [(muster.pooled[1], "SOL-PERP")]
    turns = [call for agent in muster.pooled for call in await muster.calls.calls(agent) if call.fleet_call_id]
    assert [call.slices for call in turns] == [3, 1]
    assert (await muster.calls.only(master)).state == "completed"


async def test_a_stale_price_calls_no_fleet(muster: Muster) -> None:
    """16 % down the pool is at .866; had every price risen again it would not be."""
    fresh = muster.squadron.scenes
    await muster.squadron.desk.prices({"BTC": "50400", "ETH": "2520", "SOL": "84"})
    muster.squadron.scenes = Scenes(muster.squadron.desk.market, timedelta(0), ITEMS_MAX)
    await muster.settle()
    assert await muster.calls.calls(muster.fleet.master_id) == []
    muster.squadron.scenes = fresh
    await muster.settle()
    assert (await muster.calls.only(muster.fleet.master_id)).state == "open"


async def test_where_the_pool_cannot_be_judged_each_member_is_by_itself(muster: Muster) -> None:
    """A member's coin, worth 5,000 as collateral, was all that could save the pool: then its feed ends."""
    desk, master, rich = muster.squadron.desk, muster.fleet.master_id, muster.pooled[3]
    await desk.prices({"DOGE": "0.1"})
    await desk.deposit(rich, "DOGE", 40_000)
    await muster.set(master, grace_period_seconds=60)
    await muster.crash()
    assert (await muster.calls.only(master)).state == "open"
    await desk.rows(
        """
        WITH bumped AS (UPDATE market_state SET version = version + 1 WHERE name = 'prices' RETURNING version)
        UPDATE market_prices p SET as_of = as_of - interval '10 days', version = bumped.version
        FROM bumped WHERE symbol = 'DOGE' RETURNING 1
        """
    )
    await desk.deposit(rich, "DOGE", 60_000)
    await muster.calls.pass_time(master, 61)
    assert await muster.settle([master]) == []
    assert (await muster.calls.only(master)).state == "open"
    assert set(await muster.due()) >= set(muster.pooled[:3])  # they wait no more
    await muster.settle(muster.pooled)
    assert {agent for agent, *_ in await muster.sold()} == {*muster.pooled[:3], muster.isolated}
    await desk.prices({"DOGE": "0.1"})
    await muster.settle()
    assert (await muster.calls.calls(master))[0].state in ("cured", "completed")


# --- who is in the pool


async def test_nobody_comes_or_goes_while_the_fleet_is_called(muster: Muster) -> None:
    squadron, fleet = muster.squadron, muster.fleet
    idle, late = await squadron.member(fleet, 100), await squadron.desk.agent()
    await muster.crash()

    async def leave() -> None:
        async with squadron.desk.database.transaction(ACTOR) as tx:
            books = await book.lock_all(tx, {fleet.master_id, idle})
            await delegation.give_back(tx, await squadron.scenes.at(tx), Pair(books[idle], books[fleet.master_id]))
            await fleets.remove(tx, await fleets.get_member(tx, fleet.id, idle))

    async def join() -> None:
        async with squadron.desk.database.transaction(ACTOR) as tx:
            await fleets.invite(tx, fleet, late, Terms(Decimal(10)), joins=True)

    for attempt in (leave(), join(), squadron.change(fleet, idle, delegation="isolated")):
        with pytest.raises(ConflictError) as refused:
            await attempt
        assert refused.value.code == "fleet_call_is_live"
    await squadron.change(fleet, muster.pooled[3], liquidation_priority=0)  # its coordinator may still choose
    await muster.expire()
    assert (await muster.sold("fleet"))[0][0] == muster.pooled[3]
    await leave()


@pytest.mark.parametrize("keeps", ["the master", "every member"])
async def test_a_call_by_which_nothing_more_is_sold_holds_nobody(muster: Muster, keeps: str) -> None:
    squadron, fleet = muster.squadron, muster.fleet
    rich = await squadron.member(fleet, 100)
    await squadron.desk.deposit(rich, "USDC", 100)
    for agent_id in [fleet.master_id] if keeps == "the master" else muster.pooled:
        await muster.set(agent_id, auto_liquidate=False)
    await muster.crash()
    with pytest.raises(ConflictError) as refused:
        await squadron.desk.withdraw(rich, "USDC", 60)
    assert refused.value.code == "fleet_call_is_live"
    await muster.expire()
    [call] = await muster.calls.calls(fleet.master_id)
    assert (call.cause, call.state) == ("fleet", "expired" if keeps == "the master" else "liquidating")
    with pytest.raises(ConflictError) as refused:
        await squadron.desk.withdraw(fleet.master_id, "USDC", 1)
    assert refused.value.code in ("fleet_call_is_live", "insufficient_margin")
    await squadron.desk.withdraw(rich, "USDC", 60)
    async with squadron.desk.database.transaction(ACTOR) as tx:
        await book.lock_all(tx, {fleet.master_id, rich})
        await fleets.remove(tx, await fleets.get_member(tx, fleet.id, rich))
    await squadron.desk.withdraw(rich, "USDC", 40)
    await muster.settle()


async def test_what_pays_others_takes_nothing_out_of_a_called_pool(muster: Muster) -> None:
    squadron, fleet, master = muster.squadron, muster.fleet, muster.fleet.master_id
    paying = ["casino", "escrow", "lending", "netting"]
    rich = await squadron.member(fleet, 100, services=paying)
    apart = await squadron.member(fleet, 100, services=paying, delegation="isolated")
    await squadron.desk.deposit(rich, "USDC", 100)
    await muster.crash()
    async with squadron.desk.database.transaction(ACTOR) as tx:
        agreement = await agreements.propose(
            tx, await squadron.scenes.at(tx), rich, NewAgreement("n", [apart], ["casino"], None, None)
        )
        await agreements.accept(tx, apart, agreement.id)
    asked = NewEscrow(apart, Leg("USDC", Decimal(10)), 60, "release")
    owed = NewObligation(apart, "casino", "USDC", Decimal(10), "a")

    async def fund(tx: Tx, held: Book, scene: Scene) -> None:
        await escrows.fund(tx, scene, held, replace(asked, payee=muster.isolated), Names())

    async def offer(agent_id: str) -> None:
        async with squadron.desk.database.transaction(ACTOR) as tx:
            await lending.offer(tx, squadron.scenes, agent_id, NewOffer("USDC", Decimal(10)), Names())

    async def owe() -> None:
        async with squadron.desk.database.transaction(ACTOR) as tx:
            await netting.book_obligation(tx, squadron.scenes, rich, agreement.id, owed)

    async def draw() -> None:
        await squadron.reserve(apart, 10)

    await squadron.powder(fleet, release=True)
    attempts = [squadron.run(agent_id, "escrow", fund) for agent_id in (master, rich, apart)]
    for attempt in (*attempts, offer(master), offer(rich), owe(), draw()):
        with pytest.raises(ConflictError) as refused:
            await attempt
        assert refused.value.code == "fleet_call_is_live"
    await squadron.desk.deposit(apart, "USDC", 10)
    await draw()  # it draws nothing now: its own is no part of the pool
    await squadron.reserve(rich, 10)  # and stays in it


async def test_members_open_nothing_once_the_fleets_call_has_run_out(muster: Muster) -> None:
    squadron = muster.squadron
    await muster.set(muster.fleet.master_id, auto_liquidate=False)
    rich = await squadron.member(muster.fleet, 100)
    await squadron.desk.deposit(rich, "USDC", 1_000)
    await muster.crash()
    await squadron.order(rich, "buy", "0.001")
    await muster.expire()
    with pytest.raises(ConflictError) as refused:
        await squadron.order(rich, "buy", "0.001")
    assert refused.value.code == "reduce_only"


async def test_who_is_isolated_draws_nothing_out_of_a_called_pool(muster: Muster) -> None:
    squadron, isolated = muster.squadron, muster.isolated
    await muster.crash()
    await squadron.desk.deposit(muster.fleet.master_id, "USDC", 5_000)
    left = (await squadron.desk.money(isolated))["free"]
    before = await squadron.drawn(muster.fleet)
    with pytest.raises(ConflictError) as refused:
        await squadron.reserve(isolated, left + 500)
    assert refused.value.code == "fleet_call_is_live"
    assert await squadron.drawn(muster.fleet) == before
    await muster.crash(PRICES)
    await squadron.desk.deposit(muster.fleet.master_id, "USDC", 20_000)
    await squadron.reserve(isolated, left + 500)


# --- venues, losses


async def test_a_turn_at_a_venue_waits_for_its_fills_and_no_longer_than_it_may(squadron: Squadron) -> None:
    """The first in line trades at a venue: its slice is asked for there, and who comes after it waits for its fill."""
    muster = await Muster.gathered(squadron)
    desk, master, first = squadron.desk, muster.fleet.master_id, muster.pooled[0]
    await desk.rows("UPDATE accounts SET execution = 'venue' WHERE agent_id = :agent RETURNING 1", agent=first)
    await muster.crash()
    told = await muster.expire()
    assert (first, "liquidation.requested") in told
    assert await muster.sold("fleet") == []
    [asked] = (await desk.book(first)).pending
    turn = await muster.calls.only(first)
    assert (asked.margin_call_id, turn.state, turn.cause) == (turn.id, "liquidating", "fleet")
    assert await muster.settle([master]) == []  # nobody else's turn has come
    # it never fills: once asked as often as the rules have it, the line goes on without it
    for attempt in range(2, 5):
        await muster.calls.pass_time(first, 31)
        told = await muster.settle([first])
        assert (first, "liquidation.requested") in told
        assert (await muster.calls.only(first)).attempts == attempt
    assert {agent for agent, *_ in await muster.sold("fleet")} == {muster.pooled[1]}
    assert (master, "liquidation.completed") in told
    # over with the fleet's call: what was asked for is withdrawn
    assert (first, "liquidation.completed") in await muster.settle([first])
    assert all(order.margin_call_id != turn.id for order in (await desk.book(first)).pending)


async def test_a_turn_ends_with_its_call_whatever_is_called_next(squadron: Squadron) -> None:
    """The fleet's call is over, and before the member is looked at there is another: its deadline is yet to come.

    Nothing is sold by that one; the member's own call is past its deadline, and has waited for the first.
    """
    muster = await Muster.gathered(squadron)
    desk, master, first = squadron.desk, muster.fleet.master_id, muster.pooled[0]
    await desk.rows("UPDATE accounts SET execution = 'venue' WHERE agent_id = :agent RETURNING 1", agent=first)
    await muster.crash()
    await muster.expire()
    turn = await muster.calls.only(first)
    await desk.deposit(master, "USDC", 8_000)
    assert "liquidation.completed" in (await muster.decide(master)).told
    await desk.prices({"BTC": "36000", "ETH": "1800", "SOL": "60"})
    assert "margin_call.opened" in (await muster.decide(master)).told
    await muster.calls.pass_time(first, 31)
    assert (await muster.decide(first)).told == ("liquidation.completed", "margin_call.opened")
    assert (await muster.decide(first)).told == ("margin_call.expired", "liquidation.requested")
    own = (await muster.calls.calls(first))[0]
    assert (own.cause, own.fleet_call_id) == ("maintenance", None)
    assert (await muster.calls.calls(master))[0].state == "open"
    [ended] = [call for call in await muster.calls.calls(first) if call.id == turn.id]
    assert (ended.state, ended.slices) == ("completed", 0)


async def test_what_waits_for_a_venue_is_not_exhausted(squadron: Squadron) -> None:
    """All have been asked for as often as the rules have it: there is still something to close."""
    muster = await Muster.gathered(squadron)
    muster.rules = replace(RULES, venue_attempts=0)
    for member in muster.pooled:
        await squadron.desk.rows("UPDATE accounts SET execution = 'venue' WHERE agent_id = :a RETURNING 1", a=member)
    await muster.crash()
    told = await muster.expire()
    assert [agent for agent, kind in told if kind == "liquidation.requested"] == muster.pooled
    told += await muster.settle([muster.fleet.master_id])
    assert "liquidation.exhausted" not in [kind for _, kind in told]
    assert (await muster.calls.only(muster.fleet.master_id)).state == "liquidating"


async def test_what_a_member_loses_beyond_what_it_has_is_counted_once(squadron: Squadron) -> None:
    """Everything falls by more than half: members' losses are in their own calls, and the master's money is its own."""
    muster = await Muster.gathered(squadron)
    await muster.crash({"BTC": "24000", "ETH": "1200", "SOL": "40"})
    await muster.expire()
    await muster.settle()
    for member in muster.pooled:
        lost = sum((call.lost for call in await muster.calls.calls(member)), Decimal(0))
        owed = -(await squadron.desk.figures(member)).equity
        assert float(lost) == pytest.approx(max(0.0, owed))
        assert await muster.calls.sizes(member) == {}
    assert sum(call.lost for call in await muster.calls.calls(muster.fleet.master_id)) == 0
    assert (await squadron.desk.money(muster.fleet.master_id))["free"] > 0


async def test_what_was_lost_beyond_all_can_be_written_off(squadron: Squadron) -> None:
    """The member owes the house what it has lost beyond its own; of what it drew nothing comes back."""
    muster = await Muster.gathered(squadron)
    await muster.crash({"BTC": "24000", "ETH": "1200", "SOL": "40"})
    await muster.expire()
    await muster.settle()
    lost = muster.pooled[1]
    assert (await squadron.desk.money(lost))["owed"] > 0
    async with squadron.desk.database.transaction(ACTOR) as tx:
        books = await book.lock_all(tx, {muster.fleet.master_id, lost})
        before = await fleets.get_member(tx, muster.fleet.id, lost)
        after = await delegation.write_off(tx, books[lost], before)
        await fleets.remove(tx, after)
    assert (before.drawn, after.drawn) == (Decimal(12_375), Decimal(0))


async def test_a_master_whose_members_hold_nothing_has_a_call_of_its_own(squadron: Squadron) -> None:
    fleet = await squadron.fleet(22_500)
    await squadron.member(fleet, 1_000)
    await squadron.order(fleet.master_id, "buy", 1)
    muster = Muster(squadron, fleet)
    await muster.crash({"BTC": "54000"})
    assert (await muster.calls.only(fleet.master_id)).cause == "utilization"


async def test_all_at_once_leaves_nobody_waiting(muster: Muster) -> None:
    """Workers, draws, deposits and closings cross each other: no deadlock, every slice of one call, all of it paid."""
    squadron, master = muster.squadron, muster.fleet.master_id
    await squadron.desk.prices({"BTC": "48000", "ETH": "2400", "SOL": "80"})
    await muster.set(master, grace_period_seconds=0)

    async def close(agent_id: str) -> None:
        for _ in range(3):
            for symbol, size in (await muster.calls.sizes(agent_id)).items():
                with contextlib.suppress(ConflictError):  # sold meanwhile
                    await squadron.order(agent_id, "sell", size / 4, symbol, reduce_only=True)

    async def pay() -> None:
        for _ in range(4):
            await squadron.desk.deposit(master, "USDC", 50)

    await asyncio.gather(*(muster.settle() for _ in range(3)), *(close(m) for m in muster.pooled[2:]), pay())
    await muster.settle()
    states = {call.state for agent in muster.everybody for call in await muster.calls.calls(agent)}
    assert states <= {"completed", "cured"}
    for agent in muster.everybody:
        assert await muster.calls.utilization(agent) < 0.85
        slices = sum(call.slices for call in await muster.calls.calls(agent))
        assert slices == len([row for row in await muster.sold() if row[0] == agent])


async def test_a_master_without_a_price_saves_no_member_from_its_own_call(squadron: Squadron) -> None:
    """Its book can't be judged: nothing is drawn on it, no pool is called, and members are as if they were alone."""
    muster = await Muster.gathered(squadron, usdc=100_000)
    desk, master = squadron.desk, muster.fleet.master_id
    await desk.prices({"DOGE": "0.1"})
    await desk.deposit(master, "DOGE", 10)
    await squadron.order(master, "buy", "0.001")
    await desk.rows("DELETE FROM market_prices WHERE symbol = 'DOGE' RETURNING 1")
    desk.market = MarketCache(desk.database)
    squadron.scenes = Scenes(desk.market, timedelta(hours=1), ITEMS_MAX)
    await muster.crash()
    assert {agent for agent, *_ in await muster.sold()} == set(muster.members)
    assert await muster.calls.calls(master) == []
