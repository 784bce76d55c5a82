"""Amounts of all the digits that are allowed: none is lost on the way, and none more is let in."""

from __future__ import annotations

from decimal import Decimal

import pytest

from app.db.session import Database
from app.errors import InvalidError
from tests.services.desk import Desk

WIDE = Decimal("999999999999999.999999999999999999")
DUST = Decimal("0.000000000000000001")


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)


async def test_the_widest_amount_is_booked_to_the_last_digit(desk: Desk) -> None:
    agent_id = await desk.agent()
    booked = await desk.deposit(agent_id, "USDC", WIDE)
    assert booked.book.holding("USDC").free == WIDE
    assert await desk.money(agent_id) == {"free": WIDE}
    await desk.withdraw(agent_id, "USDC", DUST)
    assert await desk.money(agent_id) == {"free": Decimal("999999999999999.999999999999999998")}


async def test_parts_of_a_wide_reservation_leave_the_rest(desk: Desk) -> None:
    agent_id = await desk.agent()
    await desk.deposit(agent_id, "USDC", WIDE)
    held = await desk.reserve(agent_id, WIDE)
    await desk.settle(agent_id, held.id, DUST)
    left = await desk.release(agent_id, held.id, "0.1")
    assert left.remaining == Decimal("999999999999999.899999999999999998")
    assert await desk.money(agent_id) == {"free": Decimal("0.1"), "reserved": left.remaining}
    assert await desk.rows("SELECT remaining, settled FROM reservations") == [(left.remaining, DUST)]
    await desk.release(agent_id, held.id)
    assert await desk.imbalances() == {}


@pytest.mark.parametrize("amount", ["12345678901.1234567890123456789", "1.0000000000000000001", "100.5e-20"])
async def test_a_digit_too_many_is_refused(desk: Desk, amount: str) -> None:
    agent_id = await desk.agent()
    with pytest.raises(InvalidError) as refused:
        await desk.deposit(agent_id, "USDC", amount)
    assert refused.value.code == "too_many_decimals"
    assert await desk.money(agent_id) == {}


async def test_a_balance_that_would_be_too_large_is_refused(desk: Desk) -> None:
    agent_id = await desk.agent()
    await desk.deposit(agent_id, "USDC", WIDE)
    with pytest.raises(InvalidError) as refused:
        await desk.deposit(agent_id, "USDC", DUST)
    assert refused.value.code == "number_out_of_range"
    assert await desk.money(agent_id) == {"free": WIDE}
