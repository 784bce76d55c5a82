"""The whole application over ASGI on a real database, and what every answer of it must look like."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, get_args

import httpx

from app.main import create_app
from app.services.accounts import Scope, create_agent, create_key
from tests.database import make_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping

    from fastapi import FastAPI
    from sqlalchemy import URL

    from app.db.session import Database

ADMIN_KEY = "an admin key that is long enough"
MARGIN = "/api/quotes/margin"
SECONDS_MAX = 15.0

_NEVER_SHOWN = (ADMIN_KEY, "Traceback", 'File "', "sqlalchemy", "asyncpg", "postgresql", "SELECT ", "INSERT ", "$1")


@dataclass(frozen=True, slots=True)
class Service:
    """A running app with a key of each scope: agent's and coordinator's are an agent's, the others the service's."""

    app: FastAPI
    client: httpx.AsyncClient
    keys: Mapping[str, str]
    agent_id: str

    async def send(self, method: str, path: str, *, key: str = "agent", **given: Any) -> httpx.Response:
        """Send a request with the key of a scope, or with the text of a key, or (empty) with none."""
        headers = dict(given.pop("headers", {}))
        if key:
            headers["Authorization"] = f"Bearer {self.keys.get(key, key)}"
        return await self.client.request(method, path, headers=headers, **given)

    async def get(self, path: str, **given: Any) -> httpx.Response:
        return await self.send("GET", path, **given)

    async def post(self, path: str, **given: Any) -> httpx.Response:
        return await self.send("POST", path, **given)

    async def delete(self, path: str, **given: Any) -> httpx.Response:
        return await self.send("DELETE", path, **given)

    async def put(self, path: str, **given: Any) -> httpx.Response:
        return await self.send("PUT", path, **{"key": "admin", **given})

    async def quote(self, **body: Any) -> dict[str, Any]:
        """Return the reply to a margin quote, which must be 200."""
        answer = await self.post(MARGIN, json=body)
        assert answer.status_code == 200, answer.text
        reply: dict[str, Any] = answer.json()
        return reply

    async def patch(self, path: str, **given: Any) -> httpx.Response:
        return await self.send("PATCH", path, **given)

    async def agent(self, name: str = "an agent") -> Agent:
        """Make an agent with an empty book, and return it with a key of its own."""
        return Agent(self, *await make_agent(self.app.state.parts.database, name))

    async def prices(self, **prices: Any) -> None:
        """Post prices of now; an underscore in a name stands for its dash."""
        body = {"prices": {name.replace("_", "-"): price for name, price in prices.items()}}
        answer = await self.post("/api/market/prices", key="market", json=body)
        assert answer.status_code == 202, answer.text


async def make_agent(database: Database, name: str = "an agent") -> tuple[str, str]:
    """Return the id and the key of a new agent with an empty book."""
    async with database.transaction("test") as tx:
        agent_id = await create_agent(tx, name)
        return agent_id, (await create_key(tx, agent_id, ["agent"])).text


@dataclass(frozen=True, slots=True)
class Agent:
    """A client with an agent's own key."""

    service: Service
    id: str
    key: str

    async def send(self, method: str, path: str, **given: Any) -> httpx.Response:
        return await self.service.send(method, f"/api{path}", **{"key": self.key, **given})

    async def get(self, path: str, **given: Any) -> dict[str, Any]:
        """Return the reply to a read, which must be 200."""
        answer = await self.send("GET", path, **given)
        assert answer.status_code == 200, answer.text
        return exact(answer)

    async def post(self, path: str, body: Any = None, **given: Any) -> dict[str, Any]:
        """Return the reply to a write, which must be 200 or 201."""
        answer = await self.ask(path, body, **given)
        assert answer.status_code in (200, 201), answer.text
        return exact(answer)

    async def ask(self, path: str, body: Any = None, **given: Any) -> httpx.Response:
        """Post, whatever the answer."""
        more = {} if body is None else {"json": body}
        return await self.send("POST", path, **more, **given)

    async def deposit(self, **amounts: Any) -> None:
        for asset, amount in amounts.items():
            await self.post("/wallet/deposits", {"asset": asset, "amount": amount})

    async def order(self, symbol: str, side: str, size: Any, **more: Any) -> dict[str, Any]:
        """Return the reply to an order, which must be filled."""
        return await self.post("/orders", {"symbol": symbol, "side": side, "size": size, **more})


def exact(answer: httpx.Response) -> dict[str, Any]:
    """Return a reply with every number that has a point as the Decimal of its digits."""
    reply: dict[str, Any] = json.loads(answer.text, parse_float=Decimal)
    return reply


@asynccontextmanager
async def connected(url: URL, **settings: Any) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    """Run an app on a database, there or not."""
    text = url.set(drivername="postgresql").render_as_string(hide_password=False)
    app = create_app(make_settings(database_url=text, admin_key=ADMIN_KEY, **settings))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://primerisk.test") as client,
    ):
        yield app, client


@asynccontextmanager
async def running(url: URL, **settings: Any) -> AsyncIterator[Service]:
    """Run an app on a migrated database with a key of each scope; `settings` is the key of the settings."""
    async with connected(url, **settings) as (app, client):
        keys = {"settings": ADMIN_KEY}
        async with app.state.parts.database.transaction("test") as tx:
            agent_id = await create_agent(tx, "Alice")
            for scope in get_args(Scope):
                owner = agent_id if scope in ("agent", "coordinator") else None
                keys[scope] = (await create_key(tx, owner, [scope], scope)).text
        yield Service(app, client, keys, agent_id)


async def until(look: Callable[[], Awaitable[Any]]) -> Any:
    """Return the first thing that is seen, within some seconds."""
    for _ in range(int(SECONDS_MAX / 0.05)):
        if seen := await look():
            return seen
        await asyncio.sleep(0.05)
    raise AssertionError(f"not seen within {SECONDS_MAX} s")


def problem(
    answer: httpx.Response, status: int, code: str, pointer: str | None = None, figures: Collection[str] = ()
) -> dict[str, Any]:
    """Check that the answer is a whole RFC 9457 document that says this, and gives nothing away.

    `figures` are the members that it has beyond those of every problem.
    """
    body = answer.text
    assert (answer.status_code, answer.json().get("code")) == (status, code), body[:400]
    assert answer.headers["content-type"] == "application/problem+json"
    assert not [word for word in _NEVER_SHOWN if word.lower() in body.lower()]
    assert len(body) < 10_000
    document: dict[str, Any] = answer.json()
    assert document.keys() == {"type", "title", "status", "detail", "code", "request_id", "errors", *figures}
    assert document["type"] == f"urn:primerisk:problem:{code}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert document["request_id"] == answer.headers["x-request-id"]
    for error in document["errors"]:
        assert error.keys() == {"pointer", "code", "detail"}
        assert error["code"]
        assert error["detail"]
    if pointer is not None:
        assert pointer in [error["pointer"] for error in document["errors"]], document["errors"]
    return document
