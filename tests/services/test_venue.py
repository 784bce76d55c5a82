"""Orders that wait at a venue, the fills that are reported of them, and liquidation by asking for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import URL

from app.db.session import Database
from app.errors import ConflictError, InvalidError, PrimeriskError
from app.services import calls, margin_calls, market, orders, venue
from app.services.liquidation import Rules
from app.services.orders import StoredOrder
from app.services.venue import Fill, Recorded
from app.services.wallet import Names
from tests.services.calls import BREACH, CONNECTIONS, CURED, DEEP, PRICES, STOP, Calls
from tests.services.desk import ACTOR, Desk

TENTH = Decimal("0.1")


@dataclass(frozen=True, slots=True)
class Venue:
    """Accounts that trade at a venue, and what it reports of them."""

    calls: Calls

    @property
    def desk(self) -> Desk:
        return self.calls.desk

    async def agent(self, usdc: str = "20000", **settings: Any) -> str:
        return await self.desk.agent(usdc, execution="venue", **settings)

    async def order(self, agent_id: str, side: Any, size: str, symbol: str = "BTC-PERP", **more: Any) -> str:
        """Book an order, of leverage 3 unless told, and return its id."""
        booked = await self.desk.order(agent_id, side, size, symbol, **{"leverage": 3} | more)
        assert booked.order.status == "pending"
        return booked.order.id

    async def fill(
        self, agent_id: str, order_id: str, fill_id: str, size: Any, price: Any, fee: Any = 0, *, confirm: bool = False
    ) -> Recorded:
        reported = Fill(fill_id, Decimal(size), Decimal(price), Decimal(fee), confirm)
        async with self.desk.locked(agent_id) as (tx, scene, held):
            return await margin_calls.record_fill(tx, scene, held, order_id, reported, Names(), TENTH)

    async def cancel(self, agent_id: str, order_id: str) -> StoredOrder:
        async with self.desk.locked(agent_id) as (tx, _, held):
            return (await venue.cancel(tx, held, order_id))[0]

    async def traded(self, agent_id: str, side: Any, size: str, symbol: str = "BTC-PERP", **more: Any) -> str:
        """Book an order and have it filled at the calm price."""
        order_id = await self.order(agent_id, side, size, symbol, **more)
        await self.fill(agent_id, order_id, "whole", size, PRICES[symbol.partition("-")[0]])
        return order_id

    async def trader(self, usdc: str = "20000", **settings: Any) -> str:
        """Make the account of `Calls.trader`, by fills."""
        agent_id = await self.agent(usdc, **settings)
        for symbol, size in (("BTC-PERP", "0.5"), ("ETH-PERP", "2"), ("SOL-PERP", "10")):
            await self.traded(agent_id, "buy", size, symbol)
        return agent_id

    async def get(self, agent_id: str, order_id: str) -> StoredOrder:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await orders.get(tx, agent_id, order_id)

    async def live(self, agent_id: str) -> list[StoredOrder]:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await orders.list_orders(tx, agent_id, 100, pending=True)

    async def requests(self, agent_id: str) -> list[dict[str, Any]]:
        query = "SELECT data FROM events WHERE agent_id = :id AND type = 'liquidation.requested' ORDER BY sequence"
        return [data for [data] in await self.desk.rows(query, id=agent_id)]

    async def last(self, agent_id: str, kind: str) -> dict[str, Any]:
        query = "SELECT data FROM events WHERE agent_id = :id AND type = :kind ORDER BY sequence DESC LIMIT 1"
        [[data]] = await self.desk.rows(query, id=agent_id, kind=kind)
        found: dict[str, Any] = data
        return found

    async def breached(self, **settings: Any) -> tuple[str, StoredOrder]:
        """Return a trader whose liquidation has asked for its first slice, and that order: all of its SOL."""
        agent_id = await self.trader(grace_period_seconds=0, **settings)
        await self.desk.prices({"BTC": BREACH})
        await self.calls.decide(agent_id)
        [asked] = await self.live(agent_id)
        return agent_id, asked


async def refused(doing: Any) -> PrimeriskError:
    with pytest.raises(PrimeriskError) as found:
        await doing
    return found.value


@pytest.fixture
async def at_venue(database_url: URL) -> AsyncIterator[Venue]:
    database = Database(database_url, CONNECTIONS)
    desk = Desk(database)
    await desk.prices(PRICES)
    await desk.market.refresh()
    made = Venue(Calls(desk))
    yield made
    assert await desk.imbalances() == {}
    await database.close()


# --- orders and fills


async def test_a_pending_order_is_no_position_and_no_money(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.5")
    book = await at_venue.desk.book(agent_id)
    assert (list(book.positions), [o.id for o in book.pending]) == ([], [order_id])
    assert await at_venue.desk.money(agent_id) == {"free": 20_000}
    assert (await at_venue.calls.decide(agent_id)).call is None


async def test_partial_fills_at_the_venues_prices(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.5")
    first = await at_venue.fill(agent_id, order_id, "a", "0.2", "60100", "1.5")
    assert (first.order.status, first.fill.status, first.order.filled_size) == ("partially_filled",) * 2 + (
        Decimal("0.2"),
    )
    second = await at_venue.fill(agent_id, order_id, "b", "0.3", "59900", "2.25")
    assert (second.order.status, second.order.fees) == ("filled", Decimal("3.75"))
    assert second.order.fill_price == (Decimal("0.2") * 60_100 + Decimal("0.3") * 59_900) / Decimal("0.5")
    assert second.order.closed_at is not None
    book = await at_venue.desk.book(agent_id)
    [position] = book.positions
    assert (position.size, position.entry_price) == (Decimal("0.5"), Decimal(59_980))
    assert list(book.pending) == []
    assert await at_venue.desk.money(agent_id) == {"free": Decimal("19996.25")}
    closing = await at_venue.order(agent_id, "sell", "0.5", reduce_only=True)
    done = await at_venue.fill(agent_id, closing, "a", "0.5", "60980", "3")  # a fill's id is its order's own
    assert done.fill.realized_pnl == 500
    assert await at_venue.desk.money(agent_id) == {"free": Decimal("20493.25")}
    assert list((await at_venue.desk.book(agent_id)).positions) == []


async def test_a_fill_is_booked_once(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.5")
    first = await at_venue.fill(agent_id, order_id, "a", "0.2", "60100", "1")
    await at_venue.fill(agent_id, order_id, "b", "0.1", "60100", "1")
    money = await at_venue.desk.money(agent_id)
    again = await at_venue.fill(agent_id, order_id, "a", "0.20", "60100.0", "1.0")
    assert (again.fill, again.trade) == (first.fill, None)
    for changed in (("0.3", "60100", "1"), ("0.2", "60101", "1"), ("0.2", "60100", "0")):
        error = await refused(at_venue.fill(agent_id, order_id, "a", *changed))
        assert error.code == "fill_conflict"
    assert await at_venue.desk.money(agent_id) == money
    assert (await at_venue.get(agent_id, order_id)).filled_size == Decimal("0.3")


async def test_an_order_never_fills_past_its_size(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.5")
    await at_venue.fill(agent_id, order_id, "a", "0.4", "60000")
    error = await refused(at_venue.fill(agent_id, order_id, "b", "0.100000000000000001", "60000"))
    assert error.code == "fill_above_order"
    await at_venue.fill(agent_id, order_id, "b", "0.1", "60000")
    assert (await refused(at_venue.fill(agent_id, order_id, "c", "0.1", "60000"))).code == "fill_above_order"
    assert await at_venue.calls.sizes(agent_id) == {"BTC-PERP": Decimal("0.5")}


async def test_an_order_that_the_book_filled_takes_no_fill(at_venue: Venue) -> None:
    agent_id = await at_venue.desk.agent("20000")
    filled = await at_venue.desk.order(agent_id, "buy", "0.1")
    error = await refused(at_venue.fill(agent_id, filled.order.id, "a", "0.1", "60000"))
    assert error.code == "fill_above_order"
    assert (await refused(at_venue.cancel(agent_id, filled.order.id))).code == "order_closed"


@pytest.mark.parametrize("price", ["66000.01", "53999.99", "600000", "0.01"])
async def test_a_price_far_from_the_mark_has_to_be_confirmed(at_venue: Venue, price: str) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "sell", "0.1")
    assert (await refused(at_venue.fill(agent_id, order_id, "a", "0.1", price))).code == "price_off_mark"
    assert await at_venue.calls.sizes(agent_id) == {}
    done = await at_venue.fill(agent_id, order_id, "a", "0.1", price, confirm=True)
    assert done.order.fill_price == Decimal(price)


@pytest.mark.parametrize(
    ("size", "price", "fee", "code"),
    [("0", "60000", "0", "not_positive"), ("-1", "60000", "0", "not_positive"), ("1", "-1", "0", "not_positive"),
     ("1", "60000", "-0.01", "not_positive"), ("1", "60000", "0.0000001", "too_many_decimals"),
     ("NaN", "60000", "0", "not_positive"), ("1", "Infinity", "0", "not_positive")],
)  # fmt: skip
async def test_numbers_that_are_no_fill(at_venue: Venue, size: str, price: str, fee: str, code: str) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.1")
    error = await refused(at_venue.fill(agent_id, order_id, "a", size, price, fee))
    assert (type(error), error.code) == (InvalidError, code)


# --- the gates count what is pending


async def test_two_pending_orders_pass_no_more_than_one(at_venue: Venue) -> None:
    """At a gate of .80, 20,000 carry a margin of 16,000: .8 coins at leverage 3."""
    agent_id = await at_venue.agent()
    await at_venue.order(agent_id, "buy", "0.4")
    await at_venue.order(agent_id, "buy", "0.4")
    error = await refused(at_venue.order(agent_id, "buy", "0.001"))
    assert error.code == "insufficient_margin"
    assert 0 <= error.figures["size_max"] < Decimal("1e-8")
    # the other side is no credit: it may be cancelled, or come last
    sell = await at_venue.order(agent_id, "sell", "0.8")
    assert (await refused(at_venue.order(agent_id, "buy", "0.001"))).code == "insufficient_margin"
    assert (await refused(at_venue.order(agent_id, "sell", "0.001"))).code == "insufficient_margin"
    await at_venue.cancel(agent_id, sell)
    await at_venue.order(agent_id, "sell", "0.001")


async def test_pending_orders_that_hedge_each_other_stay_within_the_leverage_cap(at_venue: Venue) -> None:
    """Either alone needs a margin of 16,000, both together next to none; 3.5 times 20,000 may be open."""
    async with at_venue.desk.database.transaction(ACTOR) as tx:
        for month in ("JUN", "SEP"):
            await market.put_instrument(tx, f"BTC-{month}", {"underlying": "BTC", "kind": "perpetual"})
    agent_id = await at_venue.agent()
    first = await at_venue.order(agent_id, "buy", "0.8")
    error = await refused(at_venue.order(agent_id, "sell", "0.8", "BTC-JUN"))
    assert error.code == "leverage_above_cap"
    assert error.figures["shortfall"] == pytest.approx(96_000 / 3.5 - 20_000)
    assert float(error.figures["size_max"]) == pytest.approx((70_000 - 48_000) / 60_000)
    await at_venue.order(agent_id, "sell", "0.36", "BTC-JUN")
    assert (await refused(at_venue.order(agent_id, "sell", "0.36", "BTC-SEP"))).code == "leverage_above_cap"
    error = await refused(at_venue.desk.withdraw(agent_id, "USDC", 1_000))
    assert error.code == "insufficient_margin"
    await at_venue.cancel(agent_id, first)
    await at_venue.order(agent_id, "sell", "0.36", "BTC-SEP")


async def test_orders_that_close_on_their_own_open_together(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    await at_venue.traded(agent_id, "buy", "0.8")
    await at_venue.order(agent_id, "sell", "0.8")
    await at_venue.order(agent_id, "sell", "0.8")  # closes as well if it comes first: together they open a short
    assert (await refused(at_venue.order(agent_id, "sell", "0.001"))).code == "insufficient_margin"


async def test_withdrawals_and_reservations_leave_the_margin_of_what_is_pending(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.8")
    assert (await refused(at_venue.desk.withdraw(agent_id, "USDC", 1))).code == "insufficient_margin"
    assert (await refused(at_venue.desk.reserve(agent_id, 1))).code == "insufficient_margin"
    await at_venue.cancel(agent_id, order_id)
    await at_venue.desk.withdraw(agent_id, "USDC", 20_000)


async def test_isolated_orders_share_what_is_free(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    await at_venue.order(agent_id, "buy", "0.5", mode="isolated")
    await at_venue.order(agent_id, "buy", "3", "ETH-PERP", mode="isolated")
    error = await refused(at_venue.order(agent_id, "buy", "71", "SOL-PERP", leverage=1, mode="isolated"))
    assert error.code == "insufficient_margin"
    await at_venue.order(agent_id, "buy", "69", "SOL-PERP", leverage=1, mode="isolated")


async def test_reduce_only_orders_reduce_no_more_than_there_is(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    await at_venue.traded(agent_id, "buy", "0.5")
    await at_venue.order(agent_id, "sell", "0.4", reduce_only=True)
    assert (await refused(at_venue.order(agent_id, "sell", "0.2", reduce_only=True))).code == "would_flip"
    [position] = (await at_venue.desk.book(agent_id)).positions
    assert (await refused(at_venue.desk.reduce(agent_id, position.id, 1))).code == "would_flip"
    await at_venue.desk.reduce(agent_id, position.id, "0.2")
    assert (await refused(at_venue.order(agent_id, "sell", "0.1", reduce_only=True))).code == "nothing_to_reduce"
    assert await at_venue.calls.sizes(agent_id) == {"BTC-PERP": Decimal("0.5")}


async def test_many_pending_orders_are_too_many(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    for _ in range(100):
        await at_venue.order(agent_id, "buy", "0.001")
    assert (await refused(at_venue.order(agent_id, "buy", "0.001"))).code == "account_full"


# --- a fill is a fact


async def test_a_fill_is_booked_in_a_breach_and_on_stale_prices(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.8")
    await at_venue.desk.prices({"BTC": "41000"})
    stale = Venue(Calls(Desk(at_venue.desk.database, timedelta(0))))
    await stale.fill(agent_id, order_id, "a", "0.8", "60000", confirm=True)
    assert await at_venue.calls.sizes(agent_id) == {"BTC-PERP": Decimal("0.8")}
    decided = await at_venue.calls.decide(agent_id)
    assert decided.told == ("margin_call.opened",)


async def test_a_fill_that_comes_after_the_cancel(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.5")
    cancelled = await at_venue.cancel(agent_id, order_id)
    assert (await at_venue.cancel(agent_id, order_id)) == await at_venue.get(agent_id, order_id) == cancelled
    late = await at_venue.fill(agent_id, order_id, "a", "0.3", "60000")
    assert (late.order.status, late.order.closed_at) == ("cancelled", cancelled.closed_at)
    assert list((await at_venue.desk.book(agent_id)).pending) == []
    whole = await at_venue.fill(agent_id, order_id, "b", "0.2", "60000")
    assert whole.order.status == "filled"
    assert await at_venue.calls.sizes(agent_id) == {"BTC-PERP": Decimal("0.5")}


async def test_an_isolated_fill_takes_what_is_free(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.7", mode="isolated")
    await at_venue.cancel(agent_id, order_id)
    await at_venue.desk.withdraw(agent_id, "USDC", 15_000)
    await at_venue.fill(agent_id, order_id, "a", "0.7", "60000")
    assert await at_venue.desk.money(agent_id) == {"allocated": 5_000}
    await at_venue.calls.decide(agent_id)
    assert (await at_venue.calls.only(agent_id)).cause == "isolated"


async def test_a_fill_adds_in_the_mode_of_the_position(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    first = await at_venue.order(agent_id, "buy", "0.1", mode="pooled")
    await at_venue.cancel(agent_id, first)
    second = await at_venue.order(agent_id, "buy", "0.1", mode="isolated")
    await at_venue.fill(agent_id, second, "a", "0.1", "60000")
    await at_venue.fill(agent_id, first, "a", "0.1", "60000")
    [position] = (await at_venue.desk.book(agent_id)).positions
    assert (position.size, position.margin_mode, position.allocated) == (Decimal("0.2"), "isolated", Decimal(4_000))


async def test_a_reduce_only_fill_never_flips_though_the_position_changed(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    await at_venue.traded(agent_id, "buy", "0.5")
    sell = await at_venue.order(agent_id, "sell", "0.3")
    reduce = await at_venue.order(agent_id, "sell", "0.2", reduce_only=True)
    await at_venue.fill(agent_id, sell, "a", "0.3", "60000")
    more = await at_venue.order(agent_id, "sell", "0.1")
    await at_venue.fill(agent_id, more, "a", "0.1", "60000")
    assert (await refused(at_venue.fill(agent_id, reduce, "a", "0.2", "60000"))).code == "would_flip"
    await at_venue.fill(agent_id, reduce, "a", "0.1", "60000")
    assert (await refused(at_venue.fill(agent_id, reduce, "b", "0.1", "60000"))).code == "nothing_to_reduce"
    assert await at_venue.calls.sizes(agent_id) == {}


# --- races, over real connections


async def test_one_fill_reported_many_times_at_once(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.5")
    done = await asyncio.gather(*(at_venue.fill(agent_id, order_id, "a", "0.2", "60000", "1") for _ in range(12)))
    assert len({d.fill for d in done}) == 1
    assert sum(1 for d in done if d.trade is not None) == 1
    assert await at_venue.calls.sizes(agent_id) == {"BTC-PERP": Decimal("0.2")}
    assert await at_venue.desk.money(agent_id) == {"free": 19_999}


async def test_fills_at_once_come_to_the_order_and_no_more(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    order_id = await at_venue.order(agent_id, "buy", "0.5")
    reports = (at_venue.fill(agent_id, order_id, f"f{n}", "0.1", "60000") for n in range(9))
    done = await asyncio.gather(*reports, return_exceptions=True)
    assert [type(d) for d in done if isinstance(d, Exception)] == [ConflictError] * 4
    assert await at_venue.calls.sizes(agent_id) == {"BTC-PERP": Decimal("0.5")}
    assert (await at_venue.get(agent_id, order_id)).status == "filled"


async def test_cancel_against_fill(at_venue: Venue) -> None:
    for n in range(6):
        agent_id = await at_venue.agent()
        order_id = await at_venue.order(agent_id, "buy", "0.5")
        both = [at_venue.fill(agent_id, order_id, "a", "0.2", "60000"), at_venue.cancel(agent_id, order_id)]
        await asyncio.gather(*(both if n % 2 else both[::-1]))
        order = await at_venue.get(agent_id, order_id)
        assert (order.status, order.filled_size) == ("cancelled", Decimal("0.2"))
        assert await at_venue.calls.sizes(agent_id) == {"BTC-PERP": Decimal("0.2")}
        assert list((await at_venue.desk.book(agent_id)).pending) == []


async def test_orders_at_once_pass_the_gate_together(at_venue: Venue) -> None:
    agent_id = await at_venue.agent()
    sent = await asyncio.gather(*(at_venue.order(agent_id, "buy", "0.2") for _ in range(10)), return_exceptions=True)
    assert sum(1 for s in sent if isinstance(s, str)) == 4


async def test_a_fill_against_the_decision_at_the_time_out(at_venue: Venue) -> None:
    for n in range(4):
        await at_venue.desk.prices({"BTC": PRICES["BTC"]})
        agent_id, asked = await at_venue.breached()
        await at_venue.calls.pass_time(agent_id, 31)
        steps = [
            at_venue.fill(agent_id, asked.id, "a", "10", "100"),
            at_venue.calls.decide(agent_id),
            at_venue.calls.decide(agent_id),
        ]
        await asyncio.gather(*(steps if n % 2 else steps[::-1]))
        await at_venue.calls.decide(agent_id)
        assert "SOL-PERP" not in await at_venue.calls.sizes(agent_id)
        [live] = await at_venue.live(agent_id)
        assert live.symbol == "ETH-PERP"
        told = [[o["order_id"] for o in data["orders"]] for data in await at_venue.requests(agent_id)]
        assert told in ([[asked.id], [live.id]], [[asked.id], [asked.id], [live.id]])


# --- liquidation


async def test_liquidation_asks_waits_and_goes_on_at_each_fill(at_venue: Venue) -> None:
    agent_id = await at_venue.trader()
    own = await at_venue.order(agent_id, "buy", "0.01")
    closing = await at_venue.order(agent_id, "sell", "0.01", reduce_only=True)
    await at_venue.desk.prices({"BTC": BREACH})
    await at_venue.calls.decide(agent_id)
    await at_venue.calls.pass_time(agent_id, 300)
    decided = await at_venue.calls.decide(agent_id)
    assert decided.told == ("margin_call.expired", "liquidation.requested")
    assert (await at_venue.last(agent_id, "margin_call.expired"))["cancelled_orders"] == [own]
    [request] = await at_venue.requests(agent_id)
    assert (request["attempt"], request["escalated"], request["cancelled_orders"]) == (1, False, [closing])
    [asked] = await at_venue.live(agent_id)
    assert (asked.symbol, asked.side, asked.size, asked.reduce_only) == ("SOL-PERP", "sell", Decimal(10), True)
    [shown] = request["orders"]
    assert (shown["order_id"], shown["size"], shown["reduce_only"]) == (asked.id, 10, True)
    assert (await at_venue.calls.decide(agent_id)).told == ()  # it waits
    assert len(await at_venue.calls.sizes(agent_id)) == 3
    await at_venue.fill(agent_id, asked.id, "a", "10", "99.5", "0.5")
    call = await at_venue.calls.only(agent_id)
    assert call.slices == 1
    async with at_venue.desk.database.transaction(ACTOR) as tx:
        assert agent_id in await calls.due(tx, 10)  # at once
    executed = await at_venue.last(agent_id, "liquidation.executed")
    assert (executed["order_id"], executed["fill_price"], executed["realized_pnl"]) == (asked.id, 99.5, -5)
    assert (await at_venue.calls.decide(agent_id)).told == ("liquidation.requested",)
    [second] = await at_venue.live(agent_id)
    assert second.symbol == "ETH-PERP"
    assert second.size < 2
    await at_venue.fill(agent_id, second.id, "a", second.size, "3000")
    assert (await at_venue.calls.decide(agent_id)).told == ("liquidation.completed",)
    assert STOP - 1e-3 < await at_venue.calls.utilization(agent_id) <= STOP
    call = await at_venue.calls.only(agent_id)
    assert (call.state, call.slices, call.deficit) == ("completed", 2, Decimal(0))
    assert await at_venue.live(agent_id) == []


async def test_slices_that_are_filled_at_leisure_escalate_too(at_venue: Venue) -> None:
    """Each is filled in time, so that none is asked for again: dust could put off the rest for hours."""
    agent_id = await at_venue.trader(grace_period_seconds=0)
    for n in range(4):
        await at_venue.desk.prices({f"DUST{n}": "1"})
        order_id = await at_venue.order(agent_id, "buy", "1", f"DUST{n}-PERP")
        await at_venue.fill(agent_id, order_id, "whole", "1", "1")
    await at_venue.desk.prices({"BTC": BREACH})
    await at_venue.calls.decide(agent_id)
    for n in range(4):
        await at_venue.calls.pass_time(agent_id, 29)
        [asked] = await at_venue.live(agent_id)
        await at_venue.fill(agent_id, asked.id, f"slow{n}", "1", "1")
        assert (await at_venue.calls.decide(agent_id)).told == ("liquidation.requested",)
    requests = await at_venue.requests(agent_id)
    assert [(r["attempt"], r["escalated"]) for r in requests] == [(1, False)] * 4 + [(1, True)]  # 3 times 30 s are over


async def test_what_is_not_filled_in_time_is_asked_for_again_and_escalates(at_venue: Venue) -> None:
    agent_id, asked = await at_venue.breached()
    await at_venue.fill(agent_id, asked.id, "a", "4", "100")
    rules = Rules("smallest_first", Decimal(0), venue_attempts=2)
    escalated = []
    for _ in range(3):
        await at_venue.calls.pass_time(agent_id, 29)
        assert (await at_venue.calls.decide(agent_id, rules=rules)).told == ()
        await at_venue.calls.pass_time(agent_id, 2)
        decided = await at_venue.calls.decide(agent_id, rules=rules)
        assert decided.told == ("liquidation.requested",)
        escalated.append(decided.escalated)
        [live] = await at_venue.live(agent_id)
        assert (live.id, live.remaining) == (asked.id, Decimal(6))
    assert escalated == [False, True, True]
    requests = await at_venue.requests(agent_id)
    assert [(r["attempt"], r["escalated"], r["orders"][0]["size"]) for r in requests] == [
        (1, False, 10),
        (2, False, 6),
        (3, True, 6),
        (4, True, 6),
    ]
    assert {r["orders"][0]["order_id"] for r in requests} == {asked.id}
    error = await refused(at_venue.order(agent_id, "buy", "0.001", "SOL-PERP"))
    assert error.code == "reduce_only"
    assert (await refused(at_venue.cancel(agent_id, asked.id))).code == "liquidation_order"
    error = await refused(at_venue.order(agent_id, "sell", "1", "SOL-PERP", reduce_only=True))
    assert error.code == "nothing_to_reduce"  # it is all asked for
    await at_venue.order(agent_id, "sell", "1", "ETH-PERP", reduce_only=True)


@pytest.mark.parametrize("how", ["deposit", "price"])
async def test_a_cure_while_it_waits_takes_the_orders_back(at_venue: Venue, how: str) -> None:
    agent_id, asked = await at_venue.breached()
    if how == "price":
        await at_venue.desk.prices({"BTC": CURED})
    else:
        await at_venue.desk.deposit(agent_id, "USDC", 1_100)  # utilization .79: cured, and above the stop level
        assert STOP < await at_venue.calls.utilization(agent_id) < 0.80
    assert (await at_venue.calls.decide(agent_id)).told == ("margin_call.cured",)
    assert (await at_venue.last(agent_id, "margin_call.cured"))["cancelled_orders"] == [asked.id]
    assert (await at_venue.live(agent_id), (await at_venue.get(agent_id, asked.id)).status) == ([], "cancelled")
    # what the venue had done by then is a fact
    await at_venue.fill(agent_id, asked.id, "late", "10", "100")
    assert "SOL-PERP" not in await at_venue.calls.sizes(agent_id)
    call = await at_venue.calls.only(agent_id)
    assert (call.state, call.slices, call.deficit) == ("cured", 1, Decimal(0))


async def test_once_something_is_sold_it_goes_on_to_the_stop_level(at_venue: Venue) -> None:
    agent_id, asked = await at_venue.breached()
    await at_venue.fill(agent_id, asked.id, "a", "1", "100")
    await at_venue.desk.deposit(agent_id, "USDC", 1_100)
    assert (await at_venue.calls.decide(agent_id)).told == ()
    await at_venue.desk.deposit(agent_id, "USDC", 1_000)
    assert (await at_venue.calls.decide(agent_id)).told == ("liquidation.completed",)
    assert (await at_venue.last(agent_id, "liquidation.completed"))["cancelled_orders"] == [asked.id]
    assert await at_venue.live(agent_id) == []


async def test_many_decisions_at_once_ask_once(at_venue: Venue) -> None:
    agent_id = await at_venue.trader(grace_period_seconds=0)
    await at_venue.desk.prices({"BTC": BREACH})
    await asyncio.gather(*(at_venue.calls.decide(agent_id) for _ in range(8)))
    assert len(await at_venue.live(agent_id)) == len(await at_venue.requests(agent_id)) == 1


async def test_an_order_for_more_than_there_is_gives_way_to_another(at_venue: Venue) -> None:
    """The agent's own order was filled before it was cancelled, and is reported late."""
    agent_id = await at_venue.trader(grace_period_seconds=0)
    own = await at_venue.order(agent_id, "sell", "8", "SOL-PERP", reduce_only=True)
    await at_venue.desk.prices({"BTC": BREACH})
    await at_venue.calls.decide(agent_id)
    [asked] = await at_venue.live(agent_id)
    await at_venue.fill(agent_id, own, "late", "8", "100")
    await at_venue.calls.decide(agent_id)
    [now] = await at_venue.live(agent_id)
    assert (now.symbol, now.size, now.id != asked.id) == ("SOL-PERP", Decimal(2), True)
    assert (await at_venue.get(agent_id, asked.id)).status == "cancelled"


async def test_stale_prices_ask_for_nothing(at_venue: Venue) -> None:
    agent_id, asked = await at_venue.breached()
    await at_venue.calls.pass_time(agent_id, 40)
    decided = await at_venue.calls.decide(agent_id, age=timedelta(0))
    assert decided.told == ()
    assert [r["attempt"] for r in await at_venue.requests(agent_id)] == [1]
    await at_venue.fill(agent_id, asked.id, "a", "10", "100")
    assert "SOL-PERP" not in await at_venue.calls.sizes(agent_id)


async def test_a_reservation_is_released_here(at_venue: Venue) -> None:
    agent_id = await at_venue.trader(grace_period_seconds=0)
    held = await at_venue.desk.reserve(agent_id, 100)
    await at_venue.desk.prices({"BTC": BREACH})
    told = (await at_venue.calls.decide(agent_id)).told
    assert told[-2:] == ("liquidation.executed", "liquidation.requested")
    executed = await at_venue.last(agent_id, "liquidation.executed")
    assert executed["reservation_id"] == held.id


# --- what is not covered


async def _sold_out(at_venue: Venue, agent_id: str, prices: dict[str, str]) -> None:
    """Have the venue fill whatever is asked for, until nothing is."""
    for n in range(6):
        await at_venue.calls.decide(agent_id)
        for order in await at_venue.live(agent_id):
            price = prices[order.symbol]
            await at_venue.fill(agent_id, order.id, f"f{n}", order.remaining, price, confirm=True)


async def test_what_fills_do_not_cover_is_a_deficit(at_venue: Venue) -> None:
    agent_id = await at_venue.trader(grace_period_seconds=0)
    await at_venue.desk.prices({"BTC": DEEP})
    await _sold_out(at_venue, agent_id, {"BTC-PERP": "9000", "ETH-PERP": "2900", "SOL-PERP": "90"})
    # 20,000 - .5 x 51,000 - 2 x 100 - 10 x 10
    call = await at_venue.calls.only(agent_id)
    assert (call.state, call.lost, call.slices) == ("completed", Decimal(5_800), 3)
    assert await at_venue.desk.money(agent_id) == {"owed": 5_800}
    assert (await at_venue.last(agent_id, "liquidation.completed"))["deficit"] == 5_800


async def test_what_a_late_fill_does_not_cover_is_added_to_the_deficit(at_venue: Venue) -> None:
    agent_id = await at_venue.agent("8000", grace_period_seconds=0)
    await at_venue.traded(agent_id, "buy", "0.3")
    await at_venue.desk.prices({"BTC": "40000"})
    await at_venue.calls.decide(agent_id)
    [asked] = await at_venue.live(agent_id)
    await at_venue.desk.prices({"BTC": "60000"})
    assert (await at_venue.calls.decide(agent_id)).told == ("margin_call.cured",)
    rest = await at_venue.order(agent_id, "sell", str(Decimal("0.3") - asked.size))
    await at_venue.fill(agent_id, rest, "a", Decimal("0.3") - asked.size, "60000")
    await at_venue.fill(agent_id, asked.id, "late", asked.size, "15000", confirm=True)
    owed = asked.size * 45_000 - 8_000
    assert owed > 0
    assert await at_venue.desk.money(agent_id) == {"owed": owed}
    assert (await at_venue.calls.only(agent_id)).lost == owed


@pytest.mark.parametrize("execution", ["venue", "book"])
async def test_a_loss_beyond_an_isolated_allocation_is_a_deficit_of_the_call(at_venue: Venue, execution: str) -> None:
    agent_id = await at_venue.desk.agent("20000", execution=execution, grace_period_seconds=0)
    opened = await at_venue.desk.order(agent_id, "buy", "2", "ETH-PERP", leverage=3, mode="isolated")
    if execution == "venue":
        await at_venue.fill(agent_id, opened.order.id, "a", "2", "3000")
    await at_venue.desk.prices({"ETH": "1900"})
    await _sold_out(at_venue, agent_id, {"ETH-PERP": "1900"})
    # 2,000 allocated, 2,200 lost
    call = await at_venue.calls.only(agent_id)
    assert (call.state, call.deficit) == ("completed", Decimal(200))
    assert await at_venue.desk.money(agent_id) == {"free": 18_000}
    [[lost]] = await at_venue.desk.rows("SELECT sum(amount) FROM ledger_entries WHERE kind = 'deficit'")
    assert lost == 200
