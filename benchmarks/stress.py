"""Is a stress of one account fast? A thousand scenarios of it beside a plain loop over the account's own assessment.

Run with `python -m benchmarks.stress`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from app.api.quote_request import MARGIN_QUOTE, Limits, quote_terms
from app.domain.parameters import MarginMode, MarketParameters
from app.domain.quote import QuoteTerms, account_figures
from app.domain.reverse import reverse_stress
from app.domain.scenarios import Scenario
from app.domain.stress import market_shocks, stress, stress_account
from app.settings import Settings
from benchmarks.books import AS_OF, book

SCENARIOS, POSITIONS = 1_000, 1_000
LOOPED = 25
"""Scenarios that the plain loop runs: it takes too long for all, and each costs the same."""
ROUNDS = 5

_PARAMETERS = MarketParameters()
Body = dict[str, Any]


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(6)
    scenarios = [Scenario(float(m), 0.0) for m in rng.uniform(-0.5, 0.5, SCENARIOS)]
    table = Table("book", "mode", "ms", "plain loop, ms", "ratio", "reverse stress, ms")
    for name, body in _books().items():
        for mode in ("cross", "isolated", "portfolio"):
            table.add_row(name, mode, *_measured(_terms(body, mode), body, scenarios))
    Console(width=120).print(f"{SCENARIOS:,} scenarios of an account of {POSITIONS:,} positions", table)


def _books() -> dict[str, Body]:
    return {
        "linear": book(POSITIONS, greeks_every=0),
        "linear and greeks": book(POSITIONS),
        "a tenth of options": book(POSITIONS, options=POSITIONS // 10),
        "options": book(POSITIONS, options=POSITIONS),
    }


def _terms(body: Body, mode: MarginMode) -> QuoteTerms:
    raw = MARGIN_QUOTE.decode(json.dumps(body).encode())
    return replace(quote_terms(raw, _PARAMETERS, Limits.of(Settings()), AS_OF), margin_mode=mode)


def _measured(terms: QuoteTerms, body: Body, scenarios: list[Scenario]) -> tuple[str, str, str, str]:
    def ours() -> object:
        account = stress_account(terms, {}, AS_OF)
        return stress(account, market_shocks(scenarios, account))

    account = stress_account(terms, {}, AS_OF)
    found = stress(account, market_shocks(scenarios, account))
    looped, plain = _loop(_shocked(terms, body, scenarios[:LOOPED]))
    assert np.allclose(found.equity[:LOOPED], looped, rtol=1e-9)
    plain *= SCENARIOS / LOOPED
    seconds = _best(ours)
    reverse = _best(lambda: reverse_stress(account), rounds=1)
    return f"{seconds * 1e3:,.1f}", f"{plain * 1e3:,.0f}", f"{plain / seconds:,.0f}x", f"{reverse * 1e3:,.0f}"


def _shocked(terms: QuoteTerms, body: Body, scenarios: list[Scenario]) -> list[tuple[QuoteTerms, float]]:
    """Return the account as a request at each market, and the USD that greeks positions booked on the way.

    Made beforehand: the loop pays for no more than the assessments.
    """
    return [_at(terms, body, scenario.price_move) for scenario in scenarios]


def _at(terms: QuoteTerms, body: Body, move: float) -> tuple[QuoteTerms, float]:
    rows, booked = [], 0.0
    for row in body["positions"]:
        if "mark_price" in row:
            rows.append(row | {"mark_price": row["mark_price"] * (1 + move)})
        elif "notional" in row:
            booked += row["notional"] * (row["delta"] + 0.5 * row["gamma"] * move) * move
            changed = {"delta": row["delta"] + row["gamma"] * move, "gamma": row["gamma"] * (1 + move)}
            rows.append(row | changed | {"notional": row["notional"] * (1 + move)})
        else:
            rows.append(row)
    prices = {name: price * (1 + move) for name, price in body["market"]["prices"].items()}
    moved = body | {"positions": rows, "market": {"prices": prices}}
    return _terms(moved, terms.margin_mode), booked


def _loop(requests: list[tuple[QuoteTerms, float]]) -> tuple[list[float], float]:
    """Return each account's equity and the best seconds of all of them."""

    def run() -> list[float]:
        return [account_figures(terms, {}, AS_OF).equity + booked for terms, booked in requests]

    return run(), _best(run, rounds=2)


def _best(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
