"""A demonstration: a service of its own, a fleet of agents, a market that crashes, and what becomes of each.

It speaks to the service as anybody would, over HTTP, event streams and webhooks. What it starts lives in a temporary
directory and ends with it. It may play on a service that runs already, so that an operator's dashboards have something
to show: on one that is nobody else's.
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
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import aiohttp
import msgspec
import numpy as np
from aiohttp import web
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

Plan = Literal["deposits", "reduces", "waits", "sleeps", "is careful", "is short", "lends", "borrows"]


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
LENDER, BORROWER = Member("Mona", "lends", 0.0, 0.4), Member("Nils", "borrows", 0.0, 0.4)
LENT, PLEDGED = 5_000, 0.104
"""USDC that the one lends the other, and the bitcoins that secure it: a tenth more than they have to."""
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
        own = {
            "PRIMERISK_DATA_DIR": f"{home}/data",
            "PRIMERISK_PORT": "0",
            "PRIMERISK_ADMIN_KEY": key,
            "PRIMERISK_WEBHOOK_ALLOW_PRIVATE": "true",  # the receiver is here
        }
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


# --- the receiver of webhooks


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


# --- the agents


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
    player = Player(member, made["api_key"], made["agent_id"], funds)
    await _book_deposit(stage, player, funds)
    await _subscribe(stage, player)
    weights = stage.rng.dirichlet([4.0] * len(ASSETS))
    orders = [
        {
            "symbol": f"{asset}-PERP",
            "side": member.side,
            "size": round(member.utilization * funds / INITIAL_RATE * weight / price, 4),
        }
        for asset, price, weight in zip(ASSETS, OPENING, weights.tolist(), strict=True)
    ]
    held = [{**order, "side": {"buy": "long", "sell": "short"}[member.side]} for order in orders]
    quoted = {"positions": held, "collateral": [{"asset": "USDC", "amount": funds}]}
    await stage.send("POST", "/quotes/margin", quoted, player.key)  # what it will cost
    for order in orders:
        await stage.send("POST", "/orders", order, player.key)
    own = {
        "grace_period_seconds": max(1, round(member.grace * stage.seconds)),
        "notice_delay_seconds": round(member.notice * stage.seconds),
    }
    await stage.send("PATCH", "/account/settings", own, player.key)
    stage.players.append(player)


async def _lend(stage: Stage) -> None:
    """Have one agent offer USDC, and another borrow it against bitcoins, which the crash will not spare."""
    keys = {}
    for member, asset, amount in ((LENDER, "USDC", 4.0 * LENT), (BORROWER, "BTC", 2.0 * PLEDGED)):
        made = await stage.send("POST", "/agents", {"name": member.name})
        keys[member.plan] = made["api_key"]
        worth = amount if asset == "USDC" else amount * OPENING[0]
        player = Player(member, made["api_key"], made["agent_id"], worth)
        await _book_deposit(stage, player, amount, asset)
        stage.players.append(player)
    await stage.send("POST", "/lending/create", {"asset": "USDC", "amount": LENT}, keys["lends"])
    wanted = {"asset": "USDC", "amount": LENT, "collateral": {"asset": "BTC", "amount": PLEDGED}}
    await stage.send("POST", "/lending/borrow", wanted, keys["borrows"])


async def _book_deposit(stage: Stage, player: Player, amount: float, asset: str = "USDC") -> None:
    """Book a deposit as the operator does, whose word it takes wherever balances are worth something."""
    path = f"/wallet/deposits?agent_id={player.agent_id}"
    await stage.send("POST", path, {"asset": asset, "amount": amount})


async def _subscribe(stage: Stage, player: Player) -> None:
    """Have what becomes of the agent's calls sent to the receiver as well."""
    if stage.receiver.is_refused:
        return
    wanted = {"url": stage.receiver.url, "filters": ["margin_call.*", "liquidation.*"]}
    try:
        await stage.send("POST", "/webhooks", wanted, player.key)
    except RefusedError as refusal:
        stage.receiver.is_refused = True
        stage.console.print(f"webhooks are left out: {refusal}", style="dim")


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
    await _book_deposit(stage, player, amount)
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


def _loan_opened(player: Player, data: Mapping[str, Any]) -> _Told:
    return player.member.plan, f"{data['principal']:,.2f} {data['asset']} at {data['rate_apy']:.1%} a year", "green"


def _loan_low(_: Player, data: Mapping[str, Any]) -> _Told:
    more = f"collateral is {data['ratio']:.1%} of the debt, {data['top_up']:g} {data['collateral_asset']} are missing"
    return "loan is low", more, "yellow"


def _loan_closed(_: Player, data: Mapping[str, Any]) -> _Told:
    paid = data["returned"] + data["interest"]
    sold = f"{data['collateral_sold']:.4f} {data['collateral_asset']} are sold"
    return "loan is closed", f"{sold} for {paid:,.2f} {data['asset']}, deficit {data['deficit']:,.2f}", "red"


_TOLD = {
    "loan.opened": _loan_opened,
    "loan.collateral_low": _loan_low,
    "loan.liquidated": _loan_closed,
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
    async with aiohttp.ClientSession() as http, receiving() as receiver:
        stage = Stage(http, service, console, seconds, rng, receiver, asyncio.get_running_loop().time())
        await _check_alone(stage)
        await _post(stage, OPENING)
        for member in FLEET:  # one after the other: each draws from the same rng
            await _enter(stage, member)
        await _lend(stage)
        async with _listening(stage):
            stage.started = asyncio.get_running_loop().time()
            await _trade(stage, path)
        await _sum_up(stage)


async def _check_alone(stage: Stage) -> None:
    """Refuse a service that has agents other than the demonstration's: it would move their market."""
    names = {member.name for member in FLEET}
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
