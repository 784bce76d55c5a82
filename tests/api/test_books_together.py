"""Many requests on few books at once, drawn by chance: whatever their order, every book adds up to the last digit."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from app.services import ledger
from tests.api.service import Agent, Service

if TYPE_CHECKING:
    from collections.abc import Mapping

MARKETS = {"BTC-PERP": 60_000, "ETH-PERP": 3_000, "SOL-PERP": 150}
ROUNDS, AT_ONCE = 6, 40
REFUSALS = {409}
GATE = Decimal("0.8") + Decimal("1e-9")


def _amount(rng: random.Random, least: float, most: float) -> str:
    return f"{rng.uniform(least, most):.{rng.choice((0, 2, 6, 18))}f}"


async def _asked(agent: Agent, rng: random.Random, known: Mapping[str, list[str]]) -> int:
    """Send one request drawn by chance, and return the status of its answer."""
    symbol = rng.choice(list(MARKETS))
    size = _amount(rng, 1, 3_000)
    order: dict[str, Any] = {
        "symbol": symbol,
        "side": rng.choice(("buy", "sell")),
        "size": f"{Decimal(size) / MARKETS[symbol]:.18f}",
        "reduce_only": rng.random() < 0.3,
    }
    if rng.random() < 0.3:
        order |= {"margin_mode": rng.choice(("isolated", "cross")), "leverage": rng.choice((1, 2, 3.5))}
    reservation, position = rng.choice(known["reservations"] or ["res_0"]), rng.choice(known["positions"] or ["pos_0"])
    part = {} if rng.random() < 0.3 else {"amount": _amount(rng, 1, 50)}
    path, body = rng.choice(
        [
            ("/wallet/deposits", {"asset": rng.choice(("USDC", "BTC")), "amount": f"{rng.uniform(0.01, 1):.18f}"}),
            ("/wallet/withdrawals", {"asset": "USDC", "amount": _amount(rng, 1, 400)}),
            ("/reservations", {"service": "casino", "amount": _amount(rng, 1, 400), "reducible": True}),
            (f"/reservations/{reservation}/release", part),
            (f"/reservations/{reservation}/settle", part),
            (f"/positions/{reservation}/reduce", {"reduce_pct": f"{rng.uniform(0.01, 1):.18f}"}),
            (f"/positions/{position}/reduce", {"reduce_pct": f"{rng.uniform(0.01, 1):.18f}"}),
            (f"/positions/{position}/collateral", {"amount": rng.choice(("", "-")) + _amount(rng, 1, 100)}),
            *[("/orders", order)] * 4,
        ]
    )
    answer = await agent.ask(path, body)
    expected = {200, 201} | REFUSALS | ({404} if "_0/" in path else set())
    assert answer.status_code in expected, (path, body, answer.text)
    return answer.status_code


async def _pages(agent: Agent, path: str, name: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = await agent.get(f"{path}?limit=200&cursor={cursor}")
        items += page[name]
        if page["next_cursor"] is None:
            return items
        cursor = page["next_cursor"]


def _sum(values: Any) -> Decimal:
    return sum((Decimal(str(value)) for value in values), Decimal(0))


async def _check(agent: Agent) -> None:
    """Check a book against its own ledger, reservations, positions and orders."""
    account = await agent.get("/account")
    changes: dict[str, Decimal] = defaultdict(Decimal)
    for entry in await _pages(agent, "/wallet/ledger", "entries"):
        changes[entry["asset"]] += Decimal(str(entry["change"]))
    held = {b["asset"]: b for b in account["balances"]}
    for asset, change in changes.items():
        balance = held.get(asset, {"amount": 0, "owed": 0, "borrowed": 0})
        assert Decimal(balance["amount"]) - Decimal(balance["owed"]) - Decimal(balance["borrowed"]) == change, asset
    for balance in held.values():
        assert balance["amount"] == _sum(
            balance[name] for name in ("free", "reserved", "allocated", "offered", "lent", "pledged")
        )
    opened = await _pages(agent, "/reservations", "reservations")
    usdc = held.get("USDC", {"reserved": 0, "allocated": 0})
    assert usdc["reserved"] == _sum(r["remaining"] for r in opened if r["status"] == "open")
    assert usdc["allocated"] == _sum(p["allocated_collateral"] for p in account["positions"])
    net: dict[str, Decimal] = defaultdict(Decimal)
    for order in await _pages(agent, "/orders", "orders"):
        net[order["symbol"]] += Decimal(str(order["filled_size"])) * (1 if order["side"] == "buy" else -1)
    sizes = {p["symbol"]: Decimal(str(p["size"])) * (1 if p["side"] == "long" else -1) for p in account["positions"]}
    assert sizes == {symbol: size for symbol, size in net.items() if size}
    assert len(account["positions"]) == len(sizes)


@pytest.mark.parametrize("seed", [1, 2])
async def test_books_add_up_whatever_comes_together(service: Service, seed: int) -> None:
    rng = random.Random(seed)
    await service.prices(BTC=60_000, **{name.replace("-", "_"): price for name, price in MARKETS.items()})
    agents = [await service.agent(f"agent {i}") for i in range(3)]
    for agent in agents:
        await agent.deposit(USDC=2_000)
    statuses: list[int] = []
    for turn in range(ROUNDS):
        known = {}
        for agent in agents:
            account = await agent.get("/account")
            known[agent.id] = {name: [item["id"] for item in account[name]] for name in ("reservations", "positions")}
        drawn = [rng.choice(agents) for _ in range(AT_ONCE)]
        draws = [random.Random(rng.random()) for _ in drawn]
        asked = (_asked(agent, own, known[agent.id]) for agent, own in zip(drawn, draws, strict=True))
        statuses += await asyncio.gather(*asked)
        for agent in agents:
            await _check(agent)
            utilization = (await agent.get("/account"))["health"]["utilization"]
            assert turn >= ROUNDS // 2 or utilization <= GATE  # while prices stand still, the gate holds
        if turn >= ROUNDS // 2 - 1:
            moved = {name.replace("-", "_"): price * rng.choice((0.9, 1.1)) for name, price in MARKETS.items()}
            await service.prices(**moved)
    assert statuses.count(200) + statuses.count(201) > len(statuses) / 4
    assert 409 in statuses
    async with service.app.state.parts.database.transaction("test") as tx:
        assert await ledger.imbalances(tx) == {}
