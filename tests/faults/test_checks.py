"""The checks themselves: a history that is sound passes, and each way of going wrong is objected to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from tests.faults.checks import CHECKS, objections
from tests.faults.history import Asked, CallRow, EventRow, History, OrderRow, Rows, Sent, Standing, Window

START = datetime(2026, 1, 1, tzinfo=UTC)


def _at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def _call(name: str, begun: float, **values: Any) -> CallRow:
    row = CallRow(name, "alice", "cured", _at(begun), _at(begun + 5), None, _at(begun + 3), 0)
    return replace(row, **values)


CALLS = (
    _call("call_1", 10),
    _call("call_2", 20, state="completed", expired_at=_at(25), ended_at=_at(26), slices=2),
)
ORDERS = (
    OrderRow("ord_1", "alice", "BTC-PERP", Decimal("0.5"), "", None, "buy-1"),
    OrderRow("ord_2", "alice", "ETH-PERP", Decimal(2), "", None, "buy-2"),
    OrderRow("ord_3", "alice", "ETH-PERP", Decimal(-2), "liquidation", "call_2", None),
    OrderRow("ord_4", "alice", "BTC-PERP", Decimal("-0.1"), "liquidation", "call_2", None),
)
EVENTS = tuple(
    EventRow(f"evt_{number}", "alice", number, kind, call, order)
    for number, (kind, call, order) in enumerate(
        [
            ("zone.changed", None, None),
            ("margin_call.opened", "call_1", None),
            ("margin_call.cured", "call_1", None),
            ("margin_call.opened", "call_2", None),
            ("margin_call.reminded", "call_2", None),
            ("margin_call.expired", "call_2", None),
            ("liquidation.executed", "call_2", "ord_3"),
            ("liquidation.executed", "call_2", "ord_4"),
            ("liquidation.completed", "call_2", None),
        ],
        1,
    )
)
SOUND = History(
    rows=Rows(
        calls=CALLS,
        orders=ORDERS,
        events=EVENTS,
        positions={("alice", "BTC-PERP"): Decimal("0.4")},
        deposits=("deposit-1",),
        last_sequences={"alice": len(EVENTS)},
        imbalances={},
    ),
    sent=[Sent(e.event_id, e.agent_id, e.sequence, e.type, True) for e in (*EVENTS, EVENTS[1])],
    asked=[
        Asked("deposit-1", "alice", "deposit", [(201, b"1"), (201, b"1")]),
        Asked("buy-1", "alice", "order", [(200, b"1")]),
        Asked("buy-2", "alice", "order", [(200, b"2")]),
        Asked("buy-3", "alice", "order", [(409, b"refused")]),
    ],
    windows=[Window(frozenset({"alice"}), _at(11), _at(15)), Window(frozenset({"alice"}), _at(19), _at(30))],
)


def _with(**rows: Any) -> History:
    return replace(SOUND, rows=replace(SOUND.rows, **rows))


def _without(items: Sequence[Sent], place: int) -> list[Sent]:
    return [*items[:place], *items[place + 1 :]]


def _event(place: int, **values: Any) -> History:
    changed = replace(EVENTS[place], **values)
    return _with(events=[*EVENTS[:place], changed, *EVENTS[place + 1 :]])


def _second_call(**values: Any) -> History:
    return _with(calls=(CALLS[0], replace(CALLS[1], **values)))


CORRUPTED: dict[str, Callable[[], History]] = {
    "two calls at a time": lambda: _with(calls=(replace(CALLS[0], ended_at=_at(21)), CALLS[1])),
    "two live calls": lambda: _with(calls=(replace(CALLS[0], state="open", ended_at=None), CALLS[1])),
    "a breach without a call": lambda: replace(SOUND, windows=[Window(frozenset({"alice"}), _at(14), _at(19))]),
    "two calls for a breach": lambda: replace(SOUND, windows=[Window(frozenset({"alice"}), _at(11), _at(30))]),
    "a call opened twice": lambda: _event(4, type="margin_call.opened"),
    "an end that is not told": lambda: _event(8, type="zone.changed", call_id=None),
    "an end of the other kind": lambda: _event(2, type="margin_call.expired"),
    "events of no call": lambda: _event(0, call_id="call_9"),
    "a liquidation without a call": lambda: _with(orders=(*ORDERS[:3], replace(ORDERS[3], call_id=None))),
    "a liquidation under another's call": lambda: _second_call(agent_id="bob"),
    "a liquidation under a call not expired": lambda: _second_call(expired_at=None),
    "a liquidation before the deadline": lambda: _second_call(expired_at=_at(24)),
    "a liquidation told before expiry": lambda: _with(events=(*EVENTS[:5], EVENTS[6], EVENTS[5], *EVENTS[7:])),
    "a liquidation told twice": lambda: _event(7, order_id="ord_3"),
    "a slice too many": lambda: _with(orders=(*ORDERS, replace(ORDERS[3], id="ord_5"))),
    "a liquidation that flips": lambda: _with(
        orders=(*ORDERS[:3], replace(ORDERS[3], signed_size=Decimal(-1))),
        positions={("alice", "BTC-PERP"): Decimal("-0.5")},
    ),
    "a position that no order explains": lambda: _with(positions={("alice", "BTC-PERP"): Decimal("0.5")}),
    "a fill without a position": lambda: _with(positions={}),
    "a gap in the numbers": lambda: _with(last_sequences={"alice": len(EVENTS) + 1}),
    "a number given twice": lambda: _event(4, sequence=4),
    "an event that never arrived": lambda: replace(SOUND, sent=_without(SOUND.sent, 4)),
    "an event that was never written": lambda: replace(SOUND, sent=[*SOUND.sent, Sent("x", "alice", 3, "y", True)]),
    "an event under another id": lambda: replace(
        SOUND, sent=[*SOUND.sent, replace(SOUND.sent[1], event_id="evt_99")]
    ),
    "a signature that is none": lambda: replace(SOUND, sent=[*SOUND.sent, replace(SOUND.sent[1], is_genuine=False)]),
    "a deposit made twice": lambda: _with(deposits=("deposit-1", "deposit-1")),
    "a deposit answered and lost": lambda: _with(deposits=()),
    "a deposit that nobody asked for": lambda: _with(deposits=("deposit-1", "deposit-2")),
    "an order refused and filled": lambda: replace(SOUND, asked=[*SOUND.asked[:2], replace(
        SOUND.asked[2], answers=[(409, b"refused")])]),
    "a repeat answered differently": lambda: replace(SOUND, asked=[
        replace(SOUND.asked[0], answers=[(201, b"1"), (201, b"2")]), *SOUND.asked[1:]]),
    "a ledger that is off": lambda: _with(imbalances={"USDC": Decimal("0.01")}),
    "a call that hangs": lambda: _second_call(state="liquidating", ended_at=None),
    "a run in which nothing happened": lambda: History(Rows((), (), (), {}, (), {}, {}), (), (), ()),
    "an answer of 500": lambda: replace(SOUND, faults=["POST /orders: 500"]),
}  # fmt: skip


def test_a_sound_history_passes() -> None:
    assert objections(SOUND) == []


@pytest.mark.parametrize("name", CORRUPTED)
def test_a_corrupted_history_does_not(name: str) -> None:
    assert objections(CORRUPTED[name]()), name


def test_each_check_objects_to_something() -> None:
    silent = [check.__name__ for check in CHECKS if not any(list(check(bad())) for bad in CORRUPTED.values())]
    assert silent == []


def test_who_is_in_breach() -> None:
    # .30 x 28,334 of exposure is 8,500.2
    assert Standing(Decimal(10_000), Decimal("8500.2")).is_breached
    assert not Standing(Decimal(10_000), Decimal(8_499)).is_breached
    assert Standing(Decimal(0), Decimal(1)).is_breached
