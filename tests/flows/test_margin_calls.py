"""A margin call from the price that breaches to the last event, over a real `serve` and a real receiver."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal

import pytest

from app.db.session import Database
from tests.flows.process import ROOT, STOP_SECONDS_MAX, Home, Serving, home, serving
from tests.flows.trader import BREACH, LIFE, Trader, calls_told, is_genuine, settings_of, trading, wait_for
from tests.receiver import Received, Receiver, receiving


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


@contextmanager
def _served(place: Home, database: Database, **more: str) -> Iterator[Serving]:
    given = {"PYTHONPATH": str(ROOT), **settings_of(database), **more}
    with serving(place, **given) as served:
        yield served


async def _check_liquidated_once(trader: Trader, database: Database, receiver: Receiver) -> None:
    [call] = (await trader.call("GET", "/margin-calls"))["margin_calls"]
    assert (call["state"], call["slices"], call["deficit"]) == ("completed", 2, 0)
    told = await calls_told(database, trader.agent_id)
    assert [kind for _, kind in told if kind != "margin_call.reminded"] == LIFE
    async with asyncio.timeout(20):  # each reaches the receiver under the id that it was written with
        while {item.id for item in receiver.received} != {event_id for event_id, _ in told}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    orders = (await trader.call("GET", "/orders"))["orders"]
    closed = Counter(o["symbol"] for o in orders if o["reason"] == "liquidation")
    assert closed == {"SOL-PERP": 1, "ETH-PERP": 1}
    account = await trader.call("GET", "/account")
    assert 0.7499 < account["health"]["utilization"] <= 0.75
    assert {p["symbol"]: Decimal(str(p["size"])) for p in account["positions"]}.keys() == {"BTC-PERP", "ETH-PERP"}


async def test_from_a_price_to_a_signed_webhook_and_a_liquidation(place: Home, database: Database) -> None:
    async with receiving() as receiver:
        with _served(place, database) as served:
            own = {"grace_period_seconds": 2}
            async with trading(served.greeting.address, database, receiver, **own) as (trader, secret):
                await asyncio.sleep(0.5)
                assert receiver.received == []
                started = time.monotonic()
                await trader.prices(BREACH)
                opened = await wait_for(receiver, "margin_call.opened")
                assert time.monotonic() - started < 3.0
                assert is_genuine(opened, secret)
                assert opened.event["data"]["agent_id"] == trader.agent_id
                await asyncio.sleep(1.0)
                account = await trader.call("GET", "/account")
                assert len(account["positions"]) == 3, "liquidated before the deadline"
                completed = await wait_for(receiver, "liquidation.completed")
                assert 2.0 < time.monotonic() - started < 6.0
                await _check_liquidated_once(trader, database, receiver)
                assert all(is_genuine(item, secret) for item in receiver.received)
                assert not is_genuine(Received(completed.headers, completed.body + b" "), secret)


async def test_cured_by_a_deposit_and_by_a_price(place: Home, database: Database) -> None:
    async with receiving() as receiver:
        with _served(place, database) as served:
            async with trading(served.greeting.address, database, receiver, grace_period_seconds=60) as (trader, _):
                await trader.prices(BREACH)
                await wait_for(receiver, "margin_call.opened")
                await trader.prices({"BTC": 48_000})
                await wait_for(receiver, "margin_call.cured", 3.0)
                receiver.received.clear()
                await trader.prices(BREACH)
                opened = await wait_for(receiver, "margin_call.opened", 3.0)
                cure = opened.event["data"]["cure"]["deposit"]
                await trader.call("POST", "/wallet/deposits", cure)
                await wait_for(receiver, "margin_call.cured", 3.0)
                calls = (await trader.call("GET", "/margin-calls"))["margin_calls"]
                assert [call["state"] for call in calls] == ["cured", "cured"]
                assert (await trader.call("GET", "/account"))["health"]["utilization"] <= 0.80


@pytest.mark.parametrize("seconds", [0.0, 0.7, 2.05])
async def test_a_server_killed_under_a_call_finishes_it_once(place: Home, database: Database, seconds: float) -> None:
    """Killed as the call is told, during the grace, and about when it liquidates."""
    async with receiving() as receiver:
        with _served(place, database) as served:
            own = {"grace_period_seconds": 2}
            async with trading(served.greeting.address, database, receiver, **own) as (trader, secret):
                await trader.prices(BREACH)
                await wait_for(receiver, "margin_call.opened")
                await asyncio.sleep(seconds)
                os.kill(served.process.pid, signal.SIGKILL)
                served.process.wait(STOP_SECONDS_MAX)
        with _served(place, database) as served:
            again = Trader(served.greeting.address, trader.key, trader.agent_id)
            await again.prices(BREACH)
            await wait_for(receiver, "liquidation.completed", 30.0)
            await _check_liquidated_once(again, database, receiver)
            assert all(is_genuine(item, secret) for item in receiver.received)


async def _told_to_the_end(database: Database, trader: Trader) -> list[str]:
    async with asyncio.timeout(20):
        while True:
            told = [kind for _, kind in await calls_told(database, trader.agent_id)]
            if LIFE[-1] in told:
                return told
            await asyncio.sleep(0.05)


async def test_no_grace_and_a_notice_delay(place: Home, database: Database) -> None:
    """Both at one price: the one is liquidated at once, the other when its breach has lasted."""
    async with receiving() as receiver:
        with _served(place, database) as served:
            address, no_grace = served.greeting.address, {"grace_period_seconds": 0}
            async with (
                trading(address, database, receiver, **no_grace) as (hasty, _),
                trading(address, database, receiver, notice_delay_seconds=2, **no_grace) as (patient, _),
            ):
                await hasty.prices(BREACH)
                for trader in (hasty, patient):
                    assert await _told_to_the_end(database, trader) == LIFE
                [at_once] = (await hasty.call("GET", "/margin-calls"))["margin_calls"]
                assert at_once["noticed_at"] == at_once["opened_at"] == at_once["deadline_at"]
                [later] = (await patient.call("GET", "/margin-calls"))["margin_calls"]
                noticed, opened = (datetime.fromisoformat(later[name]) for name in ("noticed_at", "opened_at"))
                assert opened - noticed >= timedelta(seconds=2)
                assert later["deadline_at"] == later["opened_at"]
