"""What is done for an account before a margin call has to be made: the cuts of the drawdown ladder."""

from __future__ import annotations

from collections.abc import Collection
from decimal import Decimal

from app.db.session import Tx
from app.domain import ladder
from app.domain.book import Book
from app.domain.quote import AccountFigures
from app.domain.trade import plan
from app.services import accounts, audit, trading, watch
from app.services.margin import Scene, by_mark, forced_price
from app.services.orders import Labels
from app.services.wallet import Names
from app.services.watch import Watch

REASON = "drawdown_ladder"


def is_due(held: Book, seen: Watch) -> bool:
    """Whether a rung is to be acted on: once a fall, where the account says so. One at a venue is only told."""
    settings = held.settings
    return settings.drawdown_ladder == "apply" and settings.execution == "book" and seen.rung > seen.rung_applied


async def step_down(
    tx: Tx,
    scene: Scene,
    held: Book,
    figures: AccountFigures,
    seen: Watch,
    slippage: Decimal,
    stale: Collection[str] = (),
) -> None:
    """Cut what the rung asks for. The book is held; nothing is sold at a stale mark."""
    policy = held.settings.policy(scene.market.parameters.policy)
    asked = ladder.plan(held, figures, policy, seen.rung, seen.rung_applied)
    await accounts.lock_account(tx, held.agent_id)
    for cut in asked.cuts:
        symbol = cut.position.symbol
        if {symbol, scene.market.parameters.underlying_of(symbol)} & set(stale):
            continue
        contract, mark = by_mark(scene.market, symbol)
        price = forced_price(mark.exact, cut.position.side, slippage)
        trade = plan(held, cut.order, contract, price, "", tx.now)
        held = (await trading.fill(tx, held, cut.order, trade, Names(), Labels(REASON))).book
    await watch.note_applied(tx, held.agent_id, seen.rung)
    name = ladder.RUNGS[seen.rung]
    await audit.record(tx, "drawdown_ladder.applied", held.agent_id, held.agent_id, rung=name, orders=len(asked.cuts))
