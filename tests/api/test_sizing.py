"""Sizing over HTTP: worked numbers, what is defaulted, what each method takes, hostile bodies."""

from __future__ import annotations

import math
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.api.bodies import LINEAR, OPTION, WORKED
from tests.api.service import problem

if TYPE_CHECKING:
    from tests.api.service import Service

SIZING = "/api/quotes/sizing"
SHARED = pytest.mark.asyncio(loop_scope="module")

THREE: dict[str, Any] = {
    "vols": {"BTC": 0.65, "ETH": 0.80, "SOL": 1.20},
    "correlation": {"BTC": {"ETH": 0.82, "SOL": 0.71}, "ETH": {"SOL": 0.78}},
}
NAMES = [{"asset": name} for name in ("BTC", "ETH", "SOL")]
EVENT = {"starts_at": "2027-01-01T00:00:00Z", "ends_at": "2027-01-01T06:00:00Z"}


async def _sized(service: Service, **body: Any) -> dict[str, Any]:
    answer = await service.post(SIZING, json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


@SHARED
async def test_risk_parity(shared: Service) -> None:
    reply = await _sized(shared, method="risk_parity", assets=NAMES, equity=1e6, **THREE)
    assert {k: round(w, 4) for k, w in reply["weights"].items()} == {"BTC": 0.4272, "ETH": 0.3382, "SOL": 0.2346}
    assert round(reply["volatility"], 4) == 0.7633
    for part in reply["contributions"].values():
        assert part == pytest.approx(reply["volatility"] / 3, abs=1e-8)
    assert reply["notionals"]["BTC"] == pytest.approx(1e6 * reply["weights"]["BTC"])
    shown = reply["covariance"]
    assert (shown["source"], shown["defaulted_pairs"], shown["defaulted_vols"]) == ("request", [], [])


@SHARED
async def test_volatility_of_equal_weights(shared: Service) -> None:
    equal = [item | {"weight": 1 / 3} for item in NAMES]
    reply = await _sized(shared, method="vol_target", assets=equal, target_volatility=0.4069, **THREE)
    assert round(reply["volatility_before"], 4) == 0.8138
    assert round(reply["undiversified_volatility_before"], 4) == 0.8833
    assert reply["factor"] == pytest.approx(0.4069 / reply["volatility_before"])
    assert reply["volatility"] == pytest.approx(0.4069)
    capped = await _sized(shared, method="vol_target", assets=equal, target_volatility=50, leverage_cap=2, **THREE)
    assert (capped["binding"], capped["factor"]) == ("leverage", pytest.approx(2))


@SHARED
async def test_the_programme_by_hand(shared: Service) -> None:
    """One asset alone: w (.30 + 2 x .60 x .65/√365) <= .60, so that margin binds; a unit more of it earns 1/that."""
    assets = [{"asset": "BTC", "edge": 0.1, "weight_max": 3}]
    reply = await _sized(shared, method="lp", assets=assets, vols={"BTC": 0.65})
    rate = 0.30 + 1.2 * 0.65 / math.sqrt(365)
    assert reply["weights"]["BTC"] == pytest.approx(0.6 / rate)
    margin = next(c for c in reply["constraints"] if c["name"] == "margin")
    assert margin["binding"] is True
    assert margin["shadow_price"] == pytest.approx(0.1 / rate)
    assert reply["volatility"] == pytest.approx(0.65 * 0.6 / rate)
    assert reply["defaulted_margin_rates"] == ["BTC"]
    least = [{"asset": "BTC", "edge": 0.1, "weight_min": 3, "weight_max": 4}]
    none = await _sized(shared, method="lp", assets=least)
    assert (none["status"], none["weights"]) == ("infeasible", None)
    assert "margin" in none["detail"]


@SHARED
async def test_without_limits_the_programme_has_no_answer(shared: Service) -> None:
    free = {"asset": "USDC", "edge": 0.01, "margin_rate": 0}
    reply = await _sized(shared, method="lp", assets=[free | {"weight_max": "none"}], leverage_cap="none")
    assert (reply["status"], reply["weights"], reply["leverage_cap"]) == ("unbounded", None, None)
    assert "USDC" in reply["detail"]
    capped = await _sized(shared, method="lp", assets=[free | {"weight_max": "none"}], leverage_cap=2)
    assert capped["weights"] == {"USDC": pytest.approx(2)}
    # what many clients send for a field left out lifts no limit
    default = await _sized(shared, method="lp", assets=[free | {"weight_max": None}], leverage_cap=None)
    assert (default["weights"], default["leverage_cap"]) == ({"USDC": 0.25}, 3.5)


@SHARED
async def test_weights_that_fill_a_limit_to_the_last_bit_fit(shared: Service) -> None:
    thirds = [{"asset": f"A{k}", "edge": 1, "margin_rate": 0.1, "weight_min": 0.1} for k in range(3)]
    vols = {f"A{k}": 0.5 for k in range(3)}  # .1 + .1 + .1 is .30000000000000004
    reply = await _sized(shared, method="lp", assets=thirds, vols=vols, leverage_cap=0.3)
    assert reply["status"] == "optimal"
    assert sum(reply["weights"].values()) == pytest.approx(0.3)


@SHARED
async def test_a_position_beside_others(shared: Service) -> None:
    """Nothing held: target x equity / vol. Beside the same coin short, the calmest size is the hedge."""
    known = {"equity": 100_000, "free_margin": 1e9, "max_leverage": 3, "vols": {"BTC": 0.65}}
    alone = await _sized(shared, method="correlation_aware", asset="BTC", **known)
    assert alone["notional"] == pytest.approx(0.5 * 100_000 / 0.65)
    assert (alone["binding"], alone["volatility_after"]) == ("volatility", pytest.approx(0.5))
    held = [{"asset": "BTC", "exposure": -40_000}]
    beside = await _sized(shared, method="correlation_aware", asset="BTC", assets=held, **known)
    assert beside["calmest_notional"] == pytest.approx(40_000)
    assert beside["notional"] == pytest.approx(40_000 + 0.5 * 100_000 / 0.65)
    tight = await _sized(shared, method="correlation_aware", asset="BTC", **(known | {"free_margin": 1_000}))
    assert (tight["binding"], tight["notional"]) == ("margin", pytest.approx(0.6 * 1_000 * 3))


@SHARED
async def test_a_position_beside_a_portfolio(shared: Service) -> None:
    reply = await _sized(shared, method="correlation_aware", asset="BTC", max_leverage=3, **WORKED)
    # a coin long and the half of one that backs it, after its haircut
    assert reply["exposures"] == {"BTC": pytest.approx(61_000 * 1.45)}
    assert reply["equity"] == 48_450
    assert reply["free_margin"] == pytest.approx(28_116.67, abs=0.005)
    assert reply["volatility_before"] == pytest.approx(0.65 * 61_000 * 1.45 / 48_450)
    assert (reply["notional"], reply["binding"]) == (None, "volatility")
    hedge = await _sized(shared, method="correlation_aware", asset="BTC", side="short", max_leverage=3, **WORKED)
    assert hedge["calmest_notional"] == pytest.approx(61_000 * 1.45)


@SHARED
async def test_leverage_by_volatility(shared: Service) -> None:
    reply = await _sized(shared, method="vol_adjusted_leverage", assets=NAMES, max_leverage=3, vols={"BTC": 0.10})
    assert reply["leverage"] == {"BTC": 3, "ETH": pytest.approx(0.75), "SOL": pytest.approx(0.5)}
    assert reply["covariance"]["defaulted_vols"] == ["ETH", "SOL"]


@SHARED
async def test_a_regime_says_what_is_defaulted(shared: Service) -> None:
    assets = [*NAMES, {"asset": "DOGE"}]
    reply = await _sized(shared, method="risk_parity", assets=assets, regime="sell_off", vols={"DOGE": 1.5})
    shown = reply["covariance"]
    assert shown["source"] == "sell_off"
    assert shown["defaulted_pairs"] == ["BTC:DOGE", "DOGE:ETH", "DOGE:SOL"]
    assert shown["correlation"]["BTC:ETH"] == pytest.approx(0.935)
    assert shown["correlation"]["BTC:DOGE"] == pytest.approx(0.80)


async def test_a_covariance_of_the_stored_closes(service: Service) -> None:
    rng = np.random.default_rng(7)
    returns = rng.normal(0, 0.02, (120, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    levels = 100 * np.vstack([np.ones(2), np.cumprod(1 + returns, axis=0)])
    rows = [
        {"asset": asset, "date": str(date(2024, 1, 1) + timedelta(days=t)), "close": float(level)}
        for k, asset in enumerate(("BTC", "ETH"))
        for t, level in enumerate(levels[:, k].tolist())
    ]
    posted = await service.post("/api/market/history", key="market", json={"closes": rows, "confirm": True})
    assert posted.status_code == 200
    window = {"window_days": 100}
    two = await _sized(service, method="risk_parity", assets=NAMES[:2], covariance=window)
    shown, known = two["covariance"], np.cov(returns[-100:].T) * 365
    assert shown["vols"]["BTC"] == pytest.approx(math.sqrt(known[0, 0]), rel=1e-9)
    rho = known[0, 1] / math.sqrt(known[0, 0] * known[1, 1])
    assert shown["correlation"]["BTC:ETH"] == pytest.approx(rho, rel=1e-9)
    assert (shown["source"], shown["method"], shown["defaulted_vols"]) == ("history", "sample", [])
    last = date.fromisoformat(two["history"]["to"])
    assert two["history"] | {"age_days": 0} == {
        "version": 1, "from": str(last - timedelta(days=99)), "to": str(last), "days": 100, "age_days": 0,
    }  # fmt: skip
    given: dict[str, Any] = {"vols": {"BCT": 1}, "correlation": {"BTC": {"EHT": 0}}}
    typo = await _sized(service, method="risk_parity", assets=NAMES[:2], **given)
    assert (typo["covariance"]["unused_vols"], typo["covariance"]["unused_pairs"]) == (["BCT"], ["BTC:EHT"])
    three = (await _sized(service, method="risk_parity", assets=NAMES, covariance=window))["covariance"]
    assert (three["defaulted_vols"], three["defaulted_pairs"]) == (["SOL"], ["BTC:SOL", "ETH:SOL"])
    assert three["too_short"] == {"SOL": 0}
    assert three["repair_distance"] > 0  # at .95 and .92 with a third, two can't be at .6


async def test_the_buffer_before_an_event(service: Service) -> None:
    body = {
        "method": "pre_event_buffer",
        "event": EVENT,
        "positions": [
            {"symbol": "BTC-PERP", "side": "long", "size": 0.4, "mark_price": 50_000},
            {"symbol": "ETH-PERP", "side": "short", "size": 4, "mark_price": 2_500},
        ],
        "collateral": [
            {"asset": "USDC", "amount": 10_000},
            {"asset": "BTC", "amount": 0.4},
            {"asset": "SOL", "amount": 100, "price": 100},
        ],
    }
    reply = await _sized(service, **body)
    assert reply["conversions"] == [{"asset": "SOL", "amount": 100, "proceeds": 10_000}]
    assert (reply["stable_share_before"], reply["stable_share"]) == (0.25, 0.5)
    assert [(o["symbol"], o["side"], o["notional"]) for o in reply["orders"]] == [
        ("BTC-PERP", "sell", 5_000),
        ("ETH-PERP", "buy", 2_500),
    ]
    assert reply["after"]["equity"] - reply["before"]["equity"] == pytest.approx(1_500)
    await service.prices(BTC=50_000)
    alice = await service.agent()
    await alice.deposit(USDC=20_000)
    await alice.order("BTC-PERP", "buy", 1)
    own = await alice.post("/quotes/sizing", {"method": "pre_event_buffer", "book": "account", "event": EVENT})
    (order,) = own["orders"]
    assert (order["symbol"], order["side"], float(order["size"])) == ("BTC-PERP", "sell", 0.25)


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({}, "missing_field", "/method"),
        ({"method": "guess"}, "invalid_value", "/method"),
        ({"method": "lp"}, "missing", "/assets"),
        ({"method": "lp", "assets": []}, "missing", "/assets"),
        ({"method": "lp", "assets": [{"asset": "BTC"}]}, "missing", "/assets/0/edge"),
        ({"method": "lp", "assets": [{"asset": "BTC", "edge": 1, "budget": 1}]}, "not_allowed", "/assets/0/budget"),
        ({"method": "lp", "assets": [{"asset": "BTC", "edge": "nan"}]}, "invalid_value", "/assets/0/edge"),
        ({"method": "risk_parity", "assets": NAMES, "utilization": 0.6}, "not_allowed", "/utilization"),
        ({"method": "risk_parity", "assets": NAMES, **WORKED}, "not_allowed", "/collateral"),
        ({"method": "risk_parity", "assets": NAMES + NAMES}, "duplicate_asset", "/assets/3/asset"),
        ({"method": "risk_parity", "assets": [{"asset": f"A{i}"} for i in range(201)]}, "too_many_items", "/assets"),
        ({"method": "risk_parity", "assets": [{"asset": "DOGE"}]}, "missing_volatility", "/vols/DOGE"),
        (
            {"method": "risk_parity", "assets": NAMES, "regime": "normal", "covariance": {}},
            "conflicting_covariance",
            "/covariance",
        ),
        (
            {"method": "risk_parity", "assets": NAMES, "correlation": {"BTC": {"ETH": 0.5}, "ETH": {"BTC": 0.6}}},
            "not_symmetric",
            "/correlation/ETH/BTC",
        ),
        ({"method": "risk_parity", "assets": NAMES, "correlation": {"BTC": {"ETH": 2}}}, "invalid_value", None),
        ({"method": "risk_parity", "assets": NAMES, "covariance": {"method": "oracle"}}, "invalid_value", None),
        ({"method": "correlation_aware", "asset": "BTC", "max_leverage": 3}, "missing", "/equity"),
        ({"method": "correlation_aware", "asset": "BTC"}, "missing", "/max_leverage"),
        (
            {"method": "correlation_aware", "asset": "BTC", "max_leverage": 3, "equity": 1, **WORKED},
            "not_allowed",
            "/equity",
        ),
        ({"method": "pre_event_buffer", "event": EVENT, "positions": [OPTION]}, "linear_only", "/positions/0/strike"),
        (
            {"method": "pre_event_buffer", "event": EVENT | {"ends_at": EVENT["starts_at"]}, **WORKED},
            "out_of_order",
            "/event/ends_at",
        ),
        (
            {"method": "pre_event_buffer", "event": EVENT | {"starts_at": "soon"}, "positions": [LINEAR]},
            "invalid_value",
            "/event/starts_at",
        ),
    ],
)
@SHARED
async def test_hostile_bodies(shared: Service, body: dict[str, Any], code: str, pointer: str | None) -> None:
    problem(await shared.post(SIZING, json=body), 422, code, pointer)
