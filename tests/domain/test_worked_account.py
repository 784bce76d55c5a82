"""The worked account of RISK.md section 1, every figure of it."""

from __future__ import annotations

import pytest

from tests.domain.book import Book, book, linear

ACCOUNT: Book = book(
    linear("BTC-PERP", "long", 1.0, entry_price=60_000.0, mark_price=61_000.0, leverage=3.0),
    held={"USDC": 20_000.0, "BTC": 0.5},
    prices={},
)


def test_health() -> None:
    quote = ACCOUNT.quote()
    health = quote.health
    assert quote.equity == health.equity == 48_450.0
    assert quote.unrealized_pnl == 1_000.0
    assert health.required_initial == pytest.approx(20_333.33, abs=0.005)
    assert health.required_maintenance == 9_150.0
    assert health.utilization == pytest.approx(0.41968, abs=5e-6)
    assert health.margin_ratio == pytest.approx(0.18885, abs=5e-6)
    assert health.stress_survival == pytest.approx(4.20219, abs=5e-6)
    assert health.headroom == pytest.approx(14_561.11, abs=0.005)
    assert health.free_margin == pytest.approx(28_116.67, abs=0.005)
    assert (health.zone, health.alert_level, health.status) == ("GREEN", "OK", "SAFE")
    assert health.model == "cross"


def test_liquidation_and_breach() -> None:
    quote = ACCOUNT.quote()
    assert 61_000 * (1 + quote.liquidation_move[0]) == pytest.approx(30_769.23, abs=0.005)
    distances = quote.distances
    assert distances.to_liquidation is not None
    assert distances.to_breach is not None
    assert 61_000 * (1 + distances.to_liquidation) == pytest.approx(30_769.23, abs=0.005)
    assert 61_000 * (1 + distances.to_breach) == pytest.approx(37_812.79, abs=0.005)
    assert not distances.breached
    assert not quote.breached.any()


def test_closed_form() -> None:
    # p* = p - (E - M) / (Q + c(1-h) - mQ+)
    root = 61_000 - (48_450 - 9_150) / (1 + 0.5 * 0.9 - 0.15 * 1)
    assert 61_000 * (1 + ACCOUNT.quote().liquidation_move[0]) == pytest.approx(root, rel=1e-12)


def test_prices_follow_the_mark_and_say_so() -> None:
    prices = ACCOUNT.quote().prices
    assert (prices["BTC"].value, prices["BTC"].source) == (61_000.0, "position")
    assert (prices["USDC"].value, prices["USDC"].source) == (1.0, "par")
