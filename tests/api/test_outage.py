"""The database away, and back: what still works says so, what doesn't says when to try again."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import asyncpg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import make_url, text

from tests.api.bodies import WORKED
from tests.api.proxy import relay
from tests.api.service import ADMIN_KEY, MARGIN, connected, problem, running

if TYPE_CHECKING:
    import httpx
    from sqlalchemy import URL

NOWHERE = make_url("postgresql://user:secret-word@127.0.0.1:1/nowhere")
HEADERS = {"Authorization": f"Bearer pr_{'0' * 16}_{'A' * 43}"}


async def test_no_database_from_the_start() -> None:
    async with connected(NOWHERE, database_connect_seconds=0.5) as (_, client):
        for key in (HEADERS, {"Authorization": f"Bearer {ADMIN_KEY}"}):
            answer = await client.post(MARGIN, json=WORKED, headers=key)
            problem(answer, 503, "database_unavailable")
            assert answer.headers["retry-after"] == "1"
            assert "secret-word" not in answer.text
        assert (await client.get("/healthz")).status_code == 200
        ready = await client.get("/readyz")
        assert ready.status_code == 503
        assert "secret-word" not in ready.text
        assert ready.json()["checks"]["database"]["ok"] is False
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/openapi.json")).status_code == 200


async def _until(status: int, client: httpx.AsyncClient) -> None:
    for _ in range(100):
        if (await client.get("/readyz")).status_code == status:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"/readyz is not {status} within 5 s")


async def test_what_is_shown_of_the_service_stands_through_an_outage_and_tells_its_age(database_url: URL) -> None:
    def shown(text: str) -> dict[str, float]:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {f"{s.name}{''.join(s.labels.values())}": s.value for s in samples if s.name.startswith("primerisk_")}

    assert database_url.host
    assert database_url.port
    async with relay(database_url.host, database_url.port) as wire:
        settings = {"database_connect_seconds": 1, "figures_seconds": 0.1}
        async with running(database_url.set(port=wire.port), **settings) as service:

            async def until(name: str, low: float, high: float) -> dict[str, float]:
                async with asyncio.timeout(30):
                    while True:
                        found = shown((await service.get("/metrics", key="")).text)
                        if low <= found.get(name, -1.0) <= high:
                            return found
                        await asyncio.sleep(0.05)

            fresh = await until("primerisk_figures_age_secondscalls", 0.0, 1.0)
            await wire.cut()
            old = await until("primerisk_figures_age_secondscalls", 2.0, 60.0)
            assert old["primerisk_database_up"] == 0
            assert old["primerisk_margin_callsopen"] == fresh["primerisk_margin_callsopen"] == 0
            assert old["primerisk_escrows_openfunded"] == 0
            await wire.restore()
            again = await until("primerisk_figures_age_secondscalls", 0.0, 1.5)
            assert again["primerisk_figure_failures_total"] == 0, "an outage is no fault of ours"


async def test_away_and_back(database_url: URL) -> None:
    assert database_url.host
    assert database_url.port
    async with relay(database_url.host, database_url.port) as wire:
        settings = {"database_connect_seconds": 1, "key_cache_seconds": 0, "market_refresh_seconds": 0.05}
        async with running(database_url.set(port=wire.port), **settings) as service:
            assert (await service.post(MARGIN, json=WORKED)).status_code == 200
            await wire.cut()
            answer = await service.post(MARGIN, json=WORKED)
            problem(answer, 503, "database_unavailable")
            assert answer.headers["retry-after"] == "1"
            # quotes themselves need no database: the key of the settings goes on
            assert (await service.post(MARGIN, key="settings", json=WORKED)).status_code == 200
            problem(await service.put("/api/market/assets/BTC", key="settings", json={}), 503, "database_unavailable")
            assert (await service.get("/healthz", key="")).status_code == 200
            assert (await service.get("/readyz", key="")).status_code == 503
            assert await _gauge(service.client, "primerisk_database_up") == 0
            await wire.restore()
            await _until(200, service.client)
            assert (await service.post(MARGIN, json=WORKED)).status_code == 200
            assert await _gauge(service.client, "primerisk_database_up") == 1


_FULL = """
CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION full_disk()
"""
_READ_ONLY = """
DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); END $$
"""
_CUT_ALL_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@pytest.mark.parametrize(
    ("statements", "said"),
    [(_FULL.format(table="market_prices").split(";\n"), "disk is full"), ([_READ_ONLY], "read-only")],
)
async def test_a_database_that_can_not_write(
    database_url: URL, statements: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(database_url) as service:
        database = service.app.state.parts.database
        async with database.transaction("test") as tx:
            for statement in statements:
                await tx.connection.execute(text(statement))
        await _cut_all(database_url)  # what is set for the database holds for new connections
        for _ in range(2):
            answer = await service.post("/api/market/prices", key="market", json={"prices": {"BTC": 1}})
            document = problem(answer, 503, "database_error")
            assert said in document["detail"]
            assert answer.headers["retry-after"] == "10"
        ours = [record for record in caplog.records if record.name == "app.db.session"]
        logged = [record for record in ours if record.levelno >= logging.ERROR]
        assert len(logged) == 1
        assert said in logged[0].getMessage()
        assert (await service.post(MARGIN, json=WORKED)).status_code == 200
        assert await _gauge(service.client, "primerisk_database_up") == 1


async def _cut_all(url: URL) -> None:
    """End every connection to the database but that of this function."""
    connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    await connection.execute(_CUT_ALL_OTHERS)
    await connection.close()


async def _gauge(client: httpx.AsyncClient, name: str) -> float:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return next(sample.value for family in families for sample in family.samples if sample.name == name)
