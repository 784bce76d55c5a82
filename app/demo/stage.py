"""What all parts of a demonstration share: its service, its receiver of webhooks, its agents at work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import numpy as np
from aiohttp import web
from rich.console import Console
from rich.text import Text

from app.demo.fleet import Member
from app.demo.service import Service


@dataclass(slots=True)
class Receiver:
    """Takes webhooks, and counts them."""

    url: str = ""
    taken: int = 0
    is_refused: bool = False
    """Whether the service sends nothing to private addresses."""

    async def take(self, _: web.Request) -> web.Response:
        """Take one."""
        self.taken += 1
        return web.Response(status=204)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Receive webhooks on loopback meanwhile."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/", receiver.take)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        receiver.url = "http://{}:{}/".format(*runner.addresses[0][:2])
        yield receiver
    finally:
        await runner.cleanup()


@dataclass(slots=True)
class Player:
    """A member at work: its key, its wallet when the market opened, and what has become of it."""

    member: Member
    key: str
    agent_id: str
    deposited: float
    calls: int = 0
    is_called: bool = False
    answered: str = ""
    """What it has done about the call that is open."""
    cures: list[str] = field(default_factory=list)
    slices: int = 0
    fleet_id: str | None = None
    """The fleet that it leads."""


@dataclass(slots=True)
class Stage:
    """What all parts of a demonstration share."""

    http: aiohttp.ClientSession
    service: Service
    console: Console
    seconds: float
    rng: np.random.Generator
    receiver: Receiver
    started: float = 0.0
    players: list[Player] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def send(self, method: str, path: str, body: Any = None, key: str | None = None) -> Any:
        """Send a request and return its reply. Raises RefusedError with the code of a refusal."""
        headers = {"Authorization": f"Bearer {key or self.service.key}"}
        url = f"{self.service.address}/api{path}"
        async with self.http.request(method, url, json=body, headers=headers) as answer:
            reply = msgspec.json.decode(await answer.read())
        if answer.status >= 400:
            raise RefusedError(f"{method} {path}: {reply.get('code')}, {reply.get('detail')}")
        return reply

    async def deposit(self, agent_id: str, amount: float, asset: str = "USDC") -> None:
        """Book a deposit as the operator does, whose word it takes wherever balances are worth something."""
        await self.send("POST", f"/wallet/deposits?agent_id={agent_id}", {"asset": asset, "amount": amount})

    def say(self, who: str, what: str, more: str, style: str = "") -> None:
        """Print one line: when, who, what, figures."""
        seconds = asyncio.get_running_loop().time() - self.started
        line = Text(f"{seconds:6.1f} s  ", style="dim")
        line.append(f"{who:<7}", style="bold").append(f"{what:<14}", style=style).append(more)
        self.console.print(line, no_wrap=True, overflow="ellipsis", soft_wrap=not self.console.is_terminal)


class RefusedError(Exception):
    """The service refused a request."""
