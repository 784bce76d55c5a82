"""What-if: what it foretells is what happens, and asking changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.api.service import problem

if TYPE_CHECKING:
    from tests.api.service import Service

WHAT_IF = "/api/quotes/what-if"
FIGURES = ("required_initial", "required_maintenance", "utilization", "margin_ratio", "zone", "status", "headroom")


async def _account(service: Service) -> dict[str, Any]:
    reply: dict[str, Any] = (await service.get("/api/account")).json()
    return reply


async def _book(service: Service) -> None:
    prices = {"BTC": 61_000, "ETH": 3_000}
    assert (await service.post("/api/market/prices", key="market", json={"prices": prices})).status_code == 202
    deposit = {"asset": "USDC", "amount": 20_000}
    assert (await service.post("/api/wallet/deposits", json=deposit)).status_code == 201
    order = {"symbol": "BTC-PERP", "side": "buy", "size": 0.5}
    assert (await service.post("/api/orders", json=order)).status_code == 200


async def _ask(service: Service, **change: Any) -> dict[str, Any]:
    answer = await service.post(WHAT_IF, json=change)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


def _same(foretold: dict[str, Any], account: dict[str, Any]) -> None:
    assert foretold["equity"] == pytest.approx(account["equity"], abs=1e-6)
    for name in FIGURES:
        seen, expected = account["health"][name], foretold["health"][name]
        assert seen == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-12)), name


async def test_an_order_does_what_was_foretold(service: Service) -> None:
    await _book(service)
    _same((await _ask(service))["before"], await _account(service))
    foretold = await _ask(service, add=[{"symbol": "ETH-PERP", "side": "short", "size": 2, "leverage": 2}])
    assert foretold["accepted"] is True
    assert foretold["reason"] is None
    order = {"symbol": "ETH-PERP", "side": "sell", "size": 2, "leverage": 2}
    assert (await service.post("/api/orders", json=order)).status_code == 200
    _same(foretold["after"], await _account(service))


async def test_closing_pays_the_profit_and_frees_the_margin(service: Service) -> None:
    await _book(service)
    assert (await service.post("/api/market/prices", key="market", json={"prices": {"BTC": 60_000}})).status_code == 202
    foretold = await _ask(service, close=["BTC-PERP"])
    assert foretold["before"]["unrealized_pnl"] == -500.0
    assert foretold["after"]["unrealized_pnl"] == 0.0
    assert foretold["change"]["equity"] == pytest.approx(0.0, abs=1e-9)
    assert foretold["after"]["health"]["required_initial"] == 0.0
    held = (await _account(service))["positions"][0]["id"]
    assert (await _ask(service, close=[held]))["after"] == foretold["after"]
    assert (await service.post(f"/api/positions/{held}/reduce", json={"reduce_pct": 1})).status_code == 200
    _same(foretold["after"], await _account(service))


async def test_replacing_is_closing_and_adding(service: Service) -> None:
    await _book(service)
    other = {"symbol": "BTC-PERP", "side": "short", "size": 0.25}
    replaced = await _ask(service, replace=[other])
    assert replaced["after"] == (await _ask(service, close=["BTC-PERP"], add=[other]))["after"]
    # a short of a quarter where a long of a half was: 61,000 x .25 x .30
    assert replaced["after"]["models"]["cross"]["initial_margin"] == pytest.approx(4_575.0)
    assert replaced["change"]["models"]["cross"]["initial_margin"] == pytest.approx(-4_575.0)


async def test_what_an_order_is_refused_for_is_foretold(service: Service) -> None:
    await _book(service)
    foretold = await _ask(service, add=[{"symbol": "ETH-PERP", "side": "long", "size": 100}])
    answer = await service.post("/api/orders", json={"symbol": "ETH-PERP", "side": "buy", "size": 100})
    assert answer.status_code == 409
    refused = answer.json()
    assert foretold["accepted"] is False
    assert foretold["reason"]["code"] == refused["code"]
    assert foretold["reason"]["shortfall"] == pytest.approx(refused["shortfall"])


async def test_options_may_be_added(service: Service) -> None:
    await _book(service)
    put = {"underlying": "BTC", "type": "put", "side": "long", "size": 0.5, "strike": 60_000, "iv": 0.5}
    hedged = await _ask(service, add=[put | {"expiry": "2060-01-01T00:00:00Z"}])
    assert hedged["after"]["options_value"] > 0.0
    assert (
        hedged["after"]["models"]["portfolio"]["initial_margin"] < hedged["after"]["models"]["cross"]["initial_margin"]
    )


async def test_asking_changes_nothing(service: Service) -> None:
    await _book(service)
    before = await _account(service)
    await _ask(service, close=["BTC-PERP"], add=[{"symbol": "ETH-PERP", "side": "long", "size": 1}])
    after = await _account(service)
    assert {**after, "as_of": before["as_of"]} == before


@pytest.mark.parametrize(
    ("change", "code", "pointer"),
    [
        ({"close": ["ETH-PERP"]}, "not_open", "/close/0"),
        ({"add": [{"symbol": "DOGE-PERP", "side": "long", "size": 1}]}, "missing_price", "/add/0/mark_price"),
        ({"replace": [{"symbol": "DOGE-PERP", "side": "long", "size": 1}]}, "missing_price", "/replace/0/mark_price"),
        ({"add": [{"symbol": "ETH-PERP", "size": 1}]}, "invalid_position", "/add/0/side"),
        ({"add": [{"symbol": "ETH PERP", "side": "long", "size": 1}]}, "invalid_symbol", "/add/0/symbol"),
        ({"drop": []}, "unknown_field", "/drop"),
    ],
)
async def test_what_is_refused(service: Service, change: dict[str, Any], code: str, pointer: str) -> None:
    await _book(service)
    problem(await service.post(WHAT_IF, json=change), 422, code, pointer)
