"""The clock of the machine that runs the app may be an hour off: the database's decides when anything is due."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import text

from app.db.session import Database
from tests.flows.process import ROOT, Home, home, running, serving
from tests.flows.shifted import COMPILER, shifted
from tests.flows.trader import ADMIN_KEY, BREACH, CALM, Trader, settings_of, trading, wait_for, wait_for_workers
from tests.receiver import Received, Receiver, receiving

HOUR = 3600
NOTICE, GRACE, STALE = 1, 3, 4
SLACK = 10.0
"""Seconds that a loaded machine may be late by; a clock that is off is off by 3,600."""


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


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
@pytest.mark.parametrize(("api", "worker"), [(HOUR, -HOUR), (-HOUR, HOUR)], ids=["api ahead", "worker ahead"])
async def test_a_clock_that_is_off_changes_nothing(place: Home, database: Database, api: int, worker: int) -> None:
    given = {"PYTHONPATH": str(ROOT), "PRIMERISK_PRICE_AGE_SECONDS_MAX": str(STALE), **settings_of(database)}
    async with receiving() as receiver:
        with (
            serving(place, command="api", **given, **shifted(place.path, api)) as served,
            running(place, "worker", **given, **shifted(place.path, worker)),
        ):
            await wait_for_workers(database, 1)
            _check_is_shifted(served.greeting.address, api)
            own = {"notice_delay_seconds": NOTICE, "grace_period_seconds": GRACE}
            async with trading(served.greeting.address, database, receiver, **own) as (trader, _):
                async with _quoted(trader, {**CALM, **BREACH}):
                    await _check_timers(trader, database, receiver)
                    await _check_requests(trader, database)
                receiver.received[:] = [item for item in receiver.received if item.event["type"] != "market.stale"]
                await _check_stale(database, receiver)
                await _check_received(database, receiver.received)


def _check_is_shifted(address: str, seconds: int) -> None:
    """The clock that stamps a reply is off: the test would pass without that."""
    stamped = httpx.get(f"{address}/healthz").headers["date"]
    shown = datetime.strptime(stamped, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC).timestamp()
    assert abs(shown - seconds - time.time()) < SLACK  # noqa: TID251  the machine's own clock
