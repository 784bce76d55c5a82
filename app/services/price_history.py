"""Bars of one minute out of the prices that are posted, by the moment that each price is dated.

A bar does not depend on the order in which its prices arrive: a late price, which no longer becomes the latest one,
still opens, closes or widens the minute that it is dated in. Two prices of one moment are the exception: where it is
the latest moment, the second is in no bar, as it is ignored among the latest prices; where it is past, the second
widens the bar, but the first to arrive opens or closes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from sqlalchemy import ARRAY, DateTime, Integer, Numeric, Text, bindparam, select, text

from app.db.session import Tx
from app.db.tables import price_bars

BARS_A_PAGE_MAX = 200
BARS_A_PURGE_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Bar:
    """The prices of a minute: the earliest, the highest, the lowest and the latest dated, USD."""

    minute: datetime
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal


# Only bars that change are written. It follows the upsert of the latest prices, so that what is stored is as new as
# what is posted: at the same moment and with another price, it is another post's.
_UPSERT_BARS = text(
    """
    INSERT INTO price_bars AS bar (symbol, minute, open, high, low, close, opened_at, closed_at)
    SELECT posted.symbol, :minute, posted.price, posted.price, posted.price, posted.price, :as_of, :as_of
    FROM unnest(:symbols, :prices) AS posted (symbol, price)
    JOIN market_prices AS latest ON latest.symbol = posted.symbol
    WHERE latest.as_of > :as_of OR latest.price = posted.price
    ON CONFLICT (symbol, minute) DO UPDATE
    SET open = CASE WHEN excluded.opened_at < bar.opened_at THEN excluded.open ELSE bar.open END,
        high = greatest(bar.high, excluded.high),
        low = least(bar.low, excluded.low),
        close = CASE WHEN excluded.closed_at > bar.closed_at THEN excluded.close ELSE bar.close END,
        opened_at = least(bar.opened_at, excluded.opened_at),
        closed_at = greatest(bar.closed_at, excluded.closed_at)
    WHERE excluded.high > bar.high OR excluded.low < bar.low
       OR excluded.opened_at < bar.opened_at OR excluded.closed_at > bar.closed_at
    """
).bindparams(
    bindparam("minute", type_=DateTime(timezone=True)),
    bindparam("as_of", type_=DateTime(timezone=True)),
    bindparam("symbols", type_=ARRAY(Text)),
    bindparam("prices", type_=ARRAY(Numeric)),
)

# Every symbol with bars has a latest price: through the symbols the primary key finds old bars, and no index by
# minute alone is needed.
_PURGE_BARS = text(
    """
    DELETE FROM price_bars USING (
        SELECT old.symbol, old.minute
        FROM market_prices CROSS JOIN LATERAL (
            SELECT symbol, minute FROM price_bars
            WHERE price_bars.symbol = market_prices.symbol AND price_bars.minute < :before
            ORDER BY minute LIMIT :most
        ) AS old
        LIMIT :most
    ) AS old
    WHERE price_bars.symbol = old.symbol AND price_bars.minute = old.minute
    """
).bindparams(bindparam("before", type_=DateTime(timezone=True)), bindparam("most", type_=Integer))


async def add(tx: Tx, symbols: Sequence[str], prices: Sequence[Decimal], as_of: datetime) -> None:
    """Put prices of one moment into their bars, in the transaction that has just posted them."""
    minute = as_of.astimezone(UTC).replace(second=0, microsecond=0)
    values = {"symbols": symbols, "prices": prices, "as_of": as_of, "minute": minute}
    await tx.connection.execute(_UPSERT_BARS, values)


async def list_bars(
    tx: Tx, symbol: str, limit: int, *, start: datetime, end: datetime, after: datetime | None = None
) -> list[Bar]:
    """Return bars of a symbol, earliest first, with start <= minute < end and past the minute `after`."""
    columns = price_bars.c
    query = select(columns.minute, columns.open, columns.high, columns.low, columns.close)
    query = query.where(columns.symbol == symbol, columns.minute >= start, columns.minute < end)
    if after is not None:
        query = query.where(columns.minute > after)
    rows = await tx.connection.execute(query.order_by(columns.minute).limit(min(limit, BARS_A_PAGE_MAX)))
    return [Bar(**row) for row in rows.mappings()]


async def purge(tx: Tx, before: datetime, most: int = BARS_A_PURGE_MAX) -> bool:
    """Delete bars of minutes before a moment, at most so many; tell whether there may be more of them."""
    done = await tx.connection.execute(_PURGE_BARS, {"before": before, "most": most})
    return done.rowcount >= most
