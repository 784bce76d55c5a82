"""Loans that run: paid for, returned, secured, recalled. Each is one transaction under all its locks; see `lending`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal

from app.db.session import Tx
from app.domain.book import ZERO
from app.domain.lending import LoanStatus
from app.domain.lending_moves import pledged, unpledged
from app.domain.money import checked_amount, plain, to_decimal
from app.domain.moves import Move
from app.errors import conflict
from app.services import ledger, loans
from app.services.lending import (
    OthersError,
    Stage,
    check_free,
    in_tries,
    prices_of,
    require_fresh,
    stage,
    tell,
    withdraw,
)
from app.services.loans import Loan, Offer
from app.services.margin import Scenes
from app.services.wallet import Names


async def on_loan(
    tx: Tx, scenes: Scenes, agent_id: str, loan_id: str, *, borrower: bool | None = None
) -> tuple[Stage, Loan]:
    """Lock both parties of a loan and its market, and return the loan with what has accrued. Raises NotFoundError.

    `borrower` says which party the agent has to be, None: either.
    """
    found = await loans.of_party(tx, agent_id, loan_id)
    if borrower is not None and borrower != (agent_id == found.borrower_id):
        raise loans.no_such_loan()
    on = await stage(tx, scenes, [found.lender_id, found.borrower_id], found.asset)
    found = await loans.of_party(tx, agent_id, loan_id)
    return on, await loans.accrued(tx, found, on.scene.now)


def require_live(loan: Loan) -> None:
    """Raise ConflictError where a loan is over."""
    if not loan.is_live:
        raise conflict("/status", "loan_closed", f"the loan is {loan.status}")


async def give_back(
    tx: Tx, scenes: Scenes, borrower_id: str, loan_id: str, amount: Decimal | None, named: Names
) -> Loan:
    """Return principal, all or an amount, with all interest that is due; the last of it frees the collateral."""
    on, loan = await on_loan(tx, scenes, borrower_id, loan_id, borrower=True)
    require_live(loan)
    part = loan.principal if amount is None else checked_amount("/amount", amount, on.terms.decimals)
    if part > loan.principal:
        detail = f"{plain(loan.principal):f} {loan.asset} are borrowed"
        raise conflict("/amount", "amount_above_loan", detail, principal=plain(loan.principal))
    due = loan.interest(on.terms.decimals)
    free = on.books[borrower_id].holding(loan.asset).free
    if part + due > free:
        detail = f"{plain(part + due):f} {loan.asset} are due with interest, {plain(free):f} are free"
        raise ledger.insufficient_funds(detail, available=plain(free), needed=plain(part + due))
    loan = await pay(on, loan, due, part, named)
    if loan.principal == 0:
        loan = await close(on, loan, "returned", named)
    await loans.store(tx, loan)
    await on.touch()
    await tell(tx, "loan.returned", loan, returned=plain(part), interest=plain(due), is_whole=not loan.is_live)
    return loan


async def pay(on: Stage, loan: Loan, interest: Decimal, principal: Decimal, named: Names) -> Loan:
    """Pay interest that is due, and principal, out of what the borrower has free; what interest is left is booked.

    Return the loan, not stored yet.
    """
    parties = on.parties(loan)
    left = loan.interest(on.terms.decimals) - interest
    occasion = named.occasion(loan.borrower_id, "lending", "loan_interest", loan.id)
    moves = [*parties.paid(interest), *parties.claimed(left - loan.interest_booked)]
    if moves:
        await ledger.post(on.tx, occasion, moves)
    loan = replace(loan, interest_paid=loan.interest_paid + interest, interest_booked=left)
    if principal == 0:
        return loan
    parties = replace(parties, lender_owed=max(ZERO, parties.lender_owed - interest))
    moves = [*parties.paid(principal), *parties.claimed(-principal)]
    await ledger.post(on.tx, replace(occasion, kind="loan_returned"), moves)
    await on.move_market(-principal, -principal)
    recalled = max(ZERO, loan.recalled - principal)
    loan = replace(loan, principal=loan.principal - principal, recalled=recalled, next_action_at=on.scene.now)
    return loan if recalled > 0 else replace(loan, recalled_at=None, due_at=None, status="active")


async def close(on: Stage, loan: Loan, status: LoanStatus, named: Names) -> Loan:
    """End a loan of which nothing is owed any more: its collateral is free. Return it, not stored yet."""
    borrower = on.books[loan.borrower_id]
    owed = borrower.holding(loan.collateral_asset).owed
    moves = unpledged(loan.borrower_id, loan.collateral_asset, loan.collateral, owed)
    if moves:
        occasion = named.occasion(loan.borrower_id, "lending", "loan_collateral", loan.id)
        await ledger.post(on.tx, occasion, moves)
    over = {"collateral": ZERO, "wanted_by": None, "next_action_at": None}
    return replace(loan, status=status, closed_at=on.scene.now, **over)  # type: ignore[arg-type]


async def top_up(tx: Tx, scenes: Scenes, borrower_id: str, loan_id: str, amount: Decimal, named: Names) -> Loan:
    """Pledge more of a loan's collateral. Raises ConflictError where less is free."""
    on, loan = await on_loan(tx, scenes, borrower_id, loan_id, borrower=True)
    require_live(loan)
    more = checked_amount("/amount", amount)
    check_free(on.books[borrower_id], loan.collateral_asset, more, "/amount")
    return await _pledge(on, loan, more, pledged(borrower_id, loan.collateral_asset, more), named)


async def release(tx: Tx, scenes: Scenes, borrower_id: str, loan_id: str, amount: Decimal | None, named: Names) -> Loan:
    """Take back collateral past what a new loan would need: all of that, or an amount.

    Raises ConflictError `insufficient_collateral` with what could be taken back, `stale_price`.
    """
    on, loan = await on_loan(tx, scenes, borrower_id, loan_id, borrower=True)
    require_live(loan)
    require_fresh(on.scene, loan.asset, loan.collateral_asset)
    prices = prices_of(on.scene, loan.asset, loan.collateral_asset)
    debt = loan.principal + loan.interest(on.terms.decimals)
    needed = prices.needed(debt, to_decimal(on.terms.collateral_ratio)) if prices.kept > 0 else loan.collateral
    excess = max(ZERO, loan.collateral - needed)
    part = excess if amount is None else checked_amount("/amount", amount)
    if part > excess or part == 0:
        detail = f"{plain(excess):f} {loan.collateral_asset} are more than the loan needs"
        raise conflict("/amount", "insufficient_collateral", detail, available=plain(excess))
    owed = on.books[borrower_id].holding(loan.collateral_asset).owed
    return await _pledge(on, loan, -part, unpledged(borrower_id, loan.collateral_asset, part, owed), named)


async def _pledge(on: Stage, loan: Loan, more: Decimal, moves: Sequence[Move], named: Names) -> Loan:
    occasion = named.occasion(loan.borrower_id, "lending", "loan_collateral", loan.id)
    await ledger.post(on.tx, occasion, moves)
    await on.touch()
    # it is looked at again at once: a warning may be over
    return await loans.store(on.tx, replace(loan, collateral=loan.collateral + more, next_action_at=on.scene.now))


@dataclass(frozen=True, slots=True)
class Recall:
    """What of an offer was withdrawn, and the loans that were recalled, or had been."""

    withdrawn: Decimal
    recalled: Sequence[Loan]


async def recall(
    tx: Tx, scenes: Scenes, lender_id: str, wanted_id: str, amount: Decimal | None, reason: str, named: Names
) -> Recall:
    """Ask a loan back, or all that an offer became: what is not lent is withdrawn at once. All, or an amount.

    A loan that is recalled already stays due when it was, unless more of it is asked for. Raises NotFoundError,
    ConflictError.
    """

    async def attempt() -> Recall:
        offered = await loans.find_offer(tx, lender_id, wanted_id)
        found = await _loans_of(tx, lender_id, wanted_id, offered)
        asset = found[0].asset if offered is None else offered.asset
        on = await stage(tx, scenes, {lender_id, *(loan.borrower_id for loan in found)}, asset)
        offered = await loans.find_offer(tx, lender_id, wanted_id)
        found = await _loans_of(tx, lender_id, wanted_id, offered)
        if any(loan.borrower_id not in on.books for loan in found):
            raise OthersError
        return await _recall(on, offered, found, amount, reason, named)

    return await in_tries(tx, attempt)


async def _loans_of(tx: Tx, lender_id: str, wanted_id: str, offered: Offer | None) -> list[Loan]:
    if offered is not None:
        return await loans.of_offers(tx, [offered.id])
    found = await loans.of_party(tx, lender_id, wanted_id)
    if found.lender_id != lender_id:
        raise loans.no_such_loan()
    return [found]


async def _recall(
    on: Stage, offered: Offer | None, found: Sequence[Loan], amount: Decimal | None, reason: str, named: Names
) -> Recall:
    if offered is None:
        require_live(found[0])
    idle = ZERO if offered is None else offered.remaining
    whole = idle + sum((loan.principal for loan in found), ZERO)
    left = whole if amount is None else checked_amount("/amount", amount, on.terms.decimals)
    if left > whole:
        raise conflict("/amount", "amount_above_loan", f"{plain(whole):f} {on.asset} are lent", principal=plain(whole))
    withdrawn = min(idle, left)
    if withdrawn > 0 and offered is not None:
        await withdraw(on, offered, withdrawn, named)
    left -= withdrawn
    await on.touch()
    recalled = []
    for loan in found:
        part = min(left, loan.principal)
        left -= part
        if part > 0:
            recalled.append(await ask_back(on, loan, part, reason))
    return Recall(withdrawn, recalled)


async def ask_back(on: Stage, loan: Loan, amount: Decimal, reason: str) -> Loan:
    """Recall so much of a live loan, both of whose parties are locked, and tell them; no less than before."""
    if amount <= loan.recalled:
        return loan
    now = on.scene.now
    due = now + timedelta(seconds=loan.notice_seconds)
    after = replace(loan, recalled=amount, recalled_at=now, due_at=due, status="recalled", wanted_by=None)
    after = replace(after, next_action_at=min(due, loan.next_interest_at))
    await loans.store(on.tx, after)
    await tell(on.tx, "loan.recalled", after, reason=reason)
    return after
