"""Requests that a caller named with a key: done once, answered alike every time.

The key's row is written in the transaction of the effect. A second request with the key waits for the first one to
commit, and then gives its answer; or, where the first failed, does the work itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256

from sqlalchemy import delete, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from app.db.session import Tx
from app.db.tables import idempotency_keys
from app.errors import ConflictError, FieldError

KEYS_A_PURGE_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Named:
    """A request with its name: whose key it is, the key, the method and path, the body."""

    caller: str
    key: str
    request: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered, to be answered again."""

    status: int
    reply: bytes


async def claim(tx: Tx, named: Named) -> Answer | None:
    """Take the key for this transaction and return None, or return what was answered to it before.

    Raises ConflictError `idempotency_conflict` where the key was used for another request.
    """
    row = {
        "caller": named.caller,
        "key": named.key,
        "request": named.request,
        "body_sha256": sha256(named.body).digest(),
        "created_at": tx.now,
    }
    taken = await tx.connection.execute(insert(idempotency_keys).values(row).on_conflict_do_nothing())
    if taken.rowcount:
        return None
    columns = idempotency_keys.c
    query = select(idempotency_keys).where(columns.caller == named.caller, columns.key == named.key)
    stored = (await tx.connection.execute(query)).mappings().one()
    for name, field in (("request", "path"), ("body_sha256", "body")):
        if stored[name] != row[name]:
            detail = f"this Idempotency-Key was used for a request with another {field}"
            error = FieldError("/headers/Idempotency-Key", "idempotency_conflict", detail)
            raise ConflictError(detail, code="idempotency_conflict", errors=(error,))
    return Answer(stored["status"], stored["reply"])


async def keep(tx: Tx, named: Named, answer: Answer) -> None:
    """Store the answer beside the effect."""
    columns = idempotency_keys.c
    statement = update(idempotency_keys).where(columns.caller == named.caller, columns.key == named.key)
    await tx.connection.execute(statement.values(status=answer.status, reply=answer.reply))


async def purge(tx: Tx, before: datetime, most: int = KEYS_A_PURGE_MAX) -> bool:
    """Delete keys that were claimed before a moment, at most so many; tell whether there may be more of them."""
    columns = idempotency_keys.c
    old = (
        select(columns.caller, columns.key).where(columns.created_at < before).order_by(columns.created_at).limit(most)
    )
    done = await tx.connection.execute(delete(idempotency_keys).where(tuple_(columns.caller, columns.key).in_(old)))
    return done.rowcount >= most
