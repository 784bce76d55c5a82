"""What tests of events and webhooks share: an agent, its endpoints, a sender on loopback, the state of deliveries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from app.db.session import Database
from app.services import accounts, delivery, events, webhooks
from app.services.sender import Resolve, Sender
from app.settings import Settings
from app.telemetry import Metrics
from tests.database import make_settings


@dataclass(frozen=True, slots=True)
class Hooks:
    """A database with an agent, and a worker's parts."""

    database: Database
    sender: Sender
    settings: Settings
    metrics: Metrics
    agent_id: str

    async def endpoint(self, url: str, *filters: str) -> tuple[str, str]:
        """Add an endpoint of the agent's and return its id and secret."""
        async with self.database.transaction("test") as tx:
            made, secret = await webhooks.create(tx, self.agent_id, url, filters, allow_private=True)
        return made.id, secret

    async def emit(self, event_type: str = "zone.changed", **data: Any) -> str:
        async with self.database.transaction("test") as tx:
            return await events.emit(tx, event_type, self.agent_id, data)

    async def deliver(self, worker: str = "worker") -> int:
        return await delivery.deliver_once(self.database, self.sender, self.settings, self.metrics, worker)

    async def run(self, worker: str = "worker") -> None:
        await delivery.run(self.database, self.sender, self.settings, self.metrics, worker)

    async def execute(self, statement: str) -> None:
        async with self.database.transaction("test") as tx:
            await tx.connection.execute(text(statement))

    async def rows(self, query: str) -> list[Mapping[str, Any]]:
        async with self.database.transaction("test") as tx:
            return [dict(row) for row in (await tx.connection.execute(text(query))).mappings()]

    async def deliveries(self) -> list[Mapping[str, Any]]:
        return await self.rows("SELECT * FROM webhook_deliveries ORDER BY id")

    async def make_due(self) -> None:
        """Let the wait before the next attempts pass."""
        await self.execute("UPDATE webhook_deliveries SET next_attempt_at = now() WHERE state = 'pending'")

    def count(self, result: str) -> float:
        return self.metrics.registry.get_sample_value("primerisk_webhook_attempts_total", {"result": result}) or 0.0


@asynccontextmanager
async def hooks_on(database: Database, resolve: Resolve | None = None, **settings: Any) -> AsyncIterator[Hooks]:
    given = make_settings(**{"webhook_allow_private": True, "webhook_seconds_max": 1.0} | settings)
    async with database.transaction("test") as tx:
        agent_id = await accounts.create_agent(tx, "Alice")
    async with Sender(given, database.clock, resolve) as sender:
        yield Hooks(database, sender, given, Metrics(), agent_id)
