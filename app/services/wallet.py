"""The wallet: deposits, withdrawals, and what services reserve of it."""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import insert, select, update

from app.db.session import Tx
from app.db.tables import SERVICE_PATTERN, reservations
from app.domain.book import PAYING_SERVICES, ZERO, Book, OpenReservation
from app.domain.money import checked_amount, plain
from app.domain.moves import SETTLEMENT_ASSET, Move, agent, house, pay_in
from app.errors import ConflictError, InvalidError, NotFoundError, conflict, invalid
from app.services import ledger, market_rules, watch
from app.services.ledger import Occasion
from app.services.margin import Scene

RESERVATIONS_A_PAGE_MAX = 200
REFERENCE_CHARACTERS_MAX = 200

_SERVICE = re.compile(SERVICE_PATTERN)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A stored reservation, open or closed."""

    id: str
    seq: int
    agent_id: str
    service: str
    asset: str
    amount: Decimal
    remaining: Decimal
    settled: Decimal
    reference: str | None
    reducible: bool
    status: str
    created_at: datetime
    closed_at: datetime | None
    bound_to: str | None


@dataclass(frozen=True, slots=True)
class Booked:
    """The ledger batch that an event wrote, and the book that it left."""

    batch: int
    amount: Decimal
    book: Book


async def deposit(tx: Tx, scene: Scene, held: Book, asset: str, amount: Decimal, named: Names) -> Booked:
    """Book what has arrived; what the agent owes of the asset is paid first. The book is locked.

    Raises InvalidError, also for an asset without a price: from then on the book could not be valued.
    """
    market_rules.check_symbol("/asset", asset)
    amount = checked_amount("/amount", amount)
    scene.require_price("/asset", asset)
    moves = pay_in(held.agent_id, asset, amount, house("external"), held.holding(asset).owed)
    after = held.after_moves(moves)
    if asset not in held.holdings:
        scene.require_room(after)
    batch = await ledger.post(tx, named.occasion(held.agent_id, "wallet", "deposit"), moves)
    await shift_peak(tx, scene, held, scene.worth(asset, amount))
    return Booked(batch, amount, after)


async def shift_peak(tx: Tx, scene: Scene, held: Book, flow: float) -> None:
    """Let an account's peak move with what comes in or leaves, so that its drawdown stays what it was."""
    if not held.settings.follows_peak:
        return
    try:
        equity = scene.figures(held).equity
    except InvalidError:  # a price is missing: the drawdown is not known
        equity = 0.0
    await watch.shift_peak(tx, held.agent_id, equity, flow)


async def withdraw(tx: Tx, scene: Scene, held: Book, asset: str, amount: Decimal, named: Names) -> Booked:
    """Book what leaves: of what is free, and never past the gate. The book is locked.

    Raises ConflictError, InvalidError.
    """
    market_rules.check_symbol("/asset", asset)
    amount = checked_amount("/amount", amount)
    _check_free(held, asset, amount)
    _check_own(held, asset, amount)
    require_uncalled(held)
    moves = [Move(asset, amount, agent(held.agent_id, "free"), house("external"))]
    after = held.after_moves(moves)
    scene.require_margin(held, after, "/amount")
    batch = await ledger.post(tx, named.occasion(held.agent_id, "wallet", "withdrawal"), moves)
    await shift_peak(tx, scene, held, -scene.worth(asset, amount))
    return Booked(batch, amount, after)


async def reserve(tx: Tx, scene: Scene, held: Book, asked: NewReservation, named: Names) -> tuple[Reservation, Book]:
    """Set an amount aside for a service. Raises ConflictError past what is free or past the gate."""
    check_service("/service", asked.service)
    require_delegated(held, asked.service)
    market_rules.check_symbol("/asset", asked.asset)
    amount = checked_amount("/amount", asked.amount)
    if asked.service in PAYING_SERVICES:
        require_uncalled(held)
    if held.opens_nothing is not None:
        raise conflict("/amount", "reduce_only", held.opens_nothing)
    _check_free(held, asked.asset, amount)
    new = _new(tx, asked, amount, named)
    moves = [Move(new.asset, amount, agent(held.agent_id, "free"), agent(held.agent_id, "reserved"))]
    after = held.after_moves(moves).with_reservation(new)
    scene.require_room(after)
    scene.require_margin(held, after, "/amount")
    row = asdict(new) | {"agent_id": held.agent_id, "status": "open"}
    stored = (await tx.connection.execute(insert(reservations).values(row).returning(reservations))).mappings().one()
    await ledger.post(tx, named.occasion(held.agent_id, new.service, "reserve", new.id), moves)
    return Reservation(**stored), after


def _new(tx: Tx, asked: NewReservation, amount: Decimal, named: Names) -> OpenReservation:
    return OpenReservation(
        id=f"res_{secrets.token_hex(10)}",
        service=asked.service,
        asset=asked.asset,
        amount=amount,
        remaining=amount,
        settled=ZERO,
        reference=named.reference,
        reducible=asked.reducible,
        created_at=tx.now,
        bound_to=asked.bound_to,
    )


async def release(
    tx: Tx, held: Book, reservation_id: str, amount: Decimal | None, named: Names
) -> tuple[Reservation, Book]:
    """Give back what a reservation holds, all of it or an amount; what the agent owes of the asset is paid first.

    The book is locked. Raises ConflictError where the reservation holds less, NotFoundError.
    """
    stored, part = await _part(tx, held, reservation_id, amount)
    moves = given_back(held, stored.asset, part)
    await ledger.post(tx, named.occasion(held.agent_id, stored.service, "release", reservation_id), moves)
    left = await _shrink(tx, stored, part, ZERO)
    return left, held.after_moves(moves).with_reservation(_open(left))


def given_back(held: Book, asset: str, amount: Decimal) -> list[Move]:
    """Return the moves that give back what was reserved: what the agent owes of the asset is paid first."""
    return pay_in(held.agent_id, asset, amount, agent(held.agent_id, "reserved"), held.holding(asset).owed)


async def settle(
    tx: Tx, held: Book, reservation_id: str, amount: Decimal | None, named: Names
) -> tuple[Reservation, Book]:
    """Pay what a reservation holds to its service, all of it or an amount; the rest stays reserved."""
    stored, part = await _part(tx, held, reservation_id, amount)
    moves = [Move(stored.asset, part, agent(held.agent_id, "reserved"), house("services"))]
    await ledger.post(tx, named.occasion(held.agent_id, stored.service, "settle", reservation_id), moves)
    left = await _shrink(tx, stored, part, part)
    return left, held.after_moves(moves).with_reservation(_open(left))


async def take_bound(tx: Tx, held: Book, reservation: OpenReservation, paid: Decimal) -> Book:
    """Close what a contract holds, so much of it paid. The book is locked, and the contract posts the moves.

    Return the book without the reservation; its holdings follow from the moves.
    """
    closed = {"remaining": ZERO, "settled": reservation.settled + paid, "closed_at": tx.now}
    status = "settled" if closed["settled"] else "released"
    await tx.connection.execute(
        update(reservations).where(reservations.c.id == reservation.id).values(**closed, status=status)
    )
    return held.with_reservation(replace(reservation, remaining=ZERO))


async def fit_bound(tx: Tx, held: Book, asked: NewReservation, named: Names) -> Book:
    """Have a contract hold as much of an asset as is asked for, 0 for none: more of what is free, or less.

    The book is locked, and whoever asks has judged it. Raises ConflictError past what is free.
    """
    known = _bound(held, asked)
    fitted, moves = fitting(tx, held, asked, named)
    if not moves:
        return held
    if moves[0].source.bucket == "free":
        _check_free(held, asked.asset, moves[0].amount)
    kind: ledger.Kind = "reserve" if moves[0].source.bucket == "free" else "release"
    await ledger.post(tx, named.occasion(held.agent_id, asked.service, kind, fitted.id), moves)
    if known is None:
        row = asdict(fitted) | {"agent_id": held.agent_id, "status": "open"}
        await tx.connection.execute(insert(reservations).values(row))
    else:
        status = "open" if fitted.remaining else "settled" if fitted.settled else "released"
        closed_at = None if fitted.remaining else tx.now
        values = {"amount": fitted.amount, "remaining": fitted.remaining, "status": status, "closed_at": closed_at}
        await tx.connection.execute(update(reservations).where(reservations.c.id == fitted.id).values(values))
    return held.after_moves(moves).with_reservation(fitted)


def fitting(tx: Tx, held: Book, asked: NewReservation, named: Names) -> tuple[OpenReservation, list[Move]]:
    """Return what a contract would hold, and the moves to it, none where it holds as much already."""
    known = _bound(held, asked)
    more = asked.amount - (ZERO if known is None else known.remaining)
    if known is None:
        fitted = _new(tx, asked, asked.amount, named)
    else:
        whole = max(known.amount, known.settled + asked.amount)
        fitted = replace(known, amount=whole, remaining=asked.amount)
    if more > 0:
        return fitted, [Move(asked.asset, more, agent(held.agent_id, "free"), agent(held.agent_id, "reserved"))]
    return fitted, given_back(held, asked.asset, -more) if more < 0 else []


def _bound(held: Book, asked: NewReservation) -> OpenReservation | None:
    if asked.bound_to is None:
        raise ValueError("it is bound to nothing")
    return held.bound(asked.bound_to, asked.asset)


async def get_reservation(tx: Tx, agent_id: str, reservation_id: str) -> Reservation:
    """Return a reservation of the agent, open or closed. Raises NotFoundError."""
    columns = reservations.c
    query = select(reservations).where(columns.agent_id == agent_id, columns.id == reservation_id)
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such reservation.", code="reservation_not_found")
    return Reservation(**row)


async def list_reservations(
    tx: Tx, agent_id: str, limit: int, before: int | None = None, status: str | None = None
) -> list[Reservation]:
    """Return an agent's reservations, newest first, from below the number `before`."""
    columns = reservations.c
    query = select(reservations).where(columns.agent_id == agent_id).order_by(columns.seq.desc())
    if before is not None:
        query = query.where(columns.seq < before)
    if status is not None:
        query = query.where(columns.status == status)
    rows = await tx.connection.execute(query.limit(min(limit, RESERVATIONS_A_PAGE_MAX)))
    return [Reservation(**row) for row in rows.mappings()]


@dataclass(frozen=True, slots=True)
class NewReservation:
    """What a service asks for; `bound_to` names the contract that alone may use it, by `take_bound`."""

    service: str
    asset: str
    amount: Decimal
    reducible: bool
    bound_to: str | None = None


@dataclass(frozen=True, slots=True)
class Names:
    """The caller's own names for an event: kept with every entry that it writes."""

    reference: str | None = None
    idempotency_key: str | None = None

    def occasion(self, agent_id: str, service: str, kind: ledger.Kind, reference: str | None = None) -> Occasion:
        """Return why money moves, for the ledger."""
        return Occasion(agent_id, service, kind, self.reference or reference, self.idempotency_key)


def check_service(pointer: str, service: str) -> None:
    """Refuse what is not the name of a service."""
    if not _SERVICE.fullmatch(service):
        detail = "a service is 1 to 32 lower-case letters, digits or _ and starts with a letter"
        raise invalid(pointer, "invalid_service", detail)


def _check_free(held: Book, asset: str, amount: Decimal) -> None:
    free = held.holding(asset).free
    if amount > free:
        # what a member of a fleet lacks may be drawn, and so is told
        lacks = {} if held.delegation is None else {"missing": plain(amount - free), "asset": asset}
        figures: dict[str, Any] = {"available": plain(free), **lacks}
        raise ledger.insufficient_funds(f"{plain(free):f} {asset} are free", **figures)


def _check_own(held: Book, asset: str, amount: Decimal) -> None:
    """Refuse to take out what a member has drawn of its fleet, or borrows while it has: that may be secured by it."""
    if held.delegation is None or held.delegation.drawn <= 0:
        return
    holding = held.holding(asset)
    kept = held.delegation.drawn if asset == SETTLEMENT_ASSET else holding.borrowed
    own = max(ZERO, holding.free - kept)
    if amount > own:
        detail = f"{plain(kept):f} {asset} are drawn of the fleet's or borrowed on it, {plain(own):f} may be taken out"
        raise conflict("/amount", "delegated_funds", detail, available=plain(own))


def require_delegated(held: Book, service: str) -> None:
    """Refuse a service that the coordinator of the agent's fleet has not permitted. Raises ConflictError."""
    if held.delegation is not None and not held.delegation.permits(service):
        raise not_delegated(service)


def require_uncalled(held: Book) -> None:
    """Refuse to take out of a fleet's pool what may be needed for its margin call. Raises ConflictError."""
    if held.is_in_called_pool:
        raise conflict("/amount", "fleet_call_is_live", "the fleet is under a margin call: nothing leaves its pool")


def not_delegated(service: str) -> ConflictError:
    """Return the refusal of a service that a fleet's coordinator has not permitted."""
    detail = f"the fleet's coordinator has not delegated {service} to this member"
    if service in PAYING_SERVICES:
        detail += ": what may pay others is for those alone whose services name it"
    return conflict("/service", "service_not_delegated", detail, service=service)


async def _part(tx: Tx, held: Book, reservation_id: str, amount: Decimal | None) -> tuple[Reservation, Decimal]:
    """Return an open reservation and the part of it that is asked for. Raises ConflictError, NotFoundError."""
    part = None if amount is None else checked_amount("/amount", amount)
    stored = await get_reservation(tx, held.agent_id, reservation_id)
    if stored.status != "open":
        raise conflict("/status", "reservation_closed", f"the reservation is {stored.status}")
    if stored.bound_to is not None:
        raise conflict("/id", "reservation_bound", f"the reservation is held by {stored.bound_to}, which alone ends it")
    part = stored.remaining if part is None else part
    if part > stored.remaining:
        detail = f"{plain(stored.remaining):f} {stored.asset} are reserved"
        raise conflict("/amount", "amount_above_reservation", detail)
    return stored, part


async def _shrink(tx: Tx, held: Reservation, part: Decimal, settled: Decimal) -> Reservation:
    remaining = held.remaining - part
    paid = held.settled + settled
    status = "open" if remaining > 0 else "settled" if paid > 0 else "released"
    closed_at = None if remaining > 0 else tx.now
    values = {"remaining": remaining, "settled": paid, "status": status, "closed_at": closed_at}
    await tx.connection.execute(update(reservations).where(reservations.c.id == held.id).values(values))
    return replace(held, **values)  # type: ignore[arg-type]


def _open(stored: Reservation) -> OpenReservation:
    return OpenReservation(
        stored.id,
        stored.service,
        stored.asset,
        stored.amount,
        stored.remaining,
        stored.settled,
        stored.reference,
        stored.reducible,
        stored.created_at,
        stored.bound_to,
    )
