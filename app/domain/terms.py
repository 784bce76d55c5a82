"""What a caller says of its positions, and the Portfolio that follows from it with market data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import numpy as np

from app.domain import black76
from app.domain.black76 import Floats
from app.domain.parameters import MarketParameters, ModelParameters
from app.domain.portfolio import (
    Flags,
    Options,
    Portfolio,
    Rows,
    no_options,
    underlying_table,
    with_sums,
)
from app.domain.prices import PriceFinder
from app.errors import FieldError, InvalidError, invalid

YEAR_SECONDS = 31_536_000.0
YEAR_DAYS = 365.0

_SIGN = {"long": 1.0, "short": -1.0, None: np.nan, "call": 1.0, "put": -1.0}


@dataclass(frozen=True, slots=True)
class PositionTerms:
    """Positions as columns of n values, None where a caller left one out.

    A row is an option where `strike`, `type` or `expiry` is given, a greeks position where `notional`, `delta`,
    `gamma` or `vega` is, else linear. Units as in `Portfolio`; `allocated_collateral` in USD.
    """

    symbol: Sequence[str | None]
    side: Sequence[str | None]
    size: Sequence[float | None]
    entry_price: Sequence[float | None]
    mark_price: Sequence[float | None]
    leverage: Sequence[float | None]
    margin_mode: Sequence[str | None]
    allocated_collateral: Sequence[float | None]
    contract_size: Sequence[float | None]
    notional: Sequence[float | None]
    delta: Sequence[float | None]
    gamma: Sequence[float | None]
    vega: Sequence[float | None]
    underlying: Sequence[str | None]
    type: Sequence[str | None]
    strike: Sequence[float | None]
    expiry: Sequence[datetime | None]
    iv: Sequence[float | None]
    rate: Sequence[float | None]
    forward: Sequence[float | None]

    def __len__(self) -> int:
        return len(self.symbol)


def _given(column: Sequence[Any]) -> bool:
    """Whether any row gives this column: a count in C, so that absent columns cost nothing."""
    return column.count(None) != len(column)


def _floats(column: Sequence[float | None], default: float = np.nan) -> Floats:
    """Return the column with `default` for what was left out."""
    if not _given(column):
        return np.full(len(column), default)
    values = np.array(column, dtype=np.float64)
    if not np.isnan(default):
        values[np.isnan(values)] = default
    return values


def _flags(column: Sequence[Any]) -> Flags:
    if not _given(column):
        return np.zeros(len(column), dtype=np.bool_)
    return np.array([v is not None for v in column], dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class _Kinds:
    option: Flags
    greeks: Flags

    @property
    def linear(self) -> Flags:
        return ~(self.option | self.greeks)


def _kinds(terms: PositionTerms) -> _Kinds:
    option = _flags(terms.strike) | _flags(terms.type) | _flags(terms.expiry)
    greeks = _flags(terms.notional) | _flags(terms.delta) | _flags(terms.gamma) | _flags(terms.vega)
    return _Kinds(option, greeks & ~option)


_NEEDS = {
    "linear": ("symbol", "side", "size"),
    "greeks": ("symbol", "notional", "delta"),
    "option": ("underlying", "type", "side", "size", "strike", "expiry", "iv"),
}
_FOREIGN = {
    "linear": ("iv", "rate", "forward"),
    "greeks": ("size", "entry_price", "contract_size", "iv", "rate", "forward"),
    "option": ("notional", "delta", "gamma", "vega", "mark_price", "entry_price", "leverage"),
}


def _check_columns(terms: PositionTerms, kinds: _Kinds) -> None:
    """Refuse rows that lack a term of their kind, or carry one of another kind. Raises InvalidError."""
    errors: list[FieldError] = []
    for kind in ("linear", "greeks", "option"):
        mask = cast("Flags", getattr(kinds, kind))
        if not mask.any():
            continue
        for name in _NEEDS[kind]:
            absent = mask & ~_flags(getattr(terms, name))
            errors += [_field(i, name, "missing", f"a {kind} position needs {name}") for i in _first(absent)]
        for name in _FOREIGN[kind]:
            column = getattr(terms, name)
            if _given(column):
                extra = mask & _flags(column)
                errors += [_field(i, name, "not_allowed", f"a {kind} position takes no {name}") for i in _first(extra)]
    if errors:
        raise InvalidError(detail=errors[0].detail, code="invalid_position", errors=tuple(errors))


def _first(mask: Flags) -> list[int]:
    """Return the first few rows: enough to mend a request without a reply as long as it."""
    return [int(i) for i in np.flatnonzero(mask)[:5]]


def _field(row: int, name: str, code: str, detail: str) -> FieldError:
    return FieldError(f"/positions/{row}/{name}", code, detail)


@dataclass(frozen=True, slots=True)
class _Markets:
    """The different markets of the rows: `code` (n,) into columns (C,), `underlying` (C,) into `names`."""

    code: Rows
    symbols: tuple[str, ...]
    underlying: Rows
    names: tuple[str, ...]
    contract_size: Floats
    initial_rate: Floats
    maintenance_rate: Floats
    price_range: Floats


def _markets(terms: PositionTerms, parameters: MarketParameters) -> _Markets:
    """Resolve each distinct (symbol, underlying) once."""
    seen: dict[tuple[str | None, str | None], int] = {}
    code = [seen.setdefault(key, len(seen)) for key in zip(terms.symbol, terms.underlying, strict=True)]
    under = [u if u is not None else parameters.underlying_of(s or "") for s, u in seen]
    names = tuple(sorted(set(under)))
    row = {name: j for j, name in enumerate(names)}
    listed = [parameters.market(s if s is not None else u, u) for (s, _), u in zip(seen, under, strict=True)]
    figures = np.array(
        [(m.contract_size, m.initial_margin_rate, m.maintenance_margin_rate, m.price_range) for m in listed],
        dtype=np.float64,
    ).reshape(-1, 4)
    return _Markets(
        code=np.array(code, dtype=np.intp),
        symbols=tuple(s if s is not None else u for (s, _), u in zip(seen, under, strict=True)),
        underlying=np.array([row[u] for u in under], dtype=np.intp),
        names=names,
        contract_size=figures[:, 0],
        initial_rate=figures[:, 1],
        maintenance_rate=figures[:, 2],
        price_range=figures[:, 3],
    )


def _request_marks(terms: PositionTerms, markets: _Markets, marks: Floats) -> dict[str, float]:
    """Return the asset prices that the rows' own marks imply.

    The asset's own symbol comes before its perpetual and that before its other markets; among rows of the
    same symbol the lowest mark counts, so that the order of the rows does not matter.
    """
    if not _given(terms.mark_price):
        return {}
    lowest = np.full(len(markets.symbols), np.inf)
    np.fmin.at(lowest, markets.code, marks)
    best: dict[str, tuple[int, str, float]] = {}
    for symbol, j, mark in zip(markets.symbols, markets.underlying.tolist(), lowest.tolist(), strict=True):
        if mark == np.inf:
            continue
        name = markets.names[j]
        rank = 0 if symbol == name else 1 if symbol == f"{name}-PERP" else 2
        best[name] = min(best.get(name, (3, "", 0.0)), (rank, symbol, mark))
    return {name: price for name, (_, _, price) in best.items()}


def build_portfolio(
    terms: PositionTerms, parameters: MarketParameters, prices: PriceFinder, now: datetime
) -> Portfolio:
    """Return the portfolio of the terms at the given prices.

    Marks come from the terms, else from `prices` (which remembers what it gave). Raises InvalidError with
    pointers `/positions/{row}/{field}` for a missing term or price, an expired option, a foreign term.
    """
    kinds = _kinds(terms)
    _check_columns(terms, kinds)
    markets = _markets(terms, parameters)
    marks = _floats(terms.mark_price)
    prices.marks = _request_marks(terms, markets, marks)
    marks = _fill_marks(marks, kinds, markets, prices)
    underlying = markets.underlying[markets.code]
    under_prices = _underlying_prices(kinds, markets, prices, underlying)
    contract = _floats(terms.contract_size)
    contract = np.where(np.isnan(contract), markets.contract_size[markets.code], contract)
    side = np.array([_SIGN[s] for s in terms.side], dtype=np.float64)
    units = _floats(terms.size, 0.0) * contract
    unit_price = np.where(kinds.option, under_prices[underlying], marks)
    notional = np.where(kinds.greeks, _floats(terms.notional, 0.0), units * unit_price)
    options = no_options()
    if kinds.option.any():
        options = _options(terms, kinds.option, underlying, side * units, under_prices, parameters.models, now)
    table = underlying_table(markets.names, under_prices, _widest(markets), parameters)
    return with_sums(
        Portfolio(
            symbols=_labels(terms, kinds, markets),
            underlying=underlying,
            notional=notional,
            delta=_delta(terms, kinds, side, notional, options),
            gamma=_floats(terms.gamma, 0.0),
            vega=_floats(terms.vega, 0.0),
            mark=np.where(kinds.option, under_prices[underlying], marks),
            unrealized_pnl=_unrealized_pnl(terms, kinds, side * units, marks),
            initial_rate=_initial_rate(terms, markets),
            maintenance_rate=markets.maintenance_rate[markets.code],
            is_option=kinds.option,
            isolated=np.array([m == "isolated" for m in terms.margin_mode], dtype=np.bool_),
            allocated=_floats(terms.allocated_collateral),
            options=options,
            underlyings=table,
            **_NO_SUMS,
        )
    )


_EMPTY: Floats = np.empty(0, dtype=np.float64)
_NO_SUMS = dict.fromkeys(("exposure", "taylor_delta", "taylor_gamma", "taylor_vega", "net", "gross"), _EMPTY)


def _labels(terms: PositionTerms, kinds: _Kinds, markets: _Markets) -> tuple[str, ...]:
    if not kinds.option.any():
        return tuple(markets.symbols[c] for c in markets.code.tolist())
    rows = zip(terms.symbol, terms.underlying, terms.expiry, terms.strike, terms.type, strict=True)
    return tuple(s if s is not None else _option_label(u, e, k, t) for s, u, e, k, t in rows)


def _option_label(underlying: str | None, expiry: datetime | None, strike: float | None, kind: str | None) -> str:
    """Return a name in the venues' way, such as BTC-25DEC26-100000-C."""
    return f"{underlying}-{expiry:%d%b%y}-{strike:g}-{(kind or '')[:1]}".upper()


def _fill_marks(marks: Floats, kinds: _Kinds, markets: _Markets, prices: PriceFinder) -> Floats:
    """Return the marks with those left out found; greeks rows keep NaN where nothing is known."""
    absent = np.isnan(marks) & ~kinds.option
    if not absent.any():
        return marks
    found = np.full(len(markets.symbols), np.nan)
    for c, row in _first_rows(markets.code, absent & kinds.linear):
        name = markets.names[markets.underlying[c]]
        found[c] = prices.mark(markets.symbols[c], name, f"/positions/{row}/mark_price")
    for c, _ in _first_rows(markets.code, absent & kinds.greeks & np.isnan(found[markets.code])):
        known = prices.known(markets.names[markets.underlying[c]])
        found[c] = np.nan if known is None else known
    return np.where(absent, found[markets.code], marks)


def _first_rows(groups: Rows, mask: Flags) -> list[tuple[int, int]]:
    """Return (group, its first row) of each group that has a row in the mask."""
    rows = np.flatnonzero(mask)
    found, first = np.unique(groups[rows], return_index=True)
    return list(zip(found.tolist(), rows[first].tolist(), strict=True))


def _underlying_prices(kinds: _Kinds, markets: _Markets, prices: PriceFinder, underlying: Rows) -> Floats:
    """Return the price of each underlying: needed under an option, else NaN where unknown."""
    needed = dict(_first_rows(underlying, kinds.option)) if kinds.option.any() else {}
    found = np.full(len(markets.names), np.nan)
    for j, name in enumerate(markets.names):
        if j in needed:
            found[j] = prices.asset(name, f"/positions/{needed[j]}/underlying")
        elif (known := prices.known(name)) is not None:
            found[j] = known
    return found


def _unrealized_pnl(terms: PositionTerms, kinds: _Kinds, units: Floats, marks: Floats) -> Floats:
    """Return signed units x (mark - entry) of linear rows that give an entry price, else 0."""
    if not _given(terms.entry_price):
        return np.zeros(len(units))
    entry = _floats(terms.entry_price)
    known = kinds.linear & ~np.isnan(entry)
    return np.where(known, units * (marks - np.where(known, entry, 0.0)), 0.0)


def _initial_rate(terms: PositionTerms, markets: _Markets) -> Floats:
    """Return max(market rate, 1/leverage): a position's own leverage only raises it."""
    rate = markets.initial_rate[markets.code]
    if not _given(terms.leverage):
        return rate
    return np.maximum(rate, 1.0 / _floats(terms.leverage, np.inf))


def _widest(markets: _Markets) -> Floats:
    """Return the price range of each underlying: the widest of its markets in the book."""
    widest = np.zeros(len(markets.names))
    np.maximum.at(widest, markets.underlying, markets.price_range)
    return widest


def _delta(terms: PositionTerms, kinds: _Kinds, side: Floats, notional: Floats, options: Options) -> Floats:
    delta = side
    if kinds.greeks.any():
        delta = np.where(kinds.greeks, _floats(terms.delta), side)
    if len(options):
        dollars = options.dollar_delta()
        under = notional[options.row]
        delta[options.row] = np.divide(dollars, under, out=np.zeros_like(dollars), where=under > 0)
    return delta


def _options(
    terms: PositionTerms,
    mask: Flags,
    underlying: Rows,
    quantity: Floats,
    under_prices: Floats,
    models: ModelParameters,
    now: datetime,
) -> Options:
    rows = np.flatnonzero(mask)
    rows = rows[np.argsort(underlying[rows], kind="stable")]
    years = _years(terms, rows, now)
    forward = _floats(terms.forward)[rows]
    forward = np.where(np.isnan(forward), under_prices[underlying[rows]], forward)
    days = years * YEAR_DAYS
    table = Options(
        row=rows,
        underlying=underlying[rows],
        quantity=quantity[rows],
        forward=forward,
        strike=_floats(terms.strike)[rows],
        years=years,
        iv=_floats(terms.iv)[rows],
        discount=np.exp(-_floats(terms.rate, 0.0)[rows] * years),
        sign=np.array([_SIGN[terms.type[i]] for i in rows.tolist()], dtype=np.float64),
        term=black76.term_factor(days, models.term_days, models.term_power_short, models.term_power_long),
        value=np.empty(len(rows)),
    )
    table.value[:] = table.values(np.zeros(1))[:, 0]
    return table


def _years(terms: PositionTerms, rows: Rows, now: datetime) -> Floats:
    """Return the years of 365 days to each expiry. Raises InvalidError `option_expired`."""
    # _check_columns has seen an expiry on every option row
    expiries = cast("list[datetime]", [terms.expiry[i] for i in rows.tolist()])
    years = np.array([(e - now).total_seconds() for e in expiries]) / YEAR_SECONDS
    gone = np.flatnonzero(years <= 0.0)
    if gone.size:
        pointer = f"/positions/{rows[gone[0]]}/expiry"
        raise invalid(pointer, "option_expired", f"the option expired before {now.isoformat()}")
    return years
