"""The body of a VaR quote, and the terms that it asks for. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal

from msgspec import Meta

from app.api.body import Body, Moment, Request
from app.api.quote_request import (
    Correlation,
    DebtIn,
    HoldingIn,
    Limits,
    MarginQuoteIn,
    MarketIn,
    PositionIn,
    Signed,
    Symbol,
    Text,
    correlation_table,
    fields_given,
)
from app.domain.correlation import REPAIR_SIZE_MAX
from app.domain.parameters import CorrelationTable, MarketParameters, ModelParameters, Regime
from app.domain.portfolio import Portfolio
from app.domain.var.historical import HistoricalMethod
from app.domain.var.monte_carlo import Distribution, checked_seed
from app.domain.var.parametric import CONFIDENCES, Moments
from app.domain.var.quote import CovarianceChoice, VarMethod, VarTerms
from app.domain.var.services import SERVICE_CORRELATIONS, ServiceRisk, service_value_at_risk
from app.domain.var.tail import checked_confidences, checked_horizon
from app.errors import invalid, pointer_to, pointers_by

WINDOW_DAYS_MAX = 3_650
SERVICES_MAX = 32
COMPONENT_ROWS_MAX = 25_000
"""Positions times confidences of one reply."""
PATHS = 100_000
HOURS_A_DAY = 24.0

ServiceName = Annotated[str, Meta(pattern="^[a-z][a-z0-9_]{0,31}(?!\\n)$")]
Numbers = float | list[float]
"""One, or one for each confidence."""
Volatility = Annotated[float, Meta(ge=0, le=100)]
Window = Annotated[int, Meta(ge=60, le=WINDOW_DAYS_MAX)]
Decay = Annotated[float, Meta(gt=0, lt=1)]


class VarQuoteIn(Request):
    """POST /api/quotes/var: a portfolio, or `book` account for the caller's stored one."""

    positions: list[PositionIn] | None = None
    collateral: list[HoldingIn] | None = None
    liabilities: list[DebtIn] | None = None
    book: Literal["account"] | None = None
    method: VarMethod | None = None
    confidence: Numbers | None = None
    horizon_days: float | None = None
    horizon_hours: float | None = None
    window_days: Window | None = None
    weighting: HistoricalMethod | None = None
    age_decay: Decay | None = None
    volatility_decay: Decay | None = None
    distribution: Distribution | None = None
    nu: float | None = None
    paths: int | None = None
    seed: int | None = None
    z: Numbers | None = None
    skew: Signed | None = None
    excess_kurtosis: Signed | None = None
    covariance: CovarianceChoice | None = None
    regime: Regime | None = None
    vols: dict[Symbol, Volatility] | None = None
    correlation: dict[Symbol, dict[Symbol, Correlation]] | None = None
    services: dict[ServiceName, Numbers] | None = None
    service_correlation: dict[ServiceName, dict[ServiceName, Correlation]] | None = None
    market: MarketIn | None = None
    as_of: Moment | None = None
    name: Text | None = None


VAR_QUOTE = Body(VarQuoteIn)

_OF_METHOD: Mapping[str, tuple[VarMethod, ...]] = {
    "weighting": ("historical",),
    "age_decay": ("historical",),
    "distribution": ("monte_carlo",),
    "nu": ("monte_carlo",),
    "paths": ("monte_carlo",),
    "z": ("parametric", "cornish_fisher"),
    "skew": ("cornish_fisher",),
    "excess_kurtosis": ("cornish_fisher",),
    "covariance": ("parametric", "cornish_fisher", "monte_carlo"),
    "regime": ("parametric", "cornish_fisher", "monte_carlo"),
    "vols": ("parametric", "cornish_fisher", "monte_carlo"),
    "correlation": ("parametric", "cornish_fisher", "monte_carlo"),
}
_OF_BOOK = ("positions", "collateral", "liabilities", "market", "as_of")


def var_terms(body: VarQuoteIn, models: ModelParameters) -> VarTerms:
    """Return what the body asks for, the parameters' own where it says nothing. Raises InvalidError with pointers."""
    method = body.method or "parametric"
    given = fields_given(body)
    for name, methods in _OF_METHOD.items():
        if name in given and method not in methods:
            raise invalid(f"/{name}", "not_allowed", f"the method {method} takes no {name}")
    covariance = _covariance(body)
    _check_choices(body, covariance)
    with pointers_by(as_named_here):
        confidences = checked_confidences(CONFIDENCES if body.confidence is None else _listed(body.confidence) or [])
    return VarTerms(
        method=method,
        confidences=confidences,
        horizon_days=_horizon(body),
        window_days=body.window_days or int(models.var_window_days),
        weighting=body.weighting or "plain",
        age_decay=models.var_age_decay if body.age_decay is None else body.age_decay,
        volatility_decay=models.var_volatility_decay if body.volatility_decay is None else body.volatility_decay,
        distribution=body.distribution or "normal",
        degrees=models.var_degrees if body.nu is None else body.nu,
        paths=PATHS if body.paths is None else body.paths,
        seed=checked_seed(body.seed or 0),
        z=_each(body.z, len(confidences), "/z"),
        moments=_moments(body),
        covariance=covariance,
        covariance_decay=body.volatility_decay if covariance == "ewma" else None,
        regime=body.regime or "normal",
        volatilities=body.vols or {},
        correlations=correlation_table(CorrelationTable({}, 0.0), body.correlation, "/correlation").pairs,
    )


def _check_choices(body: VarQuoteIn, covariance: CovarianceChoice) -> None:
    """Refuse a figure that only another choice than the body's reads: it would be thought to count."""
    weighting = body.weighting or "plain"
    is_ewma = body.method != "historical" and covariance == "ewma"
    unread = {
        "age_decay": (weighting != "age_weighted", f"the weighting {weighting}"),
        "volatility_decay": (
            weighting != "filtered" and not is_ewma,
            f"the covariance {covariance}" if body.method != "historical" else f"the weighting {weighting}",
        ),
        "nu": (body.distribution != "student_t", f"the distribution {body.distribution or 'normal'}"),
    }
    for name, (is_unread, choice) in unread.items():
        if is_unread and getattr(body, name) is not None:
            raise invalid(f"/{name}", "not_allowed", f"{choice} takes no {name}")


def margin_body(body: VarQuoteIn) -> MarginQuoteIn:
    """Return the portfolio of the body as that of a margin quote. Raises InvalidError where it names a book too."""
    if body.book is not None:
        extra = next((name for name in _OF_BOOK if getattr(body, name) is not None), None)
        if extra is not None:
            raise invalid(f"/{extra}", "not_allowed", f"{extra} is that of the stored book: leave it out, or the book")
    elif body.positions is None and not body.collateral and not body.liabilities:
        raise invalid("/positions", "missing_field", 'give positions or collateral, or "book": "account"')
    return MarginQuoteIn(
        positions=body.positions or [],
        collateral=body.collateral,
        liabilities=body.liabilities,
        market=body.market,
        as_of=body.as_of,
    )


def service_terms(body: VarQuoteIn, confidences: int) -> Mapping[str, Sequence[float]]:
    """Return the VaR of the services besides trading, one for each confidence. Raises InvalidError."""
    services = body.services or {}
    if len(services) > SERVICES_MAX:
        raise invalid("/services", "too_many_items", f"at most {SERVICES_MAX} services")
    if "trading" in services:
        raise invalid("/services/trading", "not_allowed", "the VaR of trading is that of the book")
    return {name: _each(own, confidences, pointer_to("services", name)) or [] for name, own in services.items()}


def service_risks(
    body: VarQuoteIn, trading: Sequence[float], known: Mapping[str, Sequence[float]] = MappingProxyType({})
) -> list[ServiceRisk]:
    """Return the risk across services for each confidence's VaR of trading; `known` are services worked out here.

    Raises InvalidError.
    """
    own = {**service_terms(body, len(trading)), **known}
    table = correlation_table(SERVICE_CORRELATIONS, body.service_correlation, "/service_correlation")
    return [
        # a book that gains even then has nothing to lose
        service_value_at_risk({"trading": max(0.0, var), **{n: v[i] for n, v in own.items()}}, table)
        for i, var in enumerate(trading)
    ]


def check_var_work(portfolio: Portfolio, terms: VarTerms, limits: Limits) -> None:
    """Refuse a book on too many underlyings, or what would take too long. Raises InvalidError."""
    underlyings = len(portfolio.prices)
    if underlyings > limits.underlyings_max:
        detail = f"at most {limits.underlyings_max} different underlyings, collateral too, not {underlyings}"
        raise invalid("/positions", "too_many_underlyings", detail)
    milliseconds = estimated_var_work(portfolio, terms)
    rows = len(portfolio) * len(terms.confidences)
    if milliseconds > limits.quote_milliseconds_max or rows > COMPONENT_ROWS_MAX:
        detail = (
            f"some {milliseconds / 1e3:,.1f} s of work and {rows:,} components, over the limit of"
            f" {limits.quote_milliseconds_max / 1e3:g} s and {COMPONENT_ROWS_MAX:,}: ask for fewer paths, days,"
            " options, underlyings or confidences"
        )
        raise invalid("", "too_much_work", detail)


def estimated_var_work(portfolio: Portfolio, terms: VarTerms) -> float:
    """Return roughly the milliseconds of one core that a quote takes, from what was measured on small machines."""
    options, underlyings = len(portfolio.options), len(portfolio.prices)
    days, paths = terms.window_days, terms.paths if terms.method == "monte_carlo" else 0
    scenarios = days if terms.method in ("historical", "cornish_fisher") else paths
    cells = scenarios * underlyings * (3e-5 if portfolio.is_linear else 2e-4) + scenarios * options * 4e-4
    shown = 1.0 + len(portfolio) * len(terms.confidences) * 0.02
    if terms.method == "historical":
        # each position, and each underlying, is left out once
        cells += days * (len(portfolio) + underlyings) * (3e-4 if terms.weighting == "age_weighted" else 6e-5)
        cells += days * options * 4e-4
        return shown + cells + (days * underlyings * 1e-4 if terms.weighting == "filtered" else 0.0)
    joint = days * underlyings**2 * (4e-5 if terms.covariance == "ewma" else 1e-6) * (terms.covariance != "given")
    drawn = 0.0 if portfolio.is_linear else paths * underlyings**2 * 4e-6
    return shown + cells + joint + drawn + _repair_work(underlyings, terms)


def _repair_work(underlyings: int, terms: VarTerms) -> float:
    """Return the milliseconds of making a correlation matrix of one that is none: many rounds where it is small.

    What history shows of its own hardly ever is none; what a request or a regime puts together may well be.
    """
    made_up = terms.covariance == "regime" or bool(terms.volatilities or terms.correlations)
    if not made_up:
        return 2e-5 * underlyings**3
    return (2.2e-2 if underlyings <= REPAIR_SIZE_MAX else 2.2e-4) * underlyings**3


def _horizon(body: VarQuoteIn) -> float:
    if body.horizon_days is not None and body.horizon_hours is not None:
        raise invalid("/horizon_hours", "not_allowed", "give horizon_days or horizon_hours, not both")
    if body.horizon_hours is None:
        return checked_horizon(1.0 if body.horizon_days is None else body.horizon_days)
    with pointers_by(lambda _: "/horizon_hours"):
        return checked_horizon(body.horizon_hours / HOURS_A_DAY)


def _covariance(body: VarQuoteIn) -> CovarianceChoice:
    """Return the choice: the one named, or what is given says it. Raises InvalidError where they disagree."""
    if body.correlation is not None and body.regime is not None:
        raise invalid("/regime", "not_allowed", "give correlations, or the regime whose they are")
    implied: CovarianceChoice = "given" if body.correlation is not None else "sample"
    implied = "regime" if body.regime is not None else implied
    chosen = body.covariance or implied
    if body.covariance is None and body.vols is not None and implied == "sample":
        return "given"
    if implied not in ("sample", chosen):
        name = "regime" if body.regime is not None else "correlation"
        raise invalid(f"/{name}", "not_allowed", f"the covariance {chosen} takes no {name}")
    return chosen


def _moments(body: VarQuoteIn) -> Moments | None:
    if body.skew is None and body.excess_kurtosis is None:
        return None
    return Moments(body.skew or 0.0, body.excess_kurtosis or 0.0)


def _listed(numbers: Numbers | None) -> list[float] | None:
    return numbers if numbers is None or isinstance(numbers, list) else [numbers]


def _each(numbers: Numbers | None, count: int, pointer: str) -> list[float] | None:
    found = _listed(numbers)
    if found is not None and len(found) != count:
        raise invalid(pointer, "wrong_length", f"give one number for each of the {count} confidences")
    return found


def as_named_here(pointer: str) -> str:
    """Return a pointer of the domain's by the name that its field has in the body."""
    return pointer.replace("/confidences", "/confidence", 1).replace("/degrees", "/nu", 1)


def used_parameters(terms: VarTerms, parameters: MarketParameters, price_version: int) -> dict[str, object]:
    """Return what the figures were made with: the method's own terms, and the versions of the market."""
    chosen: dict[str, object] = {"version": parameters.version, "price_version": price_version}
    if terms.needs_history:
        chosen["window_days"] = terms.window_days
    if terms.method == "historical":
        return chosen | {"weighting": terms.weighting}
    chosen["covariance"] = terms.covariance
    if terms.covariance == "regime":
        chosen["regime"] = terms.regime
    if terms.covariance == "ewma":
        own = parameters.models.covariance_decay
        chosen["decay"] = own if terms.covariance_decay is None else terms.covariance_decay
    return chosen
