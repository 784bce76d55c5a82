"""Margin of one book in each of many shocked markets: what its mode asks for after each shock, in one pass.

Cross and isolated margin need no more than the moves and the options' values. Portfolio margin is `portfolio_margin`
of the book marked at each market, laid out over scenarios: every lane's 23 cells at once, the options' too, and one
quadratic form for all scenarios whose losses have the same signs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.domain.black76 import VOLATILITY_MIN, Floats
from app.domain.curves import option_margins, rated, weights
from app.domain.margin.portfolio import (
    CELLS,
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
from app.domain.parameters import MarginMode, ModelParameters
from app.domain.portfolio import Options, Portfolio, Rows, Underlyings
from app.domain.revalue import option_pnl
from app.domain.scenarios import ScenarioGrid

CELLS_AT_ONCE = 400_000
"""Cells of profit and loss that are laid out at once: scenarios x underlyings, or markets x options, x 23."""

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


def net_exposures(book: Portfolio, grid: ScenarioGrid, terms: MarginTerms) -> Floats:
    """Return the signed exposures by underlying after each shock, USD (J, S)."""
    net = _straight(book, grid.moves.T)
    for lane in _option_lanes(book, grid, terms.parameters.models):
        net[:, lane.underlying] += lane.net[lane.at]
    return net.T


def _by_risk(book: Portfolio, grid: ScenarioGrid, terms: MarginTerms) -> Requirements:
    check_priced(book)
    models = terms.parameters.models
    count, optioned = grid.moves.shape[1], _option_lanes(book, grid, models)
    block = max(1, CELLS_AT_ONCE // (CELLS * max(1, len(book.prices))))
    initial = np.empty(count)
    for start in range(0, count, block):
        part = slice(start, start + block)
        shocked = _shocked(book, grid.moves[:, part].T, [lane.part(part) for lane in optioned], models)
        initial[part] = _initial(book, shocked, terms)
    return initial, models.maintenance_fraction * initial


def _initial(book: Portfolio, shocked: _Shocked, terms: MarginTerms) -> Floats:
    """Return initial margin (B,) of a book in each of B markets."""
    models, table = terms.parameters.models, book.underlyings
    total = shocked.pnl.sum(axis=1)
    parallel = np.maximum(0.0, -total.min(axis=1))
    risk = np.maximum(_joint(shocked.pnl, table), parallel) * models.regime_multiplier(terms.regime)
    floor = floor_by_underlying(shocked.gross, shocked.net, models).sum(axis=1)
    add_on = concentration(shocked.gross, shocked.prices, table, models.concentration_rate).sum(axis=1)
    initial: Floats = models.portfolio_factor * np.maximum(risk, floor) + add_on
    if long_option_cap(book) < np.inf:
        return np.fmin(initial, shocked.options_value)
    return initial


@dataclass(frozen=True, slots=True)
class _Shocked:
    """A book in each of B markets: weighted profit and loss by cell (B, J, 23); exposures and prices (B, J), USD."""

    pnl: Floats
    net: Floats
    gross: Floats
    prices: Floats
    options_value: Floats


def _shocked(book: Portfolio, moves: Floats, optioned: Sequence[_OptionLane], models: ModelParameters) -> _Shocked:
    """Return the book marked at moves (B, J); a greeks position keeps its parabola, as in `curves.moved`."""
    grid, factor = cells(book.underlyings, models), 1.0 + moves
    net = _straight(book, moves)
    pnl = net[:, :, None] * grid.moves
    if book.has_gamma:
        pnl += (0.5 * book.taylor_gamma * factor * factor)[:, :, None] * grid.moves * grid.moves
    if book.has_vega:
        pnl += book.taylor_vega[:, None] * grid.vol_moves
    gross, worth = _gross(book, moves), np.zeros(len(moves))
    for lane in optioned:
        j, at = lane.underlying, lane.at
        pnl[:, j] += lane.pnl[at]
        net[:, j] += lane.net[at]
        gross[:, j] += lane.gross[at]
        worth += lane.value[at]
    pnl *= grid.weights
    return _Shocked(pnl, net, gross, book.prices * factor, worth)


@dataclass(frozen=True, slots=True)
class _OptionLane:
    """The options on one underlying in each of its U distinct markets: profit and loss by cell (U, 23), and USD (U,).

    `at` (S,) is the market of each scenario.
    """

    underlying: int
    at: Rows
    pnl: Floats
    net: Floats
    gross: Floats
    value: Floats

    def part(self, scenarios: slice) -> _OptionLane:
        """Return the lane for some of the scenarios."""
        return replace(self, at=self.at[scenarios])


def _option_lanes(book: Portfolio, grid: ScenarioGrid, models: ModelParameters) -> list[_OptionLane]:
    """Return the lanes that hold options, each revalued once where scenarios do the same to its underlying."""
    return [_option_lane(book, j, grid, models) for j in np.unique(book.options.underlying).tolist()]


def _option_lane(book: Portfolio, underlying: int, grid: ScenarioGrid, models: ModelParameters) -> _OptionLane:
    options = book.options.take(book.options.underlying == underlying)
    shocks = np.stack([grid.moves[underlying], grid.vol_moves[underlying]], axis=1)
    markets, at = np.unique(shocks, axis=0, return_inverse=True)
    scan = cells(book.underlyings, models)
    pnl, sums = np.empty((len(markets), CELLS)), np.empty((3, len(markets)))
    block = max(1, CELLS_AT_ONCE // (CELLS * len(options)))
    for start in range(0, len(markets), block):
        part = slice(start, start + block)
        shocked = _shocked_options(options, markets[part])
        across = len(markets[part]), len(options)
        pnl[part] = option_pnl(shocked, scan).reshape(*across, CELLS).sum(axis=1)
        dollars = shocked.dollar_delta().reshape(across)
        sums[:, part] = dollars.sum(axis=1), np.abs(dollars).sum(axis=1), shocked.value.reshape(across).sum(axis=1)
    return _OptionLane(underlying, at.reshape(-1), pnl, *sums)


def _shocked_options(options: Options, markets: Floats) -> Options:
    """Return the options of one underlying in each of B markets (B, 2), price and volatility move, (B·O,)."""
    tiled = options.take(np.tile(np.arange(len(options)), len(markets)))
    factor = np.repeat(1.0 + markets, len(options), axis=0)
    tiled = replace(tiled, forward=tiled.forward * factor[:, 0], iv=np.maximum(tiled.iv * factor[:, 1], VOLATILITY_MIN))
    return replace(tiled, value=tiled.values(np.zeros(1))[:, 0])


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


def _joint(pnl: Floats, table: Underlyings) -> Floats:
    """Return √(d'ρ'd) + √(n'ρn) (B,) of weighted profit and loss by cell (B, J, 23)."""
    down = np.maximum(0.0, -pnl[:, :, DOWN_CELLS].min(axis=2))
    up = np.maximum(0.0, -pnl[:, :, UP_CELLS].min(axis=2))
    two_sided = np.minimum(down, up)
    joint = _norms(down - up, lambda signs: signed_correlation(signs, table.stress, table.hedge))
    if two_sided.any():
        joint += _norms(two_sided, lambda _: table.stress)
    return joint


def _norms(vectors: Floats, correlation: Callable[[Floats], Floats]) -> Floats:
    """Return √(x'Mx) of each row (B, J), M being that of its signs; zeros of x need no correlation."""
    patterns, which = np.unique(np.sign(vectors), axis=0, return_inverse=True)
    norms = np.zeros(len(vectors))
    for k, signs in enumerate(patterns):
        live = np.flatnonzero(signs)
        if live.size:
            members = np.flatnonzero(which.reshape(-1) == k)
            part, _ = sound_correlation(correlation(signs)[np.ix_(live, live)])
            x = vectors[np.ix_(members, live)]
            norms[members] = np.sqrt(np.maximum(0.0, ((x @ part) * x).sum(axis=1)))
    return norms
