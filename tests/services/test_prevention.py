"""The drawdown ladder and the trailing stop on stored accounts: told once a rung, acted on once a fall."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import URL

from app.db.session import Database
from app.errors import ConflictError
from app.services import account, margin_calls
from app.services.liquidation import Rules
from app.services.margin import Scenes
from app.services.margin_calls import Decided
from tests.database import make_settings
from tests.services.desk import ACTOR, ITEMS_MAX, Desk

RULES = Rules("smallest_first", Decimal(0))
START = Decimal(100)
SIZE = Decimal(300)
"""Of X-PERP at 100 on 100,000 USDC: each dollar off the price is .3 % of the peak."""


@pytest.fixture
async def desk(database_url: URL) -> AsyncIterator[Desk]:
    database = Database(database_url, make_settings(database_pool_size=12))
    made = Desk(database)
    await made.prices({"X": START, "Y": START})
    await made.market.refresh()
    yield made
    await database.close()


async def trader(desk: Desk, **settings: Any) -> str:
    """Make an account with 100,000 USDC that is long 300 X-PERP at 100, and has its peak written down."""
    agent_id = await desk.agent("100000", **settings)
    await desk.order(agent_id, "buy", SIZE, "X-PERP")
    await decide(desk, agent_id)
    return agent_id


async def decide(desk: Desk, agent_id: str) -> Decided:
    scenes = Scenes(desk.market, desk.price_age, ITEMS_MAX)
    async with desk.database.transaction(ACTOR) as tx:
        return await margin_calls.decide(tx, scenes, agent_id, RULES)


async def fall(desk: Desk, agent_id: str, drawdown: str) -> Decided:
    """Move the price so that equity is so far below 100,000, whatever is still open, and decide."""
    [position] = (await desk.book(agent_id)).positions
    realized = Decimal(100_000) - (await desk.book(agent_id)).holding("USDC").held
    loss = Decimal(100_000) * Decimal(drawdown) - realized
    await desk.prices({"X": round(START - loss / position.size, 12)})
    return await decide(desk, agent_id)


async def told(desk: Desk, agent_id: str, kind: str = "drawdown.changed") -> list[dict[str, Any]]:
    query = "SELECT data FROM events WHERE agent_id = :agent_id AND type = :kind ORDER BY sequence"
    return [row[0] for row in await desk.rows(query, agent_id=agent_id, kind=kind)]


async def size(desk: Desk, agent_id: str) -> Decimal:
    [position] = (await desk.book(agent_id)).positions
    return position.size


async def test_off_by_default_nothing_is_told(desk: Desk) -> None:
    agent_id = await trader(desk)
    await fall(desk, agent_id, "0.09")
    assert await told(desk, agent_id) == []


async def test_notify_tells_each_rung_once_and_closes_nothing(desk: Desk) -> None:
    agent_id = await trader(desk, drawdown_ladder="notify")
    for drawdown in ("0.06", "0.06", "0.07", "0.09", "0.075", "0.09", "0.13", "0.19"):
        await fall(desk, agent_id, drawdown)
    rungs = [(event["rung_before"], event["rung"]) for event in await told(desk, agent_id)]
    assert rungs == [("none", "trim"), ("trim", "cut"), ("cut", "halve"), ("halve", "minimum_viable")]
    assert await size(desk, agent_id) == SIZE
    first = (await told(desk, agent_id))[0]
    assert (first["action"], first["peak_equity"]) == ("notify", 100_000)
    assert first["drawdown"] == pytest.approx(0.06)
    assert [(o["symbol"], o["side"], o["reduce_only"]) for o in first["orders"]] == [("X-PERP", "sell", True)]
    assert float(first["orders"][0]["size"]) == pytest.approx(30, rel=1e-6)


async def test_apply_cuts_once_a_fall(desk: Desk) -> None:
    agent_id = await trader(desk, drawdown_ladder="apply")
    sizes = []
    for drawdown in ("0.06", "0.07", "0.045", "0.06", "0.09", "0.13"):
        await fall(desk, agent_id, drawdown)
        sizes.append(await size(desk, agent_id))
    # 10 % at .06, and not again when it trembles; then down to .75 and .50 of what there was
    assert [float(s) for s in sizes] == pytest.approx([270, 270, 270, 270, 225, 150], rel=1e-6)
    reasons = await desk.rows("SELECT DISTINCT reason FROM orders WHERE agent_id = :a AND reduce_only", a=agent_id)
    assert reasons == [("drawdown_ladder",)]
    assert await desk.imbalances() == {}


async def test_a_new_fall_is_cut_for_anew(desk: Desk) -> None:
    agent_id = await trader(desk, drawdown_ladder="apply")
    await fall(desk, agent_id, "0.06")
    await fall(desk, agent_id, "0.01")
    await fall(desk, agent_id, "0.06")
    assert float(await size(desk, agent_id)) == pytest.approx(300 * 0.9 * 0.9, rel=1e-6)
    rungs = [event["rung"] for event in await told(desk, agent_id)]
    assert rungs == ["trim", "none", "trim"]


async def test_however_many_see_it_a_rung_is_acted_on_once(desk: Desk) -> None:
    agent_id = await trader(desk, drawdown_ladder="apply")
    await desk.prices({"X": Decimal(80)})
    await asyncio.gather(*(decide(desk, agent_id) for _ in range(10)))
    assert float(await size(desk, agent_id)) == pytest.approx(270, rel=1e-6)
    assert len(await told(desk, agent_id)) == 1


async def test_the_last_rung_opens_nothing_until_it_is_left(desk: Desk) -> None:
    agent_id = await trader(desk, drawdown_ladder="apply")
    await fall(desk, agent_id, "0.185")
    assert float(await size(desk, agent_id)) == pytest.approx(150, rel=1e-6)
    with pytest.raises(ConflictError) as refused:
        await desk.order(agent_id, "buy", 1, "X-PERP")
    assert refused.value.code == "reduce_only"
    await desk.order(agent_id, "sell", 1, "X-PERP", reduce_only=True)
    await fall(desk, agent_id, "0.15")
    await desk.order(agent_id, "buy", 1, "X-PERP")


async def test_what_comes_in_or_leaves_is_no_drawdown(desk: Desk) -> None:
    agent_id = await trader(desk, drawdown_ladder="notify", trailing_stop=0.05)
    await desk.withdraw(agent_id, "USDC", 40_000)
    await decide(desk, agent_id)
    assert await told(desk, agent_id) == []
    assert await told(desk, agent_id, "trailing_stop.breached") == []


async def test_a_withdrawal_under_a_drawdown_leaves_it_what_it_was(desk: Desk) -> None:
    agent_id = await trader(desk, drawdown_ladder="notify")
    await fall(desk, agent_id, "0.03")
    await desk.withdraw(agent_id, "USDC", 80_000)
    await decide(desk, agent_id)
    assert await told(desk, agent_id) == []
    await desk.deposit(agent_id, "USDC", 500_000)
    await decide(desk, agent_id)
    assert await told(desk, agent_id) == []


async def test_dust_that_can_t_be_divided_is_closed_and_keeps_no_call_from_being_made(desk: Desk) -> None:
    agent_id = await trader(desk, drawdown_ladder="apply")
    await desk.order(agent_id, "buy", "0.000000000000000001", "Y-PERP")
    await decide(desk, agent_id)
    await desk.prices({"X": 79})  # 6.3 % down
    await decide(desk, agent_id)
    left = {p.symbol: p.size for p in (await desk.book(agent_id)).positions}
    assert set(left) == {"X-PERP"}
    assert float(left["X-PERP"]) == pytest.approx(270, rel=1e-6)


async def test_switched_on_the_ladder_begins_at_what_there_is(desk: Desk) -> None:
    agent_id = await trader(desk)
    await fall(desk, agent_id, "0.09")
    async with desk.locked(agent_id) as (tx, scene, held):
        await account.change_settings(tx, scene, held, {"drawdown_ladder": "notify"})
    await decide(desk, agent_id)
    assert await told(desk, agent_id) == []
    await fall(desk, agent_id, "0.14")  # 14,000 of 100,000 is 5.5 % of the 91,000 it began with
    assert [event["rung"] for event in await told(desk, agent_id)] == ["trim"]


async def test_a_trailing_stop_that_trembles_is_told_once(desk: Desk) -> None:
    agent_id = await trader(desk, trailing_stop=0.10)
    for drawdown in ("0.101", "0.099", "0.102", "0.095", "0.11"):
        await fall(desk, agent_id, drawdown)
    assert len(await told(desk, agent_id, "trailing_stop.breached")) == 1
    await fall(desk, agent_id, "0.07")
    await fall(desk, agent_id, "0.12")
    assert len(await told(desk, agent_id, "trailing_stop.breached")) == 2


async def test_the_band_is_where_nothing_is_told(desk: Desk) -> None:
    """Wherever the price goes within the band of the last decision, the next one tells nothing."""
    agent_id = await trader(desk, drawdown_ladder="notify", trailing_stop=0.10)
    for drawdown in ("0.03", "0.055", "0.04", "0.085", "0.099", "0.101", "0.09", "0.2", "0.17", "0.15", "0.01"):
        before = len(await told(desk, agent_id)) + len(await told(desk, agent_id, "trailing_stop.breached"))
        band = (await decide(desk, agent_id)).band
        assert band is not None
        within = band.low < 100_000 * (1 - float(drawdown)) < band.high
        await fall(desk, agent_id, drawdown)
        after = len(await told(desk, agent_id)) + len(await told(desk, agent_id, "trailing_stop.breached"))
        assert after == before or not within
