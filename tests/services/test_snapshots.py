"""Daily snapshots: what the book reads, once a day, by any number of workers; what was paid in is no profit."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from app.domain.quote import account_figures
from app.services import book, snapshots
from app.services.market_cache import MarketCache
from app.services.shards import ALL
from app.services.snapshots import Snapshots
from tests.api.service import Agent, Service, running
from tests.api.test_quotes_var import drawn, post_closes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL

    from app.db.session import Database
    from app.domain.snapshots import Snapshot
    from app.services.snapshots import Taken


@pytest.fixture
async def service(database_url: URL) -> AsyncIterator[Service]:
    async with running(database_url) as started:
        yield started


def _database(service: Service) -> Database:
    found: Database = service.app.state.parts.database
    return found


async def _round(service: Service, taker: Snapshots | None = None) -> Taken:
    cache: MarketCache = service.app.state.parts.market
    return await (taker or Snapshots("worker", _database(service))).round(await cache.refresh(), ALL)


async def _of(service: Service, agent: Agent) -> list[Snapshot]:
    """Return an agent's snapshots, oldest first."""
    async with _database(service).transaction("test") as tx:
        return (await snapshots.list_snapshots(tx, agent.id))[::-1]


async def _a_day_passes(service: Service, days: int = 1) -> None:
    """Make every snapshot older, as no clock of the tests can be set."""
    statement = """
        UPDATE account_snapshots
        SET day = day - cast(:n AS int), taken_at = taken_at - make_interval(days => cast(:n AS int))"""
    async with _database(service).transaction("test") as tx:
        for shift in (1_000 + days, -1_000):  # by way of far away: on the way no two stand on one day
            await tx.connection.execute(text(statement), {"n": shift})


async def _trader(service: Service, name: str = "trader") -> Agent:
    agent = await service.agent(name)
    await agent.deposit(USDC=20_000, ETH=3)
    await agent.order("BTC-PERP", "buy", 0.4)
    await agent.order("ETH-PERP", "sell", 1)
    return agent


async def test_a_snapshot_is_what_the_book_comes_to(service: Service) -> None:
    await service.prices(BTC=60_000, ETH=3_000)
    await post_closes(service, drawn(200, "BTC", "ETH"))
    agent = await _trader(service)
    await agent.post("/reservations", {"service": "casino", "amount": 500})
    await service.prices(BTC=61_000, ETH=2_900, BTC_PERP=61_050)
    assert (await _round(service)).count == 1
    (found,) = await _of(service, agent)
    view = service.app.state.parts.market.view
    held = await book.read(_database(service), agent.id)
    figures = account_figures(held.quote_terms(view.parameters, view.prices), view.prices, found.taken_at)
    assert found.equity == pytest.approx(figures.equity, rel=1e-12)
    assert found.value == pytest.approx(20_000 + 3 * 2_900 + 0.4 * (61_050 - 60_000) + 1 * (3_000 - 2_900))
    assert found.gross == pytest.approx(figures.gross_notional)
    assert found.flows is None
    quoted = await agent.post("/quotes/var", {"book": "account", "confidence": [0.95, 0.99]})
    assert [found.var_95, found.var_99] == [pytest.approx(float(r["var"]), rel=1e-9) for r in quoted["results"]]


async def test_once_a_day_whoever_takes_it(service: Service) -> None:
    await service.prices(BTC=60_000, ETH=3_000)
    agents = [await _trader(service, f"trader {k}") for k in range(3)]
    await service.agent("with nothing")
    done = await asyncio.gather(*(_round(service) for _ in range(4)))
    assert sum(taken.count for taken in done) == 3
    first = [await _of(service, agent) for agent in agents]
    await service.prices(BTC=50_000)
    assert (await _round(service)).count == 0
    assert [await _of(service, agent) for agent in agents] == first


async def test_rounds_are_bounded_and_come_to_everybody(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "ACCOUNTS_A_ROUND_MAX", 2)
    for k in range(5):
        await (await service.agent(f"agent {k}")).deposit(USDC=1)
    taker = Snapshots("worker", _database(service))
    rounds = [await _round(service, taker) for _ in range(4)]
    assert [(taken.count, taken.more) for taken in rounds] == [(2, True), (2, True), (1, False), (0, False)]


async def test_what_is_paid_in_and_out_is_no_profit(service: Service) -> None:
    await service.prices(BTC=60_000, ETH=3_000)
    agent = await _trader(service)
    await _round(service)
    await _a_day_passes(service)
    await agent.deposit(USDC=5_000, ETH=1)
    await agent.post("/wallet/withdrawals", {"asset": "USDC", "amount": 700})
    held = await agent.post("/reservations", {"service": "casino", "amount": 300})
    await agent.post(f"/reservations/{held['id']}/settle", {"amount": 100})
    await service.prices(BTC=61_000)
    await agent.order("BTC-PERP", "sell", 0.1)
    await service.prices(BTC=60_500, ETH=2_950)
    await _round(service)
    before, after = await _of(service, agent)
    assert after.flows is not None
    assert after.flows == pytest.approx(5_000 + 2_950 - 700 - 100)
    profit = 0.1 * 1_000 + 0.3 * 500 + 1 * 50 - 3 * 50
    assert after.value - before.value - after.flows == pytest.approx(profit)
    await _a_day_passes(service)
    await _round(service)
    assert (await _of(service, agent))[-1].flows == 0.0


async def test_who_has_no_price_is_passed_over(service: Service) -> None:
    await service.prices(BTC=60_000, ETH=3_000, XYZ=2)
    sound, broken = await _trader(service, "sound"), await service.agent("broken")
    await broken.deposit(XYZ=10)
    async with _database(service).transaction("test") as tx:
        await tx.connection.execute(text("DELETE FROM market_prices WHERE symbol = 'XYZ'"))
    fresh = MarketCache(_database(service))
    taken = await Snapshots("worker", _database(service)).round(await fresh.refresh(), ALL)
    assert taken.count == 1
    assert len(await _of(service, sound)) == 1
    assert await _of(service, broken) == []


async def test_without_volatility_there_is_a_snapshot_and_no_forecast(service: Service) -> None:
    await service.prices(XYZ=2)
    agent = await service.agent()
    await agent.deposit(XYZ=10, USDC=5)
    await _round(service)
    (found,) = await _of(service, agent)
    assert (found.value, found.var_95, found.var_99) == (25.0, None, None)


async def test_the_account_s_backtest(service: Service) -> None:
    await service.prices(BTC=60_000, ETH=3_000)
    agent = await service.agent()
    await agent.deposit(USDC=50_000)
    await agent.order("BTC-PERP", "buy", 0.5)
    nothing = await agent.get("/account/backtest")
    assert (nothing["days"], nothing["coverage"]) == ([], None)
    prices = (60_000, 60_300, 50_000, 50_100)
    for k, price in enumerate(prices):
        if k:
            await _a_day_passes(service, 2 if k == 3 else 1)
        await service.prices(BTC=price)
        await _round(service)
    reply = await agent.get("/account/backtest?confidence=0.99&window=30")
    assert [float(day["pnl"]) for day in reply["days"]] == pytest.approx([150, -5_150])
    assert [day["exception"] for day in reply["days"]] == [False, True]
    # the parameters' volatility of BTC, .65, is all there is
    assert float(reply["days"][0]["var"]) == pytest.approx(30_000 * 0.65 / 365**0.5 * 2.3263479, rel=1e-6)
    assert len(reply["missing"]) == 1
    assert len(reply["uncompared"]) == 1
    assert (reply["coverage"]["observations"], reply["coverage"]["exceptions"]) == (2, 1)
    newest = await agent.get("/account/snapshots?limit=3")
    oldest = await agent.get(f"/account/snapshots?limit=3&cursor={newest['next_cursor']}")
    days = [s["id"] for page in (newest, oldest) for s in page["snapshots"]]
    assert len(newest["snapshots"]) == 3
    assert days == sorted(set(days), reverse=True)
    assert len(days) == 4
    assert oldest["next_cursor"] is None
    other = await service.agent("another")
    assert (await other.get("/account/snapshots"))["snapshots"] == []


async def test_the_day_on_which_an_account_is_emptied_counts(service: Service) -> None:
    await service.prices(BTC=60_000)
    agent = await service.agent()
    await agent.deposit(USDC=10_000)
    await agent.order("BTC-PERP", "buy", 0.3)
    await _round(service)
    await _a_day_passes(service)
    await service.prices(BTC=50_000)
    await agent.order("BTC-PERP", "sell", 0.3)
    await agent.post("/wallet/withdrawals", {"asset": "USDC", "amount": 7_000})
    assert (await _round(service)).count == 1
    (day,) = (await agent.get("/account/backtest"))["days"]
    assert float(day["pnl"]) == pytest.approx(-3_000)
    assert day["exception"] is True
    await _a_day_passes(service)
    assert (await _round(service)).count == 0


async def test_old_snapshots_are_deleted(service: Service) -> None:
    await service.prices(BTC=60_000, ETH=3_000)
    agent = await _trader(service)
    await _round(service)
    await _a_day_passes(service, 5)
    await _round(service)
    async with _database(service).transaction("test") as tx:
        assert not await snapshots.purge(tx, tx.now - timedelta(days=3))
    assert len(await _of(service, agent)) == 1
