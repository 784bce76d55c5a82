"""Backtests of VaR: of a series that the caller supplies, and of the daily snapshots of its account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from msgspec import Meta
from starlette.responses import Response

from app.api import body as wire
from app.api.booking import BookOwner
from app.api.deps import body_of, caller_of, document, parts_of
from app.api.pages import PAGE_MAX, Limit, invalid_cursor
from app.api.quote_request import Limits, Symbol, fields_given
from app.api.var_request import Decay
from app.domain.backtest import (
    Backtest,
    BacktestMethod,
    BacktestTerms,
    Coverage,
    backtest_book,
    backtest_pnl,
    coverage,
)
from app.domain.black76 import Floats
from app.domain.panel import Dates, History, Panel
from app.domain.parameters import ModelParameters
from app.domain.snapshots import FORECASTS, AccountBacktest, Snapshot, backtest_snapshots
from app.errors import invalid, pointer_to, pointers_by
from app.services import snapshots

router = APIRouter(prefix="/api", tags=["quotes"])

DAYS_MAX = 5_000
ASSETS_MAX = 50

Money = Annotated[float, Meta(ge=-1e15, le=1e15)]
Series = Annotated[list[Money], Meta(min_length=1, max_length=DAYS_MAX)]
Return = Annotated[float, Meta(gt=-1, le=1e6)]
Returns = Annotated[list[Return], Meta(min_length=1, max_length=DAYS_MAX)]


class BacktestIn(wire.Request):
    """POST /api/quotes/backtest: `pnl` with the `var` that was forecast, or alone; or `exposures` held over returns.

    Without `var` each day is forecast from the `window` days before it. Without `returns` they are the stored ones.
    """

    pnl: Series | None = None
    var: Series | None = None
    exposures: dict[Symbol, Money] | None = None
    returns: dict[Symbol, Returns] | None = None
    confidence: float | None = None
    test_size: float | None = None
    method: BacktestMethod | None = None
    window: Annotated[int, Meta(ge=60, le=DAYS_MAX)] | None = None
    history_days: Annotated[int, Meta(ge=61, le=DAYS_MAX)] | None = None
    age_decay: Decay | None = None
    volatility_decay: Decay | None = None


_BACKTEST = wire.Body(BacktestIn)
_Cursor = Annotated[str, Query(max_length=10, pattern=r"^[0-9-]*$", description="next_cursor of the page before")]
_FORECAST_FIELDS = ("method", "window", "age_decay", "volatility_decay", "history_days")


@router.post("/quotes/backtest", openapi_extra=document("Does VaR hold: a supplied series", request=BacktestIn))
async def quote_backtest(request: Request) -> Response:
    """Kupiec's and Christoffersen's tests and the traffic light over a series of forecasts."""
    parts = parts_of(request)
    await caller_of(request)
    asked = await body_of(request, _BACKTEST)
    terms = backtest_terms(asked, parts.market.view.parameters.models)
    check_backtest(asked, terms, Limits.of(parts.settings))
    stored = None
    if asked.exposures is not None and asked.returns is None:
        stored = (await parts.history.panel(list(asked.exposures), asked.history_days or DAYS_MAX)).panel
    return Response(await parts.workshop.run(_answer, asked, terms, stored), media_type="application/json")


def backtest_terms(asked: BacktestIn, models: ModelParameters) -> BacktestTerms:
    """Return how the body would have each day forecast and tested, the parameters' own where it says nothing."""
    return BacktestTerms(
        confidence=0.99 if asked.confidence is None else asked.confidence,
        window=asked.window or int(models.var_window_days),
        method=asked.method or "plain",
        age_decay=models.var_age_decay if asked.age_decay is None else asked.age_decay,
        volatility_decay=models.var_volatility_decay if asked.volatility_decay is None else asked.volatility_decay,
        test_size=models.backtest_size if asked.test_size is None else asked.test_size,
    )


def check_backtest(asked: BacktestIn, terms: BacktestTerms, limits: Limits) -> None:
    """Refuse a body that mixes two kinds of series, or asks for too much work. Raises InvalidError."""
    given = fields_given(asked)
    if ("pnl" in given) == ("exposures" in given):
        raise invalid("/pnl", "missing_field", "give pnl, or exposures")
    foreign = ("returns", "history_days") if "pnl" in given else ("var",)
    if "var" in given:
        foreign = (*foreign, *_FORECAST_FIELDS)
    if "returns" in given:
        foreign = (*foreign, "history_days")
    if extra := next((name for name in foreign if name in given), None):
        raise invalid(f"/{extra}", "not_allowed", f"{extra} does not go with the other fields given")
    if asked.pnl is not None and asked.var is not None and len(asked.var) != len(asked.pnl):
        raise invalid("/var", "wrong_length", f"{len(asked.var)} forecasts for {len(asked.pnl)} days")
    for name in {"exposures", "returns"} & given.keys():
        if not 0 < len(given[name]) <= ASSETS_MAX:
            raise invalid(f"/{name}", "too_many_items", f"1 to {ASSETS_MAX} assets")
    _check_returns(asked)
    _check_decays(asked, terms.method)
    milliseconds = estimated_backtest_work(asked, terms.window)
    if milliseconds > limits.quote_milliseconds_max:
        seconds = limits.quote_milliseconds_max / 1e3
        detail = f"some {milliseconds / 1e3:,.1f} s of work, over the limit of {seconds:g} s: take fewer days or assets"
        raise invalid("", "too_much_work", detail)


def _check_returns(asked: BacktestIn) -> None:
    if asked.returns is None or asked.exposures is None:
        return
    lengths = {name: len(series) for name, series in asked.returns.items()}
    for name in asked.exposures:
        if name not in lengths:
            raise invalid(pointer_to("returns", name), "missing_field", f"no returns of {name}")
    longest = max(lengths.values())
    for name, length in lengths.items():
        if length != longest:
            raise invalid(pointer_to("returns", name), "wrong_length", f"{length} returns of {name}, not {longest}")


def _check_decays(asked: BacktestIn, method: BacktestMethod) -> None:
    """Refuse a decay that the method does not read: it would be thought to count. Raises InvalidError."""
    for name, reader in (("age_decay", "age_weighted"), ("volatility_decay", "filtered")):
        if getattr(asked, name) is not None and method != reader:
            raise invalid(f"/{name}", "not_allowed", f"the method {method} takes no {name}")


def estimated_backtest_work(asked: BacktestIn, window: int) -> float:
    """Return roughly the milliseconds of one core that a backtest takes, from what was measured on small machines."""
    if asked.var is not None:
        return 1.0
    days = len(asked.pnl or next(iter((asked.returns or {}).values()), ())) or asked.history_days or DAYS_MAX
    cells = max(0, days - window) * window
    if asked.method == "filtered":
        return 1.0 + cells * (2e-5 + 2e-5 * len(asked.exposures or {"": 0}))
    return 1.0 + cells * (1e-4 if asked.method == "age_weighted" else 1e-5)


def _answer(asked: BacktestIn, terms: BacktestTerms, stored: Panel | None) -> bytes:
    with pointers_by(lambda pointer: pointer.replace("/confidences/0", "/confidence", 1)):
        if asked.exposures is not None:
            reply = _held(asked.exposures, asked.returns, stored, terms)
        elif asked.var is not None:
            reply = _supplied(np.array(asked.pnl), np.array(asked.var), terms)
        else:
            pnl = np.array(asked.pnl)
            reply = _rolled(backtest_pnl(_numbers(len(pnl)), pnl, terms), terms)
    return wire.encoder.encode(reply)


def _supplied(pnl: Floats, limits: Floats, terms: BacktestTerms) -> dict[str, Any]:
    exceptions = -pnl > limits
    found = coverage(exceptions, terms.confidence, terms.test_size)
    return {
        "confidence": terms.confidence,
        "exceptions": _exceptions(np.flatnonzero(exceptions).tolist(), -pnl[exceptions], limits[exceptions]),
        "coverage": coverage_reply(found),
    }


def _held(
    exposures: Mapping[str, float],
    returns: Mapping[str, list[float]] | None,
    stored: Panel | None,
    terms: BacktestTerms,
) -> dict[str, Any]:
    """Return the backtest of exposures over the returns given, else over those that are stored."""
    net = np.array(list(exposures.values()))
    if stored is None:
        series = np.array([(returns or {})[name] for name in exposures]).T
        return _rolled(backtest_book(History(tuple(exposures), _numbers(len(series)), series), net, terms), terms)
    history = stored.history(tuple(exposures), DAYS_MAX, terms.window + 1)
    dated = {"first": history.dates[0].item(), "last": history.dates[-1].item(), "days": len(history)}
    return {"history": dated} | _rolled(backtest_book(history, net, terms), terms, dated=True)


def _numbers(count: int) -> Dates:
    """Return a day for each row of a series that has none: what is shown is its number."""
    return np.datetime64(0, "D") + np.arange(count)


def _rolled(found: Backtest, terms: BacktestTerms, *, dated: bool = False) -> dict[str, Any]:
    days = found.exception_dates if dated else found.exception_dates.astype(np.int64)
    return {
        "confidence": found.confidence,
        "method": found.method,
        "window": found.window,
        "decay": {"age_weighted": terms.age_decay, "filtered": terms.volatility_decay}.get(found.method),
        "exceptions": _exceptions(days.tolist(), found.losses[found.exceptions], found.value_at_risk[found.exceptions]),
        "coverage": coverage_reply(found.coverage),
    }


def _exceptions(days: Sequence[Any], losses: Floats, limits: Floats) -> list[dict[str, Any]]:
    """Return the exceptions; a day is its date, or its number in the series."""
    rows = zip(days, losses.tolist(), limits.tolist(), strict=True)
    return [{"day": day, "loss": loss, "var": limit} for day, loss, limit in rows]


def coverage_reply(found: Coverage) -> dict[str, Any]:
    """Return the tests of a series of exceptions."""
    return asdict(found)


@router.get("/account/backtest", openapi_extra=document("Did the account's VaR hold", scope="agent"))
async def account_backtest(
    request: Request,
    owner: BookOwner,
    confidence: Annotated[float, Query(description=".95 or .99")] = 0.99,
    window: Annotated[int, Query(ge=1, le=DAYS_MAX, description="days looked back")] = 250,
) -> Response:
    """Compare each day's profit and loss with the VaR that was forecast of it, by the account's daily snapshots."""
    if confidence not in FORECASTS:
        raise invalid("/confidence", "out_of_range", "forecasts are kept at .95 and .99")
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        stored = await snapshots.recent(tx, owner.agent_id, window)
    found = backtest_snapshots(stored, confidence)
    return wire.JsonResponse({"confidence": confidence, "window": window, "snapshots": len(stored)} | _compared(found))


def _compared(found: AccountBacktest) -> dict[str, Any]:
    return {
        "days": [{"day": d.day, "pnl": d.pnl, "var": d.value_at_risk, "exception": d.is_exception} for d in found.days],
        "missing": found.missing,
        "uncompared": found.uncompared,
        "coverage": None if found.coverage is None else coverage_reply(found.coverage),
    }


@router.get("/account/snapshots", openapi_extra=document("What the account was worth, by UTC day", scope="agent"))
async def list_snapshots(request: Request, owner: BookOwner, limit: Limit = PAGE_MAX, cursor: _Cursor = "") -> Response:
    """List the account's daily snapshots, newest first."""
    before = _day(cursor) if cursor else None
    async with parts_of(request).database.transaction(owner.caller.key_id) as tx:
        found = await snapshots.list_snapshots(tx, owner.agent_id, limit, before=before)
    more = str(found[-1].day) if len(found) == limit else None
    return wire.JsonResponse({"snapshots": [_shown(snapshot) for snapshot in found], "next_cursor": more})


def _shown(snapshot: Snapshot) -> dict[str, Any]:
    return {"id": str(snapshot.day), **asdict(snapshot)}


def _day(cursor: str) -> date:
    try:
        return date.fromisoformat(cursor)
    except ValueError:
        raise invalid_cursor() from None
