"""A fleet of five in a crash over real processes: what a cascade foretold is what workers do, whoever is killed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from app.db.session import Database
from app.services import ledger
from app.services.accounts import create_key
from tests.api.service import make_agent
from tests.flows.process import ROOT, STOP_SECONDS_MAX, Home, home, running, serving
from tests.flows.trader import Trader, settings_of, wait_for_workers

CALM = {"BTC": 60_000.0, "ETH": 3_000.0, "SOL": 100.0}
SHOCK = -0.2
ORDERS: tuple[tuple[tuple[str, float], ...], ...] = (
    (("BTC-PERP", 0.1), ("ETH-PERP", 1.5), ("SOL-PERP", 45)),
    (("SOL-PERP", 150), ("BTC-PERP", 0.3)),
    (("ETH-PERP", 12),),
    (("BTC-PERP", 0.2), ("ETH-PERP", 5)),
    (("SOL-PERP", 100), ("ETH-PERP", 2)),
)
SOLD = text(
    """
    SELECT agent_id, data ->> 'symbol' AS symbol, (data ->> 'size')::numeric AS size, data ->> 'cause' AS cause,
           data ->> 'fleet_call_id' AS fleet_call_id
    FROM events WHERE type = 'liquidation.executed' ORDER BY id
    """
)
BOOKED = text(
    """
    SELECT agent_id, symbol, size FROM orders WHERE reason = 'liquidation' AND status = 'filled' ORDER BY seq
    """
)
LIVE = text(
    """
    SELECT agent_id, state, cause, fleet_call_id, slices, deadline_at, own_deadline_at, next_action_at, now()
    FROM margin_calls WHERE state IN ('open', 'expired', 'liquidating')
    """
)
EARLY = text(
    """
    SELECT count(*) FROM events
    WHERE type = 'liquidation.executed' AND timestamp < :deadline AND agent_id <> :isolated
    """
)


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


@dataclass(frozen=True, slots=True)
class Five:
    """A coordinator and its members, priorities 1 to 4 and, isolated, 0."""

    lead: Trader
    fleet_id: str
    members: list[Trader]
    database: Database

    @property
    def isolated(self) -> str:
        return self.members[4].agent_id

    async def crash(self) -> None:
        await self.lead.prices({asset: price * (1 + SHOCK) for asset, price in CALM.items()})

    async def cascade(self) -> list[dict[str, Any]]:
        foretold = await self.lead.call("POST", f"/fleets/{self.fleet_id}/cascade", {"shock": SHOCK})
        [only] = foretold["rounds"]
        assert foretold["complete"]
        assert foretold["in_breach_after"] == []
        falls: list[dict[str, Any]] = only["liquidated"]
        return falls

    async def rows(self, statement: Any) -> list[Any]:
        async with self.database.transaction("test") as tx:
            return list((await tx.connection.execute(statement)).all())

    async def fleet_call(self) -> dict[str, Any]:
        calls = (await self.lead.call("GET", "/margin-calls"))["margin_calls"]
        [call] = [c for c in calls if c["cause"] == "fleet"]
        return dict(call)

    async def until(self, state: str, seconds: float = 30.0) -> dict[str, Any]:
        """Wait until the fleet's call is in a state."""
        async with asyncio.timeout(seconds):
            while True:
                calls = (await self.lead.call("GET", "/margin-calls"))["margin_calls"]
                found = [c for c in calls if c["cause"] == "fleet" and c["state"] == state]
                if found:
                    return dict(found[0])
                await asyncio.sleep(0.05)

    async def until_quiet(self, count: int) -> None:
        """Wait until so many slices were closed, and no call is to liquidate any more."""
        deadline = asyncio.get_running_loop().time() + 30
        while left := await self.rows(LIVE) or len(await self.rows(SOLD)) < count:
            if asyncio.get_running_loop().time() > deadline:
                pytest.fail(f"{count} slices are due; {left} goes on, and sold is {await self.rows(SOLD)}")
            await asyncio.sleep(0.05)

    async def check(self, falls: list[dict[str, Any]]) -> None:
        """Check that what was foretold is what was done, each slice once, the fleet's in its order."""
        sold = await self.rows(SOLD)
        by_fleet = [(f["agent_id"], s["symbol"], s["size"]) for f in falls if f["by"] == "fleet" for s in f["slices"]]
        assert [(s.agent_id, s.symbol) for s in sold if s.cause == "fleet"] == [of[:2] for of in by_fleet]
        for agent_id in {f["agent_id"] for f in falls}:
            for by in ("fleet", "own"):
                expected = [s for f in falls if (f["agent_id"], f["by"]) == (agent_id, by) for s in f["slices"]]
                done = [s for s in sold if s.agent_id == agent_id and (s.cause == "fleet") == (by == "fleet")]
                assert [s.symbol for s in done] == [s["symbol"] for s in expected]
                assert [float(s.size) for s in done] == pytest.approx([s["size"] for s in expected], rel=1e-6)
        assert {s.agent_id for s in sold} == {f["agent_id"] for f in falls}
        assert {(s.agent_id, s.symbol, s.size) for s in sold} == {tuple(o) for o in await self.rows(BOOKED)}
        assert len(sold) == len(await self.rows(BOOKED))
        call = await self.fleet_call()
        assert {s.fleet_call_id for s in sold if s.cause == "fleet"} == {call["id"]}
        async with self.database.transaction("test") as tx:
            assert await ledger.imbalances(tx) == {}


async def mustered(address: str, database: Database, **of_master: int) -> Five:
    """Make the fleet; its members have one second, their coordinator what is given."""
    agent_id, _ = await make_agent(database)
    async with database.transaction("test") as tx:
        key = (await create_key(tx, agent_id, ["agent", "coordinator"])).text
    lead = Trader(address, key, agent_id)
    await lead.prices(CALM)
    await lead.call("POST", "/wallet/deposits", {"asset": "USDC", "amount": 56_200})
    await lead.call("PATCH", "/account/settings", of_master)
    fleet_id = (await lead.call("POST", "/fleets", {"name": "Five", "over_delegation": True}))["id"]
    members = []
    for k, orders in enumerate(ORDERS):
        terms = {"liquidation_priority": 0, "delegation": "isolated"} if k == 4 else {"liquidation_priority": k + 1}
        made = await lead.call("POST", f"/fleets/{fleet_id}/members", {"name": f"M{k}", "max_margin": 20_000, **terms})
        member = Trader(address, made["api_key"], made["agent_id"])
        await member.call("PATCH", "/account/settings", {"grace_period_seconds": 1})
        for symbol, size in orders:
            await member.call("POST", "/orders", {"symbol": symbol, "side": "buy", "size": size})
        members.append(member)
    return Five(lead, fleet_id, members, database)


async def test_a_crash_of_five_is_what_was_foretold(place: Home, database: Database) -> None:
    """By two workers, of which one dies when the fleet's call has run out; nothing of the pool is sold before that."""
    given = {"PYTHONPATH": str(ROOT), **settings_of(database)}
    with (
        serving(place, command="api", **given) as served,
        running(place, "worker", **given) as doomed,
        running(place, "worker", **given),
    ):
        await wait_for_workers(database, 2)
        five = await mustered(served.greeting.address, database, grace_period_seconds=3)
        falls = await five.cascade()
        assert [(f["by"], f["agent_id"]) for f in falls][:2] == [
            ("fleet", five.members[0].agent_id),
            ("fleet", five.members[1].agent_id),
        ]
        assert five.isolated in {f["agent_id"] for f in falls if f["by"] == "own"}
        await five.crash()
        call = await five.until("open")
        deadline = datetime.fromisoformat(call["deadline_at"])
        assert deadline - datetime.fromisoformat(call["opened_at"]) == timedelta(seconds=3)
        async with asyncio.timeout(20):
            while five.isolated not in {s.agent_id for s in await five.rows(SOLD)}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            while not [s for s in await five.rows(SOLD) if s.cause == "fleet"]:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        doomed.send_signal(signal.SIGKILL)
        doomed.wait(STOP_SECONDS_MAX)
        await five.until("completed")
        await five.until_quiet(sum(len(f["slices"]) for f in falls))
        await five.check(falls)
        early = EARLY.bindparams(deadline=deadline, isolated=five.isolated)
        assert await five.rows(early) == [(0,)]


async def test_a_worker_killed_between_two_turns_has_lost_nothing(place: Home, database: Database) -> None:
    """One worker, killed when the first member is sold: the next one finishes the line as it was foretold."""
    given = {"PYTHONPATH": str(ROOT), **settings_of(database)}
    with serving(place, command="api", **given) as served:
        with running(place, "worker", **given) as doomed:
            await wait_for_workers(database, 1)
            five = await mustered(served.greeting.address, database, grace_period_seconds=1)
            falls = await five.cascade()
            await five.crash()
            async with asyncio.timeout(20):
                while not await five.rows(SOLD):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            doomed.send_signal(signal.SIGKILL)
            doomed.wait(STOP_SECONDS_MAX)
        await five.crash()  # the same prices again, fresh
        with running(place, "worker", **given):
            await five.until("completed")
            await five.until_quiet(sum(len(f["slices"]) for f in falls))
            await five.check(falls)
