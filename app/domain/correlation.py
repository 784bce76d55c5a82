"""Correlation matrices: built from a table of pairs, checked, and repaired to the nearest correlation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from scipy.linalg.lapack import dpotrf

from app.domain.black76 import Floats
from app.domain.parameters import CorrelationTable

REPAIR_SIZE_MAX = 40
"""Largest matrix that is repaired: the eigendecompositions grow with its cube."""
_ROUNDS, _ROUNDS_LARGE = 500, 20


def correlation_matrix(names: Sequence[str], table: CorrelationTable) -> Floats:
    """Return the (J, J) matrix of the table over the names; a pair not listed takes the table's `other`."""
    matrix = np.full((len(names), len(names)), table.other)
    np.fill_diagonal(matrix, 1.0)
    row = {name: j for j, name in enumerate(names)}
    for (a, b), rho in table.pairs.items():
        if a in row and b in row:
            matrix[row[a], row[b]] = matrix[row[b], row[a]] = rho
    return matrix


def is_positive_semidefinite(matrix: Floats, tolerance: float = 1e-10) -> bool:
    """Return whether no eigenvalue lies below -tolerance, by one Cholesky of the matrix lifted by it."""
    lifted = matrix.copy()
    lifted.flat[:: len(matrix) + 1] += tolerance
    _, failed_at = dpotrf(lifted, overwrite_a=True)
    return bool(failed_at == 0)


def nearest_correlation(matrix: Floats, tolerance: float = 1e-12, rounds_max: int = _ROUNDS) -> Floats:
    """Return the correlation matrix nearest in the Frobenius norm, (J, J).

    Higham 2002, "Computing the nearest correlation matrix": alternating projections on the semidefinite cone
    and on unit diagonals with Dykstra's correction.
    """
    current, correction = matrix.copy(), np.zeros_like(matrix)
    for _ in range(rounds_max):
        shifted = current - correction
        cone = _semidefinite_part(shifted)
        correction = cone - shifted
        unit = cone.copy()
        np.fill_diagonal(unit, 1.0)
        moved = np.linalg.norm(unit - current)
        current = unit
        if moved <= tolerance * np.linalg.norm(current):
            break
    return current


@dataclass(frozen=True, slots=True)
class Repaired:
    """A correlation matrix (J, J) and its Frobenius distance from the one that was asked for, 0 where that was one."""

    matrix: Floats
    distance: float


def repaired(matrix: Floats) -> Repaired:
    """Return the matrix (J, J), unit diagonal, or where it is not positive semidefinite the nearest that is.

    Past REPAIR_SIZE_MAX it is a near one: a few rounds of the same projections. No eigenvalue of the result is negative
    but for rounding, since the last step scales a semidefinite matrix to a unit diagonal.
    """
    if is_positive_semidefinite(matrix):
        return Repaired(matrix, 0.0)
    rounds = _ROUNDS if len(matrix) <= REPAIR_SIZE_MAX else _ROUNDS_LARGE
    cone = _semidefinite_part(nearest_correlation(matrix, rounds_max=rounds))
    scale = 1.0 / np.sqrt(np.diag(cone))
    found = cone * scale[:, None] * scale
    np.fill_diagonal(found, 1.0)
    return Repaired(found, float(np.linalg.norm(found - matrix)))


def _semidefinite_part(matrix: Floats) -> Floats:
    values, vectors = np.linalg.eigh(matrix)
    return cast("Floats", (vectors * np.maximum(values, 0.0)) @ vectors.T)
