"""A quote as tables: prices of any size, moves of any size, and what stands for none."""

from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console

from app.console import offline_quote, quote_tables
from tests.database import make_settings

PEPE = {"symbol": "PEPE-PERP", "side": "long", "size": 1e8, "entry_price": 0.0001, "mark_price": 0.00012}
BTC = {"symbol": "BTC-PERP", "side": "long", "size": 1, "mark_price": 60_000}


def shown(*positions: dict[str, Any], usdc: float = 20_000, **more: Any) -> str:
    """Return the printed tables of a book backed by dollars."""
    body = {"positions": positions, "collateral": [{"asset": "USDC", "amount": usdc}], **more}
    reply = json.loads(offline_quote(json.dumps(body).encode(), make_settings()))
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    for part in quote_tables(reply):
        console.print(part)
    return printed.getvalue()


def test_a_small_price_keeps_its_digits() -> None:
    text = shown(PEPE, usdc=5_000)
    assert "0.00012000" in text
    # p* = p - (E - M) / (Q - mQ), E = 5,000 + 2,000, M = .15 x 12,000
    assert "0.000058824 (-51.0%)" in text


def test_a_large_price_keeps_its_cents() -> None:
    assert "60,000.00" in shown(BTC)


def test_a_price_is_shown_with_its_digits_at_any_size() -> None:
    for mark, digits in ((13.4567, "13.457"), (0.2, "0.20000"), (1e-12, "0.0000000000010000"), (1e15, "000,000.00")):
        assert digits in shown(BTC | {"symbol": "X-PERP", "mark_price": mark}), mark


def test_a_far_move_is_not_spelled_out() -> None:
    text = shown(BTC | {"side": "short", "size": 0.01})
    assert "(over +1,000%)" in text
    assert "breach at over +1,000%, liquidation at over +1,000%" in text


def test_no_move_that_breaches_is_said_in_words() -> None:
    text = shown()
    assert "if all coins move together: no breach, no liquidation" in text
    assert "never" not in text


def test_an_account_that_is_there_already() -> None:
    assert "breached already, liquidation at -" in shown(BTC, usdc=10_000)
    assert "breached already, in liquidation until +" in shown(BTC, usdc=8_000)
    owing = shown(usdc=0, liabilities=[{"asset": "USDC", "amount": 1}])
    assert "breached already, in liquidation\n" in owing
