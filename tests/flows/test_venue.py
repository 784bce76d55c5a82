"""Liquidation of an account whose orders a venue fills, over a real `serve` that is killed, and a real receiver."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text

from app.db.session import Database
from tests.api.service import make_agent
from tests.flows.process import ROOT, STOP_SECONDS_MAX, Home, Serving, home, serving
from tests.flows.trader import BREACH, CALM, Trader, calls_told, settings_of, wait_for
from tests.receiver import Receiver, receiving

IMPATIENT = {"PRIMERISK_LIQUIDATION_VENUE_SECONDS": "0.8", "PRIMERISK_LIQUIDATION_VENUE_ATTEMPTS": "1"}


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


@contextmanager
def _served(place: Home, database: Database) -> Iterator[Serving]:
    given = {"PYTHONPATH": str(ROOT), **settings_of(database), **IMPATIENT}
    with serving(place, **given) as served:
        yield served


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
        with _served(place, database) as served:
            trader = await _at_venue(served.greeting.address, database, receiver)
            await trader.prices(BREACH)
            escalated = await _request(database, trader.agent_id, "SOL-PERP", 2)
            assert escalated["escalated"] is True
            [asked] = escalated["orders"]
            assert Decimal(str(asked["size"])) == 10
            await _fill(trader, asked, "first", 4, 99)
            _kill(served)
        with _served(place, database) as served:
            trader = Trader(served.greeting.address, trader.key, trader.agent_id)
            again = await _request(database, trader.agent_id, "SOL-PERP", escalated["attempt"] + 1)
            assert [(o["order_id"], o["size"]) for o in again["orders"]] == [(asked["order_id"], 6)]
            report = asyncio.create_task(_fill(trader, asked, "second", 6, 99))
            await asyncio.sleep(0.005)
            _kill(served)
            await asyncio.gather(report, return_exceptions=True)
        with _served(place, database) as served:
            trader = Trader(served.greeting.address, trader.key, trader.agent_id)
            assert (await _fill(trader, asked, "second", 6, 99))["status"] == "filled"
            [rest] = (await _request(database, trader.agent_id, "ETH-PERP", 1))["orders"]
            await _fill(trader, rest, "only", rest["size"], 3_000)
            await wait_for(receiver, "liquidation.completed", 30.0)
            await _check_sold_once(trader, database, receiver, asked["order_id"])


async def _check_sold_once(trader: Trader, database: Database, receiver: Receiver, sol_order: str) -> None:
    [call] = (await trader.call("GET", "/margin-calls"))["margin_calls"]
    assert (call["state"], call["slices"], call["deficit"]) == ("completed", 3, 0)
    told = await calls_told(database, trader.agent_id)
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
