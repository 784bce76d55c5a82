"""The agents of the demonstration: how they begin, what they do about a margin call."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec

from app.demo.coordinator import release
from app.demo.fleet import ASSETS, GENEROSITY, INITIAL_RATE, OPENING, REACTION, Member
from app.demo.stage import Player, RefusedError, Stage
from app.demo.told import TOLD


async def enter(stage: Stage, member: Member) -> None:
    """Make an agent, fund it, and have it take its positions."""
    made = await stage.send("POST", "/agents", {"name": member.name})
    funds = round(float(stage.rng.uniform(8_000, 25_000)), -2)
    player = Player(member, made["api_key"], made["agent_id"], funds)
    await stage.deposit(player.agent_id, funds)
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


async def listen(stage: Stage, player: Player, is_listening: asyncio.Event) -> None:
    """Follow an agent's event stream, print what it tells, and answer its calls."""
    headers = {"Authorization": f"Bearer {player.key}", "Accept": "text/event-stream"}
    async with stage.http.get(f"{stage.service.address}/api/events?after=0", headers=headers, timeout=None) as stream:
        is_listening.set()
        async for line in stream.content:
            if line.startswith(b"data: "):
                event = msgspec.json.decode(line.removeprefix(b"data: "))
                _hear(stage, player, event["type"], event["data"])


def _hear(stage: Stage, player: Player, kind: str, data: Mapping[str, Any]) -> None:
    tell = TOLD.get(kind)
    if tell is None or (kind == "zone.changed" and data["zone"] == data["zone_before"]):
        return  # of the changes of level, those of zone
    what, more, style = tell(player, data)
    stage.say(player.member.name, what, more, style)
    if kind == "fleet.zone_changed" and data["zone"] in ("ORANGE", "RED"):
        _begin(stage, release(stage, player))
    if kind in ("margin_call.opened", "margin_call.reminded"):
        _begin(stage, _answer(stage, player, data["margin_call_id"]))


def _begin(stage: Stage, work: Coroutine[Any, Any, None]) -> None:
    """Have an agent do something while others go on."""
    task = asyncio.create_task(work)
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
    await stage.deposit(player.agent_id, amount)
    player.deposited += amount


async def _reduce(stage: Stage, player: Player, cure: Mapping[str, Any]) -> None:
    for order in cure["orders"]:
        player.answered = "orders of its own"
        stage.say(player.member.name, "reduces", f"{order['side']} {order['size']:g} {order['symbol']}", "cyan")
        await stage.send("POST", "/orders", order, player.key)


_ANSWERS = {"deposits": _deposit, "reduces": _reduce}
