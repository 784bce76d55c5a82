"""The audit trail over HTTP: what is written, in which order, and who may read what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.api.service import problem

if TYPE_CHECKING:
    from tests.api.service import Service

AGENTS, KEYS, AUDIT, MARKET = "/api/agents", "/api/keys", "/api/audit", "/api/market"


async def _records(service: Service, key: str, **params: Any) -> list[dict[str, Any]]:
    answer = await service.get(AUDIT, key=key, params=params)
    assert answer.status_code == 200, answer.text
    records: list[dict[str, Any]] = answer.json()["records"]
    return records


def _brief(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(record["action"], record["subject"]) for record in records]


async def test_an_agents_life(service: Service) -> None:
    bob = (await service.post(AGENTS, key="settings", json={"name": "Bob"})).json()
    key = (await service.post(KEYS, key=bob["api_key"], json={"name": "two", "scopes": ["agent"]})).json()
    for _ in range(2):  # the second changes nothing, and so is in no record
        await service.delete(f"{KEYS}/{key['id']}", key=bob["api_key"])
    records = await _records(service, bob["api_key"])
    assert _brief(records) == [
        ("key.revoked", key["id"]),
        ("key.created", key["id"]),
        ("key.created", bob["key_id"]),
        ("agent.created", bob["id"]),
    ]
    assert [record["actor"] for record in records] == [bob["key_id"], bob["key_id"], "admin", "admin"]
    assert {record["agent_id"] for record in records} == {bob["id"]}
    assert records[1]["detail"] == {"name": "two", "scopes": ["agent"], "expires_at": None}
    assert records[0].keys() == {"id", "at", "actor", "agent_id", "action", "subject", "detail"}
    assert all(isinstance(record["id"], str) for record in records)
    assert await _records(service, "admin", agent_id=bob["id"]) == records


async def test_a_refused_change_leaves_no_record(service: Service) -> None:
    before = await _records(service, "admin")
    problem(await service.post(KEYS, json={"scopes": ["admin"]}), 403, "scope_missing")
    problem(await service.post(AGENTS, key="admin", json={"name": ""}), 422, "invalid_name", "/name")
    problem(await service.put(f"{MARKET}/assets/BTC", json={"haircut": 2}), 422, "out_of_range", "/haircut")
    assert (await service.put(f"{MARKET}/assets/BTC", json={"haircut": 0.1})).status_code == 200
    assert await _records(service, "admin") == before


async def test_each_change_of_the_market_is_recorded(service: Service) -> None:
    await service.put(f"{MARKET}/assets/BTC", json={"haircut": 0.2})
    await service.put(f"{MARKET}/instruments/BTC-PERP", json={"price_range": 0.2})
    await service.put(f"{MARKET}/parameters", json={"parameters": {"scenario_factor": 1.3}})
    await service.put(f"{MARKET}/correlations", json={"matrix": "hedge", "pair": ["ETH", "BTC"], "value": 0.5})
    records = (await _records(service, "admin"))[:4]
    assert _brief(records) == [
        ("market.correlation", "hedge:BTC:ETH"),
        ("market.model", "scenario_factor"),
        ("market.instrument", "BTC-PERP"),
        ("market.asset", "BTC"),
    ]
    assert [record["detail"] for record in records] == [{"version": version} for version in (5, 4, 3, 2)]
    assert {record["agent_id"] for record in records} == {None}
    assert "market." not in (await service.get(AUDIT, key="agent")).text


async def test_no_agent_reads_anothers_records(service: Service) -> None:
    bob = (await service.post(AGENTS, key="admin", json={"name": "Bob"})).json()
    for key, own, other in (("agent", service.agent_id, bob["id"]), (bob["api_key"], bob["id"], service.agent_id)):
        records = await _records(service, key)
        assert {record["agent_id"] for record in records} == {own}
        assert await _records(service, key, agent_id=own) == records
        problem(await service.get(AUDIT, key=key, params={"agent_id": other}), 404, "agent_not_found")
    assert {service.agent_id, bob["id"], None} == {record["agent_id"] for record in await _records(service, "admin")}


async def test_records_in_pages(service: Service) -> None:
    for i in range(5):
        await service.post(KEYS, json={"name": str(i), "scopes": ["agent"]})
    whole = await _records(service, "agent")
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = (await service.get(AUDIT, params={"limit": 2, "cursor": cursor})).json()
        found += page["records"]
        cursor = page["next_cursor"]
    assert found == whole
    assert len(found) == 8
    assert [record["detail"].get("name") for record in found[:5]] == ["4", "3", "2", "1", "0"]


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "9" * 30, "٣"])
async def test_what_is_no_cursor(service: Service, cursor: str) -> None:
    answer = await service.get(AUDIT, params={"cursor": cursor})
    problem(answer, 422, answer.json()["code"], "/cursor")
