"""What a stale price may hide: an account at its best, if every stale price had moved in its favour."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from app.domain.book import Book
from app.domain.gates import stale_symbols
from app.domain.health import Health
from app.domain.money import to_float
from app.domain.quote import AccountFigures
from app.services.liquidation import mark_symbol
from app.services.margin import Scene

GRAIN_SHARE_MAX = 0.01
"""Of equity: stale prices that can't change it by more keep nothing from being told."""


def stale(scene: Scene, figures: AccountFigures) -> frozenset[str]:
    """Return the symbols on which the figures depend whose prices are too old."""
    return frozenset(stale_symbols(figures, scene.now, scene.price_age_max.total_seconds()))


def at_best(scene: Scene, held: Book, figures: AccountFigures, symbols: Collection[str]) -> Health:
    """Return the account's health if each stale price had moved in its favour by the range that the risk core scans.

    Stale collateral counts without haircut besides. Of the margin with and without the positions on stale marks the
    smaller is required: a stale leg may hedge a fresh one. A breach that stands even so does not hang on what is
    stale, be it a grain of a coin whose feed has ended.
    """
    health = figures.health
    if not symbols:
        return health
    table, fresh = figures.portfolio, []
    stale_net = np.zeros(len(table.prices))  # what is long and short of one underlying does not gain twice
    for position, j, exposure in zip(held.positions, table.underlying.tolist(), table.exposure.tolist(), strict=True):
        if mark_symbol(figures, position.symbol, table.underlyings.names[j]) in symbols:
            stale_net[j] += exposure
        else:
            fresh.append(position)
    gain = float(np.abs(stale_net) @ table.underlyings.price_range)
    equity = health.equity + _collateral(scene, held, figures, symbols) + gain
    without = health if len(fresh) == len(held.positions) else scene.figures(replace(held, positions=fresh)).health
    initial = min(health.required_initial, without.required_initial)
    maintenance = min(health.required_maintenance, without.required_maintenance)
    insolvent = equity < 0.0 or (equity == 0.0 and initial > 0.0)
    used = None if insolvent else initial / equity if initial else 0.0
    return replace(
        health,
        equity=equity,
        required_initial=initial,
        required_maintenance=maintenance,
        utilization=used,
        insolvent=insolvent,
    )


def _collateral(scene: Scene, held: Book, figures: AccountFigures, symbols: Collection[str]) -> float:
    """Return what stale holdings may be worth more, and stale debts less, USD.

    What has a haircut of 1 is collateral at no price: so an operator ends what a dead feed would hold up for ever.
    """
    more = 0.0
    for asset, holding in held.holdings.items():
        if asset in symbols:
            terms, price = scene.market.parameters.asset(asset), figures.prices[asset].value
            if terms.haircut < 1.0:
                more += to_float(holding.held) * price * (terms.haircut + terms.price_range)
                more += to_float(holding.lent) * price * scene.market.parameters.models.recall_haircut
            more += to_float(holding.debt) * price * terms.price_range
    return more


def is_grain(figures: AccountFigures, best: Health) -> bool:
    """Whether what is stale is too little to matter to what is told of an account."""
    return best.equity - figures.health.equity <= GRAIN_SHARE_MAX * abs(figures.equity)
