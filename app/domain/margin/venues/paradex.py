"""Paradex's portfolio margin: 24 weighted scenarios an underlying, a minimum by delta, provisions on top.

Source: Paradex, "Portfolio Margin" (docs.paradex.trade/risk/portfolio-margin).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from app.domain.black76 import VOLATILITY_MIN, Floats
from app.domain.margin.result import MarginResult, MarginTerms, Worst, worst_scenario
from app.domain.margin.venues.report import Label, Layout, UnitMargin, report
from app.domain.margin.venues.terms import VenueInputs, VenueParameters, bounded
from app.domain.margin.venues.unit import YEAR_SECONDS, Unit, term_scale, units
from app.domain.margin.venues.venue import Venue
from app.domain.parameters import DEFAULT_ASSET
from app.domain.portfolio import Options, Portfolio, Rows, sums
from app.domain.scenarios import floored

UP, DOWN = 0.40, -0.22
SETTLEMENT_SECONDS = 1_800.0
"""Over which the price is averaged that an option settles at."""

SCENARIOS = (
    (0.16, UP, 1.0),
    *((move, side, 1.0) for move in (0.12, 0.08, 0.04, 0.0, -0.04, -0.08, -0.12) for side in (UP, DOWN)),
    (-0.16, UP, 1.0),
    (-0.66, UP, 0.24),
    (-0.33, UP, 0.48),
    (0.5, UP, 0.32),
    (1.0, UP, 0.16),
    (2.0, UP, 0.08),
    (3.0, UP, 0.0533),
    (4.0, UP, 0.04),
    (5.0, UP, 0.032),
)
"""Relative moves of price and volatility, and the weight of the P&L."""


@dataclass(frozen=True, slots=True)
class ParadexParameters(VenueParameters):
    """Factors of one underlying, fractions. `scenarios` are rows of price move, volatility move and weight.

    `volatility_floor` is the least volatility after a move upwards. Rates of delta are of delta x spot.
    """

    scenarios: tuple[tuple[float, float, float], ...] = bounded(SCENARIOS, -1.0, 100.0)
    term_days: float = bounded(30.0, 1.0, 3_650.0)
    term_power_short: float = bounded(0.30, 0.0, 1.0)
    term_power_long: float = bounded(0.13, 0.0, 1.0)
    volatility_floor: float = bounded(0.0, 0.0, 10.0)
    net_delta_rate: float = bounded(0.02, 0.0, 1.0)
    hedged_delta_rate: float = bounded(0.01, 0.0, 1.0)
    maintenance_fraction: float = bounded(0.50, 0.01, 1.0)

    def contradictions(self) -> Iterable[tuple[str, str]]:
        """Yield scenarios whose weight is no share, and a hedged delta that costs more than an open one."""
        if not all(0.0 < weight <= 1.0 for _, _, weight in self.scenarios):
            yield "scenarios", "A scenario's weight is > 0 and <= 1."
        if self.hedged_delta_rate > 2.0 * self.net_delta_rate:
            yield (
                "hedged_delta_rate",
                "hedged_delta_rate must not exceed twice net_delta_rate: a hedge would cost more.",
            )


@dataclass(frozen=True, slots=True)
class ParadexInputs(VenueInputs):
    """Provisions of one underlying, USD: for the funding of the next hours, and for fees of closing."""

    funding_provision: float | None = bounded(None)
    fee_provision: float | None = bounded(None)


PUBLISHED: Mapping[str, ParadexParameters] = MappingProxyType({DEFAULT_ASSET: ParadexParameters()})


def volatilities(options: Options, vol_moves: Floats, p: ParadexParameters) -> Floats:
    """Return the shocked volatilities (O, S): IV(1 + v·(30/max(1, DTE))^p), at least the floor where v is upwards."""
    scale = term_scale(options, p.term_days, p.term_power_short, p.term_power_long)
    shocked = options.iv[:, None] * (1.0 + vol_moves * scale[:, None])
    return np.maximum(shocked, np.where(vol_moves > 0.0, max(p.volatility_floor, VOLATILITY_MIN), VOLATILITY_MIN))


def scan(unit: Unit, p: ParadexParameters) -> Floats:
    """Return each position's weighted profit and loss (m, S), USD."""
    moves, vol_moves, weights = np.array(p.scenarios).T
    pnl: Floats = unit.pnl(floored(moves), vol_moves, volatilities(unit.options, vol_moves, p)) * weights
    return pnl


def hedged_delta(deltas: Floats) -> float:
    """Return the delta that hedges another: (Σ|delta| - |Σ delta|)/2, of instruments."""
    return 0.5 * float(np.abs(deltas).sum() - abs(deltas.sum()))


def minimum_shares(deltas: Floats, instrument: Rows, p: ParadexParameters) -> Floats:
    """Return each position's part (m,) of net rate x |net delta| + hedged rate x hedged delta, in units of delta.

    `instrument` (m,) tells positions that are one. Both terms are homogeneous, so that by Euler a position's part is
    its delta times the derivative.
    """
    half = 0.5 * p.hedged_delta_rate
    whole = float(np.sign(deltas.sum()))
    own = np.sign(sums(instrument, deltas, len(deltas)))[instrument]
    return ((p.net_delta_rate - half) * whole + half * own) * deltas


def left_out(options: Options, p: ParadexParameters) -> tuple[str, ...]:
    """Return what the venue does to options beyond the rule: a floor of volatility, and less P&L as they settle."""
    lacks_floor = len(options) > 0 and p.volatility_floor == 0.0
    settles = bool(np.any(options.years * YEAR_SECONDS < SETTLEMENT_SECONDS))
    return (*(("volatility_floor",) if lacks_floor else ()), *(("settlement_average",) if settles else ()))


def unit_margin(unit: Unit, p: ParadexParameters, inputs: ParadexInputs) -> UnitMargin:
    """Return one underlying's margin, USD: IM = max(scan, minimum) + provisions, MM = fraction x max + provisions."""
    each = scan(unit, p)
    pnl = each.sum(axis=0)
    binding = worst_scenario(pnl)
    risk = max(0.0, -float(pnl[binding]))
    deltas, instrument, spot = unit.coins(), unit.instruments(), unit.spot()
    minimum_share = spot * minimum_shares(deltas, instrument, p)
    minimum = max(0.0, float(minimum_share.sum()))
    scanned = risk >= minimum
    share = minimum_share if not scanned else -each[:, binding] if risk > 0.0 else np.zeros(len(unit))
    provisions = (inputs.funding_provision or 0.0) + (inputs.fee_provision or 0.0)
    required = max(risk, minimum)
    return UnitMargin(
        unit=unit,
        initial=required + provisions,
        maintenance=p.maintenance_fraction * required + provisions,
        labels=tuple(Label(*row) for row in p.scenarios),
        pnl=pnl,
        binding=binding,
        figures={
            "scan_risk": risk,
            "net_delta": float(deltas.sum()),
            "hedged_delta": hedged_delta(sums(instrument, deltas, len(deltas))),
            "minimum_margin": minimum,
            "net_margin": required,
            "funding_provision": inputs.funding_provision or 0.0,
            "fee_provision": inputs.fee_provision or 0.0,
            "spot_price": spot,
        },
        initial_share=share + unit.spread * provisions,
        maintenance_share=p.maintenance_fraction * share + unit.spread * provisions,
        not_modelled=(*inputs.missing, *left_out(unit.options, p)),
        worst=Worst("scan", binding, float(pnl[binding])) if scanned else Worst("minimum_delta", None, -minimum),
    )


_LAYOUT = Layout(rule="scan", charges=("scan_risk", "minimum_margin", "funding_provision", "fee_provision"))


def paradex(portfolio: Portfolio, terms: MarginTerms) -> MarginResult:
    """Return the margin of the book as Paradex has it: each underlying by itself, then summed."""
    margins = [
        unit_margin(
            unit,
            PARADEX.parameters_of(terms.parameters, unit.name),
            PARADEX.inputs_of(terms, unit.name),
        )
        for unit in units(portfolio)
    ]
    return report(PARADEX, portfolio, terms, margins, _LAYOUT)


PARADEX = Venue("paradex", paradex, ParadexParameters, ParadexInputs, PUBLISHED)
