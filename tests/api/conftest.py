from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from app.db.session import parse_database_url
from app.server import worker_of
from tests.api.service import Service, running
from tests.postgres import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL


@pytest.fixture
async def service(database_url: URL) -> AsyncIterator[Service]:
    """Yield the app on a database of its own."""
    async with running(database_url) as started:
        yield started


@pytest.fixture
async def worked(database_url: URL) -> AsyncIterator[Service]:
    """Yield the app with a worker on the same parts."""
    async with running(database_url, worker_poll_seconds=0.05) as service:
        worker = asyncio.create_task(worker_of(service.app.state.parts).run())
        yield service
        worker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(postgres_server: str, database_template: str) -> AsyncIterator[Service]:
    """Yield the app on a database of the module's own, for tests that change nothing in it."""
    async with (
        fresh_database(postgres_server, database_template) as url,
        running(parse_database_url(url)) as started,
    ):
        yield started
