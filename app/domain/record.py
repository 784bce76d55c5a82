"""Frozen dataclasses that are made by the dozen: `record` takes what `dataclasses.dataclass` does.

The type checker sees a frozen dataclass, and refuses an assignment. At run time the class is a plain one: Python's own
freezing writes each field through `object.__setattr__`, which took a seventh of the core of a small quote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

__all__ = ["record"]

T = TypeVar("T")

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:
    from dataclasses import dataclass

    def record(*, frozen: bool, slots: bool = False, eq: bool = True) -> Callable[[type[T]], type[T]]:
        """Return the decorator of a dataclass that compares, and where frozen hashes, by its fields."""
        return dataclass(slots=slots, eq=eq, unsafe_hash=frozen and eq)
