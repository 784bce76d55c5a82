"""Open and closed positions, and the collateral that isolated ones hold for themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import insert, select, update

from app.db.session import Tx
from app.db.tables import positions
from app.domain.book import ZERO, Book, OpenPosition
from app.domain.money import plain
from app.domain.moves import SETTLEMENT_ASSET, Move, agent
from app.errors import ConflictError, FieldError, NotFoundError
from app.services import book, ledger
from app.services.margin import Scene
from app.services.wallet import Names, check_amount

POSITIONS_A_PAGE_MAX = 200


@dataclass(frozen=True, slots=True)
class Position:
    """A stored position, open or closed."""

    id: str
    seq: int
    agent_id: str
    symbol: str
    side: str
    size: Decimal
    entry_price: Decimal
    leverage: Decimal | None
    margin_mode: str
    allocated: Decimal
    realized_pnl: Decimal
    reducible: bool
    opened_at: datetime
    updated_at: datetime
    closed_at: datetime | None


async def store(tx: Tx, agent_id: str, before: OpenPosition | None, after: OpenPosition | None, pnl: Decimal) -> None:
    """Write what a trade made of the position in a symbol; `pnl` is what was realised on `before`."""
    if before is not None and (after is None or after.id != before.id):
        closed = {"size": ZERO, "allocated": ZERO, "realized_pnl": before.realized_pnl + pnl, "closed_at": tx.now}
        await _update(tx, before.id, closed)
        before = None
    if after is None:
        return
    values = asdict(after)
    if before is None:
        await tx.connection.execute(insert(positions).values(values | {"agent_id": agent_id, "updated_at": tx.now}))
        return
    await _update(tx, after.id, {name: value for name, value in values.items() if name not in ("id", "opened_at")})


async def get(tx: Tx, agent_id: str, position_id: str) -> Position:
    """Return a position of the agent, open or closed. Raises NotFoundError."""
    columns = positions.c
    query = select(positions).where(columns.agent_id == agent_id, columns.id == position_id)
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such position.", code="position_not_found")
    return Position(**row)


async def list_positions(tx: Tx, agent_id: str, limit: int, before: int | None = None) -> list[Position]:
    """Return an agent's positions, open and closed, newest first, from below the number `before`."""
    columns = positions.c
    query = select(positions).where(columns.agent_id == agent_id).order_by(columns.seq.desc())
    if before is not None:
        query = query.where(columns.seq < before)
    rows = await tx.connection.execute(query.limit(min(limit, POSITIONS_A_PAGE_MAX)))
    return [Position(**row) for row in rows.mappings()]


async def allocate(
    tx: Tx, scene: Scene, agent_id: str, position_id: str, amount: Decimal, named: Names
) -> tuple[OpenPosition, Book]:
    """Add collateral to an isolated position, or (amount < 0) take some back.

    What stays must cover the position's initial margin at the mark, and what is added leaves the pool within the
    gates. Raises ConflictError, NotFoundError, InvalidError.
    """
    check_amount("/amount", abs(amount))
    before = await book.lock(tx, agent_id)
    held = await _isolated(tx, before, position_id)
    free, own = agent(agent_id, "free"), agent(agent_id, "allocated")
    move = Move(SETTLEMENT_ASSET, abs(amount), *((free, own) if amount > 0 else (own, free)))
    if amount < 0 and -amount > held.allocated:
        raise ledger.insufficient_funds(
            f"{plain(held.allocated):f} {SETTLEMENT_ASSET} are allocated", available=plain(held.allocated)
        )
    changed = replace(held, allocated=held.allocated + amount)
    after = before.after_moves([move]).with_position(held, changed)
    if amount > 0:
        scene.require_margin(before, after, "/amount")
    else:
        _check_covered(scene, after, changed)
    await ledger.post(tx, named.occasion(agent_id, "trading", "allocate" if amount > 0 else "deallocate"), [move])
    await _update(tx, held.id, {"allocated": changed.allocated})
    return changed, after


async def _isolated(tx: Tx, held_book: Book, position_id: str) -> OpenPosition:
    held = next((p for p in held_book.positions if p.id == position_id), None)
    if held is None:
        stored = await get(tx, held_book.agent_id, position_id)
        raise _conflict("/id", "position_closed", f"the position was closed at {stored.closed_at}")
    if held.margin_mode != "isolated":
        raise _conflict("/id", "not_isolated", "the position shares the account's collateral")
    return held


def _check_covered(scene: Scene, after: Book, changed: OpenPosition) -> None:
    scene.require_fresh(after)
    figures = scene.figures(after)
    row = list(after.positions).index(changed)
    equity = float(changed.allocated) + float(figures.portfolio.unrealized_pnl[row])
    needed = float(figures.isolated.position_initial[row])
    if equity < needed:
        detail = f"it would leave {equity:,.2f} USD for an initial margin of {needed:,.2f}"
        raise ConflictError(
            detail,
            code="insufficient_margin",
            errors=(FieldError("/amount", "insufficient_margin", detail),),
            figures={"shortfall": needed - equity},
        )


def _conflict(pointer: str, code: str, detail: str) -> ConflictError:
    return ConflictError(detail, code=code, errors=(FieldError(pointer, code, detail),))


async def _update(tx: Tx, position_id: str, values: dict[str, Any]) -> None:
    changed = values | {"updated_at": tx.now}
    await tx.connection.execute(update(positions).where(positions.c.id == position_id).values(changed))
