"""Black-76: European options on a forward (Black 1976, "The pricing of commodity contracts").

All inputs broadcast. `forward`, `strike` in USD; `years` > 0; `iv` > 0 annualised; `discount` = e^(-rT);
`sign` +1 for a call, -1 for a put. Values are in USD for one unit of the underlying, long.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Floats = NDArray[np.float64]

PRICE_FACTOR_MIN = 1e-6
"""Lowest shocked price, as a fraction of the price before."""
VOLATILITY_MIN = 0.01
"""Lowest shocked volatility."""


def value(forward: Floats, strike: Floats, years: Floats, iv: Floats, discount: Floats, sign: Floats) -> Floats:
    """Return D·φ·(F·N(φ·d1) - K·N(φ·d2)), never below zero, shape of the broadcast inputs."""
    deviation = iv * np.sqrt(years)
    d1 = np.log(forward / strike)
    d1 /= deviation
    d1 += 0.5 * deviation
    d1 *= sign
    d2 = d1 - sign * deviation
    result = forward * ndtr(d1)
    result -= strike * ndtr(d2)
    result *= sign * discount
    return cast("Floats", np.maximum(result, 0.0, out=result))


def delta(forward: Floats, strike: Floats, years: Floats, iv: Floats, discount: Floats, sign: Floats) -> Floats:
    """Return dV/dF = D·φ·N(φ·d1)."""
    deviation = iv * np.sqrt(years)
    d1 = np.log(forward / strike) / deviation + 0.5 * deviation
    return discount * sign * ndtr(sign * d1)


def term_factor(days: Floats, term_days: float, power_short: float, power_long: float) -> Floats:
    """Return (term_days / max(days, 1))^p, p the short power below `term_days`, else the long one.

    Short-dated volatility moves more than long-dated: the factor scales a volatility range.
    """
    power = np.where(days < term_days, power_short, power_long)
    return (term_days / np.maximum(days, 1.0)) ** power
