"""A market that crashes and comes back, agents that answer their calls or do not, and what kills their service."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

import httpx
from aiohttp import web

from app.db.session import Database, parse_database_url
from app.errors import DatabaseUnavailableError
from tests.database import make_settings
from tests.faults import history
from tests.faults.history import Asked, History, Standing, Window
from tests.faults.stack import ADMIN_KEY, KINDS, ROLES, WORKERS, Stack, standing
from tests.flows.trader import is_genuine
from tests.receiver import Received, Receiver, receiving

CALM = {"BTC": Decimal(60_000), "ETH": Decimal(3_000), "SOL": Decimal(100)}
SYMBOLS = [f"{asset}-PERP" for asset in CALM]
EQUITY = 10_000
UTILIZATION = 0.72
"""What agents lever themselves up to when the market is calm: a fall of a tenth calls them."""
DEADLINE_SECONDS = 60.0
"""What has not happened by then does not happen."""
TURNS_MORE = 3

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How hard, and from which seed."""

    seed: int
    kills: int
    agents: int
    up_seconds: float
    """How long all is up before the next kill, at most."""
    down_seconds: float = 1.0
    """How long what was killed stays down at most."""


@dataclass(frozen=True, slots=True)
class Trader:
    """An agent with its key, the secret of its endpoint, and what it does about a call."""

    agent_id: str
    key: str
    secret: str
    deposits: bool


@dataclass(slots=True)
class Desk:
    """What all parts of a run share."""

    stack: Stack
    client: httpx.AsyncClient
    database: Database
    receiver: Receiver
    rng: random.Random
    prices: dict[str, Decimal] = field(default_factory=lambda: dict(CALM))
    traders: dict[str, Trader] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    kills: list[str] = field(default_factory=list)
    quoting: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while prices are posted: none may overtake the next."""

    async def send(self, method: str, path: str, body: Any = None, *, key: str = ADMIN_KEY, name: str = "") -> Any:
        """Send a request, again and again, until it is answered; return the answer."""
        headers = {"Authorization": f"Bearer {key}"} | ({"Idempotency-Key": name} if name else {})
        while True:
            try:
                url = f"{self.stack.address}/api{path}"
                answer = await self.client.request(method, url, json=body, headers=headers)
            except httpx.TransportError:
                await asyncio.sleep(0.1)
                continue
            if answer.status_code not in (429, 503):
                if answer.status_code >= 500:
                    self.faults.append(f"{method} {path}: {answer.status_code} {answer.text}")
                return answer
            await asyncio.sleep(0.2)

    async def read(self, path: str, key: str) -> Any:
        """Return what a read gives; a refusal is a fault."""
        while True:
            answer = await self.send("GET", path, key=key)
            if answer.status_code == 200:
                return answer.json()
            self.faults.append(f"GET {path}: {answer.status_code} {answer.text}")
            await asyncio.sleep(0.2)

    async def once(self, trader: Trader, kind: str, path: str, body: Mapping[str, Any], name: str) -> None:
        """Send a request under a name until it is answered, and some a second time."""
        asked = Asked(name, trader.agent_id, kind)
        self.asked.append(asked)
        for _ in range(1 + (self.rng.random() < 0.3)):
            answer = await self.send("POST", path, body, key=trader.key, name=name)
            asked.answers.append((answer.status_code, answer.content))
            if answer.status_code >= 300:
                return

    async def post(self, prices: Mapping[str, Decimal]) -> None:
        async with self.quoting:
            self.prices |= prices
            await self.send("POST", "/market/prices", {"prices": {s: float(p) for s, p in self.prices.items()}})

    async def standings(self) -> tuple[datetime, dict[str, Standing]]:
        found: tuple[datetime, dict[str, Standing]]
        found = await self.ask(lambda: history.read_standings(self.database, self.prices))
        return found

    async def ask(self, read: Callable[[], Any]) -> Any:
        """Read from the database, again and again, until it answers."""
        while True:
            with suppress(DatabaseUnavailableError):
                return await read()
            await asyncio.sleep(0.1)


# --- the agents


async def _enter(desk: Desk, number: int) -> None:
    """Make an agent with settings of its own and an endpoint, before anything is killed."""
    made = (await desk.send("POST", "/agents", {"name": f"agent {number}"})).json()
    key = made["api_key"]
    hook = (await desk.send("POST", "/webhooks", {"url": desk.receiver.url}, key=key)).json()
    own = {
        "grace_period_seconds": (1, 1, 2, 5)[number % 4],
        "notice_delay_seconds": (0, 0, 1)[number % 3],
        "auto_liquidate": number % 8 != 7,
    }
    await desk.send("PATCH", "/account/settings", own, key=key)
    trader = Trader(made["agent_id"], key, hook["secret"], deposits=number % 3 == 0)
    desk.traders[trader.agent_id] = trader


async def _equip(desk: Desk, trader: Trader, turn: int) -> None:
    """Bring an account's equity back to where it began, and lever it up."""
    account = await desk.read("/account", trader.key)
    amount = max(0.0, EQUITY - account["equity"]) + desk.rng.randrange(1, 100)
    body = {"asset": "USDC", "amount": round(amount, 2)}
    await desk.once(trader, "deposit", "/wallet/deposits", body, f"deposit-{trader.agent_id}-{turn}")
    account = await desk.read("/account", trader.key)
    room = (UTILIZATION * account["equity"] - account["health"]["required_initial"]) / 0.30
    for symbol in desk.rng.sample(SYMBOLS, 2):
        size = round(room / 2 / float(desk.prices[symbol.removesuffix("-PERP")]), 4)
        if size > 0:
            name = f"order-{trader.agent_id}-{symbol}-{turn}"
            order = {"symbol": symbol, "side": "buy", "size": size, "meta": {"request": name}}
            await desk.once(trader, "order", "/orders", order, name)


async def _answer_calls(desk: Desk) -> None:
    """Deposit what cures, once a call, for the agents that do; for ever."""
    seen = 0
    while True:
        news = desk.receiver.received[seen:]
        seen += len(news)
        for item in news:
            data = item.event["data"]
            trader = desk.traders[data["agent_id"]]
            name = f"cure-{data.get('margin_call_id')}"
            is_new = item.event["type"] == "margin_call.opened" and all(a.key != name for a in desk.asked)
            if is_new and trader.deposits:
                await desk.once(trader, "deposit", "/wallet/deposits", data["cure"]["deposit"], name)
        await asyncio.sleep(0.1)


# --- the market


async def _trade(desk: Desk, finished: Callable[[], bool]) -> None:
    """Calm, crash, bottom, recovery, again and again; a little longer where too little has happened by the end."""
    turn, more = 0, TURNS_MORE
    while turn == 0 or not finished() or (more and not _was_eventful(desk)):
        turn += 1
        more -= finished()
        await desk.post(CALM)
        await asyncio.gather(*(_equip(desk, trader, turn) for trader in desk.traders.values()))
        depth = Decimal(desk.rng.randrange(78, 90)) / 100
        await _slide(desk, Decimal(1), depth)
        await _rest(desk)
        await _slide(desk, depth, Decimal(1))


def _was_eventful(desk: Desk) -> bool:
    told = {item.event["type"] for item in desk.receiver.received}
    return {"margin_call.cured", "liquidation.completed"} <= told


async def _quote(desk: Desk) -> None:
    """Post the prices that hold, so that none grows stale; for ever."""
    while True:
        await desk.post({})
        await asyncio.sleep(0.5)


async def _slide(desk: Desk, start: Decimal, end: Decimal, steps: int = 4) -> None:
    for step in range(1, steps + 1):
        level = start + (end - start) * step / steps
        await desk.post({asset: price * level for asset, price in CALM.items()})
        await asyncio.sleep(desk.rng.uniform(0.05, 0.3))


async def _rest(desk: Desk) -> None:
    """Hold the prices until every agent in breach has been called, and note how long that was."""
    at, found = await desk.standings()
    breached = frozenset(agent for agent, standing in found.items() if standing.is_breached)
    patience = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < patience:
        if not await desk.ask(lambda: history.breached_without_call(desk.database, breached, at)):
            break
        await asyncio.sleep(0.2)
    await asyncio.sleep(desk.rng.uniform(1, 4))
    until, _ = await desk.standings()
    desk.windows.append(Window(breached, at, until))


# --- what kills


async def _kill(desk: Desk, plan: Plan, say: Say) -> None:
    """Kill each kind of process as often as the next, in an order and at moments that nobody knows.

    Mostly when all are up, so that there is work to be cut in two; now and then while others still start.
    """
    rng = random.Random(plan.seed)
    due: list[tuple[str, ...]] = []
    while len(desk.kills) < plan.kills:
        while rng.random() > 0.05 and not await _is_up(desk):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await asyncio.sleep(rng.uniform(0, plan.up_seconds))
        due = due or rng.sample(KINDS, len(KINDS))
        role = rng.choice(due.pop())
        while not desk.stack.is_alive(role):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        desk.stack.kill(role, rng.uniform(0, plan.down_seconds))
        desk.kills.append(role)
        say(f"kill {len(desk.kills)}/{plan.kills}: {role}")


async def _is_up(desk: Desk) -> bool:
    """Tell whether the API answers and each worker has shown itself a moment ago."""
    try:
        answer = await desk.client.get(f"{desk.stack.address}/readyz")
        beats = await history.count_beats(desk.database)
    except (httpx.TransportError, DatabaseUnavailableError):
        return False
    return answer.status_code == 200 and beats >= len(WORKERS)


async def _settle(desk: Desk) -> None:
    """Wait until no call is on its way and no webhook waits, at constant prices."""
    patience = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < patience:
        if await desk.ask(lambda: history.is_settled(desk.database)):
            return
        await asyncio.sleep(0.2)


# --- all of it


async def run(plan: Plan, say: Say) -> tuple[History, Desk]:
    """Play the scenario to its end, and return what is left to check."""
    rng = random.Random(plan.seed + 1)
    seen: set[str] = set()

    async def moody(request: web.Request) -> web.StreamResponse:
        """Refuse some events once, and take others only to be slow."""
        first = request.headers["webhook-id"] not in seen
        seen.add(request.headers["webhook-id"])
        await asyncio.sleep(rng.uniform(0, 0.2) if rng.random() < 0.2 else 0)
        return web.Response(status=503 if first and rng.random() < 0.05 else 204)

    async with receiving(moody) as receiver, standing() as stack, httpx.AsyncClient(timeout=15) as client:
        database = Database(parse_database_url(stack.server.url), make_settings())
        desk = Desk(stack, client, database, receiver, rng)
        try:
            await asyncio.gather(*(_enter(desk, number) for number in range(plan.agents)))
            await _play(desk, plan, say)
            rows = await desk.ask(lambda: history.read_rows(database))
        finally:
            await database.close()
        sent = [_sent(desk, item) for item in receiver.received]
        return History(rows, sent, desk.asked, desk.windows, desk.faults), desk


async def _play(desk: Desk, plan: Plan, say: Say) -> None:
    async with _beside(_answer_calls(desk)), _beside(_quote(desk)):
        killing = asyncio.create_task(_kill(desk, plan, say))
        try:
            await _trade(desk, killing.done)
            await killing
        finally:
            killing.cancel()
        say("all kills done: it settles")
        await _settle(desk)


@asynccontextmanager
async def _beside(work: Any) -> AsyncIterator[None]:
    """Run something meanwhile; its failure is raised at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _sent(desk: Desk, item: Received) -> history.Sent:
    genuine = is_genuine(item, desk.traders[item.event["data"]["agent_id"]].secret)
    return history.sent_of(item.id, item.body, is_genuine=genuine)


def summary(told: History, desk: Desk) -> str:
    """Return what happened in a line, so that a run in which nothing did is seen."""
    states = ", ".join(
        f"{sum(c.state == state for c in told.rows.calls)} {state}" for state in ("cured", "completed", "lapsed")
    )
    forced = sum(order.reason == "liquidation" for order in told.rows.orders)
    by_role = ", ".join(f"{desk.kills.count(role)} {role}" for role in ROLES)
    return (
        f"{len(desk.kills)} kills ({by_role}); {len(told.windows)} crashes, {len(told.rows.calls)} calls ({states}), "
        f"{forced} liquidations, {len(told.rows.events)} events in {len(told.sent)} webhooks, {len(told.asked)} named "
        f"requests; {len(desk.stack.ended)} processes ended by themselves"
    )
