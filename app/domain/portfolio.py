"""The one columnar form that every model reads: a Portfolio of n positions on J underlyings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from app.domain import black76
from app.domain.black76 import Floats
from app.domain.correlation import correlation_matrix
from app.domain.parameters import MarketParameters

Rows = NDArray[np.intp]
Flags = NDArray[np.bool_]


def sums(groups: Rows, values: Floats, count: int) -> Floats:
    """Return the sums (count,) of the values by group; float also where there is no value at all."""
    return np.bincount(groups, weights=values, minlength=count).astype(np.float64, copy=False)


@dataclass(frozen=True, slots=True)
class Underlyings:
    """Per-underlying market data, each array (J,) in the order of `names` (sorted).

    `price` is NaN where none is known (greeks positions need none); `concentration_limit` is in units, NaN
    where there is none. `price_range` and `volatility_range` are relative.
    """

    names: tuple[str, ...]
    price: Floats
    price_range: Floats
    volatility_range: Floats
    concentration_limit: Floats
    stable: Flags

    def take(self, keep: Flags) -> Underlyings:
        """Return the chosen underlyings only."""
        names = tuple(name for name, kept in zip(self.names, keep.tolist(), strict=True) if kept)
        columns = {name: getattr(self, name)[keep] for name in self.__slots__ if name != "names"}
        return Underlyings(names=names, **columns)

    def correlations(self, parameters: MarketParameters) -> tuple[Floats, Floats]:
        """Return the stress and the hedge correlation matrices, (J, J) each."""
        stress, hedge = parameters.stress, parameters.hedge
        return correlation_matrix(self.names, stress), correlation_matrix(self.names, hedge)


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


@dataclass(frozen=True, slots=True)
class Portfolio:
    """n positions as columns, each (n,); money in USD.

    `notional` >= 0. `delta` is signed, per unit of notional: the side of a linear position, the given one of a
    greeks position, the dollar delta over the notional of an option. `gamma` and `vega` are those of greeks
    positions (zero for others: options are revalued in full). `unrealized_pnl` is zero for options, whose
    market value is in `options`. `mark` is NaN where a greeks position has none.
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
    exposure: Floats
    taylor_delta: Floats
    taylor_gamma: Floats
    taylor_vega: Floats
    net: Floats
    gross: Floats

    def __len__(self) -> int:
        return len(self.symbols)

    @property
    def options_value(self) -> float:
        """Market value of all options, USD."""
        return float(self.options.value.sum())

    @property
    def is_linear(self) -> bool:
        """Whether profit and loss is linear in every price: no options and no gamma."""
        return len(self.options) == 0 and not self.taylor_gamma.any()

    def by_underlying(self, values: Floats) -> Floats:
        """Return the sums (J,) of a column (n,) by underlying."""
        return sums(self.underlying, values, len(self.underlyings.names))

    def take(self, keep: Flags) -> Portfolio:
        """Return the chosen positions, on the same underlyings."""
        if keep.all():
            return self
        rows = np.flatnonzero(keep)
        new_row = np.cumsum(keep) - 1
        options = self.options.take(keep[self.options.row])
        return with_sums(
            replace(
                self,
                symbols=tuple(self.symbols[i] for i in rows),
                **{name: getattr(self, name)[rows] for name in _POSITION_COLUMNS},
                options=replace(options, row=new_row[options.row]),
            )
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


def with_sums(portfolio: Portfolio) -> Portfolio:
    """Return the portfolio with its per-underlying sums computed anew from its columns."""
    exposure = portfolio.delta * portfolio.notional
    net = portfolio.by_underlying(exposure)
    linear = net
    if len(portfolio.options):
        linear = portfolio.by_underlying(np.where(portfolio.is_option, 0.0, exposure))
    return replace(
        portfolio,
        exposure=exposure,
        net=net,
        gross=portfolio.by_underlying(np.abs(exposure)),
        taylor_delta=linear,
        taylor_gamma=portfolio.by_underlying(portfolio.gamma * portfolio.notional),
        taylor_vega=portfolio.by_underlying(portfolio.vega),
    )


def no_options() -> Options:
    """Return the empty option table."""
    return _NO_OPTIONS


_NO_ROWS: Rows = np.empty(0, dtype=np.intp)
_NO_FLOATS: Floats = np.empty(0, dtype=np.float64)
_NO_OPTIONS = Options(_NO_ROWS, _NO_ROWS, *(_NO_FLOATS,) * 9)


def underlying_table(
    names: Sequence[str], prices: Floats, price_range: Floats, parameters: MarketParameters
) -> Underlyings:
    """Return the per-underlying table; `prices` and `price_range` (J,) are resolved by the caller."""
    assets = [parameters.asset(name) for name in names]
    return Underlyings(
        names=tuple(names),
        price=prices,
        price_range=price_range,
        volatility_range=np.array([a.volatility_range for a in assets], dtype=np.float64),
        concentration_limit=np.array([a.concentration_limit for a in assets], dtype=np.float64),
        stable=np.array([a.kind == "stable" for a in assets], dtype=np.bool_),
    )
