"""What a crash would do to a fleet: who is liquidated in which order, what it frees, who is next.

Every account is judged and closed by the rules that margin calls have, on a copy of its book: the fleet's call first,
then each account's own, with what the fleet stands by it drawn before; the same targets, slices and slippage. What is
sold moves prices where an average daily volume is given, and all are judged again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from app.domain.book import Book, OpenPosition
from app.domain.liquidate import Slice
from app.domain.margin_calls import Situation, situation
from app.domain.money import plain
from app.domain.parameters import MarketParameters
from app.domain.prices import StoredPrice
from app.domain.quote import AccountFigures
from app.errors import ConflictError, invalid, pointer_to
from app.services import delegation, fleet_books, fleet_risk, liquidation, stand_by
from app.services.delegation import Pair
from app.services.fleet_books import FleetBooks
from app.services.fleet_pool import Pool
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


@dataclass
class _Sold:
    """The slices of one account as they are closed, and USD sold of each underlying, signed."""

    slices: list[dict[str, Any]] = field(default_factory=list)
    by_asset: dict[str, float] = field(default_factory=dict)

    def add(self, chosen: Slice, parameters: MarketParameters) -> None:
        """Take in a slice."""
        target, notional = chosen.target.item, chosen.target.notional * float(chosen.size / chosen.target.size)
        what = {"id": target.id, "size": plain(chosen.size), "notional": notional}
        if isinstance(target, OpenPosition):
            asset = parameters.underlying_of(target.symbol)
            sign = 1.0 if target.side == "long" else -1.0
            self.by_asset[asset] = self.by_asset.get(asset, 0.0) + sign * notional
            what |= {"symbol": target.symbol, "side": target.side}
        else:
            what |= {"service": target.service, "asset": target.asset}
        self.slices.append(what)


@dataclass
class _Round:
    """One round under way: the fleet as it stands in it, and what has happened."""

    books: FleetBooks
    scene: Scene
    rules: Rules
    left: int
    """Slices that may still be closed."""
    falls: list[dict[str, Any]] = field(default_factory=list)
    stood_by: list[dict[str, Any]] = field(default_factory=list)
    sold: dict[str, float] = field(default_factory=dict)
    in_line: list[str] = field(default_factory=list)
    """Who would have been next under the fleet's call."""
    called: bool = False

    def liquidate_pool(self) -> None:
        """Liquidate by the fleet's call, if its pool is in breach: in its order, until it may stop."""
        pool = Pool.of(self.books, self.scene, self.rules, {})
        self.called = pool.is_breached
        if not self.called or not self.books.master.settings.auto_liquidate:
            return
        while self.left > 0 and not pool.may_stop and (line := pool.line()):
            pool = self._turn(pool, line[0])
        self.in_line = pool.line()

    def _turn(self, pool: Pool, agent_id: str) -> Pool:
        before, sold = pool.accounts[agent_id].held, _Sold()
        while self.left > 0 and not pool.may_stop and pool.accounts[agent_id].targets:
            chosen = pool.next_slice(agent_id)
            held = pool.accounts[agent_id].held
            pool = pool.with_book(
                liquidation.reduced(self.scene, held, chosen.target, chosen.size, self.rules.slippage)
            )
            self._closed(sold, chosen)
        self._fell(before, pool.accounts[agent_id].held, sold, "fleet")
        return pool

    def liquidate_each(self) -> None:
        """Liquidate who is in breach by itself, the lowest priority first, but whom its fleet stands by.

        It stands first by those who would be liquidated last.
        """
        order = self.in_breach()
        left = {agent_id for agent_id in reversed(order) if not self._stood_by(agent_id)}
        for agent_id in order:
            held = self._book(agent_id)
            if agent_id in left and held.settings.auto_liquidate:
                self._liquidate_alone(held)

    def in_breach(self) -> list[str]:
        """Return who is in breach and has something to close: by priority, the master last, then the worst off."""
        ranks: dict[str, float] = {m.agent_id: m.liquidation_priority for m, _ in self.books.members}
        found = []
        for held in self._all():
            figures = self.scene.figures(held)
            judged = _judged(held, self.scene, figures)
            if judged.cause is not None and judged.anything_left:
                ratio = figures.health.margin_ratio
                rank = ranks.get(held.agent_id, math.inf)
                found.append((rank, -math.inf if ratio is None else -ratio, held.agent_id))
        return [agent_id for _, _, agent_id in sorted(found)]

    def _liquidate_alone(self, before: Book) -> None:
        """Close slice after slice, as a call that has expired does, until the account may stop or nothing is left."""
        held, sold = before, _Sold()
        alone = _judged(held, self.scene, self.scene.figures(held)).pool is None
        goal = liquidation.own_goal(held, self.scene)
        while self.left > 0:
            figures = self.scene.figures(held)
            judged = _judged(held, self.scene, figures, alone=alone)
            if (not judged.isolated if alone else judged.may_stop) or not judged.anything_left:
                break
            targets = liquidation.targets(held, figures, isolated_alone=alone)
            chosen = liquidation.next_slice(held, self.scene, figures, self.rules, targets, goal)
            held = liquidation.reduced(self.scene, held, chosen.target, chosen.size, self.rules.slippage)
            self._closed(sold, chosen)
        self._fell(before, held, sold, "own")

    def _stood_by(self, agent_id: str) -> bool:
        """Draw what a pooled member in breach lacks, on copies, if it may: the guards are those of a draw."""
        found = next((pair for pair in self.books.members if pair[0].agent_id == agent_id), None)
        if found is None or found[0].delegation != "pooled":
            return False
        member, held = found
        policy = held.settings.policy(self.scene.market.parameters.policy)
        if _judged(held, self.scene, self.scene.figures(held)).pool is None:
            return False
        amount = stand_by.missing(self.scene, held, policy.cure_utilization)
        reach = fleet_books.reach(self.books) - self.books.fleet.drawn
        if member.reduce_only or not 0 < amount <= min(member.max_margin - member.drawn, reach):
            return False
        try:
            moves = delegation.moves_of_draw(self.scene, Pair(held, self.books.master), amount)
        except ConflictError:
            return False
        self._replace(held.after_moves(moves), drawn=amount)
        self._replace(self.books.master.after_moves(moves))
        self.books = replace(self.books, fleet=replace(self.books.fleet, drawn=self.books.fleet.drawn + amount))
        self.stood_by.append({"agent_id": agent_id, "amount": plain(amount)})
        return True

    def _closed(self, sold: _Sold, chosen: Slice) -> None:
        sold.add(chosen, self.scene.market.parameters)
        self.left -= 1

    def _fell(self, before: Book, after: Book, sold: _Sold, by: str) -> None:
        self._replace(after)
        for asset, usd in sold.by_asset.items():
            self.sold[asset] = self.sold.get(asset, 0.0) + usd
        self.falls.append(_told(before, after, self.scene) | {"slices": sold.slices, "by": by})

    def _all(self) -> list[Book]:
        return [self.books.master, *(held for _, held in self.books.members)]

    def _book(self, agent_id: str) -> Book:
        return next(held for held in self._all() if held.agent_id == agent_id)

    def _replace(self, held: Book, drawn: Decimal = Decimal(0)) -> None:
        if held.agent_id == self.books.master.agent_id:
            self.books = replace(self.books, master=held)
            return
        members = [
            (replace(member, drawn=member.drawn + drawn), held) if member.agent_id == held.agent_id else (member, known)
            for member, known in self.books.members
        ]
        self.books = replace(self.books, members=members)


def require_known(scene: Scene, crash: Crash) -> None:
    """Raise InvalidError `not_listed` for a move or a volume of what is no asset of the market's."""
    parameters = scene.market.parameters
    known = _priced_assets(scene) | parameters.assets.keys()
    for field_name, given in (("shocks", crash.shocks), ("adv", crash.adv)):
        for name in given:
            if name not in known:
                asset = parameters.underlying_of(name)
                instead = f": name its underlying, {asset}" if asset in known else ""
                detail = f"{name} is no asset that has a price or is listed{instead}"
                raise invalid(pointer_to(field_name, name), "not_listed", detail)


def _priced_assets(scene: Scene) -> set[str]:
    return {scene.market.parameters.underlying_of(symbol) for symbol in scene.market.prices}


def cascade(books: FleetBooks, scene: Scene, crash: Crash, rules: Rules) -> dict[str, Any]:
    """Return the rounds of a cascade. Raises InvalidError for a price that lacks."""
    unused = crash.shocks.keys() - set(fleet_risk.names_of(books, scene))
    then = _moved(_fresh(scene), _shocks(crash, scene, scene.market.parameters))
    rounds: list[dict[str, Any]] = []
    left = SLICES_MAX
    while len(rounds) < ROUNDS_MAX and left > 0:
        now = _Round(books, then, rules, left)
        now.liquidate_pool()
        now.liquidate_each()
        books, left = now.books, now.left
        if not now.falls and not now.stood_by:
            break
        impact = {asset: _impact(usd, crash.adv[asset]) for asset, usd in now.sold.items() if crash.adv.get(asset)}
        rounds.append(_shown(now) | {"impact": impact})
        if not impact or not any(now.sold.values()):
            break
        then = _moved(then, impact)
    after = _Round(books, then, rules, left)
    pool = Pool.of(books, then, rules, {})
    return {
        "rounds": rounds,
        "complete": left > 0 and len(rounds) < ROUNDS_MAX,
        "impact_of": sorted(crash.adv),
        "unused_shocks": sorted(unused),
        "in_breach_after": after.in_breach(),
        "pool_after": {"equity": pool.health.equity, "utilization": pool.health.utilization},
        "equity_after": sum(then.figures(held).equity for held in (books.master, *(held for _, held in books.members))),
    }


def _shown(now: _Round) -> dict[str, Any]:
    fallen = [fall["agent_id"] for fall in now.falls]
    return {
        "fleet_call": now.called,
        "liquidated": now.falls,
        "next": [*fallen[1:], *(agent_id for agent_id in now.in_line if agent_id not in fallen)],
        "stood_by": now.stood_by,
        "sold": now.sold,
    }


def _shocks(crash: Crash, scene: Scene, parameters: MarketParameters) -> dict[str, float]:
    assets = _priced_assets(scene) | crash.shocks.keys()
    return {
        asset: crash.shocks.get(asset, 0.0 if parameters.asset(asset).kind == "stable" else crash.shock)
        for asset in assets
    }


def _fresh(scene: Scene) -> Scene:
    """Return the scene with every price of this moment: what would be is asked of prices as given."""
    return _priced(scene, lambda _, price: StoredPrice(price.value, scene.now, price.posted))


def _moved(scene: Scene, moves: Mapping[str, float]) -> Scene:
    """Return the scene after relative moves of assets, with all that is marked by them."""
    parameters = scene.market.parameters

    def moved(symbol: str, price: StoredPrice) -> StoredPrice:
        move = moves.get(parameters.underlying_of(symbol), 0.0)
        return StoredPrice(price.value * (1.0 + max(MOVE_MIN, move)), price.as_of) if move else price

    return _priced(scene, moved)


def _priced(scene: Scene, change: Callable[[str, StoredPrice], StoredPrice]) -> Scene:
    prices = {symbol: change(symbol, price) for symbol, price in scene.market.prices.items()}
    return replace(scene, market=replace(scene.market, prices=prices))


def _judged(held: Book, scene: Scene, figures: AccountFigures, *, alone: bool = False) -> Situation:
    return situation(
        figures.health,
        held.settings.policy(scene.market.parameters.policy),
        leveraged=held.is_leveraged,
        isolated_breached=bool(liquidation.targets(held, figures, isolated_alone=True)),
        anything_left=bool(liquidation.targets(held, figures, isolated_alone=alone)),
    )


def _told(before: Book, after: Book, scene: Scene) -> dict[str, Any]:
    then, health = scene.figures(before).health, scene.figures(after).health
    return {
        "agent_id": before.agent_id,
        "freed": then.required_initial - health.required_initial,
        "equity": health.equity,
        "utilization": health.utilization,
        "loses_all": health.equity <= 0.0,
    }


def _impact(sold: float, adv: float) -> float:
    """Return the relative move that a forced sale makes, -sign(sold)·.10·√(|sold|/ADV)."""
    return -math.copysign(IMPACT * math.sqrt(abs(sold) / adv), sold)
