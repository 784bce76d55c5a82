"""Figures as people read them."""

from __future__ import annotations

import math

from app.domain.scenarios import Scenario

PRICE_DIGITS, PRICE_DECIMALS_MIN, PRICE_DECIMALS_MAX = 5, 2, 16
"""A price is shown with so many significant digits at least, within so many decimals."""
MOVE_SHOWN_MAX = 10.0
"""A move past it is shown as being past it: its digits say nothing."""

NOTHING = "-"
_SHORT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def usd(value: float | None) -> str:
    """Return dollars and cents."""
    if value is None or math.isnan(value):
        return NOTHING
    shown = f"{value:,.2f}"
    return "0.00" if shown == "-0.00" else shown


def short(value: float) -> str:
    """Return an amount in three digits: 12.3k."""
    size = abs(value)
    for unit, name in _SHORT:
        if size >= 0.9995 * unit:
            shown = value / unit
            return f"{shown:.{0 if abs(shown) >= 99.95 else 1}f}{name}"
    return f"{value:.0f}" if size >= 0.5 else "0"


def price(value: float | None) -> str:
    """Return a price with its significant digits: many coins cost less than a cent."""
    if not value or math.isnan(value):
        return usd(value)
    decimals = PRICE_DIGITS - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(decimals, PRICE_DECIMALS_MIN), PRICE_DECIMALS_MAX)}f}"


def move(value: float) -> str:
    """Return a relative move, one that is far out as being that."""
    return f"over {MOVE_SHOWN_MAX:+,.0%}" if value > MOVE_SHOWN_MAX else f"{value:+.1%}"


def number(value: float | None) -> str:
    """Return a ratio."""
    return NOTHING if value is None else f"{value:.4f}"


def scenario(shown: Scenario) -> str:
    """Return what a scenario moves."""
    moves = f"{shown.price_move:+.2f} R" if shown.in_ranges else f"{shown.price_move:+.0%}"
    own = f", {len(shown.shocks)} own" if shown.shocks else ""
    vol = f", vol {shown.vol_move:+.0%}" if shown.vol_move else ""
    return f"price {moves}{own}{vol}"
