"""Plans over HTTP: worked ones, applied through orders, for books of every kind; hostile bodies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.api.bodies import GREEKS, LINEAR, OPTION, WORKED
from tests.api.service import Agent, problem

if TYPE_CHECKING:
    from tests.api.service import Service

DELEVERAGE, DRAWDOWN = "/api/quotes/deleverage", "/api/quotes/drawdown"
SHARED = pytest.mark.asyncio(loop_scope="module")


def linear(symbol: str, side: str, size: float, mark: float, **more: Any) -> dict[str, Any]:
    return {"symbol": symbol, "side": side, "size": size, "mark_price": mark, **more}


THREE: dict[str, Any] = {
    "positions": [
        linear("BTC-PERP", "long", 1, 50_000),
        linear("ETH-PERP", "long", 8, 2_500),
        linear("SOL-PERP", "short", 100, 100),
    ],
    "collateral": [{"asset": "USDC", "amount": 30_000}],
}
"""80,000 of notional at .30: 24,000 of 30,000."""


async def _plan(service: Service, **body: Any) -> dict[str, Any]:
    answer = await service.post(DELEVERAGE, json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


def _orders(reply: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(o["symbol"], o["side"], pytest.approx(o["size"]), o["is_whole"]) for o in reply["orders"]]


@SHARED
async def test_smallest_first_by_hand(shared: Service) -> None:
    """24,000 of 30,000 down to 16,500: 7,500 less of margin is 25,000 of notional, SOL's 10,000 and 15,000 of ETH."""
    reply = await _plan(shared, **THREE)
    assert _orders(reply) == [("SOL-PERP", "buy", 100, True), ("ETH-PERP", "sell", 6, False)]
    assert reply["dollars_traded"] == pytest.approx(25_000)
    assert reply["margin_freed"] == pytest.approx(7_500)
    assert (reply["before"]["utilization"], reply["after"]["utilization"]) == pytest.approx((0.8, 0.55))
    assert (reply["policy"], reply["target"], reply["reached"]) == ("smallest_first", 0.55, True)
    assert reply["not_modelled"]


@SHARED
async def test_keeping_the_largest(shared: Service) -> None:
    reply = await _plan(shared, **THREE, policy="keep_top_n", n=1)
    assert _orders(reply) == [("SOL-PERP", "buy", 100, True), ("ETH-PERP", "sell", 8, True)]
    assert (reply["after"]["required_initial"], reply["n"], reply["target"]) == (15_000, 1, None)


@SHARED
async def test_the_cheapest_cure_goes_for_the_margin(shared: Service) -> None:
    """A position at leverage 1 frees its whole notional: 7,500 dollars of ETH, where smallest first trades more."""
    dear = [THREE["positions"][0], linear("ETH-PERP", "long", 8, 2_500, leverage=1), THREE["positions"][2]]
    body = {"positions": dear, "collateral": [{"asset": "USDC", "amount": 50_000}]}  # 15,000 + 20,000 + 3,000
    reply = await _plan(shared, **body, policy="cheapest_cure", target=0.61)
    assert _orders(reply) == [("ETH-PERP", "sell", 3, False)]
    assert reply["dollars_traded"] == pytest.approx(7_500, rel=1e-6)
    assert reply["after"]["utilization"] <= 0.61
    first = await _plan(shared, **body, policy="smallest_first", target=0.61)
    assert first["dollars_traded"] > reply["dollars_traded"]


@SHARED
async def test_losses_are_paid_and_two_positions_in_a_symbol_stay_two(shared: Service) -> None:
    """What is left is the request's own portfolio with the orders filled: its margin quote says the same."""
    rows = [
        linear("BTC-PERP", "long", 0.5, 50_000, entry_price=60_000),
        linear("BTC-PERP", "short", 0.2, 50_100, entry_price=45_000),
        linear("ETH-PERP", "long", 8, 2_500, entry_price=2_000, contract_size=2),
    ]
    wallet = [{"asset": "USDC", "amount": 12_000, "lent": 1_000}, {"asset": "BTC", "amount": 0.1, "price": 50_050}]
    body = {"positions": rows, "collateral": wallet, "reservations": [{"service": "casino", "amount": 300}]}
    quote = await shared.quote(**body)
    reply = await _plan(shared, **body, policy="keep_top_n", n=1)
    for name in ("equity", "required_initial", "required_maintenance", "utilization"):
        assert reply["before"][name] == pytest.approx(quote["health"][name], rel=1e-12), name
    assert [(o["position_id"], o["side"]) for o in reply["orders"]] == [("1", "buy"), ("0", "sell")]
    # 0.5 x 10,000 lost, 0.2 x 5,100 lost
    left = {
        **body,
        "positions": rows[2:],
        "collateral": [{"asset": "USDC", "amount": 12_000 - 5_000 - 1_020, "lent": 1_000}, wallet[1]],
    }
    then = await shared.quote(**left)
    for name in ("equity", "required_initial", "required_maintenance", "utilization"):
        assert reply["after"][name] == pytest.approx(then["health"][name], rel=1e-12), name


async def _account(service: Service) -> Agent:
    await service.prices(BTC=50_000, ETH=2_500, SOL=100)
    alice = await service.agent()
    await alice.deposit(USDC=30_000)
    for symbol, side, size in (("BTC-PERP", "buy", 1), ("ETH-PERP", "buy", 8), ("SOL-PERP", "sell", 90)):
        await alice.order(symbol, side, size)
    await service.prices(BTC=48_000, ETH=2_450, SOL=103)
    return alice


@pytest.mark.parametrize("policy", ["smallest_first", "keep_top_n", "cheapest_cure"])
async def test_a_plan_that_is_ordered_leads_where_it_says(service: Service, policy: str) -> None:
    alice = await _account(service)
    plan = await alice.post("/quotes/deleverage", {"book": "account", "policy": policy})
    assert plan["book"] == "account"
    before = await alice.get("/account")
    assert plan["before"]["equity"] == before["health"]["equity"]
    for order in plan["orders"]:
        assert order.pop("position_id")
        body = {name: order[name] for name in ("symbol", "side", "size", "reduce_only")}
        await alice.post("/orders", {**body, "size": str(body["size"])})
    after = (await alice.get("/account"))["health"]
    for name in ("equity", "required_initial", "required_maintenance", "utilization"):
        assert float(after[name]) == pytest.approx(float(plan["after"][name]), rel=1e-12), name
    if policy != "keep_top_n":
        assert float(after["utilization"]) == pytest.approx(0.55, abs=1e-6)


async def test_an_admin_names_the_account(service: Service) -> None:
    alice = await _account(service)
    body = {"book": "account", "policy": "keep_top_n", "n": 1}
    own = await alice.post("/quotes/deleverage", body)
    named = await service.post(f"{DELEVERAGE}?agent_id={alice.id}", key="admin", json=body)
    assert named.status_code == 200
    assert [o["symbol"] for o in named.json()["orders"]] == [o["symbol"] for o in own["orders"]]
    problem(await service.post(DELEVERAGE, key="admin", json=body), 403, "agent_key_needed")
    nobody = await service.post(f"{DELEVERAGE}?agent_id=agent_0", key="admin", json=body)
    problem(nobody, 404, "agent_not_found")


@SHARED
async def test_too_much_work_is_refused_before_it_is_done(shared: Service) -> None:
    rows = [linear(f"A{i}-PERP", "long", 1, 100) for i in range(40)]
    body = {"positions": rows, "collateral": [{"asset": "USDC", "amount": 1_250}]}
    portfolio = body | {"settings": {"margin_mode": "portfolio"}, "policy": "cheapest_cure"}
    problem(await shared.post(DELEVERAGE, json=portfolio), 422, "too_much_work", "/policy")
    many = {"positions": [linear(f"A{i % 9}-PERP", "long", 1, 100) for i in range(3_000)], "policy": "smallest_first"}
    problem(await shared.post(DELEVERAGE, json=many), 422, "too_much_work", "/policy")
    assert (await _plan(shared, **body, policy="keep_top_n", n=0))["orders"]


@SHARED
async def test_the_ladder_by_hand(shared: Service) -> None:
    """Equity 30,000 from 34,000 is .1176 down: a quarter of 80,000 goes, in proportion, and a put on BTC is advised."""
    answer = await shared.post(DRAWDOWN, json=THREE | {"peak_equity": 34_000})
    reply = answer.json()
    assert answer.status_code == 200
    assert (reply["rung"], reply["drawdown"], reply["kept_share"]) == ("cut", pytest.approx(4 / 34), 0.75)
    plan = reply["plan"]
    assert [(o["symbol"], o["side"], o["size"]) for o in plan["orders"]] == [
        ("BTC-PERP", "sell", 0.25),
        ("ETH-PERP", "sell", 2),
        ("SOL-PERP", "buy", 25),
    ]
    assert (plan["gross"], plan["gross_target"]) == (80_000, 60_000)
    assert plan["gross_after"] == pytest.approx(60_000)
    assert plan["after"]["utilization"] == pytest.approx(0.6)
    assert [(h["kind"], h["underlying"], h["notional"]) for h in plan["hedges"]] == [("put", "BTC", 37_500)]
    done = (await shared.post(DRAWDOWN, json=THREE | {"peak_equity": 34_000, "applied": 2})).json()
    assert done["plan"]["orders"] == []


@pytest.mark.parametrize(
    ("equity", "rung", "kept"),
    [(100, "none", 1), (120, "none", 1), (95, "trim", 0.9), (92, "cut", 0.75), (88, "halve", 0.5), (-5, None, 0.5)],
)
@SHARED
async def test_a_rung_of_equity_alone(shared: Service, equity: float, rung: str | None, kept: float) -> None:
    reply = (await shared.post(DRAWDOWN, json={"peak_equity": 100, "equity": equity})).json()
    assert (reply["rung"], reply["kept_share"]) == (rung or "minimum_viable", kept)
    assert reply["opens_nothing"] is (rung is None)
    assert reply["plan"] is None


async def test_the_ladder_of_the_account(service: Service) -> None:
    alice = await _account(service)
    equity = float((await alice.get("/account"))["health"]["equity"])
    reply = await alice.post("/quotes/drawdown", {"book": "account", "peak_equity": equity / 0.8})
    assert reply["rung"] == "minimum_viable"
    assert float(reply["plan"]["gross_after"]) == pytest.approx(equity, rel=1e-6)
    for order in reply["plan"]["orders"]:
        await alice.post("/orders", {k: str(v) if k == "size" else v for k, v in order.items() if k != "position_id"})
    after = (await alice.get("/account"))["health"]
    assert float(after["utilization"]) == pytest.approx(float(reply["plan"]["after"]["utilization"]), rel=1e-9)


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({}, "missing", "/positions"),
        (WORKED | {"policy": "panic"}, "invalid_value", "/policy"),
        (WORKED | {"target": 0}, "invalid_value", "/target"),
        (WORKED | {"n": 2}, "not_allowed", "/n"),
        (WORKED | {"policy": "keep_top_n", "target": 0.5}, "not_allowed", "/target"),
        (WORKED | {"policy": "keep_top_n", "n": -1}, "invalid_value", "/n"),
        ({"positions": [LINEAR, OPTION]}, "linear_only", "/positions/1/strike"),
        ({"positions": [GREEKS]}, "linear_only", "/positions/0/notional"),
        (
            {"positions": [LINEAR | {"margin_mode": "isolated"}], "collateral": []},
            "allocated_above_collateral",
            "/collateral",
        ),
        ({"book": "account", "settings": {}}, "not_with_account", "/settings"),
        (WORKED | {"scenarios": "wide"}, "unknown_field", "/scenarios"),
    ],
)
@SHARED
async def test_hostile_bodies(shared: Service, body: dict[str, Any], code: str, pointer: str) -> None:
    problem(await shared.post(DELEVERAGE, json=body), 422, code, pointer)


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({}, "missing_field", "/peak_equity"),
        ({"peak_equity": 100}, "missing", "/equity"),
        ({"peak_equity": 0, "equity": 1}, "invalid_value", "/peak_equity"),
        ({"peak_equity": 100, "equity": 1, "positions": []}, "not_allowed", "/equity"),
        ({"peak_equity": 100, "equity": 1, "applied": 5}, "invalid_value", "/applied"),
        ({"peak_equity": 100, "positions": [OPTION]}, "linear_only", "/positions/0/strike"),
    ],
)
@SHARED
async def test_hostile_drawdowns(shared: Service, body: dict[str, Any], code: str, pointer: str | None) -> None:
    problem(await shared.post(DRAWDOWN, json=body), 422, code, pointer)
