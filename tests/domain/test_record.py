"""Records: what a frozen dataclass is to its callers, they are too."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest

from app.domain.record import record


@record(frozen=True, slots=True)
class Recorded:
    """A record."""

    name: str
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class Frozen:
    """The same, frozen at run time."""

    name: str
    value: float = 0.0


@record(frozen=True, eq=False)
class Unique:
    """A record that is compared by identity."""

    value: float


def test_a_record_compares_and_hashes_by_its_fields() -> None:
    assert Recorded("a") == Recorded("a", 0.0) != Recorded("a", 1.0)
    assert len({Recorded("a"), Recorded("a"), Recorded("b")}) == 2
    assert hash(Recorded("a", 2.0)) == hash(Frozen("a", 2.0))


def test_a_record_can_be_replaced_and_gets_no_new_fields() -> None:
    changed = replace(Recorded("a", 1.0), value=2.0)
    assert (changed.name, changed.value) == ("a", 2.0)
    assert Recorded.__slots__ == Frozen.__slots__


def test_a_record_without_equality_is_itself_alone() -> None:
    one = Unique(1.0)
    assert one != Unique(1.0)
    assert len({one, one, Unique(1.0)}) == 2


def test_what_a_record_leaves_out() -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(Frozen("a"), "value", 1.0)  # noqa: B010  the type checker would refuse the plain assignment
    made = Recorded("a")
    setattr(made, "value", 1.0)  # noqa: B010  and refuses it here too, where nothing else does
    assert made.value == 1.0
