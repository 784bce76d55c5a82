"""What a fleet's wallet allows, and what is said where it does not: of draws, and of delegations."""

from __future__ import annotations

from decimal import Decimal

from sqlalchemy import text

from app.db.session import Tx
from app.domain.book import ZERO, permits
from app.domain.money import plain
from app.domain.moves import SETTLEMENT_ASSET
from app.errors import ConflictError, conflict
from app.services import wallet


def reachable(held: Decimal, drawn: Decimal, dry_powder: Decimal, *, released: bool) -> Decimal:
    """Return what all members together may have drawn, of what the master holds and they have drawn."""
    return max(ZERO, (held + drawn) * (1 if released else 1 - dry_powder))


_STANDING = text(
    """
    SELECT f.drawn AS fleet_drawn, f.dry_powder, f.released_at, m.drawn, m.max_margin, m.reduce_only, m.services,
           (SELECT coalesce(sum(CASE WHEN bucket IN ('owed', 'borrowed') THEN -amount ELSE amount END), 0)
            FROM balances WHERE agent_id = :master AND asset = :asset) AS held
    FROM fleets f JOIN fleet_members m ON m.fleet_id = f.id
    WHERE f.master_id = :master AND m.agent_id = :member
    """
)


async def refused(tx: Tx, master_id: str, agent_id: str, service: str, amount: Decimal) -> ConflictError:
    """Return which limit stands against a draw."""
    values = {"master": master_id, "member": agent_id, "asset": SETTLEMENT_ASSET}
    row = (await tx.connection.execute(_STANDING, values)).one()
    if not permits(row.services, service):
        return wallet.not_delegated(service)
    if row.reduce_only:
        return conflict("/amount", "reduce_only", "the fleet's coordinator has it reduce only")
    own, needed = max(ZERO, row.max_margin - row.drawn), plain(amount)
    if amount > own:
        detail = f"{needed:f} {SETTLEMENT_ASSET} more are needed, {plain(own):f} of the delegation are left"
        return conflict("/amount", "delegation_exhausted", detail, available=plain(own), needed=needed)
    reach = reachable(row.held, row.fleet_drawn, row.dry_powder, released=row.released_at is not None)
    left = max(ZERO, reach - row.fleet_drawn)
    detail = f"{needed:f} {SETTLEMENT_ASSET} more are needed, {plain(left):f} of the fleet's are above its dry powder"
    return conflict("/amount", "fleet_exhausted", detail, available=plain(left), needed=needed)


def over_delegated(more: Decimal, delegated: Decimal, reach: Decimal) -> ConflictError:
    """Return the refusal to delegate more than is free of what the master can reach."""
    free = plain(max(ZERO, reach - delegated))
    reached = f"{plain(delegated):f} of {plain(reach):f} {SETTLEMENT_ASSET} within reach are delegated"
    detail = f"{reached}: {free:f} are free, {plain(more):f} more are asked for"
    return conflict("/max_margin", "over_delegated", detail, available=free, needed=plain(more))
