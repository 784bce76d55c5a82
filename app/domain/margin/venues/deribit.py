"""Deribit's cross portfolio margin (X:PM): a matrix of price and volatility moves, P&L in coin, and a roll shock.

Source: Deribit, "Portfolio Margin" (support.deribit.com) and the response of `private/pme/simulate`
(docs.deribit.com), whose two published cases the tests reproduce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from app.domain.black76 import Floats
from app.domain.margin.result import MarginResult, MarginTerms, worst_scenario
from app.domain.margin.venues.report import Label, Layout, UnitMargin, report
from app.domain.margin.venues.terms import VenueInputs, VenueParameters, bounded
from app.domain.margin.venues.unit import VOLATILITY_LEAST, Unit, check_expiries, term_scale, units
from app.domain.margin.venues.venue import Venue
from app.domain.portfolio import Options, Portfolio
from app.domain.record import record
from app.domain.scenarios import floored

_VOLATILITY_SIDES = (1.0, 0.0, -1.0)


@dataclass(frozen=True, slots=True)
class DeribitParameters(VenueParameters):
    """Factors of one currency. Moves and volatility ranges are fractions, `extended_dampener` is in USD.

    `price_buckets` are the price moves on each side of 0. The roll's rates are of the delta, `annual_roll` a year.
    """

    price_range: float = bounded(0.16, 0.001, 0.99)
    price_buckets: int = bounded(4, 1, 20)
    volatility_up: float = bounded(0.50, 0.0, 10.0)
    volatility_down: float = bounded(0.25, 0.0, 1.0)
    volatility_floor: float = bounded(0.50, 0.0, 10.0)
    term_days: float = bounded(30.0, 1.0, 3_650.0)
    term_power_short: float = bounded(0.30, 0.0, 1.0)
    term_power_long: float = bounded(0.13, 0.0, 1.0)
    extended_moves: tuple[float, ...] = bounded((-0.66, -0.33, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0), -0.99, 100.0)
    extended_factor: float = bounded(1.0, 0.0, 1.0)
    extended_dampener: float = bounded(100_000.0)
    pnl_offset: float = bounded(0.0, 0.0, 1.0)
    annual_roll: float = bounded(0.075, 0.0, 2.0)
    minimum_roll: float = bounded(0.01, 0.0, 1.0)
    maintenance_fraction: float = bounded(0.80, 0.01, 1.0)


@dataclass(frozen=True, slots=True)
class DeribitInputs(VenueInputs):
    """Charges that follow from more than the positions, each in coin.

    Those of market maker protection and of open orders, and the risk matrix's delta shock and correlation contingency.
    """

    mmp: float | None = bounded(None)
    open_orders: float | None = bounded(None)
    delta_shock: float | None = bounded(None)
    correlation_contingency: float | None = bounded(None)


PUBLISHED: Mapping[str, DeribitParameters] = MappingProxyType(
    {
        "BTC": DeribitParameters(),
        "ETH": DeribitParameters(
            price_range=0.18,
            volatility_up=0.40,
            extended_dampener=200_000.0,
            annual_roll=0.05,
            minimum_roll=0.005,
        ),
    }
)


@record(frozen=True, slots=True)
class Matrix:
    """The S scenarios of one currency: relative moves, floored, and the side of each volatility move, +1, 0 or -1.

    `scale` (S,), what an extended scenario's P&L in coin counts with: factor x min(1, R/|m|) x (1+m)/(1 + sgn(m)R).
    `relief` (S,) is the dampener, USD at the index: max(|m|/R - 1, 0) x D / (1 + sgn(m)R), 0 within the range.
    """

    moves: Floats
    sides: Floats
    scale: Floats
    relief: Floats
    labels: tuple[Label, ...]


@lru_cache(maxsize=64)
def matrix(p: DeribitParameters) -> Matrix:
    """Return the 3 x (2 buckets + 1) scenarios within the range, prices rising, volatility up first, then the extended.

    The extended table is valued as if the market stopped at the edge of the range, in the coin of there.
    """
    steps = np.arange(-p.price_buckets, p.price_buckets + 1) / p.price_buckets
    beyond = np.array(p.extended_moves) + 0.0  # -0 is 0 to the cache
    within = len(steps) * len(_VOLATILITY_SIDES)
    size, edge = np.abs(beyond), 1.0 + np.sign(beyond) * p.price_range
    share = np.minimum(1.0, p.price_range / np.maximum(size, p.price_range))
    labels = [Label(float(step), side, in_range=True) for step in steps for side in _VOLATILITY_SIDES]
    extended = [
        Label(move, 1.0, float(p.extended_factor * part))
        for move, part in zip(beyond.tolist(), share.tolist(), strict=True)
    ]
    return Matrix(
        moves=floored(np.concatenate([np.repeat(steps * p.price_range, len(_VOLATILITY_SIDES)), beyond])),
        sides=np.concatenate([np.tile(_VOLATILITY_SIDES, len(steps)), np.ones(len(beyond))]),
        scale=np.concatenate([np.ones(within), p.extended_factor * share * (1.0 + beyond) / edge]),
        relief=np.concatenate(
            [np.zeros(within), np.maximum(size / p.price_range - 1.0, 0.0) * p.extended_dampener / edge]
        ),
        labels=(*labels, *extended),
    )


def volatilities(options: Options, sides: Floats, p: DeribitParameters) -> Floats:
    """Return the shocked volatilities (O, S): up max(IV(1 + a·t), floor), down max(IV(1 - b·t), 0), t = (30/DTE)^p."""
    scale = term_scale(options, p.term_days, p.term_power_short, p.term_power_long)
    iv = options.iv
    by_side = np.stack(
        [
            np.maximum(iv * (1.0 - p.volatility_down * scale), VOLATILITY_LEAST),
            iv,
            np.maximum(iv * (1.0 + p.volatility_up * scale), p.volatility_floor),
        ]
    )
    return by_side[sides.astype(np.intp) + 1].T


def coin_pnl(unit: Unit, table: Matrix, p: DeribitParameters) -> Floats:
    """Return each position's P&L (m, S) in coin as it counts, before dampener and offset.

    A contract is settled in coin: a future of q coins makes q(1 - 1/(1+m)) whatever its basis, an option V'/S' - V/S.
    """
    up, down = np.maximum(table.sides, 0.0), np.minimum(table.sides, 0.0)
    vol_moves = p.volatility_up * up + p.volatility_down * down
    factor = 1.0 + table.moves
    usd = unit.pnl(table.moves, vol_moves, volatilities(unit.options, table.sides, p))
    if len(unit.options):
        usd[unit.options.row] += unit.options.value[:, None] * (1.0 - factor)
    coin: Floats = usd / (unit.marks()[:, None] * factor) * table.scale
    return coin


def dampened(pnl: Floats, relief: Floats, offset: float) -> Floats:
    """Return P&L in coin (S,) drawn towards 0 by the dampener `relief` (S,), in coin, and gains times the offset."""
    value = np.sign(pnl) * np.maximum(np.abs(pnl) - relief, 0.0)
    counted: Floats = np.where(value > 0.0, offset * value, value) + 0.0  # no loss of -0.0 is shown
    return counted


def roll_rates(years: Floats, p: DeribitParameters) -> Floats:
    """Return the roll shock of a unit of delta: max(e^(annual·T) - 1, minimum), the minimum for perpetuals (NaN)."""
    return np.fmax(np.expm1(p.annual_roll * np.nan_to_num(years)), p.minimum_roll)


def roll_shares(deltas: Floats, years: Floats, p: DeribitParameters) -> Floats:
    """Return each position's part (m,) of the roll shock, coin: its sum is Σ over expiries |Σ delta| x rate.

    Perpetuals, whose `years` are NaN, are one expiry of their own.
    """
    _, expiry = np.unique(np.nan_to_num(years, nan=-1.0), return_inverse=True)
    net = np.bincount(expiry, weights=deltas)
    shares: Floats = np.sign(net)[expiry] * deltas * roll_rates(years, p)
    return shares


def unit_margin(unit: Unit, p: DeribitParameters, inputs: DeribitInputs) -> UnitMargin:
    """Return one currency's margin, USD: coin x index.

    IM = matrix + mmp + open orders, MM = fraction x matrix, where matrix = worst + roll + delta shock + correlation
    contingency.
    """
    table, spot = matrix(p), unit.spot()
    each = coin_pnl(unit, table, p)
    raw = each.sum(axis=0)
    pnl = dampened(raw, table.relief / spot, p.pnl_offset)
    binding = worst_scenario(pnl)
    worst = max(0.0, -float(pnl[binding]))
    rolls = roll_shares(unit.coins(), unit.expiry(), p)
    roll = float(rolls.sum())
    shock, contingency = inputs.delta_shock or 0.0, inputs.correlation_contingency or 0.0
    orders = (inputs.mmp or 0.0) + (inputs.open_orders or 0.0)
    risk = worst + roll + shock + contingency
    share = rolls + unit.spread * (shock + contingency)
    if worst > 0.0:
        share = share - each[:, binding] * (float(pnl[binding]) / float(raw[binding]))
    figures = {
        "worst_loss": worst,
        "roll_shock": roll,
        "delta_shock": shock,
        "correlation_contingency": contingency,
        "matrix_margin": risk,
        "mmp": inputs.mmp or 0.0,
        "open_orders": inputs.open_orders or 0.0,
    }
    coins = {f"{name}_coin": value for name, value in figures.items()}
    initial, maintenance = risk + orders, p.maintenance_fraction * risk
    return UnitMargin(
        unit=unit,
        initial=spot * initial,
        maintenance=spot * maintenance,
        labels=table.labels,
        pnl=spot * pnl,
        binding=binding,
        figures={
            **{name: spot * value for name, value in figures.items()},
            **coins,
            "initial_margin_coin": initial,
            "maintenance_margin_coin": maintenance,
            "index_price": spot,
        },
        initial_share=spot * (share + unit.spread * orders),
        maintenance_share=spot * p.maintenance_fraction * share,
        not_modelled=inputs.missing,
    )


_LAYOUT = Layout(
    rule="matrix",
    charges=("worst_loss", "roll_shock", "delta_shock", "correlation_contingency", "mmp", "open_orders"),
    in_vol_ranges=True,
)


def deribit(portfolio: Portfolio, terms: MarginTerms) -> MarginResult:
    """Return the margin of the book as Deribit's X:PM has it: each currency by itself, then summed in USD.

    Raises InvalidError `missing_parameters` for a currency without parameters, `missing_expiry` for a future without.
    """
    margins = []
    for unit in units(portfolio):
        check_expiries(unit, terms.parameters)
        parameters, inputs = DERIBIT.parameters_of(terms.parameters, unit.name), DERIBIT.inputs_of(terms, unit.name)
        margins.append(unit_margin(unit, parameters, inputs))
    return report(DERIBIT, portfolio, terms, margins, _LAYOUT)


DERIBIT = Venue("deribit", deribit, DeribitParameters, DeribitInputs, PUBLISHED)
