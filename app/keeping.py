"""What the command line does to a database: finds or starts it, migrates it, makes and revokes keys.

It knows neither the web framework nor the risk core, so that these commands answer at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import cast

from pydantic import SecretStr
from sqlalchemy import URL

from app.db import embedded, migrate, operator_views
from app.db.session import Database, parse_database_url
from app.errors import StartupError
from app.services import accounts
from app.settings import Settings


@contextlib.contextmanager
def running_database(settings: Settings) -> Iterator[Settings]:
    """Give settings whose database URL is that of a running server: the given one, else an embedded one."""
    if settings.database_url is not None:
        parse_database_url(settings.database_url.get_secret_value())
        yield settings
        return
    with embedded.start(settings.data_dir) as server:
        yield settings.model_copy(update={"database_url": SecretStr(server.url)})


def url_of(settings: Settings) -> URL:
    """Return the URL of the database. Raises StartupError."""
    if settings.database_url is None:
        raise StartupError("no database: set PRIMERISK_DATABASE_URL")
    return parse_database_url(settings.database_url.get_secret_value())


async def prepare(settings: Settings) -> None:
    """Check the server and bring the schema to this release. Raises StartupError."""
    url = url_of(settings)
    database = Database(url, settings)
    try:
        await database.require()
    finally:
        await database.close()
    await migrate.upgrade(url)


async def migrate_for(settings: Settings, reader: str | None) -> None:
    """Bring the schema to this release, and let a role read the operator's views. Raises StartupError."""
    async with prepared(settings) as database:
        if reader is not None:
            async with database.transaction("command-line") as tx:
                await operator_views.grant(tx, reader)


async def make_key(settings: Settings, name: str, scopes: list[str]) -> str:
    """Return a new key of the service. Raises InvalidError for an unknown scope."""
    async with prepared(settings) as database, database.transaction("command-line") as tx:
        return (await accounts.create_key(tx, None, cast("list[accounts.Scope]", scopes), name)).text


async def make_agent(settings: Settings, name: str) -> tuple[str, str]:
    """Return the id and the key of a new agent. Raises InvalidError for a name that is none."""
    async with prepared(settings) as database, database.transaction("command-line") as tx:
        agent_id = await accounts.create_agent(tx, name)
        return agent_id, (await accounts.create_key(tx, agent_id, {"agent"}, name)).text


async def revoke_key(settings: Settings, key_id: str) -> None:
    """Revoke a key. Raises NotFoundError."""
    async with prepared(settings) as database, database.transaction("command-line") as tx:
        await accounts.revoke_key(tx, key_id)


@contextlib.asynccontextmanager
async def prepared(settings: Settings) -> AsyncIterator[Database]:
    """Yield the database, brought to the schema of this release. Raises StartupError."""
    await prepare(settings)
    database = Database(url_of(settings), settings)
    try:
        yield database
    finally:
        await database.close()
