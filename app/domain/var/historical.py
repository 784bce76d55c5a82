"""Historical simulation: today's book revalued in full on every day of a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal, cast

from app.domain.black76 import Floats
from app.domain.panel import HISTORY_DAYS_MIN, History, missing_history
from app.domain.portfolio import Portfolio
from app.domain.scenarios import floored
from app.domain.var.revalue import losses_at, not_modelled
from app.domain.var.tail import (
    SampleTail,
    age_weights,
    checked_confidences,
    checked_horizon,
    quantiles,
    sample_tails,
    scaled,
    weighted_quantiles,
    weighted_tails,
)
from app.domain.var.volatility import rescaled
from app.errors import invalid

HistoricalMethod = Literal["plain", "age_weighted", "filtered"]
HorizonRule = Literal["one_day", "square_root_of_time"]

AGE_DECAY = 0.98
VOLATILITY_DECAY = 0.94


@dataclass(frozen=True, slots=True)
class HistoricalTerms:
    """What to compute: `age_decay` is the λ of the weights, `volatility_decay` that of the filter."""

    confidences: Sequence[float] = (0.95, 0.99)
    horizon_days: float = 1.0
    method: HistoricalMethod = "plain"
    age_decay: float = AGE_DECAY
    volatility_decay: float = VOLATILITY_DECAY


@dataclass(frozen=True, slots=True)
class HistoricalRisk:
    """VaR and ES of a book, with the days they come from.

    `losses` (T,) are of one day, USD, and `moves` (T, J) the returns that gave them, rescaled where filtered. Each
    tail's VaR and ES are of the horizon: `scale` times its mix of `losses`, by the rule that `horizon_rule` names.
    """

    method: HistoricalMethod
    tails: tuple[SampleTail, ...]
    losses: Floats
    moves: Floats
    first: date
    last: date
    horizon_days: float
    horizon_rule: HorizonRule
    scale: float
    decay: float | None
    not_modelled: tuple[str, ...]

    @property
    def days(self) -> int:
        """Days of the window."""
        return len(self.losses)

    def values_at_risk(self, losses: Floats) -> Floats:
        """Return the VaR (K, W), at the same confidences and horizon, of other books by their daily losses (W, T)."""
        levels = [tail.confidence for tail in self.tails]
        if self.method == "age_weighted" and self.decay is not None:
            return self.scale * weighted_quantiles(losses, age_weights(self.days, self.decay), levels)
        return self.scale * quantiles(losses, levels)


def historical(portfolio: Portfolio, history: History, terms: HistoricalTerms) -> HistoricalRisk:
    """Return VaR and ES of the book, full revaluation on simple returns of its underlyings, in their order.

    Horizons other than a day scale a day's figures by √h. Raises InvalidError `missing_history` below 60 days.
    Source: docs/value-at-risk.md.
    """
    confidences, horizon = checked_confidences(terms.confidences), checked_horizon(terms.horizon_days)
    if history.assets != portfolio.underlyings.names:
        raise ValueError(f"returns of {history.assets} for {portfolio.underlyings.names}")
    if len(history) < HISTORY_DAYS_MIN:
        raise missing_history(dict.fromkeys(history.assets, len(history)), HISTORY_DAYS_MIN)
    decay = _decay(terms)
    moves = history.returns
    if terms.method == "filtered":
        moves = floored(rescaled(moves, terms.volatility_decay))
    losses = -(moves @ portfolio.net) if portfolio.is_linear else losses_at(portfolio, moves)
    if terms.method == "age_weighted":
        tails = weighted_tails(losses, age_weights(len(losses), terms.age_decay), confidences)
    else:
        tails = sample_tails(losses, confidences)
    scale = math.sqrt(horizon)
    return HistoricalRisk(
        method=terms.method,
        tails=tuple(scaled(tail, scale) for tail in tails),
        losses=losses,
        moves=moves,
        first=cast("date", history.dates[0].item()),
        last=cast("date", history.dates[-1].item()),
        horizon_days=horizon,
        horizon_rule="one_day" if horizon == 1.0 else "square_root_of_time",
        scale=scale,
        decay=decay,
        not_modelled=not_modelled(portfolio),
    )


def _decay(terms: HistoricalTerms) -> float | None:
    if terms.method == "plain":
        return None
    name = "age_decay" if terms.method == "age_weighted" else "volatility_decay"
    decay = float(getattr(terms, name))
    if not 0.0 < decay < 1.0:
        raise invalid(f"/{name}", "out_of_range", "a decay lies between 0 and 1, both excluded")
    return decay
