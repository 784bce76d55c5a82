"""Listing a symbol against an order that opens the perpetual its name implies: one of them waits, and is refused."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from app.domain.trade import Order
from app.errors import ConflictError
from app.services import market, trading
from app.services.wallet import Names
from tests.services.desk import Desk

if TYPE_CHECKING:
    from app.db.session import Database

DOGE = Order("DOGE-PERP", "buy", Decimal(10))


async def _list_as_thousands(database: Database) -> None:
    async with database.transaction("admin") as tx:
        await market.put_instrument(tx, "DOGE-PERP", {"contract_size": 1000.0})


async def test_a_listing_waits_for_the_order_and_is_refused(database: Database) -> None:
    desk = Desk(database)
    await desk.prices({"DOGE": 1})
    agent_id = await desk.agent(usdc=1_000)
    async with desk.locked(agent_id) as (tx, scene, held):
        await trading.submit(tx, scene, held, DOGE, Names())
        listing = asyncio.create_task(_list_as_thousands(database))
        await asyncio.sleep(0.3)
        assert not listing.done()
    with pytest.raises(ConflictError) as refused:
        await listing
    assert refused.value.code == "contract_fixed"


async def test_an_order_waits_for_the_listing_and_is_refused(database: Database) -> None:
    desk = Desk(database)
    await desk.prices({"DOGE": 1})
    agent_id = await desk.agent(usdc=1_000)

    async def order() -> None:
        async with desk.locked(agent_id) as (tx, scene, held):
            await trading.submit(tx, scene, held, DOGE, Names())

    async with database.transaction("admin") as tx:
        await market.put_instrument(tx, "DOGE-PERP", {"contract_size": 1000.0})
        waiting = asyncio.create_task(order())
        await asyncio.sleep(0.3)
        assert not waiting.done()
    with pytest.raises(ConflictError) as refused:
        await waiting
    assert refused.value.code == "parameters_changed"
