"""What a margin call closes, and what its owner could do instead: targets, the next slice of them, the cures.

Nothing here decides when: `margin_calls` does, under the lock of the book that it hands in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import ROUND_CEILING, Decimal
from itertools import accumulate
from typing import Any, cast

from app.db.session import Tx
from app.domain import liquidate
from app.domain.book import ZERO, Book, OpenPosition, OpenReservation, PendingOrder
from app.domain.liquidate import LiquidationPolicy, Slice, Target
from app.domain.money import plain, to_decimal, to_float
from app.domain.moves import SETTLEMENT_ASSET, Move, agent
from app.domain.quote import AccountFigures
from app.domain.trade import Order, plan
from app.services import trading, venue, wallet
from app.services.margin import Scene, by_mark, forced_price
from app.services.orders import Labels
from app.services.wallet import Names
from app.settings import Settings

ORDERS_SHOWN_MAX = 200
CURE_POSITIONS_MAX = 300
"""Larger books are told what to deposit, and no orders: each try assesses the whole book."""
_CENT = Decimal("0.01")


@dataclass(frozen=True, slots=True)
class Rules:
    """How accounts are liquidated, from the settings."""

    policy: LiquidationPolicy
    slippage: Decimal
    keep: int = 3
    venue_patience: timedelta = timedelta(seconds=30)
    venue_attempts: int = 3

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        """Return the rules of a process."""
        return cls(
            settings.liquidation_policy,
            settings.liquidation_slippage,
            settings.liquidation_keep,
            timedelta(seconds=settings.liquidation_venue_seconds),
            settings.liquidation_venue_attempts,
        )


@dataclass(frozen=True, slots=True)
class Goal:
    """What a liquidation is to reach: utilization at `level`, as `assess` finds it for the book that is left."""

    assess: Callable[[Book], AccountFigures]
    level: float


@dataclass(frozen=True, slots=True)
class Closed:
    """What was closed: the book that it left, what the house lost by it, and what is told of it."""

    book: Book
    deficit: Decimal
    told: dict[str, Any]


def breached_isolated(held: Book, figures: AccountFigures) -> list[OpenPosition]:
    """Return the isolated positions whose own collateral no longer meets their maintenance margin."""
    rows = zip(
        held.positions,
        figures.portfolio.unrealized_pnl.tolist(),
        figures.isolated.position_maintenance.tolist(),
        strict=True,
    )
    return [
        p for p, pnl, keep in rows if p.margin_mode == "isolated" and p.reducible and to_float(p.allocated) + pnl < keep
    ]


def targets(
    held: Book, figures: AccountFigures, *, isolated_alone: bool = False, stale: Collection[str] = ()
) -> list[Target]:
    """Return what may be closed: reducible positions of the pool, reducible reservations, isolated ones past saving.

    The latter alone, where a call is for them alone; and nothing of which the price is stale.
    """
    doomed = _ids(breached_isolated(held, figures))
    found: list[Target] = []
    table = figures.portfolio
    underlyings = [table.underlyings.names[j] for j in table.underlying.tolist()]
    for position, notional, underlying in zip(held.positions, table.notional.tolist(), underlyings, strict=True):
        eligible = position.id in doomed or (position.margin_mode == "pooled" and not isolated_alone)
        if eligible and position.reducible and mark_symbol(figures, position.symbol, underlying) not in stale:
            found.append(Target(position, position.size, notional))
    prices = figures.prices
    for reservation in held.reservations if not isolated_alone else ():
        if reservation.reducible and reservation.asset not in stale:
            price = prices[reservation.asset].value if reservation.asset in prices else 1.0
            found.append(Target(reservation, reservation.remaining, to_float(reservation.remaining) * price))
    return found


def mark_symbol(figures: AccountFigures, symbol: str, underlying: str) -> str:
    """Return under which name the price stands that marks a position."""
    return symbol if symbol in figures.prices else underlying


def own_goal(held: Book, scene: Scene) -> Goal:
    """Return that of an account's own call: its stop level."""
    return Goal(scene.figures, held.settings.policy(scene.market.parameters.policy).stop_utilization)


def next_slice(
    held: Book, scene: Scene, figures: AccountFigures, rules: Rules, eligible: Sequence[Target], goal: Goal
) -> Slice:
    """Return what of the eligible is closed next, at least one, as far as the goal asks for it."""
    doomed = _ids(breached_isolated(held, figures))

    def relief(target: Target) -> float:
        after = scene.figures(reduced(scene, held, target, target.size, rules.slippage))
        return figures.health.required_initial - after.health.required_initial

    ordered = liquidate.in_order(eligible, rules.policy, relief)
    # an isolated position past saving is closed whole and first: it fails alone
    past_saving = [t for t in ordered if t.item.id in doomed]
    if past_saving:
        return Slice(past_saving[0], past_saving[0].size)
    if rules.policy == "keep_top_n":
        outside = liquidate.outside_largest(ordered, rules.keep)
        if outside:
            return Slice(outside[0], outside[0].size)  # whole: no remainders but of what is kept
    return _part(held, scene, ordered[0], goal, rules.slippage)


def _part(held: Book, scene: Scene, target: Target, goal: Goal, slippage: Decimal) -> Slice:
    """Return the target, or the part of it that reaches the goal."""

    def reduce(before: Book, chosen: Target, size: Decimal) -> Book:
        return reduced(scene, before, chosen, size, slippage)

    return liquidate.next_slice(held, target, goal.assess, reduce, goal.level)


async def close(tx: Tx, scene: Scene, held: Book, chosen: Slice, rules: Rules, call_id: str) -> Closed:
    """Close a slice in the book: fill it at the mark less the slippage, or release the reservation."""
    target, names = chosen.target.item, Names(reference=call_id)
    whole = {"size": plain(chosen.size), "notional": chosen.target.notional, "is_whole": chosen.is_whole}
    if isinstance(target, OpenReservation):
        _, left = await wallet.release(tx, held, target.id, chosen.size, names)
        told: dict[str, Any] = {"reservation_id": target.id, "service": target.service, "asset": target.asset}
        return Closed(left, ZERO, told | whole)
    contract, _ = by_mark(scene.market, target.symbol)
    order = _closing(target, chosen.size)
    trade = plan(held, order, contract, _fill_price(scene, target, rules.slippage), "", tx.now)
    filled = await trading.fill(tx, held, order, trade, names, _labels(call_id))
    told = {
        "position_id": target.id,
        "order_id": filled.order.id,
        "symbol": target.symbol,
        "side": order.side,
        "fill_price": plain(trade.price),
        "realized_pnl": plain(trade.realized_pnl),
    }
    return Closed(filled.book, trade.deficit, told | whole)


async def request(tx: Tx, held: Book, chosen: Slice, position: OpenPosition, call_id: str) -> tuple[Book, list[str]]:
    """Book the reduce-only order of a slice, which waits for its venue, and cancel the agent's own orders.

    Return the book and the ids of what was cancelled: they would be in each other's way.
    """
    own = list(held.pending)
    held = await venue.withdraw(tx, held, own, "a liquidation takes their place")
    asked = await trading.wait(tx, held, _closing(position, chosen.size), _labels(call_id))
    return asked.book, [order.id for order in own]


def moot(held: Book, call_id: str) -> list[PendingOrder]:
    """Return the liquidation orders of a call that ask for more than there now is to reduce."""

    def left(order: PendingOrder) -> Decimal:
        position = held.position(order.symbol)
        closes = position is not None and (position.side == "long") == (order.side == "sell")
        return position.size if position is not None and closes else ZERO

    return [order for order in held.requested(call_id) if order.remaining > left(order)]


def asked_for(held: Book, call_id: str) -> list[dict[str, Any]]:
    """Return what the liquidation orders of a call ask a venue for: what of them is not filled yet."""
    shown = []
    for order in held.requested(call_id):
        position = held.position(order.symbol)
        shown.append(
            {
                "order_id": order.id,
                "position_id": None if position is None else position.id,
                "symbol": order.symbol,
                "side": order.side,
                "size": plain(order.remaining),
                "reduce_only": True,
            }
        )
    return shown


def _labels(call_id: str) -> Labels:
    return Labels("liquidation", {"margin_call_id": call_id}, call_id)


def cures(held: Book, scene: Scene, figures: AccountFigures) -> dict[str, Any]:
    """Return the cheapest ways out, down to the cure level: what to put in, or what to close and give up.

    `deposit` is what is missing; `allocate` what each isolated position past saving needs of its own, after the
    deposit. Instead of both: `orders`, reduce-only, and `releases` of reservations, smallest first.
    """
    allocate = _allocations(held, figures)
    return {
        "deposit": {"asset": SETTLEMENT_ASSET, "amount": _deposit(held, scene, allocate)},
        "allocate": allocate,
        **_closures(held, scene, figures),
    }


def _allocations(held: Book, figures: AccountFigures) -> list[dict[str, Any]]:
    """Return the least collateral, in whole cents, that restores each isolated position past saving."""
    doomed = _ids(breached_isolated(held, figures))
    rows = zip(
        held.positions,
        figures.portfolio.unrealized_pnl.tolist(),
        figures.isolated.position_maintenance.tolist(),
        strict=True,
    )
    found = []
    for position, pnl, keep in rows:
        if position.id in doomed:
            amount = _cents(keep - pnl - to_float(position.allocated))
            while to_float(position.allocated + amount) + pnl < keep:  # by a rounding of floats
                amount += _CENT
            found.append({"position_id": position.id, "symbol": position.symbol, "amount": amount})
    return found


def _deposit(held: Book, scene: Scene, allocate: Sequence[Mapping[str, Any]]) -> Decimal:
    """Return the USDC that brings utilization to the cure level, the allocations made, in whole cents.

    What is owed is paid first: it counts in full, the rest after haircut.
    """
    policy = held.settings.policy(scene.market.parameters.policy)
    level = min(policy.cure_utilization, policy.gate_utilization) if allocate else policy.cure_utilization
    total, money = sum((a["amount"] for a in allocate), ZERO), held.holding(SETTLEMENT_ASSET)
    health = scene.figures(_restored(held, {a["position_id"]: a["amount"] for a in allocate})).health
    missing = max(0.0, health.required_initial / level - health.equity)
    needed = money.owed + total - money.free if total > money.free else ZERO
    return max(deposit_for(scene, held, missing), needed.quantize(_CENT, ROUND_CEILING))


def deposit_for(scene: Scene, held: Book, missing: float) -> Decimal:
    """Return the USDC, in whole cents, that raises an account's equity by so many USD."""
    price, worth = scene.price(SETTLEMENT_ASSET), scene.worth(SETTLEMENT_ASSET, Decimal(1))
    debt = to_float(held.holding(SETTLEMENT_ASSET).owed) * price
    amount = min(missing, debt) / price
    if missing > debt and worth > 0.0:  # at a haircut of 1 no deposit does more than pay what is owed
        amount += (missing - debt) / worth
    return _cents(amount)


def _restored(held: Book, amounts: Mapping[str, Decimal]) -> Book:
    """Return the book with collateral added to isolated positions: out of the pool, however much of it is free."""
    for position in held.positions:
        if position.id in amounts:
            more = replace(position, allocated=position.allocated + amounts[position.id])
            own = Move(
                SETTLEMENT_ASSET, amounts[position.id], agent(held.agent_id, "free"), agent(held.agent_id, "allocated")
            )
            held = held.after_moves([own]).with_position(position, more)
    return held


def _closures(held: Book, scene: Scene, figures: AccountFigures) -> dict[str, Any]:
    """Return what to close and release: as few as will do, smallest first, the last of them in part.

    Isolated positions past saving go whole and first, as their liquidation would. `complete`: it is enough, and all of
    it is listed.
    """
    level = held.settings.policy(scene.market.parameters.policy).cure_utilization
    doomed = _ids(breached_isolated(held, figures))
    ordered = liquidate.in_order(targets(held, figures), "smallest_first", lambda _: 0.0)
    ordered.sort(key=lambda t: t.item.id not in doomed)
    if len(held.positions) > CURE_POSITIONS_MAX:
        return {"orders": [], "releases": [], "complete": False}

    def closed(left: Book, target: Target) -> Book:
        return reduced(scene, left, target, target.size, ZERO)

    books = list(accumulate(ordered, closed, initial=held))
    count = liquidate.fewest(len(doomed), len(ordered), lambda k: liquidate.is_at(scene.figures(books[k]), level))
    enough = count <= len(ordered)
    chosen = [Slice(target, target.size) for target in ordered[:count]]
    if enough and count > len(doomed):
        chosen[-1] = _part(books[count - 1], scene, ordered[count - 1], Goal(scene.figures, level), ZERO)
    shown = chosen[:ORDERS_SHOWN_MAX]
    return {
        "orders": [_order_shown(part) for part in shown if isinstance(part.target.item, OpenPosition)],
        "releases": [_release_shown(part) for part in shown if isinstance(part.target.item, OpenReservation)],
        "complete": enough and len(shown) == len(chosen),
    }


def _order_shown(part: Slice) -> dict[str, Any]:
    closing = _closing(cast("OpenPosition", part.target.item), part.size)
    return {"symbol": closing.symbol, "side": closing.side, "size": plain(part.size), "reduce_only": True}


def _release_shown(part: Slice) -> dict[str, Any]:
    reservation = cast("OpenReservation", part.target.item)
    return {"reservation_id": reservation.id, "asset": reservation.asset, "amount": plain(part.size)}


def _cents(amount: float) -> Decimal:
    return to_decimal(max(0.0, amount)).quantize(_CENT, ROUND_CEILING)


def _ids(items: Collection[OpenPosition]) -> set[str]:
    return {item.id for item in items}


def reduced(scene: Scene, held: Book, target: Target, size: Decimal, slippage: Decimal) -> Book:
    """Return the book after closing so much of a target, without writing anything."""
    if isinstance(target.item, OpenReservation):
        left = replace(target.item, remaining=target.item.remaining - size)
        moves = wallet.given_back(held, target.item.asset, size)
        return held.after_moves(moves).with_reservation(left)
    contract, _ = by_mark(scene.market, target.item.symbol)
    order = _closing(target.item, size)
    return plan(held, order, contract, _fill_price(scene, target.item, slippage), "", scene.now).book


def _closing(position: OpenPosition, size: Decimal) -> Order:
    return Order(position.symbol, "sell" if position.side == "long" else "buy", size, reduce_only=True)


def _fill_price(scene: Scene, position: OpenPosition, slippage: Decimal) -> Decimal:
    _, mark = by_mark(scene.market, position.symbol)
    return forced_price(mark.exact, position.side, slippage)
