"""What a crash would do to a fleet: who is liquidated in which order, what it frees, who is next.

Every account is judged and closed by the rules that its margin calls have, on a copy of its book: the same targets, the
same slices, the same slippage. What is sold moves prices where an average daily volume is given, and all are judged
again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.domain.book import Book, OpenPosition
from app.domain.margin_calls import Situation, situation
from app.domain.money import plain
from app.domain.parameters import MarketParameters
from app.domain.prices import StoredPrice
from app.domain.quote import AccountFigures
from app.services import liquidation
from app.services.fleet_books import FleetBooks
from app.services.liquidation import Rules
from app.services.margin import Scene

IMPACT = 0.10
"""Relative move of a price when an average day's volume is sold; √ of the share of it. docs/stress-and-sizing.md."""
ROUNDS_MAX = 20
SLICES_MAX = 2_000
"""Slices of one cascade, and of what is listed."""
MOVE_MIN = -0.99


@dataclass(frozen=True, slots=True)
class Crash:
    """Relative moves by asset, `shock` for every other that is no stablecoin; average daily volumes, USD."""

    shock: float = 0.0
    shocks: Mapping[str, float] = field(default_factory=dict)
    adv: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Fallen:
    """An account that was liquidated: the book that is left, its slices, and USD sold of each underlying, signed."""

    book: Book
    slices: list[dict[str, Any]]
    sold: Mapping[str, float]


def cascade(books: FleetBooks, scene: Scene, crash: Crash, rules: Rules) -> dict[str, Any]:
    """Return the rounds of a cascade. Raises InvalidError for a price that lacks."""
    priority = {member.agent_id: member.liquidation_priority for member, _ in books.members}
    state = {held.agent_id: held for held in (books.master, *(held for _, held in books.members))}
    parameters = scene.market.parameters
    then = _moved(scene, _shocks(crash, scene, parameters))
    rounds: list[dict[str, Any]] = []
    left = SLICES_MAX
    while len(rounds) < ROUNDS_MAX and left > 0:
        order = _in_breach(state, then, priority)
        if not order:
            break
        falls, sold = [], dict[str, float]()
        for agent_id in order:
            fallen = _liquidated(state[agent_id], then, rules, left)
            left -= len(fallen.slices)
            falls.append(_told(state[agent_id], fallen, then))
            state[agent_id] = fallen.book
            for asset, usd in fallen.sold.items():
                sold[asset] = sold.get(asset, 0.0) + usd
        impact = {asset: _impact(usd, crash.adv[asset]) for asset, usd in sold.items() if crash.adv.get(asset)}
        rounds.append({"liquidated": falls, "next": order[1:], "sold": sold, "impact": impact})
        if not impact or not any(sold.values()):
            break
        then = _moved(then, impact)
    return {
        "rounds": rounds,
        "complete": left > 0 and len(rounds) < ROUNDS_MAX,
        "impact_of": sorted(crash.adv),
        "in_breach_after": _in_breach(state, then, priority),
        "equity_after": sum(then.figures(held).equity for held in state.values()),
    }


def _shocks(crash: Crash, scene: Scene, parameters: MarketParameters) -> dict[str, float]:
    assets = {parameters.underlying_of(symbol) for symbol in scene.market.prices} | crash.shocks.keys()
    return {
        asset: crash.shocks.get(asset, 0.0 if parameters.asset(asset).kind == "stable" else crash.shock)
        for asset in assets
    }


def _moved(scene: Scene, moves: Mapping[str, float]) -> Scene:
    """Return the scene after relative moves of assets, with all that is marked by them."""
    parameters = scene.market.parameters
    prices = {
        symbol: StoredPrice(price.value * (1.0 + max(MOVE_MIN, move)), price.as_of)
        if (move := moves.get(parameters.underlying_of(symbol), 0.0))
        else price
        for symbol, price in scene.market.prices.items()
    }
    return replace(scene, market=replace(scene.market, prices=prices))


def _in_breach(state: Mapping[str, Book], scene: Scene, priority: Mapping[str, int]) -> list[str]:
    """Return who is in breach and has something to close: by priority, the lowest first, then the worst off."""
    found = []
    for agent_id, held in state.items():
        figures = scene.figures(held)
        judged = _judged(held, scene, figures)
        if judged.cause is not None and judged.anything_left:
            ratio = figures.health.margin_ratio
            found.append((priority.get(agent_id, 0), -math.inf if ratio is None else -ratio, agent_id))
    return [agent_id for _, _, agent_id in sorted(found)]


def _judged(held: Book, scene: Scene, figures: AccountFigures, *, alone: bool = False) -> Situation:
    return situation(
        figures.health,
        held.settings.policy(scene.market.parameters.policy),
        leveraged=held.is_leveraged,
        isolated_breached=bool(liquidation.targets(held, figures, isolated_alone=True)),
        anything_left=bool(liquidation.targets(held, figures, isolated_alone=alone)),
    )


def _liquidated(held: Book, scene: Scene, rules: Rules, most: int) -> _Fallen:
    """Close slice after slice, as a call that has expired does, until the account may stop or nothing is left."""
    first = _judged(held, scene, scene.figures(held))
    alone = first.pool is None
    slices: list[dict[str, Any]] = []
    sold: dict[str, float] = {}
    while len(slices) < most:
        figures = scene.figures(held)
        judged = _judged(held, scene, figures, alone=alone)
        done = not judged.isolated if alone else judged.may_stop
        if done or not judged.anything_left:
            break
        targets = liquidation.targets(held, figures, isolated_alone=alone)
        chosen = liquidation.next_slice(held, scene, figures, rules, targets)
        held = liquidation.reduced(scene, held, chosen.target, chosen.size, rules.slippage)
        target, share = chosen.target.item, float(chosen.size / chosen.target.size)
        what = {"id": target.id, "size": plain(chosen.size), "notional": chosen.target.notional * share}
        if isinstance(target, OpenPosition):
            asset = scene.market.parameters.underlying_of(target.symbol)
            sign = 1.0 if target.side == "long" else -1.0
            sold[asset] = sold.get(asset, 0.0) + sign * chosen.target.notional * share
            what |= {"symbol": target.symbol, "side": target.side}
        else:
            what |= {"service": target.service, "asset": target.asset}
        slices.append(what)
    return _Fallen(held, slices, sold)


def _told(before: Book, fallen: _Fallen, scene: Scene) -> dict[str, Any]:
    then, after = scene.figures(before).health, scene.figures(fallen.book).health
    return {
        "agent_id": before.agent_id,
        "slices": fallen.slices,
        "freed": then.required_initial - after.required_initial,
        "equity": after.equity,
        "utilization": after.utilization,
        "loses_all": after.equity <= 0.0,
    }


def _impact(sold: float, adv: float) -> float:
    """Return the relative move that a forced sale makes, -sign(sold)·.10·√(|sold|/ADV)."""
    return -math.copysign(IMPACT * math.sqrt(abs(sold) / adv), sold)
