"""What routes share: the service's parts, the caller behind a key, the body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Request

from app import telemetry
from app.api.body import Body
from app.api.streams import Streams
from app.api.workshop import Workshop
from app.db.session import Database
from app.errors import ForbiddenError, UnauthorizedError
from app.services.accounts import Caller, KeyRing, Scope
from app.services.figures.keep import Keeper
from app.services.history_cache import HistoryCache
from app.services.margin import FiguresCache, Scenes
from app.services.market_cache import MarketCache
from app.services.rates import RateLimiter
from app.settings import Settings
from app.telemetry import Metrics

T = TypeVar("T")

INLINE_BYTES_MAX = 200_000
"""Bodies up to which decoding is quicker than handing it to a thread."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a request may need, made once at start."""

    settings: Settings
    metrics: Metrics
    database: Database
    keys: KeyRing
    market: MarketCache
    figures: FiguresCache
    scenes: Scenes
    limiter: RateLimiter
    workshop: Workshop
    streams: Streams
    history: HistoryCache
    figures_shown: Keeper


def parts_of(request: Request) -> Parts:
    """Return the parts of the app that the request came to."""
    return cast("Parts", request.app.state.parts)


async def caller_of(request: Request, scope: Scope | None = None) -> Caller:
    """Return who calls. Raises UnauthorizedError, ForbiddenError without the scope, RateLimitedError."""
    parts = parts_of(request)
    caller = await parts.keys.authenticate(_bearer(request))
    if caller.agent_id is not None:
        telemetry.note(agent_id=caller.agent_id)
    parts.limiter.spend(caller.key_id)
    if scope is not None and not caller.may(scope):
        raise ForbiddenError(f"the key lacks the scope {scope}", code="scope_missing")
    return caller


async def _any_key(request: Request) -> Caller:
    return await caller_of(request)


async def _agent_key(request: Request) -> Caller:
    return await caller_of(request, "agent")


async def _market_key(request: Request) -> Caller:
    return await caller_of(request, "market")


async def _admin_key(request: Request) -> Caller:
    return await caller_of(request, "admin")


# as dependencies they run before any parameter is judged: without a key nothing else is said
AnyCaller = Annotated[Caller, Depends(_any_key)]
AgentCaller = Annotated[Caller, Depends(_agent_key)]
MarketCaller = Annotated[Caller, Depends(_market_key)]
AdminCaller = Annotated[Caller, Depends(_admin_key)]


def _bearer(request: Request) -> str:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not key:
        detail = "send the header Authorization: Bearer <key>"
        raise UnauthorizedError(detail, code="no_key", headers={"WWW-Authenticate": "Bearer"})
    return key.strip()


async def body_of(request: Request, body: Body[T], empty: bytes = b"") -> T:
    """Return the request's body, decoded; `empty` stands in for none at all.

    Raises BadRequestError, InvalidError, PayloadTooLargeError.
    """
    raw = await request.body() or empty
    if len(raw) > INLINE_BYTES_MAX:
        return await parts_of(request).workshop.run(body.decode, raw)
    return body.decode(raw)


def document(
    summary: str, *, request: Any = None, scope: str = "any key", status: int = 200, kind: str = "application/json"
) -> dict[str, Any]:
    """Return the OpenAPI entry of a route: its body's schema, its scope, its reply's kind, its errors by reference."""
    entry: dict[str, Any] = {
        "summary": summary,
        "description": f"Scope: {scope}.",
        "responses": {
            str(status): {"description": "OK", "content": {kind: {"schema": {}}}},
            "default": {
                "description": "An RFC 9457 problem document",
                "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
            },
        },
    }
    if request is not None:
        schema = {"$ref": f"#/components/schemas/{request.__name__}"}
        entry["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return entry
