"""Many assets or instruments in one request: one version, all or none, every rule of the single put."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.service import problem

if TYPE_CHECKING:
    from tests.api.service import Service

ASSETS, INSTRUMENTS, CHANGES = "/api/market/assets", "/api/market/instruments", "/api/market/changes"
SHARED = pytest.mark.asyncio(loop_scope="module")


async def _put(service: Service, **body: Any) -> dict[str, Any]:
    noun = next(iter(body))
    answer = await service.put(f"/api/market/{noun}", json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


async def test_one_version_for_all_of_them_and_none_for_nothing(service: Service) -> None:
    entries = {f"C{i}-PERP": {"underlying": "BTC", "initial_margin_rate": 0.5} for i in range(25)}
    assert await _put(service, instruments=entries) == {"version": 2, "changed": 25, "unchanged": 0}
    assert await _put(service, instruments=entries) == {"version": 2, "changed": 0, "unchanged": 25}
    mixed = entries | {"C0-PERP": {"initial_margin_rate": None}, "NEW-PERP": {}}
    assert await _put(service, instruments=mixed) == {"version": 3, "changed": 2, "unchanged": 24}
    assert await _put(service, instruments={}) == {"version": 3, "changed": 0, "unchanged": 0}
    changes = (await service.get(CHANGES)).json()["changes"]
    assert [change["name"] for change in changes[:1]] == ["C0-PERP,NEW-PERP"]
    assert changes[1]["name"].endswith(" and 15 more")
    first, new = [(await service.get(f"{INSTRUMENTS}/{s}-PERP")).json() for s in ("C0", "NEW")]
    assert (first["version"], first["initial_margin_rate"], new["version"], new["underlying"]) == (3, None, 3, "NEW")
    assert (await service.get(f"{INSTRUMENTS}/C1-PERP")).json()["version"] == 2
    records = (await service.get("/api/audit", key="admin")).json()["records"]
    assert [record["detail"] for record in records if record["action"] == "market.instrument"] == [
        {"version": 3},
        {"version": 2},
    ]


async def test_many_are_set_as_one_by_one(service: Service) -> None:
    """The same entries, together on some assets and single on others: the same parameters."""
    fields: list[dict[str, Any]] = [{"haircut": 0.3}, {"kind": "stable", "haircut": "0.01"}, {"volatility": 0.5}, {}]
    await _put(service, assets={f"M{i}": entry for i, entry in enumerate(fields)})
    for i, entry in enumerate(fields):
        single = (await service.put(f"{ASSETS}/S{i}", json=entry)).json()
        together = (await service.get(f"{ASSETS}/M{i}")).json()
        own = {"id": f"M{i}", "asset": f"M{i}", "version": 2}
        assert together == single | own


@pytest.mark.parametrize(
    ("noun", "entries", "status", "pointer"),
    [
        ("instruments", {"X": {}, "BTC-PERP": {"contract_size": 0}}, 422, "/instruments/BTC-PERP/contract_size"),
        ("instruments", {"A/B": {"price_range": 1}}, 422, "/instruments/A~1B/price_range"),
        ("instruments", {"X": {"underlying": "A B"}}, 422, "/instruments/X/underlying"),
        ("instruments", {"BTC-PERP": {"underlying": "ETH"}}, 409, "/instruments/BTC-PERP/underlying"),
        ("instruments", {"BTC-PERP": {"kind": "spot"}}, 409, "/instruments/BTC-PERP/kind"),
        ("instruments", {"X": {"initial_margin_rate": 0.1}}, 422, "/instruments/X/maintenance_margin_rate"),
        ("instruments", {"X": {}, "A B": {}}, 422, "/instruments/A B"),
        ("instruments", {"X": {}, "": {}}, 422, "/instruments/"),
        ("instruments", {"X": {}, "Y": {"size": 1}}, 422, "/instruments/Y/size"),
        ("instruments", {"X": {"version": 1}}, 409, "/instruments/X/version"),
        ("instruments", {"X": None}, 422, "/instruments/X"),
        ("instruments", [], 422, "/instruments"),
        ("assets", {"X": {}, "BTC": {"haircut": 1.1}}, 422, "/assets/BTC/haircut"),
        ("assets", {"BTC": {"haircut": "nan"}}, 422, "/assets/BTC/haircut"),
        ("assets", {"BTC": {"kind": "token"}}, 422, "/assets/BTC/kind"),
        ("assets", {"BTC": {"maintenance_margin_rate": 0.31}}, 422, "/assets/BTC/maintenance_margin_rate"),
        ("assets", {"BTC": {"version": 2, "haircut": 0.3}}, 409, "/assets/BTC/version"),
        ("assets", {"X": {}, "*": {}}, 422, "/assets/*"),
    ],
)
@SHARED
async def test_one_that_is_refused_spoils_all(
    shared: Service, noun: str, entries: Any, status: int, pointer: str
) -> None:
    answer = await shared.put(f"/api/market/{noun}", json={noun: entries})
    problem(answer, status, answer.json()["code"], pointer)
    problem(await shared.get(f"{ASSETS}/X"), 404, "asset_not_found")
    problem(await shared.get(f"{INSTRUMENTS}/X"), 404, "instrument_not_found")
    assert len((await shared.get(CHANGES)).json()["changes"]) == 1


@SHARED
async def test_a_symbol_that_stands_twice(shared: Service) -> None:
    answer = await shared.put(INSTRUMENTS, content=b'{"instruments":{"X":{},"X":{"contract_size":2}}}')
    problem(answer, 422, "duplicate_key", "/instruments/X")


async def test_an_asset_may_not_break_what_inherits_from_it(service: Service) -> None:
    await _put(
        service, instruments={"BTC-PERP": {"initial_margin_rate": 0.2}, "DOGE-PERP": {"initial_margin_rate": 0.2}}
    )
    refused = {"BTC": {"maintenance_margin_rate": 0.25}, "default": {"maintenance_margin_rate": 0.25}}
    for name, change in refused.items():
        answer = await service.put(ASSETS, json={"assets": {"SOL": {"haircut": 0.3}, name: change}})
        problem(answer, 422, "out_of_order", f"/assets/{name}/maintenance_margin_rate")
    # an asset that is listed by the same request no longer inherits from the default
    listed = {"DOGE": {"maintenance_margin_rate": 0.1}, "default": {"maintenance_margin_rate": 0.25}}
    assert (await _put(service, assets=listed))["changed"] == 2
    assert (await service.get(f"{ASSETS}/DOGE")).json()["haircut"] == 0.5


async def test_two_at_once_leave_what_one_after_the_other_leaves(service: Service) -> None:
    names = [f"C{i}" for i in range(100)]
    bodies = [
        {name: {"underlying": "BTC", "price_range": 0.2} for name in names},
        {name: {"underlying": "BTC", "initial_margin_rate": 0.5} for name in names[::-1]},
    ]
    replies = await asyncio.gather(*(_put(service, instruments=body) for body in bodies))
    assert sorted(reply["version"] for reply in replies) == [2, 3]
    for item in (await service.get(INSTRUMENTS)).json()["instruments"]:
        if item["id"] in names:
            assert (item["price_range"], item["initial_margin_rate"]) == (0.2, 0.5)
    guarded = [
        {"C0": {"price_range": (3 + i) / 10, "version": 3}, "C1": {"price_range": (3 + i) / 10}} for i in range(2)
    ]
    answers = await asyncio.gather(*(service.put(INSTRUMENTS, json={"instruments": body}) for body in guarded))
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    sizes = [(await service.get(f"{INSTRUMENTS}/{name}")).json()["price_range"] for name in ("C0", "C1")]
    assert sizes[0] == sizes[1]


async def test_five_hundred_at_once_and_ten_thousand_at_most(service: Service) -> None:
    fields = {"underlying": "BTC", "initial_margin_rate": 0.5, "price_range": 0.2}
    assert (await _put(service, instruments={f"C{i}": fields for i in range(500)}))["changed"] == 500
    many = {f"D{i}": {"haircut": 0.3} for i in range(10_000)}
    assert (await _put(service, assets=many))["changed"] == 10_000
    answer = await service.put(ASSETS, json={"assets": many | {"ONE": {}}})
    problem(answer, 422, "too_many", "/assets")
