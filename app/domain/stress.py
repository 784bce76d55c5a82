"""An account after shocks: the assessment that health makes, on each of many shocked markets at once.

A shock moves prices and volatilities and nothing else: sizes, entry prices, allocations of isolated positions, debts
and reservations stay. Stablecoins stand still unless a shock names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType

import numpy as np

from app.domain.black76 import Floats
from app.domain.collateral import Collateral
from app.domain.curves import Figures, Pool
from app.domain.health import Scales, scales
from app.domain.margin.shocked import requirements
from app.domain.parameters import MarketParameters, Regime
from app.domain.portfolio import Flags, Portfolio, Rows, Underlyings, underlying_table
from app.domain.prices import Price, StoredPrice
from app.domain.quote import QuoteTerms, pool_of, read_account
from app.domain.revalue import CELLS_MAX, each_position_pnl, pnl_by_underlying
from app.domain.scenarios import Scenario, ScenarioGrid, floored, lay_out

TWENTY_PERCENT = (Scenario(-0.20, 0.0), Scenario(0.20, 0.0))


@dataclass(frozen=True, eq=False)
class StressAccount:
    """An account laid out for shocks: a lane for each asset it has to do with, position or collateral.

    `whole` holds all positions, `pool` those that share the collateral; both on the same J lanes, `names`. By lane, USD
    (J,): `backing` is collateral after haircut less debts, `reserved` what of the pool's reservations moves with the
    asset; the rest of them stays. `prices` are those used.
    """

    whole: Portfolio
    pool: Pool
    collateral: Collateral
    backing: Floats
    reserved: Floats
    prices: Mapping[str, Price]

    @property
    def names(self) -> tuple[str, ...]:
        """The assets, sorted."""
        return self.whole.underlyings.names

    @property
    def table(self) -> Underlyings:
        """What is known of the assets."""
        return self.whole.underlyings

    @property
    def parameters(self) -> MarketParameters:
        """The parameters that margins are computed with."""
        return self.pool.terms.parameters

    def under(self, regime: Regime) -> StressAccount:
        """Return the account margined in a regime: portfolio margin is multiplied, other modes know none."""
        return replace(self, pool=replace(self.pool, terms=replace(self.pool.terms, regime=regime)))

    def lanes_of(self, assets: Sequence[str]) -> Rows:
        """Return the lanes of assets that have one."""
        row = {name: j for j, name in enumerate(self.names)}
        return np.array([row[asset] for asset in assets], dtype=np.intp)


def stress_account(
    terms: QuoteTerms,
    stored: Mapping[str, StoredPrice],
    now: datetime,
    reserved: Mapping[str, float] = MappingProxyType({}),
) -> StressAccount:
    """Return the account of the terms, ready for shocks. Raises InvalidError as `account_figures` does.

    `reserved` says what of `terms.reserved`, USD, is in which asset and moves with its price: no more than all of it.
    """
    account = read_account(terms, stored, now)
    book, collateral = account.portfolio, account.collateral
    widened = _widened(book, collateral, [*collateral.assets, *reserved], terms.margin.parameters)
    lanes = {name: j for j, name in enumerate(widened.underlyings.names)}
    moving = np.zeros(len(lanes))
    for asset, value in reserved.items():
        moving[lanes[asset]] += value
    pool = pool_of(widened, collateral, terms)
    return StressAccount(widened, pool, collateral, pool.backing.on_underlying, moving, account.prices)


def _widened(book: Portfolio, collateral: Collateral, assets: Sequence[str], parameters: MarketParameters) -> Portfolio:
    """Return the book on lanes for these assets too, so that all that moves has one."""
    known = dict(zip(book.underlyings.names, book.underlyings.price_range.tolist(), strict=True))
    prices = dict(zip(collateral.assets, collateral.price.tolist(), strict=True))
    prices |= {n: p for n, p in zip(book.underlyings.names, book.prices.tolist(), strict=True) if not np.isnan(p)}
    names = tuple(sorted({*known, *assets}))
    lane = {name: j for j, name in enumerate(names)}
    to = np.array([lane[name] for name in book.underlyings.names], dtype=np.intp)
    # a flat position leaves its underlying no range of its own
    ranges = np.array([known.get(n) or parameters.asset(n).price_range for n in names], dtype=np.float64)
    return replace(
        book,
        underlying=to[book.underlying],
        options=replace(book.options, underlying=to[book.options.underlying]),
        underlyings=underlying_table(names, ranges, parameters),
        prices=np.array([prices.get(name, np.nan) for name in names]),
    )


def market_shocks(scenarios: Sequence[Scenario], account: StressAccount) -> ScenarioGrid:
    """Return the scenarios laid out over the account's assets: relative moves (J, S), prices floored.

    A scenario's `price_move` (a multiple of an asset's own range where it says so) is that of every asset that is no
    stablecoin, its `shocks` go before it. Weights are of the margin models: a market moves wholly or not.
    """
    grid = lay_out(scenarios, account.names, account.table.price_range)
    moves = grid.moves.copy()
    for j in np.flatnonzero(account.table.stable).tolist():
        moves[j] = [s.shocks.get(account.names[j], 0.0) for s in scenarios]
    return ScenarioGrid(floored(moves), grid.vol_moves, np.ones(len(scenarios)))


def price_shocks(moves: Floats) -> ScenarioGrid:
    """Return the shocks of relative moves (J, S), floored, volatilities unchanged."""
    return ScenarioGrid(floored(moves), np.zeros_like(moves), np.ones(moves.shape[1]))


@dataclass(frozen=True, eq=False)
class Stressed:
    """An account after each of S shocks, USD (S,) unless said otherwise.

    `equity`, `pnl` (of positions) and `collateral_change` (collateral less debts, after haircut) are of the whole
    account; `pool_equity`, the required margins, with reservations, and `scales` of what shares the collateral, as in
    health. `pnl_by_asset`, `collateral_by_asset` are (J, S) in the order of `names`; `isolated_liquidated` (I, S) says
    which isolated positions, named by `isolated`, fall below their own maintenance margin.
    """

    names: tuple[str, ...]
    equity: Floats
    pnl: Floats
    collateral_change: Floats
    pool_equity: Floats
    required_initial: Floats
    required_maintenance: Floats
    scales: tuple[Scales, ...]
    breached: Flags
    pnl_by_asset: Floats
    collateral_by_asset: Floats
    isolated: tuple[str, ...]
    isolated_liquidated: Flags

    @property
    def worst(self) -> int:
        """The scenario with the least equity, the first on a tie."""
        return int(np.argmin(self.equity))

    @property
    def survival(self) -> Floats:
        """Equity after / required maintenance after (S,), NaN where nothing is to be kept."""
        kept = self.required_maintenance > 0.0
        ratio: Floats = np.divide(
            self.pool_equity, self.required_maintenance, out=np.full(kept.shape, np.nan), where=kept
        )
        return ratio


def stress(account: StressAccount, grid: ScenarioGrid) -> Stressed:
    """Return the account after each of the grid's shocks, moves (J, S) in the order of the account's names.

    Raises InvalidError as portfolio margin does: a matrix past repair, a limit in units without a price.
    """
    pooled, pool_pnl = _pooled(account, grid)
    pnl, liquidated = pool_pnl, np.empty((0, grid.moves.shape[1]), dtype=np.bool_)
    if account.whole.any_isolated:
        alone = account.whole.take(account.whole.isolated)
        each = each_position_pnl(alone, grid)
        liquidated = _liquidated(alone, grid.moves, each)
        pnl = pool_pnl + _by_lane(alone.underlying, each, len(account.names))
    policy = account.parameters.policy
    rows = zip(pooled.equity.tolist(), pooled.initial.tolist(), pooled.maintenance.tolist(), strict=True)
    collateral = account.backing[:, None] * grid.moves
    worth = float(account.backing.sum() + account.whole.unrealized_pnl.sum()) + account.whole.options_value
    return Stressed(
        names=account.names,
        equity=worth + collateral.sum(axis=0) + pnl.sum(axis=0),
        pnl=pnl.sum(axis=0),
        collateral_change=collateral.sum(axis=0),
        pool_equity=pooled.equity,
        required_initial=pooled.initial,
        required_maintenance=pooled.maintenance,
        scales=tuple(scales(*row, policy) for row in rows),
        breached=is_breached(pooled, policy.breach_utilization),
        pnl_by_asset=pnl,
        collateral_by_asset=collateral,
        isolated=tuple(s for s, own in zip(account.whole.symbols, account.whole.isolated, strict=True) if own),
        isolated_liquidated=liquidated,
    )


def pool_figures(account: StressAccount, grid: ScenarioGrid) -> Figures:
    """Return equity and required margins (S,) of what shares the collateral, after each shock."""
    return _pooled(account, grid)[0]


def is_breached(figures: Figures, breach_utilization: float) -> Flags:
    """Whether utilization is at the level or equity below required maintenance, (S,)."""
    spare = breach_utilization * figures.equity - figures.initial
    return (figures.equity < figures.maintenance) | ((figures.initial > 0.0) & (spare <= 0.0))


def _pooled(account: StressAccount, grid: ScenarioGrid) -> tuple[Figures, Floats]:
    """Return the pool's figures (S,) and its profit and loss by lane (J, S)."""
    pool = account.pool
    book, count = pool.portfolio, grid.moves.shape[1]
    pnl, initial, maintenance = np.empty(grid.moves.shape), np.empty(count), np.empty(count)
    # the options' figures stay in the cache
    block = max(1, CELLS_MAX // len(book.options)) if len(book.options) else max(1, count)
    for start in range(0, count, block):
        part = slice(start, start + block)
        shocks = replace(grid, moves=grid.moves[:, part], vol_moves=grid.vol_moves[:, part], weights=grid.weights[part])
        pnl[:, part], each_option = pnl_by_underlying(book, shocks)
        initial[part], maintenance[part] = requirements(book, shocks, each_option, pool.mode, pool.terms)
    reserved = pool.reserved + account.reserved @ grid.moves
    worth = pool.fixed_equity + float(account.backing.sum()) + book.options_value
    equity = worth + account.backing @ grid.moves + pnl.sum(axis=0)
    return Figures(equity, initial + reserved, maintenance + reserved), pnl


def _liquidated(alone: Portfolio, moves: Floats, pnl: Floats) -> Flags:
    """Whether each isolated position's equity is below its own maintenance margin (I, S)."""
    equity = (alone.allocated + alone.unrealized_pnl)[:, None] + pnl
    keeping = (alone.maintenance_rate * alone.notional)[:, None] * (1.0 + moves[alone.underlying])
    if len(alone.options):
        options = alone.options
        equity[options.row] += options.value[:, None]
        value = options.value[:, None] + pnl[options.row]
        long = (options.quantity >= 0.0)[:, None]
        keeping[options.row] = np.where(long, value, keeping[options.row] - value)
    return equity < keeping


def _by_lane(underlying: Rows, each: Floats, count: int) -> Floats:
    total = np.zeros((count, each.shape[1]))
    np.add.at(total, underlying, each)
    return total
