"""The clocks of the machines that run the app may be hours apart: the database's decides when anything is due."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text

from app.db.session import Database
from tests.flows.shifted import COMPILER, shifted
from tests.flows.topology import Process, Topology, process_watching, shared_out, standing
from tests.flows.trader import ADMIN_KEY, BREACH, CALM, Trader, settings_of, trading, wait_for
from tests.receiver import Received, Receiver, receiving

HOUR = 3600
NOTICE, GRACE, STALE = 1, 3, 4
SLACK = 10.0
"""Seconds that a loaded machine may be late by; a clock that is off is off by 3,600."""


async def _now(database: Database) -> datetime:
    async with database.transaction("test") as tx:
        moment: datetime = (await tx.connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
    return moment


def _moment(given: str) -> datetime:
    return datetime.fromisoformat(given)


@asynccontextmanager
async def _quoted(trader: Trader, prices: dict[str, float]) -> AsyncIterator[None]:
    """Post prices meanwhile, so that they do not grow stale."""

    async def quote() -> None:
        while True:
            await trader.prices(prices)
            await asyncio.sleep(0.3)

    task = asyncio.create_task(quote())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _check_timers(trader: Trader, database: Database, receiver: Receiver) -> None:
    """A breach waits for its notice, is reminded at half-time, and liquidated at its deadline, not before or after."""
    began = await _now(database)
    opened = (await wait_for(receiver, "margin_call.opened")).event["data"]
    [call] = (await trader.call("GET", "/margin-calls"))["margin_calls"]
    noticed, opened_at, deadline = (_moment(call[n]) for n in ("noticed_at", "opened_at", "deadline_at"))
    assert abs((noticed - began).total_seconds()) < SLACK
    assert NOTICE <= (opened_at - noticed).total_seconds() < NOTICE + SLACK
    assert deadline - opened_at == timedelta(seconds=GRACE)
    assert _moment(opened["deadline_at"]) == deadline
    await wait_for(receiver, "margin_call.reminded")
    assert GRACE / 2 <= (await _now(database) - opened_at).total_seconds() < GRACE / 2 + SLACK
    await wait_for(receiver, "liquidation.completed")
    assert GRACE <= (await _now(database) - opened_at).total_seconds() < GRACE + SLACK


async def _check_stale(database: Database, receiver: Receiver) -> None:
    """Prices that stop coming are told of when they have the age, not before."""
    receiver.received[:] = [item for item in receiver.received if item.event["type"] != "market.stale"]
    stopped = await _now(database)
    await wait_for(receiver, "market.stale")
    assert STALE / 2 <= (await _now(database) - stopped).total_seconds() < STALE + SLACK


async def _check_received(database: Database, received: list[Received]) -> None:
    """The times in a webhook's header and body are the database's."""
    now = await _now(database)
    for item in received:
        stamp = datetime.fromtimestamp(int(item.headers["webhook-timestamp"]), UTC)
        told = _moment(item.event["timestamp"])
        assert -1 <= (stamp - told).total_seconds() < SLACK, item.event["type"]
        assert 0 <= (now - told).total_seconds() < 60


async def _check_requests(trader: Trader, database: Database) -> None:
    """A price's date and a key's end are judged by the database's time."""
    now = await _now(database)
    expiry = {"name": "soon over", "scopes": ["agent"], "expires_at": (now + timedelta(minutes=30)).isoformat()}
    key = (await trader.call("POST", "/keys", expiry))["api_key"]
    await trader.call("GET", "/account", key=key)
    dated = {"prices": {"BNB": 600}, "as_of": now.isoformat()}
    assert (await trader.call("POST", "/market/prices", dated, ADMIN_KEY))["accepted"] == 1
    assert (await trader.call("GET", "/market/prices/BNB"))["age_seconds"] < SLACK
    early = dated | {"as_of": (now + timedelta(minutes=30)).isoformat()}
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    url = f"{trader.address}/api/market/prices"
    refused = await asyncio.to_thread(httpx.post, url, json=early, headers=headers, timeout=20)
    assert (refused.status_code, refused.json()["code"]) == (422, "in_the_future")


@pytest.mark.skipif(COMPILER is None, reason="no C compiler to shift a process's clock with")
async def test_clocks_that_are_off_change_nothing(tmp_path: Path, database: Database) -> None:
    """Of two API processes and two workers one each is an hour ahead, the other behind; each worker has an account."""
    given = {"PRIMERISK_PRICE_AGE_SECONDS_MAX": str(STALE), **settings_of(database)}
    off = [shifted(tmp_path, seconds) for seconds in (HOUR, -HOUR)]
    with standing(given, off, off[::-1]) as topology:
        for address, seconds in zip(topology.addresses, (HOUR, -HOUR), strict=True):
            _check_is_shifted(address, seconds)
        await shared_out(database)
        async with AsyncExitStack() as stack:
            watched = [await _watched_by(worker, topology, database, stack) for worker in topology.workers]
            feed = watched[0][0]
            async with _quoted(feed, {**CALM, **BREACH}):
                await asyncio.gather(*(_check_timers(trader, database, receiver) for trader, receiver in watched))
                for address in topology.addresses:
                    await _check_requests(replace(feed, address=address, others=()), database)
            await asyncio.gather(*(_check_stale(database, receiver) for _, receiver in watched))
            for _, receiver in watched:
                await _check_received(database, receiver.received)


async def _watched_by(
    worker: Process, topology: Topology, database: Database, stack: AsyncExitStack
) -> tuple[Trader, Receiver]:
    """Make traders until there is one on a worker's screen, and return it with its receiver."""
    own = {"notice_delay_seconds": NOTICE, "grace_period_seconds": GRACE}
    while True:
        receiver = await stack.enter_async_context(receiving())
        trader, _ = await stack.enter_async_context(trading(topology.addresses, database, receiver, **own))
        if await process_watching(topology, database, trader.agent_id) is worker:
            return trader, receiver


def _check_is_shifted(address: str, seconds: int) -> None:
    """The clock that stamps a reply is off: the test would pass without that."""
    stamped = httpx.get(f"{address}/healthz").headers["date"]
    shown = datetime.strptime(stamped, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC).timestamp()
    assert abs(shown - seconds - time.time()) < SLACK  # noqa: TID251  the machine's own clock
