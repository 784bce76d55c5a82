"""Events: what has happened to an agent, written in the transaction that made it so, with a number of its own.

An agent's numbers have no gap, and follow the order of commits: whoever has seen number n has missed nothing below.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import DateTime, Integer, Text, TextClause, bindparam, select, text

from app.db.event_tables import events
from app.db.session import Database, Tx
from app.domain.webhooks import EVENT_TYPES, is_urgent
from app.services import outbox

EVENTS_A_PAGE_MAX = 200
EVENTS_A_PURGE_MAX = 5_000

_encoder = msgspec.json.Encoder(decimal_format="number")
_DEADLINE = "deadline_at"


@dataclass(frozen=True, slots=True)
class Written:
    """An event that was just written: its number in the table, and the id that everybody else knows."""

    number: int
    event_id: str


@dataclass(frozen=True, slots=True)
class Event:
    """A stored event; `data` is JSON text, with its digits as they were written."""

    event_id: str
    type: str
    timestamp: datetime
    sequence: int
    data: str

    def shown(self) -> dict[str, Any]:
        """Return the event for a reply: what a webhook says, with the id that stands in its header."""
        data = msgspec.Raw(self.data.encode())
        return {
            "id": self.event_id,
            "sequence": self.sequence,
            "type": self.type,
            "timestamp": self.timestamp,
            "data": data,
        }


def body_of(event_type: str, timestamp: datetime, data: str) -> bytes:
    """Return the body of a webhook, of which every retry is a copy."""
    return _encoder.encode({"type": event_type, "timestamp": timestamp, "data": msgspec.Raw(data.encode())})


async def emit(tx: Tx, event_type: str, agent_id: str | None, data: Mapping[str, Any]) -> str:
    """Write an event of an agent, or (None) of the service, and queue it for the webhooks that want it.

    Return its id. `data` gains `agent_id`, `fleet_id` and `sequence`; Decimals keep their digits. An urgent event's
    `deadline_at`, a datetime, is until when its webhook is tried at short intervals. The agent's next events wait
    for this transaction: emit last.
    """
    deadline = data.get(_DEADLINE) if is_urgent(event_type) else None
    values = _values(tx, event_type, agent_id, data) | outbox.queue_values(event_type, deadline)
    await tx.connection.execute(_EMIT[agent_id is not None], values)
    return str(values["event_id"])


_WRITTEN = """
    WITH counted AS (
        INSERT INTO event_sequences AS s (agent_id, last) VALUES (:agent_id, 1)
        ON CONFLICT (agent_id) DO UPDATE SET last = s.last + 1 RETURNING last
    ), written AS (
        INSERT INTO events (event_id, agent_id, sequence, type, timestamp, data)
        SELECT :event_id, :agent_id, last, :type, :now, CAST(:data AS jsonb) || jsonb_build_object(
        'agent_id', CAST(:agent_id AS text), 'fleet_id', (
            SELECT fleet_id FROM fleet_members WHERE agent_id = :agent_id AND joined_at IS NOT NULL
            UNION ALL SELECT id FROM fleets WHERE master_id = :agent_id LIMIT 1), 'sequence', last)
        FROM counted RETURNING id
    )
    """
_NUMBER = "SELECT id FROM written"


def _typed(statement: TextClause) -> TextClause:
    texts = [bindparam(name, type_=Text) for name in ("agent_id", "event_id", "type", "data")]
    return statement.bindparams(bindparam("now", type_=DateTime(timezone=True)), *texts)


_WRITE = _typed(text(_WRITTEN + _NUMBER))
_EMIT = {is_agents: _typed(statement) for is_agents, statement in outbox.enqueueing(_WRITTEN).items()}


async def write(tx: Tx, event_type: str, agent_id: str | None, data: Mapping[str, Any]) -> Written:
    """Write an event that goes to no webhook by itself; `emit` is what others call."""
    values = _values(tx, event_type, agent_id, data)
    number = (await tx.connection.execute(_WRITE, values)).scalar_one()
    return Written(number, str(values["event_id"]))


def _values(tx: Tx, event_type: str, agent_id: str | None, data: Mapping[str, Any]) -> dict[str, object]:
    if event_type not in EVENT_TYPES:
        raise ValueError(f"{event_type} is no event type")
    return {
        "event_id": f"evt_{secrets.token_hex(16)}",
        "agent_id": agent_id,
        "type": event_type,
        "now": tx.now,
        "data": _encoder.encode(data).decode(),
    }


async def list_events(tx: Tx, agent_id: str | None, limit: int, after: int = 0) -> list[Event]:
    """Return events of an agent, or (None) of the service, past the number `after`, in their order."""
    columns = events.c
    shown = (columns.event_id, columns.type, columns.timestamp, columns.sequence, columns.data.cast(Text).label("data"))
    query = select(*shown).where(columns.agent_id == agent_id, columns.sequence > after)
    rows = await tx.connection.execute(query.order_by(columns.sequence).limit(min(limit, EVENTS_A_PAGE_MAX)))
    return [Event(**row) for row in rows.mappings()]


async def of_call(tx: Tx, agent_id: str, call_id: str, limit: int) -> list[Event]:
    """Return the events of a margin call, in their order."""
    columns = events.c
    shown = (columns.event_id, columns.type, columns.timestamp, columns.sequence, columns.data.cast(Text).label("data"))
    query = select(*shown).where(columns.agent_id == agent_id, columns.data["margin_call_id"].astext == call_id)
    rows = await tx.connection.execute(query.order_by(columns.sequence).limit(limit))
    return [Event(**row) for row in rows.mappings()]


_PURGE = text(
    """
    DELETE FROM events WHERE id IN (
        SELECT id FROM events e
        WHERE timestamp < :before AND NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.event = e.id)
        ORDER BY id LIMIT :most)
    """
).bindparams(bindparam("before", type_=DateTime(timezone=True)), bindparam("most", type_=Integer))


async def purge(tx: Tx, before: datetime, most: int = EVENTS_A_PURGE_MAX) -> bool:
    """Delete older events that no delivery needs; tell whether there may be more. Numbers are not given anew."""
    done = await tx.connection.execute(_PURGE, {"before": before, "most": most})
    return done.rowcount >= most


async def last_sequence(database: Database, agent_id: str | None) -> int:
    """Return the number of the last event of an agent, or (None) of the service; 0 before the first."""
    if agent_id is None:
        return await database.fetch_value("SELECT last FROM event_sequences WHERE agent_id IS NULL") or 0
    return await database.fetch_value("SELECT last FROM event_sequences WHERE agent_id = $1", agent_id) or 0
