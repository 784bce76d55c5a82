"""Reported liquidation and breach prices, put to the test by quoting a new request at them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from app.domain.parameters import MarginMode
from tests.domain.book import Book, Holding, book, greeks, linear, option, underlying_of
from tests.domain.drawn import books

MODES: tuple[MarginMode, ...] = ("cross", "isolated", "portfolio")
DRAWN = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking a whole book takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)
P = {"BTC": 60_000.0, "ETH": 3_000.0, "SOL": 150.0, "USDC": 1.0, "USDT": 1.0}


def pinned(whole: Book) -> Book:
    """Return the book with every allocation spelt out: one that is left out is posted once, at entry."""
    allocated = whole.quote(models=()).portfolio.allocated.tolist()
    rows = tuple(
        {**row, "allocated_collateral": posted} if row.get("margin_mode") == "isolated" else row
        for row, posted in zip(whole.rows, allocated, strict=True)
    )
    return replace(whole, rows=rows)


def alone(whole: Book, row: int) -> Book:
    """Return one isolated position as a book of its own, backed by its allocation."""
    own = {k: v for k, v in whole.rows[row].items() if k not in ("margin_mode", "allocated_collateral")}
    backing = (Holding("USDC", whole.rows[row]["allocated_collateral"]),)
    return replace(whole, rows=(own,), held=backing, owed=(), reserved=0.0, mode="isolated")


def standing(at: Book) -> tuple[float, float, float]:
    """Return equity, required initial and required maintenance margin of a new request."""
    if at.mode != "portfolio":
        health = at.quote(models=()).health
        return health.equity, health.required_initial, health.required_maintenance
    # the model itself, of the pooled rows: quicker than a quote that looks for distances of its own
    allocated = sum(row["allocated_collateral"] for row in at.rows if row.get("margin_mode") == "isolated")
    pooled = tuple(row for row in at.rows if row.get("margin_mode") != "isolated")
    owed = (*at.owed, Holding("USDC", allocated))
    quote = replace(at, rows=pooled, owed=owed, mode="cross").quote(models=("portfolio",))
    margin = quote.models["portfolio"]
    return quote.equity, margin.initial_margin + at.reserved, margin.maintenance_margin + at.reserved


def surplus(at: Book) -> float:
    equity, _, maintenance = standing(at)
    return equity - maintenance


def room(at: Book) -> float:
    """Return what is left before breach: of utilization .85, or of equity over maintenance."""
    equity, initial, maintenance = standing(at)
    return min(0.85 * equity - initial, equity - maintenance)


def size_of(whole: Book) -> float:
    quote = whole.quote(models=())
    held = sum(h.amount * whole.prices[h.asset] for h in (*whole.held, *whole.owed))
    return float(quote.portfolio.notional.sum()) + held


def check_root(move: float, figure: Callable[[float], float], scale: float) -> None:
    price = 1 + move
    assert price > 0
    assert figure(move) == pytest.approx(0.0, abs=1e-6 * scale * max(1.0, price))
    below, above = figure(price * (1 - 1e-5) - 1), figure(price * (1 + 1e-5) - 1)
    assert (below < 0) != (above < 0) or min(abs(below), abs(above)) < 1e-9 * scale * max(1.0, price)


def check_no_root(figure: Callable[[float], float], scale: float) -> None:
    values = [figure(move) for move in (-0.999, -0.9, -0.7, -0.5, -0.3, -0.1, 0.0, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0)]
    clear = [v for v in values if abs(v) > 1e-7 * scale]
    assert all(v < 0 for v in clear) or all(v > 0 for v in clear), values


def check_all(whole: Book) -> None:
    whole = pinned(whole)
    quote = whole.quote(models=())
    distances, scale = quote.distances, size_of(whole)

    def check(move: float | None, figure: Callable[[float], float]) -> None:
        if abs(figure(0.0)) < 1e-7 * scale:
            return
        if move is None or math.isnan(move):
            check_no_root(figure, scale)
        else:
            check_root(move, figure, scale)

    check(distances.to_liquidation, lambda m: surplus(whole.common(m)))
    if not distances.breached:  # of an account in breach RISK.md does not say where its breach lies
        check(distances.to_breach, lambda m: room(whole.common(m)))
    for row, terms in enumerate(whole.rows):
        if quote.portfolio.notional[row] == 0:
            assert math.isnan(quote.liquidation_move[row])
            continue
        name, move = underlying_of(terms), float(quote.liquidation_move[row])
        part = alone(whole, row) if terms.get("margin_mode") == "isolated" else whole
        check(move, lambda m, part=part, name=name: surplus(part.moved({name: m})))  # type: ignore[misc]
        if abs(now := surplus(part)) > 1e-7 * scale:
            assert quote.breached[row] == (now < 0)


BOOKS = {
    "long": book(linear("BTC-PERP", "long", 2.0, entry_price=58_000.0), held={"USDC": 40_000.0}, prices=P),
    "short": book(linear("BTC-PERP", "short", 2.0, entry_price=65_000.0), held={"USDC": 40_000.0}, prices=P),
    "long and collateral on it": book(linear("BTC-PERP", "long", 2.0), held={"USDC": 20_000.0, "BTC": 1.0}, prices=P),
    "short and collateral on it": book(linear("BTC-PERP", "short", 1.0), held={"USDC": 9_000.0, "BTC": 0.4}, prices=P),
    "debt in the coin": Book(
        rows=(linear("BTC-PERP", "long", 0.5),),
        held=(Holding("USDC", 90_000.0),),
        owed=(Holding("BTC", 1.0),),
        prices=P,
    ),
    "partly hedged": book(
        linear("BTC-PERP", "long", 3.0),
        linear("BTC-27MAR26", "short", 1.0),
        linear("ETH-PERP", "short", 30.0),
        held={"USDC": 60_000.0},
        prices=P,
    ),
    "short call": book(option("BTC", "call", "short", 2.0, 66_000.0, 30, 0.6), held={"USDC": 60_000.0}, prices=P),
    "short put": book(option("BTC", "put", "short", 2.0, 54_000.0, 30, 0.6), held={"USDC": 60_000.0}, prices=P),
    "short straddle": book(
        option("BTC", "call", "short", 1.0, 60_000.0, 14, 0.6),
        option("BTC", "put", "short", 1.0, 60_000.0, 14, 0.6, forward=60_500.0),
        held={"USDC": 45_000.0, "BTC": 0.1},
        prices=P,
    ),
    "long option against a short": book(
        option("BTC", "call", "long", 1.0, 60_000.0, 60, 0.6),
        linear("BTC-PERP", "short", 1.0),
        held={"USDC": 30_000.0},
        prices=P,
    ),
    "gamma": book(greeks("BTC", 100_000.0, 0.4, gamma=-3.0, vega=-500.0), held={"USDC": 30_000.0}, prices=P),
    "reserved": book(linear("SOL-PERP", "long", 500.0), held={"USDC": 40_000.0}, reserved=9_000.0, prices=P),
    "other coins only": book(linear("BTC-PERP", "long", 1.0), held={"ETH": 8.0, "SOL": 50.0}, prices=P),
    "breached": book(linear("BTC-PERP", "long", 2.0, entry_price=70_000.0), held={"USDC": 30_000.0}, prices=P),
    "insolvent": book(linear("BTC-PERP", "short", 2.0, entry_price=40_000.0), held={"USDC": 30_000.0}, prices=P),
    "on a stablecoin": book(
        linear("USDC-PERP", "long", 100_000.0), linear("BTC-PERP", "long", 0.2), held={"USDC": 30_000.0}, prices=P
    ),
    "isolated beside pooled": book(
        linear("BTC-PERP", "long", 1.0, margin_mode="isolated", leverage=5.0),
        linear("BTC-PERP", "short", 0.5, margin_mode="isolated", allocated_collateral=7_000.0, entry_price=61_000.0),
        option("BTC", "put", "short", 1.0, 58_000.0, 20, 0.7, margin_mode="isolated", allocated_collateral=18_000.0),
        greeks("ETH", 50_000.0, 0.6, gamma=-1.0, margin_mode="isolated", allocated_collateral=15_000.0),
        linear("ETH-PERP", "long", 30.0),
        held={"USDC": 120_000.0},
        prices=P,
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BOOKS)
def test_a_new_request_at_the_price_is_on_the_line(name: str, mode: MarginMode) -> None:
    check_all(replace(BOOKS[name], mode=mode))


@pytest.mark.filterwarnings("ignore:overflow")  # far from the mark, survival is a ratio to next to nothing
@DRAWN
@given(books(modes_of=("cross", "isolated")))
def test_drawn_books(whole: Book) -> None:
    check_all(whole)


@pytest.mark.filterwarnings("ignore:overflow")
@settings(DRAWN, max_examples=10)
@given(books(modes_of=("portfolio",)))
def test_drawn_books_under_portfolio_margin(whole: Book) -> None:
    check_all(whole)


def test_a_root_far_below_the_mark_is_as_exact_as_one_near_it() -> None:
    # at two ten-thousandths of DOGE's mark what is close on the scale of the mark is far on that of the price
    rows = (
        greeks("ETH", 67_153.81326656364, 0.0015, gamma=1.1),
        greeks("ETH", 2_250.579569140709, -1.5),
        option(
            "DOGE", "put", "short", 271_177.9009159472, 0.3, 3.496763, 1.9001295695053284, forward=0.19896069130878782
        ),
        option(
            "DOGE", "put", "short", 255_774.9982101664, 0.08, 262.783373, 0.7495016876435386, rate=0.1278181775832937
        ),
        option("DOGE", "call", "long", 326_213.12692733086, 0.4252895305037512, 33.486835, 2.4190401577852283),
    )
    whole = book(*rows, held={"SOL": 0.0024}, mode="portfolio", prices={**P, "DOGE": 0.2})
    check_all(replace(whole, regime="sideways"))


@pytest.mark.parametrize("mode", MODES)
def test_a_book_that_no_price_can_hurt_has_no_liquidation_price(mode: MarginMode) -> None:
    safe = book(linear("BTC-PERP", "long", 1.0), held={"USDC": 70_000.0}, mode=mode, prices=P)
    quote = safe.quote(models=())
    assert quote.distances.to_liquidation is None
    assert quote.distances.to_breach is None
    assert math.isnan(quote.liquidation_move[0])
    assert not quote.breached[0]
    assert not quote.distances.breached


@pytest.mark.parametrize("mode", MODES)
def test_breached(mode: MarginMode) -> None:
    quote = replace(BOOKS["insolvent"], mode=mode).quote(models=())
    assert quote.breached.all()
    assert quote.distances.breached
    assert quote.distances.liquidatable


def test_breached_by_utilization_alone() -> None:
    high = book(linear("BTC-PERP", "long", 1.0), held={"USDC": 21_000.0}, prices=P).quote().distances
    assert (high.breached, high.liquidatable) == (True, False)


def test_a_stable_price_takes_no_part_in_the_common_move() -> None:
    rows = linear("USDC-PERP", "long", 100_000.0), linear("BTC-PERP", "long", 0.2)
    move = book(*rows, held={"USDC": 25_000.0}, prices=P).quote(models=()).distances.to_liquidation
    # 25,000 + 12,000 m = .15 x (100,000 + 12,000 (1 + m))
    assert move == pytest.approx((15_000 + 1_800 - 25_000) / (12_000 - 1_800))


def test_a_breached_hedge_that_a_rise_would_cure() -> None:
    # maintenance falls, then rises again, as BTC rises; equity does not depend on it: two roots, the nearer counts
    whole = Book(
        rows=(linear("ETH-PERP", "short", 100_000 / 3_000), linear("BTC-PERP", "long", 1.0)),
        held=(Holding("USDC", 32_200.0),),
        owed=(Holding("BTC", 1.0),),
        prices={**P, "BTC": 20_000.0},
        mode="portfolio",
    )
    assert surplus(whole) < 0 < surplus(whole.moved({"BTC": 1.0}))
    move = float(whole.quote(models=()).liquidation_move[1])
    assert 0.5 < move < 0.7
    assert surplus(whole.moved({"BTC": move})) == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("mode", ["cross", "isolated"])
def test_a_book_of_long_options_has_no_price_to_fear(mode: MarginMode) -> None:
    # its margin is its value, whatever that is
    rows = option("BTC", "call", "long", 1.0, 60_000.0, 30, 0.5), option("BTC", "put", "long", 1.0, 60_000.0, 9, 0.5)
    quote = book(*rows, held={"USDC": 5_000.0}, mode=mode, prices=P).quote(models=())
    assert quote.distances.to_liquidation is None
    assert all(math.isnan(m) for m in quote.liquidation_move.tolist())
