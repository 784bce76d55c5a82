"""A crash of the market while the API, its workers and Postgres are killed: nothing is lost or done twice.

The short form; `make faults` runs it two hundred kills long.
"""

from __future__ import annotations

import random

from tests.faults.checks import objections
from tests.faults.scenario import Plan, run, summary
from tests.faults.stack import KINDS

KILLS_A_KIND = 2


async def test_nothing_is_lost_or_done_twice_whatever_is_killed() -> None:
    plan = Plan(random.randrange(1_000_000), KILLS_A_KIND * len(KINDS), agents=8, up_seconds=0.4, down_seconds=0.3)
    print(f"seed {plan.seed}")  # noqa: T201  shown where it fails
    history, desk = await run(plan, print)
    print(summary(history, desk))  # noqa: T201
    assert [sum(role in kind for role in desk.kills) for kind in KINDS] == [KILLS_A_KIND] * len(KINDS)
    assert objections(history) == []
