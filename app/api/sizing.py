"""How large: weights, notionals and leverage by volatility, correlation and margin; the buffer before an event."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import body as wire
from app.api.deps import Parts, document, parts_of
from app.api.plans import check_plan_work, order_shown, planned_shown
from app.api.quote_request import Limits, check_length, check_work
from app.api.risk_book import AgentId, Asked, asked_of, history_of, history_shown, planned_book, risk_book
from app.api.sizing_request import (
    ASSETS_MAX,
    SIZING,
    Method,
    SizedAssetIn,
    SizingIn,
    check_fields,
    covariance,
    covariance_shown,
    event_terms,
    limit_of,
)
from app.api.stress import estimated_work
from app.domain.black76 import Floats
from app.domain.covariance import YEAR_DAYS, Covariance
from app.domain.health import Health
from app.domain.parameters import MarketParameters
from app.domain.quote import account_figures
from app.domain.sizing.event_buffer import EventBuffer, plan_event_buffer
from app.domain.sizing.position import PositionTerms, size_position
from app.domain.sizing.programme import Programme, allocate
from app.domain.sizing.weights import (
    portfolio_volatility,
    risk_parity,
    scale_to_volatility,
    undiversified_volatility,
    volatility_adjusted_leverage,
)
from app.domain.stress import stress_account
from app.errors import invalid, pointers_under
from app.services.history_cache import Known

router = APIRouter(prefix="/api/quotes", tags=["quotes"])


@dataclass(frozen=True, slots=True)
class Holdings:
    """What is held before a position is sized: signed exposures by asset, equity and free margin, USD."""

    exposures: Mapping[str, float]
    equity: float
    free_margin: float
    health: Health | None


@dataclass(frozen=True, slots=True)
class Sized:
    """A request with all that it is answered from."""

    body: SizingIn
    assets: Sequence[SizedAssetIn]
    parameters: MarketParameters
    holdings: Holdings | None
    found: Covariance
    source: str

    def column(self, name: str, default: float) -> Floats:
        """Return a field of each asset (n,), the default where it is left out."""
        return np.array([limit_of(getattr(item, name), default) for item in self.assets], dtype=np.float64)

    def by_asset(self, values: Floats) -> dict[str, float]:
        """Return values (n,) by asset."""
        return {item.asset: value for item, value in zip(self.assets, values.tolist(), strict=True)}

    def notionals(self, weights: Floats) -> dict[str, float] | None:
        """Return the weights in USD where the equity is given."""
        return None if self.body.equity is None else self.by_asset(weights * self.body.equity)


@router.post("/sizing", openapi_extra=document("Weights, notionals or leverage", request=SizingIn))
async def quote_sizing(request: Request, agent_id: AgentId = None) -> Response:
    """Size positions; the stored account asks for a key with the scope agent."""
    parts = parts_of(request)
    asked = await asked_of(request, SIZING, agent_id)
    check_fields(asked.body)
    if asked.body.method == "pre_event_buffer":
        return Response(await parts.workshop.run(_buffer, parts, asked), media_type="application/json")
    holdings = await parts.workshop.run(_holdings, parts, asked)
    names = _names(asked.body, holdings)
    check_length("/positions", names, ASSETS_MAX)
    history = None
    if asked.body.covariance is not None:
        days = asked.body.covariance.window_days or int(parts.market.view.parameters.models.var_window_days)
        history = await history_of(parts, names, days, "/covariance/window_days")
    reply = await parts.workshop.run(_answer, parts, asked, holdings, names, history)
    return Response(reply, media_type="application/json")


def _names(body: SizingIn, holdings: Holdings | None) -> list[str]:
    """Return the assets that the covariance is of: those to size, and for a position what is held beside it."""
    if holdings is None:
        return [item.asset for item in body.assets or ()]
    return list(dict.fromkeys([*holdings.exposures, body.asset or ""]))


def _holdings(parts: Parts, asked: Asked[SizingIn]) -> Holdings | None:
    """Return what a position is sized beside: what is listed, else the book's. None for other methods."""
    body = asked.body
    if body.method != "correlation_aware":
        return None
    if asked.held is None and body.positions is None:
        for name in ("equity", "free_margin"):
            if getattr(body, name) is None:
                raise invalid(f"/{name}", "missing", 'without positions or "book": "account" it has to be given')
        exposures = {item.asset: item.exposure or 0.0 for item in body.assets or ()}
        return Holdings(exposures, body.equity or 0.0, body.free_margin or 0.0, None)
    for name in ("assets", "equity", "free_margin"):
        if getattr(body, name) is not None:
            raise invalid(f"/{name}", "not_allowed", "the book says what is held")
    found = risk_book(parts, asked)
    account = stress_account(found.terms, found.stored, found.now, found.reserved)
    check_work(estimated_work(account, 5, repairs=found.repairs), Limits.of(parts.settings))
    figures = account_figures(found.terms, found.stored, found.now)
    moving = (account.whole.net + account.backing).tolist()
    rows = zip(account.names, moving, account.table.stable.tolist(), strict=True)
    exposures = {name: value for name, value, stable in rows if value and not stable}
    return Holdings(exposures, figures.health.equity, figures.health.free_margin, figures.health)


def _answer(
    parts: Parts, asked: Asked[SizingIn], holdings: Holdings | None, names: Sequence[str], history: Known | None
) -> bytes:
    body = asked.body
    parameters = parts.market.view.parameters
    if asked.held is None and body.positions is not None:
        parameters = risk_book(parts, asked).parameters
    found, source = covariance(body, names, parameters, None if history is None else history.panel)
    sized = Sized(body, body.assets or (), parameters, holdings, found, source)
    reply = {
        "method": body.method,
        **_METHODS[body.method](sized),
        "covariance": covariance_shown(found, source, body),
        "history": None if history is None else history_shown(history, parts.database.clock.now()),
        "parameters": {"version": parameters.version},
    }
    return wire.encoder.encode(reply)


def _lp(sized: Sized) -> dict[str, Any]:
    body = sized.body
    rates = [sized.parameters.asset(item.asset).initial_margin_rate for item in sized.assets]
    own = sized.column("margin_rate", np.nan)
    programme = Programme(
        assets=[item.asset for item in sized.assets],
        edges=sized.column("edge", 0.0),
        margin_rates=np.where(np.isnan(own), rates, own),
        daily_volatility=sized.found.volatility / np.sqrt(YEAR_DAYS),
        utilization=sized.parameters.policy.target_utilization if body.utilization is None else body.utilization,
        leverage_cap=limit_of(body.leverage_cap, sized.parameters.policy.leverage_cap),
        weight_min=sized.column("weight_min", 0.0),
        weight_max=sized.column("weight_max", sized.parameters.models.sizing_weight_max),
    )
    found = allocate(programme)
    solved = found.status == "optimal"
    return {
        "status": found.status,
        "detail": found.detail or None,
        "weights": sized.by_asset(found.weights) if solved else None,
        "notionals": sized.notionals(found.weights) if solved else None,
        "edge": found.edge if solved else None,
        "volatility": portfolio_volatility(found.weights, sized.found.matrix) if solved else None,
        "constraints": found.constraints,
        "utilization": programme.utilization,
        "leverage_cap": _finite(programme.leverage_cap),
        "margin_rates": sized.by_asset(programme.margin_rates),
        "defaulted_margin_rates": [item.asset for item in sized.assets if item.margin_rate is None],
    }


def _risk_parity(sized: Sized) -> dict[str, Any]:
    found = risk_parity(sized.found.matrix, sized.column("budget", 1.0))
    return {
        "weights": sized.by_asset(found.weights),
        "notionals": sized.notionals(found.weights),
        "contributions": sized.by_asset(found.contributions),
        "volatility": found.volatility,
        "undiversified_volatility": undiversified_volatility(found.weights, sized.found.matrix),
    }


def _vol_target(sized: Sized) -> dict[str, Any]:
    body, models = sized.body, sized.parameters.models
    target = _or(body.target_volatility, models.sizing_volatility_target)
    cap = limit_of(body.leverage_cap, sized.parameters.policy.leverage_cap)
    given = sized.column("weight", 0.0)
    found = scale_to_volatility(given, sized.found.matrix, target, cap)
    return {
        "weights": sized.by_asset(found.weights),
        "notionals": sized.notionals(found.weights),
        "factor": found.factor,
        "binding": found.binding,
        "volatility": found.volatility,
        "volatility_before": portfolio_volatility(given, sized.found.matrix),
        "undiversified_volatility_before": undiversified_volatility(given, sized.found.matrix),
        "target_volatility": target,
        "leverage_cap": _finite(cap),
    }


def _correlation_aware(sized: Sized) -> dict[str, Any]:
    body, held, asset = sized.body, sized.holdings, sized.body.asset
    if held is None or asset is None or body.max_leverage is None:
        raise invalid("/asset", "missing", "correlation_aware needs asset and max_leverage")
    names, models = sized.found.names, sized.parameters.models
    rate = sized.parameters.asset(asset).initial_margin_rate if body.margin_rate is None else body.margin_rate
    terms = PositionTerms(
        exposures=np.array([held.exposures.get(name, 0.0) for name in names]),
        covariance=sized.found.matrix,
        asset=names.index(asset),
        side=-1 if body.side == "short" else 1,
        equity=held.equity,
        free_margin=held.free_margin,
        max_leverage=body.max_leverage,
        signal=1.0 if body.signal is None else body.signal,
        margin_rate=rate,
        target_volatility=_or(body.target_volatility, models.sizing_volatility_target),
        free_margin_share=_or(body.free_margin_share, models.sizing_free_margin_share),
    )
    found = size_position(terms)
    return {
        "asset": asset,
        "side": body.side or "long",
        "notional": found.notional,
        "least": found.least,
        "binding": found.binding,
        "margin_limit": found.margin_limit,
        "volatility_interval": found.volatility_interval and [_finite(end) for end in found.volatility_interval],
        "volatility_before": found.volatility_before,
        "volatility_after": found.volatility_after,
        "calmest_notional": found.calmest_notional,
        "calmest_volatility": found.calmest_volatility,
        "exposures": dict(held.exposures),
        "equity": terms.equity,
        "free_margin": terms.free_margin,
        "signal": terms.signal,
        "max_leverage": terms.max_leverage,
        "margin_rate": terms.margin_rate,
        "target_volatility": terms.target_volatility,
        "free_margin_share": terms.free_margin_share,
    }


def _or(given: float | None, default: float) -> float:
    return default if given is None else given


def _finite(limit: float | None) -> float | None:
    """Return a limit, null for none."""
    return limit if limit is not None and np.isfinite(limit) else None


def _vol_adjusted_leverage(sized: Sized) -> dict[str, Any]:
    base = _or(sized.body.base_volatility, sized.parameters.models.sizing_volatility_base)
    most = sized.body.max_leverage or 0.0
    vols = zip(sized.assets, sized.found.volatility.tolist(), strict=True)
    return {
        "leverage": {item.asset: volatility_adjusted_leverage(most, vol, base) for item, vol in vols},
        "max_leverage": most,
        "base_volatility": base,
    }


_METHODS: Mapping[Method, Callable[[Sized], dict[str, Any]]] = {
    "lp": _lp,
    "risk_parity": _risk_parity,
    "vol_target": _vol_target,
    "correlation_aware": _correlation_aware,
    "vol_adjusted_leverage": _vol_adjusted_leverage,
}


def _buffer(parts: Parts, asked: Asked[SizingIn]) -> bytes:
    event = asked.body.event
    if event is None:
        raise invalid("/event", "missing", "pre_event_buffer needs event")
    terms = event_terms(event)
    planned = planned_book(parts, asked)
    check_plan_work(parts, planned, "keep_top_n")
    with pointers_under("/event"):
        found = plan_event_buffer(planned.held, planned.assess, planned.reduce, terms)
    return wire.encoder.encode(
        {
            "method": asked.body.method,
            "book": "request" if asked.held is None else "account",
            "as_of": planned.now,
            **_buffer_shown(found),
            "parameters": {"version": planned.parameters.version},
        }
    )


def _buffer_shown(found: EventBuffer) -> dict[str, Any]:
    return {
        "starts_at": found.terms.starts_at,
        "ends_at": found.terms.ends_at,
        "conversions": found.conversions,
        "orders": [planned_shown(order) for order in found.orders],
        "reopening": [order_shown(order) for order in found.reopening],
        "stable_share_before": found.stable_share_before,
        "stable_share": found.stable_share,
        "stable_share_asked": found.terms.stable_share,
        "gross_before": found.gross_before,
        "gross": found.gross,
        "gross_cut": found.terms.gross_cut,
        "before": found.before,
        "after": found.after,
    }
