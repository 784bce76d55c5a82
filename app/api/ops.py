"""Operations: alive, ready, metrics. No key, so that probes and Prometheus need none."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from app.api.body import JsonResponse
from app.api.deps import Parts, parts_of
from app.db import migrate
from app.errors import DatabaseUnavailableError, NotFoundError
from app.services import heartbeat
from app.services.figures.accounts import Endangered
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
            fits = migrate.fits(revision)
            beat = await heartbeat.last_beat(tx) if fits else None
            silent = None if beat is None else (tx.now - beat).total_seconds()
    except DatabaseUnavailableError as error:
        away: dict[str, object] = {"ok": False, "detail": error.detail}
        return {"database": away, "migrations": away}
    migrated: dict[str, object] = {"ok": fits, "revision": revision, "head": migrate.head()}
    alive = silent is not None and silent <= heartbeat.SILENT_AFTER.total_seconds()
    worker: dict[str, object] = {"ok": alive, "seen_seconds_ago": silent}
    return {"database": {"ok": True}, "migrations": migrated, "worker": worker}


def _market_check(parts: Parts) -> dict[str, object]:
    age = parts.market.age_seconds
    return {"ok": age is not None, "age_seconds": age, "version": parts.market.view.parameters.version}


@router.get("/metrics", summary="Metrics for Prometheus")
async def metrics(request: Request) -> Response:
    """Every series of this process, in Prometheus's text format."""
    return Response(generate_latest(parts_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/metrics/accounts", summary="The accounts in the greatest danger, for Prometheus")
async def metrics_of_accounts(request: Request) -> Response:
    """Ratios and equity of some accounts by id, the highest margin ratios first; 404 unless a setting turns it on."""
    parts = parts_of(request)
    if not parts.settings.metrics_accounts_max:
        raise NotFoundError("turned off: PRIMERISK_METRICS_ACCOUNTS_MAX is 0", code="no_such_route")
    shown = Endangered(parts.figures_shown.values("accounts"), parts.settings.metrics_accounts_max)
    return Response(generate_latest(shown), media_type=CONTENT_TYPE_LATEST)
