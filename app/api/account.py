"""An agent's account: what it has, what it owes, how it stands; its positions; its settings."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from app.api import account_reply as replies
from app.api import body as wire
from app.api.booking import BookOwner, Owner, Reply, once
from app.api.deps import Parts, body_of, document, parts_of
from app.api.pages import PAGE_MAX, Cursor, Limit, next_cursor, number_cursor
from app.api.quote_request import fields_given
from app.db.session import Tx
from app.domain.book import Book, LadderMode
from app.domain.parameters import MarginMode
from app.domain.quote import AccountFigures
from app.errors import InvalidError
from app.services import account, book, positions
from app.services.margin import Scene

router = APIRouter(prefix="/api", tags=["account"])

Level = Annotated[float, Meta(ge=0.05, le=1)]
Seconds = Annotated[int, Meta(ge=0, le=86_400)]


class ThresholdsIn(wire.Request):
    """Levels of utilization of the account's own; null: the market's."""

    gate_utilization: Level | UnsetType | None = UNSET
    breach_utilization: Level | UnsetType | None = UNSET
    cure_utilization: Level | UnsetType | None = UNSET
    stop_utilization: Level | UnsetType | None = UNSET
    shortfall_utilization: Level | UnsetType | None = UNSET


class AccountSettingsIn(wire.Request):
    """PATCH /api/account/settings: fields left out stay as they are."""

    margin_mode: MarginMode | UnsetType = UNSET
    execution: Literal["book", "venue"] | UnsetType = UNSET
    auto_liquidate: bool | UnsetType = UNSET
    notice_delay_seconds: Seconds | UnsetType = UNSET
    grace_period_seconds: Seconds | UnsetType = UNSET
    trailing_stop: Annotated[float, Meta(gt=0, lt=1)] | UnsetType | None = UNSET
    drawdown_ladder: LadderMode | UnsetType = UNSET
    target_utilization: Level | UnsetType | None = UNSET
    thresholds: ThresholdsIn | UnsetType = UNSET


_SETTINGS = wire.Body(AccountSettingsIn)


async def read_account(parts: Parts, owner: Owner) -> tuple[Book, AccountFigures]:
    """Return the stored book and what it comes to, in one query. Raises NotFoundError."""
    held = await book.read(parts.database, owner.agent_id)
    now = parts.database.clock.now()
    try:
        return held, parts.figures.figures(held, parts.market.view, now)
    except InvalidError:
        # another process may have posted the price a moment ago
        return held, parts.figures.figures(held, await parts.market.refresh(), now)


@router.get("/account", openapi_extra=document("The account: equity, positions, health", scope="agent"))
async def get_account(request: Request, owner: BookOwner) -> Response:
    """Show the account at the latest prices."""
    parts = parts_of(request)
    held, figures = await read_account(parts, owner)
    age_max = timedelta(seconds=parts.settings.price_age_seconds_max)
    return wire.JsonResponse(replies.account_reply(held, figures, parts.market.view, age_max))


@router.get("/account/settings", openapi_extra=document("The account's settings", scope="agent"))
async def get_settings(request: Request, owner: BookOwner) -> Response:
    """Show the settings and the levels that follow from them."""
    parts = parts_of(request)
    held = await book.read(parts.database, owner.agent_id)
    return wire.JsonResponse(replies.settings_reply(held, parts.market.view))


@router.patch(
    "/account/settings",
    openapi_extra=document("Change the account's settings", request=AccountSettingsIn, scope="agent"),
)
async def patch_settings(request: Request, owner: BookOwner) -> Response:
    """Set the fields given."""
    asked = await body_of(request, _SETTINGS)
    change = fields_given(asked)
    thresholds = change.pop("thresholds", None)
    if thresholds is not None:
        change |= fields_given(thresholds)

    async def effect(tx: Tx, held: Book, scene: Scene) -> Reply:
        changed = await account.change_settings(tx, scene, held, change)
        return Reply(replies.settings_reply(changed, scene.market))

    return await once(request, owner, effect)


@router.get("/portfolio/positions", openapi_extra=document("What uses the wallet, by service", scope="agent"))
async def list_portfolio(request: Request, owner: BookOwner) -> Response:
    """List open trading positions and every service's reservation, with the margin that each reserves."""
    parts = parts_of(request)
    held, figures = await read_account(parts, owner)
    return wire.JsonResponse({"positions": replies.portfolio_rows(held, figures, parts.market.view)})


@router.get("/positions", openapi_extra=document("Positions, open and closed", scope="agent"))
async def list_positions(request: Request, owner: BookOwner, limit: Limit = PAGE_MAX, cursor: Cursor = "") -> Response:
    """List positions, newest first."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await positions.list_positions(tx, owner.agent_id, limit, number_cursor(cursor))
    more = next_cursor([item.seq for item in found], limit)
    return wire.JsonResponse({"positions": [replies.stored_position(p) for p in found], "next_cursor": more})


@router.get("/positions/{position_id}", openapi_extra=document("A position", scope="agent"))
async def get_position(request: Request, owner: BookOwner, position_id: str) -> Response:
    """Show a position, open or closed."""
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        return wire.JsonResponse(replies.stored_position(await positions.get(tx, owner.agent_id, position_id)))
