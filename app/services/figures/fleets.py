"""Fleets: in which zone they are, what is delegated, drawn and left of their wallets, whose dry powder is out."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from prometheus_client import Metric

from app.db.session import Tx
from app.domain.health import ZONES
from app.domain.money import to_float
from app.services import fleet_totals
from app.services.figures.keep import Figure, Values, earliest, gauge, seconds_since

EVERY_SECONDS = 2.0
WALLET = ("balance", "delegated", "drawn", "available", "dry_powder")


async def take(tx: Tx, _: Values) -> Values:
    """Return fleets by zone, members by state, the sums of their wallets, and what is out of the ordinary."""
    found = await fleet_totals.totals(tx)
    return {
        "zones": {zone: found.zones.get(zone, 0) for zone in ZONES},
        "members": dict(found.members),
        "wallets": {name: to_float(getattr(found, name)) for name in WALLET},
        "released": found.released,
        "released_at": earliest([found.released_at]),
        "drifting": found.drifting,
    }


def show(values: Values, now: datetime) -> Iterable[Metric]:
    """Return the series of fleets."""
    yield gauge("primerisk_fleets", "Fleets by zone, as last told.", values["zones"], "zone")
    yield gauge("primerisk_fleet_members", "Members of fleets, by state.", values["members"], "state")
    yield gauge(
        "primerisk_fleet_usdc",
        "Of all fleets: balance of the wallets, what is delegated, drawn, still available, and left of the dry powder.",
        values["wallets"],
        "kind",
    )
    yield gauge("primerisk_fleets_released", "Fleets whose dry powder is released.", values["released"])
    yield gauge(
        "primerisk_fleet_release_seconds",
        "How long the dry powder that was released first has been out.",
        seconds_since(values["released_at"], now),
    )
    yield gauge("primerisk_fleets_drifting", "Fleets whose correlations have drifted.", values["drifting"])


FIGURE = Figure("fleets", EVERY_SECONDS, take, show)
