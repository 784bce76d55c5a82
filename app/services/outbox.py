"""Deliveries of events to endpoints: a queue that is a table, claimed with a lease and settled with its token.

A worker that dies holds its leases until they lapse; then another one sends the same event again, under the same id.
A worker that was only slow writes with a token that is no longer there, and so changes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import (
    BigInteger,
    DateTime,
    Integer,
    SmallInteger,
    Text,
    TextClause,
    bindparam,
    case,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.db.event_tables import events, webhook_attempts, webhook_deliveries, webhook_endpoints
from app.db.session import Tx
from app.domain.dispatch import AN_AGENT_MAX, AN_ENDPOINT_MAX, Kind, Lane, Share, share_out
from app.domain.webhooks import (
    ORDINARY,
    TEST,
    TEST_EVENT,
    URGENT,
    Attempts,
    Retry,
    is_urgent,
    next_retry,
    patterns_of,
    priority_of,
)
from app.errors import NotFoundError

DELIVERIES_A_PAGE_MAX = 200
ATTEMPTS_SHOWN_MAX = 100
RECOVERED_MAX = 10_000
DELIVERIES_A_PURGE_MAX = 5_000
ENDED_AT_ONCE_MAX = 5_000
"""Deliveries that `end_abandoned` ends in one transaction: well within the time limit of a statement."""

_FEW = 1_000
"""Due deliveries that a claim looks at one by one; where there are more it goes from lane to lane."""

_LANES_MAX = 640
"""Lanes that a claim looks at, of endpoints that are well and of those that fail. What is under way at once blocks
fewer than 500, its agents' own: the others are not hidden behind them."""

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
    priority: int = ORDINARY
    failing: bool = False

    @property
    def kind(self) -> Kind:
        """Return what its slot is counted by."""
        return Kind(self.endpoint_id, self.agent_id, self.priority == URGENT, self.failing)


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


def _owned(statement: str) -> dict[bool, TextClause]:
    """Return a statement for an agent (True) and for the service: IS NOT DISTINCT FROM would use no index."""
    return {
        True: text(statement.format(mine="agent_id = :agent_id")).bindparams(bindparam("agent_id", type_=Text)),
        False: text(statement.format(mine="agent_id IS NULL")),
    }


_ENQUEUE = """
    INSERT INTO webhook_deliveries (endpoint_id, event, priority, urgent_until, created_at, next_attempt_at)
    SELECT e.id, written.id, CAST(:priority AS smallint), CAST(:deadline AS timestamptz), :now, :now
    FROM written, webhook_endpoints e
    WHERE {mine} AND e.status = 'enabled' AND (e.filters = '{{}}' OR e.filters && CAST(:patterns AS text[]))
    """

_OF_AGENT_OR_COORDINATOR = """agent_id IN (
    SELECT :agent_id UNION ALL
    SELECT f.master_id FROM fleet_members m JOIN fleets f ON f.id = m.fleet_id
    WHERE m.agent_id = :agent_id AND m.joined_at IS NOT NULL)"""


def enqueueing(written: str) -> dict[bool, TextClause]:
    """Return the statement that queues an event for every enabled endpoint that wants its type.

    Those of its agent, and of the coordinator of the agent's fleet.

    `written` are the common table expressions that write the event, the last of them `written` with its `id`; its
    parameters are `agent_id`, `now` and those of `queue_values`. For an agent (True) and for the service.
    """
    queued = written + _ENQUEUE
    return {
        True: text(queued.format(mine=_OF_AGENT_OR_COORDINATOR)).bindparams(bindparam("agent_id", type_=Text)),
        False: text(queued.format(mine="agent_id IS NULL")),
    }


def queue_values(event_type: str, deadline: datetime | None) -> dict[str, object]:
    """Return what the statement needs to know of an event; it is urgent until `deadline`."""
    return {"priority": priority_of(event_type), "deadline": deadline, "patterns": list(patterns_of(event_type))}


def _owner(agent_id: str | None) -> dict[str, str]:
    return {} if agent_id is None else {"agent_id": agent_id}


async def enqueue_test(tx: Tx, event: int, endpoint_id: str) -> int:
    """Queue a test event for one endpoint, whatever its filters, and return the delivery's id."""
    row = {"endpoint_id": endpoint_id, "event": event, "created_at": tx.now, "next_attempt_at": tx.now}
    row["priority"] = TEST
    added = await tx.connection.execute(insert(webhook_deliveries).values(row).returning(webhook_deliveries.c.id))
    number: int = added.scalar_one()
    return number


# --- out of it

_COUNT_DUE = text(
    """
    SELECT count(*) FROM (
        SELECT FROM webhook_deliveries
        WHERE state = 'pending' AND next_attempt_at <= :now AND (lease_until IS NULL OR lease_until <= :now)
        ORDER BY next_attempt_at LIMIT :most
    ) AS due
    """
).bindparams(bindparam("now", type_=_MOMENT), bindparam("most", type_=Integer))

_HEADS_OF_FEW = """
    WITH heads AS (
        SELECT endpoint_id, priority, min(next_attempt_at) AS first, count(*) AS due_count
        FROM webhook_deliveries
        WHERE state = 'pending' AND next_attempt_at <= :now AND (lease_until IS NULL OR lease_until <= :now)
        GROUP BY endpoint_id, priority
    )
    """

_HEADS_OF_MANY = """
    WITH RECURSIVE lanes AS (
        (SELECT endpoint_id, priority, next_attempt_at FROM webhook_deliveries
         WHERE state = 'pending' ORDER BY endpoint_id, priority, next_attempt_at LIMIT 1)
        UNION ALL
        SELECT following.* FROM lanes l CROSS JOIN LATERAL (
            SELECT d.endpoint_id, d.priority, d.next_attempt_at FROM webhook_deliveries d
            WHERE d.state = 'pending' AND (d.endpoint_id, d.priority) > (l.endpoint_id, l.priority)
            ORDER BY d.endpoint_id, d.priority, d.next_attempt_at LIMIT 1
        ) AS following
    ), heads AS (
        SELECT l.endpoint_id, l.priority, head.first, head.due_count
        FROM lanes l CROSS JOIN LATERAL (
            SELECT min(due.next_attempt_at) AS first, count(*) AS due_count FROM (
                SELECT d.next_attempt_at FROM webhook_deliveries d
                WHERE d.state = 'pending' AND (d.lease_until IS NULL OR d.lease_until <= :now)
                    AND (d.endpoint_id, d.priority, d.next_attempt_at) >= (l.endpoint_id, l.priority, l.next_attempt_at)
                    AND (d.endpoint_id, d.priority, d.next_attempt_at) <= (l.endpoint_id, l.priority, :now)
                ORDER BY d.endpoint_id, d.priority, d.next_attempt_at LIMIT :an_endpoint
            ) AS due
        ) AS head
        WHERE l.next_attempt_at <= :now AND head.due_count > 0
    )
    """
"""One step of an index from each lane to the next, however much waits in it. Rows are compared rather than each
column, so that no other index will do: along the one by time it would walk all that waits."""

_LANES = """
    , placed AS (
        SELECT e.id, e.agent_id, e.failing_since IS NOT NULL AS failing, h.priority, h.due_count, h.first,
            row_number() OVER (
                PARTITION BY e.agent_id, e.failing_since IS NOT NULL ORDER BY h.priority, h.first
            ) AS place
        FROM heads h JOIN webhook_endpoints e ON e.id = h.endpoint_id AND e.status = 'enabled'
    ), ranked AS (
        SELECT placed.*, row_number() OVER (PARTITION BY failing ORDER BY priority, first) AS rank
        FROM placed WHERE place <= :an_agent
    )
    SELECT id, agent_id, failing, priority, due_count
    FROM ranked WHERE rank <= :most ORDER BY priority, failing, first
    """


def _lanes(heads: str) -> TextClause:
    most = [bindparam(name, type_=Integer) for name in ("an_agent", "most")]
    return text(heads + _LANES).bindparams(bindparam("now", type_=_MOMENT), *most)


_LANES_OF_FEW = _lanes(_HEADS_OF_FEW)
_LANES_OF_MANY = _lanes(_HEADS_OF_MANY).bindparams(bindparam("an_endpoint", type_=Integer))

_LEASE = text(
    """
    WITH taken AS (
        SELECT d.id
        FROM unnest(:endpoints, :priorities, :counts) AS share (endpoint_id, priority, count) CROSS JOIN LATERAL (
            SELECT d.id FROM webhook_deliveries d
            WHERE d.state = 'pending' AND (d.lease_until IS NULL OR d.lease_until <= :now)
                AND (d.endpoint_id, d.priority, d.next_attempt_at)
                    >= (share.endpoint_id, share.priority, CAST('-infinity' AS timestamptz))
                AND (d.endpoint_id, d.priority, d.next_attempt_at) <= (share.endpoint_id, share.priority, :now)
            ORDER BY d.endpoint_id, d.priority, d.next_attempt_at LIMIT share.count
            FOR UPDATE SKIP LOCKED
        ) AS d
    )
    UPDATE webhook_deliveries d SET lease_until = :until, lease_token = :token
    FROM webhook_endpoints e, events v
    WHERE d.id = ANY (ARRAY(SELECT id FROM taken))
        AND e.id = d.endpoint_id AND v.id = d.event AND e.status = 'enabled'
    RETURNING d.id, d.lease_token AS token, d.endpoint_id, e.agent_id, e.url, e.secret,
        CASE WHEN e.secret_before_until > :now THEN e.secret_before END AS secret_before,
        v.event_id, v.type, v.timestamp, v.data::text AS data, d.attempts, d.slow_retries, d.urgent_until,
        d.priority, e.failing_since IS NOT NULL AS failing
    """
).bindparams(
    bindparam("now", type_=_MOMENT),
    bindparam("until", type_=_MOMENT),
    bindparam("token", type_=Text),
    bindparam("endpoints", type_=ARRAY(Text)),
    bindparam("priorities", type_=ARRAY(SmallInteger)),
    bindparam("counts", type_=ARRAY(Integer)),
)


async def claim(tx: Tx, worker: str, lease_seconds: float, under_way: Collection[Claim] = ()) -> list[Claim]:
    """Lease deliveries that are due, as many as there is room for beside those that are `under_way`.

    Urgent ones and those to endpoints that are well come first; `domain.dispatch` says how many each may have.
    """
    due = (await tx.connection.execute(_COUNT_DUE, {"now": tx.now, "most": _FEW})).scalar_one()
    if not due:
        return []
    lanes = await _due_lanes(tx, few=due < _FEW)
    shares = share_out(lanes, [claimed.kind for claimed in under_way])
    return await _lease(tx, worker, shares, lease_seconds) if shares else []


async def _due_lanes(tx: Tx, *, few: bool) -> list[Lane]:
    values = {"now": tx.now, "an_agent": AN_AGENT_MAX, "most": _LANES_MAX}
    if few:
        found = await tx.connection.execute(_LANES_OF_FEW, values)
    else:
        found = await tx.connection.execute(_LANES_OF_MANY, values | {"an_endpoint": AN_ENDPOINT_MAX})
    return [
        Lane(Kind(row.id, row.agent_id, row.priority == URGENT, row.failing), row.priority, row.due_count)
        for row in found
    ]


async def _lease(tx: Tx, worker: str, shares: Sequence[Share], lease_seconds: float) -> list[Claim]:
    values = {
        "now": tx.now,
        "until": tx.now + timedelta(seconds=lease_seconds),
        "token": f"{worker}:{secrets.token_hex(8)}",
        "endpoints": [share.endpoint_id for share in shares],
        "priorities": [share.priority for share in shares],
        "counts": [share.count for share in shares],
    }
    found = [Claim(**row) for row in (await tx.connection.execute(_LEASE, values)).mappings()]
    return sorted(found, key=lambda claimed: (claimed.priority, claimed.id))


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
    held = outcome.claim
    if outcome.delivered or outcome.gone or held.type == TEST_EVENT:  # who asked for a test asks again
        return None
    behind = Attempts(held.attempts + 1, held.slow_retries)
    urgent = is_urgent(held.type)
    return next_retry(
        behind, now, urgent=urgent, deadline=held.urgent_until, retry_after=outcome.retry_after, draw=draw
    )


_END_ABANDONED = text(
    """
    WITH RECURSIVE waiting AS (
        (SELECT endpoint_id FROM webhook_deliveries WHERE state = 'pending'
         ORDER BY endpoint_id, priority, next_attempt_at LIMIT 1)
        UNION ALL
        SELECT following.* FROM waiting w CROSS JOIN LATERAL (
            SELECT d.endpoint_id FROM webhook_deliveries d WHERE d.state = 'pending' AND d.endpoint_id > w.endpoint_id
            ORDER BY d.endpoint_id, d.priority, d.next_attempt_at LIMIT 1
        ) AS following
    ), abandoned AS (
        SELECT d.id FROM waiting w JOIN webhook_endpoints e ON e.id = w.endpoint_id AND e.status <> 'enabled'
            CROSS JOIN LATERAL (
                SELECT id FROM webhook_deliveries
                WHERE endpoint_id = e.id AND state = 'pending' AND (lease_until IS NULL OR lease_until <= :now)
                ORDER BY endpoint_id, priority, next_attempt_at LIMIT :most
                FOR UPDATE SKIP LOCKED
            ) AS d
        LIMIT :most
    )
    UPDATE webhook_deliveries d
    SET state = 'failed', next_attempt_at = NULL, lease_until = NULL, lease_token = NULL,
        last_error = 'the webhook was ' || e.status
    FROM webhook_endpoints e
    WHERE d.id = ANY (ARRAY(SELECT id FROM abandoned)) AND e.id = d.endpoint_id
    """
).bindparams(bindparam("now", type_=_MOMENT), bindparam("most", type_=Integer))


async def end_abandoned(tx: Tx) -> int:
    """End deliveries that wait for endpoints that are disabled or deleted, a limited number; return how many.

    What is being sent just now is left to whoever sends it.
    """
    return (await tx.connection.execute(_END_ABANDONED, {"now": tx.now, "most": ENDED_AT_ONCE_MAX})).rowcount


async def count_tests(tx: Tx, endpoint_id: str) -> int:
    """Return how many test events wait for an endpoint."""
    columns = webhook_deliveries.c
    query = select(func.count()).where(
        columns.endpoint_id == endpoint_id, columns.priority == TEST, columns.state == "pending"
    )
    count: int = (await tx.connection.execute(query)).scalar_one()
    return count


# --- again


async def rearm(tx: Tx, delivery_id: int) -> None:
    """Send a delivery once more, now, whatever became of it; the schedule of retries begins anew.

    What is sent again goes after what is urgent for the first time.
    """
    columns = webhook_deliveries.c
    values = {"state": "pending", "slow_retries": 0, "next_attempt_at": tx.now, "delivered_at": None}
    values["priority"] = case((columns.priority == URGENT, ORDINARY), else_=columns.priority)
    await tx.connection.execute(update(webhook_deliveries).where(columns.id == delivery_id).values(values))


_RECOVER = _owned(
    """
    INSERT INTO webhook_deliveries AS d (endpoint_id, event, created_at, next_attempt_at)
    SELECT :endpoint_id, v.id, CAST(:now AS timestamptz), CAST(:now AS timestamptz)
    FROM events v LEFT JOIN webhook_deliveries b ON b.endpoint_id = :endpoint_id AND b.event = v.id
    WHERE v.{mine} AND v.timestamp >= :since AND (b.id IS NULL OR b.state = 'failed') AND v.type <> 'webhook.test'
      AND (CAST(:filters AS text[]) = '{{}}'
           OR CAST(:filters AS text[]) && ARRAY[v.type, split_part(v.type, '.', 1) || '.*'])
    ORDER BY v.sequence LIMIT :most
    ON CONFLICT (endpoint_id, event) DO UPDATE
    SET state = 'pending', priority = 1, slow_retries = 0, next_attempt_at = CAST(:now AS timestamptz)
    WHERE d.state = 'failed'
    """
)


async def recover(tx: Tx, endpoint_id: str, agent_id: str | None, filters: Sequence[str], since: datetime) -> int:
    """Queue again what an endpoint has missed since a moment, the oldest first; return how many, a limited number."""
    values = {"endpoint_id": endpoint_id, "filters": list(filters), "since": since} | _owner(agent_id)
    values |= {"now": tx.now, "most": RECOVERED_MAX}
    done = await tx.connection.execute(_RECOVER[agent_id is not None], values)
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
    """How many deliveries wait, when the oldest was made, and when the first fell due; None where none waits."""

    count: int
    made_at: datetime | None
    due_at: datetime | None


NOTHING_WAITS = Backlog(0, None, None)


async def read_backlog(tx: Tx) -> dict[int, Backlog]:
    """Return what waits for enabled endpoints, by priority: that looks at everything that waits."""
    columns = webhook_deliveries.c
    query = select(
        columns.priority, func.count(), func.min(columns.created_at), func.min(columns.next_attempt_at)
    ).join(webhook_endpoints, webhook_endpoints.c.id == columns.endpoint_id)
    query = query.where(columns.state == "pending", webhook_endpoints.c.status == "enabled")
    rows = await tx.connection.execute(query.group_by(columns.priority))
    return {priority: Backlog(*waits) for priority, *waits in rows}


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
