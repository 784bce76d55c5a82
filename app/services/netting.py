"""Netting: what agents owe each other under an agreement, settled in one net movement an asset.

Order of locks: the members' accounts in the order of their ids (of an obligation, the two that it is between; of a
run, all), then the agreement's row. Nobody joins later, so that members are read before anything is locked, and who
has left under the row's lock. Whoever books holds the row: the obligations of an agreement have numbers in the order
of their commits, and a run settles all up to one of them by writing that number. It touches none of their rows, and a
second run finds nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.dialects import postgresql

from app.db.clearing_tables import netting_obligations, netting_positions, netting_runs
from app.db.session import Tx
from app.domain import netting
from app.domain.book import Book
from app.domain.fees import decimals_of
from app.domain.money import checked_amount, plain, to_float
from app.domain.moves import Move, agent, house, pay_in
from app.domain.netting import Debt, Gross, Owed, Saving, Settlement
from app.errors import ConflictError, InvalidError, conflict, invalid
from app.services import agreements, audit, book, events, ledger, market_rules, statements, wallet
from app.services.agreements import Agreement
from app.services.ledger import Occasion
from app.services.margin import Scene, Scenes
from app.services.statements import Cause, Obligation, Run, Window
from app.services.wallet import Names, NewReservation

SERVICE = "netting"
OPEN_OBLIGATIONS_MAX = 10_000
"""Obligations of one agreement that wait for a run."""
ASSETS_MAX = 16
"""Assets that are open under one agreement: a run holds all members' accounts while it pays each debtor and asset."""

ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class NewObligation:
    """What a payer owes another member; a `fact` is booked by an admin whether or not the payer can cover it."""

    payee: str
    service: str
    asset: str
    amount: Decimal
    reference: str
    fact: bool = False


@dataclass(frozen=True, slots=True)
class Ran:
    """A run, and what it spared: payments, and fees in USD at the prices of the moment."""

    run: Run
    movements_saved: int = 0
    fees_saved: float = 0.0


@dataclass(frozen=True, slots=True)
class Short:
    """What a debtor lacks at a cut-off."""

    agent_id: str
    asset: str
    due: Decimal
    missing: Decimal


# --- booking


async def book_obligation(
    tx: Tx, scenes: Scenes, payer: str, agreement_id: str, asked: NewObligation
) -> tuple[Obligation, bool]:
    """Book what a payer owes and have its running net reserved; return it, and whether it is new.

    The payer covers its new net, fee and buffer, out of what is free and within its gates; of a fact as much as is
    free is reserved. The payee's reservation shrinks with its net. After a default only what a creditor waives to
    a debtor is booked: it brings both nearer to zero. Raises ConflictError, InvalidError, NotFoundError.
    """
    seen = await agreements.get(tx, payer, agreement_id)
    if asked.payee == payer or asked.payee not in [m.agent_id for m in seen.members]:
        raise _not_a_member()
    amount = checked_amount("/amount", asked.amount, decimals_of(asked.asset))
    books = await book.lock_all(tx, [payer, asked.payee])
    agreement = await agreements.lock(tx, payer, agreement_id)
    known = await statements.by_reference(tx, agreement_id, payer, asked.reference)
    if known is not None:
        return _same(known, asked, amount), False
    scene = await scenes.at(tx)
    _check_bookable(agreement, payer, asked)
    market_rules.check_symbol("/asset", asked.asset)
    scene.require_price("/asset", asked.asset)
    await _check_assets(tx, agreement, asked.asset)
    owed = Owed(payer, asked.payee, asked.asset, amount)
    nets = {gross.agent_id: gross.net for gross in await _add(tx, agreement, owed)}
    if agreement.state == "defaulted" and not nets[payer] <= 0 <= nets[asked.payee]:
        detail = "a cut-off could not be settled: until one is, only what a creditor waives to a debtor is booked"
        raise conflict("/state", "agreement_defaulted", detail)
    await _cover(tx, scene, books[payer], agreement, owed.asset, nets[payer], fact=asked.fact)
    await _uncover(tx, books[asked.payee], agreement, owed.asset, nets[asked.payee])
    row = {
        "id": f"obl_{secrets.token_hex(10)}",
        "agreement_id": agreement_id,
        "payer": payer,
        "payee": asked.payee,
        "service": asked.service,
        "asset": asked.asset,
        "amount": amount,
        "reference": asked.reference,
        "booked_by": tx.actor,
        "booked_at": scene.now,
    }
    stored = (await tx.connection.execute(insert(netting_obligations).values(row).returning(netting_obligations))).one()
    booked = Obligation(**stored._mapping, run_id=None)  # noqa: SLF001  the public name of a row's columns
    is_due = await _is_past_threshold(tx, scene, agreement)
    await agreements.booked(tx, agreement, scene.now, is_due=is_due)
    data = {"agreement_id": agreement_id, "obligation_id": booked.id, "payer": payer, "payee": booked.payee}
    told = {"service": booked.service, "asset": booked.asset, "amount": plain(amount), "reference": booked.reference}
    await events.emit(tx, "netting.booked", booked.payee, data | told)
    return booked, True


def _same(known: Obligation, asked: NewObligation, amount: Decimal) -> Obligation:
    """Return what was booked under the reference before. Raises ConflictError where it was something else."""
    was = (known.payee, known.service, known.asset, known.amount)
    if was != (asked.payee, asked.service, asked.asset, amount):
        raise conflict("/reference", "reference_conflict", "another obligation was booked under this reference")
    return known


def _check_bookable(agreement: Agreement, payer: str, asked: NewObligation) -> None:
    if asked.payee not in agreement.present:
        raise _not_a_member()
    if agreement.state not in ("active", "defaulted") or payer not in agreement.present:
        raise conflict("/state", "agreement_not_active", f"the agreement is {agreement.state}, or the payer left it")
    if asked.service not in agreement.services:
        detail = f"the agreement is about {', '.join(agreement.services)}"
        raise invalid("/service", "service_not_agreed", detail)
    if agreement.open_obligations >= OPEN_OBLIGATIONS_MAX:
        detail = f"{OPEN_OBLIGATIONS_MAX} obligations are open: settle them first"
        raise conflict("/open_obligations", "agreement_full", detail)


async def _check_assets(tx: Tx, agreement: Agreement, asset: str) -> None:
    columns = netting_positions.c
    query = select(columns.asset).where(columns.agreement_id == agreement.id).distinct()
    open_now = set((await tx.connection.execute(query)).scalars())
    if len(open_now | {asset}) > ASSETS_MAX:
        detail = f"{ASSETS_MAX} assets are open: settle them first"
        raise conflict("/asset", "agreement_full", detail)


def _not_a_member() -> InvalidError:
    return invalid("/payee", "not_a_member", "the payee is another member of the agreement")


async def _add(tx: Tx, agreement: Agreement, owed: Owed) -> list[Gross]:
    """Add an obligation to the running sums of the two that it is between, and return these."""
    columns = netting_positions.c
    rows = [
        {"agent_id": owed.payer, "pays": owed.amount, "receives": ZERO},
        {"agent_id": owed.payee, "pays": ZERO, "receives": owed.amount},
    ]
    more = {"agreement_id": agreement.id, "asset": owed.asset}
    statement = postgresql.insert(netting_positions).values([row | more for row in rows])
    statement = statement.on_conflict_do_update(
        index_elements=["agreement_id", "agent_id", "asset"],
        set_={name: columns[name] + statement.excluded[name] for name in ("pays", "receives")},
    )
    found = await tx.connection.execute(
        statement.returning(columns.agent_id, columns.asset, columns.pays, columns.receives)
    )
    return [Gross(*row) for row in found]


def _held(agreement: Agreement, asset: str, amount: Decimal) -> NewReservation:
    return NewReservation(SERVICE, asset, amount, reducible=False, bound_to=agreement.id)


def _reserved(held: Book, agreement: Agreement, asset: str) -> Decimal:
    known = held.bound(agreement.id, asset)
    return ZERO if known is None else known.remaining


async def _cover(
    tx: Tx, scene: Scene, held: Book, agreement: Agreement, asset: str, net: Decimal, *, fact: bool
) -> None:
    """Have the running net of a payer reserved. Raises ConflictError where it is no fact and can't be."""
    target, now = agreement.terms.cover(asset, net), _reserved(held, agreement, asset)
    if fact:
        target = min(target, now + held.holding(asset).free)
    elif target > now:
        wallet.require_delegated(held, SERVICE)
        wallet.require_uncalled(held)
        if held.opens_nothing is not None:
            raise conflict("/amount", "reduce_only", held.opens_nothing)
    after = await wallet.fit_bound(tx, held, _held(agreement, asset, target), Names(agreement.id))
    if target > now and not fact:
        scene.require_room(after)
        scene.require_margin(held, after, "/amount")


async def _uncover(tx: Tx, held: Book, agreement: Agreement, asset: str, net: Decimal) -> None:
    """Give back what a smaller net no longer needs."""
    target = min(agreement.terms.cover(asset, net), _reserved(held, agreement, asset))
    await wallet.fit_bound(tx, held, _held(agreement, asset, target), Names(agreement.id))


async def _is_past_threshold(tx: Tx, scene: Scene, agreement: Agreement) -> bool:
    """Tell whether the gross that is open, this booking included, has reached the threshold at stored prices."""
    if agreement.threshold is None:
        return False
    gross: dict[str, Decimal] = {}
    for position in await statements.positions(tx, agreement):
        gross[position.asset] = gross.get(position.asset, ZERO) + position.pays
    worth = sum(to_float(amount) * scene.price(asset) for asset, amount in gross.items())
    return worth >= to_float(agreement.threshold)


# --- runs


async def run(tx: Tx, scenes: Scenes, agreement_id: str, agent_id: str | None = None) -> Ran | None:
    """Settle all that is open, or none of it: for a member on demand, or (None) because it is due.

    None where it is not due, or nothing is open. Raises ConflictError for a member where nothing is open,
    NotFoundError.
    """
    seen = await agreements.get(tx, agent_id, agreement_id)
    books = await book.lock_all(tx, seen.present)
    agreement = await agreements.lock(tx, agent_id, agreement_id)
    scene = await scenes.at(tx)
    is_due = agreement.next_action_at is not None and agreement.next_action_at <= scene.now
    if agent_id is None and not is_due:
        return None
    if agent_id is not None and agent_id not in agreement.present:
        raise conflict("/state", "agreement_not_active", "who has left an agreement settles nothing of it")
    if agreement.open_obligations == 0:
        if agent_id is not None:
            raise conflict("/open_obligations", "nothing_to_settle", "no obligation of the agreement is open")
        return None
    cause: Cause = "demand" if agent_id is not None else await _why(tx, scene, agreement)
    window = await statements.open_window(tx, agreement)
    owed = await statements.owed(tx, window)
    sums = netting.positions(owed)
    if sums != await statements.positions(tx, agreement):
        raise RuntimeError(f"the running sums of {agreement_id} are not those of its obligations")
    done = netting.settlement(sums, agreement.terms)
    debts = done.debts()
    short = _shortfalls(scene, books, agreement, debts)
    case = _Case(agreement, scene, books, window, cause, owed, done, debts)
    return await _default(tx, case, short) if short else await _settle(tx, case)


@dataclass(frozen=True, slots=True)
class _Case:
    """A run under way, everything locked."""

    agreement: Agreement
    scene: Scene
    books: dict[str, Book]
    window: Window
    cause: Cause
    owed: Sequence[Owed]
    done: Settlement
    debts: Sequence[Debt]


async def _why(tx: Tx, scene: Scene, agreement: Agreement) -> Cause:
    return "threshold" if await _is_past_threshold(tx, scene, agreement) else "interval"


def _shortfalls(scene: Scene, books: Mapping[str, Book], agreement: Agreement, debts: Sequence[Debt]) -> list[Short]:
    """Return who lacks what: beyond what is reserved for it, a debt is paid of what is free and may be withdrawn."""
    found = []
    left = dict(books)
    for debt in debts:
        held = left[debt.payer]
        extra = debt.due - _reserved(held, agreement, debt.asset)
        if extra <= 0:
            continue
        after = _paid(held, agreement, debt.asset, extra)
        if extra > held.holding(debt.asset).free or not _may_go(scene, held, after):
            found.append(Short(debt.payer, debt.asset, debt.due, extra))
        else:
            left[debt.payer] = after
    return found


def _paid(held: Book, agreement: Agreement, asset: str, extra: Decimal) -> Book:
    """Return the book after paying all that is reserved for an asset, and so much more of what is free."""
    moves = [Move(asset, extra, agent(held.agent_id, "free"), house("external"))]
    known = held.bound(agreement.id, asset)
    if known is None:
        return held.after_moves(moves)
    moves.append(Move(asset, known.remaining, agent(held.agent_id, "reserved"), house("external")))
    return held.after_moves(moves).with_reservation(replace(known, remaining=ZERO))


def _may_go(scene: Scene, before: Book, after: Book) -> bool:
    """Tell whether the gates let an account go from one book to the other, as they would let a withdrawal."""
    if before.opens_nothing is not None or before.is_in_called_pool:
        return False
    try:
        scene.require_margin(before, after, "")
    except (ConflictError, InvalidError):
        return False
    return True


async def _default(tx: Tx, case: _Case, short: Sequence[Short]) -> Ran | None:
    """Leave every obligation open, reserve what there is and the gates allow of what is missing, and say so.

    Members are told when the agreement defaults; a timer that tries again, and fails again, writes no run.
    """
    for lack in short:
        held = case.books[lack.agent_id]
        there = min(held.holding(lack.asset).free, lack.missing)
        asked, named = _held(case.agreement, lack.asset, lack.due - lack.missing + there), Names(case.agreement.id)
        fitted, moves = wallet.fitting(tx, held, asked, named)
        if there > 0 and _may_go(case.scene, held, held.after_moves(moves).with_reservation(fitted)):
            case.books[lack.agent_id] = await wallet.fit_bound(tx, held, asked, named)
    await agreements.defaulted(tx, case.agreement, case.scene.now)
    is_known = case.agreement.state == "defaulted"
    if is_known and case.cause != "demand":
        return None
    told = [
        {"agent_id": lack.agent_id, "asset": lack.asset, "due": _shown(lack.due), "missing": _shown(lack.missing)}
        for lack in short
    ]
    written = await _write(tx, case, "defaulted", {"short": told})
    for member in () if is_known else case.agreement.present:
        await events.emit(tx, "netting.defaulted", member, _told_of(written) | {"short": told})
    return Ran(written)


async def _settle(tx: Tx, case: _Case) -> Ran:
    """Move every net and charge every fee; one batch of the ledger for each debtor and asset."""
    for debt in case.debts:
        await _pay(tx, case, debt)
    saved = netting.savings(case.owed, case.done, case.agreement.terms)
    written = await _write(tx, case, "settled", _settled_figures(case.done, saved))
    columns = netting_positions.c
    await tx.connection.execute(delete(netting_positions).where(columns.agreement_id == case.agreement.id))
    await agreements.settled(tx, case.agreement, case.window.last_seq)
    sums = netting.positions(case.owed)
    for member in case.agreement.present:
        nets = {g.asset: plain(g.net) for g in sums if g.agent_id == member}
        fees = {c.asset: plain(c.amount) for c in case.done.charges if c.payer == member}
        await events.emit(tx, "netting.settled", member, _told_of(written) | {"nets": nets, "fees": fees})
    movements = sum(s.gross_movements - s.movements for s in saved)
    fees_saved = sum(to_float(s.gross_fees - s.fees) * case.scene.price(s.asset) for s in saved)
    return Ran(written, movements, fees_saved)


async def _pay(tx: Tx, case: _Case, debt: Debt) -> None:
    """Pay a debtor's net and fee, of what is reserved for it first, and give back what is left of that."""
    agent_id, asset, due = debt.payer, debt.asset, debt.due
    held, own = case.books[agent_id], agent(agent_id, "reserved")
    reservation = held.bound(case.agreement.id, asset)
    there = ZERO if reservation is None else reservation.remaining
    moves = [Move(asset, due - there, agent(agent_id, "free"), own)] if due > there else []
    for movement in debt.movements:
        owed = case.books[movement.payee].holding(asset).owed
        moves += pay_in(movement.payee, asset, movement.amount, own, owed)
    if debt.fee > 0:
        moves.append(Move(asset, debt.fee, own, house("fees")))
    if there > due:
        moves += pay_in(agent_id, asset, there - due, own, held.holding(asset).owed)
    if reservation is not None:
        case.books[agent_id] = await wallet.take_bound(tx, held, reservation, min(due, there))
    await ledger.post(tx, Occasion(agent_id, SERVICE, "netting", case.agreement.id), moves)
    for member in (agent_id, *(movement.payee for movement in debt.movements)):
        case.books[member] = case.books[member].after_moves(moves)


async def _write(tx: Tx, case: _Case, outcome: str, figures: Mapping[str, Any]) -> Run:
    row = {
        "id": f"run_{secrets.token_hex(10)}",
        "agreement_id": case.agreement.id,
        "cause": case.cause,
        "outcome": outcome,
        "ran_at": case.scene.now,
        "after_seq": case.window.after_seq,
        "last_seq": case.window.last_seq,
        "obligations": len(case.owed),
        "figures": figures,
    }
    stored = (await tx.connection.execute(insert(netting_runs).values(row).returning(netting_runs))).mappings().one()
    await audit.record(tx, f"netting.{outcome}", stored["id"], case.agreement.proposer, agreement=case.agreement.id)
    return Run(**stored)


def _settled_figures(done: Settlement, saved: Sequence[Saving]) -> dict[str, Any]:
    """Return what a run keeps of itself; amounts as text, so that no digit is lost."""
    return {
        "movements": [
            {"payer": m.payer, "payee": m.payee, "asset": m.asset, "amount": _shown(m.amount)} for m in done.movements
        ],
        "fees": [{"payer": c.payer, "asset": c.asset, "amount": _shown(c.amount)} for c in done.charges],
        "movements_saved": sum(s.gross_movements - s.movements for s in saved),
    }


def _told_of(written: Run) -> dict[str, Any]:
    return {
        "agreement_id": written.agreement_id,
        "run_id": written.id,
        "cause": written.cause,
        "obligations": written.obligations,
    }


def _shown(amount: Decimal) -> str:
    return f"{plain(amount):f}"
