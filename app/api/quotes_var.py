"""Value at risk of a portfolio, or of the caller's stored book."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api.body import encoder
from app.api.booking import owner_for
from app.api.deps import Parts, body_of, caller_of, document, parts_of
from app.api.quote_request import Limits, quote_terms, quote_time
from app.api.risk_book import history_shown
from app.api.var_reply import service_reply, var_reply
from app.api.var_request import (
    VAR_QUOTE,
    VarQuoteIn,
    as_named_here,
    check_var_work,
    margin_body,
    service_risks,
    service_terms,
    used_parameters,
    var_terms,
)
from app.domain.book import position_terms
from app.domain.collateral import CollateralTerms
from app.domain.money import to_float
from app.domain.panel import Panel
from app.domain.quote import QuoteTerms
from app.domain.var.exposures import exposed
from app.domain.var.quote import VarTerms, risk_taken, var_quote
from app.errors import ForbiddenError, pointers_by
from app.services import book, escrows
from app.services.accounts import Caller
from app.services.history_cache import Known
from app.services.market_cache import MarketView

router = APIRouter(prefix="/api/quotes", tags=["quotes"])

AgentId = Annotated[str | None, Query(max_length=64, description="whose book: for keys of an admin")]
ESCROW = "escrow"
"""The service that an account's open escrows are, in VaR across services."""
NO_HISTORY = Known(Panel((), np.empty(0, dtype="datetime64[D]"), np.empty((0, 0))), 0)


@dataclass(frozen=True, slots=True)
class Asked:
    """A body, its terms, and the book that it is about, with every underlying that this may be exposed to."""

    body: VarQuoteIn
    terms: VarTerms
    book: QuoteTerms
    view: MarketView
    now: datetime
    names: tuple[str, ...]
    escrows: QuoteTerms | None = None
    """What the account's open escrows are to bring and to take, unless the request has a VaR of its own for them."""


@router.post("/var", openapi_extra=document("Value at risk and expected shortfall", request=VarQuoteIn))
async def quote_var(request: Request, agent_id: AgentId = None) -> Response:
    """VaR and ES of a portfolio or of the stored book, their parts, and what they stand on."""
    parts = parts_of(request)
    caller = await caller_of(request)
    body = await body_of(request, VAR_QUOTE)
    now = parts.database.clock.now()
    held = await account_terms(parts, caller, agent_id) if body.book is not None else None
    legs: Mapping[str, Decimal] = {}
    if held is not None and ESCROW not in (body.services or {}):
        legs = await _open_legs(parts, caller, agent_id)
    asked = await parts.workshop.run(_asked, parts, body, held, legs, now)
    known = NO_HISTORY
    if asked.terms.needs_history:
        known = await parts.history.panel(asked.names, asked.terms.window_days)
    reply = await parts.workshop.run(_quote, parts, asked, known)
    return Response(reply, media_type="application/json")


async def account_terms(parts: Parts, caller: Caller, agent_id: str | None) -> QuoteTerms:
    """Return the stored book of a caller. Raises ForbiddenError, NotFoundError."""
    if not caller.may("agent"):
        raise ForbiddenError("the key lacks the scope agent", code="scope_missing")
    owner = await owner_for(parts.database, caller, agent_id)
    held = await book.read(parts.database, owner.agent_id)
    view = parts.market.view
    return held.quote_terms(view.parameters, view.prices)


async def _open_legs(parts: Parts, caller: Caller, agent_id: str | None) -> dict[str, Decimal]:
    """Return, by asset, what the open escrows of the account are to bring or to take."""
    owner = await owner_for(parts.database, caller, agent_id)
    async with parts.database.transaction(caller.key_id) as tx:
        return await escrows.open_legs(tx, owner.agent_id)


def _escrow_terms(held: QuoteTerms, legs: Mapping[str, Decimal]) -> QuoteTerms:
    """Return a book of what is to come, long, and what is to go, short."""
    return replace(
        held,
        positions=position_terms([]),
        collateral=[CollateralTerms(asset, to_float(amount)) for asset, amount in legs.items() if amount > 0],
        liabilities=[CollateralTerms(asset, to_float(-amount)) for asset, amount in legs.items() if amount < 0],
        reserved=0.0,
    )


def _asked(
    parts: Parts, body: VarQuoteIn, held: QuoteTerms | None, legs: Mapping[str, Decimal], now: datetime
) -> Asked:
    view = parts.market.view
    terms = var_terms(body, view.parameters.models)
    service_terms(body, len(terms.confidences))
    portfolio = margin_body(body)
    as_of = quote_time(portfolio, now)
    if held is None:
        held = quote_terms(portfolio, view.parameters, Limits.of(parts.settings), as_of)
    holdings = {item.asset for item in (*held.collateral, *held.liabilities)}
    largest = exposed(held, view.prices, as_of, moving=holdings).portfolio
    check_var_work(largest, terms, Limits.of(parts.settings))
    if not legs:
        return Asked(body, terms, held, view, as_of, largest.underlyings.names)
    pending = _escrow_terms(held, legs)
    named = exposed(pending, view.prices, as_of, moving=legs).portfolio.underlyings.names
    names = tuple(dict.fromkeys([*largest.underlyings.names, *named]))
    return Asked(body, terms, held, view, as_of, names, pending)


def _quote(parts: Parts, asked: Asked, known: Known) -> bytes:
    started = time.perf_counter()
    found = risk_taken(asked.book, asked.view.prices, asked.now, known.panel, asked.terms)
    parameters = asked.book.margin.parameters
    with pointers_by(as_named_here):
        quote = var_quote(found.portfolio, known.panel, parameters, asked.terms)
    parts.metrics.quote_seconds.labels("var").observe(time.perf_counter() - started)
    parts.metrics.quote_positions.labels("var").observe(len(found.portfolio))
    figures = [tail.value_at_risk for tail in quote.risk.tails]
    if not np.isfinite([*figures, *(tail.expected_shortfall for tail in quote.risk.tails)]).all():
        raise ArithmeticError("a quote came out without a number")
    reply = {"as_of": asked.now} | var_reply(found, quote, asked.terms)
    own = _of_escrows(asked, known.panel)
    if asked.body.services is not None or own:
        reply["services"] = service_reply(service_risks(asked.body, figures, own), asked.terms.confidences)
    reply["parameters"] = used_parameters(asked.terms, parameters, asked.view.price_version)
    reply["history"] = history_shown(known, asked.now) if asked.terms.needs_history else None
    return encoder.encode(reply)


def _of_escrows(asked: Asked, panel: Panel) -> dict[str, list[float]]:
    """Return the VaR of the account's open escrows as a service of its own; empty where none of them moves."""
    if asked.escrows is None:
        return {}
    found = risk_taken(asked.escrows, asked.view.prices, asked.now, panel, asked.terms)
    if not len(found.portfolio):
        return {}
    with pointers_by(as_named_here):
        quote = var_quote(found.portfolio, panel, asked.book.margin.parameters, asked.terms)
    return {ESCROW: [max(0.0, tail.value_at_risk) for tail in quote.risk.tails]}
