"""The pool of a fleet: its master and its pooled members, each margined by itself, judged by their sums.

Nothing nets between accounts here: what one could offset of another is told by the fleet's risk, and margins nobody.
So a pool in breach has an account in breach, and that has a call of its own: the pools to look at are those of accounts
under a call, and no account is screened twice. Members on isolated delegation are no part of it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from sqlalchemy import select, union

from app.db.fleet_tables import fleet_members, fleets
from app.db.session import Tx
from app.db.tables import margin_calls
from app.domain.book import Book
from app.domain.fleet import Part, pool_health, pool_policy, total_of
from app.domain.health import Health
from app.domain.liquidate import Slice, Target
from app.domain.margin_calls import LIVE_STATES, Situation, situation
from app.domain.moves import SETTLEMENT_ASSET
from app.domain.parameters import HealthPolicy
from app.domain.quote import AccountFigures
from app.errors import InvalidError
from app.services import book, calls, fleet_books, liquidation, shards, staleness
from app.services import fleets as stored
from app.services.calls import StoredCall
from app.services.fleet_books import FleetBooks
from app.services.liquidation import Goal, Rules
from app.services.margin import Scene

LOOK = timedelta(seconds=1)
"""How often a pool under a call is looked at, whatever tells of it."""
MEMBERS_TOLD_MAX = 50
IN_A_THREAD_MIN = 20
"""Accounts from which on a pool is assessed in a thread: the process may have requests to answer."""


@dataclass(frozen=True, slots=True)
class Account:
    """One account of the pool: its book, what that comes to, also at best where prices are stale.

    The lowest `priority` is liquidated first. `call`: the one by which it is being liquidated for the fleet.
    """

    held: Book
    figures: AccountFigures
    best: Health
    stale: frozenset[str]
    priority: float
    call: StoredCall | None
    part: Part
    """What it brings into the pool."""
    part_at_best: Part
    targets: Sequence[Target]
    """What of it may be closed."""

    def may_be_sold(self, scene: Scene, rules: Rules) -> bool:
        """Whether its turn can come: not while its venue fills nothing, nor while what was tried is put off."""
        if not self.held.settings.auto_liquidate:
            return False
        if self.call is None:
            return True
        again = self.call.next_action_at
        is_put_off = self.call.attempts == 0 and again is not None and again > scene.now + LOOK
        return self.call.attempts <= rules.venue_attempts and not is_put_off


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool as it stands, by the id of the account. `rules`: smallest first within a member, whatever else is set."""

    fleet_id: str
    master_id: str
    accounts: Mapping[str, Account]
    scene: Scene
    policy: HealthPolicy
    rules: Rules
    health: Health
    best: Health

    @classmethod
    def of(cls, books: FleetBooks, scene: Scene, rules: Rules, turns: Mapping[str, StoredCall]) -> Pool:
        """Return the pool of a fleet's books. Raises InvalidError for a missing price."""
        ranks = [(math.inf, books.master)]
        ranks += [(m.liquidation_priority, held) for m, held in books.members if m.delegation == "pooled"]
        found = {held.agent_id: _account(scene, held, rank, turns.get(held.agent_id)) for rank, held in ranks}
        market = scene.market.parameters.policy
        policy = pool_policy(market, books.master.settings.policy(market))
        return cls(
            fleet_id=books.fleet.id,
            master_id=books.master.agent_id,
            accounts=found,
            scene=scene,
            policy=policy,
            rules=replace(rules, policy="smallest_first"),
            health=_health(found, policy),
            best=_health(found, policy, at_best=True),
        )

    @property
    def in_doubt(self) -> bool:
        """Whether so much is stale that figures as they are decide nothing for the better."""
        return self.best.equity - self.health.equity > staleness.GRAIN_SHARE_MAX * abs(self.health.equity)

    def with_book(self, held: Book) -> Pool:
        """Return the pool after one of its books has changed."""
        known = self.accounts[held.agent_id]
        found = {**self.accounts, held.agent_id: _account(self.scene, held, known.priority, known.call)}
        health, best = _health(found, self.policy), _health(found, self.policy, at_best=True)
        return replace(self, accounts=found, health=health, best=best)

    def situation(self, *, anything_left: bool, waiting: bool = False) -> Situation:
        """Return what the fleet's call is judged on. Nothing is breached that a stale price might make good."""
        judged = self._judged(self.health, anything_left=anything_left, waiting=waiting)
        if not self.in_doubt:
            return judged
        return replace(judged, pool=self._judged(self.best, anything_left=anything_left, waiting=waiting).pool)

    def _judged(self, health: Health, *, anything_left: bool, waiting: bool) -> Situation:
        found = situation(health, self.policy, isolated_breached=False, anything_left=anything_left, waiting=waiting)
        return replace(found, of_fleet=True)

    @property
    def is_breached(self) -> bool:
        """Whether it is past its breach level, at best. What the master alone has at stake is its own call's."""
        if not any(a.part.required_initial > 0.0 for name, a in self.accounts.items() if name != self.master_id):
            return False
        return self.situation(anything_left=True).cause is not None

    @property
    def may_stop(self) -> bool:
        """Whether enough was sold."""
        return self.situation(anything_left=True).may_stop

    def line(self) -> list[str]:
        """Return whose turns are to come, who has something to close: by priority, the master last.

        Of the same priority comes first who has begun, then the worst off.
        """
        found = []
        for agent_id, account in self.accounts.items():
            if account.targets and account.may_be_sold(self.scene, self.rules):
                ratio = account.figures.health.margin_ratio
                worst = -math.inf if ratio is None else -ratio
                found.append((account.priority, account.call is None, worst, agent_id))
        return [agent_id for *_, agent_id in sorted(found)]

    @property
    def passes_over(self) -> bool:
        """Whether something may be closed of accounts whose turns can't come now: of a venue, or put off."""
        return any(
            account.held.settings.auto_liquidate and account.targets and not account.may_be_sold(self.scene, self.rules)
            for account in self.accounts.values()
        )

    def next_slice(self, agent_id: str) -> Slice:
        """Return what of an account is closed next, at least one target, as far as the pool's stop level asks."""
        account = self.accounts[agent_id]
        return liquidation.next_slice(
            account.held, self.scene, account.figures, self.rules, account.targets, self._goal(agent_id)
        )

    def _goal(self, agent_id: str) -> Goal:
        others = total_of(account.part for name, account in self.accounts.items() if name != agent_id)

        def assess(held: Book) -> AccountFigures:
            figures = self.scene.figures(held)
            part = Part.of(figures.health, leveraged=held.is_leveraged)
            return replace(figures, health=pool_health(others + part, self.policy))

        return Goal(assess, self.policy.stop_utilization)

    def cure(self) -> dict[str, Any]:
        """Return what ends a call of the pool: a deposit to the master. And who would be liquidated, in which order."""
        master = self.accounts[self.master_id]
        lack = max(0.0, self.health.required_initial / self.policy.cure_utilization - self.health.equity)
        hole = max(0.0, -master.figures.health.equity) if lack else 0.0
        amount = liquidation.deposit_for(self.scene, master.held, lack + hole)
        line = self.line()
        members = [_shown(self.accounts[agent_id]) for agent_id in line[:MEMBERS_TOLD_MAX]]
        return {"deposit": {"asset": SETTLEMENT_ASSET, "amount": amount}, "members": members}

    @property
    def members(self) -> list[str]:
        """Whose accounts it is made of besides the master's."""
        return [agent_id for agent_id in self.accounts if agent_id != self.master_id]

    def about_to_open(self) -> list[str]:
        """Return the members with orders at a venue that would open something."""
        return [
            agent_id
            for agent_id in self.members
            if any(not order.reduce_only for order in self.accounts[agent_id].held.pending)
        ]


def _account(scene: Scene, held: Book, priority: float, call: StoredCall | None) -> Account:
    figures = scene.figures(held)
    stale = staleness.stale(scene, figures)
    best, leveraged = staleness.at_best(scene, held, figures, stale), held.is_leveraged
    parts = Part.of(figures.health, leveraged=leveraged), Part.of(best, leveraged=leveraged)
    return Account(held, figures, best, stale, priority, call, *parts, liquidation.targets(held, figures, stale=stale))


def _health(accounts: Mapping[str, Account], policy: HealthPolicy, *, at_best: bool = False) -> Health:
    parts = (account.part_at_best if at_best else account.part for account in accounts.values())
    return pool_health(total_of(parts), policy)


def _shown(account: Account) -> dict[str, Any]:
    health = account.figures.health
    return {
        "agent_id": account.held.agent_id,
        "equity": health.equity,
        "required_initial": health.required_initial,
        "utilization": health.utilization,
    }


async def load(tx: Tx, scene: Scene, rules: Rules, fleet_id: str) -> Pool:
    """Return a fleet's pool as one statement sees it. Raises InvalidError for a missing price, NotFoundError.

    Where it is decided on, the master is locked. Members that are not may move on meanwhile: no more than if they had
    waited for it, for nothing of theirs is written, and what they draw or give back waits for the master.
    """
    books = await fleet_books.load(tx, await stored.get(tx, fleet_id, None))
    turns = await calls.turns(tx, [held.agent_id for held in books.pooled])
    if len(books.members) < IN_A_THREAD_MIN:
        return Pool.of(books, scene, rules, turns)
    return await asyncio.to_thread(Pool.of, books, scene, rules, turns)


async def called(tx: Tx, within: Collection[int]) -> list[str]:
    """Return the masters, in these shards, of the pools of which an account is under a call."""
    of_call, of_fleet, of_member = margin_calls.c, fleets.c, fleet_members.c
    live = of_call.state.in_(LIVE_STATES), shards.within(of_fleet.master_id, within)
    pooled = of_member.delegation == "pooled", of_member.joined_at.is_not(None)
    members = (
        select(of_fleet.master_id)
        .join(fleet_members, of_member.fleet_id == of_fleet.id)
        .join(margin_calls, of_call.agent_id == of_member.agent_id)
    )
    masters = select(of_fleet.master_id).join(margin_calls, of_call.agent_id == of_fleet.master_id)
    rows = await tx.connection.execute(union(members.where(*live, *pooled), masters.where(*live)))
    return list(rows.scalars())


async def is_to_be_called(tx: Tx, scene: Scene, rules: Rules, master_id: str) -> bool:
    """Tell whether a master's pool is past its breach level and under no call yet; one that is has a timer for it.

    Nothing is locked: members' draws do not wait for what is but looked at. Whoever decides judges anew. Where a price
    is missing nothing is to be called.
    """
    master = await book.load(tx, master_id)
    if master.leads is None or master.live_cause == "fleet":
        return False
    try:
        pool = await load(tx, scene, rules, master.leads)
    except InvalidError:
        return False
    return pool.is_breached
