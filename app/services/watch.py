"""What is told of an account as prices move: its zone, its alert level, stale prices, its trailing stop.

Only a change is told, and a scale falls back only when the figure is clear of the level, so that a price that trembles
on a boundary sends no storm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert

from app.db.session import Tx
from app.db.tables import account_watch, accounts
from app.domain.book import Book
from app.domain.gates import stale_symbols
from app.domain.money import to_decimal, to_float
from app.domain.moves import SETTLEMENT_DECIMALS
from app.domain.parameters import HealthPolicy
from app.domain.quote import AccountFigures
from app.domain.watch import Scale, drawdown, settled_level
from app.services import events
from app.services.margin import Scene

_ZONES = ("GREEN", "YELLOW", "ORANGE", "RED")
_LEVELS = ("OK", "WARNING", "DANGER", "EMERGENCY")


@dataclass(frozen=True, slots=True)
class Watch:
    """What was last told of an account."""

    zone: str = "GREEN"
    alert_level: str = "OK"
    stale: bool = False
    peak_equity: Decimal = Decimal(0)
    stopped: bool = False


async def look(tx: Tx, scene: Scene, held: Book, figures: AccountFigures) -> Watch:
    """Tell what has changed of an account since it was last looked at. The book is locked."""
    before = await _load(tx, held.agent_id)
    stale = stale_symbols(figures, scene.now, scene.price_age_max.total_seconds())
    if stale:
        after = replace(before, stale=True)
        if not before.stale:
            await events.emit(tx, "market.stale", held.agent_id, {"symbols": stale[:20]})
    else:
        after = await _tell_changes(tx, scene, held, figures, replace(before, stale=False))
    if after != before:
        await _store(tx, held.agent_id, after)
    return after


async def _tell_changes(tx: Tx, scene: Scene, held: Book, figures: AccountFigures, before: Watch) -> Watch:
    policy = held.settings.policy(scene.market.parameters.policy)
    health = figures.health
    levels = Scale(_LEVELS, (policy.alert_warning, policy.alert_danger, policy.alert_emergency))
    zone = settled_level(zones(policy), before.zone, health.utilization)
    level = settled_level(levels, before.alert_level, health.margin_ratio)
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
    return await _trail(tx, held, figures, after)


async def _trail(tx: Tx, held: Book, figures: AccountFigures, before: Watch) -> Watch:
    """Follow the highest equity, and tell once when the drawdown from it reaches the trailing stop."""
    equity = to_decimal(round(figures.equity, SETTLEMENT_DECIMALS))
    peak = max(before.peak_equity, equity)
    stop = held.settings.trailing_stop
    fallen = drawdown(to_float(peak), figures.equity)
    reached = stop is not None and fallen >= stop
    if reached and not before.stopped:
        data = {"drawdown": fallen, "trailing_stop": stop, "peak_equity": to_float(peak), "equity": figures.equity}
        await events.emit(tx, "trailing_stop.breached", held.agent_id, data)
    return replace(before, peak_equity=peak, stopped=reached)


async def shift_peak(tx: Tx, agent_id: str, change: float) -> None:
    """Move an account's peak with what comes in or leaves: neither is a profit nor a drawdown."""
    columns = account_watch.c
    moved = func.greatest(columns.peak_equity + to_decimal(round(change, SETTLEMENT_DECIMALS)), 0)
    await tx.connection.execute(update(account_watch).where(columns.agent_id == agent_id).values(peak_equity=moved))


async def told_zones(tx: Tx) -> dict[str, str]:
    """Return the zone that was last told of each agent."""
    rows = await tx.connection.execute(select(account_watch.c.agent_id, account_watch.c.zone))
    return {row.agent_id: row.zone for row in rows}


async def trailed_agents(tx: Tx) -> list[str]:
    """Return the agents whose accounts have a trailing stop."""
    query = select(accounts.c.agent_id).where(accounts.c.trailing_stop.is_not(None))
    return list((await tx.connection.execute(query)).scalars())


def zone_rank(zone: str) -> int:
    """Return the place of a zone, from good to bad."""
    return _ZONES.index(zone)


def zones(policy: HealthPolicy) -> Scale:
    """Return the scale of zones."""
    return Scale(_ZONES, (policy.zone_yellow, policy.zone_orange, policy.zone_red))


async def _load(tx: Tx, agent_id: str) -> Watch:
    columns = account_watch.c
    names = [columns[name] for name in Watch.__slots__]
    row = (await tx.connection.execute(select(*names).where(columns.agent_id == agent_id))).mappings().first()
    return Watch() if row is None else Watch(**row)


async def _store(tx: Tx, agent_id: str, watch: Watch) -> None:
    values = {name: getattr(watch, name) for name in Watch.__slots__} | {"updated_at": tx.now}
    statement = insert(account_watch).values(agent_id=agent_id, **values)
    await tx.connection.execute(statement.on_conflict_do_update(index_elements=["agent_id"], set_=values))
