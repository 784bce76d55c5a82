"""Lending: units on offer, loans taken against collateral, returned and recalled, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from app.api import body as wire
from app.api import lending_reply as replies
from app.api.booking import BookOwner, Label, Payer, Reply, idempotency_key, once, once_in
from app.api.deps import AdminCaller, AnyCaller, body_of, document, parts_of
from app.api.market import Version
from app.api.pages import NUMBER_MAX, PAGE_MAX, Cursor, Limit, next_cursor, number_cursor
from app.api.quote_request import fields_given
from app.db.session import Tx
from app.domain.book import Book
from app.domain.lending import NOTICE_DEFAULT, NOTICE_MAX, RATE_DECIMALS, RateKind
from app.domain.money import checked_amount, plain
from app.errors import invalid
from app.services import book, holdings, lending, loans, market, market_rules, running_loans
from app.services.holdings import HoldingSettings
from app.services.lending import NewOffer, Wanted
from app.services.loans import Loan, Offer
from app.services.margin import Scene
from app.services.wallet import Names

router = APIRouter(prefix="/api", tags=["lending"])

Symbol = Annotated[str, Meta(min_length=1, max_length=64)]
Hours = Annotated[float, Meta(ge=0, le=168)]
_LEFT_OUT: Any = None  # Raw takes null, no union does


class OfferPost(wire.Request):
    """POST /api/lending/create: units to lend, at no less than a rate, to be had back after a notice (24 hours)."""

    asset: Symbol
    amount: wire.Number
    min_borrow_rate_apy: wire.Number = _LEFT_OUT
    recall_notice_hours: Hours | None = None
    reference: Label | None = None


class PledgeIn(wire.Request):
    """Collateral of one asset; the amount left out: just what the loan needs."""

    asset: Symbol
    amount: wire.Number = _LEFT_OUT


class BorrowPost(wire.Request):
    """POST /api/lending/borrow: units to borrow, and what secures them; refused past `max_rate_apy`."""

    asset: Symbol
    amount: wire.Number
    collateral: PledgeIn
    rate: RateKind | None = None
    max_rate_apy: wire.Number = _LEFT_OUT
    recall_notice_hours_min: Hours | None = None
    reference: Label | None = None


class ReturnPost(wire.Request):
    """POST /api/lending/{id}/return, and /release: an amount, or all there is."""

    amount: wire.Number = _LEFT_OUT
    reference: Label | None = None


class PledgePost(wire.Request):
    """POST /api/lending/{id}/top-up: more of the loan's collateral."""

    amount: wire.Number
    reference: Label | None = None


class RecallPost(wire.Request):
    """POST /api/lending/{id}/recall: all, or an amount; the reason is told to the borrower."""

    reason: Label | None = None
    amount: wire.Number = _LEFT_OUT


class HoldingPut(wire.Request):
    """PUT /api/wallet/holdings/{asset}: kept for long, and how much of it may be lent (null: the market's ceiling)."""

    long_term: bool | None = None
    lent_share_max: wire.Number = _LEFT_OUT


class LendingPut(wire.Request):
    """PUT /api/market/lending/{asset}: fields left out stay as they are; `version` must be the stored one."""

    base_rate: float | UnsetType = UNSET
    slope: float | UnsetType = UNSET
    steep_slope: float | UnsetType = UNSET
    target_utilization: float | UnsetType = UNSET
    minimum_rate: float | UnsetType = UNSET
    collateral_ratio: float | UnsetType = UNSET
    low_ratio: float | UnsetType = UNSET
    liquidation_ratio: float | UnsetType = UNSET
    decimals: Annotated[int, Meta(ge=0, le=18)] | UnsetType = UNSET
    version: Annotated[int, Meta(ge=0, le=NUMBER_MAX)] | UnsetType = UNSET


_OFFER = wire.Body(OfferPost)
_BORROW = wire.Body(BorrowPost)
_RETURN = wire.Body(ReturnPost)
_PLEDGE = wire.Body(PledgePost)
_RECALL = wire.Body(RecallPost)
_HOLDING = wire.Body(HoldingPut)
_LENDING = wire.Body(LendingPut)

Role = Annotated[Literal["lender", "borrower"], Query(description="loans given, or loans taken")]
Text = Annotated[str, Query(min_length=1, max_length=64)]


# --- lenders


@router.post(
    "/lending/create", openapi_extra=document("Offer units to lend", request=OfferPost, scope="agent", status=201)
)
async def create(request: Request, owner: Payer) -> Response:
    """Set units aside for whoever borrows them; cheaper offers are taken first."""
    asked = await body_of(request, _OFFER)
    rate = _rate(asked.min_borrow_rate_apy, "/min_borrow_rate_apy")
    notice = _notice(asked.recall_notice_hours, NOTICE_DEFAULT)
    new = NewOffer(asked.asset, wire.exact(asked.amount, "/amount"), rate, notice)
    named = Names(asked.reference, idempotency_key(request))
    scenes = parts_of(request).scenes

    async def deed(tx: Tx) -> Reply:
        stored, at = await lending.offer(tx, scenes, owner.agent_id, new, named)
        shown = replies.offer_reply(stored, (), at, await scenes.at(tx))
        return Reply(shown | {"rate_apy": shown["borrow_rate_apy"]}, 201)

    return await once_in(request, owner, deed)


@router.get("/lending/active", openapi_extra=document("Offers and loans that run", scope="agent"))
async def list_active(
    request: Request, owner: BookOwner, limit: Limit = PAGE_MAX, cursor: Cursor = "", role: Role = "lender"
) -> Response:
    """List what the agent lends, an offer and its loans as one, newest first; or, by role, what it borrows."""
    parts, before = parts_of(request), number_cursor(cursor)
    async with parts.database.transaction(owner.caller.key_id) as tx:
        scene = await parts.scenes.at(tx)
        if role == "borrower":
            taken = await loans.list_borrowed(tx, owner.agent_id, limit, before)
            more = next_cursor([loan.seq for loan in taken], limit)
            return wire.JsonResponse({"loans": await _borrowed(tx, taken, scene), "next_cursor": more})
        offers, below = await loans.list_offers(tx, owner.agent_id, limit, before)
        shown = await _offered(tx, offers, scene)
        held = await book.load(tx, owner.agent_id)
        chosen = await holdings.of_agent(tx, owner.agent_id)
    ceiling = scene.market.parameters.policy.lent_share_max
    return wire.JsonResponse(
        {
            "loans": shown,
            "advisories": replies.lent_advisories(held, chosen, ceiling),
            "next_cursor": None if below is None else str(below),
        }
    )


@router.post("/lending/{loan_id}/recall", openapi_extra=document("Recall a loan", request=RecallPost, scope="agent"))
async def recall(request: Request, owner: BookOwner, loan_id: str) -> Response:
    """Ask a loan back after its notice, or all that an offer became; what is not lent of it is free at once."""
    asked = await body_of(request, _RECALL, empty=b"{}")
    amount = wire.exact_or_none(asked.amount, "/amount")
    named, scenes = Names(None, idempotency_key(request)), parts_of(request).scenes

    async def deed(tx: Tx) -> Reply:
        done = await running_loans.recall(tx, scenes, owner.agent_id, loan_id, amount, asked.reason or "", named)
        due = [loan.due_at for loan in done.recalled if loan.due_at is not None]
        content = {
            "id": loan_id,
            "loan_id": loan_id,
            "status": "recalled" if done.recalled else "closed",
            "due_at": max(due, default=tx.now),
            "withdrawn": plain(done.withdrawn),
            "recalled": [
                {"loan_id": loan.id, "amount": plain(loan.recalled), "due_at": loan.due_at} for loan in done.recalled
            ],
        }
        return Reply(content)

    return await once_in(request, owner, deed)


@router.post(
    "/lending/{loan_id}/cancel", openapi_extra=document("Withdraw an offer", request=ReturnPost, scope="agent")
)
async def cancel(request: Request, owner: BookOwner, loan_id: str) -> Response:
    """Withdraw what is not lent of an offer; its loans go on."""
    asked = await body_of(request, _RETURN, empty=b"{}")
    if wire.exact_or_none(asked.amount, "/amount") is not None:
        raise invalid("/amount", "not_allowed", "all that is not lent is withdrawn: recall an amount instead")
    named, scenes = Names(asked.reference, idempotency_key(request)), parts_of(request).scenes

    async def deed(tx: Tx) -> Reply:
        stored = await lending.cancel(tx, scenes, owner.agent_id, loan_id, named)
        [shown] = await _offered(tx, [stored], await scenes.at(tx))
        return Reply(shown)

    return await once_in(request, owner, deed)


# --- borrowers


@router.post("/lending/borrow", openapi_extra=document("Take a loan", request=BorrowPost, scope="agent", status=201))
async def borrow(request: Request, owner: BookOwner) -> Response:
    """Take what is on offer, cheapest first, against collateral that is pledged with it: a loan of each offer."""
    asked = await body_of(request, _BORROW)
    wanted = Wanted(
        asked.asset,
        wire.exact(asked.amount, "/amount"),
        asked.collateral.asset,
        wire.exact_or_none(asked.collateral.amount, "/collateral/amount"),
        asked.rate or "floating",
        _rate(asked.max_rate_apy, "/max_rate_apy"),
        _notice(asked.recall_notice_hours_min, timedelta(0)),
    )
    named, scenes = Names(asked.reference, idempotency_key(request)), parts_of(request).scenes

    async def deed(tx: Tx) -> Reply:
        taken = await lending.borrow(tx, scenes, owner.agent_id, wanted, named)
        shown = await _borrowed(tx, taken, await scenes.at(tx))
        amount = sum((loan.principal for loan in taken), Decimal(0))
        mean = sum((row["borrow_rate_apy"] * row["amount"] for row in shown), Decimal(0)) / amount
        content = {
            "loan_id": taken[0].id,
            "asset": asked.asset,
            "amount": plain(amount),
            "rate_apy": plain(replies.rounded(mean)),
            "status": "active",
            "loans": shown,
        }
        return Reply(content, 201)

    return await once_in(request, owner, deed)


@router.post("/lending/{loan_id}/return", openapi_extra=document("Return a loan", request=ReturnPost, scope="agent"))
async def give_back(request: Request, owner: BookOwner, loan_id: str) -> Response:
    """Return all of a loan, or an amount of it, with all interest that is due."""
    asked = await body_of(request, _RETURN, empty=b"{}")
    amount = wire.exact_or_none(asked.amount, "/amount")
    named, scenes = Names(asked.reference, idempotency_key(request)), parts_of(request).scenes

    async def deed(tx: Tx) -> Reply:
        loan = await running_loans.give_back(tx, scenes, owner.agent_id, loan_id, amount, named)
        [shown] = await _borrowed(tx, [loan], await scenes.at(tx))
        return Reply(shown)

    return await once_in(request, owner, deed)


@router.post("/lending/{loan_id}/top-up", openapi_extra=document("Pledge more", request=PledgePost, scope="agent"))
async def top_up(request: Request, owner: BookOwner, loan_id: str) -> Response:
    """Pledge more of the asset that secures a loan."""
    asked = await body_of(request, _PLEDGE)
    amount = wire.exact(asked.amount, "/amount")
    named, scenes = Names(asked.reference, idempotency_key(request)), parts_of(request).scenes

    async def deed(tx: Tx) -> Reply:
        loan = await running_loans.top_up(tx, scenes, owner.agent_id, loan_id, amount, named)
        [shown] = await _borrowed(tx, [loan], await scenes.at(tx))
        return Reply(shown)

    return await once_in(request, owner, deed)


@router.post(
    "/lending/{loan_id}/release", openapi_extra=document("Take back collateral", request=ReturnPost, scope="agent")
)
async def release(request: Request, owner: BookOwner, loan_id: str) -> Response:
    """Take back collateral past what a new loan of the same debt would need."""
    asked = await body_of(request, _RETURN, empty=b"{}")
    amount = wire.exact_or_none(asked.amount, "/amount")
    named, scenes = Names(asked.reference, idempotency_key(request)), parts_of(request).scenes

    async def deed(tx: Tx) -> Reply:
        loan = await running_loans.release(tx, scenes, owner.agent_id, loan_id, amount, named)
        [shown] = await _borrowed(tx, [loan], await scenes.at(tx))
        return Reply(shown)

    return await once_in(request, owner, deed)


# --- what it costs


@router.get("/lending/rates", openapi_extra=document("Rates of loans"))
async def list_rates(
    request: Request, caller: AnyCaller, limit: Limit = PAGE_MAX, cursor: Cursor = "", asset: Text | None = None
) -> Response:
    """Show the curve of each asset that is lent or on offer, where it stands, and both sides' rate of the next loan."""
    parts = parts_of(request)
    if asset is not None:
        market_rules.check_symbol("/asset", asset)
    async with parts.database.transaction(caller.key_id) as tx:
        found = await loans.list_markets(tx, limit, asset, cursor)
        cheapest = await loans.cheapest(tx, [m.asset for m in found])
        parameters = (await parts.market.current(tx)).parameters
    rows = [replies.market_reply(m, parameters.loans_of(m.asset), cheapest.get(m.asset)) for m in found]
    more = found[-1].asset if len(found) == limit else None
    return wire.JsonResponse({"rates": rows, "next_cursor": more})


@router.get("/lending/quote", openapi_extra=document("What a loan would cost", scope="agent"))
async def quote(
    request: Request,
    owner: BookOwner,
    asset: Text,
    amount: Text,
    collateral_asset: Text = "USDC",
    rate: RateKind = "floating",
) -> Response:
    """Show which offers a loan would take, what it would cost, and what would secure it; nothing is booked."""
    wanted = Wanted(asset, _amount(amount), collateral_asset, rate_kind=rate)
    parts = parts_of(request)
    for name in (asset, collateral_asset):
        market_rules.check_symbol("/asset", name)
    async with parts.database.transaction(owner.caller.key_id) as tx:
        scene, priced = await lending.quote(tx, parts.scenes, owner.agent_id, wanted)
    return wire.JsonResponse(replies.quote_reply(scene, wanted, priced))


@router.get("/lending/{loan_id}", openapi_extra=document("A loan", scope="agent"))
async def get_loan(request: Request, owner: BookOwner, loan_id: str) -> Response:
    """Show an offer, or a loan to either of its parties, open or over."""
    parts = parts_of(request)
    async with parts.database.transaction(owner.caller.key_id) as tx:
        scene = await parts.scenes.at(tx)
        offered = await loans.find_offer(tx, owner.agent_id, loan_id)
        if offered is not None:
            [shown] = await _offered(tx, [offered], scene)
            return wire.JsonResponse(shown)
        loan = await loans.of_party(tx, owner.agent_id, loan_id)
        [shown] = await _borrowed(tx, [loan], scene)
    role = "borrower" if loan.borrower_id == owner.agent_id else "lender"
    return wire.JsonResponse(shown | {"role": role})


# --- holdings, and the market's parameters


@router.get("/wallet/holdings", openapi_extra=document("What is kept for long", scope="agent"))
async def list_holdings(request: Request, owner: BookOwner) -> Response:
    """List what the agent has said of its holdings, by asset."""
    parts = parts_of(request)
    async with parts.database.transaction(owner.caller.key_id) as tx:
        found = await holdings.of_agent(tx, owner.agent_id)
    ceiling = parts.market.view.parameters.policy.lent_share_max
    rows = [replies.holding_reply(asset, chosen, ceiling) for asset, chosen in sorted(found.items())]
    return wire.JsonResponse({"holdings": rows})


@router.put("/wallet/holdings/{asset}", openapi_extra=document("Mark a holding", request=HoldingPut, scope="agent"))
async def put_holding(request: Request, owner: BookOwner, asset: str) -> Response:
    """Mark a holding as long-term, so that all of it may be lent, or set the ceiling of its own."""
    asked = await body_of(request, _HOLDING)
    share = _fraction(asked.lent_share_max, "/lent_share_max", 1, "a share is between 0 and 1")
    chosen = HoldingSettings(bool(asked.long_term), share)

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        await holdings.put(tx, held.agent_id, asset, chosen)
        return Reply(replies.holding_reply(asset, chosen, scene.market.parameters.policy.lent_share_max))

    return await once(request, owner, effect)


@router.get("/market/lending", openapi_extra=document("Parameters of loans"))
async def list_lending(request: Request, _: AnyCaller) -> Response:
    """List what loans of each listed asset cost and need; `default` holds for every other one."""
    parameters = parts_of(request).market.view.parameters
    found = {**parameters.lending, parameters.default_lending.asset: parameters.default_lending}
    rows = [{"id": name, **asdict(terms)} for name, terms in sorted(found.items())]
    return wire.JsonResponse({"lending": rows, "version": parameters.version})


@router.get("/market/lending/{asset}", openapi_extra=document("Parameters of an asset's loans"))
async def get_lending(request: Request, caller: AnyCaller, asset: str, version: Version = None) -> Response:
    """Show what loans of an asset cost and need, now or as of a version, with the curve."""
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        parameters = await market.load_parameters(tx, version)
    terms = parameters.loans_of(asset)
    return wire.JsonResponse({"id": asset, **asdict(terms), "curve": replies.curve_reply(terms)})


@router.put(
    "/market/lending/{asset}",
    openapi_extra=document("Set parameters of an asset's loans", request=LendingPut, scope="admin"),
)
async def put_lending(request: Request, caller: AdminCaller, asset: str) -> Response:
    """Set the fields given; floating rates follow at once."""
    asked = await body_of(request, _LENDING)
    change: Any = fields_given(asked)
    expected: int | None = change.pop("version", None)
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        stored = await market.put_lending(tx, asset, change, expected)
        await lending.reprice(tx, parts.scenes, asset, stored.value)
    await parts.market.refresh()
    return wire.JsonResponse({"id": asset, **asdict(stored.value), "version": stored.version})


# --- shared


async def _offered(tx: Tx, offers: Sequence[Offer], scene: Scene) -> list[dict[str, Any]]:
    lent = await loans.all_accrued(tx, await loans.of_offers(tx, [o.id for o in offers]), scene.now)
    at = {m.asset: m for m in await loans.markets_of(tx, {o.asset for o in offers})}
    return [
        replies.offer_reply(o, [loan for loan in lent if loan.offer_id == o.id], at.get(o.asset), scene) for o in offers
    ]


async def _borrowed(tx: Tx, found: Sequence[Loan], scene: Scene) -> list[dict[str, Any]]:
    accrued = await loans.all_accrued(tx, found, scene.now)
    at = {m.asset: m for m in await loans.markets_of(tx, {loan.asset for loan in found})}
    return [replies.borrowed_reply(loan, at.get(loan.asset), scene) for loan in accrued]


def _rate(number: wire.Number | None, pointer: str) -> Decimal | None:
    """Return an annual rate as a fraction, None where none is given. Raises InvalidError."""
    return _fraction(number, pointer, 10, "an annual rate is a fraction between 0 and 10: 0.05 is 5 %")


def _fraction(number: wire.Number | None, pointer: str, most: int, detail: str) -> Decimal | None:
    fraction = wire.exact_or_none(number, pointer)
    if fraction is None:
        return None
    if not 0 <= fraction <= most:
        raise invalid(pointer, "out_of_range", detail)
    return Decimal(0) if fraction == 0 else checked_amount(pointer, fraction, RATE_DECIMALS)


def _notice(hours: float | None, usual: timedelta) -> timedelta:
    return usual if hours is None else min(NOTICE_MAX, timedelta(seconds=round(hours * 3600)))


def _amount(text: str) -> Decimal:
    """Return the number of a query parameter. Raises InvalidError."""
    return checked_amount("/amount", wire.exact(msgspec.Raw(text.encode()), "/amount"))
