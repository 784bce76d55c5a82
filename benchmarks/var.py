"""Is VaR fast? Simulation and history against the best plain numpy of the same arithmetic, in one run.

Run with `python -m benchmarks.var`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from app.domain.backtest import BacktestTerms, backtest_book
from app.domain.black76 import Floats
from app.domain.panel import Panel
from app.domain.parameters import MarketParameters
from app.domain.portfolio import Portfolio
from app.domain.prices import PriceFinder
from app.domain.terms import PositionTerms, build_portfolio
from app.domain.var.contributions import historical_components
from app.domain.var.historical import HistoricalTerms, historical
from app.domain.var.monte_carlo import MonteCarloTerms, monte_carlo
from benchmarks.books import AS_OF
from benchmarks.timing import best_seconds

PATHS, ASSETS = 100_000, 50
DAYS, POSITIONS = 1_000, 1_000
CONFIDENCE = 0.99


def book(positions: int, assets: int) -> Portfolio:
    """Return linear positions spread over the assets, long and short."""
    names = [f"A{i:04d}" for i in range(assets)]
    columns: dict[str, Any] = {field.name: [None] * positions for field in fields(PositionTerms)}
    columns["symbol"] = [f"{names[i % assets]}-PERP" for i in range(positions)]
    columns["side"] = ["long" if i % 3 else "short" for i in range(positions)]
    columns["size"] = [1.0 + i % 7 for i in range(positions)]
    columns["mark_price"] = [100.0] * positions
    parameters = MarketParameters()
    return build_portfolio(PositionTerms(**columns), parameters, PriceFinder(parameters, {}, {}), AS_OF)


def covariance_of(assets: int) -> Floats:
    """Return a one-factor covariance: volatilities from .5 to 1.2, correlation .7."""
    volatility = np.linspace(0.5, 1.2, assets)
    correlation = np.full((assets, assets), 0.7) + 0.3 * np.eye(assets)
    return np.outer(volatility, volatility) * correlation


def panel(days: int, portfolio: Portfolio) -> Panel:
    """Return drawn daily returns of the portfolio's underlyings."""
    names = portfolio.underlyings.names
    returns = 0.04 * np.random.default_rng(5).standard_normal((days, len(names)))
    return Panel(names, np.arange(days).astype("datetime64[D]"), np.clip(returns, -0.5, 0.5))


def plain_losses(weights: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    """Return simulated losses by two threads of plain numpy, each in chunks of so many rows."""
    losses = np.empty(PATHS, dtype=np.float32)

    def half(thread: int) -> None:
        generator = np.random.Generator(np.random.SFC64([7, thread]))
        moves = np.empty((rows, len(weights)), dtype=np.float32)
        for start in range(thread * PATHS // 2, (thread + 1) * PATHS // 2, rows):
            stop = min(start + rows, (thread + 1) * PATHS // 2)
            part = moves[: stop - start]
            generator.standard_normal(dtype=np.float32, out=part)
            np.matmul(part, weights, out=losses[start:stop])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(half, range(2)))
    return losses


def plain_tail(losses: NDArray[np.floating]) -> tuple[float, float]:
    """Return VaR and ES by one partition."""
    count = len(losses)
    place = (count - 1) * (1.0 - CONFIDENCE)
    rank = int(place)
    worst = np.partition(losses, (count - 2 - rank, count - 1 - rank))
    high, low = float(worst[count - 1 - rank]), float(worst[count - 2 - rank])
    value_at_risk = high + (place - rank) * (low - high)
    return value_at_risk, float(worst[count - 1 - rank :].mean())


def measure_monte_carlo(table: Table) -> None:
    """Add 100,000 paths of 50 assets, VaR and ES."""
    portfolio, covariance = book(500, ASSETS), covariance_of(ASSETS)
    terms = MonteCarloTerms(seed=7, paths=PATHS, confidences=(CONFIDENCE,))

    def plain(rows: int) -> tuple[float, float]:
        factor = np.linalg.cholesky(covariance / 365.0)
        return plain_tail(plain_losses((-(factor.T @ portfolio.net)).astype(np.float32), rows))

    ours = monte_carlo(portfolio, covariance, terms).tails[0]
    assert abs(ours.value_at_risk / plain(2_500)[0] - 1.0) < 0.03
    rivals: dict[str, Callable[[], object]] = {
        "ours": lambda: monte_carlo(portfolio, covariance, terms),
        **{f"{rows:,} rows at once": functools.partial(plain, rows) for rows in (2_500, 50_000)},
    }
    name = f"Monte Carlo, {PATHS:,} paths x {ASSETS} assets, VaR + ES"
    _row(table, name, best_seconds(rivals, rounds=40), "<= 1.3x")
    _row(table, "the same: processor time of both threads", best_seconds(rivals, 40, time.process_time), "<= 1.3x")


def measure_historical(table: Table) -> None:
    """Add 1,000 days of 1,000 positions, one on each of 1,000 assets; the panel is checked before."""
    portfolio = book(POSITIONS, POSITIONS)
    history = panel(DAYS, portfolio).history(portfolio.underlyings.names, DAYS)
    terms = HistoricalTerms(confidences=(CONFIDENCE,))
    weights, returns = portfolio.net, history.returns

    def plain() -> tuple[float, float]:
        return plain_tail(-(returns @ weights))

    ours = historical(portfolio, history, terms)
    assert np.allclose((ours.tails[0].value_at_risk, ours.tails[0].expected_shortfall), plain())
    name = f"historical, {DAYS:,} days x {POSITIONS:,} positions, VaR + ES"
    _row(table, name, best_seconds({"ours": lambda: historical(portfolio, history, terms), "plain": plain}), "<= 3x")
    parts = best_seconds({"ours": lambda: historical_components(portfolio, ours), "plain": plain})
    _row(table, "the same: components by position", parts, "")


def measure_backtest(table: Table) -> None:
    """Add 1,226 days of rolling 500-day VaR against one numpy quantile a day."""
    portfolio = book(4, 4)
    history = panel(1_726, portfolio).history(portfolio.underlyings.names, 1_726)
    pnl = history.returns @ portfolio.net

    def plain() -> int:
        return sum(pnl[t] < np.quantile(pnl[t - 500 : t], 1.0 - CONFIDENCE) for t in range(500, len(pnl)))

    assert backtest_book(history, portfolio.net, BacktestTerms()).coverage.exceptions == plain()
    seconds = best_seconds(
        {"ours": lambda: backtest_book(history, portfolio.net, BacktestTerms()), "plain": plain}, rounds=3
    )
    _row(table, "rolling backtest, 1,226 days x 500", seconds, "")


def _row(table: Table, name: str, seconds: dict[str, float], target: str) -> None:
    ours = seconds.pop("ours")
    best = min(seconds, key=seconds.__getitem__)
    plain = seconds[best]
    table.add_row(name, f"{ours * 1e3:.2f}", f"{plain * 1e3:.2f} ({best})", f"{ours / plain:.2f}x", target)


def main() -> None:
    """Print the table."""
    table = Table("work", "ours, ms", "plain numpy, ms", "ratio", "target", title="VaR against plain numpy")
    console = Console(width=140)
    for measure in (measure_monte_carlo, measure_historical, measure_backtest):
        with console.status(f"{measure.__name__} …"):
            measure(table)
    console.print(table)
    console.print("Where other work shares the cores, two threads wait for them by luck; processor time does not.")


if __name__ == "__main__":
    main()
