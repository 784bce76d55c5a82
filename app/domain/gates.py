"""Whether an account may do what raises its utilization: order, withdraw, reserve, lend out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from app.domain.parameters import HealthPolicy
from app.domain.quote import AccountFigures

TOLERANCE = 1e-9
"""Relative: utilization at the gate to the last bit passes, whatever the sums' rounding."""

GateCode = Literal["insufficient_margin", "leverage_above_cap"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, and the USD of further collateral that would let it pass."""

    code: GateCode
    detail: str
    shortfall: float


def refusal(before: AccountFigures, after: AccountFigures, policy: HealthPolicy) -> Refusal | None:
    """Return why an account may not go from one standing to the other, or None.

    What does not raise utilization passes at any level; what raises it must leave it at the gate or below. Gross
    notional that rises stays within the cap times equity.
    """
    return _gate(before, after, policy) or _cap(before, after, policy)


def _gate(before: AccountFigures, after: AccountFigures, policy: HealthPolicy) -> Refusal | None:
    then, now = before.health, after.health
    if now.required_initial == 0.0 and not now.insolvent:
        return None
    level = policy.gate_utilization
    if now.utilization is not None:
        if now.utilization <= level * (1.0 + TOLERANCE):
            return None
        if then.utilization is not None and now.utilization <= then.utilization * (1.0 + TOLERANCE):
            return None
    shown = "no equity" if now.utilization is None else f"utilization {now.utilization:.4f}"
    missing = max(0.0, now.required_initial / level - now.equity)
    return Refusal("insufficient_margin", f"it would leave {shown}, the gate is {level:g}", missing)


def _cap(before: AccountFigures, after: AccountFigures, policy: HealthPolicy) -> Refusal | None:
    gross, cap = after.gross_notional, policy.leverage_cap
    if gross <= cap * after.equity * (1.0 + TOLERANCE) or gross == 0.0:
        return None
    if gross <= before.gross_notional * (1.0 + TOLERANCE) and after.equity >= before.equity * (1.0 - TOLERANCE):
        return None
    detail = f"gross notional would be {gross:,.2f}, over {cap:g} times the equity of {after.equity:,.2f}"
    return Refusal("leverage_above_cap", detail, max(0.0, gross / cap - after.equity))


def stale_symbols(figures: AccountFigures, now: datetime, seconds_max: float) -> list[str]:
    """Return the symbols whose stored price is older than the limit."""
    return [
        symbol
        for symbol, price in figures.prices.items()
        if price.as_of is not None and (now - price.as_of).total_seconds() > seconds_max
    ]
