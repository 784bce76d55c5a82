"""What the venues' tests share: a book under one venue's model, and prices of options in plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from app.domain.margin.registry import MODELS
from app.domain.margin.result import MarginResult, MarginTerms
from app.domain.margin.venues.terms import VenueInputs, VenueParameters
from app.domain.parameters import InstrumentParameters, MarketParameters
from app.domain.quote import QuoteTerms, read_account
from tests.domain.book import NOW, PRICES, Row, columns, is_greeks, is_option, underlying_of

YEAR_SECONDS = 31_536_000.0


def expires(days: float) -> datetime:
    return NOW + timedelta(days=days)


def margined(
    venue: str,
    *rows: Row,
    prices: Mapping[str, float] = PRICES,
    inputs: Mapping[str, VenueInputs] | None = None,
    parameters: Mapping[str, VenueParameters] | None = None,
    expiries: Mapping[str, float] | None = None,
    listed: Sequence[InstrumentParameters] = (),
) -> MarginResult:
    """Return the book's margin at a venue, read as a quote reads it; `expiries` are days to expiry by future."""
    market = MarketParameters()
    futures = {
        symbol: InstrumentParameters(symbol, symbol.partition("-")[0], kind="future", expiry=expires(days))
        for symbol, days in (expiries or {}).items()
    }
    market = replace(
        market,
        instruments={**market.instruments, **futures, **{i.symbol: i for i in listed}},
        venues={venue: dict(parameters)} if parameters else {},
    )
    terms = MarginTerms(parameters=market, venues={venue: dict(inputs)} if inputs else {})
    request = QuoteTerms(positions=columns(rows), margin=terms, models=(venue,), prices=prices)
    account = read_account(request, {}, NOW)
    return MODELS[venue](account.portfolio, replace(terms, stable_prices=account.stable_prices))


def unit_figure(result: MarginResult, name: str, column: int = 0) -> float:
    return float(result.per_underlying[name][column])


def black(kind: str, forward: float, strike: float, years: float, iv: float, rate: float = 0.0) -> float:
    """Black 1976, one option on one unit, discounted."""
    phi = 1.0 if kind == "call" else -1.0
    deviation = iv * math.sqrt(years)
    d1 = math.log(forward / strike) / deviation + deviation / 2
    normal = [math.erfc(-phi * d / math.sqrt(2.0)) / 2.0 for d in (d1, d1 - deviation)]
    return max(0.0, math.exp(-rate * years) * phi * (forward * normal[0] - strike * normal[1]))


def years_of(row: Row) -> float:
    return float((row["expiry"] - NOW).total_seconds()) / YEAR_SECONDS


def signed_size(row: Row) -> float:
    return float(row["size"]) * float(row.get("contract_size") or 1.0) * (-1.0 if row["side"] == "short" else 1.0)


def forward_of(row: Row, prices: Mapping[str, float]) -> float:
    return float(row.get("forward") or prices[row["underlying"]])


def option_value(row: Row, prices: Mapping[str, float], move: float = 0.0, iv: float | None = None) -> float:
    """Return the signed value of an option row, its forward moved, USD."""
    forward = forward_of(row, prices) * (1.0 + move)
    each = black(row["type"], forward, row["strike"], years_of(row), iv or row["iv"], row.get("rate") or 0.0)
    return signed_size(row) * each


def option_dollars(row: Row, prices: Mapping[str, float]) -> float:
    """Return dV/dF x F by a central difference, USD."""
    step = 1e-5
    return (option_value(row, prices, step) - option_value(row, prices, -step)) / (2.0 * step)


def straight_pnl(row: Row, prices: Mapping[str, float], move: float, vol_move: float) -> float:
    """Return the profit and loss of a linear or greeks row, USD."""
    if is_greeks(row):
        taylor = row["delta"] * move + (row.get("gamma") or 0.0) * move * move / 2.0
        return float(row["notional"] * taylor + (row.get("vega") or 0.0) * vol_move)
    return signed_size(row) * mark_of(row, prices) * move


def mark_of(row: Row, prices: Mapping[str, float]) -> float:
    return float(row.get("mark_price") or prices[underlying_of(row)])


def exposure_of(row: Row, prices: Mapping[str, float]) -> float:
    """Return the signed delta of a row, USD."""
    if is_option(row):
        return option_dollars(row, prices)
    if is_greeks(row):
        return float(row["notional"] * row["delta"])
    return signed_size(row) * mark_of(row, prices)


def by_underlying(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if (row.get("size") or row.get("notional") or 0.0) > 0.0:
            found.setdefault(underlying_of(row), []).append(row)
    return found


MARKS = {"PERP": 0.97, "27MAR26": 1.03}


def marked(row: Row) -> Row:
    """Return a linear row with the one mark of its symbol, off its underlying's price, but that price for the asset."""
    name, _, kind = row["symbol"].partition("-")
    return row | {"mark_price": PRICES[name] * MARKS[kind] if kind else None, "entry_price": None}


def label(row: Row) -> Any:
    """Return what tells the instruments of a unit apart."""
    return row.get("symbol") or (row["expiry"], row["strike"], row["type"])
