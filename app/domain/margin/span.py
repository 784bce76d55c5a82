"""SPAN: sixteen scenarios per underlying, the worst one binding, charges and credits on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from app.domain.black76 import Floats
from app.domain.margin.result import (
    Indices,
    MarginResult,
    MarginTerms,
    ScenarioTable,
    SpanCharges,
    Worst,
    worst_scenarios,
)
from app.domain.parameters import ModelParameters
from app.domain.portfolio import Portfolio, Underlyings, total
from app.domain.revalue import pnl_by_underlying, position_pnl
from app.domain.scenarios import ScenarioGrid, scan, span_scenarios

_NO_CHARGES = SpanCharges()


def scan_risk(gains: Floats) -> tuple[Floats, Indices]:
    """Return scan risks, USD >= 0, and their binding scenarios, counted from 1, of risk arrays (..., 16).

    `gains` are positive for a profit, the two tails weighted already. Source: CME SPAN; McMillan, "Options as a
    Strategic Investment", ch. 34.
    """
    binding = worst_scenarios(gains)
    rows = gains.reshape(-1, gains.shape[-1])
    worst = rows[np.arange(len(rows)), binding.ravel()].reshape(binding.shape)
    return np.maximum(0.0, -worst), binding + 1


def requirement(scan_risks: Floats, charges: Sequence[SpanCharges]) -> Floats:
    """Return max(scan + intra-commodity + delivery - inter-commodity credit, short-option minimum, 0), (J,)."""
    net = np.array([c.intra_commodity + c.delivery - c.inter_commodity_credit for c in charges])
    least = np.array([max(c.short_option_minimum, 0.0) for c in charges])
    return cast("Floats", np.maximum(scan_risks + net, least))


def _charge_columns(charges: Sequence[SpanCharges]) -> dict[str, Floats]:
    return {name: np.array([getattr(c, name) for c in charges]) for name in SpanCharges.__slots__}


def _grid(table: Underlyings, models: ModelParameters) -> ScenarioGrid:
    scenarios = span_scenarios(1.0, models.span_tail_multiple, models.span_tail_weight)
    return table.derived(
        ("span", models.span_tail_multiple, models.span_tail_weight),
        lambda: scan(
            table.price_range,
            table.volatility_range,
            np.array([s.price_move for s in scenarios]),
            np.array([s.vol_move for s in scenarios]),
            np.array([s.weight for s in scenarios]),
            term_scaled=False,
        ),
    )


def span(portfolio: Portfolio, terms: MarginTerms) -> MarginResult:
    """Return MM = Σ requirement by underlying, IM = factor x MM; net option value is reported, not subtracted.

    The price scan is each underlying's `price_range` R, the volatility scan its `volatility_range`. Charges fall
    on an underlying as a whole; its positions share them by gross exposure.
    """
    models = terms.parameters.models
    table = portfolio.underlyings
    scenarios = span_scenarios(1.0, models.span_tail_multiple, models.span_tail_weight)
    grid = _grid(table, models)
    weights = grid.weights
    pnl, each_option = pnl_by_underlying(portfolio, grid)
    pnl *= weights
    risk, binding = scan_risk(pnl)
    charges = [terms.span_charges.get(name, _NO_CHARGES) for name in table.names]
    required = requirement(risk, charges)
    chosen = np.where((np.arange(1, 17) == binding[:, None]) & (risk > 0.0)[:, None], weights, 0.0)
    share = 0.0 - position_pnl(portfolio, grid, each_option, chosen)
    if terms.span_charges:
        share += portfolio.spread(required - risk)
    columns = _charge_columns(charges)
    maintenance = total(required)
    by_scenario = np.add.reduce(pnl, axis=0)
    same = len(binding) > 0 and not np.count_nonzero(binding != binding[0])
    return MarginResult(
        model="span",
        initial_margin=models.span_initial_factor * maintenance,
        maintenance_margin=maintenance,
        position_initial=models.span_initial_factor * share,
        position_maintenance=share,
        per_underlying={
            "net_exposure": portfolio.net,
            "gross_exposure": portfolio.gross,
            "price_range": table.price_range,
            "volatility_range": table.volatility_range,
            "scan_risk": risk,
            "binding_scenario": binding.astype(np.float64),
            **columns,
            "requirement": required,
            "scenario_pnl": pnl,
        },
        parameters={
            "initial_factor": models.span_initial_factor,
            "tail_multiple": models.span_tail_multiple,
            "tail_weight": models.span_tail_weight,
        },
        add_ons={name: total(values) for name, values in columns.items()},
        worst=Worst("scan", int(binding[0]) - 1 if same else None, 0.0 - total(risk)),
        scenarios=ScenarioTable(
            price_move=[s.price_move for s in scenarios],
            vol_move=[s.vol_move for s in scenarios],
            weight=[s.weight for s in scenarios],
            pnl=by_scenario,
            in_ranges=[True] * len(scenarios),
            vol_in_ranges=True,
        ),
        notes={"net_option_value": portfolio.options_value},
    )
