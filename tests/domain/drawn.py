"""Hypothesis strategies: mixed books on several underlyings."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.domain import book as b
from tests.domain.book import Book, Holding, Row

NAMES = ("BTC", "ETH", "SOL", "DOGE")
SIDES = st.sampled_from(("long", "short"))


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, allow_infinity=False, width=64)


def digits(value: float) -> float:
    """Keep six decimals: figures below them are rounding, and no test of a formula."""
    return round(value, 6)


@st.composite
def linear_rows(draw: st.DrawFn, *, isolated: bool = True) -> Row:
    name = draw(st.sampled_from(NAMES))
    price = b.PRICES[name]
    row: Row = b.linear(
        draw(st.sampled_from((name, f"{name}-PERP", f"{name}-27MAR26"))),
        draw(SIDES),
        draw(st.one_of(st.just(0.0), between(100.0, 100_000.0))) / price,
        mark_price=draw(st.none() | between(0.95 * price, 1.05 * price)),
        entry_price=draw(st.none() | between(0.7 * price, 1.4 * price)),
        leverage=draw(st.none() | between(1.0, 20.0)),
        contract_size=draw(st.sampled_from((None, None, 0.01, 10.0))),
    )
    return row | draw(modes()) if isolated else row


@st.composite
def modes(draw: st.DrawFn) -> dict[str, Any]:
    mode = draw(st.sampled_from((None, None, "cross", "isolated")))
    if mode != "isolated":
        return {"margin_mode": mode}
    return {"margin_mode": mode, "allocated_collateral": draw(st.none() | between(0.0, 20_000.0))}


@st.composite
def greeks_rows(draw: st.DrawFn) -> Row:
    return b.greeks(
        draw(st.sampled_from(NAMES)),
        draw(between(100.0, 100_000.0)),
        draw(between(-1.5, 1.5).map(digits)),
        gamma=draw(st.none() | between(-4.0, 4.0).map(digits)),
        vega=draw(st.none() | between(-5_000.0, 5_000.0).map(digits)),
    )


@st.composite
def option_rows(draw: st.DrawFn, *, sides: st.SearchStrategy[str] = SIDES, isolated: bool = True) -> Row:
    name = draw(st.sampled_from(NAMES))
    price = b.PRICES[name]
    row = b.option(
        name,
        draw(st.sampled_from(("call", "put"))),
        draw(sides),
        draw(between(100.0, 100_000.0)) / price,
        strike=price * draw(between(0.4, 2.5)),
        days=draw(st.one_of(between(1 / 24, 40.0), between(40.0, 3_650.0))),
        iv=draw(between(0.05, 2.5)),
        rate=draw(st.none() | between(-0.02, 0.20)),
        forward=draw(st.none() | between(0.9 * price, 1.1 * price)),
    )
    return row | draw(modes()) if isolated else row


def agreed(drawn: list[Row]) -> tuple[Row, ...]:
    """Return the rows with one mark a symbol, the first one's; an asset's own is the price that the book has for it."""
    marks = dict(b.PRICES)
    return tuple(
        row | {"mark_price": marks.setdefault(row["symbol"], row["mark_price"])} if row.get("mark_price") else row
        for row in drawn
    )


def rows() -> st.SearchStrategy[Row]:
    return st.one_of(linear_rows(), linear_rows(), greeks_rows(), option_rows())


def holdings(most: float) -> st.SearchStrategy[tuple[Holding, ...]]:
    one = st.builds(
        lambda name, value: Holding(name, value / b.PRICES[name]),
        st.sampled_from(("USDC", "USDT", *NAMES, "BTC")),
        st.one_of(st.just(0.0), between(0.01, most)),
    )
    return st.lists(one, max_size=3).map(tuple)


LIMITS = {"BTC": {"concentration_limit": 0.5}, "SOL": {"concentration_limit": 100.0}}
RATES = {
    "ETH": {"initial_margin_rate": 0.2, "maintenance_margin_rate": 0.1, "haircut": 0.2},
    "DOGE": {"price_range": 0.6},
}
INSTRUMENTS = {
    "BTC-PERP": {"initial_margin_rate": 0.12, "maintenance_margin_rate": 0.08},
    "ETH-27MAR26": {"contract_size": 0.1, "maintenance_margin_rate": 0.15},
}


def books(
    positions: st.SearchStrategy[Row] | None = None, *, modes_of: tuple[str, ...] = ("cross", "isolated", "portfolio")
) -> st.SearchStrategy[Book]:
    return st.builds(
        Book,
        rows=st.lists(rows() if positions is None else positions, max_size=6).map(agreed),
        held=holdings(100_000.0),
        owed=st.one_of(st.just(()), holdings(20_000.0)),
        reserved=st.one_of(st.just(0.0), between(0.01, 20_000.0)),
        mode=st.sampled_from(modes_of),
        regime=st.sampled_from(("normal", "sideways", "sell_off", "liquidity_crisis")),
        scenario_set=st.sampled_from(("moderate", "wide")),
        assets=st.sampled_from(({}, LIMITS, RATES)),
        instruments=st.sampled_from(({}, INSTRUMENTS)),
    )
