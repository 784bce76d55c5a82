"""Escrows: an agent's money set aside for another, paid or given back when both confirm, or by time-out or decision.

The payer's money (and, of two legs, the payee's) stays in its own wallet, in a reservation that the escrow alone ends.
Order of locks: the accounts of payer, payee and referrer in the order of their ids, then the escrow's row. Parties
never change, so that they may be read before anything is locked; all else is judged on the locked row, at the
database's time. Every end is one batch of the ledger in the transaction that writes the state.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, func, insert, select, text, union_all, update

from app.db.clearing_tables import escrows
from app.db.session import Tx
from app.domain.book import Book
from app.domain.escrow import (
    LIVE_STATES,
    Action,
    Contract,
    FeePayer,
    Kind,
    Leg,
    OnTimeout,
    Payout,
    Role,
    State,
    Terms,
    step,
    time_out,
)
from app.domain.fees import decimals_of
from app.domain.money import checked_amount, plain, round_owned, to_decimal
from app.domain.moves import Move, agent, house, pay_in
from app.errors import NotFoundError, invalid
from app.services import accounts, audit, book, events, ledger, market_rules, shards, wallet
from app.services.ledger import Occasion
from app.services.margin import Scene, Scenes
from app.services.wallet import Names, NewReservation

SERVICE = "escrow"
TIMEOUT_SECONDS_MAX = 366 * 86_400
ESCROWS_A_PAGE_MAX = 200
PUT_OFF = timedelta(seconds=5)
"""How long an escrow that could not be timed out for a fault is left alone."""

Reason = Literal["confirmed", "timeout", "cancelled", "resolved"]

_REASONS: Mapping[Kind, Reason] = {"confirm": "confirmed", "cancel": "cancelled", "resolve": "resolved"}


@dataclass(frozen=True, slots=True)
class NewEscrow:
    """What a payer asks for; `counter` is what the payee is to deliver for it."""

    payee: str
    leg: Leg
    timeout_seconds: int
    on_timeout: OnTimeout
    fee_payer: FeePayer = "payer"
    counter: Leg | None = None
    referrer: str | None = None
    arbiter: str | None = None


@dataclass(frozen=True, slots=True)
class Escrow:
    """A stored escrow, live or over."""

    id: str
    seq: int
    payer: str
    payee: str
    referrer: str | None
    arbiter: str | None
    asset: str
    amount: Decimal
    counter_asset: str | None
    counter_amount: Decimal | None
    fee_rate: Decimal
    referral_share: Decimal
    fee_payer: FeePayer
    on_timeout: OnTimeout
    reference: str | None
    state: State
    payer_confirmed: bool
    payee_confirmed: bool
    funded_at: datetime
    deadline_at: datetime
    accepted_at: datetime | None
    disputed_at: datetime | None
    ended_at: datetime | None
    next_action_at: datetime | None
    disputed_by: str | None
    dispute_reason: str | None
    reason: str | None
    to_payee: Decimal | None
    fee: Decimal | None
    referral: Decimal | None

    @property
    def counter(self) -> Leg | None:
        """What the payee delivers for it."""
        if self.counter_asset is None or self.counter_amount is None:
            return None
        return Leg(self.counter_asset, self.counter_amount)

    @property
    def terms(self) -> Terms:
        """What was agreed at funding."""
        return Terms(
            Leg(self.asset, self.amount),
            self.counter,
            self.fee_rate,
            self.referral_share,
            self.fee_payer,
            self.on_timeout,
            self.deadline_at,
        )

    @property
    def contract(self) -> Contract:
        """What the rules need of it."""
        return Contract(self.terms, self.state, self.payer_confirmed, self.payee_confirmed, self.to_payee)

    @property
    def accounts(self) -> list[str]:
        """Whose money its end moves."""
        return [a for a in (self.payer, self.payee, self.referrer) if a is not None]

    def role_of(self, agent_id: str) -> Role | None:
        """Return what an agent may do to it, None for a stranger."""
        roles: dict[str | None, Role] = {self.arbiter: "arbiter", self.payee: "payee", self.payer: "payer"}
        return roles.get(agent_id)


@dataclass(frozen=True, slots=True)
class Done:
    """An escrow after what was asked, and the event that tells of it; None where nothing has changed."""

    escrow: Escrow
    told: str | None


async def fund(tx: Tx, scene: Scene, held: Book, asked: NewEscrow, named: Names) -> Done:
    """Set the payer's money aside, with its part of the fee. The payer's book is locked.

    Raises ConflictError past what is free or past the gate, InvalidError.
    """
    await _check_parties(tx, held.agent_id, asked)
    terms = _terms(scene, asked)
    escrow_id = f"esc_{secrets.token_hex(10)}"
    await _reserve(tx, scene, held, escrow_id, Leg(terms.leg.asset, terms.reserved), named)
    row = {
        "id": escrow_id,
        "payer": held.agent_id,
        "payee": asked.payee,
        "referrer": asked.referrer,
        "arbiter": asked.arbiter,
        **asdict(terms.leg),
        "counter_asset": None if terms.counter is None else terms.counter.asset,
        "counter_amount": None if terms.counter is None else terms.counter.amount,
        "fee_rate": terms.fee_rate,
        "referral_share": terms.referral_share,
        "fee_payer": terms.fee_payer,
        "on_timeout": terms.on_timeout,
        "reference": named.reference,
        "state": "funded",
        "funded_at": scene.now,
        "deadline_at": terms.deadline_at,
        "next_action_at": terms.deadline_at,
    }
    stored = (await tx.connection.execute(insert(escrows).values(row).returning(escrows))).mappings().one()
    return await _told(tx, Escrow(**stored), "escrow.funded")


async def act(
    tx: Tx,
    scenes: Scenes,
    agent_id: str | None,
    escrow_id: str,
    kind: Kind,
    *,
    share: Share | None = None,
    note: str | None = None,
) -> Done:
    """Do what a party asks: confirm, cancel, dispute, resolve. `agent_id` None: an admin.

    Raises ConflictError and ForbiddenError as the rules do, NotFoundError for a stranger; InvalidError.
    """
    seen = await get(tx, agent_id, escrow_id)
    books, escrow = await _locked(tx, seen)
    scene = await scenes.at(tx)
    to_payee = None if share is None else share.of(escrow)
    after = step(escrow.contract, Action(kind, _role(escrow, agent_id), to_payee), scene.now)
    if after == escrow.contract:
        return Done(escrow, None)
    change: dict[str, Any] = {"payer_confirmed": after.payer_confirmed, "payee_confirmed": after.payee_confirmed}
    if after.payee_confirmed and not escrow.payee_confirmed:
        change["accepted_at"] = scene.now
        if escrow.counter is not None:
            named = Names(escrow.id)
            books[escrow.payee] = await _reserve(tx, scene, books[escrow.payee], escrow.id, escrow.counter, named)
    if after.state == "disputed":
        change |= {"disputed_at": scene.now, "disputed_by": agent_id, "dispute_reason": note, "next_action_at": None}
    await audit.record(tx, f"escrow.{kind}", escrow.id, agent_id or escrow.payer, state=after.state, note=note)
    if after.is_over:
        return await _end(tx, scene, books, escrow, after, _REASONS[kind], change)
    moved = await _set(tx, escrow, {**change, "state": after.state})
    if after.state == escrow.state:
        return Done(moved, None)
    return await _told(tx, moved, f"escrow.{after.state}")


async def fire(tx: Tx, scenes: Scenes, escrow_id: str) -> Done | None:
    """Time an escrow out if its time is over; None where there is nothing to do, or it is gone."""
    seen = await _find(tx, escrow_id)
    if seen is None:
        return None
    books, escrow = await _locked(tx, seen)
    scene = await scenes.at(tx)
    after = time_out(escrow.contract, scene.now)
    if after.state == escrow.state:
        return None
    return await _end(tx, scene, books, escrow, after, "timeout", {})


@dataclass(frozen=True, slots=True)
class Share:
    """What a resolution gives the payee: an amount, or a fraction of all of it, rounded down."""

    amount: Decimal | None
    fraction: Decimal | None

    def of(self, escrow: Escrow) -> Decimal:
        """Return it in units of the escrow's asset. Raises InvalidError."""
        decimals = decimals_of(escrow.asset)
        if self.amount is not None:
            return self.amount if self.amount == 0 else checked_amount("/to_payee", self.amount, decimals)
        if self.fraction is None or not 0 <= self.fraction <= 1:
            raise invalid("/payee_share", "out_of_range", "a share is 0 to 1")
        return round_owned(escrow.amount * self.fraction, decimals)


# --- reading


async def get(tx: Tx, agent_id: str | None, escrow_id: str) -> Escrow:
    """Return an escrow that an agent is a party of, or (None) any. Raises NotFoundError."""
    found = await _find(tx, escrow_id)
    if found is None:
        raise _no_such_escrow()
    _role(found, agent_id)
    return found


async def list_escrows(
    tx: Tx, agent_id: str, limit: int, before: int | None = None, role: Role | None = None, state: State | None = None
) -> list[Escrow]:
    """Return the escrows that an agent is a party of, newest first, from below the number `before`."""
    columns, size = escrows.c, min(limit, ESCROWS_A_PAGE_MAX)

    def part(party: ColumnElement[str]) -> Select[Any]:
        query = select(escrows).where(party == agent_id).order_by(columns.seq.desc()).limit(size)
        query = query if before is None else query.where(columns.seq < before)
        return query if state is None else query.where(columns.state == state)

    # each party by its own index; nobody is two parties of one escrow
    parties = [p for p in (columns.payer, columns.payee, columns.arbiter) if role is None or p.name == role]
    found = union_all(*(select(part(party).subquery()) for party in parties)).subquery()
    rows = await tx.connection.execute(select(found).order_by(found.c.seq.desc()).limit(size))
    return [Escrow(**row) for row in rows.mappings()]


_OPEN_LEGS = text(
    """
    SELECT asset, sum(amount) AS amount FROM (
        SELECT asset, CASE payer WHEN :agent_id THEN -amount ELSE amount END AS amount
        FROM escrows WHERE (payer = :agent_id OR payee = :agent_id AND payee_confirmed) AND ended_at IS NULL
        UNION ALL
        SELECT counter_asset, CASE payer WHEN :agent_id THEN counter_amount ELSE -counter_amount END
        FROM escrows
        WHERE (payer = :agent_id OR payee = :agent_id) AND payee_confirmed
            AND ended_at IS NULL AND counter_asset IS NOT NULL
    ) AS legs GROUP BY asset HAVING sum(amount) <> 0
    """
)


async def open_legs(tx: Tx, agent_id: str) -> dict[str, Decimal]:
    """Return, by asset, what an agent's open escrows are to bring it (above zero) or to take from it, on balance.

    What the payee has not accepted is no more than the payer's own leg: else any stranger could swell an agent's risk.
    """
    rows = await tx.connection.execute(_OPEN_LEGS, {"agent_id": agent_id})
    return {row.asset: row.amount for row in rows}


async def due(tx: Tx, limit: int, within: Collection[int] = shards.ALL) -> list[str]:
    """Return the escrows of payers in these shards whose time is over, the longest over first."""
    columns = escrows.c
    query = select(columns.id).where(columns.next_action_at <= func.clock_timestamp())
    query = query.where(shards.within(columns.payer, within)).order_by(columns.next_action_at).limit(limit)
    return list((await tx.connection.execute(query)).scalars())


async def put_off(tx: Tx, escrow_id: str) -> None:
    """Leave an escrow alone for a while whose time-out has failed; its deadline stays what it was."""
    columns = escrows.c
    live = (columns.id == escrow_id, columns.next_action_at.is_not(None))
    await tx.connection.execute(update(escrows).where(*live).values(next_action_at=func.clock_timestamp() + PUT_OFF))


async def outstanding(tx: Tx) -> list[tuple[State, str, int, Decimal]]:
    """Return state, asset, number and sum of the amounts of all live escrows."""
    columns = escrows.c
    query = select(columns.state, columns.asset, func.count(), func.sum(columns.amount))
    query = query.where(columns.state.in_(LIVE_STATES)).group_by(columns.state, columns.asset)
    return [(row[0], row[1], row[2], row[3]) for row in await tx.connection.execute(query)]


async def oldest(tx: Tx) -> tuple[datetime | None, datetime | None]:
    """Return since when the oldest dispute goes on, and when the earliest timer of all live escrows is due."""
    columns = escrows.c
    query = select(func.min(columns.disputed_at).filter(columns.state == "disputed"), func.min(columns.next_action_at))
    disputed_at, next_action_at = (await tx.connection.execute(query.where(columns.state.in_(LIVE_STATES)))).one()
    return disputed_at, next_action_at


def figures(escrow: Escrow) -> dict[str, Any]:
    """Return an escrow as replies and events show it."""
    row = asdict(escrow)
    for name in ("seq", "next_action_at", "fee_rate", "referral_share", "counter_asset", "counter_amount"):
        del row[name]
    for name in ("amount", "to_payee", "fee", "referral"):
        row[name] = None if row[name] is None else plain(row[name])
    counter = escrow.counter
    row["counter_leg"] = None if counter is None else {"asset": counter.asset, "amount": plain(counter.amount)}
    row["fee_rate"], row["referral_share"] = plain(escrow.fee_rate), plain(escrow.referral_share)
    row["fee_quoted"], row["reserved"] = plain(escrow.terms.fee), plain(escrow.terms.reserved)
    return row


def _role(escrow: Escrow, agent_id: str | None) -> Role:
    """Return what an agent, or (None) an admin, is to an escrow. Raises NotFoundError for a stranger."""
    role: Role | None = "admin" if agent_id is None else escrow.role_of(agent_id)
    if role is None:
        raise _no_such_escrow()
    return role


def _no_such_escrow() -> NotFoundError:
    return NotFoundError("There is no such escrow.", code="escrow_not_found")


# --- writing


async def _check_parties(tx: Tx, payer: str, asked: NewEscrow) -> None:
    named = {"payee": asked.payee, "referrer": asked.referrer, "arbiter": asked.arbiter}
    for name, agent_id in named.items():
        if agent_id == payer or (name != "payee" and agent_id == asked.payee):
            raise invalid(f"/{name}", "same_party", f"the {name} is another agent than payer and payee")
        if agent_id is not None and not await accounts.exists(tx, agent_id):
            raise invalid(f"/{name}", "unknown_agent", "there is no such agent")


def _terms(scene: Scene, asked: NewEscrow) -> Terms:
    leg = _checked_leg(scene, "", asked.leg)
    counter = None if asked.counter is None else _checked_leg(scene, "/counter_leg", asked.counter)
    if counter is not None and counter.asset == leg.asset:
        raise invalid("/counter_leg/asset", "same_asset", "the legs are of two assets")
    if not 1 <= asked.timeout_seconds <= TIMEOUT_SECONDS_MAX:
        raise invalid("/timeout_seconds", "number_out_of_range", f"it is 1 to {TIMEOUT_SECONDS_MAX}")
    clearing = scene.market.parameters.clearing
    return Terms(
        leg=leg,
        counter=counter,
        fee_rate=to_decimal(clearing.escrow_fee),
        referral_share=to_decimal(0.0 if asked.referrer is None else clearing.referral_share),
        fee_payer=asked.fee_payer,
        on_timeout=asked.on_timeout,
        deadline_at=scene.now + timedelta(seconds=asked.timeout_seconds),
    )


def _checked_leg(scene: Scene, pointer: str, leg: Leg) -> Leg:
    """Return a leg with its digits alone. Raises InvalidError, also past the decimals that its asset is cleared in."""
    market_rules.check_symbol(f"{pointer}/asset", leg.asset)
    scene.require_price(f"{pointer}/asset", leg.asset)
    return Leg(leg.asset, checked_amount(f"{pointer}/amount", leg.amount, decimals_of(leg.asset)))


async def _reserve(tx: Tx, scene: Scene, held: Book, escrow_id: str, leg: Leg, named: Names) -> Book:
    new = NewReservation(SERVICE, leg.asset, leg.amount, reducible=False, bound_to=escrow_id)
    _, after = await wallet.reserve(tx, scene, held, new, named)
    return after


async def _locked(tx: Tx, seen: Escrow) -> tuple[dict[str, Book], Escrow]:
    """Lock the accounts, then the row, and return both as they now stand."""
    books = await book.lock_all(tx, seen.accounts)
    query = select(escrows).where(escrows.c.id == seen.id).with_for_update()
    return books, Escrow(**(await tx.connection.execute(query)).mappings().one())


async def _end(
    tx: Tx,
    scene: Scene,
    books: Mapping[str, Book],
    escrow: Escrow,
    after: Contract,
    reason: Reason,
    change: Mapping[str, Any],
) -> Done:
    """Pay out and give back in one batch, and write the end."""
    to_payee = Decimal(0) if after.to_payee is None else after.to_payee
    out = escrow.terms.payout(to_payee)
    await _close(tx, books[escrow.payer], escrow.id, escrow.asset, escrow.terms.reserved - out.payer)
    has_counter = escrow.counter is not None and books[escrow.payee].bound(escrow.id, escrow.counter.asset) is not None
    if has_counter and escrow.counter is not None:
        await _close(tx, books[escrow.payee], escrow.id, escrow.counter.asset, out.counter_to_payer)
    moves = _moves(books, escrow, out, has_counter=has_counter)
    await ledger.post(tx, Occasion(escrow.payer, SERVICE, "escrow", escrow.id), moves)
    values = {
        **change,
        "state": after.state,
        "reason": reason,
        "to_payee": to_payee,
        "fee": out.fee,
        "referral": out.referrer,
        "ended_at": scene.now,
        "next_action_at": None,
    }
    return await _told(tx, await _set(tx, escrow, values), f"escrow.{after.state}")


async def _close(tx: Tx, held: Book, escrow_id: str, asset: str, paid: Decimal) -> None:
    reservation = held.bound(escrow_id, asset)
    if reservation is None:
        raise RuntimeError(f"{escrow_id} holds no {asset} of {held.agent_id}")
    await wallet.take_bound(tx, held, reservation, paid)


def _moves(books: Mapping[str, Book], escrow: Escrow, out: Payout, *, has_counter: bool) -> list[Move]:
    """Return the moves of an end: whoever receives pays first what it owes of the asset."""
    payer, payee = agent(escrow.payer, "reserved"), agent(escrow.payee, "reserved")
    paid = [
        (escrow.payee, escrow.asset, out.payee, payer),
        (escrow.payer, escrow.asset, out.payer, payer),
        (escrow.referrer, escrow.asset, out.referrer, payer),
    ]
    if has_counter and escrow.counter is not None:
        paid.append((escrow.payer, escrow.counter.asset, out.counter_to_payer, payee))
        paid.append((escrow.payee, escrow.counter.asset, out.counter_to_payee, payee))
    moves = []
    for target, asset, amount, source in paid:
        if target is not None and amount > 0:
            moves += pay_in(target, asset, amount, source, books[target].holding(asset).owed)
    if out.platform > 0:
        moves.append(Move(escrow.asset, out.platform, payer, house("fees")))
    return moves


async def _set(tx: Tx, escrow: Escrow, values: Mapping[str, Any]) -> Escrow:
    change = update(escrows).where(escrows.c.id == escrow.id).values(**values).returning(escrows)
    return Escrow(**(await tx.connection.execute(change)).mappings().one())


async def _find(tx: Tx, escrow_id: str) -> Escrow | None:
    row = (await tx.connection.execute(select(escrows).where(escrows.c.id == escrow_id))).mappings().first()
    return None if row is None else Escrow(**row)


def _fee_alone(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in ("escrow_id", "state", "asset", "fee", "referral", "referrer", "ended_at")}


async def _told(tx: Tx, escrow: Escrow, event: str) -> Done:
    """Tell payer and payee; of a dispute and its end the arbiter too; of its fee the referrer, who is no party."""
    told = {escrow.payer, escrow.payee}
    if escrow.arbiter is not None and escrow.disputed_at is not None:
        told.add(escrow.arbiter)
    if escrow.referrer is not None and escrow.referral:
        told.add(escrow.referrer)
    shown = figures(escrow)
    data = {"escrow_id": shown.pop("id"), **shown}
    for agent_id in sorted(told):
        is_party = agent_id in (escrow.payer, escrow.payee, escrow.arbiter)
        await events.emit(tx, event, agent_id, data if is_party else _fee_alone(data))
    return Done(escrow, event)
