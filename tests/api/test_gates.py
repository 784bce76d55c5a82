"""Ways past the gates that were once open, over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.api.service import Agent, problem

if TYPE_CHECKING:
    from tests.api.service import Service


@pytest.fixture
async def alice(service: Service) -> Agent:
    return await service.agent("Alice")


async def test_a_flip_is_no_way_past_a_gate(service: Service, alice: Agent) -> None:
    """What an order opens is judged against the book after what it closes."""
    await service.prices(BTC=60_000)
    await alice.deposit(USDC=10_000)
    await alice.order("BTC-PERP", "buy", 0.44)
    await service.prices(BTC=50_000)
    answer = await alice.ask("/orders", {"symbol": "BTC-PERP", "side": "sell", "size": 0.88})
    refused = problem(answer, 409, "insufficient_margin", figures={"shortfall", "size_max"})
    # equity 5,600: .44 is closed, and .30 x 50,000 x s may be .80 of it
    assert refused["size_max"] == pytest.approx(0.44 + 0.8 * 5_600 / 15_000, rel=1e-6)
    await alice.order("BTC-PERP", "sell", refused["size_max"])


async def test_no_withdrawal_leads_below_the_minimum_of_portfolio_margin(service: Service, alice: Agent) -> None:
    await service.prices(BTC=60_000)
    await alice.deposit(USDC=10_001)
    changed = await alice.send("PATCH", "/account/settings", json={"margin_mode": "portfolio"})
    assert changed.status_code == 200
    await alice.order("BTC-PERP", "buy", 0.05)
    answer = await alice.ask("/wallet/withdrawals", {"asset": "USDC", "amount": 9_000})
    problem(answer, 409, "equity_below_minimum", "/amount")
    await alice.post("/wallet/withdrawals", {"asset": "USDC", "amount": 1})


async def test_debts_stay_backed(service: Service, alice: Agent) -> None:
    """With nothing open utilization says nothing: what is owed still keeps its collateral."""
    await service.prices(BTC=60_000)
    await alice.deposit(BTC=1)
    await alice.order("BTC-PERP", "buy", 0.65)
    await service.prices(BTC=45_000)
    position = (await alice.get("/account"))["positions"][0]["id"]
    await alice.post(f"/positions/{position}/reduce", {"reduce_pct": 1})
    assert (await alice.get("/account"))["liabilities"] == 9_750
    answer = await alice.ask("/wallet/withdrawals", {"asset": "BTC", "amount": 0.75})
    problem(answer, 409, "insufficient_margin", figures={"shortfall"})
    # 9,750 may be .80 of what backs it: .300926 BTC at 45,000 after the haircut
    await alice.post("/wallet/withdrawals", {"asset": "BTC", "amount": 0.69})


async def test_a_debt_is_paid_before_anything_is_free(service: Service, alice: Agent) -> None:
    await service.prices(BTC=60_000)
    await alice.deposit(BTC=1, USDC=1_000)
    held = await alice.post("/reservations", {"service": "casino", "amount": 1_000, "reducible": True})
    await alice.order("BTC-PERP", "buy", 0.1)
    await service.prices(BTC=35_000)
    position = (await alice.get("/account"))["positions"][0]["id"]
    await alice.post(f"/positions/{position}/reduce", {"reduce_pct": 1})
    assert (await alice.get("/wallet/balance"))["owed"] == 2_500
    await alice.post(f"/reservations/{held['id']}/release", {})
    balance = await alice.get("/wallet/balance")
    assert (balance["free"], balance["owed"], balance["reserved"]) == (0, 1_500, 0)


async def test_closing_in_parts_gives_no_more_than_closing_at_once(service: Service) -> None:
    left = []
    for parts in (1, 20):
        agent = await service.agent(f"{parts} parts")
        await service.prices(BTC=60_000)
        await agent.deposit(USDC=18_000)
        await agent.order("BTC-PERP", "buy", 1, margin_mode="isolated")
        await service.prices(BTC=30_000)
        for _ in range(parts):
            order = {"symbol": "BTC-PERP", "side": "sell", "size": 1 / parts, "reduce_only": True}
            await agent.post("/orders", order)
        left.append((await agent.get("/wallet/balance"))["usdc_balance"])
    assert left == [0, 0]


async def test_a_profit_that_is_not_paid_backs_no_withdrawal(service: Service, alice: Agent) -> None:
    await service.prices(BTC=60_000)
    await alice.deposit(USDC=18_000)
    position = (await alice.order("BTC-PERP", "buy", 1, margin_mode="isolated"))["position"]["id"]
    await service.prices(BTC=90_000)
    answer = await alice.ask(f"/positions/{position}/collateral", {"amount": -18_000})
    problem(answer, 409, "insufficient_margin", figures={"shortfall"})


async def test_adding_to_an_isolated_position_covers_its_loss(service: Service, alice: Agent) -> None:
    await service.prices(BTC=60_000)
    await alice.deposit(USDC=60_000)
    await alice.order("BTC-PERP", "buy", 1, margin_mode="isolated")
    await service.prices(BTC=40_000)
    added = await alice.order("BTC-PERP", "buy", 0.1)
    # 1.1 x 40,000 x .30 and the loss of 20,000 are covered
    assert added["position"]["allocated_collateral"] == 33_200


async def test_what_if_judges_as_an_order_is_judged(service: Service, alice: Agent) -> None:
    await service.prices(BTC=60_000, ETH=3_000)
    await alice.deposit(BTC=1)
    row = {"symbol": "ETH-PERP", "side": "long", "size": 1, "margin_mode": "isolated"}
    foretold = await alice.post("/quotes/what-if", {"add": [row]})
    order = {"symbol": "ETH-PERP", "side": "buy", "size": 1, "margin_mode": "isolated"}
    refused = problem(await alice.ask("/orders", order), 409, "insufficient_margin", figures={"shortfall", "size_max"})
    assert (foretold["accepted"], foretold["reason"]["code"]) == (False, refused["code"])
    assert float(foretold["reason"]["shortfall"]) == refused["shortfall"]
    await alice.order("BTC-PERP", "buy", 0.5)
    # a short on top of a long nets, as an order does
    netted = await alice.post("/quotes/what-if", {"add": [{"symbol": "BTC-PERP", "side": "short", "size": 0.2}]})
    await alice.order("BTC-PERP", "sell", 0.2)
    health = (await alice.get("/account"))["health"]
    assert netted["after"]["health"]["required_initial"] == health["required_initial"]
    assert netted["after"]["health"]["gross_leverage"] == health["gross_leverage"]


async def test_what_if_of_a_stored_book_is_work_too(service: Service) -> None:
    bounded = await service.agent("many")
    names = [f"C{i}" for i in range(60)]
    await service.prices(**dict.fromkeys(names, 1))
    await bounded.deposit(USDC=100_000)
    for name in names:
        await bounded.order(f"{name}-PERP", "buy", 1)
    assert (await bounded.send("PATCH", "/account/settings", json={"margin_mode": "portfolio"})).status_code == 200
    service.app.state.parts.settings.__dict__["quote_milliseconds_max"] = 100.0
    problem(await bounded.ask("/quotes/what-if", {}), 422, "too_much_work")
