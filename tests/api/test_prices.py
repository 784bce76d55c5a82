"""One symbol's price and its history over HTTP. Posting and listing prices: test_market.py."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote as escaped

import pytest

from tests.api.service import problem

if TYPE_CHECKING:
    from tests.api.service import Service

PRICES = "/api/market/prices"
MINUTE = "2026-01-02T03:04"
SHARED = pytest.mark.asyncio(loop_scope="module")


async def _post(service: Service, as_of: str, prices: dict[str, Any]) -> None:
    answer = await service.post(PRICES, key="market", json={"prices": prices, "as_of": as_of})
    assert answer.status_code == 202, answer.text


async def _history(service: Service, symbol: str, **params: Any) -> dict[str, Any]:
    answer = await service.get(f"{PRICES}/{symbol}/history", params=params)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


@pytest.mark.parametrize("symbol", ["BTC", "BTC/USDT:USDT", "a:b:c", "A/B/C", "history", "A/history", "X" * 64])
async def test_the_price_and_the_bar_of_a_symbol(service: Service, symbol: str) -> None:
    await _post(service, f"{MINUTE}:05Z", {symbol: "88500.10"})
    for path in (f"{PRICES}/{symbol}", f"{PRICES}/{escaped(symbol, safe='')}"):
        bars = (await service.get(f"{path}/history")).json()["bars"]
        assert [(bar["minute"], bar["open"]) for bar in bars] == [(f"{MINUTE}:00Z", 88500.1)]
        if not path.endswith("/history") and symbol != "A/history":
            shown = (await service.get(path)).json()
            assert shown.keys() == {"id", "symbol", "price", "as_of", "received_at", "age_seconds"}
            assert (shown["id"], shown["price"], shown["as_of"]) == (symbol, 88500.1, f"{MINUTE}:05Z")
            assert shown["age_seconds"] > 0


async def test_what_has_no_price(service: Service) -> None:
    problem(await service.get(f"{PRICES}/NOPE"), 404, "price_not_found")
    assert await _history(service, "NOPE") == {"bars": [], "next_cursor": None}
    for name in ("A%20B", "%FF", "%F0%9F%98%80", "X" * 65, "%27%3B--"):
        problem(await service.get(f"{PRICES}/{name}"), 404, "price_not_found")
        assert (await _history(service, name))["bars"] == []


async def test_late_prices_count_in_their_minute_and_digits_stay(service: Service) -> None:
    await _post(service, f"{MINUTE}:30Z", {"BTC": "2.50"})
    await _post(service, f"{MINUTE}:50Z", {"BTC": "2.000000000000000001"})
    await _post(service, f"{MINUTE}:10Z", {"BTC": "1.90"})
    await _post(service, f"{MINUTE}:50Z", {"BTC": "7"})  # another price of that moment: the first stands
    text = (await service.get(f"{PRICES}/BTC/history")).text
    assert '"open":1.90,"high":2.50,"low":1.90,"close":2.000000000000000001}' in text
    assert (await service.get(f"{PRICES}/BTC")).json()["as_of"] == f"{MINUTE}:50Z"


async def test_pages_between_two_moments(service: Service) -> None:
    start = datetime.fromisoformat(f"{MINUTE}:20Z")
    for i in range(7):
        await _post(service, (start + timedelta(minutes=i)).isoformat(), {"BTC": 1 + i})
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = await _history(service, "BTC", limit=3, cursor=cursor)
        assert len(page["bars"]) <= 3
        found += page["bars"]
        cursor = page["next_cursor"]
    assert [bar["close"] for bar in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [bar["minute"] for bar in found] == sorted(bar["minute"] for bar in found)
    asked = {"from": "2026-01-02T04:05:00+01:00", "to": "2026-01-02T03:08:00Z"}
    assert [bar["close"] for bar in (await _history(service, "BTC", **asked))["bars"]] == [2, 3, 4]
    wide = {"from": "0001-01-01T00:00:00+10:00", "to": "9999-12-31T23:59:59-10:00"}
    assert (await _history(service, "BTC", **wide))["bars"] == found
    assert (await _history(service, "BTC", **{"from": wide["to"], "to": wide["from"]}))["bars"] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("from", "yesterday"),
        ("from", "2026-01-01T00:00:00"),
        ("to", "2026-02-30T00:00:00Z"),
        ("to", "x" * 41),
        ("cursor", "x"),
        ("cursor", "2026-01-01"),
        ("limit", "201"),
    ],
)
@SHARED
async def test_refused_parameters(shared: Service, name: str, value: str) -> None:
    answer = await shared.get(f"{PRICES}/BTC/history", params={name: value})
    problem(answer, 422, answer.json()["code"], f"/{name}")
