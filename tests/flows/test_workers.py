"""`primerisk api` with workers beside it, each a process of its own: one call whoever sees the breach, whoever dies."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from aiohttp import web
from sqlalchemy import text

from app.db.session import Database
from app.services import ledger
from tests.flows.process import ROOT, STOP_SECONDS_MAX, Home, home, running, serving
from tests.flows.trader import BREACH, CALM, LIFE, Trader, settings_of, trading, wait_for, wait_for_workers
from tests.receiver import Receiver, receiving

SILENCE = text("UPDATE workers SET seen_at = seen_at - interval '10 s' RETURNING id")


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


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


async def test_two_workers_make_one_call_and_one_carries_on_alone(place: Home, database: Database) -> None:
    given = {"PYTHONPATH": str(ROOT), **settings_of(database)}
    async with receiving() as receiver:
        with (
            serving(place, command="api", **given) as served,
            running(place, "worker", **given) as doomed,
            running(place, "worker", **given) as survivor,
        ):
            await wait_for_workers(database, 2)
            own = {"grace_period_seconds": 1}
            async with trading(served.greeting.address, database, receiver, **own) as (trader, _):
                await trader.prices(BREACH)
                await wait_for(receiver, "liquidation.completed")
                await _check_liquidated(trader, database, receiver, 1)
                receiver.received.clear()
                await trader.prices({"BTC": 33_000})
                await wait_for(receiver, "margin_call.opened")
                doomed.send_signal(signal.SIGKILL)
                doomed.wait(STOP_SECONDS_MAX)
                await wait_for(receiver, "liquidation.completed")
                await _check_liquidated(trader, database, receiver, 2)
                survivor.send_signal(signal.SIGTERM)
                assert survivor.wait(STOP_SECONDS_MAX) == 0
                # nobody looks any more, and the API says so and answers on
                await trader.prices(CALM)
                async with database.transaction("test") as tx:
                    [_] = (await tx.connection.execute(SILENCE)).all()  # of the one that was killed: the other left
                ready = await asyncio.to_thread(httpx.get, f"{served.greeting.address}/readyz")
                assert (ready.status_code, ready.json()["checks"]["worker"]["ok"]) == (200, False)


async def test_two_apis_and_two_workers_make_one_call(place: Home, database: Database) -> None:
    """Whoever is asked says the same: what is posted to one is seen by all, and each call is made once."""
    given = {"PYTHONPATH": str(ROOT), **settings_of(database)}
    with home() as beside:
        async with receiving() as receiver:
            with (
                serving(place, command="api", **given) as first,
                serving(beside, command="api", **given) as second,
                running(place, "worker", **given),
                running(beside, "worker", **given),
            ):
                await wait_for_workers(database, 2)
                own = {"grace_period_seconds": 1}
                async with trading(first.greeting.address, database, receiver, **own) as (here, _):
                    there = Trader(second.greeting.address, here.key, here.agent_id)
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


async def test_a_worker_that_is_told_to_stop_finishes_what_it_sends(place: Home, database: Database) -> None:
    given = {"PYTHONPATH": str(ROOT), **settings_of(database)}
    arrived = asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        arrived.set()
        await asyncio.sleep(1.5)
        return web.Response(status=204)

    query = text("SELECT state, attempts, lease_token FROM webhook_deliveries")
    async with receiving(slow) as receiver:
        with serving(place, command="api", **given) as served, running(place, "worker", **given) as worker:
            await wait_for_workers(database, 1)
            own = {"grace_period_seconds": 600}
            async with trading(served.greeting.address, database, receiver, **own) as (trader, _):
                await trader.prices(BREACH)
                await asyncio.wait_for(arrived.wait(), 20)
                worker.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(worker.wait, STOP_SECONDS_MAX) == 0
                async with database.transaction("test") as tx:
                    [sent] = (await tx.connection.execute(query)).all()
                assert tuple(sent) == ("delivered", 1, None)
                assert len(receiver.received) == 1


async def test_a_worker_alone_shows_its_metrics_where_it_is_told_to(place: Home, database: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    given = {"PYTHONPATH": str(ROOT), **settings_of(database), "PRIMERISK_WORKER_METRICS_PORT": str(port)}
    with running(place, "worker", **given):
        async with httpx.AsyncClient() as client, asyncio.timeout(60):
            while True:
                with suppress(httpx.TransportError):
                    shown = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
                    if "primerisk_screen_shards 64.0" in shown:
                        break
                await asyncio.sleep(0.2)
    assert "primerisk_decision_seconds_count" in shown
