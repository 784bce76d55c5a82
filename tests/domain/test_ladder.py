"""The drawdown ladder: rungs, what each keeps of the gross notional, and bands in which there is nothing to tell."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import ladder
from app.domain.book import AccountSettings, Book, Holding, OpenPosition, Side
from app.domain.parameters import HealthPolicy, MarketParameters
from app.domain.prices import StoredPrice
from app.domain.quote import AccountFigures, account_figures
from app.domain.watch import clear_level, drawdown, quiet_band

POLICY = HealthPolicy()
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PRICES = {"BTC": Decimal(50_000), "ETH": Decimal(2_500), "SOL": Decimal(100)}
STORED = {name: StoredPrice(float(price), NOW) for name, price in PRICES.items()}


def position(symbol: str, side: Side, size: str, *, reducible: bool = True) -> OpenPosition:
    entry = PRICES[symbol.partition("-")[0]]
    return OpenPosition(
        f"pos_{symbol}", symbol, side, Decimal(size), entry, None, "pooled", Decimal(0), Decimal(0), reducible, NOW
    )


def book(*positions: OpenPosition, usdc: str = "100000") -> Book:
    return Book("agent", AccountSettings(), 1, {"USDC": Holding(Decimal(usdc))}, positions, [])


def figures(held: Book) -> AccountFigures:
    return account_figures(held.quote_terms(MarketParameters(), STORED), STORED, NOW)


def gross_after(held: Book, cuts: list[ladder.Cut]) -> float:
    """Return the gross notional once the orders are filled, added up by hand."""
    left = {p.id: p.size for p in held.positions}
    for cut in cuts:
        assert cut.order.reduce_only
        assert cut.order.side == ("sell" if cut.position.side == "long" else "buy")
        left[cut.position.id] -= cut.size
        assert left[cut.position.id] >= 0
    return float(sum(left[p.id] * PRICES[p.symbol.partition("-")[0]] for p in held.positions))


@pytest.mark.parametrize(
    ("fallen", "rung"),
    [
        (0.0, 0), (0.0499, 0), (0.05, 1), (0.0799, 1), (0.08, 2), (0.1199, 2), (0.12, 3), (0.18, 3), (0.1801, 4),
        (0.99, 4), (1.5, 4),
    ],
)  # fmt: skip
def test_rungs(fallen: float, rung: int) -> None:
    assert ladder.rung_at(fallen, POLICY) == rung


@pytest.mark.parametrize(
    ("before", "fallen", "after"),
    [(0, 0.051, 1), (1, 0.049, 1), (1, 0.031, 1), (1, 0.029, 0), (2, 0.061, 2), (2, 0.059, 1), (4, 0.161, 4),
     (4, 0.159, 3), (4, 0.0, 0), (3, 0.4, 4)],
)  # fmt: skip
def test_a_rung_is_left_upwards_only_when_clear_of_it(before: int, fallen: float, after: int) -> None:
    assert ladder.settled_rung(before, fallen, POLICY) == after


HELD = book(position("BTC-PERP", "long", "2"), position("ETH-PERP", "short", "20"), position("SOL-PERP", "long", "500"))
GROSS = 200_000.0


@pytest.mark.parametrize(("rung", "left"), [(0, 200_000), (1, 180_000), (2, 150_000), (3, 100_000), (4, 100_000)])
def test_what_each_rung_keeps(rung: int, left: float) -> None:
    asked = ladder.plan(HELD, figures(HELD), POLICY, rung, 0)
    assert asked.gross == pytest.approx(GROSS)
    assert gross_after(HELD, list(asked.cuts)) == pytest.approx(left, rel=1e-6)
    assert gross_after(HELD, list(asked.cuts)) <= left * (1 + 1e-12)


def test_the_way_down_does_not_matter() -> None:
    """By one rung at a time, or by all at once, as much is left."""
    gross = GROSS
    for rung in (1, 2, 3):
        gross *= ladder.kept_share(rung, POLICY) / ladder.kept_share(rung - 1, POLICY)
    assert gross == pytest.approx(ladder.plan(HELD, figures(HELD), POLICY, 3, 0).gross_target) == 100_000
    from_one = ladder.plan(HELD, figures(HELD), POLICY, 3, 1)
    assert from_one.gross_target == pytest.approx(GROSS * 5 / 9)


def test_minimum_viable_is_gross_within_equity() -> None:
    poor = book(*HELD.positions, usdc="60000")
    asked = ladder.plan(poor, figures(poor), POLICY, 4, 3)
    assert asked.gross_target == pytest.approx(60_000)
    assert gross_after(poor, list(asked.cuts)) == pytest.approx(60_000, rel=1e-6)
    broke = book(*HELD.positions, usdc="0")
    assert gross_after(broke, list(ladder.plan(broke, figures(broke), POLICY, 4, 3).cuts)) == 0


def test_what_is_not_reducible_stays_and_the_rest_makes_up_for_it() -> None:
    held = book(position("BTC-PERP", "long", "2", reducible=False), *HELD.positions[1:])
    asked = ladder.plan(held, figures(held), POLICY, 2, 0)
    assert {cut.position.symbol for cut in asked.cuts} == {"ETH-PERP", "SOL-PERP"}
    assert gross_after(held, list(asked.cuts)) == pytest.approx(150_000, rel=1e-6)


def test_hedges_are_advised_from_the_second_rung_on() -> None:
    """Net: BTC +100,000, ETH −50,000, SOL +50,000."""
    by_rung = [ladder.plan(HELD, figures(HELD), POLICY, rung, 0).hedges for rung in range(4)]
    assert list(by_rung[0]) == list(by_rung[1]) == []
    [put] = by_rung[2]
    assert (put.kind, put.underlying, put.side) == ("put", "BTC", "long")
    assert put.notional == pytest.approx(75_000)
    put, inverse = by_rung[3]
    assert put.notional == pytest.approx(50_000)
    assert (inverse.kind, inverse.underlying, inverse.side) == ("inverse", "BTC", "short")
    assert inverse.notional == pytest.approx(50_000)


def test_an_empty_book_asks_for_nothing() -> None:
    empty = book()
    asked = ladder.plan(empty, figures(empty), POLICY, 4, 0)
    assert (list(asked.cuts), list(asked.hedges)) == ([], [])


@given(
    peak=st.floats(1.0, 1e9),
    equity=st.floats(-1e9, 1e9),
    rung=st.integers(0, 4),
    stop=st.floats(0.01, 0.9),
    stopped=st.booleans(),
)
def test_within_the_band_there_is_nothing_to_tell(
    peak: float, equity: float, rung: int, stop: float, stopped: bool
) -> None:
    """The band of rung and stop is where neither would change, and no new peak is to be written down."""
    bounds = ladder.bounds(POLICY)
    falls = [*bounds[rung : rung + 1], *([] if stopped else [stop])]
    recoveries = [*(clear_level(b) for b in bounds[:rung][-1:]), *([clear_level(stop)] if stopped else [])]
    band = quiet_band(peak, falls, recoveries)
    if not band.low < equity < band.high:
        return
    fallen = drawdown(max(peak, equity), equity)
    assert ladder.settled_rung(rung, fallen, POLICY) == rung
    assert (fallen >= stop) is False or stopped
    assert not stopped or fallen >= clear_level(stop) * (1 - 1e-9)
    assert equity <= peak * 1.0001


def test_without_a_peak_the_account_is_looked_at() -> None:
    band = quiet_band(0.0, [0.1], [])
    assert not band.low < 1_000.0 < band.high
