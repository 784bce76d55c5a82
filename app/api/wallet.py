"""The wallet: balances, deposits, withdrawals, the ledger, and what services reserve."""

from __future__ import annotations

from dataclasses import asdict
from decimal import Decimal
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api import account_reply as replies
from app.api import body as wire
from app.api.account import read_account
from app.api.booking import BookOwner, Label, Payer, Reply, idempotency_key, once, require_custodian
from app.api.deps import body_of, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit, next_cursor, number_cursor
from app.db.session import Tx
from app.domain.book import Book
from app.domain.money import plain
from app.domain.moves import SETTLEMENT_ASSET
from app.services import ledger, wallet
from app.services.ledger import Entry
from app.services.margin import Scene
from app.services.wallet import Booked, Names, NewReservation

router = APIRouter(prefix="/api", tags=["wallet"])

SERVICE = "wallet"
"""What a member of a fleet that gives back a reservation does it for: nothing is drawn for that."""


class AmountIn(wire.Request):
    """POST /api/wallet/deposits and /withdrawals: units of an asset, and the caller's reference."""

    asset: str
    amount: wire.Number
    reference: Label | None = None


class ReservationPost(wire.Request):
    """POST /api/reservations: units of an asset (USDC if left out) that a service sets aside."""

    service: str
    amount: wire.Number
    asset: str | None = None
    reference: Label | None = None
    reducible: bool | None = None


class PartIn(wire.Request):
    """POST /api/reservations/{id}/release and /settle: an amount, or all that remains."""

    amount: wire.Number = wire.NOT_GIVEN
    reference: Label | None = None


_AMOUNT = wire.Body(AmountIn)
_RESERVATION = wire.Body(ReservationPost)
_PART = wire.Body(PartIn)

Status = Annotated[Literal["open", "settled", "released"] | None, Query(description="only these")]


@router.get("/wallet/balance", openapi_extra=document("Balances", scope="agent"))
async def get_balance(request: Request, owner: BookOwner) -> Response:
    """Show what the wallet holds, owes and may spend."""
    held, figures = await read_account(parts_of(request), owner)
    return wire.JsonResponse(replies.balance_reply(held, figures))


@router.post("/wallet/deposits", openapi_extra=document("Book a deposit", request=AmountIn, scope="agent", status=201))
async def deposit(request: Request, owner: BookOwner) -> Response:
    """Book units of an asset that have arrived."""
    asked = await body_of(request, _AMOUNT)
    amount = wire.exact(asked.amount, "/amount")
    require_custodian(request, owner)
    named = Names(asked.reference, idempotency_key(request))

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        booked = await wallet.deposit(tx, scene, held, asked.asset, amount, named)
        return Reply(_booked("deposit", asked, booked, tx), 201)

    return await once(request, owner, effect)


@router.post(
    "/wallet/withdrawals", openapi_extra=document("Book a withdrawal", request=AmountIn, scope="agent", status=201)
)
async def withdraw(request: Request, owner: Payer) -> Response:
    """Book units of an asset that leave: what is free, and never past the gate."""
    asked = await body_of(request, _AMOUNT)
    amount = wire.exact(asked.amount, "/amount")
    named = Names(asked.reference, idempotency_key(request))

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        booked = await wallet.withdraw(tx, scene, held, asked.asset, amount, named)
        return Reply(_booked("withdrawal", asked, booked, tx), 201)

    return await once(request, owner, effect)


@router.get("/wallet/ledger", openapi_extra=document("Ledger entries", scope="agent"))
async def list_entries(request: Request, owner: BookOwner, limit: Limit = PAGE_MAX, cursor: Cursor = "") -> Response:
    """List every move of the agent's money, newest first."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await ledger.list_entries(tx, owner.agent_id, limit, number_cursor(cursor))
    more = next_cursor([item.id for item in found], limit)
    return wire.JsonResponse({"entries": [_entry(e, owner.agent_id) for e in found], "next_cursor": more})


@router.post(
    "/reservations", openapi_extra=document("Reserve for a service", request=ReservationPost, scope="agent", status=201)
)
async def reserve(request: Request, owner: BookOwner) -> Response:
    """Set an amount aside; nobody else can spend it until it is settled or released."""
    asked = await body_of(request, _RESERVATION)
    named = Names(asked.reference, idempotency_key(request))
    amount = wire.exact(asked.amount, "/amount")
    new = NewReservation(asked.service, asked.asset or SETTLEMENT_ASSET, amount, reducible=bool(asked.reducible))

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        stored, _ = await wallet.reserve(tx, scene, held, new, named)
        return Reply(replies.stored_reservation(stored), 201)

    return await once(request, owner, effect, new.service)


@router.get("/reservations", openapi_extra=document("Reservations", scope="agent"))
async def list_reservations(
    request: Request, owner: BookOwner, limit: Limit = PAGE_MAX, cursor: Cursor = "", status: Status = None
) -> Response:
    """List reservations, newest first."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await wallet.list_reservations(tx, owner.agent_id, limit, number_cursor(cursor), status)
    more = next_cursor([item.seq for item in found], limit)
    return wire.JsonResponse({"reservations": [replies.stored_reservation(r) for r in found], "next_cursor": more})


@router.get("/reservations/{reservation_id}", openapi_extra=document("A reservation", scope="agent"))
async def get_reservation(request: Request, owner: BookOwner, reservation_id: str) -> Response:
    """Show a reservation, open or closed."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await wallet.get_reservation(tx, owner.agent_id, reservation_id)
    return wire.JsonResponse(replies.stored_reservation(found))


@router.post(
    "/reservations/{reservation_id}/release",
    openapi_extra=document("Give back what is reserved", request=PartIn, scope="agent"),
)
async def release(request: Request, owner: BookOwner, reservation_id: str) -> Response:
    """Release all that remains of a reservation, or an amount of it."""
    asked = await body_of(request, _PART, empty=b"{}")
    amount = wire.exact_or_none(asked.amount, "/amount")
    named = Names(asked.reference, idempotency_key(request))

    async def effect(tx: Tx, held: Book, _: Scene) -> Reply:
        stored, _book = await wallet.release(tx, held, reservation_id, amount, named)
        return Reply(replies.stored_reservation(stored))

    return await once(request, owner, effect, SERVICE)


@router.post(
    "/reservations/{reservation_id}/settle",
    openapi_extra=document("Pay what is reserved to its service", request=PartIn, scope="agent"),
)
async def settle(request: Request, owner: BookOwner, reservation_id: str) -> Response:
    """Settle all that remains of a reservation, or an amount of it; the rest stays reserved."""
    asked = await body_of(request, _PART, empty=b"{}")
    amount = wire.exact_or_none(asked.amount, "/amount")
    named = Names(asked.reference, idempotency_key(request))

    async def effect(tx: Tx, held: Book, _: Scene) -> Reply:
        stored, _book = await wallet.settle(tx, held, reservation_id, amount, named)
        return Reply(replies.stored_reservation(stored))

    return await once(request, owner, effect, SERVICE)


def _booked(kind: str, asked: AmountIn, booked: Booked, tx: Tx) -> dict[str, Any]:
    held = booked.book.holding(asked.asset)
    return {
        "id": str(booked.batch),
        "kind": kind,
        "asset": asked.asset,
        "amount": booked.amount,
        "reference": asked.reference,
        "posted_at": tx.now,
        "balance": {
            "asset": asked.asset,
            "amount": plain(held.held),
            "free": plain(held.free),
            "reserved": plain(held.reserved),
            "owed": plain(held.owed),
        },
    }


def _entry(entry: Entry, agent_id: str) -> dict[str, Any]:
    """Return an entry as its agent sees it: `change` is what it does to all that the agent holds less what it owes."""
    comes, goes = entry.to_owner == agent_id, entry.from_owner == agent_id
    change = Decimal(int(comes) - int(goes)) * entry.amount
    row = asdict(entry)
    return row | {"id": str(entry.id), "amount": plain(entry.amount), "change": plain(change)}
