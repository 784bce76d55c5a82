"""What the report shows of an account, computed once: health, risk, scenarios, replays of the past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType

import numpy as np

from app.domain.black76 import Floats
from app.domain.panel import HISTORY_DAYS_MIN
from app.domain.portfolio import Portfolio
from app.domain.prices import StoredPrice
from app.domain.quote import MarginQuote, QuoteTerms, margin_quote
from app.domain.replay import Replay, replay
from app.domain.revalue import pnl_by_underlying
from app.domain.scenarios import NAMED, Scenario
from app.domain.stress import TWENTY_PERCENT, StressAccount, Stressed, market_shocks, stress, stress_account
from app.domain.var.exposures import Exposed
from app.domain.var.quote import VarTerms, risk_taken
from app.errors import InvalidError
from app.report.history import Daily
from app.report.risk import Believed, Risk, believed, day_risk

SEED = 1
WORST_DAYS, WORST_WEEKS = 5, 3
GRID_PRICES = (-0.30, -0.20, -0.10, -0.05, 0.0, 0.05, 0.10, 0.20, 0.30)
GRID_VOLS = (0.50, 0.25, 0.0, -0.25, -0.50)


@dataclass(frozen=True, eq=False)
class Subject:
    """Whose report it is and what it is computed from. `reserved` is of `terms.reserved`, USD by asset."""

    title: str
    terms: QuoteTerms
    stored: Mapping[str, StoredPrice]
    now: datetime
    daily: Daily
    seed: int = SEED
    reserved: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, eq=False)
class ScenarioMap:
    """Profit and loss of the positions, USD (S, J), after each scenario, by the underlyings that it moves."""

    scenarios: tuple[tuple[str, Scenario], ...]
    underlyings: tuple[str, ...]
    pnl: Floats


@dataclass(frozen=True, slots=True)
class StressRow:
    """The account after one shock, USD; `missing` are the assets without history in it, which stand still."""

    label: str
    pnl: float
    collateral_change: float
    equity: float
    maintenance: float
    utilization: float | None
    status: str
    breached: bool
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Report:
    """All figures of a report. `exposed` is what VaR is of: positions, and coins held and owed.

    `risk`, `beliefs`: None where nothing is exposed; `grid` (V, P): without options.
    """

    subject: Subject
    quote: MarginQuote
    exposed: Exposed
    beliefs: Believed | None
    risk: Risk | None
    scenarios: ScenarioMap
    grid: Floats | None
    stress: tuple[StressRow, ...]


def report_of(subject: Subject) -> Report:
    """Return the figures. Raises InvalidError as `margin_quote` does, for a missing price among others."""
    terms, stored, now = subject.terms, subject.stored, subject.now
    quote = margin_quote(terms, stored, now)
    recent = subject.daily.recent
    how = VarTerms(method="historical", window_days=max(HISTORY_DAYS_MIN, len(recent.dates)))
    whole = risk_taken(terms, stored, now, recent, how)
    book = whole.portfolio
    beliefs = believed(book, terms.margin, subject.daily) if len(book) else None
    account = stress_account(terms, stored, now, subject.reserved)
    shocks = _scenarios(terms, account.whole)
    named = stress(account, market_shocks([scenario for _, scenario in shocks], account))
    return Report(
        subject=subject,
        quote=quote,
        exposed=whole,
        beliefs=beliefs,
        risk=None if beliefs is None else day_risk(book, beliefs.covariance, subject.daily, subject.seed),
        scenarios=_map(shocks, named),
        grid=_grid(account),
        stress=(*_twenty_percent(account), *_replays(account, subject.daily)),
    )


def _scenarios(terms: QuoteTerms, book: Portfolio) -> tuple[tuple[str, Scenario], ...]:
    """Return the scenarios of the request's own and of the named sets, each once, with the set that it is of.

    To a book without options and vega the volatility makes no difference.
    """
    has_volatility = bool(len(book.options)) or book.any_vega
    own = {"own": terms.margin.scenarios} if terms.margin.scenario_set == "own" else {}
    found: dict[object, tuple[str, Scenario]] = {}
    for name, scenarios in {**own, **NAMED}.items():
        for given in scenarios:
            scenario = given if has_volatility else replace(given, vol_move=0.0)
            shocks = tuple(sorted(scenario.shocks.items()))
            key = (scenario.price_move, scenario.vol_move, scenario.in_ranges, shocks)
            if any((scenario.price_move, scenario.vol_move, shocks)):
                found.setdefault(key, (name, scenario))
    return tuple(found.values())


def _map(shocks: Sequence[tuple[str, Scenario]], named: Stressed) -> ScenarioMap:
    moved = np.flatnonzero(np.abs(named.pnl_by_asset).max(axis=1, initial=0.0) > 0.0)
    return ScenarioMap(tuple(shocks), tuple(named.names[j] for j in moved.tolist()), named.pnl_by_asset[moved].T)


def _grid(account: StressAccount) -> Floats | None:
    """Return the positions' profit and loss (V, P) after common moves of prices and volatilities, where those count."""
    book = account.whole
    if not (len(book.options) or book.any_gamma or book.any_vega):
        return None
    cells = [Scenario(price, vol) for vol in GRID_VOLS for price in GRID_PRICES]
    pnl, _ = pnl_by_underlying(book, market_shocks(cells, account))
    total: Floats = pnl.sum(axis=0).reshape(len(GRID_VOLS), len(GRID_PRICES))
    return total


def _twenty_percent(account: StressAccount) -> list[StressRow]:
    labels = ("all prices −20 %", "all prices +20 %")
    return _rows(labels, stress(account, market_shocks(TWENTY_PERCENT, account)))


def _replays(account: StressAccount, daily: Daily) -> list[StressRow]:
    rows: list[StressRow] = []
    for days, count in ((1, WORST_DAYS), (7, WORST_WEEKS)):
        try:
            found = replay(account, daily.whole, days, count)
        except InvalidError:
            # no history, which the report says of itself
            continue
        rows += _rows(_labels(found), found.stressed, found.missing)
    return rows


def _labels(found: Replay) -> list[str]:
    spans = zip(found.first, found.last, strict=True)
    return [f"{first}" if first == last else f"{first} to {last}" for first, last in spans]


def _rows(labels: Sequence[str], after: Stressed, missing: Sequence[tuple[str, ...]] = ()) -> list[StressRow]:
    return [
        StressRow(
            label=label,
            pnl=float(after.pnl[s]),
            collateral_change=float(after.collateral_change[s]),
            equity=float(after.equity[s]),
            maintenance=float(after.required_maintenance[s]),
            utilization=after.scales[s].utilization,
            status=after.scales[s].status,
            breached=bool(after.breached[s]),
            missing=missing[s] if missing else (),
        )
        for s, label in enumerate(labels)
    ]
