"""Margin calls as stored, and which of them are due; what becomes of one is decided in `margin_calls`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import Text, bindparam, case, exists, func, insert, null, or_, select, text, union_all, update

from app.db.fleet_tables import fleet_members, fleets
from app.db.session import Tx
from app.db.tables import margin_calls
from app.domain.book import ZERO
from app.domain.margin_calls import LIVE_STATES, Call
from app.errors import NotFoundError
from app.services import shards

CALLS_A_PAGE_MAX = 200


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A call as stored, live or over."""

    id: str
    agent_id: str
    state: str
    cause: str
    noticed_at: datetime
    figures: Mapping[str, Any]
    seq: int = 0
    """Its number, 0 until it is written."""
    opened_at: datetime | None = None
    deadline_at: datetime | None = None
    expired_at: datetime | None = None
    ended_at: datetime | None = None
    acknowledged_at: datetime | None = None
    next_action_at: datetime | None = None
    reminders: int = 0
    slices: int = 0
    deficit: Decimal = ZERO
    attempts: int = 0
    respond_by: datetime | None = None
    uncovered: Decimal = ZERO
    exhausted_at: datetime | None = None
    fleet_call_id: str | None = None
    """The call of the fleet by which this member is liquidated."""
    own_cause: str | None = None
    """What it was made for before it became one of the fleet's, with the deadline that it had then."""
    own_deadline_at: datetime | None = None

    @property
    def lost(self) -> Decimal:
        """The house's losses so far, and how far equity was below zero when nothing was left to close, USD."""
        return self.deficit + self.uncovered

    @property
    def is_own(self) -> bool:
        """Whether it is the account's own, for its pooled book: neither its fleet's nor for isolated positions."""
        return self.cause in ("utilization", "maintenance")

    @property
    def is_spent(self) -> bool:
        """Whether it has sold all that it will, and goes on: nothing is left, or its account is not liquidated."""
        return self.state == "expired" or self.exhausted_at is not None

    def as_call(self) -> Call:
        """Return what the pure step needs of it."""
        return Call(
            self.state,  # type: ignore[arg-type]  # the table's CHECK
            self.noticed_at,
            self.opened_at,
            self.deadline_at,
            self.reminders,
            self.slices,
            self.attempts,
            self.respond_by,
            self.cause,  # type: ignore[arg-type]
        )


async def live(tx: Tx, agent_id: str) -> StoredCall | None:
    """Return the call that an account is under, None where there is none."""
    columns = margin_calls.c
    query = select(margin_calls).where(columns.agent_id == agent_id, columns.state.in_(LIVE_STATES))
    row = (await tx.connection.execute(query)).mappings().first()
    return None if row is None else StoredCall(**row)


_ADD = insert(margin_calls).returning(margin_calls.c.seq)


async def save(tx: Tx, before: StoredCall | None, after: StoredCall | None) -> StoredCall | None:
    """Write what has changed of a call since it was `before`, None: it is new. Return it.

    Whoever writes has its account locked, but for who `wake`s it: a call that was woken meanwhile stays awake.
    """
    if after is None or after == before:
        return after
    if before is None:
        row = {name: getattr(after, name) for name in StoredCall.__slots__ if name != "seq"}
        return replace(after, seq=(await tx.connection.execute(_ADD, row)).scalar_one())
    changed = {name: value for name in StoredCall.__slots__ if (value := getattr(after, name)) != getattr(before, name)}
    if changed.get("next_action_at") is not None:
        known, later = margin_calls.c.next_action_at, changed["next_action_at"]
        is_woken = known.is_distinct_from(before.next_action_at)
        changed["next_action_at"] = case((is_woken, func.least(known, later)), else_=later)
    await tx.connection.execute(update(margin_calls).where(margin_calls.c.id == after.id).values(**changed))
    return after


async def wake(tx: Tx, agents: Collection[str], waited_for: str) -> None:
    """Have the live calls of these agents looked at now: what those that have expired waited for is over.

    One that is still open may be expiring in another transaction, which has seen what it would wait for; one may be
    made by another, which nobody sees yet. Whoever is to write such a one `stands` on the call that it waits for: so
    that call is locked first here.
    """
    columns = margin_calls.c
    await tx.connection.execute(select(columns.id).where(columns.id == waited_for).with_for_update(key_share=True))
    live = (columns.agent_id.in_(agents), columns.state.in_(LIVE_STATES))
    await tx.connection.execute(update(margin_calls).where(*live).values(next_action_at=tx.now))


_STANDS = text(
    """
    SELECT id FROM margin_calls
    WHERE agent_id = :master AND cause = 'fleet' AND state IN ('noticed', 'open', 'liquidating')
      AND NOT jsonb_exists(figures, 'in_doubt')
    FOR SHARE SKIP LOCKED
    """
).bindparams(bindparam("master", type_=Text))


async def stands(tx: Tx, master_id: str) -> bool:
    """Tell whether a fleet's call is one that members wait for, and stays so until this transaction has ended.

    False also where it is being decided on at this moment. Ask last: whoever ends it waits for this transaction.
    """
    return (await tx.connection.execute(_STANDS, {"master": master_id})).first() is not None


async def has_waited(tx: Tx, call: StoredCall, master_id: str) -> bool:
    """Tell whether a call of the fleet that an agent leads has ended at a call's deadline or after it.

    One that began as a turn under the fleet's ended goes on with the deadline that it had before.
    """
    fleet, turn = margin_calls.alias().c, margin_calls.alias().c
    of_turn = turn.fleet_call_id == fleet.id, turn.agent_id == call.agent_id, turn.ended_at == call.noticed_at
    was_due = fleet.ended_at >= call.deadline_at, exists().where(*of_turn, turn.own_deadline_at <= fleet.ended_at)
    query = select(fleet.id).where(fleet.agent_id == master_id, fleet.cause == "fleet", or_(*was_due)).limit(1)
    return (await tx.connection.execute(query)).first() is not None


async def turns(tx: Tx, agents: Collection[str]) -> dict[str, StoredCall]:
    """Return, of these agents, the live calls by which they are liquidated for their fleet."""
    columns = margin_calls.c
    live = (columns.agent_id.in_(agents), columns.state.in_(LIVE_STATES), columns.fleet_call_id.is_not(None))
    rows = await tx.connection.execute(select(margin_calls).where(*live))
    return {row["agent_id"]: StoredCall(**row) for row in rows.mappings()}


async def under(tx: Tx, fleet_call_id: str) -> list[StoredCall]:
    """Return calls by which a fleet's call has liquidated members, in the order of their turns, a limited number."""
    columns = margin_calls.c
    query = select(margin_calls).where(columns.fleet_call_id == fleet_call_id).order_by(columns.expired_at, columns.seq)
    rows = await tx.connection.execute(query.limit(CALLS_A_PAGE_MAX))
    return [StoredCall(**row) for row in rows.mappings()]


async def put_off(tx: Tx, agent_id: str, seconds: float) -> None:
    """Let an account's call wait: what can't be decided on now does not hold up the others that are due."""
    columns = margin_calls.c
    again = func.greatest(columns.next_action_at, tx.now + timedelta(seconds=seconds))
    live = (columns.agent_id == agent_id, columns.state.in_(LIVE_STATES), columns.next_action_at.is_not(None))
    await tx.connection.execute(update(margin_calls).where(*live).values(next_action_at=again))


async def due(tx: Tx, limit: int, within: Collection[int] = shards.ALL) -> dict[str, str | None]:
    """Return agents of these shards whose calls are due, each with the master of its fleet, the longest due first.

    They are so many at most that are in no fleet, and so many of fleets, of each as many: a crowd hides nobody.
    """
    columns, member, fleet = margin_calls.c, fleet_members.c, fleets.c
    is_due = (
        columns.state.in_(LIVE_STATES),
        columns.next_action_at <= tx.now,
        shards.within(columns.agent_id, within),
    )
    belongs = exists().where(member.agent_id == columns.agent_id, member.joined_at.is_not(None))
    alone = select(columns.agent_id, null().label("master_id"), columns.next_action_at).where(*is_due, ~belongs)
    place = func.row_number().over(partition_by=fleet.id, order_by=columns.next_action_at)
    ranked = (
        select(columns.agent_id, fleet.master_id, columns.next_action_at, place.label("place"))
        .join(fleet_members, (member.agent_id == columns.agent_id) & member.joined_at.is_not(None))
        .join(fleets, fleet.id == member.fleet_id)
        .where(*is_due)
        .subquery()
    )
    of_fleets = select(ranked.c.agent_id, ranked.c.master_id, ranked.c.next_action_at)
    both = union_all(
        alone.order_by(columns.next_action_at).limit(limit).subquery().select(),
        of_fleets.order_by(ranked.c.place, ranked.c.next_action_at).limit(limit).subquery().select(),
    ).subquery()
    rows = await tx.connection.execute(select(both.c.agent_id, both.c.master_id).order_by(both.c.next_action_at))
    return {row.agent_id: row.master_id for row in rows}


async def get(tx: Tx, agent_id: str, call_id: str) -> StoredCall:
    """Return a call of the agent. Raises NotFoundError."""
    columns = margin_calls.c
    query = select(margin_calls).where(columns.agent_id == agent_id, columns.id == call_id)
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such margin call.", code="margin_call_not_found")
    return StoredCall(**row)


async def list_calls(
    tx: Tx, agent_id: str, limit: int, before: int | None = None, state: str | None = None
) -> list[StoredCall]:
    """Return an agent's calls, newest first, from below the number `before`."""
    columns = margin_calls.c
    query = select(margin_calls).where(columns.agent_id == agent_id).order_by(columns.seq.desc())
    if before is not None:
        query = query.where(columns.seq < before)
    if state is not None:
        query = query.where(columns.state == state)
    rows = await tx.connection.execute(query.limit(min(limit, CALLS_A_PAGE_MAX)))
    return [StoredCall(**row) for row in rows.mappings()]


async def list_of(tx: Tx, agent_ids: Collection[str], limit: int, before: int | None = None) -> list[StoredCall]:
    """Return the calls of several agents, newest first, from below the number `before`."""
    columns = margin_calls.c
    query = select(margin_calls).where(columns.agent_id.in_(agent_ids)).order_by(columns.seq.desc())
    if before is not None:
        query = query.where(columns.seq < before)
    rows = await tx.connection.execute(query.limit(min(limit, CALLS_A_PAGE_MAX)))
    return [StoredCall(**row) for row in rows.mappings()]
