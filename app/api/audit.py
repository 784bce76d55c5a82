"""The audit trail, as those whom it is about may read it."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import body as wire
from app.api.agents import AgentId, owner_of
from app.api.deps import AgentCaller, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit, number_cursor
from app.services import audit

router = APIRouter(prefix="/api", tags=["audit"])


@router.get("/audit", openapi_extra=document("Who did what", scope="agent"))
async def list_records(
    request: Request, caller: AgentCaller, agent_id: AgentId = None, limit: Limit = PAGE_MAX, cursor: Cursor = ""
) -> Response:
    """List the records, newest first: an agent's own; for an admin all, or those of the agent that it names."""
    before = number_cursor(cursor)
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        owner = await owner_of(tx, caller, agent_id)
        everyone = agent_id is None and caller.may("admin")
        found = await audit.list_records(tx, limit, None if everyone else owner, before)
    last = str(found[-1].id) if len(found) == limit else None
    items = [{**asdict(record), "id": str(record.id)} for record in found]
    return wire.JsonResponse({"records": items, "next_cursor": last})
