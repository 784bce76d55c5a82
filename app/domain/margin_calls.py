"""The life of a margin call, as one pure step: what to do next, given the call, the figures, and the time.

watching → noticed → open → cured, or expired → liquidating → completed. A timer carries no decision: the same step is
taken on fresh figures whenever one goes off, so that a late, an early or a doubled one does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from app.domain.book import AccountSettings
from app.domain.gates import TOLERANCE
from app.domain.health import Health
from app.domain.parameters import HealthPolicy
from app.domain.watch import HYSTERESIS

State = Literal["noticed", "open", "expired", "liquidating", "lapsed", "cured", "completed"]
Cause = Literal["utilization", "maintenance", "isolated", "fleet"]
_RANKS: dict[Cause, int] = {"isolated": 0, "utilization": 1, "maintenance": 1, "fleet": 2}
"""What goes before what: a call for the lesser becomes one for the greater."""

LIVE_STATES: tuple[State, ...] = ("noticed", "open", "expired", "liquidating")
"""States in which an account has a call; of the others it has had one."""

LAST_REMINDER = timedelta(seconds=30)
"""The last reminder goes out so long before the deadline, the first at half-time."""
HELD_BACK = timedelta(seconds=30)
"""How often a call is looked at that waits for its fleet's: where it waits no more it is looked at besides.

A fleet may have 1,000 that wait, and a worker decides on some 60 a second.
"""


@dataclass(frozen=True, slots=True)
class Call:
    """A live call. `reminders` counts those sent, `slices` what was closed; times are the database's.

    While liquidation orders wait at a venue, they have until `respond_by`, and `attempts` counts the requests for them.
    """

    state: State
    noticed_at: datetime
    opened_at: datetime | None = None
    deadline_at: datetime | None = None
    reminders: int = 0
    slices: int = 0
    attempts: int = 0
    respond_by: datetime | None = None
    cause: Cause = "utilization"

    @property
    def is_isolated(self) -> bool:
        """Whether it was made for isolated positions alone: the pool is neither judged by it nor closed for it."""
        return self.cause == "isolated"


@dataclass(frozen=True, slots=True)
class Situation:
    """What a call is judged on. `pool` is what is breached of the pooled book, None where nothing is.

    `isolated`: an isolated position is past saving. `is_clear`: the pool is below the breach level by more than a
    tremble. `anything_left`: something may be closed for this call. `waiting`: orders are out at a venue. `of_fleet`:
    the pool is a fleet's. `held_back`: whatever is closed is closed by the fleet's call, in its order.
    """

    pool: Cause | None
    isolated: bool
    is_clear: bool
    is_cured: bool
    may_stop: bool
    anything_left: bool
    waiting: bool = False
    of_fleet: bool = False
    held_back: bool = False

    @property
    def cause(self) -> Cause | None:
        """What a call is made for: the pool's breach goes before that of isolated positions."""
        if self.pool is not None:
            return "fleet" if self.of_fleet else self.pool
        return "isolated" if self.isolated else None


@dataclass(frozen=True, slots=True)
class Notice:
    """A breach was seen; it has to last until `until` before the call is made."""

    until: datetime


@dataclass(frozen=True, slots=True)
class Open:
    """The call is made; its owner has until the deadline."""

    deadline: datetime


@dataclass(frozen=True, slots=True)
class Remind:
    """A reminder is due, the `number`th."""

    number: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is due before `until` (None: before the figures change)."""

    until: datetime | None


@dataclass(frozen=True, slots=True)
class Become:
    """The call goes over into a state: lapsed, cured, expired, liquidating or completed."""

    state: State


@dataclass(frozen=True, slots=True)
class Liquidate:
    """One position, or a part of it, is to be closed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What waits at a venue is asked for again, the `attempt`th time: it was not filled in time."""

    attempt: int


Step = Notice | Open | Remind | Wait | Become | Liquidate | Request


def situation(
    health: Health,
    policy: HealthPolicy,
    *,
    leveraged: bool = True,
    isolated_breached: bool,
    anything_left: bool,
    waiting: bool = False,
) -> Situation:
    """Return what a call is judged on, from an account's health and whether an isolated position is past saving.

    Breach: utilization at the level, or equity below maintenance; never where nothing is `leveraged`, since all that
    is free may then be reserved. Cured and stopped: utilization at their levels or below, maintenance and isolated
    positions met. Source: docs/margin-calls.md, "Margin calls".
    """
    at_stake = leveraged and health.required_initial > 0.0
    short = at_stake and (health.insolvent or health.equity < health.required_maintenance)
    used = float("inf") if health.utilization is None else health.utilization
    pool: Cause | None = None
    if short:
        pool = "maintenance"
    elif at_stake and used >= policy.breach_utilization:
        pool = "utilization"
    sound = not health.insolvent and not short and not isolated_breached
    return Situation(
        pool=pool,
        isolated=isolated_breached,
        is_clear=sound and (not at_stake or used < policy.breach_utilization - HYSTERESIS),
        is_cured=sound and (not at_stake or used <= policy.cure_utilization * (1.0 + TOLERANCE)),
        may_stop=sound and (not at_stake or used <= policy.stop_utilization * (1.0 + TOLERANCE)),
        anything_left=anything_left,
        waiting=waiting,
    )


def step(call: Call | None, now_is: Situation, settings: AccountSettings, now: datetime) -> Step | None:
    """Return the next step of an account's call, None where there is nothing to do.

    A call that was made for isolated positions ends with them; a breach of the pool takes it over, with a new deadline,
    and is not cured before them. A breach of its fleet's pool takes over a master's own, which `goes_on` after it.
    Raises ValueError for a call that is over.
    """
    if call is None:
        return None if now_is.cause is None else _begin(now_is, settings, now)
    if call.state == "noticed":
        return _while_noticed(call, now_is, settings, now)
    if now_is.cause is not None and _RANKS[now_is.cause] > _RANKS[call.cause]:
        return _opened(settings, now)  # it is the pool's call from now on, with the pool's own time
    if call.state == "open":
        return _while_open(call, now_is, now)
    if call.state == "expired":
        return _while_expired(call, now_is, settings, now)
    if call.state == "liquidating":
        return _while_liquidating(call, now_is, now)
    raise ValueError(f"a call that is {call.state} takes no step")


def _may_wait(now_is: Situation) -> bool:
    """Whether the notice delay holds: equity below maintenance skips it, as an isolated position past saving does."""
    return now_is.pool != "maintenance" and not now_is.isolated


def _begin(now_is: Situation, settings: AccountSettings, now: datetime) -> Step:
    if _may_wait(now_is) and settings.notice_delay_seconds > 0:
        return Notice(now + timedelta(seconds=settings.notice_delay_seconds))
    return _opened(settings, now)


def _opened(settings: AccountSettings, now: datetime) -> Open:
    return Open(now + timedelta(seconds=settings.grace_period_seconds))


def _while_noticed(call: Call, now_is: Situation, settings: AccountSettings, now: datetime) -> Step:
    if now_is.is_clear:
        return Become("lapsed")
    due = call.noticed_at + timedelta(seconds=settings.notice_delay_seconds)
    if _may_wait(now_is) and now < due:
        return Wait(due)  # also where it trembles on the level: it would be noticed again at once
    return Become("lapsed") if now_is.cause is None else _opened(settings, now)


def _is_cured(call: Call, now_is: Situation) -> bool:
    """Whether what the call was made for is over: of an isolated position, that it is met or closed."""
    return now_is.cause is None if call.is_isolated else now_is.is_cured


def _while_open(call: Call, now_is: Situation, now: datetime) -> Step:
    if call.opened_at is None or call.deadline_at is None:
        raise ValueError("an open call has a deadline")
    if _is_cured(call, now_is):
        return Become("cured")
    if now >= call.deadline_at:
        return Become("expired")
    ahead = reminders(call.opened_at, call.deadline_at)[call.reminders :]
    if not ahead:
        return Wait(call.deadline_at)
    if now < ahead[0]:
        return Wait(ahead[0])
    # those that were slept through are not made up for
    passed = sum(1 for moment in ahead if moment <= now)
    return Remind(call.reminders + passed)


def _while_expired(call: Call, now_is: Situation, settings: AccountSettings, now: datetime) -> Step:
    if _is_cured(call, now_is):
        return Become("cured")
    if now_is.held_back:
        return Wait(now + HELD_BACK)
    return Become("liquidating") if settings.auto_liquidate else Wait(None)


def _while_liquidating(call: Call, now_is: Situation, now: datetime) -> Step:
    if now_is.waiting and call.slices == 0 and _is_cured(call, now_is):
        return Become("cured")  # nothing was sold yet: it is the owner's cure that came first
    if not now_is.isolated if call.is_isolated else now_is.may_stop:
        return Become("completed")
    if now_is.waiting:
        if call.respond_by is not None and now < call.respond_by:
            return Wait(call.respond_by)
        return Request(call.attempts + 1)
    if now_is.anything_left:
        return Wait(now + HELD_BACK) if now_is.held_back else Liquidate()
    # what is left is not ours to close: the call lives on, or the next look would begin another
    return Become("completed") if now_is.cause is None else Wait(None)


def due_by(call: Call, settings: AccountSettings) -> datetime:
    """Return a call's deadline; of one that is but noticed, the one that it would have at the earliest."""
    if call.deadline_at is not None:
        return call.deadline_at
    return call.noticed_at + timedelta(seconds=settings.notice_delay_seconds + settings.grace_period_seconds)


def goes_on(now_is: Situation, *, is_isolated: bool) -> bool:
    """Whether an account's own call goes on when the fleet's has ended that took its place: it is not cured either.

    `is_isolated`: it was made for isolated positions alone.
    """
    if now_is.cause is not None:
        return True
    return not is_isolated and now_is.anything_left and not now_is.is_cured


def reminders(opened_at: datetime, deadline_at: datetime) -> Sequence[datetime]:
    """Return when reminders are due: at half-time, and 30 s before the deadline where that is later."""
    half = opened_at + (deadline_at - opened_at) / 2
    last = deadline_at - LAST_REMINDER
    if deadline_at <= opened_at:
        return ()
    return (half, last) if last > half else (half,)
