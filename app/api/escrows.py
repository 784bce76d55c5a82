"""Escrows as their parties see them."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api import body as wire
from app.api.booking import AgentRef, BookOwner, Label, Owner, Payer, Reply, idempotency_key, once, once_in, owner_for
from app.api.deps import body_of, caller_of, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit, next_cursor, number_cursor
from app.db.session import Tx
from app.domain.book import Book
from app.domain.escrow import FeePayer, Kind, Leg, OnTimeout, State
from app.domain.moves import SETTLEMENT_ASSET
from app.errors import invalid
from app.services import clearing, escrows
from app.services.escrows import Done, NewEscrow, Share
from app.services.margin import Scene
from app.services.wallet import Names

router = APIRouter(prefix="/api/escrows", tags=["escrows"])

ADMIN = "admin"
"""In place of an agent's id: who resolves a dispute without being its arbiter."""


class LegIn(wire.Request):
    """Units of an asset that the payee is to deliver."""

    asset: str
    amount: wire.Number


class EscrowPost(wire.Request):
    """POST /api/escrows: who is paid what, what happens at the time-out, who pays the fee, who decides a dispute."""

    payee: AgentRef
    amount: wire.Number
    timeout_seconds: int
    on_timeout: OnTimeout
    asset: str | None = None
    fee_payer: FeePayer | None = None
    counter_leg: LegIn | None = None
    referrer: AgentRef | None = None
    arbiter: AgentRef | None = None
    reference: Label | None = None


class EscrowActionPost(wire.Request):
    """POST /api/escrows/{id}/confirm, /cancel and /dispute: a note, or nothing."""

    note: Label | None = None


class ResolvePost(wire.Request):
    """POST /api/escrows/{id}/resolve: what the payee receives, as an amount or as a share of it, 0 to 1."""

    to_payee: wire.Number = wire.NOT_GIVEN
    payee_share: wire.Number = wire.NOT_GIVEN
    note: Label | None = None


_ESCROW = wire.Body(EscrowPost)
_ACTION = wire.Body(EscrowActionPost)
_RESOLVE = wire.Body(ResolvePost)

RoleOf = Annotated[Literal["payer", "payee", "arbiter"] | None, Query(description="only where the agent is this")]
StateOf = Annotated[State | None, Query(description="only these")]


@router.post("", openapi_extra=document("Fund an escrow", request=EscrowPost, scope="agent", status=201))
async def fund(request: Request, owner: Payer) -> Response:
    """Set money aside for a payee: the amount, and the payer's part of the fee."""
    asked = await body_of(request, _ESCROW)
    counter = asked.counter_leg
    new = NewEscrow(
        payee=asked.payee,
        leg=Leg(SETTLEMENT_ASSET if asked.asset is None else asked.asset, wire.exact(asked.amount, "/amount")),
        timeout_seconds=asked.timeout_seconds,
        on_timeout=asked.on_timeout,
        fee_payer=asked.fee_payer or "payer",
        counter=None if counter is None else Leg(counter.asset, wire.exact(counter.amount, "/counter_leg/amount")),
        referrer=asked.referrer,
        arbiter=asked.arbiter,
    )
    named = Names(asked.reference, idempotency_key(request))

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        return _reply(request, await escrows.fund(tx, scene, held, new, named), 201)

    return await once(request, owner, effect, escrows.SERVICE)


@router.get("", openapi_extra=document("Escrows", scope="agent"))
async def list_escrows(
    request: Request,
    owner: BookOwner,
    limit: Limit = PAGE_MAX,
    cursor: Cursor = "",
    role: RoleOf = None,
    state: StateOf = None,
) -> Response:
    """List the escrows that the agent pays, is paid by, or decides, newest first."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await escrows.list_escrows(tx, owner.agent_id, limit, number_cursor(cursor), role, state)
    more = next_cursor([item.seq for item in found], limit)
    return wire.JsonResponse({"escrows": [escrows.figures(e) for e in found], "next_cursor": more})


@router.get("/{escrow_id}", openapi_extra=document("An escrow", scope="agent"))
async def get_escrow(request: Request, owner: BookOwner, escrow_id: str) -> Response:
    """Show an escrow to a party of it."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        return wire.JsonResponse(escrows.figures(await escrows.get(tx, owner.agent_id, escrow_id)))


@router.post(
    "/{escrow_id}/confirm", openapi_extra=document("Confirm an escrow", request=EscrowActionPost, scope="agent")
)
async def confirm(request: Request, owner: Payer, escrow_id: str) -> Response:
    """Confirm as payer or payee; the payee accepts by it, and delivers its leg. When both have, it is released."""
    return await _act(request, owner, escrow_id, "confirm")


@router.post("/{escrow_id}/cancel", openapi_extra=document("Cancel an escrow", request=EscrowActionPost, scope="agent"))
async def cancel(request: Request, owner: BookOwner, escrow_id: str) -> Response:
    """Call an escrow off before it is accepted: the payer has its money back."""
    return await _act(request, owner, escrow_id, "cancel")


@router.post(
    "/{escrow_id}/dispute", openapi_extra=document("Dispute an escrow", request=EscrowActionPost, scope="agent")
)
async def dispute(request: Request, owner: BookOwner, escrow_id: str) -> Response:
    """Freeze an accepted escrow until an admin or its arbiter decides."""
    return await _act(request, owner, escrow_id, "dispute")


@router.post("/{escrow_id}/resolve", openapi_extra=document("Resolve a dispute", request=ResolvePost, scope="agent"))
async def resolve(
    request: Request,
    escrow_id: str,
    agent_id: Annotated[str | None, Query(description="as whom: for keys of an admin")] = None,
) -> Response:
    """Split what is disputed: by the arbiter, or by an admin, who need not be named."""
    caller = await caller_of(request, "agent")
    is_admin = agent_id is None and caller.agent_id is None and caller.may("admin")
    database = parts_of(request).database
    owner = Owner(caller, ADMIN) if is_admin else await owner_for(database, caller, agent_id)
    asked = await body_of(request, _RESOLVE)
    amount = wire.exact_or_none(asked.to_payee, "/to_payee")
    share = wire.exact_or_none(asked.payee_share, "/payee_share")
    _check_share(amount, share)
    party = None if is_admin else owner.agent_id

    async def work(tx: Tx) -> Reply:
        scenes = parts_of(request).scenes
        given = Share(amount, share)
        return _reply(request, await escrows.act(tx, scenes, party, escrow_id, "resolve", share=given, note=asked.note))

    return await once_in(request, owner, work)


async def _act(request: Request, owner: Owner, escrow_id: str, kind: Kind) -> Response:
    asked = await body_of(request, _ACTION, empty=b"{}")

    async def work(tx: Tx) -> Reply:
        scenes = parts_of(request).scenes
        return _reply(request, await escrows.act(tx, scenes, owner.agent_id, escrow_id, kind, note=asked.note))

    return await once_in(request, owner, work)


def _check_share(amount: Decimal | None, share: Decimal | None) -> None:
    if (amount is None) == (share is None):
        raise invalid("/to_payee", "missing_field", "give to_payee or payee_share, one of the two")
    if amount is not None and amount < 0:
        raise invalid("/to_payee", "number_out_of_range", "it is 0 or more")


def _reply(request: Request, done: Done, status: int = 200) -> Reply:
    clearing.count_escrow(parts_of(request).metrics, done.told)
    return Reply(escrows.figures(done.escrow), status)
