"""All fleets, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from sqlalchemy import Text, bindparam, text

from app.db.session import Tx
from app.domain.moves import SETTLEMENT_ASSET


@dataclass(frozen=True, slots=True)
class FleetTotals:
    """Fleets by zone, members by state; sums of all wallets, USDC; whose dry powder is out, whose correlations drift.

    `delegated` are lines, and may add up to more than there is. `available` is what may still be drawn, `dry_powder`
    what of it is left that none may. `released_at` is the earliest release.
    """

    zones: Mapping[str, int]
    members: Mapping[str, int]
    balance: Decimal
    delegated: Decimal
    drawn: Decimal
    available: Decimal
    dry_powder: Decimal
    released: int
    released_at: datetime | None
    drifting: int


_ZONES = text("SELECT zone, count(*) AS fleets FROM fleets GROUP BY zone")
_MEMBERS = text(
    """
    SELECT count(*) FILTER (WHERE joined_at IS NOT NULL AND NOT reduce_only) AS active,
           count(*) FILTER (WHERE reduce_only) AS reduce_only,
           count(*) FILTER (WHERE joined_at IS NULL) AS invited,
           coalesce(sum(max_margin) FILTER (WHERE joined_at IS NOT NULL), 0) AS delegated
    FROM fleet_members
    """
)
_WALLETS = text(
    """
    WITH wallets AS (
        SELECT f.drawn, f.dry_powder, f.released_at, f.drifted_at, (
            SELECT coalesce(sum(CASE WHEN bucket IN ('owed', 'borrowed') THEN -amount ELSE amount END), 0)
            FROM balances b WHERE b.agent_id = f.master_id AND b.asset = :asset) AS held
        FROM fleets f
    ), kept AS (
        SELECT *, greatest(0, held + drawn) AS balance,
               CASE WHEN released_at IS NULL THEN dry_powder ELSE 0 END AS share
        FROM wallets
    )
    SELECT coalesce(sum(balance), 0) AS balance, coalesce(sum(drawn), 0) AS drawn,
           coalesce(sum(greatest(0, balance * (1 - share) - drawn)), 0) AS available,
           coalesce(sum(greatest(0, least(held, balance * dry_powder))), 0) AS dry_powder,
           count(released_at) AS released, min(released_at) AS released_at, count(drifted_at) AS drifting
    FROM kept
    """
).bindparams(bindparam("asset", type_=Text))


async def totals(tx: Tx) -> FleetTotals:
    """Return what all fleets of the service come to."""
    zones = {row.zone: row.fleets for row in await tx.connection.execute(_ZONES)}
    members = dict((await tx.connection.execute(_MEMBERS)).mappings().one())
    delegated = members.pop("delegated")
    wallets = (await tx.connection.execute(_WALLETS, {"asset": SETTLEMENT_ASSET})).mappings().one()
    return FleetTotals(zones=zones, members=members, delegated=delegated, **wallets)
