"""The margin calls of the whole service, counted: what an operator sees of them. Reads alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from sqlalchemy import func, select, text

from app.db.session import Tx
from app.db.tables import margin_calls
from app.domain.book import ZERO
from app.domain.margin_calls import LIVE_STATES


@dataclass(frozen=True, slots=True)
class Losses:
    """How many calls did not cover a loss, and the sum of that, USD."""

    calls: int
    deficit: Decimal


async def losses(tx: Tx) -> Losses:
    """Return what all calls so far did not cover."""
    lost = margin_calls.c.deficit + margin_calls.c.uncovered
    query = select(func.count(), func.coalesce(func.sum(lost), ZERO)).where(lost > text("0"))
    return Losses(*(await tx.connection.execute(query)).one())


@dataclass(frozen=True, slots=True)
class Live:
    """The live calls of one state: how many, the earliest deadline, the earliest next step."""

    count: int
    deadline_at: datetime | None
    next_action_at: datetime | None


async def live_now(tx: Tx) -> dict[str, Live]:
    """Return the live calls of the service by state."""
    columns = margin_calls.c
    query = select(columns.state, func.count(), func.min(columns.deadline_at), func.min(columns.next_action_at))
    rows = await tx.connection.execute(query.where(columns.state.in_(LIVE_STATES)).group_by(columns.state))
    return {state: Live(*of) for state, *of in rows}


async def time_left(tx: Tx, bounds: Sequence[float]) -> tuple[list[int], float]:
    """Return how many open calls have at most so many seconds left, by bound, and the sum of what is left."""
    left = func.extract("epoch", margin_calls.c.deadline_at - tx.now)
    within = [func.count().filter(left <= bound) for bound in bounds]
    query = select(func.coalesce(func.sum(left), 0), *within).where(margin_calls.c.state == "open")
    total, *counts = (await tx.connection.execute(query)).one()
    return counts, float(total)
