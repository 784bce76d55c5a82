"""What members have drawn flows back after what they did not ask for too: a liquidation, a venue's fill, a due timer.

A request's own give-back is in `delegation`. A book that has not changed since it was judged is not looked at again,
so that a price alone moves no money. Nor does any while an account of the fleet's pool is in breach or under a call:
what one member's liquidation sets free would save another one or not, by who comes first, and no cascade could be
foretold.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from app.db.session import Database
from app.domain.book import Book
from app.errors import ConflictError, InvalidError
from app.services import book, delegation
from app.services.delegation import Pair
from app.services.fleet_books import FleetBooks
from app.services.fleets import Fleet
from app.services.margin import Scene, Scenes

MEMBERS_A_LOOK_MAX = 50
MEMBERS_REMEMBERED_MAX = 100_000
LEAST = Decimal(1)
"""USDC below which nothing is moved unasked."""
UNJUDGED = -1
"""In place of a version: what the member can spare was not known, for a stale price or a call."""


@dataclass
class Returns:
    """Has what can be spared given back, as one worker."""

    worker_id: str
    database: Database
    scenes: Scenes
    _seen: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Versions of the books that were looked at, by member."""

    async def look(self, fleet: Fleet, scene: Scene, books: FleetBooks) -> None:
        """Look at the members whose books have changed, some at a time.

        Raises DatabaseUnavailableError, InvalidError for a price that lacks.
        """
        pool = (books.master, *books.pooled)
        if any(held.live_call is not None for held in pool):
            return
        changed = [
            held
            for member, held in books.members
            if member.drawn > 0 and held.live_call is None and self._seen.get(held.agent_id) != held.version
        ]
        changed.sort(key=lambda held: self._seen.get(held.agent_id) == UNJUDGED)  # they keep no other one waiting
        del changed[MEMBERS_A_LOOK_MAX:]
        spare = {held.agent_id for held in changed if delegation.spare(scene, held) >= LEAST}
        if spare:
            in_breach = await asyncio.to_thread(_in_breach, scene, pool)
            if in_breach:
                return  # its call is about to be made
        for held in changed:
            version = held.version if _is_known(scene, held) else UNJUDGED
            if held.agent_id in spare:
                version = await self._give_back(fleet.master_id, held.agent_id)
            self._remember(held.agent_id, version)

    async def _give_back(self, master_id: str, agent_id: str) -> int:
        """Have what a member can spare given back; return the version of its book after it.

        Not where the master has been called meanwhile: then it is looked at again after that.
        """
        async with self.database.transaction(self.worker_id) as tx:
            books = await book.lock_all(tx, {master_id, agent_id})
            held = books[agent_id]
            if books[master_id].live_call is not None:
                return UNJUDGED
            if held.delegation is not None and held.delegation.master_id == master_id:  # else it has left meanwhile
                await delegation.give_back(tx, await self.scenes.at(tx), Pair(held, books[master_id]))
        return held.version

    def _remember(self, agent_id: str, version: int) -> None:
        self._seen[agent_id] = version
        self._seen.move_to_end(agent_id)
        if len(self._seen) > MEMBERS_REMEMBERED_MAX:
            self._seen.popitem(last=False)


def _is_known(scene: Scene, held: Book) -> bool:
    """Tell whether what a member can spare is known: not before all its prices are there and fresh."""
    try:
        scene.require_fresh(scene.figures(held))
    except (ConflictError, InvalidError):
        return False
    return True


def _in_breach(scene: Scene, pool: Sequence[Book]) -> bool:
    """Tell whether any account is past its breach level. Raises InvalidError for a price that lacks."""
    market = scene.market.parameters.policy
    for held in pool:
        if not held.is_leveraged:
            continue
        used = scene.figures(held).health.utilization
        if used is None or used >= held.settings.policy(market).breach_utilization:
            return True
    return False
