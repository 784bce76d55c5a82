"""The latest price of each symbol: the newer moment wins. Writers go one by one, by the market's version of prices."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from sqlalchemy import ARRAY, BigInteger, DateTime, Numeric, Text, any_, bindparam, func, select, text

from app.db.tables import PRICES, market_prices
from app.domain.money import to_float
from app.domain.prices import StoredPrice
from app.errors import NotFoundError, invalid
from app.services import market_rules as rules
from app.services import price_history
from app.services.market import stablecoins
from app.services.parameter_versions import bump_version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

    from app.db.session import Tx

PRICES_A_POST_MAX = 10_000
PRICE_MOMENT_MIN = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class PostedPrice:
    """A price as it was posted: USD, the moment its sender says it held, and when it arrived."""

    symbol: str
    price: Decimal
    as_of: datetime
    received_at: datetime


@dataclass(frozen=True, slots=True)
class PostedPrices:
    """How many posted prices now stand, and how many gave way to one as new or newer."""

    accepted: int
    ignored: int


async def load_prices(tx: Tx, after: int = 0) -> dict[str, StoredPrice]:
    """Return the prices that were posted past a price version; all of them past 0."""
    columns = market_prices.c
    query = select(columns.symbol, columns.price, columns.as_of).where(columns.version > after)
    rows = await tx.connection.execute(query)
    return {symbol: StoredPrice(to_float(price), as_of, price) for symbol, price, as_of in rows}


async def moments(tx: Tx, symbols: Sequence[str]) -> dict[str, datetime]:
    """Return the moments that the stored prices of these symbols are dated."""
    columns = market_prices.c
    query = select(columns.symbol, columns.as_of).where(columns.symbol == any_(bindparam("symbols", type_=ARRAY(Text))))
    rows = await tx.connection.execute(query, {"symbols": list(symbols)})
    return {row.symbol: row.as_of for row in rows}


async def worth(tx: Tx, assets: Sequence[str]) -> dict[str, float]:
    """Return the USD a unit of these assets by their stored prices, however old; without one a stablecoin is 1."""
    columns = market_prices.c
    query = select(columns.symbol, columns.price).where(columns.symbol == any_(bindparam("symbols", type_=ARRAY(Text))))
    rows = await tx.connection.execute(query, {"symbols": list(assets)})
    return dict.fromkeys(await stablecoins(tx, assets), 1.0) | {symbol: to_float(price) for symbol, price in rows}


async def last_received(tx: Tx, symbols: Sequence[str]) -> datetime | None:
    """Return when the newest of the stored prices of these symbols arrived."""
    columns = market_prices.c
    query = select(func.max(columns.received_at)).where(columns.symbol == any_(bindparam("symbols", type_=ARRAY(Text))))
    found: datetime | None = (await tx.connection.execute(query, {"symbols": list(symbols)})).scalar_one()
    return found


async def list_prices(tx: Tx, limit: int, after: str = "") -> list[PostedPrice]:
    """Return prices with the digits they were posted with, by symbol, from past the symbol `after`."""
    columns = market_prices.c
    query = select(columns.symbol, columns.price, columns.as_of, columns.received_at)
    rows = await tx.connection.execute(query.where(columns.symbol > after).order_by(columns.symbol).limit(limit))
    return [PostedPrice(**row) for row in rows.mappings()]


async def get_price(tx: Tx, symbol: str) -> PostedPrice:
    """Return the latest price of a symbol; NotFoundError when none was ever posted."""
    columns = market_prices.c
    query = select(columns.symbol, columns.price, columns.as_of, columns.received_at).where(columns.symbol == symbol)
    row = (await tx.connection.execute(query)).mappings().first()
    if row is None:
        raise NotFoundError(f"There is no price of {symbol}.", code="price_not_found")
    return PostedPrice(**row)


# A price gives way to a newer one alone. The same price of the same time is written again, so that a post
# that is sent twice is answered alike.
_UPSERT_PRICES = text(
    """
    INSERT INTO market_prices AS stored (symbol, price, as_of, received_at, version)
    SELECT symbol, price, :as_of, :now, :version
    FROM unnest(:symbols, :prices) AS posted (symbol, price)
    ON CONFLICT (symbol) DO UPDATE
    SET price = excluded.price, as_of = excluded.as_of,
        received_at = excluded.received_at, version = excluded.version
    WHERE stored.as_of < excluded.as_of
       OR stored.as_of = excluded.as_of AND stored.price = excluded.price
    """
).bindparams(
    bindparam("as_of", type_=DateTime(timezone=True)),
    bindparam("now", type_=DateTime(timezone=True)),
    bindparam("version", type_=BigInteger),
    bindparam("symbols", type_=ARRAY(Text)),
    bindparam("prices", type_=ARRAY(Numeric)),
)


async def post_prices(tx: Tx, prices: Mapping[str, Decimal], as_of: datetime | None, skew: timedelta) -> PostedPrices:
    """Store the prices of one moment (the transaction's, when None); the newer `as_of` wins, per symbol.

    Bars of the price history take them in as well, late ones too.
    Raises InvalidError for a name, a price or a number of them out of bounds, and for a moment without a
    zone or further ahead of the database's clock than `skew`.
    """
    if len(prices) > PRICES_A_POST_MAX:
        raise invalid("/prices", "too_many", f"At most {PRICES_A_POST_MAX} prices a post.")
    rules.check_prices(prices)
    moment = _checked_moment(tx, as_of, skew)
    if not prices:
        return PostedPrices(0, 0)
    symbols = sorted(prices)  # one order of row locks, whoever else writes them
    posted = [prices[symbol] for symbol in symbols]
    values = {
        "symbols": symbols,
        "prices": posted,
        "as_of": moment,
        "now": tx.now,
        "version": await bump_version(tx, PRICES),
    }
    accepted = (await tx.connection.execute(_UPSERT_PRICES, values)).rowcount
    await price_history.add(tx, symbols, posted, moment)
    return PostedPrices(accepted, len(symbols) - accepted)


def _checked_moment(tx: Tx, as_of: datetime | None, skew: timedelta) -> datetime:
    if as_of is None:
        return tx.now
    if as_of.tzinfo is None:
        raise invalid("/as_of", "no_zone", "as_of needs a time zone, such as Z.")
    if as_of < PRICE_MOMENT_MIN:
        raise invalid("/as_of", "in_the_past", f"as_of is before {PRICE_MOMENT_MIN:%Y-%m-%d}.")
    if as_of > tx.now + skew:
        raise invalid("/as_of", "in_the_future", f"as_of is over {skew.total_seconds():g} s ahead of now.")
    return min(as_of, tx.now)  # a clock that is ahead must not keep later prices out
