"""An agent's account as one page of HTML with pictures, for people."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from typing import Annotated
from weakref import WeakValueDictionary

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api.account import read_account
from app.api.booking import BookOwner
from app.api.deps import Parts, document, parts_of
from app.api.quote_request import Limits, check_work, estimated_work
from app.domain.book import Book, position_terms, reserved_by_asset
from app.domain.panel import Panel
from app.domain.parameters import MarketParameters
from app.domain.var.monte_carlo import SEED_MAX
from app.report.figures import SEED, Subject, report_of
from app.report.history import daily
from app.report.page import POLICY, page
from app.services.market_cache import MarketView
from app.telemetry import package_version

router = APIRouter(prefix="/api", tags=["account"])

HISTORY_DAYS = 5 * 365
"""How far back closes are read for replays: a bear market is in it."""
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
"""One report of a key at a time: who asks for many holds one thread of the workshop, and leaves the others."""

Seed = Annotated[int, Query(ge=0, le=SEED_MAX, description="what a simulation is drawn from")]


@router.get(
    "/account/report",
    openapi_extra=document("The account's risk report, a page of HTML", scope="agent", kind="text/html"),
)
async def get_report(request: Request, owner: BookOwner, seed: Seed = SEED) -> Response:
    """Show the account's health, risk and stress on a page that needs no script and no network."""
    parts = parts_of(request)
    turn = _turns.setdefault(owner.caller.key_id, asyncio.Lock())
    async with turn:
        held, _ = await read_account(parts, owner)
        view = parts.market.view
        check_report_work(held, view.parameters, Limits.of(parts.settings))
        known = await parts.history.panel(_assets(held, view.parameters), HISTORY_DAYS)
        now = parts.database.clock.now()
        made = await parts.workshop.run(_made, parts, view, held, known.panel, now, seed)
    return Response(made, media_type="text/html; charset=utf-8", headers=HEADERS)


def check_report_work(held: Book, parameters: MarketParameters, limits: Limits) -> None:
    """Refuse a book whose liquidation prices would take too long. Raises InvalidError."""
    check_work(estimated_work(position_terms(held.positions), parameters, held.settings.margin_mode), limits)


def _assets(held: Book, parameters: MarketParameters) -> list[str]:
    """Return all that the account has to do with."""
    return sorted({parameters.underlying_of(position.symbol) for position in held.positions} | set(held.holdings))


def _made(parts: Parts, view: MarketView, held: Book, stored: Panel, now: datetime, seed: int) -> bytes:
    started = time.perf_counter()
    subject = Subject(
        title=held.agent_id,
        terms=held.quote_terms(view.parameters, view.prices),
        stored=view.prices,
        now=now,
        daily=daily(stored, int(view.parameters.models.var_window_days)),
        seed=seed,
        reserved=reserved_by_asset(held.reservations, view.parameters, view.prices),
    )
    made = page(report_of(subject), package_version()).encode()
    parts.metrics.quote_seconds.labels("report").observe(time.perf_counter() - started)
    parts.metrics.quote_positions.labels("report").observe(len(held.positions))
    return made
