"""The audit trail: who changed what, written in the transaction of the change and never rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select

from app.db.session import Tx
from app.db.tables import audit_log

RECORDS_A_PAGE_MAX = 200


@dataclass(frozen=True, slots=True)
class Record:
    """One line: when, by which key, on whose book, what was done to what, and the figures of it."""

    id: int
    at: datetime
    actor: str
    agent_id: str | None
    action: str
    subject: str
    detail: Mapping[str, Any]


async def record(tx: Tx, action: str, subject: str, agent_id: str | None = None, **detail: Any) -> None:
    """Write a line. `detail` holds what JSON holds; amounts as text, so that no digit is lost."""
    row = {"at": tx.now, "actor": tx.actor, "agent_id": agent_id, "action": action, "subject": subject}
    await tx.connection.execute(insert(audit_log), row | {"detail": detail})


async def list_records(tx: Tx, limit: int, agent_id: str | None = None, before: int | None = None) -> list[Record]:
    """Return lines, newest first, from below the id `before`; of one agent, or (None) all of them."""
    query = select(audit_log).order_by(audit_log.c.id.desc()).limit(min(limit, RECORDS_A_PAGE_MAX))
    if agent_id is not None:
        query = query.where(audit_log.c.agent_id == agent_id)
    if before is not None:
        query = query.where(audit_log.c.id < before)
    return [Record(**row) for row in (await tx.connection.execute(query)).mappings()]
