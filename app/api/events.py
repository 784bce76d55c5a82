"""An agent's events: polled page by page, or streamed."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from app.api import body as wire
from app.api.agents import AgentId, owner_of
from app.api.deps import AgentCaller, caller_of, document, parts_of
from app.api.pages import NUMBER_MAX, PAGE_MAX, Limit, invalid_cursor, next_cursor
from app.api.streams import MEDIA_TYPE
from app.services import events

router = APIRouter(prefix="/api", tags=["events"])

After = Annotated[
    int | None, Query(ge=0, le=NUMBER_MAX, description="the sequence of the last event seen; 0: from the first on")
]
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)


@router.get("/events", openapi_extra=document("Events, polled or streamed", scope="agent"))
async def list_events(
    request: Request,
    caller: AgentCaller,
    agent_id: AgentId = None,
    limit: Limit = PAGE_MAX,
    after: After = None,
) -> Response:
    """List an agent's events in their order, past the sequence `after`; for an admin's key the service's own.

    With `Accept: text/event-stream` they are streamed as they come: from `Last-Event-ID` or `after` on, else from now.
    """
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        owner = await owner_of(tx, caller, agent_id)
        if MEDIA_TYPE not in request.headers.get("accept", ""):
            found = await events.list_events(tx, owner, limit, after or 0)
            more = next_cursor([event.sequence for event in found], limit)
            return wire.JsonResponse({"events": [event.shown() for event in found], "next_cursor": more})
    parts.streams.check_room(owner)
    seen = request.headers.get("last-event-id")
    if seen is not None and not _NUMBER.fullmatch(seen):
        raise invalid_cursor()

    async def check() -> None:
        async with parts.database.transaction(caller.key_id) as tx:
            await owner_of(tx, await caller_of(request), agent_id)

    stream = parts.streams.follow(owner, after if seen is None else int(seen), check)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy would hold events back
    return StreamingResponse(stream, 200, headers, MEDIA_TYPE)
