"""The life of a margin call as tables: a call, a situation and a time in, the next step out."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from app.domain import liquidate
from app.domain.book import AccountSettings, Book
from app.domain.health import Health
from app.domain.liquidate import Target
from app.domain.margin_calls import (
    LIVE_STATES,
    Become,
    Call,
    Liquidate,
    Notice,
    Open,
    Remind,
    Request,
    Situation,
    Step,
    Wait,
    due_by,
    goes_on,
    reminders,
    situation,
    step,
)
from app.domain.parameters import HealthPolicy
from app.domain.quote import AccountFigures
from app.domain.trade import Contract, Order, plan
from app.domain.watch import HYSTERESIS, Scale, drawdown, levels_moved, settled_level
from tests.domain.test_gates import NOW, book, scene

START = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = HealthPolicy()

SAFE = Situation(pool=None, isolated=False, is_clear=True, is_cured=True, may_stop=True, anything_left=True)
CURED = replace(SAFE, may_stop=False)  # .75 < utilization <= .80
NEAR = replace(CURED, is_cured=False)  # .80 < utilization < .83
TREMBLES = replace(NEAR, is_clear=False)  # .83 <= utilization < .85
BREACH = replace(TREMBLES, pool="utilization")
SHORT = replace(TREMBLES, pool="maintenance")
ISOLATED = replace(TREMBLES, isolated=True)  # and the pool as it is
EMPTY = replace(SHORT, anything_left=False)
WAITING = replace(BREACH, waiting=True)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def own(notice: int = 0, grace: int = 300, *, auto: bool = True) -> AccountSettings:
    return AccountSettings(notice_delay_seconds=notice, grace_period_seconds=grace, auto_liquidate=auto)


def opened(grace: float = 300, reminded: int = 0, seconds: float = 0) -> Call:
    return Call("open", at(seconds), at(seconds), at(seconds + grace), reminded)


NOTICED = Call("noticed", at(0))
EXPIRED = replace(opened(), state="expired")
ALONE = replace(opened(), cause="isolated")
ALONE_EXPIRED = replace(ALONE, state="expired")
ALONE_LIQUIDATING = replace(ALONE, state="liquidating")
LIQUIDATING = replace(opened(), state="liquidating")
ASKED = replace(LIQUIDATING, attempts=1, respond_by=at(330))
SOLD = replace(ASKED, slices=1)


@pytest.mark.parametrize(
    ("call", "now_is", "settings", "seconds", "expected"),
    [
        # nothing is wrong
        (None, SAFE, own(), 0, None),
        (None, NEAR, own(notice=60), 0, None),
        # a breach: the notice delay, then the grace
        (None, BREACH, own(), 0, Open(at(300))),
        (None, BREACH, own(grace=0), 7, Open(at(7))),
        (None, BREACH, own(notice=60), 5, Notice(at(65))),
        (NOTICED, BREACH, own(notice=60), 59.999, Wait(at(60))),
        (NOTICED, BREACH, own(notice=60), 60, Open(at(360))),
        (NOTICED, BREACH, own(notice=60), 500, Open(at(800))),  # slept through: the grace runs from when it is told
        (NOTICED, BREACH, own(notice=600), 60, Wait(at(600))),  # the delay is the account's of now
        (NOTICED, NEAR, own(notice=60), 10, Become("lapsed")),
        (NOTICED, CURED, own(notice=60), 60, Become("lapsed")),
        # where it trembles on the level no second call is noticed; one that is below it in the end has lapsed
        (NOTICED, TREMBLES, own(notice=60), 10, Wait(at(60))),
        (NOTICED, TREMBLES, own(notice=60), 60, Become("lapsed")),
        # maintenance skips the notice, not the grace
        (None, SHORT, own(notice=60), 0, Open(at(300))),
        (None, ISOLATED, own(notice=60), 0, Open(at(300))),
        (NOTICED, SHORT, own(notice=60), 10, Open(at(310))),
        (opened(), SHORT, own(), 10, Wait(at(150))),
        # reminders: at half-time, and 30 s before
        (opened(), BREACH, own(), 149.999, Wait(at(150))),
        (opened(), BREACH, own(), 150, Remind(1)),
        (opened(reminded=1), BREACH, own(), 150, Wait(at(270))),
        (opened(reminded=1), BREACH, own(), 270, Remind(2)),
        (opened(reminded=2), BREACH, own(), 270, Wait(at(300))),
        (opened(), BREACH, own(), 280, Remind(2)),  # one for both that were slept through
        (opened(grace=20), BREACH, own(), 10, Remind(1)),
        (opened(grace=20, reminded=1), BREACH, own(), 10, Wait(at(20))),
        # the account's grace of now does not move a deadline that was told
        (opened(reminded=2), BREACH, own(grace=9_000), 300, Become("expired")),
        (opened(), BREACH, own(grace=1), 100, Wait(at(150))),
        # the deadline
        (opened(reminded=2), BREACH, own(), 299.999, Wait(at(300))),
        (opened(reminded=2), BREACH, own(), 300, Become("expired")),
        (opened(), BREACH, own(), 10_000, Become("expired")),  # slept through: no reminder of what is over
        (opened(grace=0), BREACH, own(), 0, Become("expired")),
        (opened(), NEAR, own(), 300, Become("expired")),
        (opened(), NEAR, own(), 0, Wait(at(150))),  # below the breach is not yet cured
        # cured, at the last moment and after it too
        (opened(), CURED, own(), 0, Become("cured")),
        (opened(), CURED, own(), 300, Become("cured")),
        (opened(grace=0), SAFE, own(), 50, Become("cured")),
        (EXPIRED, CURED, own(), 400, Become("cured")),
        (EXPIRED, CURED, own(auto=False), 400, Become("cured")),
        # expired
        (EXPIRED, BREACH, own(), 300, Become("liquidating")),
        (EXPIRED, NEAR, own(), 300, Become("liquidating")),
        (EXPIRED, BREACH, own(auto=False), 300, Wait(None)),
        (EXPIRED, EMPTY, own(auto=False), 10_000, Wait(None)),
        # liquidation goes on past the cure level, down to its own
        (LIQUIDATING, BREACH, own(), 300, Liquidate()),
        (LIQUIDATING, CURED, own(), 300, Liquidate()),
        (LIQUIDATING, SAFE, own(), 300, Become("completed")),
        # nothing is left that may be closed: over where nothing is required either, else the call lives on
        (LIQUIDATING, replace(EMPTY, pool=None), own(), 300, Become("completed")),
        (LIQUIDATING, EMPTY, own(), 300, Wait(None)),
        # a call for isolated positions neither judges the pool nor closes it
        (ALONE, ISOLATED, own(), 0, Wait(at(150))),
        (ALONE, NEAR, own(), 0, Become("cured")),  # closed or met, whatever the pool's utilization below its breach
        (ALONE, BREACH, own(), 100, Open(at(400))),  # the pool's call from now on, with the pool's own time
        (ALONE, replace(SHORT, isolated=True), own(), 299, Open(at(599))),
        (ALONE_EXPIRED, ISOLATED, own(), 300, Become("liquidating")),
        (ALONE_EXPIRED, NEAR, own(), 300, Become("cured")),
        (ALONE_LIQUIDATING, ISOLATED, own(), 300, Liquidate()),
        (ALONE_LIQUIDATING, NEAR, own(), 300, Become("completed")),
        (ALONE_LIQUIDATING, SHORT, own(), 300, Open(at(600))),
        (ALONE_EXPIRED, BREACH, own(auto=False), 300, Open(at(600))),  # else a grain would keep the pool from a call
        (opened(), ISOLATED, own(), 10, Wait(at(150))),  # and that of the pool waits for both
        (opened(reminded=2), replace(CURED, isolated=True, is_cured=False), own(), 300, Become("expired")),
        # what has begun is finished
        (LIQUIDATING, BREACH, own(auto=False), 300, Liquidate()),
        # a venue was asked: its time, then again; what was filled or taken back leads to the next slice
        (ASKED, WAITING, own(), 329.999, Wait(at(330))),
        (ASKED, WAITING, own(), 330, Request(2)),
        (replace(ASKED, attempts=7), WAITING, own(), 9_000, Request(8)),
        (ASKED, replace(WAITING, anything_left=False), own(), 331, Request(2)),
        (SOLD, WAITING, own(), 310, Wait(at(330))),
        (SOLD, BREACH, own(), 310, Liquidate()),
        # cured before anything was sold; from then on it goes down to the stop level
        (ASKED, replace(CURED, waiting=True), own(), 310, Become("cured")),
        (ASKED, replace(SAFE, waiting=True), own(), 310, Become("cured")),
        (ASKED, replace(NEAR, waiting=True), own(), 310, Wait(at(330))),
        (SOLD, replace(CURED, waiting=True), own(), 310, Wait(at(330))),
        (SOLD, replace(CURED, waiting=True), own(), 330, Request(2)),
        (SOLD, replace(SAFE, waiting=True), own(), 310, Become("completed")),
        # a second breach, after the call is over, begins anew
        (None, BREACH, own(notice=60), 1_000, Notice(at(1_060))),
    ],
)
def test_the_next_step(
    call: Call | None, now_is: Situation, settings: AccountSettings, seconds: float, expected: Step | None
) -> None:
    assert step(call, now_is, settings, at(seconds)) == expected


@pytest.mark.parametrize(
    ("call", "due"), [(opened(), 300), (EXPIRED, 300), (NOTICED, 60 + 500), (opened(seconds=7, grace=0), 7)]
)
def test_when_an_own_call_is_due_that_becomes_the_fleets(call: Call, due: float) -> None:
    assert due_by(call, own(notice=60, grace=500)) == at(due)


@pytest.mark.parametrize("now_is", [SAFE, CURED, NEAR, TREMBLES, BREACH, SHORT, EMPTY, replace(EMPTY, pool=None)])
@pytest.mark.parametrize("isolated", [False, True])
def test_an_own_call_goes_on_where_it_would_have_gone_on_by_itself(now_is: Situation, isolated: bool) -> None:
    """As a call does that was never the fleet's: cured it is over, and where nothing is left and nothing required."""
    now_is, alone = replace(now_is, isolated=isolated, is_cured=now_is.is_cured and not isolated), opened(reminded=2)
    for call in (alone, replace(alone, cause="isolated")):
        is_idle = not now_is.anything_left and not now_is.cause
        is_over = step(call, now_is, own(), at(280)) == Become("cured") or is_idle
        assert goes_on(now_is, is_isolated=call.is_isolated) is not is_over


@pytest.mark.parametrize("state", ["lapsed", "cured", "completed"])
def test_a_call_that_is_over_takes_no_step(state: Any) -> None:
    assert state not in LIVE_STATES
    with pytest.raises(ValueError, match=state):
        step(replace(opened(), state=state), BREACH, own(), at(0))


@pytest.mark.parametrize(
    ("grace", "expected"),
    [(0, []), (1, [0.5]), (20, [10]), (60, [30]), (61, [30.5, 31]), (300, [150, 270]), (86_400, [43_200, 86_370])],
)
def test_reminders(grace: float, expected: list[float]) -> None:
    assert list(reminders(at(0), at(grace))) == [at(seconds) for seconds in expected]


@pytest.mark.parametrize(("grace", "count"), [(0, 0), (20, 1), (61, 2), (300, 2)])
@pytest.mark.parametrize("every", [0.25, 7.0, 40.0, 400.0])
def test_a_clock_that_ticks_at_any_rate_expires_once_and_reminds_at_most_once_each(
    grace: float, count: int, every: float
) -> None:
    call, seconds, reminded = opened(grace), 0.0, []
    while True:
        what = step(call, BREACH, own(), at(seconds))
        if isinstance(what, Remind):
            reminded.append(what.number)
            call = replace(call, reminders=what.number)
        elif isinstance(what, Wait):
            assert what.until is not None
            assert what.until > at(seconds)
            seconds += every
        else:
            break
    assert what == Become("expired")
    assert grace <= seconds < grace + every
    assert reminded == sorted(set(reminded))
    assert set(reminded) <= set(range(1, count + 1))
    if every < 1:
        assert len(reminded) == count


# --- what a call is judged on


def health(used: float | None, equity: float = 100.0, maintenance: float = 0.0, **more: Any) -> Health:
    values: dict[str, Any] = {field.name: 0.0 for field in fields(Health) if field.name != "bands"}
    values |= {"equity": equity, "utilization": used, "required_maintenance": maintenance, "insolvent": equity < 0}
    values["required_initial"] = 0.0 if used is None else used * equity
    return Health(**(values | more))


@pytest.mark.parametrize(
    ("judged", "cause", "is_cured", "may_stop"),
    [
        (health(0.0), None, True, True),
        (health(0.75), None, True, True),
        (health(0.75 + 1e-12), None, True, True),
        (health(0.7501), None, True, False),
        (health(0.80), None, True, False),
        (health(0.80 + 1e-12), None, True, False),
        (health(0.8001), None, False, False),
        (health(0.8499), None, False, False),
        (health(0.85), "utilization", False, False),
        (health(0.99), "utilization", False, False),
        (health(0.70, maintenance=100.0), None, True, True),
        (health(0.70, maintenance=100.01), "maintenance", False, False),
        (health(0.90, maintenance=100.01), "maintenance", False, False),
        (health(None, equity=-1.0, required_initial=5.0, maintenance=1.0), "maintenance", False, False),
        (health(None, equity=-1.0), None, False, False),  # nothing is open: there is nothing to call for
    ],
)
def test_breach_cure_and_stop(judged: Health, cause: str | None, is_cured: bool, may_stop: bool) -> None:
    found = situation(judged, POLICY, isolated_breached=False, anything_left=True)
    assert (found.cause, found.is_cured, found.may_stop) == (cause, is_cured, may_stop)


def test_an_isolated_position_past_saving_is_a_cause_of_its_own() -> None:
    found = situation(health(0.1), POLICY, isolated_breached=True, anything_left=True)
    assert found == replace(ISOLATED, may_stop=False)
    both = situation(health(0.9, maintenance=101.0), POLICY, isolated_breached=True, anything_left=False)
    assert (both.cause, both.anything_left) == ("maintenance", False)


def test_an_account_s_own_levels() -> None:
    strict = AccountSettings(breach_utilization=0.5, cure_utilization=0.4, stop_utilization=0.3).policy(POLICY)
    found = [situation(health(u), strict, isolated_breached=False, anything_left=True) for u in (0.3, 0.4, 0.45, 0.5)]
    assert [s.cause for s in found] == [None, None, None, "utilization"]
    assert [s.is_cured for s in found] == [True, True, False, False]
    assert [s.may_stop for s in found] == [True, False, False, False]


# --- levels that do not tremble

ZONES = Scale(("GREEN", "YELLOW", "ORANGE", "RED"), (0.60, 0.75, 0.85))


@pytest.mark.parametrize(
    ("before", "value", "after"),
    [
        ("GREEN", 0.5999, "GREEN"),
        ("GREEN", 0.60, "YELLOW"),
        ("GREEN", 0.85, "RED"),
        ("GREEN", None, "RED"),
        ("RED", None, "RED"),
        ("RED", 0.84, "RED"),
        ("RED", 0.8301, "RED"),
        ("RED", 0.8299, "ORANGE"),
        ("RED", 0.74, "ORANGE"),  # it falls past two bounds, and clears one of them
        ("RED", 0.5799, "GREEN"),
        ("YELLOW", 0.5801, "YELLOW"),
        ("YELLOW", 0.5799, "GREEN"),
        ("YELLOW", 0.75, "ORANGE"),
    ],
)
def test_a_level_gets_worse_at_once_and_better_only_when_clear(before: str, value: float | None, after: str) -> None:
    assert settled_level(ZONES, before, value) == after


@pytest.mark.parametrize("bound", ZONES.bounds)
def test_a_figure_that_trembles_on_a_bound_changes_the_level_once(bound: float) -> None:
    told = [settled_level(ZONES, "GREEN", bound - 1e-6)]
    for i in range(100):
        told.append(settled_level(ZONES, told[-1], bound + (-1) ** i * HYSTERESIS * 0.99))
    assert sum(1 for a, b in pairwise(told) if a != b) == 1


@pytest.mark.parametrize(
    ("peak", "equity", "expected"),
    [(0, 5, 0), (0, -5, 0), (100, 100, 0), (100, 120, 0), (100, 85, 0.15), (10, -5, 1.5)],
)
def test_drawdown(peak: float, equity: float, expected: float) -> None:
    assert drawdown(peak, equity) == pytest.approx(expected, abs=1e-15)


# --- what is closed, and how much of it

HELD = book(1_000, BTC=10, ETH=4)
MARK = Decimal(100)
CONTRACT = Contract(Decimal(1), Decimal("0.2"))


def targets() -> list[Target]:
    prices = scene().figures(HELD).portfolio.notional.tolist()
    return [Target(p, p.size, n) for p, n in zip(HELD.positions, prices, strict=True)]


def symbols(found: list[Target]) -> list[str]:
    return [t.item.symbol for t in found if hasattr(t.item, "symbol")]


def test_the_order_of_closing() -> None:
    small_first = ["ETH", "BTC"]
    for given in (targets(), targets()[::-1]):
        assert symbols(liquidate.in_order(given, "smallest_first", lambda _: 0.0)) == small_first
        by_relief = liquidate.in_order(given, "largest_relief", lambda t: t.notional)
        assert symbols(by_relief) == small_first[::-1]
        alike = [replace(t, notional=1.0) for t in given]
        ids = [t.item.id for t in liquidate.in_order(alike, "smallest_first", lambda _: 0.0)]
        assert ids == sorted(ids)
        assert [t.item.id for t in liquidate.in_order(alike, "largest_relief", lambda _: 1.0)] == ids


@pytest.mark.parametrize(("keep", "outside"), [(1, ["ETH"]), (2, []), (9, [])])
def test_what_lies_outside_of_the_largest(keep: int, outside: list[str]) -> None:
    for given in (targets(), targets()[::-1]):
        assert symbols(liquidate.outside_largest(given, keep)) == outside
    held = book(1_000, 50, BTC=10, ETH=4).reservations[0]
    reserved = Target(held, held.remaining, 50_000.0)  # however large: no position
    assert liquidate.outside_largest([*targets(), reserved], keep)[-1] is reserved


def closed(held: Book, target: Target, size: Decimal) -> Book:
    assert not hasattr(target.item, "service")
    position = target.item
    order = Order(position.symbol, "sell", size, reduce_only=True)
    return plan(held, order, CONTRACT, MARK, "", NOW).book


@pytest.mark.parametrize("goal", [0.01, 0.1, 0.2, 0.25])
def test_just_the_part_that_is_enough(goal: float) -> None:
    def enough(figures: AccountFigures) -> bool:
        return (figures.health.utilization or 0.0) <= goal

    assessed = []

    def assess(held: Book) -> AccountFigures:
        assessed.append(held)
        return scene().figures(held)

    target = next(t for t in targets() if t.size == 10)
    before = scene().figures(HELD)
    assert not enough(before)
    chosen = liquidate.next_slice(HELD, target, assess, closed, goal)
    assert len(assessed) <= 6  # margin and equity are lines in the size: no search bit by bit
    after = scene().figures(closed(HELD, target, chosen.size))
    if not enough(scene().figures(closed(HELD, target, target.size))):
        assert chosen.is_whole
        return
    assert not chosen.is_whole
    assert enough(after)
    spare = target.size / 2**18  # of a size that is sought at eight digits
    assert not enough(scene().figures(closed(HELD, target, chosen.size - spare)))


def test_all_of_it_where_that_is_just_enough() -> None:
    target = targets()[0]
    exact = scene().figures(closed(HELD, target, target.size)).health.utilization
    assert exact is not None
    assert liquidate.next_slice(HELD, target, scene().figures, closed, exact).is_whole


@pytest.mark.parametrize("told", range(4))
def test_who_has_moved_is_whom_another_level_would_be_told(told: int) -> None:
    scale = Scale(("GREEN", "YELLOW", "ORANGE", "RED"), (0.60, 0.75, 0.85))
    used = [k / 200 for k in range(250)] + [0.60, 0.75, 0.85, float("inf")]
    moved = levels_moved(scale, np.full(len(used), told, dtype=np.int8), np.array(used))
    assert moved.tolist() == [settled_level(scale, scale.names[told], value) != scale.names[told] for value in used]
    assert not levels_moved(scale, np.array([told], dtype=np.int8), np.array([np.nan])).any()
