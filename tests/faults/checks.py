"""What must be true of a history, whatever was killed; each check returns what it objects to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import pairwise

from tests.faults.history import LIVE, CallRow, EventRow, History

ENDED_BY = {
    "cured": ["margin_call.cured"],
    "completed": ["margin_call.expired", "liquidation.completed"],
    "expired": ["margin_call.expired"],
    "lapsed": [],
}


def objections(history: History) -> list[str]:
    """Return every objection to a history, an empty list where there is none."""
    return [found for check in CHECKS for found in check(history)]


def _calls_do_not_overlap(history: History) -> Iterator[str]:
    calls: dict[str, list[CallRow]] = defaultdict(list)
    for call in history.rows.calls:
        calls[call.agent_id].append(call)
    for agent, own in calls.items():
        for before, after in pairwise(own):
            if before.ended_at is None or after.noticed_at < before.ended_at:
                yield f"{agent}: the calls {before.id} and {after.id} overlap"


def _a_breach_that_lasts_gets_one_call(history: History) -> Iterator[str]:
    for window in history.windows:
        met = Counter(c.agent_id for c in history.rows.calls if c.overlaps(window.since, window.until))
        for agent in sorted(window.agents):
            if met[agent] != 1:
                yield f"{agent}: {met[agent]} calls for the breach of {window.since}"


def _a_call_tells_its_life_once(history: History) -> Iterator[str]:
    told: dict[str, list[EventRow]] = defaultdict(list)
    for event in history.rows.events:
        if event.call_id is not None:
            told[event.call_id].append(event)
    for call in history.rows.calls:
        types = [event.type for event in told.pop(call.id, ())]
        wanted = [] if call.state in ("lapsed", "noticed") else ["margin_call.opened"]
        ends = ENDED_BY.get(call.state, [])
        if call.state == "cured" and call.expired_at is not None:
            ends = ["margin_call.expired", *ends]
        milestones = [kind for kind in types if kind not in ("margin_call.reminded", "liquidation.executed")]
        if milestones != wanted + ends:
            yield f"{call.id}: {call.state} after {milestones}"
    yield from (f"{call_id}: events of a call that is not there" for call_id in told)


def _liquidations_follow_an_expired_call(history: History) -> Iterator[str]:
    calls = {call.id: call for call in history.rows.calls}
    for order in history.rows.orders:
        if order.reason != "liquidation":
            continue
        call = calls.get(order.call_id or "")
        if call is None or call.agent_id != order.agent_id:
            yield f"{order.id}: liquidated without a call"
        elif call.expired_at is None or call.deadline_at is None or call.expired_at < call.deadline_at:
            yield f"{order.id}: liquidated under {call.id}, which had not expired"


def _nothing_is_liquidated_twice(history: History) -> Iterator[str]:
    forced = Counter(o.call_id for o in history.rows.orders if o.reason == "liquidation")
    executed = [e for e in history.rows.events if e.type == "liquidation.executed"]
    by_call, by_order = Counter(e.call_id for e in executed), Counter(e.order_id for e in executed)
    for call in history.rows.calls:
        counts = {call.slices, forced[call.id], by_call[call.id]}
        if len(counts) > 1:
            yield f"{call.id}: {call.slices} slices, {forced[call.id]} orders, {by_call[call.id]} events"
    for order in history.rows.orders:
        if by_order[order.id] != (order.reason == "liquidation"):
            yield f"{order.id}: {by_order[order.id]} events of its execution"


def _liquidation_comes_after_expiry(history: History) -> Iterator[str]:
    expired: set[str | None] = set()
    completed: set[str | None] = set()
    for event in history.rows.events:
        if event.type == "margin_call.expired":
            expired.add(event.call_id)
        if event.type == "liquidation.completed":
            completed.add(event.call_id)
        if event.type == "liquidation.executed" and (event.call_id not in expired or event.call_id in completed):
            yield f"{event.event_id}: a liquidation outside of its call's time"


def _positions_are_the_sum_of_orders(history: History) -> Iterator[str]:
    """Replay the fills: a forced one only ever makes a position smaller."""
    sizes: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for order in history.rows.orders:
        place = order.agent_id, order.symbol
        before, after = sizes[place], sizes[place] + order.signed_size
        if order.reason == "liquidation" and (abs(after) >= abs(before) or after * before < 0):
            yield f"{order.id}: a liquidation from {before} to {after}"
        sizes[place] = after
    for place in sizes | dict(history.rows.positions):
        if sizes.get(place, Decimal(0)) != history.rows.positions.get(place, Decimal(0)):
            yield f"{place}: orders sum to {sizes.get(place)}, the position is {history.rows.positions.get(place)}"


def _sequences_have_no_gap(history: History) -> Iterator[str]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for event in history.rows.events:
        numbers[event.agent_id].append(event.sequence)
    for agent in numbers.keys() | history.rows.last_sequences.keys():
        last = history.rows.last_sequences.get(agent, 0)
        if sorted(numbers[agent]) != list(range(1, last + 1)):
            yield f"{agent}: event numbers are not 1 to {last}"


def _every_event_arrives(history: History) -> Iterator[str]:
    written = {(e.event_id, e.agent_id, e.sequence, e.type) for e in history.rows.events}
    arrived = {(s.event_id, s.agent_id, s.sequence, s.type) for s in history.sent}
    yield from (f"{event[0]}: {event[3]} never arrived" for event in sorted(written - arrived))
    yield from (f"{event[0]}: {event[3]} arrived, and was never written" for event in sorted(arrived - written))
    yield from (f"{sent.event_id}: a signature that is none" for sent in history.sent if not sent.is_genuine)


def _named_requests_happen_once(history: History) -> Iterator[str]:
    effects = {
        "deposit": Counter(history.rows.deposits),
        "order": Counter(order.request for order in history.rows.orders if order.request is not None),
    }
    for asked in history.asked:
        done = effects[asked.kind][asked.key]
        is_done = any(status < 300 for status, _ in asked.answers)
        if asked.answers and done != is_done:
            yield f"{asked.key}: done {done} times, answered {[status for status, _ in asked.answers]}"
        if len({answer for answer in asked.answers if answer[0] < 300}) > 1:
            yield f"{asked.key}: repeated, it was answered differently"
    named = {asked.key for asked in history.asked}
    for kind, counted in effects.items():
        yield from (f"{key}: a {kind} that nobody asked for" for key in counted if key not in named)


def _the_ledger_balances(history: History) -> Iterator[str]:
    yield from (f"{asset}: the ledger is off by {off}" for asset, off in history.rows.imbalances.items())


def _nothing_is_left_half_done(history: History) -> Iterator[str]:
    for call in history.rows.calls:
        if call.state in LIVE and call.state != "expired":
            yield f"{call.id}: still {call.state} when all had settled"
        if (call.state in LIVE) != (call.ended_at is None):
            yield f"{call.id}: {call.state}, ended at {call.ended_at}"


def _no_fault_was_shown(history: History) -> Iterator[str]:
    yield from history.faults


def _it_was_put_to_the_test(history: History) -> Iterator[str]:
    """A run in which nothing happened says nothing."""
    states = Counter(call.state for call in history.rows.calls)
    yield from (f"no call was {state}" for state in ("cured", "completed") if not states[state])
    if not any(window.agents for window in history.windows):
        yield "no breach was watched"


CHECKS: tuple[Callable[[History], Iterator[str]], ...] = (
    _calls_do_not_overlap,
    _a_breach_that_lasts_gets_one_call,
    _a_call_tells_its_life_once,
    _liquidations_follow_an_expired_call,
    _liquidation_comes_after_expiry,
    _nothing_is_liquidated_twice,
    _positions_are_the_sum_of_orders,
    _sequences_have_no_gap,
    _every_event_arrives,
    _named_requests_happen_once,
    _the_ledger_balances,
    _nothing_is_left_half_done,
    _no_fault_was_shown,
    _it_was_put_to_the_test,
)
