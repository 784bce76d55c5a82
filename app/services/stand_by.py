"""What a fleet does for a pooled member in breach before anything of it is sold: it lets it draw what it lacks."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal

from app.db.session import Tx
from app.domain.book import ZERO, Book
from app.domain.money import to_decimal
from app.domain.moves import SETTLEMENT_ASSET
from app.services import delegation
from app.services.delegation import Pair
from app.services.margin import Scene

_CENT = Decimal("0.01")


def lacks(scene: Scene, held: Book) -> Decimal:
    """Return the USDC that would bring an account in breach to its cure level, in whole cents; 0 for one that is not.

    Nothing before there is a call, so that its owner hears of it, and nothing once that has expired: whoever decides on
    that draws what there is to be drawn. Raises ConflictError on stale prices.
    """
    if held.live_call not in ("noticed", "open"):
        return ZERO
    policy = held.settings.policy(scene.market.parameters.policy)
    health = scene.figures(held).health
    if health.utilization is not None and health.utilization < policy.breach_utilization:
        return ZERO
    return missing(scene, held, policy.cure_utilization)


def missing(scene: Scene, held: Book, level: float) -> Decimal:
    """Return the USDC that brings utilization to a level, in whole cents. Raises ConflictError on stale prices.

    0 for who has lost more than all it had: the fleet's money would fill that hole first. It is contained instead.
    """
    figures = scene.figures(held)
    scene.require_fresh(figures)
    if figures.health.equity < 0.0:
        return ZERO
    worth = scene.worth(SETTLEMENT_ASSET, Decimal(1))
    lack = max(0.0, figures.health.required_initial / level - figures.health.equity)
    return to_decimal(lack / worth).quantize(_CENT, ROUND_CEILING) if worth > 0.0 else ZERO


def service_of(held: Book) -> str:
    """Return in the name of which service a member draws what it lacks."""
    services = held.delegation.services if held.delegation is not None else ()
    return services[0] if services else delegation.SERVICE


async def stand_by(tx: Tx, scene: Scene, pair: Pair) -> Decimal:
    """Draw what a pooled member in breach lacks, as far as its delegation goes; both are locked. Return how much.

    Raises ConflictError where the delegation, the fleet or the master's own book can't spare it.
    """
    held = pair.member
    if held.delegation is None or not held.delegation.is_pooled:
        return ZERO
    amount = lacks(scene, held)
    if amount > 0:
        await delegation.draw(tx, scene, pair, service_of(held), amount)
    return amount
