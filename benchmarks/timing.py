"""Timing for ratios: the rivals take turns, and each keeps its best, so that noise hits both alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping


def best_seconds(
    rivals: Mapping[str, Callable[[], object]], rounds: int = 7, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the best seconds a call of each rival, measured in turns of some 50 ms, by the clock given."""
    loops = {name: _loops(call) for name, call in rivals.items()}
    best = dict.fromkeys(rivals, float("inf"))
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for name, call in rivals.items():
            best[name] = min(best[name], _seconds(call, loops[name], clock))
    gc.unfreeze()
    return best


def _loops(call: Callable[[], object]) -> int:
    call()
    return max(1, int(0.05 / max(_seconds(call, 1, time.perf_counter), 1e-7)))


def _seconds(call: Callable[[], object], loops: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(loops):
        call()
    return (clock() - started) / loops
