"""The figures of the page are those of the quote and, of risk and stress, those that a second computation gives."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from app.console import offline_quote
from app.domain.parameters import REGIME_CORRELATIONS
from app.report.figures import report_of
from app.report.history import daily_of
from app.report.page import page
from app.report_file import offline_subject
from tests.database import make_settings
from tests.domain.book import book, greeks, linear, option
from tests.report.pages import Page, amount, closes, paged

AS_OF = "2026-01-01T00:00:00Z"
PAIR = book(
    linear("BTC-PERP", "long", 0.5, entry_price=59_000),
    linear("ETH-PERP", "short", 9),
    held={"USDC": 20_000, "BTC": 0.1},
)
EXPOSURES = {"BTC": 30_000.0, "ETH": -27_000.0}
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.json"))


@cache
def with_history() -> Page:
    """Return the page of PAIR with the closes of BTC and ETH, drawn once for all who read it."""
    return Page(paged(PAIR, closes("BTC", "ETH")))


@cache
def both(path: Path) -> tuple[Page, dict[str, Any]]:
    """Return the page of a request body and the API's reply to it, of one moment."""
    raw = json.dumps(json.loads(path.read_text()) | {"as_of": AS_OF}).encode()
    settings = make_settings()
    subject = offline_subject(raw, daily_of({}), 1, settings)
    return Page(page(report_of(subject), "1.2.3")), json.loads(offline_quote(raw, settings))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_margin_and_health_are_those_of_the_quote(path: Path) -> None:
    shown, reply = both(path)
    assert {row["model"] for row in shown.table("Margin of the whole book")} == reply["models"].keys()
    for row in shown.table("Margin of the whole book"):
        model = reply["models"][row["model"]]
        assert amount(row["initial"]) == pytest.approx(model["initial_margin"], abs=0.005)
        assert amount(row["maintenance"]) == pytest.approx(model["maintenance_margin"], abs=0.005)
        assert amount(row["capital freed"]) == pytest.approx(reply["capital_freed"][row["model"]], abs=0.0005)
    for row in shown.table("Health under"):
        band = reply["health"]["bands"][row["figure"].replace(" ", "_")]
        assert row["band"] == band["band"]
        assert amount(row["value"]) == pytest.approx(band["value"], abs=0.00005)
    words = " ".join(shown.text)
    assert f"{reply['equity']:,.2f}" in words
    assert f"{reply['health']['required_maintenance']:,.2f}" in words
    for scale in ("zone", "alert_level", "status"):
        assert reply["health"][scale] in words


def test_liquidation_prices_are_those_of_the_quote() -> None:
    shown, reply = both(EXAMPLES[[path.name for path in EXAMPLES].index("pair.json")])
    prices = {p["symbol"]: p["liquidation_price"] for p in reply["positions"]}
    rows = shown.table("The positions that are nearest")
    assert {row["position"] for row in rows} == prices.keys()
    for row in rows:
        assert amount(row["liquidation at"]) == pytest.approx(prices[row["position"]], abs=0.005)
    together = {row["to"]: row["move"] for row in shown.table("All prices but stablecoins' together")}
    assert amount(together["all prices: breach"]) == pytest.approx(reply["liquidation"]["to_breach"], abs=0.0005)
    assert reply["liquidation"]["to_liquidation"] is None
    assert together["all prices: liquidation"] == "none"


def _returns(history: dict[str, Any]) -> np.ndarray[Any, Any]:
    levels = np.array([list(history[name].values()) for name in EXPOSURES])
    found: np.ndarray[Any, Any] = levels[:, 1:] / levels[:, :-1] - 1.0
    return found


WHOLE = EXPOSURES | {"BTC": EXPOSURES["BTC"] + 6_000.0}
"""With the tenth of a coin that is held, no haircut taken."""


def test_historical_var_and_es_by_hand() -> None:
    history = closes("BTC", "ETH")
    pnl = np.array(list(WHOLE.values())) @ _returns(history)
    shown = with_history()
    rows = {row["confidence"]: row for row in shown.table("Value at risk")}
    for confidence, count in (("95%", 15), ("99%", 3)):
        # of 299 days the quantiles lie between the 15th and 16th worst, the 3rd and the 4th
        assert amount(rows[confidence]["VaR"]) == pytest.approx(-np.quantile(pnl, 1.0 - amount(confidence)), abs=0.006)
        assert amount(rows[confidence]["ES"]) == pytest.approx(-np.sort(pnl)[:count].mean(), abs=0.006)
    assert amount(shown.table("Quantiles")[0]["P&L"]) == pytest.approx(pnl.min(), abs=0.006)
    assert "Historical: today's account on each of 299 days from 2024-01-02 to 2024-10-26." in " ".join(shown.text)


def test_the_correlations_are_those_of_the_returns() -> None:
    history = closes("BTC", "ETH")
    (btc, _) = with_history().table("Correlations")
    assert float(btc["ETH"]) == pytest.approx(np.corrcoef(_returns(history))[0, 1], abs=0.005)


def test_without_history_it_simulates_configured_volatilities() -> None:
    shown = Page(paged(PAIR, seed=5))
    x = np.array(list(WHOLE.values())) * np.array([0.65, 0.80]) / np.sqrt(365.0)
    rho = REGIME_CORRELATIONS["normal"]["BTC", "ETH"]
    sigma = float(np.sqrt(x @ np.array([[1.0, rho], [rho, 1.0]]) @ x))
    for row in shown.table("Value at risk"):
        confidence = amount(row["confidence"])
        # five degrees of freedom at unit variance
        expected = sigma * np.sqrt(3.0 / 5.0) * stats.t.ppf(confidence, 5)
        assert abs(amount(row["VaR"]) - expected) < 4.0 * amount(row["± VaR"])
        assert amount(row["normal VaR"]) == pytest.approx(sigma * stats.norm.ppf(confidence), abs=0.006)
    words = " ".join(shown.text)
    assert "Monte Carlo, as history of at least 60 days in common is missing" in words
    assert "seed 5" in words
    (btc, _) = shown.table("Correlations")
    assert btc["ETH"] == f"{rho:.2f}"


def test_what_is_assumed_is_named() -> None:
    shown = Page(paged(book(linear("BTC-PERP", "long", 1), linear("DOGE-PERP", "long", 1e4), held={"USDC": 50_000})))
    rows = {row["underlying"]: row for row in shown.table("What was taken")}
    assert (rows["BTC"]["volatility from"], rows["BTC"]["volatility"]) == ("parameters", "65.0%")
    assert (rows["DOGE"]["volatility from"], rows["DOGE"]["volatility"]) == ("assumed", "120.0%")
    assert "Of DOGE no volatility is set" in " ".join(shown.text)
    (btc, _) = shown.table("Correlations")
    assert btc["DOGE"].endswith("*")


def test_components_sum_to_the_whole() -> None:
    shown = with_history()
    assert {row["position"] for row in shown.table("Component VaR by position")} == {"BTC-PERP", "ETH-PERP", "BTC held"}
    whole = next(row for row in shown.table("Value at risk") if row["confidence"] == "99%")
    for part in ("underlying", "position"):
        rows = shown.table(f"Component VaR by {part}")
        assert sum(amount(row["VaR 99%"]) for row in rows) == pytest.approx(amount(whole["VaR"]), abs=0.03)
        assert sum(amount(row["ES 99%"]) for row in rows) == pytest.approx(amount(whole["ES"]), abs=0.03)


def test_scenarios_and_stress_of_a_linear_book_by_hand() -> None:
    shown = Page(paged(PAIR))
    moves = {"moderate": (-0.10, -0.05, 0.05, 0.10, -0.15, 0.15), "wide": (-0.20, 0.20)}
    rows = shown.table("Profit and loss by scenario")
    for name, expected in moves.items():
        own = [row for row in rows if row["set"] == name]
        assert [amount(row["BTC"]) for row in own] == pytest.approx([EXPOSURES["BTC"] * m for m in expected])
        assert [amount(row["total"]) for row in own] == pytest.approx([3_000.0 * m for m in expected])
    # without options volatility makes no difference: of sixteen scenarios eight are left, and none that moves nothing
    assert [row["scenario"] for row in rows if row["set"] == "span16"] == [
        f"price {sign}{size} R" for size in ("0.33", "0.67", "1.00", "2.00") for sign in "+-"
    ]
    # two ranges of 15 % each
    assert amount(rows[-1]["ETH"]) == pytest.approx(-EXPOSURES["ETH"] * 0.30)
    fall, rise = shown.table("The whole account after each shock")
    equity = 20_000 + 6_000 * 0.9 + 0.5 * 1_000
    assert amount(fall["P&L"]) == pytest.approx(-600)
    assert amount(fall["collateral"]) == pytest.approx(-6_000 * 0.9 * 0.2)
    assert amount(fall["equity after"]) == pytest.approx(equity - 600 - 1_080)
    assert amount(rise["equity after"]) == pytest.approx(equity + 600 + 1_080)
    # cross: .15 of each net exposure at its new price
    assert amount(fall["maintenance after"]) == pytest.approx(0.15 * 0.8 * 57_000)


def test_the_worst_day_of_the_past_is_replayed() -> None:
    history = closes("BTC", "ETH")
    change = np.array([EXPOSURES["BTC"] + 5_400.0, EXPOSURES["ETH"]]) @ _returns(history)
    rows = with_history().table("The whole account after each shock")
    worst = [amount(row["P&L"]) + amount(row["collateral"]) for row in rows[2:7]]
    assert worst == pytest.approx(np.sort(change)[:5].tolist(), abs=0.011)
    assert list(history["BTC"])[int(np.argmin(change)) + 1].isoformat() == rows[2]["shock"]


def test_what_has_no_history_stands_still_in_a_replay() -> None:
    mixed = book(linear("BTC-PERP", "long", 1), linear("SOL-PERP", "long", 10), held={"USDC": 50_000})
    rows = Page(paged(mixed, closes("BTC"))).table("The whole account after each shock")
    assert [row["note"] for row in rows[:2]] == ["", ""]
    assert {row["note"] for row in rows[2:]} == {"stands still: SOL"}


def test_a_grid_of_prices_and_volatilities_where_they_count() -> None:
    curved = book(greeks("BTC", 10_000, 0.5, gamma=2.0, vega=300.0), held={"USDC": 50_000})
    grid = Page(paged(curved)).table("Profit and loss by moves")
    found = {row["volatility"]: row for row in grid}
    assert amount(found["vol +50%"]["price -20%"]) == pytest.approx(
        10_000 * (0.5 * -0.2 + 0.5 * 2.0 * 0.04) + 300 * 0.5, abs=0.006
    )
    assert amount(found["vol +0%"]["price +0%"]) == 0
    optioned = book(option("BTC", "put", "long", 1, 50_000, 30, 0.6), held={"USDC": 50_000})
    assert "Profit and loss by moves of prices and of volatilities, USD" in Page(paged(optioned)).tables
    assert "Profit and loss by moves of prices and of volatilities, USD" not in Page(paged(PAIR)).tables
