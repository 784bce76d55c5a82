from __future__ import annotations

import asyncio
import stat
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from app.db.session import Database, parse_database_url
from app.errors import DatabaseUnavailableError, InvalidError, NotFoundError, RateLimitedError, UnauthorizedError
from app.services import accounts
from app.services.accounts import (
    Caller,
    KeyRing,
    NewKey,
    Scope,
    create_agent,
    create_first_key,
    create_key,
    list_keys,
    revoke_key,
    revoke_key_of,
)
from tests.database import make_settings

if TYPE_CHECKING:
    from pathlib import Path

    from app.settings import Settings

ADMIN = "an admin key that is long enough"
UNTRUSTING = make_settings(key_cache_seconds=0)
TRUSTING = make_settings(key_cache_seconds=60)


async def _new_key(
    database: Database, *scopes: Scope, agent_id: str | None = None, lives: timedelta | None = None
) -> NewKey:
    async with database.transaction("test") as tx:
        expires_at = tx.now + lives if lives else None
        return await create_key(tx, agent_id, scopes or ("agent",), "test", expires_at)


async def _new_agent(database: Database) -> str:
    async with database.transaction("test") as tx:
        return await create_agent(tx, "Alice")


async def _revoke(database: Database, key_id: str, agent_id: str | None = None) -> None:
    async with database.transaction("test") as tx:
        if agent_id is None:
            await revoke_key(tx, key_id)
        else:
            await revoke_key_of(tx, agent_id, key_id)


async def test_a_key_says_who_calls(database: Database) -> None:
    agent_id = await _new_agent(database)
    key = await _new_key(database, "agent", "coordinator", agent_id=agent_id)
    caller = await KeyRing(database, UNTRUSTING).authenticate(key.text)
    assert caller == Caller(key.id, agent_id, frozenset({"agent", "coordinator"}))
    assert (caller.may("agent"), caller.may("market")) == (True, False)


async def test_admin_may_everything(database: Database) -> None:
    key = await _new_key(database, "admin")
    caller = await KeyRing(database, UNTRUSTING).authenticate(key.text)
    assert all(caller.may(scope) for scope in accounts.ALL_SCOPES)


async def test_only_the_hash_is_stored(database: Database) -> None:
    key = await _new_key(database)
    prefix, key_id, secret = key.text.split("_", 2)
    assert (prefix, key_id, len(secret)) == ("pr", key.id, 43)
    async with database.transaction("test") as tx:
        row = (await tx.connection.execute(text("SELECT api_keys::text FROM api_keys"))).scalar_one()
    assert secret not in row


async def test_what_is_no_good_key_is_refused_alike(database: Database) -> None:
    key = await _new_key(database)
    revoked = await _new_key(database)
    await _revoke(database, revoked.id)
    hostile = [
        "",
        "pr__",
        key.text[:-1],
        key.text + "x",
        key.text.upper(),
        f"pr_{key.id}_{'A' * 43}",
        f"pr_{'0' * 16}_{key.text.split('_', 2)[2]}",
        revoked.text,
        "pr_' OR 1=1 --",
        "\ud800",
        "\0" * 63,
        "x" * 1_000_000,
    ]
    ring = KeyRing(database, UNTRUSTING)
    for attempt in hostile:
        with pytest.raises(UnauthorizedError) as caught:
            await ring.authenticate(attempt)
        assert str(caught.value) == "No valid API key."
        assert caught.value.headers == {"WWW-Authenticate": "Bearer"}


async def test_an_expired_key_is_refused(database: Database) -> None:
    key = await _new_key(database, lives=timedelta(hours=1))
    ring = KeyRing(database, UNTRUSTING)
    assert (await ring.authenticate(key.text)).key_id == key.id
    async with database.transaction("test") as tx:
        await tx.connection.execute(text("UPDATE api_keys SET expires_at = now()"))
    with pytest.raises(UnauthorizedError):
        await ring.authenticate(key.text)


async def test_a_trusted_key_does_not_outlive_its_expiry(database: Database) -> None:
    key = await _new_key(database, lives=timedelta(hours=1))
    ring = KeyRing(database, TRUSTING)
    async with database.transaction("test") as tx:
        soon = "UPDATE api_keys SET expires_at = now() + interval '300 ms'"
        await tx.connection.execute(text(soon))
    assert (await ring.authenticate(key.text)).key_id == key.id
    async with database.transaction("test") as tx:
        await tx.connection.execute(text("SELECT pg_sleep(0.4)"))
    with pytest.raises(UnauthorizedError):
        await ring.authenticate(key.text)


async def test_a_trusted_key_needs_no_query(database: Database) -> None:
    key = await _new_key(database)
    ring = KeyRing(database, TRUSTING)
    first = await ring.authenticate(key.text)
    async with database.transaction("test") as tx:
        await tx.connection.execute(text("ALTER TABLE api_keys RENAME TO gone"))
    assert await ring.authenticate(key.text) == first


async def test_revoking_is_felt_at_once_where_it_is_said(database: Database) -> None:
    key = await _new_key(database)
    ring = KeyRing(database, TRUSTING)
    await ring.authenticate(key.text)
    await _revoke(database, key.id)
    assert (await ring.authenticate(key.text)).key_id == key.id
    ring.forget(key.id)
    with pytest.raises(UnauthorizedError):
        await ring.authenticate(key.text)


async def test_the_ring_is_bounded(database: Database) -> None:
    ring = KeyRing(database, TRUSTING)
    caller = Caller("k", None, frozenset())
    for n in range(accounts.KEYS_CACHED_MAX + 10):
        ring._trust(str(n).encode(), caller, 1.0)
    assert len(ring._trusted) == accounts.KEYS_CACHED_MAX


async def test_the_settings_admin_key_needs_no_database() -> None:
    settings = make_settings(admin_key=ADMIN, database_connect_seconds=0.5)
    away = Database(parse_database_url("postgresql://u@127.0.0.1:1/d"), settings)
    ring = KeyRing(away, settings)
    assert (await ring.authenticate(ADMIN)).may("admin")
    with pytest.raises(UnauthorizedError):
        await ring.authenticate(ADMIN + " ")
    with pytest.raises(DatabaseUnavailableError):
        await ring.authenticate(f"pr_{'0' * 16}_{'A' * 43}")
    await away.close()


async def test_without_an_admin_key_no_text_is_one(database: Database) -> None:
    ring = KeyRing(database, UNTRUSTING)
    for attempt in ("", "None", ADMIN):
        with pytest.raises(UnauthorizedError):
            await ring.authenticate(attempt)


async def test_keys_are_listed_without_secrets_and_revoked_by_their_owner(database: Database) -> None:
    alice, bob = await _new_agent(database), await _new_agent(database)
    mine = await _new_key(database, agent_id=alice)
    other = await _new_key(database, agent_id=bob)
    services = [await _new_key(database), await _new_key(database)]
    async with database.transaction("test") as tx:
        assert [key.id for key in await list_keys(tx, alice)] == [mine.id]
        listed = await list_keys(tx, None)
        assert [key.id for key in listed] == sorted(key.id for key in services)
        assert await list_keys(tx, None, limit=1, after=listed[0].id) == listed[1:]
    with pytest.raises(NotFoundError):
        await _revoke(database, other.id, alice)
    await _revoke(database, mine.id, alice)
    async with database.transaction("test") as tx:
        first = (await list_keys(tx, alice))[0].revoked_at
    await _revoke(database, mine.id)
    async with database.transaction("test") as tx:
        assert (await list_keys(tx, alice))[0].revoked_at == first is not None


async def test_a_bad_key_is_not_made(database: Database) -> None:
    async with database.transaction("test") as tx:
        with pytest.raises(InvalidError, match="Scopes"):
            await create_key(tx, None, ())
        with pytest.raises(InvalidError, match="Scopes"):
            await create_key(tx, None, {"root"})  # type: ignore[arg-type]
        with pytest.raises(InvalidError, match="name"):
            await create_key(tx, None, {"agent"}, "x" * 201)
        with pytest.raises(InvalidError, match="future"):
            await create_key(tx, None, {"agent"}, "", tx.now)
        with pytest.raises(InvalidError, match="within"):
            await create_key(tx, None, {"agent"}, "", datetime.max.replace(tzinfo=timezone(timedelta(hours=-10))))
        with pytest.raises(InvalidError, match="zone"):
            await create_key(tx, None, {"agent"}, "", tx.now.replace(tzinfo=None))
        with pytest.raises(NotFoundError):
            await create_key(tx, "agent_none", {"agent"})
        for name in ("", "a\0b", "\ud800", "x" * 201):
            with pytest.raises(InvalidError):
                await create_agent(tx, name)


async def test_starts_at_once_make_one_first_key(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "first_key"
    keys = await asyncio.gather(*(create_first_key(database, path) for _ in range(5)))
    assert set(keys) == {path.read_text().strip()}
    async with database.transaction("test") as tx:
        assert len(await list_keys(tx, None)) == 1


async def test_unknown_keys_are_bounded_and_good_ones_pass(database: Database) -> None:
    good, new = await _new_key(database), await _new_key(database)
    ring = KeyRing(database, make_settings(key_cache_seconds=0, unknown_keys_per_second=0.01))
    assert (await ring.authenticate(good.text)).key_id == good.id
    assert (await ring.authenticate(good.text)).key_id == good.id
    with pytest.raises(UnauthorizedError):
        await ring.authenticate(f"pr_{'0' * 16}_{'A' * 43}")
    for key in (f"pr_{'1' * 16}_{'A' * 43}", new.text):
        with pytest.raises(RateLimitedError, match="unknown keys") as caught:
            await ring.authenticate(key)
        assert int(caught.value.headers["Retry-After"]) > 0
    assert (await ring.authenticate(good.text)).key_id == good.id


async def test_an_outage_is_not_counted_as_unknown_keys(settings: Settings) -> None:
    away = Database(parse_database_url("postgresql://u@127.0.0.1:1/d"), settings)
    ring = KeyRing(away, make_settings(unknown_keys_per_second=0.01))
    for number in range(3):
        with pytest.raises(DatabaseUnavailableError):
            await ring.authenticate(f"pr_{number:016x}_{'A' * 43}")
    await away.close()


async def test_the_first_key_is_kept_while_it_is_good(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "data" / "first_key"
    key = await create_first_key(database, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (await KeyRing(database, UNTRUSTING).authenticate(key)).may("admin")
    assert await create_first_key(database, path) == key
    await _revoke(database, key.split("_")[1])
    assert await create_first_key(database, path) not in ("", key)
    path.write_text("nonsense\n")
    fresh = await create_first_key(database, path)
    assert path.read_text().strip() == fresh
    assert [entry.name for entry in path.parent.iterdir()] == ["first_key"]
