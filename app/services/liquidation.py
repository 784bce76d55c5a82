"""What a margin call closes, and what its owner could do instead: targets, the next slice of them, the cures.

Nothing here decides when: `margin_calls` does, under the lock of the book that it hands in.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import Any

from app.db.session import Tx
from app.domain import liquidate
from app.domain.book import ZERO, Book, OpenPosition, OpenReservation
from app.domain.liquidate import LiquidationPolicy, Slice, Target
from app.domain.money import plain, to_decimal, to_float
from app.domain.quote import AccountFigures
from app.domain.trade import Order, plan
from app.services import trading, wallet
from app.services.margin import Scene, by_mark
from app.services.wallet import Names

ORDERS_SHOWN_MAX = 50


@dataclass(frozen=True, slots=True)
class Rules:
    """How accounts are liquidated, from the settings."""

    policy: LiquidationPolicy
    slippage: Decimal


@dataclass(frozen=True, slots=True)
class Closed:
    """What was closed: the book that it left, and what is told of it."""

    book: Book
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


def targets(held: Book, figures: AccountFigures) -> list[Target]:
    """Return what may be closed: reducible positions of the pool, reducible reservations, isolated ones past saving."""
    doomed = _ids(breached_isolated(held, figures))
    found: list[Target] = []
    for position, notional in zip(held.positions, figures.portfolio.notional.tolist(), strict=True):
        if position.reducible and (position.margin_mode == "pooled" or position.id in doomed):
            found.append(Target(position, position.size, notional))
    prices = figures.prices
    for reservation in held.reservations:
        if reservation.reducible:
            price = prices[reservation.asset].value if reservation.asset in prices else 1.0
            found.append(Target(reservation, reservation.remaining, to_float(reservation.remaining) * price))
    return found


def next_slice(held: Book, scene: Scene, figures: AccountFigures, rules: Rules) -> Slice:
    """Return what is closed next, down to the account's stop level. There is at least one target."""
    doomed = _ids(breached_isolated(held, figures))
    stop = held.settings.policy(scene.market.parameters.policy).stop_utilization

    def relief(target: Target) -> float:
        after = scene.figures(_reduced(scene, held, target, target.size, rules.slippage))
        return figures.health.required_initial - after.health.required_initial

    ordered = liquidate.in_order(targets(held, figures), rules.policy, relief)
    # an isolated position past saving is closed whole and first: it fails alone
    past_saving = [t for t in ordered if t.item.id in doomed]
    if past_saving:
        return Slice(past_saving[0], past_saving[0].size)
    return _part(held, scene, ordered[0], stop, rules.slippage)


def _part(held: Book, scene: Scene, target: Target, level: float, slippage: Decimal) -> Slice:
    """Return the target, or the part of it that brings utilization to the level."""

    def reduce(before: Book, chosen: Target, size: Decimal) -> Book:
        return _reduced(scene, before, chosen, size, slippage)

    def enough(after: AccountFigures) -> bool:
        return _is_at(after, level)

    return liquidate.next_slice(held, target, scene.figures, reduce, enough)


def _is_at(figures: AccountFigures, level: float) -> bool:
    used = figures.health.utilization
    return used is not None and used <= level and not figures.health.insolvent


async def close(tx: Tx, scene: Scene, held: Book, chosen: Slice, rules: Rules, call_id: str) -> Closed:
    """Close a slice in the book: fill it at the mark less the slippage, or release the reservation."""
    target, names = chosen.target.item, Names(reference=call_id)
    whole = {"size": plain(chosen.size), "notional": chosen.target.notional, "is_whole": chosen.is_whole}
    if isinstance(target, OpenReservation):
        _, left = await wallet.release(tx, held, target.id, chosen.size, names)
        told: dict[str, Any] = {"reservation_id": target.id, "service": target.service, "asset": target.asset}
        return Closed(left, told | whole)
    contract, _ = by_mark(scene.market, target.symbol)
    order = _closing(target, chosen.size)
    trade = plan(held, order, contract, _fill_price(scene, target, rules.slippage), "", tx.now)
    filled = await trading.fill(tx, held, order, trade, names, "liquidation", {"margin_call_id": call_id})
    told = {
        "position_id": target.id,
        "order_id": filled.order.id,
        "symbol": target.symbol,
        "side": order.side,
        "fill_price": plain(trade.price),
        "realized_pnl": plain(trade.realized_pnl),
    }
    return Closed(filled.book, told | whole)


def cures(held: Book, scene: Scene, figures: AccountFigures) -> dict[str, Any]:
    """Return the cheapest ways out: a deposit, or the reduce-only orders, smallest first, down to the cure level."""
    level = held.settings.policy(scene.market.parameters.policy).cure_utilization
    deposit = max(0.0, figures.health.required_initial / level - figures.health.equity)
    orders: list[dict[str, Any]] = []
    doomed = _ids(breached_isolated(held, figures))
    ordered = liquidate.in_order(targets(held, figures), "smallest_first", lambda _: 0.0)
    # an isolated position past saving is closed whole and first, as its liquidation would
    for target in sorted(ordered, key=lambda t: t.item.id not in doomed)[:ORDERS_SHOWN_MAX]:
        is_doomed = target.item.id in doomed
        if not is_doomed and _is_at(scene.figures(held), level):
            break
        chosen = Slice(target, target.size) if is_doomed else _part(held, scene, target, level, ZERO)
        held = _reduced(scene, held, target, chosen.size, ZERO)
        if isinstance(target.item, OpenPosition):
            closing = _closing(target.item, chosen.size)
            orders.append(
                {"symbol": closing.symbol, "side": closing.side, "size": plain(closing.size), "reduce_only": True}
            )
    cents = to_decimal(deposit).quantize(Decimal("0.01"), ROUND_CEILING)
    return {"deposit": {"asset": "USDC", "amount": cents}, "orders": orders}


def _ids(items: Collection[OpenPosition]) -> set[str]:
    return {item.id for item in items}


def _reduced(scene: Scene, held: Book, target: Target, size: Decimal, slippage: Decimal) -> Book:
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
    """Return the mark less the slippage of a forced sale (more, where a short is bought back)."""
    _, mark = by_mark(scene.market, position.symbol)
    return mark.exact * (1 - slippage if position.side == "long" else 1 + slippage)
