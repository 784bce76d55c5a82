"""The agenda of a worker: whom it decides on, in which order, and how often."""

from __future__ import annotations

import asyncio

from app.worker import Agenda


async def _next(agenda: Agenda) -> str | None:
    """Return who comes next, None where there is nobody."""
    try:
        async with asyncio.timeout(0.01):
            return await agenda.take()
    except TimeoutError:
        return None


async def _all(agenda: Agenda) -> list[str]:
    found = []
    while (agent := await _next(agenda)) is not None:
        found.append(agent)
    return found


async def test_each_once_and_what_is_urgent_first() -> None:
    agenda = Agenda()
    agenda.add("abc", urgent=False)
    agenda.add("xc", urgent=True)
    agenda.add("ax", urgent=False)
    assert len(agenda) == 4
    assert await _all(agenda) == ["x", "c", "a", "b"]


async def test_who_is_named_while_decided_on_comes_again_and_never_to_two_at_once() -> None:
    agenda = Agenda()
    agenda.add("a", urgent=False)
    assert await _next(agenda) == "a"
    agenda.add("a", urgent=True)
    agenda.add("b", urgent=False)
    agenda.add("a", urgent=False)
    assert await _next(agenda) == "b"
    assert await _next(agenda) is None
    agenda.done("a")
    assert await _all(agenda) == ["a"]
    agenda.done("a")
    agenda.done("b")
    assert await _next(agenda) is None


async def test_who_failed_is_left_alone_and_then_comes_by_itself() -> None:
    clock, waits = [100.0], []
    agenda = Agenda(lambda: clock[0])
    for _ in range(9):
        agenda.add("a", urgent=False)
        agenda.recall()
        assert await _next(agenda) == "a"
        waits.append(agenda.put_off("a"))
        agenda.add("a", urgent=True)
        assert await _next(agenda) is None
        clock[0] += waits[-1]
        agenda.recall()
        assert len(agenda) == 1
    assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert await _next(agenda) == "a"
    agenda.done("a")
    agenda.add("a", urgent=True)
    assert await _next(agenda) == "a"
    assert agenda.put_off("a") == 0.5


async def test_an_outage_is_no_failure_of_the_account() -> None:
    clock = [0.0]
    agenda = Agenda(lambda: clock[0])
    for _ in range(9):
        agenda.add("a", urgent=True)
        assert await _next(agenda) == "a"
        assert agenda.put_off("a", outage=True) == 0.5
        clock[0] += 0.5
        agenda.recall()


async def test_whoever_waits_is_woken() -> None:
    agenda = Agenda()
    taken = asyncio.create_task(agenda.take())
    await asyncio.sleep(0)
    agenda.add("a", urgent=False)
    assert await asyncio.wait_for(taken, 1) == "a"


async def test_a_crowd_of_one_fleet_keeps_nobody_waiting() -> None:
    """Whoever is in no fleet comes every second time, its master as well; in between, each fleet has its turn."""
    agenda = Agenda()
    crowd, few = [f"m{k}" for k in range(1_000)], ["n0", "n1"]
    agenda.add(crowd, urgent=True, masters=dict.fromkeys(crowd, "lead"))
    agenda.add(few, urgent=True, masters=dict.fromkeys(few, "other"))
    agenda.add(["x", "lead"], urgent=True)
    assert [await _next(agenda) for _ in range(8)] == ["x", "m0", "lead", "n0", "m1", "n1", "m2", "m3"]
    # one that comes again is of its fleet still, whoever names it, and whatever becomes of the decision
    agenda.add(["m0", "m1", "y", "z"], urgent=True)
    for agent in ("m0", "m1"):
        agenda.done(agent)
    assert [await _next(agenda) for _ in range(4)] == ["y", "m4", "z", "m5"]
    assert (await _all(agenda))[-2:] == ["m0", "m1"]


async def test_alone_or_in_a_fleet_all_come_in_their_order() -> None:
    agenda = Agenda()
    agenda.add("abcd", urgent=True)
    agenda.add("pqr", urgent=True, masters=dict.fromkeys("pqr", "lead"))
    agenda.add("uv", urgent=False, masters={"u": "lead", "v": None})
    assert await _all(agenda) == list("apbqcrdvu")


async def test_who_has_a_rest_comes_after_it_if_named_meanwhile() -> None:
    now = [100.0]
    agenda = Agenda(lambda: now[0])
    agenda.add("abc", urgent=True)
    assert await _all(agenda) == list("abc")
    agenda.add("b", urgent=False)  # while it is decided on
    for agent in "abc":
        agenda.done(agent, rest=2.0)
    agenda.add("ad", urgent=True)
    agenda.recall()
    assert await _all(agenda) == ["d"]
    now[0] += 2.0
    agenda.recall()
    assert sorted(await _all(agenda)) == ["a", "b"], "c was named by nobody"
    agenda.done("a")
    agenda.add("ac", urgent=True)
    assert await _all(agenda) == ["a", "c"]
