"""Agents, prices and the services of a book, each call in a transaction of its own that commits."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import text

from app.db.session import Database, Tx
from app.domain.book import Book, OpenPosition, PositionMode
from app.domain.quote import AccountFigures
from app.domain.trade import Order, OrderSide
from app.services import accounts, book, ledger, positions, prices, trading, wallet
from app.services.margin import Scene
from app.services.market_cache import MarketCache
from app.services.trading import Filled
from app.services.wallet import Booked, Names, NewReservation, Reservation

ACTOR = "desk"
ITEMS_MAX = 1_000
Amount = str | int | Decimal
_SKEW = timedelta(seconds=5)


@dataclass
class Desk:
    """Acts on one database, as the routes do: the book's lock, prices read after it, then one service call."""

    database: Database
    price_age: timedelta = timedelta(hours=1)
    market: MarketCache = field(init=False)

    def __post_init__(self) -> None:
        self.market = MarketCache(self.database)

    @asynccontextmanager
    async def scene(self) -> AsyncIterator[tuple[Tx, Scene]]:
        async with self.database.transaction(ACTOR) as tx:
            yield tx, await self._scene(tx)

    @asynccontextmanager
    async def locked(self, agent_id: str) -> AsyncIterator[tuple[Tx, Scene, Book]]:
        async with self.database.transaction(ACTOR) as tx:
            held = await book.lock(tx, agent_id)
            yield tx, await self._scene(tx), held

    async def _scene(self, tx: Tx) -> Scene:
        view = await self.market.current(tx)
        now = (await tx.connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
        return Scene(view, now, self.price_age, ITEMS_MAX)

    async def agent(self, usdc: Amount | None = None, **settings: Any) -> str:
        async with self.scene() as (tx, _):
            agent_id = await accounts.create_agent(tx, "Alice")
            if settings:
                await accounts.put_account_settings(tx, agent_id, settings)
        if usdc is not None:
            await self.deposit(agent_id, "USDC", usdc)
        return agent_id

    async def prices(self, posted: Mapping[str, Amount]) -> None:
        async with self.database.transaction(ACTOR) as tx:
            await prices.post_prices(tx, {s: Decimal(p) for s, p in posted.items()}, None, _SKEW)

    async def deposit(self, agent_id: str, asset: str, amount: Amount) -> Booked:
        async with self.locked(agent_id) as (tx, scene, held):
            return await wallet.deposit(tx, scene, held, asset, Decimal(amount), Names())

    async def withdraw(self, agent_id: str, asset: str, amount: Amount) -> Booked:
        async with self.locked(agent_id) as (tx, scene, held):
            return await wallet.withdraw(tx, scene, held, asset, Decimal(amount), Names())

    async def reserve(
        self, agent_id: str, amount: Amount, asset: str = "USDC", *, reducible: bool = True
    ) -> Reservation:
        asked = NewReservation("casino", asset, Decimal(amount), reducible)
        async with self.locked(agent_id) as (tx, scene, held):
            return (await wallet.reserve(tx, scene, held, asked, Names()))[0]

    async def release(self, agent_id: str, reservation_id: str, amount: Amount | None = None) -> Reservation:
        part = None if amount is None else Decimal(amount)
        async with self.locked(agent_id) as (tx, _, held):
            return (await wallet.release(tx, held, reservation_id, part, Names()))[0]

    async def settle(self, agent_id: str, reservation_id: str, amount: Amount | None = None) -> Reservation:
        part = None if amount is None else Decimal(amount)
        async with self.locked(agent_id) as (tx, _, held):
            return (await wallet.settle(tx, held, reservation_id, part, Names()))[0]

    async def order(
        self,
        agent_id: str,
        side: OrderSide,
        size: Amount,
        symbol: str = "BTC-PERP",
        *,
        reduce_only: bool = False,
        leverage: Amount | None = None,
        mode: PositionMode | None = None,
    ) -> Filled:
        asked = Order(symbol, side, Decimal(size), reduce_only, None if leverage is None else Decimal(leverage), mode)
        async with self.locked(agent_id) as (tx, scene, held):
            return await trading.submit(tx, scene, held, asked, Names())

    async def reduce(self, agent_id: str, target_id: str, fraction: Amount) -> Filled | tuple[Reservation, Book]:
        async with self.locked(agent_id) as (tx, scene, held):
            return await trading.reduce(tx, scene, held, target_id, Decimal(fraction), Names(), "smaller")

    async def allocate(self, agent_id: str, position_id: str, amount: Amount) -> OpenPosition:
        async with self.locked(agent_id) as (tx, scene, held):
            return (await positions.allocate(tx, scene, held, position_id, Decimal(amount), Names()))[0]

    async def book(self, agent_id: str) -> Book:
        return await book.read(self.database, agent_id)

    async def figures(self, agent_id: str) -> AccountFigures:
        async with self.scene() as (tx, scene):
            return scene.figures(await book.load(tx, agent_id))

    async def imbalances(self) -> dict[str, Decimal]:
        async with self.database.transaction(ACTOR) as tx:
            return await ledger.imbalances(tx)

    async def rows(self, query: str, **values: Any) -> list[tuple[Any, ...]]:
        async with self.database.transaction(ACTOR) as tx:
            return [tuple(row) for row in await tx.connection.execute(text(query), values)]

    async def money(self, agent_id: str) -> dict[str, Any]:
        """Return the USDC by bucket, empty ones left out."""
        found = asdict((await self.book(agent_id)).holding("USDC"))
        return {bucket: amount for bucket, amount in found.items() if amount}


PURSES = """
    SELECT owner, asset, bucket, sum(amount) AS held FROM (
        SELECT to_owner AS owner, asset, to_bucket AS bucket, amount FROM ledger_entries
        UNION ALL
        SELECT from_owner, asset, from_bucket, -amount FROM ledger_entries
    ) AS sides GROUP BY owner, asset, bucket
"""
"""What every purse holds, from the entries alone; what is owed is negative here."""
