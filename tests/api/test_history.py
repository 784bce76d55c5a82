"""Daily closes over HTTP: posted, refused, confirmed, listed."""

from __future__ import annotations

import json
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.service import exact, problem

if TYPE_CHECKING:
    from tests.api.service import Service

HISTORY = "/api/market/history"
SHARED = pytest.mark.asyncio(loop_scope="module")


def closes(asset: str = "BTC", count: int = 30, **changed: Any) -> list[dict[str, Any]]:
    """Return closes from 2024-01-01 on that go up and down by a per cent; `d5=…` is another one for the sixth day."""
    rows = [
        {"asset": asset, "date": str(date(2024, 1, 1) + timedelta(days=k)), "close": 100 + k % 3} for k in range(count)
    ]
    for name, close in changed.items():
        rows[int(name[1:])]["close"] = close
    return rows


async def _post(service: Service, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    answer = await service.post(HISTORY, key="market", json={"closes": rows, **more})
    assert answer.status_code == 200, answer.text
    return exact(answer)


async def _listed(service: Service, **params: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        answer = await service.get(HISTORY, params={**params, "cursor": cursor})
        assert answer.status_code == 200, answer.text
        page = exact(answer)
        found += page["closes"]
        cursor = page["next_cursor"]
    return found


async def test_post_and_list(service: Service) -> None:
    rows = [*closes("BTC", 20, d3="102.50"), *closes("BTC/USDT:USDT", 4), *closes("X" * 64, 3)]
    reply = await _post(service, rows)
    counts = {name: reply[name] for name in ("version", "stored", "changed", "unchanged", "flagged_count")}
    assert counts == {"version": 1, "stored": 27, "changed": 0, "unchanged": 0, "flagged_count": 0}
    found = await _listed(service, limit=5)
    assert [(c["asset"], c["date"]) for c in found] == [(r["asset"], r["date"]) for r in rows]
    assert found[0] == {"id": "BTC:2024-01-01", "asset": "BTC", "date": "2024-01-01", "close": 100}
    assert str(found[3]["close"]) == "102.50"
    some = await _listed(service, asset="BTC", **{"from": "2024-01-03", "to": "2024-01-05"})
    assert [c["date"] for c in some] == ["2024-01-03", "2024-01-04", "2024-01-05"]
    assert await _listed(service, asset="ETH") == []
    assert await _listed(service, **{"from": "2024-02-01", "to": "2023-01-01"}) == []


async def test_the_same_again(service: Service) -> None:
    await _post(service, closes())
    again = await _post(service, closes())
    assert (again["stored"], again["unchanged"], again["version"]) == (0, 30, 1)


async def test_what_looks_wrong_is_named_and_confirmed(service: Service) -> None:
    await _post(service, closes(count=25))
    wrong = closes(d4=101.5, d27=1_000)
    answer = await service.post(HISTORY, key="market", json={"closes": wrong})
    document = problem(answer, 409, "confirmation_needed", "/closes/4/close", {"flagged"})
    assert [(e["pointer"], e["code"]) for e in document["errors"]] == [
        ("/closes/4/close", "close_changed"),
        ("/closes/27/close", "close_off_history"),
    ]
    assert document["flagged"] == 2
    assert len(await _listed(service)) == 25
    done = await _post(service, wrong, confirm=True)
    assert (done["stored"], done["changed"], done["unchanged"], done["flagged_count"]) == (5, 1, 24, 2)
    assert [(f["pointer"], f["asset"], f["date"], f["code"]) for f in done["flagged"]] == [
        ("/closes/4/close", "BTC", "2024-01-05", "close_changed"),
        ("/closes/27/close", "BTC", "2024-01-28", "close_off_history"),
    ]


async def test_gaps_are_told(service: Service) -> None:
    rows = closes()
    done = await _post(service, rows[:3] + rows[5:])
    assert (done["gaps_count"], done["gaps"]) == (
        1,
        [{"asset": "BTC", "from": "2024-01-04", "to": "2024-01-05", "days": 2}],
    )


ONE = {"asset": "BTC", "date": "2024-01-01", "close": 1}


@pytest.mark.parametrize(
    ("body", "status", "code", "pointer"),
    [
        (b"", 400, "not_json", None),
        (b"[]", 422, "invalid_value", ""),
        (b"{}", 422, "missing_field", "/closes"),
        ({"closes": {}}, 422, "invalid_value", "/closes"),
        ({"closes": [1]}, 422, "invalid_value", "/closes/0"),
        ({"closes": [{}]}, 422, "missing_field", "/closes/0/asset"),
        ({"closes": [ONE], "confirm": "perhaps"}, 422, "invalid_value", "/confirm"),
        ({"closes": [ONE], "replace": True}, 422, "unknown_field", "/replace"),
        ({"closes": [ONE | {"open": 1}]}, 422, "unknown_field", "/closes/0/open"),
        ({"closes": [ONE | {"asset": 1}]}, 422, "invalid_value", "/closes/0/asset"),
        ({"closes": [ONE | {"asset": "A\x00B"}]}, 422, "invalid_symbol", "/closes/0/asset"),
        ({"closes": [ONE | {"asset": "\ud800"}]}, 400, "not_json", None),
        ({"closes": [ONE | {"asset": "X" * 65}]}, 422, "invalid_symbol", "/closes/0/asset"),
        ({"closes": [ONE | {"date": "2024-02-30"}]}, 422, "invalid_value", "/closes/0/date"),
        ({"closes": [ONE | {"date": "20240101"}]}, 422, "invalid_value", "/closes/0/date"),
        ({"closes": [ONE | {"date": "2024-W01-1"}]}, 422, "invalid_value", "/closes/0/date"),
        ({"closes": [ONE | {"date": "٢٠٢٤-01-01"}]}, 422, "invalid_value", "/closes/0/date"),
        ({"closes": [ONE | {"date": "0000-01-01"}]}, 422, "invalid_value", "/closes/0/date"),
        ({"closes": [ONE | {"date": "0001-01-01"}]}, 422, "in_the_past", "/closes/0/date"),
        ({"closes": [ONE | {"date": "9999-12-31"}]}, 422, "in_the_future", "/closes/0/date"),
        ({"closes": [ONE | {"date": 20240101}]}, 422, "invalid_value", "/closes/0/date"),
        ({"closes": [ONE | {"close": None}]}, 422, "invalid_value", "/closes/0/close"),
        ({"closes": [ONE | {"close": "NaN"}]}, 422, "invalid_value", "/closes/0/close"),
        ({"closes": [ONE | {"close": [1]}]}, 422, "invalid_value", "/closes/0/close"),
        ({"closes": [ONE | {"close": 0}]}, 422, "out_of_range", "/closes/0/close"),
        ({"closes": [ONE | {"close": -5}]}, 422, "out_of_range", "/closes/0/close"),
        ({"closes": [ONE | {"close": "1e400"}]}, 422, "out_of_range", "/closes/0/close"),
        ({"closes": [ONE | {"close": "1e999999999"}]}, 422, "out_of_range", "/closes/0/close"),
        ({"closes": [ONE | {"close": "1e-999999999"}]}, 422, "out_of_range", "/closes/0/close"),
        (b'{"closes":[{"asset":"BTC","date":"2024-01-01","close":NaN}]}', 422, "not_finite", "/closes/0/close"),
        (
            b'{"closes":[{"asset":"BTC","asset":"ETH","date":"2024-01-01","close":1}]}',
            422,
            "duplicate_key",
            "/closes/0/asset",
        ),
        ({"closes": [ONE, ONE]}, 422, "duplicate_day", "/closes/0/date"),
        ({"closes": [ONE] * 20_001}, 422, "too_many", "/closes"),
    ],
)
@SHARED
async def test_hostile_bodies(shared: Service, body: Any, status: int, code: str, pointer: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await shared.post(HISTORY, key="market", content=content)
    problem(answer, status, code, pointer)
    assert (await shared.get(HISTORY)).json() == {"closes": [], "next_cursor": None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("from", "yesterday"),
        ("from", "2024-02-30"),
        ("to", "2024-01-01T00:00:00Z"),
        ("to", ""),
        ("asset", "X" * 65),
        ("cursor", "x"),
        ("cursor", "2024-01-0"),
        ("cursor", "2024-13-01BTC"),
        ("limit", "201"),
        ("limit", "0"),
    ],
)
@SHARED
async def test_refused_parameters(shared: Service, name: str, value: str) -> None:
    answer = await shared.get(HISTORY, params={name: value})
    problem(answer, 422, answer.json()["code"], f"/{name}")


@SHARED
async def test_odd_names_find_nothing(shared: Service) -> None:
    for asset in ("", "%", "'; --", "B\x00C", "é"):
        answer = await shared.get(HISTORY, params={"asset": asset})
        assert answer.status_code in (200, 422)
        assert answer.status_code == 422 or answer.json()["closes"] == []
