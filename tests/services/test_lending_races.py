"""Lending over real connections at once, and with the connection cut between any two statements of a default."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import URL, event

from app.db.session import Database
from app.errors import DatabaseUnavailableError
from app.services.loans import Loan
from tests.services.lenders import Lenders, lenders_on
from tests.services.test_concurrency import at_once


@pytest.fixture
async def lenders(database_url: URL) -> AsyncIterator[Lenders]:
    async with lenders_on(database_url) as made:
        yield made


async def parties(lenders: Lenders, borrowers: int = 1, usdc: int = 100_000) -> tuple[str, list[str]]:
    """Make a lender with USDC and borrowers with a bitcoin and a little USDC each."""
    made = []
    for _ in range(borrowers):
        agent_id = await lenders.desk.agent("100")
        await lenders.desk.deposit(agent_id, "BTC", 1)
        made.append(agent_id)
    return await lenders.desk.agent(usdc), made


@pytest.mark.parametrize("turn", range(3))
async def test_the_last_offer_is_taken_once(lenders: Lenders, turn: int) -> None:
    alice, borrowers = await parties(lenders, 8)
    await lenders.offer(alice, 25_000)
    ended = await at_once([lenders.borrow(who, 10_000, "0.5") for who in borrowers])
    assert ended == {"done": 2, "not_enough_offered": 6}
    assert (await lenders.market()).borrowed == 20_000


async def test_borrowers_over_many_lenders_do_not_lock_each_other_out(lenders: Lenders) -> None:
    others = [(await parties(lenders, 0))[0] for _ in range(6)]
    _, borrowers = await parties(lenders, 6)
    for k, lender in enumerate(others):
        await lenders.offer(lender, 10_000, rate=str(Decimal(k) / 100))
    # each takes of two or three lenders; lenders borrow from each other at the same time
    for lender in others:
        await lenders.desk.deposit(lender, "BTC", 1)
    steps: list[Awaitable[Any]] = [lenders.borrow(who, 5_000, "0.4") for who in borrowers]
    steps += [lenders.borrow(who, 4_000, "0.4") for who in others]
    ended = await at_once(steps)
    assert set(ended) <= {"done", "not_enough_offered", "offers_moved"}
    assert ended["done"] >= 10


@pytest.mark.parametrize("turn", range(4))
async def test_a_recall_races_a_return(lenders: Lenders, turn: int) -> None:
    alice, [bob] = await parties(lenders)
    await lenders.offer(alice, 10_000)
    [loan] = await lenders.borrow(bob, 5_000, "0.5")
    steps: list[Awaitable[Any]] = [lenders.recall(alice, loan.id), lenders.give_back(loan)]
    ended = await at_once(steps if turn % 2 else steps[::-1])
    assert ended["done"] in (1, 2)
    assert set(ended) <= {"done", "loan_closed"}
    over = await lenders.loan(loan.id)
    assert over.status == "returned"
    assert over.principal == 0
    assert "lent" not in await lenders.money(alice)


@pytest.mark.parametrize("turn", range(6))
async def test_a_return_races_a_liquidation(lenders: Lenders, turn: int) -> None:
    alice, [bob] = await parties(lenders)
    await lenders.offer(alice, 40_000)
    [loan] = await lenders.borrow(bob, 25_000, "0.5")
    await lenders.desk.prices({"BTC": 56_000})
    steps: list[Awaitable[Any]] = [lenders.decide(loan.id), lenders.give_back(loan), lenders.decide(loan.id)]
    ended = await at_once(steps if turn % 2 else steps[::-1])
    over = await lenders.loan(loan.id)
    told = await lenders.desk.rows("SELECT type, count(*) FROM events WHERE type LIKE 'loan.%' GROUP BY type")
    ends = {kind: count for kind, count in told if kind in ("loan.returned", "loan.liquidated")}
    assert ends == {f"loan.{over.status}": 2}  # one outcome, told to both parties
    assert ended == ({"done": 3} if over.status == "returned" else {"done": 2, "loan_closed": 1})
    assert (await lenders.money(alice))["free"] >= 85_000


async def test_a_loan_is_bought_in_once_whoever_asks(lenders: Lenders) -> None:
    alice, [bob] = await parties(lenders)
    await lenders.offer(alice, 40_000, hours=0)
    [loan] = await lenders.borrow(bob, 25_000, "0.5")
    await lenders.recall(alice, loan.id)
    made = await asyncio.gather(*(lenders.decide(loan.id) for _ in range(8)))
    assert sum(len(d.told) for d in made) == 1


# --- cut between any two steps


@contextmanager
def cut_after(database: Database, statements: int) -> Iterator[list[str]]:
    """Cut the connection of whoever runs its statement number so many, before it is sent; yield those that were."""
    seen: list[str] = []

    def before(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)
        if len(seen) == statements:
            connection.connection.driver_connection.terminate()

    event.listen(database.engine.sync_engine, "before_cursor_execute", before)
    try:
        yield seen
    finally:
        event.remove(database.engine.sync_engine, "before_cursor_execute", before)


async def test_a_default_that_is_cut_anywhere_finishes_once(lenders: Lenders) -> None:
    alice, [bob] = await parties(lenders)
    await lenders.desk.deposit(alice, "BTC", 1)
    await lenders.offer(alice, 40_000)
    [loan] = await lenders.borrow(bob, 25_000, "0.5")
    before = [await lenders.money(who) for who in (alice, bob)]
    await lenders.desk.prices({"BTC": 40_000})  # a gap: there is a deficit as well
    cut = 1  # the first reads the clock: a connection that is lost there is replaced before anything is done
    while await _is_cut(lenders, loan, cut + 1):
        cut += 1
        assert [await lenders.money(who) for who in (alice, bob)] == before
        assert (await lenders.loan(loan.id)).status == "active"
    assert cut > 20
    over = await lenders.loan(loan.id)
    assert over.status == "liquidated"
    assert (await lenders.money(alice))["free"] == 85_000 + over.interest_paid
    told = await lenders.desk.rows("SELECT count(*) FROM events WHERE type = 'loan.liquidated'")
    assert told == [(2,)]
    assert (await lenders.decide(loan.id)).told == ()


async def _is_cut(lenders: Lenders, loan: Loan, statements: int) -> bool:
    """Decide on a loan with the connection cut at a statement; return whether it came to that."""
    with cut_after(lenders.desk.database, statements) as seen, suppress(DatabaseUnavailableError):
        await lenders.decide(loan.id)
    return len(seen) >= statements
