"""Escrows and netting agreements: what is open and what it is worth, what is late, in dispute or in default."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import get_args

from prometheus_client import Metric

from app.db.session import Tx
from app.domain.escrow import LIVE_STATES
from app.domain.money import to_float
from app.services import agreements, escrows, market, prices
from app.services.figures.keep import Figure, Values, earliest, gauge, seconds_since

EVERY_SECONDS = 2.0
AGREEMENTS = tuple(state for state in get_args(agreements.State) if state != "ended")


async def take(tx: Tx, _: Values) -> Values:
    """Return what is open by state, its worth by kind of asset, and since when the oldest of each trouble lasts."""
    outstanding = await escrows.outstanding(tx)
    disputed_at, due_at = await escrows.oldest(tx)
    standing = await agreements.standing(tx)
    defaulted = standing.get("defaulted")
    return {
        "escrows": {state: sum(row[2] for row in outstanding if row[0] == state) for state in LIVE_STATES},
        "worth": await _worth(tx, [(asset, amount) for _, asset, _, amount in outstanding]),
        "disputed_at": earliest([disputed_at]),
        "defaulted_at": earliest([defaulted.defaulted_at if defaulted else None]),
        "action_at": earliest([due_at, *(of.next_action_at for of in standing.values())]),
        "agreements": {state: standing[state].agreements if state in standing else 0 for state in AGREEMENTS},
        "obligations": sum(of.obligations for of in standing.values()),
    }


async def _worth(tx: Tx, amounts: Sequence[tuple[str, Decimal]]) -> dict[str, float]:
    """Return what amounts come to by kind of asset, USD; what has no price counts nothing."""
    assets = sorted({asset for asset, _ in amounts})
    worth, stable = await prices.worth(tx, assets), await market.stablecoins(tx, assets)
    total = {"stable": 0.0, "coin": 0.0}
    for asset, amount in amounts:
        total["stable" if asset in stable else "coin"] += to_float(amount) * worth.get(asset, 0.0)
    return total


def show(values: Values, now: datetime) -> Iterable[Metric]:
    """Return the series of clearing."""
    yield gauge("primerisk_escrows_open", "Escrows that are not over, by state.", values["escrows"], "state")
    yield gauge(
        "primerisk_escrow_outstanding_usd",
        "What payers have set aside in open escrows, USD at stored prices, by kind of asset: stable, coin.",
        values["worth"],
        "kind",
    )
    yield gauge(
        "primerisk_escrow_dispute_seconds",
        "How long the oldest dispute has gone on.",
        seconds_since(values["disputed_at"], now),
    )
    yield gauge(
        "primerisk_netting_agreements",
        "Netting agreements that have not ended, by state.",
        values["agreements"],
        "state",
    )
    yield gauge("primerisk_netting_obligations_open", "Obligations that wait for a run.", values["obligations"])
    yield gauge(
        "primerisk_netting_default_seconds",
        "How long the agreement that has been in default the longest has been so.",
        seconds_since(values["defaulted_at"], now),
    )
    yield gauge(
        "primerisk_clearing_action_late_seconds",
        "How long the time-out or cut-off that is most overdue has been due.",
        seconds_since(values["action_at"], now),
    )


FIGURE = Figure("clearing", EVERY_SECONDS, take, show)
