"""Shocks of many markets at once, held against a new request at each shocked market."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.domain.collateral import CollateralTerms
from app.domain.margin.result import MarginTerms
from app.domain.parameters import REGIMES, MarginMode
from app.domain.quote import QuoteTerms, account_figures
from app.domain.scenarios import NAMED, Scenario
from app.domain.stress import TWENTY_PERCENT, StressAccount, market_shocks, stress, stress_account
from tests.domain.book import NOW, PRICES, STABLES, Book, Holding, book, columns, greeks, is_option, linear, option, underlying_of
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
        scale = 1e-9 * (1 + after.gross_notional + before.gross_notional + sum(h.amount * PRICES[h.asset] for h in whole.held))
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
