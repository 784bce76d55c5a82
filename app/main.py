"""The web application: its parts, routes, error handlers and life cycle."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.requests import Request
from starlette.responses import Response

from app.api import (
    account,
    agents,
    audit,
    backtest,
    correlation,
    escrows,
    events,
    fleets,
    history,
    lending,
    margin_calls,
    market,
    netting,
    ops,
    plans,
    prices,
    problems,
    quotes,
    quotes_var,
    report,
    sizing,
    stress,
    trading,
    venue_parameters,
    wallet,
    webhooks,
    what_if,
)
from app.api.deps import Parts
from app.api.express import Express
from app.api.middleware import Guard
from app.api.openapi import openapi_document
from app.api.streams import Streams
from app.api.workshop import Workshop
from app.db.session import Database, parse_database_url
from app.domain.webhooks import EVENT_TYPES, is_urgent
from app.errors import FieldError, InvalidError, StartupError, pointer_to
from app.services import retention
from app.services.accounts import KeyRing
from app.services.figures import every
from app.services.figures.keep import Keeper
from app.services.history_cache import HistoryCache
from app.services.margin import FiguresCache, Scenes
from app.services.market_cache import MarketCache
from app.services.rates import RateLimiter
from app.settings import Settings
from app.telemetry import Metrics, package_version

_REFRESH_SECONDS_AT_START = 10.0
_ROUTES = (
    quotes,
    quotes_var,
    backtest,
    correlation,
    what_if,
    stress,
    sizing,
    plans,
    account,
    report,
    wallet,
    escrows,
    netting,
    trading,
    fleets,
    market,
    venue_parameters,
    prices,
    history,
    agents,
    audit,
    events,
    margin_calls,
    lending,
    webhooks,
    ops,
)
"""In the order of the documentation."""


def create_app(settings: Settings) -> FastAPI:
    """Return the app; `settings.database_url` must be set. Connections are made when it starts."""
    if settings.database_url is None:
        raise StartupError("no database: set PRIMERISK_DATABASE_URL, or use `primerisk serve`")
    database = Database(parse_database_url(settings.database_url.get_secret_value()), settings)
    metrics = Metrics()
    market_cache = MarketCache(database)
    parts = Parts(
        settings=settings,
        metrics=metrics,
        database=database,
        keys=KeyRing(database, settings),
        market=market_cache,
        figures=FiguresCache(),
        scenes=Scenes(market_cache, timedelta(seconds=settings.price_age_seconds_max), settings.account_items_max),
        limiter=RateLimiter(settings.requests_per_second, settings.requests_burst),
        workshop=Workshop(settings.heavy_threads, settings.heavy_waiting_max),
        streams=Streams(database, metrics, settings.event_streams_max),
        history=HistoryCache(database),
        figures_shown=Keeper(
            database,
            every.kinds(settings.figures_seconds, settings.ledger_check_seconds),
            settings.figures_seconds,
            metrics.registry,
        ),
    )
    _show(parts)
    app = FastAPIOffline(  # FastAPI's own /docs loads its scripts from a host of its author's
        redoc_url=None,
        static_url="/docs/assets",
        title="primerisk",
        version=package_version(),
        summary="Margin and risk for AI trading agents",
        lifespan=_lifespan,
        # the metrics are the service's own; each request would look for somebody else's providers
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.parts = parts
    for routes in _ROUTES:
        app.include_router(routes.router)
    problems.install(app)
    app.add_exception_handler(RequestValidationError, _refused_parameters)
    app.add_middleware(Express, parent=app)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]
    return app


def _show(parts: Parts) -> None:
    """Have the metrics read what the parts know, at each scrape, wherever they are shown."""
    metrics, settings, database, market = parts.metrics, parts.settings, parts.database, parts.market
    metrics.database_up.set_function(lambda: database.reachable)
    metrics.market_version.set_function(lambda: market.view.parameters.version)
    metrics.market_age_seconds.set_function(lambda: math.nan if market.age_seconds is None else market.age_seconds)
    metrics.begin_events(kind for kind in EVENT_TYPES if is_urgent(kind))
    metrics.show_connections(database.connections)
    metrics.show_limits(
        {
            "requests_under_way": settings.requests_under_way_max,
            "database_connections": settings.database_pool_size,
            "price_age_seconds": settings.price_age_seconds_max,
        }
    )


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep the market in memory fresh, and history bounded, while the app runs.

    It starts also without the database, and says 503.
    """
    parts: Parts = app.state.parts
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REFRESH_SECONDS_AT_START):
            await parts.market.try_refresh()
    loops = (
        asyncio.create_task(parts.market.run(parts.settings.market_refresh_seconds)),
        asyncio.create_task(retention.run(parts.database, _retentions(parts.settings))),
        asyncio.create_task(parts.figures_shown.run()),
    )
    try:
        yield
    finally:
        parts.streams.close()
        for loop in loops:
            loop.cancel()
        for loop in loops:
            with contextlib.suppress(asyncio.CancelledError):
                await loop
        parts.workshop.close()
        await parts.database.close()


def _retentions(settings: Settings) -> tuple[retention.Retention, ...]:
    return retention.retentions(settings.price_history_days, settings.event_days, settings.snapshot_days)


async def _refused_parameters(_: Request, error: Exception) -> Response:
    """Answer a refused query parameter as a refused field of a body is answered."""
    raised: list[dict[str, Any]] = list(error.errors()) if isinstance(error, RequestValidationError) else []
    # ("query", "models", 0): what comes after the kind of parameter leads to the item
    where = [pointer_to(*map(str, e["loc"][1:])) for e in raised]
    errors = tuple(
        FieldError(pointer, _field_code(e["type"]), str(e["msg"])) for pointer, e in zip(where, raised, strict=True)
    )
    detail = errors[0].detail if errors else "refused"
    return problems.problem_response(InvalidError(detail=detail, code="invalid_parameter", errors=errors))


def _field_code(kind: str) -> str:
    """Return our code for pydantic's name of a refusal."""
    if kind.startswith(("greater_than", "less_than")) or kind == "int_parsing_size":
        return "number_out_of_range"
    return "missing_field" if kind == "missing" else "invalid_value"
