"""What a caller says of its positions, and the Portfolio that follows from it with market data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import lru_cache
from itertools import repeat
from operator import attrgetter
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from app.domain import black76
from app.domain.black76 import Floats
from app.domain.computed import computed
from app.domain.parameters import MarketParameters, ModelParameters
from app.domain.portfolio import (
    Flags,
    Options,
    Portfolio,
    Rows,
    Underlyings,
    no_options,
    underlying_table,
)
from app.domain.prices import PriceFinder
from app.domain.record import record
from app.errors import FieldError, InvalidError, invalid

S = TypeVar("S", bound=np.generic)

YEAR_SECONDS = 31_536_000.0
YEAR_DAYS = 365.0
FORWARD_MIN, FORWARD_MAX = 0.5, 2.0
"""Multiples of the underlying's price that a forward lies within."""
REMEMBERED_MARKETS_MAX = 64
"""Books on more markets are resolved anew each time: their tables are large, and seldom asked for twice."""
REMEMBERED_ROWS_MAX = 512
"""Likewise books of more positions."""

_SIGN = {"long": 1.0, "short": -1.0, None: np.nan, "call": 1.0, "put": -1.0}


MarketKey = tuple[str | None, str | None]
"""A symbol and an underlying, as a position gives them."""


@record(frozen=True, eq=False)
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

    @computed
    def given(self) -> frozenset[str]:
        """The columns that any row gives: of a usual book six out of twenty."""
        rows = len(self)
        columns = zip(_COLUMNS, _all_columns(self), strict=True) if rows else ()
        # most columns tell by their first row
        return frozenset([name for name, values in columns if values[0] is not None or values.count(None) < rows])

    @computed
    def full(self) -> frozenset[str]:
        """The columns in which every row has a value other than 0: surely none of them is left out."""
        return frozenset([name for name in self.given if all(getattr(self, name))])

    @computed
    def markets(self) -> tuple[tuple[int, ...], tuple[MarketKey, ...]]:
        """Each row's market (n,), and the different markets that it points to, in order of appearance."""
        number = _numbered_before if len(self) <= REMEMBERED_ROWS_MAX else _numbered
        # symbols alone are compared faster than pairs
        return number(tuple(self.symbol), tuple(self.underlying) if "underlying" in self.given else None)

    def floats(self, name: str, default: float = np.nan) -> Floats:
        """Return a column of numbers (n,) with `default` for what was left out."""
        if name not in self.given:
            values = np.zeros(len(self))
            if default:
                values.fill(default)
            return values
        values = np.array(getattr(self, name), dtype=np.float64)
        if name not in self.full and default == default:  # noqa: PLR0124  None became NaN, as the default may be
            values[np.isnan(values)] = default
        return values


_COLUMNS = tuple(field.name for field in fields(PositionTerms))
_all_columns = attrgetter(*_COLUMNS)


def _numbered(
    symbols: tuple[str | None, ...], underlyings: tuple[str | None, ...] | None
) -> tuple[tuple[int, ...], tuple[MarketKey, ...]]:
    """Return each row's market, and the different markets, numbered in order of appearance."""
    keys = list(zip(symbols, repeat(None) if underlyings is None else underlyings, strict=False))
    number = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return tuple([number[key] for key in keys]), tuple(number)


# an agent asks for the same positions again and again, at other sizes and prices
_numbered_before = lru_cache(maxsize=256)(_numbered)


def _flags(column: Sequence[Any]) -> Flags:
    return np.array([v is not None for v in column], dtype=np.bool_)


@record(frozen=True, slots=True)
class _Kinds:
    """Which rows (n,) are of which kind, and which kinds there are."""

    linear: Flags
    greeks: Flags
    option: Flags
    any_linear: bool
    any_greeks: bool
    any_option: bool


_OPTION_COLUMNS = frozenset(("strike", "type", "expiry"))
_GREEKS_COLUMNS = frozenset(("notional", "delta", "gamma", "vega"))


def _kinds(terms: PositionTerms) -> _Kinds:
    if terms.given.isdisjoint(_OPTION_COLUMNS | _GREEKS_COLUMNS):  # the book that most agents have
        none = np.zeros(len(terms), dtype=np.bool_)
        return _Kinds(~none, none, none, len(terms) > 0, any_greeks=False, any_option=False)
    option = _any_flags(terms, _OPTION_COLUMNS)
    greeks = _any_flags(terms, _GREEKS_COLUMNS) & ~option
    linear = ~(option | greeks)
    return _Kinds(linear, greeks, option, *(bool(np.count_nonzero(rows)) for rows in (linear, greeks, option)))


def _any_flags(terms: PositionTerms, names: frozenset[str]) -> Flags:
    """Return the rows (n,) that give any of the columns."""
    flags = np.zeros(len(terms), dtype=np.bool_)
    for name in terms.given & names:
        flags |= _flags(getattr(terms, name))
    return flags


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
    masks = (
        ("linear", kinds.any_linear, kinds.linear),
        ("greeks", kinds.any_greeks, kinds.greeks),
        ("option", kinds.any_option, kinds.option),
    )
    for kind, is_there, mask in masks:
        if not is_there:
            continue
        for name in _NEEDS[kind]:
            if name not in terms.full and None in (column := getattr(terms, name)):
                absent = mask & ~_flags(column)
                errors += [_field(i, name, "missing", f"a {kind} position needs {name}") for i in _first(absent)]
        for name in _FOREIGN[kind]:
            if name in terms.given:
                extra = mask & _flags(getattr(terms, name))
                errors += [_field(i, name, "not_allowed", f"a {kind} position takes no {name}") for i in _first(extra)]
    if kinds.any_greeks and "short" in terms.side:
        short = kinds.greeks & np.array([side == "short" for side in terms.side], dtype=np.bool_)
        errors += [_field(i, "side", "not_allowed", "a greeks position is short by its delta") for i in _first(short)]
    if errors:
        raise InvalidError(detail=errors[0].detail, code="invalid_position", errors=tuple(errors))


def _first(mask: Flags) -> list[int]:
    """Return the first few rows: enough to mend a request without a reply as long as it."""
    return [int(i) for i in mask.nonzero()[0][:5]]


def _field(row: int, name: str, code: str, detail: str) -> FieldError:
    return FieldError(f"/positions/{row}/{name}", code, detail)


@dataclass(frozen=True, slots=True)
class _Markets:
    """The different markets (C,) of a book: `underlying` (C,) points into the table's names."""

    symbols: tuple[str, ...]
    underlying: Rows
    contract_size: Floats
    initial_rate: Floats
    maintenance_rate: Floats
    price_range: Floats
    table: Underlyings
    repeated: bool
    """Whether a symbol stands for two of the markets: with its underlying and without."""
    closest: Rows
    """The markets (C,) in the order in which their marks price their underlying: itself, its perpetual, others."""
    expiry: Sequence[datetime | None]
    """Of each market; empty where none of them expires."""
    prices_asset: Sequence[tuple[str, bool]]
    """Of each market in that order: its underlying, and whether it is that asset or its perpetual."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """The markets of a book, and of each of its rows (n,): which one, on which underlying, and what that one sets."""

    markets: _Markets
    code: Rows
    underlying: Rows
    contract_size: Floats
    initial_rate: Floats
    maintenance_rate: Floats


def _place(terms: PositionTerms, parameters: MarketParameters) -> _Placed:
    """Return the rows at their markets, each distinct (symbol, underlying) resolved once."""
    code, keys = terms.markets

    few = len(keys) <= REMEMBERED_MARKETS_MAX

    def make() -> _Placed:
        markets = parameters.remembered(keys, resolve) if few else resolve()
        at = np.array(code, dtype=np.intp)
        return _Placed(
            markets=markets,
            code=at,
            underlying=_unwritable(markets.underlying[at]),
            contract_size=_unwritable(markets.contract_size[at]),
            initial_rate=_unwritable(markets.initial_rate[at]),
            maintenance_rate=_unwritable(markets.maintenance_rate[at]),
        )

    def resolve() -> _Markets:
        return _resolve(keys, code, parameters)

    # rows hold their markets, so that many markets are no more kept under them than by themselves
    is_kept = few and len(code) <= REMEMBERED_ROWS_MAX
    return parameters.remembered(("rows", code, keys), make) if is_kept else make()


def _unwritable(column: NDArray[S]) -> NDArray[S]:
    """Return the column, which several portfolios are to share."""
    column.setflags(write=False)
    return column


def _check_underlyings(keys: Sequence[MarketKey], code: Sequence[int], parameters: MarketParameters) -> None:
    """Refuse an underlying other than the one that a listed instrument or asset has. Raises InvalidError."""
    for c, (symbol, underlying) in enumerate(keys):
        if symbol is None or underlying is None or not parameters.lists(symbol):
            continue
        listed = parameters.underlying_of(symbol)
        if underlying != listed:
            pointer = f"/positions/{code.index(c)}/underlying"
            raise invalid(pointer, "conflicting_underlying", f"{symbol} is listed on {listed}, not on {underlying}")


def _resolve(keys: Sequence[MarketKey], code: Sequence[int], parameters: MarketParameters) -> _Markets:
    """Return the markets of the keys; `code` says only which row to blame."""
    _check_underlyings(keys, code, parameters)
    under = [u if u is not None else parameters.underlying_of(s or "") for s, u in keys]
    symbols = tuple(s if s is not None else u for (s, _), u in zip(keys, under, strict=True))
    names = tuple(sorted(set(under)))
    row = {name: j for j, name in enumerate(names)}
    listed = [parameters.market(s, u) for s, u in zip(symbols, under, strict=True)]
    underlying = np.array([row[u] for u in under], dtype=np.intp)
    # the widest range of an underlying's markets in the book holds for all of them
    widest, price_range = np.zeros(len(names)), np.array([m.price_range for m in listed], dtype=np.float64)
    np.maximum.at(widest, underlying, price_range)
    ranks = [_rank(symbol, name) for symbol, name in zip(symbols, under, strict=True)]
    closest = sorted(range(len(keys)), key=lambda c: (ranks[c], symbols[c]))
    return _Markets(
        symbols=symbols,
        underlying=underlying,
        contract_size=np.array([m.contract_size for m in listed], dtype=np.float64),
        initial_rate=np.array([m.initial_margin_rate for m in listed], dtype=np.float64),
        maintenance_rate=np.array([m.maintenance_margin_rate for m in listed], dtype=np.float64),
        price_range=price_range,
        table=underlying_table(names, widest, parameters),
        repeated=len(set(symbols)) < len(symbols),
        closest=np.array(closest, dtype=np.intp),
        expiry=[m.expiry for m in listed] if any(m.expiry for m in listed) else (),
        prices_asset=[(under[c], ranks[c] < _RANK_OF_OTHERS) for c in closest],
    )


_RANK_OF_OTHERS = 2


def _rank(symbol: str, underlying: str) -> int:
    return 0 if symbol == underlying else 1 if symbol == f"{underlying}-PERP" else _RANK_OF_OTHERS


def _without_flat(markets: _Markets, code: Rows, is_open: Flags) -> _Markets:
    """Return the markets with the ranges of the open positions alone: a flat one changes nothing."""
    held = np.zeros(len(markets.symbols), dtype=np.bool_)
    held[code[is_open]] = True
    ranges = np.zeros(len(markets.table.names))
    np.maximum.at(ranges, markets.underlying[held], markets.price_range[held])
    return replace(markets, table=replace(markets.table, price_range=ranges))


def _lowest_marks(size: Floats, code: Rows, markets: _Markets, marks: Floats) -> Floats:
    """Return the lowest of the marks (n,) that the open rows give for each market's symbol (C,), infinite without one.

    The lowest holds for the rows that give none, and prices the asset, so that the order of the rows does not matter.
    `size` (n,) is NaN where it was left out.
    """
    lowest = np.empty(len(markets.symbols))
    lowest.fill(np.inf)
    if np.count_nonzero(size) < len(size):  # a flat row prices nothing but itself
        is_open = size.nonzero()[0]
        code, marks = code[is_open], marks[is_open]
    np.fmin.at(lowest, code, marks)
    if not markets.repeated:
        return lowest
    # a symbol that stands with and without its underlying is two markets here, and one to its owner
    of_symbol: dict[str, float] = {}
    for symbol, mark in zip(markets.symbols, lowest.tolist(), strict=True):
        of_symbol[symbol] = min(mark, of_symbol.get(symbol, np.inf))
    return np.array([of_symbol[symbol] for symbol in markets.symbols], dtype=np.float64)


def _asset_marks(markets: _Markets, lowest: Floats) -> tuple[dict[str, float], dict[str, float]]:
    """Return the asset prices that the marks imply: of an asset itself or its perpetual, and of its other markets."""
    near: dict[str, float] = {}
    far: dict[str, float] = {}
    for (name, is_near), mark in zip(markets.prices_asset, lowest[markets.closest].tolist(), strict=True):
        if mark < np.inf and name not in near and name not in far:
            (near if is_near else far)[name] = mark
    return near, far


def build_portfolio(
    terms: PositionTerms, parameters: MarketParameters, prices: PriceFinder, now: datetime
) -> Portfolio:
    """Return the portfolio of the terms at the given prices.

    Marks come from the terms, else from `prices` (which remembers what it gave). Raises InvalidError with
    pointers `/positions/{row}/{field}` for a missing term or price, an expired option, a foreign term.
    """
    kinds = _kinds(terms)
    _check_columns(terms, kinds)
    placed = _place(terms, parameters)
    code, markets, underlying = placed.code, placed.markets, placed.underlying
    marks, size = terms.floats("mark_price"), terms.floats("size")
    lowest = _lowest_marks(size, code, markets, marks)
    prices.marks, prices.other_marks = _asset_marks(markets, lowest)
    if "mark_price" not in terms.full:
        marks = _fill_marks(marks, lowest, kinds, code, markets, prices)
    under_prices = _underlying_prices(kinds, markets, prices, underlying)
    side = np.fromiter(map(_SIGN.__getitem__, terms.side), np.float64, len(terms))
    units = _units(terms, size, placed.contract_size)
    notional = units * marks
    delta, options = side, no_options()
    if kinds.any_option:
        marks = np.where(kinds.option, under_prices[underlying], marks)
        notional = units * marks
        options = _options(terms, kinds.option, underlying, side * units, under_prices, parameters.models, now)
    if kinds.any_greeks:
        notional = np.where(kinds.greeks, terms.floats("notional", 0.0), notional)
        delta = np.where(kinds.greeks, terms.floats("delta"), delta)
    if len(options):
        delta = _with_option_delta(delta, notional, options)
    gamma, vega = terms.floats("gamma", 0.0), terms.floats("vega", 0.0)
    if np.count_nonzero(notional) < len(notional):
        markets = _without_flat(markets, code, notional > 0.0)
    return Portfolio(
        symbols=_labels(terms, kinds),
        underlying=underlying,
        notional=notional,
        delta=delta,
        gamma=gamma,
        vega=vega,
        mark=marks,
        unrealized_pnl=_unrealized_pnl(terms, kinds, side * units, marks),
        initial_rate=_initial_rate(terms, placed.initial_rate),
        maintenance_rate=placed.maintenance_rate,
        is_option=kinds.option,
        isolated=_isolated(terms),
        allocated=terms.floats("allocated_collateral"),
        options=options,
        underlyings=markets.table,
        prices=under_prices,
        years=_years_of_futures(markets.expiry, now)[code] if markets.expiry else None,
    )


def _years_of_futures(expiries: Sequence[datetime | None], now: datetime) -> Floats:
    """Return the years of 365 days to each expiry (C,), 0 when it is past, NaN without one."""
    seconds = [np.nan if expiry is None else max(0.0, (expiry - now).total_seconds()) for expiry in expiries]
    return np.array(seconds) / YEAR_SECONDS


def _units(terms: PositionTerms, size: Floats, contract: Floats) -> Floats:
    """Return size x contract size (n,), 0 without a size; a position's own contract size goes before its market's."""
    if "contract_size" in terms.given:
        own = terms.floats("contract_size")
        contract = np.where(np.isnan(own), contract, own)
    units: Floats = size * contract
    if "size" not in terms.full:
        units[np.isnan(units)] = 0.0
    return units


def _labels(terms: PositionTerms, kinds: _Kinds) -> tuple[str, ...]:
    if not kinds.any_option:
        # _check_columns has seen a symbol on every other row
        return cast("tuple[str, ...]", tuple(terms.symbol))
    rows = zip(terms.symbol, terms.underlying, terms.expiry, terms.strike, terms.type, strict=True)
    return tuple([s if s is not None else _option_label(u, e, k, t) for s, u, e, k, t in rows])


def _option_label(underlying: str | None, expiry: datetime | None, strike: float | None, kind: str | None) -> str:
    """Return a name in the venues' way, such as BTC-25DEC26-100000-C."""
    return f"{underlying}-{expiry:%d%b%y}-{strike:g}-{(kind or '')[:1]}".upper()


def _fill_marks(
    marks: Floats, lowest: Floats, kinds: _Kinds, code: Rows, markets: _Markets, prices: PriceFinder
) -> Floats:
    """Return the marks with those left out found; greeks rows keep NaN where nothing is known."""
    absent = np.isnan(marks) & ~kinds.option
    if not np.count_nonzero(absent):
        return marks
    found = np.where(np.isinf(lowest), np.nan, lowest)
    for c, row in _first_rows(code, absent & kinds.linear & np.isnan(found[code])):
        name = markets.table.names[markets.underlying[c]]
        found[c] = prices.mark(markets.symbols[c], name, f"/positions/{row}/mark_price")
    for c, _ in _first_rows(code, absent & kinds.greeks & np.isnan(found[code])) if kinds.any_greeks else ():
        known = prices.known(markets.table.names[markets.underlying[c]])
        found[c] = np.nan if known is None else known
    return np.where(absent, found[code], marks)


def _first_rows(groups: Rows, mask: Flags) -> list[tuple[int, int]]:
    """Return (group, its first row) of each group that has a row in the mask."""
    first: dict[int, int] = {}
    for row, group, chosen in zip(range(len(groups)), groups.tolist(), mask.tolist(), strict=True):
        if chosen and group not in first:
            first[group] = row
    return sorted(first.items())


def _underlying_prices(kinds: _Kinds, markets: _Markets, prices: PriceFinder, underlying: Rows) -> Floats:
    """Return the price of each underlying: needed under an option, else NaN where unknown."""
    if not kinds.any_option:
        return np.array(prices.known_all(markets.table.names), dtype=np.float64)
    needed = dict(_first_rows(underlying, kinds.option))
    return np.array(
        [
            prices.asset(name, f"/positions/{needed[j]}/underlying") if j in needed else prices.known(name)
            for j, name in enumerate(markets.table.names)
        ],
        dtype=np.float64,
    )


def _unrealized_pnl(terms: PositionTerms, kinds: _Kinds, units: Floats, marks: Floats) -> Floats:
    """Return signed units x (mark - entry) of linear rows that give an entry price, else 0."""
    if "entry_price" not in terms.given:
        return np.zeros(len(units))
    entry = terms.floats("entry_price")
    pnl: Floats = units * (marks - entry)
    if kinds.any_greeks or kinds.any_option or "entry_price" not in terms.full:
        pnl[np.isnan(entry) | ~kinds.linear] = 0.0
    return pnl


def _initial_rate(terms: PositionTerms, rate: Floats) -> Floats:
    """Return max(market rate, 1/leverage): a position's own leverage only raises it."""
    if "leverage" not in terms.given:
        return rate
    return np.maximum(rate, 1.0 / terms.floats("leverage", np.inf))


def _with_option_delta(delta: Floats, notional: Floats, options: Options) -> Floats:
    """Return the deltas (n,) with the options' dollar deltas per unit of notional; 0 where flat."""
    filled = delta.copy()
    dollars, under = options.dollar_delta(), notional[options.row]
    filled[options.row] = np.divide(dollars, under, out=np.zeros_like(dollars), where=under > 0.0)
    return filled


def _isolated(terms: PositionTerms) -> Flags:
    if "margin_mode" not in terms.given:
        return np.zeros(len(terms), dtype=np.bool_)
    return np.array([mode == "isolated" for mode in terms.margin_mode], dtype=np.bool_)


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
    days = years * YEAR_DAYS
    table = Options(
        row=rows,
        underlying=underlying[rows],
        quantity=quantity[rows],
        forward=_forwards(terms, rows, under_prices[underlying[rows]]),
        strike=terms.floats("strike")[rows],
        years=years,
        iv=terms.floats("iv")[rows],
        discount=np.exp(-terms.floats("rate", 0.0)[rows] * years),
        sign=np.array([_SIGN[terms.type[i]] for i in rows.tolist()], dtype=np.float64),
        term=black76.term_factor(days, models.term_days, models.term_power_short, models.term_power_long),
        value=np.empty(len(rows)),
    )
    table.value[:] = table.values(np.zeros(1))[:, 0]
    return table


def _forwards(terms: PositionTerms, rows: Rows, prices: Floats) -> Floats:
    """Return the options' forwards (M,), the underlying's price where none is given.

    Raises InvalidError `forward_off_market`: a forward that no carry explains values the option at will.
    """
    if "forward" not in terms.given:
        return prices
    given = terms.floats("forward")[rows]
    off = (given < FORWARD_MIN * prices) | (given > FORWARD_MAX * prices)
    if np.count_nonzero(off):
        k = int(np.flatnonzero(off)[0])
        detail = f"a forward is {FORWARD_MIN:g} to {FORWARD_MAX:g} times its underlying's price, {prices[k]:.15g}"
        raise invalid(f"/positions/{rows[k]}/forward", "forward_off_market", detail)
    return np.where(np.isnan(given), prices, given)


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
