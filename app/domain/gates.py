"""Whether an account may do what raises its utilization: order, withdraw, reserve, lend out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from app.domain.parameters import HealthPolicy
from app.domain.quote import AccountFigures, MarginQuote

TOLERANCE = 1e-9
"""Relative: utilization at the gate to the last bit passes, whatever the sums' rounding."""

Assessed = AccountFigures | MarginQuote

GateCode = Literal["insufficient_margin", "leverage_above_cap", "stale_price", "reduce_only"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, and the USD of further collateral that would let it pass."""

    code: GateCode
    detail: str
    shortfall: float


def refusal(before: Assessed, after: Assessed, policy: HealthPolicy) -> Refusal | None:
    """Return why an account may not go from one standing to the other, or None.

    What does not raise utilization passes at any level; what raises it must leave it at the gate or below. Gross
    notional that rises stays within the cap times equity. Debts that weigh more than before stay within the gate's
    share of what is held: utilization alone says nothing of an account that only owes.
    """
    return _gate(before, after, policy) or _cap(before, after, policy) or _debt(before, after, policy)


def _gate(before: Assessed, after: Assessed, policy: HealthPolicy) -> Refusal | None:
    then, now = before.health, after.health
    if now.required_initial == 0.0 and not now.insolvent:
        return None
    level = policy.gate_utilization
    if now.utilization is not None:
        if now.utilization <= level * (1.0 + TOLERANCE):
            return None
        # exactly: a tolerance here would let many small steps climb
        if then.utilization is not None and now.utilization <= then.utilization:
            return None
    shown = "no equity" if now.utilization is None else f"utilization {now.utilization:.4f}"
    missing = max(0.0, now.required_initial / level - now.equity)
    return Refusal("insufficient_margin", f"it would leave {shown}, the gate is {level:g}", missing)


def _cap(before: Assessed, after: Assessed, policy: HealthPolicy) -> Refusal | None:
    return capped((before.gross_notional, before.equity), (after.gross_notional, after.equity), policy)


def capped(before: tuple[float, float], after: tuple[float, float], policy: HealthPolicy) -> Refusal | None:
    """Return why gross notional and equity, USD, may not go from one pair to the other: the leverage cap, or None."""
    (gross, equity), cap = after, policy.leverage_cap
    if gross == 0.0 or gross <= cap * equity * (1.0 + TOLERANCE):
        return None
    if gross <= before[0] and equity >= before[1]:
        return None
    detail = f"gross notional would be {gross:,.2f}, over {cap:g} times the equity of {equity:,.2f}"
    return Refusal("leverage_above_cap", detail, max(0.0, gross / cap - equity))


def _debt(before: Assessed, after: Assessed, policy: HealthPolicy) -> Refusal | None:
    owed, level = after.collateral.liabilities, policy.gate_utilization
    backing = after.equity + owed
    if owed == 0.0 or owed <= level * backing * (1.0 + TOLERANCE):
        return None
    if owed <= before.collateral.liabilities and backing >= before.equity + before.collateral.liabilities:
        return None
    detail = f"{owed:,.2f} USD are owed, over {level:g} of the {backing:,.2f} that would back it"
    return Refusal("insufficient_margin", detail, max(0.0, owed / level - backing))


def stale_symbols(figures: Assessed, now: datetime, seconds_max: float) -> list[str]:
    """Return the symbols whose stored price is older than the limit."""
    return [
        symbol
        for symbol, price in figures.prices.items()
        if price.as_of is not None and (now - price.as_of).total_seconds() > seconds_max
    ]
