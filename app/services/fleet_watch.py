"""What is looked at of fleets again and again: their zone is told, members are stood by, dry powder is restored.

A look is a worker's, fleet by fleet, each step in a transaction of its own that judges anew under its locks: two that
look at once tell once, and one that is killed in between has done nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from app.db.session import Database
from app.domain.watch import settled_level
from app.errors import ConflictError, DatabaseUnavailableError, PrimeriskError
from app.services import accounts, book, fleet_books, fleets
from app.services.delegation import Pair
from app.services.fleet_books import FleetBooks
from app.services.fleets import Fleet
from app.services.margin import Scene, Scenes
from app.services.stand_by import lacks, stand_by
from app.services.watch import zones
from app.telemetry import Metrics

log = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
FLEETS_A_LOOK_MAX = 200
CALM = ("GREEN", "YELLOW")


@dataclass
class FleetWatch:
    """Looks at fleets, as one worker."""

    worker_id: str
    database: Database
    scenes: Scenes
    metrics: Metrics
    after: str = ""
    """The fleet that was looked at last: where there are many, the next look goes on from it."""

    async def look(self, within: Collection[int]) -> None:
        """Look at the fleets whose masters are in these shards, a limited number. Raises DatabaseUnavailableError."""
        async with self.database.transaction(self.worker_id) as tx:
            found = await fleets.after(tx, self.after, FLEETS_A_LOOK_MAX, within)
        self.after = found[-1].id if len(found) == FLEETS_A_LOOK_MAX else ""
        for fleet in found:
            await self._one(fleet)

    async def _one(self, fleet: Fleet) -> None:
        try:
            async with self.database.transaction(self.worker_id) as tx:
                books = await fleet_books.load(tx, fleet)
                scene = await self.scenes.at(tx)
            await self._tell_zone(fleet, scene, books)
            for agent_id in needy(scene, books):
                await self._stand_by(fleet.master_id, agent_id)
        except DatabaseUnavailableError as error:
            if error.code != "database_busy":
                raise
        except PrimeriskError:  # a price lacks or is stale: nothing is told or moved
            log.info("nothing is decided on %s now", fleet.id, exc_info=True)

    async def _tell_zone(self, seen: Fleet, scene: Scene, books: FleetBooks) -> None:
        figures = fleet_books.figures(scene, books)
        scene.require_fresh(figures)
        used = figures.health.utilization
        zone = settled_level(zones(scene.market.parameters.policy), seen.zone, used)
        if zone == seen.zone:
            return
        async with self.database.transaction(self.worker_id) as tx:
            await accounts.lock_account(tx, seen.master_id)
            fleet = await fleets.get(tx, seen.id, None)
            if fleet.zone != seen.zone:
                return  # another worker has told it
            told: dict[str, Any] = {"utilization": used, "equity": figures.equity}
            told["required_initial"] = figures.health.required_initial
            moved = await fleets.tell_zone(tx, fleet, zone, told)
            if zone in CALM and moved.released_at is not None and seen.zone not in CALM:
                await fleets.restore_dry_powder(tx, moved, f"the fleet is in {zone} again")
        self.metrics.fleet_zone_changes.labels(zone).inc()

    async def _stand_by(self, master_id: str, agent_id: str) -> None:
        try:
            async with self.database.transaction(self.worker_id) as tx:
                books = await book.lock_all(tx, {master_id, agent_id})
                drawn = await stand_by(tx, await self.scenes.at(tx), Pair(books[agent_id], books[master_id]))
        except ConflictError as refused:  # it has come to its cap, or the fleet to its own: the next one may not have
            log.info("nothing is drawn for %s: %s", agent_id, refused.code)
            return
        if drawn:
            self.metrics.fleet_top_ups.inc()


def needy(scene: Scene, books: FleetBooks) -> list[str]:
    """Return the pooled members that are past their breach level, the first to be liquidated last."""
    found = [
        (-member.liquidation_priority, held.agent_id)
        for member, held in books.members
        if member.delegation == "pooled" and not member.reduce_only and lacks(scene, held) > 0
    ]
    return [agent_id for _, agent_id in sorted(found)]
