"""How large one more position may be: the volatility of the portfolio that comes of it, and the margin it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from app.domain.black76 import Floats
from app.domain.sizing.weights import portfolio_volatility
from app.errors import invalid

TARGET_VOLATILITY = 0.50
FREE_MARGIN_SHARE = 0.60

Binding = Literal["volatility", "margin"]
_NOTHING = 1e-15


@dataclass(frozen=True, slots=True)
class PositionTerms:
    """A position to be sized, on asset `asset` (its row in the covariance), `side` +1 long or −1 short.

    `exposures` (n,) are what is held, USD, signed. `signal` in [0, 1] is how far the largest leverage is used. A
    market's own initial margin rate holds where that leverage would ask for less.
    """

    exposures: Floats
    covariance: Floats
    asset: int
    side: Literal[1, -1]
    equity: float
    free_margin: float
    max_leverage: float
    signal: float = 1.0
    margin_rate: float = 0.0
    target_volatility: float = TARGET_VOLATILITY
    free_margin_share: float = FREE_MARGIN_SHARE


@dataclass(frozen=True, slots=True)
class PositionSize:
    """The notionals that fit, USD, and the largest of them. Volatilities are annualised fractions of equity.

    `notional` is None where none fits, not even 0: the portfolio is past its target, and no size of this position
    brings it back (`binding` volatility), or only one that its margin does not allow (`binding` margin).
    `volatility_interval` has the ends of the notionals ≥ 0 within the target, None where there are none;
    `calmest_notional` is where the portfolio's volatility is lowest: above 0 for a hedge.
    """

    notional: float | None
    least: float | None
    binding: Binding
    margin_limit: float
    volatility_interval: tuple[float, float] | None
    volatility_before: float
    volatility_after: float | None
    calmest_notional: float
    calmest_volatility: float


def size_position(terms: PositionTerms) -> PositionSize:
    """Return the largest notional with portfolio volatility ≤ target and margin ≤ a share of the free margin.

    Exposures over equity are the weights w of √(w'Σw). Adding N on one asset makes its square a parabola in N, whose
    roots are the ends of what fits: σ²N² + 2s(Σx)N + x'Σx = (target × equity)². Margin is N × max(rate, 1/(signal ×
    leverage)). Raises InvalidError `out_of_range` for an equity that is not positive or terms below 0.
    """
    _check(terms)
    own = float(terms.covariance[terms.asset, terms.asset])
    slope = terms.side * float(terms.covariance[terms.asset] @ terms.exposures)
    before = portfolio_volatility(terms.exposures, terms.covariance)
    target = terms.target_volatility * terms.equity
    interval = _within(own, slope, before, target)
    limit = _margin_limit(terms)
    calmest = max(0.0, -slope / own) if own > 0.0 else 0.0

    def after(notional: float) -> float:
        moved = terms.exposures.astype(float, copy=True)
        moved[terms.asset] += terms.side * notional
        return portfolio_volatility(moved, terms.covariance) / terms.equity

    notional: float | None = None
    binding: Binding = "volatility"
    if interval is not None:
        binding = "margin" if limit < interval[1] else "volatility"
        notional = min(limit, interval[1]) if limit >= interval[0] else None
    return PositionSize(
        notional=notional,
        least=None if notional is None or interval is None else interval[0],
        binding=binding,
        margin_limit=limit,
        volatility_interval=interval,
        volatility_before=before / terms.equity,
        volatility_after=None if notional is None else after(notional),
        calmest_notional=calmest,
        calmest_volatility=after(calmest),
    )


def _check(terms: PositionTerms) -> None:
    if not terms.equity > 0.0:
        raise invalid("/equity", "out_of_range", "nothing is sized on an equity that is not above 0")
    if not 0.0 <= terms.signal <= 1.0:
        raise invalid("/signal", "out_of_range", "a signal is 0 to 1")
    if not terms.max_leverage > 0.0:
        raise invalid("/max_leverage", "out_of_range", "leverage is above 0")
    for name in ("margin_rate", "target_volatility", "free_margin_share"):
        if not getattr(terms, name) >= 0.0:
            raise invalid(f"/{name}", "out_of_range", "it is 0 or more")


def _within(own: float, slope: float, before: float, target: float) -> tuple[float, float] | None:
    """Return the notionals N ≥ 0 with own·N² + 2·slope·N + before² ≤ target², None where there are none."""
    over = (before - target) * (before + target)
    if own <= _NOTHING:
        # no risk of its own, so none in common with the rest either
        return (0.0, math.inf) if over <= 0.0 else None
    spread = slope * slope - own * over
    if spread < 0.0:
        return None
    root = math.sqrt(spread)
    # the root farther from 0 without cancellation, the other one by their product over/own
    far = -(slope + math.copysign(root, slope)) / own
    near = over / (own * far) if far != 0.0 else 0.0
    low, high = min(far, near), max(far, near)
    return None if high < 0.0 else (max(0.0, low), high)


def _margin_limit(terms: PositionTerms) -> float:
    """Return the notional whose margin takes the allowed share of what is free."""
    leverage = terms.signal * terms.max_leverage
    if leverage == 0.0:
        return 0.0
    rate = max(terms.margin_rate, 1.0 / leverage)
    return terms.free_margin_share * max(0.0, terms.free_margin) / rate
