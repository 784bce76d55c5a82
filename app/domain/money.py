"""Decimal money: directed rounding, and the only bridge between Decimal and float.

Money and prices are Decimal wherever they are stored or moved; the risk core computes in float.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

DECIMALS_MAX = 18
AMOUNT_MAX = Decimal(10) ** 15
"""Prices, sizes and amounts are below this: some 33 digits, exact in Decimal and in Postgres."""

# The default context holds 28 digits, and quantize raises past them.
_WIDE = Context(prec=100)


def round_owed(amount: Decimal, decimals: int) -> Decimal:
    """Round what an agent owes up to `decimals` places, so that dust is never in the debtor's favour."""
    return _quantize(amount, decimals, ROUND_CEILING)


def round_owned(amount: Decimal, decimals: int) -> Decimal:
    """Round what an agent owns or receives down to `decimals` places (a negative balance down, too)."""
    return _quantize(amount, decimals, ROUND_FLOOR)


def plain(amount: Decimal) -> Decimal:
    """Return an amount with its digits alone: no trailing zeros, no exponent."""
    text = str(amount)
    if "E" not in text and not ("." in text and text.endswith("0")):
        return amount
    return Decimal(f"{amount.normalize(_WIDE):f}")


def to_float(amount: Decimal) -> float:
    """Return the nearest float; ValueError for NaN, an infinity, or a number past the floats."""
    value = float(amount)
    if not math.isfinite(value):
        raise ValueError(f"{amount:.3E} is not a finite number")
    return value


def to_decimal(value: float) -> Decimal:
    """Return the shortest decimal that reads back as this float; ValueError for NaN and infinities."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    if value == 0:
        return Decimal(0)  # also for -0.0
    return Decimal(repr(float(value)))  # float() first: the repr of a numpy scalar names its type


def _quantize(amount: Decimal, decimals: int, rounding: str) -> Decimal:
    if not 0 <= decimals <= DECIMALS_MAX:
        raise ValueError(f"{decimals} decimals: 0 to {DECIMALS_MAX} are kept")
    if not amount.is_finite():
        raise ValueError(f"{amount} is not a finite number")
    return amount.quantize(Decimal(1).scaleb(-decimals), rounding=rounding, context=_WIDE)
