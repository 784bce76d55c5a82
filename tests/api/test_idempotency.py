"""One request under one Idempotency-Key is done once, however often and however many at once it is sent."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from app.services import ledger
from tests.api.service import ADMIN_KEY, Agent, Service, make_agent, problem
from tests.api.wire import serving

if TYPE_CHECKING:
    from sqlalchemy import URL

    from app.db.session import Database

KEY = "Idempotency-Key"
POINTER = f"/headers/{KEY}"
COPIES = 30
DEPOSIT = ("/wallet/deposits", {"asset": "USDC", "amount": 5})
ORDER = ("/orders", {"symbol": "BTC-PERP", "side": "buy", "size": 0.01})
RESERVE = ("/reservations", {"service": "casino", "amount": 7})


@pytest.fixture
async def agent(service: Service) -> Agent:
    """Return an agent with 1,000 USDC, on a market that has prices."""
    await service.prices(BTC=60_000, BTC_PERP=60_000)
    made = await service.agent()
    await made.deposit(USDC=1_000)
    return made


async def _keyed(agent: Agent, path: str, body: Any, key: str = "once") -> httpx.Response:
    return await agent.ask(path, body, headers={KEY: key})


async def _standing(agent: Agent) -> tuple[Any, ...]:
    account = await agent.get("/account")
    entries = (await agent.get("/wallet/ledger"))["entries"]
    return account["version"], account["balances"], account["positions"], account["reservations"], entries


@pytest.mark.parametrize(("path", "body"), [DEPOSIT, ORDER, RESERVE], ids=["deposit", "order", "reservation"])
async def test_thirty_at_once_over_sockets_are_one(
    database_url: URL, database: Database, path: str, body: dict[str, Any]
) -> None:
    _, key = await make_agent(database)
    limits = httpx.Limits(max_connections=COPIES)
    async with (
        serving(database_url) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api", limits=limits, timeout=30) as client,
    ):
        mine, admin = ({"Authorization": f"Bearer {text}"} for text in (key, ADMIN_KEY))
        prices = {"prices": {"BTC": 60_000, "BTC-PERP": 60_000}}
        assert (await client.post("/market/prices", json=prices, headers=admin)).status_code == 202
        funds = {"asset": "USDC", "amount": 1_000}
        assert (await client.post("/wallet/deposits", json=funds, headers=mine)).status_code == 201
        keyed = mine | {KEY: "the same"}
        answers = await asyncio.gather(*(client.post(path, json=body, headers=keyed) for _ in range(COPIES)))
        assert len({(a.status_code, a.content) for a in answers}) == 1
        assert answers[0].status_code in (200, 201)
        assert sorted(a.headers.get("idempotency-replayed", "") for a in answers) == [""] + ["true"] * (COPIES - 1)
        account = (await client.get("/account", headers=mine)).json()
        assert account["version"] == 2
        [held] = account["balances"]
        assert held["amount"] == (1_005 if path == DEPOSIT[0] else 1_000)
        assert held["reserved"] == (7 if path == RESERVE[0] else 0)
        assert [p["size"] for p in account["positions"]] == ([0.01] if path == ORDER[0] else [])
    async with database.transaction("test") as tx:
        assert await ledger.imbalances(tx) == {}


async def test_thirty_under_keys_of_their_own_are_thirty(agent: Agent) -> None:
    path, body = DEPOSIT
    answers = await asyncio.gather(*(_keyed(agent, path, body, f"key {i}") for i in range(COPIES)))
    assert {a.status_code for a in answers} == {201}
    assert len({a.json()["id"] for a in answers}) == COPIES
    assert (await agent.get("/wallet/balance"))["usdc_balance"] == 1_000 + COPIES * 5


async def _everything(agent: Agent) -> list[tuple[str, str, Any]]:
    """Return every request that books, of which each works on what this sets up."""
    await agent.post("/reservations", {"service": "casino", "amount": 9, "reducible": True})
    [held] = (await agent.get("/reservations"))["reservations"]
    isolated = await agent.order("BTC-PERP", "buy", 0.001, margin_mode="isolated")
    position = isolated["position"]["id"]
    return [
        ("POST", *DEPOSIT),
        ("POST", "/wallet/withdrawals", DEPOSIT[1]),
        ("POST", *RESERVE),
        ("POST", f"/reservations/{held['id']}/settle", {"amount": 1}),
        ("POST", f"/reservations/{held['id']}/release", {"amount": 1}),
        ("POST", f"/positions/{held['id']}/reduce", {"reduce_pct": 0.5}),
        ("POST", *ORDER),
        ("POST", f"/positions/{position}/collateral", {"amount": 1}),
        ("POST", f"/positions/{position}/reduce", {"reduce_pct": 0.5}),
        ("PATCH", "/account/settings", {"grace_period_seconds": 60}),
    ]


async def test_whatever_books_is_answered_again(service: Service, agent: Agent) -> None:
    for i, (method, path, body) in enumerate(await _everything(agent)):
        headers = {KEY: f"request {i}"}
        first = await agent.send(method, path, json=body, headers=headers)
        assert first.status_code in (200, 201), (path, first.text)
        assert "idempotency-replayed" not in first.headers
        left = await _standing(agent)
        again = await agent.send(method, path, json=body, headers=headers)
        assert (again.status_code, again.content) == (first.status_code, first.content), path
        assert again.headers["idempotency-replayed"] == "true"
        assert again.headers["content-type"] == "application/json"
        assert await _standing(agent) == left, path
    async with service.app.state.parts.database.transaction("test") as tx:
        assert await ledger.imbalances(tx) == {}


async def test_a_body_left_out_is_a_body(agent: Agent) -> None:
    held = await agent.post(*RESERVE)
    path = f"/reservations/{held['id']}/release"
    first = await agent.ask(path, headers={KEY: "k"})
    again = await agent.ask(path, headers={KEY: "k"})
    assert (first.status_code, first.content) == (again.status_code, again.content)
    assert again.headers["idempotency-replayed"] == "true"


async def test_a_body_in_pieces_is_the_same_body(agent: Agent) -> None:
    async def pieces() -> Any:
        for piece in (b'{"asset":"US', b'DC","am', b'ount":5}'):
            yield piece

    first = await agent.ask(DEPOSIT[0], content=pieces(), headers={KEY: "k"})
    again = await agent.ask(DEPOSIT[0], content=b'{"asset":"USDC","amount":5}', headers={KEY: "k"})
    assert first.status_code == 201
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")
    assert (await agent.get("/wallet/balance"))["usdc_balance"] == 1_005


async def test_another_request_under_the_key_is_a_conflict(agent: Agent) -> None:
    assert (await _keyed(agent, *DEPOSIT)).status_code == 201
    left = await _standing(agent)
    body = problem(await _keyed(agent, DEPOSIT[0], DEPOSIT[1] | {"amount": 6}), 409, "idempotency_conflict", POINTER)
    assert "another body" in body["detail"]
    spelled = await agent.ask(DEPOSIT[0], content=b'{"amount":5,"asset":"USDC"}', headers={KEY: "once"})
    problem(spelled, 409, "idempotency_conflict", POINTER)
    path = problem(await _keyed(agent, "/wallet/withdrawals", DEPOSIT[1]), 409, "idempotency_conflict", POINTER)
    assert "another path" in path["detail"]
    assert await _standing(agent) == left


async def test_a_refusal_is_not_remembered(agent: Agent) -> None:
    withdrawal = ("/wallet/withdrawals", {"asset": "USDC", "amount": 1_500})
    for _ in range(2):
        problem(await _keyed(agent, *withdrawal), 409, "insufficient_funds", figures={"available"})
    problem(await _keyed(agent, withdrawal[0], {"asset": "USDC", "amount": -1}), 422, "not_positive")
    await agent.deposit(USDC=500)
    done = await _keyed(agent, *withdrawal)
    assert done.status_code == 201
    assert "idempotency-replayed" not in done.headers
    assert (await _keyed(agent, *withdrawal)).content == done.content
    assert (await agent.get("/wallet/balance"))["usdc_balance"] == 0


async def test_of_many_refused_at_once_none_is_remembered(agent: Agent) -> None:
    withdrawal = ("/wallet/withdrawals", {"asset": "USDC", "amount": 1_500})
    for answer in await asyncio.gather(*(_keyed(agent, *withdrawal) for _ in range(COPIES))):
        problem(answer, 409, "insufficient_funds", figures={"available"})
    assert (await agent.get("/account"))["version"] == 1


@pytest.mark.parametrize("key", ["", "a\tb", "x" * 256, "caf\u00e9", "\x7f"], ids=["empty", "tab", "long", "é", "DEL"])
async def test_keys_that_are_none(agent: Agent, key: str) -> None:
    for path, body in (DEPOSIT, ORDER, RESERVE):
        answer = await agent.ask(path, body, headers={KEY: key.encode("latin-1")})
        problem(answer, 422, "invalid_idempotency_key", POINTER)
    assert (await agent.get("/account"))["version"] == 1


@pytest.mark.parametrize("key", ["x" * 255, "a b", "'; DROP TABLE agents; --", "~"])
async def test_keys_that_are_odd(agent: Agent, key: str) -> None:
    first = await _keyed(agent, *DEPOSIT, key)
    assert first.status_code == 201
    assert (await _keyed(agent, *DEPOSIT, key)).content == first.content
    [latest, _] = (await agent.get("/wallet/ledger"))["entries"]
    assert latest["idempotency_key"] == key


async def test_two_agents_may_use_the_same_key(service: Service, agent: Agent) -> None:
    other = await service.agent("other")
    answers = await asyncio.gather(_keyed(agent, *DEPOSIT), _keyed(other, *DEPOSIT))
    assert [a.status_code for a in answers] == [201, 201]
    assert answers[0].json()["id"] != answers[1].json()["id"]
    assert (await other.get("/wallet/balance"))["usdc_balance"] == 5
    assert (await _keyed(other, *DEPOSIT)).content == answers[1].content


async def test_an_admin_has_names_of_its_own(service: Service, agent: Agent) -> None:
    """It acts on many books: its key on one says nothing about another, nor about what the agent named."""
    other = await service.agent("other")
    replies = {(await _keyed(agent, *DEPOSIT)).content}
    for owner in (agent, other):
        path = f"{DEPOSIT[0]}?agent_id={owner.id}"
        first, again = [await owner.ask(path, DEPOSIT[1], headers={KEY: "once"}, key="admin") for _ in range(2)]
        assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")
        replies.add(first.content)
    assert len(replies) == 3
    assert (await agent.get("/wallet/balance"))["usdc_balance"] == 1_010
    assert (await other.get("/wallet/balance"))["usdc_balance"] == 5


async def test_two_keys_of_an_agent_share_its_names(service: Service, agent: Agent) -> None:
    made = await agent.post("/keys", {"scopes": ["agent"]})
    first = await _keyed(agent, *DEPOSIT)
    again = await agent.ask(*DEPOSIT, headers={KEY: "once"}, key=made["api_key"])
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")


async def test_without_a_key_each_is_another(agent: Agent) -> None:
    replies = [await agent.post(*DEPOSIT) for _ in range(2)]
    assert replies[0]["id"] != replies[1]["id"]
    assert (await agent.get("/wallet/balance"))["usdc_balance"] == 1_010
