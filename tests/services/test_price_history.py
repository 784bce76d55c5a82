"""Bars against a plain recomputation from the posts, however they arrive; and their deletion."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from app.db.session import Database
from app.services import price_history
from app.services.price_history import Bar, list_bars
from app.services.prices import post_prices

SKEW = timedelta(seconds=5)
START = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
ALL = {"start": START - timedelta(days=9_000), "end": START + timedelta(days=9_000)}

Post = tuple[datetime, Mapping[str, Decimal]]


async def _post(database: Database, post: Post) -> None:
    async with database.transaction("feed") as tx:
        await post_prices(tx, post[1], post[0], SKEW)


async def _bars(database: Database, symbol: str, limit: int = 200) -> list[Bar]:
    async with database.transaction("reader") as tx:
        return await list_bars(tx, symbol, limit, **ALL)


def _recomputed(posts: Iterable[Post], symbol: str) -> list[Bar]:
    """Return the bars that the posts, in the order of their arrival, come to."""
    latest: tuple[datetime, Decimal] | None = None
    minutes: dict[datetime, list[tuple[datetime, Decimal]]] = {}
    for as_of, prices in posts:
        if symbol not in prices:
            continue
        price = prices[symbol]
        if latest is None or as_of > latest[0]:
            latest = as_of, price
        if as_of == latest[0] and price != latest[1]:
            continue
        minutes.setdefault(as_of.replace(second=0, microsecond=0), []).append((as_of, price))
    bars = []
    for minute, held in sorted(minutes.items()):
        first, last = min(as_of for as_of, _ in held), max(as_of for as_of, _ in held)
        figures = [price for _, price in held]
        opened = next(price for as_of, price in held if as_of == first)
        closed = next(price for as_of, price in held if as_of == last)
        bars.append(Bar(minute, opened, max(figures), min(figures), closed))
    return bars


_names = count()
_moments = st.integers(0, 130).map(lambda s: START + timedelta(seconds=s)) | st.sampled_from(
    [START - timedelta(microseconds=1), START, START + timedelta(seconds=59, microseconds=999_999)]
)
_prices = st.integers(1, 9).map(Decimal) | st.decimals("0.000000000000000001", "999999999999999", places=18)
_posts = st.lists(
    st.tuples(_moments, st.dictionaries(st.sampled_from(["A", "B"]), _prices, min_size=1)), min_size=1, max_size=12
)


@given(posts=_posts)
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_bars_are_what_the_posts_come_to(database: Database, posts: list[Post]) -> None:
    own = f"{next(_names)}."  # examples share a database: each has symbols of its own
    named = [(as_of, {own + symbol: price for symbol, price in prices.items()}) for as_of, prices in posts]
    for post in named:
        await _post(database, post)
    for symbol in ("A", "B"):
        assert await _bars(database, own + symbol) == _recomputed(named, own + symbol)


async def test_posts_at_once_and_out_of_order(database: Database) -> None:
    """No two posts have one moment, so that the order in which they commit can't matter."""
    rng = random.Random(7)
    symbols = [f"S{i}" for i in range(20)]
    posts = [
        (START + timedelta(seconds=3 * i), {s: Decimal(rng.randint(1, 10**6)) / 100 for s in symbols})
        for i in range(60)
    ]
    shuffled = rng.sample(posts, len(posts))
    await asyncio.gather(*(_post(database, post) for post in shuffled))
    for symbol in symbols:
        assert await _bars(database, symbol) == _recomputed(posts, symbol)


async def test_the_digits_stay(database: Database) -> None:
    await _post(database, (START, {"X": Decimal("1.10")}))
    await _post(database, (START, {"X": Decimal("1.100")}))
    assert [str(bar.open) for bar in await _bars(database, "X")] == ["1.10"]


async def test_a_refused_post_is_in_no_bar(database: Database) -> None:
    async with database.transaction("feed") as tx:
        await post_prices(tx, {"X": Decimal(1)}, START, SKEW)
        await tx.connection.rollback()
    assert await _bars(database, "X") == []


async def test_pages_and_ends(database: Database) -> None:
    for i in range(7):
        await _post(database, (START + timedelta(minutes=i, seconds=30), {"X": Decimal(1 + i), "Y": Decimal(9)}))
    whole = await _bars(database, "X")
    assert [bar.minute for bar in whole] == [START + timedelta(minutes=i) for i in range(7)]
    async with database.transaction("reader") as tx:
        assert await list_bars(tx, "X", 3, **ALL) == whole[:3]
        assert await list_bars(tx, "X", 3, **ALL, after=whole[2].minute) == whole[3:6]
        assert await list_bars(tx, "X", 9, start=whole[1].minute, end=whole[4].minute) == whole[1:4]


async def test_old_bars_are_deleted_in_batches(database: Database) -> None:
    for i in range(10):
        await _post(database, (START + timedelta(minutes=i), {"X": Decimal(1), "Y": Decimal(2)}))
    before = START + timedelta(minutes=7)
    more = []
    for _ in range(4):
        async with database.transaction("test") as tx:
            more.append(await price_history.purge(tx, before, most=5))
    assert more == [True, True, False, False]
    for symbol in ("X", "Y"):
        assert [bar.minute for bar in await _bars(database, symbol)] == [
            START + timedelta(minutes=m) for m in (7, 8, 9)
        ]


async def test_deletion_reads_by_the_key(database: Database) -> None:
    """However many bars are young, none of them is looked at."""
    async with database.transaction("test") as tx:
        await post_prices(tx, {f"S{i}": Decimal(1) for i in range(50)}, START, SKEW)
        await tx.connection.execute(
            text(
                "INSERT INTO price_bars SELECT 'S' || s, at, 1, 1, 1, 1, at, at FROM generate_series(0, 49) AS s,"
                " generate_series(now() - interval '1000 minutes', now(), interval '1 minute') AS at"
            )
        )
    async with database.transaction("test") as tx:
        await tx.connection.execute(text("ANALYZE price_bars, market_prices"))
        values = {"before": START + timedelta(minutes=1), "most": 1_000}
        plan = (await tx.connection.execute(text(f"EXPLAIN ANALYZE {price_history._PURGE_BARS.text}"), values)).all()
    assert "Seq Scan on price_bars" not in str(plan)
