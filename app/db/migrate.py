"""Bring a database to the schema of this release. Safe to run from several processes at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.errors import StartupError

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

LOCK_SECONDS_MAX = 5
"""A migration that waits longer for a table gives up, since every query behind it waits as well."""

_TURN_SECONDS_MAX = 120
_TURN_POLL_SECONDS = 0.1
_ADVISORY_LOCK = 0x7072_696D_6572_6973  # "primeris"
_REGISTERED = text("SELECT to_regclass('alembic_version')")
_REVISION = text("SELECT version_num FROM alembic_version")
_SCRIPTS = Path(__file__).resolve().parents[2] / "migrations"  # beside `app`, in the repository and installed


async def upgrade(url: URL) -> None:
    """Run every migration that the database lacks; StartupError when another process takes too long at it.

    A database that a later release has migrated is left as it is: this release goes on beside it.
    """
    engine = create_async_engine(url, poolclass=NullPool)
    try:
        async with engine.connect() as connection:  # closing it gives the advisory lock back
            await _take_turn(connection)
            await connection.execute(text(f"SET lock_timeout = '{LOCK_SECONDS_MAX}s'"))
            await connection.commit()
            revision = await current(connection)
            await connection.rollback()  # alembic begins transactions of its own
            if not fits(revision):
                await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def fits(revision: str | None) -> bool:
    """Tell whether this release can work on a database at a revision: its own, or a later release's.

    Revisions are named by their time, and each only expands what the release before it uses, until that is gone.
    """
    return revision is not None and revision >= head()


def head() -> str:
    """Return the revision that this release needs: the time with which the name of the newest script begins.

    Alembic would import every script to say the same, in each process that starts.
    """
    scripts = (_SCRIPTS / "versions").glob("[0-9]*.py")
    newest = max((path.name for path in scripts), default=None)
    if newest is None:
        raise StartupError(f"no migrations in {_SCRIPTS}")
    return newest[: len("20261127_0800")]


async def current(connection: AsyncConnection) -> str | None:
    """Return the revision of the database, or None for one that was never migrated."""
    if (await connection.execute(_REGISTERED)).scalar_one() is None:
        return None
    found: str | None = (await connection.execute(_REVISION)).scalar_one_or_none()
    return found


async def _take_turn(connection: AsyncConnection) -> None:
    """Take the advisory lock by polling: a waiting query's snapshot would block CREATE INDEX CONCURRENTLY."""
    query = select(func.pg_try_advisory_lock(_ADVISORY_LOCK))
    for _ in range(int(_TURN_SECONDS_MAX / _TURN_POLL_SECONDS)):
        taken = (await connection.execute(query)).scalar_one()
        await connection.commit()
        if taken:
            return
        await asyncio.sleep(_TURN_POLL_SECONDS)
    raise StartupError(f"another process has been migrating this database for {_TURN_SECONDS_MAX} s")


def _upgrade(connection: Connection) -> None:
    # a tenth of what a process imports, and few that start have anything to migrate
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
