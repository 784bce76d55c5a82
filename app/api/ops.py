"""Operations: alive, ready, metrics. No key, so that probes and Prometheus need none."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from app.api.body import JsonResponse
from app.api.deps import Parts, parts_of
from app.db import migrate
from app.errors import DatabaseUnavailableError
from app.services import heartbeat
from app.telemetry import package_version

router = APIRouter(tags=["operations"])

_TOLD_ONLY = ("worker",)
"""What is shown, and does not take this process out of service: it can answer without."""


@router.get("/healthz", summary="Alive")
async def healthz() -> Response:
    """Say that the process is alive; nothing else is checked."""
    return JsonResponse({"status": "alive", "version": package_version()})


@router.get("/readyz", summary="Ready to serve")
async def readyz(request: Request) -> Response:
    """Say whether the process can serve: database, migrations, market; 503 where one of them is not ready."""
    parts = parts_of(request)
    checks = {**await _database_checks(parts), "market": _market_check(parts)}
    ready = all(check["ok"] for name, check in checks.items() if name not in _TOLD_ONLY)
    return JsonResponse({"status": "ready" if ready else "not ready", "checks": checks}, 200 if ready else 503)


async def _database_checks(parts: Parts) -> dict[str, dict[str, object]]:
    try:
        async with parts.database.transaction("readyz") as tx:
            revision = await migrate.current(tx.connection)
            beat = await heartbeat.last_beat(tx) if revision == migrate.head() else None
            silent = None if beat is None else (tx.now - beat).total_seconds()
    except DatabaseUnavailableError as error:
        away: dict[str, object] = {"ok": False, "detail": error.detail}
        return {"database": away, "migrations": away}
    migrated: dict[str, object] = {"ok": revision == migrate.head(), "revision": revision, "head": migrate.head()}
    alive = silent is not None and silent <= heartbeat.SILENT_AFTER.total_seconds()
    worker: dict[str, object] = {"ok": alive, "seen_seconds_ago": silent}
    return {"database": {"ok": True}, "migrations": migrated, "worker": worker}


def _market_check(parts: Parts) -> dict[str, object]:
    age = parts.market.age_seconds
    return {"ok": age is not None, "age_seconds": age, "version": parts.market.view.parameters.version}


@router.get("/metrics", summary="Metrics for Prometheus")
async def metrics(request: Request) -> Response:
    """Every series of this process, in Prometheus's text format."""
    parts = parts_of(request)
    age = parts.market.age_seconds
    parts.metrics.market_age_seconds.set(float("nan") if age is None else age)
    parts.metrics.database_up.set(parts.database.reachable)
    parts.metrics.market_version.set(parts.market.view.parameters.version)
    return Response(generate_latest(parts.metrics.registry), media_type=CONTENT_TYPE_LATEST)
