"""Probes and metrics: they need no key, tell the truth, and keep their series few."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.db import migrate
from app.db.session import parse_database_url
from tests.api.bodies import WORKED
from tests.api.service import MARGIN, connected, problem
from tests.postgres import fresh_database

if TYPE_CHECKING:
    from prometheus_client import Metric

    from tests.api.service import Service

TYPES = {
    "primerisk_idempotent_replays": "counter",
    "primerisk_orders": "counter",
    "primerisk_account_snapshots": "counter",
    "primerisk_margin_events": "counter",
    "primerisk_decision_seconds": "histogram",
    "primerisk_decision_failures": "counter",
    "primerisk_decisions_waiting": "gauge",
    "primerisk_screen_seconds": "histogram",
    "primerisk_screen_shards": "gauge",
    "primerisk_worker_heartbeat_timestamp_seconds": "gauge",
    "primerisk_liquidations_escalated": "counter",
    "primerisk_webhook_attempts": "counter",
    "primerisk_webhook_faults": "counter",
    "primerisk_webhook_oldest_undelivered_seconds": "gauge",
    "primerisk_webhook_lag_seconds": "gauge",
    "primerisk_event_streams": "gauge",
    "primerisk_http_requests": "counter",
    "primerisk_http_request_duration_seconds": "histogram",
    "primerisk_http_requests_under_way": "gauge",
    "primerisk_quote_core_seconds": "histogram",
    "primerisk_quote_positions": "histogram",
    "primerisk_market_snapshot_age_seconds": "gauge",
    "primerisk_market_version": "gauge",
    "primerisk_database_up": "gauge",
    "primerisk_build_info": "gauge",
    "primerisk_escrow_events": "counter",
    "primerisk_escrows_open": "gauge",
    "primerisk_escrow_outstanding_usd": "gauge",
    "primerisk_netting_runs": "counter",
    "primerisk_netting_movements_saved": "counter",
    "primerisk_netting_fees_saved_usd": "counter",
    "primerisk_netting_agreements": "gauge",
    "primerisk_netting_obligations_open": "gauge",
    "primerisk_clearing_failures": "counter",
}
LABELS = {"method", "route", "status", "kind", "le", "version"}


async def _metrics(service: Service) -> dict[str, Metric]:
    answer = await service.get("/metrics", key="")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


async def _series(service: Service) -> dict[tuple[str, str, str], float]:
    samples = (await _metrics(service))["primerisk_http_requests"].samples
    return {
        (s.labels["method"], s.labels["route"], s.labels["status"]): s.value
        for s in samples
        if s.name.endswith("_total")
    }


async def _value(service: Service, name: str) -> float:
    return next(s.value for family in (await _metrics(service)).values() for s in family.samples if s.name == name)


async def test_healthz_and_readyz(service: Service) -> None:
    alive = await service.get("/healthz", key="")
    assert (alive.status_code, alive.json()["status"]) == (200, "alive")
    ready = await service.get("/readyz", key="")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    checks = ready.json()["checks"]
    assert checks.keys() >= {"database", "migrations", "market"}
    assert all(check["ok"] for name, check in checks.items() if name != "worker")
    # shown, and no reason not to serve: no worker runs here
    assert checks["worker"] == {"ok": False, "seen_seconds_ago": None}
    assert checks["migrations"]["revision"] == checks["migrations"]["head"] == migrate.head()


async def test_an_unmigrated_database_is_not_ready_and_says_why(postgres_server: str) -> None:
    async with (
        fresh_database(postgres_server) as url,
        connected(parse_database_url(url)) as (_, client),
    ):
        assert (await client.get("/healthz")).status_code == 200
        ready = await client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["checks"]["database"]["ok"] is True
        assert ready.json()["checks"]["migrations"] == {"ok": False, "revision": None, "head": migrate.head()}
        await migrate.upgrade(parse_database_url(url))
        for _ in range(100):
            ready = await client.get("/readyz")
            if ready.status_code == 200:
                break
        assert ready.json()["checks"]["migrations"]["ok"] is True


async def test_every_metric_has_its_type_and_help(service: Service) -> None:
    await service.quote(**WORKED)
    families = await _metrics(service)
    ours = {name: family for name, family in families.items() if name.startswith("primerisk_")}
    created = {name for name in ours if name.endswith("_created")}
    assert {name: family.type for name, family in ours.items() if name not in created} == TYPES
    assert all(family.documentation for family in ours.values())
    assert {label for family in ours.values() for sample in family.samples for label in sample.labels} <= LABELS
    assert {"process_resident_memory_bytes", "python_gc_objects_collected"} <= families.keys()


async def test_the_gauges_tell_what_is(service: Service) -> None:
    assert await _value(service, "primerisk_market_version") == 1
    await service.put("/api/market/assets/BTC", json={"haircut": 0.2})
    assert await _value(service, "primerisk_market_version") == 2
    assert 0 <= await _value(service, "primerisk_market_snapshot_age_seconds") < 5
    assert await _value(service, "primerisk_database_up") == 1
    assert await _value(service, "primerisk_http_requests_under_way") == 1  # this very request


async def test_requests_are_counted_by_template(service: Service) -> None:
    await service.quote(**WORKED)
    await service.quote(**WORKED)
    problem(await service.post(MARGIN, content=b"{"), 400, "not_json")
    for name in ("BTC", "ETH", "NOPE", "A:B"):
        await service.get(f"/api/market/assets/{name}")
    await service.get("/api/market/instruments/BTC/USDT:USDT")
    series = await _series(service)
    assert series["POST", MARGIN, "200"] == 2
    assert series["POST", MARGIN, "400"] == 1
    assert series["GET", "/api/market/assets/{asset}", "200"] == 2
    assert series["GET", "/api/market/assets/{asset}", "404"] == 2
    assert len([route for _, route, _ in series if "instruments" in route and "{symbol" in route]) == 1


async def test_unknown_paths_make_one_series(service: Service) -> None:
    await service.get("/metrics", key="")
    before = len(await _series(service))
    for i in range(30):
        problem(await service.get(f"/nope/{i}"), 404, "no_such_route")
        await service.send(f"FOO{i}", f"/nope/{i}")
    after = await _series(service)
    assert len(after) - before <= 2
    assert sum(value for (_, _, status), value in after.items() if status == "404") == 60


async def test_unknown_methods_make_no_series(service: Service) -> None:
    for i in range(30):
        problem(await service.send(f"FOO{i}", MARGIN), 405, "method_not_allowed")
    assert not [method for method, _, _ in await _series(service) if method.startswith("FOO")]


async def test_hostile_bodies_make_no_series(service: Service) -> None:
    """Nothing that a caller writes is a label: no name, no symbol, no key."""
    await service.post(MARGIN, json=WORKED | {"name": "odd-name", "models": ["odd-model"]})
    await service.get("/api/market/assets/odd-name?version=77", headers={"X-Request-Id": "odd-id"})
    text = (await service.get("/metrics", key="")).text
    assert "odd-" not in text
    assert "pr_" not in text


async def test_quotes_are_measured(service: Service) -> None:
    await service.quote(**WORKED)
    assert await _value(service, "primerisk_quote_core_seconds_count") == 1
    assert await _value(service, "primerisk_quote_positions_sum") == 1


@pytest.mark.parametrize(("method", "path"), [("DELETE", MARGIN), ("POST", "/healthz"), ("GET", MARGIN)])
async def test_a_wrong_method_is_told_which_is_right(service: Service, method: str, path: str) -> None:
    answer = await service.send(method, path)
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"]
