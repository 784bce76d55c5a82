"""The service's own portfolio margin: scans by underlying, joined by stress and hedge correlations.

Shocks by underlying give directional losses d (down less up) and two-sided losses n; they are joined with one
correlation where two directional losses add up and a lower one where they offset, so that a hedge earns less
credit than a concentration is charged. The same-cell scan over all underlyings is a second, parallel measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.domain.black76 import Floats
from app.domain.computed import computed
from app.domain.correlation import (
    REPAIR_SIZE_MAX,
    is_positive_semidefinite,
    nearest_correlation,
)
from app.domain.margin.result import (
    Indices,
    MarginResult,
    MarginTerms,
    ScenarioTable,
    Worst,
    worst_scenario,
)
from app.domain.parameters import ModelParameters
from app.domain.portfolio import Portfolio, Underlyings, total
from app.domain.record import record
from app.domain.revalue import pnl_by_underlying, position_pnl
from app.domain.scenarios import ScenarioGrid, scan
from app.errors import invalid

_THIRDS = (-1.0, -2 / 3, -1 / 3, 0.0, 1 / 3, 2 / 3, 1.0)
_PRICES = np.array([-1.0, *(price for price in _THIRDS for _ in range(3)), 1.0])
_VOLS = np.array([1.0, *(vol for _ in _THIRDS for vol in (-1.0, 0.0, 1.0)), 1.0])
KEPT_SIZE_MAX = REPAIR_SIZE_MAX
"""Underlyings up to which correlations are kept: all that may need a repair are, which takes long."""
_TAIL = np.array([True, *[False] * 21, True])
CELLS = len(_PRICES)
_IN_RANGES = (True,) * CELLS
# in the order of the price, so that each side is a slice; both hold the cells where only volatility moves
DOWN_CELLS = slice(0, 13)
UP_CELLS = slice(10, 23)


@dataclass(frozen=True, slots=True)
class _Cells:
    """The 23 cells in multiples of ranges, laid out over J underlyings, and as they are shown."""

    grid: ScenarioGrid
    price_moves: Sequence[float]
    vol_moves: Sequence[float]
    weights: Sequence[float]


def cells(table: Underlyings, models: ModelParameters) -> ScenarioGrid:
    """Return the 23 cells over each underlying's ranges: a tail, 7 prices x 3 volatilities, the other tail."""
    return _cells(table, models).grid


def _cells(table: Underlyings, models: ModelParameters) -> _Cells:
    multiple, weight = models.portfolio_tail_multiple, models.portfolio_tail_weight

    def make() -> _Cells:
        multiples, weights = np.where(_TAIL, multiple, 1.0) * _PRICES, np.where(_TAIL, weight, 1.0)
        grid = scan(table.price_range, table.volatility_range, multiples, _VOLS, weights, term_scaled=True)
        return _Cells(grid, multiples.tolist(), _VOLS.tolist(), weights.tolist())

    return table.derived(("cells", multiple, weight), make)


@record(frozen=True, eq=False)
class Sides:
    """Losses by underlying (J,), USD >= 0: the worst with the price down and with it up, and their cells."""

    down: Floats
    up: Floats
    down_cell: Indices
    up_cell: Indices

    @computed
    def directional(self) -> Floats:
        """D = D - U."""
        return self.down - self.up

    @computed
    def two_sided(self) -> Floats:
        """N = min(D, U)."""
        return np.minimum(self.down, self.up)


def sides(pnl: Floats) -> Sides:
    """Return the two-sided losses of weighted profit and loss by cell, (J, 23)."""
    down_cell = pnl[:, DOWN_CELLS].argmin(axis=1)
    up_cell = pnl[:, UP_CELLS].argmin(axis=1) + UP_CELLS.start
    first = np.arange(0, pnl.size, pnl.shape[1])  # of each lane, where a flat look finds what a pair of indices does
    return Sides(
        down=np.maximum(0.0, -pnl.take(first + down_cell)),
        up=np.maximum(0.0, -pnl.take(first + up_cell)),
        down_cell=down_cell,
        up_cell=up_cell,
    )


@record(frozen=True, slots=True)
class Joint:
    """joint = √(d'ρ'd) + √(n'ρn), USD, with its gradients (J,) by d and by n, and the repair if there was one."""

    value: float
    by_directional: Floats
    by_two_sided: Floats
    repair_distance: float


def signed_correlation(directional: Floats, stress: Floats, hedge: Floats) -> Floats:
    """Return ρ': the stress correlation where d_i d_j >= 0, the hedge correlation where they offset."""
    offset = np.outer(directional, directional) < 0.0
    return np.where(offset, hedge, stress)


def join(losses: Sides, table: Underlyings) -> Joint:
    """Return the joined loss; a ρ' (or ρ) that is no correlation matrix is replaced by the nearest one."""
    first, by_directional, signed_distance = _norm(losses.directional, table)
    second, by_two_sided, stress_distance = _norm(losses.two_sided, table)
    return Joint(first + second, by_directional, by_two_sided, max(signed_distance, stress_distance))


def _norm(vector: Floats, table: Underlyings) -> tuple[float, Floats, float]:
    """Return √(x'ρ'x), its gradient and the distance of the repair; zeros of x need no correlation.

    Of losses that are all of one sign, ρ' is the stress correlation.
    """
    gradient = np.zeros(len(vector))
    live = vector.nonzero()[0]
    if not live.size:
        return 0.0, gradient, 0.0
    signs, x = np.sign(vector), vector[live]
    matrix, distance = _live_correlation(signs, live, table)
    product = matrix @ x
    norm = math.sqrt(max(0.0, float(x @ product)))
    if norm > 0.0:
        gradient[live] = product / norm
    return norm, gradient, distance


def _live_correlation(signs: Floats, live: Indices, table: Underlyings) -> tuple[Floats, float]:
    """Return ρ' of the losses that are not 0 and the distance of its repair.

    It depends on their signs alone, which for one agent hardly ever change: small ones are kept.
    """

    def make() -> tuple[Floats, float]:
        matrix = signed_correlation(signs, table.stress, table.hedge)
        return sound_correlation(matrix if live.size == signs.size else matrix[np.ix_(live, live)])

    if signs.size > KEPT_SIZE_MAX:
        return make()
    return table.derived(("correlation", signs.tobytes()), make)


def sound_correlation(matrix: Floats) -> tuple[Floats, float]:
    """Return the matrix, or the nearest correlation matrix, and their distance. Raises InvalidError past its limit."""
    if is_positive_semidefinite(matrix):
        return matrix, 0.0
    if len(matrix) > REPAIR_SIZE_MAX:
        raise invalid(
            "/market/correlation",
            "correlation_not_repairable",
            f"the correlation matrix is not positive semidefinite and has over {REPAIR_SIZE_MAX} underlyings",
        )
    nearest = nearest_correlation(matrix)
    return nearest, float(np.linalg.norm(nearest - matrix))


def floor_by_underlying(gross: Floats, net: Floats, models: ModelParameters) -> Floats:
    """Return 1 % of gross + 1 % of hedged notional (gross - |net|), USD, the shape of its inputs."""
    hedged = gross - np.abs(net)
    return models.portfolio_floor_gross * gross + models.portfolio_floor_hedged * hedged


def concentration(gross: Floats, prices: Floats, table: Underlyings, rate: float) -> Floats:
    """Return rate·R·notional·(√(size/limit) - 1) above the limit, USD (J,); no limit, no add-on.

    `gross` (J,) is exposure in USD; size is gross / price, in units as the limit is.
    """
    if not table.any_limit:
        return np.zeros(gross.shape)
    size = gross / prices
    ratio = np.fmax(np.where(np.isnan(table.concentration_limit), 1.0, size / table.concentration_limit), 1.0)
    return rate * table.price_range * gross * (np.sqrt(ratio) - 1.0)


def check_priced(portfolio: Portfolio) -> None:
    """Refuse an underlying with a concentration limit in units and no price. Raises InvalidError `missing_price`."""
    table = portfolio.underlyings
    if not table.any_limit:
        return
    unpriced = ~np.isnan(table.concentration_limit) & np.isnan(portfolio.prices)
    if unpriced.any():
        name = table.names[int(np.argmax(unpriced))]
        raise invalid("/market/prices", "missing_price", f"{name} has a concentration limit in units and no price")


def long_option_cap(portfolio: Portfolio) -> float:
    """Return the book's value where every open position is a long option, else infinity."""
    if not portfolio.has_options or (portfolio.options.quantity < 0.0).any():
        return float("inf")
    only_options = bool(portfolio.is_option[portfolio.notional > 0.0].all())
    return portfolio.options_value if only_options else float("inf")


@record(frozen=True, slots=True)
class _Scan:
    """The scanned book: weighted profit and loss by underlying (J, 23) and in total (23,), and the losses' joins."""

    cells: _Cells
    pnl: Floats
    each_option: Floats
    total: Floats
    losses: Sides
    joint: Joint
    worst_cell: int

    @property
    def parallel(self) -> float:
        """The worst loss, USD >= 0, where every underlying takes the same cell."""
        return max(0.0, -float(self.total[self.worst_cell]))


def _scan(portfolio: Portfolio, models: ModelParameters) -> _Scan:
    table = portfolio.underlyings
    cells = _cells(table, models)
    pnl, each_option = pnl_by_underlying(portfolio, cells.grid)
    pnl *= cells.grid.weights
    by_cell, losses = np.add.reduce(pnl, axis=0), sides(pnl)
    joint = join(losses, table)
    return _Scan(cells, pnl, each_option, by_cell, losses, joint, worst_scenario(by_cell))


@record(frozen=True, slots=True)
class _Requirement:
    """What binds, and what it comes to, USD; `floors` and `add_on` (J,)."""

    rule: str
    risk: float
    multiplier: float
    floors: Floats
    floor: float
    add_on: Floats
    added: float
    uncapped: float
    cap: float

    @property
    def initial(self) -> float:
        return min(self.uncapped, self.cap)


def _require(portfolio: Portfolio, scan: _Scan, terms: MarginTerms) -> _Requirement:
    models = terms.parameters.models
    multiplier = models.regime_multiplier(terms.regime)
    joint, parallel = scan.joint.value, scan.parallel
    floors = floor_by_underlying(portfolio.gross, portfolio.net, models)
    risk, floor = max(joint, parallel) * multiplier, total(floors)
    add_on = concentration(portfolio.gross, portfolio.prices, portfolio.underlyings, models.concentration_rate)
    added = total(add_on) if portfolio.underlyings.any_limit else 0.0
    rule = "floor" if floor > risk else "joint" if joint >= parallel else "parallel"
    return _Requirement(
        rule=rule,
        risk=risk,
        multiplier=multiplier,
        floors=floors,
        floor=floor,
        add_on=add_on,
        added=added,
        uncapped=models.portfolio_factor * max(risk, floor) + added,
        cap=long_option_cap(portfolio),
    )


def portfolio_margin(portfolio: Portfolio, terms: MarginTerms) -> MarginResult:
    """Return IM = factor x max(risk, floor) + add-ons and MM = fraction x IM.

    risk = max(joint, parallel) x regime multiplier. A position's share is its marginal contribution (Euler): the
    shares sum to the requirement, a hedge's is negative. Raises InvalidError for a matrix past repair.
    """
    check_priced(portfolio)
    models = terms.parameters.models
    scan = _scan(portfolio, models)
    required = _require(portfolio, scan, terms)
    share = _shares(portfolio, models, scan, required)
    initial = required.initial
    binding = scan.worst_cell if required.rule == "parallel" else None
    return MarginResult(
        model="portfolio",
        initial_margin=initial,
        maintenance_margin=models.maintenance_fraction * initial,
        position_initial=share,
        position_maintenance=models.maintenance_fraction * share,
        per_underlying=_per_underlying(portfolio, scan, required),
        parameters=terms.parameters.remembered(("portfolio", terms.regime), lambda: _parameters(models, terms)),
        add_ons={"concentration": required.added},
        worst=Worst(required.rule, binding, 0.0 - max(required.risk, required.floor)),
        scenarios=ScenarioTable(
            price_move=scan.cells.price_moves,
            vol_move=scan.cells.vol_moves,
            weight=scan.cells.weights,
            pnl=scan.total,
            in_ranges=_IN_RANGES,
            vol_in_ranges=True,
        ),
        notes={
            "joint": scan.joint.value,
            "parallel": scan.parallel,
            "risk": required.risk,
            "floor": required.floor,
            "long_option_cap": None if required.cap == float("inf") else required.cap,
            "correlation_repaired": scan.joint.repair_distance > 0.0,
            "correlation_repair_distance": scan.joint.repair_distance,
        },
    )


def _per_underlying(portfolio: Portfolio, scan: _Scan, required: _Requirement) -> dict[str, Floats]:
    table, losses = portfolio.underlyings, scan.losses
    return {
        "net_exposure": portfolio.net,
        "gross_exposure": portfolio.gross,
        "price_range": table.price_range,
        "volatility_range": table.volatility_range,
        "loss_down": losses.down,
        "loss_up": losses.up,
        "directional": losses.directional,
        "two_sided": losses.two_sided,
        "worst_loss": np.maximum(losses.down, losses.up),
        "floor": required.floors,
        "concentration_add_on": required.add_on,
        "concentration_limit": table.concentration_limit,
        "scenario_pnl": scan.pnl,
    }


def _shares(portfolio: Portfolio, models: ModelParameters, scan: _Scan, required: _Requirement) -> Floats:
    """Return each position's part (n,) of the initial margin."""
    if required.rule == "floor":
        share = _floor_shares(portfolio, models) * models.portfolio_factor
    else:
        share = _risk_shares(portfolio, scan, required.rule) * (models.portfolio_factor * required.multiplier)
    if portfolio.underlyings.any_limit:
        share += portfolio.spread(required.add_on)
    if required.initial < required.uncapped:
        share *= required.initial / required.uncapped
    return share


def _floor_shares(portfolio: Portfolio, models: ModelParameters) -> Floats:
    gross = np.abs(portfolio.exposure)
    hedged = gross - np.sign(portfolio.net)[portfolio.underlying] * portfolio.exposure
    return models.portfolio_floor_gross * gross + models.portfolio_floor_hedged * hedged


def _risk_shares(portfolio: Portfolio, scan: _Scan, rule: str) -> Floats:
    """Return each position's loss (n,) in the cells that bind, each underlying's weighed by its derivative."""
    grid, losses = scan.cells.grid, scan.losses
    chosen = np.zeros(grid.moves.shape)
    if rule == "parallel":
        chosen[:, scan.worst_cell] = grid.weights[scan.worst_cell]
    else:
        lanes = np.arange(len(chosen))
        by_down, by_up = _gradients(losses, scan.joint)
        chosen[lanes, losses.down_cell] = by_down * grid.weights[losses.down_cell]
        # the cell with no price move may be the worst of both sides
        chosen[lanes, losses.up_cell] += by_up * grid.weights[losses.up_cell]
    return 0.0 - position_pnl(portfolio, grid, scan.each_option, chosen)


def _gradients(losses: Sides, joint: Joint) -> tuple[Floats, Floats]:
    """Return the derivatives (J,) of the joined loss by D and by U; a side without a loss takes no part."""
    by_down, by_up = joint.by_directional, -joint.by_directional
    if np.count_nonzero(joint.by_two_sided):
        # n = min(D, U) moves with the smaller side, d = D - U with both
        down_is_smaller = losses.down <= losses.up
        by_down = by_down + np.where(down_is_smaller, joint.by_two_sided, 0.0)
        by_up = by_up + np.where(down_is_smaller, 0.0, joint.by_two_sided)
    return by_down * (losses.down > 0.0), by_up * (losses.up > 0.0)


def _parameters(models: ModelParameters, terms: MarginTerms) -> dict[str, float | str | bool | None]:
    return {
        "regime": terms.regime,
        "regime_multiplier": models.regime_multiplier(terms.regime),
        "factor": models.portfolio_factor,
        "maintenance_fraction": models.maintenance_fraction,
        "tail_multiple": models.portfolio_tail_multiple,
        "tail_weight": models.portfolio_tail_weight,
        "floor_gross": models.portfolio_floor_gross,
        "floor_hedged": models.portfolio_floor_hedged,
        "concentration_rate": models.concentration_rate,
        "term_days": models.term_days,
        "term_power_short": models.term_power_short,
        "term_power_long": models.term_power_long,
        "stress_correlation_other": terms.parameters.stress.other,
        "hedge_correlation_other": terms.parameters.hedge.other,
    }
