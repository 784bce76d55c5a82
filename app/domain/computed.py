"""Values that follow from a frozen object, computed when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class computed(Generic[T]):  # noqa: N801  used as a decorator, like `property`
    """As `functools.cached_property`, which before Python 3.12 takes a lock each time: a quote computes twenty of them.

    Two threads may both compute a value; the object is frozen, so that both find the same.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        """Remember under which name the value is kept."""
        self._name = name

    def __get__(self, instance: Any, owner: type) -> T:
        """Return the value, and keep it where the next look finds it first."""
        value = instance.__dict__[self._name] = self._compute(instance)
        return value
