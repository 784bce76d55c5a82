"""A portfolio revalued in full at many joint moves of its underlyings; volatility and time stay."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from app.domain.black76 import Floats
from app.domain.portfolio import Flags, Portfolio
from app.domain.revalue import each_position_pnl, option_pnl, pnl_by_underlying, position_pnl
from app.domain.scenarios import ScenarioGrid, floored

OPTION_CELLS_MAX = 1_000_000
"""Option x scenario, or position x scenario values held at once."""


def _grid(moves: Floats) -> ScenarioGrid:
    count = len(moves)
    return ScenarioGrid(floored(moves.T), np.broadcast_to(0.0, moves.T.shape), np.ones(count))


def losses_at(portfolio: Portfolio, moves: Floats) -> Floats:
    """Return the losses (S,), USD, at relative price moves (S, J) of the underlyings, each price >= 1e-6 of its own."""
    total = np.empty(len(moves))
    for part in _parts(portfolio, len(moves)):
        pnl, _ = pnl_by_underlying(portfolio, _grid(moves[part]))
        np.negative(pnl.sum(axis=0), out=total[part])
    return total


def positions_apart(portfolio: Portfolio, moves: Floats) -> Iterator[tuple[Flags, Floats]]:
    """Yield which positions (n,), and their own profit and loss (k, S), USD, at the moves (S, J), many at once."""
    grid, place = _grid(moves), np.arange(len(portfolio))
    size = max(1, OPTION_CELLS_MAX // max(1, len(moves)))
    for start in range(0, len(portfolio), size):
        chosen = (place >= start) & (place < start + size)
        yield chosen, each_position_pnl(portfolio.take(chosen), grid)


def mixed_losses(portfolio: Portfolio, moves: Floats, weights: Floats) -> Floats:
    """Return each position's loss (n,), USD, weighted (S,) over the moves (S, J)."""
    total = np.zeros(len(portfolio))
    for part in _parts(portfolio, len(moves)):
        grid = _grid(moves[part])
        chosen = np.broadcast_to(weights[part], grid.moves.shape)
        total -= position_pnl(portfolio, grid, option_pnl(portfolio.options, grid), chosen)
    return total


def not_in_delta(portfolio: Portfolio) -> tuple[str, ...]:
    """Return what exposures alone leave out: of options and Greeks also how their delta changes."""
    left_out = not_modelled(portfolio)
    return ("curvature", *left_out) if left_out else ()


def not_modelled(portfolio: Portfolio) -> tuple[str, ...]:
    """Return what a revaluation at moves of prices leaves out: nothing of a book without options and Greeks."""
    if len(portfolio.options) or portfolio.any_gamma or portfolio.any_vega:
        return ("implied_volatility_moves", "passage_of_time")
    return ()


def _parts(portfolio: Portfolio, count: int) -> list[slice]:
    size = max(1, OPTION_CELLS_MAX // max(1, len(portfolio.options)))
    return [slice(start, start + size) for start in range(0, count, size)]
