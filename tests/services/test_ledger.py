"""What the ledger's tables refuse, whoever writes to them, and what posting refuses before it writes."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from app.db.session import Database
from app.domain.moves import Move, Purse, agent, house
from app.errors import ConflictError
from app.services import ledger
from app.services.ledger import Occasion
from tests.services.desk import PURSES, Desk

REFUSED_AMOUNTS = ["-1", "'NaN'", "'Infinity'", "'-Infinity'", "1e15", "0.0000000000000000001"]

INSERT_ENTRY = """
    INSERT INTO ledger_entries (batch, agent_id, service, kind, actor, posted_at, asset, amount,
        from_owner, from_bucket, to_owner, to_bucket)
    VALUES (1, :agent_id, {service}, 'deposit', 'test', now(), {asset}, {amount}, {source}, {target})
"""


@pytest.fixture
def desk(database: Database) -> Desk:
    return Desk(database)


async def execute(desk: Desk, statement: str, **values: Any) -> None:
    async with desk.database.transaction("test") as tx:
        await tx.connection.execute(text(statement), values)


def entry(**given: str) -> str:
    good = {
        "service": "'wallet'",
        "asset": "'USDC'",
        "amount": "1",
        "source": "'house', 'external'",
        "target": ":agent_id, 'free'",
    }
    return INSERT_ENTRY.format(**(good | given))


async def refused_by(desk: Desk, constraint: str, statement: str, **values: Any) -> None:
    with pytest.raises(IntegrityError, match=rf'"{constraint}"'):
        await execute(desk, statement, **values)


# --- entries


async def test_an_entry_as_it_should_be_is_written(desk: Desk) -> None:
    agent_id = await desk.agent()
    await execute(desk, entry(), agent_id=agent_id)
    await execute(desk, entry(amount="999999999999999.999999999999999999"), agent_id=agent_id)
    await execute(desk, entry(amount="0.000000000000000001"), agent_id=agent_id)
    assert await desk.rows("SELECT count(*) FROM ledger_entries") == [(3,)]


@pytest.mark.parametrize("amount", ["0", *REFUSED_AMOUNTS])
async def test_an_entry_moves_an_amount_of_money(desk: Desk, amount: str) -> None:
    await refused_by(desk, "ledger_entries_amount_check", entry(amount=amount), agent_id=await desk.agent())


async def test_an_entry_has_two_sides(desk: Desk) -> None:
    own = ":agent_id, 'free'"
    await refused_by(desk, "ledger_entries_sides_check", entry(source=own), agent_id=await desk.agent())


@pytest.mark.parametrize("asset", ["''", "'-USDC'", "'USD C'", f"'{'A' * 65}'"])
async def test_an_entry_names_an_asset(desk: Desk, asset: str) -> None:
    await refused_by(desk, "ledger_entries_asset_check", entry(asset=asset), agent_id=await desk.agent())


async def test_an_entry_names_a_service(desk: Desk) -> None:
    await refused_by(desk, "ledger_entries_service_check", entry(service="'Wallet'"), agent_id=await desk.agent())


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger_entries SET amount = 2",
        "UPDATE ledger_entries SET actor = actor",
        "UPDATE ledger_entries SET amount = 2 WHERE false",
        "DELETE FROM ledger_entries",
        "TRUNCATE ledger_entries",
        "TRUNCATE ledger_entries CASCADE",
    ],
)
async def test_entries_are_never_rewritten(desk: Desk, statement: str) -> None:
    agent_id = await desk.agent("5")
    with pytest.raises(IntegrityError, match="ledger_entries is append-only"):
        await execute(desk, statement)
    assert await desk.rows("SELECT amount FROM ledger_entries") == [(5,)]
    assert await desk.money(agent_id) == {"free": 5}


async def test_an_entry_s_number_is_not_chosen(desk: Desk) -> None:
    with pytest.raises(ProgrammingError, match='non-DEFAULT value into column "id"'):
        await execute(desk, entry().replace("(batch,", "(id, batch,").replace("(1,", "(7, 1,"), agent_id="alice")


# --- balances


@pytest.mark.parametrize("amount", REFUSED_AMOUNTS)
async def test_a_balance_is_an_amount_of_money(desk: Desk, amount: str) -> None:
    agent_id = await desk.agent("5")
    await refused_by(desk, "balances_amount_check", f"UPDATE balances SET amount = {amount}")
    statement = f"INSERT INTO balances VALUES (:agent_id, 'BTC', 'free', {amount})"
    await refused_by(desk, "balances_amount_check", statement, agent_id=agent_id)
    assert await desk.money(agent_id) == {"free": 5}


async def test_a_balance_is_in_a_known_bucket_of_a_known_agent(desk: Desk) -> None:
    statement = "INSERT INTO balances VALUES (:agent_id, 'USDC', '{}', 1)"
    agent_id = await desk.agent()
    await refused_by(desk, "balances_bucket_check", statement.format("pocket"), agent_id=agent_id)
    await refused_by(desk, "balances_agent_id_fkey", statement.format("free"), agent_id="nobody")


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("remaining = 11", "reservations_remaining_check"),
        ("settled = 1", "reservations_remaining_check"),
        ("remaining = 'NaN'", "reservations_remaining_check"),
        ("remaining = -1", "reservations_closed_check"),
        ("remaining = -1, status = 'released', closed_at = now()", "reservations_remaining_check"),
        ("remaining = 0", "reservations_closed_check"),
        ("status = 'released'", "reservations_closed_check"),
        ("closed_at = now()", "reservations_closed_check"),
        ("status = 'lost', remaining = 0, closed_at = now()", "reservations_status_check"),
        ("amount = 'NaN'", "reservations_amount_check"),
    ],
)
async def test_a_reservation_holds_no_more_than_its_amount(desk: Desk, change: str, constraint: str) -> None:
    await desk.reserve(await desk.agent("50"), 10)
    await refused_by(desk, constraint, f"UPDATE reservations SET {change}")


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("size = 'NaN'", "positions_size_check"),
        ("size = -1", "positions_size_check"),
        ("size = 0", "positions_size_check"),
        ("closed_at = now()", "positions_size_check"),
        ("entry_price = 0", "positions_entry_price_check"),
        ("allocated = 1", "positions_allocated_check"),
        ("leverage = 0.5", "positions_leverage_check"),
        ("side = 'flat'", "positions_side_check"),
    ],
)
async def test_a_position_is_one(desk: Desk, change: str, constraint: str) -> None:
    await desk.prices({"BTC": "60000"})
    await desk.order(await desk.agent("50000"), "buy", 1)
    await refused_by(desk, constraint, f"UPDATE positions SET {change}")


async def test_a_symbol_has_one_open_position(desk: Desk) -> None:
    await desk.prices({"BTC": "60000"})
    await desk.order(await desk.agent("50000"), "buy", 1)
    statement = """
        INSERT INTO positions (id, agent_id, symbol, side, size, entry_price, margin_mode, allocated, realized_pnl,
            opened_at, updated_at)
        SELECT 'second', agent_id, symbol, 'short', 1, 1, 'pooled', 0, 0, now(), now() FROM positions
    """
    await refused_by(desk, "positions_open_idx", statement)


# --- posting


@pytest.mark.parametrize("bucket", ["free", "reserved", "allocated"])
async def test_a_batch_that_a_bucket_does_not_cover_writes_nothing(desk: Desk, bucket: Any) -> None:
    alice, bob = await desk.agent("5"), await desk.agent("5")
    moves = [
        Move("USDC", Decimal(3), agent(alice, "free"), house("external")),
        Move("USDC", Decimal(6), agent(bob, bucket), agent(alice, "reserved")),
    ]
    with pytest.raises(ConflictError) as refused:
        async with desk.database.transaction("test") as tx:
            await ledger.post(tx, Occasion(alice, "escrow", "settle"), moves)
    assert refused.value.code == "insufficient_funds"
    assert await desk.money(alice) == await desk.money(bob) == {"free": 5}
    assert await desk.rows("SELECT count(*) FROM ledger_entries") == [(2,)]


async def test_debts_are_paid_no_further_than_they_go(desk: Desk) -> None:
    alice = await desk.agent("5")
    move = Move("USDC", Decimal(1), agent(alice, "free"), agent(alice, "owed"))
    with pytest.raises(ConflictError):
        async with desk.database.transaction("test") as tx:
            await ledger.post(tx, Occasion(alice, "wallet", "settle"), [move])
    assert await desk.money(alice) == {"free": 5}


async def test_a_move_to_where_it_came_from_is_no_move(desk: Desk) -> None:
    alice = await desk.agent("5")
    same = Purse(alice, "free")
    with pytest.raises(IntegrityError, match="ledger_entries_sides_check"):
        async with desk.database.transaction("test") as tx:
            await ledger.post(tx, Occasion(alice, "wallet", "settle"), [Move("USDC", Decimal(1), same, same)])
    assert await desk.rows("SELECT count(*) FROM ledger_entries") == [(1,)]


@pytest.mark.parametrize("amount", ["0", "-1"])
async def test_a_move_of_nothing_is_a_fault_of_ours(desk: Desk, amount: str) -> None:
    alice = await desk.agent("5")
    moves = [Move("USDC", Decimal(amount), agent(alice, "free"), house("external"))]
    with pytest.raises(ValueError, match="a move of"):
        async with desk.database.transaction("test") as tx:
            await ledger.post(tx, Occasion(alice, "wallet", "withdrawal"), moves)


@pytest.mark.parametrize(
    ("statement", "off"),
    [
        ("UPDATE balances SET amount = amount + 0.5 WHERE asset = 'USDC'", {"USDC": Decimal("0.5")}),
        ("DELETE FROM balances WHERE asset = 'BTC'", {"BTC": Decimal(2)}),
        ("UPDATE balances SET bucket = 'owed' WHERE asset = 'USDC'", {"USDC": Decimal(10)}),
        ("INSERT INTO balances SELECT agent_id, 'ETH', 'free', 3 FROM accounts", {"ETH": Decimal(3)}),
    ],
)
async def test_a_balance_that_the_entries_do_not_explain_is_found(
    desk: Desk, statement: str, off: dict[str, Decimal]
) -> None:
    await desk.prices({"BTC": "60000"})
    agent_id = await desk.agent("5")
    await desk.deposit(agent_id, "BTC", 2)
    assert await desk.imbalances() == {}
    await execute(desk, statement)
    assert await desk.imbalances() == off


async def test_entries_tell_who_moved_what_and_why(desk: Desk) -> None:
    agent_id = await desk.agent("50")
    held = await desk.reserve(agent_id, 20)
    await desk.settle(agent_id, held.id, 8)
    await desk.release(agent_id, held.id)
    async with desk.database.transaction("reader") as tx:
        found = await ledger.list_entries(tx, agent_id, 10)
        older = await ledger.list_entries(tx, agent_id, 10, found[1].id)
    shown = [(e.kind, e.service, e.reference, e.actor, e.amount, e.from_bucket, e.to_bucket) for e in found]
    expected: list[Any] = [
        ("release", "casino", held.id, "desk", Decimal(12), "reserved", "free"),
        ("settle", "casino", held.id, "desk", Decimal(8), "reserved", "services"),
        ("reserve", "casino", held.id, "desk", Decimal(20), "free", "reserved"),
        ("deposit", "wallet", None, "desk", Decimal(50), "external", "free"),
    ]
    assert shown == expected
    assert older == found[2:]
    purses = {(owner, bucket): amount for owner, _, bucket, amount in await desk.rows(PURSES)}
    assert purses == {
        (agent_id, "free"): 42,
        (agent_id, "reserved"): 0,
        ("house", "external"): -50,
        ("house", "services"): 8,
    }
