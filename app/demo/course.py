"""A demonstration: a service of its own, a fleet of agents, a market that crashes, and what becomes of each.

It speaks to the service as anybody would, over HTTP, event streams and webhooks. What it starts lives in a temporary
directory and ends with it. It may play on a service that runs already, so that an operator's dashboards have something
to show: on one that is nobody else's.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from types import FrameType

import aiohttp
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from app.demo.agents import enter, listen
from app.demo.coordinator import gather
from app.demo.fleet import ASSETS, BORROWER, DRAWERS, FLEET, LEADER, LENDER, OPENING, PAYERS, market_path
from app.demo.payments import clear, lend
from app.demo.service import Service, running_service
from app.demo.stage import Player, RefusedError, Stage, receiving
from app.errors import StartupError

TICK_SECONDS = 0.25
SETTLE_SECONDS_MAX = 10.0


async def _trade(stage: Stage, path: NDArray[np.float64]) -> None:
    """Post the market's prices, tick by tick, and print every eighth of them."""
    loop = asyncio.get_running_loop()
    for tick, row in enumerate(path.tolist()):
        await _post(stage, row)
        if tick % 8 == 0:
            quoted = "  ".join(f"{asset} {price:,.2f}" for asset, price in zip(ASSETS, row, strict=True))
            stage.say("market", f"{row[0] / OPENING[0] - 1:+.1%}", quoted, "blue")
        await asyncio.sleep(max(0.0, stage.started + (tick + 1) * TICK_SECONDS - loop.time()))
    ends = loop.time() + SETTLE_SECONDS_MAX
    while loop.time() < ends and any(player.is_called for player in stage.players):  # noqa: ASYNC110
        await asyncio.sleep(TICK_SECONDS)
    await asyncio.sleep(1.0)  # what was told last is on its way


async def _post(stage: Stage, prices: Sequence[float]) -> None:
    await stage.send("POST", "/market/prices", {"prices": dict(zip(ASSETS, prices, strict=True))})


@asynccontextmanager
async def _listening(stage: Stage) -> AsyncIterator[None]:
    """Follow every agent's stream meanwhile."""
    ready = [asyncio.Event() for _ in stage.players]
    pairs = zip(stage.players, ready, strict=True)
    streams = [asyncio.create_task(listen(stage, player, event)) for player, event in pairs]
    try:
        await asyncio.gather(*(event.wait() for event in ready))
        yield
    finally:
        for task in (*streams, *stage.tasks):
            task.cancel()
        await asyncio.gather(*streams, *stage.tasks, return_exceptions=True)


async def _play(service: Service, console: Console, seed: int, seconds: float) -> None:
    rng = np.random.default_rng(seed)
    path = market_path(rng, max(2, round(seconds / TICK_SECONDS)))
    async with aiohttp.ClientSession() as http, receiving() as receiver:
        stage = Stage(http, service, console, seconds, rng, receiver, asyncio.get_running_loop().time())
        await _check_alone(stage)
        await _post(stage, OPENING)
        for member in FLEET:  # one after the other: each draws from the same rng
            await enter(stage, member)
        await lend(stage)
        await gather(stage)
        async with _listening(stage):
            stage.started = asyncio.get_running_loop().time()
            await _trade(stage, path)
        await clear(stage)
        await _sum_up(stage)


async def _check_alone(stage: Stage) -> None:
    """Refuse a service that has agents other than the demonstration's: it would move their market."""
    members = (*FLEET, LENDER, BORROWER, LEADER, *(member for member, *_ in DRAWERS))
    names = {member.name for member in members} | set(PAYERS)
    others = [agent["name"] for agent in (await stage.send("GET", "/agents"))["agents"] if agent["name"] not in names]
    if others:
        raise StartupError(
            f"{stage.service.address} has agents of its own, such as {others[0]}: nothing is shown there"
        )


async def _sum_up(stage: Stage) -> None:
    """Print what has become of each agent."""
    table = Table("agent", "plan", title="What became of them", title_justify="left")
    for name in ("deposited", "equity", "utilization", "calls"):
        table.add_column(name, justify="right")
    table.add_column("outcome")
    for player in stage.players:
        account = await stage.send("GET", "/account", key=player.key)
        used = account["health"]["utilization"]
        table.add_row(
            player.member.name,
            player.member.plan,
            f"{player.deposited:,.2f}",
            f"{account['equity']:,.2f}",
            "–" if used is None else f"{used:.1%}",
            str(player.calls),
            _outcome(player),
        )
    stage.console.print(table)
    cures = Counter(how for player in stage.players for how in player.cures)
    liquidated = sum(player.slices > 0 for player in stage.players)
    counted = [f"{count} cured by {how}" for how, count in sorted(cures.items())] + [f"{liquidated} liquidated"]
    stage.console.print(f"{sum(p.calls for p in stage.players)} calls: {', '.join(counted)}")
    stage.console.print(f"{stage.receiver.taken} webhooks received", style="dim")


def _outcome(player: Player) -> str:
    told = [f"cured by {how}" for how in player.cures]
    if player.slices:
        told.append(f"liquidated in {player.slices}")
    if player.is_called:
        told.append("still called")
    return ", ".join(told) or "never called"


def demo(seed: int, seconds: float, there: Service | None) -> None:
    """Run the demonstration until it is over or interrupted; leave nothing behind. Raises StartupError.

    It plays on a service that is there, else on one of its own.
    """

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if there is None:
        console.print("starting a service on a Postgres of its own: a few seconds", style="dim")
    try:
        with running_service() if there is None else nullcontext(there) as service:
            console.print(f"the service is at {service.address}; the market opens", style="dim")
            asyncio.run(_play(service, console, seed, seconds))
    except (aiohttp.ClientError, RefusedError) as error:
        raise StartupError(f"the demonstration's service failed: {error}") from error
    except KeyboardInterrupt:
        console.print("interrupted: all is stopped", style="dim")
        raise SystemExit(128 + signal.SIGINT) from None
