"""Which position is closed next, and how much of it; and what an owner could do instead. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

from app.domain.book import Book, OpenPosition, OpenReservation
from app.domain.money import DECIMALS_MAX, round_owed, to_decimal
from app.domain.quote import AccountFigures

LiquidationPolicy = Literal["smallest_first", "largest_relief", "keep_top_n"]

SIZE_STEPS = 20
WEIGHED_MAX = 20
"""Targets whose relief is found out for one choice."""
_DIGITS = Context(prec=8, rounding=ROUND_CEILING)

Assess = Callable[[Book], AccountFigures]
Reduce = Callable[[Book, "Target", Decimal], Book]


@dataclass(frozen=True, slots=True)
class Target:
    """A reducible position or reservation, its size, and its notional in USD."""

    item: OpenPosition | OpenReservation
    size: Decimal
    notional: float


@dataclass(frozen=True, slots=True)
class Slice:
    """What is closed in one step: a target, and how much of it."""

    target: Target
    size: Decimal

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the target stays."""
        return self.size == self.target.size


def in_order(targets: Sequence[Target], policy: LiquidationPolicy, relief: Callable[[Target], float]) -> list[Target]:
    """Return the targets in the order in which they are closed.

    `smallest_first` and `keep_top_n` by notional, `largest_relief` by what closing one takes off the required initial
    margin. Ties go by id, so that two workers choose alike.
    """
    if policy == "largest_relief":
        # of the largest only: each relief assesses the whole book
        largest = sorted(targets, key=lambda t: (-t.notional, t.item.id))
        weighed = sorted(largest[:WEIGHED_MAX], key=lambda t: (-relief(t), t.item.id))
        return weighed + largest[WEIGHED_MAX:]
    return sorted(targets, key=lambda t: (t.notional, t.item.id))


def outside_largest(targets: Sequence[Target], keep: int) -> list[Target]:
    """Return the targets, in their order, but for the `keep` largest positions by notional."""
    positions = [t for t in targets if isinstance(t.item, OpenPosition)]
    largest = sorted(positions, key=lambda t: (-t.notional, t.item.id))[:keep]
    kept = {t.item.id for t in largest}
    return [t for t in targets if t.item.id not in kept]


def is_at(figures: AccountFigures, level: float) -> bool:
    """Whether utilization is at the level or below."""
    used = figures.health.utilization
    return used is not None and used <= level and not figures.health.insolvent


def next_slice(book: Book, target: Target, assess: Assess, reduce: Reduce, level: float) -> Slice:
    """Return how much of a target to close: all of it, or just the part that brings utilization to the level.

    By regula falsi on required initial margin - level x equity (Illinois; Dowell & Jarratt 1971), which is a line in
    the size but where a net exposure turns: a few assessments, not one a bit. What is returned was itself found enough.
    """

    def closed(size: Decimal) -> tuple[bool, float]:
        after = assess(reduce(book, target, size))
        return is_at(after, level), _missing(after, level)

    enough, below = closed(target.size)
    if not enough:
        return Slice(target, target.size)
    low, above, high = Decimal(0), _missing(assess(book), level), target.size
    was_enough = None
    for _ in range(SIZE_STEPS):
        share = above / (above - below) if below <= 0.0 < above < math.inf else 0.5
        middle = round_owed(_DIGITS.plus(low + (high - low) * to_decimal(share)), DECIMALS_MAX)
        if not low < middle < high:
            break
        enough, missing = closed(middle)
        again, was_enough = enough is was_enough, enough  # the end that was kept twice weighs half
        if enough:
            high, below, above = middle, min(0.0, missing), above / 2.0 if again else above
        else:
            low, above, below = middle, missing, below / 2.0 if again else below
    return Slice(target, high)


def _missing(figures: AccountFigures, level: float) -> float:
    """Return required initial margin - level x equity, USD; infinite where there is no utilization."""
    health = figures.health
    return math.inf if health.utilization is None else health.required_initial - level * health.equity


def fewest(least: int, most: int, enough: Callable[[int], bool]) -> int:
    """Return a count from least to most that is enough while one less is not (or is least); most + 1: none is.

    It takes some log2 of the range of tries, where more may be less only by chance: hedges that are closed in part.
    """
    if enough(least):
        return least
    if most <= least or not enough(most):
        return most + 1
    low, high = least, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
