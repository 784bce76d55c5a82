"""Panels of daily returns in memory, as long as the stored history is the one that they were read from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from app.db.session import Database
from app.domain.panel import Panel
from app.services.closes import history_version, load_panel

CELLS_MAX = 8_000_000
"""Returns that are remembered in all: 64 MB."""
_VERSION = "SELECT version FROM market_state WHERE name = 'history'"


@dataclass(frozen=True, slots=True)
class Known:
    """A panel, and the version of the history that it was read under."""

    panel: Panel
    version: int


class HistoryCache:
    """The panels that were asked for last."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._version = -1
        self._known: OrderedDict[tuple[tuple[str, ...], int], Panel] = OrderedDict()
        self._cells = 0

    async def panel(self, assets: Sequence[str], days: int) -> Known:
        """Return the panel of the latest `days` daily returns of these assets. Raises DatabaseUnavailableError."""
        key = tuple(sorted(set(assets))), days
        version = await self._database.fetch_value(_VERSION)
        if version == self._version and key in self._known:
            self._known.move_to_end(key)
            return Known(self._known[key], version)
        async with self._database.transaction("history-cache") as tx:
            # the version first: what is committed in between is read again with the next version
            version = await history_version(tx)
            panel = await load_panel(tx, key[0], days)
        self._keep(version, key, panel)
        return Known(panel, version)

    def _keep(self, version: int, key: tuple[tuple[str, ...], int], panel: Panel) -> None:
        if version < self._version:
            return
        if version > self._version:
            self._known.clear()
            self._version, self._cells = version, 0
        if key not in self._known:
            self._cells += panel.returns.size
        self._known[key] = panel
        while self._cells > CELLS_MAX and self._known:
            self._cells -= self._known.popitem(last=False)[1].returns.size
