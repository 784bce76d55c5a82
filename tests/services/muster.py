"""A fleet of five in a crash, decided on as a worker does: who is named, whose turn it is, who is due."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from app.services import accounts, calls, fleet_books, fleet_cascade, fleet_pool, fleets, margin_calls, shards
from app.services.delegation import MasterNeeded
from app.services.fleet_cascade import Crash
from app.services.fleets import Fleet
from app.services.liquidation import Rules
from app.services.margin_calls import Decided
from tests.services.calls import RULES, Calls
from tests.services.desk import ACTOR
from tests.services.squadron import Squadron

PRICES = {"BTC": "60000", "ETH": "3000", "SOL": "100"}
FALLEN = {"BTC": "48000", "ETH": "2400", "SOL": "80"}
SHOCK = -0.2
ORDERS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("BTC-PERP", "0.1"), ("ETH-PERP", "1.5"), ("SOL-PERP", "35")),
    (("SOL-PERP", "150"), ("BTC-PERP", "0.3")),
    (("ETH-PERP", "12"),),
    (("BTC-PERP", "0.2"), ("ETH-PERP", "5")),
    (("SOL-PERP", "100"), ("ETH-PERP", "2")),
)
"""Of four pooled members, 14,000, 33,000, 36,000 and 27,000 of notional, and of an isolated one, 16,000."""


@dataclass
class Muster:
    """Five members of one fleet, priorities 1 to 4 and, isolated, 0."""

    squadron: Squadron
    fleet: Fleet
    members: list[str] = field(default_factory=list)
    rules: Rules = RULES

    @property
    def calls(self) -> Calls:
        return Calls(self.squadron.desk)

    @property
    def pooled(self) -> list[str]:
        return self.members[:4]

    @property
    def isolated(self) -> str:
        return self.members[4]

    @property
    def everybody(self) -> list[str]:
        return [self.fleet.master_id, *self.members]

    @classmethod
    async def gathered(cls, squadron: Squadron, usdc: int = 55_600, grace: int = 0, of_master: int = 300) -> Muster:
        """Make it: each member has drawn what its orders need, .375 of their notional, 47,250 in all.

        At FALLEN the pool, with what the master has left, is at 26,400 of 27,600 (.957), each member past 1.3.
        """
        await squadron.desk.prices(PRICES)
        made = cls(squadron, await squadron.fleet(usdc, over_delegation=True))
        await made.set(made.fleet.master_id, grace_period_seconds=of_master)
        for k, orders in enumerate(ORDERS):
            isolated = k == len(ORDERS) - 1
            terms = (
                {"liquidation_priority": 0, "delegation": "isolated"} if isolated else {"liquidation_priority": k + 1}
            )
            member = await squadron.member(made.fleet, 20_000, **terms)
            made.members.append(member)
            await made.set(member, grace_period_seconds=grace)
            for symbol, size in orders:
                await squadron.order(member, "buy", size, symbol)
        return made

    async def set(self, agent_id: str, **settings: Any) -> None:
        async with self.squadron.desk.database.transaction(ACTOR) as tx:
            await accounts.lock_account(tx, agent_id)
            await accounts.put_account_settings(tx, agent_id, settings)

    async def decide(self, agent_id: str, master_id: str | None = None) -> Decided:
        """Decide as a worker does: with the master where the fleet has a say in it."""
        database = self.squadron.desk.database
        try:
            async with database.transaction(ACTOR) as tx:
                return await margin_calls.decide(tx, self.squadron.scenes, agent_id, self.rules, master_id)
        except MasterNeeded as needed:
            return await self.decide(agent_id, needed.master_id)

    async def take_turns(self, agents: Sequence[str]) -> dict[str, Decided]:
        database, scenes, master = self.squadron.desk.database, self.squadron.scenes, self.fleet.master_id
        if not agents:
            return {}
        async with database.transaction(ACTOR) as tx:
            return await margin_calls.take_turns(tx, scenes, master, agents, self.rules)

    async def settle(self, agents: Iterable[str] | None = None) -> list[tuple[str, str]]:
        """Decide on accounts, and on whom that names, until nothing is due; return what was told, in order."""
        agenda, told = deque(self.everybody if agents is None else agents), list[tuple[str, str]]()
        for _ in range(400):
            if not agenda:
                return told
            agent_id = agenda.popleft()
            decided, is_more = await self.decide(agent_id), False
            told += [(agent_id, kind) for kind in decided.told]
            for member, turn in (await self.take_turns(decided.turns)).items():
                told += [(member, kind) for kind in turn.told]
                is_more |= bool(turn.told)
                agenda.extend(turn.named)
            if is_more or "liquidation.executed" in decided.told:
                agenda.append(agent_id)
            agenda.extend(decided.named)
            assert await self.squadron.desk.imbalances() == {}
        raise AssertionError(f"it never settles: {told[-20:]}")

    async def crash(self, prices: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
        await self.squadron.desk.prices(prices or FALLEN)
        return await self.settle()

    async def expire(self) -> list[tuple[str, str]]:
        """Let the fleet's deadline pass, and decide on its master alone."""
        await self.calls.pass_time(self.fleet.master_id, 301)
        return await self.settle([self.fleet.master_id])

    async def sizes(self) -> dict[str, dict[str, Decimal]]:
        return {agent_id: await self.calls.sizes(agent_id) for agent_id in self.everybody}

    async def pool(self) -> fleet_pool.Pool:
        async with self.squadron.desk.scene() as (tx, scene):
            return await fleet_pool.load(tx, scene, self.rules, self.fleet.id)

    async def utilization(self) -> float:
        used = (await self.pool()).health.utilization
        assert used is not None
        return used

    async def cascade(self, shock: float = SHOCK) -> dict[str, Any]:
        return await self.cascade_of(Crash(shock=shock))

    async def cascade_of(self, crash: Crash) -> dict[str, Any]:
        async with self.squadron.desk.scene() as (tx, scene):
            books = await fleet_books.load(tx, await fleets.get(tx, self.fleet.id, None))
        return fleet_cascade.cascade(books, scene, crash, self.rules)

    async def due(self) -> list[str]:
        """Return whose calls are due."""
        async with self.squadron.desk.database.transaction(ACTOR) as tx:
            return list(await calls.due(tx, 100))

    async def called(self) -> list[str]:
        async with self.squadron.desk.database.transaction(ACTOR) as tx:
            return await fleet_pool.called(tx, shards.ALL)

    async def sold(self, cause: str | None = None) -> list[tuple[str, str, Decimal]]:
        """Return who was liquidated of what, in the order in which it was written."""
        query = """
            SELECT agent_id, data ->> 'symbol', (data ->> 'size')::numeric FROM events
            WHERE type = 'liquidation.executed' AND (CAST(:cause AS text) IS NULL OR data ->> 'cause' = :cause)
            ORDER BY id
        """
        return [(a, s, n) for a, s, n in await self.squadron.desk.rows(query, cause=cause)]
