"""Prices: posted, the latest, and their history in bars of a minute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from msgspec import Raw
from starlette.responses import Response

from app.api import body as wire
from app.api.deps import AnyCaller, MarketCaller, body_of, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit, invalid_cursor
from app.errors import InvalidError, pointer_to
from app.services import price_history, prices
from app.services.prices import PostedPrice

router = APIRouter(prefix="/api/market/prices", tags=["market"])

HISTORY_MIN, HISTORY_MAX = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
"""Times that the history is asked within: others are moved to its ends, for some are past Postgres's calendar."""

_From = Annotated[str | None, Query(alias="from", max_length=40, description="from this moment on (RFC 3339)")]
_To = Annotated[str | None, Query(max_length=40, description="before this moment (RFC 3339)")]


class PricesPost(wire.Request):
    """POST /api/market/prices: USD prices of assets, marks of instruments, all of one moment (now if left out)."""

    prices: dict[str, wire.Number]
    as_of: wire.Moment | None = None


_PRICES = wire.Body(PricesPost)


@router.post("", openapi_extra=document("Post prices", request=PricesPost, scope="market", status=202))
async def post_prices(request: Request, caller: MarketCaller) -> Response:
    """Store prices of one moment; per symbol the newer moment wins."""
    posted = await body_of(request, _PRICES)
    parts = parts_of(request)
    skew = timedelta(seconds=parts.settings.price_skew_seconds_max)
    exact = _decimals(posted.prices)
    dated = None if posted.as_of is None else wire.moment(posted.as_of, "/as_of")
    async with parts.database.transaction(caller.key_id) as tx:
        result = await prices.post_prices(tx, exact, dated, skew)
        as_of = dated or tx.now
    await parts.market.refresh()
    return wire.JsonResponse({"accepted": result.accepted, "ignored": result.ignored, "as_of": as_of}, 202)


@router.get("", openapi_extra=document("Latest prices"))
async def list_prices(request: Request, caller: AnyCaller, limit: Limit = PAGE_MAX, cursor: Cursor = "") -> Response:
    """List the latest prices by symbol, with their digits as posted."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await prices.list_prices(tx, limit, cursor)
        now = tx.now
    more = found[-1].symbol if len(found) == limit else None
    return wire.JsonResponse({"prices": [_price(price, now) for price in found], "next_cursor": more})


# before the price itself: a symbol may have slashes, so that its path takes in whatever follows
@router.get("/{symbol:path}/history", openapi_extra=document("Bars of a price"))
async def list_bars(
    request: Request,
    caller: AnyCaller,
    symbol: str,
    from_: _From = None,
    to: _To = None,
    limit: Limit = PAGE_MAX,
    cursor: Cursor = "",
) -> Response:
    """List the bars of one minute, earliest first; without prices in it a minute has none."""
    start = HISTORY_MIN if from_ is None else _within(wire.moment(from_, "/from"))
    end = HISTORY_MAX if to is None else _within(wire.moment(to, "/to"))
    after = _minute_of(cursor) if cursor else None
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await price_history.list_bars(tx, symbol, limit, start=start, end=end, after=after)
    more = found[-1].minute if len(found) == limit else None
    return wire.JsonResponse({"bars": found, "next_cursor": more})


@router.get("/{symbol:path}", openapi_extra=document("Latest price of a symbol"))
async def get_price(request: Request, caller: AnyCaller, symbol: str) -> Response:
    """Show the latest price of an asset or instrument, with its age."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await prices.get_price(tx, symbol)
        now = tx.now
    return wire.JsonResponse(_price(found, now))


def _price(price: PostedPrice, now: datetime) -> dict[str, Any]:
    age = max(0.0, (now - price.as_of).total_seconds())
    return {"id": price.symbol, **asdict(price), "age_seconds": age}


def _within(moment: datetime) -> datetime:
    return min(max(moment, HISTORY_MIN), HISTORY_MAX)


def _minute_of(cursor: str) -> datetime:
    try:
        return _within(wire.moment(cursor, "/cursor"))
    except InvalidError:
        raise invalid_cursor() from None


def _decimals(raw: Mapping[str, Raw]) -> dict[str, Decimal]:
    """Return prices with their exact digits. Raises InvalidError."""
    return {symbol: wire.exact(value, pointer_to("prices", symbol)) for symbol, value in raw.items()}
