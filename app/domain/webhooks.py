"""What a webhook is: its events, who wants which, how it is signed, and when it is tried again.

Signatures are those of Standard Webhooks 1.0 (https://www.standardwebhooks.com), scheme v1: HMAC-SHA256.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

EVENT_TYPES = frozenset(
    {
        "margin_call.opened",
        "margin_call.reminded",
        "margin_call.cured",
        "margin_call.expired",
        "liquidation.requested",
        "liquidation.executed",
        "liquidation.completed",
        "liquidation.exhausted",
        "zone.changed",
        "trailing_stop.breached",
        "drawdown.changed",
        "market.stale",
        "loan.opened",
        "loan.recalled",
        "loan.returned",
        "loan.collateral_low",
        "loan.liquidated",
        "escrow.funded",
        "escrow.accepted",
        "escrow.disputed",
        "escrow.released",
        "escrow.refunded",
        "escrow.cancelled",
        "escrow.resolved",
        "netting.proposed",
        "netting.activated",
        "netting.booked",
        "netting.settled",
        "netting.left",
        "netting.defaulted",
        "netting.ended",
        "fleet.zone_changed",
        "fleet.drift",
        "fleet.member_joined",
        "fleet.member_left",
        "fleet.delegation_changed",
        "fleet.member_capped",
        "fleet.written_off",
        "fleet.dry_powder_released",
        "fleet.dry_powder_restored",
        "webhook.disabled",
        "webhook.test",
    }
)
EVENT_FAMILIES = frozenset(name.partition(".")[0] for name in EVENT_TYPES)
URGENT_FAMILIES = ("margin_call", "liquidation")
TEST_EVENT = "webhook.test"

URGENT, ORDINARY, TEST = range(3)
"""Priorities of deliveries, the first sent first."""

SECRET_PREFIX = "whsec_"  # noqa: S105  what secrets begin with
SECRET_BYTES = 32


def is_filter(pattern: str) -> bool:
    """Tell whether a filter is one: an event's type, or a family such as `margin_call.*`."""
    return pattern in EVENT_TYPES or (pattern.endswith(".*") and pattern.removesuffix(".*") in EVENT_FAMILIES)


def patterns_of(event_type: str) -> tuple[str, str]:
    """Return the filters that let an event through; an endpoint without filters takes every event."""
    return event_type, event_type.partition(".")[0] + ".*"


# --- signatures


def format_secret(raw: bytes) -> str:
    """Return a secret as its owner keeps it."""
    return SECRET_PREFIX + base64.b64encode(raw).decode()


def signatures(secrets: Collection[str], event_id: str, timestamp: int, body: bytes) -> str:
    """Return the header `webhook-signature`: one signature a secret, of id, Unix seconds and the body's bytes."""
    signed = f"{event_id}.{timestamp}.".encode() + body
    keys = (base64.b64decode(secret.removeprefix(SECRET_PREFIX)) for secret in secrets)
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    return " ".join("v1," + base64.b64encode(digest).decode() for digest in digests)


# --- retries


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a delivery that failed is tried again; seconds from the attempt before. The first attempt is at once.

    Urgent events run through `urgent_seconds`, then every `urgent_every_seconds` as long as their deadline is ahead.
    What is not urgent, or no longer, runs through `slow_seconds` (spread by `jitter`), and then has failed.
    """

    urgent_seconds: Sequence[float] = (2, 5, 10, 20, 40)
    urgent_every_seconds: float = 60
    slow_seconds: Sequence[float] = (5, 300, 1_800, 7_200, 18_000, 36_000, 36_000)
    jitter: float = 0.1
    urgent_retry_after_seconds_max: float = 60
    slow_retry_after_seconds_max: float = 36_000


SCHEDULE = Schedule()
FAILING_DAYS_MAX = 5
"""Days of failures alone after which an endpoint is disabled."""


@dataclass(frozen=True, slots=True)
class Attempts:
    """What a delivery has behind it: attempts since it was last armed, and how many of them were slow retries."""

    made: int
    slow: int


@dataclass(frozen=True, slots=True)
class Retry:
    """The next attempt, and the slow retries up to and with it."""

    at: datetime
    slow: int


def is_urgent(event_type: str) -> bool:
    """Tell whether the event's time is short."""
    return event_type.partition(".")[0] in URGENT_FAMILIES


def priority_of(event_type: str) -> int:
    """Return the priority of the first delivery of an event."""
    if event_type == TEST_EVENT:
        return TEST
    return URGENT if is_urgent(event_type) else ORDINARY


def next_retry(
    behind: Attempts,
    now: datetime,
    *,
    urgent: bool,
    deadline: datetime | None = None,
    retry_after: timedelta | None = None,
    draw: float = 0.5,
    schedule: Schedule = SCHEDULE,
) -> Retry | None:
    """Return when to try again after a failure at `now`, or None where the schedule has come to its end.

    `retry_after` is what the receiver asked for: it makes a wait longer, up to a limit, never shorter. `draw` in
    [0, 1) spreads the slow retries.
    """
    asked = retry_after.total_seconds() if retry_after is not None else 0.0
    if urgent and behind.slow == 0:
        seconds = _urgent_seconds(behind.made, now, deadline, schedule)
        if seconds is not None:
            seconds = max(seconds, min(asked, schedule.urgent_retry_after_seconds_max))
            return Retry(now + timedelta(seconds=seconds), 0)
    if behind.slow >= len(schedule.slow_seconds):
        return None
    seconds = schedule.slow_seconds[behind.slow] * (1 + schedule.jitter * (2 * draw - 1))
    seconds = max(seconds, min(asked, schedule.slow_retry_after_seconds_max))
    return Retry(now + timedelta(seconds=seconds), behind.slow + 1)


def _urgent_seconds(made: int, now: datetime, deadline: datetime | None, schedule: Schedule) -> float | None:
    if made <= len(schedule.urgent_seconds):
        return schedule.urgent_seconds[made - 1]
    every = schedule.urgent_every_seconds
    return every if deadline is not None and now + timedelta(seconds=every) <= deadline else None


def read_retry_after(text: str, now: datetime) -> timedelta | None:
    """Return the wait that a Retry-After header asks for, in seconds or as a date; None where it says neither."""
    if text.isascii() and text.isdecimal():
        return timedelta(seconds=min(int(text[:9]), 10**8))
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):  # what the parser raises depends on the text
        return None
    return max(timedelta(0), (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - now)
