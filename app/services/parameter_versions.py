"""Versions of the market's parameters and prices, and the rows that stand under them.

Whoever writes holds a row of `market_state` to the end of the transaction, so that writers go one by one,
no change is lost, and the versions that readers see only ever grow. A parameter row is never rewritten:
each change appends one under the next version, and the greatest version of a key counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from sqlalchemy import func, insert, select, update
from sqlalchemy.dialects.postgresql import distinct_on

from app.db.tables import PARAMETERS, market_changes, market_state
from app.errors import ConflictError, FieldError
from app.services import audit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Column, ColumnElement, RowMapping, Table

    from app.db.session import Tx

T = TypeVar("T")

ChangeKind = Literal["seed", "asset", "instrument", "model", "correlation", "lending", "venue"]


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """A stored value, and the version under which it was last changed."""

    value: T
    version: int


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the audit trail."""

    version: int
    changed_at: datetime
    changed_by: str
    kind: ChangeKind
    name: str


async def lock_parameters(tx: Tx) -> int:
    """Take the writers' lock, and return the last writer's version: nothing changes until this one commits."""
    return await hold_version(tx, PARAMETERS)


async def next_version(tx: Tx, kind: ChangeKind, name: str) -> int:
    """Return the next version of the parameters, with its line in the audit trail."""
    version = await bump_version(tx, PARAMETERS)
    change = Change(version, tx.now, tx.actor, kind, name)
    await tx.connection.execute(insert(market_changes), asdict(change))
    await audit.record(tx, f"market.{kind}", name, version=version)
    return version


async def bump_version(tx: Tx, name: str) -> int:
    """Return the next version of one side of the market; its row stays locked until the transaction ends."""
    state = market_state.c
    statement = update(market_state).where(state.name == name).values(version=state.version + 1)
    version: int = (await tx.connection.execute(statement.returning(state.version))).scalar_one()
    return version


async def hold_version(tx: Tx, name: str) -> int:
    """Return the version of one side of the market, which nobody else changes until the transaction ends."""
    query = select(market_state.c.version).where(market_state.c.name == name).with_for_update()
    version: int = (await tx.connection.execute(query)).scalar_one()
    return version


def check_expected(name: str, stored: int, expected: int | None) -> None:
    """Refuse a change of what is not at the version that its caller expects. Raises ConflictError."""
    if expected is not None and expected != stored:
        detail = f"{name} is at version {stored}, not {expected}."
        raise ConflictError(detail, "version_conflict", (FieldError("/version", "version_conflict", detail),))


async def version_of(tx: Tx, table: Table, *where: ColumnElement[bool]) -> int:
    """Return the latest version of the rows, 0 where there is none."""
    query = select(func.coalesce(func.max(table.c.version), 0)).where(*where)
    version: int = (await tx.connection.execute(query)).scalar_one()
    return version


async def versions_of(tx: Tx, table: Table, key: Column[Any]) -> dict[str, int]:
    """Return the latest version of each key."""
    query = select(key, func.max(table.c.version)).group_by(key)
    return {row[0]: row[1] for row in await tx.connection.execute(query)}


async def row_at(tx: Tx, table: Table, where: ColumnElement[bool], at: int | None = None) -> RowMapping | None:
    """Return the row that counts, now or as of a version, None where there is none."""
    query = select(table).where(where).order_by(table.c.version.desc()).limit(1)
    if at is not None:
        query = query.where(table.c.version <= at)
    return (await tx.connection.execute(query)).mappings().first()


async def latest(tx: Tx, table: Table, key: tuple[str, ...], version: int) -> Sequence[RowMapping]:
    """Return the row of each key that counts as of a version."""
    columns: list[Column[Any]] = [table.c[name] for name in key]
    query = (
        select(table)
        .ext(distinct_on(*columns))
        .where(table.c.version <= version)
        .order_by(*columns, table.c.version.desc())
    )
    return (await tx.connection.execute(query)).mappings().all()
