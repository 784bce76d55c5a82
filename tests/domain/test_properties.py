"""What holds of every book."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from app.domain.parameters import CorrelationTable, Regime
from app.domain.quote import MarginQuote
from tests.domain.book import MODELS, Book, Holding, Row, book, linear, option
from tests.domain.drawn import NAMES, agreed, between, books, greeks_rows, linear_rows, option_rows

DRAWN = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking a whole book takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)


def scale_of(quote: MarginQuote) -> float:
    return float(quote.portfolio.notional.sum()) + 1.0


def same_margins(first: MarginQuote, second: MarginQuote, factor: float = 1.0) -> None:
    scale = 1e-9 * scale_of(second)
    for name in MODELS:
        for side in ("initial_margin", "maintenance_margin"):
            expected = factor * getattr(first.models[name], side)
            assert getattr(second.models[name], side) == pytest.approx(expected, rel=1e-9, abs=scale), (name, side)


@DRAWN
@given(books(), st.randoms())
def test_order_does_not_matter(whole: Book, random: Any) -> None:
    shuffled = list(whole.rows)
    random.shuffle(shuffled)
    first, second = whole.quote(), replace(whole, rows=tuple(shuffled)).quote()
    same_margins(first, second)
    assert second.health.equity == pytest.approx(first.health.equity, rel=1e-9, abs=1e-6)
    assert second.health.required_initial == pytest.approx(first.health.required_initial, rel=1e-9, abs=1e-6)


def times(row: Row, factor: float) -> Row:
    return row | {k: row[k] * factor for k in ("size", "notional", "vega") if row.get(k) is not None}


@DRAWN
@given(books(), between(0.01, 100.0))
def test_margins_grow_with_the_book(whole: Book, factor: float) -> None:
    whole = replace(whole, assets={})  # a concentration limit is not homogeneous
    same_margins(whole.quote(), replace(whole, rows=tuple(times(row, factor) for row in whole.rows)).quote(), factor)


@DRAWN
@given(books())
def test_a_closed_book_needs_nothing(whole: Book) -> None:
    for rows in ((), tuple(times(row, 0.0) for row in whole.rows)):
        quote = replace(whole, rows=rows, reserved=0.0).quote()
        for result in quote.models.values():
            assert result.initial_margin == result.maintenance_margin == 0.0
        assert quote.health.required_initial == 0.0
        assert quote.health.stress_survival is None
        assert set(quote.capital_freed.values()) == {0.0}


@DRAWN
@given(books())
def test_portfolio_margin_is_never_below_its_floor(whole: Book) -> None:
    result = whole.quote().models["portfolio"]
    cap = result.notes["long_option_cap"]
    floor = 1.2 * float(result.notes["floor"] or 0.0)
    least = floor if cap is None else min(floor, float(cap))
    assert result.initial_margin >= least * (1 - 1e-12)
    assert result.maintenance_margin == pytest.approx(0.8 * result.initial_margin)


@DRAWN
@given(st.lists(linear_rows(isolated=False), min_size=1, max_size=8).map(agreed))
def test_full_correlation_adds_up(rows: tuple[Row, ...]) -> None:
    full = CorrelationTable(MappingProxyType({}), 1.0)
    result = Book(rows=tuple(row | {"side": "long"} for row in rows), stress=full).quote().models["portfolio"]
    worst = float(result.per_underlying["worst_loss"].sum())
    assert result.notes["joint"] == pytest.approx(worst, rel=1e-9)
    assert result.notes["parallel"] == pytest.approx(worst, rel=1e-9)


@DRAWN
@given(books(), st.sampled_from((*NAMES, "XRP")), st.sampled_from(("long", "short")), between(1.0, 20.0))
def test_a_flat_position_changes_nothing(whole: Book, name: str, side: str, leverage: float) -> None:
    whole = replace(whole, prices={**whole.prices, "XRP": 0.5})
    flat = linear(f"{name}-PERP", side, 0.0, leverage=leverage)
    first, second = whole.quote(), replace(whole, rows=(*whole.rows, flat)).quote()
    same_margins(first, second)
    assert second.health.required_initial == pytest.approx(first.health.required_initial, rel=1e-9, abs=1e-6)
    assert math.isnan(second.liquidation_move[-1])


def test_a_flat_position_does_not_widen_the_range_of_the_others() -> None:
    wide = {"BTC-27MAR26": {"price_range": 0.5}}
    rows = (linear("BTC-PERP", "long", 1.0), linear("BTC-27MAR26", "long", 0.0))
    with_flat, without = Book(rows=rows, instruments=wide).quote(), Book(rows=rows[:1], instruments=wide).quote()
    same_margins(without, with_flat)


@DRAWN
@given(books())
def test_figures_are_numbers(whole: Book) -> None:
    quote = whole.quote()
    for model in quote.models.values():
        for name, figure in numbers({**vars_of(model), "per_underlying": without_limits(model.per_underlying)}):
            assert math.isfinite(figure), (model.model, name)
    for part in ("health", "capital_freed", "equity", "allocated", "advisories", "unrealized_pnl", "options_value"):
        for name, figure in numbers(getattr(quote, part)):
            assert math.isfinite(figure), (part, name)
    for move in (quote.distances.to_breach, quote.distances.to_liquidation):
        assert move is None or math.isfinite(move)
    moves = (*quote.liquidation_move.tolist(), *quote.distances.by_underlying.tolist())
    assert not any(math.isinf(move) for move in moves)


def vars_of(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def without_limits(columns: Any) -> dict[str, Any]:
    return {name: column for name, column in columns.items() if name != "concentration_limit"}


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, bool | str) or value is None:
        return
    if isinstance(value, int | float | np.ndarray):
        yield from ((name, float(x)) for x in np.ravel(value))
    elif is_dataclass(value):
        yield from numbers(vars_of(value), name)
    elif hasattr(value, "items"):
        for key, part in value.items():
            yield from numbers(part, f"{name}/{key}")
    else:
        for part in value:
            yield from numbers(part, name)


@DRAWN
@given(books())
def test_maintenance_is_at_most_initial(whole: Book) -> None:
    quote = whole.quote()
    for name, result in quote.models.items():
        assert 0.0 <= result.maintenance_margin <= result.initial_margin + 1e-9 * scale_of(quote), name
    assert quote.health.required_maintenance <= quote.health.required_initial + 1e-9 * scale_of(quote)


@DRAWN
@given(books())
def test_shares_add_up(whole: Book) -> None:
    quote = whole.quote()
    tolerance = 1e-8 * scale_of(quote)
    for name, result in quote.models.items():
        assert float(result.position_initial.sum()) == pytest.approx(result.initial_margin, abs=tolerance), name
        assert float(result.position_maintenance.sum()) == pytest.approx(result.maintenance_margin, abs=tolerance), name


@DRAWN
@given(st.lists(option_rows(sides=st.just("long")), min_size=1, max_size=6), st.sampled_from(("normal", "sell_off")))
def test_long_options_never_need_more_than_their_value(rows: list[Row], regime: Regime) -> None:
    quote = Book(rows=tuple(rows), regime=regime).quote()
    assert quote.models["portfolio"].initial_margin <= quote.options_value * (1 + 1e-12)


@DRAWN
@given(
    st.lists(st.one_of(linear_rows(isolated=False), option_rows(isolated=False)), min_size=1, max_size=4).map(agreed)
)
def test_a_hedged_book_never_runs_at_zero(rows: tuple[Row, ...]) -> None:
    other = {"long": "short", "short": "long"}
    whole = Book(rows=(*rows, *(row | {"side": other[row["side"]]} for row in rows)), held=(Holding("USDC", 1.0),))
    quote = whole.quote()
    gross = float(quote.portfolio.gross.sum())
    assume(gross > 1.0)
    assert quote.models["portfolio"].initial_margin >= 1.2 * 0.02 * gross * (1 - 1e-9)


@DRAWN
@given(books())
def test_regimes_are_monotone(whole: Book) -> None:
    regimes: tuple[Regime, ...] = ("sideways", "normal", "sell_off", "liquidity_crisis")
    whole = replace(whole, mode="cross")
    margins = [replace(whole, regime=regime).quote().models["portfolio"].initial_margin for regime in regimes]
    assert margins == sorted(margins)


@DRAWN
@given(books(linear_rows(isolated=False)))
def test_netting_never_costs_more_than_isolated(whole: Book) -> None:
    rows = [row | {"leverage": None} for row in whole.rows]
    quote = replace(whole, rows=tuple(rows), instruments={}, assets={}).quote()
    assert quote.models["cross"].initial_margin <= quote.models["isolated"].initial_margin * (1 + 1e-12)
    assert quote.capital_freed["isolated"] == pytest.approx(0.0, abs=1e-12)


def test_capital_freed() -> None:
    quote = book(linear("BTC-PERP", "long", 1.0), linear("BTC-PERP", "short", 0.5), held={"USDC": 9.0}).quote()
    # cross 1/2 of 1.5
    assert quote.capital_freed["cross"] == pytest.approx(2 / 3)
    assert quote.capital_freed["isolated"] == 0.0


def test_a_position_leverage_only_raises_its_rate() -> None:
    low, high = (book(linear("BTC-PERP", "long", 1.0, leverage=x)).quote().models["isolated"] for x in (2.0, 50.0))
    assert low.initial_margin == pytest.approx(30_000.0)
    assert high.initial_margin == pytest.approx(18_000.0)
    assert low.maintenance_margin == high.maintenance_margin == pytest.approx(9_000.0)


def test_a_quoted_model_margins_the_whole_book() -> None:
    rows = linear("BTC-PERP", "long", 1.0, margin_mode="isolated"), linear("BTC-PERP", "short", 1.0)
    quote = book(*rows, held={"USDC": 50_000.0}).quote()
    assert quote.models["cross"].initial_margin == 0.0
    # the account's own: the short pooled, the long outside with the margin it posted
    assert quote.health.required_initial == pytest.approx(18_000.0)
    assert quote.health.equity == pytest.approx(50_000.0 - 18_000.0)
    assert quote.equity == pytest.approx(50_000.0)


@pytest.mark.parametrize("mode", ["cross", "isolated", "portfolio"])
def test_an_option_of_the_faintest_volatility_is_worth_its_intrinsic_value(mode: str) -> None:
    row = option("BTC", "call", "long", 1.0, 59_000.0, 30, 1e-6)
    quote = book(row, held={"USDC": 9_000.0}, mode=mode).quote()
    assert quote.options_value == pytest.approx(1_000.0)
    assert math.isfinite(quote.models["portfolio"].initial_margin)


@DRAWN
@given(books(greeks_rows()))
def test_greeks_need_no_price(whole: Book) -> None:
    bare = replace(whole, held=(), owed=(), prices={}, assets={})
    assert bare.quote().models["scenario"].initial_margin == pytest.approx(
        whole.quote().models["scenario"].initial_margin, rel=1e-12
    )
