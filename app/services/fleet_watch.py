"""What is looked at of fleets again and again: zone and drift are told, members stood by, dry powder restored.

A look is a worker's, fleet by fleet, each step in a transaction of its own that judges anew under its locks: two that
look at once tell once, and one that is killed in between has done nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from app.db.session import Database
from app.domain.book import Book
from app.domain.watch import settled_level
from app.errors import ConflictError, DatabaseUnavailableError, InvalidError, PrimeriskError
from app.services import accounts, book, fleet_books, fleets
from app.services.delegation import Pair
from app.services.fleet_books import FleetBooks
from app.services.fleet_drift import DriftWatch
from app.services.fleet_returns import Returns
from app.services.fleets import Fleet
from app.services.margin import Scene, Scenes
from app.services.stand_by import lacks, stand_by
from app.services.watch import zones
from app.telemetry import Metrics

log = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
FLEETS_A_LOOK_MAX = 200
STAND_BY_SECONDS_MAX = 2.0
"""How long members of one fleet are stood by in one look; then others come, and the next look goes on from there."""
CALM = ("GREEN", "YELLOW")


@dataclass
class _Left:
    """What a fleet can still spare in one look: less than this, as far as is known."""

    below: Decimal | None = None


@dataclass
class FleetWatch:
    """Looks at fleets, as one worker."""

    worker_id: str
    database: Database
    scenes: Scenes
    metrics: Metrics
    drift: DriftWatch = field(init=False)
    returns: Returns = field(init=False)
    after: str = ""
    """The fleet that was looked at last: where there are many, the next look goes on from it."""
    stand_by_seconds_max: float = STAND_BY_SECONDS_MAX
    _reached: dict[str, str] = field(default_factory=dict)
    """By fleet, the member with whom the next look begins, where one look was not enough."""

    def __post_init__(self) -> None:
        self.drift = DriftWatch(self.worker_id, self.database, self.metrics)
        self.returns = Returns(self.worker_id, self.database, self.scenes)

    async def look(self, within: Collection[int]) -> None:
        """Look at the fleets whose masters are in these shards, a limited number. Raises DatabaseUnavailableError."""
        async with self.database.transaction(self.worker_id) as tx:
            found = await fleets.after(tx, self.after, FLEETS_A_LOOK_MAX, within)
        self.after = found[-1].id if len(found) == FLEETS_A_LOOK_MAX else ""
        with self.metrics.fleet_look_seconds.time():
            for fleet in found:
                await self._unless_it_fails(fleet, self._one(fleet))

    async def _one(self, fleet: Fleet) -> None:
        async with self.database.transaction(self.worker_id) as tx:
            books = await fleet_books.load(tx, fleet)
            scene = await self.scenes.at(tx)
        await self._unless_it_fails(fleet, self._tell_zone(fleet, scene, books))
        await self._unless_it_fails(fleet, self._stand_by_all(fleet, scene, books))
        await self._unless_it_fails(fleet, self.returns.look(fleet, scene, books))
        await self._unless_it_fails(fleet, self.drift.look(fleet, scene, books))

    async def _unless_it_fails(self, fleet: Fleet, step: Awaitable[None]) -> None:
        """Take a step; one that can't be taken keeps nobody from another. Raises DatabaseUnavailableError."""
        try:
            await step
        except DatabaseUnavailableError as error:
            if error.code != "database_busy":
                raise
        except PrimeriskError:  # a price lacks or is stale: nothing is told or moved
            log.info("nothing is decided on %s now", fleet.id, exc_info=True)
        except Exception:
            self.metrics.decision_failures.inc()
            log.exception("%s can't be looked at", fleet.id)

    async def _stand_by_all(self, fleet: Fleet, scene: Scene, books: FleetBooks) -> None:
        """Stand by the members that can be judged now: where a price of one is stale, the others are not let down.

        What the fleet could not spare for one it can't for who needs as much: they wait for the next look.
        """
        known = [(member, held) for member, held in books.members if _can_be_judged(scene, held)]
        line = _from(self._reached.pop(fleet.id, ""), needy(scene, replace(books, members=known)))
        until, left = time.monotonic() + self.stand_by_seconds_max, _Left()
        for place, (agent_id, amount) in enumerate(line):
            if place > 0 and time.monotonic() > until:
                self._reached[fleet.id] = agent_id
                return
            if left.below is None or amount < left.below:
                await self._unless_it_fails(fleet, self._stand_by(fleet.master_id, agent_id, amount, left))

    async def _tell_zone(self, seen: Fleet, scene: Scene, books: FleetBooks) -> None:
        """Tell a fleet's zone where it has changed, and restore its dry powder once it is out of its emergency."""
        figures = fleet_books.figures(scene, books)
        scene.require_fresh(figures)
        used = figures.health.utilization
        zone = settled_level(zones(scene.market.parameters.policy), seen.zone, used)
        is_over = zone in CALM and _is_over(seen, books)
        if zone == seen.zone and not is_over:
            return
        async with self.database.transaction(self.worker_id) as tx:
            await accounts.lock_account(tx, seen.master_id)
            fleet = await fleets.get(tx, seen.id, None)
            if fleet.zone != seen.zone or fleet.released_at != seen.released_at:
                return  # another worker has told it, or its coordinator has acted meanwhile: the next look sees
            if zone != seen.zone:
                told: dict[str, Any] = {"utilization": used, "equity": figures.equity}
                told["required_initial"] = figures.health.required_initial
                fleet = await fleets.tell_zone(tx, fleet, zone, told)
            if is_over:
                await fleets.restore_dry_powder(tx, fleet, f"the fleet is in {zone} again")
        if zone != seen.zone:
            self.metrics.fleet_zone_changes.labels(zone).inc()

    async def _stand_by(self, master_id: str, agent_id: str, amount: Decimal, left: _Left) -> None:
        try:
            async with self.database.transaction(self.worker_id) as tx:
                books = await book.lock_all(tx, {master_id, agent_id})
                drawn = await stand_by(tx, await self.scenes.at(tx), Pair(books[agent_id], books[master_id]))
        except ConflictError as refused:  # it has come to its cap, or the fleet to its own: the next one may not have
            log.info("nothing is drawn for %s: %s", agent_id, refused.code)
            if refused.code == "fleet_exhausted":
                left.below = amount
            return
        if drawn:
            self.metrics.fleet_top_ups.inc()


def _is_over(fleet: Fleet, books: FleetBooks) -> bool:
    """Tell whether an emergency is over for which dry powder may be out, the zone being calm.

    What was released for an emergency stays out while the fleet is called: what nets as one may be in breach by parts.
    """
    return books.master.live_cause != "fleet" if fleet.in_emergency else fleet.zone not in CALM


def _can_be_judged(scene: Scene, held: Book) -> bool:
    """Tell whether all prices of an account that is under a call are there and fresh; of others none is needed."""
    if held.live_call is None:
        return True
    try:
        scene.require_fresh(scene.figures(held))
    except (ConflictError, InvalidError):
        return False
    return True


def _from(first: str, needs: Mapping[str, Decimal]) -> list[tuple[str, Decimal]]:
    """Return who lacks how much, from one of them on, and then those before; in their order where that one is none."""
    line = list(needs.items())
    start = next((k for k, (agent_id, _) in enumerate(line) if agent_id == first), 0)
    return line[start:] + line[:start]


def needy(scene: Scene, books: FleetBooks) -> dict[str, Decimal]:
    """Return what the pooled members lack that are past their breach level, the first to be liquidated last."""
    found = [
        (-member.liquidation_priority, held.agent_id, amount)
        for member, held in books.members
        if member.delegation == "pooled" and not member.reduce_only and (amount := lacks(scene, held)) > 0
    ]
    return {agent_id: amount for _, agent_id, amount in sorted(found)}
