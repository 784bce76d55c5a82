"""Scenario margin: the worst of a set of joint moves of price and volatility, times a factor."""

from __future__ import annotations

import numpy as np

from app.domain.margin.result import MarginResult, MarginTerms, ScenarioTable, Worst, worst_scenario
from app.domain.portfolio import Portfolio, Underlyings
from app.domain.revalue import pnl_by_underlying, position_pnl
from app.domain.scenarios import NAMED, ScenarioGrid, lay_out


def _grid(terms: MarginTerms, table: Underlyings) -> ScenarioGrid:
    def make() -> ScenarioGrid:
        return lay_out(terms.scenarios, table.names, table.price_range)

    named = NAMED.get(terms.scenario_set) is terms.scenarios
    return table.derived(("scenarios", terms.scenario_set), make) if named else make()


def scenario(portfolio: Portfolio, terms: MarginTerms) -> MarginResult:
    """Return IM = max(0, -min over scenarios of the book's profit and loss) x factor, MM = fraction x IM."""
    models = terms.parameters.models
    table = portfolio.underlyings
    grid = _grid(terms, table)
    by_underlying, each_option = pnl_by_underlying(portfolio, grid)
    by_underlying *= grid.weights
    total = np.add.reduce(by_underlying, axis=0)
    binding = worst_scenario(total)
    worst = float(total[binding])
    initial = max(0.0, -worst) * models.scenario_factor
    chosen = np.zeros(grid.moves.shape)
    if worst < 0.0:
        chosen[:, binding] = grid.weights[binding]
    share = 0.0 - models.scenario_factor * position_pnl(portfolio, grid, each_option, chosen)
    return MarginResult(
        model="scenario",
        initial_margin=initial,
        maintenance_margin=models.maintenance_fraction * initial,
        position_initial=share,
        position_maintenance=models.maintenance_fraction * share,
        per_underlying={
            "net_exposure": portfolio.net,
            "gross_exposure": portfolio.gross,
            "worst_pnl": by_underlying[:, binding],
            "scenario_pnl": by_underlying,
        },
        parameters={
            "scenario_set": terms.scenario_set,
            "factor": models.scenario_factor,
            "maintenance_fraction": models.maintenance_fraction,
        },
        worst=Worst("scenario", binding, worst),
        scenarios=ScenarioTable(
            price_move=[s.price_move for s in terms.scenarios],
            vol_move=[s.vol_move for s in terms.scenarios],
            weight=[s.weight for s in terms.scenarios],
            pnl=total,
            in_ranges=[s.in_ranges for s in terms.scenarios],
            shocks=[s.shocks for s in terms.scenarios],
        ),
    )
