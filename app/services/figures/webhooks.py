"""Webhooks that wait to be delivered, by how urgent they are."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from prometheus_client import Metric

from app.db.session import Tx
from app.domain.webhooks import ORDINARY, TEST, URGENT
from app.services import outbox
from app.services.figures.keep import Figure, Values, gauge, seconds_since

EVERY_SECONDS = 1.0
LANES = {URGENT: "margin_call", ORDINARY: "other", TEST: "test"}


async def take(tx: Tx, _: Values) -> Values:
    """Return by lane how many wait, since when the oldest exists, and since when the first has been due."""
    backlog = await outbox.read_backlog(tx)
    return {
        name: {"count": lane.count, "made_at": _unix(lane.made_at), "due_at": _unix(lane.due_at)}
        for priority, name in LANES.items()
        for lane in [backlog.get(priority, outbox.NOTHING_WAITS)]
    }


def _unix(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def show(values: Values, now: datetime) -> Iterable[Metric]:
    """Return the series of the backlog."""
    lanes = values.items()
    yield gauge(
        "primerisk_webhooks_pending", "Webhooks to be delivered, by lane.", {n: v["count"] for n, v in lanes}, "lane"
    )
    yield gauge(
        "primerisk_webhook_oldest_undelivered_seconds",
        "Age of the oldest webhook that is still to be delivered, by lane.",
        {name: seconds_since(lane["made_at"], now) for name, lane in lanes},
        "lane",
    )
    yield gauge(
        "primerisk_webhook_lag_seconds",
        "How long the webhook that waits the longest has been due, by lane.",
        {name: seconds_since(lane["due_at"], now) for name, lane in lanes},
        "lane",
    )


FIGURE = Figure("webhooks", EVERY_SECONDS, take, show)
