"""The search for the cheapest cure: how much of each position to close so that the fewest dollars are traded.

Margin falls along what is closed in kinks and jumps: a hedge that is closed raises it, and the last position at an
underlying's highest rate takes that rate with it. Two searches cover what the other misses, and the cheaper answer is
pruned. Cutting planes find the optimum wherever margin is convex in what is closed. Closing step by step whatever frees
most margin a dollar finds the jumps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal

import numpy as np
from scipy.optimize import brentq, linprog

from app.domain.black76 import Floats
from app.domain.book import Book
from app.domain.liquidate import Assess, Reduce, Slice, Target

SEARCHED_MAX = 40
"""Positions that are searched at once, the largest first; the next ones follow where closing these is not enough."""
RESTARTED_MAX = 10
"""Positions up to which the steps are tried from each of them closed first."""
CUTS_MAX = 60
_DIFFERENCE = 1e-4
_TOLERANCE = 1e-10
_DIGITS = Context(prec=10, rounding=ROUND_CEILING)
_WIDENED = (1e-9, 1e-7, 1e-5, 1e-3)
_LEAST = 1e-8
"""Share of a position below which closing it is rounding."""


@dataclass(frozen=True, slots=True)
class Search:
    """A book, what of it may be closed, and the utilization to come to. Answers are fractions closed (n,)."""

    held: Book
    targets: Sequence[Target]
    assess: Assess
    reduce: Reduce
    target: float

    @property
    def dollars(self) -> Floats:
        """Notional of each target (n,), USD."""
        return np.array([t.notional for t in self.targets], dtype=np.float64)

    def slices(self, closed: Floats) -> list[Slice]:
        """Return what is closed of each target, rounded up to ten digits."""
        parts = zip(self.targets, closed.tolist(), strict=True)
        return [Slice(t, _part(t.size, share)) for t, share in parts if share > _LEAST]

    def book(self, closed: Floats) -> Book:
        """Return the book after closing."""
        left = self.held
        for part in self.slices(closed):
            left = self.reduce(left, part.target, part.size)
        return left

    def excess(self, closed: Floats) -> float:
        """Return required initial margin − target × equity after closing, USD: ≤ 0 is enough."""
        health = self.assess(self.book(closed)).health
        return health.required_initial - self.target * health.equity

    def is_enough(self, closed: Floats) -> bool:
        """Whether utilization is defined and at the target or below after closing."""
        utilization = self.assess(self.book(closed)).health.utilization
        return utilization is not None and utilization <= self.target


def _part(size: Decimal, share: float) -> Decimal:
    return size if share >= 1.0 else min(size, _DIGITS.multiply(size, Decimal(share)))


def cheapest(search: Search) -> list[Slice]:
    """Return what to close of a book whose utilization is past the target; all of it where nothing less will do.

    Near the optimum, not proved to be it: on 500 drawn books of 2 to 5 positions in cross margin, some at leverages of
    their own, it traded what the exact optimum trades (a linear programme for each set of positions closed whole), to
    1e-7. Books of over RESTARTED_MAX positions are searched from nothing closed alone.
    """
    done: list[Slice] = []
    held, rest = search.held, list(search.targets)
    while rest:
        batch, rest = rest[:SEARCHED_MAX], rest[SEARCHED_MAX:]
        part = Search(held, batch, search.assess, search.reduce, search.target)
        everything = np.ones(len(batch))
        if part.is_enough(everything):
            return done + part.slices(_best(part))
        done += part.slices(everything)
        held = part.book(everything)
    return done


def _best(search: Search) -> Floats:
    """Return the cheapest fractions found that are enough; closing everything is."""
    found = [np.ones(len(search.targets)), *_candidates(search)]
    dollars = search.dollars
    for closed in sorted(found, key=lambda c: float(c @ dollars)):
        for widened in _widened(_pruned(search, closed)):
            if search.is_enough(widened):
                return widened
    return found[0]


def _widened(closed: Floats) -> Iterator[Floats]:
    """Yield the fractions, then a little more of one or of all: what sizes, money and roots were rounded by.

    One alone, for closing more of a hedge that is evened out would need more again.
    """
    yield closed
    for more in _WIDENED:
        for part in (np.ones_like(closed), *np.eye(len(closed))):
            yield np.minimum(1.0, closed * (1.0 + more * part))


def _candidates(search: Search) -> Iterator[Floats]:
    """Yield fractions that are enough, from both searches, begun with nothing closed and with single positions."""
    count = len(search.targets)
    starts = [np.zeros(count), *(np.eye(count) if count <= RESTARTED_MAX else ())]
    for start in starts:
        planes = _cutting_planes(search, start)
        if planes is not None:
            yield planes
        yield from _steps(search, start)


# --- cutting planes


def _cutting_planes(search: Search, start: Floats) -> Floats | None:
    """Return fractions by Kelley's cutting planes (1960): the linear programme under every tangent so far.

    Exact where margin is convex in what is closed beyond the start; None where the tangents come to contradict each
    other.
    """
    count = len(search.targets)
    closed, dollars = start, search.dollars
    bounds = [(least, 1.0) for least in start.tolist()]
    rows, limits = np.empty((0, count)), np.empty(0)
    scale = max(search.excess(closed), 1e-9)
    for _ in range(CUTS_MAX):
        excess = search.excess(closed)
        if excess <= _TOLERANCE * scale:
            return closed
        slope = _slope(search, closed, excess)
        rows = np.vstack([rows, slope / scale])
        limits = np.append(limits, (float(slope @ closed) - excess) / scale)
        found = linprog(dollars / dollars.sum(), A_ub=rows, b_ub=limits, bounds=bounds, method="highs")
        if found.x is None:
            return None
        if float(np.abs(found.x - closed).max()) <= _TOLERANCE:
            break
        closed = np.clip(found.x, 0.0, 1.0)
    return _finished(search, closed, np.ones(count))


def _slope(search: Search, closed: Floats, excess: float) -> Floats:
    """Return the slopes (n,) of the excess by fraction closed, one-sided: forwards unless all is closed."""
    slope = np.empty(len(closed))
    for i, share in enumerate(closed.tolist()):
        step = _DIFFERENCE if share <= 1.0 - _DIFFERENCE else -_DIFFERENCE
        moved = closed.copy()
        moved[i] += step
        slope[i] = (search.excess(moved) - excess) / step
    return slope


# --- steps


def _steps(search: Search, start: Floats) -> Iterator[Floats]:
    """Yield the ways found to be enough while closing, step by step, what frees most margin a dollar."""
    closed, excess = start, search.excess(start)
    dollars = search.dollars
    while excess > 0.0:
        best, most = None, 0.0
        for moved in _moves(search, closed):
            then = search.excess(moved)
            if then <= 0.0 and (finished := _finished(search, closed, moved)) is not None:
                yield finished
            freed = (excess - then) / max(float((moved - closed) @ dollars), 1e-9)
            if freed > most:
                best, most, after = moved, freed, then
        if best is None:
            # no position alone frees anything, as in a hedged book: all of them in proportion do
            if (finished := _finished(search, closed, np.ones(len(closed)))) is not None:
                yield finished
            return
        closed, excess = best, after
    yield closed


def _moves(search: Search, closed: Floats) -> Iterator[Floats]:
    """Yield what may be closed next: each position whole, and each as far as evens out its underlying."""
    portfolio = search.assess(search.book(closed)).portfolio
    rows = {symbol: i for i, symbol in enumerate(portfolio.symbols)}
    for i, target in enumerate(search.targets):
        if closed[i] >= 1.0:
            continue
        moved = closed.copy()
        moved[i] = 1.0
        yield moved
        row = rows.get(getattr(target.item, "symbol", ""))
        if row is None or target.notional <= 0.0:
            continue
        net, exposure = float(portfolio.net[portfolio.underlying[row]]), float(portfolio.exposure[row])
        if net * exposure > 0.0 and abs(net) < abs(exposure):
            moved = closed.copy()
            moved[i] += abs(net) / target.notional
            yield moved


def _finished(search: Search, closed: Floats, moved: Floats) -> Floats | None:
    """Return the least way from one point towards another that is enough, None where the whole way is not."""

    def excess(share: float) -> float:
        return search.excess(closed + share * (moved - closed))

    if excess(0.0) <= 0.0:
        return closed
    if excess(1.0) > 0.0:
        return None
    share = float(brentq(excess, 0.0, 1.0, xtol=1e-9, rtol=1e-9))
    return closed + min(1.0, share) * (moved - closed)


def _pruned(search: Search, closed: Floats) -> Floats:
    """Return fractions of which none can be made smaller alone, the least effective looked at first."""
    for i in np.argsort(-search.dollars, kind="stable"):
        less = closed.copy()
        less[i] = 0.0
        if closed[i] > 0.0 and (kept := _finished(search, less, closed)) is not None:
            closed = kept
    return closed
