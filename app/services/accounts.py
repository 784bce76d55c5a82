"""Agents and their API keys: `pr_<id>_<secret>`, of which only the secret's SHA-256 is stored."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn, get_args

from sqlalchemy import bindparam, func, insert, select, update

from app.db.tables import accounts, agents, api_keys
from app.domain.money import to_decimal
from app.errors import ForbiddenError, NotFoundError, UnauthorizedError, invalid
from app.services import audit
from app.services.rates import RateLimiter

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy import ColumnElement, RowMapping

    from app.db.session import Database, Tx
    from app.settings import Settings

Scope = Literal["agent", "coordinator", "market", "admin"]

ALL_SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
KEYS_CACHED_MAX = 10_000
AGENTS_A_PAGE_MAX = 200
KEYS_A_PAGE_MAX = 200
NAME_CHARACTERS_MAX = 200
KEY_DAYS_MAX = 50 * 365
"""How far ahead a key may expire: what is further is a slip of the pen, and may lie past the calendar."""

_UNKNOWN_KEYS_BURST_SECONDS = 4
_FIRST_KEY_LOCK = 7_165_001
"""Of `pg_advisory_xact_lock`, while the first key is looked for or made."""

_KEY = re.compile(r"pr_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of a character, which are no text to Postgres
_NO_SECRET = bytes(32)  # stands in for an unknown key's hash, so that it costs the same work


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from. `agent_id` is None for a key of the service itself."""

    key_id: str
    agent_id: str | None
    scopes: frozenset[Scope]
    expires_at: datetime | None = None

    def may(self, scope: Scope) -> bool:
        """Tell whether the key has a scope; `admin` has them all."""
        return scope in self.scopes or "admin" in self.scopes


class NewKey(NamedTuple):
    """A key that was just made; `text` is the only time that its secret is seen."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Agent:
    """A stored agent."""

    id: str
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Key:
    """A stored key, without its secret."""

    id: str
    agent_id: str | None
    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


# --- agents


async def create_agent(tx: Tx, name: str) -> str:
    """Add an agent with an empty account and return its id."""
    _check_name(name, least=1)
    agent_id = f"agent_{secrets.token_hex(10)}"
    await tx.connection.execute(insert(agents).values(id=agent_id, name=name, created_at=tx.now))
    await tx.connection.execute(insert(accounts).values(agent_id=agent_id, updated_at=tx.now))
    await audit.record(tx, "agent.created", agent_id, agent_id, name=name)
    return agent_id


async def get_agent(tx: Tx, agent_id: str) -> Agent:
    """Return an agent; NotFoundError when there is none."""
    row = (await tx.connection.execute(select(agents).where(agents.c.id == agent_id))).mappings().first()
    if row is None:
        raise no_such_agent()
    return Agent(**row)


async def list_agents(tx: Tx, limit: int = AGENTS_A_PAGE_MAX, after: str = "") -> list[Agent]:
    """Return agents by id, past the id `after`."""
    query = select(agents).where(agents.c.id > after).order_by(agents.c.id).limit(min(limit, AGENTS_A_PAGE_MAX))
    return [Agent(**row) for row in (await tx.connection.execute(query)).mappings()]


async def list_ids(tx: Tx, after: str, limit: int) -> list[str]:
    """Return the ids of agents in order, past the id `after`."""
    query = select(agents.c.id).where(agents.c.id > after).order_by(agents.c.id).limit(limit)
    return list((await tx.connection.execute(query)).scalars())


async def exists(tx: Tx, agent_id: str) -> bool:
    """Tell whether there is such an agent."""
    found = await tx.connection.execute(select(agents.c.id).where(agents.c.id == agent_id))
    return found.first() is not None


async def require_agent(tx: Tx, agent_id: str) -> None:
    """Raise NotFoundError when there is no such agent."""
    if not await exists(tx, agent_id):
        raise no_such_agent()


def no_such_agent() -> NotFoundError:
    """Return the refusal of an agent that is not there, or not the caller's to see."""
    return NotFoundError("There is no such agent.", code="agent_not_found")


# --- accounts


_LOCK = (
    update(accounts)
    .where(accounts.c.agent_id == bindparam("of"))
    .values(version=accounts.c.version + 1, updated_at=bindparam("at"))
    .returning(accounts.c.version)
)
_HOLD = select(accounts.c.version).where(accounts.c.agent_id == bindparam("of")).with_for_update()


async def lock_account(tx: Tx, agent_id: str) -> int:
    """Lock an agent's book until the transaction ends, and return its new version. Raises NotFoundError.

    Whoever changes a book holds this lock, so that changes go one by one and each is judged on what the last one
    left. Several accounts are locked in the order of their ids.
    """
    row = (await tx.connection.execute(_LOCK, {"of": agent_id, "at": tx.now})).first()
    if row is None:
        raise no_such_agent()
    version: int = row.version
    return version


async def lock_accounts(tx: Tx, agent_ids: Collection[str]) -> None:
    """Lock several books as `lock_account` does, one after the other in the order of their ids.

    Raises NotFoundError where one is not there.
    """
    for agent_id in sorted(set(agent_ids)):
        await lock_account(tx, agent_id)


async def hold_account(tx: Tx, agent_id: str) -> None:
    """Lock an agent's book as `lock_account` does, without saying that it changes. Raises NotFoundError."""
    if (await tx.connection.execute(_HOLD, {"of": agent_id})).first() is None:
        raise NotFoundError("There is no such agent.", code="agent_not_found")


async def put_account_settings(tx: Tx, agent_id: str, change: Mapping[str, object]) -> None:
    """Set fields of an account's settings; the caller holds the lock and has checked them."""
    exact = {name: to_decimal(value) if isinstance(value, float) else value for name, value in change.items()}
    await tx.connection.execute(update(accounts).where(accounts.c.agent_id == agent_id).values(**exact))


# --- keys


def check_handed_out(caller: Caller, scopes: Collection[Scope]) -> None:
    """Refuse scopes that the caller does not have itself. Raises ForbiddenError."""
    lacking = sorted(scope for scope in scopes if not caller.may(scope))
    if lacking:
        detail = f"the key lacks the scope {', '.join(lacking)}, and so can't hand it out"
        raise ForbiddenError(detail, code="scope_missing")


async def create_key(
    tx: Tx,
    agent_id: str | None,
    scopes: Collection[Scope],
    name: str = "",
    expires_at: datetime | None = None,
) -> NewKey:
    """Add a key of an agent, or of the service, and return it with its secret."""
    _check_name(name, least=0)
    _check_scopes(scopes)
    _check_expiry(tx, expires_at)
    if agent_id is not None:
        await require_agent(tx, agent_id)
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    await tx.connection.execute(
        insert(api_keys).values(
            id=key_id,
            agent_id=agent_id,
            name=name,
            secret_sha256=_digest(secret),
            scopes=sorted(scopes),
            created_at=tx.now,
            expires_at=expires_at,
        )
    )
    until = None if expires_at is None else expires_at.isoformat()
    await audit.record(tx, "key.created", key_id, agent_id, name=name, scopes=sorted(scopes), expires_at=until)
    return NewKey(key_id, f"pr_{key_id}_{secret}")


async def list_keys(tx: Tx, agent_id: str | None, limit: int = KEYS_A_PAGE_MAX, after: str = "") -> list[Key]:
    """Return keys of an agent, or (None) the service's own, by id, past the id `after`; never a secret."""
    columns = [column for column in api_keys.c if column.name != "secret_sha256"]
    query = select(*columns).where(_owned_by(agent_id), api_keys.c.id > after).order_by(api_keys.c.id)
    rows = await tx.connection.execute(query.limit(min(limit, KEYS_A_PAGE_MAX)))
    return [Key(**(dict(row) | {"scopes": frozenset(row["scopes"])})) for row in rows.mappings()]


async def revoke_key_of(tx: Tx, agent_id: str | None, key_id: str) -> None:
    """Revoke a key of an agent, or (None) of the service: another's is not found. Again, it has no effect."""
    await _revoke(tx, key_id, _owned_by(agent_id))


async def revoke_key(tx: Tx, key_id: str) -> None:
    """Revoke a key, whoever's it is, for the operator. Raises NotFoundError."""
    await _revoke(tx, key_id)


async def _revoke(tx: Tx, key_id: str, *whose: ColumnElement[bool]) -> None:
    columns = api_keys.c
    live = update(api_keys).where(columns.id == key_id, columns.revoked_at.is_(None), *whose)
    done = await tx.connection.execute(live.values(revoked_at=tx.now).returning(columns.agent_id, columns.name))
    row = done.first()
    if row is not None:
        await audit.record(tx, "key.revoked", key_id, row.agent_id, name=row.name)
        return
    found = await tx.connection.execute(select(columns.id).where(columns.id == key_id, *whose))
    if found.first() is None:
        raise NotFoundError("There is no such key.", code="key_not_found")


def _owned_by(agent_id: str | None) -> ColumnElement[bool]:
    return api_keys.c.agent_id == agent_id  # None: IS NULL, the service's own


async def authenticate(tx: Tx, key: str) -> tuple[Caller, datetime | None]:
    """Return whose key this is and when it expires; UnauthorizedError, without a why, when it is not good."""
    parts = _KEY.fullmatch(key)
    if parts is None:
        _refuse()
    key_id, secret = parts.groups()
    query = select(api_keys).where(api_keys.c.id == key_id)
    row = (await tx.connection.execute(query)).mappings().first()
    same = hmac.compare_digest(_digest(secret), row["secret_sha256"] if row else _NO_SECRET)
    if row is None or not same or not _is_live(row, tx.now):
        _refuse()
    return Caller(key_id, row["agent_id"], frozenset(row["scopes"]), row["expires_at"]), row["expires_at"]


async def create_first_key(database: Database, path: Path) -> str:
    """Return the admin key kept in a file (mode 0600), made anew when it is missing or no longer good.

    Processes that start at once take turns, and the first writes its file before the next looks: one key is made.
    """
    async with database.transaction("first-key") as tx:
        await tx.connection.execute(select(func.pg_advisory_xact_lock(_FIRST_KEY_LOCK)))
        kept = _read_private(path)
        if await _is_admin(tx, kept):
            return kept
        key = await create_key(tx, None, {"admin"}, "first key")
        _write_private(path, key.text)
    return key.text


class KeyRing:
    """Checks keys, and trusts a good one for `key_cache_seconds`, so that a hot path needs no query.

    A revoked key works for that long in other processes. Refused keys are not remembered, but bounded: each costs
    a query, so that only so many a second are looked for. Keys that have been good pass that limit.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._seconds = settings.key_cache_seconds
        self._admin = _digest(settings.admin_key.get_secret_value()) if settings.admin_key else None
        # By the key's hash: good callers, and until when (monotonic) they are trusted.
        self._trusted: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()
        rate = settings.unknown_keys_per_second
        self._unknown = RateLimiter(rate, max(1, int(rate * _UNKNOWN_KEYS_BURST_SECONDS)), "unknown keys")

    async def authenticate(self, key: str) -> Caller:
        """Return the caller; UnauthorizedError for no good key, RateLimitedError, or DatabaseUnavailableError."""
        digest = _digest(key)
        if self._admin is not None and hmac.compare_digest(digest, self._admin):
            return Caller("admin", None, ALL_SCOPES)
        caller, until = self._trusted.get(digest, (None, 0.0))
        if caller is not None and time.monotonic() < until:
            return caller
        return await self._check(key, digest)

    def forget(self, key_id: str) -> None:
        """Stop trusting a key at once in this process; for whoever revokes it, after the commit."""
        for digest in [d for d, (caller, _) in self._trusted.items() if caller.key_id == key_id]:
            del self._trusted[digest]

    async def _check(self, key: str, digest: bytes) -> Caller:
        if _KEY.fullmatch(key) is None:
            _refuse()  # without a connection
        asked = time.monotonic()
        unknown = digest not in self._trusted
        if unknown:
            self._unknown.spend("")
        try:
            async with self._database.transaction("key-ring") as tx:
                caller, expires_at = await authenticate(tx, key)
        except UnauthorizedError:
            unknown = False  # what it took stays taken
            self._trusted.pop(digest, None)
            raise
        finally:
            if unknown:
                self._unknown.give_back("")
        seconds = self._seconds
        if expires_at is not None:
            seconds = min(seconds, (expires_at - tx.now).total_seconds())
        self._trust(digest, caller, asked + seconds)
        return caller

    def _trust(self, digest: bytes, caller: Caller, until: float) -> None:
        self._trusted[digest] = caller, until
        self._trusted.move_to_end(digest)
        if len(self._trusted) > KEYS_CACHED_MAX:
            self._trusted.popitem(last=False)


def _digest(secret: str) -> bytes:
    return sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _refuse() -> NoReturn:
    raise UnauthorizedError("No valid API key.", code="invalid_key", headers={"WWW-Authenticate": "Bearer"})


def _is_live(row: RowMapping, now: datetime) -> bool:
    if row["revoked_at"] is not None:
        return False
    return row["expires_at"] is None or now < row["expires_at"]


async def _is_admin(tx: Tx, key: str) -> bool:
    try:
        caller, _ = await authenticate(tx, key)
    except UnauthorizedError:
        return False
    return "admin" in caller.scopes


def _read_private(path: Path) -> str:
    return path.read_text(errors="replace").strip() if path.exists() else ""


def _write_private(path: Path, key: str) -> None:
    """Replace the file in one step, never readable by others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    fresh.touch(mode=0o600, exist_ok=False)
    fresh.write_text(key + "\n")
    fresh.replace(path)


def _check_name(name: str, least: int) -> None:
    if not least <= len(name) <= NAME_CHARACTERS_MAX or _UNSTORABLE.search(name):
        detail = f"A name has {least} to {NAME_CHARACTERS_MAX} characters, and no NUL."
        raise invalid("/name", "invalid_name", detail)


def _check_scopes(scopes: Collection[Scope]) -> None:
    if not scopes or not ALL_SCOPES.issuperset(scopes):
        raise invalid("/scopes", "invalid_scopes", f"Scopes are one or more of {', '.join(sorted(ALL_SCOPES))}.")


def _check_expiry(tx: Tx, expires_at: datetime | None) -> None:
    if expires_at is None:
        return
    if expires_at.tzinfo is None:
        raise invalid("/expires_at", "no_zone", "expires_at needs a time zone, such as Z.")
    if expires_at <= tx.now:
        raise invalid("/expires_at", "in_the_past", "expires_at is not in the future.")
    if expires_at > tx.now + timedelta(days=KEY_DAYS_MAX):
        raise invalid("/expires_at", "expiry_too_far", f"A key expires within {KEY_DAYS_MAX // 365} years.")
