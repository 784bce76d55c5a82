"""What another agent's ids are worth to a stranger: nothing, and not a word about whether they exist."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from app.db.session import parse_database_url
from app.services.accounts import create_key
from tests.api.service import Agent, Service, problem, running
from tests.postgres import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What a route with an id in its path is about, and a body that its owner may send. A route that is missing here, and
# is no parameter of the market, fails the test that walks them.
ROUTES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "GET /api/positions/{position_id}": ("position", None),
    "POST /api/positions/{target_id}/reduce": ("position", {"reduce_pct": 0.1}),
    "POST /api/positions/{position_id}/collateral": ("isolated", {"amount": 1}),
    "GET /api/orders/{order_id}": ("order", None),
    "POST /api/orders/{order_id}/fills": ("pending", {"fill_id": "a", "size": 0.001, "price": 60_000}),
    "POST /api/orders/{order_id}/cancel": ("pending", {}),
    "GET /api/reservations/{reservation_id}": ("reservation", None),
    "POST /api/reservations/{reservation_id}/release": ("reservation", {"amount": 0.1}),
    "POST /api/reservations/{reservation_id}/settle": ("reservation", {"amount": 0.1}),
    "GET /api/lending/{loan_id}": ("offer", None),
    "POST /api/lending/{loan_id}/recall": ("offer", {"reason": "I need it", "amount": 1}),
    "POST /api/lending/{loan_id}/cancel": ("offer", {}),
    "POST /api/lending/{loan_id}/return": ("loan", {"amount": 1}),
    "POST /api/lending/{loan_id}/top-up": ("loan", {"amount": 0.0001}),
    "POST /api/lending/{loan_id}/release": ("loan", {"amount": 0.0001}),
    "GET /api/escrows/{escrow_id}": ("escrow", None),
    "POST /api/escrows/{escrow_id}/confirm": ("escrow", {}),
    "GET /api/netting/agreements/{agreement_id}": ("agreement", None),
    "POST /api/netting/agreements/{agreement_id}/accept": ("agreement", {}),
    "POST /api/netting/agreements/{agreement_id}/leave": ("left", {}),
}
ELSEWHERE = {  # walked below and in the tests of agents, webhooks, margin calls, escrows, netting and fleets
    "GET /api/fleets/{fleet_id}",
    "PATCH /api/fleets/{fleet_id}",
    "DELETE /api/fleets/{fleet_id}",
    "POST /api/fleets/{fleet_id}/members",
    "GET /api/fleets/{fleet_id}/members",
    "PATCH /api/fleets/{fleet_id}/members/{agent_id}",
    "DELETE /api/fleets/{fleet_id}/members/{agent_id}",
    "POST /api/fleets/{fleet_id}/members/{agent_id}/sweep",
    "POST /api/fleets/{fleet_id}/members/{agent_id}/write-off",
    "POST /api/fleets/{fleet_id}/join",
    "POST /api/fleets/{fleet_id}/leave",
    "POST /api/fleets/{fleet_id}/dry-powder",
    "GET /api/fleets/{fleet_id}/risk",
    "POST /api/fleets/{fleet_id}/cascade",
    "GET /api/fleets/{fleet_id}/margin-calls",
    "POST /api/fleets/{fleet_id}/rebalance",
    "PUT /api/wallet/holdings/{asset}",  # an asset's name: of one's own book whatever it is
    "POST /api/escrows/{escrow_id}/cancel",
    "POST /api/escrows/{escrow_id}/dispute",
    "POST /api/escrows/{escrow_id}/resolve",
    "POST /api/netting/agreements/{agreement_id}/obligations",
    "POST /api/netting/agreements/{agreement_id}/settle",
    "GET /api/netting/agreements/{agreement_id}/obligations",
    "GET /api/netting/agreements/{agreement_id}/statement",
    "GET /api/margin-calls/{call_id}",
    "POST /api/margin-calls/{call_id}/acknowledge",
    "GET /api/agents/{agent_id}",
    "DELETE /api/keys/{key_id}",
    "GET /api/webhooks/{webhook_id}",
    "DELETE /api/webhooks/{webhook_id}",
    "POST /api/webhooks/{webhook_id}/rotate",
    "POST /api/webhooks/{webhook_id}/enable",
    "POST /api/webhooks/{webhook_id}/test",
    "POST /api/webhooks/{webhook_id}/recover",
    "GET /api/webhooks/{webhook_id}/deliveries",
    "GET /api/webhooks/deliveries/{delivery_id}",
    "POST /api/webhooks/deliveries/{delivery_id}/replay",
}
LISTS = (
    *("/positions", "/orders", "/reservations", "/wallet/ledger", "/portfolio/positions", "/lending/active"),
    *("/escrows", "/netting/agreements"),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


class Town:
    """Agent a with one of everything, agent b with as much of its own, and the ids of a's."""

    def __init__(self, a: Agent, b: Agent, ids: Mapping[str, str]) -> None:
        self.service: Service = a.service
        self.a, self.b, self.ids = a, b, ids

    async def service_key(self) -> str:
        """Return a key of the service that has the scope of agents, and no agent."""
        async with self.service.app.state.parts.database.transaction("test") as tx:
            return (await create_key(tx, None, ["agent"])).text

    def path(self, route: str) -> tuple[str, str]:
        """Return the method and the path under /api, with a's id in it."""
        method, _, template = route.partition(" ")
        return method, re.sub(r"\{\w+\}", self.ids[ROUTES[route][0]], template).removeprefix("/api")


async def _filled(agent: Agent, symbol: str, size: float, price: float, **more: Any) -> tuple[str, str]:
    """Have a venue fill an order, and return the order's id and the position's."""
    order = await agent.order(symbol, "buy", size, **more)
    await agent.post(f"/orders/{order['order_id']}/fills", {"fill_id": symbol, "size": size, "price": price})
    positions = (await agent.get("/account"))["positions"]
    return order["order_id"], next(p["id"] for p in positions if p["symbol"] == symbol)


async def _settled(service: Service, name: str) -> tuple[Agent, dict[str, str]]:
    agent = await service.agent(name)
    await agent.deposit(USDC=50_000)
    venue = await agent.send("PATCH", "/account/settings", json={"execution": "venue"})
    assert venue.status_code == 200
    order, pooled = await _filled(agent, "BTC-PERP", 0.1, 60_000)
    _, isolated = await _filled(agent, "ETH-PERP", 1, 3_000, margin_mode="isolated")
    held = await agent.post("/reservations", {"service": "casino", "amount": 100, "reducible": True})
    pending = await agent.order("BTC-PERP", "buy", 0.01)
    offer = await agent.post("/lending/create", {"asset": "USDC", "amount": 500})
    other = await service.agent(f"{name}'s payee")
    terms = {"payee": other.id, "amount": 10, "timeout_seconds": 3_600, "on_timeout": "refund"}
    escrow = await agent.post("/escrows", terms)
    agreement, left = [
        await agent.post("/netting/agreements", {"members": [other.id], "services": ["data"]}) for _ in range(2)
    ]
    return agent, {
        "position": pooled,
        "isolated": isolated,
        "order": order,
        "reservation": held["id"],
        "pending": pending["order_id"],
        "offer": offer["loan_id"],
        "escrow": escrow["id"],
        "agreement": agreement["id"],
        "left": left["id"],
    }


async def _borrowed(agent: Agent, lender: Agent) -> str:
    """Have an agent borrow of a third one's cheaper offer, and return the loan's id."""
    await lender.deposit(USDC=1_000)
    await lender.post("/lending/create", {"asset": "USDC", "amount": 400, "min_borrow_rate_apy": 0.01})
    await agent.deposit(ETH=1)
    wanted = {"asset": "USDC", "amount": 100, "collateral": {"asset": "ETH", "amount": 0.1}}
    loan_id: str = (await agent.post("/lending/borrow", wanted))["loan_id"]
    return loan_id


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def town(postgres_server: str, database_template: str) -> AsyncIterator[Town]:
    async with (
        fresh_database(postgres_server, database_template) as url,
        running(parse_database_url(url)) as service,
    ):
        await service.prices(BTC=60_000, BTC_PERP=60_000, ETH=3_000, ETH_PERP=3_000)
        a, ids = await _settled(service, "a")
        b, _ = await _settled(service, "b")
        yield Town(a, b, ids | {"loan": await _borrowed(a, await service.agent("c"))})


async def test_every_route_with_an_id_is_walked_here(town: Town) -> None:
    paths = town.service.app.openapi()["paths"]
    found = {f"{method.upper()} {path}" for path, item in paths.items() for method in item if "{" in path}
    assert {route for route in found if "/api/market/" not in route} == ROUTES.keys() | ELSEWHERE


@pytest.mark.parametrize("route", ROUTES)
async def test_a_stranger_finds_nothing(town: Town, route: str) -> None:
    method, path = town.path(route)
    before = await town.a.get("/account")
    body = ROUTES[route][1]
    given = {} if body is None else {"json": body}
    theirs = await town.b.send(method, path, **given)
    assert theirs.status_code == 404
    kind = ROUTES[route][0]
    nobodys = await town.b.send(method, path.replace(town.ids[kind], town.ids[kind][:-4] + "0000"), **given)
    said = [problem(answer, 404, theirs.json()["code"]) for answer in (theirs, nobodys)]
    assert [s.pop("request_id") for s in said]
    assert said[0] == said[1]  # that it exists is not told either
    named = await town.b.send(method, f"{path}?agent_id={town.a.id}", **given)
    problem(named, 404, "agent_not_found")
    assert (await town.a.get("/account"))["version"] == before["version"]


@pytest.mark.parametrize("route", ROUTES)
async def test_no_method_gives_more(town: Town, route: str) -> None:
    _, path = town.path(route)
    before = await town.a.get("/account")
    for method in METHODS:
        body = ROUTES[route][1] or {}
        answer = await town.b.send(method, path, json=body)
        assert answer.status_code in (404, 405), (method, answer.text)
    assert (await town.a.get("/account"))["version"] == before["version"]


@pytest.mark.parametrize("route", ROUTES)
async def test_its_owner_finds_it(town: Town, route: str) -> None:
    method, path = town.path(route)
    body = ROUTES[route][1]
    answer = await town.a.send(method, path, **({} if body is None else {"json": body}))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("route", ROUTES)
async def test_keys_that_are_no_agents(town: Town, route: str) -> None:
    method, path = town.path(route)
    body = ROUTES[route][1]
    given = {} if body is None else {"json": body}
    problem(await town.a.send(method, path, key="", **given), 401, "no_key")
    problem(await town.a.send(method, path, key=town.a.key[:-1] + "~", **given), 401, "invalid_key")
    ours = await town.service_key()
    for key in (ours, "admin", "settings"):
        problem(await town.a.send(method, path, key=key, **given), 403, "agent_key_needed")
    problem(await town.a.send(method, f"{path}?agent_id={town.a.id}", key=ours, **given), 403, "agent_key_needed")
    for scope in ("coordinator", "market"):
        problem(await town.a.send(method, path, key=scope, **given), 403, "scope_missing")


async def test_an_admin_reads_a_book_that_it_names(town: Town) -> None:
    for route in ROUTES:
        method, path = town.path(route)
        if method == "GET":
            theirs = await town.a.get(path)
            assert await town.a.get(f"{path}?agent_id={town.a.id}", key="admin") == theirs
            answer = await town.a.send("GET", f"{path}?agent_id={town.b.id}", key="admin")
            assert answer.status_code == 404
    for path in (*LISTS, "/wallet/balance", "/account/settings"):
        assert await town.a.get(f"{path}?agent_id={town.a.id}", key="admin") == await town.a.get(path), path
    problem(await town.a.send("GET", "/account?agent_id=agent_0", key="admin"), 404, "agent_not_found")


async def test_lists_are_ones_own(town: Town) -> None:
    for path in LISTS:
        text = (await town.b.send("GET", path)).text
        assert text.count('"id"') >= 1, path
        for value in (town.a.id, *town.ids.values()):
            assert value not in text, path
        named = await town.b.send("GET", f"{path}?agent_id={town.a.id}")
        problem(named, 404, "agent_not_found")


async def test_a_stranger_books_nothing_in_anothers_name(town: Town) -> None:
    before = await town.a.get("/account")
    bodies = {
        "/wallet/deposits": {"asset": "USDC", "amount": 1},
        "/wallet/withdrawals": {"asset": "USDC", "amount": 1},
        "/reservations": {"service": "casino", "amount": 1},
        "/orders": {"symbol": "BTC-PERP", "side": "buy", "size": 0.001},
        "/lending/create": {"asset": "USDC", "amount": 1},
        "/lending/borrow": {"asset": "USDC", "amount": 1, "collateral": {"asset": "ETH"}},
        "/escrows": {"payee": town.b.id, "amount": 1, "timeout_seconds": 60, "on_timeout": "release"},
        "/netting/agreements": {"members": [town.b.id], "services": ["data"]},
    }
    for path, body in bodies.items():
        problem(await town.b.ask(f"{path}?agent_id={town.a.id}", body), 404, "agent_not_found")
        problem(await town.b.ask(path, body, key=await town.service_key()), 403, "agent_key_needed")
        problem(await town.b.ask(path, body, key=""), 401, "no_key")
    what_if = await town.b.ask(f"/quotes/what-if?agent_id={town.a.id}", {"close": ["BTC-PERP"]})
    problem(what_if, 404, "agent_not_found")
    event = {"starts_at": "2027-01-01T00:00:00Z", "ends_at": "2027-01-02T00:00:00Z"}
    of_account: dict[str, dict[str, Any]] = {
        "stress": {},
        "sizing": {"method": "pre_event_buffer", "event": event},
        "deleverage": {},
        "drawdown": {"peak_equity": 1},
    }
    for name, more in of_account.items():
        body = {"book": "account", **more}
        path = f"/quotes/{name}?agent_id={town.a.id}"
        problem(await town.b.ask(path, body), 404, "agent_not_found")
        problem(await town.b.ask(path, body, key=await town.service_key()), 403, "agent_key_needed")
        problem(await town.b.ask(path, body, key="market"), 403, "scope_missing")
        assert town.a.id not in str(await town.b.post(f"/quotes/{name}", body))
    problem(await town.b.send("PATCH", f"/account/settings?agent_id={town.a.id}", json={}), 404, "agent_not_found")
    assert (await town.a.get("/account"))["version"] == before["version"]


async def test_a_stranger_revokes_nothing(town: Town) -> None:
    key_id = town.a.key.split("_")[1]
    theirs = await town.b.send("DELETE", f"/keys/{key_id}")
    nobodys = await town.b.send("DELETE", f"/keys/{'0' * 16}")
    said = [problem(answer, 404, "key_not_found") for answer in (theirs, nobodys)]
    assert said[0]["detail"] == said[1]["detail"]
    problem(await town.b.send("DELETE", f"/keys/{key_id}?agent_id={town.a.id}"), 404, "agent_not_found")
    assert key_id in str(await town.a.get("/keys"))
    assert key_id not in str(await town.b.get("/keys"))
    for agent_id in (town.a.id, "agent_0"):
        problem(await town.b.send("GET", f"/agents/{agent_id}"), 403, "scope_missing")
    records = str(await town.b.get("/audit"))
    assert town.b.id in records
    assert not [value for value in (town.a.id, *town.ids.values()) if value in records]
