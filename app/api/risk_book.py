"""The book that stress, sizing and plans are about: a request's own portfolio, or the caller's stored account."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from fastapi import Query, Request

from app.api.body import Body, Moment
from app.api.body import Request as RequestIn
from app.api.booking import owner_for
from app.api.deps import Parts, body_of, caller_of, parts_of
from app.api.quote_request import (
    DebtIn,
    HoldingIn,
    Limits,
    MarginQuoteIn,
    MarketIn,
    PositionIn,
    ReservationIn,
    SettingsIn,
    quote_time,
    read_terms,
)
from app.domain.book import ZERO, Book, reserved_by_asset
from app.domain.covariance import Pair
from app.domain.liquidate import Assess, Reduce, Target
from app.domain.parameters import MarketParameters
from app.domain.prices import StoredPrice
from app.domain.quote import QuoteTerms
from app.domain.quoted_book import quoted_book
from app.errors import ForbiddenError, invalid
from app.services import book
from app.services.accounts import Caller
from app.services.history_cache import Known
from app.services.liquidation import reduced
from app.services.margin import Scene

AgentId = Annotated[str | None, Query(description='whose book `"book":"account"` is: for keys of an admin')]

HISTORY_CELLS_MAX = 200_000
"""Assets x days of history that a request may read."""
UNUSED_SHOWN_MAX = 200

_OF_REQUEST = ("positions", "collateral", "liabilities", "reservations", "market", "settings", "as_of")


class RiskBookIn(RequestIn):
    """Positions and collateral as a margin quote takes them, or the stored account."""

    book: Literal["account"] | None = None
    positions: list[PositionIn] | None = None
    collateral: list[HoldingIn] | None = None
    liabilities: list[DebtIn] | None = None
    reservations: list[ReservationIn] | None = None
    market: MarketIn | None = None
    settings: SettingsIn | None = None  # type: ignore[valid-type]
    as_of: Moment | None = None


async def history_of(parts: Parts, assets: Sequence[str], days: int, pointer: str) -> Known:
    """Return the last so many daily returns of the assets. Raises InvalidError `too_much_work` at the pointer."""
    if len(assets) * days > HISTORY_CELLS_MAX:
        detail = f"{len(assets)} assets x {days} days of history, over the limit of {HISTORY_CELLS_MAX}"
        raise invalid(pointer, "too_much_work", detail)
    return await parts.history.panel(assets, days)


def history_shown(known: Known, now: datetime) -> dict[str, Any]:
    """Return on which days there are returns of any asset asked for, under which version, and how old the last is."""
    days: list[date] = known.panel.dates[np.isfinite(known.panel.returns).any(axis=1)].tolist()
    return {
        "version": known.version,
        "from": days[0] if days else None,
        "to": days[-1] if days else None,
        "days": len(days),
        "age_days": (now.date() - days[-1]).days if days else None,
    }


def unused(names: Collection[str], vols: Iterable[str], pairs: Iterable[Pair]) -> tuple[list[str], list[str]]:
    """Return which of the volatilities and correlations that a request gives are of nothing in the book."""
    apart = [f"{a}:{b}" for a, b in pairs if not {a, b} <= set(names)]
    return [name for name in vols if name not in names][:UNUSED_SHOWN_MAX], apart[:UNUSED_SHOWN_MAX]


B = TypeVar("B", bound=RiskBookIn)


@dataclass(frozen=True, slots=True)
class Asked(Generic[B]):
    """A request: who asks, for what, and the stored book where it is about that."""

    caller: Caller
    body: B
    held: Book | None


async def asked_of(request: Request, body: Body[B], agent_id: str | None) -> Asked[B]:
    """Return what is asked for. Raises as `body_of` and `owner_for` do."""
    caller = await caller_of(request)
    given = await body_of(request, body)
    if given.book is None:
        return Asked(caller, given, None)
    if not caller.may("agent"):
        raise ForbiddenError("the key lacks the scope agent, which an account asks for", code="scope_missing")
    for name in _OF_REQUEST:
        if getattr(given, name) is not None:
            raise invalid(f"/{name}", "not_with_account", "the account has its own, at the stored market")
    owner = await owner_for(parts_of(request).database, caller, agent_id)
    return Asked(caller, given, await book.read(parts_of(request).database, owner.agent_id))


@dataclass(frozen=True, slots=True)
class RiskBook:
    """What is assessed, at which prices and when; `reserved` is what of the reservations is in which asset, USD."""

    terms: QuoteTerms
    stored: Mapping[str, StoredPrice]
    now: datetime
    reserved: Mapping[str, float]
    repairs: bool

    @property
    def parameters(self) -> MarketParameters:
        """The parameters, the request's own included."""
        return self.terms.margin.parameters


def risk_book(parts: Parts, asked: Asked[Any]) -> RiskBook:
    """Return the book that a request is about. Raises InvalidError with pointers; no work is judged."""
    view, now = parts.market.view, parts.database.clock.now()
    held, body = asked.held, asked.body
    if held is not None:
        reserved = reserved_by_asset(held.reservations, view.parameters, view.prices)
        return RiskBook(held.quote_terms(view.parameters, view.prices), view.prices, now, reserved, repairs=False)
    if body.positions is None and not body.collateral and not body.liabilities:
        raise invalid("/positions", "missing", 'give positions or collateral, or "book": "account"')
    given: dict[str, Any] = {name: getattr(body, name) for name in _OF_REQUEST}
    quote = MarginQuoteIn(**given)
    as_of = quote_time(quote, now)
    terms = read_terms(quote, view.parameters, Limits.of(parts.settings), as_of)
    repairs = quote.market is not None and quote.market.correlates
    return RiskBook(terms, view.prices, as_of, {}, repairs=repairs)


@dataclass(frozen=True, slots=True)
class PlannedBook:
    """A book that plans are worked out on, and how it is assessed and reduced."""

    held: Book
    assess: Assess
    reduce: Reduce
    parameters: MarketParameters
    now: datetime


def planned_book(parts: Parts, asked: Asked[Any]) -> PlannedBook:
    """Return the book that a plan is asked for. Raises InvalidError, for options `linear_only`."""
    if asked.held is None:
        given = risk_book(parts, asked)
        quoted = quoted_book(given.terms, given.stored, given.now)
        return PlannedBook(quoted.book, quoted.assess, quoted.reduce, given.parameters, given.now)
    settings = parts.settings
    seconds = timedelta(seconds=settings.price_age_seconds_max)
    scene = Scene(parts.market.view, parts.database.clock.now(), seconds, settings.account_items_max)

    def reduce(held: Book, target: Target, size: Decimal) -> Book:
        return reduced(scene, held, target, size, ZERO)

    parameters = asked.held.quote_terms(scene.market.parameters, scene.market.prices).margin.parameters
    return PlannedBook(asked.held, scene.figures, reduce, parameters, scene.now)
