"""The versioned parameters of the market: assets, instruments and models."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response

from app.api import body as wire
from app.api.deps import AdminCaller, AnyCaller, Parts, body_of, document, parts_of
from app.api.pages import NUMBER_MAX, PAGE_MAX, Cursor, Limit, number_cursor
from app.api.quote_reply import market_parameters_reply
from app.api.quote_request import AssetIn, InstrumentIn, fields_given, instrument_fields
from app.domain.parameters import MarketParameters
from app.errors import pointer_to, pointers_under
from app.services import market

router = APIRouter(prefix="/api/market", tags=["market"])

Version = Annotated[int | None, Query(ge=1, le=NUMBER_MAX, description="as of this version of the parameters")]


class AssetPut(AssetIn):
    """PUT /api/market/assets/{asset}; `version`, when given, must be the stored one."""

    version: Annotated[int, Meta(ge=0)] | UnsetType = UNSET


class InstrumentPut(InstrumentIn):
    """PUT /api/market/instruments/{symbol}; `version`, when given, must be the stored one."""

    version: Annotated[int, Meta(ge=0)] | UnsetType = UNSET


class AssetsPut(wire.Request):
    """PUT /api/market/assets: many at once, each as a single one is set."""

    assets: dict[str, AssetPut]


class InstrumentsPut(wire.Request):
    """PUT /api/market/instruments: many at once, each as a single one is set."""

    instruments: dict[str, InstrumentPut]


class ParametersPut(wire.Request):
    """PUT /api/market/parameters: factors of the models and thresholds by name."""

    parameters: dict[str, float]
    version: Annotated[int, Meta(ge=0)] | None = None


class CorrelationPut(wire.Request):
    """PUT /api/market/correlations: one pair of a matrix, or (pair left out, no regime) what every other pair has."""

    matrix: Literal["stress", "hedge", "normal", "sideways", "sell_off", "liquidity_crisis"]
    value: float
    pair: Annotated[list[str], Meta(min_length=2, max_length=2)] | None = None
    version: Annotated[int, Meta(ge=0)] | None = None


_ASSET = wire.Body(AssetPut)
_INSTRUMENT = wire.Body(InstrumentPut)
_ASSETS = wire.Body(AssetsPut)
_INSTRUMENTS = wire.Body(InstrumentsPut)
_PARAMETERS = wire.Body(ParametersPut)
_CORRELATION = wire.Body(CorrelationPut)


@router.get("/assets", openapi_extra=document("Parameters of assets"))
async def list_assets(request: Request, _: AnyCaller, limit: Limit = PAGE_MAX, cursor: Cursor = "") -> Response:
    """List the assets by name; `default` holds for every asset that is not listed."""
    view = parts_of(request).market.view.parameters
    assets = {**view.assets, view.default_asset.asset: view.default_asset}
    return _page("assets", {name: _resource(name, asdict(a)) for name, a in assets.items()}, limit, cursor)


@router.put("/assets", openapi_extra=document("Set parameters of many assets", request=AssetsPut, scope="admin"))
async def put_assets(request: Request, caller: AdminCaller) -> Response:
    """Set the fields given of each asset, all under one new version, or nothing where one of them is refused."""
    asked = await body_of(request, _ASSETS)
    entries = {name: market.Entry(*_change_of(fields)) for name, fields in asked.assets.items()}
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        with pointers_under("/assets"):
            done = await market.put_assets(tx, entries)
    await parts.market.refresh()
    return wire.JsonResponse(done)


@router.get("/assets/{asset}", openapi_extra=document("Parameters of an asset"))
async def get_asset(request: Request, caller: AnyCaller, asset: str, version: Version = None) -> Response:
    """Show one listed asset, now or as of a version."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await market.get_asset(tx, asset, version)
    return wire.JsonResponse(_resource(asset, asdict(found.value), found.version))


@router.put("/assets/{asset}", openapi_extra=document("Set parameters of an asset", request=AssetPut, scope="admin"))
async def put_asset(request: Request, caller: AdminCaller, asset: str) -> Response:
    """Set the fields given; the others keep their values, or the default's for a new asset."""
    asked = await body_of(request, _ASSET)
    change, expected = _change_of(asked)
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        stored = await market.put_asset(tx, asset, change, expected)
    await parts.market.refresh()
    return wire.JsonResponse(_resource(asset, asdict(stored.value), stored.version))


@router.get("/instruments", openapi_extra=document("Parameters of instruments"))
async def list_instruments(request: Request, _: AnyCaller, limit: Limit = PAGE_MAX, cursor: Cursor = "") -> Response:
    """List the instruments by symbol; a rate that is null is the underlying asset's."""
    view = parts_of(request).market.view.parameters
    items = {symbol: _resource(symbol, asdict(i)) for symbol, i in view.instruments.items()}
    return _page("instruments", items, limit, cursor)


@router.put(
    "/instruments",
    openapi_extra=document("Set parameters of many instruments", request=InstrumentsPut, scope="admin"),
)
async def put_instruments(request: Request, caller: AdminCaller) -> Response:
    """Set the fields given of each instrument, all under one new version, or nothing where one of them is refused."""
    asked = await body_of(request, _INSTRUMENTS)
    entries = {}
    for symbol, fields in asked.instruments.items():
        with pointers_under(pointer_to("instruments", symbol)):
            entries[symbol] = market.Entry(*_change_of(fields))
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        with pointers_under("/instruments"):
            done = await market.put_instruments(tx, entries)
    await parts.market.refresh()
    return wire.JsonResponse(done)


@router.get("/instruments/{symbol:path}", openapi_extra=document("Parameters of an instrument"))
async def get_instrument(request: Request, caller: AnyCaller, symbol: str, version: Version = None) -> Response:
    """Show one listed instrument, now or as of a version."""
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        found = await market.get_instrument(tx, symbol, version)
    return wire.JsonResponse(_resource(symbol, asdict(found.value), found.version))


@router.put(
    "/instruments/{symbol:path}",
    openapi_extra=document("Set parameters of an instrument", request=InstrumentPut, scope="admin"),
)
async def put_instrument(request: Request, caller: AdminCaller, symbol: str) -> Response:
    """Set the fields given; underlying and kind are fixed once the instrument is listed."""
    asked = await body_of(request, _INSTRUMENT)
    change, expected = _change_of(asked)
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        stored = await market.put_instrument(tx, symbol, change, expected)
    await parts.market.refresh()
    return wire.JsonResponse(_resource(symbol, asdict(stored.value), stored.version))


@router.get("/parameters", openapi_extra=document("Factors, thresholds and correlations"))
async def get_parameters(request: Request, caller: AnyCaller, version: Version = None) -> Response:
    """Show every factor, threshold and correlation, now or as of a version."""
    return wire.JsonResponse(market_parameters_reply(await _parameters(parts_of(request), caller.key_id, version)))


@router.put("/parameters", openapi_extra=document("Set factors and thresholds", request=ParametersPut, scope="admin"))
async def put_parameters(request: Request, caller: AdminCaller) -> Response:
    """Set the factors and thresholds given, all under one new version."""
    change = await body_of(request, _PARAMETERS)
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        with pointers_under("/parameters"):
            await market.put_model_parameters(tx, change.parameters, change.version)
    return wire.JsonResponse(market_parameters_reply((await parts.market.refresh()).parameters))


@router.put("/correlations", openapi_extra=document("Set a correlation", request=CorrelationPut, scope="admin"))
async def put_correlation(request: Request, caller: AdminCaller) -> Response:
    """Set one pair's correlation in the stress matrix, the hedge matrix or that of a regime."""
    change = await body_of(request, _CORRELATION)
    pair = None if change.pair is None else (change.pair[0], change.pair[1])
    parts = parts_of(request)
    async with parts.database.transaction(caller.key_id) as tx:
        await market.put_correlation(tx, change.matrix, pair, change.value, change.version)
    return wire.JsonResponse(market_parameters_reply((await parts.market.refresh()).parameters))


@router.get("/changes", openapi_extra=document("Who changed which parameter"))
async def list_changes(request: Request, caller: AnyCaller, limit: Limit = PAGE_MAX, cursor: Cursor = "") -> Response:
    """List the versions, newest first, with who made each."""
    before = number_cursor(cursor)
    async with parts_of(request).database.transaction(caller.key_id) as tx:
        changes = await market.list_changes(tx, limit, before)
    last = str(changes[-1].version) if len(changes) == limit else None
    items = [{"id": str(c.version), **asdict(c)} for c in changes]
    return wire.JsonResponse({"changes": items, "next_cursor": last})


async def _parameters(parts: Parts, actor: str, version: int | None) -> MarketParameters:
    if version is None:
        return parts.market.view.parameters
    async with parts.database.transaction(actor) as tx:
        return await market.load_parameters(tx, version)


def _change_of(given: AssetPut | InstrumentPut) -> tuple[Any, int | None]:
    """Return the fields to set, and the version that the caller expects."""
    fields = instrument_fields(given) if isinstance(given, InstrumentPut) else fields_given(given)
    expected: int | None = fields.pop("version", None)
    return fields, expected


def _resource(name: str, fields: Mapping[str, Any], version: int | None = None) -> dict[str, Any]:
    known = {"id": name, **fields}
    return known if version is None else {**known, "version": version}


def _page(noun: str, items: Mapping[str, Any], limit: int, cursor: str) -> Response:
    """Return the page of the items, by name, that follow the cursor (the last name of the page before)."""
    names = sorted(items)
    start = bisect_right(names, cursor) if cursor else 0
    page = names[start : start + limit]
    more = start + limit < len(names)
    return wire.JsonResponse({noun: [items[name] for name in page], "next_cursor": page[-1] if more else None})
