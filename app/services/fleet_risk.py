"""What a fleet risks as one: read together, assessed in one pass, told by member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import ARRAY, Integer, Text, bindparam, text

from app.db.session import Tx
from app.domain.black76 import Floats
from app.domain.book import Book, reserved_value
from app.domain.book_columns import book_columns
from app.domain.covariance import Covariance, estimate
from app.domain.fleet import merged
from app.domain.fleet_plan import Share
from app.domain.fleet_risk import (
    MODELS_SHOWN,
    SHARPE_DAYS_MIN,
    FleetMargin,
    fleet_drift,
    fleet_margins,
    fleet_tail,
    herfindahl,
    shares,
    sharpe,
)
from app.domain.margin.result import MarginTerms
from app.domain.margin.venues.registry import VENUES
from app.domain.margin.venues.unit import UNIT_MILLISECONDS
from app.domain.money import plain
from app.domain.panel import HISTORY_DAYS_MIN, Panel
from app.domain.prices import PriceFinder
from app.domain.quote import AccountFigures, read_account
from app.domain.snapshots import Worth, worth
from app.services.delegation import net_utilization
from app.services.fleet_books import FleetBooks, balance, figures
from app.services.margin import Scene

UNDERLYINGS_MAX = 100
"""Assets that a fleet's VaR covers, those with the largest exposures: a covariance grows with their square."""
RECENT_DAYS = 90
PLAN_CONFIDENCE = 0.99


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for: a confidence, a horizon, a window of history in days, models beyond the service's own."""

    confidence: float = 0.99
    horizon_days: float = 1.0
    window_days: int = 500
    models: tuple[str, ...] = ()


def names_of(books: FleetBooks, scene: Scene) -> list[str]:
    """Return the assets that the fleet's risk depends on."""
    parameters = scene.market.parameters
    found = {parameters.underlying_of(p.symbol) for held in _all(books) for p in held.positions}
    return sorted(found | {asset for held in _all(books) for asset in held.holdings})


def venue_milliseconds(books: FleetBooks, scene: Scene, models: Sequence[str]) -> float:
    """Return roughly the milliseconds of one core that the models of venues take: so much an underlying of a member."""
    underlying_of = scene.market.parameters.underlying_of
    held = sum(len({underlying_of(p.symbol) for p in book.positions}) for book in _all(books))
    return len(VENUES.keys() & set(models)) * UNIT_MILLISECONDS * 2.0 * held


def _all(books: FleetBooks) -> list[Book]:
    return [books.master, *(held for _, held in books.members)]


_RETURNS = text(
    """
    SELECT s.agent_id, array_agg((s.value - b.value - s.flows) / (b.value + greatest(s.flows, 0)) ORDER BY s.day)
    FROM account_snapshots s JOIN account_snapshots b ON b.agent_id = s.agent_id AND b.day = s.day - 1
    WHERE s.agent_id = ANY (:agents) AND s.day > (CAST(:now AS timestamptz) AT TIME ZONE 'UTC')::date - :days
      AND s.flows IS NOT NULL AND b.value + greatest(s.flows, 0) >= 1
    GROUP BY s.agent_id
    """
).bindparams(bindparam("agents", type_=ARRAY(Text)), bindparam("days", type_=Integer))


async def daily_returns(tx: Tx, agents: Sequence[str], days: int) -> dict[str, list[float]]:
    """Return daily returns by agent, from their snapshots, what came in or went out removed.

    What came in counts as there from the beginning of its day; a day that began with less than a dollar has none.
    """
    rows = await tx.connection.execute(_RETURNS, {"agents": list(agents), "now": tx.now, "days": days})
    return {agent: list(found) for agent, found in rows}


def risk(
    books: FleetBooks, scene: Scene, panel: Panel, recent: Panel, returns: dict[str, list[float]], asked: Asked
) -> dict[str, Any]:
    """Return a fleet's risk. Raises InvalidError for a price or a volatility that lacks."""
    parameters, everyone = scene.market.parameters, _all(books)
    prices = {symbol: price.value for symbol, price in scene.market.prices.items()}
    found = worth(book_columns(everyone), prices, parameters)
    chosen = _covered(found, panel, scene)
    exposures, names = found.exposures[:, chosen], [found.names[j] for j in chosen]
    covariance = estimate(panel, names, parameters) if names else _EMPTY
    tail = fleet_tail(exposures, covariance, asked.confidence, asked.horizon_days)
    parts = list(zip(tail.own.tolist(), tail.component.tolist(), tail.component_es.tolist(), strict=True))
    one = figures(scene, books)
    margins = _margins(books, one, scene, asked.models)
    members = [
        _member(k, everyone[k], parts[k], margins) | _sharpe(returns.get(everyone[k].agent_id, []))
        for k in range(len(everyone))
    ]
    return {
        "balance": plain(balance(books.master, books.fleet)),
        "net_utilization": _net_utilization(books, margins, scene),
        **_health(one),
        "margin": {m.model: _netted(m) for m in margins},
        "var": {
            "confidence": tail.confidence,
            "horizon_days": asked.horizon_days,
            "var": tail.value_at_risk,
            "es": tail.expected_shortfall,
            "sum_of_members": float(tail.own.sum()),
            "diversified": tail.diversified,
            "not_covered": [n for j, n in enumerate(found.names) if j not in chosen and found.exposures[:, j].any()],
        },
        "concentration": _concentration(exposures, names, everyone, found),
        "drift": _drift(exposures, recent, names, asked, scene),
        "master": members[0],
        "members": members[1:],
    }


def _netted(margin: FleetMargin) -> dict[str, Any]:
    return {
        "fleet": _known(margin.fleet),
        "members": _known(float(margin.alone.sum())),
        "freed": _known(margin.freed),
        "reason": margin.reason,
    }


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


_EMPTY = Covariance((), np.zeros(0), np.zeros((0, 0)))


def _covered(found: Worth, panel: Panel, scene: Scene) -> list[int]:
    """Return the columns that VaR covers: what has history or a volatility; a stablecoin without stands still."""
    days = np.isfinite(panel.of(found.names)).sum(axis=0)
    size = np.abs(np.nan_to_num(found.exposures)).sum(axis=0)
    known = [
        j
        for j, name in enumerate(found.names)
        if size[j] > 0.0 and (days[j] >= HISTORY_DAYS_MIN or scene.market.parameters.asset(name).volatility is not None)
    ]
    return sorted(sorted(known, key=lambda j: -size[j])[:UNDERLYINGS_MAX])


def _margins(books: FleetBooks, one: AccountFigures, scene: Scene, models: Sequence[str]) -> list[FleetMargin]:
    """Return the models' margins, those of venues where asked for, of all positions as one book and of each member."""
    view, everyone = scene.market, _all(books)
    terms = merged(everyone[0], everyone[1:]).quote_terms(view.parameters, view.prices)
    is_known = len(books.pooled) == len(books.members)  # the fleet's figures are of the same positions
    portfolio = one.portfolio if is_known else read_account(terms, view.prices, scene.now).portfolio
    owner = np.repeat(np.arange(len(everyone)), [len(held.positions) for held in everyone])
    stable = PriceFinder(view.parameters, {}, view.prices).stable_prices() if models else {}
    margin = MarginTerms(parameters=terms.margin.parameters, stable_prices=stable)
    shown = tuple(dict.fromkeys((*MODELS_SHOWN, *models)))
    return fleet_margins(portfolio, owner, len(everyone), margin, shown)


def _health(one: AccountFigures) -> dict[str, Any]:
    health = one.health
    return {
        "equity": one.equity,
        "required_initial": health.required_initial,
        "required_maintenance": health.required_maintenance,
        "utilization": health.utilization,
        "margin_ratio": health.margin_ratio,
        "zone": health.zone,
    }


def _net_utilization(books: FleetBooks, margins: Sequence[FleetMargin], scene: Scene) -> float | None:
    """Return what members reserve, margin under the cross model and for services, over the master's balance."""
    cross, view = next(m for m in margins if m.model == "cross"), scene.market
    reserved = sum(reserved_value(held.reservations, view.parameters, view.prices) for _, held in books.members)
    return net_utilization(float(cross.alone[1:].sum()) + reserved, balance(books.master, books.fleet))


def _concentration(exposures: Floats, names: Sequence[str], everyone: Sequence[Book], found: Worth) -> dict[str, Any]:
    net = exposures.sum(axis=0)
    gross = {held.agent_id: float(found.gross[k]) for k, held in enumerate(everyone)}
    return {
        "by_underlying": shares(dict(zip(names, net.tolist(), strict=True))),
        "herfindahl": herfindahl(net),
        "by_member": shares(gross),
    }


def drifted(books: FleetBooks, scene: Scene, recent: Panel) -> dict[str, Any] | None:
    """Return how far recent correlations of what a fleet holds are from calm ones, and what that costs.

    None where it holds nothing with a history. Raises InvalidError for a volatility that lacks.
    """
    prices = {symbol: price.value for symbol, price in scene.market.prices.items()}
    found = worth(book_columns(_all(books)), prices, scene.market.parameters)
    chosen = _covered(found, recent, scene)
    return _drift(found.exposures[:, chosen], recent, [found.names[j] for j in chosen], Asked(), scene)


def _drift(exposures: Floats, panel: Panel, names: Sequence[str], asked: Asked, scene: Scene) -> dict[str, Any] | None:
    if not names:
        return None
    parameters = scene.market.parameters
    recent = estimate(panel, names, parameters)
    got = fleet_drift(exposures.sum(axis=0), recent, asked.confidence, parameters)
    return {
        "window_days": RECENT_DAYS,
        "assets": got.found.names,
        "distance": got.found.distance,
        "mean_distance": got.mean_distance,
        "limit": parameters.models.fleet_drift,
        "nearest": got.found.nearest,
        "var_calm": got.found.expected,
        "var_recent": got.found.realised,
        "var_stress": got.stressed,
    }


def _member(k: int, held: Book, parts: tuple[float, float, float], margins: Sequence[FleetMargin]) -> dict[str, Any]:
    delegated = held.delegation
    return {
        "agent_id": held.agent_id,
        "drawn": None if delegated is None else plain(delegated.drawn),
        "max_margin": None if delegated is None else plain(delegated.max_margin),
        "var": parts[0],
        "component_var": parts[1],
        "component_es": parts[2],
        "margin": {m.model: _known(float(m.alone[k])) for m in margins},
        "edge": {m.model: _known(float(m.edge[k])) for m in margins},
    }


def _sharpe(returns: Sequence[float]) -> dict[str, Any]:
    ratio = sharpe(returns)
    reason = None
    if ratio is None:
        few = len(returns) < SHARPE_DAYS_MIN
        reason = f"{len(returns)} daily returns, of {SHARPE_DAYS_MIN} at least" if few else "nothing has moved"
    return {"sharpe": ratio, "sharpe_days": len(returns), "sharpe_reason": reason}


def members_to_plan(books: FleetBooks, scene: Scene, panel: Panel, returns: dict[str, list[float]]) -> list[Share]:
    """Return the members as a plan of delegations sees them. Raises InvalidError for a price that lacks."""
    parameters, shared = scene.market.parameters, [(m, held) for m, held in books.members if not m.reduce_only]
    everyone = [held for _, held in shared]
    prices = {symbol: price.value for symbol, price in scene.market.prices.items()}
    found = worth(book_columns(everyone), prices, parameters)
    chosen = _covered(found, panel, scene)
    names = [found.names[j] for j in chosen]
    covariance = estimate(panel, names, parameters) if names else _EMPTY
    tail = fleet_tail(found.exposures[:, chosen], covariance, PLAN_CONFIDENCE)
    return [
        Share(
            agent_id=held.agent_id,
            max_margin=member.max_margin,
            drawn=member.drawn,
            used=scene.figures(held).health.required_initial,
            var=float(tail.own[k]),
            sharpe=sharpe(returns.get(held.agent_id, [])),
        )
        for k, (member, held) in enumerate(shared)
    ]
