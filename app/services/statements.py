"""What was booked under netting agreements, and what settling it took or takes: read, never written.

The obligations of an agreement have numbers in the order of their commits: those after one number, up to another, are
what a run settles, and what was open at a moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, select

from app.db.clearing_tables import netting_obligations, netting_positions, netting_runs
from app.db.session import Tx
from app.domain import netting
from app.domain.netting import Gross, Owed, Saving, Settlement
from app.errors import NotFoundError
from app.services import agreements
from app.services.agreements import Agreement

OBLIGATIONS_A_PAGE_MAX = 200
RUNS_SHOWN_MAX = 20

Cause = Literal["interval", "threshold", "demand"]


@dataclass(frozen=True, slots=True)
class Obligation:
    """A stored obligation; `run_id` is the run that settled it."""

    agreement_id: str
    seq: int
    id: str
    payer: str
    payee: str
    service: str
    asset: str
    amount: Decimal
    reference: str
    booked_by: str
    booked_at: datetime
    run_id: str | None


@dataclass(frozen=True, slots=True)
class Run:
    """A cut-off: what it settled, or that it could not."""

    agreement_id: str
    seq: int
    id: str
    cause: Cause
    outcome: Literal["settled", "defaulted"]
    ran_at: datetime
    after_seq: int
    last_seq: int
    obligations: int
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Window:
    """Obligations of an agreement after one number, up to another."""

    agreement_id: str
    after_seq: int
    last_seq: int


@dataclass(frozen=True, slots=True)
class Stated:
    """What a statement is worked out from: what was owed in its window, and a page of the obligations."""

    agreement: Agreement
    run: Run | None
    as_of: datetime
    owed: Sequence[Owed]
    page: Sequence[Obligation]


@dataclass(frozen=True, slots=True)
class Statement:
    """Each member's sums, and what settling them moves, charges and saves."""

    positions: Sequence[Gross]
    settlement: Settlement
    savings: Sequence[Saving]


async def stated(
    tx: Tx,
    agent_id: str,
    agreement_id: str,
    *,
    run_id: str | None = None,
    as_of: datetime | None = None,
    limit: int = OBLIGATIONS_A_PAGE_MAX,
    before: int | None = None,
) -> Stated:
    """Return what a run settled, or what was open at a moment, now where left out; to who has left, as it was then.

    Raises NotFoundError.
    """
    agreement = await agreements.get(tx, agent_id, agreement_id)
    until = agreement.left_at(agent_id)
    ran = None if run_id is None else await _run(tx, agreement_id, run_id, until)
    if ran is not None:
        window, moment = Window(agreement_id, ran.after_seq, ran.last_seq), ran.ran_at
    else:
        # within the agreement's life: some moments are past Postgres's calendar
        moment = tx.now if as_of is None else max(agreement.created_at, min(as_of, tx.now))
        window = await _window_at(tx, agreement, moment if until is None else min(moment, until))
    page = await list_obligations(tx, window, limit, before)
    return Stated(agreement, ran, moment, await owed(tx, window), page)


def worked_out(said: Stated) -> Statement:
    """Return the nets, and what settling them takes and saves: some ten milliseconds for a thousand obligations."""
    terms, sums = said.agreement.terms, netting.positions(said.owed)
    done = netting.settlement(sums, terms)
    return Statement(sums, done, netting.savings(said.owed, done, terms))


async def list_obligations(tx: Tx, window: Window, limit: int, before: int | None = None) -> list[Obligation]:
    """Return obligations of a window, newest first, from below the number `before`, with the runs that settled them."""
    columns, runs = netting_obligations.c, netting_runs.c
    settled = (runs.agreement_id == columns.agreement_id, runs.outcome == "settled", runs.last_seq >= columns.seq)
    run_id = select(runs.id).where(*settled).order_by(runs.last_seq).limit(1).scalar_subquery()
    query = select(netting_obligations, run_id.label("run_id")).where(*_within(window))
    if before is not None:
        query = query.where(columns.seq < before)
    rows = await tx.connection.execute(query.order_by(columns.seq.desc()).limit(min(limit, OBLIGATIONS_A_PAGE_MAX)))
    return [Obligation(**row) for row in rows.mappings()]


async def all_of(tx: Tx, agreement: Agreement, until: datetime | None = None) -> Window:
    """Return the window of all that was ever booked against an agreement, or was by a moment."""
    columns = netting_obligations.c
    query = select(func.max(columns.seq)).where(columns.agreement_id == agreement.id)
    if until is not None:
        query = query.where(columns.booked_at <= until)
    return Window(agreement.id, 0, (await tx.connection.execute(query)).scalar_one() or 0)


async def last_runs(tx: Tx, agreement: Agreement, until: datetime | None = None) -> list[Run]:
    """Return the latest runs of an agreement, newest first, of all or of those until a moment."""
    query = select(netting_runs).where(*_runs_until(agreement.id, until)).order_by(netting_runs.c.seq.desc())
    rows = await tx.connection.execute(query.limit(RUNS_SHOWN_MAX))
    return [Run(**row) for row in rows.mappings()]


async def _run(tx: Tx, agreement_id: str, run_id: str, until: datetime | None) -> Run:
    query = select(netting_runs).where(*_runs_until(agreement_id, until), netting_runs.c.id == run_id)
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such run of the agreement.", code="run_not_found")
    return Run(**row)


def _runs_until(agreement_id: str, until: datetime | None) -> tuple[ColumnElement[bool], ...]:
    columns = netting_runs.c
    own = columns.agreement_id == agreement_id
    return (own,) if until is None else (own, columns.ran_at <= until)


async def open_window(tx: Tx, agreement: Agreement) -> Window:
    """Return the window of what no run has settled."""
    return replace(await all_of(tx, agreement), after_seq=agreement.settled_through)


async def _window_at(tx: Tx, agreement: Agreement, moment: datetime) -> Window:
    """Return what was open at a moment: booked by then, and settled by no run until then."""
    runs, columns = netting_runs.c, netting_obligations.c
    settled = select(func.max(runs.last_seq)).where(
        runs.agreement_id == agreement.id, runs.outcome == "settled", runs.ran_at <= moment
    )
    booked = select(func.max(columns.seq)).where(columns.agreement_id == agreement.id, columns.booked_at <= moment)
    after, last = [(await tx.connection.execute(query)).scalar_one() or 0 for query in (settled, booked)]
    return Window(agreement.id, after, last)


def _within(window: Window) -> tuple[ColumnElement[bool], ...]:
    columns = netting_obligations.c
    return (
        columns.agreement_id == window.agreement_id,
        columns.seq > window.after_seq,
        columns.seq <= window.last_seq,
    )


async def owed(tx: Tx, window: Window) -> list[Owed]:
    """Return the obligations of a window as the rules need them."""
    columns = netting_obligations.c
    query = select(columns.payer, columns.payee, columns.asset, columns.amount).where(*_within(window))
    return [Owed(*row) for row in await tx.connection.execute(query)]


async def positions(tx: Tx, agreement: Agreement) -> list[Gross]:
    """Return the running sums of what is open, by asset and member."""
    columns = netting_positions.c
    query = select(columns.agent_id, columns.asset, columns.pays, columns.receives)
    rows = await tx.connection.execute(query.where(columns.agreement_id == agreement.id))
    return sorted((Gross(*row) for row in rows), key=lambda g: (g.asset, g.agent_id))


async def by_reference(tx: Tx, agreement_id: str, payer: str, reference: str) -> Obligation | None:
    """Return what a payer has booked under a reference."""
    columns = netting_obligations.c
    query = select(netting_obligations).where(
        columns.agreement_id == agreement_id, columns.payer == payer, columns.reference == reference
    )
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        return None
    return next(iter(await list_obligations(tx, Window(agreement_id, row["seq"] - 1, row["seq"]), 1)))
