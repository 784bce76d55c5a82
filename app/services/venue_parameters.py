"""The parameters of the venues' margin models, by venue and underlying, versioned with the market's others."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import msgspec
from sqlalchemy import insert

from app.db.tables import venue_parameters
from app.domain.margin.venues.registry import VENUES
from app.domain.parameters import MarketParameters
from app.errors import NotFoundError
from app.services import market_rules as rules
from app.services.parameter_versions import (
    Versioned,
    check_expected,
    latest,
    lock_parameters,
    next_version,
    row_at,
    version_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import ColumnElement

    from app.db.session import Tx
    from app.domain.margin.venues.terms import VenueParameters
    from app.domain.margin.venues.venue import Venue


async def stored_venues(tx: Tx, version: int) -> Mapping[str, Mapping[str, VenueParameters]]:
    """Return the parameters by venue and underlying as of a version, of the venues that this release knows."""
    found: dict[str, dict[str, VenueParameters]] = {}
    for row in await latest(tx, venue_parameters, ("venue", "underlying"), version):
        if row["venue"] in VENUES:
            found.setdefault(row["venue"], {})[row["underlying"]] = _read(VENUES[row["venue"]], row["parameters"])
    return MappingProxyType({name: MappingProxyType(rows) for name, rows in found.items()})


async def get_venue_parameters(tx: Tx, name: str, underlying: str, at: int | None = None) -> Versioned[VenueParameters]:
    """Return an underlying's own parameters, current or as of a version. Raises NotFoundError where it has none."""
    venue = _venue(name)
    row = await row_at(tx, venue_parameters, _key(name, underlying), at)
    if row is not None:
        return Versioned(_read(venue, row["parameters"]), row["version"])
    raise NotFoundError(f"{name} has no parameters of its own for {underlying}.", code="parameters_not_found")


async def put_venue_parameters(
    tx: Tx, name: str, underlying: str, change: Mapping[str, Any], expected: int | None = None
) -> Versioned[VenueParameters]:
    """Set parameters of an underlying; a new one starts from those for all others, else from the venue's first ones.

    A change of nothing writes nothing. Raises ConflictError when the stored version is not the expected one (0: none),
    InvalidError for what is out of range or contradicts another parameter.
    """
    venue = _venue(name)
    rules.check_symbol("/underlying", underlying)
    latest_version = await lock_parameters(tx)
    stored = await version_of(tx, venue_parameters, _key(name, underlying))
    check_expected(f"{name} {underlying}", stored, expected)
    market = MarketParameters(venues=await stored_venues(tx, latest_version))
    known = venue.known(market, underlying) or venue.parameters()
    merged = cast("VenueParameters", replace(known, **change))
    if stored and merged == known:
        return Versioned(merged, stored)
    rules.refuse(merged.faults())
    version = await next_version(tx, "venue", f"{name}:{underlying}")
    row = {"venue": name, "underlying": underlying, "version": version, "parameters": asdict(merged)}
    await tx.connection.execute(insert(venue_parameters), row)
    return Versioned(merged, version)


def _venue(name: str) -> Venue[Any, Any]:
    venue = VENUES.get(name)
    if venue is None:
        raise NotFoundError(f"There is no venue {name}.", code="venue_not_found")
    return venue


def _key(venue: str, underlying: str) -> ColumnElement[bool]:
    return (venue_parameters.c.venue == venue) & (venue_parameters.c.underlying == underlying)


def _read(venue: Venue[Any, Any], stored: Mapping[str, Any]) -> VenueParameters:
    """Return the stored parameters; a name that the database does not hold yet has its default."""
    return cast("VenueParameters", msgspec.convert(stored, venue.parameters))
