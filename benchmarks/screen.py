"""Is the screen fast? All accounts re-margined after a tick, beside plain numpy and the memory's bandwidth, in one run.

Run with `python -m benchmarks.screen`, with `--load` to measure the load out of Postgres as well (a minute more).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from app.db import embedded, migrate
from app.db.session import Database, parse_database_url
from app.domain.black76 import Floats
from app.domain.book_columns import BookColumns
from app.domain.screen import Screen
from app.domain.screen_scenarios import Exposures, scenario_pnl
from app.services import screen_book
from app.settings import Settings
from benchmarks.fleet import fleet, market
from benchmarks.store import store

ACCOUNTS, POSITIONS, SCENARIOS, THREADS = 100_000, 10, 64, 2
ROUNDS = 7
COPIED_BYTES = 256_000_000

Seconds = tuple[float, float]
"""Best wall and best processor time."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--load", action="store_true", help="load 1 M positions out of Postgres")
    arguments = parser.parse_args()
    parameters, prices = market()
    columns = fleet(ACCOUNTS, POSITIONS, prices)
    before = _resident()
    screen = Screen(parameters, prices)
    screen.update(columns)
    table = Table("work", "ms", "CPU ms", "plain numpy, ms", "ratio", "target, ms", title=_title(screen))
    bandwidth = _bandwidth()
    _add_ticks(table, screen, columns, prices)
    own = _resident() - before
    _add_scenarios(table, screen, prices)
    if arguments.load:
        table.add_row("load 1 M positions", *_shown(_load(columns, prices)), "", "", "<= 2,500")
    console = Console(width=120)
    console.print(table)
    read = 8 * 9 * len(columns.positions.account)
    console.print(
        f"memory copied at {bandwidth / 1e9:.1f} GB/s, one thread: the {read / 1e6:.0f} MB that a tick of every price"
        f" reads at least take {read / bandwidth * 1e3:.0f} ms. The screen"
        f" takes {own / 1e6:,.0f} MB at its peak, target 1,000."
    )


def _title(screen: Screen) -> str:
    held = len(screen.board.symbols) - 1
    return f"{len(screen):,} accounts x {POSITIONS} positions, {held} markets; {len(screen.candidates()):,} candidates"


def _add_ticks(table: Table, screen: Screen, columns: BookColumns, prices: dict[str, float]) -> None:
    steps = itertools.count(1)

    def moved(names: list[str]) -> dict[str, float]:
        factor = 1.0 + 1e-4 * (next(steps) % 7 + 1)
        return {name: prices[name] * factor for name in names}

    every = list(prices)
    ours = _best(lambda: screen.candidates(screen.tick(moved(every)).accounts))
    plain = _best(lambda: plain_cross(columns, screen, prices), rounds=3)
    table.add_row("tick of every price, candidates found", *_shown(ours), *_against(plain, ours), "<= 100")
    holders = np.bincount(columns.positions.symbol, minlength=len(columns.symbols))
    median = columns.symbols[int(np.argsort(holders)[len(holders) // 2])]
    one = _best(lambda: screen.candidates(screen.tick(moved([median])).accounts), rounds=50)
    touched = len(screen.tick(moved([median])).accounts)
    table.add_row(f"tick of the median market, {touched:,} holders", *_shown(one), *_against(plain, one), "<= 2")
    some = screen.columns()
    single = fleet(1, POSITIONS, prices)
    renamed = BookColumns(**{n: getattr(single, n) for n in single.__slots__} | {"agents": [some.agents[5]]})
    table.add_row("one account's book replaced", *_shown(_best(lambda: screen.update(renamed), rounds=50)), "", "", "")


def _add_scenarios(table: Table, screen: Screen, prices: dict[str, float]) -> None:
    rng = np.random.default_rng(4)
    moves = rng.uniform(-0.3, 0.3, (len(screen.board.assets), SCENARIOS))
    plain = _best(lambda: plain_scenarios(screen.exposures(), moves), rounds=2)
    with ThreadPoolExecutor(THREADS) as pool:
        for name, spread in (("one thread", map), (f"{THREADS} threads", pool.map)):
            ours = _best(lambda spread=spread: scenario_pnl(screen.exposures(), moves, spread))  # type: ignore[misc]
            table.add_row(f"{SCENARIOS} scenarios, {name}", *_shown(ours), *_against(plain, ours), "")
        steps = itertools.count(1)

        def both() -> None:
            screen.tick({name: price * (1.0 + 1e-4 * (next(steps) % 7)) for name, price in prices.items()})
            scenario_pnl(screen.exposures(), moves, pool.map)

        table.add_row(f"tick of every price and {SCENARIOS} scenarios", *_shown(_best(both)), "", "", "<= 100")


def plain_cross(columns: BookColumns, screen: Screen, prices: dict[str, float]) -> Floats:
    """Return each account's equity from profit and loss less its margin at one rate, netted by market: no modes."""
    p = columns.positions
    mark = np.array([prices[s] for s in columns.symbols])[p.symbol]
    equity = np.zeros(len(screen))
    np.add.at(equity, p.account, p.size * (mark - p.entry_price))
    net = np.zeros((len(screen), len(columns.symbols)))
    np.add.at(net, (p.account, p.symbol), p.size * mark)
    equity -= 0.15 * np.abs(net).sum(axis=1)
    return equity


def plain_scenarios(parts: tuple[Exposures, ...], moves: Floats) -> Floats:
    """Return each account's profit and loss in each scenario, one scenario after the other, in double precision."""
    count = len(parts[0].indptr) - 1
    result = np.zeros((count, moves.shape[1]))
    for part in parts:
        owner = np.repeat(np.arange(count), np.diff(part.indptr))
        for s in range(moves.shape[1]):
            result[:, s] += np.bincount(owner, part.value * moves[part.asset, s], count)
    return result


def _load(columns: BookColumns, prices: dict[str, float]) -> Seconds:
    """Return the best seconds of a load out of a server of its own."""

    async def measured(url: str) -> Seconds:
        await store(url, columns, prices)
        database = Database(parse_database_url(url), Settings())
        walls, cpus = [], []
        for _ in range(4):
            wall, cpu = time.perf_counter(), time.process_time()
            await screen_book.load_all(database)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        await database.close()
        return min(walls), min(cpus)

    with tempfile.TemporaryDirectory() as home, embedded.start(Path(home)) as server:
        asyncio.run(migrate.upgrade(parse_database_url(server.url)))
        return uvloop.run(measured(server.url))


def _bandwidth() -> float:
    """Return the bytes a second, read and written, of a copy that no cache holds."""
    source = np.ones(COPIED_BYTES // 8)
    target = np.empty_like(source)
    return 2 * COPIED_BYTES / _best(lambda: np.copyto(target, source))[0]


def _best(call: Callable[[], object], rounds: int = ROUNDS) -> Seconds:
    walls, cpus = [], []
    call()
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def _shown(seconds: Seconds) -> tuple[str, str]:
    return f"{seconds[0] * 1e3:,.2f}", f"{seconds[1] * 1e3:,.2f}"


def _against(plain: Seconds, ours: Seconds) -> tuple[str, str]:
    return f"{plain[0] * 1e3:,.1f}", f"{plain[1] / ours[1]:,.1f}x"


def _resident() -> int:
    """Return the most memory that the process has had, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
