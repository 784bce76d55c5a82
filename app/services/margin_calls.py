"""Margin calls: noticed, made, reminded of, cured or expired, and what is liquidated. Decided under the book's lock.

`decide` is the one place that moves a call on. The screen and the timers only name accounts to it: it locks the book,
reads it and the market afresh, asks the pure step, and writes the call, its timer, what was closed and the events that
tell of it in one transaction. Asking twice, late or for nothing does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy.exc import DBAPIError

from app import telemetry
from app.db.session import Tx
from app.domain.book import ZERO, Book, OpenPosition, PendingOrder
from app.domain.health import Health
from app.domain.liquidate import Slice, Target
from app.domain.margin_calls import (
    Become,
    Cause,
    Liquidate,
    Notice,
    Open,
    Remind,
    Request,
    Situation,
    Step,
    Wait,
    situation,
    step,
)
from app.domain.money import plain, to_decimal
from app.domain.moves import SETTLEMENT_DECIMALS
from app.domain.quote import AccountFigures
from app.domain.trade import Trade
from app.domain.watch import Band
from app.errors import InvalidError, PrimeriskError
from app.services import (
    accounts,
    audit,
    book,
    calls,
    events,
    liquidation,
    prevention,
    prices,
    recalls,
    staleness,
    venue,
    watch,
)
from app.services.calls import StoredCall
from app.services.liquidation import Rules
from app.services.margin import Scene, Scenes
from app.services.venue import Fill, Recorded
from app.services.wallet import Names

log = logging.getLogger(__name__)

STEPS_MAX = 8
"""Changes of state in one decision: more than the longest way through a life."""
STEP_SHARE_MIN = 0.005
"""A step of liquidation closes at least this share of what may be closed, however small the positions are."""
SLICES_A_STEP_MAX, POSITIONS_USUAL = 3_000, 15
"""Slices in one step, times the positions of the book that each of them assesses: 200 of a usual book."""
RETRY_STALE = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Decided:
    """What came of a decision: the call as it now stands, the events that were written, what is told of its levels.

    `levels` are the ranks of zone and alert level, None where a price is missing; `band`: of equity, within which
    there is nothing to tell of the drawdown, None where it is not followed. It `waits` where prices are stale: nothing
    was decided. `escalated`: a venue was asked once more after as many requests, or as much time, as the rules have.
    `priced_at`: when the newest price arrived that the account depends on, where a call has begun.
    """

    call: StoredCall | None
    told: tuple[str, ...] = ()
    levels: tuple[int, int] | None = None
    band: Band | None = None
    waits: bool = False
    escalated: bool = False
    priced_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class _Case:
    """A decision under way: the locked book, the market, the figures, the call as it now stands."""

    held: Book
    scene: Scene
    figures: AccountFigures
    call: StoredCall | None
    stored: StoredCall | None = None
    """The call as it is in the table: what a decision makes of it is written once, at its end."""
    stale: frozenset[str] = frozenset()
    in_doubt: bool = False
    """Whether so much is stale that figures as they are decide nothing for the better."""
    told: tuple[str, ...] = ()
    escalated: bool = False

    @property
    def targets(self) -> list[Target]:
        """What may be closed for the call."""
        alone = self.call is not None and self.call.cause == "isolated"
        return liquidation.targets(self.held, self.figures, isolated_alone=alone, stale=self.stale)


async def decide(tx: Tx, scenes: Scenes, agent_id: str, rules: Rules) -> Decided:
    """Move an account's call on as far as it goes now, and tell what has changed of its levels.

    One position is closed, or as many small ones as make STEP_SHARE_MIN of the book; where more are to follow the call
    is due again at once. Where the breach hangs on a stale price, or a price is missing, nothing is decided.
    """
    held = await book.hold(tx, agent_id)
    scene = await scenes.at(tx)
    call = None if held.live_call is None else await calls.live(tx, agent_id)
    if call is not None:
        telemetry.note(margin_call_id=call.id)
    try:
        figures = scene.figures(held)
    except InvalidError:
        return Decided(await calls.save(tx, call, _postponed(call, scene.now)))
    stale = staleness.stale(scene, figures)
    in_doubt = not staleness.is_grain(figures, staleness.at_best(scene, held, figures, stale))
    case = _Case(held, scene, figures, call, call, stale, in_doubt)
    if case.in_doubt and _hangs_on_stale(case):
        case = await _saved(tx, replace(case, call=_postponed(call, scene.now)))
        return await _look(tx, case, rules)
    case = await _without_moot(tx, case)
    for _ in range(STEPS_MAX):
        settled, case = await _advance(tx, case, rules)
        if settled:
            break
    case = await _saved(tx, case)
    if (None if case.call is None else case.call.state) != (None if call is None else call.state):
        await accounts.lock_account(tx, agent_id)  # the screen hears of it by the book's version
    decided = await _look(tx, case, rules)
    if call is None and case.call is not None:
        return replace(decided, priced_at=await prices.last_received(tx, list(figures.prices)))
    return decided


async def _look(tx: Tx, case: _Case, rules: Rules) -> Decided:
    """Tell what has changed of the account's levels, and cut what its drawdown ladder asks for."""
    held, scene, figures = case.held, case.scene, case.figures
    policy = held.settings.policy(scene.market.parameters.policy)
    seen = await watch.look(tx, held, figures, policy, sorted(case.stale), is_sure=not case.in_doubt)
    is_left_alone = case.in_doubt or (case.call is not None and case.call.state in ("expired", "liquidating"))
    if not is_left_alone and prevention.is_due(held, seen):
        try:
            async with tx.connection.begin_nested():  # whatever becomes of a cut, the call stands
                await prevention.step_down(tx, scene, held, figures, seen, rules.slippage, case.stale)
        except (PrimeriskError, DBAPIError):
            log.exception("the drawdown ladder of %s can't be applied", held.agent_id)
    band = watch.band_of(held, seen, policy)
    return Decided(case.call, case.told, seen.levels, band, waits=case.in_doubt, escalated=case.escalated)


async def _without_moot(tx: Tx, case: _Case) -> _Case:
    """Cancel liquidation orders that ask for more than there now is: the next slice is chosen anew."""
    moot = [] if case.call is None else liquidation.moot(case.held, case.call.id)
    return replace(case, held=await venue.withdraw(tx, case.held, moot, "there is less to reduce")) if moot else case


async def _advance(tx: Tx, case: _Case, rules: Rules) -> tuple[bool, _Case]:  # noqa: PLR0911  one a kind of step
    """Take one step; return whether that is all for now."""
    call, now = case.call, case.scene.now
    judged, what = _situation(case), _next(case)
    if what is None:
        return True, case
    if isinstance(what, Notice | Open) and call is None:
        call = _begun(case, judged.cause)
    if call is None:
        raise RuntimeError("a step of a call that is not there")
    match what:
        case Notice():
            moved = replace(call, next_action_at=what.until)
            return True, replace(case, call=moved)
        case Open():
            return False, _with(case, await _open(tx, case, call, what, judged), "margin_call.opened")
        case Remind():
            moved = replace(call, reminders=what.number, next_action_at=now)
            await _tell(tx, "margin_call.reminded", _figures(case), moved)
            return False, _with(case, moved, "margin_call.reminded")
        case Wait():
            return True, await _wait(tx, case, call, what, judged)
        case Become():
            return await _become(tx, case, call, what)
        case Request():
            return True, await _ask(tx, case, call, rules, what.attempt)
        case _:
            return True, await _try_to_liquidate(tx, replace(case, call=call), call, rules)


async def _wait(tx: Tx, case: _Case, call: StoredCall, what: Wait, judged: Situation) -> _Case:
    """Wait; and tell once where nothing is left to close although the breach stands, with what is not covered."""
    is_exhausted = call.state == "liquidating" and not judged.anything_left and not judged.waiting and not case.in_doubt
    if not is_exhausted:
        return replace(case, call=replace(call, next_action_at=what.until))
    now, uncovered = case.scene.now, _uncovered(case.figures)
    moved = replace(call, next_action_at=what.until, uncovered=uncovered, exhausted_at=call.exhausted_at or now)
    if call.exhausted_at is not None:
        return replace(case, call=moved)
    await _tell(tx, "liquidation.exhausted", _figures(case), moved, deficit=plain(moved.lost))
    await audit.record(tx, "margin_call.exhausted", moved.id, moved.agent_id, deficit=str(moved.lost))
    return _with(case, moved, "liquidation.exhausted")


def _begun(case: _Case, cause: Cause | None) -> StoredCall:
    if cause is None:
        raise RuntimeError("a call without a cause")
    return StoredCall(
        id=f"call_{secrets.token_hex(10)}",
        agent_id=case.held.agent_id,
        state="noticed",
        cause=cause,
        noticed_at=case.scene.now,
        next_action_at=case.scene.now,
        figures=_figures(case),
    )


async def _open(tx: Tx, case: _Case, call: StoredCall, what: Open, judged: Situation) -> StoredCall:
    moved = replace(
        call,
        state="open",
        cause=judged.cause or call.cause,
        opened_at=case.scene.now,
        deadline_at=what.deadline,
        next_action_at=what.deadline,
        reminders=0,
        expired_at=None,
        figures=_figures(case),
    )
    # in a thread: it assesses the book several times, and the process may have requests to answer
    cure = await asyncio.to_thread(liquidation.cures, case.held, case.scene, case.figures)
    asked_back = await recalls.arm(tx, case.scene, case.held, case.figures, moved.id, moved.cause)
    await _tell(tx, "margin_call.opened", _figures(case), moved, cure=cure, recalls=asked_back)
    await audit.record(tx, "margin_call.opened", moved.id, moved.agent_id, cause=moved.cause)
    return moved


async def _become(tx: Tx, case: _Case, call: StoredCall, what: Become) -> tuple[bool, _Case]:
    now = case.scene.now
    match what.state:
        case "expired":
            # from now on the account may only reduce
            case, cancelled = await _withdraw(tx, case, [o for o in case.held.pending if not o.reduce_only])
            moved = replace(call, state="expired", expired_at=now, next_action_at=now)
            held, offers = await recalls.withdraw_offers(tx, case.scene, case.held, call.id, call.cause)
            asked_back = await recalls.arm(tx, case.scene, held, case.figures, call.id, call.cause)
            case = replace(case, held=held)
            told = {"cancelled_orders": cancelled, "cancelled_offers": offers, "recalls": asked_back}
            await _tell(tx, "margin_call.expired", _figures(case), moved, **told)
            return False, _with(case, moved, "margin_call.expired")
        case "liquidating":
            return False, replace(case, call=replace(call, state="liquidating", next_action_at=now))
        case "completed":
            case, cancelled = await _withdraw(tx, case, case.held.requested(call.id))
            uncovered = max(call.uncovered, _uncovered(case.figures))
            moved = _ended(call, "completed", now, uncovered=uncovered)
            told = {"deficit": plain(moved.lost), "slices": moved.slices, "cancelled_orders": cancelled}
            await _tell(tx, "liquidation.completed", _figures(case), moved, **told)
        case "cured":
            case, cancelled = await _withdraw(tx, case, case.held.requested(call.id))
            moved = _ended(call, "cured", now)
            await _tell(tx, "margin_call.cured", _figures(case), moved, cancelled_orders=cancelled)
        case _:
            moved = _ended(call, "lapsed", now)
    await audit.record(tx, f"margin_call.{moved.state}", moved.id, moved.agent_id, deficit=str(moved.lost))
    kind = {"completed": "liquidation.completed", "cured": "margin_call.cured"}.get(moved.state)
    return True, _with(case, moved, *(() if kind is None else (kind,)))


def _with(case: _Case, call: StoredCall, *told: str) -> _Case:
    return replace(case, call=call, told=(*case.told, *told))


async def _withdraw(tx: Tx, case: _Case, pending: list[PendingOrder]) -> tuple[_Case, list[str]]:
    held = await venue.withdraw(tx, case.held, pending, "margin call")
    return replace(case, held=held), [order.id for order in pending]


def _uncovered(figures: AccountFigures) -> Decimal:
    """Return how far equity is below zero, USD."""
    return max(ZERO, to_decimal(round(-figures.equity, SETTLEMENT_DECIMALS)))


def _ended(call: StoredCall, state: str, now: datetime, **values: Any) -> StoredCall:
    return replace(call, state=state, ended_at=now, next_action_at=None, **values)


def _situation(case: _Case) -> Situation:
    """Return what the call is judged on. Of the pool nothing is breached that a stale price might make good."""
    judged = _judged(case, case.figures.health)
    return replace(judged, pool=_judged(case, _at_best(case)).pool) if case.in_doubt else judged


def _judged(case: _Case, health: Health) -> Situation:
    held, figures = case.held, case.figures
    doomed = liquidation.targets(held, figures, isolated_alone=True, stale=case.stale)
    return situation(
        health,
        held.settings.policy(case.scene.market.parameters.policy),
        leveraged=held.is_leveraged,
        isolated_breached=bool(doomed),
        anything_left=bool(case.targets),
        waiting=case.call is not None and bool(held.requested(case.call.id)),
    )


def _at_best(case: _Case) -> Health:
    return staleness.at_best(case.scene, case.held, case.figures, case.stale)


def _hangs_on_stale(case: _Case) -> bool:
    """Whether there is nothing to do that does not depend on a stale price: no breach, and no call to end."""
    nothing_at_stake = case.call is not None and case.figures.health.required_initial == 0.0
    return _situation(case).cause is None and not nothing_at_stake


async def _try_to_liquidate(tx: Tx, case: _Case, call: StoredCall, rules: Rules) -> _Case:
    """Liquidate; what was decided on the way there stands, whatever becomes of it: its owner is to hear of the call.

    What can't be booked, at an absurd price, is then tried alone, and put off.
    """
    if case.stored is not None and case.stored.state == "liquidating":
        return await _liquidate(tx, case, call, rules)
    try:
        async with tx.connection.begin_nested():
            return await _liquidate(tx, case, call, rules)
    except (PrimeriskError, DBAPIError):
        log.exception("nothing of %s can be liquidated now", case.held.agent_id)
        return case


async def _liquidate(tx: Tx, case: _Case, call: StoredCall, rules: Rules) -> _Case:
    """Close what is next, and look again at once; or ask the venue for it.

    Where it is a small part of the book, what comes after it as well: dust would hold up the rest.
    """
    if await recalls.are_awaited(tx, case.held, call.expired_at, case.scene.now):
        return replace(case, call=replace(call, next_action_at=case.scene.now + recalls.RETRY))
    await accounts.lock_account(tx, case.held.agent_id)
    case = await _saved(tx, case)  # orders refer to it
    call = case.call or call
    least = STEP_SHARE_MIN * sum(target.notional for target in case.targets)
    closed = 0.0
    for _ in range(max(1, SLICES_A_STEP_MAX // max(POSITIONS_USUAL, len(case.held.positions)))):
        chosen = liquidation.next_slice(case.held, case.scene, case.figures, rules, case.targets)
        target = chosen.target.item
        if case.held.settings.execution == "venue" and isinstance(target, OpenPosition):
            held, cancelled = await liquidation.request(tx, case.held, chosen, target, call.id)
            return await _ask(tx, replace(case, held=held), call, rules, 1, cancelled)
        case, call = await _close(tx, case, call, chosen, rules)
        closed += chosen.target.notional
        if closed >= least or not chosen.is_whole or (case.in_doubt and _hangs_on_stale(case)):
            break
        if not isinstance(_next(case), Liquidate):
            break
    return case


async def _close(tx: Tx, case: _Case, call: StoredCall, chosen: Slice, rules: Rules) -> tuple[_Case, StoredCall]:
    closed = await liquidation.close(tx, case.scene, case.held, chosen, rules, call.id)
    after = replace(case, held=closed.book, figures=case.scene.figures(closed.book))
    moved = replace(
        call,
        slices=call.slices + 1,
        deficit=call.deficit + closed.deficit,
        figures=_figures(after),
        next_action_at=case.scene.now,
        exhausted_at=None,
    )
    await _tell(tx, "liquidation.executed", _figures(after), moved, **closed.told)
    return _with(after, moved, "liquidation.executed"), moved


def _next(case: _Case) -> Step | None:
    call = None if case.call is None else case.call.as_call()
    return step(call, _situation(case), case.held.settings, case.scene.now)


async def _ask(
    tx: Tx, case: _Case, call: StoredCall, rules: Rules, attempt: int, cancelled: Sequence[str] = ()
) -> _Case:
    """Ask the venue for what waits there, and give it time: `next_action_at` is when it will have had it.

    It escalates after as many requests as the rules have, or as much time, if slice after slice is filled at leisure.
    """
    until, enough = case.scene.now + rules.venue_patience, rules.venue_attempts * rules.venue_patience
    drags_on = call.slices > 0 and call.expired_at is not None and case.scene.now >= call.expired_at + enough
    escalated = attempt > rules.venue_attempts or drags_on
    moved = replace(call, attempts=attempt, respond_by=until, next_action_at=until)
    told = {
        "attempt": attempt,
        "escalated": escalated,
        "respond_by": until,
        "orders": liquidation.asked_for(case.held, call.id),
        "cancelled_orders": cancelled,
    }
    await _tell(tx, "liquidation.requested", _figures(case), moved, **told)
    return replace(_with(case, moved, "liquidation.requested"), escalated=escalated)


async def record_fill(
    tx: Tx, scene: Scene, held: Book, order_id: str, reported: Fill, named: Names, distance_max: Decimal
) -> Recorded:
    """Book a fill of a venue, and have the account's call, where it has one, looked at at once. The book is locked.

    Raises as `venue.record` does.
    """
    done = await venue.record(tx, scene, held, order_id, reported, named, distance_max)
    if done.trade is None:
        return done
    if done.order.margin_call_id is not None:
        await _executed(tx, scene, held, done, done.trade, done.order.margin_call_id)
    live = await calls.live(tx, held.agent_id)
    if live is not None:
        await calls.save(tx, live, replace(live, next_action_at=scene.now))
    return done


async def _executed(tx: Tx, scene: Scene, before: Book, done: Recorded, trade: Trade, call_id: str) -> None:
    """Tell of a liquidation order's fill; one that comes when the call is over adds what it did not cover."""
    call = await calls.get(tx, before.agent_id, call_id)
    figures, uncovered = call.figures, ZERO
    try:
        after = scene.figures(done.book)
    except InvalidError:
        pass  # a price is missing: the call keeps what was known
    else:
        figures = _shown(after)
        if call.ended_at is not None and not done.book.positions:
            uncovered = max(ZERO, _uncovered(after) - _uncovered(scene.figures(before)))
    moved = replace(
        call,
        slices=call.slices + 1,
        deficit=call.deficit + trade.deficit,
        uncovered=call.uncovered + uncovered,
        figures=figures,
    )
    await calls.save(tx, call, moved)
    told = {
        "position_id": done.fill.position_id,
        "order_id": done.order.id,
        "fill_id": done.fill.fill_id,
        "symbol": done.order.symbol,
        "side": done.order.side,
        "size": plain(done.fill.size),
        "fill_price": plain(done.fill.price),
        "fee": plain(done.fill.fee),
        "realized_pnl": plain(trade.realized_pnl),
        "is_whole": trade.after is None,
        "deficit": plain(moved.lost),
    }
    await _tell(tx, "liquidation.executed", figures, moved, **told)


def _figures(case: _Case) -> dict[str, Any]:
    """Return what a call remembers of the account: figures as JSON holds them."""
    return _shown(case.figures)


def _shown(figures: AccountFigures) -> dict[str, Any]:
    health = figures.health
    return {
        "equity": health.equity,
        "required_initial": health.required_initial,
        "required_maintenance": health.required_maintenance,
        "utilization": health.utilization,
        "margin_ratio": health.margin_ratio,
        "zone": health.zone,
        "alert_level": health.alert_level,
        "shortfall": health.shortfall,
    }


async def _tell(tx: Tx, kind: str, figures: Mapping[str, Any], call: StoredCall, **more: Any) -> None:
    data = {
        "margin_call_id": call.id,
        "state": call.state,
        "cause": call.cause,
        "opened_at": call.opened_at,
        "deadline_at": call.deadline_at,
        **figures,
        **more,
    }
    await events.emit(tx, kind, call.agent_id, data)


def _postponed(call: StoredCall | None, now: datetime) -> StoredCall | None:
    """Return a call that is looked at again soon: nothing is decided on prices that are stale or missing."""
    return None if call is None else replace(call, next_action_at=now + RETRY_STALE)


async def _saved(tx: Tx, case: _Case) -> _Case:
    call = await calls.save(tx, case.stored, case.call)
    return replace(case, call=call, stored=call)


async def acknowledge(tx: Tx, agent_id: str, call_id: str, note: str) -> StoredCall:
    """Record that the owner has seen a call; the clock goes on. Raises NotFoundError."""
    call = await calls.get(tx, agent_id, call_id)
    if call.acknowledged_at is not None:
        return call
    moved = replace(call, acknowledged_at=tx.now)
    await calls.save(tx, call, moved)
    await audit.record(tx, "margin_call.acknowledged", call_id, agent_id, note=note)
    return moved
