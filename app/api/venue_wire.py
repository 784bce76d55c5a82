"""A venue's parameters and inputs on the wire: made from the domain's dataclasses, so that neither lacks a field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import GenericAlias
from typing import Annotated, Any, cast, get_type_hints

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from app.api.body import Request
from app.domain.margin.venues.registry import VENUES
from app.domain.margin.venues.terms import VenueInputs, VenueParameters
from app.domain.margin.venues.venue import Venue
from app.domain.parameters import MarketParameters
from app.errors import invalid, pointer_to, pointers_under
from app.services import market_rules

UNDERLYINGS_MAX = 500
"""Underlyings that a request may say something of, at one venue."""

Underlying = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}(?!\n)$")]


def _name(venue: str) -> str:
    return venue.capitalize()


def _parameters_type(venue: Venue[Any, Any]) -> type[Struct]:
    hints = get_type_hints(venue.parameters)
    names = [(f.name, hints[f.name] | UnsetType, UNSET) for f in fields(venue.parameters)]
    namespace = {"__doc__": f"Parameters of {venue.name} for one underlying; those left out stay as they are."}
    return msgspec.defstruct(f"{_name(venue.name)}ParametersIn", names, bases=(Request,), namespace=namespace)


PARAMETERS_IN: Mapping[str, type[Struct]] = {name: _parameters_type(venue) for name, venue in VENUES.items()}


def _put_type(venue: Venue[Any, Any]) -> type[Struct]:
    doc = f"PUT /api/market/venues/{venue.name}/{{underlying}}; `version`, when given, must be the stored one."
    return msgspec.defstruct(
        f"{_name(venue.name)}ParametersPut",
        [("version", Annotated[int, Meta(ge=0)] | None, None)],
        bases=(PARAMETERS_IN[venue.name],),
        namespace={"__doc__": doc},
    )


PARAMETERS_PUT: Mapping[str, type[Struct]] = {name: _put_type(venue) for name, venue in VENUES.items()}


def _unit_type(venue: Venue[Any, Any]) -> type[Struct]:
    hints = get_type_hints(venue.inputs)
    names = [(f.name, hints[f.name], None) for f in fields(venue.inputs)]
    return msgspec.defstruct(
        f"{_name(venue.name)}UnitIn",
        [*names, ("parameters", PARAMETERS_IN[venue.name] | None, None)],
        bases=(Request,),
        namespace={"__doc__": f"What a quote says of one underlying at {venue.name}, and parameters of its own."},
    )


_UNIT_TYPES: dict[str, Any] = {name: _unit_type(venue) for name, venue in VENUES.items()}
VenuesIn = msgspec.defstruct(
    "VenuesIn",
    [(name, GenericAlias(dict, (Underlying, unit)) | None, None) for name, unit in _UNIT_TYPES.items()],
    bases=(Request,),
    namespace={"__doc__": "What a quote says of underlyings, by venue."},
)


def check_venue_lengths(given: Struct | None) -> None:
    """Refuse a venue with more underlyings than the limit. Raises InvalidError."""
    for name in VENUES if given is not None else ():
        units = getattr(given, name)
        if units is not None and len(units) > UNDERLYINGS_MAX:
            detail = f"at most {UNDERLYINGS_MAX} items, not {len(units)}"
            raise invalid(pointer_to("market", "venues", name), "too_many_items", detail)


def venue_inputs(given: Struct | None) -> dict[str, dict[str, VenueInputs]]:
    """Return what the request knows by venue and underlying. Raises InvalidError with pointers."""
    found: dict[str, dict[str, VenueInputs]] = {}
    for name, underlying, unit in _units(given):
        known = [f.name for f in fields(VENUES[name].inputs)]
        inputs = cast("VenueInputs", VENUES[name].inputs(**{field: getattr(unit, field) for field in known}))
        with pointers_under(pointer_to("market", "venues", name, underlying)):
            market_rules.refuse(inputs.faults())
        found.setdefault(name, {})[underlying] = inputs
    return found


def venue_parameters(market: MarketParameters, given: Struct | None) -> Mapping[str, Mapping[str, VenueParameters]]:
    """Return the venues' parameters with the request's own. Raises InvalidError with pointers."""
    changed = {name: dict(rows) for name, rows in market.venues.items()}
    for name, underlying, unit in _units(given):
        if unit.parameters is not None:
            merged = merged_parameters(VENUES[name], market, underlying, parameters_given(unit.parameters))
            with pointers_under(pointer_to("market", "venues", name, underlying, "parameters")):
                market_rules.refuse(merged.faults())
            changed.setdefault(name, {})[underlying] = merged
    return changed


def parameters_given(own: Struct) -> dict[str, Any]:
    """Return the parameters that a body sets."""
    names = (name for name in own.__struct_fields__ if name != "version")
    return {name: value for name in names if (value := getattr(own, name)) is not UNSET}


def merged_parameters(
    venue: Venue[Any, Any], market: MarketParameters, underlying: str, change: Mapping[str, Any]
) -> VenueParameters:
    """Return an underlying's parameters with the change; one without any begins with those of the venue's type."""
    known = venue.known(market, underlying) or venue.parameters()
    return cast("VenueParameters", replace(known, **change))


def _units(given: Struct | None) -> list[tuple[str, str, Any]]:
    """Return (venue, underlying, what is said of it) of all units of the request; of the last the type is made here."""
    if given is None:
        return []
    return [(name, key, unit) for name in VENUES for key, unit in (getattr(given, name) or {}).items()]
