"""The screen at work: what has changed, whom it touches, and on whom a decision is due. It decides nothing.

The screen's arithmetic runs in a thread, one piece after the other, so that a process that also answers requests goes
on answering them meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np

from app.db.session import Database
from app.domain.black76 import Floats
from app.domain.book_columns import BookColumns
from app.domain.portfolio import Flags, Rows
from app.domain.screen import BREACHED, CALLED, Screen, Standing
from app.domain.tally import Tally, tally
from app.domain.watch import Band, Ranks, levels_moved
from app.services import fleet_books, screen_book, watch
from app.services.market_cache import MarketCache, MarketView
from app.services.shards import ALL

STALE_SECONDS = 1.0
"""How often prices are looked over for those that have gone stale."""
TALLY_SECONDS = 2.0
"""How often all accounts are counted for the operator."""

_NOBODY: Rows = np.zeros(0, dtype=np.intp)
_QUIET = Band(-np.inf, np.inf)


@dataclass(frozen=True, slots=True)
class Named:
    """Agents on whom a decision is due: those past a level at which it matters when, and those with news to tell.

    Of the former those whose equity covers the least of their maintenance margin come first; `masters`: who leads the
    fleets that they are members of.
    """

    urgent: Sequence[str] = ()
    others: Sequence[str] = ()
    masters: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Told:
    """What was last told of the screen's accounts, by their index (n,).

    `zone` and `alert` are ranks; `low` and `high` bound the equity within which there is nothing to tell of the
    drawdown; `judged` is the standing in which an account with an open call was last decided on. Who `waits` could not
    be decided on, for a price was stale.
    """

    zone: Ranks
    alert: Ranks
    low: Floats
    high: Floats
    judged: Standing
    waits: Flags

    @classmethod
    def of(cls, count: int) -> _Told:
        """Return what is told of accounts of whom nothing was: GREEN, OK, followed by nobody."""
        nothing, unknown = np.zeros((2, count), dtype=np.int8), np.full(count, 255, dtype=np.uint8)
        bounds, nobody = np.full((2, count), np.inf), np.zeros(count, dtype=np.bool_)
        return cls(nothing[0], nothing[1], -bounds[0], bounds[1], unknown, nobody)

    def learn(
        self, screen: Screen, accounts: Rows, levels: Mapping[str, tuple[int, int]], bands: Mapping[str, Band]
    ) -> None:
        """Take in what was told of accounts, new ones too."""
        new = self.of(len(screen) - len(self.zone))
        for name in self.__slots__:
            setattr(self, name, np.concatenate([getattr(self, name), getattr(new, name)]))
        self.low[accounts], self.high[accounts], self.judged[accounts] = -np.inf, np.inf, 255
        _set(screen, self.zone, {agent: zone for agent, (zone, _) in levels.items()})
        _set(screen, self.alert, {agent: level for agent, (_, level) in levels.items()})
        _set(screen, self.low, {agent: band.low for agent, band in bands.items()})
        _set(screen, self.high, {agent: band.high for agent, band in bands.items()})


@dataclass(frozen=True, slots=True)
class _Note:
    """What a decision has told of an account."""

    agent: str
    levels: tuple[int, int]
    band: Band
    waits: bool


class Watchman:
    """Keeps the screen of the accounts in some shards up to date, and names those on whom a decision is due."""

    def __init__(self, actor: str, database: Database, market: MarketCache, price_age_max: timedelta) -> None:
        self._actor = actor
        self._database = database
        self._market = market
        self._price_age_max = price_age_max
        self._shards: frozenset[int] = frozenset()
        self._screen: Screen | None = None
        self._horizon = ""
        self._prices: dict[str, float] = {}
        self._told = _Told.of(0)
        self._notes: list[_Note] = []
        self._looking = False
        self._stale: frozenset[str] = frozenset()
        self._stale_at = 0.0
        self.tally: Tally | None = None
        """How the accounts stand that are screened here, once they have been looked at."""
        self._tally_at = 0.0

    async def look(self, shards: frozenset[int]) -> Named:
        """Take in what has changed since the last look, and name the agents on whom a decision is due.

        Raises DatabaseUnavailableError; whatever stops it half-way, the next look begins anew.
        """
        self._looking = True
        try:
            await self._count()
            if self._screen is None or not shards >= self._shards:
                return await self._begin(shards)
            return await self._go_on(self._screen, shards)
        except BaseException:
            self._screen = None
            raise
        finally:
            self._looking = False
            self._take_notes()

    def decided(self, agent: str, levels: tuple[int, int], band: Band | None, *, waits: bool) -> None:
        """Take note of what is now told of an account; during a look, of what it reads meanwhile, at its end."""
        self._notes.append(_Note(agent, levels, band or _QUIET, waits))
        if not self._looking:
            self._take_notes()

    def _take_notes(self) -> None:
        told, index = self._told, {} if self._screen is None else self._screen.index
        for note in self._notes:
            row = index.get(note.agent)
            if row is not None:
                told.zone[row], told.alert[row] = note.levels
                told.low[row], told.high[row] = note.band.low, note.band.high
                told.waits[row] = note.waits
        self._notes.clear()

    async def _begin(self, shards: frozenset[int]) -> Named:
        self._screen = None
        view = await self._market.refresh()
        loaded = await screen_book.load_all(self._database, _only(shards))
        prices = _prices(view)
        screen, told = Screen(view.parameters, prices), _Told.of(0)
        await self._take(screen, told, loaded.columns, None)
        self._screen, self._told, self._prices = screen, told, prices
        self._horizon, self._shards = loaded.horizon, shards
        self._take_notes()
        return await self._named(screen, np.arange(len(screen)), _NOBODY)

    async def _go_on(self, screen: Screen, shards: frozenset[int]) -> Named:
        view = await self._market.refresh()
        touched = _NOBODY
        if view.parameters.version != screen.parameters.version:
            screen = await asyncio.to_thread(screen.under, view.parameters)
            touched = np.arange(len(screen))
        prices = _prices(view)
        moved = {symbol: price for symbol, price in prices.items() if self._prices.get(symbol) != price}
        if moved:
            figures = await asyncio.to_thread(screen.tick, moved)
            touched = np.union1d(touched, figures.accounts)
            self._prices = prices
        loaded = await screen_book.load_changed(self._database, screen.version_of, self._horizon, _only(self._shards))
        touched = np.union1d(touched, await self._take(screen, self._told, loaded.columns, loaded.columns.agents))
        self._horizon = loaded.horizon
        if shards != self._shards:
            gained = await screen_book.load_all(self._database, _only(shards - self._shards))
            touched = np.union1d(touched, await self._take(screen, self._told, gained.columns, gained.columns.agents))
            self._shards = shards
        self._screen = screen
        self._take_notes()
        return await self._named(screen, touched, self._gone_stale(screen))

    async def _take(self, screen: Screen, told: _Told, columns: BookColumns, agents: Sequence[str] | None) -> Rows:
        """Put books into the screen, with what was told of their accounts; return them. `agents` None: everybody's."""
        if not len(columns.agents):
            return _NOBODY
        accounts = await asyncio.to_thread(screen.update, columns)
        async with self._database.transaction(self._actor) as tx:
            levels = await watch.told_levels(tx, agents)
            bands = await watch.followed(tx, screen.parameters.policy, agents)
        await asyncio.to_thread(told.learn, screen, accounts, levels, bands)
        return accounts

    async def _named(self, screen: Screen, touched: Rows, stale: Rows) -> Named:
        """Return the agents of those touched on whom a decision is due, and those whose prices have gone stale."""
        if not len(touched) + len(stale):
            return Named()
        urgent, others = await asyncio.to_thread(self._due, screen, touched)
        others = np.union1d(others, stale)
        names, news = ([screen.agents[row] for row in rows.tolist()] for rows in (urgent, others))
        if not names:
            return Named(names, news)
        async with self._database.transaction(self._actor) as tx:
            return Named(names, news, await fleet_books.masters_of(tx, names))

    def _due(self, screen: Screen, touched: Rows) -> tuple[Rows, Rows]:
        """Return who is in breach without a call, or has one and is not, or stands otherwise than when it was judged.

        The worst off come first. And of whom else something is no longer as it was told.
        """
        figures, told, policy = screen.figures(touched), self._told, screen.parameters.policy
        stands = screen.standing(touched)
        called, breached = (stands & CALLED) != 0, (stands & BREACHED) != 0
        urgent = np.where(called, ~breached | (stands != told.judged[touched]), breached)
        told.judged[touched] = stands
        moved = levels_moved(watch.zones(policy), told.zone[touched], figures.utilization)
        moved |= levels_moved(watch.levels(policy), told.alert[touched], figures.margin_ratio)
        equity = screen.whole_equity(touched)
        moved |= (equity <= told.low[touched]) | (equity >= told.high[touched])
        worst_first = np.lexsort((equity[urgent], -figures.margin_ratio[urgent]))
        return touched[urgent][worst_first], touched[moved & ~urgent]

    async def _count(self) -> None:
        """Count the accounts where it is time to."""
        now = time.monotonic()
        if self._screen is None or now < self._tally_at + TALLY_SECONDS:
            return
        self._tally_at, told, policy = now, self._told, self._screen.parameters.policy
        zones, levels = (watch.zones(policy).names, told.zone), (watch.levels(policy).names, told.alert)
        self.tally = await asyncio.to_thread(tally, self._screen, zones, levels)

    def _gone_stale(self, screen: Screen) -> Rows:
        """Return the accounts with a price that has gone stale or is fresh again, and those that need wait no more.

        No tick tells of it: a price may be posted again unchanged.
        """
        now = time.monotonic()
        if now < self._stale_at + STALE_SECONDS:
            return _NOBODY
        oldest = self._database.clock.now() - self._price_age_max
        stale = frozenset(symbol for symbol, price in self._market.view.prices.items() if price.as_of < oldest)
        changed = stale ^ self._stale
        self._stale, self._stale_at = stale, now
        waiting = np.flatnonzero(self._told.waits)
        if len(waiting):
            waiting = np.setdiff1d(waiting, screen.depending_on(stale))
            self._told.waits[waiting] = False
        return np.union1d(waiting, screen.depending_on(changed)) if changed else waiting


def _prices(view: MarketView) -> dict[str, float]:
    return {symbol: price.value for symbol, price in view.prices.items()}


def _only(shards: frozenset[int]) -> Sequence[int] | None:
    """Return what the loader takes: None for every account, which costs it nothing to choose."""
    return None if shards == ALL else sorted(shards)


def _set(screen: Screen, column: Ranks | Floats, values: Mapping[str, float]) -> None:
    """Write values by agent into a column by account; those who are not on the screen have none."""
    known = [agent for agent in values if agent in screen.index]
    column[[screen.index[agent] for agent in known]] = [values[agent] for agent in known]
