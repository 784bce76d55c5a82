"""The reply to a margin quote: the domain's arrays as JSON objects, built for one pass of the encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any, cast

import msgspec
from msgspec import Struct

from app.api.body import encoder
from app.domain.black76 import Floats
from app.domain.health import Advisory
from app.domain.margin.result import MarginResult, MarginTerms
from app.domain.parameters import CorrelationTable, MarketParameters, Pairs
from app.domain.portfolio import Portfolio
from app.domain.quote import MarginQuote, QuoteTerms
from app.domain.terms import REMEMBERED_MARKETS_MAX, MarketKey, PositionTerms

_Margins = tuple[list[float], list[float]]
"""Each position's initial and maintenance margin under one model, USD."""


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


class HoldingOut(Struct, gc=False):
    """A holding, or a debt with a negative amount: USD after haircut."""

    asset: str
    amount: float
    lent: float
    price: float
    haircut: float
    value: float


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


def margin_reply(quote: MarginQuote, terms: QuoteTerms, ids: Sequence[str | None], stale_seconds: float) -> Any:
    """Return the reply, ready to encode."""
    health, distances = quote.health, quote.distances
    alone = _margins(quote.isolated)
    return {
        "as_of": quote.as_of,
        "equity": quote.equity,
        "collateral_value": quote.collateral.collateral_value,
        "liabilities": quote.collateral.liabilities,
        "unrealized_pnl": quote.unrealized_pnl,
        "options_value": quote.options_value,
        "allocated_collateral": quote.allocated,
        "models": {
            name: _model(result, quote.portfolio, alone if result is quote.isolated else _margins(result))
            for name, result in quote.models.items()
        },
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
        "positions": _positions(quote, terms.positions, ids, alone),
        "collateral": _collateral(quote),
        "advisories": [*quote.advisories, *_price_advisories(quote, stale_seconds)],
        "prices": quote.prices,
        "parameters": parameters_shown(
            tuple(dict.fromkeys([*quote.portfolio.underlyings.names, *quote.collateral.assets])),
            terms.positions.markets[1],
            terms.margin,
        ),
    }


def _margins(result: MarginResult) -> _Margins:
    return result.position_initial.tolist(), result.position_maintenance.tolist()


def _positions(
    quote: MarginQuote, terms: PositionTerms, ids: Sequence[str | None], alone: _Margins
) -> list[PositionOut]:
    book = quote.portfolio
    names = book.underlyings.names
    return list(
        map(
            PositionOut,
            range(len(book)),
            ids,
            book.symbols,
            map(names.__getitem__, book.underlying.tolist()),
            _kinds(book, terms),
            _sides(book, terms),
            ["isolated" if own else quote.health.model for own in book.isolated.tolist()]
            if book.any_isolated
            else repeat(quote.health.model),
            book.notional.tolist(),
            book.exposure.tolist(),
            book.mark.tolist(),
            terms.entry_price,
            book.unrealized_pnl.tolist(),
            *alone,
            (book.mark * (1.0 + quote.liquidation_move)).tolist(),
            quote.liquidation_move.tolist(),
            quote.breached.tolist(),
        )
    )


def _sides(book: Portfolio, terms: PositionTerms) -> Iterable[str]:
    if not book.has_options and "delta" not in terms.given:
        return cast("Sequence[str]", terms.side)  # each linear position has one
    sides = ["short" if delta < 0.0 else "long" for delta in book.delta.tolist()]
    if not book.has_options:
        return sides
    return [given or side for given, side in zip(terms.side, sides, strict=True)]  # a short put has a positive delta


def _kinds(book: Portfolio, terms: PositionTerms) -> Iterable[str]:
    if not book.has_options and "notional" not in terms.given:
        return repeat("linear", len(book))
    options = set(book.options.row.tolist())
    return [
        "option" if i in options else "linear" if notional is None else "greeks"
        for i, notional in enumerate(terms.notional)
    ]


def _model(result: MarginResult, book: Portfolio, margins: _Margins) -> dict[str, Any]:
    worst = result.worst
    return {
        "initial_margin": result.initial_margin,
        "maintenance_margin": result.maintenance_margin,
        "worst": worst,
        "scenarios": _scenarios(result),
        "add_ons": result.add_ons,
        "per_underlying": _per_underlying(result.per_underlying, book.underlyings.names),
        "per_position": list(map(ShareOut, book.symbols, *margins)),
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


def _per_underlying(columns: Mapping[str, Floats], names: tuple[str, ...]) -> dict[str, Struct]:
    rows = map(_row_type(tuple(columns)), *[column.tolist() for column in columns.values()])
    return dict(zip(names, rows, strict=True))


@lru_cache(maxsize=32)
def _row_type(keys: tuple[str, ...]) -> type[Struct]:
    """Return the type of a row with these figures: a struct is made and encoded in half the time of a dict."""
    return msgspec.defstruct("UnderlyingOut", keys, gc=False)


def _collateral(quote: MarginQuote) -> list[HoldingOut]:
    held = quote.collateral
    columns = (held.amount, held.lent, held.price, held.haircut, held.value)
    return list(map(HoldingOut, held.assets, *[column.tolist() for column in columns]))


def _price_advisories(quote: MarginQuote, stale_seconds: float) -> list[Advisory]:
    return [
        Advisory("stale_price", f"the price of {symbol} is {age:.0f} seconds old", age, stale_seconds)
        for symbol, price in quote.prices.items()
        if price.as_of is not None and (age := (quote.as_of - price.as_of).total_seconds()) > stale_seconds
    ]


def parameters_shown(names: tuple[str, ...], markets: tuple[MarketKey, ...], terms: MarginTerms) -> dict[str, Any]:
    """Return the parameters that a quote of these assets and of positions on these markets was made with."""
    parameters = terms.parameters

    def figures() -> dict[str, msgspec.Raw]:
        return _figures(names, markets, parameters)

    # the books that agents keep asking for are on the same few markets: their parameters are encoded once
    few = len(names) + len(markets) <= REMEMBERED_MARKETS_MAX
    return {
        "version": parameters.version,
        "regime": terms.regime,
        **(parameters.remembered(("reply", names, markets), figures) if few else figures()),
        **parameters.remembered("reply", lambda: _factors(parameters)),
    }


def _figures(
    names: Sequence[str], markets: Sequence[MarketKey], parameters: MarketParameters
) -> dict[str, msgspec.Raw]:
    """Return the JSON of the parameters of these assets, and of the markets that are listed."""
    listed = dict.fromkeys(symbol for symbol, _ in markets if symbol in parameters.instruments)
    shown = {
        "assets": {name: parameters.asset(name) for name in names},
        "instruments": {symbol: parameters.instruments[symbol] for symbol in listed if symbol is not None},
        "stress_correlation": _correlation(parameters.stress, names),
        "hedge_correlation": _correlation(parameters.hedge, names),
    }
    return {name: msgspec.Raw(encoder.encode(value)) for name, value in shown.items()}


def _correlation(table: CorrelationTable, names: Sequence[str]) -> dict[str, Any]:
    pairs = {f"{a}:{b}": rho for (a, b), rho in table.pairs.items() if a in names and b in names}
    return {"pairs": pairs, "other": table.other}


def _factors(parameters: MarketParameters) -> dict[str, msgspec.Raw]:
    """Return the factors and thresholds as JSON."""
    return {
        "models": msgspec.Raw(encoder.encode(parameters.models)),
        "settings": msgspec.Raw(encoder.encode(parameters.policy)),
    }


def market_parameters_reply(parameters: MarketParameters) -> dict[str, Any]:
    """Return every factor, threshold and correlation of one version."""
    return {
        "version": parameters.version,
        "models": parameters.models,
        "settings": parameters.policy,
        "clearing": parameters.clearing,
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
    return all(map(math.isfinite, figures))
