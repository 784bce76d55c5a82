"""The history of closes on a database: what is stored, what asks for confirmation, what is read back."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from app.db.session import Database
from app.domain.closes import Close, Gap
from app.errors import ConflictError, InvalidError
from app.services import closes
from app.services.audit import list_records
from app.services.closes import Posted, list_closes, load_panel, post_closes

START = date(2024, 1, 1)


def day(number: int) -> date:
    return START + timedelta(days=number)


def series(asset: str, count: int, start: int = 0, factor: float = 1.0) -> list[Close]:
    """Return closes that move by about a per cent a day."""
    path = 100.0 * np.exp(np.cumsum(np.random.default_rng(len(asset)).normal(0.0, 0.01, start + count)))
    return [Close(asset, day(k), Decimal(f"{path[k] * factor:.4f}")) for k in range(start, start + count)]


async def post(database: Database, rows: list[Close], **terms: Any) -> Posted:
    async with database.transaction("feed") as tx:
        return await post_closes(tx, rows, **terms)


async def everything(database: Database) -> list[Close]:
    found: list[Close] = []
    async with database.transaction("reader") as tx:
        while True:
            after = (found[-1].asset, found[-1].day) if found else None
            page = await list_closes(tx, 7, after=after)
            if not page:
                return found
            found += page


async def test_what_is_posted_is_read_back_with_its_digits(database: Database) -> None:
    rows = [*series("BTC", 30), *series("ETH", 20), Close("SOL", day(3), Decimal("1.10"))]
    done = await post(database, rows[::-1])
    assert (done.version, done.stored, done.changed, done.unchanged) == (1, 51, 0, 0)
    found = await everything(database)
    assert found == sorted(rows, key=lambda c: (c.asset, c.day))
    assert str(found[-1].close) == "1.10"


async def test_the_same_again_changes_nothing(database: Database) -> None:
    rows = series("BTC", 30)
    await post(database, rows[:20])
    done = await post(database, rows)
    assert (done.version, done.stored, done.unchanged) == (2, 10, 20)
    again = await post(database, rows)
    assert (again.version, again.stored, again.changed, again.unchanged, again.flagged) == (2, 0, 0, 30, [])
    nothing = await post(database, [])
    assert (nothing.version, nothing.stored) == (2, 0)
    same = await post(database, [Close("BTC", r.day, r.close.normalize()) for r in rows])
    assert same.unchanged == 30


async def test_another_close_for_a_day_asks(database: Database) -> None:
    rows = series("BTC", 30)
    await post(database, rows)
    moved = Close("BTC", day(10), rows[10].close + 1)
    with pytest.raises(ConflictError) as refused:
        await post(database, [moved, *series("ETH", 5)])
    assert refused.value.code == "confirmation_needed"
    assert [(e.pointer, e.code) for e in refused.value.errors] == [("/closes/0/close", "close_changed")]
    assert "BTC" in refused.value.errors[0].detail
    assert await everything(database) == rows  # not even the others are stored
    done = await post(database, [moved], confirm=True)
    assert (done.stored, done.changed, done.version) == (0, 1, 2)
    assert (await everything(database))[10] == moved
    async with database.transaction("reader") as tx:
        (record,) = [r for r in await list_records(tx, 10) if r.action == "history.confirmed"]
    assert (record.subject, record.actor, record.detail["version"]) == ("BTC", "feed", 2)


@pytest.mark.parametrize("factor", [Decimal("0.1"), Decimal(10)])
async def test_a_close_off_its_history_asks(database: Database, factor: Decimal) -> None:
    rows = series("BTC", 40)
    await post(database, rows[:39])
    off = Close("BTC", rows[39].day, rows[39].close * factor)
    with pytest.raises(ConflictError) as refused:
        await post(database, [off])
    (error,) = refused.value.errors
    assert (error.pointer, error.code) == ("/closes/0/close", "close_off_history")
    assert "robust deviations" in error.detail
    done = await post(database, [off], confirm=True)
    assert [f.code for f in done.flagged] == ["close_off_history"]
    assert (await post(database, [off])).unchanged == 1  # what is stored is not asked about again


async def test_a_close_in_another_unit_before_what_is_stored(database: Database) -> None:
    rows = series("BTC", 60)
    await post(database, rows[30:])
    with pytest.raises(ConflictError, match="BTC"):
        await post(database, series("BTC", 30, factor=0.01))
    assert (await post(database, rows[:30])).stored == 30


async def test_what_is_far_away_is_not_compared(database: Database) -> None:
    """A year without closes: nothing is known any more of where the price should be."""
    await post(database, series("BTC", 30))
    late = [Close("BTC", day(400 + k), r.close * 9) for k, r in enumerate(series("BTC", 30))]
    done = await post(database, late)
    assert (done.stored, done.flagged) == (30, [])


async def test_gaps_are_named(database: Database) -> None:
    rows = series("BTC", 30)
    done = await post(database, [*rows[:5], *rows[8:10], *rows[11:]])
    assert done.gaps == [Gap("BTC", day(5), day(7)), Gap("BTC", day(10), day(10))]
    done = await post(database, [rows[6]])
    assert done.gaps == [Gap("BTC", day(5), day(5)), Gap("BTC", day(7), day(7))]
    done = await post(database, [rows[5], rows[7], rows[10]])
    assert done.gaps == []


NOW = datetime.now(UTC).date()  # noqa: TID251


@pytest.mark.parametrize(
    ("rows", "codes"),
    [
        ([Close("BTC", day(0), Decimal(0))], ["out_of_range"]),
        ([Close("BTC", day(0), Decimal(-1))], ["out_of_range"]),
        ([Close("BTC", day(0), Decimal("NaN"))], ["out_of_range"]),
        ([Close("BTC", day(0), Decimal("Infinity"))], ["out_of_range"]),
        ([Close("BTC", day(0), Decimal("1e15"))], ["out_of_range"]),
        ([Close("BTC", day(0), Decimal("1e-19"))], ["out_of_range"]),
        ([Close("", day(0), Decimal(1))], ["invalid_symbol"]),
        ([Close("B C", day(0), Decimal(-1))], ["invalid_symbol"]),
        ([Close("BTC", NOW + timedelta(days=2), Decimal(1))], ["in_the_future"]),
        ([Close("BTC", date.max, Decimal(1))], ["in_the_future"]),
        ([Close("BTC", date(1969, 12, 31), Decimal(1))], ["in_the_past"]),
        ([Close("BTC", date.min, Decimal(1))], ["in_the_past"]),
        ([Close("BTC", day(0), Decimal(1))] * 2, ["duplicate_day"] * 2),
        ([Close("BTC", day(0), Decimal(1)), Close("BTC", day(0), Decimal(2))], ["duplicate_day"] * 2),
        ([Close("BTC", day(0), Decimal(0)), Close("ETH", date.max, Decimal(1))], ["out_of_range", "in_the_future"]),
    ],
)
async def test_what_is_no_close(database: Database, rows: list[Close], codes: list[str]) -> None:
    for confirm in (False, True):
        with pytest.raises(InvalidError) as refused:
            await post(database, [*rows, *series("SOL", 3)], confirm=confirm)
        assert [error.code for error in refused.value.errors] == codes
        assert refused.value.errors[0].pointer.startswith("/closes/0/")
    assert await everything(database) == []


async def test_too_many(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidError, match="20000"):
        await post(database, [Close(f"X{k}", START, Decimal(1)) for k in range(20_001)])
    await post(database, series("BTC", 3))
    monkeypatch.setattr(closes, "DAYS_A_POST_MAX", 10_000)
    wide = [Close(f"X{k}", date(1990 + 30 * (k % 2), 1, 1), Decimal(1)) for k in range(40)]
    with pytest.raises(InvalidError, match="fewer assets"):
        await post(database, wide)


async def test_twenty_thousand_at_once(database: Database) -> None:
    rows = [row for k in range(20) for row in series("ABCDEFGHIJKLMNOPQRST"[k], 1_000)]
    rows = [Close(r.asset, r.day - timedelta(days=1_500), r.close) for r in rows]
    assert (await post(database, rows)).stored == 20_000
    assert (await post(database, rows)).unchanged == 20_000


async def test_writers_go_one_by_one(database: Database) -> None:
    rows = series("BTC", 40)
    done = await asyncio.gather(*(post(database, rows[k : k + 20]) for k in range(0, 21, 2)))
    assert sum(d.stored for d in done) == 40
    assert await everything(database) == rows


async def test_days_between(database: Database) -> None:
    await post(database, [*series("BTC", 30), *series("ETH", 30)])
    async with database.transaction("reader") as tx:
        found = await list_closes(tx, 200, asset="ETH", first=day(3), last=day(5))
    assert [(c.asset, c.day) for c in found] == [("ETH", day(3)), ("ETH", day(4)), ("ETH", day(5))]


async def test_a_panel_of_a_window(database: Database) -> None:
    btc, eth = series("BTC", 30), series("ETH", 29)
    await post(database, [*btc, *eth[:10], *eth[12:]])
    async with database.transaction("reader") as tx:
        whole = await load_panel(tx, ["ETH", "BTC"], 20)
        early = await load_panel(tx, ["BTC"], 5, day(9))
        nothing = await load_panel(tx, ["DOGE"], 20)
    assert whole.assets == ("ETH", "BTC")
    assert whole.dates.tolist() == [day(t) for t in range(10, 30)]
    assert whole.gaps == [Gap("ETH", day(10), day(12)), Gap("ETH", day(29), day(29))]
    assert whole.returns[3].tolist() == [pytest.approx(float(s[13].close) / float(s[12].close) - 1) for s in (eth, btc)]
    assert len(whole.history(("BTC", "ETH"), 20, 1)) == 16
    assert early.returns[:, 0].tolist() == [
        pytest.approx(float(btc[k + 1].close) / float(btc[k].close) - 1) for k in range(4, 9)
    ]
    assert (nothing.dates.tolist(), nothing.returns.shape) == ([], (0, 1))


async def test_the_table_itself_refuses_what_is_no_close(database: Database) -> None:
    for bad in ("'BTC', '2024-01-01', 'NaN'", "'BTC', '1969-01-01', 1", "'B C', '2024-01-01', 1"):
        with pytest.raises(Exception, match=r"daily_closes_(close|day|asset)_check"):
            async with database.transaction("test") as tx:
                await tx.connection.execute(text(f"INSERT INTO daily_closes VALUES ({bad}, 1, now())"))
