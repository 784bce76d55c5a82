"""Members of fleets over HTTP: invitations, what each sees of its own, its profits and losses, delegations anew."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import norm
from sqlalchemy import text

from app.services import accounts, fleet_books, fleets, ledger
from tests.api.service import Agent, Service, problem, until
from tests.api.test_fleets import Led, code, coordinator, crowd, led
from tests.api.test_quotes_var import drawn as drawn_closes
from tests.api.test_quotes_var import post_closes

if TYPE_CHECKING:
    import httpx

WAITS_FOR_US = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))"
Z99 = float(norm.ppf(0.99))


async def execute(service: Service, statement: str, **values: Any) -> None:
    async with service.app.state.parts.database.transaction("test") as tx:
        await tx.connection.execute(text(statement), values)


async def test_an_agent_sees_what_it_is_invited_to_and_nothing_of_the_others(service: Service) -> None:
    fleet, agent = await led(service), await service.agent("Bob")
    other = await fleet.member(1_000)
    problem(await agent.send("GET", "/fleets/membership"), 404, "member_not_found")
    asked = {"agent_id": agent.id, "max_margin": 100, "services": ["trading"], "liquidation_priority": 3}
    await fleet.lead.post(f"/fleets/{fleet.id}/members", asked)
    seen = await agent.get("/fleets/membership")
    assert (seen["fleet_id"], seen["fleet_name"], seen["status"]) == (fleet.id, "Alpha", "invited")
    assert (seen["max_margin"], seen["services"], seen["liquidation_priority"]) == (100, ["trading"], 3)
    await agent.post(f"/fleets/{fleet.id}/join")
    assert (await agent.get("/fleets/membership"))["status"] == "active"
    assert other.id not in str(await agent.get("/fleets/membership"))
    theirs = await fleet.lead.get(f"/fleets/membership?agent_id={other.id}")
    assert (theirs["id"], theirs["made_for_fleet"]) == (other.id, True)
    problem(await other.send("GET", f"/fleets/membership?agent_id={agent.id}"), 404, "agent_not_found")


async def test_who_is_only_invited_is_told_and_asked_for_nothing(service: Service) -> None:
    """Its stream stays its own, and no answer hangs on what it has."""
    await service.prices(BTC=60_000)
    fleet, agent, idle = await led(service), await service.agent("Bob"), await service.agent("Eve")
    await agent.deposit(USDC=30_000)
    await agent.order("BTC-PERP", "buy", 0.1)
    before = await agent.get("/events")
    said = []
    for one in (agent, idle):
        path = f"/fleets/{fleet.id}/members/{one.id}"
        await fleet.lead.post(f"/fleets/{fleet.id}/members", {"agent_id": one.id, "max_margin": 100})
        answers = [
            await fleet.lead.send("PATCH", path, json={"max_margin": 200}),
            await fleet.lead.ask(f"{path}/write-off"),
            await fleet.lead.ask(f"{path}/sweep"),
            await fleet.lead.send("DELETE", path),
        ]
        said.append([answer.status_code for answer in answers])
    assert said[0] == said[1] == [200, 200, 403, 204]
    assert await agent.get("/events") == before


async def test_invitations_are_limited_and_lapse(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "INVITATIONS_MAX", 2)
    fleet, other, agents = await led(service), await led(service), [await service.agent() for _ in range(4)]
    bodies = [{"agent_id": agent.id, "max_margin": 1} for agent in agents]
    said = await asyncio.gather(*(fleet.lead.ask(f"/fleets/{fleet.id}/members", body) for body in bodies))
    assert sorted(answer.status_code for answer in said) == [201, 201, 409, 409]
    assert {code(answer) for answer in said if answer.status_code == 409} == {"too_many_invitations"}
    await fleet.member(1)  # whoever joins at once was never invited
    taken = next(body for body, answer in zip(bodies, said, strict=True) if answer.status_code == 201)
    path = f"/fleets/{other.id}/members"
    assert code(await other.lead.ask(path, taken)) == "already_in_a_fleet"
    older = "UPDATE fleet_members SET invited_at = invited_at - interval '8 days' WHERE agent_id = :agent"
    await execute(service, older, agent=taken["agent_id"])
    assert (await other.lead.post(path, taken))["status"] == "invited"
    agent = next(agent for agent in agents if agent.id == taken["agent_id"])
    problem(await agent.ask(f"/fleets/{fleet.id}/join"), 404, "fleet_not_found")
    await agent.post(f"/fleets/{other.id}/join")


async def test_who_was_made_for_a_fleet_is_so_whenever_it_was_made(service: Service) -> None:
    """An agent that came of itself, and a clock that has stood still: its keys are its own all the same."""
    fleet, agent = await led(service), await service.agent("Bob")
    made = await fleet.member(1)
    await fleet.lead.post(f"/fleets/{fleet.id}/members", {"agent_id": agent.id, "max_margin": 1})
    await agent.post(f"/fleets/{fleet.id}/join")
    await execute(service, "UPDATE fleet_members m SET invited_at = created_at FROM agents a WHERE a.id = m.agent_id")
    await execute(service, "UPDATE agents SET created_at = created_at - interval '1 s' WHERE id = :id", id=made.id)
    scopes = {"scopes": ["agent"]}
    problem(await fleet.lead.ask(f"/keys?agent_id={agent.id}", scopes), 403, "scope_missing")
    assert (await fleet.lead.post(f"/keys?agent_id={made.id}", scopes))["agent_id"] == made.id


async def test_profit_is_swept_to_the_master(service: Service) -> None:
    """Half a bitcoin at the gate has drawn 11,250; 6,000 more a coin are 3,000 of profit."""
    await service.prices(BTC=60_000)
    fleet = await led(service, 100_000)
    member = await fleet.member(30_000)
    path = f"/fleets/{fleet.id}/members/{member.id}/sweep"
    await member.order("BTC-PERP", "buy", 0.5)
    assert (await fleet.lead.post(path))["amount"] == 0
    await service.prices(BTC=66_000)
    await member.order("BTC-PERP", "sell", 0.5, reduce_only=True)
    assert (await member.get("/wallet/balance"))["free"] == 3_000
    assert code(await fleet.lead.ask(path, {"amount": 3_001})) == "insufficient_funds"
    assert (await fleet.lead.post(path, {"amount": 1_000}))["amount"] == 1_000
    said = await asyncio.gather(*(fleet.lead.ask(path) for _ in range(4)))
    assert sorted(answer.json()["amount"] for answer in said) == [0, 0, 0, 2_000]
    shown = await fleet.get()
    assert (shown["balance"], shown["drawn"]) == (103_000, 0)
    entries = (await member.get("/wallet/ledger"))["entries"]
    assert [(e["kind"], e["amount"]) for e in entries[:2]] == [("sweep", 2_000), ("sweep", 1_000)]
    free = await service.agent("Bob")
    await fleet.lead.post(f"/fleets/{fleet.id}/members", {"agent_id": free.id, "max_margin": 1})
    await free.post(f"/fleets/{fleet.id}/join")
    problem(await fleet.lead.ask(f"/fleets/{fleet.id}/members/{free.id}/sweep"), 403, "scope_missing")


async def test_with_something_open_the_sweep_leaves_what_it_needs(service: Service) -> None:
    """Half a bitcoin at 60,000 needs 9,000: at the target of .60 an equity of 15,000 stays, of 40,000 of its own."""
    await service.prices(BTC=60_000)
    fleet = await led(service, 100_000)
    member = await fleet.member(30_000)
    await member.deposit(USDC=40_000)
    await member.order("BTC-PERP", "buy", 0.5)
    swept = await fleet.lead.post(f"/fleets/{fleet.id}/members/{member.id}/sweep")
    assert swept["amount"] == 25_000
    assert float((await member.get("/account"))["health"]["utilization"]) == pytest.approx(0.6)


async def test_what_is_lost_is_written_off_when_nothing_is_left(service: Service) -> None:
    fleet = await led(service, 10_000)
    member = await fleet.member(1_000, services=["casino"])
    path = f"/fleets/{fleet.id}/members/{member.id}"
    held = await member.post("/reservations", {"service": "casino", "amount": 400})
    assert code(await fleet.lead.ask(f"{path}/write-off")) == "positions_open"
    await member.post(f"/reservations/{held['id']}/settle", {"amount": 300})
    assert code(await fleet.lead.ask(f"{path}/write-off")) == "positions_open"
    await member.post(f"/reservations/{held['id']}/release")
    shown = await fleet.get()
    assert (shown["balance"], shown["drawn"], shown["available"]) == (10_000, 300, 8_200)
    assert code(await fleet.lead.send("DELETE", path)) == "delegation_in_use"
    assert code(await member.ask(f"/fleets/{fleet.id}/leave")) == "delegation_in_use"
    written = await asyncio.gather(*(fleet.lead.post(f"{path}/write-off") for _ in range(3)))
    assert {one["drawn"] for one in written} == {0}
    shown = await fleet.get()
    assert (shown["balance"], shown["drawn"], shown["reachable"]) == (9_700, 0, 8_245)
    [told] = [e for e in (await member.get("/events"))["events"] if e["type"] == "fleet.written_off"]
    assert (told["data"]["amount"], told["data"]["fleet_id"]) == (300, fleet.id)
    await member.post("/reservations", {"service": "casino", "amount": 1_000})  # all of its delegation again
    assert code(await fleet.lead.ask(f"{path}/write-off")) == "positions_open"


async def test_who_is_to_reduce_keeps_its_delegation_when_others_are_set_anew(service: Service) -> None:
    fleet, members = await crowd(service)
    first = f"/fleets/{fleet.id}/members/{members[0].id}"
    changed = await fleet.lead.send("PATCH", first, json={"max_margin": 1_000, "on_excess": "reduce_only"})
    assert (changed.json()["reduce_only"], changed.json()["drawn"]) == (True, 11_250)
    assert code(await members[0].ask("/reservations", {"service": "casino", "amount": 1})) == "reduce_only"
    # what else is changed of it asks nothing new, and a delegation that covers what is drawn ends it
    changed = await fleet.lead.send("PATCH", first, json={"liquidation_priority": 7})
    assert (changed.json()["reduce_only"], changed.json()["liquidation_priority"]) == (True, 7)
    for most, reduces in ((11_250, False), (1_000, True)):
        again = {"max_margin": most, "on_excess": "reduce_only"}
        assert (await fleet.lead.send("PATCH", first, json=again)).json()["reduce_only"] is reduces
    done = await fleet.lead.post(f"/fleets/{fleet.id}/rebalance", {"policy": "equal_risk", "apply": True})
    assert [m["agent_id"] for m in done["moves"]] == [m.id for m in members[1:]]
    assert sum(m["after"] for m in done["moves"]) <= 85_000 - 11_250
    listed = {m["id"]: m for m in (await fleet.lead.get(f"/fleets/{fleet.id}/members"))["members"]}
    assert (listed[members[0].id]["reduce_only"], listed[members[0].id]["max_margin"]) == (True, 1_000)


async def test_a_member_that_leaves_meanwhile_is_not_rebalanced(service: Service) -> None:
    """A rebalance waits for the account of a member, which leaves: it is judged anew, or refused, never half done."""
    fleet, members = await crowd(service)
    idle = await fleet.member(7_000)
    path = f"/fleets/{fleet.id}/rebalance"
    database = service.app.state.parts.database
    async with database.transaction("test") as tx:
        await accounts.lock_account(tx, idle.id)
        waiting = asyncio.create_task(fleet.lead.ask(path, {"policy": "to_need", "apply": True}))

        async def waits() -> bool:
            return bool((await tx.connection.execute(text(WAITS_FOR_US))).scalar_one())

        await until(waits)
        await fleets.remove(tx, await fleets.get_member(tx, fleet.id, idle.id))
    assert code(await waiting) == "fleet_changed"
    listed = (await fleet.lead.get(f"/fleets/{fleet.id}/members"))["members"]
    assert {m["max_margin"] for m in listed} == {20_000}
    again = await fleet.lead.post(path, {"policy": "to_need", "apply": True})
    assert {m["agent_id"] for m in again["moves"]} == {m.id for m in members}


async def test_joining_and_rebalancing_at_once_never_pass_the_dry_powder(service: Service) -> None:
    fleet, _ = await crowd(service)
    path = f"/fleets/{fleet.id}/rebalance"

    async def join() -> None:
        await fleet.member(1_000)

    async def share_out() -> int:
        return (await fleet.lead.ask(path, {"policy": "equal_risk", "apply": True, "share_min": 0.01})).status_code

    said = await asyncio.gather(*(task for _ in range(4) for task in (share_out(), join())))
    assert set(said) <= {None, 200, 409}
    assert await share_out() == 200
    listed = (await fleet.lead.get(f"/fleets/{fleet.id}/members"))["members"]
    assert len(listed) == 7
    assert sum(m["max_margin"] for m in listed) <= 85_000


async def test_a_fleet_without_members_is_disbanded(service: Service) -> None:
    fleet, agent, other = await led(service), await service.agent("Bob"), await led(service)
    member = await fleet.member(100)
    path = f"/fleets/{fleet.id}"
    assert code(await fleet.lead.send("DELETE", path)) == "fleet_not_empty"
    assert (await fleet.lead.send("DELETE", f"{path}/members/{member.id}")).status_code == 204
    await fleet.lead.post(f"{path}/members", {"agent_id": agent.id, "max_margin": 1})
    assert code(await fleet.lead.send("DELETE", path)) == "fleet_not_empty"
    await agent.post(f"{path}/leave")
    # a member that comes at the same moment keeps it, or finds it gone
    said = await asyncio.gather(
        fleet.lead.send("DELETE", path), fleet.lead.ask(f"{path}/members", {"name": "b", "max_margin": 1})
    )
    assert [answer.status_code for answer in said] in ([204, 404], [409, 201])
    if said[0].status_code == 409:
        assert (await fleet.lead.send("DELETE", f"{path}/members/{said[1].json()['id']}")).status_code == 204
        assert (await fleet.lead.send("DELETE", path)).status_code == 204
    problem(await fleet.lead.send("GET", path), 404, "fleet_not_found")
    await other.lead.post(f"/fleets/{other.id}/members", {"agent_id": fleet.lead.id, "max_margin": 1})
    assert (await fleet.lead.post(f"/fleets/{other.id}/join"))["status"] == "active"


async def test_everything_at_once_keeps_the_counts(service: Service) -> None:
    """Members draw, lose and give back while they are swept, written off, changed and rebalanced: all in turn."""
    fleet = await led(service, 20_000)
    members = [await fleet.member(3_000) for _ in range(4)]
    said: list[httpx.Response] = []

    async def play(member: Agent) -> None:
        path = f"/fleets/{fleet.id}/members/{member.id}"
        for k in range(4):
            held = await member.ask("/reservations", {"service": "casino", "amount": 100 + k})
            said.append(held)
            if held.status_code == 201:
                reservation = f"/reservations/{held.json()['id']}"
                said.append(await member.ask(f"{reservation}/settle", {"amount": 10}))
                said.append(await member.ask(f"{reservation}/release"))
            said.append(await fleet.lead.send("PATCH", path, json={"max_margin": 3_000 + k}))
            said.append(await fleet.lead.ask(f"{path}/write-off"))
            said.append(await fleet.lead.ask(f"{path}/sweep"))

    async def coordinate() -> None:
        for action in ("release", "restore") * 2:
            said.append(await fleet.lead.ask(f"/fleets/{fleet.id}/dry-powder", {"action": action, "reason": "a test"}))
            said.append(await fleet.lead.ask(f"/fleets/{fleet.id}/rebalance", {"policy": "equal_risk", "apply": True}))

    await asyncio.gather(coordinate(), *(play(member) for member in members))
    refusals = {answer.json()["code"] for answer in said if answer.status_code not in (200, 201)}
    assert refusals <= {"positions_open", "delegation_exhausted", "delegation_in_use", "fleet_exhausted"}, refusals
    lost = 10 * sum(answer.status_code == 200 and answer.url.path.endswith("/settle") for answer in said)
    listed = (await fleet.lead.get(f"/fleets/{fleet.id}/members"))["members"]
    shown = await fleet.get()
    assert shown["drawn"] == sum(m["drawn"] for m in listed)
    assert shown["balance"] == 20_000 - lost + shown["drawn"] > 18_000
    async with service.app.state.parts.database.transaction("test") as tx:
        assert await ledger.imbalances(tx) == {}


async def test_the_wallet_that_is_shown_is_of_one_moment(service: Service) -> None:
    """What is drawn meanwhile is neither missing nor there twice."""
    fleet = await led(service, 10_000)
    member = await fleet.member(5_000)

    async def draw_and_give_back() -> None:
        for _ in range(10):
            held = await member.post("/reservations", {"service": "casino", "amount": 1_000})
            await member.post(f"/reservations/{held['id']}/release")

    drawing = asyncio.create_task(draw_and_give_back())
    seen = []
    while not drawing.done():
        seen.append((await fleet.get())["balance"])
    await drawing
    assert set(seen) == {10_000}


async def test_stale_prices_are_no_emergency(service: Service) -> None:
    await service.prices(BTC=60_000)
    fleet = await led(service, 30_000, over_delegation=True)
    member = await fleet.member(30_000)
    await member.order("BTC-PERP", "buy", 1)
    await service.prices(BTC=49_500)
    older = "UPDATE market_prices SET as_of = as_of - interval '1 hour', version = version + 1"
    await execute(service, "UPDATE market_state SET version = version + 1 WHERE name = 'prices'")
    await execute(service, older)
    path = f"/fleets/{fleet.id}/dry-powder"
    assert code(await fleet.lead.ask(path, {"action": "release"})) == "stale_price"
    await execute(service, "UPDATE fleets SET zone = 'RED'")  # as it was told while prices were fresh
    shown = await fleet.lead.post(path, {"action": "release"})
    assert (shown["release_reason"], shown["in_emergency"]) == ("the fleet is in RED", True)


async def test_what_pays_others_says_why_it_is_refused(service: Service) -> None:
    fleet = await led(service)
    member, friend = await fleet.member(1_000), await service.agent()
    terms = {"payee": friend.id, "amount": 1, "timeout_seconds": 60, "on_timeout": "release"}
    refused = problem(await member.ask("/escrows", terms), 409, "service_not_delegated", figures=("service",))
    assert refused["service"] == "escrow"
    assert "services name it" in refused["detail"]


async def positioned(service: Service) -> Led:
    """Three members on three coins, with some 200 days of history."""
    await post_closes(service, drawn_closes(200, "BTC", "ETH", "SOL"))
    await service.prices(BTC=60_000, ETH=3_000, SOL=100)
    fleet = await led(service, 200_000)
    for symbol, side, size in (("BTC-PERP", "buy", 0.5), ("ETH-PERP", "buy", 5), ("SOL-PERP", "sell", 100)):
        await (await fleet.member(30_000)).order(symbol, side, size)
    return fleet


async def test_components_are_those_of_another_computation(service: Service) -> None:
    """30,000 of BTC, 15,000 of ETH and -10,000 of SOL: VaR, ES and components by numpy's covariance of the closes."""
    fleet = await positioned(service)
    found = await fleet.lead.get(f"/fleets/{fleet.id}/risk?confidence=0.99&horizon_days=10&window_days=500")
    closes = drawn_closes(200, "BTC", "ETH", "SOL")
    prices = np.column_stack([closes[asset] for asset in ("BTC", "ETH", "SOL")])
    covariance = np.cov((prices[1:] / prices[:-1] - 1.0).T) * 10.0
    x = np.array([30_000.0, 15_000.0, -10_000.0])
    deviation = np.sqrt(x @ covariance @ x)
    shortfall = norm.pdf(Z99) / 0.01
    assert float(found["var"]["var"]) == pytest.approx(Z99 * deviation)
    assert float(found["var"]["es"]) == pytest.approx(shortfall * deviation)
    euler = x * (covariance @ x) / deviation
    members = found["members"]
    assert [float(m["component_var"]) for m in members] == pytest.approx(Z99 * euler)
    assert [float(m["component_es"]) for m in members] == pytest.approx(shortfall * euler)
    assert [float(m["var"]) for m in members] == pytest.approx(Z99 * np.abs(x) * np.sqrt(np.diag(covariance)))
    assert float(found["var"]["sum_of_members"]) == pytest.approx(sum(float(m["var"]) for m in members))


async def test_every_model_nets_across_members_as_one_quote_would(service: Service) -> None:
    """The fleet's margin is that of a quote of all positions, each member's that of a quote of its own."""
    fleet = await positioned(service)
    found = await fleet.lead.get(f"/fleets/{fleet.id}/risk")
    held: list[dict[str, Any]] = [
        {"symbol": "BTC-PERP", "side": "long", "size": 0.5},
        {"symbol": "ETH-PERP", "side": "long", "size": 5},
        {"symbol": "SOL-PERP", "side": "short", "size": 100},
    ]
    models = ["isolated", "cross", "scenario", "portfolio", "span"]

    async def quoted(positions: list[dict[str, Any]]) -> dict[str, float]:
        reply = await service.quote(positions=positions, models=models)
        return {name: float(reply["models"][name]["initial_margin"]) for name in models}

    whole, alone = await quoted(held), [await quoted([one]) for one in held]
    for name in models:
        margin = found["margin"][name]
        assert float(margin["fleet"]) == pytest.approx(whole[name])
        assert [float(m["margin"][name]) for m in found["members"]] == pytest.approx([one[name] for one in alone])
        assert float(margin["members"]) == pytest.approx(sum(one[name] for one in alone))
        assert float(margin["freed"]) == pytest.approx(1.0 - whole[name] / sum(one[name] for one in alone))
    # at the edge: a hundredth more of a member's position, under the models that are smooth there
    for k, member in enumerate(found["members"]):
        more = [dict(one) for one in held]
        more[k]["size"] *= 1.01
        grown = await quoted(more)
        for name in ("isolated", "cross", "scenario", "span"):
            assert float(member["edge"][name]) == pytest.approx((grown[name] - whole[name]) * 100, rel=1e-6), name


async def test_a_venues_model_is_told_where_it_is_asked_for(service: Service) -> None:
    """Deribit has no parameters for SOL: of the fleet as one it can't tell, of those on other coins it can."""
    fleet = await positioned(service)
    path = f"/fleets/{fleet.id}/risk"
    assert list((await fleet.lead.get(path))["margin"]) == ["isolated", "cross", "scenario", "portfolio", "span"]
    found = await fleet.lead.get(f"{path}?models=okx&models=deribit")
    held = [
        {"symbol": "BTC-PERP", "side": "long", "size": 0.5},
        {"symbol": "ETH-PERP", "side": "long", "size": 5},
        {"symbol": "SOL-PERP", "side": "short", "size": 100},
    ]
    whole = await service.quote(positions=held, models=["okx"])
    assert float(found["margin"]["okx"]["fleet"]) == pytest.approx(whole["models"]["okx"]["initial_margin"])
    assert found["margin"]["deribit"]["fleet"] is None
    assert found["margin"]["deribit"]["reason"] == "deribit has no parameters for SOL"
    alone = [member["margin"]["deribit"] for member in found["members"]]
    assert alone[2] is None
    btc = await service.quote(positions=held[:1], models=["deribit"])
    assert float(alone[0]) == pytest.approx(btc["models"]["deribit"]["initial_margin"])
    refused = await fleet.lead.send("GET", f"{path}?models=kraken")
    problem(refused, 422, "invalid_parameter", "/models/0")
    parts = service.app.state.parts
    scarce = parts.settings.model_copy(update={"quote_milliseconds_max": 4.0})  # two models of three units are 4.8 ms
    service.app.state.parts = replace(parts, settings=scarce)
    problem(await fleet.lead.send("GET", f"{path}?models=okx&models=deribit"), 422, "too_much_work")
    assert (await fleet.lead.send("GET", f"{path}?models=okx")).status_code == 200


async def test_what_is_reserved_counts_in_the_net_utilization(service: Service) -> None:
    """18,900 of margin, 1,000 USDC, and an ether of 3,000 after its haircut of .12, on 100,000."""
    fleet, members = await crowd(service)
    await members[0].post("/reservations", {"service": "casino", "amount": 1_000})
    await members[1].deposit(ETH=1)
    await members[1].post("/reservations", {"service": "casino", "asset": "ETH", "amount": 1})
    found = await fleet.lead.get(f"/fleets/{fleet.id}/risk")
    assert float(found["net_utilization"]) == pytest.approx((18_900 + 1_000 + 2_640) / 100_000)


async def test_sharpe_is_of_the_days_within_the_window(service: Service) -> None:
    """80 daily returns on 10,000, of which a window of 60 days has the last 60; what came in one day is no profit."""
    fleet, _ = await crowd(service)
    member = (await fleet.lead.get(f"/fleets/{fleet.id}/members"))["members"][0]["id"]
    insert = """INSERT INTO account_snapshots (agent_id, day, taken_at, equity, value, flows, gross, ledger_id)
        VALUES (:agent, current_date - CAST(:back AS int), now(), :value, :value, :flows, 0, 1)"""
    value, returns = 10_000.0, np.random.default_rng(5).normal(0.002, 0.02, 80)
    await execute(service, insert, agent=member, back=80, value=value, flows=0.0)
    for k, made in enumerate(returns.tolist()):
        flow = 5_000.0 if k == 50 else 0.0
        value = (value + flow) * (1.0 + made)
        await execute(service, insert, agent=member, back=79 - k, value=value, flows=flow)
    for days, seen in ((60, returns[-60:]), (500, returns)):
        told = (await fleet.lead.get(f"/fleets/{fleet.id}/risk?window_days={days}"))["members"][0]
        assert told["sharpe_days"] == len(seen)
        assert float(told["sharpe"]) == pytest.approx(seen.mean() / seen.std(ddof=1) * np.sqrt(365))


async def test_a_fleet_of_one_admin_is_made_for_an_agent(service: Service) -> None:
    """An admin acts for any coordinator: what it sets is what the coordinator sees."""
    lead = await coordinator(service)
    terms = {"name": "Beta", "dry_powder": 0.5, "over_delegation": True}
    made = await lead.post(f"/fleets?agent_id={lead.id}", terms, key="admin")
    assert made["dry_powder"] == Decimal("0.5")
    fleet = Led(lead, made["id"])
    await lead.deposit(USDC=1_000)
    await fleet.member(300)
    assert [one["code"] for one in (await fleet.get())["advisories"]] == ["dry_powder_unusual"]
    await fleet.member(300)
    shown = await fleet.get()
    assert (shown["delegated"], shown["reachable"]) == (600, 500)
    assert [(one["code"], one.get("excess")) for one in shown["advisories"][1:]] == [("over_delegated", 100)]


async def test_the_books_of_a_fleet_are_shared_out_within_reach(service: Service) -> None:
    fleet, _ = await crowd(service)
    async with service.app.state.parts.database.transaction("test") as tx:
        books = await fleet_books.load(tx, await fleets.get(tx, fleet.id, None))
    assert fleet_books.to_share_out(books) == fleet_books.reach(books) == 85_000
