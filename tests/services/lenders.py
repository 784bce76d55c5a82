"""A desk whose agents lend and borrow, and a clock that goes on at a word."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import URL

from app.db.session import Database, Tx
from app.domain.lending import RateKind
from app.services import lending, loan_steps, loans, running_loans
from app.services.lending import NewOffer, Wanted
from app.services.liquidation import Rules
from app.services.loan_steps import Decided
from app.services.loans import Loan, Market, Offer
from app.services.margin import Scene, Scenes
from app.services.market_cache import MarketCache
from app.services.running_loans import Recall
from app.services.wallet import Names
from tests.database import make_settings
from tests.services.desk import ACTOR, ITEMS_MAX, Amount, Desk

RULES = Rules("smallest_first", Decimal("0.005"))
PRICES = {"BTC": "60000", "ETH": "3000", "USDC": "1"}
NOBODY = Names()
CONNECTIONS = make_settings(database_pool_size=20, database_connect_seconds=20)
BOOKS = """
    SELECT asset,
        (SELECT coalesce(sum(amount), 0) FROM balances WHERE bucket = 'lent' AND asset = a.asset),
        (SELECT coalesce(sum(amount), 0) FROM balances WHERE bucket = 'borrowed' AND asset = a.asset),
        (SELECT coalesce(sum(principal + interest_booked), 0) FROM loans WHERE asset = a.asset),
        (SELECT coalesce(sum(amount), 0) FROM balances WHERE bucket = 'offered' AND asset = a.asset),
        (SELECT coalesce(sum(remaining), 0) FROM loan_offers WHERE asset = a.asset),
        (SELECT coalesce(sum(amount), 0) FROM balances WHERE bucket = 'pledged' AND asset = a.asset),
        (SELECT coalesce(sum(collateral), 0) FROM loans WHERE collateral_asset = a.asset),
        (SELECT coalesce(sum(supplied), 0) FROM lending_markets WHERE asset = a.asset),
        (SELECT coalesce(sum(borrowed), 0) FROM lending_markets WHERE asset = a.asset),
        (SELECT coalesce(sum(principal), 0) FROM loans WHERE asset = a.asset)
    FROM (SELECT DISTINCT asset FROM balances) AS a
"""


class ShiftedScenes(Scenes):
    """Scenes whose clock is ahead of the database's; prices are as old as they are by that."""

    def __init__(self, market: MarketCache, price_age_max: timedelta) -> None:
        super().__init__(market, price_age_max, ITEMS_MAX)
        self.shift = timedelta(0)
        self.stopped: datetime | None = None

    async def at(self, tx: Tx) -> Scene:
        scene = await super().at(tx)
        return replace(scene, now=(self.stopped or scene.now) + self.shift)


@dataclass
class Lenders:
    """A desk, and lending on it; every call is a transaction of its own that commits."""

    desk: Desk
    scenes: ShiftedScenes = field(init=False)

    def __post_init__(self) -> None:
        self.scenes = ShiftedScenes(self.desk.market, timedelta(days=10_000))

    def pass_time(self, **parts: float) -> None:
        self.scenes.shift += timedelta(**parts)

    async def stop_clock(self) -> None:
        """Let time pass at a word alone."""
        async with self.desk.database.transaction(ACTOR) as tx:
            self.scenes.stopped = tx.now

    async def offer(
        self, lender: str, amount: Amount, asset: str = "USDC", rate: Amount | None = None, hours: float = 24
    ) -> Offer:
        asked = NewOffer(asset, Decimal(amount), None if rate is None else Decimal(rate), timedelta(hours=hours))
        async with self.desk.database.transaction(ACTOR) as tx:
            return (await lending.offer(tx, self.scenes, lender, asked, NOBODY))[0]

    async def borrow(
        self,
        borrower: str,
        amount: Amount,
        collateral: Amount | None = None,
        asset: str = "USDC",
        of: str = "BTC",
        *,
        kind: RateKind = "floating",
        **more: Any,
    ) -> list[Loan]:
        pledge = None if collateral is None else Decimal(collateral)
        wanted = Wanted(asset, Decimal(amount), of, pledge, kind, **more)
        async with self.desk.database.transaction(ACTOR) as tx:
            return await lending.borrow(tx, self.scenes, borrower, wanted, NOBODY)

    async def give_back(self, loan: Loan, amount: Amount | None = None) -> Loan:
        part = None if amount is None else Decimal(amount)
        async with self.desk.database.transaction(ACTOR) as tx:
            return await running_loans.give_back(tx, self.scenes, loan.borrower_id, loan.id, part, NOBODY)

    async def recall(self, lender: str, loan_id: str, amount: Amount | None = None) -> Recall:
        part = None if amount is None else Decimal(amount)
        async with self.desk.database.transaction(ACTOR) as tx:
            return await running_loans.recall(tx, self.scenes, lender, loan_id, part, "why", NOBODY)

    async def cancel(self, lender: str, offer_id: str) -> Offer:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await lending.cancel(tx, self.scenes, lender, offer_id, NOBODY)

    async def top_up(self, loan: Loan, amount: Amount) -> Loan:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await running_loans.top_up(tx, self.scenes, loan.borrower_id, loan.id, Decimal(amount), NOBODY)

    async def release(self, loan: Loan, amount: Amount | None = None) -> Loan:
        part = None if amount is None else Decimal(amount)
        async with self.desk.database.transaction(ACTOR) as tx:
            return await running_loans.release(tx, self.scenes, loan.borrower_id, loan.id, part, NOBODY)

    async def decide(self, loan_id: str, rules: Rules = RULES) -> Decided:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await loan_steps.decide(tx, self.scenes, loan_id, rules)

    async def loan(self, loan_id: str) -> Loan:
        async with self.desk.database.transaction(ACTOR) as tx:
            found = await loans.get(tx, loan_id)
        assert found is not None
        return found

    async def market(self, asset: str = "USDC") -> Market:
        async with self.desk.database.transaction(ACTOR) as tx:
            return (await loans.markets_of(tx, [asset]))[0]

    async def money(self, agent_id: str, asset: str = "USDC") -> dict[str, Decimal]:
        """Return the units of an asset by bucket, empty ones left out."""
        held = (await self.desk.book(agent_id)).holding(asset)
        return {name: amount for name in held.__slots__ if (amount := getattr(held, name))}

    async def events(self, agent_id: str) -> list[str]:
        query = "SELECT type FROM events WHERE agent_id = :agent_id AND type LIKE 'loan.%' ORDER BY sequence"
        return [row[0] for row in await self.desk.rows(query, agent_id=agent_id)]


@asynccontextmanager
async def lenders_on(url: URL) -> AsyncIterator[Lenders]:
    """Yield a desk with prices on a database, whose books of lending have to agree afterwards."""
    database = Database(url, CONNECTIONS)
    desk = Desk(database)
    await desk.prices(PRICES)
    await desk.market.refresh()
    yield Lenders(desk)
    await check(desk)
    await database.close()


async def check(desk: Desk) -> None:
    """Check that all books of lending agree with each other."""
    assert await desk.imbalances() == {}
    for asset, lent, borrowed, owed, offered, remaining, pledged, secured, *market in await desk.rows(BOOKS):
        supplied, used, principal = market
        assert lent == borrowed == owed, asset
        assert offered == remaining, asset
        assert pledged == secured, asset
        assert (supplied, used) == (remaining + principal, principal), asset
