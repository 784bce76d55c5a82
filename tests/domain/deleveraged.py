"""Stored books for plans: linear positions, assessed as the account is, reduced at the mark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from app.domain.book import AccountSettings, Book, Holding, OpenPosition
from app.domain.liquidate import Target
from app.domain.money import to_decimal
from app.domain.parameters import MarketParameters
from app.domain.prices import StoredPrice
from app.domain.quote import AccountFigures, account_figures
from app.domain.trade import Contract, Order, OrderSide, plan

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PRICES = {"BTC": 50_000.0, "ETH": 2_500.0, "SOL": 100.0, "BNB": 500.0, "USDC": 1.0}


@dataclass(frozen=True)
class Floor:
    """A market: assesses a book, and reduces one at the mark less a slippage."""

    prices: Mapping[str, float] = field(default_factory=lambda: dict(PRICES))
    parameters: MarketParameters = field(default_factory=MarketParameters)
    slippage: float = 0.0

    @property
    def stored(self) -> dict[str, StoredPrice]:
        return {name: StoredPrice(price, NOW) for name, price in self.prices.items()}

    def assess(self, held: Book) -> AccountFigures:
        return account_figures(held.quote_terms(self.parameters, self.stored), self.stored, NOW)

    def reduce(self, held: Book, target: Target, size: Decimal) -> Book:
        assert isinstance(target.item, OpenPosition)
        position = target.item
        side: OrderSide = "sell" if position.side == "long" else "buy"
        market = self.parameters.market(position.symbol, self.parameters.underlying_of(position.symbol))
        contract = Contract(to_decimal(market.contract_size), to_decimal(market.initial_margin_rate))
        mark = self.prices[self.parameters.underlying_of(position.symbol)]
        price = to_decimal(mark * (1 - self.slippage if side == "sell" else 1 + self.slippage))
        return plan(held, Order(position.symbol, side, size, reduce_only=True), contract, price, "", NOW).book


def position(symbol: str, notional: float, number: int = 0, **terms: Any) -> OpenPosition:
    """Return a position of a signed notional at `PRICES`, entered at the mark unless told otherwise."""
    price = PRICES[symbol.partition("-")[0]]
    known: dict[str, Any] = {
        "id": f"pos_{number}",
        "symbol": symbol,
        "side": "long" if notional > 0 else "short",
        "size": to_decimal(abs(notional) / price),
        "entry_price": to_decimal(price),
        "leverage": None,
        "margin_mode": "pooled",
        "allocated": Decimal(0),
        "realized_pnl": Decimal(0),
        "reducible": True,
        "opened_at": NOW,
    }
    return OpenPosition(**(known | terms))


def book(*positions: OpenPosition, usdc: float = 10_000, mode: Any = "cross", **holdings: float) -> Book:
    held = {name: Holding(free=to_decimal(amount)) for name, amount in {"USDC": usdc, **holdings}.items()}
    return Book("alice", AccountSettings(margin_mode=mode), 1, held, list(positions), [])
