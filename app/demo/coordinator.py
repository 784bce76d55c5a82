"""A fleet of the demonstration: one wallet behind two members, one of which it stands by."""

from __future__ import annotations

from app.demo.fleet import DRAWERS, LEADER, OPENING, WALLET
from app.demo.stage import Player, RefusedError, Stage


async def gather(stage: Stage) -> None:
    """Make a coordinator and its fleet, and have its members buy bitcoins with what they draw of its wallet."""
    made = await stage.send("POST", "/agents", {"name": LEADER.name})
    scopes = {"scopes": ["agent", "coordinator"]}
    key = (await stage.send("POST", f"/keys?agent_id={made['agent_id']}", scopes))["api_key"]
    await stage.deposit(made["agent_id"], WALLET)
    fleet = await stage.send("POST", "/fleets", {"name": LEADER.name, "over_delegation": True}, key)
    stage.players.append(Player(LEADER, key, made["agent_id"], WALLET, fleet_id=fleet["id"]))
    for member, delegation, most, size in DRAWERS:
        terms = {"name": member.name, "max_margin": most, "delegation": delegation}
        joined = await stage.send("POST", f"/fleets/{fleet['id']}/members", terms, key)
        own = {"grace_period_seconds": max(1, round(member.grace * stage.seconds))}
        await stage.send("PATCH", "/account/settings", own, joined["api_key"])
        await stage.send("POST", "/orders", {"symbol": "BTC-PERP", "side": "buy", "size": size}, joined["api_key"])
        stage.players.append(Player(member, joined["api_key"], joined["agent_id"], 0.0))
    shown = await stage.send("GET", f"/fleets/{fleet['id']}", key=key)
    drawn = f"{len(DRAWERS)} members have drawn {shown['drawn']:,.2f} of {WALLET:,} USDC"
    stage.say(LEADER.name, "leads", f"{drawn}, {OPENING[0]:,.0f} a bitcoin", "green")


async def release(stage: Stage, player: Player) -> None:
    """Let the fleet's members reach its dry powder, as its coordinator may while it is in an emergency."""
    try:
        await stage.send("POST", f"/fleets/{player.fleet_id}/dry-powder", {"action": "release"}, player.key)
    except RefusedError as refusal:
        stage.say(player.member.name, "is refused", str(refusal), "red")
