"""Collateral feedback: the worked step, the loop against a plain one, and what every loop must keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.domain.feedback import Feedback, FeedbackTerms, collateral_step, feedback
from app.domain.parameters import MarginMode, ModelParameters
from app.domain.quote import account_figures
from app.domain.scenarios import Scenario
from app.domain.stress import market_shocks
from app.errors import InvalidError
from tests.domain.book import NOW, PRICES, Book, Holding, book, greeks, linear, option
from tests.domain.drawn import between, books
from tests.domain.test_stress import P, account_of, pinned, terms_of

DEEP = dict.fromkeys(PRICES, 1e30)
MODES: tuple[MarginMode, ...] = ("cross", "isolated", "portfolio")


def run(whole: Book, move: float, adv: Mapping[str, float], *, vol: float = 0.0, **terms: Any) -> Feedback:
    account = account_of(pinned(whole))
    given_terms = FeedbackTerms(adv, **{"impact": 0.10, "slippage": 0.03, **terms})
    return feedback(account, market_shocks([Scenario(move, vol)], account), given_terms)


def test_the_defaults_are_parameters() -> None:
    assert (ModelParameters().impact_coefficient, ModelParameters().forced_sale_slippage) == (0.10, 0.03)


def test_one_step_worked() -> None:
    whole = book(held={"BTC": 0.5, "USDC": 10_000.0}, prices={"BTC": 50_000.0})
    step = collateral_step(account_of(whole).collateral, np.array([-0.30, 0.0]), 0.03)
    assert (step.before, step.after, step.drop) == pytest.approx((32_500.0, 25_225.0, 7_275.0))
    assert step.drop_share == pytest.approx(0.224, abs=5e-4)


def test_a_step_takes_no_more_than_there_is_and_leaves_debts_out() -> None:
    whole = Book(held=(Holding("DOGE", 1_000.0), Holding("USDC", 10.0)), owed=(Holding("BTC", 1.0),))
    step = collateral_step(account_of(whole).collateral, np.array([-0.5, -0.1, -0.5]), 0.60)
    assert step.before == pytest.approx(1_000 * 0.2 * 0.5 + 10)
    assert step.after == pytest.approx(9.0)  # haircut and slippage are over 1: the coin counts for nothing
    empty = collateral_step(account_of(book(prices=P)).collateral, np.empty(0), 0.03)
    assert (empty.before, empty.after, empty.drop_share) == (0.0, 0.0, 0.0)


def plain_loop(size: float, coins: float, cash: float, price: float, move: float, adv: float) -> list[dict[str, float]]:
    """Return the rounds of a long BTC position with BTC and USDC as collateral, in cross mode: plain arithmetic."""
    entry, rounds = price, []
    price *= 1 + move
    for _ in range(100):
        collateral = cash + coins * price * (1 - 0.10 - 0.03)
        equity = collateral + size * (price - entry)
        required = 0.30 * size * price
        found = {"price": price, "collateral": collateral, "equity": equity, "required": required, "sold": 0.0}
        rounds.append(found)
        if equity <= 0 or (required / equity < 0.85 and equity >= 0.15 * size * price):
            break
        # the least x with .30·size·(1-x)·price = .75·(equity + x·coins·price·.10)
        low, high = 0.0, 1.0
        for _ in range(200):
            x = (low + high) / 2
            enough = 0.30 * size * (1 - x) * price <= 0.75 * (equity + x * coins * price * 0.10)
            low, high = (low, x) if enough else (x, high)
        cash += high * (size * (price - entry) + coins * price * 0.97)
        found["sold"] = high * (size + coins) * price
        size, coins = size * (1 - high), coins * (1 - high)
        price *= 1 - 0.10 * math.sqrt(found["sold"] / adv)
    return rounds


@pytest.mark.parametrize(
    ("size", "coins", "cash", "move", "adv", "outcome", "count"),
    [
        (1.0, 0.5, 20_000.0, -0.05, 1e6, "stable", 1),
        (2.0, 1.0, 20_000.0, -0.30, 5e6, "stable", 2),
        (4.0, 2.0, 20_000.0, -0.30, 1e5, "stable", 4),
        (3.0, 2.0, 0.0, -0.20, 2e4, "stable", 7),
        (3.0, 2.0, 0.0, -0.35, 2e4, "insolvent", 2),
        (2.0, 2.0, 0.0, -0.70, 1e6, "insolvent", 1),
    ],
)
def test_the_loop_is_the_plain_one(
    size: float, coins: float, cash: float, move: float, adv: float, outcome: str, count: int
) -> None:
    whole = book(linear("BTC-PERP", "long", size, entry_price=60_000.0), held={"BTC": coins, "USDC": cash}, prices=P)
    found = run(whole, move, {"BTC": adv})
    expected = plain_loop(size, coins, cash, 60_000.0, move, adv)
    assert found.outcome == outcome
    assert len(found.rounds) == len(expected) == count
    btc = found.names.index("BTC")
    for ours, theirs in zip(found.rounds, expected, strict=True):
        assert 60_000 * (1 + ours.moves[btc]) == pytest.approx(theirs["price"], rel=1e-9)
        assert ours.collateral_value == pytest.approx(theirs["collateral"], rel=1e-9)
        assert ours.equity == pytest.approx(theirs["equity"], abs=1e-4)
        assert ours.required_initial == pytest.approx(theirs["required"], rel=1e-9, abs=1e-4)
        assert ours.sold[btc] == pytest.approx(theirs["sold"] if ours.equity > 0 else ours.sold[btc], rel=1e-9)


def test_without_a_call_there_is_one_round_and_no_sale() -> None:
    found = run(book(linear("BTC-PERP", "long", 0.1), held={"USDC": 50_000.0}, prices=P), -0.1, {"BTC": 1e6})
    assert found.outcome == "stable"
    assert [(r.call, r.fraction, r.sold.tolist()) for r in found.rounds] == [(False, 0.0, [0.0, 0.0])]


def test_shorts_are_bought_back_and_drive_the_price_up() -> None:
    whole = book(linear("BTC-PERP", "short", 1.0), held={"USDC": 30_000.0}, prices=P)
    first, second, *_ = run(whole, 0.15, {"BTC": 1e7}).rounds
    assert first.call
    assert first.sold[0] == pytest.approx(-first.fraction * 69_000)
    assert first.impact[0] == pytest.approx(0.10 * math.sqrt(first.fraction * 69_000 / 1e7))
    assert 1 + second.moves[0] == pytest.approx(1.15 * (1 + first.impact[0]))


def test_an_asset_without_a_volume_is_named() -> None:
    whole = book(linear("ETH-PERP", "long", 1.0), held={"BTC": 1.0, "SOL": 1.0, "USDC": 5.0}, prices=P)
    with pytest.raises(InvalidError) as error:
        run(whole, -0.1, {"BTC": 1e6, "SOL": 0.0})
    assert error.value.code == "missing_adv"
    assert [(e.pointer, e.code) for e in error.value.errors] == [
        ("/adv/ETH", "missing_adv"),
        ("/adv/SOL", "missing_adv"),
    ]


def test_what_is_reserved_can_outlast_all_there_is_to_sell() -> None:
    whole = book(held={"BTC": 1.0}, reserved=54_000.0, prices=P)
    found = run(whole, -0.30, {"BTC": 1e12})
    assert found.outcome == "sold_out"
    assert found.rounds[-1].collateral_value == pytest.approx(60_000 * 0.7 * 0.97, rel=1e-9)


def test_lent_coins_are_not_sold() -> None:
    whole = Book(rows=(linear("BTC-PERP", "long", 1.0),), held=(Holding("BTC", 0.6, lent=0.6),), prices=P)
    first = run(whole, -0.3, {"BTC": 1e9}).rounds[0]
    assert first.collateral_value == pytest.approx(0.6 * 42_000 * (0.9 - 0.03 - 0.05))
    assert first.sold[0] == pytest.approx(first.fraction * 42_000)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(whole=books(), move=between(-0.6, 0.6), adv=st.floats(5.0, 10.0).map(lambda x: 10**x))
def test_every_loop_ends_where_it_says(whole: Book, move: float, adv: float) -> None:
    found = run(whole, move, dict.fromkeys(PRICES, adv))
    policy = whole.parameters().policy
    assert found.outcome != "rounds_max"
    for here, after in zip(found.rounds, found.rounds[1:], strict=False):
        assert here.call
        assert 0 < here.fraction <= 1
        assert after.moves == pytest.approx(np.maximum((1 + here.moves) * (1 + here.impact) - 1, 1e-6 - 1))
        assert (np.abs(here.impact) <= 0.10 * np.sqrt(np.abs(here.sold) / adv) * (1 + 1e-12)).all()
    last = found.rounds[-1]
    assert last.call == (found.outcome != "stable")
    if found.outcome == "insolvent":
        assert last.equity <= 0
    if found.outcome == "stable" and last.required_initial > 0:
        assert last.utilization is not None
        assert last.utilization < policy.breach_utilization


@pytest.mark.parametrize("mode", MODES)
def test_a_sale_without_impact_ends_at_the_stop(mode: MarginMode) -> None:
    rows = (
        linear("BTC-PERP", "long", 1.0, entry_price=58_000.0),
        linear("ETH-PERP", "short", 10.0),
        option("BTC", "put", "short", 0.5, 55_000.0, 30, 0.6),
        greeks("SOL", 9_000.0, 0.3, gamma=1.5, vega=-4_000.0),
    )
    cash = {"cross": 14_000.0, "isolated": 28_000.0, "portfolio": 5_000.0}[mode]
    whole = book(*rows, held={"USDC": cash, "SOL": 100.0}, reserved=500.0, mode=mode, prices=P)
    found = run(whole, -0.15, DEEP, vol=0.2)
    assert [r.call for r in found.rounds] == [True, False]
    assert found.rounds[-1].utilization == pytest.approx(0.75, abs=1e-9)


def test_the_first_round_is_the_account_at_the_shock() -> None:
    whole = book(linear("BTC-PERP", "long", 1.0), held={"USDC": 20_000.0, "ETH": 2.0}, mode="portfolio", prices=P)
    first = run(whole, -0.10, {"BTC": 1e7, "ETH": 1e7}, slippage=0.0).rounds[0]
    health = account_figures(terms_of(whole.common(-0.10)), {}, NOW).health
    assert (first.equity, first.required_initial, first.required_maintenance) == pytest.approx(
        (health.equity, health.required_initial, health.required_maintenance)
    )
    assert first.utilization == pytest.approx(health.utilization)
