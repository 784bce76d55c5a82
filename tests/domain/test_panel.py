"""The panel of returns: days line up, gaps are named, a window is what was asked for."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.closes import Gap
from app.domain.panel import Panel, panel_of_closes

START = date(2024, 1, 1)
DRAWN = settings(max_examples=100, deadline=None, derandomize=True)


def test_a_panel_lines_days_up() -> None:
    day = [START + timedelta(days=k) for k in range(6)]
    closes = {
        "A": {day[0]: 100.0, day[1]: 110.0, day[2]: 99.0, day[4]: 50.0, day[5]: 60.0},
        "B": {day[1]: 10.0, day[2]: 11.0, day[3]: 11.0, day[4]: 22.0},
    }
    found = panel_of_closes(closes)
    assert found.dates.tolist() == day[1:]
    assert found.gaps == [Gap("A", day[3], day[4]), Gap("B", day[1], day[1]), Gap("B", day[5], day[5])]
    common = found.history(("B", "A"), days=3, days_min=1)
    assert common.dates.tolist() == [day[2]]
    assert common.returns.tolist() == [[pytest.approx(0.1), pytest.approx(-0.1)]]
    windowed = panel_of_closes(closes, day[2], day[4])
    assert windowed.dates.tolist() == day[3:5]
    assert windowed.returns == pytest.approx(found.returns[2:4], nan_ok=True)


def test_assets_without_any_close() -> None:
    nothing = panel_of_closes({"A": {}}, START, START + timedelta(days=3))
    assert nothing.gaps == [Gap("A", START + timedelta(days=1), START + timedelta(days=3))]
    assert panel_of_closes({"A": {}}).returns.shape == (0, 1)


@given(present=st.lists(st.booleans(), min_size=2, max_size=40))
@DRAWN
def test_the_gaps_are_the_days_without_a_return(present: list[bool]) -> None:
    days = [START + timedelta(days=k) for k in range(len(present))]
    closes = {day: 1.0 + k for k, (day, here) in enumerate(zip(days, present, strict=True)) if here}
    found = panel_of_closes({"A": closes}, days[0], days[-1])
    missing = {gap.first + timedelta(days=k) for gap in found.gaps for k in range(gap.days)}
    assert missing == {days[k] for k in range(1, len(days)) if not (present[k] and present[k - 1])}
    assert len(found.gaps) == len({gap.first for gap in found.gaps})


@given(dropped=st.sets(st.integers(1, 18), max_size=10))
@DRAWN
def test_rows_that_lack_and_rows_without_a_close_are_the_same(dropped: set[int]) -> None:
    dates = np.datetime64(START) + np.arange(20)
    closes = np.exp(np.random.default_rng(1).normal(0, 0.1, (20, 2)))
    keep = [k for k in range(20) if k not in dropped]
    holed = closes.copy()
    holed[sorted(dropped)] = np.nan
    without = Panel.from_closes(("A", "B"), dates[keep], closes[keep])
    assert without.dates.tolist() == dates[1:].tolist()
    assert without.returns == pytest.approx(Panel.from_closes(("A", "B"), dates, holed).returns, nan_ok=True)
