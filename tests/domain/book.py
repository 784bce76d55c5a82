"""Short builders: a book of rows and holdings, quoted by the service, moved along prices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

from app.domain.collateral import CollateralTerms
from app.domain.margin.result import MarginTerms, SpanCharges
from app.domain.margin.venues.terms import VenueInputs, VenueParameters
from app.domain.parameters import CorrelationTable, InstrumentParameters, MarginMode, MarketParameters, Regime
from app.domain.prices import StoredPrice
from app.domain.quote import MarginQuote, QuoteTerms, margin_quote
from app.domain.scenarios import NAMED, Scenario
from app.domain.terms import PositionTerms

Row = dict[str, Any]

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MODELS = ("isolated", "cross", "scenario", "portfolio", "span")
PRICES = {"BTC": 60_000.0, "ETH": 3_000.0, "SOL": 150.0, "DOGE": 0.2, "USDC": 1.0, "USDT": 1.0}
STABLES = ("USDC", "USDT")


def linear(symbol: str, side: str, size: float, **terms: Any) -> Row:
    return {"symbol": symbol, "side": side, "size": size, **terms}


def greeks(symbol: str, notional: float, delta: float, **terms: Any) -> Row:
    return {"symbol": symbol, "notional": notional, "delta": delta, **terms}


def option(
    underlying: str, kind: str, side: str, size: float, strike: float, days: float, iv: float, **terms: Any
) -> Row:
    expiry = NOW + timedelta(days=days)
    return {
        "underlying": underlying,
        "type": kind,
        "side": side,
        "size": size,
        "strike": strike,
        "expiry": expiry,
        "iv": iv,
        **terms,
    }


def is_option(row: Row) -> bool:
    return row.get("strike") is not None


def is_greeks(row: Row) -> bool:
    return row.get("notional") is not None


def underlying_of(row: Row) -> str:
    return str(row.get("underlying") or str(row["symbol"]).partition("-")[0])


def columns(rows: Sequence[Row]) -> PositionTerms:
    return PositionTerms(**{f.name: [row.get(f.name) for row in rows] for f in fields(PositionTerms)})


class Holding(NamedTuple):
    asset: str
    amount: float
    lent: float = 0.0


@dataclass(frozen=True)
class Book:
    """A whole request, its asset prices given one by one. `assets`, `instruments` override single parameters."""

    rows: tuple[Row, ...] = ()
    held: tuple[Holding, ...] = ()
    owed: tuple[Holding, ...] = ()
    prices: Mapping[str, float] = field(default_factory=lambda: MappingProxyType(PRICES))
    reserved: float = 0.0
    mode: MarginMode = "cross"
    regime: Regime = "normal"
    assets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    instruments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stress: CorrelationTable | None = None
    hedge: CorrelationTable | None = None
    scenario_set: str = "moderate"
    scenarios: tuple[Scenario, ...] | None = None
    span_charges: Mapping[str, SpanCharges] = field(default_factory=dict)
    venues: Mapping[str, Mapping[str, VenueParameters]] = field(default_factory=dict)
    venue_inputs: Mapping[str, Mapping[str, VenueInputs]] = field(default_factory=dict)

    def parameters(self) -> MarketParameters:
        shipped = MarketParameters()
        assets = dict(shipped.assets)
        for name, changes in self.assets.items():
            assets[name] = replace(shipped.asset(name), asset=name, **changes)
        instruments = dict(shipped.instruments)
        for symbol, changes in self.instruments.items():
            known = instruments.get(symbol) or InstrumentParameters(symbol, symbol.partition("-")[0])
            instruments[symbol] = replace(known, **changes)
        stress, hedge = self.stress or shipped.stress, self.hedge or shipped.hedge
        return replace(shipped, assets=assets, instruments=instruments, stress=stress, hedge=hedge, venues=self.venues)

    def quote(self, *, stored: Mapping[str, StoredPrice] | None = None, models: Sequence[str] = MODELS) -> MarginQuote:
        terms = MarginTerms(
            parameters=self.parameters(),
            scenarios=NAMED[self.scenario_set] if self.scenarios is None else self.scenarios,
            scenario_set=self.scenario_set,
            regime=self.regime,
            span_charges=self.span_charges,
            venues=self.venue_inputs,
        )
        request = QuoteTerms(
            positions=columns(self.rows),
            margin=terms,
            collateral=[CollateralTerms(h.asset, h.amount, None, h.lent) for h in self.held],
            liabilities=[CollateralTerms(h.asset, h.amount) for h in self.owed],
            models=models,
            margin_mode=self.mode,
            reserved=self.reserved,
            prices=self.prices,
        )
        return margin_quote(request, stored or {}, NOW)

    def moved(self, moves: Mapping[str, float]) -> Book:
        """Return the same book at new prices: every price on an asset multiplied by 1 + its move."""
        rows, booked = [], 0.0
        for row in self.rows:
            new, profit = self._moved_row(row, moves.get(underlying_of(row), 0.0))
            rows.append(new)
            booked += profit
        prices = {name: price * (1 + moves.get(name, 0.0)) for name, price in self.prices.items()}
        held = (*self.held, Holding("USDT", booked)) if booked >= 0 else self.held
        owed = (*self.owed, Holding("USDT", -booked)) if booked < 0 else self.owed
        return replace(self, rows=tuple(rows), prices=prices, held=held, owed=owed)

    def mark_of(self, row: Row) -> float:
        """Return a linear row's mark: its own, the lowest that its market's rows give, the symbol's, the asset's."""
        own = row.get("mark_price")
        if own:
            return float(own)
        alike = [r["mark_price"] for r in self.rows if self._marks(r, row)]
        return float(min(alike, default=0.0) or self.prices.get(row["symbol"]) or self.prices[underlying_of(row)])

    def _marks(self, other: Row, row: Row) -> bool:
        alike = other.get("symbol") == row["symbol"] and other.get("underlying") == row.get("underlying")
        return bool(alike and other.get("mark_price") and other.get("size", 1.0) > 0)

    def _moved_row(self, row: Row, move: float) -> tuple[Row, float]:
        factor = 1 + move
        if is_option(row):
            forward = row.get("forward")
            return row | {"forward": None if forward is None else forward * factor}, 0.0
        if not is_greeks(row):
            mark = self.mark_of(row)
            return row | {"mark_price": mark * factor, "entry_price": row.get("entry_price") or mark}, 0.0
        gamma = row.get("gamma") or 0.0
        profit = row["notional"] * (row["delta"] * move + gamma * move * move / 2)
        new = row | {
            "notional": row["notional"] * factor,
            "delta": row["delta"] + gamma * move,
            "gamma": gamma * factor,
        }
        if row.get("allocated_collateral") is not None:
            new["allocated_collateral"] = row["allocated_collateral"] + profit
        return new, profit

    def common(self, move: float) -> Book:
        return self.moved({name: 0.0 if name in STABLES else move for name in self.prices})


def book(*rows: Row, held: Mapping[str, float] | None = None, **terms: Any) -> Book:
    return Book(rows=rows, held=tuple(Holding(a, x) for a, x in (held or {}).items()), **terms)
