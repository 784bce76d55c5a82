"""Stateless quotes: a portfolio in, its risk out, without the database."""

from __future__ import annotations

import time
from datetime import datetime

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.body import EncodedResponse, encoder
from app.api.deps import Parts, body_of, caller_of, document, parts_of
from app.api.quote_reply import is_finite, margin_reply
from app.api.quote_request import MARGIN_QUOTE, Limits, MarginQuoteIn, quote_terms, quote_time
from app.domain.margin.venues.registry import VENUES
from app.domain.quote import margin_quote

router = APIRouter(prefix="/api/quotes", tags=["quotes"])

INLINE_POSITIONS_MAX = 400
"""Positions up to which handing a quote to a thread costs more than it frees the loop."""


@router.post("/margin", openapi_extra=document("A margin quote under several models", request=MarginQuoteIn))
async def quote_margin(request: Request) -> Response:
    """Margin, health and liquidation prices of a portfolio."""
    parts = parts_of(request)
    await caller_of(request)
    body = await body_of(request, MARGIN_QUOTE)
    now = parts.database.clock.now()
    if _is_light(body):
        reply = _quote(parts, body, now)
    else:
        reply = await parts.workshop.run(_quote, parts, body, now)
    return EncodedResponse(reply)


def _is_light(body: MarginQuoteIn) -> bool:
    """Whether the quote holds the event loop for a millisecond or two at most."""
    # typed as it is made, from the parameter classes, the settings look always there
    settings: object = body.settings
    return (
        settings is None
        and (body.market is None or body.market.prices_only)
        and len(body.positions) <= INLINE_POSITIONS_MAX
        and len(body.collateral or ()) + len(body.liabilities or ()) <= INLINE_POSITIONS_MAX
        and not isinstance(body.scenarios, list)
        and VENUES.keys().isdisjoint(body.models or ())
        and "strike" not in body.terms.given
    )


def _quote(parts: Parts, body: MarginQuoteIn, now: datetime) -> bytes:
    view, settings = parts.market.view, parts.settings
    started = time.perf_counter()
    as_of = quote_time(body, now)
    terms = quote_terms(body, view.parameters, Limits.of(settings), as_of)
    quote = margin_quote(terms, view.prices, as_of)
    parts.metrics.margin_quote_seconds.observe(time.perf_counter() - started)
    parts.metrics.margin_quote_positions.observe(len(body.positions))
    if not is_finite(quote):
        raise ArithmeticError("a quote came out without a number")
    return encoder.encode(margin_reply(quote, terms, body.columns["id"], settings.price_age_seconds_max))
