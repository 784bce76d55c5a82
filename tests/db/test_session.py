from __future__ import annotations

import asyncio
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from app.db.session import Clock, Database, parse_database_url, system_now
from app.errors import DatabaseUnavailableError, StartupError
from tests.database import make_settings

if TYPE_CHECKING:
    from sqlalchemy import URL, TextClause

    from app.settings import Settings

INSERT_AGENT = text("INSERT INTO agents (id, name) VALUES ('a', 'A')")
COUNT_AGENTS = text("SELECT count(*) FROM agents")


async def _count(database: Database) -> int:
    async with database.transaction("test") as tx:
        return int((await tx.connection.execute(COUNT_AGENTS)).scalar_one())


async def _execute(database: Database, *statements: TextClause) -> None:
    async with database.transaction("test") as tx:
        for statement in statements:
            await tx.connection.execute(statement)


async def _be_killed(database: Database, *then: TextClause) -> None:
    async with database.transaction("test") as tx:
        await tx.connection.execute(INSERT_AGENT)
        pid = (await tx.connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        await _execute(database, text(f"SELECT pg_terminate_backend({pid})"))
        for statement in then:
            await tx.connection.execute(statement)


async def test_a_transaction_commits_at_its_end(database: Database) -> None:
    async with database.transaction("alice") as tx:
        await tx.connection.execute(INSERT_AGENT)
        assert tx.actor == "alice"
        assert tx.now == (await tx.connection.execute(text("SELECT transaction_timestamp()"))).scalar_one()
        assert tx.now.utcoffset() == timedelta(0)
        assert await _count(database) == 0
    assert await _count(database) == 1


async def test_an_error_rolls_back(database: Database) -> None:
    with pytest.raises(IntegrityError, match="agents_pkey"):
        await _execute(database, INSERT_AGENT, INSERT_AGENT)
    assert await _count(database) == 0


async def test_a_failing_commit_raises(database: Database) -> None:
    deferred = "ALTER TABLE agents ADD CONSTRAINT one UNIQUE (name) DEFERRABLE INITIALLY DEFERRED"
    await _execute(database, text(deferred))
    with pytest.raises(IntegrityError, match="one"):
        await _execute(database, text("INSERT INTO agents VALUES ('a', 'A'), ('b', 'A')"))
    assert await _count(database) == 0


async def test_an_error_of_ours_is_no_outage(database: Database) -> None:
    with pytest.raises(ProgrammingError):
        async with database.transaction("test") as tx:
            await tx.connection.execute(text("SELECT nothing FROM nowhere"))


async def test_a_killed_connection_is_an_outage_and_the_next_one_works(database: Database) -> None:
    with pytest.raises(DatabaseUnavailableError) as caught:
        await _be_killed(database, text("SELECT 1"))
    assert caught.value.code == "database_unavailable"
    assert "SELECT" not in str(caught.value)
    assert await _count(database) == 0


async def test_a_connection_killed_before_the_commit_is_an_outage(database: Database) -> None:
    with pytest.raises(DatabaseUnavailableError):
        await _be_killed(database)
    assert await _count(database) == 0


async def test_a_driver_that_is_confused_by_a_killed_server_is_an_outage(database: Database) -> None:
    """As it was where Postgres was killed while it greeted a connection."""
    with pytest.raises(DatabaseUnavailableError, match="does not answer"):
        async with database.transaction("test"):
            raise asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress")


async def test_connections_killed_in_the_pool_go_unnoticed(database: Database, database_url: URL) -> None:
    await asyncio.gather(*(_count(database) for _ in range(5)))
    other = Database(database_url, make_settings())
    async with other.transaction("killer") as killer:
        everyone = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        await killer.connection.execute(text(f"{everyone} AND datname = current_database()"))
    await other.close()
    assert await asyncio.gather(*(_count(database) for _ in range(5))) == [0] * 5


async def test_an_empty_pool_is_an_outage(database_url: URL) -> None:
    settings = make_settings(database_pool_size=2, database_connect_seconds=0.2)
    database = Database(database_url, settings)
    async with database.transaction("holder"), database.transaction("another"):
        with pytest.raises(DatabaseUnavailableError):
            await database.ping()
    await database.ping()
    await database.close()


async def test_a_lock_that_is_not_had_in_time_is_named(database: Database) -> None:
    lock = text("LOCK TABLE agents IN ACCESS EXCLUSIVE MODE")
    async with database.transaction("holder") as holder:
        await holder.connection.execute(lock)
        with pytest.raises(DatabaseUnavailableError, match="lock timeout") as caught:
            await _execute(database, text("SET LOCAL lock_timeout = '50ms'"), COUNT_AGENTS)
    assert caught.value.code == "database_busy"


async def test_the_clock_carries_on_between_readings(database: Database) -> None:
    with pytest.raises(DatabaseUnavailableError):
        Clock().now()
    await database.ping()
    await asyncio.sleep(0.05)
    carried = database.clock.now()
    async with database.transaction("test") as tx:
        assert timedelta(0) <= tx.now - carried < timedelta(seconds=1)
    assert abs(system_now() - carried) < timedelta(minutes=1)


async def test_a_good_server_passes_at_start(database: Database) -> None:
    await database.require()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"port": 1, "password": "hunter2"}, "can't be reached"),
        ({"host": "no-such-host.invalid", "password": "hunter2"}, "can't be reached"),
        ({"database": "nowhere"}, "no database named nowhere"),
    ],
)
async def test_a_bad_server_is_one_clear_line_at_start(
    database_url: URL, settings: Settings, change: dict[str, object], reason: str
) -> None:
    database = Database(database_url.set(**change), settings)  # type: ignore[arg-type]
    with pytest.raises(StartupError, match=reason) as caught:
        await database.require()
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DatabaseUnavailableError):
        await database.ping()
    await database.close()


async def test_a_refused_user_is_said_at_start(database_url: URL, settings: Settings) -> None:
    database = Database(database_url.set(username="nobody_here", password="hunter2"), settings)
    with pytest.raises(StartupError, match="refused the user or the password"):
        await database.require()
    await database.close()


async def test_a_silent_server_is_given_up_in_time(settings: Settings) -> None:
    server = socket.create_server(("127.0.0.1", 0))  # the kernel connects, nobody answers
    port = server.getsockname()[1]
    impatient = settings.model_copy(update={"database_connect_seconds": 0.2})
    database = Database(parse_database_url(f"postgresql://u@127.0.0.1:{port}/d"), impatient)
    begun = time.monotonic()
    with pytest.raises(DatabaseUnavailableError):
        await database.ping()
    with pytest.raises(StartupError, match="did not answer in time"):
        await database.require()
    assert time.monotonic() - begun < 10, "it would have waited for ever"
    await database.close()
    server.close()


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
def test_a_url_is_read(scheme: str) -> None:
    url = parse_database_url(f" {scheme}://u:p%40ss@db:6543/risk?sslmode=require\n")
    assert url.drivername == "postgresql+asyncpg"
    assert (url.username, url.password, url.host, url.port, url.database) == ("u", "p@ss", "db", 6543, "risk")
    assert dict(url.query) == {"ssl": "require"}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "not like"),
        ("hunter2", "not like"),
        ("postgresql://u:hunter2@db:port/risk", "not like"),
        ("mysql://u:hunter2@db/risk", "scheme is mysql"),
        ("postgresql://u:hunter2@db:5432", "names no database"),
        ("postgresql://u:hunter2@db/risk?pool=9", "unknown option pool"),
    ],
)
def test_a_bad_url_is_one_clear_line_without_its_secret(url: str, reason: str) -> None:
    with pytest.raises(StartupError, match=reason) as caught:
        parse_database_url(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
