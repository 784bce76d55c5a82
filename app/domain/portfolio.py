"""The one columnar form that every model reads: a Portfolio of n positions on J underlyings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from app.domain import black76
from app.domain.black76 import Floats
from app.domain.computed import computed
from app.domain.correlation import correlation_matrix
from app.domain.parameters import CorrelationTable, MarketParameters
from app.domain.record import record

T = TypeVar("T")

Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]

DERIVED_MAX = 32
"""What one table of underlyings keeps of what was derived from it."""


def sums(groups: Rows, values: Floats, count: int) -> Floats:
    """Return the sums (count,) of the values by group; float also where there is no value at all."""
    if not len(values):
        return np.zeros(count)
    return cast("Floats", np.bincount(groups, weights=values, minlength=count))


def total(values: Floats) -> float:
    """Return the sum of a column: that of `values.sum()`, which goes through Python and takes twice as long."""
    return float(np.add.reduce(values))


@dataclass(frozen=True, eq=False)
class Underlyings:
    """Per-underlying parameters, each array (J,) in the order of `names` (sorted).

    `concentration_limit` is in units, NaN where there is none. `price_range` and `volatility_range` are relative.
    Compared and hashed by identity: quotes on the same markets share one, and what is derived from it.
    """

    names: tuple[str, ...]
    price_range: Floats
    volatility_range: Floats
    concentration_limit: Floats
    stable: Flags
    stress_table: CorrelationTable
    hedge_table: CorrelationTable

    @computed
    def row(self) -> Mapping[str, int]:
        """Where each name stands."""
        return {name: j for j, name in enumerate(self.names)}

    @computed
    def stress(self) -> Floats:
        """The stress correlations (J, J)."""
        return correlation_matrix(self.names, self.stress_table)

    @computed
    def hedge(self) -> Floats:
        """The hedge correlations (J, J)."""
        return correlation_matrix(self.names, self.hedge_table)

    @computed
    def any_stable(self) -> bool:
        """Whether any underlying is a stablecoin."""
        return bool(np.count_nonzero(self.stable))

    @computed
    def any_limit(self) -> bool:
        """Whether any underlying has a concentration limit."""
        return not bool(np.isnan(self.concentration_limit).all())

    @computed
    def _derived(self) -> dict[Hashable, object]:
        return {}

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` gave for this key; it depends on nothing else than the key and the table."""
        found = self._derived.get(key)
        if found is None:
            if len(self._derived) >= DERIVED_MAX:
                self._derived.clear()
            found = self._derived[key] = make()
        return cast("T", found)

    def take(self, keep: Flags) -> Underlyings:
        """Return the chosen underlyings only."""
        names = tuple(name for name, kept in zip(self.names, keep.tolist(), strict=True) if kept)
        arrays = ("price_range", "volatility_range", "concentration_limit", "stable")
        return replace(self, names=names, **{name: getattr(self, name)[keep] for name in arrays})


@dataclass(frozen=True, slots=True)
class Options:
    """The option rows of a portfolio, sorted by underlying; each array (O,).

    `row` is the position's row, `quantity` side x size x contract size, `forward` and `strike` in USD,
    `value` the signed market value at `iv`, `term` the factor on a volatility range.
    """

    row: Rows
    underlying: Rows
    quantity: Floats
    forward: Floats
    strike: Floats
    years: Floats
    iv: Floats
    discount: Floats
    sign: Floats
    term: Floats
    value: Floats

    def __len__(self) -> int:
        return len(self.row)

    def take(self, keep: Rows | Flags | slice) -> Options:
        """Return the chosen options only."""
        columns = {name: getattr(self, name)[keep] for name in self.__slots__}
        return Options(**columns)

    def dollar_delta(self) -> Floats:
        """Return the signed change in value (O,) for a relative move of the underlying, USD per 1."""
        each = black76.delta(self.forward, self.strike, self.years, self.iv, self.discount, self.sign)
        return self.quantity * each * self.forward

    def values(self, moves: Floats, iv: Floats | None = None) -> Floats:
        """Return signed values (O, K) at relative price moves (O, K) or (K,); IV unchanged unless given."""
        forward = self.forward[:, None] * (1.0 + moves)
        each = black76.value(
            forward,
            self.strike[:, None],
            self.years[:, None],
            self.iv[:, None] if iv is None else iv,
            self.discount[:, None],
            self.sign[:, None],
        )
        return self.quantity[:, None] * each


@record(frozen=True, eq=False)
class Portfolio:
    """n positions as columns, each (n,); money in USD. What follows from the columns is computed once, when asked.

    `notional` >= 0. `delta` is signed, per unit of notional: the side of a linear position, the given one of a
    greeks position, the dollar delta over the notional of an option. `gamma` and `vega` are those of greeks
    positions (zero for others: options are revalued in full). `unrealized_pnl` is zero for options, whose
    market value is in `options`. `mark` is NaN where a greeks position has none, `allocated` where no collateral was
    named. `prices` (J,) are those of the underlyings, NaN where none is known. `years` (n,) are those to the expiry of
    dated futures, >= 0, NaN for other positions; None where the book has none.
    """

    symbols: tuple[str, ...]
    underlying: Rows
    notional: Floats
    delta: Floats
    gamma: Floats
    vega: Floats
    mark: Floats
    unrealized_pnl: Floats
    initial_rate: Floats
    maintenance_rate: Floats
    is_option: Flags
    isolated: Flags
    allocated: Floats
    options: Options
    underlyings: Underlyings
    prices: Floats
    years: Floats | None = None

    def __len__(self) -> int:
        return len(self.symbols)

    @computed
    def exposure(self) -> Floats:
        """Signed exposures delta x notional, USD (n,)."""
        return self.delta * self.notional

    @computed
    def net(self) -> Floats:
        """Net exposure by underlying, USD (J,)."""
        return self.by_underlying(self.exposure)

    @computed
    def gross(self) -> Floats:
        """Sum of absolute exposures by underlying, USD (J,)."""
        return self.by_underlying(np.abs(self.exposure))

    @computed
    def taylor_delta(self) -> Floats:
        """Net exposure of linear and greeks positions by underlying, USD (J,)."""
        if not self.has_options:
            return self.net
        return self.by_underlying(np.where(self.is_option, 0.0, self.exposure))

    @computed
    def taylor_gamma(self) -> Floats:
        """Σ gamma x notional by underlying, USD per return² (J,)."""
        return self.by_underlying(self.gamma * self.notional) if self.any_gamma else np.zeros(len(self.prices))

    @computed
    def taylor_vega(self) -> Floats:
        """Σ vega by underlying, USD per +1.00 of volatility move (J,)."""
        return self.by_underlying(self.vega) if self.any_vega else np.zeros(len(self.prices))

    @computed
    def has_options(self) -> bool:
        """Whether any position is an option."""
        return len(self.options) > 0

    @computed
    def any_gamma(self) -> bool:
        """Whether any position has gamma."""
        return bool(np.count_nonzero(self.gamma))

    @computed
    def any_vega(self) -> bool:
        """Whether any position has vega."""
        return bool(np.count_nonzero(self.vega))

    @computed
    def any_isolated(self) -> bool:
        """Whether any position stands alone."""
        return bool(np.count_nonzero(self.isolated))

    @computed
    def any_flat(self) -> bool:
        """Whether any position has no notional."""
        return bool(np.count_nonzero(self.notional) < len(self))

    @computed
    def has_gamma(self) -> bool:
        """Whether any underlying has gamma left after netting."""
        return self.any_gamma and bool(np.count_nonzero(self.taylor_gamma))

    @computed
    def has_vega(self) -> bool:
        """Whether any underlying has vega left after netting."""
        return self.any_vega and bool(np.count_nonzero(self.taylor_vega))

    @computed
    def highest_rates(self) -> tuple[Floats, Floats]:
        """The highest initial and maintenance rate (J,) among open linear and greeks positions."""
        own_initial, own_maintenance = self.initial_rate, self.maintenance_rate
        if self.has_options or self.any_flat:
            counts = ~self.is_option & (self.notional > 0.0)
            own_initial, own_maintenance = own_initial * counts, own_maintenance * counts
        initial, maintenance = np.zeros(len(self.prices)), np.zeros(len(self.prices))
        np.maximum.at(initial, self.underlying, own_initial)
        np.maximum.at(maintenance, self.underlying, own_maintenance)
        return initial, maintenance

    @computed
    def options_value(self) -> float:
        """Market value of all options, USD."""
        return total(self.options.value) if self.has_options else 0.0

    @computed
    def profit(self) -> float:
        """Unrealized profit and loss of all positions but options, USD."""
        return total(self.unrealized_pnl)

    @property
    def is_linear(self) -> bool:
        """Whether profit and loss is linear in every price: no options and no gamma."""
        return not self.has_options and not self.has_gamma

    def by_underlying(self, values: Floats) -> Floats:
        """Return the sums (J,) of a column (n,) by underlying."""
        return sums(self.underlying, values, len(self.underlyings.names))

    def spread(self, amounts: Floats) -> Floats:
        """Return each position's part (n,) of amounts by underlying (J,), in proportion to gross exposure."""
        per_dollar = np.divide(amounts, self.gross, out=np.zeros_like(amounts), where=self.gross > 0.0)
        return per_dollar[self.underlying] * np.abs(self.exposure)

    def take(self, keep: Flags) -> Portfolio:
        """Return the chosen positions, on the same underlyings."""
        if keep.all():
            return self
        rows = np.flatnonzero(keep)
        new_row = np.cumsum(keep) - 1
        options = self.options.take(keep[self.options.row])
        return replace(
            self,
            symbols=tuple(self.symbols[i] for i in rows),
            **{name: getattr(self, name)[rows] for name in _POSITION_COLUMNS},
            options=replace(options, row=new_row[options.row]),
            years=None if self.years is None else self.years[rows],
        )


_POSITION_COLUMNS = (
    "underlying",
    "notional",
    "delta",
    "gamma",
    "vega",
    "mark",
    "unrealized_pnl",
    "initial_rate",
    "maintenance_rate",
    "is_option",
    "isolated",
    "allocated",
)


def no_options() -> Options:
    """Return the empty option table."""
    return _NO_OPTIONS


_NO_ROWS: Rows = np.empty(0, dtype=np.intp)
_NO_FLOATS: Floats = np.empty(0, dtype=np.float64)
_NO_OPTIONS = Options(_NO_ROWS, _NO_ROWS, *(_NO_FLOATS,) * 9)


def underlying_table(names: Sequence[str], price_range: Floats, parameters: MarketParameters) -> Underlyings:
    """Return the per-underlying table; `price_range` (J,) is resolved by the caller."""
    assets = [parameters.asset(name) for name in names]
    return Underlyings(
        names=tuple(names),
        price_range=price_range,
        volatility_range=np.array([a.volatility_range for a in assets], dtype=np.float64),
        concentration_limit=np.array([a.concentration_limit for a in assets], dtype=np.float64),
        stable=np.array([a.kind == "stable" for a in assets], dtype=np.bool_),
        stress_table=parameters.stress,
        hedge_table=parameters.hedge,
    )
