"""Which webhooks are sent next: how the slots of one process are shared out, so that nobody takes all of them.

Three bounds hold at each of two levels, the process and the agent: on everything under way, on what is ordinary, and
on what goes to endpoints that are failing. The rest is kept for urgent events to endpoints that are well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

UNDER_WAY_MAX = 128
"""Deliveries that one process sends at once."""
ORDINARY_MAX = 96
"""Of those, all but urgent ones to endpoints that are well."""
FAILING_MAX = 32
"""Of those, the ones to endpoints that are failing."""

AN_AGENT_MAX = 8
AN_AGENT_ORDINARY_MAX = 6
AN_AGENT_FAILING_MAX = 4

AN_ENDPOINT_MAX = 4
A_FAILING_ENDPOINT_MAX = 1

_Key = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides on a delivery's slot: for which endpoint of whom, and whether that was failing when looked at."""

    endpoint_id: str
    agent_id: str | None
    urgent: bool
    failing: bool


@dataclass(frozen=True, slots=True)
class Lane:
    """Deliveries of one kind and priority that are due: how many, as far as that matters."""

    kind: Kind
    priority: int
    count: int


@dataclass(frozen=True, slots=True)
class Share:
    """How many deliveries of a lane may begin."""

    endpoint_id: str
    priority: int
    count: int


def share_out(due: Iterable[Lane], under_way: Iterable[Kind]) -> list[Share]:
    """Return what may begin beside what is under way, the first lanes first; no bound is passed, none left unused."""
    used = Counter[_Key]()
    for kind in under_way:
        used.update(_bounds(kind).keys())
    shares = []
    for lane in due:
        bounds = _bounds(lane.kind)
        count = min(lane.count, *(most - used[key] for key, most in bounds.items()))
        if count > 0:
            used.update(dict.fromkeys(bounds, count))
            shares.append(Share(lane.kind.endpoint_id, lane.priority, count))
    return shares


def _bounds(kind: Kind) -> dict[_Key, int]:
    """Return the bounds that a delivery counts against."""
    agent = kind.agent_id
    bounds: dict[_Key, int] = {
        ("process", None): UNDER_WAY_MAX,
        ("agent", agent): AN_AGENT_MAX,
        ("endpoint", kind.endpoint_id): A_FAILING_ENDPOINT_MAX if kind.failing else AN_ENDPOINT_MAX,
    }
    if kind.failing or not kind.urgent:
        bounds |= {("process's ordinary", None): ORDINARY_MAX, ("agent's ordinary", agent): AN_AGENT_ORDINARY_MAX}
    if kind.failing:
        bounds |= {("process's failing", None): FAILING_MAX, ("agent's failing", agent): AN_AGENT_FAILING_MAX}
    return bounds
