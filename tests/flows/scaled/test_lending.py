"""Loans on two API processes and two workers, which are killed as a crash of the market brings thirty of them down."""

from __future__ import annotations

import asyncio
import random
from decimal import Decimal
from typing import Any

import pytest

from app.db.session import Database
from tests.api.service import make_agent
from tests.flows.topology import Topology
from tests.flows.trader import ADMIN_KEY, Trader
from tests.services.desk import Desk
from tests.services.lenders import check

BORROWERS, KILLS = 30, 4
SECONDS_MAX = 60


async def _party(topology: Topology, database: Database, **amounts: Any) -> Trader:
    agent_id, key = await make_agent(database)
    first, second = topology.addresses
    made = Trader(first, key, agent_id, (second,))
    for asset, amount in amounts.items():
        await made.call("POST", "/wallet/deposits", {"asset": asset, "amount": amount})
    return made


async def _until(database: Database, query: str, lender: Trader, least: int) -> int:
    async with asyncio.timeout(SECONDS_MAX):
        while (found := await database.fetch_value(query, lender.agent_id)) < least:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return int(found)


async def _loan(borrower: Trader, amount: int, pledge: float) -> str:
    wanted = {"asset": "USDC", "amount": amount, "collateral": {"asset": "BTC", "amount": pledge}}
    loan_id: str = (await borrower.call("POST", "/lending/borrow", wanted))["loan_id"]
    return loan_id


async def test_workers_that_are_killed_bring_every_default_to_its_end_once(
    topology: Topology, database: Database
) -> None:
    rng = random.Random(3)
    lender = await _party(topology, database, USDC=100_000)
    await lender.call("POST", "/market/prices", {"prices": {"BTC": 60_000}}, ADMIN_KEY)
    terms = {"asset": "USDC", "amount": 40_000, "min_borrow_rate_apy": 0.05, "recall_notice_hours": 0}
    offer = await lender.call("POST", "/lending/create", terms)
    borrowers = [await _party(topology, database, BTC=1) for _ in range(BORROWERS)]
    for borrower in borrowers:
        await _loan(borrower, 1_000, 0.02)
    # at 50,000 each pledge is 900 after haircut: all of them go
    await lender.call("POST", "/market/prices", {"prices": {"BTC": 50_000}}, ADMIN_KEY)
    ended = "SELECT count(*) FROM loans WHERE lender_id = $1 AND status = 'liquidated'"
    for kill in range(KILLS):  # each by turns, in the middle of it: the first has come back when the other goes
        await _until(database, ended, lender, (kill + 1) * BORROWERS // (KILLS + 2))
        await asyncio.sleep(rng.uniform(0, 0.05))
        topology.workers[kill % 2].kill()
        topology.workers[kill % 2].start()
    assert await _until(database, ended, lender, BORROWERS) == BORROWERS
    told = (
        "SELECT count(*) FROM events WHERE type = 'loan.liquidated'"
        " AND data ->> 'loan_id' IN (SELECT id FROM loans WHERE lender_id = $1)"
    )
    assert await database.fetch_value(told, lender.agent_id) == 2 * BORROWERS
    paid = await database.fetch_value("SELECT sum(interest_paid) FROM loans WHERE lender_id = $1", lender.agent_id)
    wallet = await lender.call("GET", "/wallet/balance")
    assert Decimal(str(wallet["usdc_balance"])) == 100_000 + paid
    assert wallet["lent"] == 0
    await check(Desk(database))
    await lender.call("POST", f"/lending/{offer['loan_id']}/recall", {"reason": "nobody else borrows of it"})


async def test_a_recall_without_notice_is_bought_in_by_the_worker(topology: Topology, database: Database) -> None:
    lender, borrower = await _party(topology, database, USDC=1_000), await _party(topology, database)
    await lender.call("POST", "/market/prices", {"prices": {"BTC": 60_000}}, ADMIN_KEY)
    await borrower.call("POST", "/wallet/deposits", {"asset": "BTC", "amount": 1})
    offer = {"asset": "USDC", "amount": 400, "recall_notice_hours": 0}
    made = await lender.call("POST", "/lending/create", offer)
    await _loan(borrower, 200, 0.01)
    recalled = await lender.call("POST", f"/lending/{made['loan_id']}/recall", {"reason": "I need it"})
    assert recalled["status"] == "recalled"
    await _until(database, "SELECT count(*) FROM loans WHERE lender_id = $1 AND status = 'liquidated'", lender, 1)
    wallet = await lender.call("GET", "/wallet/balance")
    assert wallet["free"] == pytest.approx(1_000, abs=0.01)
    assert wallet["free"] > 1_000
    kinds = [event["type"] for event in (await borrower.call("GET", "/events"))["events"]]
    assert [k for k in kinds if k.startswith("loan.")] == ["loan.opened", "loan.recalled", "loan.liquidated"]
