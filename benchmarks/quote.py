"""Is the risk core fast? It against the same work as a plain double loop, in one run.

Run with `make bench`, or `python -m benchmarks.quote`.
"""

from __future__ import annotations

import json

import numpy as np
from rich.console import Console
from rich.table import Table

from app.api.quote_request import MARGIN_QUOTE, Limits, position_terms, quote_terms
from app.domain.fleet_risk import MODELS_SHOWN
from app.domain.margin.registry import MODELS
from app.domain.margin.result import MarginTerms
from app.domain.margin.venues.registry import VENUES
from app.domain.parameters import MarketParameters
from app.domain.portfolio import Portfolio
from app.domain.prices import PriceFinder
from app.domain.quote import QuoteTerms, margin_quote
from app.domain.revalue import pnl_by_underlying
from app.domain.scenarios import ScenarioGrid
from app.domain.terms import build_portfolio
from app.settings import Settings
from benchmarks.books import AS_OF, book, loop_option_pnl, loop_pnl
from benchmarks.timing import best_seconds

SCENARIOS = [(round(-0.3 + 0.6 * (i % 16) / 15, 4), round(-0.3 + 0.3 * (i // 16), 4)) for i in range(64)]
_PARAMETERS = MarketParameters()
_MODEL_SCENARIOS = 6 + 23 + 16
"""What the scenario, portfolio and span models revalue in one quote."""


def _portfolio(body: dict[str, object]) -> Portfolio:
    decoded = MARGIN_QUOTE.decode(json.dumps(body).encode())
    prices = decoded.market.prices if decoded.market and decoded.market.prices else {}
    return build_portfolio(position_terms(decoded.positions), _PARAMETERS, PriceFinder(_PARAMETERS, prices, {}), AS_OF)


def _grid(portfolio: Portfolio, scenarios: list[tuple[float, float]]) -> ScenarioGrid:
    lanes = np.ones((len(portfolio.underlyings.names), 1))
    moves, vols = np.array(scenarios).T
    return ScenarioGrid(lanes * moves, lanes * vols, np.ones(len(scenarios)))


def _terms(body: dict[str, object]) -> QuoteTerms:
    raw = MARGIN_QUOTE.decode(json.dumps(body | {"models": list(MODELS_SHOWN)}).encode())
    return quote_terms(raw, _PARAMETERS, Limits.of(Settings()), AS_OF)


def measure_pnl(table: Table) -> None:
    """Add the profit and loss of 1,000 linear and greeks positions over 64 scenarios."""
    body = book(1_000)
    portfolio = _portfolio(body)
    grid = _grid(portfolio, SCENARIOS)
    ours = pnl_by_underlying(portfolio, grid)[0].sum(axis=0)
    assert np.allclose(ours, loop_pnl(body["positions"], SCENARIOS))

    def from_columns() -> object:
        """Include the sums by underlying, which a quote makes once for all its models."""
        portfolio.by_underlying(portfolio.delta * portfolio.notional)
        portfolio.by_underlying(portfolio.gamma * portfolio.notional)
        portfolio.by_underlying(portfolio.vega)
        return pnl_by_underlying(portfolio, grid)[0].sum(axis=0)

    seconds = best_seconds({"ours": from_columns, "loop": lambda: loop_pnl(body["positions"], SCENARIOS)})
    _row(table, "P&L, 1,000 linear/greeks x 64 scenarios", seconds, "300x")


def measure_options(table: Table) -> None:
    """Add the full revaluation of 1,000 options over 16 scenarios."""
    body = book(1_000, options=1_000)
    portfolio = _portfolio(body)
    scenarios = SCENARIOS[:16]
    grid = _grid(portfolio, scenarios)
    prices = body["market"]["prices"]
    ours = pnl_by_underlying(portfolio, grid)[0].sum(axis=0)
    assert np.allclose(ours, loop_option_pnl(body["positions"], prices, scenarios))
    seconds = best_seconds(
        {
            "ours": lambda: pnl_by_underlying(portfolio, grid),
            "loop": lambda: loop_option_pnl(body["positions"], prices, scenarios),
        },
        rounds=3,
    )
    _row(table, "P&L, 1,000 options x 16 scenarios", seconds, "<= 2 ms")


def measure_core(table: Table) -> None:
    """Add the whole core (five models, health, liquidation prices) for books of three sizes."""
    for positions, options, target in ((10, 0, "<= 1 ms"), (100, 0, ""), (1_000, 0, "<= 8 ms"), (1_000, 100, "")):
        body = book(positions, options=options)
        terms = _terms(body)
        rows = body["positions"]
        linear, curved = rows[options:], rows[:options]
        scenarios = (SCENARIOS * 2)[:_MODEL_SCENARIOS]
        prices = body["market"]["prices"]
        seconds = best_seconds(
            {
                "ours": lambda terms=terms: margin_quote(terms, {}, AS_OF),  # type: ignore[misc]
                "loop": lambda a=linear, b=curved, p=prices, s=scenarios: (  # type: ignore[misc]
                    loop_pnl(a, s),
                    loop_option_pnl(b, p, s),
                ),
            }
        )
        name = f"quote core, five models, {positions:,} positions" + (f", {options} of them options" if options else "")
        _row(table, name, seconds, target)


def measure_venues(table: Table) -> None:
    """Add each venue's model on 100 options and 100 linear positions, against the plain revaluation of as much."""
    body = book(200, underlyings=2, options=100, greeks_every=0)
    portfolio, terms, rows = _portfolio(body), MarginTerms(parameters=_PARAMETERS), body["positions"]
    for name in VENUES:
        of_one = MODELS[name](portfolio, terms).per_underlying["scenario_pnl"][0]
        scenarios = SCENARIOS[: np.count_nonzero(~np.isnan(of_one))]
        seconds = best_seconds(
            {
                "ours": lambda model=MODELS[name]: model(portfolio, terms),  # type: ignore[misc]
                "loop": lambda s=scenarios: (  # type: ignore[misc]
                    loop_pnl(rows[100:], s),
                    loop_option_pnl(rows[:100], body["market"]["prices"], s),
                ),
            }
        )
        _row(table, f"{name}, 100 options, 100 linear, {len(scenarios)} scenarios", seconds, "")


def _row(table: Table, name: str, seconds: dict[str, float], target: str) -> None:
    ours, loop = seconds["ours"], seconds["loop"]
    table.add_row(name, f"{ours * 1e3:.3f}", f"{loop * 1e3:.2f}", f"{loop / ours:,.1f}x", target)


def main() -> None:
    """Print the table."""
    table = Table("work", "ours, ms", "plain loop, ms", "ratio", "target", title="risk core against a plain loop")
    console = Console(width=120)
    for measure in (measure_pnl, measure_options, measure_core, measure_venues):
        with console.status(f"{measure.__name__} …"):
            measure(table)
    console.print(table)
    console.print("The plain loop does the scenarios' P&L only; the core adds margins, health, liquidation prices.")


if __name__ == "__main__":
    main()
