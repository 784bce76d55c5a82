"""Fleets: who belongs to one, and what members draw of its master's wallet. The only writer of their tables.

The master is the coordinator's own account. What a member draws is moved into the member's own, so that every gate,
margin call and liquidation works on the member's book as on any other. Whoever draws, gives back or changes a
delegation holds the locks on the master and on the member, taken in the order of their ids.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import Numeric, Select, Text, bindparam, case, delete, func, insert, select, text, update

from app.db.fleet_tables import fleet_members, fleets
from app.db.session import Tx
from app.db.tables import balances
from app.domain.book import PAYING_SERVICES, ZERO
from app.domain.money import plain
from app.domain.moves import SETTLEMENT_ASSET
from app.errors import NotFoundError, conflict, invalid
from app.services import accounts, audit, calls, events, fleet_limits, shards
from app.services.fleet_limits import reachable
from app.services.fleet_terms import Delegated, Terms, checked_terms, digits

DRY_POWDER = Decimal("0.15")
"""Share of the master's wallet that no member reaches, where nothing else is asked for."""
DRY_POWDER_MAX = Decimal("0.9")
DRY_POWDER_ADVISED = Decimal("0.15"), Decimal("0.20")
MEMBERS_MAX = 1_000
"""Members of one fleet, the invited ones too."""
INVITATIONS_MAX = 50
"""Agents that a fleet has invited and that have not answered yet."""
INVITATION = timedelta(days=7)
"""How long an invitation keeps others from inviting the agent."""
FLEETS_A_PAGE_MAX = 200
ROOM = Decimal("0.1")
"""Share of its delegation that a member has drawn or given back when it has had room again."""
CAPPED_AGAIN = timedelta(minutes=1)
"""How long after it was told that a member draws no more it is not told again."""
REASON_CHARACTERS_MAX = 200


@dataclass(frozen=True, slots=True)
class Fleet:
    """A stored fleet; `drawn` is what its members hold of the master's USDC."""

    id: str
    seq: int
    master_id: str
    name: str
    dry_powder: Decimal
    drawn: Decimal
    created_at: datetime
    released_at: datetime | None
    release_reason: str | None
    zone: str
    in_emergency: bool
    """Whether the dry powder is released for the zone that the fleet was in, and so until it is out of it."""
    drifted_at: datetime | None
    over_delegation: bool
    """Whether delegations may add up to more than is within reach."""


@dataclass(frozen=True, slots=True)
class Member:
    """A stored member; it is only invited until `joined_at`."""

    agent_id: str
    seq: int
    fleet_id: str
    max_margin: Decimal
    drawn: Decimal
    services: Sequence[str]
    liquidation_priority: int
    delegation: Delegated
    reduce_only: bool
    invited_at: datetime
    joined_at: datetime | None
    capped_at: datetime | None
    made_for_fleet: bool
    capped_drawn: Decimal | None
    """What it had drawn when it was told that it draws no more; None once it has had room since."""


# --- fleets


async def create(
    tx: Tx, master_id: str, name: str, dry_powder: Decimal = DRY_POWDER, *, over_delegation: bool = False
) -> Fleet:
    """Make an agent the master of a fleet. Raises ConflictError where it is in one, InvalidError, NotFoundError."""
    if not 1 <= len(name) <= accounts.NAME_CHARACTERS_MAX or "\0" in name:
        raise invalid("/name", "invalid_name", f"a name has 1 to {accounts.NAME_CHARACTERS_MAX} characters")
    if not 0 <= dry_powder <= DRY_POWDER_MAX:
        raise invalid("/dry_powder", "number_out_of_range", f"dry powder is a share from 0 to {DRY_POWDER_MAX}")
    dry_powder = digits("/dry_powder", dry_powder)
    await accounts.lock_account(tx, master_id)
    await _require_unattached(tx, master_id, "")
    terms = {"name": name, "dry_powder": dry_powder, "over_delegation": over_delegation}
    row = terms | {"id": f"fleet_{secrets.token_hex(10)}", "master_id": master_id, "created_at": tx.now}
    made = await tx.connection.execute(insert(fleets).values(row).returning(fleets))
    fleet = Fleet(**made.mappings().one())
    await audit.record(tx, "fleet.created", fleet.id, master_id, **terms | {"dry_powder": str(dry_powder)})
    return fleet


async def allow_over_delegation(tx: Tx, fleet: Fleet, *, allowed: bool | None) -> Fleet:
    """Let delegations add up to more than is within reach, or no more: those that do stay. The master is locked here.

    None leaves it as it is, whatever another request has made of it meanwhile.
    Raises NotFoundError where the fleet was ended meanwhile.
    """
    await accounts.lock_account(tx, fleet.master_id)
    known = await get(tx, fleet.id, fleet.master_id)
    if allowed in (None, known.over_delegation):
        return known
    statement = update(fleets).where(fleets.c.id == fleet.id).values(over_delegation=allowed).returning(fleets)
    changed = Fleet(**(await tx.connection.execute(statement)).mappings().one())
    await audit.record(tx, "fleet.changed", fleet.id, fleet.master_id, over_delegation=allowed)
    return changed


async def _require_unattached(tx: Tx, agent_id: str, pointer: str) -> None:
    """Refuse an agent that leads a fleet or is in one: fleets are not nested. Raises ConflictError.

    Its account is locked. An invitation that it has left unanswered for too long gives way.
    """
    columns = fleet_members.c
    lapsed = (columns.agent_id == agent_id) & columns.joined_at.is_(None) & (columns.invited_at < tx.now - INVITATION)
    await tx.connection.execute(delete(fleet_members).where(lapsed))
    leads = select(fleets.c.id).where(fleets.c.master_id == agent_id)
    belongs = select(columns.fleet_id).where(columns.agent_id == agent_id)
    for query in (leads, belongs):
        if (await tx.connection.execute(query)).first() is not None:
            raise conflict(pointer, "already_in_a_fleet", "the agent leads a fleet or belongs to one already")


def _fleet_of(fleet_id: str, master_id: str | None) -> Select[Any]:
    query = select(fleets).where(fleets.c.id == fleet_id)
    return query if master_id is None else query.where(fleets.c.master_id == master_id)


async def get(tx: Tx, fleet_id: str, master_id: str | None) -> Fleet:
    """Return a fleet to its master, or (None) to the operator. Raises NotFoundError."""
    row = (await tx.connection.execute(_fleet_of(fleet_id, master_id))).mappings().first()
    if row is None:
        raise no_such_fleet()
    return Fleet(**row)


_SIGNED = case((balances.c.bucket.in_(("owed", "borrowed")), -balances.c.amount), else_=balances.c.amount)
_HELD = (
    select(func.coalesce(func.sum(_SIGNED), 0))
    .where(balances.c.agent_id == fleets.c.master_id, balances.c.asset == SETTLEMENT_ASSET)
    .scalar_subquery()
    .label("held")
)
_DELEGATED = (
    select(func.coalesce(func.sum(func.greatest(fleet_members.c.max_margin, fleet_members.c.drawn)), 0))
    .where(fleet_members.c.fleet_id == fleets.c.id, fleet_members.c.joined_at.is_not(None))
    .scalar_subquery()
    .label("delegated")
)


@dataclass(frozen=True, slots=True)
class Wallet:
    """A fleet, the USDC that its master holds less what it owes, and what is delegated to its members together.

    Of a member that is to reduce, and holds more than is delegated to it, that counts.
    """

    fleet: Fleet
    held: Decimal
    delegated: Decimal

    @property
    def reach(self) -> Decimal:
        """What all members together may have drawn."""
        of = self.fleet
        return reachable(self.held, of.drawn, of.dry_powder, released=of.released_at is not None)


async def wallet_of(tx: Tx, fleet_id: str) -> Wallet:
    """Return a fleet with its wallet, all as one statement sees them. Raises NotFoundError."""
    found = await tx.connection.execute(select(fleets, _HELD, _DELEGATED).where(fleets.c.id == fleet_id))
    known = found.mappings().first()
    if known is None:
        raise no_such_fleet()
    row = dict(known)
    held, delegated = row.pop("held"), row.pop("delegated")
    return Wallet(Fleet(**row), held, delegated)


def no_such_fleet() -> NotFoundError:
    """Return the refusal of a fleet that is not there, or not the caller's to see."""
    return NotFoundError("There is no such fleet.", code="fleet_not_found")


async def disband(tx: Tx, fleet: Fleet) -> None:
    """End a fleet that has no members. Raises ConflictError `fleet_not_empty` where it has, or has invited one.

    Raises NotFoundError where another has ended it meanwhile.
    """
    await accounts.lock_account(tx, fleet.master_id)
    await get(tx, fleet.id, fleet.master_id)
    remaining = select(fleet_members.c.agent_id).where(fleet_members.c.fleet_id == fleet.id).limit(1)
    if (await tx.connection.execute(remaining)).first() is not None:
        raise conflict("", "fleet_not_empty", "it has members, or invitations that are unanswered: let them go first")
    await tx.connection.execute(delete(fleets).where(fleets.c.id == fleet.id))
    await audit.record(tx, "fleet.disbanded", fleet.id, fleet.master_id)


async def list_fleets(tx: Tx, master_id: str | None, limit: int, before: int | None = None) -> list[Fleet]:
    """Return an agent's fleets, or (None) all, newest first, from below the number `before`."""
    query = select(fleets).order_by(fleets.c.seq.desc()).limit(min(limit, FLEETS_A_PAGE_MAX))
    if master_id is not None:
        query = query.where(fleets.c.master_id == master_id)
    if before is not None:
        query = query.where(fleets.c.seq < before)
    return [Fleet(**row) for row in (await tx.connection.execute(query)).mappings()]


async def after(tx: Tx, fleet_id: str, limit: int, within: Collection[int]) -> list[Fleet]:
    """Return fleets whose masters are in these shards, by id, past one."""
    query = select(fleets).where(fleets.c.id > fleet_id, shards.within(fleets.c.master_id, within))
    rows = await tx.connection.execute(query.order_by(fleets.c.id).limit(limit))
    return [Fleet(**row) for row in rows.mappings()]


async def tell_zone(tx: Tx, fleet: Fleet, zone: str, figures: Mapping[str, Any]) -> Fleet:
    """Write and tell a fleet's new zone; the master is locked."""
    statement = update(fleets).where(fleets.c.id == fleet.id).values(zone=zone).returning(fleets)
    changed = Fleet(**(await tx.connection.execute(statement)).mappings().one())
    told = {"zone": zone, "zone_before": fleet.zone, **figures}
    await events.emit(tx, "fleet.zone_changed", fleet.master_id, told)
    return changed


async def tell_drift(tx: Tx, fleet: Fleet, figures: Mapping[str, Any], *, drifting: bool) -> None:
    """Write and tell that correlations have drifted, or no more; the master is locked."""
    since = tx.now if drifting else None
    await tx.connection.execute(update(fleets).where(fleets.c.id == fleet.id).values(drifted_at=since))
    await events.emit(tx, "fleet.drift", fleet.master_id, {"drifting": drifting, **figures})


COMMANDS = """
    SELECT 1 FROM fleet_members m JOIN fleets f ON f.id = m.fleet_id
    WHERE m.agent_id = $1 AND f.master_id = $2 AND m.joined_at IS NOT NULL"""
"""Whether the agent $1 is a member of the fleet that $2 leads."""


async def commands(tx: Tx, master_id: str, agent_id: str) -> bool:
    """Tell whether an agent is a member of the fleet that another one leads."""
    query = text(COMMANDS.replace("$1", ":member").replace("$2", ":master"))
    return (await tx.connection.execute(query, {"member": agent_id, "master": master_id})).first() is not None


async def made(tx: Tx, master_id: str, agent_id: str) -> bool:
    """Tell whether a member was made for the fleet that another one leads, and was nobody's before."""
    columns = fleet_members.c
    query = select(columns.agent_id).join(fleets, fleets.c.id == columns.fleet_id)
    query = query.where(fleets.c.master_id == master_id, columns.agent_id == agent_id, columns.made_for_fleet)
    return (await tx.connection.execute(query)).first() is not None


# --- members


async def get_member(tx: Tx, fleet_id: str, agent_id: str) -> Member:
    """Return a member of a fleet, or who is invited. Raises NotFoundError."""
    columns = fleet_members.c
    query = select(fleet_members).where(columns.fleet_id == fleet_id, columns.agent_id == agent_id)
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such member.", code="member_not_found")
    return Member(**row)


async def list_members(tx: Tx, fleet_id: str, limit: int, after: int = 0) -> list[Member]:
    """Return members in the order in which they came, past the number `after`."""
    columns = fleet_members.c
    query = select(fleet_members).where(columns.fleet_id == fleet_id, columns.seq > after).order_by(columns.seq)
    return [Member(**row) for row in (await tx.connection.execute(query.limit(limit))).mappings()]


async def agents_of(tx: Tx, fleet: Fleet) -> list[str]:
    """Return the master and the members that have joined."""
    columns = fleet_members.c
    joined = select(columns.agent_id).where(columns.fleet_id == fleet.id, columns.joined_at.is_not(None))
    return [fleet.master_id, *(await tx.connection.execute(joined)).scalars()]


async def lock(tx: Tx, fleet: Fleet) -> list[str]:
    """Lock the books of a fleet's master and of its members, and return who they are: nobody joins or leaves then.

    Raises ConflictError `fleet_changed` where one has while the locks were waited for.
    """
    found = await agents_of(tx, fleet)
    await accounts.lock_accounts(tx, found)
    if set(await agents_of(tx, fleet)) != set(found):
        raise conflict("", "fleet_changed", "a member has joined or left meanwhile: ask again")
    return found


async def invite(tx: Tx, fleet: Fleet, agent_id: str, terms: Terms, *, joins: bool, made: bool = False) -> Member:
    """Add an agent to a fleet: at once, or when it has agreed to it; one that is `made` for it joins at once.

    Both accounts are locked here. Raises ConflictError, InvalidError, NotFoundError.
    """
    checked = checked_terms(terms)
    await accounts.lock_accounts(tx, {fleet.master_id, agent_id})
    await get(tx, fleet.id, fleet.master_id)  # it may have been disbanded meanwhile
    await _require_unattached(tx, agent_id, "/agent_id")
    await _require_room(tx, fleet, joins=joins or made)
    row = asdict(checked) | {"agent_id": agent_id, "fleet_id": fleet.id, "invited_at": tx.now, "made_for_fleet": made}
    added = await tx.connection.execute(insert(fleet_members).values(row).returning(fleet_members))
    member = Member(**added.mappings().one())
    await audit.record(tx, "fleet.invited", fleet.id, agent_id, max_margin=str(checked.max_margin))
    if joins or made:
        return await _join(tx, fleet, member)
    await _require_covered(tx, fleet.id, checked.max_margin)
    return member


async def _require_room(tx: Tx, fleet: Fleet, *, joins: bool) -> None:
    """Refuse one more than a fleet may have, or may have invited; its master is locked. Raises ConflictError."""
    columns = fleet_members.c
    unanswered = func.count().filter(columns.joined_at.is_(None))
    counted = await tx.connection.execute(select(func.count(), unanswered).where(columns.fleet_id == fleet.id))
    everybody, invited = counted.one()
    if everybody >= MEMBERS_MAX:
        raise conflict("", "fleet_full", f"a fleet has at most {MEMBERS_MAX} members")
    if invited >= INVITATIONS_MAX and not joins:
        detail = f"{INVITATIONS_MAX} invitations are unanswered: withdraw some"
        raise conflict("", "too_many_invitations", detail)


async def _require_covered(tx: Tx, fleet_id: str, more: Decimal) -> None:
    """Refuse to delegate so much more than the master can reach now, but in a fleet that may. The master is locked.

    Raises ConflictError `over_delegated`.
    """
    known = await wallet_of(tx, fleet_id)
    if more > 0 and not known.fleet.over_delegation and known.delegated + more > known.reach:
        raise fleet_limits.over_delegated(more, known.delegated, known.reach)


async def membership(tx: Tx, agent_id: str) -> tuple[Member, Fleet]:
    """Return what an agent has of the fleet that it is in or invited to, and that. Raises NotFoundError."""
    query = select(fleet_members.c.fleet_id).where(fleet_members.c.agent_id == agent_id)
    fleet_id = (await tx.connection.execute(query)).scalar_one_or_none()
    if fleet_id is None:
        raise NotFoundError("The agent is in no fleet, and is invited to none.", code="member_not_found")
    return await get_member(tx, fleet_id, agent_id), await get(tx, fleet_id, None)


async def join(tx: Tx, fleet_id: str, agent_id: str) -> Member:
    """Let an invited agent join; again is the same. Raises NotFoundError for whoever is not invited."""
    fleet = await joinable(tx, fleet_id, agent_id)
    await accounts.lock_accounts(tx, {fleet.master_id, agent_id})
    member = await get_member(tx, fleet_id, agent_id)
    return member if member.joined_at is not None else await _join(tx, fleet, member)


async def joinable(tx: Tx, fleet_id: str, agent_id: str) -> Fleet:
    """Return a fleet to whom it has invited or who is a member. Raises NotFoundError."""
    try:
        await get_member(tx, fleet_id, agent_id)
    except NotFoundError:
        raise no_such_fleet() from None
    return await get(tx, fleet_id, None)


async def _require_no_call(tx: Tx, fleet_id: str, *, or_spent: bool = False) -> None:
    """Refuse who would come into a fleet's pool or leave it while that is under a call. The master is locked.

    Who leaves does so under a call that is spent too: it may never end.
    """
    live = await calls.live(tx, (await get(tx, fleet_id, None)).master_id)
    if live is not None and live.cause == "fleet" and not (or_spent and live.is_spent):
        raise conflict("", "fleet_call_is_live", "the fleet is under a margin call: its pool stays as it is until then")


async def _join(tx: Tx, fleet: Fleet, member: Member) -> Member:
    if member.delegation == "pooled":
        await _require_no_call(tx, fleet.id)
    await _require_covered(tx, fleet.id, member.max_margin)
    joined = await _change(tx, member.agent_id, joined_at=tx.now)
    await _tell(tx, "fleet.member_joined", joined, max_margin=plain(joined.max_margin))
    await audit.record(tx, "fleet.joined", fleet.id, member.agent_id)
    return joined


async def change_terms(tx: Tx, member: Member, terms: Terms, *, reduce_only_on_excess: bool, cause: str) -> Member:
    """Change what is delegated. The accounts are locked, and what the member could spare is given back.

    Raises ConflictError `delegation_in_use` where more is drawn than would be delegated, unless the member is to reduce
    then, or is to already; `over_delegated` where it is raised past what the master can reach.
    """
    checked = checked_terms(terms)
    if checked.max_margin > member.max_margin:
        before = ZERO if member.joined_at is None else max(member.max_margin, member.drawn)
        await _require_covered(tx, member.fleet_id, max(checked.max_margin, member.drawn) - before)
    return await _redelegated(tx, member, checked, reduce_only_on_excess=reduce_only_on_excess, cause=cause)


async def _redelegated(tx: Tx, member: Member, checked: Terms, *, reduce_only_on_excess: bool, cause: str) -> Member:
    excess = member.drawn - checked.max_margin
    if excess > 0 and not reduce_only_on_excess and not member.reduce_only:
        detail = f"{plain(member.drawn):f} {SETTLEMENT_ASSET} are drawn and in use"
        raise conflict("/max_margin", "delegation_in_use", detail, drawn=plain(member.drawn))
    if checked.delegation != member.delegation:
        await _require_no_call(tx, member.fleet_id)
    changed = await _change(tx, member.agent_id, **asdict(checked), reduce_only=excess > 0, capped_drawn=None)
    told = {name: value for name, value in asdict(checked).items() if value != getattr(member, name)}
    if told or changed.reduce_only != member.reduce_only:
        if changed.joined_at is not None:  # who is only invited has no part in it
            figures = told | {"reduce_only": changed.reduce_only, "drawn": plain(changed.drawn), "cause": cause}
            await _tell(tx, "fleet.delegation_changed", changed, **figures)
        await audit.record(tx, "fleet.delegated", member.fleet_id, member.agent_id, max_margin=str(checked.max_margin))
    return changed


async def redelegate(tx: Tx, members: Sequence[Member], amounts: Sequence[Decimal], policy: str) -> None:
    """Give members new delegations, none below what it has drawn. All accounts are locked.

    They are told in the order of their ids, as whoever tells several agents does: their events are numbered one by one.
    Raises ConflictError `over_delegated` where together they would rise past what the master can reach.
    """
    before = (await wallet_of(tx, members[0].fleet_id)).delegated if members else ZERO
    for member, amount in sorted(zip(members, amounts, strict=True), key=lambda of: of[0].agent_id):
        terms = Terms(amount, member.services, member.liquidation_priority, member.delegation)
        await _redelegated(tx, member, checked_terms(terms), reduce_only_on_excess=False, cause=policy)
    if members:
        after = await wallet_of(tx, members[0].fleet_id)
        if before < after.delegated and after.reach < after.delegated and not after.fleet.over_delegation:
            raise fleet_limits.over_delegated(after.delegated - before, before, after.reach)


async def remove(tx: Tx, member: Member) -> None:
    """Let a member go, or withdraw an invitation. The accounts are locked. Raises ConflictError while it has drawn."""
    if member.drawn > 0:
        detail = f"{plain(member.drawn):f} {SETTLEMENT_ASSET} are drawn: they are given back first"
        raise conflict("/drawn", "delegation_in_use", detail, drawn=plain(member.drawn))
    if member.joined_at is not None:
        if member.delegation == "pooled":
            await _require_no_call(tx, member.fleet_id, or_spent=True)
        await _tell(tx, "fleet.member_left", member)
    await tx.connection.execute(delete(fleet_members).where(fleet_members.c.agent_id == member.agent_id))
    await audit.record(tx, "fleet.left", member.fleet_id, member.agent_id)


async def write_off(tx: Tx, member: Member) -> Member:
    """Count what a member has drawn as lost, its fleet's no more. The accounts are locked."""
    lost, known = member.drawn, fleets.c
    await tx.connection.execute(update(fleets).where(known.id == member.fleet_id).values(drawn=known.drawn - lost))
    changed = await _change(tx, member.agent_id, drawn=ZERO, capped_drawn=None)
    await _tell(tx, "fleet.written_off", changed, amount=plain(lost))
    await audit.record(tx, "fleet.written_off", member.fleet_id, member.agent_id, amount=str(plain(lost)))
    return changed


async def _change(tx: Tx, agent_id: str, **values: Any) -> Member:
    statement = update(fleet_members).where(fleet_members.c.agent_id == agent_id).values(values)
    return Member(**(await tx.connection.execute(statement.returning(fleet_members))).mappings().one())


async def _tell(tx: Tx, kind: str, member: Member, **figures: Any) -> None:
    await events.emit(tx, kind, member.agent_id, {"member_id": member.agent_id, **figures})


# --- what is drawn

_DRAW = text(
    """
    WITH money AS (
        SELECT coalesce(sum(CASE WHEN bucket IN ('owed', 'borrowed') THEN -amount ELSE amount END), 0) AS held
        FROM balances WHERE agent_id = :master AND asset = :asset
    ), taken AS (
        UPDATE fleets f SET drawn = f.drawn + :amount FROM fleet_members m, money
        WHERE f.id = m.fleet_id AND f.master_id = :master AND m.agent_id = :member AND m.joined_at IS NOT NULL
          AND NOT m.reduce_only
          AND (:service = ANY (m.services) OR (m.services = '{}' AND NOT :service = ANY (:paying)))
          AND m.drawn + :amount <= m.max_margin
          AND f.drawn + :amount
              <= (money.held + f.drawn) * (1 - CASE WHEN f.released_at IS NULL THEN f.dry_powder ELSE 0 END)
        RETURNING f.id
    )
    UPDATE fleet_members m SET drawn = m.drawn + :amount,
        capped_drawn = CASE WHEN abs(m.drawn + :amount - capped_drawn) < max_margin * :room THEN capped_drawn END
    FROM taken WHERE m.agent_id = :member AND m.fleet_id = taken.id
    RETURNING m.drawn
    """
)
_GIVE_BACK = text(
    """
    WITH given AS (
        UPDATE fleet_members SET drawn = drawn - :amount,
            capped_drawn = CASE WHEN abs(drawn - :amount - capped_drawn) < max_margin * :room THEN capped_drawn END
        WHERE agent_id = :member AND drawn >= :amount RETURNING fleet_id, drawn
    )
    UPDATE fleets f SET drawn = f.drawn - :amount FROM given WHERE f.id = given.fleet_id RETURNING given.drawn
    """
)
_texts = tuple(bindparam(name, type_=Text) for name in ("master", "member", "asset", "service"))
_numbers = tuple(bindparam(name, type_=Numeric) for name in ("amount", "room"))
_DRAW = _DRAW.bindparams(*_numbers, *_texts)
_GIVE_BACK = _GIVE_BACK.bindparams(*_numbers, bindparam("member", type_=Text))


async def take(tx: Tx, master_id: str, agent_id: str, service: str, amount: Decimal) -> Decimal:
    """Count an amount as drawn: permission, the member's cap, the fleet's and the dry powder in one guarded statement.

    Return what the member has drawn with it. Raises ConflictError with what could be drawn.
    """
    values = {
        "master": master_id,
        "member": agent_id,
        "asset": SETTLEMENT_ASSET,
        "service": service,
        "paying": list(PAYING_SERVICES),
        "amount": amount,
        "room": ROOM,
    }
    row = (await tx.connection.execute(_DRAW, values)).first()
    if row is None:
        raise await fleet_limits.refused(tx, master_id, agent_id, service, amount)
    drawn: Decimal = row.drawn
    return drawn


async def put_back(tx: Tx, agent_id: str, amount: Decimal) -> Decimal:
    """Count an amount as given back; return what is still drawn."""
    values = {"member": agent_id, "amount": amount, "room": ROOM}
    drawn: Decimal = (await tx.connection.execute(_GIVE_BACK, values)).scalar_one()
    return drawn


async def tell_capped(tx: Tx, agent_id: str, figures: Mapping[str, Any]) -> bool:
    """Tell once that a member has come to the end of what it may draw, until it has had room again.

    It has had that when it has drawn or given back a ROOM of its delegation since, or this was changed; and it is told
    once in CAPPED_AGAIN at most: no coordinator is told at the pace at which a member asks for too much. Its book is
    locked first: whoever gives back has told of the member before it comes to the member's row.
    """
    await accounts.hold_account(tx, agent_id)
    columns = fleet_members.c
    is_over = columns.capped_at.is_(None) | (columns.capped_at <= tx.now - CAPPED_AGAIN)
    first = update(fleet_members).where(columns.agent_id == agent_id, columns.capped_drawn.is_(None), is_over)
    told = first.values(capped_at=tx.now, capped_drawn=columns.drawn).returning(fleet_members)
    row = (await tx.connection.execute(told)).mappings().first()
    if row is None:
        return False
    member = Member(**row)
    await _tell(
        tx, "fleet.member_capped", member, drawn=plain(member.drawn), max_margin=plain(member.max_margin), **figures
    )
    return True


# --- dry powder


async def release_dry_powder(tx: Tx, fleet: Fleet, reason: str, *, in_emergency: bool = False) -> Fleet:
    """Let members reach the dry powder; the master is locked. Raises ConflictError where they do already.

    What is released `in_emergency` is restored once the fleet is out of it, else when it is asked for.
    """
    if fleet.released_at is not None:
        raise conflict("/action", "already_released", "the dry powder is released already")
    if not 1 <= len(reason) <= REASON_CHARACTERS_MAX:
        raise invalid("/reason", "invalid_reason", f"a reason has 1 to {REASON_CHARACTERS_MAX} characters")
    released = {"released_at": tx.now, "release_reason": reason, "in_emergency": in_emergency}
    return await _powder(tx, fleet, "fleet.dry_powder_released", reason, **released)


async def restore_dry_powder(tx: Tx, fleet: Fleet, reason: str) -> Fleet:
    """Put the dry powder out of reach again; again is the same. What is drawn of it comes back as members give back."""
    if fleet.released_at is None:
        return fleet
    return await _powder(tx, fleet, "fleet.dry_powder_restored", reason, **_RESTORED)


_RESTORED = {"released_at": None, "release_reason": None, "in_emergency": False}


async def _powder(tx: Tx, fleet: Fleet, kind: str, reason: str, **values: Any) -> Fleet:
    statement = update(fleets).where(fleets.c.id == fleet.id).values(values).returning(fleets)
    changed = Fleet(**(await tx.connection.execute(statement)).mappings().one())
    figures = {"dry_powder": plain(fleet.dry_powder), "drawn": plain(fleet.drawn), "reason": reason}
    await audit.record(tx, kind, fleet.id, fleet.master_id, reason=reason)
    await events.emit(tx, kind, fleet.master_id, figures)
    return changed
