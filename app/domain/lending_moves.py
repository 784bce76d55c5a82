"""The moves of money of loans: opened, paid for, returned, secured and bought in. Pure.

A lender's `lent` and its borrowers' `borrowed` are the two sides of the same units: what one move takes off the one, it
takes off the other. Interest that a borrower can't pay is added to both, and bears none itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from app.domain.lending import Purchase
from app.domain.moves import Move, agent, house, pay_in


@dataclass(frozen=True, slots=True)
class Parties:
    """A loan's lender and borrower, its asset, and what the lender owes the house of it: that is paid first."""

    lender_id: str
    borrower_id: str
    asset: str
    lender_owed: Decimal

    def handed_over(self, amount: Decimal) -> list[Move]:
        """Return the moves of units from an open offer to the borrower, who owes them from then on."""
        units = Move(self.asset, amount, agent(self.lender_id, "offered"), agent(self.borrower_id, "free"))
        return [units, *self.claimed(amount)]

    def claimed(self, amount: Decimal) -> list[Move]:
        """Return the move by which the borrower owes the lender more, or (below zero) less."""
        debt, claim = agent(self.borrower_id, "borrowed"), agent(self.lender_id, "lent")
        if amount == 0:
            return []
        return [Move(self.asset, amount, debt, claim) if amount > 0 else Move(self.asset, -amount, claim, debt)]

    def paid(self, amount: Decimal) -> list[Move]:
        """Return the moves of units of the borrower's to the lender, who is free to use what it does not owe."""
        source = agent(self.borrower_id, "free")
        return pay_in(self.lender_id, self.asset, amount, source, self.lender_owed) if amount > 0 else []


def pledged(agent_id: str, asset: str, amount: Decimal) -> list[Move]:
    """Return the move that sets collateral aside for a loan."""
    return [Move(asset, amount, agent(agent_id, "free"), agent(agent_id, "pledged"))]


def unpledged(agent_id: str, asset: str, amount: Decimal, owed: Decimal) -> list[Move]:
    """Return the moves that give collateral back; what its owner owes the house of the asset is paid first."""
    return pay_in(agent_id, asset, amount, agent(agent_id, "pledged"), owed) if amount > 0 else []


def bought_in(agent_id: str, asset: str, collateral: str, done: Purchase, free: Decimal) -> list[Move]:
    """Return the moves that turn a borrower's collateral into units of the borrowed asset, free to be handed on.

    They come from the house, which takes the collateral. What that does not pay for comes out of what the borrower has
    free; the rest the house advances, and the borrower owes it.
    """
    pledge, units = agent(agent_id, "pledged"), agent(agent_id, "free")
    moves = []
    if collateral == asset:
        moves += [Move(asset, done.sold, pledge, units)] if done.sold > 0 else []
    else:
        moves += [Move(collateral, done.sold, pledge, house("trading"))] if done.sold > 0 else []
        moves += [Move(asset, done.bought, house("trading"), units)] if done.bought > 0 else []
    advanced = done.missing - min(free, done.missing)
    return moves + ([Move(asset, advanced, agent(agent_id, "owed"), units)] if advanced > 0 else [])
