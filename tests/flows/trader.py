"""An agent over HTTP that holds a leveraged book, and what its receiver hears."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
from sqlalchemy import URL, text

from app.db.session import Database
from app.services import ledger
from tests.api.service import make_agent
from tests.receiver import Received, Receiver

ADMIN_KEY = "an admin key that is long enough"
CALM, BREACH = {"BTC": 60_000, "ETH": 3_000, "SOL": 100}, {"BTC": 41_000}
PLAIN = False
"""No TLS is spoken here: a client that would check certificates loads them all, in a fiftieth of a second."""
LIFE = [
    "margin_call.opened",
    "margin_call.expired",
    "liquidation.executed",
    "liquidation.executed",
    "liquidation.completed",
]
"""What is told of a call that nobody answers at the prices of BREACH, but for reminders."""


def settings_of(database: Database | URL) -> dict[str, str]:
    """Return the environment of processes that work on a database and with a receiver of ours."""
    url = database if isinstance(database, URL) else database.url
    return {
        "PRIMERISK_DATABASE_URL": url.set(drivername="postgresql").render_as_string(hide_password=False),
        "PRIMERISK_ADMIN_KEY": ADMIN_KEY,
        "PRIMERISK_WEBHOOK_ALLOW_PRIVATE": "true",
        "PRIMERISK_LIQUIDATION_SLIPPAGE": "0",
    }


@dataclass(frozen=True, slots=True)
class Trader:
    """An agent with its key; it asks its address and the others by turns."""

    address: str
    key: str
    agent_id: str
    others: tuple[str, ...] = ()
    _turns: Iterator[int] = field(default_factory=count)

    async def call(self, method: str, path: str, body: Any = None, key: str | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        async with httpx.AsyncClient(headers=headers, timeout=20, verify=PLAIN) as client:
            answer = await self._answer(client, method, path, body)
        assert answer.status_code < 300, answer.text
        reply: dict[str, Any] = answer.json()
        return reply

    async def _answer(self, client: httpx.AsyncClient, method: str, path: str, body: Any) -> httpx.Response:
        """Return what the one whose turn it is answers; who does not listen is passed over, as a proxy would."""
        addresses = (self.address, *self.others)
        for others_left in reversed(range(len(addresses))):
            address = addresses[next(self._turns) % len(addresses)]
            try:
                return await client.request(method, f"{address}/api{path}", json=body)
            except httpx.ConnectError:
                if not others_left:
                    raise
        raise AssertionError("nobody was asked")

    async def prices(self, prices: Mapping[str, float]) -> None:
        await self.call("POST", "/market/prices", {"prices": prices}, ADMIN_KEY)


@asynccontextmanager
async def trading(
    address: str | tuple[str, ...], database: Database, receiver: Receiver, **own: Any
) -> AsyncIterator[tuple[Trader, str]]:
    """Yield an agent that holds 37,000 of notional on 20,000, and the secret of its endpoint."""
    agent_id, key = await make_agent(database)
    first, *others = (address,) if isinstance(address, str) else address
    made = Trader(first, key, agent_id, tuple(others))
    await made.prices(CALM)
    await made.call("POST", "/wallet/deposits", {"asset": "USDC", "amount": 20_000})
    for symbol, size in (("BTC-PERP", 0.5), ("ETH-PERP", 2), ("SOL-PERP", 10)):
        await made.call("POST", "/orders", {"symbol": symbol, "side": "buy", "size": size, "leverage": 3})
    await made.call("PATCH", "/account/settings", own)
    filters = ["margin_call.*", "liquidation.*", "market.stale"]
    hook = await made.call("POST", "/webhooks", {"url": receiver.url, "filters": filters})
    yield made, hook["secret"]


async def wait_for(receiver: Receiver, event_type: str, seconds: float = 20.0) -> Received:
    async with asyncio.timeout(seconds):
        while True:
            found = next((item for item in receiver.received if item.event["type"] == event_type), None)
            if found is not None:
                return found
            await asyncio.sleep(0.01)


async def wait_for_workers(database: Database, count: int) -> None:
    """Wait until so many have shown themselves a moment ago."""
    query = text("SELECT count(*) FROM workers WHERE seen_at > now() - interval '2.5 s'")
    async with asyncio.timeout(30):
        while True:
            async with database.transaction("test") as tx:
                if (await tx.connection.execute(query)).scalar_one() == count:
                    return
            await asyncio.sleep(0.05)


def is_genuine(item: Received, secret: str) -> bool:
    """Verify as Standard Webhooks has it, with nothing of ours."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = f"{item.headers['webhook-id']}.{item.headers['webhook-timestamp']}.".encode() + item.body
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return expected in item.headers["webhook-signature"].split(" ")


async def calls_told(database: Database, agent_id: str) -> list[tuple[str, str]]:
    """Return the id and type of what was written of calls, in order; the numbers of all events have no gap."""
    query = text("SELECT event_id, type, sequence FROM events WHERE agent_id = :agent_id ORDER BY sequence")
    async with database.transaction("test") as tx:
        rows = (await tx.connection.execute(query, {"agent_id": agent_id})).all()
        assert await ledger.imbalances(tx) == {}
    assert [row.sequence for row in rows] == list(range(1, len(rows) + 1))
    return [(row.event_id, row.type) for row in rows if row.type.startswith(("margin_call.", "liquidation."))]


async def told_to_the_end(database: Database, trader: Trader) -> list[str]:
    """Return what was told of a trader's call once it is over."""
    async with asyncio.timeout(20):
        while True:
            told = [kind for _, kind in await calls_told(database, trader.agent_id)]
            if LIFE[-1] in told:
                return told
            await asyncio.sleep(0.05)


async def check_liquidated_once(trader: Trader, database: Database, receiver: Receiver) -> None:
    """Check that a call at the prices of BREACH had its whole life once, and that all of it was received."""
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
    assert {p["symbol"] for p in account["positions"]} == {"BTC-PERP", "ETH-PERP"}
