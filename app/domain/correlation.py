"""Correlation matrices: built from a table of pairs, checked, and repaired to the nearest correlation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from scipy.linalg.lapack import dpotrf

from app.domain.black76 import Floats
from app.domain.parameters import CorrelationTable

REPAIR_SIZE_MAX = 40
"""Largest matrix that is repaired: the eigendecompositions grow with its cube."""


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


def nearest_correlation(matrix: Floats, tolerance: float = 1e-12, rounds_max: int = 500) -> Floats:
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


def _semidefinite_part(matrix: Floats) -> Floats:
    values, vectors = np.linalg.eigh(matrix)
    return cast("Floats", (vectors * np.maximum(values, 0.0)) @ vectors.T)
