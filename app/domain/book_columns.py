"""Many books as columns: what the screen is built from, and brought up to date with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from app.domain.black76 import Floats
from app.domain.book import Book
from app.domain.money import to_float
from app.domain.parameters import MarginMode
from app.domain.portfolio import Flags, Rows

Codes = NDArray[np.int8]
Versions = NDArray[np.int64]

MODES: tuple[MarginMode, ...] = get_args(MarginMode)
ISOLATED, PORTFOLIO = MODES.index("isolated"), MODES.index("portfolio")


@dataclass(frozen=True, slots=True)
class PositionColumns:
    """Open positions (n,): `account` and `symbol` point into the names of the BookColumns.

    `size` in contracts, negative for a short; `entry_price` USD; `leverage` NaN where none was chosen; `allocated` USD.
    """

    account: Rows
    symbol: Rows
    size: Floats
    entry_price: Floats
    leverage: Floats
    isolated: Flags
    allocated: Floats


@dataclass(frozen=True, slots=True)
class HoldingColumns:
    """Units of an asset (n,), all >= 0: held, of those reserved and lent out, and owed; rows of one asset add up."""

    account: Rows
    asset: Rows
    held: Floats
    owed: Floats
    reserved: Floats
    lent: Floats


@dataclass(frozen=True, slots=True)
class BookColumns:
    """The whole books of A different agents.

    `mode` is an index into MODES; `breach` is the account's own level of utilization, NaN where it has none.
    """

    agents: Sequence[str]
    version: Versions
    mode: Codes
    breach: Floats
    open_call: Flags
    symbols: Sequence[str]
    assets: Sequence[str]
    positions: PositionColumns
    holdings: HoldingColumns


def book_columns(books: Sequence[Book], open_calls: frozenset[str] = frozenset()) -> BookColumns:
    """Return books as columns; `open_calls` names the agents with an open margin call."""
    symbols: dict[str, int] = {}
    assets: dict[str, int] = {}
    positions = [
        (
            k,
            symbols.setdefault(p.symbol, len(symbols)),
            to_float(p.size) if p.side == "long" else -to_float(p.size),
            to_float(p.entry_price),
            np.nan if p.leverage is None else to_float(p.leverage),
            p.margin_mode == "isolated",
            to_float(p.allocated),
        )
        for k, book in enumerate(books)
        for p in book.positions
    ]
    holdings: list[tuple[float, ...]] = []
    for k, book in enumerate(books):
        held = {
            asset: (to_float(h.held), to_float(h.debt), 0.0, to_float(h.lent)) for asset, h in book.holdings.items()
        }
        rows = [*held.items(), *((r.asset, (0.0, 0.0, to_float(r.remaining), 0.0)) for r in book.reservations)]
        holdings += [(k, assets.setdefault(asset, len(assets)), *units) for asset, units in rows if any(units)]
    return BookColumns(
        agents=[book.agent_id for book in books],
        version=np.array([book.version for book in books], dtype=np.int64),
        mode=np.array([MODES.index(book.settings.margin_mode) for book in books], dtype=np.int8),
        breach=np.array([book.settings.breach_utilization for book in books], dtype=np.float64),
        open_call=np.array([book.agent_id in open_calls for book in books], dtype=np.bool_),
        symbols=tuple(symbols),
        assets=tuple(assets),
        positions=PositionColumns(**_transposed(positions, PositionColumns)),
        holdings=HoldingColumns(**_transposed(holdings, HoldingColumns)),
    )


_DTYPES: Mapping[str, type[np.generic]] = {
    "account": np.intp,
    "symbol": np.intp,
    "asset": np.intp,
    "isolated": np.bool_,
}


def _transposed(
    rows: Sequence[tuple[float, ...]], kind: type[PositionColumns | HoldingColumns]
) -> dict[str, NDArray[Any]]:
    names = kind.__slots__
    columns = zip(*rows, strict=True) if rows else ((),) * len(names)
    return {n: np.array(values, dtype=_DTYPES.get(n, np.float64)) for n, values in zip(names, columns, strict=True)}
