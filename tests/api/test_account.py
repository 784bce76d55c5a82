"""The account over HTTP: the worked figures, the names that clients rely on, margin modes, settings."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.service import Agent, Service, problem

if TYPE_CHECKING:
    from collections.abc import Mapping

SETTINGS = "/account/settings"
EMPTY_LEVELS = dict.fromkeys(
    ("gate_utilization", "breach_utilization", "cure_utilization", "stop_utilization", "shortfall_utilization")
)


@pytest.fixture
async def agent(service: Service) -> Agent:
    """Return an agent with nothing, on a market that has prices."""
    await service.prices(BTC=60_000, BTC_PERP=60_000, ETH=3_000, ETH_PERP=3_000)
    return await service.agent()


@pytest.fixture
async def worked(service: Service, agent: Agent) -> Agent:
    """Return the agent of RISK.md's worked account, reached by deposits, an order and a price."""
    await agent.deposit(USDC=20_000, BTC=0.5)
    await agent.order("BTC-PERP", "buy", 1, leverage=3)
    await service.prices(BTC=61_000, BTC_PERP=61_000)
    return agent


def _near(given: Mapping[str, Any], **expected: float) -> None:
    for name, value in expected.items():
        assert float(given[name]) == pytest.approx(value, abs=0.005 if value > 10 else 5e-6), name


async def _patch(agent: Agent, **body: Any) -> dict[str, Any]:
    answer = await agent.send("PATCH", SETTINGS, json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


# --- the worked account


async def test_the_worked_account(worked: Agent) -> None:
    account = await worked.get("/account")
    assert (account["equity"], account["collateral"], account["unrealized_pnl"]) == (48_450, 47_450, 1_000)
    assert (account["gross_notional"], account["liabilities"], account["margin_mode"]) == (61_000, 0, "cross")
    health = account["health"]
    assert health["required_maintenance"] == 9_150
    _near(
        health, required_initial=20_333.33, utilization=0.41968, margin_ratio=0.18885, stress_survival=4.20219,
        headroom=14_561.11, free_margin=28_116.67,
    )  # fmt: skip
    assert (health["zone"], health["alert_level"], health["status"]) == ("GREEN", "OK", "SAFE")
    [position] = account["positions"]
    assert position["size"] == 1
    _near(position, initial_margin=20_333.33)
    assert {name: position[name] for name in ("symbol", "side", "entry_price", "current_price", "leverage")} == {
        "symbol": "BTC-PERP", "side": "long", "entry_price": 60_000, "current_price": 61_000, "leverage": 3,
    }  # fmt: skip
    assert (position["maintenance_margin"], position["unrealized_pnl"]) == (9_150, 1_000)


async def test_a_quote_of_the_same_book_says_the_same(service: Service, worked: Agent) -> None:
    account = await worked.get("/account")
    quote = await service.quote(
        positions=[{"symbol": "BTC-PERP", "side": "long", "size": 1, "entry_price": 60000, "leverage": 3}],
        collateral=[{"asset": "USDC", "amount": 20000}, {"asset": "BTC", "amount": 0.5}],
    )
    assert float(account["equity"]) == quote["equity"]
    for name in ("utilization", "margin_ratio", "stress_survival", "headroom", "required_initial", "health_score"):
        assert float(account["health"][name]) == quote["health"][name], name


async def test_the_names_that_clients_read(worked: Agent) -> None:
    await worked.post("/reservations", {"service": "casino", "amount": 250})
    assert {"usdc_balance", "balances", "reserved", "free", "collateral_value"} <= (
        await worked.get("/wallet/balance")
    ).keys()
    portfolio = await worked.get("/portfolio/positions")
    assert portfolio.keys() == {"positions"}
    trading, casino = portfolio["positions"]
    names = {"id", "service", "symbol", "notional_usd", "margin_reserved", "leverage", "reducible"}
    assert names <= trading.keys() == casino.keys()
    assert (trading["service"], trading["symbol"], trading["notional_usd"]) == ("trading", "BTC-PERP", 61_000)
    assert (trading["leverage"], trading["reducible"]) == (3, True)
    _near(trading, margin_reserved=20_333.33)
    assert (casino["service"], casino["margin_reserved"], casino["reducible"]) == ("casino", 250, False)
    account = await worked.get("/account")
    assert {"id", "collateral", "equity", "unrealized_pnl", "positions", "health"} <= account.keys()
    fields = {"symbol", "side", "size", "entry_price", "current_price", "leverage", "initial_margin"}
    assert fields | {"maintenance_margin", "unrealized_pnl"} <= account["positions"][0].keys()
    assert float(account["health"]["required_initial"]) == pytest.approx(20_583.3333333)
    filled = await worked.order("BTC-PERP", "buy", "0.001", order_type="market", meta={"a": 1})
    assert {"order_id", "status", "fill_price"} <= filled.keys()
    assert filled["status"] == "filled"


async def test_an_empty_account_is_safe(agent: Agent) -> None:
    account = await agent.get("/account")
    assert (account["id"], account["equity"], account["positions"]) == (agent.id, 0, [])
    health = account["health"]
    assert (health["zone"], health["status"], health["utilization"]) == ("GREEN", "SAFE", 0)
    assert health["insolvent"] is False
    assert health["stress_survival"] is None


async def test_an_account_that_lost_everything_says_so(service: Service, agent: Agent) -> None:
    await agent.deposit(USDC=21_000)
    await agent.order("BTC-PERP", "buy", 0.8, leverage=3)
    await service.prices(BTC=30_000, BTC_PERP=30_000)
    account = await agent.get("/account")
    assert account["equity"] == -3_000
    health = account["health"]
    assert (health["zone"], health["alert_level"], health["status"]) == ("RED", "EMERGENCY", "LIQUIDATION")
    assert (health["utilization"], health["margin_ratio"], health["insolvent"]) == (None, None, True)


async def test_a_reply_has_no_number_that_json_lacks(service: Service, agent: Agent) -> None:
    """Ratios of next to nothing, and of nothing at all."""
    await agent.deposit(USDC="0.000000000000000001")
    await service.prices(DUST="0.000000000000000001")
    await agent.order("DUST-PERP", "buy", "0.000000000000000001")
    for path in ("/account", "/wallet/balance", "/portfolio/positions", "/positions", "/orders"):
        answer = await agent.send("GET", path)
        assert answer.status_code == 200
        assert not {"NaN", "Infinity", "inf"} & set(answer.text.replace(",", ":").replace("}", ":").split(":"))


# --- margin modes


async def test_portfolio_margin_of_a_hedge(agent: Agent) -> None:
    await agent.deposit(USDC=20_000)
    await agent.order("BTC-PERP", "buy", "0.2")
    await agent.order("ETH-PERP", "sell", 4)
    cross = (await agent.get("/account"))["health"]
    assert float(cross["required_initial"]) == pytest.approx(0.3 * 24_000)
    await _patch(agent, margin_mode="portfolio")
    account = await agent.get("/account")
    assert account["margin_mode"] == account["health"]["model"] == "portfolio"
    assert float(account["health"]["required_initial"]) < 0.8 * float(cross["required_initial"])
    assert {p["margin_mode"] for p in account["positions"]} == {"portfolio"}
    await _patch(agent, margin_mode="cross")
    assert (await agent.get("/account"))["health"] == cross


async def test_portfolio_margin_asks_for_its_minimum(service: Service, agent: Agent) -> None:
    await agent.deposit(USDC="9999.99")
    refused = await agent.send("PATCH", SETTINGS, json={"margin_mode": "portfolio"})
    document = problem(refused, 409, "equity_below_minimum", "/margin_mode", figures={"shortfall"})
    assert document["shortfall"] == pytest.approx(0.01)
    assert (await agent.get(SETTINGS))["margin_mode"] == "cross"
    await agent.deposit(USDC="0.01")
    assert (await _patch(agent, margin_mode="portfolio"))["margin_mode"] == "portfolio"
    opened = await agent.order("BTC-PERP", "buy", "0.2")
    assert (await agent.get("/account"))["reduce_only"] is False
    await service.prices(BTC=59_000, BTC_PERP=59_000)
    assert (await agent.get("/account"))["reduce_only"] is True
    body = {"symbol": "BTC-PERP", "side": "buy", "size": 0.001}
    problem(await agent.ask("/orders", body), 409, "reduce_only", "/reduce_only")
    await agent.post(f"/positions/{opened['position']['id']}/reduce", {"reduce_pct": 1})
    assert (await agent.get("/account"))["reduce_only"] is True


async def test_isolated_mode_holds_for_new_positions(worked: Agent) -> None:
    assert (await _patch(worked, margin_mode="isolated"))["margin_mode"] == "isolated"
    opened = await worked.order("ETH-PERP", "buy", 1, leverage=3)
    assert opened["position"]["margin_mode"] == "isolated"
    assert opened["position"]["allocated_collateral"] == 1_000
    pooled, isolated = (await worked.get("/account"))["positions"]
    assert (pooled["margin_mode"], isolated["margin_mode"]) == ("cross", "isolated")


async def test_a_mode_that_the_book_can_not_carry_is_refused(service: Service, agent: Agent) -> None:
    """The hedge nets in portfolio mode; per underlying it is past the gate."""
    await agent.deposit(USDC=20_000)
    await _patch(agent, margin_mode="portfolio")
    await agent.order("BTC-PERP", "buy", "0.55")
    await agent.order("ETH-PERP", "sell", 11)
    refused = await agent.send("PATCH", SETTINGS, json={"margin_mode": "cross"})
    document = problem(refused, 409, "insufficient_margin", "/margin_mode", figures={"shortfall"})
    assert document["shortfall"] == pytest.approx(0.3 * 66_000 / 0.8 - 20_000)
    assert (await agent.get("/account"))["margin_mode"] == "portfolio"


# --- settings


async def test_settings_at_first(agent: Agent) -> None:
    assert await agent.get(SETTINGS) == {
        "agent_id": agent.id, "margin_mode": "cross", "execution": "book", "auto_liquidate": True,
        "notice_delay_seconds": 0, "grace_period_seconds": 300, "trailing_stop": None, "drawdown_ladder": "off",
        "target_utilization": None, "thresholds": EMPTY_LEVELS,
        "effective": {
            "target_utilization": Decimal("0.6"), "gate_utilization": Decimal("0.8"),
            "breach_utilization": Decimal("0.85"), "cure_utilization": Decimal("0.8"),
            "stop_utilization": Decimal("0.75"), "shortfall_utilization": Decimal("0.75"),
        },
    }  # fmt: skip


async def test_a_patch_sets_what_it_names(agent: Agent) -> None:
    first = await agent.get(SETTINGS)
    await _patch(agent, grace_period_seconds=0, notice_delay_seconds=86_400, auto_liquidate=False)
    changed = await _patch(agent, trailing_stop=0.1, thresholds={"gate_utilization": 0.7})
    assert changed == (await agent.send("GET", SETTINGS)).json()
    assert (changed["grace_period_seconds"], changed["notice_delay_seconds"]) == (0, 86_400)
    assert (changed["auto_liquidate"], changed["trailing_stop"]) == (False, 0.1)
    assert changed["thresholds"] == EMPTY_LEVELS | {"gate_utilization": 0.7}
    assert changed["effective"]["gate_utilization"] == 0.7
    await _patch(agent, grace_period_seconds=300, notice_delay_seconds=0, auto_liquidate=True)
    await _patch(agent, trailing_stop=None, thresholds={"gate_utilization": None})
    assert await agent.get(SETTINGS) == first


async def test_an_empty_patch_changes_nothing(agent: Agent) -> None:
    before = (await agent.get(SETTINGS), (await agent.get("/account"))["positions"])
    assert await _patch(agent) == (await agent.send("GET", SETTINGS)).json()
    await _patch(agent, thresholds={})
    assert (await agent.get(SETTINGS), (await agent.get("/account"))["positions"]) == before


LEVELS = {
    "gate_utilization": 0.8,
    "breach_utilization": 0.85,
    "cure_utilization": 0.8,
    "stop_utilization": 0.75,
    "shortfall_utilization": 0.75,
}


@pytest.mark.parametrize("name", LEVELS)
async def test_an_own_level_is_never_looser(agent: Agent, name: str) -> None:
    refused = await agent.send("PATCH", SETTINGS, json={"thresholds": {name: LEVELS[name] + 0.001}})
    problem(refused, 422, "looser_than_market", f"/thresholds/{name}")
    changed = await _patch(agent, thresholds={name: LEVELS[name]})
    assert changed["effective"][name] == LEVELS[name]


async def test_the_target_is_never_looser_and_stays_below_the_gate(agent: Agent) -> None:
    refused = await agent.send("PATCH", SETTINGS, json={"target_utilization": 0.61})
    problem(refused, 422, "looser_than_market", "/target_utilization")
    out_of_order = await agent.send("PATCH", SETTINGS, json={"thresholds": {"gate_utilization": 0.5}})
    problem(out_of_order, 422, "out_of_order", "/target_utilization")
    both = {"target_utilization": 0.4, "thresholds": {"gate_utilization": 0.5}}
    assert (await _patch(agent, **both))["effective"]["target_utilization"] == 0.4


async def test_levels_out_of_order_are_refused_where_they_stand(agent: Agent) -> None:
    refused = await agent.send("PATCH", SETTINGS, json={"thresholds": {"cure_utilization": 0.6}})
    problem(refused, 422, "out_of_order", "/thresholds/stop_utilization")


async def test_an_own_gate_holds_for_orders(agent: Agent) -> None:
    await agent.deposit(USDC=30_000)
    await _patch(agent, target_utilization=0.4, thresholds={"gate_utilization": 0.5})
    body = {"symbol": "BTC-PERP", "side": "buy", "size": 1, "leverage": 3}
    document = problem(
        await agent.ask("/orders", body), 409, "insufficient_margin", "/size", figures={"shortfall", "size_max"}
    )
    assert document["shortfall"] == pytest.approx(10_000)
    assert document["size_max"] == pytest.approx(0.75, rel=1e-6)


async def test_execution_changes_while_no_order_is_pending(agent: Agent) -> None:
    await agent.deposit(USDC=10_000)
    changed = await agent.send("PATCH", SETTINGS, json={"execution": "venue"})
    assert (changed.status_code, changed.json()["execution"]) == (200, "venue")
    order = await agent.order("BTC-PERP", "buy", "0.01")
    problem(await agent.send("PATCH", SETTINGS, json={"execution": "book"}), 409, "orders_pending", "/execution")
    assert (await agent.send("PATCH", SETTINGS, json={"execution": "venue"})).status_code == 200  # no change
    assert (await agent.send("PATCH", SETTINGS, json={"grace_period_seconds": 5})).status_code == 200
    await agent.post(f"/orders/{order['order_id']}/cancel")
    assert (await agent.send("PATCH", SETTINGS, json={"execution": "book"})).json()["execution"] == "book"
    assert (await agent.get(SETTINGS))["execution"] == "book"
