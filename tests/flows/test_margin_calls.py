"""A margin call from the price that breaches to the last event, over a real `serve` and a real receiver."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from app.db.session import Database
from app.services import ledger
from tests.api.service import make_agent
from tests.flows.process import ROOT, STOP_SECONDS_MAX, Home, Serving, home, serving
from tests.receiver import Received, Receiver, receiving

ADMIN_KEY = "an admin key that is long enough"
CALM, BREACH = {"BTC": 60_000, "ETH": 3_000, "SOL": 100}, {"BTC": 41_000}
LIFE = [
    "margin_call.opened",
    "margin_call.expired",
    "liquidation.executed",
    "liquidation.executed",
    "liquidation.completed",
]


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


@contextmanager
def _served(place: Home, database: Database, **more: str) -> Iterator[Serving]:
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    given = {
        "PYTHONPATH": str(ROOT),
        "PRIMERISK_DATABASE_URL": url,
        "PRIMERISK_ADMIN_KEY": ADMIN_KEY,
        "PRIMERISK_WEBHOOK_ALLOW_PRIVATE": "true",
        "PRIMERISK_LIQUIDATION_SLIPPAGE": "0",
        **more,
    }
    with serving(place, **given) as served:
        yield served


@dataclass(frozen=True, slots=True)
class Trader:
    """An agent over HTTP."""

    address: str
    key: str
    agent_id: str

    async def call(self, method: str, path: str, body: Any = None, key: str | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        async with httpx.AsyncClient(headers=headers, timeout=20) as client:
            answer = await client.request(method, f"{self.address}/api{path}", json=body)
        assert answer.status_code < 300, answer.text
        reply: dict[str, Any] = answer.json()
        return reply

    async def prices(self, prices: Mapping[str, float]) -> None:
        await self.call("POST", "/market/prices", {"prices": prices}, ADMIN_KEY)


@asynccontextmanager
async def _trader(
    address: str, database: Database, receiver: Receiver, **own: Any
) -> AsyncIterator[tuple[Trader, str]]:
    """Yield an agent that holds 37,000 of notional on 20,000, and the secret of its endpoint."""
    agent_id, key = await make_agent(database)
    made = Trader(address, key, agent_id)
    await made.prices(CALM)
    await made.call("POST", "/wallet/deposits", {"asset": "USDC", "amount": 20_000})
    for symbol, size in (("BTC-PERP", 0.5), ("ETH-PERP", 2), ("SOL-PERP", 10)):
        await made.call("POST", "/orders", {"symbol": symbol, "side": "buy", "size": size, "leverage": 3})
    await made.call("PATCH", "/account/settings", own)
    hook = await made.call("POST", "/webhooks", {"url": receiver.url, "filters": ["margin_call.*", "liquidation.*"]})
    yield made, hook["secret"]


async def _wait_for(receiver: Receiver, event_type: str, seconds: float = 20.0) -> Received:
    async with asyncio.timeout(seconds):
        while True:
            found = next((item for item in receiver.received if item.event["type"] == event_type), None)
            if found is not None:
                return found
            await asyncio.sleep(0.01)


def _is_genuine(item: Received, secret: str) -> bool:
    """Verify as Standard Webhooks has it, with nothing of ours."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{item.headers['webhook-id']}.{item.headers['webhook-timestamp']}.".encode() + item.body
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return expected in item.headers["webhook-signature"].split(" ")


async def _told(database: Database, agent_id: str) -> list[tuple[str, str]]:
    """Return the id and type of what was written of calls, in order; the numbers of all events have no gap."""
    query = text("SELECT event_id, type, sequence FROM events WHERE agent_id = :agent_id ORDER BY sequence")
    async with database.transaction("test") as tx:
        rows = (await tx.connection.execute(query, {"agent_id": agent_id})).all()
        assert await ledger.imbalances(tx) == {}
    assert [row.sequence for row in rows] == list(range(1, len(rows) + 1))
    return [(row.event_id, row.type) for row in rows if row.type.startswith(("margin_call.", "liquidation."))]


async def _check_liquidated_once(trader: Trader, database: Database, receiver: Receiver) -> None:
    [call] = (await trader.call("GET", "/margin-calls"))["margin_calls"]
    assert (call["state"], call["slices"], call["deficit"]) == ("completed", 2, 0)
    told = await _told(database, trader.agent_id)
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
            async with _trader(served.greeting.address, database, receiver, **own) as (trader, secret):
                await asyncio.sleep(0.5)
                assert receiver.received == []
                started = time.monotonic()
                await trader.prices(BREACH)
                opened = await _wait_for(receiver, "margin_call.opened")
                assert time.monotonic() - started < 3.0
                assert _is_genuine(opened, secret)
                assert opened.event["data"]["agent_id"] == trader.agent_id
                await asyncio.sleep(1.0)
                account = await trader.call("GET", "/account")
                assert len(account["positions"]) == 3, "liquidated before the deadline"
                completed = await _wait_for(receiver, "liquidation.completed")
                assert 2.0 < time.monotonic() - started < 6.0
                await _check_liquidated_once(trader, database, receiver)
                assert all(_is_genuine(item, secret) for item in receiver.received)
                assert not _is_genuine(Received(completed.headers, completed.body + b" "), secret)


async def test_cured_by_a_deposit_and_by_a_price(place: Home, database: Database) -> None:
    async with receiving() as receiver:
        with _served(place, database) as served:
            async with _trader(served.greeting.address, database, receiver, grace_period_seconds=60) as (trader, _):
                await trader.prices(BREACH)
                await _wait_for(receiver, "margin_call.opened")
                await trader.prices({"BTC": 48_000})
                await _wait_for(receiver, "margin_call.cured", 3.0)
                receiver.received.clear()
                await trader.prices(BREACH)
                opened = await _wait_for(receiver, "margin_call.opened", 3.0)
                cure = opened.event["data"]["cure"]["deposit"]
                await trader.call("POST", "/wallet/deposits", cure)
                await _wait_for(receiver, "margin_call.cured", 3.0)
                calls = (await trader.call("GET", "/margin-calls"))["margin_calls"]
                assert [call["state"] for call in calls] == ["cured", "cured"]
                assert (await trader.call("GET", "/account"))["health"]["utilization"] <= 0.80


@pytest.mark.parametrize("seconds", [0.0, 0.7, 2.05])
async def test_a_server_killed_under_a_call_finishes_it_once(place: Home, database: Database, seconds: float) -> None:
    """Killed as the call is told, during the grace, and about when it liquidates."""
    async with receiving() as receiver:
        with _served(place, database) as served:
            own = {"grace_period_seconds": 2}
            async with _trader(served.greeting.address, database, receiver, **own) as (trader, secret):
                await trader.prices(BREACH)
                await _wait_for(receiver, "margin_call.opened")
                await asyncio.sleep(seconds)
                os.kill(served.process.pid, signal.SIGKILL)
                served.process.wait(STOP_SECONDS_MAX)
        with _served(place, database) as served:
            again = Trader(served.greeting.address, trader.key, trader.agent_id)
            await again.prices(BREACH)
            await _wait_for(receiver, "liquidation.completed", 30.0)
            await _check_liquidated_once(again, database, receiver)
            assert all(_is_genuine(item, secret) for item in receiver.received)


# --- at a venue

IMPATIENT = {"PRIMERISK_LIQUIDATION_VENUE_SECONDS": "0.8", "PRIMERISK_LIQUIDATION_VENUE_ATTEMPTS": "1"}


async def _request(database: Database, agent_id: str, symbol: str, attempt: int) -> dict[str, Any]:
    """Wait until a symbol was asked for so many times, and return what the latest request says."""
    query = text(
        "SELECT data FROM events WHERE agent_id = :agent_id AND type = 'liquidation.requested'"
        " AND data -> 'orders' -> 0 ->> 'symbol' = :symbol ORDER BY sequence DESC LIMIT 1"
    )
    async with asyncio.timeout(30):
        while True:
            async with database.transaction("test") as tx:
                given = {"agent_id": agent_id, "symbol": symbol}
                data = (await tx.connection.execute(query, given)).scalar_one_or_none()
            if data is not None and data["attempt"] >= attempt:
                found: dict[str, Any] = data
                return found
            await asyncio.sleep(0.02)


async def _fill(trader: Trader, order: Mapping[str, Any], fill_id: str, size: Any, price: float) -> dict[str, Any]:
    body = {"fill_id": fill_id, "size": size, "price": price}
    return await trader.call("POST", f"/orders/{order['order_id']}/fills", body)


def _kill(served: Serving) -> None:
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.wait(STOP_SECONDS_MAX)


async def _at_venue(address: str, database: Database, receiver: Receiver) -> Trader:
    """Return the trader of `_trader`, whose orders a venue fills."""
    agent_id, key = await make_agent(database)
    made = Trader(address, key, agent_id)
    await made.prices(CALM)
    await made.call("POST", "/wallet/deposits", {"asset": "USDC", "amount": 20_000})
    await made.call("PATCH", "/account/settings", {"execution": "venue", "grace_period_seconds": 1})
    for symbol, size in (("BTC-PERP", 0.5), ("ETH-PERP", 2), ("SOL-PERP", 10)):
        body = {"symbol": symbol, "side": "buy", "size": size, "leverage": 3}
        order = await made.call("POST", "/orders", body)
        await _fill(made, order, "opened", size, CALM[symbol.partition("-")[0]])
    await made.call("POST", "/webhooks", {"url": receiver.url, "filters": ["margin_call.*", "liquidation.*"]})
    return made


async def test_a_venue_that_is_silent_and_a_server_that_is_killed_sell_everything_once(
    place: Home, database: Database
) -> None:
    """Killed as it waits for the venue, and with a fill on its way: the venue reports that one again."""
    async with receiving() as receiver:
        with _served(place, database, **IMPATIENT) as served:
            trader = await _at_venue(served.greeting.address, database, receiver)
            await trader.prices(BREACH)
            escalated = await _request(database, trader.agent_id, "SOL-PERP", 2)
            assert escalated["escalated"] is True
            [asked] = escalated["orders"]
            assert Decimal(str(asked["size"])) == 10
            await _fill(trader, asked, "first", 4, 99)
            _kill(served)
        with _served(place, database, **IMPATIENT) as served:
            trader = Trader(served.greeting.address, trader.key, trader.agent_id)
            again = await _request(database, trader.agent_id, "SOL-PERP", escalated["attempt"] + 1)
            assert [(o["order_id"], o["size"]) for o in again["orders"]] == [(asked["order_id"], 6)]
            report = asyncio.create_task(_fill(trader, asked, "second", 6, 99))
            await asyncio.sleep(0.005)
            _kill(served)
            await asyncio.gather(report, return_exceptions=True)
        with _served(place, database, **IMPATIENT) as served:
            trader = Trader(served.greeting.address, trader.key, trader.agent_id)
            assert (await _fill(trader, asked, "second", 6, 99))["status"] == "filled"
            [rest] = (await _request(database, trader.agent_id, "ETH-PERP", 1))["orders"]
            await _fill(trader, rest, "only", rest["size"], 3_000)
            await _wait_for(receiver, "liquidation.completed", 30.0)
            await _check_sold_once(trader, database, receiver, asked["order_id"])


async def _check_sold_once(trader: Trader, database: Database, receiver: Receiver, sol_order: str) -> None:
    [call] = (await trader.call("GET", "/margin-calls"))["margin_calls"]
    assert (call["state"], call["slices"], call["deficit"]) == ("completed", 3, 0)
    told = await _told(database, trader.agent_id)
    kinds = Counter(kind for _, kind in told)
    assert (kinds["margin_call.opened"], kinds["margin_call.expired"], kinds["liquidation.completed"]) == (1, 1, 1)
    assert kinds["liquidation.executed"] == 3
    orders = (await trader.call("GET", "/orders"))["orders"]
    sold = [o for o in orders if o["margin_call_id"] == call["id"]]
    assert [(o["symbol"], o["status"]) for o in sold] == [("ETH-PERP", "filled"), ("SOL-PERP", "filled")]
    fills = (await trader.call("GET", f"/orders/{sol_order}"))["fills"]
    assert [(f["fill_id"], f["size"]) for f in fills] == [("first", 4), ("second", 6)]
    account = await trader.call("GET", "/account")
    assert 0.7499 < account["health"]["utilization"] <= 0.75
    assert {p["symbol"] for p in account["positions"]} == {"BTC-PERP", "ETH-PERP"}
    async with asyncio.timeout(20):
        while {item.id for item in receiver.received} != {event_id for event_id, _ in told}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
