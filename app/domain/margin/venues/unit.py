"""A book cut into its underlyings, each revalued over a venue's scenarios."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.domain import black76
from app.domain.black76 import Floats
from app.domain.parameters import MarketParameters
from app.domain.portfolio import Flags, Options, Portfolio, Rows
from app.errors import invalid, pointer_to

YEAR_DAYS = 365.0
YEAR_SECONDS = YEAR_DAYS * 86_400.0
UNIT_MILLISECONDS = 0.4
"""Roughly what a venue's margin of one underlying takes of one core, options aside, on small machines."""
VOLATILITY_LEAST = 1e-9
"""Where a venue's rule lets a volatility fall to 0: an option is then worth its intrinsic value to the last digit."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The m positions on one underlying, money in USD; `column` is the underlying's place in the book.

    `price` is the underlying's, NaN where none is known, `mark` (m,) each contract's, for an option its underlying's.
    `rows` are the positions' rows, `spread` (m,) their parts of what is of none of them, `exposure`, `gamma`, `vega`
    those of linear and greeks positions (0 for options), `years` to the expiry of dated futures (NaN for others).
    `options` are the unit's, their `row` counted within it.
    """

    name: str
    column: int
    rows: Rows
    symbols: tuple[str, ...]
    spread: Floats
    price: float
    mark: Floats
    exposure: Floats
    gamma: Floats
    vega: Floats
    years: Floats
    options: Options

    def __len__(self) -> int:
        return len(self.rows)

    def spot(self) -> float:
        """Return the underlying's price, USD. Raises InvalidError `missing_price` where none is known."""
        if np.isnan(self.price):
            pointer = pointer_to("market", "prices", self.name)
            raise invalid(pointer, "missing_price", f"no price of {self.name} is given or stored")
        return self.price

    def marks(self) -> Floats:
        """Return what each position's contract trades at (m,), USD: the underlying's price where it has no mark."""
        return np.where(np.isnan(self.mark), self.spot(), self.mark) if np.isnan(self.mark).any() else self.mark

    def coins(self) -> Floats:
        """Return the signed deltas (m,) in units of the underlying: a linear position's size, an option's dV/dF."""
        coins: Floats = self.exposure / self.marks()
        if len(self.options):
            coins[self.options.row] = self.options.dollar_delta() / self.options.forward
        return coins

    def instruments(self) -> Rows:
        """Return which instrument each position is of (m,), numbered in order of appearance."""
        return numbered(self.symbols)

    def expiry(self) -> Floats:
        """Return the years to expiry (m,) of options and dated futures, NaN for others."""
        years = self.years.copy()
        years[self.options.row] = self.options.years
        return years

    def pnl(self, moves: Floats, vol_moves: Floats, iv: Floats, moving: Floats | None = None) -> Floats:
        """Return each position's profit and loss (m, S), USD, at relative price moves (S,).

        `vol_moves` (S,) are the greeks positions', `iv` (O, S) the options' volatilities, `moving` (O,) what part of
        an option's forward moves: all of it unless given.
        """
        pnl: Floats = self.exposure[:, None] * moves
        if np.count_nonzero(self.gamma):
            pnl += (0.5 * self.gamma)[:, None] * moves * moves
        if np.count_nonzero(self.vega):
            pnl += self.vega[:, None] * vol_moves
        if len(self.options):
            own = moves if moving is None else moves * moving[:, None]
            pnl[self.options.row] = self.options.values(own, iv) - self.options.value[:, None]
        return pnl


def units(portfolio: Portfolio) -> list[Unit]:
    """Return the units of the underlyings that the book has open positions on, in the order of its underlyings."""
    held = portfolio.notional > 0.0
    is_open = np.zeros(len(portfolio.prices), dtype=np.bool_)
    is_open[portfolio.underlying[held]] = True
    years = portfolio.years if portfolio.years is not None else np.full(len(portfolio), np.nan)
    straight = ~portfolio.is_option
    columns = {
        "mark": portfolio.mark,
        "exposure": np.where(straight, portfolio.exposure, 0.0),
        "gamma": np.where(straight, portfolio.gamma * portfolio.notional, 0.0),
        "vega": np.where(straight, portfolio.vega, 0.0),
        "years": years,
    }
    order = np.argsort(portfolio.underlying, kind="stable")
    bounds = np.searchsorted(portfolio.underlying[order], np.arange(len(portfolio.prices) + 1))
    found = []
    for j in np.flatnonzero(is_open).tolist():
        rows = order[bounds[j] : bounds[j + 1]]
        found.append(
            Unit(
                name=portfolio.underlyings.names[j],
                column=j,
                rows=rows,
                symbols=tuple([portfolio.symbols[row] for row in rows.tolist()]),
                spread=_parts(np.abs(portfolio.exposure[rows]), portfolio.notional[rows]),
                price=float(portfolio.prices[j]),
                **{name: column[rows] for name, column in columns.items()},
                options=_options_of(portfolio.options, j, rows),
            )
        )
    return found


def check_expiries(unit: Unit, market: MarketParameters) -> None:
    """Refuse a listed future that nothing says the expiry of. Raises InvalidError `missing_expiry`."""
    for symbol in dict.fromkeys(unit.symbols):
        instrument = market.instruments.get(symbol)
        if instrument is not None and instrument.kind == "future" and instrument.expires_at is None:
            pointer = pointer_to("market", "instruments", symbol, "expiry")
            raise invalid(pointer, "missing_expiry", f"nothing says when the future {symbol} expires")


def settlement_asset(symbol: str, parameters: MarketParameters) -> str | None:
    """Return the stablecoin that a contract is quoted in, as USDT of BTC-USDT-SWAP; None where it is none."""
    for quoted in symbol.replace("/", "-").split("-")[1:2]:
        if quoted in parameters.assets and parameters.asset(quoted).kind == "stable":
            return quoted
    return None


def is_spot(symbol: str, underlying: str, parameters: MarketParameters) -> bool:
    """Whether a symbol is the coin itself: as listed, else by its name, as BTC, BTC-USDT or BTC/USD."""
    listed = parameters.instruments.get(symbol)
    if listed is not None:
        return listed.kind == "spot"
    base, *quoted = symbol.replace("/", "-").split("-")
    in_dollars = quoted == ["USD"] or (len(quoted) == 1 and settlement_asset(symbol, parameters) is not None)
    return base == underlying and (not quoted or in_dollars)


def holdings(unit: Unit, portfolio: Portfolio, market: MarketParameters) -> Flags:
    """Return which positions (m,) are the coin itself, by what its symbol is listed as or named.

    A greeks position is one only where it is as good as the coin: of delta one, without gamma and vega.
    """
    spot = {symbol for symbol in set(unit.symbols) if is_spot(symbol, unit.name, market)}
    plain = (np.abs(portfolio.delta[unit.rows]) == 1.0) & (unit.gamma == 0.0) & (unit.vega == 0.0)
    held: Flags = plain & np.array([symbol in spot for symbol in unit.symbols], dtype=np.bool_)
    return held


def numbered(keys: Sequence[Hashable]) -> Rows:
    """Return each key's number, counted in order of appearance."""
    number = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys], dtype=np.intp)


def _parts(gross: Floats, notional: Floats) -> Floats:
    """Return shares (m,) that sum to 1: by gross exposure, by notional where that is nothing."""
    by = gross if gross.sum() > 0.0 else notional
    shares: Floats = by / by.sum()
    return shares


def _options_of(options: Options, underlying: int, rows: Rows) -> Options:
    part = options.take(options.underlying == underlying)
    return replace(part, row=np.searchsorted(rows, part.row))


def term_scale(options: Options, term_days: float, power_short: float, power_long: float) -> Floats:
    """Return (term_days / max(DTE, 1))^p (O,), p the short power below `term_days`, else the long one."""
    return black76.term_factor(options.years * YEAR_DAYS, term_days, power_short, power_long)
