"""What an owner, a dead feed or a grain of dust can't do to a margin call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import URL, text

from app.db.session import Database
from app.domain.book import Book
from app.domain.liquidate import fewest
from app.domain.quote import AccountFigures
from app.errors import ConflictError, InvalidError
from app.services import account, liquidation, market
from app.services.liquidation import Rules
from app.services.margin import Scene
from tests.services.calls import BREACH, CONNECTIONS, DEEP, PRICES, RULES, Calls
from tests.services.desk import ACTOR, Desk

AGE = timedelta(minutes=1)


@pytest.fixture
async def desk(database_url: URL) -> AsyncIterator[Desk]:
    database = Database(database_url, CONNECTIONS)
    made = Desk(database)
    await made.prices(PRICES | {"DOGE": "0.1", "XX": "10"})
    await made.market.refresh()
    yield made
    await database.close()


@pytest.fixture
def calls(desk: Desk) -> Calls:
    return Calls(desk)


async def _let_go_stale(desk: Desk, *symbols: str) -> None:
    async with desk.database.transaction(ACTOR) as tx:
        statement = text(
            """
            WITH bumped AS (UPDATE market_state SET version = version + 1 WHERE name = 'prices' RETURNING version)
            UPDATE market_prices p SET as_of = as_of - interval '10 days', version = bumped.version
            FROM bumped WHERE symbol = ANY (:symbols)"""
        )
        await tx.connection.execute(statement, {"symbols": list(symbols)})


async def _set(desk: Desk, agent_id: str, **change: Any) -> None:
    async with desk.locked(agent_id) as (tx, scene, held):
        await account.change_settings(tx, scene, held, change)


# --- stale prices


@pytest.mark.parametrize("amount", ["0.000000000000000001", "10000"])
async def test_a_grain_whose_feed_has_ended_holds_nothing_up(calls: Calls, amount: str) -> None:
    """10,000 DOGE are 1,000 USD at the most that a stale price may be off: not what a deficit of 14,000 hangs on."""
    agent_id = await calls.trader(grace_period_seconds=0)
    await calls.desk.deposit(agent_id, "DOGE", amount)
    await calls.desk.prices({"BTC": DEEP})
    await _let_go_stale(calls.desk, "DOGE")
    for _ in range(5):
        await calls.decide(agent_id, AGE)
    [call] = await calls.calls(agent_id)
    assert call.state == "completed"
    assert set(await calls.told(agent_id)) >= {"market.stale", "margin_call.opened", "liquidation.executed"}


async def test_collateral_that_counts_at_no_price_holds_nothing_up(calls: Calls) -> None:
    """Who holds enough of a coin whose feed has ended is never called, until an operator sets its haircut to 1."""
    agent_id = await calls.trader()
    await calls.desk.deposit(agent_id, "DOGE", "120000")
    await calls.desk.prices({"BTC": DEEP})
    await _let_go_stale(calls.desk, "DOGE")
    assert "margin_call.opened" not in (await calls.decide(agent_id, AGE)).told
    async with calls.desk.database.transaction(ACTOR) as tx:
        await market.put_asset(tx, "DOGE", {"haircut": 1.0})
    assert "margin_call.opened" in (await calls.decide(agent_id, AGE)).told


async def test_a_breach_that_hangs_on_a_stale_price_waits(calls: Calls) -> None:
    """Without haircut, and .30 higher, the DOGE would be worth 15,600 USD: enough to be sound."""
    agent_id = await calls.trader(grace_period_seconds=0)
    await calls.desk.deposit(agent_id, "DOGE", "120000")
    await calls.desk.prices({"BTC": DEEP})
    await _let_go_stale(calls.desk, "DOGE")
    assert (await calls.decide(agent_id, AGE)).waits
    assert await calls.calls(agent_id) == []
    await calls.desk.prices({"DOGE": "0.01"})
    await calls.decide(agent_id, AGE)
    assert len(await calls.calls(agent_id)) == 1


async def test_nothing_is_sold_at_a_stale_mark(calls: Calls) -> None:
    agent_id = await calls.trader(grace_period_seconds=0)
    await calls.desk.prices({"BTC": "3000"})
    await _let_go_stale(calls.desk, "SOL")
    for _ in range(6):
        await calls.decide(agent_id, AGE)
    assert await calls.sizes(agent_id) == {"SOL-PERP": 10}
    assert (await calls.only(agent_id)).state == "liquidating"


async def test_a_stale_leg_that_hedges_a_fresh_one_hides_no_breach(calls: Calls) -> None:
    """Long 1.2 BTC-PERP, short .5 of a contract whose own mark has stopped: equity falls by 50,000 all the same."""
    desk = calls.desk
    listed: market.InstrumentChange = {"underlying": "BTC", "kind": "future"}
    async with desk.database.transaction(ACTOR) as tx:
        await market.put_instrument(tx, "BTC-DEC", listed)
    await desk.prices({"BTC-DEC": "60000"})
    agent_id = await desk.agent("30000", grace_period_seconds=0)
    await desk.order(agent_id, "buy", "1.2", "BTC-PERP")
    await desk.order(agent_id, "sell", "0.5", "BTC-DEC")
    await desk.prices({"BTC": DEEP})
    await _let_go_stale(desk, "BTC-DEC")
    for _ in range(4):
        await calls.decide(agent_id, AGE)
    assert set(await calls.sizes(agent_id)) == {"BTC-DEC"}


async def test_a_grain_keeps_no_level_no_stop_and_no_rung_from_being_told(calls: Calls) -> None:
    agent_id = await calls.desk.agent("20000", trailing_stop=0.1, drawdown_ladder="apply")
    await calls.desk.order(agent_id, "buy", "0.3")
    await calls.desk.deposit(agent_id, "DOGE", "0.0001")
    await calls.decide(agent_id)
    await calls.desk.prices({"BTC": "35000"})
    await _let_go_stale(calls.desk, "DOGE")
    await calls.decide(agent_id, AGE)
    told = await calls.events(agent_id)
    assert {"market.stale", "trailing_stop.breached", "drawdown.changed"} <= set(told)
    assert (await calls.sizes(agent_id))["BTC-PERP"] < Decimal("0.2")


async def test_what_is_not_covered_is_counted_once_however_often_prices_go_stale(calls: Calls) -> None:
    """20,000 of loss on 15,000, and a reservation that stays."""
    desk = calls.desk
    agent_id = await desk.agent("15000", grace_period_seconds=0)
    await desk.order(agent_id, "buy", "0.4", leverage=5)
    await desk.reserve(agent_id, "2000", reducible=False)
    await desk.deposit(agent_id, "DOGE", "1")
    await desk.prices({"BTC": "10000"})
    for _ in range(3):
        for _ in range(4):
            await calls.decide(agent_id, AGE)
        await _let_go_stale(desk, "DOGE")
        await calls.decide(agent_id, AGE)
        await desk.prices({"DOGE": "0.1", "BTC": "10000"})
    call = await calls.only(agent_id)
    assert call.state == "liquidating"
    assert Decimal(4_999) < call.lost <= Decimal(5_000)
    assert (await calls.told(agent_id)).count("liquidation.exhausted") == 1


# --- isolated positions


async def _with_isolated(calls: Calls, pool: str) -> str:
    """Make an account whose pool is at utilization .30 x `pool` x 3,000 / 10,000, with an isolated BTC position."""
    agent_id = await calls.desk.agent("13500", grace_period_seconds=0)
    await calls.desk.order(agent_id, "buy", pool, "ETH-PERP")
    await calls.desk.order(agent_id, "buy", "0.1", "BTC-PERP", leverage=3, mode="isolated")
    return agent_id


async def test_an_isolated_position_fails_alone(calls: Calls) -> None:
    """The pool stands at some .77, between the stop and the gate: nothing of it is sold."""
    agent_id = await _with_isolated(calls, "9.9")
    before = await calls.utilization(agent_id)
    assert 0.75 < before < 0.80
    await calls.desk.prices({"BTC": "41000"})
    await calls.until_settled(agent_id)
    [call] = await calls.calls(agent_id)
    assert (call.state, call.cause, call.slices) == ("completed", "isolated", 1)
    assert await calls.sizes(agent_id) == {"ETH-PERP": Decimal("9.9")}


async def test_an_isolated_position_closed_by_its_owner_is_the_cure(calls: Calls) -> None:
    agent_id = await _with_isolated(calls, "9.9")
    async with calls.desk.database.transaction(ACTOR) as tx:
        statement = text("UPDATE accounts SET grace_period_seconds = 300 WHERE agent_id = :agent_id")
        await tx.connection.execute(statement, {"agent_id": agent_id})
    await calls.desk.prices({"BTC": "41000", "ETH": "2990"})
    await calls.decide(agent_id)
    assert (await calls.only(agent_id)).state == "open"
    await calls.desk.order(agent_id, "sell", "0.1", "BTC-PERP", reduce_only=True)
    await calls.decide(agent_id)
    assert (await calls.only(agent_id)).state == "cured"


async def test_a_breach_of_the_pool_takes_the_call_over_with_its_own_time(calls: Calls) -> None:
    agent_id = await _with_isolated(calls, "9.9")
    async with calls.desk.database.transaction(ACTOR) as tx:
        statement = text("UPDATE accounts SET grace_period_seconds = 300 WHERE agent_id = :agent_id")
        await tx.connection.execute(statement, {"agent_id": agent_id})
    await calls.desk.prices({"BTC": "41000"})
    await calls.decide(agent_id)
    await calls.pass_time(agent_id, 250)
    await calls.desk.prices({"ETH": "2700"})
    await calls.decide(agent_id)
    call = await calls.only(agent_id)
    assert (call.state, call.cause, call.reminders) == ("open", "utilization", 0)
    assert call.deadline_at is not None
    assert call.opened_at is not None
    assert call.deadline_at - call.opened_at == timedelta(seconds=300)
    assert await calls.told(agent_id) == ["margin_call.opened", "margin_call.opened"]


# --- nothing leveraged


async def test_reserving_all_that_is_free_is_no_breach(calls: Calls) -> None:
    agent_id = await calls.desk.agent("1000")
    await calls.desk.reserve(agent_id, "900")
    await calls.desk.reserve(agent_id, "90", reducible=False)
    await calls.decide(agent_id)
    assert await calls.calls(agent_id) == []


# --- dust


async def test_dust_costs_the_liquidation_one_step(calls: Calls) -> None:
    agent_id = await calls.trader(grace_period_seconds=0)
    for _ in range(30):
        await calls.desk.reserve(agent_id, "0.000000000000000001")
    await calls.desk.prices({"BTC": BREACH})
    made = await calls.until_settled(agent_id)
    executed = [decided.told.count("liquidation.executed") for decided in made]
    assert executed[0] > 30
    assert len(made) <= 4
    assert (await calls.only(agent_id)).state == "completed"
    assert "SOL-PERP" not in await calls.sizes(agent_id)


async def test_nothing_is_reserved_under_an_expired_call(calls: Calls) -> None:
    agent_id = await calls.trader(grace_period_seconds=0, auto_liquidate=False)
    await calls.desk.prices({"BTC": BREACH})
    await calls.decide(agent_id)
    with pytest.raises(ConflictError) as refused:
        await calls.desk.reserve(agent_id, "0.000000000000000001")
    assert refused.value.code == "reduce_only"


# --- settings under a call


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"grace_period_seconds": 301}, True),
        ({"grace_period_seconds": 10}, False),
        ({"notice_delay_seconds": 1}, True),
        ({"auto_liquidate": False}, True),
        ({"execution": "venue"}, True),
        ({"auto_liquidate": True}, False),
        ({"breach_utilization": None}, True),
        ({"breach_utilization": 0.84}, True),
        ({"breach_utilization": 0.81}, False),
        ({"stop_utilization": 0.7}, False),
        ({"trailing_stop": 0.5, "target_utilization": None}, False),
    ],
)
async def test_under_a_call_settings_only_become_stricter(calls: Calls, change: dict[str, Any], refused: bool) -> None:
    agent_id = await calls.trader(breach_utilization=0.82)
    await calls.desk.prices({"BTC": BREACH})
    await calls.decide(agent_id)
    if not refused:
        await _set(calls.desk, agent_id, **change)
        return
    with pytest.raises(ConflictError) as found:
        await _set(calls.desk, agent_id, **change)
    assert found.value.code == "call_is_live"


async def test_without_a_call_they_are_the_owners(calls: Calls) -> None:
    agent_id = await calls.trader()
    await _set(calls.desk, agent_id, grace_period_seconds=9_000, auto_liquidate=False)


# --- what is told of cures, in few tries


async def test_cures_of_a_long_book_take_few_assessments(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    assessed: list[Book] = []
    figures = Scene.figures

    def counted(scene: Scene, book: Book) -> AccountFigures:
        assessed.append(book)
        return figures(scene, book)

    monkeypatch.setattr(Scene, "figures", counted)
    agent_id = await calls.trader()
    async with calls.desk.locked(agent_id) as (_, scene, held):
        [btc] = [p for p in held.positions if p.symbol == "BTC-PERP"]
        many = [replace(btc, id=f"p{k}", symbol=f"A{k}-PERP", size=Decimal(1)) for k in range(100)]
        marks = {f"A{k}": replace(scene.market.prices["BTC"], value=50.0 + k / 10, posted=None) for k in range(100)}
        there = replace(scene, market=replace(scene.market, prices={**scene.market.prices, **marks}))
        whole = replace(held, positions=[*held.positions, *(replace(p, entry_price=Decimal(100)) for p in many)])
        assessed.clear()
        cure = liquidation.cures(whole, there, figures(there, whole))
    assert len(assessed) < 45
    assert cure["complete"] is True, (len(cure["orders"]), cure["deposit"])
    assert 0 < len(cure["orders"]) <= 103


@pytest.mark.parametrize("answer", range(14))
def test_the_fewest_that_are_enough(answer: int) -> None:
    tried: list[int] = []

    def enough(count: int) -> bool:
        tried.append(count)
        return count >= answer

    assert fewest(3, 12, enough) == max(3, answer)
    assert len(tried) <= 6


# --- the largest relief


async def test_largest_relief_weighs_the_largest_only(calls: Calls) -> None:
    agent_id = await calls.trader(grace_period_seconds=0)
    await calls.desk.prices({"BTC": BREACH})
    await calls.until_settled(agent_id, rules=Rules("largest_relief", RULES.slippage))
    [call] = await calls.calls(agent_id)
    assert (call.state, call.slices) == ("completed", 1)


@pytest.mark.parametrize("grace", [0, 300])
async def test_a_call_at_an_absurd_price_is_told_though_nothing_can_be_booked(calls: Calls, grace: int) -> None:
    """A loss of 10^16 USD has no place in the ledger. Its owner hears of the call; a slip that is mended ends it."""
    agent_id = await calls.desk.agent("2000000", grace_period_seconds=grace)
    await calls.desk.order(agent_id, "sell", "20", leverage=3)
    await calls.desk.prices({"BTC": "999999999999999"})
    await calls.decide(agent_id)
    await calls.pass_time(agent_id, grace)
    if grace:
        await calls.decide(agent_id)
    call = await calls.only(agent_id)
    assert (call.state, call.slices) == ("liquidating", 0)
    assert await calls.told(agent_id) == ["margin_call.opened", "margin_call.expired"]
    with pytest.raises(InvalidError):
        await calls.decide(agent_id)  # alone from now on: the worker counts it, and waits longer each time
    await calls.desk.prices({"BTC": PRICES["BTC"]})
    await calls.until_settled(agent_id)
    assert (await calls.only(agent_id)).state == "completed"
    assert await calls.sizes(agent_id) == {"BTC-PERP": Decimal(20)}
    assert await calls.desk.imbalances() == {}
