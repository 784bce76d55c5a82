"""Stress over HTTP: worked numbers, the reply held against margin quotes at the shocked market, hostile bodies."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.bodies import EVERYTHING, LINEAR, OPTION, WORKED
from tests.api.service import problem, running

if TYPE_CHECKING:
    from sqlalchemy import URL

    from tests.api.service import Service

STRESS = "/api/quotes/stress"
SHARED = pytest.mark.asyncio(loop_scope="module")


async def _stress(service: Service, **body: Any) -> dict[str, Any]:
    answer = await service.post(STRESS, json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


@SHARED
async def test_the_worked_account_survives_a_fall_of_a_fifth(shared: Service) -> None:
    reply = await _stress(shared, **WORKED)
    (result,) = reply["results"]
    down, up = result["scenarios"]
    assert down["survival"] == pytest.approx(4.20219, abs=5e-6)
    assert result["survival"] == down["survival"] < up["survival"]
    assert result["worst"]["index"] == 0
    # 48,450 less a fifth of 61,000 and of .45 x 61,000
    assert down["equity"] == pytest.approx(48_450 - 0.2 * 61_000 * 1.45)
    assert down["pnl"] == pytest.approx(-12_200)
    assert result["before"]["equity"] == 48_450
    assert (down["zone"], down["status"], down["breached"], down["liquidated"]) == ("GREEN", "SAFE", False, False)
    assert reply["parameters"]["version"] == 1
    assert reply["prices"]["BTC"] == {"value": 61_000, "source": "position", "as_of": None}
    assert reply["not_modelled"]


@SHARED
async def test_collateral_that_is_sold_at_a_loss(shared: Service) -> None:
    """Half a coin at 50,000 and 10,000 USDC, a fall of 30 %, haircut .10, slippage .03: 32,500 becomes 25,225."""
    body = {
        "positions": [],
        "collateral": [{"asset": "BTC", "amount": 0.5, "price": 50_000}, {"asset": "USDC", "amount": 10_000}],
        "scenarios": [{"price_move": -0.3, "name": "a fall"}],
        "feedback": {"adv": {"BTC": 1e9}, "slippage": 0.03},
    }
    reply = await _stress(shared, **body)
    fed = reply["results"][0]["feedback"]
    step = fed["collateral_step"]
    assert (step["before"], step["after"], step["drop"]) == pytest.approx((32_500, 25_225, 7_275))
    assert step["drop_share"] == pytest.approx(0.224, abs=5e-4)
    assert fed["outcome"] == "stable"  # nothing is leveraged, so that nobody calls
    assert reply["scenarios"][0]["name"] == "a fall"


@SHARED
async def test_each_scenario_is_a_margin_quote_at_its_market(shared: Service) -> None:
    """The shocked market as a request of its own: the same equity, margins and scales."""
    short = {"symbol": "ETH-PERP", "side": "short", "size": 9, "entry_price": 2_900, "mark_price": 2_840}
    body = {**WORKED, "positions": [LINEAR, short], "settings": {"margin_mode": "portfolio"}}
    shocks = [{"BTC": -0.25, "ETH": -0.1}, {"BTC": 0.3, "ETH": 0.45}]
    reply = await _stress(shared, **body, scenarios=[{"shocks": own} for own in shocks])
    for own, row in zip(shocks, reply["results"][0]["scenarios"], strict=True):
        moved = [
            LINEAR | {"mark_price": 61_000 * (1 + own["BTC"])},
            short | {"mark_price": 2_840 * (1 + own["ETH"])},
        ]
        quote = await shared.quote(**(body | {"positions": moved}))
        health = quote["health"]
        for name in ("required_initial", "required_maintenance", "utilization", "margin_ratio", "equity"):
            assert row[name] == pytest.approx(health[name], rel=1e-9), name
        for name in ("zone", "alert_level", "status"):
            assert row[name] == health[name]


@SHARED
async def test_reverse_sits_on_the_boundary(shared: Service) -> None:
    reverse = (await _stress(shared, **WORKED, reverse=True))["results"][0]["reverse"]
    assert 61_000 * (1 + reverse["common"]["liquidation"]["down"]) == pytest.approx(30_769.23, abs=0.005)
    assert 61_000 * (1 + reverse["common"]["breach"]["down"]) == pytest.approx(37_812.79, abs=0.005)
    assert reverse["by_asset"]["BTC"] == reverse["common"]
    for boundary, figure, level in (("breach", "utilization", 0.85), ("liquidation", "margin_ratio", 1.0)):
        mark = 61_000 * (1 + reverse["common"][boundary]["down"])
        quote = await shared.quote(**(WORKED | {"positions": [LINEAR | {"mark_price": mark}]}))
        # surpluses below 1e-13 of the largest on the search grid, at a thousandfold price, count as none
        assert quote["health"][figure] == pytest.approx(level, rel=1e-8)
    mark = 61_000 * (1 + reverse["common"]["zero_equity"]["down"])
    quote = await shared.quote(**(WORKED | {"positions": [LINEAR | {"mark_price": mark}]}))
    assert quote["equity"] == pytest.approx(0, abs=1e-4)
    assert reverse["common"]["breach"]["up"] is None


@SHARED
async def test_a_regime_multiplies_portfolio_margin_and_has_its_matrix(shared: Service) -> None:
    body = {**WORKED, "positions": [LINEAR, LINEAR | {"symbol": "ETH-PERP", "mark_price": 3_000, "entry_price": 3_000}]}
    names = ["normal", "sideways", "sell_off", "liquidity_crisis"]
    portfolio = {"settings": {"margin_mode": "portfolio"}}
    normal, *others = (await _stress(shared, **body, **portfolio, regimes=names))["results"]
    assert [r["regime"] for r in (normal, *others)] == names
    for result, multiple in zip(others, (0.85, 1.5, 2.0), strict=True):
        assert result["margin_multiplier"] == multiple
        for row, base in zip(result["scenarios"], normal["scenarios"], strict=True):
            assert row["required_initial"] == pytest.approx(multiple * base["required_initial"])
            assert row["equity"] == base["equity"]
    shown = [r["correlation"]["pairs"]["BTC:ETH"] for r in (normal, *others)]
    assert shown == pytest.approx([0.80, 0.675, 0.935, 0.97])
    x, y = 61_000 * 1.45 * 0.65, 3_000 * 0.80
    expected = ((x * x + y * y + 2 * 0.8 * x * y) / 365) ** 0.5
    assert normal["correlation"]["daily_deviation"] == pytest.approx(expected)


@SHARED
async def test_the_loop_sells_until_there_is_no_call(shared: Service) -> None:
    body = {
        "positions": [LINEAR | {"leverage": None}],
        "collateral": [{"asset": "BTC", "amount": 0.5}, {"asset": "USDC", "amount": 6_000}],
        "scenarios": [{"price_move": -0.2}],
    }
    answer = await shared.post(STRESS, json=body | {"feedback": {}})
    assert "BTC" in problem(answer, 422, "missing_adv", "/feedback/adv/BTC")["detail"]
    deep = (await _stress(shared, **body, feedback={"adv": {"BTC": 1e12}}))["results"][0]["feedback"]
    assert deep["outcome"] == "stable"
    assert deep["rounds"][0]["call"] is True
    assert deep["rounds"][-1]["call"] is False
    assert deep["rounds"][-1]["utilization"] == pytest.approx(0.75, abs=0.01)
    thin = (await _stress(shared, **body, feedback={"adv": {"BTC": 50_000}, "impact": 0.5}))["results"][0]["feedback"]
    assert thin["rounds"][-1]["equity"] < deep["rounds"][-1]["equity"]
    first = thin["rounds"][0]
    assert first["impact"]["BTC"] == pytest.approx(-0.5 * (first["sold"]["BTC"] / 50_000) ** 0.5)


async def _closes(service: Service, **series: list[float]) -> None:
    rows = [
        {"asset": asset, "date": str(date(2024, 1, 1) + timedelta(days=k)), "close": close}
        for asset, closes in series.items()
        for k, close in enumerate(closes)
    ]
    answer = await service.post("/api/market/history", key="market", json={"closes": rows, "confirm": True})
    assert answer.status_code == 200, answer.text


async def test_the_worst_days_and_weeks_of_the_past(service: Service) -> None:
    closes = [100.0 + k % 3 for k in range(40)]
    closes[20:] = [0.8 * close for close in closes[20:]]
    await _closes(service, BTC=closes)
    reply = await _stress(service, **WORKED, replay={"window_days": 1, "count": 2})
    first, second = reply["scenarios"]
    assert (first["from"], first["to"]) == ("2024-01-21", "2024-01-21")
    fall = closes[20] / closes[19] - 1
    assert first["moves"]["BTC"] == pytest.approx(fall)
    row = reply["results"][0]["scenarios"][0]
    assert row["equity"] == pytest.approx(48_450 + 61_000 * 1.45 * fall)
    assert row["equity"] < reply["results"][0]["scenarios"][1]["equity"]
    assert second["moves"]["BTC"] == pytest.approx(100 / 102 - 1)
    shown, age = reply["history"], datetime.fromisoformat(reply["as_of"]).date() - date(2024, 2, 9)
    assert shown.pop("age_days") == age.days
    assert shown == {"version": 1, "from": "2024-01-02", "to": "2024-02-09", "days": 39}
    week = (await _stress(service, **WORKED, replay={"window_days": 7, "count": 1}))["scenarios"][0]
    assert date.fromisoformat(week["to"]) - date.fromisoformat(week["from"]) == timedelta(days=6)
    both = await _stress(service, **WORKED, replay={}, scenarios="twenty_percent")
    assert [row["source"] for row in both["scenarios"][:3]] == ["twenty_percent", "twenty_percent", "replay"]


async def test_the_stored_account_moves_with_what_it_has_reserved(service: Service) -> None:
    await service.prices(BTC=50_000)
    alice = await service.agent()
    await alice.deposit(USDC=10_000, BTC=1)
    await alice.order("BTC-PERP", "buy", 0.5)
    await alice.post("/reservations", {"service": "casino", "asset": "BTC", "amount": 0.2})
    body = {"book": "account", "scenarios": [{"price_move": -0.2}], "regimes": ["sideways", "sell_off"]}
    reply = await alice.post("/quotes/stress", body)
    account = await alice.get("/account")
    row = reply["results"][0]["scenarios"][0]
    await service.prices(BTC=40_000)
    after = await alice.get("/account")
    assert float(reply["results"][0]["before"]["equity"]) == pytest.approx(float(account["equity"]))
    for name in ("equity", "required_initial", "required_maintenance", "utilization"):
        assert float(row[name]) == pytest.approx(float(after["health"][name]), rel=1e-9), name
    # a multiplier below 1 is for quotes of portfolios alone
    assert [r["margined_as"] for r in reply["results"]] == ["normal", "sell_off"]
    assert reply["book"] == "account"


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({}, "missing", "/positions"),
        ({"book": "mine"}, "invalid_value", "/book"),
        ({"book": "account", "positions": []}, "not_with_account", "/positions"),
        ({"book": "account", "market": {}}, "not_with_account", "/market"),
        (WORKED | {"scenarios": "armageddon"}, "unknown_scenario_set", "/scenarios"),
        (WORKED | {"scenarios": []}, "no_scenarios", "/scenarios"),
        (WORKED | {"scenarios": [{}]}, "empty_scenario", "/scenarios/0"),
        (WORKED | {"scenarios": [{"price_move": -0.1, "weight": 0.5}]}, "unknown_field", "/scenarios/0/weight"),
        (WORKED | {"scenarios": [{"price_move": -1.5}]}, "invalid_value", "/scenarios/0/price_move"),
        (WORKED | {"scenarios": [{"price_move": 1}] * 1_001}, "too_many_items", "/scenarios"),
        (WORKED | {"regimes": ["calm"]}, "invalid_value", "/regimes/0"),
        (WORKED | {"replay": {"window_days": 2}}, "invalid_value", "/replay/window_days"),
        (WORKED | {"replay": {"count": 51}}, "invalid_value", "/replay/count"),
        (WORKED | {"replay": {}}, "missing_history", None),
        (WORKED | {"feedback": {"adv": {"BTC": 1e9}, "scenario": 2}}, "out_of_range", "/feedback/scenario"),
        (WORKED | {"feedback": {"adv": {"BTC": -1}}}, "invalid_value", "/feedback/adv/BTC"),
        (WORKED | {"positions": [{"symbol": "NOPE-PERP", "side": "long", "size": 1}]}, "missing_price", None),
        (WORKED | {"models": ["cross"]}, "unknown_field", "/models"),
        (WORKED | {"scenarios": ["moderate", "mild"]}, "unknown_scenario_set", "/scenarios/1"),
        (WORKED | {"scenarios": ["span16"] * 63}, "too_many_items", "/scenarios"),
        (WORKED | {"regimes": "panic"}, "invalid_value", "/regimes"),
    ],
)
@SHARED
async def test_hostile_bodies(shared: Service, body: dict[str, Any], code: str, pointer: str | None) -> None:
    problem(await shared.post(STRESS, json=body), 422, code, pointer)


@SHARED
async def test_all_that_a_margin_quote_takes(shared: Service) -> None:
    taken = {k: v for k, v in EVERYTHING.items() if k not in ("models", "scenarios", "regime", "name")}
    reply = await _stress(shared, **taken, scenarios="span16", reverse=True)
    assert len(reply["results"][0]["scenarios"]) == 16
    equity = (await shared.quote(**EVERYTHING))["equity"]
    assert reply["results"][0]["before"]["equity"] == pytest.approx(equity)
    assert reply["unused_shocks"] == []
    unused = await _stress(shared, **WORKED, scenarios=[{"shocks": {"BTCC": -0.1}}])
    assert unused["unused_shocks"] == ["BTCC"]


@SHARED
async def test_sets_by_name_beside_own_scenarios_and_one_regime(shared: Service) -> None:
    own = {"price_move": -0.4, "name": "crash"}
    reply = await _stress(shared, **WORKED, scenarios=["moderate", own, "twenty_percent"], regimes="sell_off")
    assert [row["source"] for row in reply["scenarios"]] == ["moderate"] * 6 + ["own"] + ["twenty_percent"] * 2
    assert [row["name"] for row in reply["scenarios"]] == [None] * 6 + ["crash"] + [None] * 2
    (result,) = reply["results"]
    assert result["regime"] == "sell_off"
    assert result["scenarios"][6]["equity"] == pytest.approx(48_450 - 0.4 * 61_000 * 1.45)
    alone = await _stress(shared, collateral=WORKED["collateral"], market={"prices": {"BTC": 61_000}})
    assert alone["results"][0]["scenarios"][0]["equity"] == pytest.approx(47_450 - 0.2 * 61_000 * 0.45)


@SHARED
async def test_too_much_work_is_refused_before_it_is_done(shared: Service) -> None:
    options = [OPTION | {"underlying": f"A{i % 20}", "strike": 100 + i} for i in range(1_000)]
    book = {
        "positions": options,
        "collateral": [{"asset": "USDC", "amount": 1e6}],
        "market": {"prices": {f"A{i}": 100 for i in range(20)}},
        "settings": {"margin_mode": "portfolio"},
    }
    many = [{"price_move": -k / 10_000} for k in range(1_000)]
    regimes = ["normal", "sideways", "sell_off", "liquidity_crisis"]
    problem(
        await shared.post(STRESS, json=book | {"scenarios": many, "regimes": regimes}),
        422,
        "too_much_work",
        "/scenarios",
    )
    wide = [{"symbol": f"A{i}-PERP", "side": "long", "size": 1, "mark_price": 1} for i in range(400)]
    problem(await shared.post(STRESS, json={"positions": wide, "reverse": True}), 422, "too_much_work", "/reverse")


async def test_history_is_bounded(database_url: URL) -> None:
    async with running(database_url) as service:
        wide = [{"symbol": f"A{i}-PERP", "side": "long", "size": 1, "mark_price": 1} for i in range(100)]
        body = {"positions": wide, "replay": {"history_days": 3_660}}
        problem(await service.post(STRESS, json=body), 422, "too_much_work", "/replay/history_days")
