"""Margin of one book in each of many shocked markets: what its mode asks for after each shock, in one pass.

Cross and isolated margin need no more than the moves and the options' values. Portfolio margin is `portfolio_margin`
of the book marked at each market, laid out over scenarios: every lane's 23 cells at once, the options' too, and one
quadratic form for all scenarios whose losses have the same signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from app.domain.black76 import VOLATILITY_MIN, Floats
from app.domain.curves import option_margins, rated, weights
from app.domain.margin.portfolio import (
    DOWN_CELLS,
    UP_CELLS,
    cells,
    check_priced,
    concentration,
    floor_by_underlying,
    long_option_cap,
    signed_correlation,
    sound_correlation,
)
from app.domain.margin.result import MarginTerms
from app.domain.parameters import MarginMode
from app.domain.portfolio import Options, Portfolio, Underlyings
from app.domain.revalue import option_pnl
from app.domain.scenarios import ScenarioGrid

FIGURES_AT_ONCE = 400_000
"""Cells of profit and loss that are laid out at once: scenarios x (underlyings + options) x 23."""

Requirements = tuple[Floats, Floats]
"""Initial and maintenance margin, USD (S,)."""


def requirements(
    book: Portfolio, grid: ScenarioGrid, each_option: Floats, mode: MarginMode, terms: MarginTerms
) -> Requirements:
    """Return the book's margins in its mode after each of the grid's shocks, reservations aside.

    `each_option` (O, S) is the options' profit and loss, as `pnl_by_underlying` returns it.
    """
    if mode == "portfolio":
        return _by_risk(book, grid, terms)
    by_initial, by_maintenance = weights(book, mode)
    base = rated(book, mode, grid.moves)
    initial, maintenance = by_initial @ base, by_maintenance @ base
    if len(book.options):
        options = book.options
        value = options.value[:, None] + each_option
        opening, keeping = option_margins(book, grid.moves[options.underlying], value)
        initial, maintenance = initial + opening.sum(axis=0), maintenance + keeping.sum(axis=0)
    return initial, maintenance


def net_exposures(book: Portfolio, grid: ScenarioGrid) -> Floats:
    """Return the signed exposures by underlying after each shock, USD (J, S)."""
    moves = grid.moves.T
    net = _straight(book, moves)
    if len(book.options):
        options = _shocked_options(book.options, moves, grid.vol_moves.T)
        lanes, starts = np.unique(book.options.underlying, return_index=True)
        net[:, lanes] += np.add.reduceat(options.dollar_delta().reshape(len(moves), -1), starts, axis=1)
    return net.T


def _by_risk(book: Portfolio, grid: ScenarioGrid, terms: MarginTerms) -> Requirements:
    check_priced(book)
    count = grid.moves.shape[1]
    lanes = len(book.prices) + len(book.options)
    block = max(1, FIGURES_AT_ONCE // (len(cells(book.underlyings, terms.parameters.models).weights) * max(1, lanes)))
    initial = np.empty(count)
    for start in range(0, count, block):
        part = slice(start, start + block)
        initial[part] = _initial(book, grid.moves[:, part].T, grid.vol_moves[:, part].T, terms)
    return initial, terms.parameters.models.maintenance_fraction * initial


def _initial(book: Portfolio, moves: Floats, vol_moves: Floats, terms: MarginTerms) -> Floats:
    """Return initial margin (B,) after moves (B, J)."""
    models, table = terms.parameters.models, book.underlyings
    shocked = _shocked(book, moves, vol_moves, terms)
    total = shocked.pnl.sum(axis=1)
    parallel = np.maximum(0.0, -total.min(axis=1))
    joint = _joint(shocked.pnl, table)
    risk = np.maximum(joint, parallel) * models.regime_multiplier(terms.regime)
    floor = floor_by_underlying(shocked.gross, shocked.net, models).sum(axis=1)
    add_on = concentration(shocked.gross, book.prices * (1.0 + moves), table, models.concentration_rate).sum(axis=1)
    initial: Floats = models.portfolio_factor * np.maximum(risk, floor) + add_on
    if long_option_cap(book) < np.inf:
        return np.fmin(initial, shocked.options_value)
    return initial


@dataclass(frozen=True, slots=True)
class _Shocked:
    """A book in each of B markets: weighted profit and loss by cell (B, J, 23), exposures (B, J), USD."""

    pnl: Floats
    net: Floats
    gross: Floats
    options_value: Floats


def _shocked(book: Portfolio, moves: Floats, vol_moves: Floats, terms: MarginTerms) -> _Shocked:
    """Return the book marked at moves (B, J); a greeks position keeps its parabola, as in `curves.moved`."""
    grid, factor = cells(book.underlyings, terms.parameters.models), 1.0 + moves
    net = _straight(book, moves)
    pnl = net[:, :, None] * grid.moves
    if book.has_gamma:
        pnl += (0.5 * book.taylor_gamma * factor * factor)[:, :, None] * grid.moves * grid.moves
    if book.has_vega:
        pnl += book.taylor_vega[:, None] * grid.vol_moves
    gross = _gross(book, moves)
    worth = np.zeros(len(moves))
    if len(book.options):
        options = _shocked_options(book.options, moves, vol_moves)
        across = len(moves), len(book.options)
        pnl_each = option_pnl(options, grid).reshape(*across, -1)
        dollars = options.dollar_delta().reshape(across)
        lanes, starts = np.unique(book.options.underlying, return_index=True)
        pnl[:, lanes] += np.add.reduceat(pnl_each, starts, axis=1)
        net[:, lanes] += np.add.reduceat(dollars, starts, axis=1)
        gross[:, lanes] += np.add.reduceat(np.abs(dollars), starts, axis=1)
        worth = options.value.reshape(across).sum(axis=1)
    pnl *= grid.weights
    return _Shocked(pnl, net, gross, worth)


def _straight(book: Portfolio, moves: Floats) -> Floats:
    """Return the signed exposures of linear and greeks positions after moves (B, J), USD."""
    return (book.taylor_delta + book.taylor_gamma * moves) * (1.0 + moves)


def _gross(book: Portfolio, moves: Floats) -> Floats:
    """Return the sums of absolute exposures of linear and greeks positions after moves (B, J), USD."""
    plain = ~book.is_option
    bent = plain & (book.gamma != 0.0)
    straight = book.by_underlying(np.where(plain & ~bent, np.abs(book.exposure), 0.0))
    gross: Floats = straight * (1.0 + moves)
    rows = np.flatnonzero(bent)
    if rows.size:
        rows = rows[np.argsort(book.underlying[rows], kind="stable")]
        lanes, starts = np.unique(book.underlying[rows], return_index=True)
        m = moves[:, book.underlying[rows]]
        each = np.abs(book.delta[rows] + book.gamma[rows] * m) * book.notional[rows] * (1.0 + m)
        gross[:, lanes] += np.add.reduceat(each, starts, axis=1)
    return gross


def _shocked_options(options: Options, moves: Floats, vol_moves: Floats) -> Options:
    """Return the options in each of B markets, one market after the other, (B·O,)."""
    count = len(moves)
    under = options.underlying
    tiled = options.take(np.tile(np.arange(len(options)), count))
    iv = np.maximum(options.iv * (1.0 + vol_moves[:, under]), VOLATILITY_MIN)
    forward = options.forward * (1.0 + moves[:, under])
    tiled = replace(tiled, forward=forward.reshape(-1), iv=iv.reshape(-1))
    return replace(tiled, value=tiled.values(np.zeros(1))[:, 0])


def _joint(pnl: Floats, table: Underlyings) -> Floats:
    """Return √(d'ρ'd) + √(n'ρn) (B,) of weighted profit and loss by cell (B, J, 23)."""
    down = np.maximum(0.0, -pnl[:, :, DOWN_CELLS].min(axis=2))
    up = np.maximum(0.0, -pnl[:, :, UP_CELLS].min(axis=2))
    two_sided = np.minimum(down, up)
    joint = _norms(down - up, lambda signs: signed_correlation(signs, table.stress, table.hedge), table)
    if two_sided.any():
        joint += _norms(two_sided, lambda _: table.stress, table)
    return joint


def _norms(vectors: Floats, correlation: Callable[[Floats], Floats], table: Underlyings) -> Floats:
    """Return √(x'Mx) of each row (B, J), M being that of its signs; zeros of x need no correlation."""
    patterns, which = np.unique(np.sign(vectors), axis=0, return_inverse=True)
    norms = np.zeros(len(vectors))
    for k, signs in enumerate(patterns):
        live = np.flatnonzero(signs)
        if live.size:
            members = np.flatnonzero(which.reshape(-1) == k)
            part, _ = sound_correlation(correlation(signs)[np.ix_(live, live)], table)
            x = vectors[np.ix_(members, live)]
            norms[members] = np.sqrt(np.maximum(0.0, ((x @ part) * x).sum(axis=1)))
    return norms
