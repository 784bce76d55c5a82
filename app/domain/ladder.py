"""The drawdown ladder: what is cut, rung by rung, as equity falls from its peak. Pure.

Cuts are of the gross notional that stood before the first rung, so that it does not matter whether an account falls
by one rung at a time or by several at once: .90, .75 and .50 of it are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

from app.domain.book import MINIMUM_VIABLE, Book, OpenPosition
from app.domain.money import DECIMALS_MAX, round_owed, to_decimal
from app.domain.parameters import HealthPolicy
from app.domain.quote import AccountFigures
from app.domain.trade import Order
from app.domain.watch import clear_level

RUNGS = ("none", "trim", "cut", "halve", "minimum_viable")
PUT_FROM, HEDGE_FROM = 2, 3
_SIZE_DIGITS = Context(prec=8, rounding=ROUND_CEILING)


@dataclass(frozen=True, slots=True)
class Cut:
    """A reduce-only order for a part of an open position."""

    position: OpenPosition
    size: Decimal

    @property
    def order(self) -> Order:
        """The order that closes the part."""
        side: Literal["buy", "sell"] = "sell" if self.position.side == "long" else "buy"
        return Order(self.position.symbol, side, self.size, reduce_only=True)


@dataclass(frozen=True, slots=True)
class Hedge:
    """Protection that a rung advises: USD of notional on an underlying. It is told, never ordered."""

    kind: Literal["put", "inverse"]
    underlying: str
    side: Literal["long", "short"]
    notional: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rung asks for: gross notional down to `gross_target`, USD, by `cuts`, and what protection it advises."""

    rung: int
    gross: float
    gross_target: float
    cuts: Sequence[Cut]
    hedges: Sequence[Hedge]


def bounds(policy: HealthPolicy) -> tuple[float, float, float, float]:
    """Return the drawdowns at which the rungs past the first begin."""
    return policy.drawdown_trim, policy.drawdown_cut, policy.drawdown_halve, policy.drawdown_minimum


def rung_at(drawdown: float, policy: HealthPolicy) -> int:
    """Return the rung of a drawdown, a fraction of the peak: bounds are inclusive, but for the last."""
    *inner, last = bounds(policy)
    if drawdown > last:
        return MINIMUM_VIABLE
    return sum(1 for bound in inner if drawdown >= bound)


def settled_rung(before: int, drawdown: float, policy: HealthPolicy) -> int:
    """Return the rung to tell: down at once, up only when the drawdown is clear of the bound."""
    now = rung_at(drawdown, policy)
    held = sum(1 for bound in bounds(policy) if drawdown >= clear_level(bound))
    return max(now, min(before, held))


def kept_share(rung: int, policy: HealthPolicy) -> float:
    """Return the share of gross notional that is kept on a rung."""
    cuts = (0.0, policy.drawdown_trim_share, policy.drawdown_cut_share, policy.drawdown_halve_share)
    return 1.0 - cuts[min(rung, HEDGE_FROM)]


def plan(book: Book, figures: AccountFigures, policy: HealthPolicy, rung: int, applied: int) -> Plan:
    """Return what a rung asks of a book for which `applied` was the deepest rung acted on in this fall.

    What may be reduced is cut by one share. Source: docs/margin-calls.md, "Drawdown ladder".
    """
    gross = figures.gross_notional
    target = gross * min(1.0, kept_share(rung, policy) / kept_share(applied, policy))
    if rung == MINIMUM_VIABLE:
        target = min(target, max(figures.equity, 0.0))
    return Plan(
        rung,
        gross,
        target,
        _cuts(book, figures, gross - target),
        _hedges(figures, rung, target / gross if gross else 0.0),
    )


def _cuts(book: Book, figures: AccountFigures, excess: float) -> list[Cut]:
    notionals = figures.portfolio.notional.tolist()
    reducible = [(p, n) for p, n in zip(book.positions, notionals, strict=True) if p.reducible and n > 0.0]
    total = sum(notional for _, notional in reducible)
    if excess <= 0.0 or total <= 0.0:
        return []
    share = to_decimal(min(1.0, excess / total))
    return [Cut(p, _part(p.size, share)) for p, _ in reducible]


def _part(size: Decimal, share: Decimal) -> Decimal:
    """Return a share of a size that can be booked, rounded up; all of what is too small to be divided."""
    return min(size, round_owed(_SIZE_DIGITS.multiply(size, share), DECIMALS_MAX))


def _hedges(figures: AccountFigures, rung: int, kept: float) -> list[Hedge]:
    """Return a put on the largest long from the second rung on, and from the third the inverse of what is left."""
    table = figures.portfolio
    names, net = table.underlyings.names, table.net.tolist()
    longs = table.by_underlying(table.exposure.clip(min=0.0)).tolist()
    found: list[Hedge] = []
    if rung >= PUT_FROM and max(longs, default=0.0) > 0.0:
        most = longs.index(max(longs))
        found.append(Hedge("put", names[most], "long", longs[most] * kept))
    if rung >= HEDGE_FROM and any(net):
        most = max(range(len(net)), key=lambda j: abs(net[j]))
        found.append(Hedge("inverse", names[most], "short" if net[most] > 0.0 else "long", abs(net[most]) * kept))
    return found
