"""Derive portfolio margin (PM2): a net margin of each underlying from 31 scenarios, the basis and contingencies.

Source: Derive's documentation, "PM2" and "Portfolio Margin Parameters". What the service decides where these do not
reach it stands in the README.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from app.domain.black76 import Floats
from app.domain.computed import computed
from app.domain.margin.result import MarginResult, MarginTerms, Worst, worst_scenario
from app.domain.margin.venues.report import Label, Layout, UnitMargin, report
from app.domain.margin.venues.terms import AMOUNT_MAX, VenueInputs, VenueParameters, bounded
from app.domain.margin.venues.unit import (
    VOLATILITY_LEAST,
    YEAR_DAYS,
    YEAR_SECONDS,
    Unit,
    check_expiries,
    holdings,
    numbered,
    units,
)
from app.domain.margin.venues.venue import Venue
from app.domain.parameters import DEFAULT_ASSET
from app.domain.portfolio import Flags, Options, Portfolio, Rows, sums, total
from app.domain.record import record
from app.domain.scenarios import floored

CASH_ASSET = "USDC"
SCENARIOS_KEPT = 64
"""Sets of parameters whose scenarios are kept."""
_UP, _SAME, _DOWN, _LINEAR, _ABSOLUTE = range(5)


@dataclass(frozen=True, slots=True)
class DeriveParameters(VenueParameters):
    """Factors of one underlying. Moves and rates are fractions; a year is 365 days.

    `edge_moves` are shocked with volatility up alone, `moves` with it down, same and up; `tails` are (move, weight),
    volatility up. Discounts of an expiry's shocked value V': `long_` where V' >= 0, `short_` where V' < 0. Options
    settle at the mean price of their last `settlement_seconds`.
    """

    edge_moves: tuple[float, ...] = bounded((0.18, -0.18), -1.0, 10.0)
    moves: tuple[float, ...] = bounded((0.135, 0.09, 0.045, 0.0, -0.045, -0.09, -0.135), -1.0, 10.0)
    tails: tuple[tuple[float, float], ...] = bounded(
        ((-0.66, 0.054545), (-0.33, 0.109091), (0.5, 0.072), (1.0, 0.036), (2.0, 0.018), (3.0, 0.012)), -1.0, 10.0
    )
    volatility_up: float = bounded(0.5, 0.0, 10.0)
    volatility_down: float = bounded(0.275, 0.0, 10.0)
    volatility_floor: float = bounded(0.45, 0.0, 10.0)
    term_days: float = bounded(30.0, 1.0, 365.0)
    term_days_least: float = bounded(1.0, 0.01, 365.0)
    term_power_short: float = bounded(0.30, 0.0, 2.0)
    term_power_long: float = bounded(0.13, 0.0, 2.0)
    long_discount: float = bounded(0.95, 0.0, 1.0)
    long_rate_multiple: float = bounded(1.0, 0.0, 10.0)
    long_rate_add: float = bounded(0.08, 0.0, 10.0)
    short_premium: float = bounded(1.04, 1.0, 10.0)
    short_rate_multiple: float = bounded(0.5, 0.0, 10.0)
    short_rate_add: float = bounded(0.08, 0.0, 10.0)
    settlement_seconds: float = bounded(1_800.0, 1.0, 86_400.0)
    basis_move: float = bounded(0.045, 0.0, 1.0)
    basis_factor: float = bounded(0.5, 0.0, 10.0)
    basis_factor_annual: float = bounded(2.0, 0.0, 10.0)
    skew_cap: float = bounded(0.15, 0.0, 1.0)
    skew_cap_decay: float = bounded(0.05, 0.0, 1.0)
    skew_reach: float = bounded(4.0, 0.0, 100.0)
    skew_level: float = bounded(0.6, 0.0, 10.0)
    skew_level_decay: float = bounded(0.1, 0.0, 10.0)
    skew_reach_least: float = bounded(0.01, 1e-6, 10.0)
    loss_factor_initial: float = bounded(1.0, 0.0, 10.0)
    loss_factor_maintenance: float = bounded(0.8, 0.0, 10.0)
    perpetual_rate: float = bounded(0.015, 0.0, 1.0)
    perpetual_rate_initial: float = bounded(0.005, 0.0, 1.0)
    short_option_rate: float = bounded(0.003, 0.0, 1.0)
    short_option_rate_initial: float = bounded(0.002, 0.0, 1.0)
    confidence_least: float = bounded(0.55, 0.0, 1.0)
    stable_least: float = bounded(0.98, 0.0, 1.0)
    stable_factor: float = bounded(2.0, 0.0, 100.0)

    def contradictions(self) -> Iterable[tuple[str, str]]:
        """Yield weights below 0 and a maintenance factor above the initial one."""
        if any(weight < 0.0 for _, weight in self.tails):
            yield "tails", "A tail's weight must be >= 0."
        if self.loss_factor_maintenance > self.loss_factor_initial:
            yield "loss_factor_maintenance", "The maintenance factor must not exceed the initial one."


@dataclass(frozen=True, slots=True)
class DeriveInputs(VenueInputs):
    """What Derive knows of one underlying's subaccount, USD: `cash` and unrealised `funding` are signed.

    `confidence` is the lowest of the oracles', from 0 to 1; `collateral_` is the haircut on assets other than cash.
    """

    cash: float | None = bounded(None, -AMOUNT_MAX, AMOUNT_MAX)
    funding: float | None = bounded(None, -AMOUNT_MAX, AMOUNT_MAX)
    confidence: float | None = bounded(None, 0.0, 1.0)
    collateral_initial: float | None = bounded(None)
    collateral_maintenance: float | None = bounded(None)

    def contradictions(self) -> Iterable[tuple[str, str]]:
        """Yield a haircut that is larger for maintenance margin than for initial margin."""
        if (self.collateral_maintenance or 0.0) > (self.collateral_initial or 0.0):
            yield "collateral_maintenance", "The haircut for maintenance must not exceed that for initial margin."


@record(frozen=True, eq=False)
class Scenarios:
    """The scenarios in order, arrays (S,): price moves, how volatility moves, weights; the last two are the skews."""

    moves: Floats
    vols: Rows
    weights: Floats

    @property
    def skew(self) -> Rows:
        """The places of the two skew scenarios."""
        return np.flatnonzero(self.vols >= _LINEAR)

    @property
    def vol_directions(self) -> Floats:
        """+1, 0, -1 where volatility moves up, not at all, down (S,); 0 in the skews."""
        return np.array([1.0, 0.0, -1.0, 0.0, 0.0])[self.vols]

    @computed
    def labels(self) -> tuple[Label, ...]:
        """The scenarios as they are shown; volatility moves are multiples of the expiry's own."""
        return tuple(map(Label, self.moves.tolist(), self.vol_directions.tolist(), self.weights.tolist()))


@lru_cache(maxsize=SCENARIOS_KEPT)
def scenarios(parameters: DeriveParameters) -> Scenarios:
    """Return the edge upwards, the inner moves with volatility down, same and up, the edge downwards, tails, skews."""
    edges = [(move, _UP, 1.0) for move in parameters.edge_moves]
    inner = [(move, vol, 1.0) for move in parameters.moves for vol in (_DOWN, _SAME, _UP)]
    tails = [(move, _UP, weight) for move, weight in parameters.tails]
    skews = [(0.0, _LINEAR, 1.0), (0.0, _ABSOLUTE, 1.0)]
    moves, vols, weights = np.array([*edges[:1], *inner, *edges[1:], *tails, *skews]).T + 0.0  # -0 is 0 to the cache
    return Scenarios(floored(moves), vols.astype(np.intp), weights)


def volatilities(options: Options, parameters: DeriveParameters) -> Floats:
    """Return the options' volatilities (O, 5): up, same, down, with the linear skew, with the absolute skew.

    Up is max(floor, IV(1 + up·x)), down IV·max(0, 1 - down·x), x = (30 / max(DTE, 1))^p.
    """
    days = options.years * YEAR_DAYS
    power = np.where(days <= parameters.term_days, parameters.term_power_short, parameters.term_power_long)
    x = (parameters.term_days / np.maximum(days, parameters.term_days_least)) ** power
    up = np.maximum(parameters.volatility_floor, options.iv * (1.0 + parameters.volatility_up * x))
    down = options.iv * np.maximum(0.0, 1.0 - parameters.volatility_down * x)
    moneyness = np.log(options.strike / options.forward)
    linear = options.iv * (1.0 + skew_moves(moneyness, options.years, parameters))
    absolute = options.iv * (1.0 + skew_moves(np.abs(moneyness), options.years, parameters))
    moved: Floats = np.maximum(np.stack([up, options.iv, down, linear, absolute], axis=1), VOLATILITY_LEAST)
    return moved


def skew_moves(moneyness: Floats, years: Floats, parameters: DeriveParameters) -> Floats:
    """Return the relative volatility moves clip(k·cap/k*, -cap, cap) at log moneyness k, shapes (O,).

    cap = .15 - .05√T, no lower than 0; k* = max(.01, 4√T(.6 - .1√T)).
    """
    root = np.sqrt(years)
    cap = np.maximum(0.0, parameters.skew_cap - parameters.skew_cap_decay * root)
    reach = parameters.skew_reach * root * (parameters.skew_level - parameters.skew_level_decay * root)
    return np.clip(moneyness * cap / np.maximum(parameters.skew_reach_least, reach), -cap, cap)


def static_discounts(options: Options, parameters: DeriveParameters) -> tuple[Floats, Floats]:
    """Return what multiplies a shocked value (O,), where its expiry's is >= 0 and where it is < 0.

    .95·e^(-T(r + .08)) and min(1/D, 1.04·e^(T(.5r + .08))), D = e^(-rT). The venue's rate is never below 0: such a one
    counts as 0.
    """
    p, years = parameters, options.years
    carry = np.maximum(0.0, -np.log(options.discount))  # r·T
    long = p.long_discount * np.exp(-(p.long_rate_multiple * carry + p.long_rate_add * years))
    short = p.short_premium * np.exp(p.short_rate_multiple * carry + p.short_rate_add * years)
    return long, np.minimum(np.exp(carry), short)


def unsettled(options: Options, parameters: DeriveParameters) -> Floats:
    """Return the part (O,) of the price that an option settles at which is not known yet: T / window, at most 1."""
    return np.minimum(1.0, options.years * YEAR_SECONDS / parameters.settlement_seconds)


def scenario_pnl(unit: Unit, shocks: Scenarios, parameters: DeriveParameters) -> Floats:
    """Return each position's profit and loss in each scenario, USD (m, S), discounted and weighted.

    An option's is V'·discount - V0, the discount by the sign of its expiry's V'. In a skew an expiry counts -|P&L|.
    """
    options = unit.options
    vol_moves = np.array([parameters.volatility_up, 0.0, -parameters.volatility_down, 0.0, 0.0])[shocks.vols]
    iv = volatilities(options, parameters)[:, shocks.vols]
    pnl = unit.pnl(shocks.moves, vol_moves, iv, unsettled(options, parameters))
    if len(options):
        before = options.value[:, None]
        expiry = np.unique(options.years, return_inverse=True)[1].reshape(-1)
        shocked = pnl[options.row] + before
        long, short = static_discounts(options, parameters)
        discounted = shocked * np.where(_by_group(expiry, shocked)[expiry] >= 0.0, long[:, None], short[:, None])
        own = discounted - before
        signs = np.sign(_by_group(expiry, own[:, shocks.skew]))
        own[:, shocks.skew] *= -signs[expiry]
        pnl[options.row] = own
    pnl *= shocks.weights
    return pnl


def basis_pnl(unit: Unit, parameters: DeriveParameters) -> Floats:
    """Return each position's part (m,) of the basis term, USD, Σ <= 0.

    Σ over expiries of min(V(+4.5 %) - V0, V(-4.5 %) - V0, 0)(.5 + 2T), volatility unchanged; nothing for perpetuals.
    """
    expiry = unit.expiry()
    dated = np.flatnonzero(~np.isnan(expiry))
    if not dated.size:
        return np.zeros(len(unit))
    moves = floored(np.array([parameters.basis_move, -parameters.basis_move]))
    each = unit.pnl(moves, np.zeros(2), unit.options.iv[:, None], unsettled(unit.options, parameters))[dated]
    years, group = np.unique(expiry[dated], return_inverse=True)
    group = group.reshape(-1)
    by_expiry = _by_group(group, each)
    factor = parameters.basis_factor + parameters.basis_factor_annual * years
    weight = np.where(by_expiry.min(axis=1) < 0.0, factor, 0.0)
    part = np.zeros(len(unit))
    part[dated] = each[np.arange(len(dated)), by_expiry.argmin(axis=1)[group]] * weight[group]
    return part


def _by_group(group: Rows, values: Floats) -> Floats:
    """Return the sums (G, S) of values (n, S) by group."""
    summed = np.zeros((int(group.max(initial=-1)) + 1, values.shape[1]))
    np.add.at(summed, group, values)
    return summed


@record(frozen=True, eq=False)
class Contingencies:
    """USD that each position adds (m,), for maintenance and beyond it for initial margin."""

    perpetual: Floats
    short_option: Floats
    perpetual_initial: Floats
    short_option_initial: Floats
    confidence_initial: Floats

    @property
    def maintenance(self) -> Floats:
        """What both margins have (m,)."""
        return self.perpetual + self.short_option

    @property
    def initial(self) -> Floats:
        """What initial margin has (m,): that of maintenance, and what is its own."""
        beyond: Floats = self.perpetual_initial + self.short_option_initial + self.confidence_initial
        return self.maintenance + beyond

    def totals(self) -> dict[str, float]:
        """Return each one's sum, USD."""
        return {name: total(getattr(self, name)) for name in self.__dataclass_fields__}


def contingencies(
    unit: Unit, sizes: Floats, spot: Flags, confidence: float | None, parameters: DeriveParameters
) -> Contingencies:
    """Return the contingencies at the unit's spot; `sizes` (m,) are notionals in units of the underlying.

    `spot` (m,) tells holdings of the coin, which is collateral and pays its haircut. On the net of each perpetual or
    future and on the net short options of each strike and expiry, at their rates; for oracles below the least
    confidence (1 - confidence) x notional.
    """
    p, price = parameters, unit.spot()
    delta_one = _net_parts(unit.instruments(), np.where(spot, 0.0, _coins(unit))) * price
    short = _short_parts(unit) * price
    doubt = 1.0 - confidence if confidence is not None and confidence < p.confidence_least else 0.0
    return Contingencies(
        perpetual=p.perpetual_rate * delta_one,
        short_option=p.short_option_rate * short,
        perpetual_initial=p.perpetual_rate_initial * delta_one,
        short_option_initial=p.short_option_rate_initial * short,
        confidence_initial=doubt * price * sizes,
    )


def _coins(unit: Unit) -> Floats:
    """Return the signed deltas (m,) of linear and greeks positions in units of the underlying, 0 for options."""
    return unit.exposure / unit.marks()


def _net_parts(group: Rows, values: Floats) -> Floats:
    """Return signed parts (n,) of Σ over groups of |Σ values|."""
    parts: Floats = np.sign(sums(group, values, len(values)))[group] * values
    return parts


def _short_parts(unit: Unit) -> Floats:
    """Return signed parts (m,), in options, of Σ over strikes and expiries of the net short ones."""
    options, parts = unit.options, np.zeros(len(unit))
    if len(options):
        strikes = numbered(list(zip(options.years.tolist(), options.strike.tolist(), strict=True)))
        net = sums(strikes, options.quantity, len(options))
        parts[options.row] = np.where(net[strikes] < 0.0, -options.quantity, 0.0)
    return parts


def stable_add(price: float, parameters: DeriveParameters) -> float:
    """Return what a stablecoin below .98 adds to the loss factor of initial margin: 2(.98 - price)."""
    return parameters.stable_factor * max(0.0, parameters.stable_least - price)


def _unit_margin(unit: Unit, portfolio: Portfolio, terms: MarginTerms) -> UnitMargin:
    check_expiries(unit, terms.parameters)
    parameters, inputs = DERIVE.parameters_of(terms.parameters, unit.name), DERIVE.inputs_of(terms, unit.name)
    shocks = scenarios(parameters)
    pnl, basis = scenario_pnl(unit, shocks, parameters), basis_pnl(unit, parameters)
    by_scenario = pnl.sum(axis=0)
    binding = worst_scenario(by_scenario)
    worst = pnl[:, binding] if by_scenario[binding] <= total(basis) else basis
    sizes = portfolio.notional[unit.rows] / unit.marks()
    extra = contingencies(unit, sizes, holdings(unit, portfolio, terms.parameters), inputs.confidence, parameters)
    haircut_initial, haircut = inputs.collateral_initial or 0.0, inputs.collateral_maintenance or 0.0
    stable = terms.stable_prices.get(CASH_ASSET, 1.0)
    factor_initial = parameters.loss_factor_initial + stable_add(stable, parameters)
    initial = extra.initial - factor_initial * worst
    maintenance = extra.maintenance - parameters.loss_factor_maintenance * worst
    required, kept = total(initial) + haircut_initial, total(maintenance) + haircut
    cash = inputs.cash or 0.0
    to_market = total(unit.options.value) + total(portfolio.unrealized_pnl[unit.rows]) + (inputs.funding or 0.0)
    return UnitMargin(
        unit=unit,
        initial=required,
        maintenance=kept,
        labels=shocks.labels,
        pnl=by_scenario,
        binding=binding,
        figures={
            "spot": unit.spot(),
            "stable_price": stable,
            "loss_factor_initial": factor_initial,
            "worst_scenario": float(by_scenario[binding]),
            "basis": total(basis),
            "loss": -total(worst),
            **extra.totals(),
            "collateral_initial": haircut_initial,
            "collateral_maintenance": haircut,
            "cash": cash,
            "mark_to_market": to_market,
            "net_initial": cash + to_market - required,
            "net_maintenance": cash + to_market - kept,
        },
        initial_share=initial + unit.spread * haircut_initial,
        maintenance_share=maintenance + unit.spread * haircut,
        not_modelled=inputs.missing,
        worst=None if worst is not basis else Worst("basis", None, total(basis)),
    )


_LAYOUT = Layout(
    "scenario",
    (
        "worst_scenario",
        "basis",
        "loss",
        *Contingencies.__dataclass_fields__,
        "collateral_initial",
        "collateral_maintenance",
    ),
    in_vol_ranges=True,
)


def derive(portfolio: Portfolio, terms: MarginTerms) -> MarginResult:
    """Return the requirement cash + mark-to-market - net margin of each underlying, summed.

    net margin = cash + mark-to-market + f·min(basis term, worst scenario) - contingencies: signed, negative where money
    is short; it stands beside the requirement, in `per_underlying` and summed.
    """
    margins = [_unit_margin(unit, portfolio, terms) for unit in units(portfolio)]
    return report(
        DERIVE,
        portfolio,
        terms,
        margins,
        _LAYOUT,
        notes={
            name: sum(margin.figures[name] for margin in margins)
            for name in ("cash", "mark_to_market", "net_initial", "net_maintenance")
        },
    )


DERIVE = Venue("derive", derive, DeriveParameters, DeriveInputs, MappingProxyType({DEFAULT_ASSET: DeriveParameters()}))
