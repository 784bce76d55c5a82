"""The database: connections, the only commit, the only clock, and the one place that names an outage."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import asyncpg
from sqlalchemy import URL, func, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from app.errors import DatabaseUnavailableError, StartupError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.pool import AsyncAdaptedQueuePool

    from app.settings import Settings

log = logging.getLogger(__name__)

POSTGRES_VERSION_MIN = 150_000
STATEMENT_SECONDS_MAX = 15
LOCK_SECONDS_MAX = 5
IDLE_IN_TRANSACTION_SECONDS_MAX = 30

_NOW = select(func.now())

_DRIVER = "postgresql+asyncpg"
_SCHEMES = ("postgresql", "postgres", _DRIVER)
_QUERY_NAMES = {"ssl": "ssl", "sslmode": "ssl", "host": "host", "port": "port"}
"""What may follow the `?`, under its name in asyncpg; root certificates come from PGSSLROOTCERT."""

# SQLSTATEs: the classes that mean no usable server, and the codes that mean a busy one.
_AWAY_CLASSES = ("08", "28", "3D", "53", "57", "58")
_BUSY_CODES = {
    "25P03": "idle in transaction",
    "40001": "serialization failure",
    "40P01": "deadlock",
    "55P03": "lock timeout",
    "57014": "statement timeout",
}
_FAULTS = {
    "25006": "it is read-only",
    "53100": "its disk is full",
    "53200": "it is out of memory",
    "58030": "its disk fails",
    "XX001": "its data is damaged",
    "XX002": "an index of it is damaged",
}
"""The server answers, and an operator must see to it."""
_CLIENT_ERRORS = asyncpg.InterfaceError, asyncpg.InternalClientError
"""The driver's own; the latter where a server is killed in the middle of a greeting."""
_FAULT_LOG_SECONDS = 60.0
"""How often the same fault is logged: it comes back with every request."""


@dataclass(frozen=True, slots=True)
class Tx:
    """One open transaction: its connection, the database's time at its start (UTC), and who acts."""

    connection: AsyncConnection
    now: datetime
    actor: str


class Clock:
    """The database's clock between two readings, carried on by the monotonic clock of this process.

    It costs no round trip, and lags the database by at most the round trip of the last reading.
    """

    def __init__(self) -> None:
        self._reading: tuple[datetime, float] | None = None

    def set(self, now: datetime) -> None:
        """Take a reading that has just arrived."""
        self._reading = now, time.monotonic()

    def now(self) -> datetime:
        """Return the database's time; DatabaseUnavailableError before the first reading."""
        if self._reading is None:
            raise _away()
        read, at = self._reading
        return read + timedelta(seconds=time.monotonic() - at)


class Database:
    """A pool of connections to one Postgres database."""

    def __init__(self, url: URL, settings: Settings) -> None:
        self.url = url
        self.clock = Clock()
        self.reachable = False
        """Whether the last transaction found the server."""
        self.engine = _engine(url, settings)
        self._reader = _Reader(url, settings)
        self._faults_logged: dict[str, float] = {}

    @asynccontextmanager
    async def transaction(self, actor: str) -> AsyncIterator[Tx]:
        """Open a transaction that commits when the block ends, and rolls back when it raises.

        Raises DatabaseUnavailableError when the server is away, too busy to answer in time, or at fault.
        """
        try:
            with _outages_named():
                async with AsyncExitStack() as stack:
                    connection, now = await self._begin(stack)
                    self.clock.set(now)
                    self.reachable = True
                    yield Tx(connection, now, actor)
        except DatabaseUnavailableError as error:
            self._fail(error)
            raise

    async def _begin(self, stack: AsyncExitStack) -> tuple[AsyncConnection, datetime]:
        """Begin a transaction that ends with the stack, and return it with the database's time.

        Where the connection was lost in the pool, that is once more on a new one: nothing was done on it yet. To ask
        each connection first whether it lives, as the engine would, costs three round trips a transaction.
        """
        try:
            return await self._begin_once(stack)
        except DBAPIError as error:
            if not (error.connection_invalidated or _is_closed(error)):
                raise
            return await self._begin_once(stack)

    async def _begin_once(self, stack: AsyncExitStack) -> tuple[AsyncConnection, datetime]:
        async with AsyncExitStack() as begun:
            connection = await begun.enter_async_context(self.engine.begin())
            now: datetime = (await connection.execute(_NOW)).scalar_one()
            await stack.enter_async_context(begun.pop_all())
        return connection, now

    async def fetch_value(self, query: str, *arguments: object) -> Any:
        """Return the first value of a query, None where it has no row; for reads that are asked for all the time.

        The driver's own pool answers four times as many as SQLAlchemy does. One statement is one snapshot. Raises
        DatabaseUnavailableError.
        """
        try:
            with _outages_named():
                value = await self._reader.fetch_value(query, *arguments)
        except DatabaseUnavailableError as error:
            self._fail(error)
            raise
        self.reachable = True
        return value

    @asynccontextmanager
    async def snapshot(self, exported: str | None = None) -> AsyncIterator[asyncpg.Connection]:
        """Open a connection of the driver's own whose statements all see one state, for reads in bulk.

        `exported` names the state that another such connection sees. Raises DatabaseUnavailableError.
        """
        try:
            with _outages_named():
                async with self._reader.snapshot(exported) as connection:
                    yield connection
        except DatabaseUnavailableError as error:
            self._fail(error)
            raise
        self.reachable = True

    def _fail(self, error: DatabaseUnavailableError) -> None:
        self.reachable = error.code != "database_unavailable"
        if error.code == "database_error":
            self._log_fault(error.detail)

    def _log_fault(self, detail: str) -> None:
        now = time.monotonic()
        if now >= self._faults_logged.get(detail, 0.0):
            log.error("%s", detail)
            self._faults_logged[detail] = now + _FAULT_LOG_SECONDS

    async def ping(self) -> None:
        """Return once the server has answered a query; DatabaseUnavailableError when it does not."""
        async with self.transaction("ping"):
            return

    def connections(self) -> dict[tuple[str, str], int]:
        """Return how many connections this process has, by pool and by whether they are in use."""
        pool = cast("AsyncAdaptedQueuePool", self.engine.pool)
        reads_in_use, reads_idle = self._reader.connections()
        return {
            ("transactions", "in_use"): pool.checkedout(),
            ("transactions", "idle"): pool.checkedin(),
            ("reads", "in_use"): reads_in_use,
            ("reads", "idle"): reads_idle,
        }

    async def require(self) -> None:
        """Check at start that the server answers and is recent enough; StartupError in one line."""
        try:
            async with self.engine.connect() as connection:
                number = (await connection.execute(text("SHOW server_version_num"))).scalar_one()
        except (OSError, SQLAlchemyError, ValueError) as error:  # ValueError: a host name that can't be encoded
            raise StartupError(f"{_shown(self.url)}: {_reason(error, self.url)}") from error
        if int(number) < POSTGRES_VERSION_MIN:
            raise StartupError(f"{_shown(self.url)}: Postgres 15 or later is needed, this is {number}")

    async def close(self) -> None:
        """Close every connection of the pools."""
        await self._reader.close()
        await self.engine.dispose()


class _Reader:
    """A pool of the driver's own, opened when it is first needed."""

    def __init__(self, url: URL, settings: Settings) -> None:
        self._url = url
        self._size = settings.database_pool_size
        self._connect_seconds = settings.database_connect_seconds
        self._pool: asyncpg.Pool | None = None
        self._opening = asyncio.Lock()

    async def fetch_value(self, query: str, *arguments: object) -> Any:
        pool = self._pool or await self._open()
        async with pool.acquire(timeout=self._connect_seconds) as connection:
            return await connection.fetchval(query, *arguments)

    @asynccontextmanager
    async def snapshot(self, exported: str | None) -> AsyncIterator[asyncpg.Connection]:
        pool = self._pool or await self._open()
        async with (
            pool.acquire(timeout=self._connect_seconds) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            if exported is not None:
                await connection.execute(f"SET TRANSACTION SNAPSHOT '{exported}'")
            yield connection

    def connections(self) -> tuple[int, int]:
        """Return how many are in use, and how many are idle."""
        if self._pool is None:
            return 0, 0
        return self._pool.get_size() - self._pool.get_idle_size(), self._pool.get_idle_size()

    async def _open(self) -> asyncpg.Pool:
        async with self._opening:
            if self._pool is None:
                _, arguments = self._url.get_dialect()().create_connect_args(self._url)
                options = _connect_options(self._connect_seconds)
                self._pool = await asyncpg.create_pool(
                    min_size=0, max_size=self._size, reset=_nothing_to_reset, **arguments, **options
                )
            return self._pool

    async def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()


async def _nothing_to_reset(_: object) -> None:
    """Give a connection back as it is: a single plain SELECT leaves nothing behind, and a reset is a round trip."""


def system_now() -> datetime:
    """Return this machine's time in UTC, for the command line where no database is at hand."""
    return datetime.now(UTC)  # noqa: TID251  this module is where the clock lives


def parse_database_url(value: str) -> URL:
    """Return a Postgres server's URL as SQLAlchemy takes it; StartupError in one line, without the secret."""
    try:
        url = make_url(value.strip())
    except (ArgumentError, ValueError):  # not chained: their text may hold the password
        raise StartupError("database URL: not like postgresql://user:password@host:port/name") from None
    if url.drivername not in _SCHEMES:
        raise StartupError(f"database URL: the scheme is {url.drivername}, not postgresql")
    if not url.database:
        raise StartupError(f"{_shown(url)}: the database URL names no database")
    unknown = sorted(set(url.query) - set(_QUERY_NAMES))
    if unknown:
        raise StartupError(f"database URL: unknown option {unknown[0]} (known: {', '.join(_QUERY_NAMES)})")
    query = {_QUERY_NAMES[name]: value for name, value in url.query.items()}
    ready = url.set(drivername=_DRIVER, query=query)
    try:
        ready.get_dialect()().create_connect_args(ready)
    except (ArgumentError, ValueError):
        raise StartupError(f"{_shown(url)}: the database URL has a host or port that can't be read") from None
    return ready


def _engine(url: URL, settings: Settings) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_size=settings.database_pool_size,
        max_overflow=0,
        pool_timeout=settings.database_connect_seconds,
        pool_use_lifo=True,
        hide_parameters=True,  # an error's text may be logged, and they may be secrets
        connect_args=_connect_options(settings.database_connect_seconds),
    )


def _connect_options(connect_seconds: float) -> dict[str, Any]:
    return {
        "timeout": connect_seconds,
        # The server's own limit answers first; this one is for a server that has gone silent.
        "command_timeout": STATEMENT_SECONDS_MAX + 5,
        "server_settings": {
            "application_name": "primerisk",
            "timezone": "UTC",
            "jit": "off",  # it costs short queries more than it saves
            "statement_timeout": f"{STATEMENT_SECONDS_MAX}s",
            "lock_timeout": f"{LOCK_SECONDS_MAX}s",
            "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_SECONDS_MAX}s",
        },
    }


@contextmanager
def _outages_named() -> Iterator[None]:
    """Turn what the driver, the pool and the socket raise for an outage or a fault into the one error for it."""
    try:
        yield
    except (OSError, PoolTimeoutError) as error:  # a transaction does no other I/O (house rule 2)
        raise _away() from error
    except (asyncpg.PostgresError, *_CLIENT_ERRORS) as error:  # of the driver's own pool
        named = _outage(getattr(error, "sqlstate", None) or "", gone=isinstance(error, _CLIENT_ERRORS))
        if named is None:
            raise
        raise named from error
    except DBAPIError as error:
        named = _outage(_sqlstate(error), gone=error.connection_invalidated or _is_closed(error))
        if named is None:
            raise
        raise named from error


def _outage(state: str, *, gone: bool) -> DatabaseUnavailableError | None:
    """Return the error for a SQLSTATE that is an outage or a fault, None for any other."""
    if state in _BUSY_CODES:
        return _busy(_BUSY_CODES[state])
    if state in _FAULTS:
        return _faulty(_FAULTS[state])
    return _away() if gone or state.startswith(_AWAY_CLASSES) else None


def _away() -> DatabaseUnavailableError:
    return DatabaseUnavailableError(
        "The database does not answer.", code="database_unavailable", headers={"Retry-After": "1"}
    )


def _busy(why: str) -> DatabaseUnavailableError:
    return DatabaseUnavailableError(
        f"The database is busy ({why}): try again.", code="database_busy", headers={"Retry-After": "1"}
    )


def _faulty(why: str) -> DatabaseUnavailableError:
    return DatabaseUnavailableError(
        f"The database can't serve this: {why}.", code="database_error", headers={"Retry-After": "10"}
    )


def _sqlstate(error: BaseException) -> str:
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _is_closed(error: DBAPIError) -> bool:
    """Tell whether the driver refused because the connection is gone, for which it has no SQLSTATE."""
    said = str(error.orig)
    return any(words in said for words in ("connection is closed", "connection was closed", "cannot switch to state"))


def _shown(url: URL) -> str:
    return url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)


def _reason(error: BaseException, url: URL) -> str:
    state = _sqlstate(error)
    if state.startswith("28"):
        return "the server refused the user or the password"
    if state == "3D000":
        return f"the server has no database named {url.database}"
    if isinstance(error, TimeoutError):
        return "the server did not answer in time"
    if isinstance(error, OSError):
        return f"the server can't be reached ({error.strerror or error})"
    return f"the server can't be used ({getattr(error, 'orig', None) or error})"
