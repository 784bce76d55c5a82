"""Monte Carlo VaR: normal or Student-t returns of the underlyings, the book revalued in full on each path.

Paths are drawn in blocks, each from a generator of its own that the seed and the block's number fix: the figures
are the same whatever the number of threads. float32 draws and, for a linear book, float32 losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from app.domain.black76 import Floats
from app.domain.portfolio import Portfolio, Rows
from app.domain.var.parametric import checked_covariance
from app.domain.var.revalue import losses_at, not_modelled
from app.domain.var.tail import (
    YEAR_DAYS,
    Mix,
    SampleTail,
    checked_confidences,
    checked_horizon,
    largest,
    rank_of,
    ranked_tails,
)
from app.errors import invalid

Distribution = Literal["normal", "student_t"]
Floats32 = NDArray[np.float32]

PATHS_MIN = 1_000
PATHS_MAX = 1_000_000
THREADS_MAX = 2
DEGREES = 5.0
SEED_MAX = 2**63 - 1
BLOCK_DRAWS = 1 << 17
"""Draws in a block: half a megabyte, so that it is still in the cache when it is used."""


@dataclass(frozen=True, slots=True)
class MonteCarloTerms:
    """What to simulate. `degrees` of freedom > 2 are Student-t's, which is scaled to unit variance."""

    seed: int
    paths: int = 100_000
    distribution: Distribution = "normal"
    degrees: float = DEGREES
    confidences: Sequence[float] = (0.95, 0.99)
    horizon_days: float = 1.0
    threads: int = THREADS_MAX


@dataclass(frozen=True, slots=True)
class SimulatedTail:
    """One confidence's figures, USD, with their standard errors.

    `around` are the paths whose losses lie within one standard error of VaR's rank, `beyond` those ES is the mean of.
    """

    confidence: float
    value_at_risk: float
    expected_shortfall: float
    var_standard_error: float
    es_standard_error: float
    around: Mix
    beyond: Mix


@dataclass(frozen=True, slots=True)
class MonteCarloRisk:
    """VaR and ES of a book, with all that repeats them: seed, paths, distribution. `losses` (paths,) USD."""

    distribution: Distribution
    degrees: float | None
    seed: int
    paths: int
    horizon_days: float
    tails: tuple[SimulatedTail, ...]
    losses: NDArray[np.floating]
    not_modelled: tuple[str, ...]


def monte_carlo(portfolio: Portfolio, covariance: Floats, terms: MonteCarloTerms) -> MonteCarloRisk:
    """Return VaR and ES over simulated moves of the underlyings, of covariance Σ·h/365 (J, J), and mean 0.

    Student-t moves share one χ² a path, so that tails come together. A linear book is exposures by underlying, and
    not floored; else each price is floored at 1e-6 of its own. Raises InvalidError for terms that can't be.
    Source: Glasserman, "Monte Carlo Methods in Financial Engineering", ch. 2 and 9.
    """
    _check(terms)
    factor = _factor(checked_covariance(covariance, len(portfolio.prices)), terms.horizon_days)
    if portfolio.is_linear:
        losses: NDArray[np.floating] = _linear_losses(-(factor.T @ portfolio.net), terms)
    else:
        losses = _revalued_losses(portfolio, factor, terms)
    return MonteCarloRisk(
        distribution=terms.distribution,
        degrees=terms.degrees if terms.distribution == "student_t" else None,
        seed=terms.seed,
        paths=terms.paths,
        horizon_days=float(terms.horizon_days),
        tails=simulated_tails(losses, terms.confidences),
        losses=losses,
        not_modelled=not_modelled(portfolio),
    )


def _check(terms: MonteCarloTerms) -> None:
    checked_confidences(terms.confidences)
    checked_horizon(terms.horizon_days)
    if not PATHS_MIN <= terms.paths <= PATHS_MAX:
        raise invalid("/paths", "out_of_range", f"{PATHS_MIN:,} to {PATHS_MAX:,} paths")
    checked_seed(terms.seed)
    if terms.distribution == "student_t" and not 2.0 < terms.degrees <= 1_000.0:
        raise invalid("/degrees", "out_of_range", "degrees of freedom lie above 2, up to 1,000")


def checked_seed(seed: int) -> int:
    """Return the seed. Raises InvalidError unless it is from 0 to 2^63 - 1."""
    if not 0 <= seed <= SEED_MAX:
        raise invalid("/seed", "out_of_range", "a seed is a whole number from 0 to 2^63 - 1")
    return seed


def _factor(covariance: Floats, horizon_days: float) -> Floats:
    """Return L (J, J) with LL' = Σ·h/365: Cholesky's, or where Σ is singular that of its eigenvectors."""
    scaled = covariance * (horizon_days / YEAR_DAYS)
    try:
        return cast("Floats", np.linalg.cholesky(scaled))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(scaled)
        return cast("Floats", vectors * np.sqrt(np.maximum(values, 0.0)))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Paths in blocks of `size`, of J standardised moves each."""

    terms: MonteCarloTerms
    columns: int

    @property
    def size(self) -> int:
        return max(1, BLOCK_DRAWS // max(1, self.columns))

    def __len__(self) -> int:
        return math.ceil(self.terms.paths / self.size)

    def rows(self, block: int) -> slice:
        return slice(block * self.size, min((block + 1) * self.size, self.terms.paths))

    def draw(self, block: int, into: Floats32) -> Floats32:
        """Return the uncorrelated normal moves (rows, J) of a block, in `into`."""
        rows = self.rows(block)
        moves = into[: rows.stop - rows.start]
        self._generator(block, 0).standard_normal(dtype=np.float32, out=moves)
        return moves

    def mixing(self, block: int) -> Floats32 | None:
        """Return √((degrees - 2)/χ²) (rows,), which makes normal moves Student-t of unit variance."""
        if self.terms.distribution == "normal":
            return None
        rows = self.rows(block)
        half = 0.5 * self.terms.degrees
        chi = self._generator(block, 1).standard_gamma(half, rows.stop - rows.start, dtype=np.float32)
        return cast("Floats32", np.sqrt(np.float32(half - 1.0) / np.maximum(chi, np.float32(1e-30))))

    def run(self, work: Callable[[int, Floats32], None]) -> None:
        """Call `work` for each block, with a buffer of the thread's own; a thread takes the next when it is done."""
        waiting = iter(range(len(self)))

        def share(_: int) -> None:
            buffer = np.empty((self.size, self.columns), dtype=np.float32)
            for block in waiting:
                work(block, buffer)

        threads = max(1, min(self.terms.threads, THREADS_MAX, len(self)))
        if threads == 1:
            share(0)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(share, range(threads)))

    def _generator(self, block: int, stream: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(self.terms.seed, spawn_key=(block, stream))
        return np.random.Generator(np.random.SFC64(sequence))


def _linear_losses(weights: Floats, terms: MonteCarloTerms) -> Floats32:
    """Return the losses (paths,) of a book whose loss is the product of standardised moves and weights (J,)."""
    blocks = _Blocks(terms, len(weights))
    losses = np.empty(terms.paths, dtype=np.float32)
    single = weights.astype(np.float32)

    def work(block: int, buffer: Floats32) -> None:
        into = losses[blocks.rows(block)]
        np.matmul(blocks.draw(block, buffer), single, out=into)
        mixing = blocks.mixing(block)
        if mixing is not None:
            into *= mixing

    blocks.run(work)
    return losses


def _revalued_losses(portfolio: Portfolio, factor: Floats, terms: MonteCarloTerms) -> Floats:
    blocks = _Blocks(terms, len(factor))
    losses = np.empty(terms.paths)
    single = factor.T.astype(np.float32)

    def work(block: int, buffer: Floats32) -> None:
        losses[blocks.rows(block)] = losses_at(portfolio, _moves(blocks, block, buffer, single))

    blocks.run(work)
    return losses


def _moves(blocks: _Blocks, block: int, buffer: Floats32, factor: Floats32) -> Floats:
    """Return the correlated relative moves (rows, J) of a block."""
    moves = blocks.draw(block, buffer) @ factor
    mixing = blocks.mixing(block)
    if mixing is not None:
        moves *= mixing[:, None]
    return moves.astype(np.float64)


def moves_of(covariance: Floats, paths: Rows, terms: MonteCarloTerms) -> Floats:
    """Return the moves (K, J) of the named paths, drawn again."""
    factor = _factor(covariance, terms.horizon_days)
    blocks = _Blocks(terms, len(factor))
    moves = np.empty((len(paths), len(factor)))
    single = factor.T.astype(np.float32)
    block_of = paths // blocks.size

    def work(block: int, buffer: Floats32) -> None:
        wanted = np.flatnonzero(block_of == block)
        if len(wanted):
            moves[wanted] = _moves(blocks, block, buffer, single)[paths[wanted] - block * blocks.size]

    blocks.run(work)
    return moves


def simulated_tails(losses: NDArray[np.floating], confidences: Sequence[float]) -> tuple[SimulatedTail, ...]:
    """Return the figures of independent losses (paths,), with standard errors.

    VaR's: half the distance of the order statistics one binomial deviation √(nc(1-c)) either side of its rank, which
    needs no density. ES's: √((var(loss | tail) + c(ES - VaR)²)/(n(1-c))). c is the confidence.
    Source: Manistre & Hancock 2005, "Variance of the CTE estimator".
    """
    count = len(losses)
    order, worst = largest(losses, max(_last_rank(count, confidence) for confidence in confidences) + 2)
    return tuple(_simulated(tail, count, order, worst) for tail in ranked_tails(count, order, worst, confidences))


def _deviation(count: int, confidence: float) -> float:
    return math.sqrt(count * confidence * (1.0 - confidence))


def _last_rank(count: int, confidence: float) -> int:
    return rank_of(count, confidence)[0] + math.ceil(_deviation(count, confidence))


def _simulated(tail: SampleTail, count: int, order: Rows, worst: Floats) -> SimulatedTail:
    rank, _ = rank_of(count, tail.confidence)
    width = math.ceil(_deviation(count, tail.confidence))
    first, last = max(0, rank - width), min(rank + width, len(worst) - 1)
    around = order[first : last + 1]
    excess = tail.expected_shortfall - tail.value_at_risk
    variance = float(worst[: rank + 1].var()) + tail.confidence * excess**2
    return SimulatedTail(
        confidence=tail.confidence,
        value_at_risk=tail.value_at_risk,
        expected_shortfall=tail.expected_shortfall,
        var_standard_error=float(worst[first] - worst[last])
        * _deviation(count, tail.confidence)
        / max(1, last - first),
        es_standard_error=math.sqrt(variance / (count * (1.0 - tail.confidence))),
        around=Mix(around, np.full(len(around), 1.0 / len(around))),
        beyond=tail.es_mix,
    )
