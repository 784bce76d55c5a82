"""Money that moves: out of one bucket, into another. What the ledger writes, and what a plan of a trade consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

HOUSE = "house"
"""The owner of what is not an agent's: the outside world, the other side of profit and loss."""

SETTLEMENT_ASSET = "USDC"
"""Profit and loss of linear contracts is paid in it, one unit for a USD."""

SETTLEMENT_DECIMALS = 6

AgentBucket = Literal["free", "reserved", "allocated", "owed", "offered", "lent", "pledged", "borrowed"]
"""`offered`: set aside by open offers to lend; `lent`: what borrowers owe; `pledged`: what secures own loans."""
DEBTS: frozenset[str] = frozenset({"owed", "borrowed"})
"""Buckets that grow by what leaves them: debts to the house, and to lenders."""

HouseBucket = Literal["external", "trading", "services", "deficit", "fees"]


@dataclass(frozen=True, slots=True)
class Purse:
    """One bucket of one owner."""

    owner: str
    bucket: str


@dataclass(frozen=True, slots=True)
class Move:
    """An amount > 0 of an asset that leaves one purse for another."""

    asset: str
    amount: Decimal
    source: Purse
    target: Purse


BalanceKey = tuple[str, str, str]
"""Agent, asset, bucket."""


def agent(agent_id: str, bucket: AgentBucket) -> Purse:
    """Return a bucket of an agent."""
    return Purse(agent_id, bucket)


def house(bucket: HouseBucket) -> Purse:
    """Return a bucket of the house."""
    return Purse(HOUSE, bucket)


def net_changes(moves: Sequence[Move]) -> dict[BalanceKey, Decimal]:
    """Return the net change of each agent's bucket, sorted; a debt grows by what leaves it.

    Raises ValueError for a move of nothing or less.
    """
    changes: dict[BalanceKey, Decimal] = {}
    for move in moves:
        if not move.amount > 0:
            raise ValueError(f"a move of {move.amount}")
        for purse, sign in ((move.source, -1), (move.target, 1)):
            if purse.owner == HOUSE:
                continue
            owed = -1 if purse.bucket in DEBTS else 1
            key = (purse.owner, move.asset, purse.bucket)
            changes[key] = changes.get(key, Decimal(0)) + sign * owed * move.amount
    return dict(sorted(changes.items()))


def pay_in(agent_id: str, asset: str, amount: Decimal, source: Purse, owed: Decimal) -> list[Move]:
    """Return the moves that bring an amount to an agent: what it owes of the asset is paid first."""
    back = min(owed, amount)
    parts = ((back, agent(agent_id, "owed")), (amount - back, agent(agent_id, "free")))
    return [Move(asset, part, source, target) for part, target in parts if part > 0]


def take_out(agent_id: str, asset: str, amount: Decimal, target: Purse, free: Decimal) -> list[Move]:
    """Return the moves that take an amount from an agent: what is free first, the rest is owed from then on."""
    here = min(free, amount)
    parts = ((here, agent(agent_id, "free")), (amount - here, agent(agent_id, "owed")))
    return [Move(asset, part, source, target) for part, source in parts if part > 0]
