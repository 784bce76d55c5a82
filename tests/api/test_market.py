"""Market parameters and prices over HTTP: versions, conflicts, pages, names, digits, pointers."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import quote as escaped

import pytest

from tests.api.bodies import LINEAR
from tests.api.service import problem

if TYPE_CHECKING:
    from tests.api.service import Service

ASSETS, INSTRUMENTS = "/api/market/assets", "/api/market/instruments"
PRICES, PARAMETERS = "/api/market/prices", "/api/market/parameters"
CORRELATIONS, CHANGES = "/api/market/correlations", "/api/market/changes"

SHARED = pytest.mark.asyncio(loop_scope="module")
"""For tests that change nothing, and so share one app."""


async def _post(service: Service, prices: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = await service.post(PRICES, key="market", json={"prices": prices, **more})
    assert answer.status_code == 202, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


async def _pages(service: Service, path: str, noun: str, limit: int) -> list[list[dict[str, Any]]]:
    """Return the pages of a list, each with at most `limit` items."""
    pages: list[list[dict[str, Any]]] = []
    cursor = ""
    for _ in range(1_000):
        answer = await service.get(path, params={"limit": limit, "cursor": cursor})
        assert answer.status_code == 200, answer.text
        pages.append(answer.json()[noun])
        cursor = answer.json()["next_cursor"]
        if cursor is None:
            return pages
    raise AssertionError("the cursors never end")


# --- assets and instruments


async def test_an_asset_keeps_what_a_put_leaves_out(service: Service) -> None:
    before = (await service.get(f"{ASSETS}/BTC")).json()
    put = (await service.put(f"{ASSETS}/BTC", json={"haircut": 0.2, "volatility": None})).json()
    assert put == before | {"haircut": 0.2, "volatility": None, "version": 2}
    assert (await service.get(f"{ASSETS}/BTC")).json() == put
    assert (await service.get(f"{ASSETS}/BTC?version=1")).json() == before


async def test_the_same_put_twice_changes_nothing(service: Service) -> None:
    first = await service.put(f"{ASSETS}/DOGE", json={"haircut": 0.4})
    again = await service.put(f"{ASSETS}/DOGE", json={"haircut": 0.4})
    assert first.json() == again.json()
    assert len((await service.get(CHANGES)).json()["changes"]) == 2


async def test_a_version_is_expected_or_conflicts(service: Service) -> None:
    for path in (f"{ASSETS}/NEW", f"{INSTRUMENTS}/NEW-PERP"):
        made = await service.put(path, json={"initial_margin_rate": 0.5, "version": 0})
        assert made.status_code == 200
        version = made.json()["version"]
        change = {"initial_margin_rate": 0.6}
        problem(await service.put(path, json=change | {"version": 0}), 409, "version_conflict")
        problem(await service.put(path, json=change | {"version": version + 1}), 409, "version_conflict")
        problem(await service.put(path, json=change | {"version": 10**30}), 409, "version_conflict")
        assert (await service.put(path, json=change | {"version": version})).status_code == 200
        problem(await service.put(path, json=change | {"version": version}), 409, "version_conflict")
        problem(await service.put(path, json=change | {"version": -1}), 422, "invalid_value", "/version")


async def test_one_of_ten_writers_at_once_wins(service: Service) -> None:
    puts = [service.put(f"{ASSETS}/BTC", json={"haircut": 0.2 + i / 100, "version": 1}) for i in range(10)]
    answers = await asyncio.gather(*puts)
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 9
    won = next(answer for answer in answers if answer.status_code == 200)
    assert (await service.get(f"{ASSETS}/BTC")).json() == won.json()


@pytest.mark.parametrize(
    ("path", "body", "pointer"),
    [
        (f"{ASSETS}/BTC", {"haircut": 1.1}, "/haircut"),
        (f"{ASSETS}/BTC", {"haircut": "nan"}, "/haircut"),
        (f"{ASSETS}/BTC", {"haircut": None}, "/haircut"),
        (f"{ASSETS}/BTC", {"kind": "token"}, "/kind"),
        (f"{ASSETS}/BTC", {"maintenance_margin_rate": 0.31}, "/maintenance_margin_rate"),
        (f"{ASSETS}/BTC", {"price_range": 1}, "/price_range"),
        (f"{ASSETS}/BTC", {"hair_cut": 0.1}, "/hair_cut"),
        (f"{INSTRUMENTS}/BTC-PERP", {"maintenance_margin_rate": 0.31}, "/maintenance_margin_rate"),
        (f"{INSTRUMENTS}/BTC-PERP", {"contract_size": 0}, "/contract_size"),
        (f"{INSTRUMENTS}/X-PERP", {"underlying": "A B"}, "/underlying"),
        (PARAMETERS, {"parameters": {"target_utilization": 2}}, "/parameters/target_utilization"),
        (PARAMETERS, {"parameters": {"target_utilization": "x"}}, "/parameters/target_utilization"),
        (PARAMETERS, {"parameters": {"zone_yellow": 0.8}}, "/parameters/zone_yellow"),
        (PARAMETERS, {"parameters": {"a/b": 1}}, "/parameters/a~1b"),
        (PARAMETERS, {"parameters": None}, "/parameters"),
        (CORRELATIONS, {"matrix": "stress", "pair": ["A B", "C"], "value": 0.5}, "/pair/0"),
        (CORRELATIONS, {"matrix": "stress", "pair": ["C", "A B"], "value": 0.5}, "/pair/1"),
        (CORRELATIONS, {"matrix": "stress", "pair": ["A", "A"], "value": 0.5}, "/pair/1"),
        (CORRELATIONS, {"matrix": "stress", "pair": ["A"], "value": 0.5}, "/pair"),
        (CORRELATIONS, {"matrix": "stress", "pair": ["A", "B"], "value": 1.5}, "/value"),
        (CORRELATIONS, {"matrix": "calm", "pair": ["A", "B"], "value": 0.5}, "/matrix"),
    ],
)
@SHARED
async def test_a_refused_put_points_at_the_field(
    shared: Service, path: str, body: dict[str, Any], pointer: str
) -> None:
    answer = await shared.put(path, json=body)
    problem(answer, 422, answer.json()["code"], pointer)
    assert [change["kind"] for change in (await shared.get(CHANGES)).json()["changes"]] == ["seed"]


@pytest.mark.parametrize("symbol", ["BTC/USDT:USDT", "BTC-27DEC26", "1000PEPE.P", "a:b:c", "A/B/C", "X" * 64])
async def test_names_of_instruments_in_the_path(service: Service, symbol: str) -> None:
    for path in (f"{INSTRUMENTS}/{symbol}", f"{INSTRUMENTS}/{escaped(symbol, safe='')}"):
        put = await service.put(path, json={"initial_margin_rate": 0.5, "underlying": "BTC"})
        assert put.status_code == 200, put.text
        got = (await service.get(path)).json()
        assert got == put.json()
        assert (got["id"], got["symbol"], got["underlying"]) == (symbol, symbol, "BTC")
    position = LINEAR | {"symbol": symbol, "leverage": 10}
    reply = await service.quote(positions=[position], models=["isolated"])
    assert reply["models"]["isolated"]["initial_margin"] == 30_500


@pytest.mark.parametrize("name", ["%00", "A%20B", "%FF", "%F0%9F%98%80", "X" * 65, "%27%3B--", "..%2F.."])
@SHARED
async def test_what_is_no_name_is_not_found_and_not_made(shared: Service, name: str) -> None:
    for root in (ASSETS, INSTRUMENTS):
        found = await shared.get(f"{root}/{name}")
        assert found.status_code in (404, 422), found.text
        problem(found, found.status_code, found.json()["code"])
        made = await shared.put(f"{root}/{name}", json={})
        assert made.status_code in (404, 422), made.text
        problem(made, made.status_code, made.json()["code"])


async def test_what_is_not_listed_is_not_found(service: Service) -> None:
    problem(await service.get(f"{ASSETS}/NOPE"), 404, "asset_not_found")
    problem(await service.get(f"{INSTRUMENTS}/NOPE"), 404, "instrument_not_found")
    await service.put(f"{ASSETS}/LATER", json={})
    problem(await service.get(f"{ASSETS}/LATER?version=1"), 404, "asset_not_found")


async def test_an_instrument_stays_the_contract_that_it_is(service: Service) -> None:
    answer = await service.put(f"{INSTRUMENTS}/BTC-PERP", json={"underlying": "ETH"})
    problem(answer, 409, "contract_fixed", "/underlying")
    problem(await service.put(f"{INSTRUMENTS}/BTC-PERP", json={"kind": "spot"}), 409, "contract_fixed", "/kind")


async def test_a_rate_set_to_null_is_the_underlyings_again(service: Service) -> None:
    async def margin() -> float:
        reply = await service.quote(positions=[LINEAR | {"leverage": 10}], models=["isolated"])
        initial: float = reply["models"]["isolated"]["initial_margin"]
        return initial

    await service.put(f"{INSTRUMENTS}/BTC-PERP", json={"initial_margin_rate": 0.5})
    assert await margin() == 30_500
    await service.put(f"{INSTRUMENTS}/BTC-PERP", json={"initial_margin_rate": None})
    assert await margin() == pytest.approx(18_300)


async def test_many_instruments_in_pages(service: Service) -> None:
    names = [f"C{i}/USDT:USDT" for i in range(280)]
    for start in range(0, len(names), 40):
        chunk = names[start : start + 40]
        await asyncio.gather(*(service.put(f"{INSTRUMENTS}/{n}", json={"underlying": "BTC"}) for n in chunk))
    pages = await _pages(service, INSTRUMENTS, "instruments", 100)
    assert [len(page) for page in pages] == [100, 100, 84]
    listed = [item["id"] for page in pages for item in page]
    assert listed == sorted([*names, "BNB-PERP", "BTC-PERP", "ETH-PERP", "SOL-PERP"])
    assert len((await service.get(INSTRUMENTS)).json()["instruments"]) == 200


# --- parameters, correlations, changes


async def test_parameters_now_and_then(service: Service) -> None:
    first = (await service.get(PARAMETERS)).json()
    put = await service.put(PARAMETERS, json={"parameters": {"scenario_factor": 1.3, "zone_red": "0.9"}})
    now = (await service.get(PARAMETERS)).json()
    assert put.json() == now
    assert (now["version"], now["models"]["scenario_factor"], now["settings"]["zone_red"]) == (2, 1.3, 0.9)
    assert (await service.get(f"{PARAMETERS}?version=1")).json() == first
    assert (await service.get(f"{PARAMETERS}?version=2")).json() == now
    problem(await service.get(f"{PARAMETERS}?version=3"), 404, "version_not_found")
    problem(await service.put(PARAMETERS, json={"parameters": {}, "version": 1}), 409, "version_conflict")


async def test_correlations_in_either_order(service: Service) -> None:
    body = {"matrix": "hedge", "pair": ["ETH", "BTC"], "value": 0.7}
    put = (await service.put(CORRELATIONS, json=body)).json()
    assert put["hedge_correlation"]["pairs"]["BTC:ETH"] == 0.7
    assert put["stress_correlation"]["pairs"]["BTC:ETH"] == 0.95
    other = (await service.put(CORRELATIONS, json={"matrix": "hedge", "value": 0.3})).json()
    assert other["hedge_correlation"]["other"] == 0.3
    again = body | {"pair": ["BTC", "ETH"], "value": 0.8}
    problem(await service.put(CORRELATIONS, json=again | {"version": 1}), 409, "version_conflict")
    assert (await service.put(CORRELATIONS, json=again | {"version": 2})).status_code == 200


@pytest.mark.parametrize("version", ["0", "-1", "x", "1.5", ""])
@SHARED
async def test_a_version_that_is_none(shared: Service, version: str) -> None:
    for path in (PARAMETERS, f"{ASSETS}/BTC", f"{INSTRUMENTS}/BTC-PERP"):
        document = problem(await shared.get(f"{path}?version={version}"), 422, "invalid_parameter", "/version")
        code = "number_out_of_range" if version in ("0", "-1") else "invalid_value"
        assert [error["code"] for error in document["errors"]] == [code]


@pytest.mark.parametrize("number", ["2147483648", "9223372036854775808", "9" * 30, "9" * 64])
@SHARED
async def test_versions_and_cursors_past_every_integer(shared: Service, number: str) -> None:
    for path in (PARAMETERS, f"{ASSETS}/BTC", f"{INSTRUMENTS}/BTC-PERP"):
        answer = await shared.get(f"{path}?version={number}")
        assert answer.status_code in (200, 404, 422), answer.text
    answer = await shared.get(f"{CHANGES}?cursor={number}")
    assert answer.status_code in (200, 422), answer.text


async def test_changes_newest_first_in_pages_with_who_made_them(service: Service) -> None:
    for i in range(5):
        await service.put(f"{ASSETS}/A{i}", json={}, key="settings")
    pages = await _pages(service, CHANGES, "changes", 2)
    found = [change for page in pages for change in page]
    assert [change["version"] for change in found] == [6, 5, 4, 3, 2, 1]
    assert [change["name"] for change in found[:2]] == ["A4", "A3"]
    assert {change["changed_by"] for change in found} == {"admin", "migration"}
    assert all(change["id"] == str(change["version"]) for change in found)
    problem(await service.get(f"{CHANGES}?cursor=x"), 422, "invalid_cursor", "/cursor")


@pytest.mark.parametrize("path", [ASSETS, INSTRUMENTS, PRICES, CHANGES])
@pytest.mark.parametrize("limit", ["0", "201", "-1", "x", "1e2", "9" * 30])
@SHARED
async def test_limits_of_a_page(shared: Service, path: str, limit: str) -> None:
    document = problem(await shared.get(f"{path}?limit={limit}"), 422, "invalid_parameter", "/limit")
    code = "invalid_value" if limit in ("x", "1e2") else "number_out_of_range"
    assert [error["code"] for error in document["errors"]] == [code]


# --- prices


async def test_the_newer_price_wins_and_a_repeated_post_is_answered_alike(service: Service) -> None:
    at = "2026-01-02T03:04:05Z"
    first = await _post(service, {"BTC": 88_500, "ETH": 2_840}, as_of=at)
    assert first == {"accepted": 2, "ignored": 0, "as_of": at}
    assert await _post(service, {"BTC": 88_500, "ETH": 2_840}, as_of=at) == first
    older = await _post(service, {"BTC": 1, "SOL": 150}, as_of="2026-01-01T00:00:00+01:00")
    assert (older["accepted"], older["ignored"]) == (1, 1)
    listed = {item["id"]: item for item in (await service.get(PRICES)).json()["prices"]}
    assert listed["BTC"]["price"] == 88_500
    assert listed["BTC"]["as_of"] == at
    assert listed["BTC"]["age_seconds"] > 0
    assert listed["SOL"]["as_of"] == "2025-12-31T23:00:00Z"


@pytest.mark.parametrize(
    ("spelled", "printed"),
    [
        ("0.1", "0.1"),
        ("88500.12", "88500.12"),
        ('"2840.5"', "2840.5"),
        ("1e-8", "0.00000001"),
        ("123456789.123456789012345678", "123456789.123456789012345678"),
        ('"0.123456789012345678"', "0.123456789012345678"),
        ("999999999999999.999999999999999999", "999999999999999.999999999999999999"),
    ],
)
async def test_exact_digits(service: Service, spelled: str, printed: str) -> None:
    """API.md: exact decimal digits out; a number or a decimal string in."""
    body = f'{{"prices":{{"BTC":{spelled}}}}}'
    assert (await service.post(PRICES, key="market", content=body)).status_code == 202
    text = (await service.get(PRICES)).text
    shown = text.partition('"price":')[2].partition(",")[0]
    assert float(shown) == float(printed)
    assert format(Decimal(shown), "f") == printed


@pytest.mark.parametrize(
    "spelled",
    ["0", "-1", "1e15", "1e-19", '"nan"', '"sNaN"', '"inf"', "NaN", "1e400", "1E+1000000", "1E-1000000", "true", "null",
     '"1E+999999999999999999999"', '""', '"0x10"', "[1]", "{}", "9" * 5_000, '"1_000"', '" 5 "', '"\u0663"'],
)  # fmt: skip
@SHARED
async def test_a_price_that_is_none(shared: Service, spelled: str) -> None:
    body = f'{{"prices":{{"ETH":5,"A/B":{spelled}}}}}'
    answer = await shared.post(PRICES, key="market", content=body.encode())
    problem(answer, 422, answer.json().get("code", ""), "/prices/A~1B")
    assert (await shared.get(PRICES)).json()["prices"] == []


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b'{"prices":{"A B":1}}', "/prices/A B"),
        (b'{"prices":{"A\\n":1}}', "/prices/A\n"),
        (b'{"prices":{"":1}}', "/prices/"),
        (b'{"prices":{"BTC":1,"BTC":2}}', "/prices/BTC"),
        (b'{"prices":{"BTC":1},"prices":{}}', "/prices"),
        (b'{"prices":[]}', "/prices"),
        (b'{"price":{}}', "/price"),
        (b'{"prices":{},"as_of":"2026-01-01T00:00:00"}', "/as_of"),
        (b'{"prices":{"BTC":1},"as_of":"2126-01-01T00:00:00Z"}', "/as_of"),
        (b'{"prices":{"BTC":1},"as_of":"9999-12-31T23:59:59-10:00"}', "/as_of"),
        (b'{"prices":{"BTC":1},"as_of":"0001-01-01T00:00:00+10:00"}', "/as_of"),
        (b'{"prices":{"BTC":1},"as_of":"yesterday"}', "/as_of"),
    ],
)
@SHARED
async def test_refused_posts_point_at_the_field(shared: Service, body: bytes, pointer: str) -> None:
    answer = await shared.post(PRICES, key="market", content=body)
    problem(answer, 422, answer.json()["code"], pointer)


async def test_the_oldest_moment_spoils_no_list(service: Service) -> None:
    """Whatever moment a post is taken with, the list of prices and quotes go on."""
    await service.post(PRICES, key="market", json={"prices": {"OLD": 5}, "as_of": "0001-01-01T00:00:00Z"})
    await _post(service, {"BTC": 1})
    assert (await service.get(PRICES)).status_code == 200
    old = [{"asset": "OLD", "amount": 1}]
    answer = await service.post("/api/quotes/margin", json={"positions": [], "collateral": old})
    assert answer.status_code in (200, 422)


async def test_ten_thousand_prices(service: Service) -> None:
    prices = {f"S{i}": 1 + i for i in range(10_000)}
    assert (await _post(service, prices))["accepted"] == 10_000
    problem(await service.post(PRICES, key="market", json={"prices": prices | {"ONE": 1}}), 422, "too_many", "/prices")
    pages = await _pages(service, PRICES, "prices", 200)
    assert len(pages) in (50, 51)  # the last may be empty
    assert {item["id"]: item["price"] for page in pages for item in page} == prices


async def test_writers_of_prices_in_any_order(service: Service) -> None:
    """Two posts of the same symbols at once, in opposite orders: both are answered, none deadlocks."""
    names = [f"S{i}" for i in range(500)]
    posts = [_post(service, dict.fromkeys(names[:: (1, -1)[i % 2]], 1 + i)) for i in range(10)]
    replies = await asyncio.gather(*posts)
    assert all(reply["accepted"] + reply["ignored"] == 500 for reply in replies)


@SHARED
async def test_a_number_of_5_000_digits_beside_an_escape_is_refused(shared: Service) -> None:
    """The escape asks for a second look, whose parser takes no number of that length."""
    answer = await shared.post(PRICES, key="market", content=b'{"prices":{"A\\u0042":' + b"9" * 5_000 + b"}}")
    problem(answer, 400, "not_json")
