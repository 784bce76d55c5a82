"""Netting agreements, what is booked against them, and what settling it moves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from msgspec import Meta
from starlette.responses import Response

from app.api import body as wire
from app.api.booking import AgentRef, BookOwner, Owner, Payer, Reply, once_in
from app.api.deps import body_of, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit, next_cursor, number_cursor
from app.db.session import Tx
from app.domain.money import plain
from app.errors import ForbiddenError, invalid
from app.services import agreements, clearing, netting, statements
from app.services.agreements import Agreement, NewAgreement
from app.services.netting import NewObligation
from app.services.statements import Obligation, Run, Stated, Statement

router = APIRouter(prefix="/api/netting/agreements", tags=["netting"])

RunId = Annotated[str | None, Query(description="what a run settled, or could not", pattern="^[A-Za-z0-9_]{1,64}$")]
Name = Annotated[str, Meta(min_length=1, max_length=200, pattern="^[^\\x00]*$")]


class AgreementPost(wire.Request):
    """POST /api/netting/agreements: with whom, about which services, and when it is settled."""

    members: list[AgentRef]
    services: list[str]
    name: Name | None = None
    interval_seconds: int | None = None
    threshold: wire.Number = wire.NOT_GIVEN


class ObligationPost(wire.Request):
    """POST /api/netting/agreements/{id}/obligations: what the agent owes another member, under its own reference."""

    payee: AgentRef
    service: str
    asset: str
    amount: wire.Number
    reference: Name
    fact: bool | None = None


class AgreementActionPost(wire.Request):
    """POST /api/netting/agreements/{id}/accept, /leave and /settle: nothing."""


_AGREEMENT = wire.Body(AgreementPost)
_OBLIGATION = wire.Body(ObligationPost)
_ACTION = wire.Body(AgreementActionPost)


@router.post(
    "", openapi_extra=document("Propose a netting agreement", request=AgreementPost, scope="agent", status=201)
)
async def propose(request: Request, owner: BookOwner) -> Response:
    """Propose an agreement to other agents; it binds when all have accepted."""
    asked = await body_of(request, _AGREEMENT)
    new = NewAgreement(
        name=asked.name or "netting",
        members=asked.members,
        services=asked.services,
        interval_seconds=asked.interval_seconds,
        threshold=wire.exact_or_none(asked.threshold, "/threshold"),
    )

    async def work(tx: Tx) -> Reply:
        scene = await parts_of(request).scenes.at(tx)
        return Reply(_agreement(await agreements.propose(tx, scene, owner.agent_id, new)), 201)

    return await once_in(request, owner, work)


@router.get("", openapi_extra=document("Netting agreements", scope="agent"))
async def list_agreements(request: Request, owner: BookOwner, limit: Limit = PAGE_MAX, cursor: Cursor = "") -> Response:
    """List the agreements that the agent is or was a member of, newest first."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await agreements.list_agreements(tx, owner.agent_id, limit, number_cursor(cursor))
    more = next_cursor([item.seq for item in found], limit)
    return wire.JsonResponse({"agreements": [_agreement(a) for a in found], "next_cursor": more})


@router.get("/{agreement_id}", openapi_extra=document("A netting agreement", scope="agent"))
async def get_agreement(request: Request, owner: BookOwner, agreement_id: str) -> Response:
    """Show an agreement, its members and its latest runs."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await agreements.get(tx, owner.agent_id, agreement_id)
        runs = await statements.last_runs(tx, found, found.left_at(owner.agent_id))
    return wire.JsonResponse({**_agreement(found), "runs": [_run(run) for run in runs]})


@router.post(
    "/{agreement_id}/accept",
    openapi_extra=document("Accept a netting agreement", request=AgreementActionPost, scope="agent"),
)
async def accept(request: Request, owner: BookOwner, agreement_id: str) -> Response:
    """Accept a proposed agreement; the last member to do so makes it active."""
    return await _answer(request, owner, agreement_id, agreements.accept)


@router.post(
    "/{agreement_id}/leave",
    openapi_extra=document("Leave or decline a netting agreement", request=AgreementActionPost, scope="agent"),
)
async def leave(request: Request, owner: BookOwner, agreement_id: str) -> Response:
    """Leave an agreement under which nothing is open, or decline one that is proposed."""
    return await _answer(request, owner, agreement_id, agreements.leave)


async def _answer(
    request: Request, owner: Owner, agreement_id: str, answer: Callable[[Tx, str, str], Awaitable[Agreement]]
) -> Response:
    await body_of(request, _ACTION, empty=b"{}")

    async def work(tx: Tx) -> Reply:
        return Reply(_agreement(await answer(tx, owner.agent_id, agreement_id)))

    return await once_in(request, owner, work)


@router.post(
    "/{agreement_id}/obligations",
    openapi_extra=document("Book an obligation", request=ObligationPost, scope="agent", status=201),
)
async def book_obligation(request: Request, owner: Payer, agreement_id: str) -> Response:
    """Book what the agent owes another member; its running net is reserved. The same reference again: 200."""
    asked = await body_of(request, _OBLIGATION)
    if asked.fact and not owner.caller.may("admin"):
        raise ForbiddenError("only an admin books a fact that the payer can't cover", code="scope_missing")
    amount = wire.exact(asked.amount, "/amount")
    new = NewObligation(asked.payee, asked.service, asked.asset, amount, asked.reference, bool(asked.fact))

    async def work(tx: Tx) -> Reply:
        scenes = parts_of(request).scenes
        booked, is_new = await netting.book_obligation(tx, scenes, owner.agent_id, agreement_id, new)
        return Reply(_obligation(booked), 201 if is_new else 200)

    return await once_in(request, owner, work)


@router.get("/{agreement_id}/obligations", openapi_extra=document("Obligations", scope="agent"))
async def list_obligations(
    request: Request, owner: BookOwner, agreement_id: str, limit: Limit = PAGE_MAX, cursor: Cursor = ""
) -> Response:
    """List what was booked against an agreement, settled or open, newest first."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        agreement = await agreements.get(tx, owner.agent_id, agreement_id)
        window = await statements.all_of(tx, agreement, agreement.left_at(owner.agent_id))
        found = await statements.list_obligations(tx, window, limit, number_cursor(cursor))
    more = next_cursor([item.seq for item in found], limit)
    return wire.JsonResponse({"obligations": [_obligation(o) for o in found], "next_cursor": more})


@router.post(
    "/{agreement_id}/settle",
    openapi_extra=document("Settle an agreement now", request=AgreementActionPost, scope="agent"),
)
async def settle(request: Request, owner: BookOwner, agreement_id: str) -> Response:
    """Settle all that is open, in one net movement a debtor and asset; or, where one lacks the money, nothing."""
    await body_of(request, _ACTION, empty=b"{}")
    parts = parts_of(request)

    async def work(tx: Tx) -> Reply:
        ran = await netting.run(tx, parts.scenes, agreement_id, owner.agent_id)
        if ran is None:
            raise RuntimeError("a run on demand settles, defaults or is refused")
        clearing.count_run(parts.metrics, ran)
        return Reply(_run(ran.run))

    return await once_in(request, owner, work)


@router.get("/{agreement_id}/statement", openapi_extra=document("A statement of an agreement", scope="agent"))
async def get_statement(
    request: Request,
    owner: BookOwner,
    agreement_id: str,
    as_of: Annotated[str | None, Query(description="a moment: what was open then", max_length=40)] = None,
    run_id: RunId = None,
    limit: Limit = PAGE_MAX,
    cursor: Cursor = "",
) -> Response:
    """List obligations, each member's net, and what settling them takes and saves: now, at a moment, or by a run."""
    if as_of is not None and run_id is not None:
        raise invalid("/as_of", "not_allowed", "a run has its own moment: give as_of or run_id")
    moment: datetime | None = None if as_of is None else wire.moment(as_of, "/as_of")
    parts = parts_of(request)
    async with parts.database.transaction(owner.caller.key_id) as tx:
        said = await statements.stated(
            tx, owner.agent_id, agreement_id, run_id=run_id, as_of=moment, limit=limit, before=number_cursor(cursor)
        )
    more = next_cursor([item.seq for item in said.page], limit)
    found = await parts.workshop.run(statements.worked_out, said)
    return wire.JsonResponse({**_statement(said, found), "next_cursor": more})


def _agreement(agreement: Agreement) -> dict[str, Any]:
    row = asdict(agreement)
    del row["seq"], row["settled_through"]
    for name in ("threshold", "fee_rate", "buffer"):
        row[name] = _plain(row[name])
    row["next_cut_off_at"] = row.pop("next_action_at")
    return row


def _obligation(obligation: Obligation) -> dict[str, Any]:
    row = asdict(obligation)
    del row["seq"], row["booked_by"]
    return {**row, "amount": plain(obligation.amount), "state": "open" if obligation.run_id is None else "settled"}


def _run(run: Run) -> dict[str, Any]:
    """Return a run; its amounts were kept as text, and leave as numbers."""
    figures = {name: _numbers(value) if isinstance(value, list) else value for name, value in run.figures.items()}
    shown = {"run_id": run.id, "agreement_id": run.agreement_id, "outcome": run.outcome, "cause": run.cause}
    return {**shown, "ran_at": run.ran_at, "obligations": run.obligations, **figures}


def _numbers(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    amounts = ("amount", "due", "missing")
    return [{name: Decimal(text) if name in amounts else text for name, text in row.items()} for row in rows]


def _statement(said: Stated, found: Statement) -> dict[str, Any]:
    return {
        "agreement_id": said.agreement.id,
        "state": said.agreement.state,
        "run": None if said.run is None else _run(said.run),
        "as_of": said.as_of,
        "count": len(said.owed),
        "nets": [_plain_row(asdict(position)) | {"net": plain(position.net)} for position in found.positions],
        "movements": [_plain_row(asdict(m)) for m in found.settlement.movements],
        "fees": [_plain_row(asdict(c)) for c in found.settlement.charges],
        "saving": [
            _plain_row(asdict(s))
            | {"movements_saved": s.gross_movements - s.movements, "fees_saved": plain(s.gross_fees - s.fees)}
            for s in found.savings
        ],
        "movements_saved": sum(s.gross_movements - s.movements for s in found.savings),
        "obligations": [_obligation(o) for o in said.page],
    }


def _plain(value: Decimal | None) -> Decimal | None:
    return None if value is None else plain(value)


def _plain_row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(value) if isinstance(value, Decimal) else value for name, value in row.items()}
