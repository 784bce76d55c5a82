"""The keeping of loans at work: timers that are due, and loans that a price brings past a level. It decides nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from datetime import timedelta

from sqlalchemy.exc import SQLAlchemyError

from app.db.session import Database
from app.errors import DatabaseUnavailableError
from app.services import loan_steps, loans
from app.services.liquidation import Rules
from app.services.margin import Scenes
from app.services.market_cache import MarketCache
from app.telemetry import Metrics

log = logging.getLogger(__name__)

NAMED_AT_ONCE_MAX = 200
DECISIONS_AT_ONCE = 2
LOOK_SECONDS = 1.0
"""How often all loans are looked over where no price has changed: interest accrues, and prices go stale."""
AGAIN_SECONDS = 30.0
"""How long a loan is left alone on which deciding has failed."""


class LoanKeeper:
    """Keeps the loans of one worker's shards."""

    def __init__(
        self,
        actor: str,
        database: Database,
        scenes: Scenes,
        market: MarketCache,
        metrics: Metrics,
        rules: Rules,
        price_age_max: timedelta,
    ) -> None:
        self._actor = actor
        self._database = database
        self._scenes = scenes
        self._market = market
        self._metrics = metrics
        self._rules = rules
        self._price_age_max = price_age_max
        self._prices = -1
        self._looked = 0.0
        self._again: dict[str, float] = {}

    async def round(self, shards: Collection[int]) -> None:
        """Decide on the loans that are due, or past a level. Raises DatabaseUnavailableError."""
        now = time.monotonic()
        self._again = {loan: moment for loan, moment in self._again.items() if moment > now}
        named = [loan for loan in await self._named(shards, now) if loan not in self._again]
        for start in range(0, len(named), DECISIONS_AT_ONCE):
            await asyncio.gather(*(self._decide(loan) for loan in named[start : start + DECISIONS_AT_ONCE]))

    async def _named(self, shards: Collection[int], now: float) -> Sequence[str]:
        """Return the loans to decide on, those first that prices have brought past a level."""
        if not shards:
            return ()
        async with self._database.transaction(self._actor) as tx:
            due = await loans.due(tx, NAMED_AT_ONCE_MAX, shards)
            view = await self._market.current(tx)
            below: list[str] = []
            if view.price_version != self._prices or now - self._looked >= LOOK_SECONDS:
                age_max, most, but = self._price_age_max, NAMED_AT_ONCE_MAX, tuple(self._again)
                below = await loan_steps.named_by_prices(tx, view, age_max, shards, most, but)
                self._prices, self._looked = view.price_version, now
        return list(dict.fromkeys([*below, *due]))

    async def _decide(self, loan_id: str) -> None:
        """Decide on one loan; one that can't be decided on holds up no other."""
        try:
            async with self._database.transaction(self._actor) as tx:
                decided = await loan_steps.decide(tx, self._scenes, loan_id, self._rules)
        except DatabaseUnavailableError as error:
            log.warning("no decision on a loan now: %s", error.code)
        except Exception:
            self._metrics.decision_failures.inc()
            log.exception("no decision on %s", loan_id)
            await self._leave_alone(loan_id)
        else:
            for told in decided.told:
                self._metrics.loan_events.labels(told).inc()
            if decided.deficit:
                log.error("the house advanced %.2f USD to make the lender of %s whole", decided.deficit, loan_id)

    async def _leave_alone(self, loan_id: str) -> None:
        """Put off a loan, in the database too: its timer would be due for ever."""
        self._again[loan_id] = time.monotonic() + AGAIN_SECONDS
        try:
            async with self._database.transaction(self._actor) as tx:
                await loans.put_off(tx, loan_id, tx.now + timedelta(seconds=AGAIN_SECONDS))
        except (DatabaseUnavailableError, SQLAlchemyError) as error:
            log.warning("a loan can't be put off: %s", type(error).__name__)
