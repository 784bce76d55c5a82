"""Netting agreements: proposed by one member, bound once all have accepted, left when nothing is open.

Whoever changes an agreement, books against it or settles it locks its row; see `netting` for the accounts before it.
Also who only tells the members holds their accounts first: events of one agent wait for each other, and two that told
the same agents in two orders would wait for ever.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, insert, select, update

from app.db.clearing_tables import netting_agreements, netting_members
from app.db.session import Tx
from app.domain.money import checked_amount, to_decimal
from app.domain.netting import Terms
from app.errors import NotFoundError, conflict, invalid
from app.services import accounts, audit, events, shards, wallet
from app.services.margin import Scene

MEMBERS_MAX = 50
SERVICES_MAX = 32
AGREEMENTS_PROPOSED_MAX = 100
"""Agreements of one proposer that others have not yet answered."""
INTERVAL_SECONDS_MAX = 366 * 86_400
AGREEMENTS_A_PAGE_MAX = 200
PUT_OFF = timedelta(seconds=5)
"""How long an agreement is left alone whose run has failed for a fault."""
RETRY_DEFAULT = timedelta(seconds=60)
"""When a defaulted agreement without a shorter interval is tried again."""

State = Literal["proposed", "active", "defaulted", "ended"]


@dataclass(frozen=True, slots=True)
class NewAgreement:
    """What a proposer asks for; `threshold` is of the gross that is open, USD."""

    name: str
    members: Sequence[str]
    services: Sequence[str]
    interval_seconds: int | None = None
    threshold: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """An agent of an agreement."""

    agent_id: str
    accepted_at: datetime | None
    left_at: datetime | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """A stored agreement with its members, those who left included."""

    id: str
    seq: int
    name: str
    proposer: str
    services: Sequence[str]
    interval_seconds: int | None
    threshold: Decimal | None
    fee_rate: Decimal
    buffer: Decimal
    state: State
    created_at: datetime
    activated_at: datetime | None
    defaulted_at: datetime | None
    ended_at: datetime | None
    next_action_at: datetime | None
    open_obligations: int
    settled_through: int
    members: Sequence[Member]

    @property
    def present(self) -> list[str]:
        """Who has not left, in the order of their ids."""
        return [m.agent_id for m in self.members if m.left_at is None]

    def left_at(self, agent_id: str) -> datetime | None:
        """Return when a member has left."""
        return next(m.left_at for m in self.members if m.agent_id == agent_id)

    @property
    def terms(self) -> Terms:
        """What was agreed on."""
        return Terms(self.fee_rate, self.buffer)


async def propose(tx: Tx, scene: Scene, proposer: str, asked: NewAgreement) -> Agreement:
    """Write an agreement that its proposer has accepted, under the fee and the buffer of this moment.

    Raises InvalidError, ConflictError past the limit of what waits for answers.
    """
    members = await _checked_members(tx, proposer, asked)
    if not 1 <= len(asked.services) <= SERVICES_MAX:
        raise invalid("/services", "too_many_items", f"an agreement is about 1 to {SERVICES_MAX} services")
    for service in asked.services:
        wallet.check_service("/services", service)
    if asked.interval_seconds is not None and not 1 <= asked.interval_seconds <= INTERVAL_SECONDS_MAX:
        raise invalid("/interval_seconds", "number_out_of_range", f"it is 1 to {INTERVAL_SECONDS_MAX}")
    threshold = None if asked.threshold is None else checked_amount("/threshold", asked.threshold)
    await _check_waiting(tx, proposer)
    await _hold(tx, members)
    clearing = scene.market.parameters.clearing
    agreement_id = f"net_{secrets.token_hex(10)}"
    row = {
        "id": agreement_id,
        "name": asked.name,
        "proposer": proposer,
        "services": sorted(set(asked.services)),
        "interval_seconds": asked.interval_seconds,
        "threshold": threshold,
        "fee_rate": to_decimal(clearing.netting_fee),
        "buffer": to_decimal(clearing.netting_buffer),
        "state": "proposed",
        "created_at": scene.now,
    }
    await tx.connection.execute(insert(netting_agreements).values(row))
    joined = [
        {"agreement_id": agreement_id, "agent_id": m, "accepted_at": scene.now if m == proposer else None}
        for m in members
    ]
    await tx.connection.execute(insert(netting_members), joined)
    await audit.record(tx, "netting.proposed", agreement_id, proposer, members=members, name=asked.name)
    agreement = await _get(tx, agreement_id)
    await _tell(tx, agreement, "netting.proposed")
    return agreement


async def accept(tx: Tx, agent_id: str, agreement_id: str) -> Agreement:
    """Accept an agreement; the last to do so makes it active. Again: nothing. Raises ConflictError, NotFoundError."""
    agreement = await _held(tx, agent_id, agreement_id)
    if agreement.state == "ended":
        raise conflict("/state", "agreement_ended", "the agreement has ended")
    mine = next(m for m in agreement.members if m.agent_id == agent_id)
    if mine.accepted_at is not None:
        return agreement
    await _set_member(tx, agreement_id, agent_id, {"accepted_at": tx.now})
    await audit.record(tx, "netting.accepted", agreement_id, agent_id)
    if all(m.accepted_at is not None for m in agreement.members if m.agent_id != agent_id):
        await _set(tx, agreement_id, {"state": "active", "activated_at": tx.now})
        agreement = await _get(tx, agreement_id)
        await _tell(tx, agreement, "netting.activated")
        return agreement
    return await _get(tx, agreement_id)


async def leave(tx: Tx, agent_id: str, agreement_id: str) -> Agreement:
    """Leave an agreement, or decline one: nothing may be open. It ends where fewer than two remain, or it was declined.

    Raises ConflictError, NotFoundError.
    """
    agreement = await _held(tx, agent_id, agreement_id)
    mine = next(m for m in agreement.members if m.agent_id == agent_id)
    if agreement.state == "ended" or mine.left_at is not None:
        return agreement
    if agreement.open_obligations:
        detail = f"{agreement.open_obligations} obligations are open: settle them first"
        raise conflict("/open_obligations", "obligations_open", detail)
    await _set_member(tx, agreement_id, agent_id, {"left_at": func.clock_timestamp()})
    await audit.record(tx, "netting.left", agreement_id, agent_id)
    if agreement.state == "proposed" or len(agreement.present) <= 2:
        await _set(tx, agreement_id, {"state": "ended", "ended_at": tx.now, "next_action_at": None})
    left = await _get(tx, agreement_id)
    event = "netting.ended" if left.state == "ended" else "netting.left"
    await _tell(tx, left, event, agent_id=agent_id)
    return left


# --- reading


async def get(tx: Tx, agent_id: str | None, agreement_id: str) -> Agreement:
    """Return an agreement that an agent is or was a member of, or (None) any. Raises NotFoundError."""
    query = select(netting_agreements).where(netting_agreements.c.id == agreement_id)
    return await _found(tx, query, agent_id)


async def lock(tx: Tx, agent_id: str | None, agreement_id: str) -> Agreement:
    """Lock an agreement's row and return it as `get` does. Accounts that are to be locked are locked before it."""
    query = select(netting_agreements).where(netting_agreements.c.id == agreement_id).with_for_update()
    return await _found(tx, query, agent_id)


async def list_agreements(tx: Tx, agent_id: str, limit: int, before: int | None = None) -> list[Agreement]:
    """Return the agreements that an agent is or was a member of, newest first, from below the number `before`."""
    columns, members = netting_agreements.c, netting_members.c
    query = select(netting_agreements).join(netting_members, members.agreement_id == columns.id)
    query = query.where(members.agent_id == agent_id).order_by(columns.seq.desc())
    if before is not None:
        query = query.where(columns.seq < before)
    rows = (await tx.connection.execute(query.limit(min(limit, AGREEMENTS_A_PAGE_MAX)))).mappings().all()
    joined = await _members(tx, [row["id"] for row in rows])
    return [Agreement(**row, members=joined[row["id"]]) for row in rows]


async def due(tx: Tx, limit: int, within: Collection[int] = shards.ALL) -> list[str]:
    """Return the agreements of proposers in these shards that are due for a run, the longest due first."""
    columns = netting_agreements.c
    query = select(columns.id).where(columns.next_action_at <= func.clock_timestamp(), columns.open_obligations > 0)
    query = query.where(shards.within(columns.proposer, within)).order_by(columns.next_action_at).limit(limit)
    return list((await tx.connection.execute(query)).scalars())


@dataclass(frozen=True, slots=True)
class Standing:
    """The agreements of one state: how many, their open obligations, the longest in default, the earliest timer."""

    agreements: int
    obligations: int
    defaulted_at: datetime | None
    next_action_at: datetime | None


async def standing(tx: Tx) -> dict[State, Standing]:
    """Return the agreements that have not ended by state."""
    columns = netting_agreements.c
    sums = func.count(), func.sum(columns.open_obligations)
    times = func.min(columns.defaulted_at), func.min(columns.next_action_at)
    query = select(columns.state, *sums, *times).where(columns.state != "ended").group_by(columns.state)
    return {state: Standing(*of) for state, *of in await tx.connection.execute(query)}


# --- what becomes of it, by `netting` under the row's lock


async def booked(tx: Tx, agreement: Agreement, now: datetime, *, is_due: bool) -> None:
    """Count an obligation. The first sets the timer to the next cut-off; where it is due, to now."""
    change: dict[str, Any] = {"open_obligations": agreement.open_obligations + 1}
    if agreement.open_obligations == 0:
        change["next_action_at"] = _cut_off(agreement, now)
    if is_due:
        change["next_action_at"] = func.clock_timestamp()
    await _set(tx, agreement.id, change)


async def settled(tx: Tx, agreement: Agreement, last_seq: int) -> None:
    """Write that all is settled up to a number: until something is booked there is nothing to time."""
    done = {"state": "active", "defaulted_at": None, "open_obligations": 0, "settled_through": last_seq}
    await _set(tx, agreement.id, {**done, "next_action_at": None})


async def defaulted(tx: Tx, agreement: Agreement, now: datetime) -> None:
    """Write that a run could not settle: nothing more is booked until one can, which is tried again."""
    interval = agreement.interval_seconds
    again = RETRY_DEFAULT if interval is None else min(RETRY_DEFAULT, timedelta(seconds=interval))
    change = {"state": "defaulted", "defaulted_at": agreement.defaulted_at or now, "next_action_at": now + again}
    await _set(tx, agreement.id, change)


async def put_off(tx: Tx, agreement_id: str) -> None:
    """Leave an agreement alone for a while whose run has failed."""
    columns = netting_agreements.c
    change = update(netting_agreements).where(columns.id == agreement_id, columns.next_action_at.is_not(None))
    await tx.connection.execute(change.values(next_action_at=func.clock_timestamp() + PUT_OFF))


def _cut_off(agreement: Agreement, now: datetime) -> datetime | None:
    """Return the next cut-off: whole intervals after the activation, so that a late run moves none of the others."""
    if agreement.interval_seconds is None:
        return None
    interval, begun = timedelta(seconds=agreement.interval_seconds), agreement.activated_at or now
    return begun + ((now - begun) // interval + 1) * interval


async def _hold(tx: Tx, members: Collection[str]) -> None:
    for agent_id in sorted(members):
        await accounts.hold_account(tx, agent_id)


async def _held(tx: Tx, agent_id: str, agreement_id: str) -> Agreement:
    """Lock an agreement for one who will tell its members: nobody joins, so that they may be read before."""
    seen = await get(tx, agent_id, agreement_id)
    await _hold(tx, [m.agent_id for m in seen.members])
    return await lock(tx, agent_id, agreement_id)


async def _checked_members(tx: Tx, proposer: str, asked: NewAgreement) -> list[str]:
    members = sorted({proposer, *asked.members})
    if len(members) < 2 or len(asked.members) > MEMBERS_MAX or len(members) > MEMBERS_MAX:
        raise invalid("/members", "too_many_items", f"an agreement is between 2 to {MEMBERS_MAX} agents")
    for place, agent_id in enumerate(asked.members):
        if not await accounts.exists(tx, agent_id):
            raise invalid(f"/members/{place}", "unknown_agent", "there is no such agent")
    return members


async def _check_waiting(tx: Tx, proposer: str) -> None:
    columns = netting_agreements.c
    query = select(func.count()).where(columns.proposer == proposer, columns.state == "proposed")
    if (await tx.connection.execute(query)).scalar_one() >= AGREEMENTS_PROPOSED_MAX:
        detail = f"{AGREEMENTS_PROPOSED_MAX} agreements of yours wait for answers: leave some"
        raise conflict("", "too_many_agreements", detail)


async def _get(tx: Tx, agreement_id: str) -> Agreement:
    return await get(tx, None, agreement_id)


async def _found(tx: Tx, query: Any, agent_id: str | None) -> Agreement:
    row = (await tx.connection.execute(query)).mappings().first()
    members = [] if row is None else (await _members(tx, [row["id"]]))[row["id"]]
    if row is None or (agent_id is not None and agent_id not in [m.agent_id for m in members]):
        raise NotFoundError("There is no such agreement.", code="agreement_not_found")
    return Agreement(**row, members=members)


async def _members(tx: Tx, agreement_ids: Sequence[str]) -> dict[str, list[Member]]:
    columns = netting_members.c
    query = select(netting_members).where(columns.agreement_id.in_(agreement_ids)).order_by(columns.agent_id)
    found: dict[str, list[Member]] = {agreement_id: [] for agreement_id in agreement_ids}
    for row in await tx.connection.execute(query):
        found[row.agreement_id].append(Member(row.agent_id, row.accepted_at, row.left_at))
    return found


async def _set(tx: Tx, agreement_id: str, values: Mapping[str, Any]) -> None:
    change = update(netting_agreements).where(netting_agreements.c.id == agreement_id)
    await tx.connection.execute(change.values(**values))


async def _set_member(tx: Tx, agreement_id: str, agent_id: str, values: Mapping[str, Any]) -> None:
    columns = netting_members.c
    mine: tuple[ColumnElement[bool], ...] = (columns.agreement_id == agreement_id, columns.agent_id == agent_id)
    await tx.connection.execute(update(netting_members).where(*mine).values(**values))


async def _tell(tx: Tx, agreement: Agreement, event: str, **more: Any) -> None:
    """Tell every member, in the order of their ids: whoever tells several waits for them in that order."""
    data = {"agreement_id": agreement.id, "name": agreement.name, "state": agreement.state, **more}
    members = [m.agent_id for m in agreement.members]
    for agent_id in members:
        await events.emit(tx, event, agent_id, {**data, "members": members})
