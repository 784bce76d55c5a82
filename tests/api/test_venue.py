"""Orders at a venue over HTTP: booked, filled, cancelled, refused by name; and what is asked for in a liquidation."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from app.server import worker_of
from tests.api.service import Agent, Service, problem, running

if TYPE_CHECKING:
    from sqlalchemy import URL

FILL = {"fill_id": "t-1", "size": "0.2", "price": 60_100, "fee": 1.5}


@pytest.fixture
async def agent(service: Service) -> Agent:
    """Return an agent that trades at a venue, with 30,000 USDC."""
    await service.prices(BTC=60_000, ETH=3_000)
    made = await service.agent("Vera")
    await made.deposit(USDC=30_000)
    changed = await made.send("PATCH", "/account/settings", json={"execution": "venue"})
    assert changed.json()["execution"] == "venue"
    return made


async def _order(agent: Agent, side: str = "buy", size: Any = 0.5, **more: Any) -> str:
    order_id: str = (await agent.order("BTC-PERP", side, size, leverage=3, **more))["order_id"]
    return order_id


async def _metric(service: Service, line: str) -> float:
    text = (await service.get("/metrics", key="")).text
    return next((float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line)), 0.0)


async def test_an_order_from_pending_to_filled(service: Service, agent: Agent) -> None:
    booked = await agent.order("BTC-PERP", "buy", 0.5, leverage=3, meta={"strategy": "x"})
    order_id = booked["order_id"]
    assert (booked["status"], booked["fill_price"], booked["filled_size"]) == ("pending", None, 0)
    assert (booked["position"], booked["meta"]) == (None, {"strategy": "x"})
    assert await _metric(service, 'primerisk_orders_total{result="pending"}') == 1
    [waiting] = (await agent.get("/account"))["pending_orders"]
    assert (waiting["order_id"], waiting["remaining"]) == (order_id, Decimal("0.5"))
    assert [o["id"] for o in (await agent.get("/orders?pending=true"))["orders"]] == [order_id]
    reply = await agent.post(f"/orders/{order_id}/fills", FILL)
    assert reply == {
        "id": "t-1", "fill_id": "t-1", "order_id": order_id, "size": Decimal("0.2"), "price": 60_100,
        "fee": Decimal("1.5"), "realized_pnl": 0, "position_id": reply["position_id"], "filled_size": Decimal("0.2"),
        "status": "partially_filled", "recorded_at": reply["recorded_at"],
    }  # fmt: skip
    await agent.post(f"/orders/{order_id}/fills", {"fill_id": "t-2", "size": 0.3, "price": "59900"})
    order = await agent.get(f"/orders/{order_id}")
    assert (order["status"], order["fees"], order["fill_price"]) == ("filled", Decimal("1.5"), 59_980)
    assert [f["fill_id"] for f in order["fills"]] == ["t-1", "t-2"]
    assert order["fills"][0] == reply
    [position] = (await agent.get("/account"))["positions"]
    assert (position["id"], position["size"]) == (reply["position_id"], Decimal("0.5"))
    kinds = [e["kind"] for e in (await agent.get("/wallet/ledger"))["entries"]]
    assert kinds == ["fee", "deposit"]
    assert (await agent.get("/orders?pending=true"))["orders"] == []


async def test_a_fill_again_is_answered_alike_to_the_byte(agent: Agent) -> None:
    path = f"/orders/{await _order(agent)}/fills"
    first = await agent.ask(path, FILL)
    await agent.post(path, FILL | {"fill_id": "t-2"})
    again = await agent.ask(path, {"price": "60100.0", "size": 0.2, "fee": "1.50", "fill_id": "t-1", "confirm": True})
    assert (again.status_code, again.content) == (200, first.content)
    for name, value in (("size", 0.1), ("price", 60_000), ("fee", None)):
        problem(await agent.ask(path, FILL | {name: value}), 409, "fill_conflict", f"/{name}")
    keyed = [await agent.ask(path, FILL | {"fill_id": "t-3", "size": 0.1}, headers={"Idempotency-Key": "k"})] * 2
    assert len({answer.content for answer in keyed}) == 1
    assert [p["size"] for p in (await agent.get("/account"))["positions"]] == [Decimal("0.5")]


async def test_refusals_by_name(agent: Agent) -> None:
    order_id = await _order(agent)
    path = f"/orders/{order_id}/fills"
    problem(await agent.ask(path, FILL | {"size": 0.6}), 409, "fill_above_order", "/size")
    problem(await agent.ask(path, FILL | {"price": 6_010}), 409, "price_off_mark", "/price")
    problem(await agent.ask("/orders/ord_0/fills", FILL), 404, "order_not_found")
    problem(await agent.ask("/orders/ord_0/cancel"), 404, "order_not_found")
    await agent.post(path, FILL | {"size": 0.5, "price": 6_010, "confirm": True})
    problem(await agent.ask(f"/orders/{order_id}/cancel"), 409, "order_closed", "/status")
    reduce = await _order(agent, "sell", 0.5, reduce_only=True)
    position = (await agent.get("/account"))["positions"][0]["id"]
    problem(await agent.ask(f"/positions/{position}/reduce", {"reduce_pct": 0.5}), 409, "nothing_to_reduce")
    cancelled = await agent.post(f"/orders/{reduce}/cancel", {"reason": "no longer"})
    assert (cancelled["status"], cancelled["filled_size"]) == ("cancelled", 0)
    assert await agent.post(f"/orders/{reduce}/cancel") == cancelled
    reduced = await agent.post(f"/positions/{position}/reduce", {"reduce_pct": 0.5, "reason": "risk"})
    assert (reduced["status"], reduced["size"], reduced["reduce_only"]) == ("pending", Decimal("0.25"), True)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("fill_id", "", "invalid_value"), ("fill_id", "x" * 101, "invalid_value"), ("fill_id", "a\0b", "invalid_value"),
        ("fill_id", 7, "invalid_value"), ("fill_id", None, "invalid_value"), ("size", 0, "not_positive"),
        ("size", -1, "not_positive"), ("size", "NaN", "invalid_value"), ("size", "1e400", "number_out_of_range"),
        ("size", "1e-19", "too_many_decimals"), ("price", 0, "not_positive"), ("price", "Infinity", "invalid_value"),
        ("price", 1e15, "number_out_of_range"), ("price", [60_000], "invalid_value"), ("fee", -1, "not_positive"),
        ("fee", "0.0000001", "too_many_decimals"), ("fee", 1e15, "number_out_of_range"),
        ("fee", True, "invalid_value"), ("confirm", "yes", "invalid_value"), ("note", "x", "unknown_field"),
    ],
)  # fmt: skip
async def test_hostile_fills(agent: Agent, field: str, value: Any, code: str) -> None:
    order_id = await _order(agent)
    before = (await agent.get("/account"))["balances"]
    problem(await agent.ask(f"/orders/{order_id}/fills", FILL | {field: value}), 422, code, f"/{field}")
    order = await agent.get(f"/orders/{order_id}")
    assert (order["status"], order["fills"]) == ("pending", [])
    assert (await agent.get("/account"))["balances"] == before


async def test_more_hostile_bodies(agent: Agent) -> None:
    path = f"/orders/{await _order(agent)}/fills"
    for raw, status, code in (
        (b"", 400, "not_json"),
        (b"[]", 422, "invalid_value"),
        (b"{}", 422, "missing_field"),
        (b'{"fill_id":"a","size":NaN,"price":60000}', 422, "not_finite"),
        (b'{"fill_id":"a","size":0.1,"size":0.2,"price":60000}', 422, "duplicate_key"),
        (b'{"fill_id":"a","size":0.1,"price":' + b"9" * 100_000 + b"}", 422, "number_out_of_range"),
        (b'{"fill_id":"a","size":0.1}', 422, "missing_field"),
    ):
        problem(await agent.send("POST", path, content=raw), status, code)
    long = {"fill_id": "\u00e9" * 100, "size": "0.1", "price": "60000.000000000000000001"}
    assert (await agent.post(path, long))["price"] == Decimal("60000.000000000000000001")


async def test_what_is_pending_counts_in_a_what_if(agent: Agent) -> None:
    """30,000 carry 1.2 coins at leverage 3."""
    add = {"add": [{"symbol": "BTC-PERP", "side": "long", "size": 0.8, "leverage": 3}]}
    assert (await agent.post("/quotes/what-if", add))["accepted"] is True
    order_id = await _order(agent)
    reply = await agent.post("/quotes/what-if", add)
    assert (reply["accepted"], reply["reason"]["code"]) == (False, "insufficient_margin")
    assert reply["before"]["health"]["required_initial"] == 0
    problem(
        await agent.ask("/orders", {"symbol": "BTC-PERP", "side": "buy", "size": 0.8, "leverage": 3}),
        409,
        "insufficient_margin",
        figures={"shortfall", "size_max"},
    )
    await agent.post(f"/orders/{order_id}/cancel")
    assert (await agent.post("/quotes/what-if", add))["accepted"] is True


async def test_a_liquidation_that_its_venue_does_not_answer(database_url: URL) -> None:
    settings = {"worker_poll_seconds": 0.05, "liquidation_venue_seconds": 0.2, "liquidation_venue_attempts": 2}
    async with running(database_url, **settings) as service:
        worker = asyncio.create_task(worker_of(service.app.state.parts).run())
        await service.prices(BTC=60_000)
        vera = await service.agent("Vera")
        await vera.deposit(USDC=20_000)
        changed = {"execution": "venue", "grace_period_seconds": 0}
        assert (await vera.send("PATCH", "/account/settings", json=changed)).status_code == 200
        order_id = await _order(vera, size=0.8)
        await vera.post(f"/orders/{order_id}/fills", {"fill_id": "a", "size": 0.8, "price": 60_000})
        await service.prices(BTC=57_000)
        async with asyncio.timeout(10):
            while not await _metric(service, "primerisk_liquidations_escalated_total"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        [call] = (await vera.get("/margin-calls"))["margin_calls"]
        assert call["state"] == "liquidating"
        assert call["attempts"] >= 3
        assert (await vera.get("/account"))["reduce_only"] is True
        [asked] = (await vera.get("/orders?pending=true"))["orders"]
        assert asked["margin_call_id"] == call["id"]
        problem(await vera.ask(f"/orders/{asked['id']}/cancel"), 409, "liquidation_order", "/id")
        fill = {"fill_id": "b", "size": str(asked["size"]), "price": 57_000}
        await vera.post(f"/orders/{asked['id']}/fills", fill)
        async with asyncio.timeout(10):
            while (await vera.get(f"/margin-calls/{call['id']}"))["state"] != "completed":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        told = (await vera.get(f"/margin-calls/{call['id']}"))["events"]
        asks = [e["data"] for e in told if e["type"] == "liquidation.requested"]
        assert [(a["attempt"], a["escalated"]) for a in asks] == [(n, n > 2) for n in range(1, len(asks) + 1)]
        assert await _metric(service, 'primerisk_margin_events_total{event="liquidation.executed"}') == 1
        worker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await worker
