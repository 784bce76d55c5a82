"""Webhook endpoints: where an agent wants its events sent, under which secret, and when that is given up."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, func, insert, select, text, update

from app.db.event_tables import webhook_endpoints
from app.db.session import Tx
from app.domain.webhooks import FAILING_DAYS_MAX, SECRET_BYTES, TEST_EVENT, format_secret, is_filter
from app.errors import NotFoundError, conflict, invalid
from app.services import audit, events, outbox
from app.services.addresses import checked_url
from app.services.outbox import Delivery, Outcome

ENDPOINTS_MAX = 10
"""Endpoints of one agent."""
FILTERS_MAX = 50
SECRET_OVERLAP_HOURS = 24
RECOVER_DAYS_MAX = 30
TESTS_MAX = 5
"""Test events that may wait for one endpoint: each takes a slot for as long as the receiver makes it last."""

_ENDPOINTS_LOCK = 7_165_002
"""Of `pg_advisory_xact_lock`, with the agent's hash: its endpoints are counted and added by one at a time."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A stored endpoint, without its secrets."""

    id: str
    seq: int
    agent_id: str | None
    url: str
    filters: tuple[str, ...]
    status: str
    reason: str | None
    failing_since: datetime | None
    secret_before_until: datetime | None
    created_at: datetime


_SECRETS = ("secret", "secret_before")
_SHOWN = tuple(column for column in webhook_endpoints.c if column.name not in _SECRETS)


def _new_secret() -> str:
    return format_secret(secrets.token_bytes(SECRET_BYTES))


def _mine(agent_id: str | None) -> ColumnElement[bool]:
    """Return the condition that an endpoint is the agent's, or (None) the service's, and is still there."""
    return (webhook_endpoints.c.agent_id == agent_id) & (webhook_endpoints.c.status != "deleted")


async def create(
    tx: Tx, agent_id: str | None, url: str, filters: Sequence[str] = (), *, allow_private: bool = False
) -> tuple[Endpoint, str]:
    """Add an endpoint and return it with its secret, which is not shown again.

    Raises InvalidError for a URL or a filter that is none, ConflictError `too_many_webhooks`.
    """
    address = checked_url(url, allow_private=allow_private)
    if len(filters) > FILTERS_MAX:
        raise invalid("/filters", "too_many", f"At most {FILTERS_MAX} filters an endpoint.")
    for i, pattern in enumerate(filters):
        if not is_filter(pattern):
            raise invalid(f"/filters/{i}", "unknown_event", "a filter is an event's type, or a family like zone.*")
    await tx.connection.execute(select(func.pg_advisory_xact_lock(_ENDPOINTS_LOCK, func.hashtext(agent_id or ""))))
    held = await tx.connection.execute(select(func.count()).select_from(webhook_endpoints).where(_mine(agent_id)))
    if held.scalar_one() >= ENDPOINTS_MAX:
        raise conflict("/url", "too_many_webhooks", f"an agent has at most {ENDPOINTS_MAX} webhooks")
    endpoint_id, secret = f"wh_{secrets.token_hex(10)}", _new_secret()
    row = {
        "id": endpoint_id,
        "agent_id": agent_id,
        "url": address,
        "filters": list(dict.fromkeys(filters)),
        "secret": secret,
        "status": "enabled",
        "created_at": tx.now,
    }
    made = (await tx.connection.execute(insert(webhook_endpoints).values(row).returning(*_SHOWN))).mappings().one()
    await audit.record(tx, "webhook.created", endpoint_id, agent_id, url=address)
    return Endpoint(**(dict(made) | {"filters": tuple(made["filters"])})), secret


async def list_endpoints(tx: Tx, agent_id: str | None) -> list[Endpoint]:
    """Return every endpoint of an agent, oldest first: a limited number."""
    query = select(*_SHOWN).where(_mine(agent_id)).order_by(webhook_endpoints.c.seq)
    rows = (await tx.connection.execute(query)).mappings()
    return [Endpoint(**(dict(row) | {"filters": tuple(row["filters"])})) for row in rows]


async def get(tx: Tx, agent_id: str | None, endpoint_id: str, *, lock: bool = False) -> Endpoint:
    """Return an endpoint of an agent, or (None) of the service. Raises NotFoundError."""
    query = select(*_SHOWN).where(_mine(agent_id), webhook_endpoints.c.id == endpoint_id)
    if lock:
        query = query.with_for_update(key_share=True)  # events go on being queued for it
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such webhook.", code="webhook_not_found")
    return Endpoint(**(dict(row) | {"filters": tuple(row["filters"])}))


async def delete(tx: Tx, agent_id: str | None, endpoint_id: str) -> None:
    """Delete an endpoint and its secrets: nothing is sent to it any more; the log of what was sent stays.

    What waits for it is ended by the workers, batch by batch: it may be more than one transaction can change.
    """
    await get(tx, agent_id, endpoint_id, lock=True)
    gone = {"status": "deleted", "reason": None, "secret": None, "secret_before": None, "secret_before_until": None}
    await _update(tx, endpoint_id, **gone)
    await audit.record(tx, "webhook.deleted", endpoint_id, agent_id)


async def rotate(tx: Tx, agent_id: str | None, endpoint_id: str) -> tuple[Endpoint, str]:
    """Give an endpoint a new secret, shown once; for a day its webhooks are signed with the one before as well."""
    await get(tx, agent_id, endpoint_id, lock=True)
    secret, until = _new_secret(), tx.now + timedelta(hours=SECRET_OVERLAP_HOURS)
    await _update(tx, endpoint_id, secret_before=webhook_endpoints.c.secret, secret=secret, secret_before_until=until)
    await audit.record(tx, "webhook.rotated", endpoint_id, agent_id)
    return await get(tx, agent_id, endpoint_id), secret


async def enable(tx: Tx, agent_id: str | None, endpoint_id: str) -> Endpoint:
    """Send to an endpoint again that was disabled; what it missed is sent when it is recovered."""
    if (await get(tx, agent_id, endpoint_id, lock=True)).status == "disabled":
        await _update(tx, endpoint_id, status="enabled", reason=None, failing_since=None)
        await audit.record(tx, "webhook.enabled", endpoint_id, agent_id)
    return await get(tx, agent_id, endpoint_id)


async def send_test(tx: Tx, agent_id: str | None, endpoint_id: str) -> Delivery:
    """Queue an event `webhook.test` for this endpoint alone, to be tried once.

    Raises ConflictError where it is disabled, or as many wait as may.
    """
    await _require_enabled(tx, agent_id, endpoint_id)
    if await outbox.count_tests(tx, endpoint_id) >= TESTS_MAX:
        raise conflict("/tests", "too_many_tests", f"{TESTS_MAX} test events wait for this webhook")
    written = await events.write(tx, TEST_EVENT, agent_id, {"webhook_id": endpoint_id})
    return await outbox.get_delivery(tx, agent_id, await outbox.enqueue_test(tx, written.number, endpoint_id))


async def list_deliveries(
    tx: Tx, agent_id: str | None, endpoint_id: str, limit: int, before: int | None = None, state: str | None = None
) -> list[Delivery]:
    """Return an endpoint's deliveries, newest first. Raises NotFoundError."""
    await get(tx, agent_id, endpoint_id)
    return await outbox.list_deliveries(tx, endpoint_id, limit, before, state)


async def replay(tx: Tx, agent_id: str | None, delivery_id: int) -> Delivery:
    """Send one delivery again, under its event's own id. Raises ConflictError where its endpoint is disabled."""
    found = await outbox.get_delivery(tx, agent_id, delivery_id)
    await _require_enabled(tx, agent_id, found.endpoint_id)
    await outbox.rearm(tx, delivery_id)
    return await outbox.get_delivery(tx, agent_id, delivery_id)


async def recover(tx: Tx, agent_id: str | None, endpoint_id: str, since: datetime) -> int:
    """Send again what failed, or was never queued, since a moment; return how many, at most a limited number.

    Raises InvalidError for a moment too long ago, ConflictError where the endpoint is disabled.
    """
    if not tx.now - timedelta(days=RECOVER_DAYS_MAX) <= since <= tx.now:
        raise invalid("/since", "out_of_range", f"since is within the last {RECOVER_DAYS_MAX} days")
    endpoint = await _require_enabled(tx, agent_id, endpoint_id)
    return await outbox.recover(tx, endpoint_id, agent_id, endpoint.filters, since)


async def _require_enabled(tx: Tx, agent_id: str | None, endpoint_id: str) -> Endpoint:
    endpoint = await get(tx, agent_id, endpoint_id, lock=True)
    if endpoint.status != "enabled":
        raise conflict("/status", "webhook_disabled", f"the webhook is disabled: {endpoint.reason}")
    return endpoint


# --- what a worker found


_WAIT_BRIEFLY = text("SET LOCAL lock_timeout = '1s'")
"""An endpoint that somebody holds for longer holds up the others that are recorded with it."""


async def record(tx: Tx, outcomes: Sequence[Outcome], draw: Callable[[], float]) -> int:
    """Write what attempts came to: deliveries done, to be tried again or failed; endpoints failing or disabled.

    What was leased to another worker meanwhile only goes into the log. `draw` gives numbers in [0, 1). Return how
    many endpoints were disabled.
    """
    await tx.connection.execute(_WAIT_BRIEFLY)
    locked = await _lock_touched(tx, outcomes)
    held = await outbox.settle(tx, outcomes, draw)
    counted = [outcome for outcome in outcomes if outcome.claim.id in held]
    well = {outcome.claim.endpoint_id for outcome in counted if outcome.delivered}
    columns = webhook_endpoints.c
    if well & locked:
        healed = update(webhook_endpoints).where(columns.id.in_(well & locked), columns.failing_since.is_not(None))
        await tx.connection.execute(healed.values(failing_since=None))
    ill = {o.claim.endpoint_id for o in counted if not o.delivered} - well
    if ill:
        fallen = update(webhook_endpoints).where(columns.id.in_(ill), columns.failing_since.is_(None))
        await tx.connection.execute(fallen.values(failing_since=tx.now))
    gone = {o.claim.endpoint_id for o in counted if o.gone}
    return await _disable_lost(tx, ill | gone, gone)


async def _lock_touched(tx: Tx, outcomes: Sequence[Outcome]) -> set[str]:
    """Lock the endpoints that the outcomes may change, all at once in one order, and return them.

    Workers that record for the same endpoints take turns, whichever of them fail and whichever are well again.
    """
    columns = webhook_endpoints.c
    failed = {o.claim.endpoint_id for o in outcomes if not o.delivered}
    delivered = {o.claim.endpoint_id for o in outcomes if o.delivered}
    touched = columns.id.in_(failed) | (columns.id.in_(delivered) & columns.failing_since.is_not(None))
    query = select(columns.id).where(touched).order_by(columns.id).with_for_update(key_share=True)
    return set((await tx.connection.execute(query)).scalars())


async def _disable_lost(tx: Tx, suspects: set[str], gone: set[str]) -> int:
    """Disable what answered 410, and what has failed for days, and tell their agents; return how many."""
    if not suspects:
        return 0
    columns = webhook_endpoints.c
    lost = columns.id.in_(gone) | (columns.failing_since <= tx.now - timedelta(days=FAILING_DAYS_MAX))
    query = select(columns.id, columns.agent_id, columns.url, columns.failing_since)
    query = query.where(columns.id.in_(suspects), columns.status == "enabled", lost)
    found = (await tx.connection.execute(query.order_by(columns.agent_id, columns.id))).all()
    for row in found:
        reason = "it answered 410 Gone" if row.id in gone else f"every attempt of {FAILING_DAYS_MAX} days failed"
        await _update(tx, row.id, status="disabled", reason=reason)
        told = {"webhook_id": row.id, "url": row.url, "reason": reason, "failing_since": row.failing_since}
        await events.emit(tx, "webhook.disabled", row.agent_id, told)
    return len(found)


async def _update(tx: Tx, endpoint_id: str, **values: object) -> None:
    await tx.connection.execute(update(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id).values(**values))
