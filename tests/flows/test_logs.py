"""What a service writes to its log: JSON that says whom it concerns, at every level, and never a secret."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from app.db.session import Database
from tests.flows.process import ROOT, Home, home, serving
from tests.flows.trader import ADMIN_KEY, BREACH, settings_of, trading, wait_for
from tests.receiver import receiving

PASSWORD = "a-password-of-the-database"


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


@pytest.fixture
async def given(database: Database) -> Any:
    """Yield the environment of a service that connects with a password of its own."""
    role = f"service_{database.url.database}"

    async def run(*statements: str) -> None:
        async with database.transaction("test") as tx:
            for statement in statements:
                await tx.connection.execute(text(statement))

    await run(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{PASSWORD}'")
    url = database.url.set(drivername="postgresql", username=role, password=PASSWORD)
    try:
        yield settings_of(database) | {
            "PYTHONPATH": str(ROOT),
            "PRIMERISK_DATABASE_URL": url.render_as_string(hide_password=False),
            "PRIMERISK_LOG_FORMAT": "json",
            "PRIMERISK_LOG_LEVEL": "debug",
        }
    finally:
        await run(f"DROP ROLE {role}")


async def test_a_flow_is_told_with_its_ids_and_without_secrets(
    place: Home, database: Database, given: dict[str, str]
) -> None:
    async with receiving() as receiver:
        with serving(place, **given) as served:
            own = {"grace_period_seconds": 1}
            async with trading(served.greeting.address, database, receiver, **own) as (trader, secret):
                hook = (await trader.call("GET", "/webhooks"))["webhooks"][0]["id"]
                rotated = (await trader.call("POST", f"/webhooks/{hook}/rotate"))["secret"]
                await _stumble(trader.address, trader.key, database)
                await trader.prices(BREACH)
                await wait_for(receiver, "liquidation.completed")
                [call] = (await trader.call("GET", "/margin-calls"))["margin_calls"]
                logged = await asyncio.to_thread(_logged, place.path / "serve.log", "GET /api/margin-calls 200 ")
    secrets = [ADMIN_KEY, PASSWORD, trader.key, trader.key.rpartition("_")[2]]
    secrets += [whole.removeprefix("whsec_") for whole in (secret, rotated)]
    assert [found for found in secrets if found in logged] == []
    assert "DETAIL:  (withheld)" in logged, "a row was refused"
    assert "whsec_" not in logged, "nor the secret of the endpoint that could not be stored"
    lines = [json.loads(line) for line in logged.splitlines() if line.startswith("{")]
    assert {line["level"] for line in lines} >= {"debug", "info", "error"}
    assert all(line.keys() >= {"time", "level", "logger", "message"} for line in lines)
    told = {line["message"]: line for line in lines if line.get("margin_call_id") == call["id"]}
    assert told.keys() >= {"margin_call.opened", "margin_call.expired", "liquidation.completed"}
    assert {line["agent_id"] for line in told.values()} == {trader.agent_id}
    asked = [line for line in lines if re.match(r"GET /api/margin-calls 200 ", line["message"])]
    assert asked
    assert asked[0]["agent_id"] == trader.agent_id
    assert re.fullmatch(r"[0-9a-f]{16}", asked[0]["request_id"])


def _logged(log: Path, last: str) -> str:
    """Return what is in the log once the last request is: its line comes after its answer."""
    deadline = time.monotonic() + 10.0
    while last not in (said := log.read_text()):
        assert time.monotonic() < deadline, said
        time.sleep(0.02)
    return said


async def _stumble(address: str, key: str, database: Database) -> None:
    """Have a statement fail whose values are a secret, as a damaged database would."""

    async def run(statement: str) -> None:
        async with database.transaction("test") as tx:
            await tx.connection.execute(text(statement))

    await run("ALTER TABLE webhook_endpoints ADD CONSTRAINT broken CHECK (seq < 2)")
    headers = {"Authorization": f"Bearer {key}"}
    body = {"url": "http://127.0.0.1:9/", "filters": []}
    async with httpx.AsyncClient(headers=headers) as client:
        answer = await client.post(f"{address}/api/webhooks", json=body)
    assert answer.status_code == 500
    await run("ALTER TABLE webhook_endpoints DROP CONSTRAINT broken")
