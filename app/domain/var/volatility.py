"""Returns rescaled to today's volatility."""

from __future__ import annotations

from typing import cast

import numpy as np

from app.domain.black76 import Floats


def ewma_variance(returns: Floats, decay: float, first: Floats | float) -> Floats:
    """Return the variances (T + 1, ...) forecast for each of T days and the day after, from returns (T, ...).

    σ²_{t+1} = λσ²_t + (1-λ)r²_t, σ²_0 = `first`. Source: RiskMetrics Technical Document 1996.
    """
    variance = np.empty((len(returns) + 1, *returns.shape[1:]))
    variance[0] = first
    fresh = (1.0 - decay) * returns**2
    for t, squared in enumerate(fresh):
        variance[t + 1] = decay * variance[t] + squared
    return variance


def rescaled(returns: Floats, decay: float) -> Floats:
    """Return the returns (T, ...) at today's volatility: r_t x σ_{T+1}/σ_t.

    σ are EWMA volatilities seeded with the window's sample variance. An asset that never moved is left as it is.
    Source: Hull & White 1998, "Incorporating volatility updating into the historical simulation method".
    """
    variance = ewma_variance(returns, decay, returns.var(axis=0, ddof=1))
    ratio = np.divide(variance[-1], variance[:-1], out=np.ones_like(returns), where=variance[:-1] > 0.0)
    return cast("Floats", returns * np.sqrt(ratio))
