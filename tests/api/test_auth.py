"""Who may call what: keys, scopes, rates."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

from app.services.accounts import create_agent, create_key, revoke_key
from tests.api.service import ADMIN_KEY, MARGIN, Service, problem, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL

UNKNOWN = f"pr_{'0' * 16}_{'A' * 43}"
ASSETS = "/api/market/assets"

# What each route needs; a route that is missing here fails the test that walks them.
ANY, AGENT, COORDINATOR, MARKET, ADMIN = "any key", "agent", "coordinator", "market", "admin"
NEEDS = {
    "POST /api/quotes/margin": ANY,
    "POST /api/quotes/var": ANY,
    "POST /api/quotes/backtest": ANY,
    "GET /api/market/correlation": ANY,
    "GET /api/account/backtest": AGENT,
    "GET /api/account/snapshots": AGENT,
    "GET /api/market/assets": ANY,
    "PUT /api/market/assets": ADMIN,
    "GET /api/market/assets/{asset}": ANY,
    "PUT /api/market/assets/{asset}": ADMIN,
    "GET /api/market/instruments": ANY,
    "PUT /api/market/instruments": ADMIN,
    "GET /api/market/instruments/{symbol}": ANY,
    "PUT /api/market/instruments/{symbol}": ADMIN,
    "POST /api/market/prices": MARKET,
    "GET /api/market/prices": ANY,
    "GET /api/market/prices/{symbol}": ANY,
    "GET /api/market/prices/{symbol}/history": ANY,
    "POST /api/market/history": MARKET,
    "GET /api/market/history": ANY,
    "GET /api/market/parameters": ANY,
    "PUT /api/market/parameters": ADMIN,
    "PUT /api/market/correlations": ADMIN,
    "GET /api/market/changes": ANY,
    "GET /api/market/venues": ANY,
    "GET /api/market/venues/{venue}/{underlying}": ANY,
    "PUT /api/market/venues/deribit/{underlying}": ADMIN,
    "PUT /api/market/venues/okx/{underlying}": ADMIN,
    "PUT /api/market/venues/derive/{underlying}": ADMIN,
    "PUT /api/market/venues/paradex/{underlying}": ADMIN,
    "POST /api/agents": ADMIN,
    "GET /api/agents": ADMIN,
    "GET /api/agents/{agent_id}": ADMIN,
    "POST /api/keys": AGENT,
    "GET /api/keys": AGENT,
    "DELETE /api/keys/{key_id}": AGENT,
    "GET /api/audit": AGENT,
    "POST /api/quotes/what-if": AGENT,
    "POST /api/quotes/stress": ANY,
    "POST /api/quotes/sizing": ANY,
    "POST /api/quotes/deleverage": ANY,
    "POST /api/quotes/drawdown": ANY,
    "GET /api/account": AGENT,
    "GET /api/account/report": AGENT,
    "GET /api/account/settings": AGENT,
    "PATCH /api/account/settings": AGENT,
    "GET /api/portfolio/positions": AGENT,
    "GET /api/positions": AGENT,
    "GET /api/positions/{position_id}": AGENT,
    "GET /api/wallet/balance": AGENT,
    "POST /api/wallet/deposits": AGENT,
    "POST /api/wallet/withdrawals": AGENT,
    "GET /api/wallet/ledger": AGENT,
    "POST /api/reservations": AGENT,
    "GET /api/reservations": AGENT,
    "GET /api/reservations/{reservation_id}": AGENT,
    "POST /api/reservations/{reservation_id}/release": AGENT,
    "POST /api/reservations/{reservation_id}/settle": AGENT,
    "POST /api/orders": AGENT,
    "GET /api/orders": AGENT,
    "GET /api/orders/{order_id}": AGENT,
    "POST /api/orders/{order_id}/fills": AGENT,
    "POST /api/orders/{order_id}/cancel": AGENT,
    "POST /api/positions/{target_id}/reduce": AGENT,
    "POST /api/positions/{position_id}/collateral": AGENT,
    "GET /api/events": AGENT,
    "POST /api/webhooks": AGENT,
    "GET /api/webhooks": AGENT,
    "GET /api/webhooks/{webhook_id}": AGENT,
    "DELETE /api/webhooks/{webhook_id}": AGENT,
    "POST /api/webhooks/{webhook_id}/rotate": AGENT,
    "POST /api/webhooks/{webhook_id}/enable": AGENT,
    "POST /api/webhooks/{webhook_id}/test": AGENT,
    "POST /api/webhooks/{webhook_id}/recover": AGENT,
    "GET /api/webhooks/{webhook_id}/deliveries": AGENT,
    "GET /api/webhooks/deliveries/{delivery_id}": AGENT,
    "POST /api/webhooks/deliveries/{delivery_id}/replay": AGENT,
    "GET /api/margin-calls": AGENT,
    "GET /api/margin-calls/{call_id}": AGENT,
    "POST /api/margin-calls/{call_id}/acknowledge": AGENT,
    "POST /api/escrows": AGENT,
    "GET /api/escrows": AGENT,
    "GET /api/escrows/{escrow_id}": AGENT,
    "POST /api/escrows/{escrow_id}/confirm": AGENT,
    "POST /api/escrows/{escrow_id}/cancel": AGENT,
    "POST /api/escrows/{escrow_id}/dispute": AGENT,
    "POST /api/escrows/{escrow_id}/resolve": AGENT,
    "POST /api/netting/agreements": AGENT,
    "GET /api/netting/agreements": AGENT,
    "GET /api/netting/agreements/{agreement_id}": AGENT,
    "POST /api/netting/agreements/{agreement_id}/accept": AGENT,
    "POST /api/netting/agreements/{agreement_id}/leave": AGENT,
    "POST /api/netting/agreements/{agreement_id}/obligations": AGENT,
    "GET /api/netting/agreements/{agreement_id}/obligations": AGENT,
    "POST /api/netting/agreements/{agreement_id}/settle": AGENT,
    "GET /api/netting/agreements/{agreement_id}/statement": AGENT,
    "POST /api/lending/create": AGENT,
    "GET /api/lending/active": AGENT,
    "POST /api/lending/{loan_id}/recall": AGENT,
    "POST /api/lending/{loan_id}/cancel": AGENT,
    "POST /api/lending/borrow": AGENT,
    "POST /api/lending/{loan_id}/return": AGENT,
    "POST /api/lending/{loan_id}/top-up": AGENT,
    "POST /api/lending/{loan_id}/release": AGENT,
    "GET /api/lending/rates": ANY,
    "GET /api/lending/quote": AGENT,
    "GET /api/lending/{loan_id}": AGENT,
    "GET /api/wallet/holdings": AGENT,
    "PUT /api/wallet/holdings/{asset}": AGENT,
    "GET /api/market/lending": ANY,
    "GET /api/market/lending/{asset}": ANY,
    "PUT /api/market/lending/{asset}": ADMIN,
    "POST /api/fleets": COORDINATOR,
    "GET /api/fleets": COORDINATOR,
    "GET /api/fleets/membership": AGENT,
    "GET /api/fleets/{fleet_id}": COORDINATOR,
    "PATCH /api/fleets/{fleet_id}": COORDINATOR,
    "DELETE /api/fleets/{fleet_id}": COORDINATOR,
    "POST /api/fleets/{fleet_id}/members": COORDINATOR,
    "GET /api/fleets/{fleet_id}/members": COORDINATOR,
    "PATCH /api/fleets/{fleet_id}/members/{agent_id}": COORDINATOR,
    "DELETE /api/fleets/{fleet_id}/members/{agent_id}": COORDINATOR,
    "POST /api/fleets/{fleet_id}/members/{agent_id}/sweep": COORDINATOR,
    "POST /api/fleets/{fleet_id}/members/{agent_id}/write-off": COORDINATOR,
    "POST /api/fleets/{fleet_id}/dry-powder": COORDINATOR,
    "GET /api/fleets/{fleet_id}/risk": COORDINATOR,
    "POST /api/fleets/{fleet_id}/cascade": COORDINATOR,
    "GET /api/fleets/{fleet_id}/margin-calls": COORDINATOR,
    "POST /api/fleets/{fleet_id}/rebalance": COORDINATOR,
    "POST /api/fleets/{fleet_id}/join": AGENT,
    "POST /api/fleets/{fleet_id}/leave": AGENT,
}
SERVICE_KEYS_TOO = ("/api/keys", "/api/audit", "/api/events", "/api/webhooks")
"""Routes for agents that a key of the service may ask for itself; on the others it names an agent."""
OPEN = {"GET /healthz", "GET /readyz", "GET /metrics", "GET /metrics/accounts"}


def _routes(service: Service) -> dict[str, dict[str, Any]]:
    paths = service.app.openapi()["paths"]
    return {f"{method.upper()} {path}": entry for path, item in paths.items() for method, entry in item.items()}


def _filled(route: str) -> tuple[str, str]:
    method, _, path = route.partition(" ")
    return method, re.sub(r"\{\w+\}", "BTC", path)


async def test_every_route_has_its_scope_here_and_in_its_description(service: Service) -> None:
    routes = _routes(service)
    assert routes.keys() == NEEDS.keys() | OPEN
    for route, scope in NEEDS.items():
        assert f"Scope: {scope}" in routes[route]["description"], route


async def test_every_route_refuses_who_has_no_good_key(service: Service) -> None:
    for route in NEEDS:
        method, path = _filled(route)
        answer = await service.send(method, path, key="")
        problem(answer, 401, "no_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        problem(await service.send(method, path, key=UNKNOWN), 401, "invalid_key")


async def test_a_refusal_comes_before_any_other(service: Service) -> None:
    """Without a key nothing of the request is judged: neither its parameters nor its body."""
    problem(await service.get(f"{ASSETS}?limit=x", key=""), 401, "no_key")
    problem(await service.post(MARGIN, key="", content=b"{"), 401, "no_key")
    problem(await service.put(f"{ASSETS}/BTC", key="agent", content=b"{"), 403, "scope_missing")


@pytest.mark.parametrize("scope", ["agent", "coordinator", "market", "admin", "settings"])
async def test_scopes(service: Service, scope: str) -> None:
    for route, needed in NEEDS.items():
        method, path = _filled(route)
        if needed == AGENT and scope in ("admin", "settings") and not path.startswith(SERVICE_KEYS_TOO):
            path += f"?agent_id={service.agent_id}"
        answer = await service.send(method, path, key=scope, content=b"?")
        if needed == ANY or scope in ("admin", "settings", needed):
            assert answer.status_code not in (401, 403), route
        else:
            document = problem(answer, 403, "scope_missing")
            assert needed in document["detail"]


@pytest.mark.parametrize("scope", ["agent", "coordinator", "market"])
async def test_a_refused_write_writes_nothing(service: Service, scope: str) -> None:
    problem(await service.put(f"{ASSETS}/BTC", key=scope, json={"haircut": 0.9}), 403, "scope_missing")
    assert (await service.get(f"{ASSETS}/BTC")).json()["haircut"] == 0.1


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic eHg6eHg=", "Token {key}", "{key}", "Bearer{key}", "bearer,{key}", "Bearer\t{key}"],
)
async def test_other_schemes_are_no_key(service: Service, header: str) -> None:
    value = header.format(key=ADMIN_KEY)
    answer = await service.get(ASSETS, key="", headers={"Authorization": value})
    assert answer.status_code == 401
    problem(answer, 401, answer.json()["code"])


async def test_the_scheme_is_read_in_any_case(service: Service) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        header = {"Authorization": f"{scheme} {service.keys['agent']}"}
        assert (await service.get(ASSETS, key="", headers=header)).status_code == 200


async def test_why_a_key_is_no_good_is_not_told(service: Service) -> None:
    """An unknown id, a wrong secret, a revoked and an expired key: one answer, but for the request's id."""
    database = service.app.state.parts.database
    async with database.transaction("test") as tx:
        revoked = await create_key(tx, None, ["admin"])
        expired = await create_key(tx, None, ["admin"])
        await revoke_key(tx, revoked.id)
        query = text("UPDATE api_keys SET expires_at = now() WHERE id = :id")
        await tx.connection.execute(query, {"id": expired.id})
    wrong = service.keys["admin"][:-2] + "__"
    bodies = []
    for key in (UNKNOWN, wrong, revoked.text, expired.text, "nonsense", ADMIN_KEY + "x", "\u00ff".encode("latin-1")):
        value = b"Bearer " + (key if isinstance(key, bytes) else key.encode())
        document = problem(await service.get(ASSETS, key="", headers={b"Authorization": value}), 401, "invalid_key")
        bodies.append({name: value for name, value in document.items() if name != "request_id"})
    assert all(body == bodies[0] for body in bodies)


async def test_a_revoked_key_ends_within_the_time_that_it_is_trusted(database_url: URL) -> None:
    async with running(database_url, key_cache_seconds=0) as service:
        database = service.app.state.parts.database
        async with database.transaction("test") as tx:
            agent_id = await create_agent(tx, "Alice")
            key = await create_key(tx, agent_id, ["agent"])
        assert (await service.get(ASSETS, key=key.text)).status_code == 200
        async with database.transaction("test") as tx:
            await revoke_key(tx, key.id)
        problem(await service.get(ASSETS, key=key.text), 401, "invalid_key")


async def test_rate_limit(database_url: URL) -> None:
    async with running(database_url, requests_per_second=2, requests_burst=3) as service:
        codes = [(await service.get(ASSETS)).status_code for _ in range(3)]
        answer = await service.get(ASSETS)
        assert codes == [200] * 3
        problem(answer, 429, "rate_limited")
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["ratelimit"] == '"key";r=0;t=1'
        assert answer.headers["ratelimit-policy"].startswith('"key";q=3;w=')
        assert (await service.get(ASSETS, key="market")).status_code == 200  # a limit of its own
        assert (await service.get("/healthz", key="")).status_code == 200
        await asyncio.sleep(1)
        assert (await service.get(ASSETS)).status_code == 200


async def test_rate_limit_off(database_url: URL) -> None:
    async with running(database_url, requests_per_second=0, requests_burst=1) as service:
        assert {(await service.get(ASSETS)).status_code for _ in range(20)} == {200}


async def test_too_many_requests_under_way(database_url: URL) -> None:
    async with running(database_url, requests_under_way_max=1) as service:
        held, go = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            held.set()
            await go.wait()
            yield b'{"positions":[]}'

        first = asyncio.create_task(service.post(MARGIN, content=slow()))
        await held.wait()
        refused = await service.get(ASSETS)
        problem(refused, 503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await service.get(path, key="")).status_code == 200
        go.set()
        assert (await first).status_code == 200
        assert (await service.get(ASSETS)).status_code == 200
