"""Named and own scenario sets: joint moves of price and volatility, with a weight on the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from app.domain.black76 import PRICE_FACTOR_MIN, Floats


@dataclass(frozen=True, slots=True)
class Scenario:
    """One joint move: relative price move, relative volatility move, own moves of single underlyings.

    With `in_ranges` the price move is a multiple of each underlying's own price range R.
    """

    price_move: float
    vol_move: float
    shocks: Mapping[str, float] = field(default_factory=dict)
    weight: float = 1.0
    in_ranges: bool = False


def _plain(*pairs: tuple[float, float]) -> tuple[Scenario, ...]:
    return tuple(Scenario(price, vol) for price, vol in pairs)


_THIRDS = (0.0, 1 / 3, -1 / 3, 2 / 3, -2 / 3, 1.0, -1.0)


@lru_cache(maxsize=16)
def span_scenarios(vol_range: float, tail_multiple: float, tail_weight: float) -> tuple[Scenario, ...]:
    """Return the sixteen SPAN scenarios in order: seven prices with vol up then down, two weighted tails."""
    body = tuple(Scenario(third, direction * vol_range, in_ranges=True) for third in _THIRDS for direction in (1, -1))
    tails = tuple(Scenario(sign * tail_multiple, 0.0, weight=tail_weight, in_ranges=True) for sign in (1.0, -1.0))
    return body + tails


NAMED: Mapping[str, tuple[Scenario, ...]] = MappingProxyType(
    {
        "moderate": _plain((-0.10, 0.25), (-0.05, 0.10), (0.05, 0.10), (0.10, -0.15), (-0.15, 0.35), (0.15, -0.20)),
        "wide": _plain((-0.20, 0.40), (-0.10, 0.25), (-0.05, 0.10), (0.05, 0.10), (0.10, -0.15), (0.20, -0.25)),
        "span16": span_scenarios(0.25, 2.0, 0.35),
    }
)


@dataclass(frozen=True, slots=True)
class ScenarioGrid:
    """Scenarios laid out for J underlyings: `moves`, `vol_moves` (J, S) relative; `weights` (S,).

    With `term_scaled` an option's volatility move is multiplied by its term factor.
    """

    moves: Floats
    vol_moves: Floats
    weights: Floats
    term_scaled: bool = False


def floored(moves: Floats) -> Floats:
    """Return the moves with S(1+m) floored at a millionth of S."""
    return np.maximum(moves, PRICE_FACTOR_MIN - 1.0)


def lay_out(scenarios: Sequence[Scenario], underlyings: Sequence[str], price_range: Floats) -> ScenarioGrid:
    """Return the grid of the scenarios over the underlyings; `price_range` (J,)."""
    moves = np.array([s.price_move for s in scenarios], dtype=np.float64)
    vols = np.array([s.vol_move for s in scenarios], dtype=np.float64)
    weights = np.array([s.weight for s in scenarios], dtype=np.float64)
    scale = np.array([s.in_ranges for s in scenarios])
    by_underlying = np.where(scale, moves * price_range[:, None], moves)
    if any(s.shocks for s in scenarios):
        by_underlying = _with_shocks(by_underlying, scenarios, underlyings)
    vol_moves = np.broadcast_to(vols, by_underlying.shape)
    return ScenarioGrid(floored(by_underlying), vol_moves, weights)


def scan(
    price_range: Floats,
    volatility_range: Floats,
    multiples: Floats,
    directions: Floats,
    weights: Floats,
    *,
    term_scaled: bool,
) -> ScenarioGrid:
    """Return the grid in which each underlying moves by multiples (S,) of its own ranges (J,)."""
    return ScenarioGrid(
        moves=floored(price_range[:, None] * multiples),
        vol_moves=volatility_range[:, None] * directions,
        weights=weights,
        term_scaled=term_scaled,
    )


def _with_shocks(moves: Floats, scenarios: Sequence[Scenario], underlyings: Sequence[str]) -> Floats:
    row = {name: j for j, name in enumerate(underlyings)}
    shocked = moves.copy()
    for s, scenario in enumerate(scenarios):
        for name, move in scenario.shocks.items():
            if name in row:
                shocked[row[name], s] = move
    return shocked
