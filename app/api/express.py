"""The few routes that callers ask for all the time, answered without the router's detour.

They are registered with the router as well, where their documentation and every other method live. Measured on an
account read: the router and its dependency injection cost more than the database.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api import account, quotes, wallet
from app.api.booking import Owner, owner_of

Handler = Callable[[Request], Awaitable[Response]]


def _of_owner(handler: Callable[[Request, Owner], Awaitable[Response]]) -> Handler:
    """Return the handler with the owner of the book looked up before it, as the router would."""

    async def answer(request: Request) -> Response:
        return await handler(request, await owner_of(request, request.query_params.get("agent_id")))

    return answer


HANDLERS: Mapping[tuple[str, str], Handler] = {
    ("POST", "/api/quotes/margin"): quotes.quote_margin,
    ("GET", "/api/account"): _of_owner(account.get_account),
    ("GET", "/api/portfolio/positions"): _of_owner(account.list_portfolio),
    ("GET", "/api/wallet/balance"): _of_owner(wallet.get_balance),
}


class _Request(Request):
    """A request whose body is read in one loop."""

    async def body(self) -> bytes:
        """Return as Starlette does, which goes through two generators. Raises ClientDisconnect."""
        if not hasattr(self, "_body"):
            chunks, more = [], True
            while more:
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunks.append(message.get("body", b""))
                more = message.get("more_body", False)
            self._body = b"".join(chunks)
        return self._body


@dataclass(frozen=True, slots=True)
class _Route:
    """What the metrics read of a route."""

    path: str


class Express:
    """Answers the frequent routes itself, and passes everything else on. Errors rise to the guard around it."""

    def __init__(self, app: ASGIApp, parent: FastAPI) -> None:
        self.app = app
        self.parent = parent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        handler = HANDLERS.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            await self.app(scope, receive, send)
            return
        scope["app"], scope["route"] = self.parent, _Route(scope["path"])
        response = await handler(_Request(scope, receive, send))
        await response(scope, receive, send)
