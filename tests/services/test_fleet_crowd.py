"""A fleet of many in breach at once is one among others: it hides nobody whose call is due, and is known by name."""

from __future__ import annotations

from datetime import timedelta

from app.screening import Watchman
from app.services import calls, fleet_books
from app.services.shards import ALL
from tests.services.desk import ACTOR
from tests.services.muster import FALLEN, Muster
from tests.services.squadron import Squadron

DUE = """
    INSERT INTO margin_calls (id, agent_id, state, cause, noticed_at, next_action_at, figures,
                              reminders, slices, deficit, uncovered, attempts)
    VALUES ('call_' || CAST(:agent AS text), :agent, 'noticed', 'utilization', now() - interval '1 h',
            now() - make_interval(secs => :seconds), '{}', 0, 0, 0, 0, 0) RETURNING 1
"""


async def test_who_is_due_is_not_hidden_by_a_crowd_that_was_due_before(squadron: Squadron) -> None:
    fleets = [await squadron.fleet(1_000) for _ in range(2)]
    crowd = [await squadron.member(fleets[0], 1) for _ in range(5)]
    few = [await squadron.member(fleets[1], 1) for _ in range(2)]
    alone = [await squadron.desk.agent() for _ in range(4)]
    for k, agent in enumerate([*crowd, *few, *alone]):
        await squadron.desk.rows(DUE, agent=agent, seconds=100 - k)
    leads = dict.fromkeys(crowd, fleets[0].master_id) | dict.fromkeys(few, fleets[1].master_id)

    async def due(limit: int) -> dict[str, str | None]:
        async with squadron.desk.database.transaction(ACTOR) as tx:
            return await calls.due(tx, limit)

    assert await due(100) == leads | dict.fromkeys(alone)
    # two of those alone and two of fleets, one of each; the longest due first
    assert list(await due(2)) == [crowd[0], few[0], *alone[:2]]
    assert list(await due(4)) == [*crowd[:2], *few, *alone]


async def test_the_screen_names_members_with_who_leads_them(muster: Muster) -> None:
    desk, master = muster.squadron.desk, muster.fleet.master_id
    other = await desk.agent(10_000)
    await desk.order(other, "buy", "0.4")
    await desk.prices(FALLEN)
    named = await Watchman(ACTOR, desk.database, desk.market, timedelta(hours=1)).look(ALL)
    assert set(named.urgent) == {other, *muster.members}
    assert named.masters == dict.fromkeys(muster.members, master)


async def test_in_a_crash_of_all_markets_everybody_is_named(squadron: Squadron) -> None:
    """More are in breach at once than a statement has arguments, 32,767."""
    fleet = await squadron.fleet(1_000)
    member = await squadron.member(fleet, 1)
    everybody = [*(f"agent_{k}" for k in range(40_000)), member]
    async with squadron.desk.database.transaction(ACTOR) as tx:
        assert await fleet_books.masters_of(tx, everybody) == {member: fleet.master_id}
