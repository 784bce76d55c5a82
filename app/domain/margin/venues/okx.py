"""OKX portfolio margin: stress losses of one risk unit, basis and minimum charges, nothing across units.

Source: OKX, "Portfolio margin mode: cross-margin trading (risk unit merge)" and its notice of 2 January 2025 on MR1,
MR4, MR6 and MR7. What the service decides where these do not reach it stands in the README.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from app.domain.black76 import VOLATILITY_MIN, Floats
from app.domain.computed import computed
from app.domain.margin.result import MarginResult, MarginTerms, Worst, worst_scenario
from app.domain.margin.venues.report import AccountCharge, Label, Layout, UnitMargin, report
from app.domain.margin.venues.terms import AMOUNT_MAX, VenueInputs, VenueParameters, bounded
from app.domain.margin.venues.unit import Unit, check_expiries, holdings, settlement_asset, term_scale, units
from app.domain.margin.venues.venue import Venue
from app.domain.parameters import DEFAULT_ASSET
from app.domain.portfolio import Flags, Portfolio, Rows, sums, total
from app.domain.record import record
from app.domain.scenarios import floored

SCENARIOS_KEPT = 64
"""Sets of parameters whose scenarios are kept."""
_SPOT = -1.0
_PERPETUAL = np.inf
"""Keys of the buckets that have no expiry; an expiry's are its years."""


@dataclass(frozen=True, slots=True)
class OkxParameters(VenueParameters):
    """Factors of one risk unit. Moves and rates are fractions, tiers are in USD of the raw charge.

    `spot_moves` are MR1's three price moves, either way; `volatility_up` and `volatility_down` its relative volatility
    moves at `term_days`, times (term_days / max(DTE, 1))^p. `minimum_tiers` are (from, multiplier), each multiplier on
    what of the raw minimum charge lies in its tier.
    """

    spot_moves: tuple[float, float, float] = bounded((0.08, 0.16, 0.25), 0.0, 10.0)
    volatility_up: float = bounded(0.25, 0.0, 10.0)
    volatility_down: float = bounded(0.25, 0.0, 10.0)
    term_days: float = bounded(30.0, 1.0, 365.0)
    term_power_short: float = bounded(0.30, 0.0, 2.0)
    term_power_long: float = bounded(0.13, 0.0, 2.0)
    extreme_move: float = bounded(0.50, 0.0, 10.0)
    extreme_weight: float = bounded(0.50, 0.0, 1.0)
    basis_rate: float = bounded(0.008, 0.0, 1.0)
    basis_annual_rate: float = bounded(0.30, 0.0, 10.0)
    minimum_rate: float = bounded(0.007, 0.0, 1.0)
    minimum_tiers: tuple[tuple[float, float], ...] = bounded(
        ((0.0, 1.0), (250e3, 2.0), (500e3, 4.0), (1e6, 6.0), (2e6, 8.0), (3e6, 10.0), (4e6, 12.0)), 0.0, AMOUNT_MAX
    )
    initial_factor: float = bounded(1.3, 1.0, 10.0)

    def contradictions(self) -> Iterable[tuple[str, str]]:
        """Yield tiers that do not begin at 0 or do not rise."""
        starts = [start for start, _ in self.minimum_tiers]
        if starts[0] != 0.0 or starts != sorted(set(starts)):
            yield "minimum_tiers", "The tiers begin at 0 and rise."


@dataclass(frozen=True, slots=True)
class OkxInputs(VenueInputs):
    """What OKX charges on a risk unit beyond its positions, USD, and the index price in the contracts' quote currency.

    MR2 theta decay, MR3 vega term structure, MR5 interest rate, MR8 borrowing, as maintenance and as initial margin
    (the same where left out), MR9 stablecoin depegging.
    """

    index_price: float | None = bounded(None, 1e-12, AMOUNT_MAX)
    mr2: float | None = bounded(None)
    mr3: float | None = bounded(None)
    mr5: float | None = bounded(None)
    mr8: float | None = bounded(None)
    mr8_initial: float | None = bounded(None)
    mr9: float | None = bounded(None)

    def contradictions(self) -> Iterable[tuple[str, str]]:
        """Yield an initial margin of borrowing below its maintenance margin, or without one."""
        if self.mr8_initial is not None and (self.mr8 is None or self.mr8_initial < self.mr8):
            yield "mr8_initial", "mr8_initial needs mr8, and must not be less."


_MAJOR = OkxParameters(
    spot_moves=(0.04, 0.08, 0.12), extreme_move=0.24, basis_rate=0.002, basis_annual_rate=0.05, minimum_rate=0.0045
)
_MIDDLE_SPOT = ("LTC", "BCH", "EOS", "OKB", "DOT", "BSV", "LINK", "FIL", "ADA", "TRX", "UNI", "XRP")
_MIDDLE_EXTREME = ("SOL", "DOGE", "PEPE", "XRP", "BNB", "SHIB", "LTC", "ORDI", "WLD", "BCH", "ADA")


def _published() -> dict[str, OkxParameters]:
    """Return the parameters by underlying: OKX groups the assets of MR1 otherwise than those of MR4 and MR6."""
    table = {name: OkxParameters(spot_moves=(0.06, 0.12, 0.18)) for name in _MIDDLE_SPOT}
    for name in _MIDDLE_EXTREME:
        table[name] = replace(table.get(name, OkxParameters()), extreme_move=0.36, basis_annual_rate=0.15)
    return {"BTC": _MAJOR, "ETH": _MAJOR, **table, DEFAULT_ASSET: OkxParameters()}


@record(frozen=True, eq=False)
class Scenarios:
    """MR1's price moves with volatility up, same and down each, then MR6's two, volatility unchanged; arrays (S,)."""

    moves: Floats
    vol_moves: Floats
    weights: Floats

    @computed
    def labels(self) -> tuple[Label, ...]:
        """The scenarios as they are shown."""
        return tuple(map(Label, self.moves.tolist(), self.vol_moves.tolist(), self.weights.tolist()))

    @property
    def spot_count(self) -> int:
        """How many of them are MR1's: all but the last two."""
        return len(self.moves) - 2


@lru_cache(maxsize=SCENARIOS_KEPT)
def scenarios(parameters: OkxParameters) -> Scenarios:
    """Return the scenarios of a unit, by price, volatility up before down; the price no lower than 1e-6 of itself."""
    sizes = parameters.spot_moves
    prices = [*(-size for size in reversed(sizes)), 0.0, *sizes]
    vols = parameters.volatility_up, 0.0, -parameters.volatility_down
    grid = [(price, vol, 1.0) for price in prices for vol in vols]
    extremes = [(sign * parameters.extreme_move, 0.0, parameters.extreme_weight) for sign in (-1.0, 1.0)]
    moves, vol_moves, weights = np.array(grid + extremes).T + 0.0  # -0 is 0 to the cache
    return Scenarios(floored(moves), vol_moves, weights)


def shocked_volatilities(unit: Unit, shocks: Scenarios, parameters: OkxParameters) -> Floats:
    """Return the options' volatilities in each scenario (O, S), those that move no lower than .01."""
    options = unit.options
    scale = term_scale(options, parameters.term_days, parameters.term_power_short, parameters.term_power_long)
    moved = np.maximum(options.iv[:, None] * (1.0 + shocks.vol_moves * scale[:, None]), VOLATILITY_MIN)
    return np.where(shocks.vol_moves == 0.0, options.iv[:, None], moved)


def buckets(unit: Unit, spot: Flags) -> tuple[Floats, Rows]:
    """Return the keys (B,) of the unit's basis buckets and each position's bucket (m,); `spot` (m,) tells holdings.

    Perpetuals are one bucket, spot holdings another, each expiry one more, its options and futures together.
    """
    expiry = unit.expiry()
    undated = np.where(spot, _SPOT, _PERPETUAL)
    keys, bucket = np.unique(np.where(np.isnan(expiry), undated, expiry), return_inverse=True)
    return keys, bucket.reshape(-1)


def basis_rates(keys: Floats, parameters: OkxParameters) -> Floats:
    """Return MR4's rate of |Δ| by bucket (B,): a dated one's grows with its years, no lower than a perpetual's."""
    years = np.where(np.isfinite(keys) & (keys >= 0.0), keys, 0.0)
    return np.maximum(parameters.basis_rate, parameters.basis_annual_rate * years)


def minimum_charge(raw: float, tiers: Sequence[tuple[float, float]]) -> float:
    """Return MR7, USD: Σ over tiers of the multiplier x the part of the raw charge that lies within the tier."""
    ends = [*(start for start, _ in tiers[1:]), np.inf]
    return sum(
        multiplier * max(0.0, min(raw, end) - start) for (start, multiplier), end in zip(tiers, ends, strict=True)
    )


@record(frozen=True, slots=True)
class Charges:
    """MR1 to MR9 of one unit, USD >= 0; MR8 is the account's."""

    mr1: float
    mr2: float
    mr3: float
    mr4: float
    mr5: float
    mr6: float
    mr7: float
    mr9: float

    @property
    def stress(self) -> float:
        """max(MR1, MR2, MR6)."""
        return max(self.mr1, self.mr2, self.mr6)

    @property
    def supplied(self) -> float:
        """MR3 + MR5 + MR9, which only the caller knows."""
        return self.mr3 + self.mr5 + self.mr9

    @property
    def maintenance(self) -> float:
        """MMR = max(max(MR1, MR2, MR6) + MR3 + MR4 + MR5 + MR9, MR7)."""
        return max(self.stress + self.supplied + self.mr4, self.mr7)


@record(frozen=True, eq=False)
class _Deltas:
    """Signed Δ of each position (m,), USD: at its mark times the price of what it is quoted in.

    `instrument` and `bucket` (m,) tell what nets in MR7 and in MR4, `keys` (B,) are the buckets'.
    """

    each: Floats
    instrument: Rows
    bucket: Rows
    keys: Floats

    def basis(self, rates: Floats) -> Floats:
        """Return each position's signed part (m,) of MR4 = Σ over buckets of rate (B,) x |Σ Δ|."""
        net = sums(self.bucket, self.each, len(rates))
        part: Floats = (rates * np.sign(net))[self.bucket] * self.each
        return part

    @computed
    def contracts(self) -> Floats:
        """Those of contracts (m,): 0 for spot, which nothing closes."""
        return np.where(self.keys[self.bucket] == _SPOT, 0.0, self.each)

    def gross(self) -> float:
        """Return Σ over instruments of |Σ Δ| of contracts: what there is to close."""
        return total(np.abs(sums(self.instrument, self.contracts, len(self.each))))

    def by_contract(self, amount: float) -> Floats:
        """Return an amount above 0, which some contract has made, in parts (m,) by their |Δ|."""
        size = np.abs(self.contracts)
        return size * (amount / total(size))


def stress_pnl(unit: Unit, shocks: Scenarios, at_index: Floats, parameters: OkxParameters) -> Floats:
    """Return each position's profit and loss in each scenario, USD (m, S), weighted.

    `at_index` (m,) is what a contract is worth at the index over what it is worth at its mark, both USD.
    """
    shocked = replace(unit, exposure=unit.exposure * at_index, gamma=unit.gamma * at_index)
    pnl = shocked.pnl(shocks.moves, shocks.vol_moves, shocked_volatilities(unit, shocks, parameters))
    pnl *= shocks.weights
    return pnl


def _unit_margin(unit: Unit, portfolio: Portfolio, terms: MarginTerms) -> UnitMargin:
    check_expiries(unit, terms.parameters)
    parameters, inputs = OKX.parameters_of(terms.parameters, unit.name), OKX.inputs_of(terms, unit.name)
    settle = _settlement_prices(unit.symbols, terms)
    deltas = _deltas(unit, holdings(unit, portfolio, terms.parameters), settle)
    shocks = scenarios(parameters)
    index = inputs.index_price or unit.price
    at_index = np.where(np.isnan(unit.mark) | np.isnan(index), 1.0, index / unit.mark)
    pnl = stress_pnl(unit, shocks, settle * at_index, parameters)
    by_scenario = pnl.sum(axis=0)
    binding = worst_scenario(by_scenario)
    basis = deltas.basis(basis_rates(deltas.keys, parameters))
    charges = Charges(
        **{name: getattr(inputs, name) or 0.0 for name in ("mr2", "mr3", "mr5", "mr9")},
        mr1=max(0.0, -float(by_scenario[: shocks.spot_count].min())),
        mr4=total(basis),
        mr6=max(0.0, -float(by_scenario[shocks.spot_count :].min())),
        mr7=minimum_charge(parameters.minimum_rate * deltas.gross(), parameters.minimum_tiers),
    )
    worst = _worst(charges, binding, shocks)
    share = _shares(charges, unit, deltas, basis, -pnl[:, binding], worst)
    return UnitMargin(
        unit=unit,
        initial=parameters.initial_factor * charges.maintenance,
        maintenance=charges.maintenance,
        labels=shocks.labels,
        pnl=by_scenario,
        binding=binding,
        figures={
            "delta": total(deltas.each),
            "index_price": index,
            **{name: getattr(charges, name) for name in Charges.__slots__},
        },
        initial_share=parameters.initial_factor * share,
        maintenance_share=share,
        not_modelled=_not_modelled(unit, inputs, terms),
        worst=worst,
    )


def _worst(charges: Charges, scenario: int, shocks: Scenarios) -> Worst:
    """Return what binds: MR7, MR2, or the scenario of MR1 or MR6."""
    if charges.mr7 > charges.stress + charges.supplied + charges.mr4:
        return Worst("mr7", None, -charges.mr7)
    if charges.mr2 > max(charges.mr1, charges.mr6):
        return Worst("mr2", None, -charges.mr2)
    return Worst("mr1" if scenario < shocks.spot_count else "mr6", scenario, 0.0 - charges.stress)


def _shares(charges: Charges, unit: Unit, deltas: _Deltas, basis: Floats, losses: Floats, worst: Worst) -> Floats:
    """Return each position's part (m,) of the unit's MMR: of a scenario that binds by its loss there."""
    if worst.rule == "mr7":
        return deltas.by_contract(charges.mr7)
    stress = losses if worst.index is not None and charges.stress > 0.0 else unit.spread * charges.stress
    return stress + basis + unit.spread * charges.supplied


def _deltas(unit: Unit, spot: Flags, settle: Floats) -> _Deltas:
    """Return the Δ of the unit; `spot` (m,) tells holdings of the coin itself."""
    each = unit.exposure * settle
    if len(unit.options):
        each[unit.options.row] = unit.options.dollar_delta()
    keys, bucket = buckets(unit, spot)
    return _Deltas(each, unit.instruments(), bucket, keys)


def _settlement_prices(symbols: Sequence[str], terms: MarginTerms) -> Floats:
    """Return the USD price (m,) of what each position is quoted in: 1 but for a stablecoin off its par."""
    known: Mapping[str, float] = {
        symbol: terms.stable_prices.get(settlement_asset(symbol, terms.parameters) or "", 1.0)
        for symbol in dict.fromkeys(symbols)
    }
    return np.array([known[symbol] for symbol in symbols], dtype=np.float64)


def _borrowed(terms: MarginTerms) -> dict[str, OkxInputs]:
    """Return the inputs of each underlying or asset that MR8 is supplied of."""
    given = {name: OKX.inputs_of(terms, name) for name in terms.venues.get(OKX.name, {})}
    return {name: inputs for name, inputs in given.items() if inputs.mr8 is not None}


def _borrowing(terms: MarginTerms) -> AccountCharge:
    """Return MR8: it is the account's, and as initial margin the same unless more is supplied."""
    supplied = _borrowed(terms)
    kept = sum((inputs.mr8 or 0.0 for inputs in supplied.values()), 0.0)
    initial = sum((inputs.mr8_initial or inputs.mr8 or 0.0 for inputs in supplied.values()), 0.0)
    return AccountCharge(initial, kept, {"mr8": kept, "mr8_initial": initial}, supplied.keys())


def _not_modelled(unit: Unit, inputs: OkxInputs, terms: MarginTerms) -> tuple[str, ...]:
    """Return what was not supplied, and OKX's own table of volatility moves where the unit has a volatility."""
    borrowed = _borrowed(terms)
    charges = [name for name in inputs.missing if name not in {"index_price", "mr8", "mr8_initial"}]
    if not borrowed:
        charges.append("mr8")
    elif any(each.mr8_initial is None for each in borrowed.values()):
        charges.append("mr8_initial")
    shocked = len(unit.options) > 0 or np.count_nonzero(unit.vega) > 0
    return (*sorted(charges), "mr1_volatility_table") if shocked else tuple(sorted(charges))


def okx(portfolio: Portfolio, terms: MarginTerms) -> MarginResult:
    """Return MMR = Σ over underlyings of max(max(MR1, MR2, MR6) + MR3 + MR4 + MR5 + MR9, MR7) + MR8.

    IMR = Σ initial factor x MMR + MR8. MR8 is on the account: that of every underlying and asset it is supplied for; as
    initial margin it may be more.
    """
    margins = [_unit_margin(unit, portfolio, terms) for unit in units(portfolio)]
    layout = Layout("stress", Charges.__slots__)
    return report(OKX, portfolio, terms, margins, layout, account=_borrowing(terms))


OKX = Venue("okx", okx, OkxParameters, OkxInputs, MappingProxyType(_published()))
