"""Migrations run beside the release before: they only add to what it uses. What they may say is checked statement by
statement, as they were really executed; `tests/flows/test_upgrade.py` runs the release before on what comes of them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import URL, Engine, event, text

from app.db import migrate
from app.db.session import Database, parse_database_url
from app.settings import Settings
from tests.api.service import connected
from tests.postgres import fresh_database

FIRST_RELEASE = "20261122_0550"
"""Up to here there was no release before, and a migration could do what it liked."""
CONTRACTS: dict[str, str] = {}
"""Revisions that take something away, each with the release that stopped using it."""

_HARMLESS = (
    r"CREATE (TABLE|VIEW|SEQUENCE|TRIGGER|(OR REPLACE )?FUNCTION) ",
    r"CREATE (UNIQUE )?INDEX CONCURRENTLY ",
    r"DROP INDEX CONCURRENTLY IF EXISTS ",
    r"INSERT INTO ",
    r"ALTER TABLE \w+ VALIDATE CONSTRAINT ",
    r"ALTER TABLE \w+ ADD CONSTRAINT .* NOT VALID$",
    r"UPDATE alembic_version ",
    r"(SELECT|SET|SHOW|COMMIT|BEGIN) ?",
)


def _objections(statements: list[str]) -> list[str]:
    """Return which of a revision's statements the release before may stumble over, or wait for."""
    made = set(re.findall(r"CREATE TABLE (\w+)", "\n".join(statements)))
    added = set(re.findall(r"ALTER TABLE (\w+) ADD COLUMN (\w+)", "\n".join(statements)))
    dropped: set[tuple[str, str]] = set()
    found = []
    for statement in statements:
        table = re.match(r"ALTER TABLE (\w+) |CREATE (?:UNIQUE )?INDEX \w+ ON (\w+)", statement)
        if any(re.match(pattern, statement) for pattern in _HARMLESS) or (table and set(table.groups()) & made):
            continue
        if re.match(r"ALTER TABLE \w+ ADD COLUMN ", statement) and (
            "NOT NULL" not in statement or "DEFAULT" in statement
        ):
            continue
        filled = re.match(r"UPDATE (\w+) (?:\w+ )?SET (\w+) = [^,]+ FROM ", statement)
        if filled is not None and filled.groups() in added:
            continue  # what the release before knows nothing of
        constraint = re.match(r"ALTER TABLE (\w+) (DROP|ADD) CONSTRAINT (\w+)", statement)
        if constraint is None:
            found.append(statement)
            continue
        name = constraint[1], constraint[3]
        if constraint[2] == "DROP":
            dropped.add(name)
        elif name not in dropped:
            found.append(statement)  # it reads the whole table under a lock: NOT VALID, then VALIDATE
        else:
            dropped.discard(name)  # the same rule, wider
    return found + [f"{table} loses {rule}" for table, rule in sorted(dropped)]


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Give the statements that are executed meanwhile, on one line each."""
    statements: list[str] = []

    def hear(*given: Any) -> None:
        statements.append(" ".join(given[2].split()))

    event.listen(Engine, "before_cursor_execute", hear)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", hear)


def _by_revision(statements: list[str]) -> dict[str, list[str]]:
    """Return the statements of each revision; alembic ends one by writing its name."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for statement in statements:
        current.append(statement)
        if named := re.search(r"alembic_version .*?'(\d{8}_\d{4})'", statement):
            found[named[1]], current = current, []
    return found


@pytest.fixture
async def empty_url(postgres_server: str) -> AsyncIterator[URL]:
    async with fresh_database(postgres_server) as url:
        yield parse_database_url(url)


async def test_migrations_only_add_to_what_the_release_before_uses(empty_url: URL) -> None:
    with _heard() as statements:
        await migrate.upgrade(empty_url)
    revisions = _by_revision(statements)
    assert list(revisions) == sorted(revisions), "a later revision has a later name"
    assert max(revisions) == migrate.head()
    checked = {name: of for name, of in revisions.items() if name > FIRST_RELEASE and name not in CONTRACTS}
    assert checked
    assert {name: objected for name, of in checked.items() if (objected := _objections(of))} == {}


@pytest.mark.parametrize(
    "statements",
    [
        ["DROP TABLE accounts"],
        ["ALTER TABLE accounts DROP COLUMN version"],
        ["ALTER TABLE accounts ADD COLUMN colour TEXT NOT NULL"],
        ["ALTER TABLE accounts ALTER COLUMN version TYPE integer"],
        ["ALTER TABLE accounts RENAME COLUMN version TO edition"],
        ["ALTER TABLE accounts ADD CONSTRAINT narrow CHECK (version < 9)"],
        ["ALTER TABLE accounts DROP CONSTRAINT accounts_delays_check"],
        ["CREATE INDEX slow ON ledger_entries (asset)"],
        ["UPDATE accounts SET version = 0"],
        ["ALTER TABLE accounts ADD COLUMN colour TEXT", "UPDATE accounts a SET version = 0 FROM agents"],
    ],
)
def test_what_the_release_before_would_stumble_over_is_objected_to(statements: list[str]) -> None:
    assert _objections(statements) != []


async def test_a_database_that_a_later_release_has_migrated_is_worked_on(
    database: Database, settings: Settings
) -> None:
    async with database.transaction("test") as tx:
        await tx.connection.execute(text("UPDATE alembic_version SET version_num = '29991231_0000'"))
    await migrate.upgrade(database.url)
    async with database.transaction("test") as tx:
        assert await migrate.current(tx.connection) == "29991231_0000"
    async with connected(database.url) as (_, client):
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["checks"]["migrations"]["ok"] is True
