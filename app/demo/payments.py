"""What agents of the demonstration lend and pay each other."""

from __future__ import annotations

from collections.abc import Mapping

from app.demo.fleet import BORROWER, LENDER, LENT, OPENING, PAYERS, PLEDGED
from app.demo.stage import Player, Stage

CALLS_EACH_WAY = 10
"""Obligations that two agents book on each other before they net them."""


async def lend(stage: Stage) -> None:
    """Have one agent offer USDC, and another borrow it against bitcoins, which the crash will not spare."""
    keys = {}
    for member, asset, amount in ((LENDER, "USDC", 4.0 * LENT), (BORROWER, "BTC", 2.0 * PLEDGED)):
        made = await stage.send("POST", "/agents", {"name": member.name})
        keys[member.plan] = made["api_key"]
        worth = amount if asset == "USDC" else amount * OPENING[0]
        player = Player(member, made["api_key"], made["agent_id"], worth)
        await stage.deposit(player.agent_id, amount, asset)
        stage.players.append(player)
    await stage.send("POST", "/lending/create", {"asset": "USDC", "amount": LENT}, keys["lends"])
    wanted = {"asset": "USDC", "amount": LENT, "collateral": {"asset": "BTC", "amount": PLEDGED}}
    await stage.send("POST", "/lending/borrow", wanted, keys["borrows"])


async def clear(stage: Stage) -> None:
    """Have two agents that have just come pay through an escrow, and net what they owe each other."""
    keys, ids = {}, {}
    for name in PAYERS:
        made = await stage.send("POST", "/agents", {"name": name})
        keys[name], ids[name] = made["api_key"], made["agent_id"]
        await stage.deposit(ids[name], 20_000)
    await _pay(stage, keys, ids)
    await _net(stage, keys, ids)


async def _pay(stage: Stage, keys: Mapping[str, str], ids: Mapping[str, str]) -> None:
    terms = {"payee": ids["Otto"], "timeout_seconds": 3_600, "on_timeout": "refund"}
    made = await stage.send("POST", "/escrows", terms | {"amount": 10_000}, keys["Mara"])
    stage.say("Mara", "escrow funded", f"10,000 USDC for Otto, {made['reserved']:,.2f} set aside", "cyan")
    await stage.send("POST", f"/escrows/{made['id']}/confirm", {}, keys["Otto"])
    done = await stage.send("POST", f"/escrows/{made['id']}/confirm", {}, keys["Mara"])
    stage.say("Otto", "is paid", f"{done['to_payee']:,.2f} USDC, fee {done['fee']:,.2f}", "green")
    await stage.send("POST", "/escrows", terms | {"amount": 500}, keys["Mara"])  # one that waits


async def _net(stage: Stage, keys: Mapping[str, str], ids: Mapping[str, str]) -> None:
    body = {"members": [ids["Otto"]], "services": ["data"]}
    made = await stage.send("POST", "/netting/agreements", body, keys["Mara"])
    path = f"/netting/agreements/{made['id']}"
    await stage.send("POST", f"{path}/accept", {}, keys["Otto"])

    async def owe(payer: str, payee: str, amount: int, reference: str) -> None:
        owed = {"payee": ids[payee], "service": "data", "asset": "USDC", "amount": amount, "reference": reference}
        await stage.send("POST", f"{path}/obligations", owed, keys[payer])

    for k in range(CALLS_EACH_WAY):
        await owe("Mara", "Otto", 100 + k, f"call {k}")
        await owe("Otto", "Mara", 90 + k, f"call {k}")
    told = await stage.send("GET", f"{path}/statement", key=keys["Otto"])
    ran = await stage.send("POST", f"{path}/settle", {}, keys["Otto"])
    saving, moved = told["saving"][0], f"{len(ran['movements'])} payment of {ran['movements'][0]['amount']:,.2f} USDC"
    spared = f"{saving['movements_saved']} payments and {saving['fees_saved']:,.2f} of fees spared"
    stage.say("Mara", "netted", f"{ran['obligations']} obligations: {moved}, {spared}", "green")
    await owe("Mara", "Otto", 50, "next")  # one that waits
