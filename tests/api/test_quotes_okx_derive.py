"""Quotes under OKX's and Derive's portfolio margin over HTTP: worked figures, inputs, overrides, stored parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.api.service import MARGIN, problem

if TYPE_CHECKING:
    from tests.api.service import Service

SWAP = {"symbol": "BTC-USDT-SWAP", "side": "short", "size": 10, "contract_size": 0.01, "mark_price": 97093.7}
OKX: dict[str, Any] = {"positions": [SWAP], "models": ["okx"], "market": {"prices": {"BTC": 97078.9, "USDT": 0.99954}}}
CALL = {
    "underlying": "BTC",
    "type": "call",
    "strike": 100000,
    "expiry": "2027-01-10T04:47:32Z",
    "side": "short",
    "size": 1,
    "iv": 0.453803924321583,
    "rate": 0.15,
    "forward": 95776.67392708939,
}
DERIVE: dict[str, Any] = {
    "positions": [CALL],
    "models": ["derive"],
    "market": {"prices": {"BTC": 95663.50604855}},
    "as_of": "2027-01-01T00:00:00Z",
}


async def model(service: Service, body: dict[str, Any], **venues: Any) -> dict[str, Any]:
    """Return the reply's only model, the request saying so much of venues."""
    market = body["market"] | ({"venues": venues} if venues else {})
    reply = await service.quote(**{**body, "market": market})
    found: dict[str, Any] = reply["models"][body["models"][0]]
    return found


async def test_okx(service: Service) -> None:
    found = await model(service, OKX)
    assert found["maintenance_margin"] == pytest.approx(1_183.8207318516, rel=1e-12)
    assert found["initial_margin"] == pytest.approx(1_538.9669514071, rel=1e-12)
    assert found["add_ons"]["mr4"] == pytest.approx(19.4098073796, rel=1e-12)
    assert found["per_underlying"]["BTC"]["index_price"] == 97078.9
    assert found["not_modelled"] == ["mr2", "mr3", "mr5", "mr8", "mr9"]
    worst = found["worst"]
    assert worst["rule"] == "mr1"
    assert found["scenarios"][worst["index"]]["pnl"] == worst["pnl"] == pytest.approx(-1_164.410924472)
    assert found["per_position"][0]["maintenance_margin"] == pytest.approx(found["maintenance_margin"])


async def test_okx_reply_names_prices_and_parameters(service: Service) -> None:
    reply = await service.quote(**OKX)
    assert reply["prices"]["USDT"] == {"value": 0.99954, "source": "request", "as_of": None}
    shown = reply["models"]["okx"]["parameters"]["BTC"]
    assert (shown["basis_rate"], shown["minimum_rate"], shown["spot_moves"]) == (0.002, 0.0045, [0.04, 0.08, 0.12])
    assert shown["minimum_tiers"][1] == [250000, 2]
    assert reply["parameters"]["version"] == 1


async def test_a_posted_depeg_counts(service: Service) -> None:
    posted = await service.post("/api/market/prices", key="market", json={"prices": {"USDT": 0.9}})
    assert posted.status_code == 202
    found = await model(service, OKX | {"market": {"prices": {"BTC": 97078.9}}})
    assert found["add_ons"]["mr1"] == pytest.approx(0.1 * 97078.9 * 0.9 * 0.12)


async def test_okx_supplied_charges_and_own_parameters(service: Service) -> None:
    charges = {"mr2": "1.5", "mr3": 2, "mr5": 3, "mr8": 50, "mr8_initial": 80, "mr9": 4}
    unit = charges | {"parameters": {"basis_rate": 0.01}}
    found = await model(service, OKX, okx={"BTC": unit})
    assert found["not_modelled"] == []
    delta = 9_704.9036898
    kept = 1_164.410924472 + 0.01 * delta + 2 + 3 + 4
    assert found["maintenance_margin"] == pytest.approx(kept + 50)
    assert found["initial_margin"] == pytest.approx(1.3 * kept + 80)
    assert found["parameters"]["BTC"]["basis_rate"] == 0.01


async def test_derive(service: Service) -> None:
    found = await model(service, DERIVE)
    assert found["mark_to_market"] == pytest.approx(-1_186.4185694588, rel=1e-12)
    assert found["net_initial"] == pytest.approx(-14_604.0481201448, rel=1e-12)
    assert found["net_maintenance"] == pytest.approx(-11_824.8587039591, rel=1e-12)
    assert found["initial_margin"] == pytest.approx(14_604.0481201448 - 1_186.4185694588, rel=1e-12)
    assert found["worst"]["pnl"] == pytest.approx(-12_939.3120204433, rel=1e-12)
    assert found["scenarios"][found["worst"]["index"]]["price_move"] == 0.18
    assert len(found["scenarios"]) == 31


async def test_derive_inputs(service: Service) -> None:
    perp = {"symbol": "ETH-PERP", "side": "long", "size": 1, "mark_price": 3100}
    body = {"positions": [perp], "models": ["derive"], "market": {"prices": {"ETH": 3000}}}
    found = await model(service, body, derive={"ETH": {"funding": 10}})
    assert (found["net_initial"], found["net_maintenance"]) == pytest.approx((-608, -481.4), rel=1e-12)
    found = await model(service, body, derive={"ETH": {"funding": 10, "cash": 1000, "confidence": 0.5}})
    assert found["net_initial"] == pytest.approx(-608 + 1000 - 0.5 * 3000)
    assert found["net_maintenance"] == pytest.approx(-481.4 + 1000)
    assert found["not_modelled"] == ["collateral_initial", "collateral_maintenance"]


async def test_a_depeg_of_the_cash(service: Service) -> None:
    perp = {"symbol": "ETH-PERP", "side": "long", "size": 1, "mark_price": 3000}
    body = {"positions": [perp], "models": ["derive"], "market": {"prices": {"ETH": 3000, "USDC": 0.97}}}
    found = await model(service, body)
    assert found["initial_margin"] == pytest.approx(540 * 1.02 + 60)
    assert found["per_underlying"]["ETH"]["stable_price"] == 0.97


async def test_dated_future(service: Service) -> None:
    """Its expiry is the instrument's, or what its symbol says."""
    future = {"symbol": "BTC-FAR", "side": "long", "size": 1, "mark_price": 60000}
    perp = {"symbol": "BTC-PERP", "side": "short", "size": 1, "mark_price": 60000}
    far = {"underlying": "BTC", "kind": "future", "expiry": "2028-01-01T00:00:00Z"}
    body = {"positions": [future, perp], "models": ["okx", "derive"], "as_of": "2027-01-01T00:00:00Z"}
    models = (await service.quote(**body, market={"instruments": {"BTC-FAR": far}}))["models"]
    assert models["okx"]["add_ons"]["mr4"] == pytest.approx(60_000 * (0.002 + 0.05))
    assert models["derive"]["add_ons"]["basis"] == pytest.approx(-60_000 * 0.045 * 2.5)
    body["positions"] = [future | {"symbol": "BTC-1JAN28"}, perp]
    dated = (await service.quote(**body))["models"]
    eight_hours = 8 / (365 * 24)  # contracts expire at 08:00 UTC
    assert dated["okx"]["add_ons"]["mr4"] == pytest.approx(60_000 * (0.002 + 0.05 * (1 + eight_hours)))


async def test_stored_parameters(service: Service) -> None:
    stored = await service.put("/api/market/venues/okx/BTC", json={"extreme_weight": 1, "version": 1})
    assert stored.status_code == 200, stored.text
    found = await model(service, OKX)
    assert found["worst"]["rule"] == "mr6"
    assert found["maintenance_margin"] == pytest.approx(2_328.821848944 + 19.4098073796)
    stored = await service.put("/api/market/venues/derive/BTC", json={"perpetual_rate": 0.03})
    assert stored.status_code == 200, stored.text
    assert stored.json()["tails"][0] == [-0.66, 0.054545]
    listed = (await service.get("/api/market/venues")).json()["venues"]
    assert listed["derive"]["BTC"]["perpetual_rate"] == 0.03
    assert listed["derive"]["default"]["perpetual_rate"] == 0.015
    assert listed["okx"]["default"]["spot_moves"] == [0.08, 0.16, 0.25]


@pytest.mark.parametrize(
    ("venues", "code", "pointer"),
    [
        ({"okx": {"BTC": {"mr2": -1}}}, "out_of_range", "/market/venues/okx/BTC/mr2"),
        ({"okx": {"BTC": {"mr22": 1}}}, "unknown_field", "/market/venues/okx/BTC"),
        ({"okx": {"BTC": {"index_price": 0}}}, "out_of_range", "/market/venues/okx/BTC/index_price"),
        ({"okx": {"BTC": {"parameters": {"minimum_tiers": [[1, 1]]}}}}, "out_of_order", "minimum_tiers"),
        ({"okx": {"BTC": {"parameters": {"spot_moves": [0.1, 0.2]}}}}, "invalid_value", "spot_moves"),
        ({"okx": {"BTC": {"parameters": {"minimum_tiers": []}}}}, "too_many_items", "minimum_tiers"),
        ({"derive": {"BTC": {"confidence": 1.1}}}, "out_of_range", "/market/venues/derive/BTC/confidence"),
        ({"derive": {"BTC": {"collateral_maintenance": 1}}}, "out_of_order", "collateral_maintenance"),
        ({"derive": {"BTC": {"parameters": {"tails": [[0.5, -1]]}}}}, "out_of_order", "tails"),
        ({"derive": {"BTC": {"parameters": {"skew_reach_least": 0}}}}, "out_of_range", "skew_reach_least"),
        ({"derive": {f"X{i}": {} for i in range(501)}}, "too_many_items", "/market/venues/derive"),
    ],
)
async def test_hostile_bodies(service: Service, venues: dict[str, Any], code: str, pointer: str) -> None:
    body = OKX | {"market": OKX["market"] | {"venues": venues}}
    refused = problem(await service.post(MARGIN, json=body), 422, code)
    assert pointer in refused["errors"][0]["pointer"]
