"""Reverse stress: the smallest move of prices, each way, to breach, to liquidation, to no equity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize.elementwise import find_root

from app.domain.black76 import Floats
from app.domain.curves import SEARCH_GRID, Figures
from app.domain.portfolio import Rows
from app.domain.stress import StressAccount, is_breached, pool_figures, price_shocks

Boundary = Literal["breach", "liquidation", "zero_equity"]
BOUNDARIES: tuple[Boundary, ...] = ("breach", "liquidation", "zero_equity")

_NOISE = 1e-13
"""Of the largest figure: a surplus that is nothing but rounding crosses no boundary."""
_MOVE_TOLERANCE = 1e-14


@dataclass(frozen=True, slots=True)
class Reach:
    """The smallest relative fall and rise that reach a boundary; None: none does. Both are 0 where it is reached."""

    down: float | None
    up: float | None
    already: bool


@dataclass(frozen=True, slots=True)
class ReverseStress:
    """By boundary: the move that all prices but stablecoins' make together, and that of each asset alone."""

    common: Mapping[Boundary, Reach]
    by_asset: Mapping[str, Mapping[Boundary, Reach]]


def reverse_stress(account: StressAccount) -> ReverseStress:
    """Return the moves after which the account sits on each boundary, volatilities unchanged.

    Breach is utilization at the policy's level or equity below required maintenance, liquidation the latter alone; all
    of what shares the collateral. Moves lie between a millionth of the price and a thousandfold; two crossings closer
    to each other than half a percent (near no move, coarser far out) may be missed. Stablecoins have no move here.
    """
    loose = ~account.table.stable
    coins = np.flatnonzero(loose)
    directions = np.concatenate([loose[None, :].astype(np.float64), np.eye(len(loose))[coins]])
    reaches = _reaches(account, directions)
    return ReverseStress(
        common=reaches[0],
        by_asset={account.names[j]: reaches[k + 1] for k, j in enumerate(coins.tolist())},
    )


def _reaches(account: StressAccount, directions: Floats) -> list[Mapping[Boundary, Reach]]:
    """Return the reaches along each direction (L, J)."""
    lines = np.repeat(np.arange(len(directions)), len(SEARCH_GRID))
    moves = np.tile(SEARCH_GRID, len(directions))
    values = _surpluses(account, directions, lines, moves).reshape(3, len(directions), len(SEARCH_GRID))
    noise = _NOISE * np.abs(values).max(axis=(1, 2))
    crossings = _crossings(values, noise)
    roots = _refined(account, directions, crossings, noise)
    already = _already(account)
    return [_by_boundary(roots, line, already) for line in range(len(directions))]


def _already(account: StressAccount) -> tuple[bool, bool, bool]:
    """Whether each boundary is reached as prices are."""
    here = pool_figures(account, price_shocks(np.zeros((len(account.names), 1))))
    breached = is_breached(here, account.parameters.policy.breach_utilization)
    return bool(breached[0]), bool(here.equity[0] < here.maintenance[0]), bool(here.equity[0] < 0.0)


def _surpluses(account: StressAccount, directions: Floats, lines: Rows, moves: Floats) -> Floats:
    """Return what is left before utilization breaches, before liquidation, and of equity, USD (3, M), at moves (M,)."""
    figures = pool_figures(account, price_shocks((directions[lines] * moves[:, None]).T))
    return _left(figures, account.parameters.policy.breach_utilization)


def _left(figures: Figures, breach_utilization: float) -> Floats:
    equity = figures.equity
    return np.array([breach_utilization * equity - figures.initial, equity - figures.maintenance, equity])


@dataclass(frozen=True, slots=True)
class _Crossings:
    """Brackets (M,), each of one surplus along one line on one side: a move before its boundary, and one beyond it."""

    surplus: Rows
    line: Rows
    near: Floats
    far: Floats


def _crossings(values: Floats, noise: Floats) -> _Crossings:
    """Return the first crossing on either side of no move, values (3, L, K) on the grid."""
    still = int(np.argmin(np.abs(SEARCH_GRID)))
    beyond = values < -noise[:, None, None]
    found: list[tuple[int, int, float, float]] = []
    for sign in (-1, 1):
        side = beyond[:, :, still::sign]
        for surplus, line in np.argwhere(side.any(axis=2) & ~side[:, :, 0]).tolist():
            k = still + sign * int(np.argmax(side[surplus, line]))
            found.append((surplus, line, float(SEARCH_GRID[k - sign]), float(SEARCH_GRID[k])))
    surpluses, lines, near, far = zip(*found, strict=True) if found else ((), (), (), ())
    return _Crossings(np.array(surpluses, dtype=np.intp), np.array(lines, dtype=np.intp), np.array(near), np.array(far))


_Root = tuple[int, int, float]
"""A surplus, a line, and the move at which the one is used up along the other."""


def _refined(account: StressAccount, directions: Floats, found: _Crossings, noise: Floats) -> list[_Root]:
    """Return the roots within the brackets, all of them refined together."""
    if not len(found.line):
        return []

    def left(moves: Floats, surplus: Rows, line: Rows) -> Floats:
        values = _surpluses(account, directions, line, moves)
        return values[surplus, np.arange(len(moves))] + noise[surplus]

    brackets = (found.near, found.far)
    result = find_root(left, brackets, args=(found.surplus, found.line), tolerances={"xatol": _MOVE_TOLERANCE})
    # a surplus within rounding of nothing may change its sign with the company it is computed in
    moves = np.where(result.success, result.x, found.near)
    return list(zip(found.surplus.tolist(), found.line.tolist(), moves.tolist(), strict=True))


def _by_boundary(roots: list[_Root], line: int, already: tuple[bool, bool, bool]) -> dict[Boundary, Reach]:
    """Return the nearest roots of a line each way; a breach is of utilization or of maintenance."""
    own = [(surplus, move) for surplus, at, move in roots if at == line]
    of: dict[Boundary, tuple[int, ...]] = {"breach": (0, 1), "liquidation": (1,), "zero_equity": (2,)}
    return {
        boundary: _reach([move for surplus, move in own if surplus in of[boundary]], already=there)
        for boundary, there in zip(BOUNDARIES, already, strict=True)
    }


def _reach(moves: list[float], *, already: bool) -> Reach:
    if already:
        return Reach(0.0, 0.0, already=True)
    down = max((move for move in moves if move < 0.0), default=None)
    up = min((move for move in moves if move >= 0.0), default=None)
    return Reach(down, up, already=False)
