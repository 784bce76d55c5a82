"""What a change would make of the caller's stored book, before anything is done."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from msgspec import Meta
from starlette.responses import Response

from app.api import body as wire
from app.api.booking import BookOwner
from app.api.deps import Parts, body_of, document, parts_of
from app.api.quote_request import Limits, PositionIn, check_terms, check_work, estimated_work, position_terms
from app.domain.book import Book
from app.domain.book import position_terms as position_terms_of
from app.domain.quote import MarginQuote
from app.domain.what_if import Change, WhatIf, what_if
from app.errors import pointers_under
from app.services import book

router = APIRouter(prefix="/api/quotes", tags=["quotes"])

NAMES_MAX = 5_000


class WhatIfIn(wire.Request):
    """POST /api/quotes/what-if: positions to add, to close (by id or symbol), to replace (by their symbols)."""

    add: list[PositionIn] | None = None
    close: Annotated[list[str], Meta(max_length=NAMES_MAX)] | None = None
    replace: list[PositionIn] | None = None


_WHAT_IF = wire.Body(WhatIfIn)


@router.post("/what-if", openapi_extra=document("A change to the stored book", request=WhatIfIn, scope="agent"))
async def quote_what_if(request: Request, owner: BookOwner) -> Response:
    """Show every figure before and after a change, and whether it would be accepted."""
    parts = parts_of(request)
    asked = await body_of(request, _WHAT_IF)
    held = await book.read(parts.database, owner.agent_id)
    return Response(await parts.workshop.run(_answer, parts, held, asked), media_type="application/json")


def _answer(parts: Parts, held: Book, asked: WhatIfIn) -> bytes:
    view, now = parts.market.view, parts.database.clock.now()
    limits = Limits.of(parts.settings)
    rows = {}
    for name, given in (("add", asked.add), ("replace", asked.replace)):
        with pointers_under(f"/{name}", "/positions"):
            rows[name] = position_terms(given or [])
            check_terms(rows[name], view.parameters, held.settings.margin_mode, limits, now)
    whole = position_terms_of(held.positions)
    work = sum(estimated_work(part, view.parameters, held.settings.margin_mode) for part in (whole, *rows.values()))
    check_work(2 * work, limits)
    change = Change(asked.close or (), rows["add"], rows["replace"])
    seconds = parts.settings.price_age_seconds_max
    return wire.encoder.encode(_reply(what_if(held, change, view.parameters, view.prices, now, seconds)))


def _reply(found: WhatIf) -> dict[str, Any]:
    before, after = _figures(found.before), _figures(found.after)
    refused = found.refusal
    reason = None
    if refused is not None:
        reason = {"code": refused.code, "detail": refused.detail, "shortfall": refused.shortfall}
    return {
        "as_of": found.after.as_of,
        "accepted": refused is None,
        "reason": reason,
        "before": before,
        "change": _difference(before, after),
        "after": after,
        "prices": found.after.prices,
    }


_HEALTH_FIGURES = (
    "required_initial",
    "required_maintenance",
    "utilization",
    "margin_ratio",
    "liquidation_buffer",
    "net_exposure_ratio",
    "stress_survival",
    "gross_leverage",
    "free_margin",
    "headroom",
    "shortfall",
    "health_score",
    "zone",
    "alert_level",
    "status",
)


def _figures(quote: MarginQuote) -> dict[str, Any]:
    return {
        "equity": quote.equity,
        "collateral_value": quote.collateral.collateral_value,
        "liabilities": quote.collateral.liabilities,
        "unrealized_pnl": quote.unrealized_pnl,
        "options_value": quote.options_value,
        "allocated_collateral": quote.allocated,
        "models": {
            name: {"initial_margin": result.initial_margin, "maintenance_margin": result.maintenance_margin}
            for name, result in quote.models.items()
        },
        "health": {name: getattr(quote.health, name) for name in _HEALTH_FIGURES},
        "liquidation": {
            "to_breach": quote.distances.to_breach,
            "to_liquidation": quote.distances.to_liquidation,
            "liquidatable": quote.distances.liquidatable,
        },
    }


def _difference(before: Any, after: Any) -> Any:
    """Return after less before, figure by figure; null where one of them is not defined or no number."""
    if isinstance(before, dict):
        return {name: _difference(before[name], after[name]) for name in before}
    numbers = isinstance(before, int | float) and isinstance(after, int | float)
    return after - before if numbers and not isinstance(before, bool) else None
