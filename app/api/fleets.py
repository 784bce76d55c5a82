"""Fleets as their coordinators see them: members, what is delegated to each, the dry powder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from app.api import body as wire
from app.api.booking import AgentRef, BookOwner, Label, Owner, Reply, once_in, owner_for
from app.api.deps import Parts, body_of, caller_of, document, parts_of
from app.api.margin_calls import call_reply
from app.api.pages import PAGE_MAX, Cursor, Limit, next_cursor, number_cursor
from app.api.quote_request import Limits, MarginModelName, check_work
from app.api.risk_book import history_of, history_shown
from app.api.webhooks import NothingIn
from app.db.session import Tx
from app.domain import fleet_plan
from app.domain.book import ZERO
from app.domain.fleet_plan import Bounds, Policy, Share
from app.domain.money import AMOUNT_MAX, checked_amount, plain
from app.errors import ForbiddenError, invalid, pointer_to
from app.services import accounts, book, calls, delegation, fleet_books, fleet_cascade, fleet_risk, fleets
from app.services.accounts import Caller
from app.services.delegation import Pair
from app.services.fleet_cascade import Crash
from app.services.fleet_risk import Asked
from app.services.fleet_terms import Delegated, Terms
from app.services.fleets import Fleet, Member
from app.services.history_cache import Known
from app.services.liquidation import Rules

router = APIRouter(prefix="/api/fleets", tags=["fleets"])

EMERGENCIES = ("ORANGE", "RED")
CRASH_MAX = 10
"""A price rises to eleven times at most."""


class FleetPost(wire.Request):
    """POST /api/fleets: the key's own agent leads it, its wallet is the master's."""

    name: str
    dry_powder: wire.Number = wire.NOT_GIVEN
    over_delegation: bool | None = None


class FleetPatch(wire.Request):
    """PATCH /api/fleets/{id}: whether delegations may add up to more than is within reach."""

    over_delegation: bool | None = None


class MemberPost(wire.Request):
    """POST /api/fleets/{id}/members: a new agent by its name, or one that there is by its id."""

    max_margin: wire.Number
    name: str | None = None
    agent_id: AgentRef | None = None
    services: list[str] | None = None
    liquidation_priority: int | None = None
    delegation: Delegated | None = None


class MemberPatch(wire.Request):
    """PATCH /api/fleets/{id}/members/{agent_id}: `on_excess` says what happens where more is in use."""

    max_margin: wire.Number = wire.NOT_GIVEN
    services: list[str] | None = None
    liquidation_priority: int | None = None
    delegation: Delegated | None = None
    on_excess: Literal["refuse", "reduce_only"] | None = None


class SweepPost(wire.Request):
    """POST /api/fleets/{id}/members/{agent_id}/sweep: all that the member can do without where `amount` is left out."""

    amount: wire.Number = wire.NOT_GIVEN


class DryPowderPost(wire.Request):
    """POST /api/fleets/{id}/dry-powder: released in an emergency, or for a reason that is given."""

    action: Literal["release", "restore"]
    reason: Label | None = None


class RebalancePost(wire.Request):
    """POST /api/fleets/{id}/rebalance: planned, or applied; bounds are shares of what is above the dry powder."""

    policy: Policy
    apply: bool | None = None
    share_min: wire.Number = wire.NOT_GIVEN
    share_max: wire.Number = wire.NOT_GIVEN


class CascadePost(wire.Request):
    """POST /api/fleets/{id}/cascade: relative moves of prices; volumes by which sales move them further."""

    shock: wire.Number = wire.NOT_GIVEN
    shocks: dict[str, wire.Number] | None = None
    adv: dict[str, wire.Number] | None = None


_FLEET = wire.Body(FleetPost)
_FLEET_PATCH = wire.Body(FleetPatch)
_MEMBER = wire.Body(MemberPost)
_PATCH = wire.Body(MemberPatch)
_SWEEP = wire.Body(SweepPost)
_POWDER = wire.Body(DryPowderPost)
_REBALANCE = wire.Body(RebalancePost)
_CASCADE = wire.Body(CascadePost)
_NOTHING = wire.Body(NothingIn)


@dataclass(frozen=True, slots=True)
class Led:
    """Whose fleets a request may see: a coordinator's own, or (None) all, an admin's."""

    caller: Caller
    master_id: str | None

    def owner(self, fleet: Fleet) -> Owner:
        """Return in whose name a fleet is changed."""
        return Owner(self.caller, fleet.master_id)


async def _led(request: Request) -> Led:
    caller = await caller_of(request, "coordinator")
    return Led(caller, None if caller.may("admin") else caller.agent_id or "")


Leader = Annotated[Led, Depends(_led)]
MasterId = Annotated[str | None, Query(description="whose fleet: for keys of an admin")]


@router.post("", openapi_extra=document("Make a fleet", request=FleetPost, scope="coordinator", status=201))
async def create_fleet(request: Request, led: Leader, agent_id: MasterId = None) -> Response:
    """Make the agent the master of a fleet."""
    asked = await body_of(request, _FLEET)
    owner = await owner_for(parts_of(request).database, led.caller, agent_id)
    given = wire.exact_or_none(asked.dry_powder, "/dry_powder")
    share, over = fleets.DRY_POWDER if given is None else given, bool(asked.over_delegation)

    async def deed(tx: Tx) -> Reply:
        fleet = await fleets.create(tx, owner.agent_id, asked.name, share, over_delegation=over)
        return Reply(await _shown(tx, fleet), 201)

    return await once_in(request, owner, deed)


@router.get("", openapi_extra=document("Fleets", scope="coordinator"))
async def list_fleets(request: Request, led: Leader, limit: Limit = PAGE_MAX, cursor: Cursor = "") -> Response:
    """List the caller's fleet, or all to an admin, newest first."""
    async with parts_of(request).database.transaction(led.caller.key_id) as tx:
        found = await fleets.list_fleets(tx, led.master_id, limit, number_cursor(cursor))
    more = next_cursor([fleet.seq for fleet in found], limit)
    return wire.JsonResponse({"fleets": [_stored(fleet) for fleet in found], "next_cursor": more})


@router.get("/membership", openapi_extra=document("The fleet an agent is in", scope="agent"))
async def get_membership(request: Request, owner: BookOwner) -> Response:
    """Show an agent the fleet that it is in or invited to, and what is delegated to it: of the others nothing."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        member, fleet = await fleets.membership(tx, owner.agent_id)
    return wire.JsonResponse(_member(member) | {"fleet_name": fleet.name})


@router.get("/{fleet_id}", openapi_extra=document("A fleet", scope="coordinator"))
async def get_fleet(request: Request, led: Leader, fleet_id: str) -> Response:
    """Show a fleet: what its master holds, what is drawn, what may still be."""
    async with parts_of(request).database.transaction(led.caller.key_id) as tx:
        return wire.JsonResponse(await _shown(tx, await fleets.get(tx, fleet_id, led.master_id)))


@router.patch("/{fleet_id}", openapi_extra=document("Change a fleet", request=FleetPatch, scope="coordinator"))
async def patch_fleet(request: Request, led: Leader, fleet_id: str) -> Response:
    """Let delegations add up to more than the master can reach, or no more: what is delegated already stays."""
    asked = await body_of(request, _FLEET_PATCH)
    fleet = await _fleet(request, led, fleet_id)

    async def deed(tx: Tx) -> Reply:
        changed = await fleets.allow_over_delegation(tx, fleet, allowed=asked.over_delegation)
        return Reply(await _shown(tx, changed))

    return await once_in(request, led.owner(fleet), deed)


@router.delete("/{fleet_id}", openapi_extra=document("Disband a fleet", scope="coordinator", status=204))
async def delete_fleet(request: Request, led: Leader, fleet_id: str) -> Response:
    """End a fleet without members: its master is an agent like any other again."""
    fleet = await _fleet(request, led, fleet_id)
    async with parts_of(request).database.transaction(led.caller.key_id) as tx:
        await fleets.disband(tx, fleet)
    return Response(status_code=204)


@router.post(
    "/{fleet_id}/members", openapi_extra=document("Add a member", request=MemberPost, scope="coordinator", status=201)
)
async def add_member(request: Request, led: Leader, fleet_id: str) -> Response:
    """Add a new agent, with its first key, which is shown this once; or invite one that there is."""
    asked = await body_of(request, _MEMBER)
    terms = Terms(
        wire.exact(asked.max_margin, "/max_margin"),
        asked.services or (),
        asked.liquidation_priority or 0,
        asked.delegation or "pooled",
    )
    if (asked.name is None) == (asked.agent_id is None):
        raise invalid("/agent_id", "missing_field", "give name, of a new agent, or agent_id, one of the two")
    fleet = await _fleet(request, led, fleet_id)

    async def deed(tx: Tx) -> Reply:
        known = await fleets.invite(tx, fleet, asked.agent_id or "", terms, joins=led.caller.may("admin"))
        return Reply(_member(known), 201)

    if asked.agent_id is not None:
        return await once_in(request, led.owner(fleet), deed)
    return await _made(request, led, fleet, asked.name or "", terms)


async def _made(request: Request, led: Led, fleet: Fleet, name: str, terms: Terms) -> Response:
    """Add a new agent. Its key is nowhere but in this reply: an Idempotency-Key would have it stored."""
    async with parts_of(request).database.transaction(led.caller.key_id) as tx:
        agent_id = await accounts.create_agent(tx, name)
        member = await fleets.invite(tx, fleet, agent_id, terms, joins=True, made=True)
        key = await accounts.create_key(tx, agent_id, {"agent"}, name)
    return wire.JsonResponse({**_member(member), "api_key": key.text, "key_id": key.id}, 201)


@router.get("/{fleet_id}/members", openapi_extra=document("Members of a fleet", scope="coordinator"))
async def list_members(
    request: Request, led: Leader, fleet_id: str, limit: Limit = PAGE_MAX, cursor: Cursor = ""
) -> Response:
    """List the members in the order in which they came, the invited ones too."""
    async with parts_of(request).database.transaction(led.caller.key_id) as tx:
        fleet = await fleets.get(tx, fleet_id, led.master_id)
        found = await fleets.list_members(tx, fleet.id, limit, number_cursor(cursor) or 0)
    more = next_cursor([member.seq for member in found], limit)
    return wire.JsonResponse({"members": [_member(member) for member in found], "next_cursor": more})


@router.patch(
    "/{fleet_id}/members/{agent_id}",
    openapi_extra=document("Change a delegation", request=MemberPatch, scope="coordinator"),
)
async def patch_member(request: Request, led: Leader, fleet_id: str, agent_id: str) -> Response:
    """Change what is delegated to a member; what it can spare is given back first."""
    asked = await body_of(request, _PATCH)
    most = wire.exact_or_none(asked.max_margin, "/max_margin")
    fleet = await _fleet(request, led, fleet_id)

    async def deed(tx: Tx) -> Reply:
        before = await _recalled(request, tx, fleet, agent_id)
        reduces = asked.on_excess == "reduce_only"
        terms = _changed(before, asked, most)
        member = await fleets.change_terms(tx, before, terms, reduce_only_on_excess=reduces, cause="coordinator")
        return Reply(_member(member))

    return await once_in(request, led.owner(fleet), deed)


@router.delete(
    "/{fleet_id}/members/{agent_id}", openapi_extra=document("Let a member go", scope="coordinator", status=204)
)
async def delete_member(request: Request, led: Leader, fleet_id: str, agent_id: str) -> Response:
    """Let a member go that has given back what it drew, or withdraw an invitation."""
    fleet = await _fleet(request, led, fleet_id)
    async with parts_of(request).database.transaction(led.caller.key_id) as tx:
        await fleets.remove(tx, await _recalled(request, tx, fleet, agent_id))
    return Response(status_code=204)


@router.post(
    "/{fleet_id}/members/{agent_id}/sweep",
    openapi_extra=document("Take a member's profit", request=SweepPost, scope="coordinator"),
)
async def sweep_member(request: Request, led: Leader, fleet_id: str, agent_id: str) -> Response:
    """Move what a member that was made for the fleet has of its own, and can do without, into the master's wallet."""
    asked = await body_of(request, _SWEEP, empty=b"{}")
    amount = (
        None if (given := wire.exact_or_none(asked.amount, "/amount")) is None else checked_amount("/amount", given)
    )
    fleet = await _fleet(request, led, fleet_id)

    async def deed(tx: Tx) -> Reply:
        member, pair = await _gathered(request, tx, fleet, agent_id)
        if not member.made_for_fleet:
            raise ForbiddenError("a member that was not made for the fleet keeps its own money", code="scope_missing")
        moved = await delegation.sweep(tx, await parts_of(request).scenes.at(tx), pair, amount)
        return Reply(_member(member) | {"amount": plain(moved)})

    return await once_in(request, led.owner(fleet), deed)


@router.post(
    "/{fleet_id}/members/{agent_id}/write-off",
    openapi_extra=document("Count what a member has lost as lost", request=NothingIn, scope="coordinator"),
)
async def write_off_member(request: Request, led: Leader, fleet_id: str, agent_id: str) -> Response:
    """Count what a member drew and lost as the fleet's loss: its delegation is whole again, and it may leave."""
    await body_of(request, _NOTHING, empty=b"{}")
    fleet = await _fleet(request, led, fleet_id)

    async def deed(tx: Tx) -> Reply:
        member, pair = await _gathered(request, tx, fleet, agent_id)
        return Reply(_member(await delegation.write_off(tx, pair.member, member)))

    return await once_in(request, led.owner(fleet), deed)


@router.post("/{fleet_id}/join", openapi_extra=document("Join a fleet", request=NothingIn, scope="agent"))
async def join(request: Request, owner: BookOwner, fleet_id: str) -> Response:
    """Agree to an invitation: from then on the coordinator sees the agent's book and acts for it."""
    await body_of(request, _NOTHING, empty=b"{}")

    async def deed(tx: Tx) -> Reply:
        return Reply(_member(await fleets.join(tx, fleet_id, owner.agent_id)))

    return await once_in(request, owner, deed)


@router.post("/{fleet_id}/leave", openapi_extra=document("Leave a fleet", request=NothingIn, scope="agent"))
async def leave(request: Request, owner: BookOwner, fleet_id: str) -> Response:
    """Decline an invitation, or leave a fleet when all that was drawn is given back."""
    await body_of(request, _NOTHING, empty=b"{}")

    async def deed(tx: Tx) -> Reply:
        fleet = await fleets.joinable(tx, fleet_id, owner.agent_id)
        member = await _recalled(request, tx, fleet, owner.agent_id)
        await fleets.remove(tx, member)
        return Reply(_member(member) | {"status": "left"})

    return await once_in(request, owner, deed)


@router.post(
    "/{fleet_id}/dry-powder",
    openapi_extra=document("Release or restore the dry powder", request=DryPowderPost, scope="coordinator"),
)
async def dry_powder(request: Request, led: Leader, fleet_id: str) -> Response:
    """Let members reach the dry powder while the fleet is in ORANGE or RED, or for a reason; or put it out of reach."""
    asked = await body_of(request, _POWDER)
    fleet = await _fleet(request, led, fleet_id)

    async def deed(tx: Tx) -> Reply:
        await accounts.lock_account(tx, fleet.master_id)
        fresh = await fleets.get(tx, fleet.id, fleet.master_id)
        if asked.action == "restore":
            changed = await fleets.restore_dry_powder(tx, fresh, asked.reason or "restored by the coordinator")
        else:
            reason = asked.reason or await _emergency(request, tx, fresh)
            changed = await fleets.release_dry_powder(tx, fresh, reason, in_emergency=not asked.reason)
        return Reply(await _shown(tx, changed))

    return await once_in(request, led.owner(fleet), deed)


Confidence = Annotated[float, Query(gt=0.5, lt=1, description="of VaR and ES")]
Horizon = Annotated[float, Query(gt=0, le=365, description="of VaR and ES, days")]
Window = Annotated[int, Query(ge=60, le=3_650, description="days of history looked back, and of returns")]
Models = Annotated[Sequence[MarginModelName], Query(max_length=10, description="models beside the service's own")]


@router.get("/{fleet_id}/risk", openapi_extra=document("A fleet's risk as one", scope="coordinator"))
async def get_risk(
    request: Request,
    led: Leader,
    fleet_id: str,
    confidence: Confidence = 0.99,
    horizon_days: Horizon = 1.0,
    window_days: Window | None = None,
    models: Models = (),
) -> Response:
    """Show the fleet's margin, VaR, concentration and drift, netted across members, and each member's part of it."""
    parts = parts_of(request)
    days = window_days or _window_days(parts)
    asked = Asked(confidence, horizon_days, days, tuple(models))
    async with parts.database.transaction(led.caller.key_id) as tx:
        books = await fleet_books.load(tx, await fleets.get(tx, fleet_id, led.master_id))
        scene = await parts.scenes.at(tx)
        agents = [books.master.agent_id, *(held.agent_id for _, held in books.members)]
        returns = await fleet_risk.daily_returns(tx, agents, days)
    work = fleet_risk.venue_milliseconds(books, scene, models)
    check_work(work, Limits.of(parts.settings), "/models", "fewer models")
    names = fleet_risk.names_of(books, scene)
    known = await history_of(parts, names, days, "/window_days")
    recent = await history_of(parts, names, fleet_risk.RECENT_DAYS, "/window_days")
    found = await parts.workshop.run(fleet_risk.risk, books, scene, known.panel, recent.panel, returns, asked)
    return wire.JsonResponse({"fleet_id": fleet_id, **found, "history": history_shown(known, scene.now)})


@router.post(
    "/{fleet_id}/cascade", openapi_extra=document("What a crash would do", request=CascadePost, scope="coordinator")
)
async def post_cascade(request: Request, led: Leader, fleet_id: str) -> Response:
    """Tell who would be liquidated in which order at moved prices, and what it frees. Nothing is changed."""
    asked, parts = await body_of(request, _CASCADE), parts_of(request)
    crash = Crash(
        shock=_move("/shock", wire.exact_or_none(asked.shock, "/shock") or ZERO),
        shocks={name: _move(p, wire.exact(m, p)) for name, p, m in _by_name("shocks", asked.shocks)},
        adv={name: _volume(p, wire.exact(v, p)) for name, p, v in _by_name("adv", asked.adv)},
    )
    async with parts.database.transaction(led.caller.key_id) as tx:
        books = await fleet_books.load(tx, await fleets.get(tx, fleet_id, led.master_id))
        scene = await parts.scenes.at(tx)
    fleet_cascade.require_known(scene, crash)
    rules = Rules.of(parts.settings)
    found = await parts.workshop.run(fleet_cascade.cascade, books, scene, crash, rules)
    return wire.JsonResponse({"fleet_id": fleet_id, **found})


def _by_name(field: str, given: dict[str, msgspec.Raw] | None) -> list[tuple[str, str, msgspec.Raw]]:
    """Return what is given by name, each with its pointer."""
    return [(name, pointer_to(field, name), value) for name, value in (given or {}).items()]


def _volume(pointer: str, volume: Decimal) -> float:
    found = float(volume)  # judged as it is used: what is too small for a float is 0, what is too large infinite
    if not 0.0 < found < AMOUNT_MAX:
        raise invalid(pointer, "number_out_of_range", f"a daily volume is above 0 and below {AMOUNT_MAX:f}")
    return found


def _move(pointer: str, move: Decimal) -> float:
    found = float(move)
    if not -1.0 < found <= CRASH_MAX:
        raise invalid(pointer, "number_out_of_range", f"a move is above -1 and at most {CRASH_MAX}")
    return found


@router.get("/{fleet_id}/margin-calls", openapi_extra=document("Margin calls of a fleet", scope="coordinator"))
async def list_margin_calls(
    request: Request, led: Leader, fleet_id: str, limit: Limit = PAGE_MAX, cursor: Cursor = ""
) -> Response:
    """List the margin calls of the fleet, of its master and of the members that have joined, newest first."""
    async with parts_of(request).database.transaction(led.caller.key_id) as tx:
        fleet = await fleets.get(tx, fleet_id, led.master_id)
        found = await calls.list_of(tx, await fleets.agents_of(tx, fleet), limit, number_cursor(cursor))
    more = next_cursor([call.seq for call in found], limit)
    shown = [call_reply(call) | {"agent_id": call.agent_id} for call in found]
    return wire.JsonResponse({"margin_calls": shown, "next_cursor": more})


@router.post(
    "/{fleet_id}/rebalance",
    openapi_extra=document("Plan or apply moves of delegation", request=RebalancePost, scope="coordinator"),
)
async def rebalance(request: Request, led: Leader, fleet_id: str) -> Response:
    """Share out anew what is above the dry powder; applied, all in one transaction, with an event for each change."""
    asked, parts = await body_of(request, _REBALANCE), parts_of(request)
    bounds = Bounds(*_bounds(asked))
    fleet = await _fleet(request, led, fleet_id)
    known = await _history(request, led, fleet)  # before there are locks, for others wait for them

    async def deed(tx: Tx) -> Reply:
        agents = await (fleets.lock(tx, fleet) if asked.apply else fleets.agents_of(tx, fleet))
        scene = await parts.scenes.at(tx)
        books = await fleet_books.load(tx, await fleets.get(tx, fleet.id, fleet.master_id))
        returns = await fleet_risk.daily_returns(tx, agents, _window_days(parts))
        members = await parts.workshop.run(fleet_risk.members_to_plan, books, scene, known.panel, returns)
        planned = fleet_plan.plan(members, fleet_books.to_share_out(books), asked.policy, bounds)
        if asked.apply:
            await fleets.redelegate(tx, books.rebalanced, planned, asked.policy)
        moves = [_planned(member, amount) for member, amount in zip(members, planned, strict=True)]
        return Reply({"fleet_id": fleet.id, "policy": asked.policy, "applied": bool(asked.apply), "moves": moves})

    return await once_in(request, led.owner(fleet), deed)


async def _history(request: Request, led: Led, fleet: Fleet) -> Known:
    """Return the returns of what a fleet holds. Raises InvalidError `too_much_work`."""
    parts = parts_of(request)
    async with parts.database.transaction(led.caller.key_id) as tx:
        books, scene = await fleet_books.load(tx, fleet), await parts.scenes.at(tx)
    return await history_of(parts, fleet_risk.names_of(books, scene), _window_days(parts), "/policy")


def _window_days(parts: Parts) -> int:
    return int(parts.market.view.parameters.models.var_window_days)


def _bounds(asked: RebalancePost) -> tuple[float, float]:
    least = wire.exact_or_none(asked.share_min, "/share_min")
    most = wire.exact_or_none(asked.share_max, "/share_max")
    found = 0.0 if least is None else float(least), 1.0 if most is None else float(most)
    if not 0.0 <= found[0] <= found[1] <= 1.0:
        raise invalid("/share_min", "number_out_of_range", "0 <= share_min <= share_max <= 1")
    return found


def _planned(member: Share, amount: Decimal) -> dict[str, Any]:
    before = member.max_margin
    return {"agent_id": member.agent_id, "before": plain(before), "after": plain(amount), "drawn": plain(member.drawn)}


async def _emergency(request: Request, tx: Tx, fleet: Fleet) -> str:
    """Return why the dry powder may be released without a reason: its call, the zone last told, or that of this moment.

    Raises ConflictError where prices are stale, InvalidError where there is no emergency.
    """
    if (await book.load(tx, fleet.master_id)).live_cause == "fleet":
        return "the fleet is under a margin call"
    if fleet.zone not in EMERGENCIES:
        scene = await parts_of(request).scenes.at(tx)
        figures = fleet_books.figures(scene, await fleet_books.load(tx, fleet))
        scene.require_fresh(figures)
        if figures.health.zone not in EMERGENCIES:
            raise invalid("/reason", "no_emergency", f"the fleet is in {figures.health.zone}: give a reason")
        return f"the fleet is in {figures.health.zone}"
    return f"the fleet is in {fleet.zone}"


async def _fleet(request: Request, led: Led, fleet_id: str) -> Fleet:
    """Return a fleet that the caller leads, or an admin's any. Raises NotFoundError."""
    async with parts_of(request).database.transaction(led.caller.key_id) as tx:
        return await fleets.get(tx, fleet_id, led.master_id)


async def _recalled(request: Request, tx: Tx, fleet: Fleet, agent_id: str) -> Member:
    """Lock a member and its master, have what it can spare given back, and return it as it then stands."""
    return (await _gathered(request, tx, fleet, agent_id))[0]


async def _gathered(request: Request, tx: Tx, fleet: Fleet, agent_id: str) -> tuple[Member, Pair]:
    """Do as `_recalled`, and return both books as they then stand too."""
    await fleets.get_member(tx, fleet.id, agent_id)
    books = await book.lock_all(tx, {fleet.master_id, agent_id})
    scene = await parts_of(request).scenes.at(tx)
    pair = await delegation.give_back(tx, scene, Pair(books[agent_id], books[fleet.master_id]))
    return await fleets.get_member(tx, fleet.id, agent_id), pair


def _changed(before: Member, asked: MemberPatch, most: Decimal | None) -> Terms:
    priority, kind = asked.liquidation_priority, asked.delegation
    return Terms(
        max_margin=before.max_margin if most is None else most,
        services=before.services if asked.services is None else asked.services,
        liquidation_priority=before.liquidation_priority if priority is None else priority,
        delegation=before.delegation if kind is None else kind,
    )


async def _shown(tx: Tx, fleet: Fleet) -> dict[str, Any]:
    """Return a fleet with what its master holds, in USDC."""
    known = await fleets.wallet_of(tx, fleet.id)
    fleet, held, reach = known.fleet, known.held, known.reach
    low, high = fleets.DRY_POWDER_ADVISED
    advisories: list[dict[str, Any]] = []
    if not low <= fleet.dry_powder <= high:
        advisories.append({"code": "dry_powder_unusual", "low": low, "high": high})
    if known.delegated > reach:
        advisories.append({"code": "over_delegated", "excess": plain(known.delegated - reach)})
    return {
        **_stored(fleet),
        "balance": plain(held + fleet.drawn),
        "delegated": plain(known.delegated),
        "reachable": plain(reach),
        "available": plain(max(Decimal(0), reach - fleet.drawn)),
        "advisories": advisories,
    }


def _stored(fleet: Fleet) -> dict[str, Any]:
    row = asdict(fleet)
    del row["seq"]
    return row | {"dry_powder": plain(fleet.dry_powder), "drawn": plain(fleet.drawn)}


def _member(member: Member) -> dict[str, Any]:
    row = asdict(member)
    del row["seq"]
    if row.pop("capped_drawn") is None:
        row["capped_at"] = None  # it has had room since
    status = "invited" if member.joined_at is None else "active"
    amounts = {"max_margin": plain(member.max_margin), "drawn": plain(member.drawn)}
    return row | amounts | {"id": member.agent_id, "status": status}
