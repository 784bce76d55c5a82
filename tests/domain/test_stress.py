"""Shocks of many markets at once, held against a new request at each shocked market."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.domain.collateral import CollateralTerms
from app.domain.margin.result import MarginTerms
from app.domain.parameters import REGIMES, CorrelationTable, MarginMode, Regime
from app.domain.quote import QuoteTerms, account_figures
from app.domain.scenarios import NAMED, Scenario
from app.domain.stress import TWENTY_PERCENT, StressAccount, market_shocks, price_shocks, stress, stress_account
from app.errors import InvalidError
from tests.domain.book import (
    NOW,
    PRICES,
    STABLES,
    Book,
    Holding,
    book,
    columns,
    greeks,
    is_option,
    linear,
    option,
)
from tests.domain.drawn import between, books

DRAWN = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
P = {k: PRICES[k] for k in ("BTC", "ETH", "SOL", "USDC", "USDT")}


def terms_of(whole: Book) -> QuoteTerms:
    return QuoteTerms(
        positions=columns(whole.rows),
        margin=MarginTerms(parameters=whole.parameters(), regime=whole.regime),
        collateral=[CollateralTerms(h.asset, h.amount, None, h.lent) for h in whole.held],
        liabilities=[CollateralTerms(h.asset, h.amount) for h in whole.owed],
        margin_mode=whole.mode,
        reserved=whole.reserved,
        prices=whole.prices,
    )


def account_of(whole: Book) -> StressAccount:
    return stress_account(terms_of(whole), {}, NOW)


def pinned(whole: Book) -> Book:
    """Return the book with every allocation spelt out: one that is left out is posted once, at entry."""
    allocated = account_of(whole).whole.allocated.tolist()
    rows = tuple(
        {**row, "allocated_collateral": posted} if row.get("margin_mode") == "isolated" else row
        for row, posted in zip(whole.rows, allocated, strict=True)
    )
    return replace(whole, rows=rows)


def shocked(whole: Book, scenario: Scenario) -> Book:
    """Return the same book as a request at the scenario's market."""
    moves = {n: max(scenario.shocks.get(n, 0.0 if n in STABLES else scenario.price_move), 1e-6 - 1) for n in PRICES}
    rows: list[dict[str, Any]] = []
    booked = 0.0
    for row in whole.moved(moves).rows:
        if is_option(row):
            row["iv"] = max(row["iv"] * (1 + scenario.vol_move), 0.01)
        profit = (row.get("vega") or 0.0) * scenario.vol_move
        booked += profit
        if row.get("margin_mode") == "isolated":
            row["allocated_collateral"] += profit
        rows.append(row)
    moved = whole.moved(moves)
    more = (Holding("USDT", booked / moved.prices["USDT"]),)
    return replace(
        moved,
        rows=tuple(rows),
        held=moved.held + more if booked > 0 else moved.held,
        owed=moved.owed + tuple(h._replace(amount=-h.amount) for h in more) if booked < 0 else moved.owed,
    )


def check(whole: Book, scenarios: Sequence[Scenario]) -> None:
    whole = pinned(whole)
    account = account_of(whole)
    found = stress(account, market_shocks(scenarios, account))
    policy = whole.parameters().policy
    before = account_figures(terms_of(whole), {}, NOW)
    for s, scenario in enumerate(scenarios):
        after = account_figures(terms_of(shocked(whole, scenario)), {}, NOW)
        scale = 1e-9 * (
            1 + after.gross_notional + before.gross_notional + sum(h.amount * PRICES[h.asset] for h in whole.held)
        )
        health, got = after.health, found.scales[s]
        assert found.equity[s] == pytest.approx(after.equity, abs=scale)
        assert found.pool_equity[s] == pytest.approx(health.equity, abs=scale)
        assert found.required_initial[s] == pytest.approx(health.required_initial, rel=1e-9, abs=scale)
        assert found.required_maintenance[s] == pytest.approx(health.required_maintenance, rel=1e-9, abs=scale)
        assert found.pnl[s] + found.collateral_change[s] == pytest.approx(after.equity - before.equity, abs=scale)
        if abs(health.equity) > 1e3 * scale:
            assert got.insolvent == health.insolvent
            near = [policy.zone_yellow, policy.zone_orange, policy.zone_red, policy.status_danger, 1.0]
            if not any(abs((health.utilization or 0) - x) + abs((health.margin_ratio or 0) - x) < 1e-6 for x in near):
                assert (got.zone, got.alert_level, got.status) == (health.zone, health.alert_level, health.status)


SHOCKS = st.dictionaries(st.sampled_from(("BTC", "ETH", "SOL", "DOGE")), between(-0.9, 1.5), max_size=3)
SCENARIOS = st.lists(
    st.builds(Scenario, between(-0.95, 2.0), between(-0.6, 1.5), SHOCKS),
    min_size=1,
    max_size=4,
)


@DRAWN
@given(whole=books(), scenarios=SCENARIOS)
def test_every_shock_is_the_account_at_its_market(whole: Book, scenarios: list[Scenario]) -> None:
    check(whole, scenarios)


BOOKS = {
    "linear": book(
        linear("BTC-PERP", "long", 2.0, entry_price=58_000.0, leverage=4.0),
        linear("ETH-PERP", "short", 20.0),
        held={"USDC": 40_000.0, "SOL": 50.0},
        prices=P,
    ),
    "options": book(
        option("BTC", "call", "short", 1.0, 60_000.0, 14, 0.6),
        option("BTC", "put", "long", 2.0, 50_000.0, 90, 0.7),
        option("ETH", "put", "short", 10.0, 2_800.0, 30, 0.8),
        held={"USDC": 80_000.0, "BTC": 0.3},
        prices=P,
    ),
    "greeks": book(
        greeks("BTC", 100_000.0, 0.4, gamma=-3.0, vega=-500.0),
        greeks("BTC", 50_000.0, -0.9, gamma=2.0),
        greeks("ETH", 9_000.0, -0.8, gamma=0.5, vega=700.0),
        held={"USDC": 30_000.0},
        prices=P,
    ),
    "isolated beside pooled": book(
        linear("BTC-PERP", "long", 1.0, margin_mode="isolated", leverage=5.0),
        option("BTC", "put", "short", 1.0, 50_000.0, 30, 0.6, margin_mode="isolated", allocated_collateral=15_000.0),
        linear("ETH-PERP", "long", 5.0),
        held={"USDC": 60_000.0, "BTC": 0.2},
        prices=P,
    ),
    "long options alone": book(option("BTC", "call", "long", 1.0, 60_000.0, 30, 0.5), held={"USDC": 900.0}, prices=P),
    "options that nearly offset": book(
        option("BTC", "call", "long", 3.0, 60_000.0, 30, 0.5),
        option("BTC", "call", "short", 3.0, 60_010.0, 30, 0.5),
        held={"USDC": 90_000.0},
        prices=P,
    ),
    "a coin lent and one owed": Book(
        rows=(linear("SOL-PERP", "short", 100.0),),
        held=(Holding("USDC", 50_000.0), Holding("ETH", 4.0, lent=3.0)),
        owed=(Holding("BTC", 0.2),),
        prices=P,
    ),
    "flat": book(linear("BTC-PERP", "long", 0.0), held={"BTC": 1.0}, prices=P),
    "nothing": Book(prices=P),
    "limits": book(
        linear("BTC-PERP", "long", 2.0),
        greeks("SOL", 90_000.0, 0.5, gamma=1.0),
        held={"USDC": 90_000.0},
        assets={"BTC": {"concentration_limit": 0.5}, "SOL": {"concentration_limit": 100.0}},
        prices=P,
    ),
}
WILD = (
    *NAMED["moderate"],
    *NAMED["wide"],
    *TWENTY_PERCENT,
    Scenario(-0.9, 2.0, {"BTC": -0.99, "SOL": 4.0}),
    Scenario(0.0, -0.999),
    Scenario(-1.0, 0.0),
    Scenario(0.0, 0.0, {"USDC": -0.12}),
    Scenario(-0.1, 0.3, {"ETH": 0.0, "USDC": 0.01}),
)


@pytest.mark.parametrize("mode", ["cross", "isolated", "portfolio"])
@pytest.mark.parametrize("name", BOOKS)
def test_sets_extremes_and_depegs(name: str, mode: MarginMode) -> None:
    check(replace(BOOKS[name], mode=mode), WILD)


@pytest.mark.parametrize("name", BOOKS)
def test_a_set_whose_matrix_needs_a_repair(name: str) -> None:
    pairs = {("BTC", "ETH"): 1.0, ("ETH", "SOL"): 1.0, ("BTC", "SOL"): 0.0}
    broken = CorrelationTable(MappingProxyType(pairs), 0.8)
    check(replace(BOOKS[name], mode="portfolio", stress=broken), WILD)


def test_blocks_of_scenarios_are_the_scenarios_one_by_one() -> None:
    rows = tuple(option("BTC", "call", "short", 0.01 * k, 40_000.0 + 400 * k, 10 + k, 0.6) for k in range(1, 121))
    rng = np.random.default_rng(3)
    scenarios = [Scenario(float(m), float(v)) for m, v in rng.uniform(-0.5, 0.5, (400, 2))]
    for mode in ("cross", "portfolio"):
        account = account_of(book(*rows, linear("ETH-PERP", "long", 3.0), held={"USDC": 9e5}, mode=mode, prices=P))
        found = stress(account, market_shocks(scenarios, account))
        for s in (0, 1, 199, 272, 273, 399):
            alone = stress(account, market_shocks(scenarios[s : s + 1], account))
            assert found.equity[s] == pytest.approx(alone.equity[0], rel=1e-12)
            assert found.required_initial[s] == pytest.approx(alone.required_initial[0], rel=1e-12)


def test_the_named_set_of_section_two() -> None:
    whole = book(greeks("BTC", 10_000.0, 1.0, gamma=0.001), greeks("ETH", 8_000.0, -0.8, gamma=0.001), prices=P)
    account = account_of(whole)
    found = stress(account, market_shocks(NAMED["moderate"], account))
    assert found.pnl[4] == pytest.approx(-539.7975)
    assert found.worst == 4


def test_span_moves_are_multiples_of_each_assets_range_taken_whole() -> None:
    account = account_of(book(linear("BTC-PERP", "long", 1.0), held={"SOL": 10.0, "USDC": 1.0}, prices=P))
    found = stress(account, market_shocks(NAMED["span16"], account))
    assert found.pnl[15] == pytest.approx(-60_000 * 0.30)
    assert found.collateral_change[15] == pytest.approx(-10 * 150 * 0.85 * 0.40)


@pytest.mark.parametrize("mode", ["cross", "isolated", "portfolio"])
@pytest.mark.parametrize("name", [name for name in BOOKS if name not in ("flat", "nothing")])
def test_the_lesser_survival_of_twenty_percent_is_healths(name: str, mode: MarginMode) -> None:
    account = account_of(pinned(replace(BOOKS[name], mode=mode)))
    found = stress(account, market_shocks(TWENTY_PERCENT, account))
    health = account_figures(terms_of(replace(BOOKS[name], mode=mode)), {}, NOW).health
    assert float(np.nanmin(found.survival)) == pytest.approx(health.stress_survival)


def test_stablecoins_stand_still_unless_named() -> None:
    account = account_of(book(held={"USDC": 100.0, "USDT": 50.0, "BTC": 1.0}, prices=P))
    scenarios = [Scenario(-0.5, 0.0), Scenario(-0.5, 0.0, {"USDT": -0.2}), Scenario(0.0, 0.0, {"USDC": -2.0})]
    found = stress(account, market_shocks(scenarios, account))
    assert found.collateral_change == pytest.approx([-27_000, -27_010, -100 * (1 - 1e-6)])


def test_reservations_in_a_coin_move_with_it() -> None:
    whole = book(linear("ETH-PERP", "long", 1.0), held={"BTC": 1.0, "USDC": 5e4}, reserved=10_000.0, prices=P)
    account = stress_account(terms_of(whole), {}, NOW, {"BTC": 6_000.0, "XRP": 1_000.0})
    grid = market_shocks([Scenario(0.0, 0.0, {"BTC": -0.5}), Scenario(0.0, 0.0, {"XRP": 1.0})], account)
    fixed = stress(account_of(whole), market_shocks([Scenario(0.0, 0.0)] * 2, account_of(whole)))
    found = stress(account, grid)
    assert found.required_initial - fixed.required_initial == pytest.approx([-3_000, 1_000])
    assert found.required_maintenance - fixed.required_maintenance == pytest.approx([-3_000, 1_000])


def test_isolated_positions_are_liquidated_on_their_own() -> None:
    whole = BOOKS["isolated beside pooled"]
    quote = pinned(whole).quote(models=())
    prices = [60_000 * (1 + m) for m in quote.liquidation_move[:2].tolist()]
    account = account_of(whole)
    moves = [p / 60_000 - 1 for price in prices for p in (price * 0.999, price * 1.001)]
    found = stress(account, market_shocks([Scenario(0.0, 0.0, {"BTC": m}) for m in moves], account))
    assert found.isolated == tuple(quote.portfolio.symbols[:2])
    assert found.isolated_liquidated[0, :2].tolist() == [True, False]
    assert found.isolated_liquidated[1, 2:].tolist() == [True, False]


def test_breach_is_utilization_at_the_level_or_equity_below_maintenance() -> None:
    # the worked account of section 1 breaches at 37,812.79 and is liquidated at 30,769.23
    whole = book(
        linear("BTC-PERP", "long", 1.0, entry_price=60_000.0, leverage=3.0),
        held={"USDC": 20_000.0, "BTC": 0.5},
        prices={**P, "BTC": 61_000.0},
    )
    account = account_of(whole)
    at = [37_812.80, 37_812.78, 30_769.24, 30_769.22]
    found = stress(account, market_shocks([Scenario(price / 61_000 - 1, 0.0) for price in at], account))
    assert found.breached.tolist() == [False, True, True, True]
    assert [s.status == "LIQUIDATION" for s in found.scales] == [False, False, False, True]
    assert found.scales[0].zone == "ORANGE"
    assert found.scales[1].zone == "RED"


@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_multiplies_portfolio_margin_alone(regime: Regime) -> None:
    multiplier = {"normal": 1.0, "sideways": 0.85, "sell_off": 1.5, "liquidity_crisis": 2.0}[regime]
    for mode, factor in (("portfolio", multiplier), ("cross", 1.0)):
        account = account_of(replace(BOOKS["linear"], mode=mode))  # type: ignore[arg-type]
        grid = market_shocks(NAMED["moderate"], account)
        found, normal = stress(account.under(regime), grid), stress(account, grid)
        assert found.required_initial == pytest.approx(normal.required_initial * factor)
        assert found.equity == pytest.approx(normal.equity)


def test_profit_by_asset_adds_up() -> None:
    account = account_of(BOOKS["isolated beside pooled"])
    found = stress(account, market_shocks(WILD, account))
    assert found.names == ("BTC", "ETH", "USDC")
    assert found.pnl_by_asset.sum(axis=0) == pytest.approx(found.pnl)
    assert found.collateral_by_asset.sum(axis=0) == pytest.approx(found.collateral_change)
    assert found.pnl_by_asset[1] == pytest.approx([15_000 * grid for grid in market_shocks(WILD, account).moves[1]])


def test_own_moves_of_prices_are_floored() -> None:
    account = account_of(book(linear("BTC-PERP", "long", 1.0), held={"USDC": 1.0}, prices=P))
    found = stress(account, price_shocks(np.array([[-3.0, 0.5], [0.0, 0.0]])))
    assert found.pnl == pytest.approx([-60_000 * (1 - 1e-6), 30_000])


def test_a_limit_in_units_needs_a_price() -> None:
    whole = Book(
        rows=(greeks("SOL", 1_000.0, 1.0),),
        held=(Holding("USDC", 9_000.0),),
        assets={"SOL": {"concentration_limit": 1.0}},
        prices={},
        mode="portfolio",
    )
    account = account_of(whole)
    with pytest.raises(InvalidError) as error:
        stress(account, market_shocks(TWENTY_PERCENT, account))
    assert error.value.code == "missing_price"
