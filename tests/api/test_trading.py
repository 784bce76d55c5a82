"""Orders and reductions over HTTP: what is filled, what is refused, and with which figures."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from app.services import ledger
from tests.api.service import Agent, Service, problem, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL

LONG_AGO = "2026-01-01T00:00:00Z"
REFUSED = {"shortfall", "size_max"}


@pytest.fixture
async def agent(service: Service) -> Agent:
    """Return an agent with 30,000 USDC, on a market that has prices."""
    await service.prices(BTC=60_000, BTC_PERP=60_000, ETH=3_000, ETH_PERP=3_000)
    made = await service.agent()
    await made.deposit(USDC=30_000)
    return made


@asynccontextmanager
async def _later(url: URL, agent: Agent) -> AsyncIterator[Agent]:
    """Yield the agent before a process for which every stored price is stale."""
    async with running(url, price_age_seconds_max=1e-6) as service:
        yield replace(agent, service=service)


async def _balanced(service: Service) -> None:
    async with service.app.state.parts.database.transaction("test") as tx:
        assert await ledger.imbalances(tx) == {}


async def _sizes(agent: Agent) -> list[tuple[str, str, Any]]:
    return [(p["symbol"], p["side"], p["size"]) for p in (await agent.get("/account"))["positions"]]


# --- orders


async def test_an_order_says_how_it_was_filled(agent: Agent) -> None:
    body = {
        "symbol": "BTC-PERP", "side": "buy", "size": 0.5, "order_type": "market", "reduce_only": False, "leverage": 3,
        "margin_mode": "cross", "meta": {"strategy": "momentum", "signal": 0.75},
    }  # fmt: skip
    filled = await agent.post("/orders", body)
    order = {name: value for name, value in filled.items() if name not in ("position", "account")}
    assert order == {
        "order_id": order["id"], "id": order["id"], "symbol": "BTC-PERP", "side": "buy", "size": Decimal("0.5"),
        "order_type": "market", "reduce_only": False, "leverage": 3, "reason": "", "status": "filled",
        "meta": {"strategy": "momentum", "signal": Decimal("0.75")}, "fill_price": 60_000,
        "filled_size": Decimal("0.5"), "realized_pnl": 0, "position_id": filled["position"]["id"],
        "created_at": order["created_at"], "closed_at": order["created_at"], "fees": 0, "margin_call_id": None,
    }  # fmt: skip
    assert await agent.get(f"/orders/{order['id']}") == {**order, "fills": []}
    assert filled["position"] == (await agent.get("/account"))["positions"][0]
    assert filled["account"]["equity"] == 30_000
    assert filled["account"]["required_initial"] == 10_000
    assert filled["account"]["zone"] == "GREEN"


async def test_the_average_entry_and_what_is_realised(service: Service, agent: Agent) -> None:
    await agent.order("BTC-PERP", "buy", "0.1")
    await service.prices(BTC_PERP="60100.50")
    grown = await agent.order("BTC-PERP", "buy", "0.2")
    assert grown["position"]["size"] == Decimal("0.3")
    assert grown["position"]["entry_price"] == Decimal(60067)
    await service.prices(BTC_PERP=61_067)
    part = await agent.order("BTC-PERP", "sell", "0.1", reduce_only=True)
    assert (part["realized_pnl"], part["position"]["size"]) == (100, Decimal("0.2"))
    assert part["position"]["realized_pnl"] == 100
    assert (await agent.get("/wallet/balance"))["usdc_balance"] == 30_100
    flipped = await agent.order("BTC-PERP", "sell", "0.3")
    assert (flipped["realized_pnl"], flipped["filled_size"]) == (200, Decimal("0.3"))
    assert (flipped["position"]["side"], flipped["position"]["size"]) == ("short", Decimal("0.1"))
    assert flipped["position"]["entry_price"] == 61_067
    assert flipped["position"]["id"] != grown["position"]["id"]
    await service.prices(BTC_PERP=62_067)
    closed = await agent.order("BTC-PERP", "buy", "0.1", reduce_only=True)
    assert (closed["realized_pnl"], closed["position"]) == (-100, None)
    assert (await agent.get("/wallet/balance"))["usdc_balance"] == 30_200
    stored = (await agent.get("/positions"))["positions"]
    assert [(p["status"], p["size"], p["realized_pnl"]) for p in stored] == [("closed", 0, -100), ("closed", 0, 300)]
    assert await agent.get(f"/positions/{grown['position']['id']}") == stored[1]
    await _balanced(service)


async def test_a_loss_beyond_what_is_free_is_owed(service: Service, agent: Agent) -> None:
    await agent.deposit(BTC=1)
    await agent.post("/wallet/withdrawals", {"asset": "USDC", "amount": 29_990})
    await agent.order("ETH-PERP", "buy", 1)
    await service.prices(ETH_PERP=2_900)
    await agent.order("ETH-PERP", "sell", 1)
    wallet = await agent.get("/wallet/balance")
    assert (wallet["usdc_balance"], wallet["owed"]) == (0, 90)
    assert wallet["equity"] == 54_000 - 90
    booked = await agent.post("/wallet/deposits", {"asset": "USDC", "amount": 100})
    assert booked["balance"] == {"asset": "USDC", "amount": 10, "free": 10, "reserved": 0, "owed": 0}
    entries = (await agent.get("/wallet/ledger"))["entries"]
    assert sum(e["change"] for e in entries if e["asset"] == "USDC") == 10
    await _balanced(service)


async def test_a_listed_contract_size_and_margin_rate(service: Service, agent: Agent) -> None:
    listed = {"underlying": "ETH", "contract_size": 10, "initial_margin_rate": 0.5, "maintenance_margin_rate": 0.2}
    assert (await service.put("/api/market/instruments/ETH-TEN", json=listed)).status_code == 200
    await service.prices(ETH_TEN=3_000)
    filled = await agent.order("ETH-TEN", "sell", 1, leverage=10)
    assert filled["position"]["notional_usd"] == 30_000
    assert filled["position"]["initial_margin"] == 15_000
    assert filled["position"]["maintenance_margin"] == 6_000
    await service.prices(ETH_TEN=2_999)
    assert (await agent.order("ETH-TEN", "buy", 1))["realized_pnl"] == 10


async def test_pages_of_orders_and_positions(agent: Agent) -> None:
    sent = [(await agent.order("ETH-PERP", side, "0.1"))["order_id"] for side in ("buy", "sell") * 3]
    page = await agent.get("/orders?limit=4")
    assert [o["order_id"] for o in page["orders"]] == sent[:1:-1]
    rest = await agent.get(f"/orders?limit=4&cursor={page['next_cursor']}")
    assert ([o["order_id"] for o in rest["orders"]], rest["next_cursor"]) == (sent[1::-1], None)
    positions = await agent.get("/positions?limit=2")
    more = await agent.get(f"/positions?limit=2&cursor={positions['next_cursor']}")
    assert [len(positions["positions"]), len(more["positions"])] == [2, 1]
    assert len({p["id"] for p in positions["positions"] + more["positions"]}) == 3


# --- the gate


async def test_an_order_past_the_gate_says_what_is_missing_and_what_would_pass(agent: Agent) -> None:
    """30,000 at a gate of .80 carries a margin of 24,000: at 20,000 a coin, 1.2 coins."""
    body = {"symbol": "BTC-PERP", "side": "buy", "size": 1.5, "leverage": 3}
    document = problem(await agent.ask("/orders", body), 409, "insufficient_margin", "/size", figures=REFUSED)
    assert document["shortfall"] == pytest.approx(30_000 / 0.8 - 30_000)
    size_max = document["size_max"]
    assert size_max == pytest.approx(1.2, rel=1e-6)
    assert size_max <= 1.2
    assert (await agent.get("/account"))["positions"] == []
    assert (await agent.get("/orders"))["orders"] == []
    refused = await agent.ask("/orders", body | {"size": size_max * 1.000001})
    problem(refused, 409, "insufficient_margin", "/size", figures=REFUSED)
    assert (await agent.order("BTC-PERP", "buy", size_max, leverage=3))["position"]["size"] == Decimal(str(size_max))


async def test_the_shortfall_is_what_lets_it_pass(agent: Agent) -> None:
    body = {"symbol": "BTC-PERP", "side": "sell", "size": 1.5, "leverage": 3}
    document = problem(await agent.ask("/orders", body), 409, "insufficient_margin", figures=REFUSED)
    await agent.deposit(USDC=document["shortfall"] - 0.01)
    problem(await agent.ask("/orders", body), 409, "insufficient_margin", figures=REFUSED)
    await agent.deposit(USDC=0.02)
    await agent.order("BTC-PERP", "sell", 1.5, leverage=3)


async def test_the_leverage_cap(service: Service, agent: Agent) -> None:
    """Gross notional is 3.5 times equity at most: 105,000 of 30,000, whatever the margin."""
    rates = {"initial_margin_rate": 0.1, "maintenance_margin_rate": 0.05}
    assert (await service.put("/api/market/assets/BTC", json=rates)).status_code == 200
    body = {"symbol": "BTC-PERP", "side": "buy", "size": 1.76}
    document = problem(await agent.ask("/orders", body), 409, "leverage_above_cap", "/size", figures=REFUSED)
    assert document["shortfall"] == pytest.approx(1.76 * 60_000 / 3.5 - 30_000)
    assert document["size_max"] == pytest.approx(1.75, rel=1e-6)
    await agent.order("BTC-PERP", "buy", document["size_max"])


async def test_an_order_that_closes_more_than_it_opens_passes_at_any_level(service: Service, agent: Agent) -> None:
    await agent.order("BTC-PERP", "buy", 1.2, leverage=3)
    await service.prices(BTC_PERP=45_000)
    assert (await agent.get("/account"))["health"]["utilization"] > 1
    smaller = await agent.order("BTC-PERP", "sell", 1.3)
    assert (smaller["position"]["side"], smaller["position"]["size"]) == ("short", Decimal("0.1"))


async def test_nothing_opens_without_money(service: Service, agent: Agent) -> None:
    poor = await service.agent("poor")
    body = {"symbol": "ETH-PERP", "side": "buy", "size": 1}
    document = problem(await poor.ask("/orders", body), 409, "insufficient_margin", "/size", figures=REFUSED)
    assert (document["size_max"], document["shortfall"]) == (0, pytest.approx(900 / 0.8))


async def test_orders_at_once_pass_the_gate_together(service: Service, agent: Agent) -> None:
    """Each of 12 is fine alone; no more than six of .2 fit under 1.2 coins."""
    body = {"symbol": "BTC-PERP", "side": "buy", "size": 0.2, "leverage": 3}
    answers = await asyncio.gather(*(agent.ask("/orders", body) for _ in range(12)))
    assert sorted(a.status_code for a in answers) == [200] * 6 + [409] * 6
    assert await _sizes(agent) == [("BTC-PERP", "long", Decimal("1.2"))]
    assert len((await agent.get("/orders"))["orders"]) == 6


# --- reduce only


async def test_reduce_only_never_flips(agent: Agent) -> None:
    sell = {"symbol": "BTC-PERP", "side": "sell", "size": 0.3, "reduce_only": True}
    problem(await agent.ask("/orders", sell), 409, "nothing_to_reduce", "/reduce_only")
    await agent.order("BTC-PERP", "buy", 0.3)
    above = await agent.ask("/orders", sell | {"size": "0.300000000000000001"})
    problem(above, 409, "would_flip", "/size")
    buy = await agent.ask("/orders", sell | {"side": "buy"})
    problem(buy, 409, "nothing_to_reduce", "/reduce_only")
    assert await _sizes(agent) == [("BTC-PERP", "long", Decimal("0.3"))]
    answers = await asyncio.gather(*(agent.ask("/orders", sell | {"size": 0.2}) for _ in range(8)))
    assert sorted(a.status_code for a in answers) == [200] + [409] * 7
    assert await _sizes(agent) == [("BTC-PERP", "long", Decimal("0.1"))]


# --- prices that are too old


async def test_a_stale_mark_opens_nothing_and_reduces_all_the_same(
    database_url: URL, service: Service, agent: Agent
) -> None:
    opened = await agent.order("BTC-PERP", "buy", 0.5)
    held = await agent.post("/reservations", {"service": "casino", "amount": 10, "reducible": True})
    async with _later(database_url, agent) as late:
        assert (await late.get("/account"))["stale_prices"] == ["BTC-PERP", "BTC"]
        buy = {"symbol": "BTC-PERP", "side": "buy", "size": 0.1}
        problem(await late.ask("/orders", buy), 409, "stale_price", "/market/prices")
        flip = buy | {"side": "sell", "size": 0.6}
        problem(await late.ask("/orders", flip), 409, "stale_price", "/market/prices")
        problem(await late.ask("/wallet/withdrawals", {"asset": "USDC", "amount": 1}), 409, "stale_price")
        problem(await late.ask("/reservations", {"service": "casino", "amount": 1}), 409, "stale_price")
        await late.post(f"/reservations/{held['id']}/release", {"amount": 1})
        await late.post(f"/positions/{held['id']}/reduce", {"reduce_pct": 1})
        await late.post(f"/positions/{opened['position']['id']}/reduce", {"reduce_pct": 0.5})
        await late.order("BTC-PERP", "sell", 0.25, reduce_only=True)
        assert await _sizes(late) == []
        await late.post("/wallet/withdrawals", {"asset": "USDC", "amount": 1})  # nothing open depends on a price


async def test_a_price_dated_long_ago_opens_nothing(service: Service, agent: Agent) -> None:
    body = {"prices": {"SOL": 150}, "as_of": LONG_AGO}
    assert (await service.post("/api/market/prices", key="market", json=body)).status_code == 202
    order = {"symbol": "SOL-PERP", "side": "buy", "size": 1}
    document = problem(await agent.ask("/orders", order), 409, "stale_price", "/market/prices")
    assert "SOL" in document["errors"][0]["detail"]
    await service.prices(SOL=150)
    await agent.order("SOL-PERP", "buy", 1)


async def test_collateral_with_a_stale_price_opens_nothing_either(service: Service, agent: Agent) -> None:
    body = {"prices": {"SOL": 150}, "as_of": LONG_AGO}
    assert (await service.post("/api/market/prices", key="market", json=body)).status_code == 202
    await agent.deposit(SOL=10)
    problem(await agent.ask("/orders", {"symbol": "ETH-PERP", "side": "buy", "size": 1}), 409, "stale_price")


# --- reduce


async def test_reduce_by_a_fraction(service: Service, agent: Agent) -> None:
    opened = await agent.order("BTC-PERP", "buy", 1, leverage=3)
    await service.prices(BTC_PERP=61_000)
    path = f"/positions/{opened['position']['id']}/reduce"
    reduced = await agent.post(path, {"reduce_pct": 0.25, "reason": "risk_limit"})
    assert (reduced["id"], reduced["service"], reduced["side"]) == (opened["position"]["id"], "trading", "sell")
    assert (reduced["filled_size"], reduced["realized_pnl"]) == (Decimal("0.25"), 250)
    assert (reduced["reason"], reduced["reduce_only"], reduced["fill_price"]) == ("risk_limit", True, 61_000)
    assert reduced["position"]["size"] == Decimal("0.75")
    assert reduced["account"]["required_initial"] == 15_250
    [entry] = [e for e in (await agent.get("/wallet/ledger"))["entries"] if e["kind"] == "realized_pnl"]
    assert (entry["reference"], entry["change"]) == ("risk_limit", 250)
    assert (await agent.post(path, {"reduce_pct": "1"}))["position"] is None
    problem(await agent.ask(path, {"reduce_pct": 0.5}), 409, "already_closed", "/id")


async def test_reduce_rounds_up_to_the_last_decimal(agent: Agent) -> None:
    opened = await agent.order("ETH-PERP", "sell", "0.000000000000000007")
    reduced = await agent.post(f"/positions/{opened['position']['id']}/reduce", {"reduce_pct": 0.5})
    assert reduced["side"] == "buy"
    assert reduced["filled_size"] == Decimal("0.000000000000000004")
    assert reduced["position"]["size"] == Decimal("0.000000000000000003")


async def test_reduce_a_reservation(service: Service, agent: Agent) -> None:
    held = await agent.post("/reservations", {"service": "casino", "amount": "0.3", "reducible": True})
    path = f"/positions/{held['id']}/reduce"
    reduced = await agent.post(path, {"reduce_pct": "0.1", "reason": "margin"})
    assert (reduced["id"], reduced["service"], reduced["status"]) == (held["id"], "casino", "open")
    assert (reduced["amount"], reduced["remaining"], reduced["settled"]) == (Decimal("0.3"), Decimal("0.27"), 0)
    assert reduced["account"]["required_initial"] == Decimal("0.27")
    done = await agent.post(path, {"reduce_pct": 1})
    assert (done["remaining"], done["status"]) == (0, "released")
    problem(await agent.ask(path, {"reduce_pct": 1}), 409, "already_closed", "/id")
    assert (await agent.get("/wallet/balance"))["free"] == 30_000
    await _balanced(service)


async def test_all_of_a_long_amount_is_all_of_it(service: Service, agent: Agent) -> None:
    """33 digits: more than Decimal computes with by default."""
    amount = "123456789012345.123456789012345678"
    await agent.deposit(ETH=amount)
    held = await agent.post("/reservations", {"service": "casino", "asset": "ETH", "amount": amount, "reducible": True})
    done = await agent.post(f"/positions/{held['id']}/reduce", {"reduce_pct": 1})
    assert (done["remaining"], done["status"]) == (0, "released")
    await _balanced(service)


async def test_what_is_not_reducible_is_left_alone(agent: Agent) -> None:
    held = await agent.post("/reservations", {"service": "domains", "amount": 10})
    assert held["reducible"] is False
    problem(await agent.ask(f"/positions/{held['id']}/reduce", {"reduce_pct": 0.5}), 409, "not_reducible", "/id")
    problem(await agent.ask("/positions/pos_0/reduce", {"reduce_pct": 0.5}), 404, "position_not_found")
    assert (await agent.get(f"/reservations/{held['id']}"))["remaining"] == 10


# --- isolated


async def test_isolated_collateral(service: Service, agent: Agent) -> None:
    opened = await agent.order("BTC-PERP", "buy", 0.5, leverage=3, margin_mode="isolated")
    position = opened["position"]
    path = f"/positions/{position['id']}/collateral"
    assert (position["margin_mode"], position["allocated_collateral"]) == ("isolated", 10_000)
    wallet = await agent.get("/wallet/balance")
    assert (wallet["usdc_balance"], wallet["free"], wallet["allocated"]) == (30_000, 20_000, 10_000)
    assert (await agent.get("/account"))["health"]["required_initial"] == 0
    more = await agent.post(path, {"amount": "500.25"})
    assert more["position"]["allocated_collateral"] == Decimal("10500.25")
    back = await agent.post(path, {"amount": -500})
    assert back["position"]["allocated_collateral"] == Decimal("10000.25")
    short = await agent.ask(path, {"amount": "-0.26"})
    document = problem(short, 409, "insufficient_margin", "/amount", figures={"shortfall"})
    assert document["shortfall"] == pytest.approx(0.01)
    above = await agent.ask(path, {"amount": 20_000})
    document = problem(above, 409, "insufficient_funds", "/amount", figures={"available"})
    assert document["available"] == 19_999.75
    all_of_it = await agent.ask(path, {"amount": -10_001})
    problem(all_of_it, 409, "insufficient_funds", "/amount", figures={"available"})
    await service.prices(BTC_PERP=62_000)
    part = await agent.post(f"/positions/{position['id']}/reduce", {"reduce_pct": 0.5})
    assert part["realized_pnl"] == 500
    assert part["position"]["allocated_collateral"] == Decimal("5000.125")
    await agent.post(f"/positions/{position['id']}/reduce", {"reduce_pct": 1})
    wallet = await agent.get("/wallet/balance")
    assert (wallet["usdc_balance"], wallet["free"], wallet["allocated"]) == (31_000, 31_000, 0)
    problem(await agent.ask(path, {"amount": 1}), 409, "position_closed", "/id")
    await _balanced(service)


async def test_an_isolated_loss_ends_at_its_allocation(service: Service, agent: Agent) -> None:
    await agent.order("BTC-PERP", "buy", 0.5, leverage=3, margin_mode="isolated")
    await service.prices(BTC_PERP=30_000)
    closed = await agent.order("BTC-PERP", "sell", 0.5, reduce_only=True)
    assert (closed["realized_pnl"], closed["position"]) == (-15_000, None)
    wallet = await agent.get("/wallet/balance")
    assert (wallet["usdc_balance"], wallet["owed"]) == (20_000, 0)
    await _balanced(service)


async def test_a_pooled_position_has_no_collateral_of_its_own(agent: Agent) -> None:
    opened = await agent.order("BTC-PERP", "buy", 0.1)
    path = f"/positions/{opened['position']['id']}/collateral"
    problem(await agent.ask(path, {"amount": 5}), 409, "not_isolated", "/id")
    problem(await agent.ask(path, {"amount": 0}), 422, "not_positive", "/amount")
    body = {"symbol": "BTC-PERP", "side": "buy", "size": 0.1, "margin_mode": "isolated"}
    problem(await agent.ask("/orders", body), 409, "margin_mode_conflict", "/margin_mode")
    assert await _sizes(agent) == [("BTC-PERP", "long", Decimal("0.1"))]


async def test_an_allocation_past_what_is_free_is_refused(agent: Agent) -> None:
    body = {"symbol": "BTC-PERP", "side": "buy", "size": 1.6, "leverage": 3, "margin_mode": "isolated"}
    document = problem(await agent.ask("/orders", body), 409, "insufficient_margin", "/size", figures=REFUSED)
    assert document["shortfall"] == pytest.approx(2_000)
    assert document["size_max"] == pytest.approx(1.5, rel=1e-6)
    await agent.post("/orders", body | {"size": document["size_max"]})
