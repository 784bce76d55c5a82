"""What routes share that act on an agent's book: whose book it is, the market to decide by, answers given once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import Depends, Query, Request
from msgspec import Meta
from starlette.responses import Response

from app import telemetry
from app.api.body import encoder
from app.api.deps import caller_of, parts_of
from app.db.session import Database, Tx
from app.domain.book import Book
from app.errors import ConflictError, ForbiddenError, NotFoundError, invalid
from app.services import book, delegation, fleets, idempotency
from app.services.accounts import Caller
from app.services.idempotency import Answer, Named
from app.services.margin import Scene

KEY_CHARACTERS_MAX = 255

Label = Annotated[str, Meta(max_length=200, pattern="^[^\\x00]*$")]
"""A caller's own words, kept as they are."""

AgentRef = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}(?!\\n)$")]
"""The id of an agent in a body."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose book a request acts on, and who acts."""

    caller: Caller
    agent_id: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What an effect answers."""

    content: Any
    status: int = 200


async def owner_of(
    request: Request,
    agent_id: Annotated[str | None, Query(description="whose book: for keys of an admin or a coordinator")] = None,
) -> Owner:
    """Return whose book it is: the key's own agent's, a member's that its coordinator names, any that an admin names.

    Raises ForbiddenError, NotFoundError.
    """
    return await owner_for(parts_of(request).database, await caller_of(request, "agent"), agent_id)


async def owner_for(database: Database, caller: Caller, agent_id: str | None) -> Owner:
    """Return whose book a caller with the scope agent means. Raises ForbiddenError, NotFoundError."""
    if agent_id is not None and not _AGENT_ID.fullmatch(agent_id):
        raise NotFoundError("There is no such agent.", code="agent_not_found")
    if agent_id is None and caller.agent_id is not None:
        return Owner(caller, caller.agent_id)
    if agent_id is not None and (agent_id == caller.agent_id or caller.may("admin")):
        telemetry.note(agent_id=agent_id)
        return Owner(caller, agent_id)
    if agent_id is not None and await _commands(database, caller, agent_id):
        telemetry.note(agent_id=agent_id)
        return Owner(caller, agent_id)
    if caller.agent_id is not None:
        raise NotFoundError("There is no such agent.", code="agent_not_found")
    detail = "this is a key of the service: use an agent's key, or name the agent with ?agent_id= and an admin key"
    raise ForbiddenError(detail, code="agent_key_needed")


async def _commands(database: Database, caller: Caller, agent_id: str) -> bool:
    """Whether the key is a coordinator's, and the agent a member of its fleet."""
    if caller.agent_id is None or not caller.may("coordinator"):
        return False
    return await database.fetch_value(fleets.COMMANDS, agent_id, caller.agent_id) is not None


BookOwner = Annotated[Owner, Depends(owner_of)]


async def payer_of(request: Request, owner: BookOwner) -> Owner:
    """Return whose book it is that money leaves for others. Raises ForbiddenError.

    A member that was not made for its fleet keeps its own money: its coordinator trades it, and pays nobody with it.
    """
    caller = owner.caller
    if caller.agent_id is None or caller.agent_id == owner.agent_id or caller.may("admin"):
        return owner
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        if await fleets.made(tx, caller.agent_id, owner.agent_id):
            return owner
    raise ForbiddenError("a member that was not made for the fleet pays others itself", code="scope_missing")


Payer = Annotated[Owner, Depends(payer_of)]

Effect = Callable[[Tx, Book, Scene], Awaitable[Reply]]
"""What a request does to a book: in its transaction, to the book under its lock, at the market read after that."""

Deed = Callable[[Tx], Awaitable[Reply]]
"""What a request does in its transaction, of several accounts maybe: it takes the locks itself."""

AT_ONCE_MAX = 2
"""Requests that wait for one book's lock on a connection: a busy agent leaves connections to the others."""

_AGENT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()


def idempotency_key(request: Request) -> str | None:
    """Return the caller's name for the request. Raises InvalidError for one that is no printable ASCII."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not (1 <= len(key) <= KEY_CHARACTERS_MAX and key.isascii() and key.isprintable()):
        detail = f"an Idempotency-Key has 1 to {KEY_CHARACTERS_MAX} printable ASCII characters"
        raise invalid("/headers/Idempotency-Key", "invalid_idempotency_key", detail)
    return key


def require_custodian(request: Request, owner: Owner) -> None:
    """Refuse to take an agent's word for money where only the operator's counts. Raises ForbiddenError."""
    if not (parts_of(request).settings.agents_may_deposit or owner.caller.may("admin")):
        raise ForbiddenError("deposits and fills are booked with an admin key", code="scope_missing")


async def once(request: Request, owner: Owner, effect: Effect, service: str | None = None) -> Response:
    """Run an effect on the owner's book as `once_in` runs a deed, under the book's lock.

    For a `service` a member of a fleet may draw what it lacks, and gives back what it can spare after it.
    """
    scenes = parts_of(request).scenes

    async def deed(tx: Tx) -> Reply:
        held = await book.lock(tx, owner.agent_id)
        return await effect(tx, held, await scenes.at(tx))

    if service is None:
        return await once_in(request, owner, deed)
    return await _once_delegated(request, owner, effect, service)


async def _once_delegated(request: Request, owner: Owner, effect: Effect, service: str) -> Response:
    parts = parts_of(request)
    try:
        return await once_in(request, owner, lambda tx: delegation.alone(tx, parts.scenes, owner.agent_id, effect))
    except delegation.MasterNeeded as needed:
        master_id = needed.master_id

    async def deed(tx: Tx) -> Reply:
        return await delegation.together(tx, parts.scenes, owner.agent_id, master_id, service, effect)

    try:
        return await once_in(request, owner, deed)
    except ConflictError as refused:
        if delegation.is_exhausted(refused):
            figures = {"service": service, "reason": refused.code, "needed": refused.figures.get("needed")}
            async with parts.database.transaction(owner.caller.key_id) as tx:
                await fleets.tell_capped(tx, owner.agent_id, figures)
        raise


async def once_in(request: Request, owner: Owner, deed: Deed) -> Response:
    """Do a deed, which takes its own locks, in one transaction, and answer when it is committed.

    A request that carries an Idempotency-Key is done once: its answer is stored beside the effect and given again,
    with the header Idempotency-Replayed, to every later request with the key. A refusal is not stored: nothing was
    done, and the same request may pass later.
    """
    parts = parts_of(request)
    key = idempotency_key(request)
    named = None
    if key is not None:
        named = Named(_namespace(owner), key, f"{request.method} {request.url.path}", await request.body())
    turn = _turns.setdefault(owner.agent_id, asyncio.Semaphore(AT_ONCE_MAX))
    async with turn, parts.database.transaction(owner.caller.key_id) as tx:
        kept = None if named is None else await idempotency.claim(tx, named)
        answer = kept or await _done(tx, deed, named)
    headers = {}
    if kept is not None:
        headers["Idempotency-Replayed"] = "true"
        parts.metrics.idempotent_replays.inc()
    return Response(answer.reply, answer.status, headers, "application/json")


def _namespace(owner: Owner) -> str:
    """Return whose names for requests these are: an agent's keys share theirs, an admin's key has its own."""
    if owner.caller.agent_id == owner.agent_id:
        return owner.agent_id
    return f"{owner.caller.key_id}/{owner.agent_id}"


async def _done(tx: Tx, deed: Deed, named: Named | None) -> Answer:
    reply = await deed(tx)
    answer = Answer(reply.status, encoder.encode(reply.content))
    if named is not None:
        await idempotency.keep(tx, named, answer)
    return answer
