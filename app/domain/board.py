"""Every market and asset that the screened books name, by index: parameters, marks and prices as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from app.domain.black76 import Floats
from app.domain.parameters import MarketParameters
from app.domain.portfolio import Flags, Rows


class Board:
    """Arrays by symbol (M,) and by asset (K,); an asset is whatever is held, owed or stands under a market.

    Prices are found as `PriceFinder` finds them where nothing but stored prices is given: of an asset its own, else 1
    of a stablecoin; a mark is the symbol's own price, else its underlying's. NaN: there is none. Index 0 is nobody's:
    blank rows point there.
    """

    def __init__(self, parameters: MarketParameters, prices: Mapping[str, float]) -> None:
        self.parameters = parameters
        self.stored = dict(prices)
        self.recall_haircut = parameters.models.recall_haircut
        self.symbols: dict[str, int] = {"": 0}
        self.assets: dict[str, int] = {"": 0}
        self.underlying: Rows = np.zeros(1, dtype=np.intp)
        self.contract_size: Floats = np.zeros(1)
        self.initial_rate: Floats = np.zeros(1)
        self.maintenance_rate: Floats = np.zeros(1)
        self.price_range: Floats = np.zeros(1)
        self.own_price: Floats = np.ones(1)
        self.mark: Floats = np.ones(1)
        self.haircut: Floats = np.zeros(1)
        self.limit: Floats = np.full(1, np.nan)
        self.price: Floats = np.ones(1)
        self.backing: Floats = np.ones(1)
        """What a held unit of an asset counts for after haircut, USD (K,)."""

    def symbol_ids(self, names: Sequence[str]) -> Rows:
        """Return the indices of symbols, new ones added."""
        new = [name for name in dict.fromkeys(names) if name not in self.symbols]
        if new:
            self._add_symbols(new)
        return np.array([self.symbols[name] for name in names], dtype=np.intp)

    def asset_ids(self, names: Sequence[str]) -> Rows:
        """Return the indices of assets, new ones added."""
        new = [name for name in dict.fromkeys(names) if name not in self.assets]
        if new:
            self._add_assets(new)
        return np.array([self.assets[name] for name in names], dtype=np.intp)

    def _add_symbols(self, new: Sequence[str]) -> None:
        of = [self.parameters.underlying_of(name) for name in new]
        markets = [self.parameters.market(name, under) for name, under in zip(new, of, strict=True)]
        self.symbols |= {name: len(self.symbols) + k for k, name in enumerate(new)}
        self.underlying = np.concatenate([self.underlying, self.asset_ids(of)])
        self.contract_size = np.append(self.contract_size, [m.contract_size for m in markets])
        self.initial_rate = np.append(self.initial_rate, [m.initial_margin_rate for m in markets])
        self.maintenance_rate = np.append(self.maintenance_rate, [m.maintenance_margin_rate for m in markets])
        self.price_range = np.append(self.price_range, [m.price_range for m in markets])
        self.own_price = np.append(self.own_price, [self.stored.get(name, np.nan) for name in new])
        self.mark = self._marks()

    def _add_assets(self, new: Sequence[str]) -> None:
        assets = [self.parameters.asset(name) for name in new]
        par = [1.0 if a.kind == "stable" else np.nan for a in assets]
        self.assets |= {name: len(self.assets) + k for k, name in enumerate(new)}
        self.haircut = np.append(self.haircut, [a.haircut for a in assets])
        limits = [np.nan if a.concentration_limit is None else a.concentration_limit for a in assets]
        self.limit = np.append(self.limit, limits)
        self.price = np.append(self.price, [self.stored.get(n, p) for n, p in zip(new, par, strict=True)])
        self.backing = self.price * (1.0 - self.haircut)

    def _marks(self) -> Floats:
        return np.where(np.isnan(self.own_price), self.price[self.underlying], self.own_price)

    def post(self, prices: Mapping[str, float]) -> tuple[Rows, Rows]:
        """Take in new prices; return the symbols whose mark changed and the assets whose price did."""
        self.stored.update(prices)
        before = self.mark, self.price.copy()
        for name, price in prices.items():
            symbol, asset = self.symbols.get(name), self.assets.get(name)
            if symbol is not None:
                self.own_price[symbol] = price
            if asset is not None:
                self.price[asset] = price
        self.mark = self._marks()
        self.backing = self.price * (1.0 - self.haircut)
        return np.flatnonzero(_differs(before[0], self.mark)), np.flatnonzero(_differs(before[1], self.price))

    def symbols_on(self, assets: Rows) -> Rows:
        """Return the symbols whose underlying is among the assets."""
        return np.flatnonzero(np.isin(self.underlying, assets))


def _differs(before: Floats, after: Floats) -> Flags:
    differs: Flags = (before != after) & ~(np.isnan(before) & np.isnan(after))
    return differs
