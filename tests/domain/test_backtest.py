"""Days whose one-day loss passes portfolio maintenance margin, on 1,726 real days (RISK.md section 2.1)."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from app.domain.parameters import MarketParameters
from tests.domain.book import Book, linear

CLOSES = Path(__file__).resolve().parents[2] / "../shared/data/crypto_daily_closes.csv"
pytestmark = pytest.mark.skipif(not CLOSES.exists(), reason=f"no closes at {CLOSES}")


def closes() -> list[dict[str, float]]:
    with CLOSES.open() as lines:
        return [{k: float(v) for k, v in row.items() if k != "date"} for row in csv.DictReader(lines)]


def losing_days(exposures: dict[str, float], *, hedge: float | None = None) -> int:
    days = closes()
    assert len(days) == 1_727
    first = days[0]
    rows = tuple(
        linear(f"{asset}-PERP", "long" if usd > 0 else "short", abs(usd) / first[asset])
        for asset, usd in exposures.items()
    )
    book = Book(rows=rows, prices=first)
    if hedge is not None:
        table = MarketParameters().hedge
        book = replace(book, hedge=replace(table, pairs=MappingProxyType(dict.fromkeys(table.pairs, hedge))))
    margin = book.quote().models["portfolio"].maintenance_margin
    pairs = itertools.pairwise(days)
    profits = [sum(usd * (b[asset] / a[asset] - 1) for asset, usd in exposures.items()) for a, b in pairs]
    return sum(-profit > margin for profit in profits)


@pytest.mark.parametrize(
    ("exposures", "days"),
    [
        ({"BTC": 10_000.0, "ETH": -8_000.0}, 2),
        ({"BTC": 10_000.0, "SOL": -10_000.0}, 25),
        ({"BTC": 10_000.0}, 1),
    ],
)
def test_days_past_maintenance(exposures: dict[str, float], days: int) -> None:
    assert losing_days(exposures) == days


def test_a_hedge_trusted_as_much_as_stress_fails_forty_days() -> None:
    assert losing_days({"BTC": 10_000.0, "ETH": -8_000.0}, hedge=0.95) == 40
