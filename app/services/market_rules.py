"""What a market parameter may be: ranges of single fields, and the orders between fields.

The tables' CHECKs hold the same ranges; these refuse first, with a pointer at the field.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from app.db.tables import SYMBOL_PATTERN
from app.domain.money import AMOUNT_MAX, DECIMALS_MAX
from app.errors import FieldError, InvalidError, pointer_to, pointers_under

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from decimal import Decimal

    from app.domain.parameters import (
        AssetParameters,
        ClearingParameters,
        HealthPolicy,
        InstrumentParameters,
        LendingParameters,
        MarketParameters,
        ModelParameters,
    )

_SYMBOL = re.compile(SYMBOL_PATTERN)

EXPIRY_MIN, EXPIRY_MAX = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Range:
    """An interval that takes in its ends unless they are open; it never holds NaN."""

    low: float
    high: float
    low_open: bool = True
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        low, high = ">" if self.low_open else ">=", "<" if self.high_open else "<="
        return f"{low} {self.low:g} and {high} {self.high:g}"


_POSITIVE = Range(0, 1e15, high_open=True)
_ZERO_OR_MORE = Range(0, 1e15, low_open=False, high_open=True)
_FRACTION = Range(0, 1, low_open=False)
_FRACTION_ABOVE_0 = Range(0, 1)
_MOVE = Range(0, 1, high_open=True)
_LEVEL = Range(0.05, 1, low_open=False)
_MARGIN_RATE = Range(0, 10)
_VOLATILITY = Range(0, 100)
CORRELATION = Range(-1, 1, low_open=False)

_ASSET_RANGES = {
    "haircut": _FRACTION,
    "initial_margin_rate": _MARGIN_RATE,
    "maintenance_margin_rate": _MARGIN_RATE,
    "price_range": _MOVE,
    "volatility_range": Range(0, 10),
    "volatility": _VOLATILITY,
    "concentration_limit": _POSITIVE,
}
_INSTRUMENT_RANGES = {
    "contract_size": _POSITIVE,
    "initial_margin_rate": _MARGIN_RATE,
    "maintenance_margin_rate": _MARGIN_RATE,
    "price_range": _MOVE,
    "volatility": _VOLATILITY,
}
_YEARLY = Range(0, 10, low_open=False)
_RATIO = Range(1, 10, low_open=False)
_LENDING_RANGES = {
    "base_rate": _YEARLY,
    "slope": _YEARLY,
    "steep_slope": Range(0, 100, low_open=False),
    "target_utilization": Range(0, 1, high_open=True),
    "minimum_rate": _YEARLY,
    "collateral_ratio": _RATIO,
    "low_ratio": _RATIO,
    "liquidation_ratio": _RATIO,
    "decimals": Range(0, 18, low_open=False),
}
# A factor or threshold that is not named here is positive.
_MODEL_RANGES = {
    "maintenance_fraction": _FRACTION_ABOVE_0,
    "portfolio_tail_weight": _FRACTION,
    "portfolio_floor_gross": _FRACTION,
    "portfolio_floor_hedged": _FRACTION,
    "portfolio_minimum_equity": _ZERO_OR_MORE,
    "concentration_rate": _FRACTION,
    "term_power_short": _FRACTION,
    "term_power_long": _FRACTION,
    "span_tail_weight": _FRACTION,
    "span_initial_factor": Range(1, 1e15, low_open=False),
    "recall_haircut": _MOVE,
    "covariance_decay": _MOVE,
    "var_window_days": Range(60, 3_650, low_open=False),
    "var_age_decay": _MOVE,
    "var_volatility_decay": _MOVE,
    "var_degrees": Range(2, 1_000),
    "backtest_size": _MOVE,
    "sizing_free_margin_share": _FRACTION,
    "deleverage_utilization": _FRACTION_ABOVE_0,
    "fleet_drift": Range(0, 2),
    "impact_coefficient": _FRACTION,
    "forced_sale_slippage": _FRACTION,
    "target_utilization": _LEVEL,
    "gate_utilization": _LEVEL,
    "breach_utilization": _LEVEL,
    "cure_utilization": _LEVEL,
    "stop_utilization": _LEVEL,
    "shortfall_utilization": _LEVEL,
    "survival_move": _MOVE,
    "stable_share_min": _FRACTION,
    "asset_share_max": _FRACTION,
    "lent_share_max": _FRACTION,
    "drawdown_trim": _MOVE,
    "drawdown_cut": _MOVE,
    "drawdown_halve": _MOVE,
    "drawdown_minimum": _MOVE,
    "drawdown_trim_share": _MOVE,
    "drawdown_cut_share": _MOVE,
    "drawdown_halve_share": _MOVE,
    "escrow_fee": _FRACTION,
    "referral_share": _FRACTION,
    "netting_fee": _FRACTION,
    "netting_buffer": _FRACTION,
}
_MODEL_ORDERS = (
    ("target_utilization", "gate_utilization"),
    ("gate_utilization", "breach_utilization"),
    ("stop_utilization", "cure_utilization"),
    ("cure_utilization", "breach_utilization"),
    ("zone_yellow", "zone_orange"),
    ("zone_orange", "zone_red"),
    ("alert_warning", "alert_danger"),
    ("alert_danger", "alert_emergency"),
    ("status_warning", "status_danger"),
    ("status_danger", "status_liquidation"),
    ("band_margin_ratio_warning", "band_margin_ratio_critical"),
    ("band_utilization_warning", "band_utilization_critical"),
    ("band_buffer_warning", "band_buffer_safe"),
    ("band_net_exposure_warning", "band_net_exposure_critical"),
    ("band_survival_warning", "band_survival_safe"),
    ("drawdown_trim", "drawdown_cut"),
    ("drawdown_cut", "drawdown_halve"),
    ("drawdown_halve", "drawdown_minimum"),
    ("drawdown_trim_share", "drawdown_cut_share"),
    ("drawdown_cut_share", "drawdown_halve_share"),
)


def check_symbol(pointer: str, symbol: str) -> None:
    """Refuse what is not a name of an asset or instrument."""
    refuse(_symbol_errors(pointer, (symbol,)))


def check_asset(merged: AssetParameters, parameters: MarketParameters) -> None:
    """Refuse an asset whose fields are out of range, or one that breaks an instrument on it."""
    refuse(_range_errors(asdict(merged), _ASSET_RANGES))
    refuse(_margin_errors(merged.initial_margin_rate, merged.maintenance_margin_rate, ""))
    refuse(
        error
        for instrument in parameters.instruments.values()
        if parameters.asset(instrument.underlying).asset == merged.asset or instrument.underlying == merged.asset
        for error in _effective_margin_errors(instrument, merged)
    )


def check_assets(merged: Mapping[str, AssetParameters], after: MarketParameters) -> None:
    """Refuse what `check_asset` refuses, for many in one pass; `after` holds them all, pointers start with /{asset}."""
    for name, asset in merged.items():
        with pointers_under(pointer_to(name)):
            refuse(_range_errors(asdict(asset), _ASSET_RANGES))
            refuse(_margin_errors(asset.initial_margin_rate, asset.maintenance_margin_rate, ""))
    for instrument in after.instruments.values():
        underlying = after.asset(instrument.underlying)
        if underlying.asset in merged:
            with pointers_under(pointer_to(underlying.asset)):
                refuse(_effective_margin_errors(instrument, underlying))


def check_instrument(merged: InstrumentParameters, underlying: AssetParameters) -> None:
    """Refuse an instrument out of range, or whose margin rates contradict those it inherits."""
    refuse(_symbol_errors("/underlying", (merged.underlying,)))
    refuse(_expiry_errors(merged))
    refuse(_range_errors(asdict(merged), _INSTRUMENT_RANGES))
    refuse(_effective_margin_errors(merged, underlying))


def check_lending(merged: LendingParameters) -> None:
    """Refuse rates and ratios of an asset's loans out of range or out of order."""
    values: dict[str, float] = asdict(merged)
    refuse(_range_errors(values, _LENDING_RANGES))
    refuse(
        FieldError(f"/{low}", "out_of_order", f"{low} must not exceed {high}.")
        for low, high in (("liquidation_ratio", "low_ratio"), ("low_ratio", "collateral_ratio"))
        if values[low] > values[high]
    )


def check_models(models: ModelParameters, policy: HealthPolicy, clearing: ClearingParameters) -> None:
    """Refuse factors and thresholds out of range or out of order."""
    values: dict[str, float] = asdict(models) | asdict(policy) | asdict(clearing)
    refuse(_range_errors(values, {name: _MODEL_RANGES.get(name, _POSITIVE) for name in values}))
    refuse(
        FieldError(f"/{low}", "out_of_order", f"{low} must not exceed {high}.")
        for low, high in _MODEL_ORDERS
        if values[low] > values[high]
    )


def check_prices(prices: Mapping[str, Decimal]) -> None:
    """Refuse names and prices that the table would not take."""
    refuse(_symbol_errors("/prices/{}", prices))
    refuse(_no_price(pointer_to("prices", symbol)) for symbol, price in prices.items() if not _is_price(price))


def check_close(pointer: str, close: Decimal) -> None:
    """Refuse a close that the table would not take."""
    if not _is_price(close):
        refuse((_no_price(pointer),))


def refuse(errors: Iterable[FieldError]) -> None:
    """Raise the 422 that lists these errors, if there are any."""
    found = tuple(errors)
    if found:
        raise InvalidError(found[0].detail, code=found[0].code, errors=found)


def _expiry_errors(instrument: InstrumentParameters) -> Iterator[FieldError]:
    expiry = instrument.expiry
    if expiry is None:
        return
    if instrument.kind != "future":
        yield FieldError("/expiry", "not_allowed", f"A {instrument.kind} does not expire: only a future does.")
    elif not EXPIRY_MIN <= expiry < EXPIRY_MAX:
        detail = f"An expiry lies between {EXPIRY_MIN:%Y} and {EXPIRY_MAX:%Y}."
        yield FieldError("/expiry", "out_of_range", detail)


def _symbol_errors(pointer: str, symbols: Iterable[str]) -> Iterator[FieldError]:
    for symbol in symbols:
        if not _SYMBOL.fullmatch(symbol):
            detail = "A symbol is 1 to 64 letters, digits or . _ : / - and starts with a letter or digit."
            yield FieldError(pointer.format(pointer_to(symbol)[1:]), "invalid_symbol", detail)


def _no_price(pointer: str) -> FieldError:
    detail = f"A price is > 0, < {AMOUNT_MAX:.0e} and has at most {DECIMALS_MAX} decimals."
    return FieldError(pointer, "out_of_range", detail)


def _is_price(price: Decimal) -> bool:
    if not (price.is_finite() and 0 < price < AMOUNT_MAX):
        return False
    exponent = price.as_tuple().exponent
    return isinstance(exponent, int) and exponent >= -DECIMALS_MAX


def _range_errors(values: Mapping[str, float | None], ranges: Mapping[str, Range]) -> Iterator[FieldError]:
    for name, allowed in ranges.items():
        value = values[name]
        if value is not None and value not in allowed:
            yield FieldError(pointer_to(name), "out_of_range", f"{name} must be {allowed}.")


def _margin_errors(initial: float, maintenance: float, whose: str) -> Iterator[FieldError]:
    if maintenance > initial:
        detail = f"The maintenance margin rate{whose} must not exceed the initial one."
        yield FieldError("/maintenance_margin_rate", "out_of_order", detail)


def _effective_margin_errors(instrument: InstrumentParameters, underlying: AssetParameters) -> Iterator[FieldError]:
    initial = instrument.initial_margin_rate
    maintenance = instrument.maintenance_margin_rate
    return _margin_errors(
        underlying.initial_margin_rate if initial is None else initial,
        underlying.maintenance_margin_rate if maintenance is None else maintenance,
        f" of {instrument.symbol} (what it leaves out is {instrument.underlying}'s)",
    )
