"""A pytest plugin: one real Postgres for the whole run, shared by its workers, and a database a test."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from app.db import embedded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

_HOME = "PRIMERISK_TEST_HOME"  # the workers inherit it from the process that started them
_MEMORY = Path("/dev/shm")
_MEMORY_BYTES_MIN = 2 << 30
_OWNED = pytest.StashKey[Path]()

_QUICK = (
    "ALTER SYSTEM SET fsync = off",
    "ALTER SYSTEM SET full_page_writes = off",
    "SELECT pg_reload_conf()",
    # a login is most of what a short connection costs, and its thousands of hashes most of a login
    "SET scram_iterations = 1",
)
"""Nothing that the tests prove hangs on these: no test takes the machine's power away."""


def pytest_configure(config: pytest.Config) -> None:
    """Make a directory for everything that the run writes: every temporary one of it is in there."""
    if _HOME not in os.environ:
        home = Path(tempfile.mkdtemp(prefix="pr-", dir=_MEMORY if _is_roomy(_MEMORY) else None))
        home.chmod(0o711)  # root's servers run as another user
        (home / "tmp").mkdir()
        config.stash[_OWNED] = home
        os.environ |= {_HOME: str(home), "TMPDIR": str(home / "tmp")}
        tempfile.tempdir = None  # which has remembered the one before


def pytest_unconfigure(config: pytest.Config) -> None:
    home = config.stash.get(_OWNED, None)
    if home is not None:
        del os.environ[_HOME]
        shutil.rmtree(home)


def _is_roomy(place: Path) -> bool:
    """Tell whether servers can live there: databases are made and dropped twenty times as fast in memory as on disk."""
    if not os.access(place, os.W_OK) or os.statvfs(place).f_flag & os.ST_NOEXEC:
        return False
    return shutil.disk_usage(place).free >= _MEMORY_BYTES_MIN


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Yield the URL of a superuser on a server that has room for databases of ours."""
    given = os.environ.get("PRIMERISK_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with embedded.start(Path(os.environ[_HOME])) as server:
        asyncio.run(_quicken(server.url))
        yield server.url


async def _quicken(server: str) -> None:
    admin = await asyncpg.connect(server)
    try:
        await admin.execute("SELECT pg_advisory_lock(hashtext('quicken'))")
        if await admin.fetchval("SHOW fsync") == "on":
            for statement in _QUICK:
                await admin.execute(statement)
            await admin.execute(f"ALTER ROLE postgres PASSWORD '{urlsplit(server).password}'")
    finally:
        await admin.close()


def database_url(server: str, name: str) -> str:
    """Return `server`'s URL with another database."""
    return urlsplit(server)._replace(path=f"/{name}").geturl()


def ensure_template(server: str, name: str, build: Callable[[str], None]) -> None:
    """Have `build(url)` fill the database `name` unless another worker did; it must disconnect at its end.

    Blocks, so call it from a plain (not async) session fixture; put what the content depends on into `name`.
    """
    asyncio.run(_ensure_template(server, name, build))


async def _ensure_template(server: str, name: str, build: Callable[[str], None]) -> None:
    admin = await asyncpg.connect(server)
    try:
        await admin.execute("SELECT pg_advisory_lock(hashtext($1))", name)
        if await admin.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
            return
        scratch = f"scratch_{uuid4().hex}"  # renamed when whole: a failed build is no template
        await admin.execute(f"CREATE DATABASE {scratch}")
        await asyncio.to_thread(build, database_url(server, scratch))
        await admin.execute(f'ALTER DATABASE {scratch} RENAME TO "{name}"')
    finally:
        await admin.close()


@asynccontextmanager
async def fresh_database(server: str, template: str = "template1") -> AsyncIterator[str]:
    """Yield the URL of a new copy of `template`, and drop it at the end, whoever is still connected."""
    name = f"test_{uuid4().hex}"
    await _execute(server, f'CREATE DATABASE {name} TEMPLATE "{template}" STRATEGY FILE_COPY')
    try:
        yield database_url(server, name)
    finally:
        await _execute(server, f"DROP DATABASE {name} WITH (FORCE)")


async def _execute(server: str, sql: str) -> None:
    admin = await asyncpg.connect(server)
    try:
        await admin.execute(sql)
    finally:
        await admin.close()
