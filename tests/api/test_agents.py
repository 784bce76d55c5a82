"""Agents and keys over HTTP: made, listed, handed out, revoked, and never another's."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from tests.api.service import Service, problem, running

if TYPE_CHECKING:
    from sqlalchemy import URL

AGENTS, KEYS, AUDIT = "/api/agents", "/api/keys", "/api/audit"
BALANCE = "/api/market/assets"
"""A route for any key."""

SHARED = pytest.mark.asyncio(loop_scope="module")


async def _agent(service: Service, name: str = "Bob") -> dict[str, Any]:
    answer = await service.post(AGENTS, key="admin", json={"name": name})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def _key(service: Service, by: str, *scopes: str, **more: Any) -> dict[str, Any]:
    path = f"{KEYS}?agent_id={agent}" if (agent := more.pop("agent_id", None)) else KEYS
    answer = await service.post(path, key=by, json={"scopes": scopes or ["agent"], **more})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def _listed(service: Service, path: str, noun: str, key: str, **params: Any) -> list[dict[str, Any]]:
    """Return the items of all pages."""
    items: list[dict[str, Any]] = []
    cursor = ""
    for _ in range(1_000):
        answer = await service.get(path, key=key, params={**params, "cursor": cursor})
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page[noun]) <= params.get("limit", 200)
        items += page[noun]
        cursor = page["next_cursor"]
        if cursor is None:
            return items
    raise AssertionError("the cursors never end")


# --- agents


async def test_a_new_agent_has_a_key_and_an_account(service: Service) -> None:
    made = await _agent(service, "Bob")
    assert made.keys() == {"id", "agent_id", "name", "api_key", "key_id", "created_at"}
    assert (made["id"], made["name"]) == (made["agent_id"], "Bob")
    assert (await service.get(BALANCE, key=made["api_key"])).status_code == 200
    keys = await _listed(service, KEYS, "keys", made["api_key"])
    assert [(key["id"], key["scopes"], key["agent_id"]) for key in keys] == [(made["key_id"], ["agent"], made["id"])]
    async with service.app.state.parts.database.transaction("test") as tx:
        query = text("SELECT margin_mode, version FROM accounts WHERE agent_id = :id")
        rows = [tuple(row) for row in await tx.connection.execute(query, {"id": made["id"]})]
    assert rows == [("cross", 0)]
    shown = (await service.get(f"{AGENTS}/{made['id']}", key="admin")).json()
    assert shown == {name: made[name] for name in ("id", "agent_id", "name", "created_at")}


async def test_agents_in_pages(service: Service) -> None:
    made = [await _agent(service, f"agent {i}") for i in range(7)]
    for limit in (1, 2, 8, 200):
        listed = await _listed(service, AGENTS, "agents", "admin", limit=limit)
        assert [agent["id"] for agent in listed] == sorted([*(agent["id"] for agent in made), service.agent_id])
    assert "pr_" not in (await service.get(AGENTS, key="admin")).text


@pytest.mark.parametrize(
    "name",
    ["'; DROP TABLE agents; --", "<script>", "Ünï ☃ 👩‍👩‍👧", "\n\t\x07", "{}%s{0}", "x" * 200, "\\u0000", "\u202e"],
)
async def test_hostile_names_are_names(service: Service, name: str) -> None:
    made = await _agent(service, name)
    assert (await service.get(f"{AGENTS}/{made['id']}", key="admin")).json()["name"] == name
    key = await _key(service, made["api_key"], name=name)
    listed = await _listed(service, KEYS, "keys", made["api_key"])
    assert {k["name"] for k in listed} == {name} == {key["name"]}
    records = (await service.get(AUDIT, key=made["api_key"])).json()["records"]
    assert {record["detail"]["name"] for record in records} == {name}


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b'{"name":""}', "/name"),
        (b'{"name":"a\\u0000b"}', "/name"),
        (b'{"name":null}', "/name"),
        (b'{"name":7}', "/name"),
        (b'{"name":"' + b"x" * 201 + b'"}', "/name"),
        (b"{}", "/name"),
        (b'{"name":"a","admin":true}', "/admin"),
        (b'{"name":"a","name":"b"}', "/name"),
    ],
)
@SHARED
async def test_what_is_no_agent(shared: Service, body: bytes, pointer: str) -> None:
    answer = await shared.post(AGENTS, key="admin", content=body)
    problem(answer, 422, answer.json()["code"], pointer)


@SHARED
async def test_half_a_character_is_no_text(shared: Service) -> None:
    problem(await shared.post(AGENTS, key="admin", content=b'{"name":"\\ud800"}'), 400, "not_json")


@pytest.mark.parametrize("agent_id", ["nobody", "%00", "%F0%9F%98%80", "x" * 65, "'%20OR%201=1", "admin", "house"])
@SHARED
async def test_an_agent_that_is_none(shared: Service, agent_id: str) -> None:
    answer = await shared.get(f"{AGENTS}/{agent_id}", key="admin")
    problem(answer, 404, "no_such_route" if agent_id == "%00" else "agent_not_found")
    for path in (KEYS, AUDIT):
        answer = await shared.get(f"{path}?agent_id={agent_id}", key="admin")
        assert answer.status_code in (404, 422), answer.text
        problem(answer, answer.status_code, answer.json()["code"])


# --- keys


async def test_a_key_is_shown_once(service: Service) -> None:
    made = await _key(service, "agent", "agent", name="laptop", expires_at="2060-01-01T00:00:00+01:00")
    assert made.keys() == {
        "id", "agent_id", "name", "scopes", "created_at", "expires_at", "revoked_at", "api_key",
    }  # fmt: skip
    assert (made["agent_id"], made["name"], made["scopes"]) == (service.agent_id, "laptop", ["agent"])
    assert (await service.get(BALANCE, key=made["api_key"])).status_code == 200
    answer = await service.get(KEYS, key="agent")
    stored = next(key for key in answer.json()["keys"] if key["id"] == made["id"])
    assert stored.items() >= {"name": "laptop", "scopes": ["agent"], "expires_at": "2059-12-31T23:00:00Z"}.items()
    for path in (KEYS, AUDIT, AGENTS, "/api/market/changes"):
        shown = (await service.get(path, key="admin" if path == AGENTS else "agent")).text
        assert made["api_key"].split("_", 2)[2] not in shown
        assert "secret" not in shown


async def test_no_secret_is_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made = await _agent(service)
    key = await _key(service, made["api_key"])
    await service.get(BALANCE, key=key["api_key"])
    await service.delete(f"{KEYS}/{key['id']}", key=made["api_key"])
    problem(await service.get(BALANCE, key=key["api_key"]), 401, "invalid_key")
    for text_ in (made["api_key"], key["api_key"]):
        assert text_.split("_", 2)[2] not in caplog.text


@pytest.mark.parametrize(
    ("by", "scopes", "lacking"),
    [
        ("agent", ["admin"], "admin"),
        ("agent", ["agent", "market"], "market"),
        ("agent", ["coordinator"], "coordinator"),
        ("agent", ["admin", "coordinator"], "admin, coordinator"),
    ],
)
@SHARED
async def test_no_key_hands_out_what_it_lacks(shared: Service, by: str, scopes: list[str], lacking: str) -> None:
    document = problem(await shared.post(KEYS, key=by, json={"scopes": scopes}), 403, "scope_missing")
    assert lacking in document["detail"]


async def test_a_key_hands_out_what_it_has(service: Service) -> None:
    both = await _key(service, "admin", "agent", "coordinator", agent_id=service.agent_id)
    made = await _key(service, both["api_key"], "coordinator", "coordinator")
    assert made["scopes"] == ["coordinator"]
    problem(await service.post(KEYS, key=both["api_key"], json={"scopes": ["market"]}), 403, "scope_missing")
    for scope in ("agent", "coordinator", "market", "admin"):
        assert (await _key(service, "settings", scope))["agent_id"] is None


@pytest.mark.parametrize("key", ["market", "coordinator"])
@SHARED
async def test_keys_without_the_scope_manage_none(shared: Service, key: str) -> None:
    for method, path in (("POST", KEYS), ("GET", KEYS), ("DELETE", f"{KEYS}/x"), ("GET", AUDIT)):
        problem(await shared.send(method, path, key=key, json={"scopes": ["market"]}), 403, "scope_missing")
    for path in (AGENTS, f"{AGENTS}/{shared.agent_id}"):
        problem(await shared.get(path, key=key), 403, "scope_missing")


async def test_a_service_key_without_admin_has_no_keys_to_manage(service: Service) -> None:
    made = await _key(service, "admin", "agent")
    for method, path in (("POST", KEYS), ("GET", KEYS), ("DELETE", f"{KEYS}/{made['id']}"), ("GET", AUDIT)):
        answer = await service.send(method, path, key=made["api_key"], json={"scopes": ["agent"]})
        problem(answer, 403, "agent_key_needed")


async def test_no_agent_sees_or_ends_anothers_key(service: Service) -> None:
    bob = await _agent(service, "Bob")
    mine = await _key(service, "agent")
    assert mine["id"] not in (await service.get(KEYS, key=bob["api_key"])).text
    problem(await service.delete(f"{KEYS}/{mine['id']}", key=bob["api_key"]), 404, "key_not_found")
    problem(await service.delete(f"{KEYS}/{'0' * 16}", key=bob["api_key"]), 404, "key_not_found")
    for method, path in (("GET", KEYS), ("POST", KEYS), ("DELETE", f"{KEYS}/{mine['id']}"), ("GET", AUDIT)):
        for other in (service.agent_id, "nobody"):
            path_ = f"{path}?agent_id={other}"
            answer = await service.send(method, path_, key=bob["api_key"], json={"scopes": ["agent"]})
            problem(answer, 404, "agent_not_found")
    assert (await service.get(f"{KEYS}?agent_id={bob['id']}", key=bob["api_key"])).status_code == 200
    assert (await service.get(BALANCE, key=mine["api_key"])).status_code == 200


async def test_an_admin_manages_the_services_keys_or_those_of_an_agent(service: Service) -> None:
    bob = await _agent(service, "Bob")
    own = await _key(service, "admin", "market")
    assert own["agent_id"] is None
    listed = await _listed(service, KEYS, "keys", "admin")
    assert {key["agent_id"] for key in listed} == {None}
    assert own["id"] in {key["id"] for key in listed}
    problem(await service.delete(f"{KEYS}/{bob['key_id']}", key="admin"), 404, "key_not_found")
    wrong = f"{KEYS}/{bob['key_id']}?agent_id={service.agent_id}"
    problem(await service.delete(wrong, key="admin"), 404, "key_not_found")
    made = await _key(service, "admin", agent_id=bob["id"])
    listed = await _listed(service, KEYS, "keys", "admin", agent_id=bob["id"])
    assert {key["id"] for key in listed} == {made["id"], bob["key_id"]}
    assert (await service.delete(f"{KEYS}/{made['id']}?agent_id={bob['id']}", key="admin")).status_code == 204
    problem(await service.get(BALANCE, key=made["api_key"]), 401, "invalid_key")


async def test_keys_in_pages(service: Service) -> None:
    bob = await _agent(service, "Bob")
    ids = [bob["key_id"], *[(await _key(service, bob["api_key"]))["id"] for _ in range(6)]]
    for limit in (1, 3, 7, 200):
        assert [k["id"] for k in await _listed(service, KEYS, "keys", bob["api_key"], limit=limit)] == sorted(ids)
    for path in (KEYS, AGENTS, AUDIT):
        for limit_ in ("0", "201", "-1", "x"):
            problem(await service.get(f"{path}?limit={limit_}", key="admin"), 422, "invalid_parameter", "/limit")


async def test_a_revoked_key_ends_here_at_once(database_url: URL) -> None:
    async with running(database_url, key_cache_seconds=60) as service:
        made = await _key(service, "agent")
        assert (await service.get(BALANCE, key=made["api_key"])).status_code == 200
        answer = await service.delete(f"{KEYS}/{made['id']}", key="agent")
        assert (answer.status_code, answer.content) == (204, b"")
        problem(await service.get(BALANCE, key=made["api_key"]), 401, "invalid_key")
        first = next(k for k in (await service.get(KEYS)).json()["keys"] if k["id"] == made["id"])
        assert (await service.delete(f"{KEYS}/{made['id']}", key="agent")).status_code == 204
        assert first["revoked_at"] is not None
        assert first in (await service.get(KEYS)).json()["keys"]


async def test_a_key_may_end_itself(service: Service) -> None:
    made = await _key(service, "agent")
    assert (await service.delete(f"{KEYS}/{made['id']}", key=made["api_key"])).status_code == 204
    problem(await service.delete(f"{KEYS}/{made['id']}", key=made["api_key"]), 401, "invalid_key")


async def test_an_expired_key_is_refused(database_url: URL) -> None:
    async with running(database_url, key_cache_seconds=60) as service:
        database = service.app.state.parts.database
        async with database.transaction("test") as tx:
            soon = tx.now + timedelta(seconds=2)
        made = await _key(service, "agent", expires_at=soon.isoformat())
        assert (await service.get(BALANCE, key=made["api_key"])).status_code == 200
        async with database.transaction("test") as tx:
            left = text("SELECT pg_sleep(0.1 + extract(epoch FROM CAST(:soon AS timestamptz) - clock_timestamp()))")
            await tx.connection.execute(left, {"soon": soon})
        problem(await service.get(BALANCE, key=made["api_key"]), 401, "invalid_key")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/scopes"),
        ({"scopes": []}, "/scopes"),
        ({"scopes": None}, "/scopes"),
        ({"scopes": "agent"}, "/scopes"),
        ({"scopes": ["agent", "root"]}, "/scopes/1"),
        ({"scopes": ["agent"], "name": "a\0"}, "/name"),
        ({"scopes": ["agent"], "name": "x" * 201}, "/name"),
        ({"scopes": ["agent"], "expires_at": "2026-01-01T00:00:00Z"}, "/expires_at"),
        ({"scopes": ["agent"], "expires_at": "2060-01-01T00:00:00"}, "/expires_at"),
        ({"scopes": ["agent"], "expires_at": "9999-12-31T23:59:59-10:00"}, "/expires_at"),
        ({"scopes": ["agent"], "expires_at": "0001-01-01T00:00:00+10:00"}, "/expires_at"),
        ({"scopes": ["agent"], "expires_at": "soon"}, "/expires_at"),
        ({"scopes": ["agent"], "agent_id": "agent_x"}, "/agent_id"),
    ],
)
@SHARED
async def test_what_is_no_key(shared: Service, body: dict[str, Any], pointer: str) -> None:
    answer = await shared.post(KEYS, key="agent", json=body)
    problem(answer, 422, answer.json()["code"], pointer)


async def test_a_key_that_expires_makes_none_that_lasts_longer(service: Service) -> None:
    soon, later = "2030-01-01T00:00:00Z", "2030-01-02T00:00:00Z"
    made = await service.post("/api/keys", json={"scopes": ["agent"], "expires_at": soon})
    assert made.status_code == 201
    key = made.json()["api_key"]
    for expires in ({}, {"expires_at": later}):
        answer = await service.post("/api/keys", key=key, json={"scopes": ["agent"], **expires})
        problem(answer, 422, "outlives_its_maker", "/expires_at")
    assert (await service.post("/api/keys", key=key, json={"scopes": ["agent"], "expires_at": soon})).status_code == 201
