"""Nearest correlation matrices, and the matrices that portfolio margin is joined with."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from types import MappingProxyType

import numpy as np
import pytest

from app.domain.black76 import Floats
from app.domain.correlation import correlation_matrix, is_positive_semidefinite, nearest_correlation, repaired
from app.domain.parameters import CorrelationTable, MarketParameters
from tests.domain.book import Book, linear
from tests.domain.reference import HEDGE, STRESS, correlation

HIGHAM = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
NAMES = ("BTC", "ETH", "SOL", "BNB", "DOGE", "XRP")


def correlations(size: int, count: int, seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    for k in range(count):
        factors = rng.standard_normal((size, 1 + k % size))
        factors /= np.linalg.norm(factors, axis=1, keepdims=True)
        yield factors @ factors.T


def invalid_matrices() -> Iterator[Floats]:
    rng = np.random.default_rng(7)
    for size in (3, 4, 6, 10):
        upper = np.triu(rng.choice((-0.9, 0.9), (size, size)), 1)
        upper[0, 1:3], upper[1, 2] = 0.9, -0.9  # two that both follow a third can't oppose each other
        yield upper + upper.T + np.eye(size)


def test_highams_example() -> None:
    nearest = nearest_correlation(HIGHAM)
    assert nearest[0, 1] == pytest.approx(0.7607, abs=5e-5)
    assert nearest[1, 2] == pytest.approx(0.7607, abs=5e-5)
    assert nearest[0, 2] == pytest.approx(0.1573, abs=5e-5)
    assert np.linalg.norm(nearest - HIGHAM) == pytest.approx(0.5278, abs=5e-5)


@pytest.mark.parametrize("matrix", [HIGHAM, *invalid_matrices()])
def test_nearest_is_a_correlation_and_none_is_nearer(matrix: Floats) -> None:
    nearest = nearest_correlation(matrix)
    assert np.diag(nearest) == pytest.approx(np.ones(len(matrix)))
    assert nearest == pytest.approx(nearest.T)
    assert np.linalg.eigvalsh(nearest).min() > -1e-7
    distance = np.linalg.norm(nearest - matrix)
    for other in correlations(len(matrix), 400, seed=11):
        assert np.linalg.norm(other - matrix) >= distance - 1e-9
        # a projection on a convex set: no way into the set makes an acute angle with what was cut off
        assert float(((matrix - nearest) * (other - nearest)).sum()) <= 1e-6


@pytest.mark.parametrize("matrix", [HIGHAM, *invalid_matrices()])
def test_statsmodels_finds_none_nearer(matrix: Floats) -> None:
    tools = pytest.importorskip("statsmodels.stats.correlation_tools")
    with warnings.catch_warnings():
        # it says that its rounds are used up
        warnings.simplefilter("ignore")
        theirs = tools.corr_nearest(matrix, threshold=0.0, n_fact=1_000)
    nearest = nearest_correlation(matrix)
    assert np.linalg.norm(nearest - matrix) <= np.linalg.norm(theirs - matrix) + 1e-9
    assert nearest == pytest.approx(theirs, abs=2e-3)
    assert repaired(matrix).matrix == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("matrix", list(correlations(5, 5, seed=3)))
def test_a_correlation_is_its_own_nearest(matrix: Floats) -> None:
    assert is_positive_semidefinite(matrix)
    assert nearest_correlation(matrix) == pytest.approx(matrix, abs=1e-9)


@pytest.mark.parametrize("matrix", [HIGHAM, *invalid_matrices()])
def test_an_indefinite_matrix_is_seen(matrix: Floats) -> None:
    assert not is_positive_semidefinite(matrix)


def test_seeded_tables() -> None:
    parameters = MarketParameters()
    stress, hedge = correlation_matrix(NAMES, parameters.stress), correlation_matrix(NAMES, parameters.hedge)
    for (i, a), (j, b) in itertools.product(enumerate(NAMES), enumerate(NAMES)):
        assert stress[i, j] == correlation(STRESS, 0.80, a, b)
        assert hedge[i, j] == correlation(HEDGE, 0.40, a, b)


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=len(NAMES))))
def test_every_signed_matrix_of_the_seeds_is_semidefinite(signs: tuple[int, ...]) -> None:
    signed = np.array(
        [
            [
                correlation(STRESS, 0.80, a, b) if signs[i] == signs[j] else correlation(HEDGE, 0.40, a, b)
                for j, b in enumerate(NAMES)
            ]
            for i, a in enumerate(NAMES)
        ]
    )
    assert np.linalg.eigvalsh(signed).min() > 0
    rows = tuple(
        linear(f"{a}-PERP", "long" if s > 0 else "short", 1_000.0 * (i + 1), mark_price=1.0)
        for i, (a, s) in enumerate(zip(NAMES, signs, strict=True))
    )
    result = Book(rows=rows, prices={}).quote(models=("portfolio",)).models["portfolio"]
    assert result.notes["correlation_repaired"] is False
    widths = np.array([0.15, 0.15, 0.20, 0.20, 0.30, 0.30])
    d = np.array(signs) * 1_000 * np.arange(1, 7) * widths
    assert result.notes["joint"] == pytest.approx(np.sqrt(d @ signed @ d), rel=1e-9)


def test_an_override_that_is_no_correlation_is_repaired_and_said_so() -> None:
    pairs = MappingProxyType({("BTC", "ETH"): 1.0, ("ETH", "SOL"): 1.0, ("BTC", "SOL"): 0.0})
    rows = tuple(linear(f"{a}-PERP", "long", 1_000.0, mark_price=1.0) for a in ("BTC", "ETH", "SOL"))
    book = Book(rows=rows, prices={}, stress=CorrelationTable(pairs, 0.8))
    result = book.quote().models["portfolio"]
    assert result.notes["correlation_repaired"] is True
    assert result.notes["correlation_repair_distance"] == pytest.approx(0.5278, abs=5e-5)
    repaired = np.array([[1, 0.760690, 0.157298], [0.760690, 1, 0.760690], [0.157298, 0.760690, 1]])
    d = np.array([150.0, 150.0, 200.0])
    assert result.notes["joint"] == pytest.approx(np.sqrt(d @ repaired @ d), rel=1e-5)


def test_a_hedge_table_that_is_no_correlation_is_repaired_too() -> None:
    pairs = MappingProxyType({("BTC", "ETH"): 0.99, ("BTC", "SOL"): 0.99})
    rows = (
        linear("BTC-PERP", "long", 1_000.0, mark_price=1.0),
        linear("ETH-PERP", "short", 1_000.0, mark_price=1.0),
        linear("SOL-PERP", "short", 1_000.0, mark_price=1.0),
    )
    stress = CorrelationTable(MappingProxyType({("ETH", "SOL"): 0.1}), 0.8)
    result = Book(rows=rows, prices={}, stress=stress, hedge=CorrelationTable(pairs, 0.4)).quote().models["portfolio"]
    assert result.notes["correlation_repaired"] is True
    assert result.initial_margin > 0
