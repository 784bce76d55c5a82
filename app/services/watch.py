"""What is told of an account as prices move: zone, alert level, stale prices, trailing stop, drawdown ladder.

Only a change is told, and a scale falls back only when the figure is clear of the level, so that a price that trembles
on a boundary sends no storm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

from sqlalchemy import Text, any_, bindparam, func, select, text, update
from sqlalchemy.dialects.postgresql import ARRAY, insert

from app.db.session import Tx
from app.db.tables import account_watch
from app.domain import ladder
from app.domain.book import Book
from app.domain.health import ZONES
from app.domain.money import plain, to_decimal, to_float
from app.domain.moves import SETTLEMENT_DECIMALS
from app.domain.parameters import HealthPolicy
from app.domain.quote import AccountFigures
from app.domain.trade import Order
from app.domain.watch import Band, Scale, clear_level, drawdown, quiet_band, settled_level
from app.services import events

ORDERS_TOLD_MAX = 50

_LEVELS = ("OK", "WARNING", "DANGER", "EMERGENCY")


@dataclass(frozen=True, slots=True)
class Watch:
    """What was last told of an account."""

    zone: str = "GREEN"
    alert_level: str = "OK"
    stale: bool = False
    peak_equity: Decimal = Decimal(0)
    stopped: bool = False
    rung: int = 0
    rung_applied: int = 0

    @property
    def levels(self) -> tuple[int, int]:
        """The ranks of zone and alert level."""
        return ranks(self.zone, self.alert_level)


async def look(
    tx: Tx, held: Book, figures: AccountFigures, policy: HealthPolicy, stale: Sequence[str], *, is_sure: bool
) -> Watch:
    """Tell what has changed of an account since it was last looked at. The book is locked.

    Where prices are `stale` that is told once, and nothing else unless what hangs on them is too little to matter.
    """
    before = await _load(tx, held.agent_id)
    after = replace(before, stale=bool(stale))
    if stale and not before.stale:
        await events.emit(tx, "market.stale", held.agent_id, {"symbols": list(stale[:20])})
    if is_sure:
        after = await _tell_changes(tx, held, figures, after, policy)
    if after != before:
        await _store(tx, held.agent_id, after)
    return after


async def _tell_changes(tx: Tx, held: Book, figures: AccountFigures, before: Watch, policy: HealthPolicy) -> Watch:
    health = figures.health
    zone = settled_level(zones(policy), before.zone, health.utilization)
    level = settled_level(levels(policy), before.alert_level, health.margin_ratio)
    if (zone, level) != (before.zone, before.alert_level):
        data: dict[str, Any] = {
            "zone": zone,
            "zone_before": before.zone,
            "alert_level": level,
            "alert_level_before": before.alert_level,
            "utilization": health.utilization,
            "margin_ratio": health.margin_ratio,
            "equity": health.equity,
        }
        await events.emit(tx, "zone.changed", held.agent_id, data)
    after = replace(before, zone=zone, alert_level=level)
    return await _follow(tx, held, figures, after, policy)


async def _follow(tx: Tx, held: Book, figures: AccountFigures, before: Watch, policy: HealthPolicy) -> Watch:
    """Follow the highest equity, and tell how far equity is below it: the trailing stop and the ladder's rung."""
    equity = to_decimal(round(figures.equity, SETTLEMENT_DECIMALS))
    after = replace(before, peak_equity=max(before.peak_equity, equity))
    fallen = drawdown(to_float(after.peak_equity), figures.equity)
    after = await _tell_stop(tx, held, figures, after, fallen)
    return await _tell_rung(tx, held, figures, after, fallen, policy)


async def _tell_stop(tx: Tx, held: Book, figures: AccountFigures, before: Watch, fallen: float) -> Watch:
    """Tell once when the drawdown reaches the trailing stop."""
    stop = held.settings.trailing_stop
    reached = stop is not None and (fallen >= stop or (before.stopped and fallen >= clear_level(stop)))
    if reached and not before.stopped:
        peak = to_float(before.peak_equity)
        data = {"drawdown": fallen, "trailing_stop": stop, "peak_equity": peak, "equity": figures.equity}
        await events.emit(tx, "trailing_stop.breached", held.agent_id, data)
    return replace(before, stopped=reached)


async def _tell_rung(
    tx: Tx, held: Book, figures: AccountFigures, before: Watch, fallen: float, policy: HealthPolicy
) -> Watch:
    """Tell a change of the rung on the drawdown ladder, with what the rung asks for."""
    mode = held.settings.drawdown_ladder
    if mode == "off":
        return replace(before, rung=0, rung_applied=0)
    rung = ladder.settled_rung(before.rung, fallen, policy)
    applied = before.rung_applied if rung else 0
    if rung != before.rung:
        asked = ladder.plan(held, figures, policy, rung, applied)
        data: dict[str, Any] = {
            "rung": ladder.RUNGS[rung],
            "rung_before": ladder.RUNGS[before.rung],
            "action": mode,
            "drawdown": fallen,
            "peak_equity": to_float(before.peak_equity),
            "equity": figures.equity,
            "gross_notional": asked.gross,
            "gross_target": asked.gross_target,
            "orders": [_order(cut.order) for cut in asked.cuts[:ORDERS_TOLD_MAX]] if rung > applied else [],
            "hedges": [asdict(hedge) for hedge in asked.hedges],
        }
        await events.emit(tx, "drawdown.changed", held.agent_id, data)
    return replace(before, rung=rung, rung_applied=applied)


def _order(order: Order) -> dict[str, Any]:
    return {"symbol": order.symbol, "side": order.side, "size": plain(order.size), "reduce_only": True}


async def note_applied(tx: Tx, agent_id: str, rung: int) -> None:
    """Note that a rung was acted on: in the same fall it is not acted on again."""
    noted = update(account_watch).where(account_watch.c.agent_id == agent_id).values(rung_applied=rung)
    await tx.connection.execute(noted)


async def start_fall(tx: Tx, agent_id: str) -> None:
    """Begin to measure an account's drawdown anew: its next equity is the peak."""
    begun = update(account_watch).where(account_watch.c.agent_id == agent_id)
    await tx.connection.execute(begun.values(peak_equity=0, rung=0, rung_applied=0, stopped=False))


async def shift_peak(tx: Tx, agent_id: str, equity: float, flow: float) -> None:
    """Scale an account's peak as a flow scales its equity, USD: neither a profit nor a drawdown, nor less of one.

    Where there was no equity the flow is added.
    """
    peak = account_watch.c.peak_equity
    scaled = peak * to_decimal((equity + flow) / equity) if equity > 0.0 else peak + to_decimal(flow)
    moved = func.greatest(func.round(scaled, SETTLEMENT_DECIMALS), 0)
    await tx.connection.execute(
        update(account_watch).where(account_watch.c.agent_id == agent_id).values(peak_equity=moved)
    )


async def told_levels(tx: Tx, agents: Sequence[str] | None = None) -> dict[str, tuple[int, int]]:
    """Return the ranks of zone and alert level that were last told of each agent, or of these."""
    query = select(account_watch.c.agent_id, account_watch.c.zone, account_watch.c.alert_level)
    if agents is not None:
        query = query.where(account_watch.c.agent_id == any_(bindparam("agents", list(agents), ARRAY(Text))))
    return {agent: ranks(zone, level) for agent, zone, level in await tx.connection.execute(query)}


_FOLLOWED = text(
    """
    SELECT a.agent_id, a.trailing_stop, a.drawdown_ladder, coalesce(w.peak_equity, 0), coalesce(w.stopped, false),
           coalesce(w.rung, 0)
    FROM accounts a LEFT JOIN account_watch w USING (agent_id)
    WHERE (a.trailing_stop IS NOT NULL OR a.drawdown_ladder <> 'off')
      AND (CAST(:agents AS text[]) IS NULL OR a.agent_id = ANY (CAST(:agents AS text[])))
    """
).bindparams(bindparam("agents", type_=ARRAY(Text)))


async def followed(tx: Tx, policy: HealthPolicy, agents: Sequence[str] | None = None) -> dict[str, Band]:
    """Return, for accounts whose peak is followed, the band of equity within which there is nothing to tell."""
    rows = await tx.connection.execute(_FOLLOWED, {"agents": None if agents is None else list(agents)})
    return {
        agent: _band(
            policy,
            peak,
            None if stop is None else to_float(stop),
            ladder_on=mode != "off",
            stopped=stopped,
            rung=rung,
        )
        for agent, stop, mode, peak, stopped, rung in rows
    }


def band_of(held: Book, seen: Watch, policy: HealthPolicy) -> Band | None:
    """Return the band of equity within which there is nothing to tell of an account; None: its peak is not followed."""
    settings = held.settings
    if not settings.follows_peak:
        return None
    is_on = settings.drawdown_ladder != "off"
    return _band(
        policy, seen.peak_equity, settings.trailing_stop, ladder_on=is_on, stopped=seen.stopped, rung=seen.rung
    )


def _band(
    policy: HealthPolicy, peak: Decimal, stop: float | None, *, ladder_on: bool, stopped: bool, rung: int
) -> Band:
    falls = [stop] if stop is not None and not stopped else []
    recoveries = [clear_level(stop)] if stop is not None and stopped else []
    if ladder_on:
        bounds = ladder.bounds(policy)
        falls += bounds[rung : rung + 1]
        recoveries += [clear_level(bound) for bound in bounds[:rung][-1:]]
    return quiet_band(to_float(peak), falls, recoveries)


def ranks(zone: str, alert_level: str) -> tuple[int, int]:
    """Return the places of a zone and of an alert level, from good to bad."""
    return ZONES.index(zone), _LEVELS.index(alert_level)


def zones(policy: HealthPolicy) -> Scale:
    """Return the scale of zones, by utilization."""
    return Scale(ZONES, (policy.zone_yellow, policy.zone_orange, policy.zone_red))


def levels(policy: HealthPolicy) -> Scale:
    """Return the scale of alert levels, by margin ratio."""
    return Scale(_LEVELS, (policy.alert_warning, policy.alert_danger, policy.alert_emergency))


_LOAD = select(*(account_watch.c[name] for name in Watch.__slots__)).where(
    account_watch.c.agent_id == bindparam("agent_id")
)
_ADD = insert(account_watch)
_STORE = _ADD.on_conflict_do_update(
    index_elements=["agent_id"], set_={name: _ADD.excluded[name] for name in (*Watch.__slots__, "updated_at")}
)


async def _load(tx: Tx, agent_id: str) -> Watch:
    row = (await tx.connection.execute(_LOAD, {"agent_id": agent_id})).mappings().first()
    return Watch() if row is None else Watch(**row)


async def _store(tx: Tx, agent_id: str, watch: Watch) -> None:
    row = {name: getattr(watch, name) for name in Watch.__slots__} | {"agent_id": agent_id, "updated_at": tx.now}
    await tx.connection.execute(_STORE, row)
