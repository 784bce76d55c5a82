"""Correlations: those of a regime, those that were seen of late, and how far apart they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from scipy.special import ndtri
from starlette.responses import Response

from app.api import body as wire
from app.api.deps import caller_of, document, parts_of
from app.api.quote_request import SYMBOL
from app.api.quotes_var import AgentId, account_terms
from app.api.risk_book import history_shown
from app.api.var_reply import covariance_reply
from app.domain.covariance import Covariance, estimate
from app.domain.panel import Panel
from app.domain.parameters import MarketParameters, Regime
from app.domain.portfolio import Portfolio
from app.domain.quote import QuoteTerms
from app.domain.regimes import Drift, drift, regime_correlation
from app.domain.var.quote import VarTerms, risk_taken
from app.errors import invalid

router = APIRouter(prefix="/api/market/correlation", tags=["market"])

ASSETS_MAX = 50
CONFIDENCE = 0.99

_Assets = Annotated[str, Query(max_length=4_000, description="names with commas between; with book=account: its own")]
_RegimeQuery = Annotated[Regime, Query(description="the regime that is compared with")]
_Window = Annotated[int, Query(ge=60, le=3_650, description="days looked back")]
_Confidence = Annotated[float, Query(gt=0.5, lt=1, description="of the VaR under both")]
_Book = Annotated[Literal["account"] | None, Query(description="whose VaR is told under both")]


@router.get("", openapi_extra=document("A regime's correlations beside those seen of late"))
async def get_correlation(
    request: Request,
    regime: _RegimeQuery = "normal",
    assets: _Assets = "",
    window_days: _Window = 90,
    book: _Book = None,
    confidence: _Confidence = CONFIDENCE,
    agent_id: AgentId = None,
) -> Response:
    """Compare realised correlations with a regime's: how far apart, the nearest regime, an account's VaR under both."""
    parts = parts_of(request)
    caller = await caller_of(request)
    held = None if book is None else await account_terms(parts, caller, agent_id)
    view, now = parts.market.view, parts.database.clock.now()
    names = _names(assets, held, view.parameters)
    if len(names) > ASSETS_MAX:
        raise invalid("/assets", "too_many_items", f"at most {ASSETS_MAX} assets, not {len(names)}")
    known = await parts.history.panel(names, window_days)
    portfolio = None
    if held is not None:
        portfolio = risk_taken(held, view.prices, now, known.panel, VarTerms()).portfolio
        names = list(portfolio.underlyings.names)
    reply = await parts.workshop.run(_compared, names, known.panel, view.parameters, regime, portfolio, confidence)
    reply |= {"window_days": window_days, "history": history_shown(known, now), "version": view.parameters.version}
    return wire.JsonResponse(reply)


def _names(assets: str, held: QuoteTerms | None, parameters: MarketParameters) -> list[str]:
    """Return the assets to read: those named, those of the book, else the listed coins. Raises InvalidError."""
    names = list(dict.fromkeys(filter(None, assets.split(","))))
    if held is not None and names:
        raise invalid("/assets", "not_allowed", "the assets are those of the book")
    if held is not None:
        symbols = [symbol for symbol in held.positions.symbol if symbol is not None]
        names = [
            *map(parameters.underlying_of, symbols),
            *(item.asset for item in (*held.collateral, *held.liabilities)),
        ]
        return list(dict.fromkeys(names))
    wrong = next((name for name in names if not SYMBOL.fullmatch(name)), None)
    if wrong is not None:
        raise invalid("/assets", "invalid_symbol", "an asset is 1 to 64 letters, digits or . _ : / -")
    return names or [name for name, asset in parameters.assets.items() if asset.kind != "stable"][:ASSETS_MAX]


def _compared(
    names: list[str],
    panel: Panel,
    parameters: MarketParameters,
    regime: Regime,
    portfolio: Portfolio | None,
    confidence: float,
) -> dict[str, Any]:
    recent = estimate(panel, names, parameters)
    mended = regime_correlation(regime, names, parameters)
    configured = replace(recent, correlation=mended.matrix, method="regime", repair_distance=mended.distance)

    def var(covariance: Covariance) -> float:
        return 0.0 if portfolio is None else -float(ndtri(1.0 - confidence)) * covariance.deviation(portfolio.net)

    found = drift(recent, regime, parameters, var)
    return {
        "regime": regime,
        "configured": covariance_reply(replace(configured, defaulted_pairs=())),
        "realised": covariance_reply(recent),
        "drift": {
            "assets": found.names,
            "distance": found.distance,
            "distances": found.distances,
            "nearest": found.nearest,
        },
        "var": None if portfolio is None else _figures(found, confidence),
    }


def _figures(found: Drift, confidence: float) -> dict[str, float]:
    return {"confidence": confidence, "horizon_days": 1.0, "configured": found.expected, "realised": found.realised}
