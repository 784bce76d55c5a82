"""How a coordinator's delegations are shared out anew: in proportion to a weight, within bounds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Literal

import numpy as np

from app.domain.black76 import Floats
from app.domain.money import to_decimal, to_float
from app.errors import conflict

Policy = Literal["equal_risk", "sharpe", "to_need"]

NEED_MARGIN = 1.25
"""`to_need` delegates so many times what a member has in use: room to its gate of .80."""
_CENT = Decimal("0.01")
_HALVINGS = 200
_WEIGHT_MIN = 1e-12
"""Relative to the largest: a smaller weight is none."""
_FLOAT_DECIMALS = 6


@dataclass(frozen=True, slots=True)
class Share:
    """A member as a plan sees it. `used` is its own requirement, `var` its own VaR, USD; `sharpe` None if unknown."""

    agent_id: str
    max_margin: Decimal
    drawn: Decimal
    used: float
    var: float
    sharpe: float | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """The least and the most that a member is delegated, as shares of the whole."""

    least: float = 0.0
    most: float = 1.0


def plan(members: Sequence[Share], budget: Decimal, policy: Policy, bounds: Bounds) -> list[Decimal]:
    """Return each member's new delegation, USDC in whole cents: none below what is drawn, together within the budget.

    `equal_risk`: what it is delegated times its VaR a dollar in use is alike for all; who uses nothing has the mean of
    the others'. `sharpe`: in proportion to its ratio where that is positive, else nothing above what is drawn.
    `to_need`: 1.25 times what it has in use, less in proportion where the budget is short.

    Raises ConflictError `fleet_exhausted` where more is drawn, or least bounds ask for more, than the budget.
    """
    whole, drawn = to_float(budget), np.array([to_float(m.drawn) for m in members])
    low, high = np.maximum(drawn, bounds.least * whole), np.maximum(drawn, bounds.most * whole)
    if policy == "to_need":
        needed = np.array([m.used * NEED_MARGIN for m in members])
        high = np.clip(needed, low, high)
    if low.sum() > whole * (1.0 + 1e-12):
        detail = f"{low.sum():,.2f} USDC are drawn or the least that is asked for, of {whole:,.2f} above the dry powder"
        raise conflict("/policy", "fleet_exhausted", detail, needed=float(low.sum()), available=budget)
    spread = filled(_weights(members, policy), low, high, whole)
    cents = [to_decimal(round(amount, _FLOAT_DECIMALS)).quantize(_CENT, ROUND_FLOOR) for amount in spread.tolist()]
    return [max(amount, member.drawn) for amount, member in zip(cents, members, strict=True)]


def _weights(members: Sequence[Share], policy: Policy) -> Floats:
    if policy == "sharpe":
        return np.array([max(0.0, m.sharpe or 0.0) for m in members])
    if policy == "to_need":
        return np.array([max(m.used, 0.0) for m in members])
    per_dollar = np.array([m.var / m.used if m.used > 0.0 and m.var > 0.0 else np.nan for m in members])
    usual = float(np.nanmean(per_dollar)) if np.isfinite(per_dollar).any() else 1.0
    return 1.0 / np.where(np.isfinite(per_dollar), per_dollar, usual)


def filled(weights: Floats, low: Floats, high: Floats, whole: float) -> Floats:
    """Return λ·weights clipped to [low, high], for the λ at which they sum to the whole, or the most that they can.

    By halving: the sum never falls as λ rises.
    """
    largest = float(weights.max(initial=0.0))
    if largest < _WEIGHT_MIN:
        return low
    weights = weights / largest
    weights = np.where(weights < _WEIGHT_MIN, 0.0, weights)
    positive = weights > 0.0
    below, above = 0.0, float((high[positive] / weights[positive]).max())
    found = np.clip(above * weights, low, high)
    if found.sum() <= whole:
        return found
    for _ in range(_HALVINGS):
        middle = (below + above) / 2.0
        if not below < middle < above:
            break
        below, above = (middle, above) if np.clip(middle * weights, low, high).sum() <= whole else (below, middle)
    return np.clip(below * weights, low, high)
