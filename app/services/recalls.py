"""What a margin call does about its account's lending, before any position is touched.

Loans that can be had back within a day are wanted back, the smallest first, until they are worth the shortfall. Here
they are only marked so, and due: a recall is told to the borrower too, whose account is not locked here. Whoever keeps
the loans takes them next, each under the locks of both parties.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from app.db.session import Tx
from app.domain.book import Book
from app.domain.lending import recalls_for
from app.domain.money import plain
from app.domain.quote import AccountFigures
from app.services import lending, loans
from app.services.margin import Scene
from app.services.wallet import Names

PATIENCE = timedelta(seconds=5)
"""How long liquidation waits for loans to be recalled after a call has expired: one that can't be holds up no more."""
RETRY = timedelta(milliseconds=200)


async def arm(
    tx: Tx, scene: Scene, held: Book, figures: AccountFigures, call_id: str, cause: str
) -> list[dict[str, Any]]:
    """Mark the loans that a call wants back, and return what is told of them. The account is locked."""
    if cause == "isolated" or not held.loans:
        return []
    prices = {loan.asset: scene.price(loan.asset) for loan in held.loans}
    chosen = recalls_for(held.loans, prices, figures.health.shortfall)
    if chosen:
        await loans.want_back(tx, held.agent_id, [loan.id for loan in chosen], call_id, scene.now)
    return [
        {
            "loan_id": loan.id,
            "asset": loan.asset,
            "amount": plain(loan.principal),
            "recall_notice_hours": loan.notice_seconds / 3600,
        }
        for loan in chosen
    ]


async def withdraw_offers(tx: Tx, scene: Scene, held: Book, call_id: str, cause: str) -> tuple[Book, list[str]]:
    """Withdraw an account's open offers: from now on it may only reduce. Return its book and the offers' ids."""
    if cause == "isolated" or not any(holding.offered > 0 for holding in held.holdings.values()):
        return held, []
    return await lending.cancel_all(tx, scene, held, Names(reference=call_id))


async def are_awaited(tx: Tx, held: Book, expired_at: datetime | None, now: datetime) -> bool:
    """Whether loans are still to be recalled before a position is touched."""
    if not held.loans or expired_at is None or now - expired_at >= PATIENCE:
        return False
    return await loans.any_wanted(tx, held.agent_id)
