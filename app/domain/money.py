"""Decimal money: directed rounding, and the only bridge between Decimal and float.

Money and prices are Decimal wherever they are stored or moved; the risk core computes in float.
"""

from __future__ import annotations

import decimal
import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from app.errors import invalid

DECIMALS_MAX = 18
AMOUNT_MAX = Decimal(10) ** 15
"""Prices, sizes and amounts are below this: some 33 digits, exact in Decimal and in Postgres."""

PRECISION = 100
"""Digits of every Decimal operation of the process: sums and products of amounts are exact. Python's default is 28."""

decimal.DefaultContext.prec = PRECISION  # of threads to come
decimal.getcontext().prec = PRECISION  # of this one, and of the tasks it starts


def round_owed(amount: Decimal, decimals: int) -> Decimal:
    """Round what an agent owes up to `decimals` places, so that dust is never in the debtor's favour."""
    return _quantize(amount, decimals, ROUND_CEILING)


def round_owned(amount: Decimal, decimals: int) -> Decimal:
    """Round what an agent owns or receives down to `decimals` places (a negative balance down, too)."""
    return _quantize(amount, decimals, ROUND_FLOOR)


def checked_amount(pointer: str, amount: Decimal, decimals: int = DECIMALS_MAX) -> Decimal:
    """Return an amount of money or contracts with its digits alone.

    Raises InvalidError at `pointer` for what is not above zero, too large, or has too many decimals.
    """
    if not amount.is_finite() or amount <= 0:
        raise invalid(pointer, "not_positive", "it must be a number above zero")
    # judged by its digits, which no context rounds
    _, digits, exponent = amount.as_tuple()
    zeros = next(i for i, digit in enumerate(reversed(digits)) if digit)
    exponent = int(exponent) + zeros
    if len(digits) - zeros + exponent > AMOUNT_MAX.adjusted():
        raise invalid(pointer, "number_out_of_range", f"it must be below {AMOUNT_MAX:f}")
    if -exponent > decimals:
        raise invalid(pointer, "too_many_decimals", f"at most {decimals} decimals are kept")
    kept = digits[: len(digits) - zeros]
    return plain(Decimal((0, kept, exponent)))


def plain(amount: Decimal) -> Decimal:
    """Return an amount with its digits alone: no trailing zeros, no exponent."""
    text = str(amount)
    if "E" not in text and not ("." in text and text.endswith("0")):
        return amount
    return Decimal(f"{amount.normalize():f}")


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
    return amount.quantize(Decimal(1).scaleb(-decimals), rounding=rounding)
