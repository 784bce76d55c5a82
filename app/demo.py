"""A demonstration: a service of its own, a fleet of agents, a market that crashes, and what becomes of each.

It speaks to the service as anybody would, over HTTP and event streams. What it starts lives in a temporary directory
and ends with it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.errors import StartupError

TICK_SECONDS = 0.25
SETTLE_SECONDS_MAX = 10.0
STOP_SECONDS_MAX = 30.0
_GREETING = "primerisk is at "

ASSETS = ("BTC", "ETH", "SOL")
OPENING = (60_000.0, 3_000.0, 150.0)
BETA = (0.9, 1.0, 1.1)
"""How far an asset falls where the market falls by one."""
NOISE = 0.0015
LEVELS = ((0.0, 1.0), (0.15, 1.0), (0.40, 0.76), (0.60, 0.77), (0.75, 0.98), (1.0, 0.985))
"""The market's level at parts of its whole time: calm, a crash, the bottom, a rebound, calm again."""

INITIAL_RATE = 0.30
"""Initial margin of the three markets, as a share of notional: how much a utilization buys."""

Plan = Literal["deposits", "reduces", "waits", "sleeps", "is careful", "is short"]


@dataclass(frozen=True, slots=True)
class Member:
    """One agent of the fleet: what it does about a call, how far it levers itself up, how long its grace is.

    `grace` and `notice` are shares of the demonstration's time.
    """

    name: str
    plan: Plan
    utilization: float
    grace: float
    notice: float = 0.0
    side: Literal["buy", "sell"] = "buy"


FLEET = (
    Member("Ada", "deposits", 0.70, 0.4),
    Member("Bela", "deposits", 0.66, 0.4),
    Member("Chen", "deposits", 0.73, 0.4, notice=0.03),
    Member("Dora", "reduces", 0.70, 0.4),
    Member("Emil", "reduces", 0.65, 0.4),
    Member("Faye", "waits", 0.68, 0.9),
    Member("Gus", "waits", 0.64, 0.9, notice=0.03),
    Member("Hana", "sleeps", 0.72, 0.12),
    Member("Ivo", "sleeps", 0.68, 0.15),
    Member("June", "sleeps", 0.74, 0.15),
    Member("Kofi", "is careful", 0.35, 0.4),
    Member("Lena", "is short", 0.50, 0.4, side="sell"),
)
REACTION = 0.03
"""How long an agent takes to answer a call, as a share of the demonstration's time."""
GENEROSITY = 2.5
"""What is deposited for each USDC asked for: the market may fall further."""


def market_path(rng: np.random.Generator, ticks: int) -> NDArray[np.float64]:
    """Return the prices of the assets at each tick, USD, shape (ticks, assets): a given course under a little noise."""
    at, level = (np.array(column) for column in zip(*LEVELS, strict=True))
    course = np.interp(np.linspace(0.0, 1.0, ticks), at, level)
    noise = rng.normal(0.0, NOISE, (ticks, len(ASSETS)))
    falls = 1.0 - (1.0 - course)[:, None] * np.array(BETA)
    prices: NDArray[np.float64] = np.array(OPENING) * falls * (1.0 + noise)
    return prices


# --- the service


@dataclass(frozen=True, slots=True)
class Service:
    """A service that listens, and a key of it that may do anything."""

    address: str
    key: str


@contextmanager
def running_service() -> Iterator[Service]:
    """Run `primerisk serve` on an embedded Postgres in a directory of its own; both are gone afterwards.

    Raises StartupError, with what the service said, where it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="primerisk-demo-") as home:
        key = secrets.token_urlsafe(24)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PRIMERISK_")}
        own = {"PRIMERISK_DATA_DIR": f"{home}/data", "PRIMERISK_PORT": "0", "PRIMERISK_ADMIN_KEY": key}
        log = Path(home, "log")
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve"],
                cwd=home,
                env=kept | own,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for us: we stop it in order
            )
        try:
            yield Service(_address(process, log), key)
        finally:
            _stop(process)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    for raw in process.stdout or ():
        line = raw.decode()
        if line.startswith(_GREETING):
            return line.removeprefix(_GREETING).split()[0]
    said = log.read_text().strip().splitlines()
    raise StartupError(said[-1] if said else "the service did not start")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the service, whatever keys are pressed meanwhile: half a stop would leave Postgres behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.terminate()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    finally:
        signal.signal(signal.SIGINT, before)


# --- the agents


@dataclass(slots=True)
class Player:
    """A member at work: its key, its wallet when the market opened, and what has become of it."""

    member: Member
    key: str
    deposited: float
    calls: int = 0
    is_called: bool = False
    answered: str = ""
    """What it has done about the call that is open."""
    cures: list[str] = field(default_factory=list)
    slices: int = 0


@dataclass(slots=True)
class Stage:
    """What all parts of a demonstration share."""

    http: aiohttp.ClientSession
    service: Service
    console: Console
    seconds: float
    rng: np.random.Generator
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

    def say(self, who: str, what: str, more: str, style: str = "") -> None:
        """Print one line: when, who, what, figures."""
        seconds = asyncio.get_running_loop().time() - self.started
        line = Text(f"{seconds:6.1f} s  ", style="dim")
        line.append(f"{who:<7}", style="bold").append(f"{what:<14}", style=style).append(more)
        self.console.print(line, no_wrap=True, overflow="ellipsis", soft_wrap=not self.console.is_terminal)


class RefusedError(Exception):
    """The service refused a request."""


async def _enter(stage: Stage, member: Member) -> None:
    """Make an agent, fund it, and have it take its positions."""
    made = await stage.send("POST", "/agents", {"name": member.name})
    funds = round(float(stage.rng.uniform(8_000, 25_000)), -2)
    player = Player(member, made["api_key"], funds)
    await stage.send("POST", "/wallet/deposits", {"asset": "USDC", "amount": funds}, player.key)
    weights = stage.rng.dirichlet([4.0] * len(ASSETS))
    for asset, price, weight in zip(ASSETS, OPENING, weights.tolist(), strict=True):
        size = round(member.utilization * funds / INITIAL_RATE * weight / price, 4)
        order = {"symbol": f"{asset}-PERP", "side": member.side, "size": size}
        await stage.send("POST", "/orders", order, player.key)
    own = {
        "grace_period_seconds": max(1, round(member.grace * stage.seconds)),
        "notice_delay_seconds": round(member.notice * stage.seconds),
    }
    await stage.send("PATCH", "/account/settings", own, player.key)
    stage.players.append(player)


async def _listen(stage: Stage, player: Player, is_listening: asyncio.Event) -> None:
    """Follow an agent's event stream, print what it tells, and answer its calls."""
    headers = {"Authorization": f"Bearer {player.key}", "Accept": "text/event-stream"}
    async with stage.http.get(f"{stage.service.address}/api/events?after=0", headers=headers, timeout=None) as stream:
        is_listening.set()
        async for line in stream.content:
            if line.startswith(b"data: "):
                event = msgspec.json.decode(line.removeprefix(b"data: "))
                _hear(stage, player, event["type"], event["data"])


def _hear(stage: Stage, player: Player, kind: str, data: Mapping[str, Any]) -> None:
    tell = _TOLD.get(kind)
    if tell is None or (kind == "zone.changed" and data["zone"] == data["zone_before"]):
        return  # of the changes of level, those of zone
    what, more, style = tell(player, data)
    stage.say(player.member.name, what, more, style)
    if kind in ("margin_call.opened", "margin_call.reminded"):
        task = asyncio.create_task(_answer(stage, player, data["margin_call_id"]))
        stage.tasks.add(task)
        task.add_done_callback(stage.tasks.discard)


async def _answer(stage: Stage, player: Player, call_id: str) -> None:
    """Do about a call what the agent does about calls, going by what would cure it by then."""
    answer = _ANSWERS.get(player.member.plan)
    if answer is None:
        return
    await asyncio.sleep(REACTION * stage.seconds)
    try:
        call = await stage.send("GET", f"/margin-calls/{call_id}", key=player.key)
        if call["cure"] is not None:  # else it is over
            await answer(stage, player, call["cure"])
    except RefusedError as refusal:
        stage.say(player.member.name, "is refused", str(refusal), "red")


async def _deposit(stage: Stage, player: Player, cure: Mapping[str, Any]) -> None:
    amount = round(GENEROSITY * cure["deposit"]["amount"], 2)
    if amount <= 0:
        return
    player.answered = "a deposit"
    stage.say(player.member.name, "deposits", f"{amount:,.2f} USDC", "cyan")
    await stage.send("POST", "/wallet/deposits", {"asset": "USDC", "amount": amount}, player.key)
    player.deposited += amount


async def _reduce(stage: Stage, player: Player, cure: Mapping[str, Any]) -> None:
    for order in cure["orders"]:
        player.answered = "orders of its own"
        stage.say(player.member.name, "reduces", f"{order['side']} {order['size']:g} {order['symbol']}", "cyan")
        await stage.send("POST", "/orders", order, player.key)


_ANSWERS = {"deposits": _deposit, "reduces": _reduce}


# --- what is told: of an event, the word, the figures, the colour

_Told = tuple[str, str, str]


def _percent(ratio: float | None) -> str:
    return "insolvent" if ratio is None else f"utilization {ratio:.1%}"


def _opened(player: Player, data: Mapping[str, Any]) -> _Told:
    player.calls += 1
    player.is_called, player.answered = True, ""
    grace = _seconds(data["opened_at"], data["deadline_at"])
    asked = data["cure"]["deposit"]["amount"]
    return "margin call", f"{_percent(data['utilization'])}, {asked:,.2f} USDC would cure, {grace:.0f} s left", "yellow"


def _reminded(_: Player, data: Mapping[str, Any]) -> _Told:
    return "is reminded", f"{_percent(data['utilization'])}, shortfall {data['shortfall']:,.2f}", "yellow"


def _cured(player: Player, data: Mapping[str, Any]) -> _Told:
    player.is_called = False
    how = player.answered or "the price"
    player.cures.append(how)
    return "cured", f"by {how}, {_percent(data['utilization'])}", "green"


def _expired(_: Player, data: Mapping[str, Any]) -> _Told:
    return "call expired", f"{_percent(data['utilization'])}, equity {data['equity']:,.2f}", "red"


def _executed(player: Player, data: Mapping[str, Any]) -> _Told:
    player.slices += 1
    part = "all of it" if data["is_whole"] else "a part"
    sold = f"{data['side']} {data['size']:g} {data['symbol']} at {data['fill_price']:,.2f}, {part}"
    return "liquidated", f"{sold}, {data['realized_pnl']:+,.2f} USDC, {_percent(data['utilization'])}", "bold red"


def _completed(player: Player, data: Mapping[str, Any]) -> _Told:
    player.is_called = False
    slices = "1 slice" if data["slices"] == 1 else f"{data['slices']} slices"
    return "completed", f"{slices}, deficit {data['deficit']:,.2f}, {_percent(data['utilization'])}", "red"


def _zone(_: Player, data: Mapping[str, Any]) -> _Told:
    style = {"GREEN": "green", "YELLOW": "yellow", "ORANGE": "dark_orange", "RED": "red"}[data["zone"]]
    return f"is {data['zone']}", f"after {data['zone_before']}, {_percent(data['utilization'])}", style


_TOLD = {
    "margin_call.opened": _opened,
    "margin_call.reminded": _reminded,
    "margin_call.cured": _cured,
    "margin_call.expired": _expired,
    "liquidation.executed": _executed,
    "liquidation.completed": _completed,
    "zone.changed": _zone,
}


def _seconds(start: str, end: str) -> float:
    begun, ended = (np.datetime64(moment.removesuffix("Z").removesuffix("+00:00"), "us") for moment in (start, end))
    return float((ended - begun) / np.timedelta64(1, "s"))


# --- the course of it


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


# --- what they pay each other

CALLS_EACH_WAY = 10
"""Obligations that two agents book on each other before they net them."""


async def _clear(stage: Stage) -> None:
    """Have two agents that have just come pay through an escrow, and net what they owe each other."""
    keys, ids = {}, {}
    for name in ("Mara", "Nils"):
        made = await stage.send("POST", "/agents", {"name": name})
        keys[name], ids[name] = made["api_key"], made["agent_id"]
        await stage.send("POST", "/wallet/deposits", {"asset": "USDC", "amount": 20_000}, keys[name])
    await _pay(stage, keys, ids)
    await _net(stage, keys, ids)


async def _pay(stage: Stage, keys: Mapping[str, str], ids: Mapping[str, str]) -> None:
    terms = {"payee": ids["Nils"], "timeout_seconds": 3_600, "on_timeout": "refund"}
    made = await stage.send("POST", "/escrows", terms | {"amount": 10_000}, keys["Mara"])
    stage.say("Mara", "escrow funded", f"10,000 USDC for Nils, {made['reserved']:,.2f} set aside", "cyan")
    await stage.send("POST", f"/escrows/{made['id']}/confirm", {}, keys["Nils"])
    done = await stage.send("POST", f"/escrows/{made['id']}/confirm", {}, keys["Mara"])
    stage.say("Nils", "is paid", f"{done['to_payee']:,.2f} USDC, fee {done['fee']:,.2f}", "green")
    await stage.send("POST", "/escrows", terms | {"amount": 500}, keys["Mara"])  # one that waits


async def _net(stage: Stage, keys: Mapping[str, str], ids: Mapping[str, str]) -> None:
    body = {"members": [ids["Nils"]], "services": ["data"]}
    made = await stage.send("POST", "/netting/agreements", body, keys["Mara"])
    path = f"/netting/agreements/{made['id']}"
    await stage.send("POST", f"{path}/accept", {}, keys["Nils"])

    async def owe(payer: str, payee: str, amount: int, reference: str) -> None:
        owed = {"payee": ids[payee], "service": "data", "asset": "USDC", "amount": amount, "reference": reference}
        await stage.send("POST", f"{path}/obligations", owed, keys[payer])

    for k in range(CALLS_EACH_WAY):
        await owe("Mara", "Nils", 100 + k, f"call {k}")
        await owe("Nils", "Mara", 90 + k, f"call {k}")
    told = await stage.send("GET", f"{path}/statement", key=keys["Nils"])
    ran = await stage.send("POST", f"{path}/settle", {}, keys["Nils"])
    saving, moved = told["saving"][0], f"{len(ran['movements'])} payment of {ran['movements'][0]['amount']:,.2f} USDC"
    spared = f"{saving['movements_saved']} payments and {saving['fees_saved']:,.2f} of fees spared"
    stage.say("Mara", "netted", f"{ran['obligations']} obligations: {moved}, {spared}", "green")
    await owe("Mara", "Nils", 50, "next")  # one that waits


@asynccontextmanager
async def _listening(stage: Stage) -> AsyncIterator[None]:
    """Follow every agent's stream meanwhile."""
    ready = [asyncio.Event() for _ in stage.players]
    pairs = zip(stage.players, ready, strict=True)
    streams = [asyncio.create_task(_listen(stage, player, event)) for player, event in pairs]
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
    async with aiohttp.ClientSession() as http:
        stage = Stage(http, service, console, seconds, rng, asyncio.get_running_loop().time())
        await _post(stage, OPENING)
        for member in FLEET:  # one after the other: each draws from the same rng
            await _enter(stage, member)
        async with _listening(stage):
            stage.started = asyncio.get_running_loop().time()
            await _trade(stage, path)
        await _clear(stage)
        await _sum_up(stage)


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


def _outcome(player: Player) -> str:
    told = [f"cured by {how}" for how in player.cures]
    if player.slices:
        told.append(f"liquidated in {player.slices}")
    if player.is_called:
        told.append("still called")
    return ", ".join(told) or "never called"


def demo(seed: int, seconds: float) -> None:
    """Run the demonstration until it is over or interrupted; leave nothing behind. Raises StartupError."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print("starting a service on a Postgres of its own: a few seconds", style="dim")
    try:
        with running_service() as service:
            console.print(f"the service is at {service.address}; the market opens", style="dim")
            asyncio.run(_play(service, console, seed, seconds))
    except (aiohttp.ClientError, RefusedError) as error:
        raise StartupError(f"the demonstration's service failed: {error}") from error
    except KeyboardInterrupt:
        console.print("interrupted: all is stopped", style="dim")
        raise SystemExit(128 + signal.SIGINT) from None
