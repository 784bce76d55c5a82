"""Loans over a real API and real workers, which are killed while a crash of the market brings thirty of them down."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from decimal import Decimal
from typing import Any

import pytest

from app.db.session import Database
from tests.api.service import make_agent
from tests.flows.process import ROOT, Home, home, running, serving
from tests.flows.trader import ADMIN_KEY, Trader, settings_of
from tests.services.desk import Desk
from tests.services.lenders import check

BORROWERS, KILLS = 30, 4
SECONDS_MAX = 60


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


async def _party(address: str, database: Database, **amounts: Any) -> Trader:
    agent_id, key = await make_agent(database)
    made = Trader(address, key, agent_id)
    for asset, amount in amounts.items():
        await made.call("POST", "/wallet/deposits", {"asset": asset, "amount": amount})
    return made


async def _until(database: Database, query: str, wanted: Any) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while await database.fetch_value(query) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def _loan(borrower: Trader, amount: int, pledge: float) -> str:
    wanted = {"asset": "USDC", "amount": amount, "collateral": {"asset": "BTC", "amount": pledge}}
    loan_id: str = (await borrower.call("POST", "/lending/borrow", wanted))["loan_id"]
    return loan_id


async def test_workers_that_are_killed_bring_every_default_to_its_end_once(place: Home, database: Database) -> None:
    given = {"PYTHONPATH": str(ROOT), **settings_of(database)}
    rng = random.Random(3)
    with ExitStack() as stack:
        served = stack.enter_context(serving(place, command="api", **given))
        address = served.greeting.address
        lender = await _party(address, database, USDC=100_000)
        await lender.call("POST", "/market/prices", {"prices": {"BTC": 60_000}}, ADMIN_KEY)
        offer = {"asset": "USDC", "amount": 40_000, "min_borrow_rate_apy": 0.05, "recall_notice_hours": 0}
        await lender.call("POST", "/lending/create", offer)
        borrowers = [await _party(address, database, BTC=1) for _ in range(BORROWERS)]
        for borrower in borrowers:
            await _loan(borrower, 1_000, 0.02)
        # at 50,000 each pledge is 900 after haircut: all of them go
        await lender.call("POST", "/market/prices", {"prices": {"BTC": 50_000}}, ADMIN_KEY)
        for _ in range(KILLS):
            with running(place, "worker", **given) as worker:
                await asyncio.sleep(rng.uniform(1.5, 4.0))
                worker.send_signal(signal.SIGKILL)
                worker.wait()
        stack.enter_context(running(place, "worker", **given))
        await _until(database, "SELECT count(*) FROM loans WHERE status = 'liquidated'", BORROWERS)
        told = await database.fetch_value("SELECT count(*) FROM events WHERE type = 'loan.liquidated'")
        assert told == 2 * BORROWERS
        paid = await database.fetch_value("SELECT sum(interest_paid) FROM loans")
        wallet = await lender.call("GET", "/wallet/balance")
        assert Decimal(str(wallet["usdc_balance"])) == 100_000 + paid
        assert wallet["lent"] == 0
        await check(Desk(database))


async def test_a_recall_without_notice_is_bought_in_by_the_worker(place: Home, database: Database) -> None:
    given = {"PYTHONPATH": str(ROOT), **settings_of(database)}
    with serving(place, **given) as served:
        address = served.greeting.address
        lender, borrower = await _party(address, database, USDC=1_000), await _party(address, database)
        await lender.call("POST", "/market/prices", {"prices": {"BTC": 60_000}}, ADMIN_KEY)
        await borrower.call("POST", "/wallet/deposits", {"asset": "BTC", "amount": 1})
        offer = {"asset": "USDC", "amount": 400, "recall_notice_hours": 0}
        made = await lender.call("POST", "/lending/create", offer)
        await _loan(borrower, 200, 0.01)
        recalled = await lender.call("POST", f"/lending/{made['loan_id']}/recall", {"reason": "I need it"})
        assert recalled["status"] == "recalled"
        await _until(database, "SELECT status FROM loans", "liquidated")
        wallet = await lender.call("GET", "/wallet/balance")
        assert wallet["free"] == pytest.approx(1_000, abs=0.01)
        assert wallet["free"] > 1_000
        kinds = [event["type"] for event in (await borrower.call("GET", "/events"))["events"]]
        assert [k for k in kinds if k.startswith("loan.")] == ["loan.opened", "loan.recalled", "loan.liquidated"]
