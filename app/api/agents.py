"""Agents and API keys: a key's secret is in the reply that makes it, and nowhere else."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api import body as wire
from app.api.deps import AdminCaller, AgentCaller, body_of, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit
from app.db.session import Tx
from app.errors import ForbiddenError, invalid
from app.services import accounts, fleets
from app.services.accounts import Caller, Key, Scope

router = APIRouter(prefix="/api", tags=["agents"])

AgentId = Annotated[
    str | None,
    Query(
        max_length=64,
        description="an agent other than the caller's own: scope admin, or a member's coordinator",
        pattern=r"^[ -~]*$",
    ),
]


class AgentPost(wire.Request):
    """POST /api/agents."""

    name: str


class KeyPost(wire.Request):
    """POST /api/keys: without `expires_at` the key lasts until it is revoked."""

    scopes: list[Scope]
    name: str | None = None
    expires_at: wire.Moment | None = None


_AGENT = wire.Body(AgentPost)
_KEY = wire.Body(KeyPost)


@router.post("/agents", openapi_extra=document("Make an agent", request=AgentPost, scope="admin", status=201))
async def create_agent(request: Request, caller: AdminCaller) -> Response:
    """Make an agent with an empty account and its first key, which is shown this once."""
    asked = await body_of(request, _AGENT)
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        agent_id = await accounts.create_agent(tx, asked.name)
        key = await accounts.create_key(tx, agent_id, {"agent"}, asked.name)
        made = accounts.Agent(agent_id, asked.name, tx.now)
    return wire.JsonResponse({**_agent(made), "api_key": key.text, "key_id": key.id}, 201)


@router.get("/agents", openapi_extra=document("Agents", scope="admin"))
async def list_agents(request: Request, caller: AdminCaller, limit: Limit = PAGE_MAX, cursor: Cursor = "") -> Response:
    """List the agents by id."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await accounts.list_agents(tx, limit, cursor)
    more = found[-1].id if len(found) == limit else None
    return wire.JsonResponse({"agents": [_agent(agent) for agent in found], "next_cursor": more})


@router.get("/agents/{agent_id}", openapi_extra=document("An agent", scope="admin"))
async def get_agent(request: Request, caller: AdminCaller, agent_id: str) -> Response:
    """Show an agent."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await accounts.get_agent(tx, agent_id)
    return wire.JsonResponse(_agent(found))


@router.post("/keys", openapi_extra=document("Make a key", request=KeyPost, scope="agent", status=201))
async def create_key(request: Request, caller: AgentCaller, agent_id: AgentId = None) -> Response:
    """Make a key, shown this once, with no scope that the caller lacks."""
    asked = await body_of(request, _KEY)
    scopes = set(asked.scopes)
    expires_at = None if asked.expires_at is None else wire.moment(asked.expires_at, "/expires_at")
    accounts.check_handed_out(caller, scopes)
    if caller.expires_at is not None and (expires_at is None or expires_at > caller.expires_at):
        detail = f"a key that expires makes none that lasts longer: at the latest {caller.expires_at.isoformat()}"
        raise invalid("/expires_at", "outlives_its_maker", detail)
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        owner = await keeper_of(tx, caller, agent_id)
        made = await accounts.create_key(tx, owner, scopes, asked.name or "", expires_at)
        now = tx.now
    key = Key(made.id, owner, asked.name or "", frozenset(scopes), now, expires_at, None)
    return wire.JsonResponse({**_key(key), "api_key": made.text}, 201)


@router.get("/keys", openapi_extra=document("Keys", scope="agent"))
async def list_keys(
    request: Request, caller: AgentCaller, agent_id: AgentId = None, limit: Limit = PAGE_MAX, cursor: Cursor = ""
) -> Response:
    """List the keys of the caller's agent, or of the service, by id; revoked ones too."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await accounts.list_keys(tx, await owner_of(tx, caller, agent_id), limit, cursor)
    more = found[-1].id if len(found) == limit else None
    return wire.JsonResponse({"keys": [_key(key) for key in found], "next_cursor": more})


@router.delete("/keys/{key_id}", openapi_extra=document("Revoke a key", scope="agent", status=204))
async def delete_key(request: Request, caller: AgentCaller, key_id: str, agent_id: AgentId = None) -> Response:
    """Revoke a key: refused here from now on, in other processes once they no longer trust it."""
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        await accounts.revoke_key_of(tx, await keeper_of(tx, caller, agent_id), key_id)
    parts.keys.forget(key_id)
    return Response(status_code=204)


async def owner_of(tx: Tx, caller: Caller, agent_id: str | None) -> str | None:
    """Return whose keys or records are meant: the caller's agent, one that an admin or a coordinator names; None: ours.

    Raises NotFoundError for an agent that is not the caller's to see, ForbiddenError for a key without an agent.
    """
    if caller.may("admin"):
        if agent_id is not None:
            await accounts.require_agent(tx, agent_id)
        return caller.agent_id if agent_id is None else agent_id
    if caller.agent_id is None:
        detail = "this is a key of the service without the scope admin: use an agent's key"
        raise ForbiddenError(detail, code="agent_key_needed")
    if agent_id is None or agent_id == caller.agent_id:
        return caller.agent_id
    if caller.may("coordinator") and await fleets.commands(tx, caller.agent_id, agent_id):
        return agent_id
    raise accounts.no_such_agent()


async def keeper_of(tx: Tx, caller: Caller, agent_id: str | None) -> str | None:
    """Return whose keys and webhooks may be made or taken away: as `owner_of`, but for members that came of themselves.

    These keep their own, so that a fleet that they leave has nothing of theirs. Raises ForbiddenError, NotFoundError.
    """
    owner = await owner_of(tx, caller, agent_id)
    if owner is None or owner == caller.agent_id or caller.may("admin"):
        return owner
    if caller.agent_id is not None and await fleets.made(tx, caller.agent_id, owner):
        return owner
    raise ForbiddenError("a member that was not made for the fleet keeps its own keys", code="scope_missing")


def _agent(agent: accounts.Agent) -> dict[str, Any]:
    return {**asdict(agent), "agent_id": agent.id}


def _key(key: Key) -> dict[str, Any]:
    return {**asdict(key), "scopes": sorted(key.scopes)}
