"""Margin calls: noticed, made, reminded of, cured or expired, and what is liquidated. Decided under the book's lock.

`decide` is the one place that moves a call on. The screen and the timers only name accounts to it: it locks the book,
reads it and the market afresh, asks the pure step, and writes the call, its timer, what was closed and the events that
tell of it in one transaction. Asking twice, late or for nothing does no harm.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from typing import Any

from sqlalchemy import func, insert, select, update

from app.db.session import Tx
from app.db.tables import margin_calls
from app.domain import liquidate
from app.domain.book import ZERO, Book, OpenPosition, OpenReservation
from app.domain.gates import stale_symbols
from app.domain.liquidate import LiquidationPolicy, Slice, Target
from app.domain.margin_calls import LIVE_STATES, Become, Call, Notice, Open, Remind, Situation, Wait, situation, step
from app.domain.money import plain, to_decimal, to_float
from app.domain.moves import SETTLEMENT_DECIMALS
from app.domain.quote import AccountFigures
from app.domain.trade import Order, plan
from app.domain.watch import Band
from app.errors import InvalidError, NotFoundError
from app.services import accounts, audit, book, events, prevention, trading, wallet, watch
from app.services.margin import Scene, Scenes, by_mark, forced_price
from app.services.wallet import Names

CALLS_A_PAGE_MAX = 200
STEPS_MAX = 8
"""Changes of state in one decision: more than the longest way through a life."""
RETRY_STALE = timedelta(seconds=1)
ORDERS_SHOWN_MAX = 50


@dataclass(frozen=True, slots=True)
class StoredCall:
    """A call as stored, live or over."""

    id: str
    seq: int
    agent_id: str
    state: str
    cause: str
    noticed_at: datetime
    opened_at: datetime | None
    deadline_at: datetime | None
    expired_at: datetime | None
    ended_at: datetime | None
    acknowledged_at: datetime | None
    next_action_at: datetime | None
    reminders: int
    slices: int
    deficit: Decimal
    figures: Mapping[str, Any]

    def as_call(self) -> Call:
        """Return what the pure step needs of it."""
        return Call(self.state, self.noticed_at, self.opened_at, self.deadline_at, self.reminders)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Rules:
    """How accounts are liquidated, from the settings."""

    policy: LiquidationPolicy
    slippage: Decimal


@dataclass(frozen=True, slots=True)
class Decided:
    """What came of a decision: the call as it now stands, the events that were written, what is told of its levels.

    `levels` are the ranks of zone and alert level, None where a price is missing; `band`: of equity, within which
    there is nothing to tell of the drawdown, None where it is not followed. It `waits` where prices are stale: nothing
    was decided.
    """

    call: StoredCall | None
    told: tuple[str, ...] = ()
    levels: tuple[int, int] | None = None
    band: Band | None = None
    waits: bool = False


@dataclass(frozen=True, slots=True)
class _Case:
    """A decision under way: the locked book, the market, the figures, the call as it now stands."""

    held: Book
    scene: Scene
    figures: AccountFigures
    call: StoredCall | None
    told: tuple[str, ...] = ()


async def decide(tx: Tx, scenes: Scenes, agent_id: str, rules: Rules) -> Decided:
    """Move an account's call on as far as it goes now, and tell what has changed of its levels.

    At most one position is closed; where more are to follow the call is due again at once. On stale or missing prices
    nothing is opened and nothing liquidated.
    """
    held = await book.hold(tx, agent_id)
    scene = await scenes.at(tx)
    call = await _live(tx, agent_id)
    try:
        figures = scene.figures(held)
    except InvalidError:
        return Decided(await _postpone(tx, call, scene.now))
    if stale_symbols(figures, scene.now, scene.price_age_max.total_seconds()):
        seen = await watch.look(tx, scene, held, figures)
        policy = held.settings.policy(scene.market.parameters.policy)
        band = watch.band_of(held, seen, policy)
        return Decided(await _postpone(tx, call, scene.now), (), seen.levels, band, waits=True)
    case = _Case(held, scene, figures, call)
    for _ in range(STEPS_MAX):
        settled, case = await _advance(tx, case, rules)
        if settled:
            break
    if (None if case.call is None else case.call.state) != (None if call is None else call.state):
        await accounts.lock_account(tx, agent_id)  # the screen hears of it by the book's version
    return await _look(tx, case, rules)


async def _look(tx: Tx, case: _Case, rules: Rules) -> Decided:
    """Tell what has changed of the account's levels, and cut what its drawdown ladder asks for."""
    held, scene = case.held, case.scene
    policy = held.settings.policy(scene.market.parameters.policy)
    seen = await watch.look(tx, scene, held, case.figures)
    if case.call is None or case.call.state not in ("expired", "liquidating"):
        await prevention.step_down(tx, scene, held, case.figures, seen, rules.slippage)
    return Decided(case.call, case.told, seen.levels, watch.band_of(held, seen, policy))


async def _advance(tx: Tx, case: _Case, rules: Rules) -> tuple[bool, _Case]:  # noqa: PLR0911  one a kind of step
    """Take one step; return whether that is all for now."""
    call, now = case.call, case.scene.now
    judged = _situation(case)
    what = step(None if call is None else call.as_call(), judged, case.held.settings, now)
    if what is None:
        return True, case
    if isinstance(what, Notice | Open) and call is None:
        call = await _begin(tx, case, judged)
    if call is None:
        raise RuntimeError("a step of a call that is not there")
    match what:
        case Notice():
            moved = await _set(tx, call, next_action_at=what.until)
            return True, replace(case, call=moved)
        case Open():
            return False, _with(case, await _open(tx, case, call, what, judged), "margin_call.opened")
        case Remind():
            moved = await _set(tx, call, reminders=what.number, next_action_at=now)
            await _tell(tx, "margin_call.reminded", case, moved)
            return False, _with(case, moved, "margin_call.reminded")
        case Wait():
            return True, replace(case, call=await _set(tx, call, next_action_at=what.until))
        case Become():
            return await _become(tx, case, call, what)
        case _:
            return True, await _liquidate(tx, replace(case, call=call), call, rules)


async def _begin(tx: Tx, case: _Case, judged: Situation) -> StoredCall:
    row = {
        "id": f"call_{secrets.token_hex(10)}",
        "agent_id": case.held.agent_id,
        "state": "noticed",
        "cause": judged.cause,
        "noticed_at": case.scene.now,
        "next_action_at": case.scene.now,
        "deficit": ZERO,
        "figures": _figures(case),
    }
    stored = (await tx.connection.execute(insert(margin_calls).values(row).returning(margin_calls))).mappings().one()
    return StoredCall(**stored)


async def _open(tx: Tx, case: _Case, call: StoredCall, what: Open, judged: Situation) -> StoredCall:
    changed = {
        "state": "open",
        "cause": judged.cause or call.cause,
        "opened_at": case.scene.now,
        "deadline_at": what.deadline,
        "next_action_at": what.deadline,
        "figures": _figures(case),
    }
    moved = await _set(tx, call, **changed)
    await _tell(tx, "margin_call.opened", case, moved, cure=cures(case.held, case.scene, case.figures))
    await audit.record(tx, "margin_call.opened", moved.id, moved.agent_id, cause=moved.cause)
    return moved


async def _become(tx: Tx, case: _Case, call: StoredCall, what: Become) -> tuple[bool, _Case]:
    now = case.scene.now
    match what.state:
        case "expired":
            moved = await _set(tx, call, state="expired", expired_at=now, next_action_at=now)
            await _tell(tx, "margin_call.expired", case, moved)
            return False, _with(case, moved, "margin_call.expired")
        case "liquidating":
            return False, replace(case, call=await _set(tx, call, state="liquidating", next_action_at=now))
        case "completed":
            deficit = max(ZERO, to_decimal(round(-case.figures.equity, SETTLEMENT_DECIMALS)))
            moved = await _end(tx, call, "completed", now, deficit=deficit)
            await _tell(tx, "liquidation.completed", case, moved, deficit=plain(deficit), slices=moved.slices)
        case "cured":
            moved = await _end(tx, call, "cured", now)
            await _tell(tx, "margin_call.cured", case, moved)
        case _:
            moved = await _end(tx, call, "lapsed", now)
    await audit.record(tx, f"margin_call.{moved.state}", moved.id, moved.agent_id, deficit=str(moved.deficit))
    kind = {"completed": "liquidation.completed", "cured": "margin_call.cured"}.get(moved.state)
    return True, _with(case, moved, *(() if kind is None else (kind,)))


def _with(case: _Case, call: StoredCall, *told: str) -> _Case:
    return replace(case, call=call, told=(*case.told, *told))


async def _end(tx: Tx, call: StoredCall, state: str, now: datetime, **values: Any) -> StoredCall:
    return await _set(tx, call, state=state, ended_at=now, next_action_at=None, **values)


def _situation(case: _Case) -> Situation:
    policy = case.held.settings.policy(case.scene.market.parameters.policy)
    return situation(
        case.figures.health,
        policy,
        isolated_breached=bool(_breached_isolated(case)),
        anything_left=bool(_targets(case)),
    )


def _breached_isolated(case: _Case) -> list[OpenPosition]:
    """Return the isolated positions whose own collateral no longer meets their maintenance margin."""
    table, alone = case.figures.portfolio, case.figures.isolated
    rows = zip(
        case.held.positions,
        table.unrealized_pnl.tolist(),
        alone.position_maintenance.tolist(),
        strict=True,
    )
    return [
        p for p, pnl, keep in rows if p.margin_mode == "isolated" and p.reducible and to_float(p.allocated) + pnl < keep
    ]


def _targets(case: _Case) -> list[Target]:
    """Return what may be closed: reducible positions of the pool, reducible reservations, isolated ones past saving."""
    doomed = {p.id for p in _breached_isolated(case)}
    found: list[Target] = []
    for position, notional in zip(case.held.positions, case.figures.portfolio.notional.tolist(), strict=True):
        if position.reducible and (position.margin_mode == "pooled" or position.id in doomed):
            found.append(Target(position, position.size, notional))
    prices = case.figures.prices
    for reservation in case.held.reservations:
        if reservation.reducible:
            price = prices[reservation.asset].value if reservation.asset in prices else 1.0
            found.append(Target(reservation, reservation.remaining, to_float(reservation.remaining) * price))
    return found


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
    _, mark = by_mark(scene.market, position.symbol)
    return forced_price(mark.exact, position.side, slippage)


async def _liquidate(tx: Tx, case: _Case, call: StoredCall, rules: Rules) -> _Case:
    """Close the next position, or the part of it that is enough, and look again at once."""
    await accounts.lock_account(tx, case.held.agent_id)
    chosen = _next_slice(case, rules)
    target = chosen.target.item
    names = Names(reference=call.id)
    if isinstance(target, OpenReservation):
        _, held = await wallet.release(tx, case.held, target.id, chosen.size, names)
        told: dict[str, Any] = {"reservation_id": target.id, "service": target.service, "asset": target.asset}
    else:
        contract, _ = by_mark(case.scene.market, target.symbol)
        order = _closing(target, chosen.size)
        trade = plan(case.held, order, contract, _fill_price(case.scene, target, rules.slippage), "", tx.now)
        filled = await trading.fill(tx, case.held, order, trade, names, "liquidation", {"margin_call_id": call.id})
        held = filled.book
        told = {
            "position_id": target.id,
            "order_id": filled.order.id,
            "symbol": target.symbol,
            "side": order.side,
            "fill_price": plain(trade.price),
            "realized_pnl": plain(trade.realized_pnl),
        }
    after = replace(case, held=held, figures=case.scene.figures(held))
    moved = await _set(tx, call, slices=call.slices + 1, next_action_at=case.scene.now, figures=_figures(after))
    whole = {"size": plain(chosen.size), "notional": chosen.target.notional, "is_whole": chosen.is_whole}
    await _tell(tx, "liquidation.executed", after, moved, **told, **whole)
    return _with(after, moved, "liquidation.executed")


def _next_slice(case: _Case, rules: Rules) -> Slice:
    scene = case.scene
    policy = case.held.settings.policy(scene.market.parameters.policy)
    doomed = {p.id for p in _breached_isolated(case)}

    def reduce(held: Book, target: Target, size: Decimal) -> Book:
        return _reduced(scene, held, target, size, rules.slippage)

    def relief(target: Target) -> float:
        after = scene.figures(reduce(case.held, target, target.size))
        return case.figures.health.required_initial - after.health.required_initial

    def enough(figures: AccountFigures) -> bool:
        used = figures.health.utilization
        return used is not None and used <= policy.stop_utilization and not figures.health.insolvent

    targets = liquidate.in_order(_targets(case), rules.policy, relief)
    # an isolated position past saving is closed whole and first: it fails alone
    past_saving = [t for t in targets if t.item.id in doomed]
    if past_saving:
        return Slice(past_saving[0], past_saving[0].size)
    return liquidate.next_slice(case.held, targets[0], scene.figures, reduce, enough)


def cures(held: Book, scene: Scene, figures: AccountFigures) -> dict[str, Any]:
    """Return the cheapest ways out: a deposit, or the reduce-only orders, smallest first, down to the cure level."""
    policy = held.settings.policy(scene.market.parameters.policy)
    health = figures.health
    deposit = max(0.0, health.required_initial / policy.cure_utilization - health.equity)
    case = _Case(held, scene, figures, None)

    def reduce(before: Book, target: Target, size: Decimal) -> Book:
        return _reduced(scene, before, target, size, ZERO)

    def enough(after: AccountFigures) -> bool:
        used = after.health.utilization
        return used is not None and used <= policy.cure_utilization and not after.health.insolvent

    orders: list[dict[str, Any]] = []
    doomed = {p.id for p in _breached_isolated(case)}
    targets = liquidate.in_order(_targets(case), "smallest_first", lambda _: 0.0)
    # an isolated position past saving is closed whole and first, as its liquidation would
    for target in sorted(targets, key=lambda t: t.item.id not in doomed)[:ORDERS_SHOWN_MAX]:
        is_doomed = target.item.id in doomed
        if not is_doomed and enough(scene.figures(held)):
            break
        whole = Slice(target, target.size)
        chosen = whole if is_doomed else liquidate.next_slice(held, target, scene.figures, reduce, enough)
        held = reduce(held, target, chosen.size)
        if isinstance(target.item, OpenPosition):
            closing = _closing(target.item, chosen.size)
            orders.append(
                {"symbol": closing.symbol, "side": closing.side, "size": plain(closing.size), "reduce_only": True}
            )
    cents = to_decimal(deposit).quantize(Decimal("0.01"), ROUND_CEILING)
    return {"deposit": {"asset": "USDC", "amount": cents}, "orders": orders}


def _figures(case: _Case) -> dict[str, Any]:
    """Return what a call remembers of the account: figures as JSON holds them."""
    health = case.figures.health
    return {
        "equity": health.equity,
        "required_initial": health.required_initial,
        "required_maintenance": health.required_maintenance,
        "utilization": health.utilization,
        "margin_ratio": health.margin_ratio,
        "zone": health.zone,
        "alert_level": health.alert_level,
        "shortfall": health.shortfall,
    }


async def _tell(tx: Tx, kind: str, case: _Case, call: StoredCall, **more: Any) -> None:
    data = {
        "margin_call_id": call.id,
        "state": call.state,
        "cause": call.cause,
        "opened_at": call.opened_at,
        "deadline_at": call.deadline_at,
        **_figures(case),
        **more,
    }
    await events.emit(tx, kind, call.agent_id, data)


async def _postpone(tx: Tx, call: StoredCall | None, now: datetime) -> StoredCall | None:
    """Look again soon: nothing is decided on prices that are stale or missing."""
    return None if call is None else await _set(tx, call, next_action_at=now + RETRY_STALE)


async def _live(tx: Tx, agent_id: str) -> StoredCall | None:
    columns = margin_calls.c
    query = select(margin_calls).where(columns.agent_id == agent_id, columns.state.in_(LIVE_STATES))
    row = (await tx.connection.execute(query)).mappings().first()
    return None if row is None else StoredCall(**row)


async def _set(tx: Tx, call: StoredCall, **values: Any) -> StoredCall:
    changed = {name: value for name, value in values.items() if value != getattr(call, name)}
    if changed:
        await tx.connection.execute(update(margin_calls).where(margin_calls.c.id == call.id).values(**changed))
    return replace(call, **changed)


async def put_off(tx: Tx, agent_id: str, seconds: float) -> None:
    """Let an account's call wait: what can't be decided on now does not hold up the others that are due."""
    columns = margin_calls.c
    again = func.greatest(columns.next_action_at, tx.now + timedelta(seconds=seconds))
    live = (columns.agent_id == agent_id, columns.state.in_(LIVE_STATES), columns.next_action_at.is_not(None))
    await tx.connection.execute(update(margin_calls).where(*live).values(next_action_at=again))


async def due(tx: Tx, limit: int) -> list[str]:
    """Return agents whose calls are due, and keep other workers off them until the transaction ends."""
    columns = margin_calls.c
    query = (
        select(columns.agent_id)
        .where(columns.state.in_(LIVE_STATES), columns.next_action_at <= tx.now)
        .order_by(columns.next_action_at)
        .limit(limit)
    )
    return list((await tx.connection.execute(query)).scalars())


async def acknowledge(tx: Tx, agent_id: str, call_id: str, note: str) -> StoredCall:
    """Record that the owner has seen a call; the clock goes on. Raises NotFoundError."""
    call = await get(tx, agent_id, call_id)
    if call.acknowledged_at is not None:
        return call
    moved = await _set(tx, call, acknowledged_at=tx.now)
    await audit.record(tx, "margin_call.acknowledged", call_id, agent_id, note=note)
    return moved


async def get(tx: Tx, agent_id: str, call_id: str) -> StoredCall:
    """Return a call of the agent. Raises NotFoundError."""
    columns = margin_calls.c
    query = select(margin_calls).where(columns.agent_id == agent_id, columns.id == call_id)
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError("There is no such margin call.", code="margin_call_not_found")
    return StoredCall(**row)


async def list_calls(
    tx: Tx, agent_id: str, limit: int, before: int | None = None, state: str | None = None
) -> list[StoredCall]:
    """Return an agent's calls, newest first, from below the number `before`."""
    columns = margin_calls.c
    query = select(margin_calls).where(columns.agent_id == agent_id).order_by(columns.seq.desc())
    if before is not None:
        query = query.where(columns.seq < before)
    if state is not None:
        query = query.where(columns.state == state)
    rows = await tx.connection.execute(query.limit(min(limit, CALLS_A_PAGE_MAX)))
    return [StoredCall(**row) for row in rows.mappings()]
