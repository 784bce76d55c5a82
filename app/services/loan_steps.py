"""What becomes of a loan by itself: interest is paid, recalls fall due, collateral falls short.

`decide` is the one place. Timers and the watch over prices only name loans to it: it locks both parties and the
market, reads them and the prices afresh, asks the pure step, and writes what follows, the ledger's entries, the loan's
timer and the events to both parties in one transaction. Asking twice, late or for nothing does no harm.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal

from sqlalchemy import select

from app.db.session import Tx
from app.db.tables import margin_calls
from app.domain.book import ZERO
from app.domain.lending import Prices, Situation, Step, next_interest, next_look, next_step, purchase
from app.domain.lending_moves import bought_in
from app.domain.margin_calls import LIVE_STATES
from app.domain.money import plain, to_decimal, to_float
from app.errors import InvalidError
from app.services import ledger, lending, loans
from app.services.lending import Stage
from app.services.liquidation import Rules
from app.services.loans import Levels, Loan
from app.services.margin import Scene, Scenes
from app.services.market_cache import MarketView
from app.services.running_loans import ask_back, close, on_loan, pay
from app.services.wallet import Names

STEPS_MAX = 8
"""Steps of one decision: more than the longest way through."""
SLACK = 0.002
"""How far above a level the watch names a loan: what a day's interest can be at the curve's end."""
OF_THE_SERVICE = Names()


@dataclass(frozen=True, slots=True)
class Decided:
    """What came of a decision: the events told, and what the house advanced to make a lender whole, in USD."""

    told: tuple[str, ...] = ()
    deficit: float = 0.0


async def decide(tx: Tx, scenes: Scenes, loan_id: str, rules: Rules) -> Decided:
    """Take every step that is due of a loan. Where a price is missing or stale, nothing is sold."""
    found = await loans.get(tx, loan_id)
    if found is None:
        return Decided()
    told: tuple[str, ...] = ()
    deficit = 0.0
    for _ in range(STEPS_MAX):
        on, loan = await on_loan(tx, scenes, found.lender_id, loan_id)
        if not loan.is_live:
            break
        prices = _prices(on.scene, loan)
        debt = loan.principal + loan.interest(on.terms.decimals)
        ratio = None if prices is None else prices.ratio(loan.collateral, debt)
        is_wanted = loan.wanted_by is not None and loan.recalled < loan.principal
        judged = Situation(ratio, loan.is_low, loan.due_at, loan.next_interest_at, is_wanted)
        step = next_step(judged, on.terms, on.scene.now)
        if step is None:
            await loans.store(tx, replace(loan, next_action_at=next_look(judged, on.scene.now)))
            break
        done = await _take(on, loan, step, prices, rules)
        told, deficit = told + done.told, deficit + done.deficit
    return Decided(told, deficit)


def _prices(scene: Scene, loan: Loan) -> Prices | None:
    """Return what a loan is valued at, None where a price is missing or stale."""
    if lending.stale_of(scene, loan.asset, loan.collateral_asset):
        return None
    try:
        return lending.prices_of(scene, loan.asset, loan.collateral_asset)
    except InvalidError:
        return None


async def _take(on: Stage, loan: Loan, step: Step, prices: Prices | None, rules: Rules) -> Decided:
    match step, prices:
        case "liquidate", Prices():
            return await _sell(on, loan, loan.principal, "collateral", prices, rules)
        case "buy in", Prices():
            return await _sell(on, loan, loan.recalled, "overdue", prices, rules)
        case "recall", _:
            return await _recall(on, loan)
        case "pay interest", _:
            return await _pay_interest(on, loan)
        case (("warn" | "note well"), Prices()):
            return await _note(on, loan, prices, is_low=step == "warn")
        case _:
            raise RuntimeError(f"{step} without prices")


async def _recall(on: Stage, loan: Loan) -> Decided:
    """Recall a loan for the margin call that wants it back, unless that is over."""
    columns = margin_calls.c
    query = select(columns.id).where(columns.id == loan.wanted_by, columns.state.in_(LIVE_STATES))
    if (await on.tx.connection.execute(query)).first() is None:
        await loans.store(on.tx, replace(loan, wanted_by=None))
        return Decided()
    await on.touch()
    await ask_back(on, loan, loan.principal, "margin call")
    return Decided(("loan.recalled",))


async def _pay_interest(on: Stage, loan: Loan) -> Decided:
    """Pay the interest of the days that are over, as far as it is free; the rest is a debt that bears none."""
    due = loan.interest(on.terms.decimals)
    free = on.books[loan.borrower_id].holding(loan.asset).free
    loan = await pay(on, loan, min(due, free), ZERO, OF_THE_SERVICE)
    await loans.store(on.tx, replace(loan, next_interest_at=next_interest(loan.opened_at, on.scene.now)))
    await on.touch()
    return Decided()


async def _note(on: Stage, loan: Loan, prices: Prices, *, is_low: bool) -> Decided:
    """Remember that a loan's collateral is low, and tell both parties; or that it no longer is."""
    after = await loans.store(on.tx, replace(loan, is_low=is_low))
    if not is_low:
        return Decided()
    debt = loan.principal + loan.interest(on.terms.decimals)
    wanted = prices.needed(debt, to_decimal(on.terms.collateral_ratio)) if prices.kept > 0 else None
    told = {
        "ratio": to_float(prices.ratio(loan.collateral, debt)),
        "liquidation_ratio": on.terms.liquidation_ratio,
        "top_up": None if wanted is None else plain(max(ZERO, wanted - loan.collateral)),
    }
    await lending.tell(on.tx, "loan.collateral_low", after, **told)
    return Decided(("loan.collateral_low",))


async def _sell(on: Stage, loan: Loan, part: Decimal, cause: str, prices: Prices, rules: Rules) -> Decided:
    """Sell collateral for principal and all interest, and hand that to the lender; where it was all, end the loan.

    What the collateral does not pay for comes out of what the borrower has free of the asset, and the house advances
    the rest: the lender is whole, and the borrower owes the house.
    """
    decimals, interest = on.terms.decimals, loan.interest(on.terms.decimals)
    slippage = ZERO if loan.collateral_asset == loan.asset else rules.slippage
    done = purchase(part + interest, loan.collateral, prices, slippage, decimals)
    free = on.books[loan.borrower_id].holding(loan.asset).free
    deficit = done.missing - min(free, done.missing)
    moves = bought_in(loan.borrower_id, loan.asset, loan.collateral_asset, done, free)
    if moves:  # none where there is no collateral, and the borrower has enough free
        occasion = OF_THE_SERVICE.occasion(loan.borrower_id, "lending", "loan_liquidated", loan.id)
        await ledger.post(on.tx, occasion, moves)
    left = replace(loan, collateral=loan.collateral - done.sold, deficit=loan.deficit + deficit)
    after = await pay(on, left, interest, part, OF_THE_SERVICE)
    given_back = after.collateral if after.principal == 0 else ZERO
    if after.principal == 0:
        after = await close(on, after, "liquidated", OF_THE_SERVICE)
    await loans.store(on.tx, after)
    await on.touch()
    told = {
        "cause": cause,
        "returned": plain(part),
        "interest": plain(interest),
        "collateral_sold": plain(done.sold),
        "collateral_returned": plain(given_back),
        "deficit": plain(deficit),
        "is_whole": not after.is_live,
    }
    await lending.tell(on.tx, "loan.liquidated", after, **told)
    return Decided(("loan.liquidated",), to_float(deficit) * on.scene.price(loan.asset) if deficit else 0.0)


async def named_by_prices(
    tx: Tx, view: MarketView, price_age_max: timedelta, within: Collection[int], limit: int, but: Collection[str] = ()
) -> list[str]:
    """Return the loans that may be past a level at these prices; none of a pair with a price missing or stale.

    None of those in `but`.
    """
    scene = Scene(view, tx.now, price_age_max, 0)
    levels = []
    for asset, collateral_asset in await loans.pairs(tx):
        if lending.stale_of(scene, asset, collateral_asset):
            continue
        try:
            prices = lending.prices_of(scene, asset, collateral_asset)
        except InvalidError:
            continue
        terms = view.parameters.loans_of(asset)
        worth = to_float(prices.ratio(Decimal(1), Decimal(1)))
        levels.append(Levels(asset, collateral_asset, worth, terms.liquidation_ratio + SLACK, terms.low_ratio + SLACK))
    return await loans.below(tx, levels, tx.now, within, limit, but)
