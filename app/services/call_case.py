"""A decision on a margin call under way: whose call it is, and what it is judged on. It writes nothing.

An account's own call is judged on its own figures. Where it is the master of a fleet whose pool is in breach, its call
is the fleet's, judged on the pool's. A pooled member has its turn under the fleet's call: its call is then one of the
fleet's too, and closes of the member until the pool is where it may stop.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from app.db.session import Tx
from app.domain.book import ZERO, Book
from app.domain.health import Health
from app.domain.liquidate import Slice, Target
from app.domain.margin_calls import Become, Cause, Liquidate, Situation, Step, due_by, goes_on, situation, step
from app.domain.money import to_decimal
from app.domain.moves import SETTLEMENT_DECIMALS
from app.domain.quote import AccountFigures
from app.errors import InvalidError
from app.services import calls, fleet_pool, liquidation, staleness
from app.services.calls import StoredCall
from app.services.delegation import MasterNeeded
from app.services.fleet_pool import Pool
from app.services.liquidation import Rules
from app.services.margin import Scene

_OVER = Situation(pool=None, isolated=False, is_clear=True, is_cured=True, may_stop=True, anything_left=False)
"""Of a member's turn whose fleet's call has ended: nothing more is closed by it."""


@dataclass(frozen=True, slots=True)
class Case:
    """A decision under way: the locked book, the market, the figures, the call as it now stands."""

    held: Book
    scene: Scene
    figures: AccountFigures
    call: StoredCall | None
    stored: StoredCall | None = None
    """The call as it is in the table: what a decision makes of it is written once, at its end."""
    stale: frozenset[str] = frozenset()
    in_doubt: bool = False
    """Whether so much is stale of the account that figures as they are decide nothing for the better."""
    told: tuple[str, ...] = ()
    escalated: bool = False
    pool: Pool | None = None
    """That of the fleet whose call this is."""
    is_over: bool = False
    """Whether this is a member's turn and the fleet's call has ended."""
    master: Book | None = None
    """The master's book, where it is locked too and the member may draw on it."""
    held_back: bool = False
    """Whether what is closed is closed by the fleet's call."""
    uncalled: bool = False
    """Whether the pool is in breach, and nobody has called it yet."""
    drew: bool | None = None
    """Whether the fleet stood by its member; None: that was not tried."""
    turns: tuple[str, ...] = ()
    """Members whose turn it is, by the fleet's call."""

    @property
    def leads(self) -> bool:
        """Whether the call is the fleet's, its account the master."""
        return self.pool is not None and self.pool.master_id == self.held.agent_id

    @property
    def is_held_back(self) -> bool:
        """Whether the account's own call has expired and waits for the fleet's."""
        call = self.call
        return self.held_back and call is not None and call.state in ("expired", "liquidating") and call.is_own

    @property
    def is_unsure(self) -> bool:
        """Whether so much is stale of what the call is judged on."""
        return self.in_doubt if self.pool is None else self.pool.in_doubt

    @property
    def passes_over(self) -> bool:
        """Whether the fleet's call waits for members whose turns can't come now, though something is left of theirs."""
        return self.pool is not None and self.leads and self.pool.passes_over

    @property
    def targets(self) -> list[Target]:
        """What may be closed for the call."""
        alone = self.call is not None and self.call.cause == "isolated"
        return liquidation.targets(self.held, self.figures, isolated_alone=alone, stale=self.stale)

    @property
    def judged(self) -> AccountFigures:
        """The figures that the call tells of: the account's, with the pool's health where it is the fleet's."""
        return replace(self.figures, health=self.pool.health) if self.pool is not None and self.leads else self.figures

    def situation(self) -> Situation:
        """Return what the call is judged on. Nothing is breached that a stale price might make good."""
        if self.is_over:
            return _OVER
        if self.pool is not None:
            return self._of_leader(self.pool) if self.leads else self._of_turn(self.pool)
        own = self._judged(self.figures.health)
        return replace(own, pool=self._judged(self._at_best()).pool) if self.in_doubt else own

    def _of_leader(self, pool: Pool) -> Situation:
        return pool.situation(anything_left=bool(pool.line()), waiting=self.waits)

    def _of_turn(self, pool: Pool) -> Situation:
        """Return that of a member's turn, which ends when the pool may stop, or when nothing of the member is left."""
        targets = bool(self.targets)
        judged = pool.situation(anything_left=targets, waiting=self.waits)
        is_done = not targets and not self.waits
        return replace(judged, is_cured=judged.may_stop, pool=None if is_done else judged.pool)

    def _judged(self, health: Health) -> Situation:
        held, figures = self.held, self.figures
        doomed = liquidation.targets(held, figures, isolated_alone=True, stale=self.stale)
        found = situation(
            health,
            held.settings.policy(self.scene.market.parameters.policy),
            leveraged=held.is_leveraged,
            isolated_breached=bool(doomed),
            anything_left=bool(self.targets),
            waiting=self.waits,
        )
        isolated = self.call is not None and self.call.cause == "isolated"  # it fails alone, whatever the fleet's does
        return replace(found, held_back=self.held_back and not isolated)

    @property
    def waits(self) -> bool:
        """Whether orders for the call are out at a venue."""
        return self.call is not None and bool(self.held.requested(self.call.id))

    def _at_best(self) -> Health:
        return staleness.at_best(self.scene, self.held, self.figures, self.stale)

    def hangs_on_stale(self) -> bool:
        """Whether there is nothing to do that does not depend on a stale price: no breach, and no call to end."""
        health = self.figures.health if self.pool is None else self.pool.health
        nothing_at_stake = self.call is not None and health.required_initial == 0.0
        return self.situation().cause is None and not nothing_at_stake

    def next_step(self) -> Step | None:
        """Return what is to be done next."""
        call = None if self.call is None else self.call.as_call()
        return step(call, self.situation(), self.held.settings, self.scene.now)

    def asks_the_fleet(self) -> bool:
        """Whether a member's own liquidation is next, and its fleet has not been asked to stand by it."""
        of, call = self.held.delegation, self.call
        if of is None or not of.is_pooled or call is None or call.cause in ("isolated", "fleet"):
            return False
        if self.drew is not None or self.held_back or call.slices > 0:
            return False
        what = self.next_step()
        return isinstance(what, Liquidate) or (isinstance(what, Become) and what.state in ("expired", "liquidating"))

    def next_slice(self, rules: Rules) -> Slice:
        """Return what is closed next."""
        if self.pool is not None:
            return self.pool.next_slice(self.held.agent_id)
        goal = liquidation.own_goal(self.held, self.scene)
        return liquidation.next_slice(self.held, self.scene, self.figures, rules, self.targets, goal)

    def with_book(self, held: Book) -> Case:
        """Return the case after its book has changed."""
        pool = None if self.pool is None else self.pool.with_book(held)
        return replace(self, held=held, figures=self.scene.figures(held), pool=pool)

    def by_itself(self) -> Case:
        """Return the case of the account alone, whatever becomes of its fleet's call, and with no call yet."""
        return replace(self, call=None, stored=None, pool=None, is_over=False)

    def with_call(self, call: StoredCall, *told: str) -> Case:
        """Return the case after the call has moved, and what was told of it."""
        return replace(self, call=call, told=(*self.told, *told))

    def uncovered(self) -> Decimal:
        """Return how far equity is below zero, USD; nothing yet of what has still a call of its own to come."""
        if (self.pool is not None or self.is_over) and self.figures.health.required_initial > 0.0:
            return ZERO
        return below_zero(self.figures)

    def shown(self) -> dict[str, Any]:
        """Return what a call remembers of the account: figures as JSON holds them."""
        found = shown(self.judged)
        if self.pool is not None:
            found["fleet_id"] = self.pool.fleet_id
            found["fleet_utilization"] = self.pool.health.utilization
        return found


def below_zero(figures: AccountFigures) -> Decimal:
    """Return how far equity is below zero, USD."""
    return max(ZERO, to_decimal(round(-figures.equity, SETTLEMENT_DECIMALS)))


def shown(figures: AccountFigures) -> dict[str, Any]:
    """Return what a call remembers of figures."""
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


def begun(case: Case, cause: Cause, figures: Mapping[str, Any]) -> StoredCall:
    """Return a new call of the account."""
    return StoredCall(
        id=f"call_{secrets.token_hex(10)}",
        agent_id=case.held.agent_id,
        state="noticed",
        cause=cause,
        noticed_at=case.scene.now,
        next_action_at=case.scene.now,
        figures=figures,
    )


def put_aside(held: Book, call: StoredCall) -> StoredCall:
    """Return a call that becomes one of the fleet's, with what it was of its own."""
    if call.cause == "fleet":
        return call
    return replace(call, own_cause=call.cause, own_deadline_at=due_by(call.as_call(), held.settings))


def still_own(case: Case, call: StoredCall) -> bool:
    """Whether the account's own call, of which one of the fleet's took the place, is not over meanwhile."""
    return call.own_cause is not None and goes_on(
        case.by_itself().situation(), is_isolated=call.own_cause == "isolated"
    )


async def placed(tx: Tx, case: Case, master: Book | None, rules: Rules, pool: Pool | None) -> Case:
    """Return the case as the account's fleet has it, if it is of one. `master`: the fleet's, locked too; `pool`: read.

    Raises InvalidError where the fleet's call can't be judged for a missing price, and MasterNeeded.
    """
    held = case.held
    if held.leads is not None:
        return await _led(tx, case, held.leads, rules)
    of = held.delegation
    is_turn = case.call is not None and case.call.fleet_call_id is not None
    if of is None or not of.is_pooled:
        return replace(case, is_over=is_turn)
    if master is not None and master.agent_id == of.master_id:
        return await _of_member(tx, case, master, rules, pool)
    if is_turn:
        raise MasterNeeded(of.master_id)
    return replace(case, held_back=of.waits_for_fleet and not await _has_waited(tx, case, of.master_id))


async def _has_waited(tx: Tx, case: Case, master_id: str) -> bool:
    """Whether the account's own call is past its deadline, and has waited for a call of its fleet's since.

    It waits for no second one: whoever brings the pool into breach again and again would else put it off for ever.
    """
    call = case.call
    if call is None or not call.is_own or call.deadline_at is None or case.scene.now < call.deadline_at:
        return False
    return await calls.has_waited(tx, call, master_id)


def drags_on(call: StoredCall, rules: Rules, now: datetime) -> bool:
    """Whether a venue fills slice after slice at leisure: past as much time as the rules have for all its requests."""
    enough = rules.venue_attempts * rules.venue_patience
    return call.slices > 0 and call.expired_at is not None and now >= call.expired_at + enough


async def _goes_first(tx: Tx, case: Case, rules: Rules) -> bool:
    """Whether a master's own call is finished before its fleet's takes its place: while something of it is closed."""
    call = case.call
    if call is None or case.in_doubt or not case.held.settings.auto_liquidate or call.attempts > rules.venue_attempts:
        return False
    if case.held.settings.execution == "venue" and drags_on(call, rules, case.scene.now):
        return False
    return (bool(case.targets) or case.waits) and await _has_waited(tx, case, case.held.agent_id)


async def awake(tx: Tx, case: Case) -> Case:
    """Have a call that is to wait for its fleet's looked at again soon, unless that one is sure to wake it."""
    of, call, soon = case.held.delegation, case.call, case.scene.now + fleet_pool.LOOK
    if of is None or call is None or call.next_action_at is None or not case.is_held_back or call.next_action_at < soon:
        return case
    if await calls.stands(tx, of.master_id):
        return case
    return replace(case, call=replace(call, next_action_at=soon))


async def _led(tx: Tx, case: Case, fleet_id: str, rules: Rules) -> Case:
    """Return the case of a master: the fleet's where its pool is in breach or has a call, else its own."""
    is_fleets = case.call is not None and case.call.cause == "fleet"
    if case.call is not None and not case.in_doubt and not still_own(case, case.call):
        case = replace(case, call=replace(case.call, own_cause=None, own_deadline_at=None))
    try:
        pool = await fleet_pool.load(tx, case.scene, rules, fleet_id)
    except InvalidError:
        if is_fleets:
            raise
        return case
    if not is_fleets and (not pool.is_breached or await _goes_first(tx, case, rules)):
        return case
    return replace(case, pool=pool)


async def _of_member(tx: Tx, case: Case, master: Book, rules: Rules, pool: Pool | None) -> Case:
    """Return the case of a pooled member whose master is locked: its turn, or its own, held back or stood by."""
    call, of = case.call, case.held.delegation
    turn_under = None if call is None else call.fleet_call_id
    is_turn = turn_under is not None
    live = None if master.live_call is None else await calls.live(tx, master.agent_id)
    fleet_call = live if live is not None and live.cause == "fleet" else None
    if is_turn and (fleet_call is None or fleet_call.id != turn_under):
        return replace(case, is_over=True)
    if of is None or master.leads is None:
        return case
    try:
        pool = pool or await fleet_pool.load(tx, case.scene, rules, master.leads)
    except InvalidError:
        if is_turn:
            raise
        waited = await _has_waited(tx, case, master.agent_id)
        return replace(case, master=master, held_back=of.waits_for_fleet and not waited)
    if fleet_call is not None and (is_turn or _is_next(pool, fleet_call, case.held.agent_id)):
        taken = _taken(case, fleet_call)
        return replace(case, pool=pool, call=taken)
    uncalled = fleet_call is None and pool.is_breached
    held_back = (of.waits_for_fleet or uncalled) and not await _has_waited(tx, case, master.agent_id)
    return replace(case, master=master, held_back=held_back, uncalled=uncalled)


def _is_next(pool: Pool, fleet_call: StoredCall, agent_id: str) -> bool:
    if fleet_call.state != "liquidating" or pool.may_stop:
        return False
    return agent_id in pool.line()[:1]


def _taken(case: Case, fleet_call: StoredCall) -> StoredCall:
    """Return the member's call, a new one if it has none, as one of the fleet's, whose deadline is over."""
    now = case.scene.now
    call = case.call or begun(case, "fleet", shown(case.figures))
    if call.fleet_call_id is not None:
        return call
    own = put_aside(case.held, call)
    taken = replace(own, cause="fleet", fleet_call_id=fleet_call.id, next_action_at=now)
    if call.state not in ("noticed", "open"):
        return taken
    return replace(taken, state="open", opened_at=call.opened_at or fleet_call.opened_at or now, deadline_at=now)
