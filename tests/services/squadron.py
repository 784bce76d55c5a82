"""Fleets on a desk: members whose requests run as the routes run them, over real connections."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Any

from app.domain.book import Book
from app.domain.trade import Order, OrderSide
from app.services import accounts, book, delegation, fleets, trading, wallet
from app.services.delegation import Effect, Pair, T
from app.services.fleet_terms import Terms
from app.services.fleets import Fleet, Member
from app.services.margin import Scenes
from app.services.trading import Filled
from app.services.wallet import Names, NewReservation, Reservation
from tests.services.desk import ACTOR, ITEMS_MAX, Amount, Desk


@dataclass
class Squadron:
    """Acts on the fleets of one desk."""

    desk: Desk
    scenes: Scenes = field(init=False)

    def __post_init__(self) -> None:
        self.scenes = Scenes(self.desk.market, timedelta(hours=1), ITEMS_MAX)

    async def fleet(self, usdc: Amount, dry_powder: str = "0.15", *, over_delegation: bool = False) -> Fleet:
        master = await self.desk.agent(usdc)
        async with self.desk.database.transaction(ACTOR) as tx:
            return await fleets.create(tx, master, "Alpha", Decimal(dry_powder), over_delegation=over_delegation)

    async def member(self, fleet: Fleet, max_margin: Amount, agent_id: str | None = None, **terms: Any) -> str:
        joining = agent_id or await self.desk.agent()
        async with self.desk.database.transaction(ACTOR) as tx:
            await fleets.invite(tx, fleet, joining, Terms(Decimal(max_margin), **terms), joins=True)
        return joining

    async def run(self, agent_id: str, service: str, effect: Effect[T]) -> T:
        database = self.desk.database
        try:
            async with database.transaction(ACTOR) as tx:
                return await delegation.alone(tx, self.scenes, agent_id, effect)
        except delegation.MasterNeeded as needed:
            async with database.transaction(ACTOR) as tx:
                return await delegation.together(tx, self.scenes, agent_id, needed.master_id, service, effect)

    async def reserve(self, agent_id: str, amount: Amount, service: str = "casino") -> Reservation:
        asked = NewReservation(service, "USDC", Decimal(amount), reducible=True)

        async def effect(tx: Any, held: Book, scene: Any) -> Reservation:
            return (await wallet.reserve(tx, scene, held, asked, Names()))[0]

        return await self.run(agent_id, service, effect)

    async def release(self, agent_id: str, reservation_id: str, amount: Amount | None = None) -> Reservation:
        part = None if amount is None else Decimal(amount)

        async def effect(tx: Any, held: Book, _: Any) -> Reservation:
            return (await wallet.release(tx, held, reservation_id, part, Names()))[0]

        return await self.run(agent_id, "wallet", effect)

    async def order(
        self, agent_id: str, side: OrderSide, size: Amount, symbol: str = "BTC-PERP", *, reduce_only: bool = False
    ) -> Filled:
        asked = Order(symbol, side, Decimal(size), reduce_only)

        async def effect(tx: Any, held: Book, scene: Any) -> Filled:
            return await trading.submit(tx, scene, held, asked, Names())

        return await self.run(agent_id, "trading", effect)

    async def change(self, fleet: Fleet, agent_id: str, *, reduce_only: bool = False, **terms: Any) -> Member:
        """Change a delegation as the route does: what can be spared is given back first."""
        async with self.desk.database.transaction(ACTOR) as tx:
            books = await book.lock_all(tx, {fleet.master_id, agent_id})
            pair = Pair(books[agent_id], books[fleet.master_id])
            await delegation.give_back(tx, await self.scenes.at(tx), pair)
            before = await fleets.get_member(tx, fleet.id, agent_id)
            known = {name: getattr(before, name) for name in Terms.__slots__}
            asked = Terms(**(known | terms))
            return await fleets.change_terms(tx, before, asked, reduce_only_on_excess=reduce_only, cause="test")

    async def get(self, fleet: Fleet) -> Fleet:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await fleets.get(tx, fleet.id, None)

    async def drawn(self, fleet: Fleet) -> dict[str, Decimal]:
        async with self.desk.database.transaction(ACTOR) as tx:
            return {m.agent_id: m.drawn for m in await fleets.list_members(tx, fleet.id, 1_000)}

    async def powder(self, fleet: Fleet, *, release: bool) -> Fleet:
        async with self.desk.database.transaction(ACTOR) as tx:
            await accounts.lock_account(tx, fleet.master_id)
            change = fleets.release_dry_powder if release else fleets.restore_dry_powder
            return await change(tx, await fleets.get(tx, fleet.id, None), "a test")
