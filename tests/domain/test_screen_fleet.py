"""The benchmark's fleet in small: whom a tick touches, scenarios against plain numpy, many books replaced."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from app.domain.screen import Screen
from app.domain.screen_scenarios import scenario_pnl
from benchmarks.fleet import fleet, market
from benchmarks.screen import plain_scenarios

ACCOUNTS = 1_000
PARAMETERS, PRICES = market()
COLUMNS = fleet(ACCOUNTS, 10, PRICES)


@pytest.fixture
def screen() -> Screen:
    made = Screen(PARAMETERS, PRICES)
    made.update(COLUMNS)
    return made


def test_a_tick_touches_exactly_the_holders(screen: Screen) -> None:
    symbol = COLUMNS.symbols[100]
    held = np.unique(COLUMNS.positions.account[COLUMNS.positions.symbol == 100])
    assert np.array_equal(screen.tick({symbol: PRICES[symbol] * 1.01}).accounts, held)
    assert len(screen.tick({symbol: PRICES[symbol] * 1.01}).accounts) == 0
    assert len(screen.tick({"NOBODY": 1.0}).accounts) == 0


def test_a_few_ticks_leave_the_figures_of_one_of_every_price(screen: Screen) -> None:
    moved = {name: price * 1.02 for name, price in PRICES.items()}
    for name, price in moved.items():
        screen.tick({name: price})
    other = Screen(PARAMETERS, moved)
    other.update(COLUMNS)
    np.testing.assert_allclose(screen.figures().equity, other.figures().equity, rtol=1e-12)
    np.testing.assert_allclose(screen.figures().required_initial, other.figures().required_initial, rtol=1e-12)
    assert np.array_equal(screen.candidates(), other.candidates())


def test_scenarios_are_those_of_plain_numpy(screen: Screen) -> None:
    moves = np.random.default_rng(5).uniform(-0.3, 0.3, (len(screen.board.assets), 8))
    expected = plain_scenarios(screen.exposures(), moves)
    with ThreadPoolExecutor(2) as pool:
        for spread in (map, pool.map):
            found = scenario_pnl(screen.exposures(), moves, spread)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1.0)  # of some 100,000 gross


def test_books_may_shrink_and_grow_and_come_back(screen: Screen) -> None:
    before = screen.figures()
    p = COLUMNS.positions
    kept = (p.account % 3 != 0) | (p.symbol % 2 == 0)
    names = ("account", "symbol", "size", "entry_price", "leverage", "isolated", "allocated")
    fewer = replace(p, **{name: getattr(p, name)[kept] for name in names})
    screen.update(replace(COLUMNS, positions=fewer))
    assert not np.array_equal(screen.figures().required_initial, before.required_initial)
    screen.update(COLUMNS)
    np.testing.assert_allclose(screen.figures().required_initial, before.required_initial, rtol=1e-12)
    np.testing.assert_allclose(screen.under(PARAMETERS).figures().equity, before.equity, rtol=1e-12)


def test_an_open_call_is_a_candidate(screen: Screen) -> None:
    calm = int(np.argmin(screen.figures().utilization))
    assert calm not in screen.candidates()
    screen.update(replace(COLUMNS, open_call=np.arange(ACCOUNTS) == calm))
    assert calm in screen.candidates()
