"""Two API processes with two workers beside them: one call whoever sees the breach, one effect whoever is asked."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import httpx
from aiohttp import web
from sqlalchemy import text

from app.db.session import Database
from app.services import ledger
from tests.flows.process import STOP_SECONDS_MAX
from tests.flows.topology import Topology, process_watching, shared_out
from tests.flows.trader import BREACH, CALM, LIFE, Trader, trading, wait_for
from tests.receiver import Receiver, receiving

SILENCE = text("UPDATE workers SET seen_at = seen_at - interval '10 s' RETURNING id")


async def _milestones(trader: Trader) -> list[str]:
    told = (await trader.call("GET", "/events"))["events"]
    wanted = ("margin_call.", "liquidation.")
    return [e["type"] for e in told if e["type"].startswith(wanted) and e["type"] != "margin_call.reminded"]


async def _check_liquidated(trader: Trader, database: Database, receiver: Receiver, times: int) -> None:
    """Check that so many calls went their whole way, each once, and that all of it was told under one id each."""
    calls = (await trader.call("GET", "/margin-calls"))["margin_calls"]
    assert [call["state"] for call in calls] == ["completed"] * times
    milestones = await _milestones(trader)
    forced = [o for o in (await trader.call("GET", "/orders"))["orders"] if o["reason"] == "liquidation"]
    assert len(forced) == sum(call["slices"] for call in calls) == milestones.count("liquidation.executed")
    assert milestones[: len(LIFE)] == LIFE
    assert Counter(milestones)["margin_call.opened"] == Counter(milestones)["liquidation.completed"] == times
    ids = {item.id for item in receiver.received}
    assert len(ids) == len({item.event["data"]["sequence"] for item in receiver.received})
    async with database.transaction("test") as tx:
        assert await ledger.imbalances(tx) == {}


async def test_two_workers_make_one_call_and_one_carries_on_alone(topology: Topology, database: Database) -> None:
    async with receiving() as receiver:
        own = {"grace_period_seconds": 1}
        async with trading(topology.addresses, database, receiver, **own) as (trader, _):
            await trader.prices(BREACH)
            await wait_for(receiver, "liquidation.completed")
            await _check_liquidated(trader, database, receiver, 1)
            receiver.received.clear()
            await trader.prices({"BTC": 33_000})
            await wait_for(receiver, "margin_call.opened")
            doomed = await process_watching(topology, database, trader.agent_id)
            doomed.kill()
            await wait_for(receiver, "liquidation.completed")
            await _check_liquidated(trader, database, receiver, 2)
            [survivor] = [worker for worker in topology.workers if worker.is_alive]
            assert survivor.stop() == 0
            # nobody looks any more, and the APIs say so and answer on
            await trader.prices(CALM)
            async with database.transaction("test") as tx:
                silent = (await tx.connection.execute(SILENCE)).scalars().all()
            assert not [worker for worker in silent if f"-{survivor.pid}-" in worker], "it has taken its leave"
            for address in topology.addresses:
                ready = await asyncio.to_thread(httpx.get, f"{address}/readyz")
                assert (ready.status_code, ready.json()["checks"]["worker"]["ok"]) == (200, False)


async def test_whoever_is_asked_says_the_same(topology: Topology, database: Database) -> None:
    """What is posted to one is seen by all, and each call is made once."""
    first, second = topology.addresses
    async with receiving() as receiver:
        own = {"grace_period_seconds": 1}
        async with trading(first, database, receiver, **own) as (here, _):
            there = Trader(second, here.key, here.agent_id)
            await there.prices(BREACH)
            await wait_for(receiver, "liquidation.completed")
            await _check_liquidated(here, database, receiver, 1)
            await _check_liquidated(there, database, receiver, 1)
            await here.prices(CALM)
            await there.call("PATCH", "/account/settings", {"grace_period_seconds": 600})
            receiver.received.clear()
            await here.prices({"BTC": 33_000})
            opened = await wait_for(receiver, "margin_call.opened")
            await there.call("POST", "/wallet/deposits", opened.event["data"]["cure"]["deposit"])
            await wait_for(receiver, "margin_call.cured")
            for trader in (here, there):
                calls = (await trader.call("GET", "/margin-calls"))["margin_calls"]
                assert [call["state"] for call in calls] == ["cured", "completed"]


async def test_a_request_repeated_at_both_apis_has_one_effect(topology: Topology, database: Database) -> None:
    async with receiving() as receiver, trading(topology.addresses, database, receiver) as (trader, _):
        before = (await trader.call("GET", "/wallet/balance"))["usdc_balance"]
        headers = {"Authorization": f"Bearer {trader.key}", "Idempotency-Key": "once"}
        body = {"asset": "USDC", "amount": 7}
        async with httpx.AsyncClient(headers=headers, timeout=20) as client:
            posts = [client.post(f"{a}/api/wallet/deposits", json=body) for a in topology.addresses * 10]
            answers = await asyncio.gather(*posts)
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.content for answer in answers}) == 1
        for _ in topology.apis:
            assert (await trader.call("GET", "/wallet/balance"))["usdc_balance"] == before + 7


async def _told(address: str, key: str, after: int) -> AsyncGenerator[dict[str, Any]]:
    """Yield the events of a stream that follows a number."""
    headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream", "Last-Event-ID": str(after)}
    async with (
        httpx.AsyncClient(headers=headers, timeout=20) as client,
        client.stream("GET", f"{address}/api/events") as reply,
    ):
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))


async def test_a_stream_is_followed_on_at_the_other_api_when_its_own_is_killed(
    topology: Topology, database: Database
) -> None:
    first, second = topology.addresses
    async with receiving() as receiver, trading(second, database, receiver, grace_period_seconds=1) as (trader, _):
        last = max((e["sequence"] for e in (await trader.call("GET", "/events"))["events"]), default=0)
        heard = []
        with suppress(httpx.TransportError):  # the connection is cut
            async with aclosing(_told(first, trader.key, last)) as stream:
                await trader.prices(BREACH)
                async for event in stream:
                    heard.append(event)
                    if event["type"] == "margin_call.opened":
                        topology.apis[0].kill()
        async with asyncio.timeout(20), aclosing(_told(second, trader.key, heard[-1]["sequence"])) as stream:
            async for event in stream:
                heard.append(event)
                if event["type"] == LIFE[-1]:
                    break
        numbers = [event["sequence"] for event in heard]
        assert numbers == list(range(last + 1, last + 1 + len(numbers)))
        wanted = ("margin_call.", "liquidation.")
        assert [e["type"] for e in heard if e["type"].startswith(wanted) and "reminded" not in e["type"]] == LIFE


async def test_workers_that_are_told_to_stop_finish_what_they_send(topology: Topology, database: Database) -> None:
    arrived = asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        arrived.set()
        await asyncio.sleep(1.5)
        return web.Response(status=204)

    query = text(
        "SELECT d.state, d.attempts, d.lease_token FROM webhook_deliveries d"
        " JOIN webhook_endpoints e ON e.id = d.endpoint_id WHERE e.agent_id = :agent_id"
    )
    async with receiving(slow) as receiver:
        own = {"grace_period_seconds": 600}
        async with trading(topology.addresses[0], database, receiver, **own) as (trader, _):
            await trader.prices(BREACH)
            await asyncio.wait_for(arrived.wait(), 20)
            for worker in topology.workers:  # both at once: either may send it
                assert worker.process is not None
                worker.process.send_signal(signal.SIGTERM)
            for worker in topology.workers:
                assert worker.process is not None
                assert await asyncio.to_thread(worker.process.wait, STOP_SECONDS_MAX) == 0
            async with database.transaction("test") as tx:
                [sent] = (await tx.connection.execute(query, {"agent_id": trader.agent_id})).all()
            assert tuple(sent) == ("delivered", 1, None)
            assert len(receiver.received) == 1


async def test_workers_share_the_accounts_and_show_what_they_do(topology: Topology, database: Database) -> None:
    await shared_out(database)
    pattern = re.compile(r"^primerisk_screen_shards (\S+)$", re.MULTILINE)
    async with httpx.AsyncClient() as client, asyncio.timeout(20):
        while True:
            shown = [(await client.get(f"{worker.address}/metrics")).text for worker in topology.workers]
            if [pattern.findall(of_one) for of_one in shown] == [["32.0"]] * 2:
                break
            await asyncio.sleep(0.1)
    assert all("primerisk_decision_seconds_count" in of_one for of_one in shown)
