"""The worker: watches every book, fires the timers of margin calls, delivers webhooks. Any number may run at once.

Nothing here decides. The screen and the timers name accounts; each is decided on alone, under the lock of its book, on
figures of that moment, so that two workers that name the same account do no harm.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from app.db.session import Database
from app.domain.portfolio import Rows
from app.domain.screen import Screen
from app.domain.watch import Ranks, levels_moved
from app.errors import DatabaseUnavailableError
from app.services import delivery, heartbeat, margin_calls, screen_book, watch
from app.services.margin import Scenes
from app.services.margin_calls import Decided, Rules
from app.services.market_cache import MarketCache, MarketView
from app.services.sender import Sender
from app.settings import Settings
from app.telemetry import Metrics

log = logging.getLogger(__name__)

DUE_AT_ONCE_MAX = 200
DECISIONS_AT_ONCE = 4
OUTAGE_PAUSE_SECONDS = 1.0
TRAILED_SECONDS = 1.0
"""How often accounts with a trailing stop are looked at: their peak may move where no level does."""
STALE_SECONDS = 1.0
"""How often prices are looked over for those that have gone stale."""
MISSED_SECONDS = 1.0
"""How often accounts are tried again that an outage kept from being decided on."""

_NOBODY: Rows = np.zeros(0, dtype=np.intp)


@dataclass(slots=True)
class _Seen:
    """What the screen has been told of so far."""

    screen: Screen
    horizon: str
    prices: dict[str, float]
    told: dict[str, int]
    """The rank of the zone that was last told of each agent; GREEN, 0, for those of whom nothing was."""
    ranks: Ranks
    """The same by the screen's account."""
    stale: frozenset[str] = frozenset()
    stale_at: float = 0.0
    missed: set[int] = field(default_factory=set)
    """The screen's accounts that were to be decided on, and could not be for an outage."""
    missed_at: float = 0.0


class Worker:
    """One worker of a process."""

    def __init__(
        self, settings: Settings, database: Database, market: MarketCache, scenes: Scenes, metrics: Metrics
    ) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._settings = settings
        self._database = database
        self._market = market
        self._scenes = scenes
        self._metrics = metrics
        self._rules = Rules(settings.liquidation_policy, settings.liquidation_slippage)
        self._turns = asyncio.Semaphore(DECISIONS_AT_ONCE)

    async def run(self) -> None:
        """Work until cancelled, then finish what is under way."""
        async with Sender(self._settings, self._database.clock) as sender:
            loops = [
                asyncio.create_task(self._forever(self._watch)),
                asyncio.create_task(self._forever(self._fire_timers)),
                asyncio.create_task(self._forever(self._trail)),
                asyncio.create_task(self._forever(self._beat)),
                asyncio.create_task(delivery.run(self._database, sender, self._settings, self._metrics, self.id)),
            ]
            try:
                await asyncio.gather(*loops)
            finally:
                for loop in loops:
                    if not loop.cancelling():  # a second time would cut off what it finishes
                        loop.cancel()
                await asyncio.gather(*loops, return_exceptions=True)

    async def _forever(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop; an outage, or a fault of ours, is logged and the loop begun anew."""
        while True:
            try:
                await loop()
            except (DatabaseUnavailableError, SQLAlchemyError) as error:
                log.warning("the worker waits for the database: %s", type(error).__name__)
            except Exception:
                log.exception("a loop of the worker failed")
            await asyncio.sleep(OUTAGE_PAUSE_SECONDS)

    # --- the screen

    async def _watch(self) -> None:
        """Re-margin whoever a change of prices or books touches, and have decided who is a candidate."""
        seen = await self._first_look()
        await self._decide_on(seen, self._candidates(seen, np.arange(len(seen.screen))))
        while True:
            touched = await self._news(seen)
            due = np.union1d(self._candidates(seen, touched), self._gone_stale(seen))
            due = np.union1d(due, _missed(seen))
            if len(due):
                await self._decide_on(seen, due)
            await asyncio.sleep(self._settings.worker_poll_seconds)

    async def _first_look(self) -> _Seen:
        view = await self._market.refresh()
        loaded = await screen_book.load_all(self._database)
        prices = _prices(view)
        screen = Screen(view.parameters, prices)
        screen.update(loaded.columns)
        async with self._database.transaction(self.id) as tx:
            told = {agent: watch.zone_rank(zone) for agent, zone in (await watch.told_zones(tx)).items()}
        return _Seen(screen, loaded.horizon, prices, told, np.zeros(0, dtype=np.int8))

    async def _news(self, seen: _Seen) -> Rows:
        """Take in what has changed since, and return the accounts that it touches."""
        view = await self._market.refresh()
        if view.parameters.version != seen.screen.parameters.version:
            seen.screen = seen.screen.under(view.parameters)
            touched = np.arange(len(seen.screen))
        else:
            touched = _NOBODY
        prices = _prices(view)
        moved = {symbol: price for symbol, price in prices.items() if seen.prices.get(symbol) != price}
        if moved:
            touched = np.union1d(touched, seen.screen.tick(moved).accounts)
            seen.prices = prices
        loaded = await screen_book.load_changed(self._database, seen.screen.versions(), seen.horizon)
        seen.horizon = loaded.horizon
        if len(loaded.columns.agents):
            touched = np.union1d(touched, seen.screen.update(loaded.columns))
        return touched

    def _candidates(self, seen: _Seen, touched: Rows) -> Rows:
        """Return those of the accounts for whom a decision is due, or whose zone is no longer the one told."""
        screen = seen.screen
        if len(seen.ranks) < len(screen):
            seen.ranks = np.array([seen.told.get(agent, 0) for agent in screen.agents], dtype=np.int8)
        figures = screen.figures(touched)
        moved = levels_moved(watch.zones(screen.parameters.policy), seen.ranks[touched], figures.utilization)
        return np.union1d(screen.candidates(touched), touched[moved])

    def _gone_stale(self, seen: _Seen) -> Rows:
        """Return the accounts that depend on a price that has gone stale, or is fresh again: no tick tells of it."""
        now = time.monotonic()
        if now < seen.stale_at + STALE_SECONDS:
            return _NOBODY
        oldest = self._database.clock.now() - timedelta(seconds=self._settings.price_age_seconds_max)
        stale = frozenset(symbol for symbol, price in self._market.view.prices.items() if price.as_of < oldest)
        changed = stale ^ seen.stale
        seen.stale, seen.stale_at = stale, now
        return seen.screen.depending_on(changed) if changed else _NOBODY

    async def _decide_on(self, seen: _Seen, accounts: Rows) -> None:
        rows = accounts.tolist()
        decided = await asyncio.gather(*(self._decide(seen.screen.agents[row]) for row in rows))
        for row, done in zip(rows, decided, strict=True):
            if done is None:
                seen.missed.add(row)
                continue
            seen.missed.discard(row)
            if done.zone is not None:
                seen.told[seen.screen.agents[row]] = seen.ranks[row] = watch.zone_rank(done.zone)

    # --- timers

    async def _fire_timers(self) -> None:
        """Decide on the accounts whose calls are due."""
        while True:
            async with self._database.transaction(self.id) as tx:
                due = await margin_calls.due(tx, DUE_AT_ONCE_MAX)
            if due:
                await asyncio.gather(*(self._decide(agent) for agent in due))
            await asyncio.sleep(self._settings.worker_poll_seconds)

    async def _trail(self) -> None:
        """Follow the accounts that have a trailing stop."""
        while True:
            async with self._database.transaction(self.id) as tx:
                trailed = await watch.trailed_agents(tx)
            await asyncio.gather(*(self._decide(agent) for agent in trailed))
            await asyncio.sleep(TRAILED_SECONDS)

    async def _decide(self, agent_id: str) -> Decided | None:
        """Decide on one account, and return what came of it; None where an outage kept it from being decided on."""
        async with self._turns:
            started = time.perf_counter()
            try:
                async with self._database.transaction(self.id) as tx:
                    decided = await margin_calls.decide(tx, self._scenes, agent_id, self._rules)
            except DatabaseUnavailableError as error:
                log.warning("no decision on an account now: %s", error.code)
                return None
            except Exception:  # one account that can't be decided on holds up no other
                log.exception("no decision on %s", agent_id)
                return Decided(None, None, ())
            self._metrics.decision_seconds.observe(time.perf_counter() - started)
            for told in decided.told:
                self._metrics.margin_events.labels(told).inc()
            return decided

    async def _beat(self) -> None:
        """Tell that this worker is alive."""
        while True:
            async with self._database.transaction(self.id) as tx:
                await heartbeat.beat(tx, self.id)
            await asyncio.sleep(heartbeat.EVERY.total_seconds())


def _missed(seen: _Seen) -> Rows:
    """Return, every so often, the accounts that were missed: no change tells of them again."""
    now = time.monotonic()
    if not seen.missed or now < seen.missed_at + MISSED_SECONDS:
        return _NOBODY
    seen.missed_at = now
    return np.array(sorted(seen.missed), dtype=np.intp)


def _prices(view: MarketView) -> dict[str, float]:
    return {symbol: price.value for symbol, price in view.prices.items()}
