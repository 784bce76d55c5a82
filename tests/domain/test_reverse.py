"""Reverse stress: at its answer a new request sits on the boundary, and nearer moves stay on this side of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from app.domain.quote import account_figures
from app.domain.reverse import BOUNDARIES, Boundary, Reach, reverse_stress
from tests.domain.book import NOW, STABLES, Book, Holding, book, linear, option
from tests.domain.drawn import books
from tests.domain.test_stress import P, account_of, pinned, terms_of

DRAWN = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
STEPS = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)


def left(whole: Book, boundary: Boundary) -> float:
    """Return how much is left before a boundary, USD, of a new request."""
    health = account_figures(terms_of(whole), {}, NOW).health
    spare = health.equity - health.required_maintenance
    room = 0.85 * health.equity - health.required_initial
    return {"breach": min(spare, room), "liquidation": spare, "zero_equity": health.equity}[boundary]


def moved(whole: Book, asset: str | None, move: float) -> Book:
    return whole.common(move) if asset is None else whole.moved({asset: move})


def size_of(whole: Book) -> float:
    held = sum(h.amount * whole.prices[h.asset] for h in (*whole.held, *whole.owed))
    return float(account_of(whole).whole.notional.sum()) + held + whole.reserved


def check_reach(whole: Book, asset: str | None, boundary: Boundary, found: Reach, *, every: bool) -> None:
    scale = size_of(whole)
    here = left(whole, boundary)
    if abs(here) <= 1e-7 * scale:
        return
    assert found.already == (here < 0)
    if found.already:
        assert (found.down, found.up) == (0.0, 0.0)
        return
    for move, far in ((found.down, -0.999), (found.up, 20.0)):
        if move is not None:
            assert (move < 0) == (far < 0)
            at = left(moved(whole, asset, move), boundary)
            assert at == pytest.approx(0.0, abs=1e-6 * scale * max(1.0, 1 + move))
        if every:
            for step in STEPS:
                nearer = step * (far if move is None else move)
                rest = left(moved(whole, asset, nearer), boundary)
                assert rest > -1e-7 * scale * max(1.0, 1 + nearer)


def check(whole: Book, *, every: bool = True) -> None:
    whole = pinned(whole)
    account = account_of(whole)
    found = reverse_stress(account)
    coins = [name for name in account.names if name not in STABLES]
    assert list(found.by_asset) == coins
    for boundary in BOUNDARIES:
        check_reach(whole, None, boundary, found.common[boundary], every=every)
        for asset in coins:
            check_reach(whole, asset, boundary, found.by_asset[asset][boundary], every=every)


@DRAWN
@given(whole=books(modes_of=("cross", "isolated")))
def test_additive_accounts_sit_on_the_boundary(whole: Book) -> None:
    check(whole, every=False)


@settings(DRAWN, max_examples=25)
@given(whole=books(modes_of=("portfolio",)))
def test_portfolio_accounts_sit_on_the_boundary(whole: Book) -> None:
    check(whole, every=False)


def test_the_worked_account() -> None:
    # section 1: liquidation at 30,769.23 and breach at 37,812.79 from a mark of 61,000
    whole = book(
        linear("BTC-PERP", "long", 1.0, entry_price=60_000.0, leverage=3.0),
        held={"USDC": 20_000.0, "BTC": 0.5},
        prices={**P, "BTC": 61_000.0},
    )
    found = reverse_stress(account_of(whole))
    for reach in (found.common, found.by_asset["BTC"]):
        assert 61_000 * (1 + (reach["breach"].down or 0)) == pytest.approx(37_812.79, abs=0.01)
        assert 61_000 * (1 + (reach["liquidation"].down or 0)) == pytest.approx(30_769.23, abs=0.01)
        # 20,000 + .5·.9·p + (p - 60,000) = 0
        assert 61_000 * (1 + (reach["zero_equity"].down or 0)) == pytest.approx(40_000 / 1.45)
        assert [reach[b].up for b in BOUNDARIES] == [None, None, None]
    check(whole)


CASES = {
    "short": book(linear("BTC-PERP", "short", 2.0), held={"USDC": 60_000.0}, prices=P),
    "short straddle": book(
        option("BTC", "call", "short", 1.0, 60_000.0, 14, 0.6),
        option("BTC", "put", "short", 1.0, 60_000.0, 14, 0.6),
        held={"USDC": 45_000.0, "BTC": 0.1},
        prices=P,
    ),
    "collateral in another coin": book(linear("BTC-PERP", "long", 1.0), held={"ETH": 18.0, "SOL": 150.0}, prices=P),
    "reserved": book(linear("SOL-PERP", "long", 500.0), held={"USDC": 50_000.0}, reserved=9_000.0, prices=P),
    "debt in the coin": Book(
        rows=(linear("BTC-PERP", "long", 0.5),),
        held=(Holding("USDC", 90_000.0),),
        owed=(Holding("BTC", 1.0),),
        prices=P,
    ),
    "hedged": book(
        linear("BTC-PERP", "long", 2.0), linear("ETH-PERP", "short", 40.0), held={"USDC": 40_000.0}, prices=P
    ),
}


@pytest.mark.parametrize("mode", ["cross", "isolated", "portfolio"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_nearer_reaches_it(name: str, mode: str) -> None:
    check(replace(CASES[name], mode=mode))  # type: ignore[arg-type]


def test_a_straddle_breaches_either_way() -> None:
    found = reverse_stress(account_of(CASES["short straddle"])).common["liquidation"]
    assert found.down is not None
    assert found.up is not None


def test_collateral_alone_can_breach() -> None:
    found = reverse_stress(account_of(CASES["collateral in another coin"]))
    assert found.by_asset["ETH"]["breach"].down is not None
    assert found.by_asset["ETH"]["breach"].up is None


def test_what_is_breached_already_is_said_to_be() -> None:
    whole = book(linear("BTC-PERP", "long", 2.0), held={"USDC": 41_000.0}, prices=P)
    found = reverse_stress(account_of(whole)).common
    assert found["breach"] == Reach(0.0, 0.0, already=True)
    assert not found["liquidation"].already


def test_nothing_open_has_nothing_to_fear() -> None:
    found = reverse_stress(account_of(book(held={"USDC": 100.0, "BTC": 1.0}, prices=P)))
    assert all(reach == Reach(None, None, already=False) for reach in found.common.values())
    assert reverse_stress(account_of(book(prices=P))).by_asset == {}
