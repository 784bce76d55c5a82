"""Which price a quote uses for each symbol, and where it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Literal

from app.domain.money import to_decimal
from app.domain.parameters import MarketParameters
from app.domain.record import record
from app.errors import InvalidError, invalid

PriceSource = Literal["request", "position", "stored", "par"]


@dataclass(frozen=True, slots=True)
class StoredPrice:
    """A price as last posted: USD, the time it is dated, and its digits as they were posted where they are known."""

    value: float
    as_of: datetime
    posted: Decimal | None = field(default=None, compare=False)

    @property
    def exact(self) -> Decimal:
        """The price as money."""
        return self.posted if self.posted is not None else to_decimal(self.value)


@record(frozen=True, slots=True)
class Price:
    """A price as used. `as_of` only where it is a stored one."""

    value: float
    source: PriceSource
    as_of: datetime | None = None


def conflicting_price(pointer: str, name: str, here: float, elsewhere: float) -> InvalidError:
    """Return the refusal of a price: a request gives one price to a name."""
    return invalid(pointer, "conflicting_price", f"{name} is at {here:.15g} here and at {elsewhere:.15g} elsewhere")


@dataclass(slots=True)
class PriceFinder:
    """Finds prices in a fixed order and remembers each one used, for the reply.

    Of an asset: the request's own, the mark of an open position on the asset or its perpetual, the stored one, the
    mark of an open position on another of its markets, 1 for a stablecoin. Nothing found is an error, never zero.
    """

    parameters: MarketParameters
    requested: Mapping[str, float]
    stored: Mapping[str, StoredPrice]
    marks: Mapping[str, float] = field(default_factory=dict)
    other_marks: Mapping[str, float] = field(default_factory=dict)
    used: dict[str, Price] = field(default_factory=dict)

    def asset(self, name: str, pointer: str) -> float:
        """Return the USD price of an asset. Raises InvalidError `missing_price` at `pointer`."""
        price = self.used.get(name) or self._asset(name)
        if price is None:
            raise invalid(pointer, "missing_price", f"no price for {name}: give one, or post it to the market")
        self.used[name] = price
        return price.value

    def mark(self, symbol: str, underlying: str, pointer: str) -> float:
        """Return the mark of a symbol: its own, else its underlying's. Raises as `asset` does."""
        price = self.used.get(symbol) or self._mark(symbol, underlying)
        if price is None:
            return self.asset(underlying, pointer)
        self.used[symbol] = price
        return price.value

    def known(self, name: str) -> float | None:
        """Return an asset's price where there is one, without an error."""
        price = self.used.get(name) or self._asset(name)
        if price is None:
            return None
        self.used[name] = price
        return price.value

    def stable_prices(self) -> dict[str, float]:
        """Return the prices of the listed stablecoins, 1 where nothing says otherwise."""
        stable = [name for name, asset in self.parameters.assets.items() if asset.kind == "stable"]
        return {name: price for name in stable if (price := self.known(name)) is not None}

    def known_all(self, names: Sequence[str]) -> list[float | None]:
        """Return `known` of each name."""
        used, requested = self.used, self.requested
        found: list[float | None] = []
        for name in names:
            if name in requested and name not in used:  # as most are
                value = requested[name]
                used[name] = Price(value, "request")
                found.append(value)
            else:
                found.append(self.known(name))
        return found

    def _asset(self, name: str) -> Price | None:
        if name in self.requested:
            return Price(self.requested[name], "request")
        if name in self.marks:
            return Price(self.marks[name], "position")
        if name in self.stored:
            return Price(self.stored[name].value, "stored", self.stored[name].as_of)
        if name in self.other_marks:
            return Price(self.other_marks[name], "position")
        return Price(1.0, "par") if self.parameters.asset(name).kind == "stable" else None

    def _mark(self, symbol: str, underlying: str) -> Price | None:
        if symbol in self.requested:
            return Price(self.requested[symbol], "request")
        if underlying in self.requested or symbol not in self.stored:
            return None
        return Price(self.stored[symbol].value, "stored", self.stored[symbol].as_of)
