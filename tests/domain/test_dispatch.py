"""Shares of the slots: no bound is passed, none is left unused, and a margin call finds room beside any hog."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from app.domain.dispatch import Kind, Lane, Share, share_out


def _kinds(failing: bool | None = None) -> st.SearchStrategy[Kind]:
    """Return kinds of 30 agents with 10 endpoints each, every third of them failing."""

    def kind(agent: int, endpoint: int, urgent: bool) -> Kind:
        ill = endpoint % 3 == 0 if failing is None else failing
        return Kind(f"wh_{agent}_{endpoint}", f"agent_{agent}" if agent else None, urgent, ill)

    return st.builds(kind, st.integers(0, 29), st.integers(0, 9), st.booleans())


_LANES = st.lists(
    st.builds(lambda kind, count: Lane(kind, 0 if kind.urgent else 1, count), _kinds(), st.integers(1, 4)),
    max_size=200,
    unique_by=lambda lane: (lane.kind.endpoint_id, lane.priority),
)


def _passed(kinds: Iterable[Kind]) -> bool:
    """Tell whether so many at once pass a bound: the README's figures, counted one by one."""
    held = list(kinds)
    owners, endpoints = Counter(kind.agent_id for kind in held), Counter(kind.endpoint_id for kind in held)
    ordinary = [kind for kind in held if kind.failing or not kind.urgent]
    ill = [kind for kind in held if kind.failing]
    return (
        len(held) > 128
        or len(ordinary) > 96
        or len(ill) > 32
        or max(owners.values(), default=0) > 8
        or max(Counter(kind.agent_id for kind in ordinary).values(), default=0) > 6
        or max(Counter(kind.agent_id for kind in ill).values(), default=0) > 4
        or max(endpoints.values(), default=0) > 4
        or max((endpoints[kind.endpoint_id] for kind in ill), default=0) > 1
    )


def _begun(lanes: Iterable[Lane], shares: Iterable[Share]) -> list[Kind]:
    kinds = {(lane.kind.endpoint_id, lane.priority): lane.kind for lane in lanes}
    return [kinds[share.endpoint_id, share.priority] for share in shares for _ in range(share.count)]


@given(_LANES, _LANES)
def test_no_bound_is_passed_and_none_left_unused(first: list[Lane], then: list[Lane]) -> None:
    held = _begun(first, share_out(first, []))
    assert not _passed(held)
    shares = share_out(then, held)
    after = held + _begun(then, shares)
    assert not _passed(after)
    given_to = {(share.endpoint_id, share.priority): share.count for share in shares}
    for lane in then:
        count = given_to.get((lane.kind.endpoint_id, lane.priority), 0)
        assert count <= lane.count
        assert count == lane.count or _passed([*after, lane.kind])


@given(st.lists(st.builds(lambda kind: Lane(kind, 1, 4), _kinds()), max_size=300))
def test_what_is_ordinary_or_failing_never_keeps_a_margin_call_waiting(hogs: list[Lane]) -> None:
    ordinary = [lane for lane in hogs if lane.kind.failing or not lane.kind.urgent]
    held = _begun(ordinary, share_out(ordinary, []))
    call = Lane(Kind("wh_call", "agent_1", urgent=True, failing=False), 0, 1)
    assert share_out([call], held) == [Share("wh_call", 0, 1)]


def test_the_first_lanes_come_first() -> None:
    lanes = [Lane(Kind(f"wh_{i}", f"agent_{i}", urgent=False, failing=False), 1, 4) for i in range(40)]
    shares = share_out(lanes, [])
    assert [share.endpoint_id for share in shares] == [f"wh_{i}" for i in range(24)]
