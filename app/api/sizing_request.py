"""What a sizing request is made of, which fields each method takes, and the covariance that it is sized on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from msgspec import Meta

from app.api import body as wire
from app.api.body import Moment, moment
from app.api.quote_request import Correlation, NonNegative, Positive, Signed, Symbol, correlation_table, fields_given
from app.api.risk_book import RiskBookIn, unused
from app.domain.covariance import Covariance, Estimator, covariance_of, estimate, pairs_of
from app.domain.panel import Panel
from app.domain.parameters import MarketParameters, Regime
from app.domain.regimes import regime_table
from app.domain.sizing.event_buffer import EventTerms
from app.errors import invalid

Method = Literal["lp", "risk_parity", "vol_target", "correlation_aware", "vol_adjusted_leverage", "pre_event_buffer"]

ASSETS_MAX = 200
WINDOW_DAYS_MAX = 3_660

Fraction = Annotated[float, Meta(ge=0, le=1)]
NoLimit = Literal["none"]
"""Said in a word: null is what many clients send for a field left out, and must not lift a limit."""
Leverage = Annotated[float, Meta(gt=0, le=1_000)]


class SizedAssetIn(wire.Request):
    """One asset to size; which fields count depends on the method."""

    asset: Symbol
    edge: Signed | None = None
    margin_rate: Annotated[float, Meta(ge=0, le=10)] | None = None
    weight: Signed | None = None
    weight_min: NonNegative | None = None
    weight_max: NonNegative | NoLimit | None = None
    budget: Positive | None = None
    exposure: Signed | None = None


class CovarianceIn(wire.Request):
    """A covariance estimated from the stored closes, of the parameters' `var_window_days` where nothing is said."""

    method: Estimator = "sample"
    window_days: Annotated[int, Meta(ge=2, le=WINDOW_DAYS_MAX)] | None = None


class EventIn(wire.Request):
    """The window of an event, the least share of stablecoins in it, and the fraction of gross to cut."""

    starts_at: Moment
    ends_at: Moment
    stable_share: Fraction | None = None
    gross_cut: Fraction | None = None


class SizingIn(RiskBookIn, kw_only=True):
    """POST /api/quotes/sizing."""

    method: Method
    assets: list[SizedAssetIn] | None = None
    vols: dict[Symbol, Annotated[float, Meta(gt=0, le=100)]] | None = None
    correlation: dict[Symbol, dict[Symbol, Correlation]] | None = None
    regime: Regime | None = None
    covariance: CovarianceIn | None = None
    equity: Positive | None = None
    free_margin: NonNegative | None = None
    utilization: Annotated[float, Meta(gt=0, le=1)] | None = None
    leverage_cap: Leverage | NoLimit | None = None
    target_volatility: Annotated[float, Meta(gt=0, le=100)] | None = None
    asset: Symbol | None = None
    side: Literal["long", "short"] | None = None
    max_leverage: Leverage | None = None
    margin_rate: Annotated[float, Meta(ge=0, le=10)] | None = None
    signal: Fraction | None = None
    free_margin_share: Fraction | None = None
    base_volatility: Annotated[float, Meta(gt=0, le=100)] | None = None
    event: EventIn | None = None


SIZING = wire.Body(SizingIn)

_BOOK = frozenset({"book", "positions", "collateral", "liabilities", "reservations", "market", "settings", "as_of"})
_COVARIANCE = frozenset({"vols", "correlation", "regime", "covariance"})
_TAKES: Mapping[Method, tuple[frozenset[str], frozenset[str]]] = {
    "lp": (frozenset({"assets"}), _COVARIANCE | {"equity", "utilization", "leverage_cap"}),
    "risk_parity": (frozenset({"assets"}), _COVARIANCE | {"equity"}),
    "vol_target": (frozenset({"assets"}), _COVARIANCE | {"equity", "target_volatility", "leverage_cap"}),
    "correlation_aware": (
        frozenset({"asset", "max_leverage"}),
        _BOOK
        | _COVARIANCE
        | {"assets", "equity", "free_margin", "side", "margin_rate", "signal", "free_margin_share"}
        | {"target_volatility"},
    ),
    "vol_adjusted_leverage": (frozenset({"assets", "max_leverage"}), _COVARIANCE | {"base_volatility"}),
    "pre_event_buffer": (frozenset({"event"}), _BOOK),
}
_OF_ASSETS: Mapping[Method, frozenset[str]] = {
    "lp": frozenset({"edge", "margin_rate", "weight_min", "weight_max"}),
    "risk_parity": frozenset({"budget"}),
    "vol_target": frozenset({"weight"}),
    "correlation_aware": frozenset({"exposure"}),
    "vol_adjusted_leverage": frozenset(),
    "pre_event_buffer": frozenset(),
}
_NEEDED: Mapping[Method, str] = {"lp": "edge", "vol_target": "weight", "correlation_aware": "exposure"}
"""The field that each asset must have."""


def check_fields(body: SizingIn) -> None:
    """Refuse fields that the method does not take, and the lack of those that it needs. Raises InvalidError."""
    needed, optional = _TAKES[body.method]
    given = fields_given(body).keys() - {"method"}
    for name in sorted(given - needed - optional):
        raise invalid(f"/{name}", "not_allowed", f"{body.method} takes no {name}")
    for name in sorted(needed - given):
        raise invalid(f"/{name}", "missing", f"{body.method} needs {name}")
    sources = [name for name in ("correlation", "regime", "covariance") if getattr(body, name) is not None]
    if len(sources) > 1:
        detail = f"give one of {' and '.join(sources)}: each says what the correlations are"
        raise invalid(f"/{sources[1]}", "conflicting_covariance", detail)
    _check_assets(body)


def _check_assets(body: SizingIn) -> None:
    assets = body.assets
    if assets is None:
        return
    if not assets or len(assets) > ASSETS_MAX:
        raise invalid("/assets", "too_many_items" if assets else "missing", f"1 to {ASSETS_MAX} assets are sized")
    seen: set[str] = set()
    for i, item in enumerate(assets):
        if item.asset in seen:
            raise invalid(f"/assets/{i}/asset", "duplicate_asset", f"{item.asset} stands twice")
        seen.add(item.asset)
        given = fields_given(item).keys() - {"asset"}
        for name in sorted(given - _OF_ASSETS[body.method]):
            raise invalid(f"/assets/{i}/{name}", "not_allowed", f"{body.method} takes no {name}")
        needed = _NEEDED.get(body.method)
        if needed is not None and needed not in given:
            raise invalid(f"/assets/{i}/{needed}", "missing", f"{body.method} needs the {needed} of each asset")


def covariance(
    body: SizingIn, names: Sequence[str], parameters: MarketParameters, panel: Panel | None
) -> tuple[Covariance, str]:
    """Return the covariance of the assets, and what it was taken from: the closes, the request, or a regime.

    Raises InvalidError `missing_volatility`, `missing_history`, and as `correlation_table` does.
    """
    vols = body.vols or {}
    if body.covariance is not None and panel is not None:
        return estimate(panel, names, parameters, body.covariance.method, volatilities=vols), "history"
    if body.correlation is not None:
        table = correlation_table(parameters.stress, body.correlation, "/correlation")
        found = covariance_of(names, vols, table, parameters)
        given = {pair for a, row in body.correlation.items() for b in row for pair in ((a, b), (b, a))}
        return replace(found, defaulted_pairs=tuple(p for p in pairs_of(names) if p not in given)), "request"
    regime = body.regime or "normal"
    return covariance_of(names, vols, regime_table(regime, names, parameters), parameters), regime


def covariance_shown(found: Covariance, source: str, body: SizingIn) -> dict[str, Any]:
    """Return the volatilities, up to 200 correlations, what was taken from the parameters, and what was not used."""
    vols, apart = unused(
        found.names, body.vols or {}, [(a, b) for a, row in (body.correlation or {}).items() for b in row]
    )
    row = {name: j for j, name in enumerate(found.names)}
    pairs = pairs_of(found.names)
    shown = {f"{a}:{b}": float(found.correlation[row[a], row[b]]) for a, b in pairs} if len(pairs) <= 200 else None
    return {
        "source": source,
        "method": found.method,
        "vols": dict(zip(found.names, found.volatility.tolist(), strict=True)),
        "correlation": shown,
        "defaulted_pairs": [f"{a}:{b}" for a, b in found.defaulted_pairs[:200]],
        "defaulted_pairs_count": len(found.defaulted_pairs),
        "defaulted_vols": found.defaulted_volatilities,
        "unused_vols": vols,
        "unused_pairs": apart,
        "too_short": dict(found.too_short),
        "repair_distance": found.repair_distance,
    }


def limit_of(given: float | NoLimit | None, default: float) -> float:
    """Return the limit given, infinite for none, the default where it is left out."""
    if given is None:
        return default
    return math.inf if isinstance(given, str) else given


def event_terms(event: EventIn) -> EventTerms:
    """Return the terms of a buffer. Raises InvalidError for what is no time."""
    defaults = EventTerms(datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))
    return EventTerms(
        starts_at=moment(event.starts_at, "/event/starts_at"),
        ends_at=moment(event.ends_at, "/event/ends_at"),
        stable_share=defaults.stable_share if event.stable_share is None else event.stable_share,
        gross_cut=defaults.gross_cut if event.gross_cut is None else event.gross_cut,
    )
