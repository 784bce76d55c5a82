"""The worker: watches every book, fires the timers of margin calls, delivers webhooks. Any number may run at once.

Nothing here decides. The screen and the timers name accounts; each is decided on alone, under the lock of its book, on
figures of that moment, so that two workers that name the same account do no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from app.db.session import Database
from app.domain.portfolio import Rows
from app.domain.screen import Screen
from app.errors import DatabaseUnavailableError
from app.services import delivery, heartbeat, margin_calls, screen_book, watch
from app.services.margin import Scenes
from app.services.margin_calls import Rules
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


@dataclass(slots=True)
class _Seen:
    """What the screen has been told of so far."""

    screen: Screen
    horizon: str
    prices: dict[str, float]
    told: dict[str, str]
    """The zone that was last told of each agent."""


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
                    loop.cancel()
                for loop in loops:
                    with contextlib.suppress(asyncio.CancelledError):
                        await loop

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
        await self._decide_on(seen, self._candidates(seen, None))
        while True:
            touched = await self._news(seen)
            if len(touched):
                await self._decide_on(seen, self._candidates(seen, touched))
            await asyncio.sleep(self._settings.worker_poll_seconds)

    async def _first_look(self) -> _Seen:
        view = await self._market.refresh()
        loaded = await screen_book.load_all(self._database)
        prices = _prices(view)
        screen = Screen(view.parameters, prices)
        screen.update(loaded.columns)
        async with self._database.transaction(self.id) as tx:
            told = await watch.told_zones(tx)
        return _Seen(screen, loaded.horizon, prices, told)

    async def _news(self, seen: _Seen) -> Rows:
        """Take in what has changed since, and return the accounts that it touches."""
        view = await self._market.refresh()
        if view.parameters.version != seen.screen.parameters.version:
            seen.screen = seen.screen.under(view.parameters)
            touched = np.arange(len(seen.screen))
        else:
            touched = np.zeros(0, dtype=np.intp)
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

    def _candidates(self, seen: _Seen, touched: Rows | None) -> list[str]:
        """Return the agents for whom a decision is due, or whose zone is no longer the one told."""
        screen = seen.screen
        due = set(screen.candidates(touched).tolist())
        figures = screen.figures(touched)
        policy = screen.parameters.policy
        for account, used in zip(figures.accounts.tolist(), figures.utilization.tolist(), strict=True):
            if watch.zone_moved(seen.told.get(screen.agents[account], "GREEN"), used, policy):
                due.add(account)
        return [screen.agents[account] for account in sorted(due)]

    async def _decide_on(self, seen: _Seen, agents: Iterable[str]) -> None:
        decided = await asyncio.gather(*(self._decide(agent) for agent in agents))
        seen.told.update({agent: zone for agent, zone in decided if zone is not None})

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

    async def _decide(self, agent_id: str) -> tuple[str, str | None]:
        """Decide on one account, and return its zone as told."""
        async with self._turns:
            started = time.perf_counter()
            try:
                async with self._database.transaction(self.id) as tx:
                    decided = await margin_calls.decide(tx, self._scenes, agent_id, self._rules)
            except DatabaseUnavailableError as error:
                log.warning("no decision on an account now: %s", error.code)
                return agent_id, None
            except Exception:  # one account that can't be decided on holds up no other
                log.exception("no decision on %s", agent_id)
                return agent_id, None
            self._metrics.decision_seconds.observe(time.perf_counter() - started)
            for told in decided.told:
                self._metrics.margin_events.labels(told).inc()
            return agent_id, decided.zone

    async def _beat(self) -> None:
        """Tell that this worker is alive."""
        while True:
            async with self._database.transaction(self.id) as tx:
                await heartbeat.beat(tx, self.id)
            await asyncio.sleep(heartbeat.EVERY.total_seconds())


def _prices(view: MarketView) -> dict[str, float]:
    return {symbol: price.value for symbol, price in view.prices.items()}
