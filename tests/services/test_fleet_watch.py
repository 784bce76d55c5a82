"""What workers tell and do of fleets by themselves: once, however many look, and one fleet's fault is no other's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from sqlalchemy import URL, text

from app.db.session import Database
from app.domain.closes import Close
from app.errors import ConflictError
from app.services import fleet_books, fleets, margin_calls, market
from app.services.closes import post_closes
from app.services.fleet_books import FleetBooks
from app.services.fleet_watch import FleetWatch
from app.services.fleets import Fleet
from app.services.liquidation import Rules
from app.services.margin import Scene, Scenes
from app.services.shards import SHARDS
from app.telemetry import Metrics
from tests.database import make_settings
from tests.services.desk import ACTOR, ITEMS_MAX, Desk
from tests.services.squadron import Squadron

EVERYTHING = range(SHARDS)
RULES = Rules("smallest_first", Decimal(0))
OLD = """
    WITH next AS (UPDATE market_state SET version = version + 1 WHERE name = 'prices' RETURNING version)
    UPDATE market_prices SET as_of = as_of - interval '2 hours', version = next.version FROM next WHERE symbol = :symbol
"""


@dataclass
class Watched:
    """A squadron under two workers' eyes."""

    squadron: Squadron
    metrics: Metrics
    watches: list[FleetWatch]

    async def look(self) -> None:
        """Have both workers look at once at all fleets, as while one takes over from the other."""
        await asyncio.gather(*(watch.look(EVERYTHING) for watch in self.watches))

    async def told(self, fleet: Fleet, kind: str = "fleet.%") -> list[dict[str, Any]]:
        query = "SELECT type, data FROM events WHERE agent_id = :agent AND type LIKE :kind ORDER BY sequence"
        rows = await self.squadron.desk.rows(query, agent=fleet.master_id, kind=kind)
        assert {row[1]["fleet_id"] for row in rows} <= {fleet.id}
        return [{"type": row[0], **row[1]} for row in rows]

    async def execute(self, statement: str, **values: Any) -> None:
        async with self.squadron.desk.database.transaction(ACTOR) as tx:
            await tx.connection.execute(text(statement), values)

    async def decide(self, agent_id: str) -> None:
        async with self.squadron.desk.database.transaction(ACTOR) as tx:
            await margin_calls.decide(tx, self.squadron.scenes, agent_id, RULES)


@pytest.fixture
async def watched(database_url: URL) -> AsyncIterator[Watched]:
    database = Database(database_url, make_settings(database_pool_size=20, database_connect_seconds=20))
    desk = Desk(database)
    await desk.prices({"BTC": "60000", "ETH": "3000"})
    await desk.market.refresh()
    squadron, metrics = Squadron(desk), Metrics()
    scenes = Scenes(desk.market, timedelta(hours=1), ITEMS_MAX)
    yield Watched(squadron, metrics, [FleetWatch(f"worker-{k}", database, scenes, metrics) for k in range(2)])
    assert await desk.imbalances() == {}
    await database.close()


def closes(assets: tuple[str, ...], correlation: float, days: int = 120) -> list[Close]:
    """Return closes of assets whose daily returns have just this correlation with one another in the sample."""
    rng = np.random.default_rng(7)
    drawn = rng.normal(size=(days, len(assets) + 1))
    drawn -= drawn.mean(axis=0)
    basis = np.linalg.qr(drawn)[0]  # orthogonal, of mean zero
    common, own = basis[:, :1], basis[:, 1:]
    returns = 0.3 * (np.sqrt(correlation) * common + np.sqrt(1.0 - correlation) * own)
    prices = 100.0 * np.cumprod(1.0 + returns, axis=0)
    first = np.datetime64("2026-01-01")
    return [
        Close(asset, (first + day).astype(object), Decimal(f"{prices[day, j]:.10f}"))
        for day in range(days)
        for j, asset in enumerate(assets)
    ]


async def post(watched: Watched, correlation: float) -> None:
    async with watched.squadron.desk.database.transaction(ACTOR) as tx:
        await post_closes(tx, closes(("BTC", "ETH"), correlation), confirm=True)
    for watch in watched.watches:
        watch.drift.every_seconds = 0.0


async def seen(squadron: Squadron, fleet: Fleet) -> tuple[Scene, FleetBooks]:
    async with squadron.desk.database.transaction(ACTOR) as tx:
        return await squadron.scenes.at(tx), await fleet_books.load(tx, fleet)


async def test_drift_is_told_once_when_it_begins_and_once_when_it_is_over(watched: Watched) -> None:
    """BTC and ETH go together at .80 in calm markets: the limit of .20 is passed below .60, and cleared above .62."""
    squadron = watched.squadron
    fleet = await squadron.fleet(100_000)
    member = await squadron.member(fleet, 50_000)
    await post(watched, 0.1)
    await watched.look()
    assert await watched.told(fleet, "fleet.drift") == [], "there is nothing whose correlations could drift"
    await squadron.order(member, "buy", "0.3")
    await squadron.order(member, "buy", "4", "ETH-PERP")
    for _ in range(2):
        await watched.look()
    [begun] = await watched.told(fleet, "fleet.drift")
    assert (begun["drifting"], begun["limit"], begun["fleet_id"]) == (True, 0.2, fleet.id)
    # the last 90 of 119 returns: whatever their own correlation, that of numpy
    returns = np.array([float(c.close) for c in closes(("BTC", "ETH"), 0.1)]).reshape(-1, 2)
    seen = np.corrcoef((returns[1:] / returns[:-1] - 1.0)[-90:].T)[0, 1]
    assert begun["mean_distance"] == pytest.approx(0.8 - seen)
    assert begun["assets"] == ["BTC", "ETH"]
    assert begun["var_recent"] < begun["var_calm"] < begun["var_stress"]
    assert (await squadron.get(fleet)).drifted_at is not None
    await post(watched, 0.8)
    for _ in range(2):
        await watched.look()
    assert [e["drifting"] for e in await watched.told(fleet, "fleet.drift")] == [True, False]
    assert (await squadron.get(fleet)).drifted_at is None


async def test_drift_is_held_to_the_parameter_and_looked_at_once_a_minute(watched: Watched) -> None:
    squadron = watched.squadron
    fleet = await squadron.fleet(100_000, over_delegation=True)
    await squadron.order(await squadron.member(fleet, 50_000), "buy", "0.3")
    await squadron.order(await squadron.member(fleet, 50_000), "buy", "4", "ETH-PERP")
    await post(watched, 0.1)
    async with squadron.desk.database.transaction(ACTOR) as tx:
        await market.put_model_parameters(tx, {"fleet_drift": 0.9})
    for watch in watched.watches:
        watch.drift.every_seconds = 60.0
    await watched.look()
    assert await watched.told(fleet, "fleet.drift") == []
    async with squadron.desk.database.transaction(ACTOR) as tx:
        await market.put_model_parameters(tx, {"fleet_drift": 0.3})
    await watched.look()
    assert await watched.told(fleet, "fleet.drift") == [], "both have looked within the minute"
    for watch in watched.watches:
        watch.drift.every_seconds = 0.0
    await watched.look()
    assert [e["limit"] for e in await watched.told(fleet, "fleet.drift")] == [0.3]


async def test_drift_that_cannot_be_computed_is_told_of_once_and_tried_less_and_less_often(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    """The closes are away for the looks at 0 s and at 60 s, and back from then on: the next one is at 180 s."""
    squadron, [watch, _] = watched.squadron, watched.watches
    fleet, clock = await squadron.fleet(100_000), [0.0]
    member = await squadron.member(fleet, 50_000)
    await squadron.order(member, "buy", "0.3")
    await squadron.order(member, "buy", "4", "ETH-PERP")
    await post(watched, 0.1)
    watch.drift.clock, watch.drift.every_seconds = (lambda: clock[0]), 60.0
    caplog.set_level("INFO", "app.services")

    async def drifted_at(seconds: float) -> int:
        clock[0] = seconds
        await watch.look(EVERYTHING)
        return len(await watched.told(fleet, "fleet.drift"))

    def said() -> list[str]:
        return [record.message for record in caplog.records if "drift" in record.message]

    await watched.execute("ALTER TABLE daily_closes RENAME TO away")
    assert [await drifted_at(seconds) for seconds in (0, 1, 59, 60)] == [0] * 4
    await watched.execute("ALTER TABLE away RENAME TO daily_closes")
    assert len(said()) == 1
    assert f"the drift of {fleet.id} can't be computed" in said()[0]
    assert watched.metrics.registry.get_sample_value("primerisk_fleet_drift_failures_total") == 1
    assert watched.metrics.registry.get_sample_value("primerisk_decision_failures_total") == 0
    assert [await drifted_at(seconds) for seconds in (120, 179, 180)] == [0, 0, 1]
    assert said()[1:] == [f"the drift of {fleet.id} can be computed again"]


async def test_a_zone_is_told_once_and_an_emergency_ends_with_it(watched: Watched) -> None:
    """At 49,500 the fleet is in ORANGE: 14,850 of margin on 19,500. No worker has looked when it is calm again."""
    squadron = watched.squadron
    fleet = await squadron.fleet(30_000, "0.2", over_delegation=True)
    await squadron.order(await squadron.member(fleet, 30_000), "buy", 1)
    await watched.look()
    assert [e["zone"] for e in await watched.told(fleet)] == ["YELLOW"]
    async with squadron.desk.database.transaction(ACTOR) as tx:
        await fleets.release_dry_powder(tx, await squadron.get(fleet), "the fleet is in ORANGE", in_emergency=True)
    await watched.look()
    names = [e["type"] for e in await watched.told(fleet)]
    assert names == ["fleet.zone_changed", "fleet.dry_powder_released", "fleet.dry_powder_restored"]
    # with a reason it is out until the coordinator has it back, or the fleet has been in an emergency
    async with squadron.desk.database.transaction(ACTOR) as tx:
        await fleets.release_dry_powder(tx, await squadron.get(fleet), "a hedge before the weekend")
    await watched.look()
    assert (await squadron.get(fleet)).released_at is not None
    await squadron.desk.prices({"BTC": "49500"})
    await watched.look()
    await squadron.desk.prices({"BTC": "60000"})
    await watched.look()
    names = [e["type"] for e in await watched.told(fleet)][3:]
    assert sorted(names) == ["fleet.dry_powder_released", "fleet.dry_powder_restored", *["fleet.zone_changed"] * 2]
    assert (await squadron.get(fleet)).released_at is None
    samples = [s for family in watched.metrics.fleet_zone_changes.collect() for s in family.samples]
    counted = {sample.labels["zone"]: sample.value for sample in samples}
    assert {zone: counted[zone] for zone in ("YELLOW", "ORANGE")} == {"YELLOW": 2, "ORANGE": 1}


async def test_a_live_call_is_an_emergency_in_every_zone(watched: Watched) -> None:
    """Long and short of one coin net as one, GREEN, and are margined by themselves: 43,200 of 45,000."""
    squadron = watched.squadron
    fleet = await squadron.fleet(45_000, "0", over_delegation=True)
    for side in ("buy", "sell"):
        await squadron.order(await squadron.member(fleet, 30_000), side, 1)
    await squadron.desk.prices({"BTC": "72000"})
    await watched.decide(fleet.master_id)
    async with squadron.desk.database.transaction(ACTOR) as tx:
        await fleets.release_dry_powder(tx, await squadron.get(fleet), "the fleet is called", in_emergency=True)
    await watched.look()
    after = await squadron.get(fleet)
    assert (after.zone, after.in_emergency) == ("GREEN", True)
    await squadron.desk.prices({"BTC": "60000"})
    await watched.decide(fleet.master_id)
    await watched.look()
    assert (await squadron.get(fleet)).released_at is None


async def test_it_is_released_once_however_many_ask(watched: Watched) -> None:
    squadron = watched.squadron
    fleet = await squadron.fleet(1_000)

    async def release() -> str:
        try:
            await squadron.powder(fleet, release=True)
        except ConflictError as refused:
            return str(refused.code)
        return "released"

    said = await asyncio.gather(*(release() for _ in range(8)))
    assert sorted(said) == ["already_released"] * 7 + ["released"]
    await asyncio.gather(*(squadron.powder(fleet, release=False) for _ in range(4)))
    assert [e["type"] for e in await watched.told(fleet)] == ["fleet.dry_powder_released", "fleet.dry_powder_restored"]


async def test_a_stale_price_of_one_member_lets_nobody_else_down(watched: Watched) -> None:
    """Two members of one fleet are called; then the price of ETH, which the first one holds, is old."""
    squadron = watched.squadron
    fleet = await squadron.fleet(100_000)
    stale, other = await squadron.member(fleet, 30_000), await squadron.member(fleet, 30_000)
    await squadron.order(stale, "buy", "0.1")
    await squadron.order(stale, "buy", "8", "ETH-PERP")
    await squadron.order(other, "buy", "0.5")
    await squadron.desk.prices({"BTC": "54000", "ETH": "2600"})
    for member in (stale, other):
        await watched.decide(member)
    before = await squadron.drawn(fleet)
    await watched.execute(OLD, symbol="ETH")
    await watched.look()
    after = await squadron.drawn(fleet)
    assert after[stale] == before[stale]
    assert after[other] > before[other]
    assert (await squadron.get(fleet)).zone == "GREEN", "that waits for all prices"


async def test_what_a_fleet_cannot_spare_is_not_asked_for_by_each_of_a_crowd(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    """Three lack 750 each and the fleet has 101 left: that is found out once. Who lacks no more is stood by."""
    squadron = watched.squadron
    fleet = await squadron.fleet(14_200, "0", over_delegation=True)
    crowd = [await squadron.member(fleet, 9_000, liquidation_priority=2) for _ in range(3)]
    small = await squadron.member(fleet, 9_000, liquidation_priority=1)
    for member in crowd:
        await squadron.order(member, "buy", "0.2")  # 12,000, of which .375 are drawn
    await squadron.order(small, "buy", "0.0266")
    await squadron.desk.prices({"BTC": "54000"})
    for member in (*crowd, small):
        await watched.decide(member)
    before = await squadron.drawn(fleet)
    caplog.set_level("INFO", "app.services.fleet_watch")
    await watched.watches[0].look(EVERYTHING)
    refused = [record.message for record in caplog.records if record.message.startswith("nothing is drawn")]
    assert len(refused) == 1
    assert refused[0].endswith("fleet_exhausted")
    after = await squadron.drawn(fleet)
    assert {agent for agent in after if after[agent] > before[agent]} == {small}


async def test_a_crowd_is_stood_by_in_as_many_looks_as_it_takes(watched: Watched) -> None:
    """Two are at their caps and are refused at each look; the two after them get what they lack all the same."""
    squadron = watched.squadron
    fleet = await squadron.fleet(100_000, "0")
    capped = [await squadron.member(fleet, 4_500, liquidation_priority=2) for _ in range(2)]
    others = [await squadron.member(fleet, 9_000, liquidation_priority=1) for _ in range(2)]
    for member in (*capped, *others):
        await squadron.order(member, "buy", "0.2")
    await squadron.desk.prices({"BTC": "54000"})
    for member in (*capped, *others):
        await watched.decide(member)
    before, watch = await squadron.drawn(fleet), watched.watches[0]
    watch.stand_by_seconds_max = 0.0  # one a look
    served = []
    for _ in range(4):
        await watch.look(EVERYTHING)
        after = await squadron.drawn(fleet)
        served.append({agent for agent in after if after[agent] > before[agent]})
    assert [len(one) for one in served] == [0, 0, 1, 2]
    assert served[-1] == set(others)


async def test_one_fleet_at_fault_is_no_others(watched: Watched) -> None:
    """The zone of the first fleet can't be written: the second one's is told all the same."""
    squadron = watched.squadron
    found = [await squadron.fleet(30_000, over_delegation=True) for _ in range(2)]
    for fleet in found:
        await squadron.order(await squadron.member(fleet, 30_000), "buy", 1)
    first, second = sorted(found, key=lambda fleet: fleet.id)
    await watched.execute(f"ALTER TABLE fleets ADD CONSTRAINT odd CHECK (id <> '{first.id}' OR zone = 'GREEN')")
    await watched.watches[0].look(EVERYTHING)
    assert (await squadron.get(first)).zone == "GREEN"
    assert (await squadron.get(second)).zone == "YELLOW"
    assert watched.metrics.registry.get_sample_value("primerisk_decision_failures_total") == 1


async def test_what_a_member_did_not_ask_for_gives_back_too(watched: Watched) -> None:
    """Half of what it holds is closed by another way than its request: at the target of .60 it needs 15,000."""
    squadron = watched.squadron
    fleet = await squadron.fleet(100_000)
    member = await squadron.member(fleet, 30_000)
    await squadron.order(member, "buy", 1)
    await watched.look()
    assert await squadron.drawn(fleet) == {member: 22_500}
    await squadron.desk.order(member, "sell", "0.5", reduce_only=True)
    assert await squadron.drawn(fleet) == {member: 22_500}
    # not while another one of the pool is called
    other = await squadron.member(fleet, 30_000)
    await squadron.desk.deposit(other, "USDC", 4_500)
    await squadron.desk.order(other, "buy", 4, "ETH-PERP")
    await squadron.desk.prices({"ETH": "2700"})
    for _ in ("in breach", "called"):
        for watch in watched.watches:
            await watch.returns.look(fleet, *await seen(squadron, fleet))
        assert (await squadron.drawn(fleet))[member] == 22_500
        await watched.decide(other)
    await squadron.desk.prices({"ETH": "3000"})
    await watched.decide(other)
    await squadron.desk.order(other, "sell", 4, "ETH-PERP", reduce_only=True)
    await squadron.desk.withdraw(other, "USDC", 4_500)
    async with squadron.desk.database.transaction(ACTOR) as tx:
        await fleets.remove(tx, await fleets.get_member(tx, fleet.id, other))
    await watched.look()
    assert await squadron.drawn(fleet) == {member: 15_000}
    # a price alone moves nothing, once both know the book
    await watched.look()
    await squadron.desk.prices({"BTC": "80000"})
    await watched.look()
    assert await squadron.drawn(fleet) == {member: 15_000}


async def test_what_a_stale_price_hides_is_given_back_once_it_is_fresh(watched: Watched) -> None:
    squadron = watched.squadron
    fleet = await squadron.fleet(100_000)
    member = await squadron.member(fleet, 30_000)
    await squadron.order(member, "buy", 1)
    await squadron.desk.order(member, "sell", "0.5", reduce_only=True)
    await watched.execute(OLD, symbol="BTC")
    await watched.look()
    assert await squadron.drawn(fleet) == {member: 22_500}
    await squadron.desk.prices({"BTC": "60000"})
    await watched.look()
    assert await squadron.drawn(fleet) == {member: 15_000}


async def test_a_call_that_is_made_meanwhile_keeps_all_where_it_is(watched: Watched) -> None:
    """A worker has read the fleet while it was sound; before it has the locks the fleet is called."""
    squadron = watched.squadron
    fleet = await squadron.fleet(30_000, "0", over_delegation=True)
    idle, busy = await squadron.member(fleet, 3_000), await squadron.member(fleet, 30_000)
    await squadron.order(idle, "buy", "0.1")
    await squadron.desk.order(idle, "sell", "0.1", reduce_only=True)
    await squadron.order(busy, "buy", "24", "ETH-PERP")
    before, known = await squadron.drawn(fleet), await seen(squadron, fleet)
    await squadron.desk.prices({"ETH": "2400"})
    await watched.decide(fleet.master_id)
    assert (await squadron.desk.book(fleet.master_id)).live_cause == "fleet"
    await watched.watches[0].returns.look(fleet, *known)
    assert await squadron.drawn(fleet) == before
