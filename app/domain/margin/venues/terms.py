"""What every venue's parameters and inputs have in common: frozen fields with bounds, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from app.errors import FieldError, pointer_to

T = TypeVar("T")

ITEMS_MAX = 100
"""Scenarios, tiers or other rows of one parameter."""
AMOUNT_MAX = 1e15


def bounded(default: T, low: float = 0.0, high: float = AMOUNT_MAX) -> T:
    """Return a dataclass field whose numbers, however deep in tuples, lie within [low, high]; None is left out."""
    return field(default=default, metadata={"bounds": (low, high)})


@dataclass(frozen=True, slots=True)
class _Bounded:
    def faults(self) -> Iterator[FieldError]:
        """Yield what is out of range, or contradicts another field; pointers start with the field's name."""
        found = False
        for known in fields(self):
            for error in _faults(known.name, getattr(self, known.name), *known.metadata["bounds"]):
                found = True
                yield error
        if not found:
            yield from (FieldError(pointer_to(name), "out_of_order", detail) for name, detail in self.contradictions())

    def contradictions(self) -> Iterable[tuple[str, str]]:
        """Return fields, each within its bounds, that contradict others, with a sentence on each."""
        return ()


class VenueParameters(_Bounded):
    """Factors that a venue publishes for one underlying. Every field is `bounded` and has the published default."""

    __slots__ = ()


class VenueInputs(_Bounded):
    """What of one underlying only the caller knows. Every field is `bounded` and None where it is not supplied."""

    __slots__ = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of what was not supplied."""
        return tuple(known.name for known in fields(self) if getattr(self, known.name) is None)


def _faults(name: str, value: Any, low: float, high: float) -> Iterator[FieldError]:
    if isinstance(value, tuple) and not 1 <= len(value) <= ITEMS_MAX:
        yield FieldError(pointer_to(name), "too_many_items", f"{name} has 1 to {ITEMS_MAX} items.")
    elif not all(low <= number <= high and math.isfinite(number) for number in _numbers(value)):
        yield FieldError(pointer_to(name), "out_of_range", f"{name} must be >= {low:g} and <= {high:g}.")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif value is not None:
        yield value
