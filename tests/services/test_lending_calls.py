"""What a margin call does about its account's lending before it touches a position."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import URL, event, text

from tests.services.calls import RULES, Calls
from tests.services.lenders import Lenders, lenders_on


@pytest.fixture
async def lenders(database_url: URL) -> AsyncIterator[Lenders]:
    async with lenders_on(database_url) as made:
        yield made


async def _trader(lenders: Lenders, *amounts: tuple[int, float]) -> tuple[str, list[str]]:
    """Make a trader who has lent these amounts of USDC at these notices, and return the loans' ids."""
    trader, borrower = await lenders.desk.agent("20000"), await lenders.desk.agent()
    await lenders.desk.deposit(borrower, "BTC", 1)
    made = []
    for amount, hours in amounts:
        await lenders.offer(trader, amount, hours=hours)
        made += [loan.id for loan in await lenders.borrow(borrower, amount, Decimal(amount) / 25_000)]
    await lenders.desk.order(trader, "buy", "0.8")  # 14,400 of margin
    return trader, made


async def _recalled(lenders: Lenders, loan_ids: list[str]) -> list[str]:
    for loan_id in loan_ids:
        await lenders.decide(loan_id)
    return [loan_id for loan_id in loan_ids if (await lenders.loan(loan_id)).status != "active"]


async def test_a_call_recalls_the_smallest_loans_first_and_no_more_than_the_shortfall(lenders: Lenders) -> None:
    trader, ids = await _trader(lenders, (3_000, 24), (1_000, 12), (2_000, 48), (1_500, 24))
    calls = Calls(lenders.desk)
    await lenders.desk.prices({"BTC": 57_000})  # equity 17,225, margin 13,680 of it
    assert (await calls.decide(trader)).told == ()
    await lenders.desk.prices({"BTC": 54_500})  # equity 15,225, margin 13,080: .859, shortfall 2,215
    assert (await calls.decide(trader)).told == ("margin_call.opened",)
    [(asked,)] = await lenders.desk.rows("SELECT data->'recalls' FROM events WHERE type = 'margin_call.opened'")
    assert [entry["loan_id"] for entry in asked] == [ids[1], ids[3]]
    assert await _recalled(lenders, ids) == [ids[1], ids[3]]  # 1,000 and 1,500; 48 hours are too long to wait
    events = await lenders.desk.rows("SELECT DISTINCT data->>'loan_id' FROM events WHERE type = 'loan.recalled'")
    assert {row[0] for row in events} == {ids[1], ids[3]}
    await calls.decide(trader)
    assert await _recalled(lenders, ids) == [ids[1], ids[3]]  # those on their way count


async def test_loans_without_notice_are_back_before_a_position_is_touched(lenders: Lenders) -> None:
    trader, ids = await _trader(lenders, (6_000, 0))
    calls = Calls(lenders.desk)
    await lenders.offer(trader, 200)
    await lenders.desk.prices({"BTC": 54_500})
    await calls.decide(trader)
    await calls.pass_time(trader, 300)
    told = (await calls.decide(trader, rules=RULES)).told
    assert told == ("margin_call.expired",)
    assert (await lenders.money(trader)).get("offered") is None
    assert await calls.sizes(trader) == {"BTC-PERP": Decimal("0.8")}
    assert await _recalled(lenders, ids) == ids
    over = await lenders.loan(ids[0])
    assert over.status == "liquidated"  # bought in at once
    assert (await calls.decide(trader)).told == ("liquidation.executed",)


async def test_a_loan_that_is_not_recalled_in_time_holds_up_no_liquidation(lenders: Lenders) -> None:
    trader, _ = await _trader(lenders, (6_000, 0))
    calls = Calls(lenders.desk)
    await lenders.desk.prices({"BTC": 54_500})
    await calls.decide(trader)
    await calls.pass_time(trader, 300)
    assert (await calls.decide(trader)).told == ("margin_call.expired",)
    async with lenders.desk.database.transaction("test") as tx:
        await tx.connection.execute(text("UPDATE margin_calls SET expired_at = expired_at - interval '6 seconds'"))
    assert (await calls.decide(trader)).told == ("liquidation.executed",)


async def test_a_call_that_is_cured_wants_nothing_back(lenders: Lenders) -> None:
    trader, ids = await _trader(lenders, (6_000, 24))
    calls = Calls(lenders.desk)
    await lenders.desk.prices({"BTC": 54_500})
    await calls.decide(trader)
    await lenders.desk.deposit(trader, "USDC", 10_000)
    assert (await calls.decide(trader)).told == ("margin_call.cured",)
    assert await _recalled(lenders, ids) == []
    assert (await lenders.loan(ids[0])).wanted_by is None


async def test_all_offers_are_withdrawn_when_a_call_expires(lenders: Lenders) -> None:
    trader, _ = await _trader(lenders, (1_000, 24))
    await lenders.desk.deposit(trader, "ETH", 1)
    for asset, amount in (("USDC", 200), ("ETH", "0.1"), ("USDC", 300), ("ETH", "0.2")):
        await lenders.offer(trader, amount, asset)
    calls = Calls(lenders.desk)
    await lenders.desk.prices({"BTC": 48_000})
    await calls.decide(trader)
    await calls.pass_time(trader, 300)
    statements = await _statements(lenders, calls.decide(trader))
    assert (await lenders.money(trader, "ETH")) == {"free": 1}
    assert "offered" not in await lenders.money(trader)
    assert await lenders.desk.rows("SELECT count(*) FROM loan_offers WHERE remaining > 0") == [(0,)]
    assert (await lenders.market("ETH")).supplied == 0
    changed = [statement for statement in statements if statement.startswith("UPDATE lending_markets")]
    assert len(changed) == 2  # a market is held for one change, however many the offers


async def _statements(lenders: Lenders, step: Awaitable[Any]) -> list[str]:
    seen: list[str] = []
    engine = lenders.desk.database.engine.sync_engine

    def before(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(engine, "before_cursor_execute", before)
    try:
        await step
    finally:
        event.remove(engine, "before_cursor_execute", before)
    return seen
