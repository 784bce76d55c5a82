"""Real connections at once on the same books: what is refused is refused, what is done is done once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import URL

from app.db.session import Database, Tx
from app.domain.moves import Move, agent, house
from app.errors import ConflictError, PrimeriskError
from app.services import accounts, idempotency, ledger
from app.services.idempotency import Answer, Named
from app.services.ledger import Occasion
from tests.database import make_settings
from tests.services.desk import Desk

CONNECTIONS = make_settings(database_pool_size=20, database_connect_seconds=20)
REQUEST = Named("alice", "first", "POST /api/wallet/deposits", b"{}")


@pytest.fixture
async def desk(database_url: URL) -> AsyncIterator[Desk]:
    """Yield a desk with prices, over twenty connections."""
    database = Database(database_url, CONNECTIONS)
    made = Desk(database)
    await made.prices({"BTC": "60000", "ETH": "3000"})
    await made.market.refresh()
    yield made
    await database.close()


async def at_once(steps: Sequence[Awaitable[Any]]) -> Counter[str]:
    """Run steps at once and count how they end: "done", or the code of the refusal. Anything else is raised."""
    ended: Counter[str] = Counter()
    for result in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, PrimeriskError):
            raise result
        ended[result.code if isinstance(result, PrimeriskError) else "done"] += 1
    return ended


# --- reservations, withdrawals, orders


@pytest.mark.parametrize("turn", range(5))
async def test_a_balance_is_not_reserved_twice(desk: Desk, turn: int) -> None:
    agent_id = await desk.agent("100")
    ended = await at_once([desk.reserve(agent_id, 30) for _ in range(40)])
    assert ended == {"done": 3, "insufficient_funds": 37}
    assert await desk.money(agent_id) == {"free": 10, "reserved": 90}
    assert await desk.rows("SELECT sum(remaining), count(*) FROM reservations") == [(90, 3)]
    assert await desk.imbalances() == {}


async def test_two_processes_do_not_reserve_a_balance_twice(desk: Desk, database_url: URL) -> None:
    other = Desk(Database(database_url, CONNECTIONS))
    agent_id = await desk.agent("100")
    ended = await at_once([d.reserve(agent_id, 30) for d in (desk, other) for _ in range(15)])
    assert ended == {"done": 3, "insufficient_funds": 27}
    assert await desk.money(agent_id) == {"free": 10, "reserved": 90}
    await other.database.close()


@pytest.mark.parametrize("turn", range(3))
async def test_reservations_withdrawals_and_orders_share_one_balance(desk: Desk, turn: int) -> None:
    agent_id = await desk.agent("1000")
    # an order of 1,800 USD takes 540 of margin, which the gate makes 675 of equity
    steps: list[Awaitable[Any]] = [desk.reserve(agent_id, 150) for _ in range(10)]
    steps += [desk.withdraw(agent_id, "USDC", 200) for _ in range(6)]
    steps += [desk.order(agent_id, "buy", "0.03") for _ in range(3)]
    ended = await at_once(steps[turn:] + steps[:turn])
    assert ended["done"] > 0
    assert set(ended) <= {"done", "insufficient_funds", "insufficient_margin", "leverage_above_cap"}
    book = await desk.book(agent_id)
    money = book.holding("USDC")
    [(paid,)] = await desk.rows("SELECT coalesce(sum(amount), 0) FROM ledger_entries WHERE kind = 'withdrawal'")
    assert money.free + money.reserved + paid == 1000
    assert money.owed == 0
    assert money.reserved == sum(r.remaining for r in book.reservations)
    size = sum((p.size for p in book.positions), Decimal(0))
    if size:
        required = size * 60_000 * Decimal("0.30") + money.reserved
        # what came last while a position was open left it at the gate or below
        assert required <= Decimal("0.80") * (money.free + money.reserved)
    [(booked,)] = await desk.rows("SELECT count(*) FROM orders")
    assert size == booked * Decimal("0.03")
    assert await desk.imbalances() == {}


# --- the same thing twice


@pytest.mark.parametrize("turn", range(5))
async def test_a_position_is_closed_once(desk: Desk, turn: int) -> None:
    agent_id = await desk.agent("100000")
    await desk.order(agent_id, "buy", 1)
    await desk.prices({"BTC": "61000"})
    ended = await at_once([desk.order(agent_id, "sell", 1, reduce_only=True) for _ in range(6)])
    assert ended == {"done": 1, "nothing_to_reduce": 5}
    assert (await desk.book(agent_id)).positions == []
    assert await desk.money(agent_id) == {"free": 101_000}
    assert await desk.rows("SELECT size, realized_pnl FROM positions") == [(0, 1_000)]


@pytest.mark.parametrize("turn", range(5))
async def test_orders_that_close_do_not_flip_where_they_may_not(desk: Desk, turn: int) -> None:
    agent_id = await desk.agent("100000")
    await desk.order(agent_id, "sell", 1)
    ended = await at_once([desk.order(agent_id, "buy", "0.4", reduce_only=True) for _ in range(5)])
    assert ended == {"done": 2, "would_flip": 3}
    [position] = (await desk.book(agent_id)).positions
    assert (position.side, position.size) == ("short", Decimal("0.2"))


async def test_a_reduction_of_all_by_two_is_done_by_one(desk: Desk) -> None:
    agent_id = await desk.agent("100000")
    filled = await desk.order(agent_id, "buy", 1)
    assert filled.position is not None
    ended = await at_once([desk.reduce(agent_id, filled.position.id, 1) for _ in range(4)])
    assert ended == {"done": 1, "already_closed": 3}
    assert await desk.rows("SELECT count(*) FROM orders WHERE reduce_only") == [(1,)]


@pytest.mark.parametrize("turn", range(5))
async def test_a_reservation_is_settled_once(desk: Desk, turn: int) -> None:
    agent_id = await desk.agent("100")
    held = await desk.reserve(agent_id, 60)
    ended = await at_once([desk.settle(agent_id, held.id) for _ in range(8)])
    assert ended == {"done": 1, "reservation_closed": 7}
    assert await desk.money(agent_id) == {"free": 40}
    assert await desk.rows("SELECT amount, to_bucket FROM ledger_entries WHERE kind = 'settle'") == [(60, "services")]


@pytest.mark.parametrize("turn", range(5))
async def test_what_is_released_is_not_settled_too(desk: Desk, turn: int) -> None:
    agent_id = await desk.agent("100")
    held = await desk.reserve(agent_id, 60)
    steps = [(desk.release if (i + turn) % 2 else desk.settle)(agent_id, held.id, 40) for i in range(6)]
    ended = await at_once(steps)
    assert ended == {"done": 1, "amount_above_reservation": 5}
    await desk.settle(agent_id, held.id)
    [(kind,)] = await desk.rows(
        "SELECT kind FROM ledger_entries WHERE kind IN ('settle', 'release') ORDER BY id LIMIT 1"
    )
    [(status, settled)] = await desk.rows("SELECT status, settled FROM reservations")
    assert (status, settled) == ("settled", 60 if kind == "settle" else 20)
    assert await desk.money(agent_id) == {"free": 100 - settled}
    assert await desk.imbalances() == {}


# --- many at once


async def test_deposits_at_once_add_up(desk: Desk) -> None:
    agent_id = await desk.agent()
    amounts = [Decimal(i) + Decimal("0.000001") for i in range(1, 41)]
    ended = await at_once([desk.deposit(agent_id, "USDC", amount) for amount in amounts])
    assert ended == {"done": 40}
    assert await desk.money(agent_id) == {"free": Decimal("820.000040")}
    assert await desk.rows("SELECT version FROM accounts WHERE agent_id = :id", id=agent_id) == [(40,)]
    assert await desk.rows("SELECT count(DISTINCT batch) FROM ledger_entries") == [(40,)]


async def test_one_agent_does_not_wait_for_another(desk: Desk) -> None:
    first, second = await desk.agent("100"), await desk.agent("100")
    async with desk.database.transaction("slow") as tx:
        await accounts.lock_account(tx, first)
        await asyncio.wait_for(desk.reserve(second, 10), 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(desk.reserve(first, 10), 0.2)
    assert await desk.money(first) == {"free": 100}
    assert await desk.money(second) == {"free": 90, "reserved": 10}


async def test_two_agents_that_pay_each_other_do_not_deadlock(desk: Desk) -> None:
    agents = [await desk.agent("100"), await desk.agent("100")]

    async def pay(payer: str, payee: str, amount: int) -> None:
        async with desk.database.transaction("pay") as tx:
            for agent_id in sorted((payer, payee)):
                await accounts.lock_account(tx, agent_id)
            move = Move("USDC", Decimal(amount), agent(payer, "free"), agent(payee, "free"))
            await ledger.post(tx, Occasion(payer, "escrow", "settle"), [move])

    first, second = agents
    steps = [pay(first, second, 3) if i % 2 else pay(second, first, 2) for i in range(40)]
    assert await at_once(steps) == {"done": 40}
    assert [await desk.money(a) for a in agents] == [{"free": 100 - 20 * 3 + 20 * 2}, {"free": 100 + 20 * 3 - 20 * 2}]
    assert await desk.imbalances() == {}


async def test_two_agents_trade_at_once(desk: Desk) -> None:
    agents = [await desk.agent("100000"), await desk.agent("100000")]
    steps = [desk.order(a, "buy" if i % 2 else "sell", "0.1", "ETH-PERP") for i in range(9) for a in agents]
    assert await at_once(steps) == {"done": 18}
    for agent_id in agents:
        [position] = (await desk.book(agent_id)).positions
        assert (position.side, position.size, position.entry_price) == ("short", Decimal("0.1"), Decimal(3_000))
    assert await desk.imbalances() == {}


async def test_a_book_read_beside_writers_is_always_whole(desk: Desk) -> None:
    agent_id = await desk.agent("1000")

    async def reserve_and_settle() -> None:
        for _ in range(10):
            await desk.settle(agent_id, (await desk.reserve(agent_id, 10)).id)

    writers = [asyncio.create_task(reserve_and_settle()) for _ in range(3)]
    seen = set()
    while not all(writer.done() for writer in writers):
        book = await desk.book(agent_id)
        reserved = sum(r.remaining for r in book.reservations)
        assert book.holding("USDC").reserved == reserved
        seen.add(reserved)
    await asyncio.gather(*writers)
    assert len(seen) > 1
    assert await desk.money(agent_id) == {"free": 700}


# --- a request that is sent again


async def _deposit_once(desk: Desk, agent_id: str, named: Named = REQUEST, *, fails: bool = False) -> Answer:
    """Answer a request as the routes do: claim, act, keep, in one transaction."""
    async with desk.database.transaction("alice") as tx:
        answer = await idempotency.claim(tx, named)
        if answer is not None:
            return answer
        await _book(tx, agent_id)
        await asyncio.sleep(0.05)
        if fails:
            raise ConflictError("it fails", code="fails")
        [version] = (await tx.connection.exec_driver_sql("SELECT version FROM accounts")).one()
        answer = Answer(201, f"version {version}".encode())
        await idempotency.keep(tx, named, answer)
        return answer


async def _book(tx: Tx, agent_id: str) -> None:
    await accounts.lock_account(tx, agent_id)
    move = Move("USDC", Decimal(7), house("external"), agent(agent_id, "free"))
    await ledger.post(tx, Occasion(agent_id, "wallet", "deposit"), [move])


async def test_thirty_copies_of_a_request_have_one_effect_and_one_answer(desk: Desk) -> None:
    agent_id = await desk.agent()
    answers = await asyncio.gather(*[_deposit_once(desk, agent_id) for _ in range(30)])
    assert set(answers) == {Answer(201, b"version 1")}
    assert len(answers) == 30
    assert await desk.money(agent_id) == {"free": 7}
    assert await desk.rows("SELECT count(*) FROM ledger_entries") == [(1,)]


async def test_where_the_first_copy_fails_a_later_one_does_the_work(desk: Desk) -> None:
    agent_id = await desk.agent()
    first = asyncio.create_task(_deposit_once(desk, agent_id, fails=True))
    await asyncio.sleep(0.02)
    others = [asyncio.create_task(_deposit_once(desk, agent_id)) for _ in range(5)]
    with pytest.raises(ConflictError, match="it fails"):
        await first
    assert set(await asyncio.gather(*others)) == {Answer(201, b"version 1")}
    assert await desk.money(agent_id) == {"free": 7}


async def test_a_request_whose_connection_breaks_may_be_sent_again(desk: Desk) -> None:
    agent_id = await desk.agent()
    with suppress(asyncio.CancelledError):
        first = asyncio.create_task(_deposit_once(desk, agent_id))
        await asyncio.sleep(0.03)
        first.cancel()
        await first
    assert await desk.money(agent_id) == {}
    assert await _deposit_once(desk, agent_id) == Answer(201, b"version 1")


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (Named("alice", "first", "POST /api/orders", b"{}"), "path"),
        (Named("alice", "first", REQUEST.request, b"{ }"), "body"),
    ],
)
async def test_a_key_names_one_request(desk: Desk, other: Named, field: str) -> None:
    agent_id = await desk.agent()
    kept = await _deposit_once(desk, agent_id)
    with pytest.raises(ConflictError, match=field) as refused:
        await _deposit_once(desk, agent_id, other)
    assert refused.value.code == "idempotency_conflict"
    assert await _deposit_once(desk, agent_id) == kept
    assert await desk.money(agent_id) == {"free": 7}


async def test_keys_of_two_callers_are_two_keys(desk: Desk) -> None:
    agent_id = await desk.agent()
    await _deposit_once(desk, agent_id)
    bob = Named("bob", REQUEST.key, REQUEST.request, REQUEST.body)
    assert await _deposit_once(desk, agent_id, bob) == Answer(201, b"version 2")
    assert await desk.money(agent_id) == {"free": 14}
