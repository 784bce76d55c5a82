"""Venues' models over HTTP: Deribit's and Paradex's figures, inputs, stored parameters in versions, refusals."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, get_args

import pytest

from app.api.quote_request import MarginModelName
from app.domain.margin.registry import MODELS
from tests.api.bodies import LINEAR
from tests.api.service import MARGIN, problem

if TYPE_CHECKING:
    from tests.api.service import Service

VENUES = "/api/market/venues"
WORKED: dict[str, Any] = {
    "positions": [
        {"symbol": "BTC-PERP", "side": "long", "size": 0.314538364, "mark_price": 65910.57},
        {"symbol": "BTC-28JUN24", "side": "short", "size": 0.001187534, "mark_price": 67371.75},
    ],
    "models": ["deribit"],
    "as_of": "2024-06-17T16:02:20Z",
    "market": {"prices": {"BTC": 65666.19}},
}
SHARED = pytest.mark.asyncio(loop_scope="module")
"""For tests that change nothing, and so share one app."""


async def model(service: Service, body: dict[str, Any] = WORKED, **venues: Any) -> dict[str, Any]:
    """Return the reply's first model, the request saying so much of venues."""
    market = body["market"] | ({"venues": venues} if venues else {})
    found: dict[str, Any] = (await service.quote(**{**body, "market": market}))["models"][body["models"][0]]
    return found


def test_a_request_may_name_every_model() -> None:
    assert set(get_args(MarginModelName)) == set(MODELS)


@SHARED
async def test_deribits_published_case(shared: Service) -> None:
    found = await model(shared, deribit={"BTC": {"mmp": 0.06, "open_orders": "0.000018212"}})
    btc = found["per_underlying"]["BTC"]
    assert btc["worst_loss_coin"] == pytest.approx(0.05968587238, abs=1e-11)
    assert btc["roll_shock_coin"] == pytest.approx(0.00315725898, abs=1e-11)
    assert btc["initial_margin_coin"] == pytest.approx(0.122861343, abs=1e-8)
    assert btc["maintenance_margin_coin"] == pytest.approx(0.050274505, abs=1e-8)
    assert found["initial_margin"] == pytest.approx(65666.19 * btc["initial_margin_coin"])
    assert found["worst"]["rule"] == "matrix"
    scenario = found["scenarios"][found["worst"]["index"]]
    assert (scenario["price_move"], scenario["price_move_unit"]) == (-1.0, "price_range")
    assert scenario["pnl"] == found["worst"]["pnl"]
    assert found["not_modelled"] == ["delta_shock", "correlation_contingency"]
    assert found["parameters"]["BTC"]["extended_moves"] == [-0.66, -0.33, 0.5, 1, 2, 3, 4, 5]
    shares = sum(share["initial_margin"] for share in found["per_position"])
    assert shares == pytest.approx(found["initial_margin"])


@SHARED
async def test_a_quote_may_have_parameters_of_its_own(shared: Service) -> None:
    plain = await model(shared)
    wider = await model(shared, deribit={"BTC": {"parameters": {"price_range": 0.2}}})
    assert wider["parameters"]["BTC"] == plain["parameters"]["BTC"] | {"price_range": 0.2}
    assert wider["initial_margin"] > plain["initial_margin"]
    assert await model(shared) == plain


@SHARED
async def test_an_expiry_of_an_instrument_counts(shared: Service) -> None:
    """A future of one year rolls at e^.075 - 1."""
    body = WORKED | {"positions": [{"symbol": "BTC-FAR", "side": "long", "size": 1, "mark_price": 70000}]}
    instrument = {"kind": "future", "expiry": "2025-06-17T18:02:20+02:00"}
    market = WORKED["market"] | {"instruments": {"BTC-FAR": instrument}}
    reply = await shared.quote(**{**body, "market": market})
    roll = reply["models"]["deribit"]["per_underlying"]["BTC"]["roll_shock_coin"]
    assert roll == pytest.approx(0.07788415, abs=1e-8)
    assert reply["parameters"]["instruments"]["BTC-FAR"]["expiry"] == "2025-06-17T16:02:20Z"


@SHARED
async def test_several_venues_at_once_are_what_each_is_alone(shared: Service) -> None:
    names = ["deribit", "okx", "derive", "paradex"]
    together = await shared.quote(**{**WORKED, "models": names})
    for name in names:
        assert await model(shared, WORKED | {"models": [name]}) == together["models"][name]
        assert together["capital_freed"][name] < 1.0


@SHARED
async def test_what_is_said_of_no_position_is_told(shared: Service) -> None:
    assert "unused_inputs" not in await model(shared)
    found = await model(shared, deribit={"ETH": {"mmp": 1}, "SOL": {"mmp": 2}})
    assert found["unused_inputs"] == "ETH, SOL"


@pytest.mark.parametrize(
    ("symbol", "others", "unused"),
    [
        ("SOL-PERP", {"parameters": {"price_range": 0.3}}, None),
        ("BTC-PERP", {"parameters": {"price_range": 0.3}}, "default"),  # it has its own
        ("SOL-PERP", {"parameters": {"price_range": 0.3}, "mmp": 1}, "default"),
    ],
)
@SHARED
async def test_parameters_of_all_others_are_used(
    shared: Service, symbol: str, others: dict[str, Any], unused: str | None
) -> None:
    body = {"positions": [LINEAR | {"symbol": symbol}], "models": ["deribit"], "market": {}}
    found = await model(shared, body, deribit={"default": others})
    assert found.get("unused_inputs") == unused
    assert found["parameters"][symbol[:3]]["price_range"] == (0.3 if symbol == "SOL-PERP" else 0.16)


@SHARED
async def test_paradex(shared: Service) -> None:
    row = {"symbol": "BTC-USD-PERP", "side": "long", "size": 1, "mark_price": 70000}
    body = {"positions": [row], "models": ["paradex"], "market": {}}
    found = await model(shared, body, paradex={"BTC": {"fee_provision": 21}})
    assert (found["initial_margin"], found["maintenance_margin"]) == (11_221.0, 5_621.0)
    assert found["not_modelled"] == ["funding_provision"]
    assert len(found["scenarios"]) == 24


@pytest.mark.parametrize(
    ("venues", "code", "pointer"),
    [
        ({"kraken": {}}, "unknown_field", "/market/venues/kraken"),
        ({"deribit": []}, "invalid_value", "/market/venues/deribit"),
        ({"deribit": {" BTC": {}}}, "invalid_value", "/market/venues/deribit"),
        ({"deribit": {"BTC": {"mr2": 1}}}, "unknown_field", "/market/venues/deribit/BTC/mr2"),
        ({"deribit": {"BTC": {"mmp": -1}}}, "out_of_range", "/market/venues/deribit/BTC/mmp"),
        ({"deribit": {"BTC": {"mmp": 1e16}}}, "out_of_range", "/market/venues/deribit/BTC/mmp"),
        ({"deribit": {"BTC": {"parameters": {"price_rang": 1}}}}, "unknown_field", "/parameters/price_rang"),
        ({"deribit": {"BTC": {"parameters": {"price_range": 1}}}}, "out_of_range", "/parameters/price_range"),
        ({"deribit": {"BTC": {"parameters": {"price_range": None}}}}, "invalid_value", "/parameters/price_range"),
        ({"deribit": {"BTC": {"parameters": {"price_buckets": 1.5}}}}, "invalid_value", "/parameters/price_buckets"),
        ({"deribit": {"BTC": {"parameters": {"price_buckets": 0}}}}, "out_of_range", "/parameters/price_buckets"),
        ({"deribit": {"BTC": {"parameters": {"extended_moves": []}}}}, "too_many_items", "extended_moves"),
        ({"deribit": {"BTC": {"parameters": {"extended_moves": [0.5] * 101}}}}, "too_many_items", "extended_moves"),
        ({"deribit": {"BTC": {"parameters": {"extended_moves": [-1]}}}}, "out_of_range", "extended_moves"),
        ({"paradex": {"BTC": {"parameters": {"scenarios": [[0.1, 0.2]]}}}}, "invalid_value", "scenarios"),
        ({"paradex": {"BTC": {"parameters": {"scenarios": [[0.1, 0.2, 0]]}}}}, "out_of_order", "scenarios"),
        ({"paradex": {"BTC": {"parameters": {"hedged_delta_rate": 0.05}}}}, "out_of_order", "hedged_delta_rate"),
        ({"paradex": {f"X{k}": {} for k in range(501)}}, "too_many_items", "/market/venues/paradex"),
    ],
)
@SHARED
async def test_hostile_bodies(shared: Service, venues: dict[str, Any], code: str, pointer: str) -> None:
    body = WORKED | {"market": WORKED["market"] | {"venues": venues}}
    refused = problem(await shared.post(MARGIN, json=body), 422, code)
    assert pointer in refused["errors"][0]["pointer"]


@pytest.mark.parametrize(
    ("position", "instrument", "code", "pointer"),
    [
        ("SOL-PERP", None, "missing_parameters", "/market/venues/deribit/SOL/parameters"),
        ("BTC-X", {"kind": "future"}, "missing_expiry", "/market/instruments/BTC-X/expiry"),
        ("BTC-X", {"kind": "future", "expiry": "soon"}, "invalid_value", "/market/instruments/BTC-X/expiry"),
        ("BTC-X", {"kind": "future", "expiry": "2300-01-01T00:00:00Z"}, "out_of_range", "/expiry"),
        ("BTC-X", {"kind": "future", "expiry": "9999-12-31T23:59:59-10:00"}, "out_of_range", "/expiry"),
        ("BTC-X", {"kind": "future", "expiry": "0001-01-01T00:00:00+10:00"}, "out_of_range", "/expiry"),
        ("BTC-X", {"expiry": "2030-01-01T00:00:00Z"}, "not_allowed", "/market/instruments/BTC-X/expiry"),
    ],
)
@SHARED
async def test_what_lacks_is_named(
    shared: Service, position: str, instrument: dict[str, Any] | None, code: str, pointer: str
) -> None:
    market = {"instruments": {position: instrument}} if instrument else {}
    body = {"positions": [LINEAR | {"symbol": position}], "models": ["deribit"], "market": market}
    refused = problem(await shared.post(MARGIN, json=body), 422, code)
    assert pointer in refused["errors"][0]["pointer"]


@SHARED
async def test_underlyings_with_scenarios_of_their_own_are_limited(shared: Service) -> None:
    """All are shown to every underlying, so that a reply would grow as their square."""
    rows = [LINEAR | {"symbol": f"A{k}-PERP", "mark_price": 100} for k in range(200)]

    def body(first_move: float) -> dict[str, Any]:
        units = {f"A{k}": {"parameters": {"extended_moves": [k * first_move + 1]}} for k in range(200)}
        return {"positions": rows, "models": ["deribit"], "market": {"venues": {"deribit": units}}}

    refused = problem(await shared.post(MARGIN, json=body(0.01)), 422, "too_many_items")
    assert refused["errors"][0]["pointer"] == "/market/venues/deribit"
    assert len((await shared.quote(**body(0)))["models"]["deribit"]["scenarios"]) == 28


@SHARED
async def test_a_key_that_stands_twice_is_found(shared: Service) -> None:
    raw = '{"positions": [], "market": {"venues": {"deribit": {"BTC": {"mmp": 1, "mmp": 2}}}}}'
    problem(await shared.post(MARGIN, content=raw), 422, "duplicate_key")


# --- stored parameters


async def put(service: Service, path: str, **body: Any) -> dict[str, Any]:
    answer = await service.put(f"{VENUES}/{path}", json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


async def test_parameters_are_stored_in_versions(service: Service) -> None:
    first = (await service.get(f"{VENUES}/deribit/BTC")).json()
    assert (first["version"], first["price_range"]) == (1, 0.16)
    before = await model(service)
    second = await put(service, "deribit/BTC", price_range=0.2, extended_moves=[1.0], version=1)
    assert second == first | {"version": 2, "price_range": 0.2, "extended_moves": [1.0]}
    assert (await service.get(f"{VENUES}/deribit/BTC")).json() == second
    assert (await service.get(f"{VENUES}/deribit/BTC", params={"version": 1})).json() == first
    after = await service.quote(**WORKED)
    assert after["parameters"]["version"] == 2
    assert after["models"]["deribit"]["initial_margin"] > before["initial_margin"]
    assert len(after["models"]["deribit"]["scenarios"]) == 28
    changes = (await service.get("/api/market/changes")).json()["changes"]
    assert (changes[0]["version"], changes[0]["kind"], changes[0]["name"]) == (2, "venue", "deribit:BTC")
    audit = (await service.get("/api/audit", key="admin")).json()["records"]
    assert ("market.venue", "deribit:BTC") in [(line["action"], line["subject"]) for line in audit]


async def test_the_same_again_is_no_new_version(service: Service) -> None:
    assert (await put(service, "deribit/BTC", price_range=0.16))["version"] == 1
    assert (await service.get(VENUES)).json()["version"] == 1


async def test_a_new_underlying_starts_from_the_default(service: Service) -> None:
    body = WORKED | {"positions": [LINEAR | {"symbol": "SOL-PERP", "mark_price": 150}]}
    problem(await service.post(MARGIN, json=body), 422, "missing_parameters")
    problem(await service.get(f"{VENUES}/deribit/SOL"), 404, "parameters_not_found")
    sol = await put(service, "deribit/SOL", price_range=0.3, version=0)
    assert (sol["price_range"], sol["minimum_roll"]) == (0.3, 0.01)
    assert (await model(service, body))["initial_margin"] > 0
    hype = await put(service, "paradex/HYPE", hedged_delta_rate=0.015)
    assert (hype["hedged_delta_rate"], hype["net_delta_rate"]) == (0.015, 0.02)
    listed = (await service.get(VENUES)).json()["venues"]
    assert list(listed) == ["deribit", "okx", "derive", "paradex"]
    assert set(listed["deribit"]) == {"BTC", "ETH", "SOL"}
    assert set(listed["paradex"]) == {"default", "HYPE"}


async def test_two_writers_of_one_version_do_not_both_win(service: Service) -> None:
    puts = [service.put(f"{VENUES}/deribit/BTC", json={"price_range": 0.2 + k / 100, "version": 1}) for k in range(6)]
    answers = await asyncio.gather(*puts)
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 5
    problem(next(a for a in answers if a.status_code == 409), 409, "version_conflict")
    assert (await service.get(f"{VENUES}/deribit/BTC")).json()["version"] == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("deribit/BTC", {"price_range": 2}, 422, "out_of_range"),
        ("deribit/BTC", {"price_range": 0.2, "version": 7}, 409, "version_conflict"),
        ("deribit/BTC", {"minimum_tiers": [[0, 1]]}, 422, "unknown_field"),
        ("deribit/%20", {"price_range": 0.2}, 422, "invalid_symbol"),
        ("okx/BTC", {"minimum_tiers": [[1, 1]]}, 422, "out_of_order"),
        ("kraken/BTC", {"price_range": 0.2}, 405, "method_not_allowed"),
    ],
)
async def test_refused_parameters_change_nothing(
    service: Service, path: str, body: dict[str, Any], status: int, code: str
) -> None:
    problem(await service.put(f"{VENUES}/{path}", json=body), status, code)
    assert (await service.get(VENUES)).json()["version"] == 1


async def test_only_an_admin_sets_them(service: Service) -> None:
    for key in ("market", "agent"):
        answer = await service.put(f"{VENUES}/deribit/BTC", key=key, json={"price_range": 0.2})
        problem(answer, 403, "scope_missing")
        assert (await service.get(VENUES, key=key)).status_code == 200
    problem(await service.get(f"{VENUES}/kraken/BTC"), 404, "venue_not_found")


async def test_an_expiry_is_stored_and_stays(service: Service) -> None:
    path = "/api/market/instruments/BTC-Q"
    far = "2027-06-25T08:00:00Z"
    stored = await service.put(path, json={"underlying": "BTC", "kind": "future"})
    assert stored.json()["expiry"] is None
    stored = await service.put(path, json={"expiry": "2027-06-25T10:00:00+02:00"})
    assert stored.json()["expiry"] == far
    assert (await service.get(path)).json()["expiry"] == far
    problem(await service.put(path, json={"expiry": "2028-06-25T08:00:00Z"}), 409, "contract_fixed")
    problem(await service.put(path, json={"expiry": None}), 409, "contract_fixed")
    problem(await service.put("/api/market/instruments/BTC-PERP", json={"expiry": far}), 422, "not_allowed")
    many = {"instruments": {"BTC-R": {"underlying": "BTC", "kind": "future", "expiry": "never"}}}
    refused = problem(await service.put("/api/market/instruments", json=many), 422, "invalid_value")
    assert refused["errors"][0]["pointer"] == "/instruments/BTC-R/expiry"
