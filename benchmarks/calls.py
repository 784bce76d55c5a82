"""How soon is a breach told? From the post of a price to the webhook of the margin call, over a real `serve`.

One account first, twenty times over; then all of a fleet in breach at one price, its last account's webhook included.
Server, worker, Postgres and the receiver share the machine. Run with `make bench`, or `python -m benchmarks.calls`.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web
from rich.console import Console
from rich.table import Table

from benchmarks.http import KEY, server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROUNDS = 20
FLEET = 300
CALM, BREACH = 100.0, 75.0
"""10,000 USDC and 250 X-PERP: utilization .75, and at 75 1.5."""
WAIT_SECONDS_MAX = 120.0


class Fleet:
    """Agents over HTTP, and when each of their margin calls arrived."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self.session, self.address = session, address
        self.keys: dict[str, str] = {}
        self.heard: dict[str, float] = {}
        self.hook = ""

    async def call(self, method: str, path: str, body: Any, key: str = KEY) -> Any:
        """Return a reply."""
        headers = {"Authorization": f"Bearer {key}"}
        async with self.session.request(method, self.address + path, json=body, headers=headers) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def price(self, value: float) -> None:
        """Post the price of X."""
        await self.call("POST", "/api/market/prices", {"prices": {"X": value}})

    async def add(self) -> str:
        """Return a new agent whose call goes to the receiver."""
        made = await self.call("POST", "/api/agents", {"name": "benchmark"})
        agent, key = made["agent_id"], made["api_key"]
        self.keys[agent] = key
        await self.call("POST", "/api/wallet/deposits", {"asset": "USDC", "amount": 10_000}, key)
        await self.call("POST", "/api/orders", {"symbol": "X-PERP", "side": "buy", "size": 250}, key)
        await self.call("POST", "/api/webhooks", {"url": self.hook, "filters": ["margin_call.opened"]}, key)
        return str(agent)

    async def until_heard(self, agents: set[str]) -> None:
        """Wait for the webhooks of all of them."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not agents <= self.heard.keys():  # noqa: ASYNC110
                await asyncio.sleep(0.002)


@asynccontextmanager
async def _receiving(fleet: Fleet) -> AsyncIterator[None]:
    async def hear(request: web.Request) -> web.Response:
        fleet.heard.setdefault((await request.json())["data"]["agent_id"], time.perf_counter())
        return web.Response()

    app = web.Application()
    app.router.add_post("/", hear)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fleet.hook = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    try:
        yield
    finally:
        await runner.cleanup()


async def _one_by_one(fleet: Fleet) -> list[float]:
    """Return the seconds from post to webhook, each of an account that is alone in breach."""
    took = []
    for _ in range(ROUNDS):
        await fleet.price(CALM)
        agent = await fleet.add()
        await asyncio.sleep(0.5)
        begun = time.perf_counter()
        await fleet.price(BREACH)
        await fleet.until_heard({agent})
        took.append(fleet.heard[agent] - begun)
        body = {"symbol": "X-PERP", "side": "sell", "size": 250, "reduce_only": True}
        await fleet.call("POST", "/api/orders", body, fleet.keys[agent])
    return sorted(took)


async def _all_at_once(fleet: Fleet) -> list[float]:
    agents = set()
    for k in range(FLEET):
        if k % 20 == 0:
            await fleet.price(CALM)  # nothing is opened at a stale price
        agents.add(await fleet.add())
    await asyncio.sleep(0.5)
    begun = time.perf_counter()
    await fleet.price(BREACH)
    await fleet.until_heard(agents)
    return sorted(fleet.heard[agent] - begun for agent in agents)


async def _measure(address: str) -> None:
    table = Table("from the post of a price to the webhook", "median s", "last s", "calls/s", "target", box=None)
    async with aiohttp.ClientSession() as session:
        fleet = Fleet(session, address)
        async with _receiving(fleet):
            alone = await _one_by_one(fleet)
            table.add_row("one account in breach", f"{alone[ROUNDS // 2]:.3f}", f"{alone[-1]:.3f}", "", "<= 1")
            many = await _all_at_once(fleet)
            rate = f"{FLEET / many[-1]:.0f}"
            table.add_row(f"{FLEET} accounts at one price", f"{many[FLEET // 2]:.2f}", f"{many[-1]:.2f}", rate, "")
    Console(width=110).print(table)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory:
        given = {"PRIMERISK_WEBHOOK_ALLOW_PRIVATE": "true"}
        with server("quote", Path(directory), given) as served:
            asyncio.run(_measure(f"http://127.0.0.1:{served.port}"))


if __name__ == "__main__":
    main()
