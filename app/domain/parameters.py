"""Every parameter of the risk core as frozen values, with the defaults that a new database is seeded with.

Rates, shocks, haircuts and ratios are fractions; volatility is annualised; limits are in units of the asset.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal, TypeVar, cast

from app.domain.margin.venues.terms import VenueParameters

AssetKind = Literal["stable", "coin"]
InstrumentKind = Literal["spot", "perpetual", "future"]
Regime = Literal["normal", "sideways", "sell_off", "liquidity_crisis"]
MarginMode = Literal["cross", "isolated", "portfolio"]

Pairs = Mapping[tuple[str, str], float]
"""Correlations by sorted pair of assets."""

REGIMES: tuple[Regime, ...] = ("normal", "sideways", "sell_off", "liquidity_crisis")

T = TypeVar("T")

DEFAULT_ASSET = "default"
EXPIRY_HOUR = 8
"""The hour, UTC, at which a contract expires whose name has no more than the day: that of Deribit, OKX and Binance."""
MEMO_MAX = 512
"""Derived tables that one version of the parameters keeps."""


_DATED = re.compile(r".*[-_](?:(\d{1,2})([A-Z]{3})(\d\d)|(\d\d)(\d\d)(\d\d))", re.ASCII)
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")


def named_expiry(symbol: str) -> datetime | None:
    """Return the expiry in the name of a dated future, BTC-28JUN24 or BTC-USD-240628; None where there is none."""
    found = _DATED.fullmatch(symbol)
    if found is None:
        return None
    day, month, year, *numbers = found.groups()
    if day is None:
        year, number, day = numbers
    else:
        number = str(_MONTHS.index(month) + 1) if month in _MONTHS else "0"
    try:
        return datetime(2000 + int(year), int(number), int(day), EXPIRY_HOUR, tzinfo=UTC)
    except ValueError:
        return None  # such as the 30th of February: a name like any other


@dataclass(frozen=True, slots=True)
class AssetParameters:
    """What the risk core knows of one asset, as collateral and as an underlying.

    `kind` stable is left out of common price moves. `price_range` is the R of the scans, `volatility_range`
    their relative volatility move. `concentration_limit` is in units of the asset; None: no add-on.
    """

    asset: str
    kind: AssetKind = "coin"
    haircut: float = 0.50
    initial_margin_rate: float = 0.30
    maintenance_margin_rate: float = 0.15
    price_range: float = 0.30
    volatility_range: float = 0.25
    volatility: float | None = None
    concentration_limit: float | None = None


@dataclass(frozen=True, slots=True)
class InstrumentParameters:
    """One market on an underlying; a rate left None is the underlying asset's. Only a future has an expiry."""

    symbol: str
    underlying: str
    kind: InstrumentKind = "perpetual"
    contract_size: float = 1.0
    initial_margin_rate: float | None = None
    maintenance_margin_rate: float | None = None
    price_range: float | None = None
    volatility: float | None = None
    expiry: datetime | None = None

    @property
    def expires_at(self) -> datetime | None:
        """When a future expires: as stored, else as its name says; None where neither does, and for what never does."""
        if self.kind != "future":
            return None
        return self.expiry or named_expiry(self.symbol)


@dataclass(frozen=True, slots=True)
class LendingParameters:
    """What loans of one asset cost and need. Rates are simple annual ones, on actual/365.

    The borrow rate is base_rate + slope x U / target_utilization up to that utilization U, and climbs by steep_slope
    from there to U = 1. Ratios are of collateral after haircut to debt: at opening, when its owner is warned, when it
    is sold. `minimum_rate` is the lender's where an offer names none; `decimals` are the asset's last digit.
    """

    asset: str
    base_rate: float = 0.01
    slope: float = 0.04
    steep_slope: float = 0.60
    target_utilization: float = 0.80
    minimum_rate: float = 0.05
    collateral_ratio: float = 1.15
    low_ratio: float = 1.08
    liquidation_ratio: float = 1.03
    decimals: int = 8


@dataclass(frozen=True, slots=True)
class MarketFigures:
    """What the margin models need of one market, every rate resolved."""

    contract_size: float
    initial_margin_rate: float
    maintenance_margin_rate: float
    price_range: float
    expiry: datetime | None = None


@dataclass(frozen=True, slots=True)
class CorrelationTable:
    """Pairwise correlations; a pair that is not listed takes `other`. Keys are sorted pairs."""

    pairs: Pairs
    other: float

    def between(self, a: str, b: str) -> float:
        """Return the correlation of two assets, 1 with itself."""
        if a == b:
            return 1.0
        return self.pairs.get((a, b) if a < b else (b, a), self.other)


@dataclass(frozen=True, slots=True)
class ModelParameters:
    """The factors of the margin models (docs/quotes.md), and what VaR, stress, sizing and plans begin with."""

    maintenance_fraction: float = 0.80
    scenario_factor: float = 1.20
    portfolio_factor: float = 1.20
    portfolio_tail_multiple: float = 2.0
    portfolio_tail_weight: float = 0.50
    portfolio_floor_gross: float = 0.01
    portfolio_floor_hedged: float = 0.01
    portfolio_minimum_equity: float = 10_000.0
    concentration_rate: float = 0.10
    term_days: float = 30.0
    term_power_short: float = 0.30
    term_power_long: float = 0.13
    span_initial_factor: float = 1.10
    span_tail_multiple: float = 2.0
    span_tail_weight: float = 0.35
    recall_haircut: float = 0.05
    regime_normal: float = 1.0
    regime_sideways: float = 0.85
    regime_sell_off: float = 1.5
    regime_liquidity_crisis: float = 2.0
    covariance_decay: float = 0.94
    impact_coefficient: float = 0.10
    forced_sale_slippage: float = 0.03
    var_window_days: float = 500.0
    var_age_decay: float = 0.98
    var_volatility_decay: float = 0.94
    var_degrees: float = 5.0
    backtest_size: float = 0.05
    sizing_volatility_target: float = 0.50
    sizing_volatility_base: float = 0.20
    sizing_free_margin_share: float = 0.60
    sizing_weight_max: float = 0.25
    deleverage_utilization: float = 0.55
    fleet_drift: float = 0.20

    def regime_multiplier(self, regime: Regime) -> float:
        """Return the margin multiplier of a regime."""
        multiplier: float = getattr(self, f"regime_{regime}")
        return multiplier


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """Gates, targets and scales of an account. The lower bound of each band is inclusive.

    From each `drawdown_` bound on its share of gross notional is cut; past `drawdown_minimum` nothing is opened.
    """

    target_utilization: float = 0.60
    gate_utilization: float = 0.80
    breach_utilization: float = 0.85
    cure_utilization: float = 0.80
    stop_utilization: float = 0.75
    shortfall_utilization: float = 0.75
    leverage_cap: float = 3.5
    zone_yellow: float = 0.60
    zone_orange: float = 0.75
    zone_red: float = 0.85
    alert_warning: float = 0.50
    alert_danger: float = 0.70
    alert_emergency: float = 0.85
    status_warning: float = 0.80
    status_danger: float = 0.90
    status_liquidation: float = 1.0
    band_margin_ratio_warning: float = 0.50
    band_margin_ratio_critical: float = 0.80
    band_utilization_warning: float = 0.60
    band_utilization_critical: float = 0.80
    band_buffer_safe: float = 0.40
    band_buffer_warning: float = 0.20
    band_net_exposure_warning: float = 2.0
    band_net_exposure_critical: float = 3.5
    band_survival_safe: float = 1.10
    band_survival_warning: float = 1.00
    survival_move: float = 0.20
    stable_share_min: float = 0.50
    asset_share_max: float = 0.50
    lent_share_max: float = 0.40
    drawdown_trim: float = 0.05
    drawdown_cut: float = 0.08
    drawdown_halve: float = 0.12
    drawdown_minimum: float = 0.18
    drawdown_trim_share: float = 0.10
    drawdown_cut_share: float = 0.25
    drawdown_halve_share: float = 0.50


@dataclass(frozen=True, slots=True)
class ClearingParameters:
    """What clearing charges and keeps aside, as fractions; a contract holds those of its beginning.

    `escrow_fee` is of the amount, `referral_share` of that fee, `netting_fee` of the net; `netting_buffer` is reserved
    beside it.
    """

    escrow_fee: float = 0.01
    referral_share: float = 0.15
    netting_fee: float = 0.01
    netting_buffer: float = 0.05


STRESS_CORRELATIONS = CorrelationTable(
    MappingProxyType(
        {
            ("BTC", "ETH"): 0.95,
            ("BTC", "SOL"): 0.90,
            ("ETH", "SOL"): 0.92,
            ("BNB", "BTC"): 0.88,
            ("BNB", "ETH"): 0.87,
            ("BNB", "SOL"): 0.85,
        }
    ),
    other=0.80,
)
HEDGE_CORRELATIONS = CorrelationTable(
    MappingProxyType({("BTC", "ETH"): 0.60, ("BTC", "SOL"): 0.50, ("ETH", "SOL"): 0.55}), other=0.40
)


def _regime(btc_eth: float, btc_sol: float, eth_sol: float) -> Pairs:
    return MappingProxyType({("BTC", "ETH"): btc_eth, ("BTC", "SOL"): btc_sol, ("ETH", "SOL"): eth_sol})


REGIME_CORRELATIONS: Mapping[Regime, Pairs] = MappingProxyType(
    {
        "normal": _regime(0.80, 0.70, 0.75),
        "sideways": _regime(0.675, 0.575, 0.625),
        "sell_off": _regime(0.935, 0.90, 0.92),
        "liquidity_crisis": _regime(0.97, 0.95, 0.965),
    }
)
"""By regime the pairs of its own; any other pair has what `app/domain/regimes.py` makes of the stress table."""

_ASSETS = (
    AssetParameters("BTC", haircut=0.10, price_range=0.15, volatility=0.65),
    AssetParameters("ETH", haircut=0.12, price_range=0.15, volatility=0.80),
    AssetParameters("SOL", haircut=0.15, price_range=0.20, volatility=1.20),
    AssetParameters("BNB", haircut=0.20, price_range=0.20),
    AssetParameters("USDC", kind="stable", haircut=0.0),
    AssetParameters("USDT", kind="stable", haircut=0.0),
)


_LENDING = (
    LendingParameters("BTC", minimum_rate=0.028, collateral_ratio=1.10, low_ratio=1.06),
    LendingParameters("ETH", minimum_rate=0.042, collateral_ratio=1.10, low_ratio=1.06, decimals=18),
    LendingParameters("SOL", minimum_rate=0.071, decimals=9),
    LendingParameters("USDC", minimum_rate=0.094, collateral_ratio=1.05, low_ratio=1.04, decimals=6),
    LendingParameters("USDT", minimum_rate=0.094, collateral_ratio=1.05, low_ratio=1.04, decimals=6),
)


@dataclass(frozen=True, slots=True)
class MarketParameters:
    """One version of every parameter. `version` 0 is what the package ships, before any database.

    `venues` holds the venues' parameters by venue and underlying where they are not those that the package ships.
    """

    version: int = 0
    assets: Mapping[str, AssetParameters] = field(
        default_factory=lambda: MappingProxyType({a.asset: a for a in _ASSETS})
    )
    default_asset: AssetParameters = field(default_factory=lambda: AssetParameters(DEFAULT_ASSET))
    instruments: Mapping[str, InstrumentParameters] = field(
        default_factory=lambda: MappingProxyType(
            {f"{a}-PERP": InstrumentParameters(f"{a}-PERP", a) for a in ("BTC", "ETH", "SOL", "BNB")}
        )
    )
    stress: CorrelationTable = STRESS_CORRELATIONS
    hedge: CorrelationTable = HEDGE_CORRELATIONS
    regimes: Mapping[Regime, Pairs] = field(default_factory=lambda: REGIME_CORRELATIONS)
    models: ModelParameters = field(default_factory=ModelParameters)
    policy: HealthPolicy = field(default_factory=HealthPolicy)
    lending: Mapping[str, LendingParameters] = field(
        default_factory=lambda: MappingProxyType({p.asset: p for p in _LENDING})
    )
    default_lending: LendingParameters = field(default_factory=lambda: LendingParameters(DEFAULT_ASSET))
    clearing: ClearingParameters = field(default_factory=ClearingParameters)
    venues: Mapping[str, Mapping[str, VenueParameters]] = field(default_factory=lambda: MappingProxyType({}))
    _memo: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def remembered(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` gave for this key under these parameters; it must depend on nothing else."""
        found = self._memo.get(key)
        if found is None:
            if len(self._memo) >= MEMO_MAX:
                self._memo.clear()
            found = self._memo[key] = make()
        return cast("T", found)

    def asset(self, name: str) -> AssetParameters:
        """Return an asset's parameters, or the default's for an asset that is not listed."""
        return self.assets.get(name, self.default_asset)

    def loans_of(self, asset: str) -> LendingParameters:
        """Return what loans of an asset cost and need, the default's for an asset that is not listed."""
        return self.lending.get(asset, self.default_lending)

    def lists(self, symbol: str) -> bool:
        """Whether a symbol is a listed instrument or asset."""
        return symbol in self.instruments or symbol in self.assets

    def underlying_of(self, symbol: str) -> str:
        """Return the underlying of a symbol: the instrument's, else what stands before the first - or /."""
        instrument = self.instruments.get(symbol)
        if instrument is not None:
            return instrument.underlying
        return symbol.partition("-")[0].partition("/")[0]

    def market(self, symbol: str, underlying: str) -> MarketFigures:
        """Return the figures of a market: the instrument's own, else its underlying asset's."""
        asset = self.asset(underlying)
        listed = self.instruments.get(symbol)
        if listed is None:
            return MarketFigures(
                1.0, asset.initial_margin_rate, asset.maintenance_margin_rate, asset.price_range, named_expiry(symbol)
            )
        return MarketFigures(
            listed.contract_size,
            _first_of(listed.initial_margin_rate, asset.initial_margin_rate),
            _first_of(listed.maintenance_margin_rate, asset.maintenance_margin_rate),
            _first_of(listed.price_range, asset.price_range),
            listed.expires_at,
        )


def _first_of(own: float | None, inherited: float) -> float:
    return inherited if own is None else own
