"""What members draw of a fleet: never past a cap or the dry powder, however many at once, and it flows back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal

import pytest
from sqlalchemy import URL

from app.db.session import Database
from app.errors import ConflictError, NotFoundError
from app.services import fleets
from app.services.fleet_terms import Terms
from app.services.fleets import Fleet
from tests.database import make_settings
from tests.services.desk import ACTOR, Desk
from tests.services.squadron import Squadron

# What the ledger says that each member holds of its master: the entries alone, no column of ours.
OF_LEDGER = """
    SELECT agent_id, sum(CASE kind WHEN 'delegate' THEN amount ELSE -amount END) FROM ledger_entries
    WHERE kind IN ('delegate', 'undelegate') GROUP BY agent_id
"""


@pytest.fixture
async def squadron(database_url: URL) -> AsyncIterator[Squadron]:
    database = Database(database_url, make_settings(database_pool_size=20, database_connect_seconds=20))
    desk = Desk(database)
    await desk.prices({"BTC": "60000", "ETH": "3000"})
    await desk.market.refresh()
    made = Squadron(desk)
    yield made
    assert await desk.imbalances() == {}
    await database.close()


async def check(squadron: Squadron, fleet: Fleet, most: Decimal) -> dict[str, Decimal]:
    """Check a fleet's counts against the ledger's entries, and that no more is out than may be."""
    drawn = await squadron.drawn(fleet)
    ledger = {agent: total for agent, total in await squadron.desk.rows(OF_LEDGER) if total}
    assert {agent: amount for agent, amount in drawn.items() if amount} == ledger
    assert (await squadron.get(fleet)).drawn == sum(drawn.values()) <= most
    return drawn


@pytest.mark.parametrize("_", range(3))
async def test_fifty_members_at_once_leave_the_dry_powder_alone(squadron: Squadron, _: int) -> None:
    fleet = await squadron.fleet(10_000, over_delegation=True)
    members = [await squadron.member(fleet, 250) for _ in range(50)]

    async def take(agent_id: str, amount: int) -> str:
        try:
            await squadron.reserve(agent_id, amount)
        except ConflictError as refused:
            return str(refused.code)
        return "reserved"

    # each asks for 150 twice, which its cap of 250 does not allow, and all for 7,500 of 8,500; then for a hundred more
    said = await asyncio.gather(*(take(agent, 150) for agent in members * 2))
    assert (said.count("reserved"), said.count("delegation_exhausted")) == (50, 50)
    drawn = await check(squadron, fleet, Decimal(8_500))
    assert set(drawn.values()) == {Decimal(150)}
    said = await asyncio.gather(*(take(agent, 100) for agent in members))
    assert (said.count("reserved"), said.count("fleet_exhausted")) == (10, 40)
    assert sum((await check(squadron, fleet, Decimal(8_500))).values()) == 8_500
    assert await squadron.desk.money(fleet.master_id) == {"free": 1_500}


async def test_orders_draw_what_they_lack_and_give_back_what_they_spare(squadron: Squadron) -> None:
    fleet = await squadron.fleet(100_000)
    member = await squadron.member(fleet, 30_000)
    # 60,000 at a rate of .30 is 18,000 of margin: at the gate of .80 it takes an equity of 22,500
    await squadron.order(member, "buy", 1)
    assert await check(squadron, fleet, Decimal(85_000)) == {member: 22_500}
    figures = await squadron.desk.figures(member)
    assert figures.health.utilization == pytest.approx(0.80)
    with pytest.raises(ConflictError) as refused:
        await squadron.order(member, "buy", 1)
    assert refused.value.code == "delegation_exhausted"
    assert refused.value.figures["available"] == 7_500
    # half of it closed: 9,000 of margin, at the target of .60 an equity of 15,000; gross 30,000 / 3.5 is less
    await squadron.order(member, "sell", "0.5", reduce_only=True)
    assert await check(squadron, fleet, Decimal(85_000)) == {member: 15_000}
    await squadron.order(member, "sell", "0.5", reduce_only=True)
    assert await check(squadron, fleet, Decimal(85_000)) == {member: 0}
    assert await squadron.desk.money(fleet.master_id) == {"free": 100_000}


async def test_own_money_comes_first_and_what_is_lost_stays_drawn(squadron: Squadron) -> None:
    fleet = await squadron.fleet(10_000)
    member = await squadron.member(fleet, 5_000)
    await squadron.desk.deposit(member, "USDC", 1_000)
    first = await squadron.reserve(member, 800)
    assert await squadron.drawn(fleet) == {member: 0}
    second = await squadron.reserve(member, 700)
    assert await squadron.drawn(fleet) == {member: 500}
    await squadron.desk.settle(member, second.id)
    await squadron.release(member, first.id)
    # 1,500 less the 700 that were paid: 500 go back, 300 of its own are left
    assert await check(squadron, fleet, Decimal(8_500)) == {member: 0}
    assert await squadron.desk.money(member) == {"free": 300}


async def test_what_is_drawn_is_not_taken_out(squadron: Squadron) -> None:
    fleet = await squadron.fleet(10_000)
    member = await squadron.member(fleet, 5_000)
    held = await squadron.reserve(member, 400)
    await squadron.desk.deposit(member, "USDC", 100)
    await squadron.desk.release(member, held.id)  # by a way that gives nothing back
    with pytest.raises(ConflictError) as refused:
        await squadron.desk.withdraw(member, "USDC", 101)
    assert (refused.value.code, refused.value.figures["available"]) == ("delegated_funds", 100)
    await squadron.desk.withdraw(member, "USDC", 100)
    assert await squadron.desk.money(member) == {"free": 400}


async def test_services_and_reduce_only(squadron: Squadron) -> None:
    fleet = await squadron.fleet(10_000)
    member = await squadron.member(fleet, 5_000, services=["casino"])
    for attempt in (squadron.reserve(member, 10, "domains"), squadron.order(member, "buy", "0.01")):
        with pytest.raises(ConflictError) as refused:
            await attempt
        assert refused.value.code == "service_not_delegated"
    await squadron.reserve(member, 1_000)
    with pytest.raises(ConflictError) as refused:
        await squadron.change(fleet, member, max_margin=Decimal(500))
    assert refused.value.code == "delegation_in_use"
    changed = await squadron.change(fleet, member, reduce_only=True, max_margin=Decimal(500))
    assert changed.reduce_only
    assert changed.drawn == 1_000
    with pytest.raises(ConflictError) as refused:
        await squadron.reserve(member, 1)
    assert refused.value.code == "reduce_only"
    [held] = (await squadron.desk.book(member)).reservations
    await squadron.release(member, held.id)
    again = await squadron.change(fleet, member)
    assert not again.reduce_only
    assert again.drawn == 0


async def test_released_dry_powder_is_reached_until_it_is_restored(squadron: Squadron) -> None:
    fleet = await squadron.fleet(1_000, "0.2", over_delegation=True)
    member = await squadron.member(fleet, 5_000)
    await squadron.reserve(member, 800)
    with pytest.raises(ConflictError) as refused:
        await squadron.reserve(member, 1)
    assert (refused.value.code, refused.value.figures["available"]) == ("fleet_exhausted", 0)
    await squadron.powder(fleet, release=True)
    await squadron.reserve(member, 150)
    await squadron.powder(fleet, release=False)
    with pytest.raises(ConflictError):
        await squadron.reserve(member, 1)
    told = "SELECT type FROM events WHERE agent_id = :agent AND type LIKE 'fleet.%' ORDER BY sequence"
    names = [row[0] for row in await squadron.desk.rows(told, agent=fleet.master_id)]
    assert names == ["fleet.dry_powder_released", "fleet.dry_powder_restored"]


async def test_the_master_keeps_what_its_own_book_needs(squadron: Squadron) -> None:
    fleet = await squadron.fleet(30_000)
    member = await squadron.member(fleet, 20_000)
    await squadron.desk.order(fleet.master_id, "buy", 1)  # 18,000 of margin: 22,500 stay
    with pytest.raises(ConflictError) as refused:
        await squadron.reserve(member, 7_501)
    assert refused.value.code == "fleet_exhausted"
    await squadron.reserve(member, 7_500)
    assert await check(squadron, fleet, Decimal(25_500)) == {member: 7_500}


async def test_an_agent_is_in_one_fleet_however_many_ask_at_once(squadron: Squadron) -> None:
    agent = await squadron.desk.agent()
    led = [await squadron.fleet(1_000) for _ in range(8)]

    async def invite(fleet: Fleet) -> str:
        try:
            async with squadron.desk.database.transaction(ACTOR) as tx:
                await fleets.invite(tx, fleet, agent, Terms(Decimal(10)), joins=True)
        except ConflictError as refused:
            return str(refused.code)
        return "joined"

    said = await asyncio.gather(*(invite(fleet) for fleet in led))
    assert sorted(said) == ["already_in_a_fleet"] * 7 + ["joined"]
    with pytest.raises(ConflictError):
        async with squadron.desk.database.transaction(ACTOR) as tx:
            await fleets.create(tx, agent, "of a member")


async def test_a_fleet_is_disbanded_once_however_many_ask_at_once(squadron: Squadron) -> None:
    fleet = await squadron.fleet(1_000)

    async def disband() -> str:
        try:
            async with squadron.desk.database.transaction(ACTOR) as tx:
                await fleets.disband(tx, fleet)
        except NotFoundError as gone:
            return str(gone.code)
        return "disbanded"

    outcomes = await asyncio.gather(*(disband() for _ in range(5)))
    assert sorted(outcomes) == ["disbanded", *["fleet_not_found"] * 4]
    [[recorded]] = await squadron.desk.rows("SELECT count(*) FROM audit_log WHERE action = 'fleet.disbanded'")
    assert recorded == 1


async def test_members_and_masters_cross_each_other_without_a_deadlock(squadron: Squadron) -> None:
    """Draws of members, deposits to the master and changes of delegations at once: each waits its turn."""
    fleet = await squadron.fleet(50_000)
    members = [await squadron.member(fleet, 3_000) for _ in range(6)]

    async def work(agent_id: str) -> None:
        for k in range(4):
            held = await squadron.reserve(agent_id, 100 + k)
            await squadron.change(fleet, agent_id, max_margin=Decimal(3_000 + k))
            await squadron.desk.deposit(fleet.master_id, "USDC", 1)
            await squadron.release(agent_id, held.id)

    await asyncio.gather(*(work(agent) for agent in members))
    assert set((await check(squadron, fleet, Decimal(1))).values()) == {Decimal(0)}
    assert await squadron.desk.money(fleet.master_id) == {"free": 50_024}
