"""Open and closed positions, and the collateral that isolated ones hold for themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import insert, select, update

from app.db.session import Tx
from app.db.trading_tables import positions
from app.domain.book import ZERO, Book, OpenPosition
from app.domain.money import checked_amount, plain, to_float
from app.domain.moves import SETTLEMENT_ASSET, Move, agent, pay_in
from app.errors import NotFoundError, conflict
from app.services import ledger
from app.services.margin import Scene
from app.services.wallet import Names

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
    tx: Tx, scene: Scene, held: Book, position_id: str, amount: Decimal, named: Names
) -> tuple[OpenPosition, Book]:
    """Add collateral to an isolated position, or (amount < 0) take some back. The book is locked.

    What stays must cover the position's initial margin and its loss so far, and what is added leaves the pool within
    the gates. Raises ConflictError, NotFoundError, InvalidError.
    """
    adding = not amount.is_signed()
    size = checked_amount("/amount", amount.copy_abs())
    position = await _isolated(tx, held, position_id)
    own = agent(held.agent_id, "allocated")
    if adding:
        moves = [Move(SETTLEMENT_ASSET, size, agent(held.agent_id, "free"), own)]
    else:
        moves = pay_in(held.agent_id, SETTLEMENT_ASSET, size, own, held.holding(SETTLEMENT_ASSET).owed)
    available = held.holding(SETTLEMENT_ASSET).free if adding else position.allocated
    if size > available:
        what = "free" if adding else "allocated"
        detail = f"{plain(available):f} {SETTLEMENT_ASSET} are {what}"
        raise ledger.insufficient_funds(detail, available=plain(available))
    changed = replace(position, allocated=position.allocated + (size if adding else -size))
    after = held.after_moves(moves).with_position(position, changed)
    if adding:
        scene.require_margin(held, after, "/amount")
    else:
        _check_covered(scene, after, changed)
    await ledger.post(tx, named.occasion(held.agent_id, "trading", "allocate" if adding else "deallocate"), moves)
    await _update(tx, position.id, {"allocated": changed.allocated})
    return changed, after


async def _isolated(tx: Tx, held: Book, position_id: str) -> OpenPosition:
    position = next((p for p in held.positions if p.id == position_id), None)
    if position is None:
        stored = await get(tx, held.agent_id, position_id)
        raise conflict("/id", "position_closed", f"the position was closed at {stored.closed_at}")
    if position.margin_mode != "isolated":
        raise conflict("/id", "not_isolated", "the position shares the account's collateral")
    return position


def _check_covered(scene: Scene, after: Book, changed: OpenPosition) -> None:
    """Refuse what would leave an isolated position less than its initial margin; a profit so far does not count."""
    figures = scene.figures(after)
    scene.require_fresh(figures)
    row = list(after.positions).index(changed)
    kept = to_float(changed.allocated) + min(0.0, float(figures.portfolio.unrealized_pnl[row]))
    needed = float(figures.isolated.position_initial[row])
    if kept < needed:
        detail = f"it would leave {kept:,.2f} USD for an initial margin of {needed:,.2f}"
        raise conflict("/amount", "insufficient_margin", detail, shortfall=needed - kept)


async def _update(tx: Tx, position_id: str, values: dict[str, Any]) -> None:
    changed = values | {"updated_at": tx.now}
    await tx.connection.execute(update(positions).where(positions.c.id == position_id).values(changed))
