"""Netting: what members of a group owe each other, the least that has to move for it, and what that saves.

A member's net in an asset is what it owes less what it is owed; over the group the nets sum to zero. Settled by
matching the largest debtor with the largest creditor: each movement brings one of the two to zero, the last one both,
so that n members need at most n - 1 movements an asset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from heapq import heapify, heappop, heappush

from app.domain.fees import decimals_of, fee_on
from app.domain.money import round_owed

ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class Owed:
    """What one member owes another."""

    payer: str
    payee: str
    asset: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Gross:
    """What a member owes (`pays`) and is owed (`receives`) in one asset, all of it open."""

    agent_id: str
    asset: str
    pays: Decimal
    receives: Decimal

    @property
    def net(self) -> Decimal:
        """What it owes on balance; below zero, what it is owed."""
        return self.pays - self.receives


@dataclass(frozen=True, slots=True)
class Movement:
    """One net payment."""

    payer: str
    payee: str
    asset: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Charge:
    """The one fee of a net debtor in an asset."""

    payer: str
    asset: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Terms:
    """What the members agreed on: the fee on net movements, and the buffer on top of what is reserved."""

    fee_rate: Decimal
    buffer: Decimal

    def fee(self, asset: str, amount: Decimal) -> Decimal:
        """Return the fee on an amount, rounded up."""
        return fee_on(asset, amount, self.fee_rate)

    def due(self, asset: str, net: Decimal) -> Decimal:
        """Return what a net takes at the cut-off: itself and its fee; nothing where the member is owed."""
        return net + self.fee(asset, net) if net > 0 else ZERO

    def cover(self, asset: str, net: Decimal) -> Decimal:
        """Return what is reserved for a running net: what is due, and the buffer on it."""
        return self.due(asset, net) + round_owed(max(net, ZERO) * self.buffer, decimals_of(asset))


@dataclass(frozen=True, slots=True)
class Debt:
    """What one debtor pays of one asset: to whom, and its fee."""

    payer: str
    asset: str
    movements: Sequence[Movement]
    fee: Decimal

    @property
    def due(self) -> Decimal:
        """All that it pays."""
        return sum((movement.amount for movement in self.movements), self.fee)


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a cut-off moves and charges."""

    movements: Sequence[Movement]
    charges: Sequence[Charge]

    def debts(self) -> list[Debt]:
        """Return what each debtor pays of each asset, in the order of their ids."""
        moved: dict[tuple[str, str], list[Movement]] = {}
        for movement in self.movements:
            moved.setdefault((movement.payer, movement.asset), []).append(movement)
        fees = {(charge.payer, charge.asset): charge.amount for charge in self.charges}
        return [Debt(*debtor, moved[debtor], fees.get(debtor, ZERO)) for debtor in sorted(moved)]


@dataclass(frozen=True, slots=True)
class Saving:
    """One asset settled each obligation by itself (`gross`), and net: payments, units moved, fees."""

    asset: str
    gross_movements: int
    gross_amount: Decimal
    gross_fees: Decimal
    movements: int
    amount: Decimal
    fees: Decimal


def positions(obligations: Iterable[Owed]) -> list[Gross]:
    """Return each member's sums, by asset and member."""
    pays: dict[tuple[str, str], Decimal] = {}
    receives: dict[tuple[str, str], Decimal] = {}
    for owed in obligations:
        for sums, member in ((pays, owed.payer), (receives, owed.payee)):
            key = owed.asset, member
            sums[key] = sums.get(key, ZERO) + owed.amount
    keys = sorted(pays.keys() | receives.keys())
    return [Gross(key[1], key[0], pays.get(key, ZERO), receives.get(key, ZERO)) for key in keys]


def savings(obligations: Sequence[Owed], done: Settlement, terms: Terms) -> list[Saving]:
    """Return what each asset's obligations would have taken one by one, and what they take net, by asset."""
    gross, moved, charged = (_by_asset(items) for items in (obligations, done.movements, done.charges))
    return [
        Saving(
            asset=asset,
            gross_movements=len(gross[asset]),
            gross_amount=sum(gross[asset], ZERO),
            gross_fees=sum((terms.fee(asset, amount) for amount in gross[asset]), ZERO),
            movements=len(moved.get(asset, ())),
            amount=sum(moved.get(asset, ()), ZERO),
            fees=sum(charged.get(asset, ()), ZERO),
        )
        for asset in sorted(gross)
    ]


def _by_asset(items: Iterable[Owed | Movement | Charge]) -> dict[str, list[Decimal]]:
    found: dict[str, list[Decimal]] = {}
    for item in items:
        found.setdefault(item.asset, []).append(item.amount)
    return found


def settlement(members: Iterable[Gross], terms: Terms) -> Settlement:
    """Return the net movements of all assets, by asset, and one fee a debtor and asset.

    Raises ArithmeticError where the nets of an asset do not sum to zero: the positions are then not of one group.
    """
    nets: dict[str, dict[str, Decimal]] = {}
    for position in members:
        nets.setdefault(position.asset, {})[position.agent_id] = position.net
    moved = [movement for asset in sorted(nets) for movement in movements(asset, nets[asset])]
    owed: dict[tuple[str, str], Decimal] = {}
    for movement in moved:
        key = movement.payer, movement.asset
        owed[key] = owed.get(key, ZERO) + movement.amount
    charges = [Charge(payer, asset, terms.fee(asset, amount)) for (payer, asset), amount in owed.items()]
    return Settlement(moved, [charge for charge in charges if charge.amount > 0])


def movements(asset: str, nets: Mapping[str, Decimal]) -> list[Movement]:
    """Return the movements that bring these nets to zero, the largest first; at most one fewer than members."""
    if sum(nets.values(), ZERO) != 0:
        raise ArithmeticError(f"nets of {asset} that do not sum to zero")
    debtors = [(-net, agent_id) for agent_id, net in nets.items() if net > 0]
    creditors = [(net, agent_id) for agent_id, net in nets.items() if net < 0]
    heapify(debtors)
    heapify(creditors)
    found = []
    while debtors:
        owes, payer = heappop(debtors)
        is_owed, payee = heappop(creditors)
        amount = min(-owes, -is_owed)
        found.append(Movement(payer, payee, asset, amount))
        if owes + amount < 0:
            heappush(debtors, (owes + amount, payer))
        if is_owed + amount < 0:
            heappush(creditors, (is_owed + amount, payee))
    return found
