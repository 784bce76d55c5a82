"""Orders, what a venue fills of them, and what makes positions smaller or safer."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from msgspec import Meta
from starlette.responses import Response

from app.api import account_reply as replies
from app.api import body as wire
from app.api.booking import BookOwner, Label, Reply, idempotency_key, once, require_custodian
from app.api.deps import body_of, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit, next_cursor, number_cursor
from app.db.session import Tx
from app.domain.book import ZERO, Book, OpenPosition, PositionMode
from app.domain.money import checked_amount
from app.domain.parameters import MarginMode
from app.domain.trade import Order
from app.errors import InvalidError, PrimeriskError, invalid
from app.services import margin_calls, orders, positions, trading, venue
from app.services.margin import Scene
from app.services.orders import Labels
from app.services.trading import Filled
from app.services.venue import Fill
from app.services.wallet import Names

router = APIRouter(prefix="/api", tags=["trading"])

META_BYTES_MAX = 4_096
LEVERAGE_MAX = 1_000
LEVERAGE_DECIMALS_MAX = 6
META_BRACKETS_MAX = 200
FILLS_SHOWN_MAX = 200

FillId = Annotated[str, Meta(min_length=1, max_length=100, pattern="^[^\\x00]*$")]
"""A venue's own id of a fill."""

Pending = Annotated[bool, Query(description="those alone that wait for fills")]


class OrderPost(wire.Request):
    """POST /api/orders: a market order for `size` contracts, filled at the stored mark, or by the account's venue."""

    symbol: str
    side: Literal["buy", "sell"]
    size: wire.Number
    order_type: Literal["market"] | None = None
    reduce_only: bool | None = None
    leverage: wire.Number = wire.NOT_GIVEN
    margin_mode: MarginMode | None = None
    meta: dict[str, Any] | None = None


class ReducePost(wire.Request):
    """POST /api/positions/{id}/reduce: a fraction in (0, 1] of the position or reservation."""

    reduce_pct: wire.Number
    reason: Label | None = None


class CollateralPost(wire.Request):
    """POST /api/positions/{id}/collateral: USDC to add to an isolated position, or (negative) to take back."""

    amount: wire.Number
    reference: Label | None = None


class CancelPost(wire.Request):
    """POST /api/orders/{id}/cancel: why, for the audit trail, or nothing."""

    reason: Label | None = None


class FillPost(wire.Request):
    """POST /api/orders/{id}/fills: what a venue filled; `fee` in USDC; `confirm` a price far from the mark."""

    fill_id: FillId
    size: wire.Number
    price: wire.Number
    fee: wire.Number = wire.NOT_GIVEN
    confirm: bool | None = None


_ORDER = wire.Body(OrderPost)
_FILL = wire.Body(FillPost)
_CANCEL = wire.Body(CancelPost)
_REDUCE = wire.Body(ReducePost)
_COLLATERAL = wire.Body(CollateralPost)


@router.post("/orders", openapi_extra=document("Send an order", request=OrderPost, scope="agent"))
async def post_order(request: Request, owner: BookOwner) -> Response:
    """Fill a market order, or refuse it with the shortfall and the largest size that would pass."""
    asked = await body_of(request, _ORDER)
    order = _order(asked)
    named = Names(None, idempotency_key(request))
    result = "filled"

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        nonlocal result
        filled = await trading.submit(tx, scene, held, order, named, Labels(meta=asked.meta))
        result = filled.order.status
        return Reply(_filled(filled, scene))

    counter = parts_of(request).metrics.orders
    try:
        answer = await once(request, owner, effect, trading.SERVICE)
    except PrimeriskError:
        counter.labels("refused").inc()
        raise
    if "Idempotency-Replayed" not in answer.headers:
        counter.labels(result).inc()
    return answer


@router.get("/orders", openapi_extra=document("Orders", scope="agent"))
async def list_orders(
    request: Request, owner: BookOwner, limit: Limit = PAGE_MAX, cursor: Cursor = "", pending: Pending = False
) -> Response:
    """List orders, newest first; or those alone that wait for fills."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await orders.list_orders(tx, owner.agent_id, limit, number_cursor(cursor), pending=pending)
    more = next_cursor([item.seq for item in found], limit)
    return wire.JsonResponse({"orders": [replies.stored_order(o) for o in found], "next_cursor": more})


@router.get("/orders/{order_id}", openapi_extra=document("An order", scope="agent"))
async def get_order(request: Request, owner: BookOwner, order_id: str) -> Response:
    """Show an order with the fills that its venue reported."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        order = await orders.get(tx, owner.agent_id, order_id)
        fills = await orders.list_fills(tx, order_id, FILLS_SHOWN_MAX)
    return wire.JsonResponse({**replies.stored_order(order), "fills": [replies.stored_fill(f) for f in fills]})


@router.post(
    "/orders/{order_id}/fills",
    openapi_extra=document("Report a venue's fill of an order", request=FillPost, scope="agent"),
)
async def post_fill(request: Request, owner: BookOwner, order_id: str) -> Response:
    """Book what a venue filled of an order: position, profit or loss and fee at the venue's price."""
    require_custodian(request, owner)  # a fill is money: whoever may not book a deposit may not report one
    asked = await body_of(request, _FILL)
    fee = wire.exact_or_none(asked.fee, "/fee") or ZERO
    size, price = wire.exact(asked.size, "/size"), wire.exact(asked.price, "/price")
    reported = Fill(asked.fill_id, size, price, fee, bool(asked.confirm))
    named = Names(None, idempotency_key(request))
    parts = parts_of(request)
    events: list[str] = []

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        distance = parts.settings.fill_distance_max
        done = await margin_calls.record_fill(tx, scene, held, order_id, reported, named, distance)
        if done.trade is not None and done.order.margin_call_id is not None:
            events.append("liquidation.executed")
        return Reply(replies.stored_fill(done.fill))

    answer = await once(request, owner, effect)
    for event in events:
        parts.metrics.margin_events.labels(event).inc()
    return answer


@router.post(
    "/orders/{order_id}/cancel",
    openapi_extra=document("Cancel the rest of an order", request=CancelPost, scope="agent"),
)
async def cancel_order(request: Request, owner: BookOwner, order_id: str) -> Response:
    """Cancel what remains of an order that waits for fills; one that comes all the same is still booked."""
    asked = await body_of(request, _CANCEL, empty=b"{}")

    async def effect(tx: Tx, held: Book, _: Scene) -> Reply:
        cancelled = (await venue.cancel(tx, held, order_id, asked.reason or ""))[0]
        return Reply(replies.stored_order(cancelled))

    return await once(request, owner, effect, trading.SERVICE)


@router.post(
    "/positions/{target_id}/reduce",
    openapi_extra=document("Reduce a position or a reservation", request=ReducePost, scope="agent"),
)
async def reduce(request: Request, owner: BookOwner, target_id: str) -> Response:
    """Close a fraction of a position at the mark, or release that fraction of a reducible reservation."""
    asked = await body_of(request, _REDUCE)
    fraction = _fraction(wire.exact(asked.reduce_pct, "/reduce_pct"))
    reason = asked.reason or ""
    named = Names(asked.reason, idempotency_key(request))

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        done = await trading.reduce(tx, scene, held, target_id, fraction, named, reason)
        if isinstance(done, Filled):
            return Reply({**_filled(done, scene), "id": target_id, "service": "trading"})
        stored, left = done
        return Reply({**replies.stored_reservation(stored), "account": _left(left, scene, None)["account"]})

    return await once(request, owner, effect, trading.SERVICE)


@router.post(
    "/positions/{position_id}/collateral",
    openapi_extra=document("Add or take back an isolated position's collateral", request=CollateralPost, scope="agent"),
)
async def allocate(request: Request, owner: BookOwner, position_id: str) -> Response:
    """Move USDC between the wallet and an isolated position."""
    asked = await body_of(request, _COLLATERAL)
    amount = wire.exact(asked.amount, "/amount")
    named = Names(asked.reference, idempotency_key(request))

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        position, left = await positions.allocate(tx, scene, held, position_id, amount, named)
        return Reply(_left(left, scene, position))

    return await once(request, owner, effect, trading.SERVICE)


def _order(asked: OrderPost) -> Order:
    leverage = wire.exact_or_none(asked.leverage, "/leverage")
    if leverage is not None:
        leverage = checked_amount("/leverage", leverage, LEVERAGE_DECIMALS_MAX)
        if not 1 <= leverage <= LEVERAGE_MAX:
            raise invalid("/leverage", "number_out_of_range", f"leverage is 1 to {LEVERAGE_MAX}")
    if asked.meta is not None:
        _check_meta(asked.meta)
    mode: PositionMode | None = None
    if asked.margin_mode is not None:
        mode = "isolated" if asked.margin_mode == "isolated" else "pooled"
    return Order(asked.symbol, asked.side, wire.exact(asked.size, "/size"), bool(asked.reduce_only), leverage, mode)


def _check_meta(meta: dict[str, Any]) -> None:
    """Refuse what is too long, too deep, or no text for Postgres. Raises InvalidError."""
    written = wire.encoder.encode(meta)
    if len(written) > META_BYTES_MAX:
        raise invalid("/meta", "too_long", f"meta has at most {META_BYTES_MAX} bytes")
    if b"\\u0000" in written:
        raise invalid("/meta", "invalid_value", "meta has no NUL")
    # brackets in its texts count too: it is a bound, not a measure
    if written.count(b"[") + written.count(b"{") > META_BRACKETS_MAX:
        raise invalid("/meta", "nested_too_deeply", f"meta has at most {META_BRACKETS_MAX} arrays and objects")


def _fraction(given: Decimal) -> Decimal:
    fraction = checked_amount("/reduce_pct", given)
    if fraction > 1:
        raise invalid("/reduce_pct", "number_out_of_range", "reduce_pct is above 0 and at most 1")
    return fraction


def _filled(filled: Filled, scene: Scene) -> dict[str, Any]:
    return {**replies.stored_order(filled.order), **_left(filled.book, scene, filled.position)}


def _left(book: Book, scene: Scene, position: OpenPosition | None) -> dict[str, Any]:
    """Return the position and where the account stands after the event.

    Both are None where a price is missing, which must keep nobody in.
    """
    try:
        figures = scene.figures(book)
    except InvalidError:
        return {"position": None, "account": None}
    rows = replies.open_positions(book, figures)
    health = figures.health
    return {
        "position": None if position is None else next(row for row in rows if row["id"] == position.id),
        "account": {
            "equity": figures.equity,
            "required_initial": health.required_initial,
            "utilization": health.utilization,
            "margin_ratio": health.margin_ratio,
            "zone": health.zone,
        },
    }
