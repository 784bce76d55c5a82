"""Probes and metrics: they need no key, tell the truth, and keep their series few."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from app.db import migrate
from app.db.session import parse_database_url
from app.domain import escrow
from app.domain.escrow import State
from app.domain.margin_calls import LIVE_STATES
from app.domain.tally import BANDS, Endangered, Tally
from app.domain.webhooks import EVENT_TYPES
from app.services import heartbeat
from app.services.figures import every
from app.services.figures.clearing import AGREEMENTS
from app.services.figures.fleets import WALLET
from tests.api.bodies import WORKED
from tests.api.service import MARGIN, connected, problem, running
from tests.postgres import fresh_database

if TYPE_CHECKING:
    from prometheus_client import Metric
    from sqlalchemy import URL

    from tests.api.service import Service

TYPES = {
    "primerisk_idempotent_replays": "counter",
    "primerisk_orders": "counter",
    "primerisk_account_snapshots": "counter",
    "primerisk_margin_events": "counter",
    "primerisk_loan_events": "counter",
    "primerisk_decision_seconds": "histogram",
    "primerisk_decision_failures": "counter",
    "primerisk_decisions_waiting": "gauge",
    "primerisk_screen_seconds": "histogram",
    "primerisk_screen_shards": "gauge",
    "primerisk_worker_heartbeat_timestamp_seconds": "gauge",
    "primerisk_liquidations_escalated": "counter",
    "primerisk_webhook_attempts": "counter",
    "primerisk_webhook_faults": "counter",
    "primerisk_price_to_call_seconds": "histogram",
    "primerisk_database_connections": "gauge",
    "primerisk_limit": "gauge",
    "primerisk_figure_failures": "counter",
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
    "primerisk_netting_runs": "counter",
    "primerisk_netting_movements_saved": "counter",
    "primerisk_fleet_zone_changes": "counter",
    "primerisk_fleet_top_ups": "counter",
    "primerisk_fleet_drift_failures": "counter",
    "primerisk_fleet_look_seconds": "histogram",
    "primerisk_netting_fees_saved_usd": "counter",
    "primerisk_clearing_failures": "counter",
}
OF_THE_SERVICE = {
    "primerisk_accounts": "gauge",
    "primerisk_accounts_by_alert_level": "gauge",
    "primerisk_accounts_by_margin_ratio": "gauge",
    "primerisk_accounts_unpriced": "gauge",
    "primerisk_margin_ratio_worst": "gauge",
    "primerisk_price_age_seconds": "gauge",
    "primerisk_workers": "gauge",
    "primerisk_worker_seen_seconds": "gauge",
    "primerisk_shards": "gauge",
    "primerisk_margin_calls": "gauge",
    "primerisk_margin_call_grace_remaining_seconds": "histogram",
    "primerisk_margin_call_overdue_seconds": "gauge",
    "primerisk_margin_call_action_late_seconds": "gauge",
    "primerisk_margin_call_deficit_usd": "counter",
    "primerisk_margin_calls_with_deficit": "counter",
    "primerisk_webhooks_pending": "gauge",
    "primerisk_webhook_oldest_undelivered_seconds": "gauge",
    "primerisk_webhook_lag_seconds": "gauge",
    "primerisk_ledger_imbalance": "gauge",
    "primerisk_ledger_checked_seconds": "gauge",
    "primerisk_owed": "gauge",
    "primerisk_var_forecasts": "gauge",
    "primerisk_var_exceptions": "gauge",
    "primerisk_var_exceptions_expected": "gauge",
    "primerisk_loans": "gauge",
    "primerisk_loans_borrowed_usd": "gauge",
    "primerisk_loans_utilization": "gauge",
    "primerisk_loans_rate": "gauge",
    "primerisk_loan_recall_overdue_seconds": "gauge",
    "primerisk_loan_action_late_seconds": "gauge",
    "primerisk_loan_deficit": "counter",
    "primerisk_loans_with_deficit": "counter",
    "primerisk_escrows_open": "gauge",
    "primerisk_escrow_outstanding_usd": "gauge",
    "primerisk_escrow_dispute_seconds": "gauge",
    "primerisk_netting_agreements": "gauge",
    "primerisk_netting_obligations_open": "gauge",
    "primerisk_netting_default_seconds": "gauge",
    "primerisk_clearing_action_late_seconds": "gauge",
    "primerisk_fleets": "gauge",
    "primerisk_fleet_members": "gauge",
    "primerisk_fleet_usdc": "gauge",
    "primerisk_fleets_released": "gauge",
    "primerisk_fleet_release_seconds": "gauge",
    "primerisk_fleets_drifting": "gauge",
    "primerisk_figures_age_seconds": "gauge",
    "primerisk_figures_seconds": "gauge",
}
"""Of the database, and the same in every process."""
KINDS = {kind.name for kind in every.kinds(1.0, 1.0)}
LABELS: dict[str, set[str] | int] = {
    # by name: all values that it may have, or how many at most
    "method": {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "-"},
    "route": 120,
    "status": 40,
    "kind": {"margin", "var", "stress", "sizing", "what_if", "plans", "backtest", "report", "stable", "coin", *WALLET},
    "le": 40,
    "version": 1,
    "result": {"filled", "pending", "refused", "delivered", "timeout", "unreachable", "blocked"},
    "event": {
        *(kind for kind in EVENT_TYPES if kind.startswith(("margin_call.", "liquidation.", "loan."))),
        *get_args(State),
    },
    "outcome": {"settled", "defaulted"},
    "pool": {"transactions", "reads"},
    "state": {
        "in_use",
        "idle",
        "held",
        "free",
        "active",
        "recalled",
        "invited",
        "reduce_only",
        *LIVE_STATES,
        *escrow.LIVE_STATES,
        *AGREEMENTS,
    },
    "limit": {"requests_under_way", "database_connections", "price_age_seconds"},
    "figures": KINDS,
    "zone": {"GREEN", "YELLOW", "ORANGE", "RED"},
    "level": {"OK", "WARNING", "DANGER", "EMERGENCY"},
    "band": set(BANDS),
    "lane": {"margin_call", "other", "test"},
    "confidence": {"0.95", "0.99"},
    "asset": 100,
}
"""Every label there is: none names an agent, a key, a request or a call."""


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


def _check_labels(families: list[Metric]) -> None:
    """Check that labels are those that are known, each with few values."""
    seen: dict[str, set[str]] = {}
    for sample in (sample for family in families for sample in family.samples):
        for label, value in sample.labels.items():
            seen.setdefault(label, set()).add(value)
    assert seen.keys() <= LABELS.keys()
    for label, values in seen.items():
        allowed = LABELS[label]
        assert len(values) <= allowed if isinstance(allowed, int) else values <= allowed, (label, values)


async def _have_figures(service: Service) -> None:
    """Write what a worker would have told, and have the figures taken."""
    tally = Tally(1, {"RED": 1}, {"OK": 1}, dict.fromkeys(BANDS, 0), 0, [Endangered("agent_x", 0.9, 0.9, 1.0)], {})
    async with service.app.state.parts.database.transaction("test") as tx:
        await heartbeat.beat(tx, "worker", tally)
        await tx.connection.execute(text("UPDATE service_figures SET taken_at = 'epoch'"))
    shown = service.app.state.parts.figures_shown
    async with asyncio.timeout(30):
        while not all(shown.values(name) for name in KINDS) or not shown.values("accounts").get("zones"):
            await shown.round()  # the app takes them too: what it is about to write is read the next time


async def test_every_metric_has_its_type_and_help(service: Service) -> None:
    await service.quote(**WORKED)
    await _have_figures(service)
    families = await _metrics(service)
    ours = {name: family for name, family in families.items() if name.startswith("primerisk_")}
    created = {name for name in ours if name.endswith("_created")}
    assert {name: family.type for name, family in ours.items() if name not in created} == TYPES | OF_THE_SERVICE
    assert all(family.documentation for family in ours.values())
    _check_labels(list(ours.values()))
    assert {"process_resident_memory_bytes", "python_gc_objects_collected"} <= families.keys()


async def test_processes_agree_on_what_is_the_services(service: Service, database_url: URL) -> None:
    await _have_figures(service)
    async with running(database_url) as other:
        await other.app.state.parts.figures_shown.round()
        found = [await _metrics(one) for one in (service, other)]
    ages = {name for name in OF_THE_SERVICE if "seconds" in name}
    for name in OF_THE_SERVICE.keys() - ages:
        assert found[0][name].samples == found[1][name].samples


async def test_the_endangered_are_shown_where_that_is_asked_for(service: Service, database_url: URL) -> None:
    problem(await service.get("/metrics/accounts", key=""), 404, "no_such_route")
    await _have_figures(service)
    async with running(database_url, metrics_accounts_max=5) as other:
        await other.app.state.parts.figures_shown.round()
        shown = await other.get("/metrics/accounts", key="")
    assert shown.status_code == 200
    [family] = [f for f in text_string_to_metric_families(shown.text) if f.name == "primerisk_account_margin_ratio"]
    assert [(sample.labels, sample.value) for sample in family.samples] == [({"agent_id": "agent_x"}, 0.9)]


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
