"""The market in memory, so that a quote needs no query."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from app.domain.parameters import MarketParameters
from app.errors import DatabaseUnavailableError
from app.services.market import load_parameters, load_versions
from app.services.prices import load_prices

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from app.db.session import Database, Tx
    from app.domain.prices import StoredPrice

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MarketView:
    """The market as one read of the database saw it, and when; before the first read, the package's defaults."""

    parameters: MarketParameters = field(default_factory=MarketParameters)
    prices: Mapping[str, StoredPrice] = field(default_factory=lambda: MappingProxyType({}))
    price_version: int = 0
    read_at: datetime | None = None


class MarketCache:
    """Keeps one `MarketView` per process fresh, and the last one through an outage."""

    def __init__(self, database: Database) -> None:
        self.view = MarketView()
        self._database = database
        self._lock = asyncio.Lock()
        self._begun = 0
        self._done = 0
        self._read: float | None = None
        self._failing = False

    @property
    def age_seconds(self) -> float | None:
        """Return how long ago the view was found to be current, None before the first read."""
        return None if self._read is None else time.monotonic() - self._read

    async def refresh(self) -> MarketView:
        """Return a view at least as new as this call, so that a writer that refreshes sees its own write.

        Callers that wait for the same read share it. Raises DatabaseUnavailableError.
        """
        asked = self._begun
        async with self._lock:
            if self._done > asked:
                return self.view
            self._begun += 1
            self.view = await self._read_changes(self.view)
            self._done, self._read = self._begun, time.monotonic()
            return self.view

    async def run(self, every_seconds: float) -> None:
        """Refresh for ever; an outage is logged when it begins and when it ends."""
        while True:
            await self.try_refresh()
            await asyncio.sleep(every_seconds)

    async def try_refresh(self) -> None:
        """Refresh, or keep the last view where the database is away or not migrated yet."""
        try:
            await self.refresh()
        except (DatabaseUnavailableError, SQLAlchemyError) as error:
            if not self._failing:
                log.warning("the market can't be read, quotes use the last view: %s", type(error).__name__)
            self._failing = True
            return
        if self._failing:
            log.info("the market is read again")
        self._failing = False

    async def _read_changes(self, view: MarketView) -> MarketView:
        async with self._database.transaction("market-cache") as tx:
            return await _newer(tx, view)

    async def current(self, tx: Tx) -> MarketView:
        """Return the market as a transaction sees it, for a decision: also what another process has just posted."""
        return await _newer(tx, self.view)


async def _newer(tx: Tx, view: MarketView) -> MarketView:
    """Return the view with what was committed since it was read."""
    versions = await load_versions(tx)
    parameters = view.parameters
    if versions.parameters != parameters.version:
        parameters = await load_parameters(tx, versions.parameters)
    prices = view.prices
    if versions.prices != view.price_version:
        # Writers commit in the order of their versions, so none below the last one read can follow.
        prices = MappingProxyType({**prices, **await load_prices(tx, after=view.price_version)})
    return MarketView(parameters, prices, versions.prices, versions.read_at)
