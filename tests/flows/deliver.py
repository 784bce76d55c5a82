"""A worker of webhooks as a process of its own, to be killed: python -m tests.flows.deliver DATABASE_URL."""

from __future__ import annotations

import asyncio
import sys

from app.db.session import Database, parse_database_url
from app.services import delivery
from app.services.sender import Sender
from app.telemetry import Metrics
from tests.database import make_settings


async def main(url: str) -> None:
    settings = make_settings(webhook_allow_private=True, webhook_seconds_max=1)
    database = Database(parse_database_url(url), settings)
    async with Sender(settings, database.clock) as sender:
        await delivery.run(database, sender, settings, Metrics(), "child")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
