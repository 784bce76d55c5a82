"""The reply to a stress request: what each market leaves of a book, as JSON objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.api.quote_reply import parameters_shown
from app.api.risk_book import RiskBook, history_shown
from app.domain.black76 import Floats
from app.domain.covariance import covariance_of, pairs_of
from app.domain.feedback import CollateralStep, Feedback, Round
from app.domain.parameters import Regime
from app.domain.regimes import regime_correlation, regime_table
from app.domain.replay import Replay
from app.domain.reverse import ReverseStress
from app.domain.scenarios import Scenario
from app.domain.stress import StressAccount, Stressed
from app.services.history_cache import Known

PAIRS_SHOWN_MAX = 200
NOT_MODELLED = (
    "passage of time, funding and interest under a shock",
    "changes of haircuts, margin rates and correlations by the shock",
    "isolated positions in the feedback loop",
    "moves of implied volatility in replays and in the reverse search",
)


def reply(
    account: StressAccount,
    book: RiskBook,
    scenarios: list[dict[str, Any]],
    results: list[dict[str, Any]],
    history: Known | None,
) -> dict[str, Any]:
    """Return the whole reply."""
    names = tuple(dict.fromkeys([*account.names, *account.collateral.assets]))
    shocked = {name for row in scenarios for name in row.get("shocks") or ()}
    return {
        "as_of": book.now,
        "margin_mode": account.pool.mode,
        "scenarios": scenarios,
        "results": results,
        "unused_shocks": sorted(shocked - set(account.names)),
        "history": None if history is None else history_shown(history, book.now),
        "not_modelled": NOT_MODELLED,
        "prices": dict(account.prices),
        "parameters": parameters_shown(names, book.terms.positions.markets[1], book.terms.margin),
    }


@dataclass(frozen=True, slots=True)
class Labelled:
    """A scenario with the set that it is of, `own` for the request's, and the name that the request gives it."""

    source: str
    name: str | None
    scenario: Scenario


def scenario_rows(
    account: StressAccount, scenarios: Sequence[Labelled], replayed: Replay | None
) -> list[dict[str, Any]]:
    """Return what each scenario is, in order: those asked for, then the replayed windows."""
    rows: list[dict[str, Any]] = []
    for k, labelled in enumerate(scenarios):
        scenario = labelled.scenario
        rows.append(
            {
                "index": k,
                "source": labelled.source,
                "name": labelled.name,
                "price_move": scenario.price_move,
                "price_move_unit": "price_range" if scenario.in_ranges else "relative",
                "vol_move": scenario.vol_move,
                "shocks": dict(scenario.shocks) or None,
            }
        )
    if replayed is not None:
        windows = zip(replayed.first, replayed.last, replayed.moves.T, replayed.missing, strict=True)
        for first, last, moves, missing in windows:
            rows.append(
                {
                    "index": len(rows),
                    "source": "replay",
                    "from": first,
                    "to": last,
                    "moves": dict(zip(account.names, moves.tolist(), strict=True)),
                    "missing": missing,
                }
            )
    return rows


def figures(stressed: Stressed) -> list[dict[str, Any]]:
    """Return the account after each shock."""
    survival = stressed.survival
    liquidated = stressed.pool_equity < stressed.required_maintenance
    found = []
    for k, scale in enumerate(stressed.scales):
        found.append(
            {
                "equity": float(stressed.equity[k]),
                "pnl": float(stressed.pnl[k]),
                "collateral_change": float(stressed.collateral_change[k]),
                "pool_equity": float(stressed.pool_equity[k]),
                "required_initial": float(stressed.required_initial[k]),
                "required_maintenance": float(stressed.required_maintenance[k]),
                "utilization": scale.utilization,
                "margin_ratio": scale.margin_ratio,
                "survival": None if np.isnan(survival[k]) else float(survival[k]),
                "zone": scale.zone,
                "alert_level": scale.alert_level,
                "status": scale.status,
                "breached": bool(stressed.breached[k]),
                "liquidated": bool(liquidated[k]),
                "isolated_liquidated": [
                    name for name, gone in zip(stressed.isolated, stressed.isolated_liquidated, strict=True) if gone[k]
                ],
            }
        )
    return found


def correlation(account: StressAccount, regime: Regime) -> dict[str, Any]:
    """Return a regime's correlations of what the book is exposed to, and the book's deviation of a day under them.

    The deviation is null where an asset has no volatility; up to 200 pairs are shown.
    """
    exposures = account.whole.net + account.backing
    lanes = np.flatnonzero((exposures != 0.0) & ~account.table.stable).tolist()
    names = [account.names[j] for j in lanes]
    parameters = account.parameters
    without = [name for name in names if parameters.asset(name).volatility is None]
    pairs = pairs_of(names)
    found: dict[str, Any] = {
        "pairs": None,
        "repair_distance": 0.0,
        "daily_deviation": None,
        "missing_volatility": without,
    }
    mended = regime_correlation(regime, names, parameters)
    row = {name: k for k, name in enumerate(names)}
    if len(pairs) <= PAIRS_SHOWN_MAX:
        found["pairs"] = {f"{a}:{b}": float(mended.matrix[row[a], row[b]]) for a, b in pairs}
    found["repair_distance"] = mended.distance
    if not without:
        covariance = covariance_of(names, {}, regime_table(regime, names, parameters), parameters)
        found["daily_deviation"] = covariance.deviation(exposures[lanes])
    return found


def feedback(loop: Feedback, step: CollateralStep, scenario: int) -> dict[str, Any]:
    """Return the one step of collateral and every round of the loop."""
    return {
        "scenario": scenario,
        "collateral_step": {
            "before": step.before,
            "after": step.after,
            "drop": step.drop,
            "drop_share": step.drop_share,
        },
        "outcome": loop.outcome,
        "rounds": [_round(loop.names, found) for found in loop.rounds],
        "adv": dict(loop.terms.adv),
        "impact": loop.terms.impact,
        "slippage": loop.terms.slippage,
    }


def reverse(found: ReverseStress) -> dict[str, Any]:
    """Return the smallest moves to each boundary."""
    by_asset = {name: dict(reaches) for name, reaches in found.by_asset.items()}
    return {"common": dict(found.common), "by_asset": by_asset}


def _round(names: Sequence[str], found: Round) -> dict[str, Any]:
    return {
        "moves": _named(names, found.moves),
        "collateral_value": found.collateral_value,
        "equity": found.equity,
        "required_initial": found.required_initial,
        "required_maintenance": found.required_maintenance,
        "utilization": found.utilization,
        "call": found.call,
        "fraction": found.fraction,
        "sold": _named(names, found.sold),
        "impact": _named(names, found.impact),
    }


def _named(names: Sequence[str], values: Floats) -> dict[str, float]:
    """Return the values that are not 0 by name."""
    return {name: value for name, value in zip(names, values.tolist(), strict=True) if value}
