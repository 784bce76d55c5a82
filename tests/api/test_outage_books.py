"""Postgres dies while a request is under way: the caller hears so, nothing is half booked, and the next one works."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import psutil
import pytest
from sqlalchemy import text

from app.db import embedded, migrate
from app.db.session import LOCK_SECONDS_MAX, parse_database_url
from app.services import ledger
from tests.api.service import Agent, Service, problem, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


KEYED = {"Idempotency-Key": "through the fire"}
COMMIT_LOCK = 4_242
WRITES: dict[str, tuple[str, dict[str, Any]]] = {
    "deposit": ("/wallet/deposits", {"asset": "USDC", "amount": 5}),
    "order": ("/orders", {"symbol": "BTC-PERP", "side": "buy", "size": 0.01}),
    "reservation": ("/reservations", {"service": "casino", "amount": 7}),
}


class Island:
    """A Postgres of the module's own, which its tests kill and bring back at its port."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._file = home / "postgres" / "postmaster.pid"
        self._server = embedded.start(home)
        self._noted = self._file.read_bytes()
        self._struck = False

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def pid(self) -> int:
        return self._server.pid

    def raise_again(self) -> None:
        """Start the server if it is gone, and wait until it has recovered."""
        if self._struck:
            with suppress(psutil.Error):
                psutil.Process(self.pid).wait(20)
        if not embedded.is_running(self._home):
            if not self._file.exists():  # after an orderly end nothing is left that names its port
                self._file.write_bytes(self._noted)
            before, self._server = self._server, embedded.start(self._home)
            before._users.close()  # its lock goes, and not the server that runs anew
            assert self._server.url == before.url
            self._noted = self._file.read_bytes()
        self._struck = False

    def strike(self, number: int) -> None:
        """Send a signal to the main process."""
        os.kill(self.pid, number)
        self._struck = True

    def close(self) -> None:
        self._server.close()


@pytest.fixture(scope="module")
def island() -> Iterator[Island]:
    with tempfile.TemporaryDirectory(prefix="primerisk-outage-") as path:
        made = Island(Path(path))
        asyncio.run(migrate.upgrade(parse_database_url(made.url)))
        yield made
        made.close()


@asynccontextmanager
async def _settled(island: Island) -> AsyncIterator[Agent]:
    """Yield an agent of an app on the island, with 1,000 USDC."""
    async with running(parse_database_url(island.url), database_connect_seconds=2) as service:
        await service.prices(BTC=60_000, BTC_PERP=60_000)
        agent = await service.agent()
        await agent.deposit(USDC=1_000)
        yield agent


async def _standing(agent: Agent) -> tuple[Any, ...]:
    account = await agent.get("/account")
    entries = (await agent.get("/wallet/ledger"))["entries"]
    orders = (await agent.get("/orders"))["orders"]
    return account["version"], account["balances"], account["positions"], account["reservations"], entries, orders


async def _balanced(service: Service) -> None:
    async with service.app.state.parts.database.transaction("test") as tx:
        assert await ledger.imbalances(tx) == {}


async def _waiting(url: str) -> int:
    """Return the pid of the backend that waits for a lock, once one does."""
    connection = await asyncpg.connect(url)
    query = (
        "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'primerisk'"
        " AND datname = current_database()"
    )
    try:
        for _ in range(400):
            if (pid := await connection.fetchval(query)) is not None:
                return int(pid)
            await asyncio.sleep(0.01)
    finally:
        await connection.close()
    raise AssertionError("no request waits for a lock")


def _stop_at_once(island: Island, _: int) -> None:
    island.strike(signal.SIGQUIT)  # what `pg_ctl stop -m immediate` sends


def _kill(island: Island, _: int) -> None:
    island.strike(signal.SIGKILL)


def _kill_backend(_: Island, backend: int) -> None:
    os.kill(backend, signal.SIGKILL)  # whereupon Postgres ends all others, and recovers


Blow = Callable[[Island, int], None]
BLOWS = [_stop_at_once, _kill, _kill_backend]


async def _survives(island: Island, agent: Agent, write: str, blow: Blow, held: asyncpg.Connection) -> None:
    """Strike while the write waits for what `held` holds; then see that it is undone, and that it can be done."""
    path, body = WRITES[write]
    before = await _standing(agent)
    ended = asyncio.Event()
    held.add_termination_listener(lambda _: ended.set())
    asked = asyncio.create_task(agent.ask(path, body, headers=KEYED))
    backend = await _waiting(island.url)
    blow(island, backend)
    answer = await asked
    problem(answer, 503, "database_unavailable")
    assert answer.headers["retry-after"] == "1"
    async with asyncio.timeout(10):
        await ended.wait()  # as each blow ends every connection, sooner or later
    await asyncio.to_thread(island.raise_again)
    await _recovered(island)
    assert await _standing(agent) == before
    await _balanced(agent.service)
    again = await agent.ask(path, body, headers=KEYED)
    assert again.status_code in (200, 201), again.text
    assert "idempotency-replayed" not in again.headers
    after = await _standing(agent)
    assert after[0] == before[0] + 1
    await _balanced(agent.service)
    assert (await agent.ask(path, body, headers=KEYED)).content == again.content
    assert await _standing(agent) == after


async def _recovered(island: Island) -> None:
    for _ in range(200):
        try:
            await (await asyncpg.connect(island.url)).close()
        except (OSError, asyncpg.PostgresError):
            await asyncio.sleep(0.05)
        else:
            return
    raise AssertionError("the server is not back within 10 s")


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("blow", BLOWS, ids=lambda blow: blow.__name__.strip("_"))
async def test_struck_while_it_waits_for_the_book(island: Island, write: str, blow: Blow) -> None:
    async with _settled(island) as agent:
        held = await asyncpg.connect(island.url)
        await held.execute("BEGIN")
        await held.fetch("SELECT 1 FROM accounts WHERE agent_id = $1 FOR UPDATE", agent.id)
        await _survives(island, agent, write, blow, held)


@pytest.mark.parametrize("blow", BLOWS, ids=lambda blow: blow.__name__.strip("_"))
async def test_struck_in_the_middle_of_its_commit(island: Island, blow: Blow) -> None:
    """Everything is written, and COMMIT has been sent: what it waits for is a deferred trigger."""
    async with _settled(island) as agent:
        held = await asyncpg.connect(island.url)
        await held.execute(
            f"""
            CREATE OR REPLACE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_advisory_xact_lock({COMMIT_LOCK}); RETURN NULL; END $$;
            CREATE CONSTRAINT TRIGGER wait_at_commit AFTER INSERT ON ledger_entries DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION wait_at_commit()
            """
        )
        await held.fetch(f"SELECT pg_advisory_lock({COMMIT_LOCK})")
        try:
            await _survives(island, agent, "deposit", blow, held)
        finally:
            async with agent.service.app.state.parts.database.transaction("test") as tx:
                await tx.connection.execute(text("DROP TRIGGER wait_at_commit ON ledger_entries"))


async def test_every_connection_is_dead_and_no_request_is_lost_after_it_is_back(island: Island) -> None:
    async with _settled(island) as agent:
        paths = ["/account", "/wallet/balance", "/orders", "/reservations"] * 8

        async def statuses() -> set[int]:
            answers: list[httpx.Response] = await asyncio.gather(*(agent.send("GET", path) for path in paths))
            return {answer.status_code for answer in answers}

        assert await statuses() == {200}  # and every connection of both pools is open
        _kill(island, 0)
        await asyncio.to_thread(island.raise_again)
        await _recovered(island)
        assert await statuses() == {200}


# --- faults that leave the server up


_FAILING = """
CREATE FUNCTION fail_at_commit() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'not today' USING ERRCODE = '{code}'; END $$;
CREATE CONSTRAINT TRIGGER fail_at_commit AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION fail_at_commit()
"""


@pytest.mark.parametrize(
    ("sqlstate", "status", "code"),
    [("23514", 500, "internal_error"), ("40001", 503, "database_busy"), ("53100", 503, "database_error")],
)
@pytest.mark.parametrize(
    ("write", "table"), [("deposit", "ledger_entries"), ("order", "orders"), ("reservation", "reservations")]
)
async def test_a_commit_that_fails_is_no_success(
    service: Service, write: str, table: str, sqlstate: str, status: int, code: str
) -> None:
    await service.prices(BTC=60_000, BTC_PERP=60_000)
    agent = await service.agent()
    await agent.deposit(USDC=1_000)
    before = await _standing(agent)
    database = service.app.state.parts.database
    async with database.transaction("test") as tx:
        for statement in _FAILING.format(code=sqlstate, table=table).split(";\nCREATE CON"):
            whole = statement if statement.startswith("\n") else f"CREATE CON{statement}"
            await tx.connection.execute(text(whole))
    path, body = WRITES[write]
    for _ in range(2):
        problem(await agent.ask(path, body, headers=KEYED), status, code)
        assert await _standing(agent) == before
    async with database.transaction("test") as tx:
        await tx.connection.execute(text(f"DROP TRIGGER fail_at_commit ON {table}"))
    done = await agent.ask(path, body, headers=KEYED)
    assert done.status_code in (200, 201)
    assert "idempotency-replayed" not in done.headers
    await _balanced(service)


async def test_a_book_that_stays_locked_is_busy(service: Service) -> None:
    agent = await service.agent()
    await agent.deposit(USDC=1_000)
    before = await _standing(agent)
    async with service.app.state.parts.database.transaction("test") as tx:
        await tx.connection.execute(text("SELECT 1 FROM accounts FOR UPDATE"))
        async with asyncio.timeout(LOCK_SECONDS_MAX + 5):
            answer = await agent.ask(*WRITES["deposit"], headers=KEYED)
        problem(answer, 503, "database_busy")
        assert answer.headers["retry-after"] == "1"
        assert (await agent.get("/account"))["equity"] == 1_000  # readers wait for nobody
    assert await _standing(agent) == before
    assert (await agent.ask(*WRITES["deposit"], headers=KEYED)).status_code == 201


async def test_a_backend_that_is_ended_by_an_operator(service: Service) -> None:
    agent = await service.agent()
    await agent.deposit(USDC=1_000)
    before = await _standing(agent)
    database = service.app.state.parts.database
    async with database.transaction("test") as tx:
        await tx.connection.execute(text("SELECT 1 FROM accounts FOR UPDATE"))
        asked = asyncio.create_task(agent.ask(*WRITES["deposit"], headers=KEYED))
        url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
        pid = await _waiting(url)
        await tx.connection.execute(text(f"SELECT pg_terminate_backend({pid})"))
        problem(await asked, 503, "database_unavailable")
    assert await _standing(agent) == before
    assert (await agent.ask(*WRITES["deposit"], headers=KEYED)).status_code == 201
