"""Whether the correlations of what a fleet holds have drifted from calm ones: told when they have, and when no more.

Closes come once a day, and what a fleet holds changes seldom: a fleet is looked at once a minute, and nothing is
computed while the history, the parameters and the assets are those of the last time. One whose drift can't be computed
is left alone for longer and longer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from app.db.session import Database, Tx
from app.errors import DatabaseUnavailableError
from app.services import accounts, fleet_risk, fleets
from app.services.fleet_books import FleetBooks
from app.services.fleets import Fleet
from app.services.history_cache import HistoryCache
from app.services.margin import Scene
from app.telemetry import Metrics

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
DOUBLINGS_MAX = 4
"""How often that time is doubled, after one failure more each time."""
CLEAR = 0.9
"""A drift is over at this share of the limit: a figure that trembles at it is told once."""
FLEETS_REMEMBERED_MAX = 10_000

Basis = tuple[int, int, tuple[str, ...]]
"""Versions of the history and of the parameters, and the assets held."""


@dataclass(frozen=True, slots=True)
class _Look:
    """When a fleet was looked at last, what the figure stood on, and how often it could not be computed since."""

    at: float = float("-inf")
    basis: Basis | None = None
    failures: int = 0


@dataclass
class DriftWatch:
    """Looks at the correlations of fleets, as one worker."""

    worker_id: str
    database: Database
    metrics: Metrics
    clock: Callable[[], float] = time.monotonic
    every_seconds: float = EVERY_SECONDS
    history: HistoryCache = field(init=False)
    _seen: OrderedDict[str, _Look] = field(default_factory=OrderedDict)
    """The last look at each fleet."""

    def __post_init__(self) -> None:
        self.history = HistoryCache(self.database)

    async def look(self, fleet: Fleet, scene: Scene, books: FleetBooks) -> None:
        """Tell a fleet's drift where it has begun or is over; that it can't be computed once, until it can.

        Raises DatabaseUnavailableError.
        """
        last, now = self._seen.get(fleet.id, _Look()), self.clock()
        if now < last.at + self.every_seconds * 2.0 ** min(DOUBLINGS_MAX, max(0, last.failures - 1)):
            return
        try:
            basis = await self._judge(fleet, scene, books, last.basis)
        except DatabaseUnavailableError:
            raise  # no failure of the fleet's
        except Exception:
            if last.failures == 0:
                self.metrics.fleet_drift_failures.inc()
                detail = "the drift of %s can't be computed: it is tried again less and less often"
                log.warning(detail, fleet.id, exc_info=True)
            self._remember(fleet.id, _Look(now, None, last.failures + 1))
        else:
            if last.failures > 0:
                log.info("the drift of %s can be computed again", fleet.id)
            self._remember(fleet.id, _Look(now, basis))

    async def _judge(self, fleet: Fleet, scene: Scene, books: FleetBooks, before: Basis | None) -> Basis:
        """Compute a fleet's drift, if that is not to stand on the same as before, and tell of it; return on what."""
        names = fleet_risk.names_of(books, scene)
        known = await self.history.panel(names, fleet_risk.RECENT_DAYS)
        basis = known.version, scene.market.parameters.version, tuple(names)
        if basis != before:
            found = await asyncio.to_thread(fleet_risk.drifted, books, scene, known.panel)
            await self._settle(fleet, found)
        return basis

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

    def _remember(self, fleet_id: str, look: _Look) -> None:
        self._seen[fleet_id] = look
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
