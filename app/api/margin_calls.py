"""Margin calls as their owner sees them."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api import body as wire
from app.api.booking import BookOwner, Label
from app.api.deps import body_of, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit, next_cursor, number_cursor
from app.db.session import Tx
from app.domain.book import Book
from app.domain.margin_calls import LIVE_STATES
from app.domain.money import plain
from app.errors import InvalidError
from app.services import book, calls, events, fleet_pool, liquidation, margin_calls
from app.services.calls import StoredCall
from app.services.liquidation import Rules
from app.services.margin import Scene

router = APIRouter(prefix="/api/margin-calls", tags=["margin calls"])

EVENTS_SHOWN_MAX = 200


class AcknowledgePost(wire.Request):
    """POST /api/margin-calls/{id}/acknowledge: a note for the audit trail, or nothing."""

    note: Label | None = None


_ACKNOWLEDGE = wire.Body(AcknowledgePost)

State = Annotated[
    Literal["noticed", "open", "expired", "liquidating", "lapsed", "cured", "completed"] | None,
    Query(description="only these"),
]


@router.get("", openapi_extra=document("Margin calls", scope="agent"))
async def list_calls(
    request: Request, owner: BookOwner, limit: Limit = PAGE_MAX, cursor: Cursor = "", state: State = None
) -> Response:
    """List the account's calls, newest first."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await calls.list_calls(tx, owner.agent_id, limit, number_cursor(cursor), state)
    more = next_cursor([call.seq for call in found], limit)
    return wire.JsonResponse({"margin_calls": [call_reply(call) for call in found], "next_cursor": more})


@router.get("/{call_id}", openapi_extra=document("A margin call", scope="agent"))
async def get_call(request: Request, owner: BookOwner, call_id: str) -> Response:
    """Show a call with its events; while it lives, also what would cure it now. A fleet's with its members' turns."""
    parts = parts_of(request)
    async with parts.database.transaction(owner.caller.key_id) as tx:
        call = await calls.get(tx, owner.agent_id, call_id)
        told = await events.of_call(tx, owner.agent_id, call_id, EVENTS_SHOWN_MAX)
        held = await book.load(tx, owner.agent_id)
        scene = await parts.scenes.at(tx)
        more = await _of_fleet(tx, scene, held, call, Rules.of(parts.settings)) if call.cause == "fleet" else None
    if more is None:
        more = {"cure": await parts.workshop.run(_cure, held, scene) if call.state in LIVE_STATES else None}
    return wire.JsonResponse({**call_reply(call), **more, "events": [event.shown() for event in told]})


async def _of_fleet(tx: Tx, scene: Scene, held: Book, call: StoredCall, rules: Rules) -> dict[str, Any]:
    """Return what cures a fleet's call, and its members' turns; of a turn, that it is cured with the fleet's."""
    if call.fleet_call_id is not None:
        return {"cure": None}
    turns = [call_reply(turn) | {"agent_id": turn.agent_id} for turn in await calls.under(tx, call.id)]
    if call.state not in LIVE_STATES or held.leads is None:
        return {"cure": None, "turns": turns}
    try:
        pool = await fleet_pool.load(tx, scene, rules, held.leads)
    except InvalidError:
        return {"cure": None, "turns": turns}
    return {"cure": await asyncio.to_thread(pool.cure), "turns": turns}


@router.post(
    "/{call_id}/acknowledge",
    openapi_extra=document("Acknowledge a margin call", request=AcknowledgePost, scope="agent"),
)
async def acknowledge(request: Request, owner: BookOwner, call_id: str) -> Response:
    """Record that the owner has seen the call. The clock goes on."""
    asked = await body_of(request, _ACKNOWLEDGE, empty=b"{}")
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        return wire.JsonResponse(
            call_reply(await margin_calls.acknowledge(tx, owner.agent_id, call_id, asked.note or ""))
        )


def _cure(held: Book, scene: Scene) -> dict[str, Any] | None:
    """Return what would cure the account now, None where a price is missing. It assesses the book several times."""
    try:
        return liquidation.cures(held, scene, scene.figures(held))
    except InvalidError:
        return None


def call_reply(call: StoredCall) -> dict[str, Any]:
    """Return a call as its owner sees it."""
    row = asdict(call)
    for name in ("seq", "agent_id", "next_action_at", "figures", "uncovered"):
        del row[name]
    return {**row, "deficit": plain(call.lost), **call.figures}
