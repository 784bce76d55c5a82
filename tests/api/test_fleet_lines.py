"""What a fleet delegates is held to what its master can reach, and members that come to its end are told of once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from app.db.session import Database
from app.services import fleets
from tests.api.service import Agent, Service, exact, problem
from tests.api.test_fleets import Led, code, crowd, led

if TYPE_CHECKING:
    import httpx


async def refusal(answer: httpx.Response) -> tuple[Any, Any]:
    """Return what is free and what was asked for, of a delegation that was refused."""
    shown = problem(answer, 409, "over_delegated", figures=("available", "needed"))
    return shown["available"], shown["needed"]


async def add(fleet: Led, most: Any, **more: Any) -> httpx.Response:
    return await fleet.lead.ask(f"/fleets/{fleet.id}/members", {"name": "a", "max_margin": most, **more})


async def change(fleet: Led, agent: Agent, **body: Any) -> httpx.Response:
    return await fleet.lead.send("PATCH", f"/fleets/{fleet.id}/members/{agent.id}", json=body)


async def test_lines_go_as_far_as_the_master_reaches(service: Service) -> None:
    """8,500 of 10,000 are above the dry powder: a member more, an invitation, a raise, all are held to what is free."""
    fleet, free = await led(service), await service.agent("Bob")
    first = await fleet.member(5_000)
    assert await refusal(await add(fleet, 3_501)) == (3_500, 3_501)
    assert (await fleet.get())["delegated"] == 5_000
    await fleet.member(3_000)
    assert await refusal(await change(fleet, first, max_margin="5500.01")) == (500, 500.01)
    assert (await change(fleet, first, max_margin=5_500)).status_code == 200
    assert await refusal(await add(fleet, "0.01")) == (0, 0.01)
    await fleet.member(0)  # a line of nothing is always there
    # what is invited counts when it joins: the coordinator hears at once of what could not be had then
    invited = {"agent_id": free.id, "max_margin": 400}
    path = f"/fleets/{fleet.id}/members"
    assert await refusal(await fleet.lead.ask(path, invited)) == (0, 400)
    assert (await change(fleet, first, max_margin=5_000)).status_code == 200
    assert (await fleet.lead.post(path, invited))["status"] == "invited"
    assert await refusal(await change(fleet, free, max_margin=501)) == (500, 501)
    await fleet.member(500)
    assert await refusal(await free.ask(f"/fleets/{fleet.id}/join")) == (0, 400)
    await fleet.lead.deposit(USDC=1_000)
    assert (await free.post(f"/fleets/{fleet.id}/join"))["status"] == "active"
    shown = await fleet.get()
    assert (shown["delegated"], shown["reachable"], shown["advisories"]) == (8_900, 9_350, [])


async def test_a_fleet_may_say_that_it_delegates_more(service: Service) -> None:
    fleet, bold = await led(service), await led(service, over_delegation=True)
    assert ((await fleet.get())["over_delegation"], (await bold.get())["over_delegation"]) == (False, True)
    await bold.member(8_000)
    await bold.member(8_000)
    assert [one["excess"] for one in (await bold.get())["advisories"]] == [7_500]
    answer = await fleet.lead.send("PATCH", f"/fleets/{fleet.id}", json={"over_delegation": True})
    assert exact(answer)["over_delegation"] is True
    member = await fleet.member(20_000)
    # taken back, lines stay as they are, and may be lowered: none is raised
    for _ in range(2):
        answer = await fleet.lead.send("PATCH", f"/fleets/{fleet.id}", json={"over_delegation": False})
        assert (exact(answer)["over_delegation"], exact(answer)["delegated"]) == (False, 20_000)
    assert await refusal(await change(fleet, member, max_margin=20_001)) == (0, 1)
    assert (await change(fleet, member, max_margin=19_000)).status_code == 200
    assert await refusal(await add(fleet, 1)) == (0, 1)
    assert (await fleet.lead.send("PATCH", f"/fleets/{fleet.id}", json={})).status_code == 200
    audited = [r for r in (await fleet.lead.get("/audit"))["records"] if r["action"] == "fleet.changed"]
    assert [record["detail"] for record in audited] == [{"over_delegation": False}, {"over_delegation": True}]


async def test_a_patch_of_nothing_undoes_no_other(service: Service) -> None:
    """It has read the fleet before the other one is committed, and waits for it."""
    fleet, database = await led(service), service.app.state.parts.database
    async with database.transaction("test") as tx:
        known = await fleets.get(tx, fleet.id, fleet.lead.id)
        await fleets.allow_over_delegation(tx, known, allowed=True)
        asked = asyncio.create_task(fleet.lead.send("PATCH", f"/fleets/{fleet.id}", json={}))
        async with asyncio.timeout(5):
            while not await _waits_for_a_lock(database):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert exact(await asked)["over_delegation"] is True
    assert (await fleet.get())["over_delegation"] is True


async def _waits_for_a_lock(database: Database) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with database.transaction("test") as tx:
        return bool((await tx.connection.execute(text(waiting))).scalar_one())


async def test_lines_stay_when_the_wallet_falls(service: Service) -> None:
    """A wallet of 5,000 reaches 4,250: the line of 8,000 is told as too much, and what is drawn is held to it."""
    fleet = await led(service)
    member = await fleet.member(8_000)
    await fleet.lead.post("/wallet/withdrawals", {"asset": "USDC", "amount": 5_000})
    shown = await fleet.get()
    assert [(one["code"], one["excess"]) for one in shown["advisories"]] == [("over_delegated", 3_750)]
    assert await refusal(await add(fleet, 1)) == (0, 1)
    assert (await change(fleet, member, liquidation_priority=3)).status_code == 200
    await member.post("/reservations", {"service": "casino", "amount": 4_250})
    assert code(await member.ask("/reservations", {"service": "casino", "amount": 1})) == "fleet_exhausted"
    # released, the dry powder is within reach, and so are lines of it
    await fleet.lead.post(f"/fleets/{fleet.id}/dry-powder", {"action": "release", "reason": "a hedge"})
    assert (await change(fleet, member, max_margin=4_250)).status_code == 200
    await fleet.member(750)
    assert await refusal(await add(fleet, 1)) == (0, 1)


async def test_a_line_is_a_number(service: Service) -> None:
    """There is none without end: null is refused of a new member, and changes nothing of one that there is."""
    fleet = await led(service)
    problem(await add(fleet, None), 422, "invalid_value")
    member = await fleet.member(1_000)
    assert exact(await change(fleet, member, max_margin=None))["max_margin"] == 1_000


async def test_two_lines_at_once_share_what_is_free(service: Service) -> None:
    """Members, invitations that are accepted and raises over connections of their own: never past 8,500 together."""
    fleet, guests = await led(service), [await service.agent() for _ in range(4)]
    raised = [await fleet.member(100) for _ in range(4)]
    for guest in guests:
        await fleet.lead.post(f"/fleets/{fleet.id}/members", {"agent_id": guest.id, "max_margin": 2_000})
    said = await asyncio.gather(
        *(guest.ask(f"/fleets/{fleet.id}/join") for guest in guests),
        *(add(fleet, 2_000) for _ in range(4)),
        *(change(fleet, member, max_margin=2_100) for member in raised),
    )
    done = [answer for answer in said if answer.status_code in (200, 201)]
    assert len(done) == 4, "8,100 are free, in portions of 2,000"
    assert {code(answer) for answer in said if answer not in done} == {"over_delegated"}
    assert (await fleet.get())["delegated"] == 8_400


async def test_a_rebalance_stays_within_reach(service: Service) -> None:
    """One member is to reduce, and has less drawn than its line by now: that line counts, and no other takes it."""
    fleet, members = await crowd(service)
    reduced = members[0]
    assert (await change(fleet, reduced, max_margin=11_000, on_excess="reduce_only")).status_code == 200
    await reduced.order("BTC-PERP", "sell", 0.4, reduce_only=True)
    listed = {m["id"]: m for m in (await fleet.lead.get(f"/fleets/{fleet.id}/members"))["members"]}
    assert listed[reduced.id]["reduce_only"] is True
    assert listed[reduced.id]["drawn"] < 11_000
    body = {"policy": "equal_risk", "apply": True}
    done = await fleet.lead.post(f"/fleets/{fleet.id}/rebalance", body)
    assert sum(m["after"] for m in done["moves"]) <= 85_000 - 11_000
    shown = await fleet.get()
    assert shown["delegated"] <= shown["reachable"] == 85_000


async def test_a_crash_of_what_is_no_asset_is_refused(service: Service) -> None:
    fleet, _ = await crowd(service)
    path = f"/fleets/{fleet.id}/cascade"
    for body, pointer in (
        ({"shocks": {"BTC": -0.1, "BCT": -0.5}}, "/shocks/BCT"),
        ({"shocks": {"ETH-PERP": -0.1}}, "/shocks/ETH-PERP"),
        ({"shocks": {"a/b~c": -0.1}}, "/shocks/a~1b~0c"),
        ({"shock": -0.1, "adv": {"btc": 1_000}}, "/adv/btc"),
    ):
        answer = await fleet.lead.ask(path, body)
        problem(answer, 422, "not_listed")
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
    # what is listed and nobody of the fleet holds is told, as in a stress test
    found = await fleet.lead.post(path, {"shocks": {"SOL": -0.5, "BTC": -0.1, "ETH": 0}})
    assert found["unused_shocks"] == ["SOL"]


async def capped(member: Agent) -> int:
    return [e["type"] for e in (await member.get("/events"))["events"]].count("fleet.member_capped")


async def test_the_end_of_a_line_is_told_once_until_there_was_room_again(service: Service) -> None:
    """A line of 1,000: a trifle drawn or given back between two requests is no room, a tenth of it is."""
    fleet = await led(service)
    member = await fleet.member(1_000)

    async def ask_too_much() -> dict[str, Any]:
        assert code(await member.ask("/reservations", {"service": "casino", "amount": 1_001})) == "delegation_exhausted"
        return await member.get("/fleets/membership")

    async def minutes_pass() -> None:
        older = text("UPDATE fleet_members SET capped_at = capped_at - interval '61 s'")
        async with service.app.state.parts.database.transaction("test") as tx:
            await tx.connection.execute(older)

    assert (await ask_too_much())["capped_at"] is not None
    for _ in range(3):  # a loop at no cost
        held = await member.post("/reservations", {"service": "casino", "amount": 1})
        await member.post(f"/reservations/{held['id']}/release")
        await minutes_pass()
        await ask_too_much()
    assert await capped(member) == 1
    held = await member.post("/reservations", {"service": "casino", "amount": 100})
    assert (await member.get("/fleets/membership"))["capped_at"] is None
    await ask_too_much()
    assert await capped(member) == 2
    # it has had room again, within a minute: that is told when the minute is over
    await member.post(f"/reservations/{held['id']}/release")
    await ask_too_much()
    assert await capped(member) == 2
    await minutes_pass()
    assert (await ask_too_much())["capped_at"] is not None
    assert await capped(member) == 3
    # and when its delegation is another
    await minutes_pass()
    assert (await change(fleet, member, max_margin=900)).status_code == 200
    await ask_too_much()
    assert await capped(member) == 4
