"""A pytest plugin: a migrated, seeded database a test, cloned from a template that is made once a run."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from app.db import migrate
from app.db.session import Database, parse_database_url
from app.domain.margin.venues.registry import VENUES
from app.domain.parameters import MarketParameters
from app.settings import Settings
from tests.postgres import ensure_template, fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL

_MIGRATIONS = Path(__file__).parents[1] / "migrations"


def make_settings(**values: Any) -> Settings:
    """Return the defaults but for these, whatever .env file lies about."""
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]  # which mypy does not see


def shipped_parameters() -> MarketParameters:
    """Return what a new database holds: the package's defaults, the venues' spelled out."""
    return MarketParameters(version=1, venues={name: venue.published for name, venue in VENUES.items()})


@pytest.fixture
def settings() -> Settings:
    return make_settings()


@pytest.fixture(scope="session")
def database_template(postgres_server: str) -> str:
    name = f"migrated_{_fingerprint()}"
    ensure_template(postgres_server, name, _migrate)
    return name


@pytest.fixture
async def database_url(postgres_server: str, database_template: str) -> AsyncIterator[URL]:
    """Yield the URL of a fresh database at the head revision."""
    async with fresh_database(postgres_server, database_template) as url:
        yield parse_database_url(url)


@pytest.fixture
async def database(database_url: URL, settings: Settings) -> AsyncIterator[Database]:
    """Yield a `Database` on a fresh database, closed at the end."""
    opened = Database(database_url, settings)
    yield opened
    await opened.close()


def _migrate(url: str) -> None:
    asyncio.run(migrate.upgrade(parse_database_url(url)))


def _fingerprint() -> str:
    """Name the template after what made it, for a server that outlives the run."""
    sources = sorted(_MIGRATIONS.rglob("*.py"))
    return sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
