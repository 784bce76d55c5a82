"""Valid bodies with random wounds: never a fault of ours, and never a reply that is not strict JSON."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.api.bodies import EVERYTHING
from tests.api.service import MARGIN, problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.api.service import Service

pytestmark = pytest.mark.asyncio(loop_scope="module")

Path = tuple[str | int, ...]

EXTREMES: list[Any] = [
    0, -0.0, 1, -1, 0.5, 1e-9, 1e-300, 5e-324, 1e15, 1e16, 1e308, -1e15, 10**400, math.nan, math.inf, -math.inf,
    "0.1", "1e-300", "nan", "inf", "null", "", "BTC", "BTC-PERP", "A/B:C", "\0", "x" * 200, "long", "short", "call",
    "2027-06-25T08:00:00Z", "2026-12-25T08:00:00-23:59", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", 1829000000,
    None, True, False, [], {}, [[]], [{}], {"BTC": 1}, {"BTC": {"ETH": 1}}, "isolated", "portfolio", "cross",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(EXTREMES),
    st.floats(),
    st.floats(min_value=0, max_value=1e15, allow_subnormal=True),
    st.integers(),
    st.text(max_size=5),
    st.recursive(
        st.sampled_from(EXTREMES),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _paths(item, (*path, name))


PATHS = list(_paths(EVERYTHING))


def _wounded(path: Path, value: Any, body: Any) -> None:
    """Put a value at a path, where an earlier wound has left the path standing."""
    *steps, last = path
    try:
        for step in steps:
            body = body[step]
        if isinstance(body, dict | list):
            body[last] = value  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        return


def _strictly(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


async def _check(shared: Service, body: bytes) -> None:
    answer = await shared.post(MARGIN, content=body)
    reply = _strictly(answer.text)
    if answer.status_code != 200:
        assert answer.status_code in (400, 413, 422), answer.text
        problem(answer, answer.status_code, reply["code"])
        return
    margins = [m[n] for m in reply["models"].values() for n in ("initial_margin", "maintenance_margin")]
    figures = [reply["equity"], reply["collateral_value"], reply["unrealized_pnl"], *margins]
    assert all(isinstance(figure, float | int) for figure in figures), figures


@given(wounds=st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
async def test_wounded_bodies(shared: Service, wounds: list[tuple[Path, Any]]) -> None:
    body = copy.deepcopy(EVERYTHING)
    for path, value in wounds:
        _wounded(path, copy.deepcopy(value), body)
    await _check(shared, json.dumps(body).encode())


NUMBERS = st.floats(min_value=0, max_value=1e15, exclude_min=True) | st.sampled_from([1e-320, 1e-15, 1e-3, 1.0, 1e15])
NUMERIC = [path for path in PATHS if path[0] == "positions" and path[-1] in {
    "size", "entry_price", "mark_price", "leverage", "notional", "delta", "gamma", "vega", "strike", "iv", "rate",
    "forward", "allocated_collateral",
}]  # fmt: skip


@example(wounds=[(("positions", 5, "size"), 996_542_670_558_319.0)])
@given(wounds=st.lists(st.tuples(st.sampled_from(NUMERIC), NUMBERS), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
async def test_extreme_numbers(shared: Service, wounds: list[tuple[Path, float]]) -> None:
    """Every number that a field may take gives finite figures, without a warning from the numerics."""
    body = copy.deepcopy(EVERYTHING)
    for path, value in wounds:
        _wounded(path, value, body)
    await _check(shared, json.dumps(body).encode())


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
async def test_wounded_bytes(shared: Service, data: st.DataObject) -> None:
    raw = bytearray(json.dumps(EVERYTHING).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    await _check(shared, bytes(raw))
