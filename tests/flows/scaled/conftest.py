"""The stories here are played on one installation of two API processes and two workers, which is shared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import text

from app.db.session import Database, parse_database_url
from app.services import webhooks
from app.settings import Settings
from tests.flows.topology import Topology, standing
from tests.flows.trader import settings_of
from tests.postgres import fresh_database

ENDPOINTS = text("SELECT id, agent_id FROM webhook_endpoints WHERE status <> 'deleted'")


@contextmanager
def _fresh(server: str, template: str) -> Iterator[str]:
    """Yield the URL of a new database, from outside of any event loop."""
    with asyncio.Runner() as runner:
        made = fresh_database(server, template)
        url = runner.run(made.__aenter__())
        try:
            yield url
        finally:
            runner.run(made.__aexit__(None, None, None))


@pytest.fixture(scope="package")
def shared(postgres_server: str, database_template: str) -> Iterator[tuple[str, Topology]]:
    with _fresh(postgres_server, database_template) as url, standing(settings_of(parse_database_url(url))) as made:
        yield url, made


@pytest.fixture
async def database(shared: tuple[str, Topology], settings: Settings) -> AsyncIterator[Database]:
    """Yield the database that all four work on; at the end no webhook of the test's is sent any more."""
    opened = Database(parse_database_url(shared[0]), settings)
    yield opened
    async with opened.transaction("test") as tx:
        for endpoint_id, agent_id in (await tx.connection.execute(ENDPOINTS)).all():
            await webhooks.delete(tx, agent_id, endpoint_id)
    await opened.close()


@pytest.fixture
def topology(shared: tuple[str, Topology]) -> Topology:
    """Return the four processes, all of them well, whomever the test before has killed."""
    shared[1].restore()
    return shared[1]
