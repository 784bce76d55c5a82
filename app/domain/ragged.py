"""Rows of many owners as columns, each owner's rows side by side, that can be replaced owner by owner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.domain.portfolio import Rows

Column = NDArray[Any]

BLANK_SHARE_MAX = 0.125
"""Share of blank rows past which all rows are moved together: each full pass reads them too."""
SPARE_SHARE = 0.0625
"""Room left at the end when the columns grow."""


class Ragged:
    """Columns of n rows, besides `owner` (n,); owner k has the rows start[k] to start[k] + count[k].

    Rows that are replaced by as many stay where they are; more or fewer go to the end, and leave blanks behind: rows
    that a full pass may read, since a blank adds nothing to any sum.
    """

    def __init__(self, blank: Mapping[str, np.generic]) -> None:
        self.start: Rows = np.zeros(0, dtype=np.intp)
        self.count: Rows = np.zeros(0, dtype=np.intp)
        self.in_order = True
        """Whether the rows stand in the order of their owners, without blanks: start is the sum of counts before."""
        self._blank = {**blank, "owner": np.intp(0)}
        self._columns: dict[str, Column] = {name: np.empty(0, value.dtype) for name, value in self._blank.items()}
        self._used = 0
        self._blanks = 0

    def __len__(self) -> int:
        return self._used

    def __getitem__(self, name: str) -> Column:
        return self._columns[name][: self._used]

    def rows(self, owners: Rows) -> tuple[Rows, Rows]:
        """Return the rows (m,) of owners (k,), and for each of them which of the k it belongs to (m,)."""
        counts = self.count[owners]
        local = np.repeat(np.arange(len(owners)), counts)
        shift = self.start[owners] - (np.cumsum(counts) - counts)
        return np.arange(len(local)) + shift[local], local

    def add_owners(self, total: int) -> None:
        """Let there be `total` owners; new ones have no rows."""
        more = total - len(self.start)
        self.start = np.concatenate([self.start, np.full(more, self._used)])
        self.count = np.concatenate([self.count, np.zeros(more, dtype=np.intp)])

    def replace(self, owners: Rows, local: Rows, columns: Mapping[str, Column]) -> None:
        """Replace all rows of owners (k,) by m others, sorted by `local` (m,): which of the k each belongs to."""
        counts = np.bincount(local, minlength=len(owners))
        stays = self.count[owners] == counts
        here = stays[local]
        rows, _ = self.rows(owners[stays])
        for name, values in columns.items():
            self._columns[name][rows] = values[here]
        moved = owners[~stays]
        if len(moved):
            self._blank_out(moved)
            self._append(moved, counts[~stays], {name: values[~here] for name, values in columns.items()})
            if self._blanks > BLANK_SHARE_MAX * self._used:
                self._reorder()
            else:
                self._look_at_order()

    def close_up(self) -> None:
        """Bring the rows into the order of their owners, without blanks."""
        if not self.in_order:
            self._reorder()

    def _blank_out(self, owners: Rows) -> None:
        rows, _ = self.rows(owners)
        for name, value in self._blank.items():
            self._columns[name][rows] = value
        self._blanks += len(rows)

    def _append(self, owners: Rows, counts: Rows, columns: Mapping[str, Column]) -> None:
        total = self._used + int(counts.sum())
        if total > len(self._columns["owner"]):
            room = int(total * (1.0 + SPARE_SHARE)) + 64
            for name, old in self._columns.items():
                self._columns[name] = np.empty(room, old.dtype)
                self._columns[name][: self._used] = old[: self._used]
        for name, values in (*columns.items(), ("owner", np.repeat(owners, counts))):
            self._columns[name][self._used : total] = values
        self.start[owners] = self._used + np.cumsum(counts) - counts
        self.count[owners] = counts
        self._used = total

    def _reorder(self) -> None:
        rows, _ = self.rows(np.arange(len(self.start)))
        for values in self._columns.values():
            values[: len(rows)] = values[rows]
        self.start = np.cumsum(self.count) - self.count
        self._used, self._blanks, self.in_order = len(rows), 0, True

    def _look_at_order(self) -> None:
        tidy = np.cumsum(self.count) - self.count
        self.in_order = self._blanks == 0 and bool((self.start == tidy)[self.count > 0].all())
        if self.in_order:
            self.start = tidy
