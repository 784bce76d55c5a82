from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from app.db import clearing_tables, event_tables, lending_tables, migrate, operator_views
from app.db.session import Database, parse_database_url
from app.db.tables import APPEND_ONLY, api_keys, market_prices, metadata, model_parameters
from app.domain.parameters import MarketParameters
from app.services.market import load_parameters
from app.services.prices import load_prices
from tests.database import shipped_parameters
from tests.postgres import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL, Executable

    from app.settings import Settings

# One query an aspect: everything that a database holds beyond its rows.
SCHEMA = {
    "columns": """
        SELECT table_name, ordinal_position, column_name, data_type, udt_name, is_nullable, column_default,
               numeric_precision, numeric_scale, character_maximum_length
        FROM information_schema.columns WHERE table_schema = 'public'""",
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace""",
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "triggers": """
        SELECT tgrelid::regclass::text, tgname, pg_get_triggerdef(oid)
        FROM pg_trigger WHERE NOT tgisinternal""",
    "functions": """
        SELECT proname, prorettype::regtype::text, regexp_replace(prosrc, '\\s+', ' ', 'g')
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace""",
    "views": "SELECT viewname, definition FROM pg_views WHERE schemaname = 'public'",
    "options": """
        SELECT relname, relkind::text, relpersistence::text, reloptions::text
        FROM pg_class WHERE relnamespace = 'public'::regnamespace""",
}

HISTORY = (*APPEND_ONLY, *event_tables.APPEND_ONLY, *lending_tables.APPEND_ONLY, *clearing_tables.APPEND_ONLY)


@pytest.fixture
async def empty_url(postgres_server: str) -> AsyncIterator[URL]:
    async with fresh_database(postgres_server) as url:
        yield parse_database_url(url)


async def _execute(database: Database, statement: Executable) -> None:
    async with database.transaction("test") as tx:
        await tx.connection.execute(statement)


async def _schema(database: Database, aspect: str) -> set[tuple[object, ...]]:
    async with database.transaction("test") as tx:
        rows = {tuple(row) for row in await tx.connection.execute(text(SCHEMA[aspect]))}
    return {row for row in rows if not str(row[0]).startswith("alembic_version")}


@pytest.mark.parametrize("aspect", SCHEMA)
async def test_the_migrations_build_what_the_tables_say(
    database: Database, empty_url: URL, settings: Settings, aspect: str
) -> None:
    created = Database(empty_url, settings)
    async with created.transaction("test") as tx:
        await tx.connection.run_sync(metadata.create_all)
    expected = await _schema(created, aspect)
    await created.close()
    assert await _schema(database, aspect) == expected


async def test_operators_have_their_views(database: Database) -> None:
    async with database.transaction("test") as tx:
        for view in operator_views.VIEWS:
            assert (await tx.connection.execute(text(f"SELECT * FROM {view}"))).all() == []


async def test_a_new_database_holds_the_packages_defaults(database: Database) -> None:
    async with database.transaction("test") as tx:
        assert await load_parameters(tx) == shipped_parameters()
        assert await load_prices(tx) == {}


async def test_every_model_parameter_is_seeded(database: Database) -> None:
    defaults = MarketParameters()
    async with database.transaction("test") as tx:
        names = (await tx.connection.execute(select(model_parameters.c.name))).scalars().all()
    groups = (defaults.models, defaults.policy, defaults.clearing)
    assert set(names) == {name for group in groups for name in asdict(group)}


async def test_revisions(empty_url: URL, settings: Settings) -> None:
    database = Database(empty_url, settings)
    async with database.transaction("test") as tx:
        assert await migrate.current(tx.connection) is None
    await migrate.upgrade(empty_url)
    await migrate.upgrade(empty_url)
    async with database.transaction("test") as tx:
        assert await migrate.current(tx.connection) == migrate.head()
    await database.close()


async def test_several_may_migrate_at_once(empty_url: URL, settings: Settings) -> None:
    await asyncio.gather(*(migrate.upgrade(empty_url) for _ in range(4)))
    database = Database(empty_url, settings)
    async with database.transaction("test") as tx:
        assert await load_parameters(tx) == shipped_parameters()
    await database.close()


@pytest.mark.parametrize("table", [table.name for table in HISTORY])
@pytest.mark.parametrize("statement", ["UPDATE {} SET {} = NULL", "DELETE FROM {}", "TRUNCATE {} CASCADE"])
async def test_history_is_append_only(database: Database, table: str, statement: str) -> None:
    column = list(metadata.tables[table].columns)[-1].name
    with pytest.raises(IntegrityError, match="append-only"):
        await _execute(database, text(statement.format(table, column)))


@pytest.mark.parametrize("price", ["NaN", "Infinity", "-Infinity", "0", "-1", "1e15", "1e-19"])
async def test_the_table_itself_refuses_what_is_no_price(database: Database, price: str) -> None:
    with pytest.raises(IntegrityError, match="market_prices_price_check"):
        await _execute(database, text(f"INSERT INTO market_prices VALUES ('BTC', '{price}', now(), now(), 1)"))


@pytest.mark.parametrize("symbol", ["", " BTC", "BTC\n", "-BTC", "B" * 65, "Ƀ"])
async def test_the_table_itself_refuses_what_is_no_symbol(database: Database, symbol: str) -> None:
    now = func.now()
    row = insert(market_prices).values(symbol=symbol, price=1, as_of=now, received_at=now, version=1)
    with pytest.raises(IntegrityError, match="market_prices_symbol_check"):
        await _execute(database, row)


@pytest.mark.parametrize("scopes", [[], ["root"], ["admin", "root"], ["admin", None]])
async def test_the_table_itself_refuses_unknown_scopes(database: Database, scopes: list[str]) -> None:
    row = {"id": "k", "name": "", "secret_sha256": bytes(32), "scopes": scopes}
    with pytest.raises(DBAPIError, match="api_keys_scopes_check"):
        await _execute(database, insert(api_keys).values(row))


async def test_the_regimes_are_seeded_and_no_other_matrix_is_known(database: Database) -> None:
    async with database.transaction("test") as tx:
        assert (await load_parameters(tx, 1)).regimes == MarketParameters().regimes
    with pytest.raises(IntegrityError, match="correlation_parameters_matrix_check"):
        await _execute(database, text("INSERT INTO correlation_parameters VALUES ('panic', 'BTC', 'ETH', 1, 0.9)"))


@pytest.mark.parametrize(
    "values", ["'stress', 'ETH', 'BTC', 1, 0", "'stress', 'BTC', 'BTC', 1, 0", "'stress', 'A', 'B', 1, 'NaN'"]
)
async def test_pairs_are_sorted_and_correlations_bounded(database: Database, values: str) -> None:
    with pytest.raises(IntegrityError, match=r"correlation_parameters_(pair|value)_check"):
        await _execute(database, text(f"INSERT INTO correlation_parameters VALUES ({values})"))
