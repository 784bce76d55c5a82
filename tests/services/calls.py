"""A desk whose accounts are decided on, and whose calls grow older at a word."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import text

from app.services import calls as stored
from app.services import margin_calls
from app.services.calls import StoredCall
from app.services.liquidation import Rules
from app.services.margin import Scenes
from app.services.margin_calls import Decided
from tests.database import make_settings
from tests.services.desk import ACTOR, ITEMS_MAX, Desk

CONNECTIONS = make_settings(database_pool_size=20, database_connect_seconds=20)
RULES = Rules("smallest_first", Decimal(0))
PRICES = {"BTC": "60000", "ETH": "3000", "SOL": "100"}
BREACH, CURED, DEEP = "41000", "48000", "10000"
"""Prices of BTC: utilization .873, .733, and equity below zero."""
STOP = 0.75


@dataclass(frozen=True, slots=True)
class Calls:
    """A desk, and decisions on its accounts."""

    desk: Desk

    async def decide(self, agent_id: str, age: timedelta | None = None, rules: Rules = RULES) -> Decided:
        scenes = Scenes(self.desk.market, self.desk.price_age if age is None else age, ITEMS_MAX)
        async with self.desk.database.transaction(ACTOR) as tx:
            return await margin_calls.decide(tx, scenes, agent_id, rules)

    async def until_settled(self, agent_id: str, rules: Rules = RULES) -> list[Decided]:
        """Decide until nothing is due at once, as a worker does, and return the decisions."""
        made = []
        while True:
            made.append(await self.decide(agent_id, rules=rules))
            assert len(made) < 50
            assert await self.desk.imbalances() == {}
            if "liquidation.executed" not in made[-1].told:
                return made

    async def trader(self, usdc: str = "20000", **settings: Any) -> str:
        """Make an account that holds 0.5 BTC, 2 ETH and 10 SOL, long: notional 37,000, utilization .617."""
        agent_id = await self.desk.agent(usdc, **settings)
        for symbol, size in (("BTC-PERP", "0.5"), ("ETH-PERP", "2"), ("SOL-PERP", "10")):
            await self.desk.order(agent_id, "buy", size, symbol, leverage=3)
        return agent_id

    async def calls(self, agent_id: str) -> list[StoredCall]:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await stored.list_calls(tx, agent_id, 100)

    async def only(self, agent_id: str) -> StoredCall:
        [call] = await self.calls(agent_id)
        return call

    async def events(self, agent_id: str, family: str = "%") -> list[str]:
        query = "SELECT type FROM events WHERE agent_id = :agent_id AND type LIKE :family ORDER BY sequence"
        return [row[0] for row in await self.desk.rows(query, agent_id=agent_id, family=family)]

    async def told(self, agent_id: str) -> list[str]:
        """Return the events but for those of levels."""
        return [e for e in await self.events(agent_id) if e != "zone.changed"]

    async def pass_time(self, agent_id: str, seconds: float) -> None:
        """Let a call be so much older."""
        moments = (
            "noticed_at",
            "opened_at",
            "deadline_at",
            "expired_at",
            "next_action_at",
            "respond_by",
            "own_deadline_at",
        )
        changes = ", ".join(f"{name} = {name} - make_interval(secs => :seconds)" for name in moments)
        statement = text(f"UPDATE margin_calls SET {changes} WHERE agent_id = :agent_id AND ended_at IS NULL")
        async with self.desk.database.transaction(ACTOR) as tx:
            await tx.connection.execute(statement, {"agent_id": agent_id, "seconds": seconds})

    async def utilization(self, agent_id: str) -> float:
        used = (await self.desk.figures(agent_id)).health.utilization
        assert used is not None
        return used

    async def sizes(self, agent_id: str) -> dict[str, Decimal]:
        return {p.symbol: p.size for p in (await self.desk.book(agent_id)).positions}
