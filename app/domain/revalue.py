"""Profit and loss of a portfolio over scenarios: linear, Taylor and Black-76 in one pass.

Linear and greeks positions are first summed by underlying, so that their cost over S scenarios is one (J, S)
product whatever their number; options are revalued in full, in blocks that stay in the cache.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from app.domain.black76 import VOLATILITY_MIN, Floats
from app.domain.portfolio import Options, Portfolio
from app.domain.scenarios import ScenarioGrid

CELLS_MAX = 32_768
"""Option x scenario cells revalued at once: a few arrays of this size fit in a core's cache."""


def taylor_pnl(portfolio: Portfolio, grid: ScenarioGrid) -> Floats:
    """Return Σ delta·notional·m + ½·gamma·notional·m² + vega·v by underlying, USD, (J, S)."""
    moves = grid.moves
    pnl = portfolio.taylor_delta[:, None] * moves
    if portfolio.has_gamma:
        pnl += (0.5 * portfolio.taylor_gamma)[:, None] * moves * moves
    if portfolio.has_vega:
        pnl += portfolio.taylor_vega[:, None] * grid.vol_moves
    return pnl


def option_pnl(options: Options, grid: ScenarioGrid) -> Floats:
    """Return the change in value of each option, USD, (O, S): IV' = max(IV(1+v), .01)."""
    result = np.empty((len(options), grid.moves.shape[1]))
    block = max(1, CELLS_MAX // grid.moves.shape[1])
    for start in range(0, len(options), block):
        part = options.take(slice(start, start + block))
        vol_moves = grid.vol_moves[part.underlying]
        if grid.term_scaled:
            vol_moves = vol_moves * part.term[:, None]
        iv = np.maximum(part.iv[:, None] * (1.0 + vol_moves), VOLATILITY_MIN)
        values = part.values(grid.moves[part.underlying], iv)
        np.subtract(values, part.value[:, None], out=result[start : start + block])
    return result


def sum_by_underlying(options: Options, pnl: Floats, underlyings: int) -> Floats:
    """Return the sums (J, S) of option figures (O, S); the options are sorted by underlying."""
    total = np.zeros((underlyings, pnl.shape[1]))
    if len(options):
        found, starts = np.unique(options.underlying, return_index=True)
        total[found] = np.add.reduceat(pnl, starts, axis=0)
    return total


def pnl_by_underlying(portfolio: Portfolio, grid: ScenarioGrid) -> tuple[Floats, Floats]:
    """Return profit and loss by underlying (J, S), and of each option (O, S), USD, before weights."""
    pnl = taylor_pnl(portfolio, grid)
    if not portfolio.has_options:
        return pnl, np.empty((0, pnl.shape[1]))
    each_option = option_pnl(portfolio.options, grid)
    pnl += sum_by_underlying(portfolio.options, each_option, len(pnl))
    return pnl, each_option


def each_position_pnl(portfolio: Portfolio, grid: ScenarioGrid) -> Floats:
    """Return the profit and loss of each position in each scenario, USD, (n, S), before weights."""
    moves = grid.moves[portfolio.underlying]
    pnl: Floats = portfolio.exposure[:, None] * moves
    if portfolio.any_gamma:
        pnl += (0.5 * portfolio.gamma * portfolio.notional)[:, None] * moves * moves
    if portfolio.any_vega:
        pnl += portfolio.vega[:, None] * grid.vol_moves[portfolio.underlying]
    if portfolio.has_options:
        pnl[portfolio.options.row] = option_pnl(portfolio.options, grid)
    return pnl


def position_pnl(portfolio: Portfolio, grid: ScenarioGrid, each_option: Floats, chosen: Floats) -> Floats:
    """Return the profit and loss (n,) of each position where underlying j takes a mix of scenarios.

    `chosen` (J, S) is the weight of each scenario for each underlying; `each_option` (O, S) as returned by
    `pnl_by_underlying`.
    """
    u = portfolio.underlying
    pnl = portfolio.exposure * np.add.reduce(chosen * grid.moves, axis=1)[u]
    if portfolio.any_gamma:
        pnl += 0.5 * portfolio.gamma * portfolio.notional * np.add.reduce(chosen * grid.moves**2, axis=1)[u]
    if portfolio.any_vega:
        pnl += portfolio.vega * np.add.reduce(chosen * grid.vol_moves, axis=1)[u]
    if portfolio.has_options:
        options = portfolio.options
        pnl[options.row] = (each_option * chosen[options.underlying]).sum(axis=1)
    return cast("Floats", pnl)
