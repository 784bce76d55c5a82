"""Daily closes: posted in bulk, listed by asset and day."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from msgspec import Meta
from starlette.responses import Response

from app.api import body as wire
from app.api.deps import AnyCaller, MarketCaller, body_of, document, parts_of
from app.api.pages import PAGE_MAX, Limit, invalid_cursor
from app.domain.closes import Close, Gap
from app.errors import InvalidError, invalid
from app.services import closes

router = APIRouter(prefix="/api/market/history", tags=["market"])

FLAGGED_SHOWN_MAX = 200
"""Findings and gaps that a reply lists; it counts them all."""

_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_Asset = Annotated[str | None, Query(max_length=64, pattern=r"^[ -~]*$", description="of this asset alone")]
_From = Annotated[str | None, Query(alias="from", max_length=10, description="from this day on")]
_To = Annotated[str | None, Query(max_length=10, description="up to this day, included")]
# a day and the name of an asset, longer than the cursors of other lists
_Cursor = Annotated[str, Query(max_length=75, pattern=r"^[ -~]*$", description="next_cursor of the page before")]


class CloseIn(wire.Request):
    """The last price of an asset on a UTC day, such as 2024-12-31."""

    asset: str
    date: Annotated[str, Meta(max_length=10, extra_json_schema={"format": "date"})]
    close: wire.Number


class HistoryPost(wire.Request):
    """POST /api/market/history; `confirm` stores what is off its history, or differs from what is stored, as well."""

    closes: list[CloseIn]
    confirm: bool = False


_HISTORY = wire.Body(HistoryPost)


@router.post("", openapi_extra=document("Post daily closes", request=HistoryPost, scope="market"))
async def post_history(request: Request, caller: MarketCaller) -> Response:
    """Store daily closes, all or none of them; what is stored already is left as it is."""
    asked = await body_of(request, _HISTORY)
    if len(asked.closes) > closes.CLOSES_A_POST_MAX:
        raise invalid("/closes", "too_many", f"At most {closes.CLOSES_A_POST_MAX} closes a post.")
    posted = [_close(i, given) for i, given in enumerate(asked.closes)]
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        done = await closes.post_closes(
            tx, posted, confirm=asked.confirm, deviations_max=parts.settings.close_deviations_max
        )
    return wire.JsonResponse(
        {
            "version": done.version,
            "stored": done.stored,
            "changed": done.changed,
            "unchanged": done.unchanged,
            "flagged_count": len(done.flagged),
            "flagged": [_flagged(finding) for finding in done.flagged[:FLAGGED_SHOWN_MAX]],
            "gaps_count": len(done.gaps),
            "gaps": _gaps(done.gaps[:FLAGGED_SHOWN_MAX]),
        }
    )


@router.get("", openapi_extra=document("Daily closes"))
async def list_history(
    request: Request,
    caller: AnyCaller,
    asset: _Asset = None,
    from_: _From = None,
    to: _To = None,
    limit: Limit = PAGE_MAX,
    cursor: _Cursor = "",
) -> Response:
    """List daily closes by asset and day, earliest first."""
    first = None if from_ is None else _day(from_, "/from")
    last = None if to is None else _day(to, "/to")
    after = _after(cursor) if cursor else None
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await closes.list_closes(tx, limit, asset=asset, first=first, last=last, after=after)
    more = f"{found[-1].day}{found[-1].asset}" if len(found) == limit else None
    return wire.JsonResponse({"closes": [_shown(close) for close in found], "next_cursor": more})


def _close(row: int, given: CloseIn) -> Close:
    where = f"/closes/{row}"
    return Close(given.asset, _day(given.date, f"{where}/date"), wire.exact(given.close, f"{where}/close"))


def _day(text: str, pointer: str) -> date:
    if _DAY.fullmatch(text):
        try:
            return date.fromisoformat(text)
        except ValueError:
            pass  # such as the 30th of February: refused like any other text below
    raise invalid(pointer, "invalid_value", "a day is written like 2024-12-31")


def _after(cursor: str) -> tuple[str, date]:
    try:
        return cursor[10:], _day(cursor[:10], "/cursor")
    except InvalidError:
        raise invalid_cursor() from None


def _shown(close: Close) -> dict[str, Any]:
    return {"id": f"{close.asset}:{close.day}", "asset": close.asset, "date": close.day, "close": close.close}


def _flagged(finding: closes.Finding) -> dict[str, Any]:
    known = asdict(finding)
    return {"pointer": f"/closes/{known.pop('row')}/close", "date": known.pop("day"), **known}


def _gaps(gaps: Sequence[Gap]) -> list[dict[str, Any]]:
    return [{"asset": gap.asset, "from": gap.first, "to": gap.last, "days": gap.days} for gap in gaps]
