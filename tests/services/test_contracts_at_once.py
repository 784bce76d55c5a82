"""Escrows, netting, lending, orders and margin calls of the same agents at once: none waits for another for ever."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest
from sqlalchemy import URL

from app.db.session import Database
from app.services import agreements, margin_calls
from app.services.agreements import Agreement, NewAgreement
from tests.database import make_settings
from tests.services.clearing import Clearing
from tests.services.desk import ACTOR, Desk
from tests.services.lenders import PRICES, RULES, Lenders, check
from tests.services.test_concurrency import at_once

WITHIN_THE_RULES = {
    "done",
    "agreement_ended",
    "escrow_closed",
    "escrow_disputed",
    "not_accepted",
    "nothing_to_settle",
    "not_enough_offered",
    "offers_moved",
    "loan_closed",
}


@pytest.fixture
async def desk(database_url: URL) -> AsyncIterator[Desk]:
    database = Database(database_url, make_settings(database_pool_size=20, database_connect_seconds=20))
    made = Desk(database)
    await made.prices(PRICES)
    await made.market.refresh()
    yield made
    await database.close()


@pytest.mark.parametrize("turn", range(3))
async def test_nothing_waits_for_ever(desk: Desk, turn: int) -> None:
    """A deadlock would be `database_busy`. Afterwards the books of all balance."""
    lenders, clearing = Lenders(desk), Clearing(desk)
    agents = [await desk.agent("100000") for _ in range(4)]
    for agent_id in agents:
        await desk.deposit(agent_id, "BTC", 2)
        await lenders.offer(agent_id, 20_000)
    group = await clearing.agree(*agents)
    loans = [loan for agent_id in agents[:2] for loan in await lenders.borrow(agent_id, 5_000, "0.4")]
    steps: list[Awaitable[Any]] = [lenders.give_back(loan) for loan in loans]
    steps += [lenders.recall(loan.lender_id, loan.id) for loan in loans]
    for k, agent_id in enumerate(agents):
        steps += await contracts(clearing, group, agent_id, [agents[(k + n) % 4] for n in (1, 2, 3)])
        steps += [lenders.borrow(agent_id, 3_000, "0.3"), decide(clearing, agent_id)]
        steps.append(desk.order(agent_id, "buy", "0.1", leverage=3))
    random.Random(turn).shuffle(steps)
    ended = await at_once(steps)
    assert set(ended) <= WITHIN_THE_RULES, ended
    assert ended["done"] > len(steps) / 2
    await clearing.check()
    await check(desk)


async def contracts(clearing: Clearing, group: Agreement, agent_id: str, others: list[str]) -> list[Awaitable[Any]]:
    """Return what an agent does with the others, who are three, of escrows and netting."""
    payee, third, other = others
    swap = await clearing.fund(agent_id, payee, 500, counter=("BTC", "0.01"), referrer=third, arbiter=other)
    over = await clearing.fund(agent_id, other, 100, on_timeout="release", referrer=payee)
    await clearing.pass_deadline(over)
    opened = await propose(clearing, agent_id, [payee, third])
    return [
        clearing.confirm(agent_id, swap),
        clearing.confirm(payee, swap),
        clearing.act(payee, swap, "dispute"),
        clearing.fire(over),
        clearing.fire(over),
        clearing.fund(agent_id, third, 50, arbiter=payee),
        clearing.owe(group, agent_id, payee, 70),
        clearing.owe(group, agent_id, third, "0.001", "BTC"),
        clearing.settle(group, agent_id),
        clearing.accept(payee, opened),
        clearing.accept(third, opened),
        clearing.leave(third, opened),
        propose(clearing, agent_id, [other, third]),
    ]


async def propose(clearing: Clearing, agent_id: str, members: list[str]) -> Agreement:
    async with clearing.desk.database.transaction(ACTOR) as tx:
        asked = NewAgreement("more", members, ["data"])
        return await agreements.propose(tx, await clearing.scenes.at(tx), agent_id, asked)


async def decide(clearing: Clearing, agent_id: str) -> margin_calls.Decided:
    async with clearing.desk.database.transaction("worker") as tx:
        return await margin_calls.decide(tx, clearing.scenes, agent_id, RULES)
