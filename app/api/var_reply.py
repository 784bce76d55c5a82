"""A VaR quote as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from app.api.risk_book import unused
from app.domain.black76 import Floats
from app.domain.covariance import Covariance
from app.domain.panel import History
from app.domain.portfolio import Portfolio
from app.domain.var.contributions import VarParts
from app.domain.var.exposures import Exposed
from app.domain.var.historical import HistoricalRisk
from app.domain.var.monte_carlo import MonteCarloRisk
from app.domain.var.parametric import ParametricRisk
from app.domain.var.quote import VarQuote, VarTerms
from app.domain.var.revalue import not_in_delta
from app.domain.var.services import ServiceRisk

CORRELATIONS_SHOWN_MAX = 50
"""Underlyings up to which a reply spells out their correlations."""
PAIRS_SHOWN_MAX = 1_000


def var_reply(book: Exposed, quote: VarQuote, terms: VarTerms) -> dict[str, Any]:
    """Return the figures of a quote, ready to encode."""
    portfolio = book.portfolio
    names = portfolio.underlyings.names
    return {
        "method": terms.method,
        "seed": terms.seed,
        "horizon_days": terms.horizon_days,
        "results": [
            {"confidence": tail.confidence, "var": tail.value_at_risk, "es": tail.expected_shortfall}
            for tail in quote.risk.tails
        ],
        "components": [_components(book, parts) for parts in quote.parts],
        "exposures": dict(zip(names, portfolio.net.tolist(), strict=True)),
        "standing_still": book.standing_still,
        "evidence": _evidence(portfolio, quote, terms),
        "covariance": None if quote.covariance is None else _covariance(quote.covariance, terms),
        "prices": book.prices,
    }


def service_reply(risks: Sequence[ServiceRisk], confidences: Sequence[float]) -> list[dict[str, Any]]:
    """Return the risk across services by confidence."""
    return [
        {
            "confidence": confidence,
            "var": risk.value_at_risk,
            "components": dict(zip(risk.services, risk.components.tolist(), strict=True)),
            "correlation": _matrix(risk.services, risk.correlation),
            "repaired": risk.repaired,
        }
        for confidence, risk in zip(confidences, risks, strict=True)
    ]


def covariance_reply(found: Covariance) -> dict[str, Any]:
    """Return volatilities and correlations with where they come from."""
    shown = len(found.names) <= CORRELATIONS_SHOWN_MAX
    pairs = found.defaulted_pairs[:PAIRS_SHOWN_MAX]
    return {
        "method": found.method,
        "volatility": dict(zip(found.names, found.volatility.tolist(), strict=True)),
        "correlation": _matrix(found.names, found.correlation) if shown else None,
        "defaulted_pairs_count": len(found.defaulted_pairs),
        "defaulted_pairs": [f"{a}:{b}" for a, b in pairs],
        "defaulted_volatilities": found.defaulted_volatilities,
        "too_short": found.too_short,
        "repaired": found.repair_distance > 0.0,
        "repair_distance": found.repair_distance,
    }


def _covariance(found: Covariance, terms: VarTerms) -> dict[str, Any]:
    vols, apart = unused(found.names, terms.volatilities, terms.correlations)
    return covariance_reply(found) | {"unused_volatilities": vols, "unused_pairs": apart}


def _matrix(names: Sequence[str], values: Floats) -> dict[str, dict[str, float]]:
    rows = zip(names, values.tolist(), strict=True)
    return {name: dict(zip(names, row, strict=True)) for name, row in rows}


def _components(book: Exposed, parts: VarParts) -> dict[str, Any]:
    portfolio, found = book.portfolio, parts.components
    names = portfolio.underlyings.names
    rows = zip(book.kind, book.index, portfolio.symbols, portfolio.underlying.tolist(), strict=True)
    positions = [
        {"kind": kind, "index": index, "symbol": symbol, "underlying": names[j]} for kind, index, symbol, j in rows
    ]
    by_position = {
        "exposure": portfolio.exposure,
        "var": found.var_by_position,
        "es": found.es_by_position,
        "marginal_var": parts.marginal_var[portfolio.underlying],
        "incremental_var": parts.incremental_var_by_position,
    }
    by_underlying = {
        "exposure": portfolio.net,
        "var": found.var_by_underlying,
        "es": found.es_by_underlying,
        "marginal_var": parts.marginal_var,
        "marginal_es": parts.marginal_es,
        "incremental_var": parts.incremental_var_by_underlying,
    }
    return {
        "confidence": found.confidence,
        "rule": found.rule,
        "positions": _rows(positions, by_position),
        "underlyings": _rows([{"underlying": name} for name in names], by_underlying),
    }


def _rows(labels: Sequence[dict[str, Any]], columns: dict[str, Floats]) -> list[dict[str, Any]]:
    """Return a row for each label; the encoder makes null of what is not told, a NaN."""
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [label | dict(zip(columns, row, strict=True)) for label, row in zip(labels, values, strict=True)]


def _evidence(portfolio: Portfolio, quote: VarQuote, terms: VarTerms) -> dict[str, Any]:
    risk = quote.risk
    if isinstance(risk, HistoricalRisk):
        return _historical(risk, quote.history)
    if isinstance(risk, MonteCarloRisk):
        return _monte_carlo(risk)
    return _parametric(risk, quote, terms) | {"not_modelled": not_in_delta(portfolio)}


def _parametric(risk: ParametricRisk, quote: VarQuote, terms: VarTerms) -> dict[str, Any]:
    found: dict[str, Any] = {
        "sigma": risk.sigma,
        "z": [tail.z for tail in risk.tails],
        "scaling": "square_root_of_time",
    }
    if risk.moments is not None:
        found |= {
            "skew": risk.moments.skew,
            "excess_kurtosis": risk.moments.excess_kurtosis,
            "moments": "history" if terms.moments is None else "given",
            "monotone": [tail.monotone for tail in risk.tails],
        }
    return found | _window(quote.history)


def _historical(risk: HistoricalRisk, history: History | None) -> dict[str, Any]:
    return _window(history) | {
        "weighting": risk.method,
        "decay": risk.decay,
        "scaling": risk.horizon_rule,
        "scale": risk.scale,
        "not_modelled": risk.not_modelled,
    }


def _monte_carlo(risk: MonteCarloRisk) -> dict[str, Any]:
    return {
        "distribution": risk.distribution,
        "nu": risk.degrees,
        "seed": risk.seed,
        "paths": risk.paths,
        "var_standard_error": [tail.var_standard_error for tail in risk.tails],
        "es_standard_error": [tail.es_standard_error for tail in risk.tails],
        "not_modelled": risk.not_modelled,
    }


def _window(history: History | None) -> dict[str, Any]:
    """Return the days used; `left_out` lie between them, and lack the return of some asset."""
    if history is None:
        return {}
    first, last = history.dates[0], history.dates[-1]
    span = int((last - first) / np.timedelta64(1, "D")) + 1
    return {
        "days": len(history),
        "first": first.item(),
        "last": last.item(),
        "left_out": span - len(history),
    }
