"""Margin calls: noticed, made, reminded of, cured or expired, and what is liquidated. Decided under the book's lock.

`decide` is the one place that moves a call on. The screen and the timers only name accounts to it: it locks the book,
reads it and the market afresh, asks the pure step, and writes the call, its timer, what was closed and the events that
tell of it in one transaction. Asking twice, late or for nothing does no harm.

A pooled member of a fleet is liquidated under its master's lock too: by then its fleet has stood by it as far as it
goes, and the fleet's pool was found sound. Else it is the fleet's call, on its master, that says whose turn it is; each
turn is a decision on that member, which judges the pool anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy.exc import DBAPIError

from app import telemetry
from app.db.session import Tx
from app.domain.book import ZERO, Book, OpenPosition, PendingOrder
from app.domain.liquidate import Slice
from app.domain.margin_calls import Become, Liquidate, Notice, Open, Remind, Request, Situation, Wait
from app.domain.money import plain
from app.domain.trade import Trade
from app.domain.watch import Band
from app.errors import ConflictError, InvalidError, PrimeriskError
from app.services import (
    accounts,
    audit,
    book,
    call_case,
    calls,
    delegation,
    events,
    fleet_pool,
    fleets,
    liquidation,
    prevention,
    prices,
    recalls,
    staleness,
    stand_by,
    venue,
    watch,
)
from app.services.call_case import Case
from app.services.calls import StoredCall
from app.services.delegation import MasterNeeded, Pair
from app.services.fleet_pool import Pool
from app.services.liquidation import Rules
from app.services.margin import Scene, Scenes
from app.services.venue import Fill, Recorded
from app.services.wallet import Names

log = logging.getLogger(__name__)

STEPS_MAX = 10
"""Changes of state in one decision: more than the longest way through a life."""
STEP_SHARE_MIN = 0.005
"""A step of liquidation closes at least this share of what may be closed, however small the positions are."""
SLICES_A_STEP_MAX, POSITIONS_USUAL = 3_000, 15
"""Slices in one step, times the positions of the book that each of them assesses: 200 of a usual book."""
TURNS_AT_ONCE = 16
"""Members named at once, whose turns follow each other: each is judged anew when it comes."""
_IS_CALLED = {"margin_call.opened", "margin_call.reminded", "margin_call.expired"}
IN_DOUBT = "in_doubt"
RETRY_STALE = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class Decided:
    """What came of a decision: the call as it now stands, the events that were written, what is told of its levels.

    `levels` are the ranks of zone and alert level, None where a price is missing; `band`: of equity, within which
    there is nothing to tell of the drawdown, None where it is not followed. It `waits` where prices are stale: nothing
    was decided. `escalated`: a venue was asked once more after as many requests, or as much time, as the rules have.
    `priced_at`: when the newest price arrived that the account depends on, where a call has begun. `turns`: members on
    whom to decide now, together with this account, their fleet's master; `named`: accounts on whom to decide besides.
    `drew`: its fleet has stood by the account.
    """

    call: StoredCall | None
    told: tuple[str, ...] = ()
    levels: tuple[int, int] | None = None
    band: Band | None = None
    waits: bool = False
    escalated: bool = False
    priced_at: datetime | None = None
    turns: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    drew: bool = False


async def decide(tx: Tx, scenes: Scenes, agent_id: str, rules: Rules, master_id: str | None = None) -> Decided:
    """Move an account's call on as far as it goes now, and tell what has changed of its levels.

    One position is closed, or as many small ones as make STEP_SHARE_MIN of the book; where more are to follow the call
    is due again at once. In a member's turn all is closed that the fleet's call asks for. Where the breach hangs on a
    stale price, or a price is missing, nothing is decided. Raises MasterNeeded where the agent's fleet has a say in it:
    then the transaction is begun anew with its master.
    """
    books = await book.hold_all(tx, {agent_id, master_id or agent_id})
    master = None if master_id is None else books[master_id]
    return (await _decide(tx, await scenes.at(tx), books[agent_id], master, rules))[0]


async def take_turns(tx: Tx, scenes: Scenes, master_id: str, agents: Sequence[str], rules: Rules) -> dict[str, Decided]:
    """Decide on members of a fleet, one after the other, under its call; the pool is read once, and followed.

    Return what was decided of each, up to the one with which the pool may stop.
    """
    books = await book.hold_all(tx, {master_id, *agents})
    scene, pool, made = await scenes.at(tx), None, dict[str, Decided]()
    for agent_id in agents:
        made[agent_id], pool = await _decide(tx, scene, books[agent_id], books[master_id], rules, pool)
        if pool is None or pool.may_stop:
            break
    return made


async def pass_over(tx: Tx, scenes: Scenes, agent_id: str, master_id: str, rules: Rules, seconds: float) -> None:
    """Let a member's call wait whose turn has failed, one that is made for that where it has none of the fleet's yet.

    The line goes on with who comes after it: else it would begin with the one that fails for ever.
    """
    books = await book.hold_all(tx, {agent_id, master_id})
    held, call, scene = books[agent_id], await calls.live(tx, agent_id), await scenes.at(tx)
    case = await call_case.placed(tx, Case(held, scene, scene.figures(held), call), books[master_id], rules, None)
    if case.pool is not None:
        await accounts.lock_account(tx, agent_id)
        await calls.save(tx, call, case.call)
    await calls.put_off(tx, agent_id, seconds)


async def _decide(
    tx: Tx, scene: Scene, held: Book, master: Book | None, rules: Rules, pool: Pool | None = None
) -> tuple[Decided, Pool | None]:
    """Decide on a book that is locked; return the fleet's pool with it, where that was looked at."""
    call = None if held.live_call is None else await calls.live(tx, held.agent_id)
    if call is not None:
        telemetry.note(margin_call_id=call.id)
    try:
        figures = scene.figures(held)
        stale = staleness.stale(scene, figures)
        in_doubt = not staleness.is_grain(figures, staleness.at_best(scene, held, figures, stale))
        case = Case(held, scene, figures, call, call, stale, in_doubt)
        case = await call_case.placed(tx, case, master, rules, pool)
    except InvalidError:  # a price lacks, here or in the fleet
        return Decided(await calls.save(tx, call, await _postponed(tx, held, call, scene.now))), None
    if case.is_unsure and case.hangs_on_stale():
        case = await _saved(tx, replace(case, call=await _postponed(tx, held, call, scene.now)))
        return await _look(tx, case, rules), case.pool
    case = await _without_openings(tx, await _without_moot(tx, _beyond_doubt(case)))
    for _ in range(STEPS_MAX):
        if case.asks_the_fleet():
            case = await _ask_the_fleet(tx, case)
        settled, case = await _advance(tx, case, rules)
        if settled:
            break
    case = await _saved(tx, await call_case.awake(tx, case))
    if (None if case.call is None else case.call.state) != (None if call is None else call.state):
        await accounts.lock_account(tx, held.agent_id)  # the screen hears of it by the book's version
    decided = replace(await _look(tx, case, rules), turns=case.turns, named=_named(case), drew=bool(case.drew))
    if call is None and case.call is not None:
        decided = replace(decided, priced_at=await prices.last_received(tx, list(figures.prices)))
    return decided, case.pool


async def _look(tx: Tx, case: Case, rules: Rules) -> Decided:
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
    return Decided(
        case.call, case.told, seen.levels, band, waits=case.in_doubt or case.is_unsure, escalated=case.escalated
    )


async def _without_moot(tx: Tx, case: Case) -> Case:
    """Cancel liquidation orders that ask for more than there now is: the next slice is chosen anew."""
    moot = [] if case.call is None else liquidation.moot(case.held, case.call.id)
    return replace(case, held=await venue.withdraw(tx, case.held, moot, "there is less to reduce")) if moot else case


async def _without_openings(tx: Tx, case: Case) -> Case:
    """Cancel what a member would still open at its venue when its fleet's call has expired."""
    of = case.held.delegation
    openings = [order for order in case.held.pending if not order.reduce_only]
    if of is None or not of.opens_nothing or not openings:
        return case
    await accounts.lock_account(tx, case.held.agent_id)
    return replace(case, held=await venue.withdraw(tx, case.held, openings, "the fleet's margin call"))


def _named(case: Case) -> tuple[str, ...]:
    """Return on whom to decide besides: the master, as news of a member may be its pool's; members, when it expires.

    That a member is called too changes nothing of a fleet's call that lives: a thousand of them would have it looked at
    as often.
    """
    of, call = case.held.delegation, case.call
    is_news = of is not None and (case.told if of.fleet_call is None else set(case.told) - _IS_CALLED)
    if of is not None and of.is_pooled and (is_news or case.uncalled):
        return (of.master_id,)
    if case.pool is None or not case.leads or call is None or call.state not in ("expired", "liquidating"):
        return ()
    return tuple(case.pool.about_to_open())


async def _advance(tx: Tx, case: Case, rules: Rules) -> tuple[bool, Case]:  # noqa: PLR0911  one a kind of step
    """Take one step; return whether that is all for now."""
    call, now = case.call, case.scene.now
    judged, what = case.situation(), case.next_step()
    if what is None:
        return True, case
    if isinstance(what, Notice | Open) and call is None and judged.cause is not None:
        call = call_case.begun(case, judged.cause, case.shown())
    if call is None:
        raise RuntimeError("a step of a call that is not there")
    match what:
        case Notice():
            return True, replace(case, call=replace(call, next_action_at=_next_look(case, what.until)))
        case Open():
            return False, case.with_call(await _open(tx, case, call, what, judged), "margin_call.opened")
        case Remind():
            moved = replace(call, reminders=what.number, next_action_at=now)
            await _tell(tx, "margin_call.reminded", case.shown(), moved)
            return False, case.with_call(moved, "margin_call.reminded")
        case Wait():
            return True, await _wait(tx, case, call, what, judged)
        case Become():
            return await _become(tx, case, call, what)
        case Request():
            return True, await _ask(tx, case, call, rules, what.attempt)
        case _:
            return await _liquidate_next(tx, replace(case, call=call), call, rules)


def _next_look(case: Case, until: datetime | None) -> datetime | None:
    """Return when a call is looked at next, however long it is to wait: a fleet's is its members' too."""
    if not case.leads:
        return until
    look = case.scene.now + fleet_pool.LOOK
    return look if until is None else min(until, look)


async def _ask_the_fleet(tx: Tx, case: Case) -> Case:
    """Draw what the member lacks before anything of it is sold; where that can't be had it is as it was.

    It is brought to its cure level, or, if it is about to be sold already, to where that may stop. Raises MasterNeeded.
    """
    held, call, of = case.held, case.call, case.held.delegation
    if case.master is None or of is None:
        raise MasterNeeded("" if of is None else of.master_id)
    policy = held.settings.policy(case.scene.market.parameters.policy)
    is_begun = call is not None and call.state == "liquidating"
    try:
        level = policy.stop_utilization if is_begun else policy.cure_utilization
        amount = stand_by.missing(case.scene, held, level)
        if amount <= 0:
            return replace(case, drew=False)
        async with tx.connection.begin_nested():
            await accounts.lock_accounts(tx, {held.agent_id, case.master.agent_id})
            pair = Pair(held, case.master)
            pair = await delegation.draw(tx, case.scene, pair, stand_by.service_of(held), amount)
    except (ConflictError, InvalidError) as refused:  # no more for it, or the master's book can't be judged
        log.info("nothing is drawn for %s: %s", held.agent_id, refused.code)
        return replace(case, drew=False)
    return replace(case.with_book(pair.member), master=pair.master, drew=True)


async def _wait(tx: Tx, case: Case, call: StoredCall, what: Wait, judged: Situation) -> Case:
    """Wait; and tell once where nothing is left to close although the breach stands, with what is not covered."""
    is_left = judged.anything_left or judged.waiting or case.passes_over
    is_exhausted = call.state == "liquidating" and not is_left and not case.is_unsure
    until = _next_look(case, what.until)
    if not is_exhausted:
        return replace(case, call=replace(call, next_action_at=until))
    now, uncovered = case.scene.now, case.uncovered()
    moved = replace(call, next_action_at=until, uncovered=uncovered, exhausted_at=call.exhausted_at or now)
    if call.exhausted_at is not None:
        return replace(case, call=moved)
    await _tell(tx, "liquidation.exhausted", case.shown(), moved, deficit=plain(moved.lost))
    await audit.record(tx, "margin_call.exhausted", moved.id, moved.agent_id, deficit=str(moved.lost))
    return case.with_call(moved, "liquidation.exhausted")


async def _open(tx: Tx, case: Case, call: StoredCall, what: Open, judged: Situation) -> StoredCall:
    cause = judged.cause or call.cause
    moved = replace(
        call_case.put_aside(case.held, call) if cause == "fleet" else call,
        state="open",
        cause=cause,
        opened_at=case.scene.now,
        deadline_at=what.deadline,
        next_action_at=what.deadline,
        reminders=0,
        expired_at=None,
        figures=case.shown(),
    )
    # in a thread: it assesses the book several times, and the process may have requests to answer
    if case.pool is not None:
        cure = await asyncio.to_thread(case.pool.cure)
    else:
        cure = await asyncio.to_thread(liquidation.cures, case.held, case.scene, case.figures)
    asked_back = await recalls.arm(tx, case.scene, case.held, case.judged, moved.id, moved.cause)
    await _tell(tx, "margin_call.opened", case.shown(), moved, cure=cure, recalls=asked_back)
    await audit.record(tx, "margin_call.opened", moved.id, moved.agent_id, cause=moved.cause)
    return moved


async def _become(tx: Tx, case: Case, call: StoredCall, what: Become) -> tuple[bool, Case]:
    now = case.scene.now
    match what.state:
        case "expired":
            # from now on the account may only reduce
            case, cancelled = await _withdraw(tx, case, [o for o in case.held.pending if not o.reduce_only])
            moved = replace(call, state="expired", expired_at=now, next_action_at=now)
            held, offers = await recalls.withdraw_offers(tx, case.scene, case.held, call.id, call.cause)
            asked_back = await recalls.arm(tx, case.scene, held, case.judged, call.id, call.cause)
            case = case.with_book(held)
            if case.pool is not None and case.leads and not held.settings.auto_liquidate:
                await calls.wake(tx, case.pool.members, call.id)  # from now on they are by themselves
            told = {"cancelled_orders": cancelled, "cancelled_offers": offers, "recalls": asked_back}
            await _tell(tx, "margin_call.expired", case.shown(), moved, **told)
            return False, case.with_call(moved, "margin_call.expired")
        case "liquidating":
            return False, replace(case, call=replace(call, state="liquidating", next_action_at=now))
        case "completed":
            case, cancelled = await _withdraw(tx, case, case.held.requested(call.id))
            uncovered = max(call.uncovered, case.uncovered())
            moved = _ended(call, "completed", now, uncovered=uncovered)
            told = {"deficit": plain(moved.lost), "slices": moved.slices, "cancelled_orders": cancelled}
            told |= await _end_of_turns(tx, case, call)
            await _tell(tx, "liquidation.completed", case.shown(), moved, **told)
        case "cured":
            case, cancelled = await _withdraw(tx, case, case.held.requested(call.id))
            moved = _ended(call, "cured", now)
            await _end_of_turns(tx, case, call)
            await _tell(tx, "margin_call.cured", case.shown(), moved, cancelled_orders=cancelled)
        case _:
            moved = _ended(call, "lapsed", now)
            await _end_of_turns(tx, case, call)
    await audit.record(tx, f"margin_call.{moved.state}", moved.id, moved.agent_id, deficit=str(moved.lost))
    kind = {"completed": "liquidation.completed", "cured": "margin_call.cured"}.get(moved.state)
    return await _go_on(tx, case.with_call(moved, *(() if kind is None else (kind,))), moved)


async def _go_on(tx: Tx, case: Case, ended: StoredCall) -> tuple[bool, Case]:
    """Go on with the account's own call, by its own deadline, where that of the fleet's has ended that took its place.

    A master's is decided on at once, so that the pool is in no breach again before it is.
    """
    if ended.own_deadline_at is None or not call_case.still_own(case, ended):
        return True, case
    await _saved(tx, case)  # one live call an account
    own, now = case.by_itself(), case.scene.now
    judged = own.situation()
    call = call_case.begun(own, judged.cause or "utilization", own.shown())
    opened = await _open(tx, own, call, Open(max(now, ended.own_deadline_at)), judged)
    after = replace(case, stored=None).with_call(replace(opened, next_action_at=now), "margin_call.opened")
    if case.held.leads is None or case.in_doubt:
        return True, after
    return False, replace(after, pool=None)


async def _end_of_turns(tx: Tx, case: Case, call: StoredCall) -> dict[str, Any]:
    """Have the members looked at who waited for their fleet's call, and return what it has closed of each."""
    if case.pool is None or not case.leads:
        return {}
    await calls.wake(tx, case.pool.members, call.id)
    turns = (await calls.under(tx, call.id))[: fleet_pool.MEMBERS_TOLD_MAX]
    return {"members": [{"agent_id": t.agent_id, "margin_call_id": t.id, "slices": t.slices} for t in turns]}


async def _withdraw(tx: Tx, case: Case, pending: list[PendingOrder]) -> tuple[Case, list[str]]:
    held = await venue.withdraw(tx, case.held, pending, "margin call")
    return replace(case, held=held), [order.id for order in pending]


def _ended(call: StoredCall, state: str, now: datetime, **values: Any) -> StoredCall:
    return replace(call, state=state, ended_at=now, next_action_at=None, **values)


async def _liquidate_next(tx: Tx, case: Case, call: StoredCall, rules: Rules) -> tuple[bool, Case]:
    """Close what is next, or, of a fleet, say whose turn it is; return whether that is all for now."""
    if case.pool is None:
        return True, await _try_to_liquidate(tx, case, call, rules)
    if case.leads and (line := case.pool.line())[0] != case.held.agent_id:
        look = _next_look(case, None)
        return True, replace(case, call=replace(call, next_action_at=look), turns=tuple(line[:TURNS_AT_ONCE]))
    after = await _try_to_liquidate(tx, case, call, rules)
    return after.told == case.told or "liquidation.requested" in after.told, after


async def _try_to_liquidate(tx: Tx, case: Case, call: StoredCall, rules: Rules) -> Case:
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


async def _liquidate(tx: Tx, case: Case, call: StoredCall, rules: Rules) -> Case:
    """Close what is next, and look again at once; or ask the venue for it.

    Where it is a small part of the book, what comes after it as well: dust would hold up the rest.
    """
    if await recalls.are_awaited(tx, case.held, call.expired_at, case.scene.now):
        return replace(case, call=replace(call, next_action_at=case.scene.now + recalls.RETRY))
    await accounts.lock_account(tx, case.held.agent_id)
    case = await _saved(tx, case)  # orders refer to it
    call = case.call or call
    whole_turn = case.pool is not None
    least = STEP_SHARE_MIN * sum(target.notional for target in case.targets)
    closed = 0.0
    for _ in range(max(1, SLICES_A_STEP_MAX // max(POSITIONS_USUAL, len(case.held.positions)))):
        chosen = case.next_slice(rules)
        target = chosen.target.item
        if case.held.settings.execution == "venue" and isinstance(target, OpenPosition):
            held, cancelled = await liquidation.request(tx, case.held, chosen, target, call.id)
            return await _ask(tx, replace(case, held=held), call, rules, 1, cancelled)
        case, call = await _close(tx, case, call, chosen, rules)
        closed += chosen.target.notional
        if (closed >= least or not chosen.is_whole) and not whole_turn:
            break
        if case.is_unsure and case.hangs_on_stale():
            break
        if not isinstance(case.next_step(), Liquidate):
            break
    return case


async def _close(tx: Tx, case: Case, call: StoredCall, chosen: Slice, rules: Rules) -> tuple[Case, StoredCall]:
    closed = await liquidation.close(tx, case.scene, case.held, chosen, rules, call.id)
    after = case.with_book(closed.book)
    moved = replace(
        call,
        slices=call.slices + 1,
        deficit=call.deficit + closed.deficit,
        figures=after.shown(),
        next_action_at=case.scene.now,
        exhausted_at=None,
    )
    await _tell(tx, "liquidation.executed", after.shown(), moved, **closed.told)
    return after.with_call(moved, "liquidation.executed"), moved


async def _ask(tx: Tx, case: Case, call: StoredCall, rules: Rules, attempt: int, cancelled: Sequence[str] = ()) -> Case:
    """Ask the venue for what waits there, and give it time: `next_action_at` is when it will have had it.

    It escalates after as many requests as the rules have, or as much time, if slice after slice is filled at leisure.
    """
    until = case.scene.now + rules.venue_patience
    escalated = attempt > rules.venue_attempts or call_case.drags_on(call, rules, case.scene.now)
    moved = replace(call, attempts=attempt, respond_by=until, next_action_at=until)
    told = {
        "attempt": attempt,
        "escalated": escalated,
        "respond_by": until,
        "orders": liquidation.asked_for(case.held, call.id),
        "cancelled_orders": cancelled,
    }
    await _tell(tx, "liquidation.requested", case.shown(), moved, **told)
    return replace(case.with_call(moved, "liquidation.requested"), escalated=escalated)


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
        figures = call_case.shown(after)
        if call.ended_at is not None and not done.book.positions:
            uncovered = max(ZERO, call_case.below_zero(after) - call_case.below_zero(scene.figures(before)))
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
    if call.fleet_call_id is not None:
        data["fleet_call_id"] = call.fleet_call_id
    await events.emit(tx, kind, call.agent_id, data)


async def _postponed(tx: Tx, held: Book, call: StoredCall | None, now: datetime) -> StoredCall | None:
    """Return a call that is looked at again soon: nothing is decided on prices that are stale or missing.

    A fleet's says so in its figures: meanwhile its members are by themselves, and are looked at now.
    """
    if call is None:
        return None
    later = replace(call, next_action_at=now + RETRY_STALE)
    if call.cause != "fleet" or IN_DOUBT in call.figures:
        return later
    if held.leads is not None:
        members = await fleets.list_members(tx, held.leads, fleets.MEMBERS_MAX)
        await calls.wake(tx, [member.agent_id for member in members], call.id)
    return replace(later, figures={**call.figures, IN_DOUBT: True})


def _beyond_doubt(case: Case) -> Case:
    """Return the case with a call that no longer waits for prices."""
    if case.call is None or IN_DOUBT not in case.call.figures:
        return case
    return replace(case, call=replace(case.call, figures=case.shown()))


async def _saved(tx: Tx, case: Case) -> Case:
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
