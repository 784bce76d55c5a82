"""The parameters of the venues' margin models, by venue and underlying."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api import body as wire
from app.api.deps import AdminCaller, AnyCaller, body_of, document, parts_of
from app.api.pages import NUMBER_MAX
from app.api.venue_wire import PARAMETERS_PUT, parameters_given
from app.domain.margin.venues.registry import VENUES
from app.domain.margin.venues.terms import VenueParameters
from app.services.parameter_versions import Versioned
from app.services.venue_parameters import get_venue_parameters, put_venue_parameters

router = APIRouter(prefix="/api/market", tags=["market"])

Version = Annotated[int | None, Query(ge=1, le=NUMBER_MAX, description="as of this version of the parameters")]


@router.get("/venues", openapi_extra=document("Parameters of the venues' margin models"))
async def list_venues(request: Request, _: AnyCaller) -> Response:
    """List the parameters by venue and underlying; `default` holds for every underlying that is not listed."""
    market = parts_of(request).market.view.parameters
    venues = {name: dict(venue.listed(market)) for name, venue in VENUES.items()}
    return wire.JsonResponse({"version": market.version, "venues": venues})


@router.get("/venues/{venue}/{underlying:path}", openapi_extra=document("A venue's parameters of an underlying"))
async def get_venue(
    request: Request, caller: AnyCaller, venue: str, underlying: str, version: Version = None
) -> Response:
    """Show an underlying's own parameters at a venue, now or as of a version."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await get_venue_parameters(tx, venue, underlying, version)
    return wire.JsonResponse(_resource(venue, underlying, found))


def _put(venue: str) -> Callable[..., Awaitable[Response]]:
    body: wire.Body[Any] = wire.Body(PARAMETERS_PUT[venue])

    async def put_venue(request: Request, caller: AdminCaller, underlying: str) -> Response:
        """Set the parameters given; the others keep their values, or the default's for a new underlying."""
        asked = await body_of(request, body)
        parts = parts_of(request)
        async with parts.database.transaction(caller.key_id) as tx:
            change = parameters_given(asked)
            stored = await put_venue_parameters(tx, venue, underlying, change, asked.version)
        await parts.market.refresh()
        return wire.JsonResponse(_resource(venue, underlying, stored))

    return put_venue


for _name in VENUES:
    # a route a venue, since each has parameters, and so a body, of its own
    router.put(
        f"/venues/{_name}/{{underlying:path}}",
        openapi_extra=document(
            f"Set {_name}'s parameters of an underlying", request=PARAMETERS_PUT[_name], scope="admin"
        ),
    )(_put(_name))


def _resource(venue: str, underlying: str, found: Versioned[VenueParameters]) -> dict[str, Any]:
    return {"id": f"{venue}:{underlying}", "venue": venue, "version": found.version, **asdict(found.value)}
