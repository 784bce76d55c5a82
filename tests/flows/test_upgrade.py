"""An upgrade as an operator does it: `migrate` while the release before goes on, then the new one beside it.

The release before is the commit before the one that added the newest migration, out of this repository's history.
"""

from __future__ import annotations

import asyncio
import io
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.db import migrate
from app.db.session import Database, parse_database_url
from app.services import ledger
from app.settings import Settings
from tests.flows.process import ROOT, STOP_SECONDS_MAX, Home, home, running, serving
from tests.flows.trader import ADMIN_KEY, BREACH, CALM, Trader, settings_of, wait_for_workers
from tests.postgres import fresh_database


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=False, capture_output=True, timeout=60)
    return done.stdout if done.returncode == 0 else b""


@pytest.fixture(scope="module")
def release_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tree of the release before."""
    [newest] = (ROOT / "migrations" / "versions").glob(f"{migrate.head()}_*.py")
    added = _git("log", "--diff-filter=A", "--format=%H", "--", str(newest)).split()
    packed = _git("archive", f"{added[-1].decode()}^") if added else b""
    if not packed:
        pytest.skip("the history of this repository is not at hand")
    place = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=io.BytesIO(packed)) as tree:
        tree.extractall(place, filter="data")
    return place


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


async def _trader(address: str) -> Trader:
    """Make an agent that holds 37,000 of notional on 20,000, through the API alone."""
    admin = Trader(address, ADMIN_KEY, "")
    made = await admin.call("POST", "/agents", {"name": "Alice"})
    trader = Trader(address, made["api_key"], made["agent_id"])
    await trader.prices(CALM)
    await trader.call("POST", "/wallet/deposits", {"asset": "USDC", "amount": 20_000})
    for symbol, size in (("BTC-PERP", 0.5), ("ETH-PERP", 2), ("SOL-PERP", 10)):
        await trader.call("POST", "/orders", {"symbol": symbol, "side": "buy", "size": size, "leverage": 3})
    await trader.call("PATCH", "/account/settings", {"grace_period_seconds": 1})
    return trader


async def _until(trader: Trader, event: str) -> None:
    async with asyncio.timeout(60):
        while event not in [told["type"] for told in (await trader.call("GET", "/events"))["events"]]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_an_upgrade_under_a_margin_call(
    place: Home, postgres_server: str, settings: Settings, release_before: Path
) -> None:
    async with fresh_database(postgres_server) as url:
        database = Database(parse_database_url(url), settings)
        given = settings_of(database)
        before = given | {"PYTHONPATH": str(release_before)}
        with (
            serving(place, command="api", **before) as old,
            running(place, "worker", **before) as old_worker,
        ):
            await wait_for_workers(database, 1)
            called, calm = await _trader(old.greeting.address), await _trader(old.greeting.address)
            await calm.call("POST", "/wallet/deposits", {"asset": "USDC", "amount": 5_000})
            revision = _readiness(old.greeting.address)["checks"]["migrations"]["head"]
            assert revision < migrate.head(), "this is the release before"
            await called.prices(BREACH)
            await _until(called, "margin_call.opened")
            done = await asyncio.to_thread(place.run, "migrate", given=given | {"PYTHONPATH": str(ROOT)})
            assert done.returncode == 0, done.stderr
            await _until(called, "liquidation.completed")
            assert (await calm.call("GET", "/account"))["positions"], "and it answers"
            await _go_on(database, given, calm)
            old_worker.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(old_worker.wait, STOP_SECONDS_MAX) == 0
        async with database.transaction("test") as tx:
            assert await ledger.imbalances(tx) == {}
        await database.close()


async def _go_on(database: Database, given: dict[str, str], trader: Trader) -> None:
    """Have the new release join the old one: each sees what the other has done."""
    with home() as beside:
        new = given | {"PYTHONPATH": str(ROOT)}
        with serving(beside, command="api", **new) as served, running(beside, "worker", **new):
            await wait_for_workers(database, 2)
            here = Trader(served.greeting.address, trader.key, trader.agent_id)
            await here.prices({"BTC": 24_000})
            await _until(trader, "liquidation.completed")
            calls = [(await one.call("GET", "/margin-calls"))["margin_calls"] for one in (here, trader)]
            assert [call["state"] for call in calls[0]] == ["completed"]
            said = [{name: now[name] for name in was} for now, was in zip(*calls, strict=True)]
            assert said == calls[1]  # the new one may say more
            assert _readiness(served.greeting.address)["status"] == "ready"


def _readiness(address: str) -> Any:
    """Return what a process says of its readiness."""
    return httpx.get(f"{address}/readyz", timeout=20).json()
