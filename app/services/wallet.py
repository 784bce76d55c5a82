"""The wallet: deposits, withdrawals, and what services reserve of it."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal

from sqlalchemy import insert, select, update

from app.db.session import Tx
from app.db.tables import SERVICE_PATTERN, reservations
from app.domain.book import ZERO, Book, OpenReservation
from app.domain.money import AMOUNT_MAX, DECIMALS_MAX, plain
from app.domain.moves import Move, agent, house, pay_in
from app.errors import ConflictError, FieldError, NotFoundError, invalid
from app.services import audit, book, ledger, market_rules
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


@dataclass(frozen=True, slots=True)
class Booked:
    """The ledger batch that an event wrote, and the book that it left."""

    batch: int
    book: Book


async def deposit(tx: Tx, scene: Scene, agent_id: str, asset: str, amount: Decimal, named: Names) -> Booked:
    """Book what has arrived; what the agent owes of the asset is paid first.

    Raises InvalidError, also for an asset without a price: from then on the book could not be valued.
    """
    market_rules.check_symbol("/asset", asset)
    check_amount("/amount", amount)
    scene.require_price("/asset", asset)
    before = await book.lock(tx, agent_id)
    moves = pay_in(agent_id, asset, amount, house("external"), before.holding(asset).owed)
    batch = await ledger.post(tx, named.occasion(agent_id, "wallet", "deposit"), moves)
    return Booked(batch, before.after_moves(moves))


async def withdraw(tx: Tx, scene: Scene, agent_id: str, asset: str, amount: Decimal, named: Names) -> Booked:
    """Book what leaves: of what is free, and never past the gate. Raises ConflictError, InvalidError."""
    market_rules.check_symbol("/asset", asset)
    check_amount("/amount", amount)
    before = await book.lock(tx, agent_id)
    _check_free(before, asset, amount)
    moves = [Move(asset, amount, agent(agent_id, "free"), house("external"))]
    after = before.after_moves(moves)
    scene.require_margin(before, after, "/amount")
    batch = await ledger.post(tx, named.occasion(agent_id, "wallet", "withdrawal"), moves)
    return Booked(batch, after)


async def reserve(tx: Tx, scene: Scene, asked: NewReservation, named: Names) -> tuple[Reservation, Book]:
    """Set an amount aside for a service. Raises ConflictError past what is free or past the gate."""
    _check_service(asked.service)
    market_rules.check_symbol("/asset", asked.asset)
    check_amount("/amount", asked.amount)
    before = await book.lock(tx, asked.agent_id)
    _check_free(before, asked.asset, asked.amount)
    moves = [Move(asked.asset, asked.amount, agent(asked.agent_id, "free"), agent(asked.agent_id, "reserved"))]
    row = {
        "id": f"res_{secrets.token_hex(10)}",
        "agent_id": asked.agent_id,
        "service": asked.service,
        "asset": asked.asset,
        "amount": asked.amount,
        "remaining": asked.amount,
        "settled": ZERO,
        "reference": named.reference,
        "reducible": asked.reducible,
        "status": "open",
        "created_at": tx.now,
    }
    shown = ("agent_id", "status")
    after = before.after_moves(moves).with_reservation(
        OpenReservation(**{k: v for k, v in row.items() if k not in shown})  # type: ignore[arg-type]
    )
    scene.require_margin(before, after, "/amount")
    stored = (await tx.connection.execute(insert(reservations).values(row).returning(reservations))).mappings().one()
    await ledger.post(tx, named.occasion(asked.agent_id, asked.service, "reserve"), moves)
    return Reservation(**stored), after


async def release(
    tx: Tx, agent_id: str, reservation_id: str, amount: Decimal | None, named: Names
) -> tuple[Reservation, Book]:
    """Give back what a reservation holds, all of it or an amount. Raises ConflictError where it holds less."""
    before, held, part = await _locked(tx, agent_id, reservation_id, amount)
    moves = [Move(held.asset, part, agent(agent_id, "reserved"), agent(agent_id, "free"))]
    await ledger.post(tx, named.occasion(agent_id, held.service, "release", reservation_id), moves)
    stored = await _shrink(tx, held, part, ZERO)
    return stored, before.after_moves(moves).with_reservation(_open(stored))


async def settle(
    tx: Tx, agent_id: str, reservation_id: str, amount: Decimal | None, named: Names
) -> tuple[Reservation, Book]:
    """Pay what a reservation holds to its service, all of it or an amount; the rest stays reserved."""
    before, held, part = await _locked(tx, agent_id, reservation_id, amount)
    moves = [Move(held.asset, part, agent(agent_id, "reserved"), house("services"))]
    await ledger.post(tx, named.occasion(agent_id, held.service, "settle", reservation_id), moves)
    stored = await _shrink(tx, held, part, part)
    await audit.record(tx, "reservation.settled", held.id, agent_id, amount=str(part), asset=held.asset)
    return stored, before.after_moves(moves).with_reservation(_open(stored))


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
    """What a service asks for."""

    agent_id: str
    service: str
    asset: str
    amount: Decimal
    reducible: bool


@dataclass(frozen=True, slots=True)
class Names:
    """The caller's own names for an event: kept with every entry that it writes."""

    reference: str | None = None
    idempotency_key: str | None = None

    def occasion(self, agent_id: str, service: str, kind: ledger.Kind, reference: str | None = None) -> Occasion:
        """Return why money moves, for the ledger."""
        return Occasion(agent_id, service, kind, self.reference or reference, self.idempotency_key)


def check_amount(pointer: str, amount: Decimal) -> None:
    """Refuse what is no amount of money: not above zero, too large, or with too many decimals."""
    if not amount.is_finite() or amount <= 0:
        raise invalid(pointer, "not_positive", "an amount is above zero")
    if amount >= AMOUNT_MAX:
        raise invalid(pointer, "number_out_of_range", f"an amount is below {AMOUNT_MAX:f}")
    if -int(amount.normalize().as_tuple().exponent) > DECIMALS_MAX:
        raise invalid(pointer, "too_many_decimals", f"an amount has at most {DECIMALS_MAX} decimals")


def _check_service(service: str) -> None:
    if not _SERVICE.fullmatch(service):
        detail = "a service is 1 to 32 lower-case letters, digits or _ and starts with a letter"
        raise invalid("/service", "invalid_service", detail)


def _check_free(held: Book, asset: str, amount: Decimal) -> None:
    free = held.holding(asset).free
    if amount > free:
        raise ledger.insufficient_funds(f"{plain(free):f} {asset} are free", available=plain(free))


async def _locked(
    tx: Tx, agent_id: str, reservation_id: str, amount: Decimal | None
) -> tuple[Book, Reservation, Decimal]:
    """Lock the book and return it, the reservation and the part that is asked for. Raises ConflictError."""
    if amount is not None:
        check_amount("/amount", amount)
    before = await book.lock(tx, agent_id)
    held = await get_reservation(tx, agent_id, reservation_id)
    if held.status != "open":
        raise _conflict("/status", "reservation_closed", f"the reservation is {held.status}")
    part = held.remaining if amount is None else amount
    if part > held.remaining:
        raise _conflict("/amount", "amount_above_reservation", f"{plain(held.remaining):f} {held.asset} are reserved")
    return before, held, part


def _conflict(pointer: str, code: str, detail: str) -> ConflictError:
    return ConflictError(detail, code=code, errors=(FieldError(pointer, code, detail),))


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
    )
