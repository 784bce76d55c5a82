"""A fleet's books as one: what a master and its members hold and owe together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from app.domain.book import Book, Holding

_BUCKETS = tuple(field.name for field in fields(Holding))


def merged(master: Book, members: Sequence[Book]) -> Book:
    """Return one book of a master's and its members', under the master's settings: what offsets, nets."""
    books = (master, *members)
    holdings: dict[str, Holding] = {}
    for held in books:
        for asset, units in held.holdings.items():
            known = holdings.get(asset)
            holdings[asset] = units if known is None else _sum(known, units)
    return replace(
        master,
        holdings=holdings,
        positions=[position for held in books for position in held.positions],
        reservations=[reservation for held in books for reservation in held.reservations],
        pending=[],
        loans=(),
        delegation=None,
    )


def _sum(a: Holding, b: Holding) -> Holding:
    return Holding(**{name: getattr(a, name) + getattr(b, name) for name in _BUCKETS})
