"""Plans that bring an account's utilization down: reduce-only orders, what they free, and the health that follows.

A plan books nothing: each is worked out on copies of the book, assessed as the account itself is. Reservations are left
to the services that hold them; isolated positions have collateral of their own and no part in the pool's utilization,
so that only `keep_top_n` closes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from app.domain.book import Book, LentLoan, OpenPosition
from app.domain.cheapest import Search, cheapest
from app.domain.health import Health
from app.domain.lending import recalls_for
from app.domain.liquidate import Assess, Reduce, Slice, Target, is_at, next_slice
from app.domain.moves import Move, agent
from app.domain.quote import AccountFigures
from app.domain.trade import Order

TARGET_UTILIZATION = 0.55

DeleveragePolicy = Literal["smallest_first", "keep_top_n", "cheapest_cure"]


@dataclass(frozen=True, slots=True)
class PlannedOrder:
    """One reduce-only order of a plan, and the notional that it trades at the mark, USD."""

    position_id: str
    order: Order
    notional: float
    is_whole: bool


@dataclass(frozen=True, slots=True)
class DeleveragePlan:
    """Orders in the sequence in which they are sent, and what they come to, USD.

    `reached` tells whether what was asked for is met: where it is not, no plan of this policy meets it. `margin_freed`
    is what the orders take off the required initial margin, reservations aside.
    """

    policy: DeleveragePolicy
    orders: Sequence[PlannedOrder]
    reached: bool
    dollars_traded: float
    margin_freed: float
    before: Health
    after: Health
    book: Book


def recall_first(held: Book, figures: AccountFigures, target: float) -> tuple[list[LentLoan], Book]:
    """Return the loans to recall before a position is touched, and the book with them back.

    Those with a notice of a day at most, the smallest first, until they are worth what is missing to the target.
    """
    missing = figures.health.required_initial / target - figures.health.equity
    chosen = recalls_for(held.loans, {name: price.value for name, price in figures.prices.items()}, missing)
    own = agent(held.agent_id, "lent"), agent(held.agent_id, "free")
    return chosen, held.after_moves([Move(loan.asset, loan.principal, *own) for loan in chosen])


def smallest_first(held: Book, assess: Assess, reduce: Reduce, target: float = TARGET_UTILIZATION) -> DeleveragePlan:
    """Return the plan that closes the smallest position, then the next, the last one as far as is needed."""
    figures = assess(held)
    left, slices = held, list[Slice]()
    for chosen in sorted(_pooled(held, figures), key=lambda t: (t.notional, t.item.id)):
        if is_at(assess(left), target):
            break
        part = next_slice(left, chosen, assess, reduce, target)
        left = reduce(left, part.target, part.size)
        slices.append(part)
    return _plan("smallest_first", figures, assess(left), slices, left, target)


def keep_top_n(held: Book, assess: Assess, reduce: Reduce, count: int) -> DeleveragePlan:
    """Return the plan that keeps the `count` largest positions by notional and closes the others, smallest first.

    Positions that are not reducible count among the largest where they are, and stay where they are not.
    """
    figures = assess(held)
    ranked = sorted(_targets(held, figures), key=lambda t: (-t.notional, t.item.id))
    reducible = {p.id for p in held.positions if p.reducible}
    slices = [Slice(t, t.size) for t in reversed(ranked[count:]) if t.item.id in reducible]
    left = held
    for part in slices:
        left = reduce(left, part.target, part.size)
    return _plan("keep_top_n", figures, assess(left), slices, left, None, reached=len(left.positions) <= count)


def cheapest_cure(held: Book, assess: Assess, reduce: Reduce, target: float = TARGET_UTILIZATION) -> DeleveragePlan:
    """Return the plan that trades the fewest dollars found; how near the optimum that is: `cheapest.cheapest`."""
    figures = assess(held)
    targets = sorted(_pooled(held, figures), key=lambda t: (-t.notional, t.item.id))
    slices: list[Slice] = []
    if not is_at(figures, target):
        slices = cheapest(Search(held, targets, assess, reduce, target))
    left = held
    for part in slices:
        left = reduce(left, part.target, part.size)
    return _plan("cheapest_cure", figures, assess(left), slices, left, target)


def planned_order(part: Slice) -> PlannedOrder:
    """Return the reduce-only order that closes a slice of a position. Raises TypeError for one of a reservation."""
    position = part.target.item
    if not isinstance(position, OpenPosition):
        raise TypeError(f"{position.id} is a reservation: no order closes it")
    share = 1.0 if part.is_whole else float(part.size / part.target.size)
    order = Order(position.symbol, "sell" if position.side == "long" else "buy", part.size, reduce_only=True)
    return PlannedOrder(position.id, order, share * part.target.notional, part.is_whole)


def _targets(held: Book, figures: AccountFigures) -> list[Target]:
    notionals = figures.portfolio.notional.tolist()
    return [Target(p, p.size, notional) for p, notional in zip(held.positions, notionals, strict=True)]


def _pooled(held: Book, figures: AccountFigures) -> list[Target]:
    may_close = {p.id for p in held.positions if p.reducible and p.margin_mode == "pooled"}
    return [t for t in _targets(held, figures) if t.item.id in may_close]


def _plan(
    policy: DeleveragePolicy,
    before: AccountFigures,
    after: AccountFigures,
    slices: Sequence[Slice],
    left: Book,
    target: float | None,
    *,
    reached: bool = False,
) -> DeleveragePlan:
    orders = [planned_order(part) for part in slices]
    return DeleveragePlan(
        policy=policy,
        orders=orders,
        reached=reached if target is None else is_at(after, target),
        dollars_traded=sum(planned.notional for planned in orders),
        margin_freed=before.health.required_initial - after.health.required_initial,
        before=before.health,
        after=after.health,
        book=left,
    )
