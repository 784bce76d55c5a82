"""Whether the correlations of what a fleet holds have drifted from calm ones: told when they have, and when no more.

Closes come once a day, and what a fleet holds changes seldom: a fleet is looked at once a minute, and nothing is
computed while the history, the parameters and the assets are those of the last time.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from app.db.session import Database, Tx
from app.services import accounts, fleet_risk, fleets
from app.services.fleet_books import FleetBooks
from app.services.fleets import Fleet
from app.services.history_cache import HistoryCache
from app.services.margin import Scene

EVERY_SECONDS = 60.0
CLEAR = 0.9
"""A drift is over at this share of the limit: a figure that trembles at it is told once."""
FLEETS_REMEMBERED_MAX = 10_000

Basis = tuple[int, int, tuple[str, ...]]
"""Versions of the history and of the parameters, and the assets held."""


@dataclass
class DriftWatch:
    """Looks at the correlations of fleets, as one worker."""

    worker_id: str
    database: Database
    every_seconds: float = EVERY_SECONDS
    history: HistoryCache = field(init=False)
    _seen: OrderedDict[str, tuple[float, Basis]] = field(default_factory=OrderedDict)
    """By fleet when it was looked at last, and what the figure stood on."""

    def __post_init__(self) -> None:
        self.history = HistoryCache(self.database)

    async def look(self, fleet: Fleet, scene: Scene, books: FleetBooks) -> None:
        """Tell a fleet's drift where it has begun or is over. Raises InvalidError, DatabaseUnavailableError."""
        looked_at, before = self._seen.get(fleet.id, (float("-inf"), None))
        now = time.monotonic()
        if now < looked_at + self.every_seconds:
            return
        names = fleet_risk.names_of(books, scene)
        known = await self.history.panel(names, fleet_risk.RECENT_DAYS)
        basis = known.version, scene.market.parameters.version, tuple(names)
        if basis != before:
            found = await asyncio.to_thread(fleet_risk.drifted, books, scene, known.panel)
            await self._settle(fleet, found)
        self._remember(fleet.id, now, basis)

    async def _settle(self, seen: Fleet, found: dict[str, Any] | None) -> None:
        if _is_drifting(seen, found) == (seen.drifted_at is not None):
            return
        async with self.database.transaction(self.worker_id) as tx:
            await self._tell(tx, seen, found)

    async def _tell(self, tx: Tx, seen: Fleet, found: dict[str, Any] | None) -> None:
        await accounts.hold_account(tx, seen.master_id)
        fleet = await fleets.get(tx, seen.id, None)
        drifting = _is_drifting(fleet, found)
        if drifting != (fleet.drifted_at is not None):  # else another worker has told it
            await fleets.tell_drift(tx, fleet, found or {}, drifting=drifting)

    def _remember(self, fleet_id: str, now: float, basis: Basis) -> None:
        self._seen[fleet_id] = now, basis
        self._seen.move_to_end(fleet_id)
        if len(self._seen) > FLEETS_REMEMBERED_MAX:
            self._seen.popitem(last=False)


def _is_drifting(fleet: Fleet, found: dict[str, Any] | None) -> bool:
    """Tell whether correlations are too far off, from where it was told last; those of nothing are not."""
    if found is None:
        return False
    limit: float = found["limit"] * (1.0 if fleet.drifted_at is None else CLEAR)
    mean_distance: float = found["mean_distance"]
    return mean_distance >= limit
