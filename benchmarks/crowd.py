"""Who waits for whom, where 1,000 members of one fleet are in breach at one price? Others are, a second later.

From the post of a price to the moment at which a call is noticed, over a real `serve`. Server, worker and Postgres
share the machine. Run with `make bench`, or `python -m benchmarks.crowd`.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from benchmarks.http import KEY, server

MEMBERS, OTHERS, AT_ONCE = 1_000, 5, 16
CALM, BREACH = 100.0, 75.0
"""Utilization .80 of a member, .75 of another, and 1.8 and 1.5."""
WAIT_SECONDS_MAX = 120.0


@dataclass(frozen=True, slots=True)
class Client:
    """The service over HTTP."""

    session: aiohttp.ClientSession
    address: str

    async def call(self, method: str, path: str, body: Any = None, key: str = KEY) -> Any:
        """Return a reply."""
        headers = {"Authorization": f"Bearer {key}"}
        async with self.session.request(method, self.address + path, json=body, headers=headers) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def price(self, **prices: float) -> datetime:
        """Post prices; return when, by the database's clock."""
        posted = await self.call("POST", "/api/market/prices", {"prices": prices})
        return datetime.fromisoformat(posted["as_of"])

    async def agent(self, usdc: int) -> Mapping[str, str]:
        """Return a new agent with its key."""
        made: Mapping[str, str] = await self.call("POST", "/api/agents", {"name": "benchmark"})
        await self.call("POST", "/api/wallet/deposits", {"asset": "USDC", "amount": usdc}, made["api_key"])
        return made

    async def buy(self, key: str, symbol: str, size: int) -> None:
        """Buy at the mark."""
        await self.call("POST", "/api/orders", {"symbol": symbol, "side": "buy", "size": size}, key)

    async def noticed(self, path: str, key: str, count: int) -> list[dict[str, Any]]:
        """Return the calls of a list, once there are so many."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while True:
                found: list[dict[str, Any]] = []
                cursor: str | None = ""
                while cursor is not None:
                    page = await self.call("GET", f"{path}?limit=200&cursor={cursor}", None, key)
                    found += page["margin_calls"]
                    cursor = page["next_cursor"]
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.5)


async def _gathered(client: Client) -> tuple[str, str, str]:
    """Make the fleet, each member at its gate with what it drew; return its id, who leads it, and the key of that."""
    leader = await client.agent(MEMBERS * 100)
    scopes = {"scopes": ["agent", "coordinator"]}
    key = (await client.call("POST", f"/api/keys?agent_id={leader['agent_id']}", scopes))["api_key"]
    terms = {"name": "crowd", "over_delegation": True}
    fleet = (await client.call("POST", "/api/fleets", terms, key))["id"]

    async def join() -> None:
        terms = {"name": "one of many", "max_margin": 1_000}
        made = await client.call("POST", f"/api/fleets/{fleet}/members", terms, key)
        await client.buy(made["api_key"], "X-PERP", 2)

    for start in range(0, MEMBERS, AT_ONCE):
        await client.price(X=CALM, Y=CALM)  # nothing is opened at a stale price
        await asyncio.gather(*(join() for _ in range(start, min(start + AT_ONCE, MEMBERS))))
    return fleet, leader["agent_id"], key


def _after(call: Mapping[str, Any], posted: datetime) -> float:
    return (datetime.fromisoformat(call["noticed_at"]) - posted).total_seconds()


async def _measure(address: str) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:
        client = Client(session, address)
        await client.price(X=CALM, Y=CALM)
        others = [await client.agent(10_000) for _ in range(OTHERS)]
        for other in others:
            await client.buy(other["api_key"], "Y-PERP", 250)
        fleet, master, key = await _gathered(client)
        await asyncio.sleep(2.0)
        began = await client.price(X=BREACH, Y=CALM)
        await asyncio.sleep(1.0)
        later = await client.price(Y=BREACH)
        own = [await client.noticed("/api/margin-calls", other["api_key"], 1) for other in others]
        calls = await client.noticed(f"/api/fleets/{fleet}/margin-calls", key, MEMBERS + 1)
    late = sorted(_after(call, later) for [call] in own)
    of_fleet = [_after(call, began) for call in calls if call["agent_id"] == master]
    of_members = sorted(_after(call, began) for call in calls if call["agent_id"] != master)
    table = Table("called after the price", "first s", "median s", "last s", box=None)
    for name, rows in (("in no fleet", late), ("the fleet as one", of_fleet), ("its members", of_members)):
        table.add_row(f"{len(rows):,} {name}", f"{rows[0]:.2f}", f"{rows[len(rows) // 2]:.2f}", f"{rows[-1]:.2f}")
    Console(width=100).print(table)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory, server("quote", Path(directory)) as served:
        asyncio.run(_measure(f"http://127.0.0.1:{served.port}"))


if __name__ == "__main__":
    main()
