"""The reply to a margin quote: the domain's arrays as JSON objects, built for one pass of the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import repeat
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from app.api.body import encoder
from app.api.quote_request import PositionIn
from app.domain.black76 import Floats
from app.domain.health import Advisory
from app.domain.margin.result import MarginResult, MarginTerms
from app.domain.parameters import CorrelationTable, HealthPolicy, MarketParameters, ModelParameters, Pairs
from app.domain.portfolio import Portfolio
from app.domain.prices import Price
from app.domain.quote import MarginQuote
from app.domain.terms import REMEMBERED_MARKETS_MAX


class PositionOut(Struct, gc=False):
    """One position as quoted. Margins are of the position alone; its share of a model's is in that model."""

    index: int
    id: str | None
    symbol: str
    underlying: str
    kind: str
    side: str
    margin_mode: str
    notional: float
    exposure: float
    mark_price: float
    entry_price: float | None
    unrealized_pnl: float
    initial_margin: float
    maintenance_margin: float
    liquidation_price: float
    liquidation_distance: float
    breached: bool


class ShareOut(Struct, gc=False):
    """A position's share of a model's margin; shares sum to it, a hedge's is negative."""

    symbol: str
    initial_margin: float
    maintenance_margin: float


class ScenarioOut(Struct, omit_defaults=True):
    """One scenario of a model: moves, weight, and the book's weighted profit and loss in USD."""

    index: int
    price_move: float
    vol_move: float
    weight: float
    pnl: float
    price_move_unit: str
    vol_move_unit: str
    shocks: dict[str, float] | None = None


def margin_reply(quote: MarginQuote, positions: list[PositionIn], terms: MarginTerms, stale_seconds: float) -> Any:
    """Return the reply, ready to encode."""
    health, distances = quote.health, quote.distances
    alone = _alone(quote)
    return {
        "as_of": quote.as_of,
        "equity": quote.equity,
        "collateral_value": quote.collateral.collateral_value,
        "liabilities": quote.collateral.liabilities,
        "unrealized_pnl": quote.unrealized_pnl,
        "options_value": quote.options_value,
        "allocated_collateral": quote.allocated,
        "models": {name: _model(result, quote.portfolio) for name, result in quote.models.items()},
        "capital_freed": quote.capital_freed,
        "portfolio_margin_eligible": quote.eligible,
        "health": health,
        "liquidation": {
            "to_breach": distances.to_breach,
            "to_liquidation": distances.to_liquidation,
            "breached": distances.breached,
            "liquidatable": distances.liquidatable,
            "by_underlying": dict(
                zip(quote.portfolio.underlyings.names, distances.by_underlying.tolist(), strict=True)
            ),
        },
        "positions": _positions(quote, positions, alone),
        "collateral": _collateral(quote),
        "advisories": [*quote.advisories, *_price_advisories(quote, stale_seconds)],
        "prices": quote.prices,
        "parameters": parameters_shown(
            tuple(dict.fromkeys([*quote.portfolio.underlyings.names, *quote.collateral.assets])),
            quote.portfolio.symbols,
            terms,
        ),
    }


def _alone(quote: MarginQuote) -> tuple[Floats, Floats]:
    """Return the stand-alone margins (n,): those of the isolated model."""
    return quote.isolated.position_initial, quote.isolated.position_maintenance


def _positions(quote: MarginQuote, positions: list[PositionIn], alone: tuple[Floats, Floats]) -> list[PositionOut]:
    book = quote.portfolio
    names = book.underlyings.names
    return list(
        map(
            PositionOut,
            range(len(book)),
            [p.id for p in positions],
            book.symbols,
            [names[j] for j in book.underlying.tolist()],
            _kinds(book, positions),
            ["short" if delta < 0.0 else "long" for delta in book.delta.tolist()]
            if not len(book.options)
            else [p.side or ("short" if d < 0.0 else "long") for p, d in zip(positions, book.delta, strict=True)],
            ["isolated" if alone else quote.health.model for alone in book.isolated.tolist()],
            book.notional.tolist(),
            book.exposure.tolist(),
            book.mark.tolist(),
            [p.entry_price for p in positions],
            book.unrealized_pnl.tolist(),
            alone[0].tolist(),
            alone[1].tolist(),
            (book.mark * (1.0 + quote.liquidation_move)).tolist(),
            quote.liquidation_move.tolist(),
            quote.breached.tolist(),
        )
    )


def _kinds(book: Portfolio, positions: list[PositionIn]) -> Iterable[str]:
    options = set(book.options.row.tolist())
    if not options and not any(p.notional is not None for p in positions):
        return repeat("linear", len(book))
    return [
        "option" if i in options else "greeks" if p.notional is not None else "linear" for i, p in enumerate(positions)
    ]


def _model(result: MarginResult, book: Portfolio) -> dict[str, Any]:
    worst = result.worst
    return {
        "initial_margin": result.initial_margin,
        "maintenance_margin": result.maintenance_margin,
        "worst": worst,
        "scenarios": _scenarios(result),
        "add_ons": result.add_ons,
        "per_underlying": _per_underlying(result.per_underlying, book.underlyings.names),
        "per_position": list(
            map(ShareOut, book.symbols, result.position_initial.tolist(), result.position_maintenance.tolist())
        ),
        "parameters": result.parameters,
        "not_modelled": result.not_modelled,
        **result.notes,
    }


def _scenarios(result: MarginResult) -> list[ScenarioOut]:
    table = result.scenarios
    if table is None:
        return []
    units = ["price_range" if own else "relative" for own in table.in_ranges]
    shocks = [dict(s) or None for s in table.shocks] or repeat(None)
    return list(
        map(
            ScenarioOut,
            range(len(units)),
            table.price_move,
            table.vol_move,
            table.weight,
            table.pnl.tolist(),
            units,
            repeat("volatility_range" if table.vol_in_ranges else "relative"),
            shocks,
        )
    )


def _per_underlying(columns: Mapping[str, Floats], names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    keys = tuple(columns)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {name: dict(zip(keys, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def _collateral(quote: MarginQuote) -> list[dict[str, Any]]:
    held = quote.collateral
    keys = ("asset", "amount", "lent", "price", "haircut", "value")
    columns = (held.amount, held.lent, held.price, held.haircut, held.value)
    rows = zip(held.assets, *(column.tolist() for column in columns), strict=True)
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _price_advisories(quote: MarginQuote, stale_seconds: float) -> list[Advisory]:
    return [
        Advisory("stale_price", f"the price of {symbol} is {age:.0f} seconds old", age, stale_seconds)
        for symbol, price in quote.prices.items()
        if (age := _age(price, quote.as_of)) > stale_seconds
    ]


def _age(price: Price, now: datetime) -> float:
    return 0.0 if price.as_of is None else (now - price.as_of).total_seconds()


def parameters_shown(names: tuple[str, ...], of_positions: Sequence[str], terms: MarginTerms) -> dict[str, Any]:
    """Return the parameters that a quote of these assets and positions was made with."""
    parameters = terms.parameters
    symbols = tuple(dict.fromkeys(of_positions))
    # the books that agents keep asking for are on the same few markets: their parameters are encoded once
    key = ("reply", names, symbols) if len(names) + len(symbols) <= REMEMBERED_MARKETS_MAX else None
    figures = _figures(names, symbols, parameters)
    return {
        "version": parameters.version,
        "regime": terms.regime,
        **(figures() if key is None else parameters.remembered(key, figures)),
        "models": _encoded(parameters.models),
        "settings": _encoded(parameters.policy),
    }


def _figures(
    names: Sequence[str], symbols: Sequence[str], parameters: MarketParameters
) -> Callable[[], dict[str, msgspec.Raw]]:
    """Return what makes the JSON of the parameters of these assets and symbols."""

    def make() -> dict[str, msgspec.Raw]:
        shown = {
            "assets": {name: parameters.asset(name) for name in names},
            "instruments": {s: parameters.instruments[s] for s in symbols if s in parameters.instruments},
            "stress_correlation": _correlation(parameters.stress, names),
            "hedge_correlation": _correlation(parameters.hedge, names),
        }
        return {name: msgspec.Raw(encoder.encode(value)) for name, value in shown.items()}

    return make


def _correlation(table: CorrelationTable, names: Sequence[str]) -> dict[str, Any]:
    pairs = {f"{a}:{b}": rho for (a, b), rho in table.pairs.items() if a in names and b in names}
    return {"pairs": pairs, "other": table.other}


@lru_cache(maxsize=32)
def _encoded(factors: ModelParameters | HealthPolicy) -> msgspec.Raw:
    """Return factors as JSON: they hardly ever change, so their bytes are kept."""
    return msgspec.Raw(encoder.encode(factors))


def market_parameters_reply(parameters: MarketParameters) -> dict[str, Any]:
    """Return every factor, threshold and correlation of one version."""
    return {
        "version": parameters.version,
        "models": parameters.models,
        "settings": parameters.policy,
        "stress_correlation": _whole(parameters.stress),
        "hedge_correlation": _whole(parameters.hedge),
        "regime_correlations": {regime: _listed(pairs) for regime, pairs in parameters.regimes.items()},
    }


def _whole(table: CorrelationTable) -> dict[str, Any]:
    return {"pairs": _listed(table.pairs), "other": table.other}


def _listed(pairs: Pairs) -> dict[str, float]:
    return {f"{a}:{b}": rho for (a, b), rho in pairs.items()}


def is_finite(quote: MarginQuote) -> bool:
    """Whether every headline figure is a number: a second line behind the limits on input."""
    figures = [quote.equity, quote.health.required_initial, quote.health.required_maintenance]
    figures += [m.initial_margin for m in quote.models.values()]
    return bool(np.isfinite(figures).all())
