"""Deliveries of events to endpoints: a queue that is a table, claimed with a lease and settled with its token.

A worker that dies holds its leases until they lapse; then another one sends the same event again, under the same id.
A worker that was only slow writes with a token that is no longer there, and so changes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import BigInteger, DateTime, Integer, Text, bindparam, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY

from app.db.event_tables import events, webhook_attempts, webhook_deliveries, webhook_endpoints
from app.db.session import Tx
from app.domain.webhooks import Attempts, Retry, is_urgent, next_retry, patterns_of
from app.errors import NotFoundError

AN_ENDPOINT_MAX = 4
"""Deliveries to one endpoint in one claim: a slow one leaves room to the others."""

DELIVERIES_A_PAGE_MAX = 200
ATTEMPTS_SHOWN_MAX = 100
RECOVERED_MAX = 10_000
DELIVERIES_A_PURGE_MAX = 5_000

_WINDOW = 8
"""Due rows that a claim looks at, for each that it takes: many may be of one endpoint."""

_MOMENT = DateTime(timezone=True)


@dataclass(frozen=True, slots=True)
class Claim:
    """A delivery that is the claimer's to send until its lease ends, and everything needed to send it."""

    id: int
    token: str
    endpoint_id: str
    agent_id: str | None
    url: str
    secret: str
    secret_before: str | None
    event_id: str
    type: str
    timestamp: datetime
    data: str
    attempts: int
    slow_retries: int
    urgent_until: datetime | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: with a status, or with an error before there was one."""

    claim: Claim
    at: datetime
    milliseconds: int
    status: int | None
    error: str | None = None
    retry_after: timedelta | None = None

    @property
    def delivered(self) -> bool:
        """Tell whether the receiver took it."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Tell whether the receiver wants no more, ever."""
        return self.status == 410


@dataclass(frozen=True, slots=True)
class Delivery:
    """A stored delivery, with its event's name."""

    id: int
    endpoint_id: str
    event_id: str
    type: str
    state: str
    attempts: int
    created_at: datetime
    next_attempt_at: datetime | None
    delivered_at: datetime | None
    last_status: int | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One line of the log."""

    at: datetime
    milliseconds: int
    status: int | None
    error: str | None


# --- into the queue

_ENQUEUE = text(
    """
    INSERT INTO webhook_deliveries (endpoint_id, event, urgent_until, created_at, next_attempt_at)
    SELECT id, :event, :deadline, :now, :now FROM webhook_endpoints
    WHERE agent_id IS NOT DISTINCT FROM :agent_id AND status = 'enabled' AND (filters = '{}' OR filters && :patterns)
    """
).bindparams(
    bindparam("event", type_=BigInteger),
    bindparam("deadline", type_=_MOMENT),
    bindparam("now", type_=_MOMENT),
    bindparam("agent_id", type_=Text),
    bindparam("patterns", type_=ARRAY(Text)),
)


async def enqueue(tx: Tx, event: int, event_type: str, agent_id: str | None, deadline: datetime | None) -> None:
    """Queue an event for every enabled endpoint of its agent that wants its type."""
    values = {"event": event, "deadline": deadline, "now": tx.now, "agent_id": agent_id}
    await tx.connection.execute(_ENQUEUE, values | {"patterns": list(patterns_of(event_type))})


async def enqueue_for(tx: Tx, event: int, endpoint_id: str) -> int:
    """Queue an event for one endpoint, whatever its filters, and return the delivery's id."""
    row = {"endpoint_id": endpoint_id, "event": event, "created_at": tx.now, "next_attempt_at": tx.now}
    added = await tx.connection.execute(insert(webhook_deliveries).values(row).returning(webhook_deliveries.c.id))
    number: int = added.scalar_one()
    return number


# --- out of it

_CLAIM = text(
    """
    WITH due AS (
        SELECT d.id, d.endpoint_id, d.next_attempt_at
        FROM webhook_deliveries d JOIN webhook_endpoints e ON e.id = d.endpoint_id
        WHERE d.state = 'pending' AND d.next_attempt_at <= :now AND (d.lease_until IS NULL OR d.lease_until <= :now)
          AND e.status = 'enabled' AND d.endpoint_id <> ALL (:busy)
        ORDER BY d.next_attempt_at LIMIT :looked_at
        FOR UPDATE OF d SKIP LOCKED
    ), placed AS (
        SELECT id, next_attempt_at, row_number() OVER (PARTITION BY endpoint_id ORDER BY next_attempt_at, id) AS place
        FROM due
    ), taken AS (
        SELECT id FROM placed WHERE place <= :an_endpoint ORDER BY next_attempt_at, id LIMIT :most
    )
    UPDATE webhook_deliveries d SET lease_until = :until, lease_token = :token
    FROM taken, webhook_endpoints e, events v
    WHERE d.id = taken.id AND e.id = d.endpoint_id AND v.id = d.event
    RETURNING d.id, d.lease_token AS token, d.endpoint_id, e.agent_id, e.url, e.secret,
        CASE WHEN e.secret_before_until > :now THEN e.secret_before END AS secret_before,
        v.event_id, v.type, v.timestamp, v.data::text AS data, d.attempts, d.slow_retries, d.urgent_until
    """
).bindparams(
    bindparam("now", type_=_MOMENT),
    bindparam("until", type_=_MOMENT),
    bindparam("token", type_=Text),
    bindparam("busy", type_=ARRAY(Text)),
    bindparam("looked_at", type_=Integer),
    bindparam("an_endpoint", type_=Integer),
    bindparam("most", type_=Integer),
)


async def claim(tx: Tx, worker: str, limit: int, lease_seconds: float, busy: Collection[str] = ()) -> list[Claim]:
    """Lease deliveries that are due, the longest due first, but none to the endpoints that are `busy`."""
    values = {
        "now": tx.now,
        "until": tx.now + timedelta(seconds=lease_seconds),
        "token": f"{worker}:{secrets.token_hex(8)}",
        "busy": list(busy),
        "looked_at": limit * _WINDOW,
        "an_endpoint": AN_ENDPOINT_MAX,
        "most": limit,
    }
    return [Claim(**row) for row in (await tx.connection.execute(_CLAIM, values)).mappings()]


_SETTLE = text(
    """
    UPDATE webhook_deliveries d
    SET state = o.state, attempts = d.attempts + 1, slow_retries = o.slow, next_attempt_at = o.again,
        delivered_at = CASE WHEN o.state = 'delivered' THEN o.at END, last_status = o.status, last_error = o.error,
        lease_until = NULL, lease_token = NULL
    FROM unnest(:ids, :tokens, :states, :slows, :agains, :ats, :statuses, :errors)
        AS o (id, token, state, slow, again, at, status, error)
    WHERE d.id = o.id AND d.lease_token = o.token
    RETURNING d.id
    """
).bindparams(
    bindparam("ids", type_=ARRAY(BigInteger)),
    bindparam("tokens", type_=ARRAY(Text)),
    bindparam("states", type_=ARRAY(Text)),
    bindparam("slows", type_=ARRAY(Integer)),
    bindparam("agains", type_=ARRAY(_MOMENT)),
    bindparam("ats", type_=ARRAY(_MOMENT)),
    bindparam("statuses", type_=ARRAY(Integer)),
    bindparam("errors", type_=ARRAY(Text)),
)


async def settle(tx: Tx, outcomes: Sequence[Outcome], draw: Callable[[], float]) -> set[int]:
    """Log attempts, and write what becomes of their deliveries; return those whose lease still held.

    An attempt is logged in any case: it was made.
    """
    if not outcomes:
        return set()
    ordered = sorted(outcomes, key=lambda o: o.claim.id)  # one order of row locks, whoever else settles
    log = [
        {"delivery_id": o.claim.id, "at": o.at, "milliseconds": o.milliseconds, "status": o.status, "error": o.error}
        for o in ordered
    ]
    await tx.connection.execute(insert(webhook_attempts), log)
    retries = [_retry(outcome, tx.now, draw()) for outcome in ordered]
    states = [
        "delivered" if outcome.delivered else "pending" if retry else "failed"
        for outcome, retry in zip(ordered, retries, strict=True)
    ]
    values = {
        "ids": [o.claim.id for o in ordered],
        "tokens": [o.claim.token for o in ordered],
        "states": states,
        "slows": [r.slow if r is not None else o.claim.slow_retries for r, o in zip(retries, ordered, strict=True)],
        "agains": [None if r is None else r.at for r in retries],
        "ats": [o.at for o in ordered],
        "statuses": [o.status for o in ordered],
        "errors": [o.error for o in ordered],
    }
    return set((await tx.connection.execute(_SETTLE, values)).scalars())


def _retry(outcome: Outcome, now: datetime, draw: float) -> Retry | None:
    if outcome.delivered or outcome.gone:
        return None
    held = outcome.claim
    behind = Attempts(held.attempts + 1, held.slow_retries)
    urgent = is_urgent(held.type)
    return next_retry(
        behind, now, urgent=urgent, deadline=held.urgent_until, retry_after=outcome.retry_after, draw=draw
    )


async def give_up(tx: Tx, endpoint_id: str, why: str) -> None:
    """End everything that waits for an endpoint; what is being sent to it changes nothing any more."""
    columns = webhook_deliveries.c
    waiting = update(webhook_deliveries).where(columns.endpoint_id == endpoint_id, columns.state == "pending")
    ended = {"state": "failed", "next_attempt_at": None, "lease_until": None, "lease_token": None, "last_error": why}
    await tx.connection.execute(waiting.values(ended))


# --- again


async def rearm(tx: Tx, delivery_id: int) -> None:
    """Send a delivery once more, now, whatever became of it; the schedule of retries begins anew."""
    columns = webhook_deliveries.c
    values = {"state": "pending", "slow_retries": 0, "next_attempt_at": tx.now, "delivered_at": None}
    await tx.connection.execute(update(webhook_deliveries).where(columns.id == delivery_id).values(values))


_RECOVER = text(
    """
    INSERT INTO webhook_deliveries AS d (endpoint_id, event, created_at, next_attempt_at)
    SELECT :endpoint_id, v.id, :now, :now
    FROM events v LEFT JOIN webhook_deliveries b ON b.endpoint_id = :endpoint_id AND b.event = v.id
    WHERE v.agent_id IS NOT DISTINCT FROM :agent_id AND v.timestamp >= :since AND (b.id IS NULL OR b.state = 'failed')
      AND v.type <> 'webhook.test'
      AND (:filters = '{}' OR :filters && ARRAY[v.type, split_part(v.type, '.', 1) || '.*'])
    ORDER BY v.id LIMIT :most
    ON CONFLICT (endpoint_id, event) DO UPDATE SET state = 'pending', slow_retries = 0, next_attempt_at = :now
    WHERE d.state = 'failed'
    """
).bindparams(
    bindparam("endpoint_id", type_=Text),
    bindparam("agent_id", type_=Text),
    bindparam("filters", type_=ARRAY(Text)),
    bindparam("since", type_=_MOMENT),
    bindparam("now", type_=_MOMENT),
    bindparam("most", type_=Integer),
)


async def recover(tx: Tx, endpoint_id: str, agent_id: str | None, filters: Sequence[str], since: datetime) -> int:
    """Queue again what an endpoint has missed since a moment, the oldest first; return how many, a limited number."""
    values = {"endpoint_id": endpoint_id, "agent_id": agent_id, "filters": list(filters), "since": since}
    done = await tx.connection.execute(_RECOVER, values | {"now": tx.now, "most": RECOVERED_MAX})
    return done.rowcount


# --- to read

_SHOWN = (
    webhook_deliveries.c.id,
    webhook_deliveries.c.endpoint_id,
    events.c.event_id,
    events.c.type,
    webhook_deliveries.c.state,
    webhook_deliveries.c.attempts,
    webhook_deliveries.c.created_at,
    webhook_deliveries.c.next_attempt_at,
    webhook_deliveries.c.delivered_at,
    webhook_deliveries.c.last_status,
    webhook_deliveries.c.last_error,
)


async def list_deliveries(
    tx: Tx, endpoint_id: str, limit: int, before: int | None = None, state: str | None = None
) -> list[Delivery]:
    """Return an endpoint's deliveries, newest first, from below the id `before`."""
    columns = webhook_deliveries.c
    query = select(*_SHOWN).join(events, events.c.id == columns.event).where(columns.endpoint_id == endpoint_id)
    if before is not None:
        query = query.where(columns.id < before)
    if state is not None:
        query = query.where(columns.state == state)
    rows = await tx.connection.execute(query.order_by(columns.id.desc()).limit(min(limit, DELIVERIES_A_PAGE_MAX)))
    return [Delivery(**row) for row in rows.mappings()]


async def get_delivery(tx: Tx, agent_id: str | None, delivery_id: int) -> Delivery:
    """Return a delivery to an endpoint of the agent's, or (None) of the service's. Raises NotFoundError."""
    columns, owners = webhook_deliveries.c, webhook_endpoints.c
    query = select(*_SHOWN).join(events, events.c.id == columns.event)
    query = query.join(webhook_endpoints, owners.id == columns.endpoint_id)
    query = query.where(columns.id == delivery_id, owners.agent_id == agent_id, owners.status != "deleted")
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such delivery.", code="delivery_not_found")
    return Delivery(**row)


async def list_attempts(tx: Tx, delivery_id: int) -> list[Attempt]:
    """Return the last attempts of a delivery, newest first."""
    columns = webhook_attempts.c
    query = select(columns.at, columns.milliseconds, columns.status, columns.error)
    query = query.where(columns.delivery_id == delivery_id).order_by(columns.id.desc()).limit(ATTEMPTS_SHOWN_MAX)
    return [Attempt(**row) for row in (await tx.connection.execute(query)).mappings()]


@dataclass(frozen=True, slots=True)
class Backlog:
    """How far deliveries are behind, in seconds: since the oldest was made, and since the first fell due."""

    age_seconds: float
    lag_seconds: float


async def read_backlog(tx: Tx) -> Backlog:
    """Return how far behind the deliveries to enabled endpoints are; zeros where none waits."""
    columns = webhook_deliveries.c
    query = select(func.min(columns.created_at), func.min(columns.next_attempt_at))
    query = query.join(webhook_endpoints, webhook_endpoints.c.id == columns.endpoint_id)
    query = query.where(columns.state == "pending", webhook_endpoints.c.status == "enabled")
    moments: Sequence[datetime | None] = (await tx.connection.execute(query)).one()
    ages = (0.0 if moment is None else max(0.0, (tx.now - moment).total_seconds()) for moment in moments)
    return Backlog(*ages)


_PURGE = text(
    """
    WITH old AS (
        SELECT id FROM webhook_deliveries WHERE created_at < :before AND state <> 'pending' ORDER BY id LIMIT :most
    ), attempts AS (
        DELETE FROM webhook_attempts a USING old WHERE a.delivery_id = old.id
    )
    DELETE FROM webhook_deliveries d USING old WHERE d.id = old.id
    """
).bindparams(bindparam("before", type_=_MOMENT), bindparam("most", type_=Integer))


async def purge(tx: Tx, before: datetime, most: int = DELIVERIES_A_PURGE_MAX) -> bool:
    """Delete deliveries that are over and older, with their attempts; tell whether there may be more of them."""
    done = await tx.connection.execute(_PURGE, {"before": before, "most": most})
    return done.rowcount >= most
