"""Margin quotes over HTTP: the specification's figures, prices and overrides, versions, and one answer for all."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.bodies import ALL_MODELS, AS_OF, EVERYTHING, LINEAR, OPTION, WORKED
from tests.api.service import MARGIN, problem

if TYPE_CHECKING:
    from tests.api.service import Service

PRIMERISK = Path(sys.executable).with_name("primerisk")


async def test_the_worked_quote(service: Service) -> None:
    """RISK.md §1, Worked."""
    reply = await service.quote(**WORKED)
    health, position = reply["health"], reply["positions"][0]
    assert reply["equity"] == pytest.approx(48_450, abs=1e-9)
    assert reply["models"]["isolated"]["initial_margin"] == pytest.approx(20_333.33, abs=0.005)
    assert reply["models"]["isolated"]["maintenance_margin"] == pytest.approx(9_150, abs=1e-9)
    assert health["utilization"] == pytest.approx(0.41968, abs=5e-6)
    assert health["margin_ratio"] == pytest.approx(0.18885, abs=5e-6)
    assert health["stress_survival"] == pytest.approx(4.20219, abs=5e-6)
    assert health["headroom"] == pytest.approx(14_561.11, abs=0.005)
    assert health["free_margin"] == pytest.approx(28_116.67, abs=0.005)
    assert (health["zone"], health["alert_level"], health["status"]) == ("GREEN", "OK", "SAFE")
    assert position["liquidation_price"] == pytest.approx(30_769.23, abs=0.005)
    assert position["mark_price"] * (1 + reply["liquidation"]["to_breach"]) == pytest.approx(37_812.79, abs=0.005)
    assert position["notional"] == 61_000
    assert position["unrealized_pnl"] == 1_000


async def test_all_five_models_and_what_they_free(service: Service) -> None:
    reply = await service.quote(**EVERYTHING)
    models = reply["models"]
    assert list(models) == ALL_MODELS
    isolated = models["isolated"]["initial_margin"]
    for name, model in models.items():
        assert model["initial_margin"] >= model["maintenance_margin"] > 0
        assert reply["capital_freed"][name] == pytest.approx(1 - model["initial_margin"] / isolated)
        shares = sum(share["initial_margin"] for share in model["per_position"])
        assert shares == pytest.approx(model["initial_margin"]), name
    worst = models["scenario"]["worst"]
    assert models["scenario"]["scenarios"][worst["index"]]["pnl"] == worst["pnl"]
    assert reply["capital_freed"]["isolated"] == 0


async def test_the_default_models(service: Service) -> None:
    assert list((await service.quote(**WORKED))["models"]) == ["isolated", "cross", "portfolio"]


async def test_the_worked_portfolio_margin(service: Service) -> None:
    """RISK.md §2.1, Worked: BTC +10,000 / ETH -8,000, and each leg of §2's scenarios with gamma."""
    legs = [{"symbol": "BTC", "notional": 10_000, "delta": 1}, {"symbol": "ETH", "notional": 8_000, "delta": -1}]
    reply = await service.quote(positions=legs, models=["portfolio"])
    assert reply["models"]["portfolio"]["initial_margin"] == pytest.approx(1_484.318, abs=5e-4)
    legs = [
        {"symbol": "BTC", "notional": 10_000, "delta": 1, "gamma": 0.001},
        {"symbol": "BTC", "notional": 8_000, "delta": -0.8, "gamma": 0.001},
    ]
    model = (await service.quote(positions=legs, models=["scenario"]))["models"]["scenario"]
    assert model["initial_margin"] == pytest.approx(647.757, abs=5e-4)
    assert model["worst"]["pnl"] == pytest.approx(-539.7975, abs=5e-5)


async def test_stored_prices_fill_the_marks_left_out(service: Service) -> None:
    unpriced = {name: value for name, value in LINEAR.items() if name != "mark_price"}
    body = WORKED | {"positions": [unpriced]}
    problem(await service.post(MARGIN, json=body), 422, "missing_price", "/positions/0/mark_price")
    posted = await service.post("/api/market/prices", key="market", json={"prices": {"BTC": 61_000}})
    assert posted.status_code == 202
    reply = await service.quote(**body)
    assert reply["equity"] == 48_450
    assert reply["prices"]["BTC"]["source"] == "stored"
    await service.post("/api/market/prices", key="market", json={"prices": {"BTC-PERP": 61_100}})
    reply = await service.quote(**body)
    assert (reply["positions"][0]["mark_price"], reply["prices"]["BTC"]["value"]) == (61_100, 61_000)
    reply = await service.quote(**body, market={"prices": {"BTC": 62_000}})
    assert (reply["positions"][0]["mark_price"], reply["prices"]["BTC"]["source"]) == (62_000, "request")


async def test_a_stale_stored_price_is_told(service: Service) -> None:
    """A coin of which the last price is two minutes old, and one that has just been priced."""
    long_ago = service.app.state.parts.database.clock.now() - timedelta(minutes=2)
    for price in ({"prices": {"ETH": 3_000}}, {"prices": {"BTC": 61_000}, "as_of": long_ago.isoformat()}):
        assert (await service.post("/api/market/prices", key="market", json=price)).status_code == 202
    fresh, stale = ({"positions": [], "collateral": [{"asset": asset, "amount": 1}]} for asset in ("ETH", "BTC"))
    assert "stale_price" not in [a["code"] for a in (await service.quote(**fresh))["advisories"]]
    reply = await service.quote(**stale)
    advisory = next(a for a in reply["advisories"] if a["code"] == "stale_price")
    assert 120 <= advisory["value"] < 180
    assert advisory["limit"] == 60
    given = await service.quote(**stale, market={"prices": {"BTC": 61_000}})
    assert "stale_price" not in [a["code"] for a in given["advisories"]]


async def test_overrides_hold_for_one_quote_and_are_shown(service: Service) -> None:
    market = {"assets": {"BTC": {"haircut": 0.2, "initial_margin_rate": 0.5}}}
    reply = await service.quote(**WORKED, market=market, settings={"target_utilization": 0.5})
    assert reply["equity"] == 48_450 - 0.1 * 0.5 * 61_000
    assert reply["models"]["cross"]["initial_margin"] == 30_500
    assert reply["parameters"]["assets"]["BTC"]["haircut"] == 0.2
    assert reply["parameters"]["settings"]["target_utilization"] == 0.5
    assert reply["health"]["headroom"] == pytest.approx(max(0, reply["equity"] - 30_500 / 0.5))
    again = await service.quote(**WORKED)
    assert (again["equity"], again["parameters"]["assets"]["BTC"]["haircut"]) == (48_450, 0.1)


async def test_a_margin_mode_of_the_account(service: Service) -> None:
    reply = await service.quote(**WORKED, settings={"margin_mode": "portfolio"})
    assert reply["health"]["model"] == "portfolio"
    assert reply["health"]["required_initial"] == reply["models"]["portfolio"]["initial_margin"]


async def test_decimal_strings_are_numbers(service: Service) -> None:
    def spelled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: spelled(item) for name, item in value.items()}
        if isinstance(value, list):
            return [spelled(item) for item in value]
        return str(value) if isinstance(value, int | float) else value

    assert await service.quote(**spelled(EVERYTHING)) == await service.quote(**EVERYTHING)


async def test_the_reply_names_its_version(service: Service) -> None:
    first = (await service.quote(**WORKED))["parameters"]
    put = await service.put("/api/market/assets/BTC", json={"haircut": 0.2})
    reply = await service.quote(**WORKED)
    assert first["version"] < reply["parameters"]["version"] == put.json()["version"]
    assert (first["assets"]["BTC"]["haircut"], reply["parameters"]["assets"]["BTC"]["haircut"]) == (0.1, 0.2)
    assert reply["equity"] == 48_450 - 0.1 * 0.5 * 61_000


@pytest.mark.parametrize(("sent", "echoed"), [("abc-1.2_Z", True), ("x" * 64, True), ("x" * 65, False), ("a b", False)])
async def test_the_request_id_is_echoed_where_it_is_harmless(service: Service, sent: str, echoed: bool) -> None:
    answer = await service.post(MARGIN, json=WORKED, headers={"X-Request-Id": sent})
    assert (answer.headers["x-request-id"] == sent) == echoed
    assert answer.headers["x-request-id"]
    refused = await service.post(MARGIN, json={}, headers={"X-Request-Id": sent})
    assert (refused.json()["request_id"] == sent) == echoed


async def test_the_command_line_gives_the_same_reply(service: Service) -> None:
    process = await asyncio.create_subprocess_exec(
        PRIMERISK, "quote", "--json", "-", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate(json.dumps(EVERYTHING).encode())
    assert process.returncode == 0
    told, offline = await service.quote(**EVERYTHING), json.loads(printed)
    assert (told["parameters"].pop("version"), offline["parameters"].pop("version")) == (1, 0)
    assert told == offline


def _book(count: int) -> list[dict[str, Any]]:
    return [
        LINEAR | {"symbol": f"{asset}-PERP", "side": ("long", "short")[i % 3 == 0], "size": 1 + i / 7}
        for i, asset in zip(range(count), ("BTC", "ETH", "SOL", "X") * count, strict=False)
    ]


async def test_a_large_portfolio_is_answered_like_a_small_one(service: Service) -> None:
    """One model of it is quoted in the event loop, five of it in a thread: the figures are the same."""
    body = {"positions": _book(1_000), "collateral": WORKED["collateral"], "as_of": AS_OF}
    whole = await service.quote(**body, models=ALL_MODELS)
    for name in ALL_MODELS:
        alone = await service.quote(**body, models=[name])
        assert alone["models"] == {name: whole["models"][name]}
        assert alone["positions"] == whole["positions"]
        assert alone["health"] == whole["health"]


async def test_the_largest_portfolio(service: Service) -> None:
    answer = await service.post(MARGIN, json={"positions": _book(5_000), "models": ALL_MODELS})
    assert answer.status_code == 200
    assert len(answer.json()["positions"]) == 5_000
    assert answer.elapsed.total_seconds() < 5


async def test_many_options_do_not_hold_up_the_loop(service: Service) -> None:
    """A health probe is answered at once while a heavy quote is worked on in a thread."""
    options = [OPTION | {"strike": 40_000 + 10 * i} for i in range(5_000)]
    body = {"positions": options, "market": {"prices": {"BTC": 61_000}}, "models": ALL_MODELS}
    heavy = asyncio.create_task(service.post(MARGIN, json=body))
    probes = 0
    while not heavy.done():
        assert (await service.get("/healthz", key="")).status_code == 200
        probes += 1
        await asyncio.sleep(0)  # the probe itself never waits: give the loop back
    assert (await heavy).status_code == 200
    assert probes > 10


async def test_fifty_quotes_at_once_are_equal(service: Service) -> None:
    bodies = [EVERYTHING, {"positions": _book(1_000), "as_of": AS_OF}]
    answers = await asyncio.gather(*(service.post(MARGIN, json=bodies[i % 2]) for i in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    for kind in (0, 1):
        assert len({answer.content for answer in answers[kind::2]}) == 1


async def test_an_empty_book_is_safe(service: Service) -> None:
    reply = await service.quote(positions=[])
    assert (reply["equity"], reply["health"]["status"], reply["health"]["liquidation_buffer"]) == (0, "SAFE", 1)
    assert reply["health"]["stress_survival"] is None


async def test_an_insolvent_book_is_told_as_such(service: Service) -> None:
    health = (await service.quote(positions=[LINEAR | {"mark_price": 30_000}]))["health"]
    assert health["insolvent"] is True
    assert health["utilization"] is health["margin_ratio"] is None
    assert (health["zone"], health["alert_level"], health["status"]) == ("RED", "EMERGENCY", "LIQUIDATION")
    assert health["health_score"] == 0
