"""Which accounts hold which market: the inverted index that says whom a price touches."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from app.domain.portfolio import Flags, Rows

_SHIFT = 32
_MASK = (1 << _SHIFT) - 1

Keys = NDArray[np.int64]


def pair_keys(markets: Rows, accounts: Rows) -> Keys:
    """Return one sorted number for each different pair of market and account."""
    return np.unique((markets.astype(np.int64) << _SHIFT) | accounts)


class Holders:
    """Sorted accounts by market. Exact: an account that let go of a market is no longer there."""

    def __init__(self) -> None:
        self._of: list[Rows] = []

    def change(self, before: Keys, after: Keys) -> None:
        """Take in that some accounts held the pairs `before` and hold the pairs `after` now."""
        for market, accounts in _by_market(np.setdiff1d(before, after, assume_unique=True)):
            held = self._of[market]
            self._of[market] = np.delete(held, np.searchsorted(held, accounts))
        for market, accounts in _by_market(np.setdiff1d(after, before, assume_unique=True)):
            while len(self._of) <= market:
                self._of.append(np.empty(0, dtype=np.intp))
            held = self._of[market]
            self._of[market] = np.insert(held, np.searchsorted(held, accounts), accounts)

    def mark(self, markets: Iterable[int], flags: Flags) -> None:
        """Set the flags (A,) of whoever holds any of the markets."""
        for market in markets:
            if market < len(self._of):
                flags[self._of[market]] = True

    def counts(self, markets: int) -> Rows:
        """Return how many accounts hold each of the first so many markets (markets,)."""
        held = [len(accounts) for accounts in self._of[:markets]]
        return np.array(held + [0] * (markets - len(held)), dtype=np.intp)


def _by_market(keys: Keys) -> Iterable[tuple[int, Rows]]:
    if not len(keys):
        return
    markets = keys >> _SHIFT
    starts = np.flatnonzero(np.diff(markets, prepend=-1))
    for market, part in zip(markets[starts].tolist(), np.split(keys, starts[1:]), strict=True):
        yield market, (part & _MASK).astype(np.intp)
