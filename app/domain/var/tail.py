"""Value at risk and expected shortfall of a sample of losses, and the scenarios that each stands on.

Losses are positive USD. A rank counts from the largest loss, 0 first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from app.domain.black76 import Floats
from app.domain.portfolio import Rows
from app.errors import FieldError, InvalidError, invalid

CONFIDENCES_MAX = 20
YEAR_DAYS = 365.0
"""A year, leap years too."""
HORIZON_DAYS_MAX = 365.0
RANK_DECIMALS = 9
"""A rank this near to a whole one is whole: 500 x (1 - .99) is 5, not the 5.0000000000000044 of binary fractions."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A figure as a mean over scenarios: `rows` (K,) of the sample, `weights` (K,) that sum to 1."""

    rows: Rows
    weights: Floats


@dataclass(frozen=True, slots=True)
class SampleTail:
    """One confidence's figures in USD; `var_mix` and `es_mix` say which losses they are the means of."""

    confidence: float
    value_at_risk: float
    expected_shortfall: float
    var_mix: Mix
    es_mix: Mix


def checked_confidences(confidences: Sequence[float]) -> tuple[float, ...]:
    """Return the confidences. Raises InvalidError unless there is one at least, each within (.5, 1)."""
    if not 0 < len(confidences) <= CONFIDENCES_MAX:
        raise invalid("/confidences", "too_many_items", f"1 to {CONFIDENCES_MAX} confidences, not {len(confidences)}")
    wrong = [i for i, confidence in enumerate(confidences) if not 0.5 < confidence < 1.0]
    if wrong:
        detail = "a confidence lies between .5 and 1, both excluded"
        errors = tuple(FieldError(f"/confidences/{i}", "out_of_range", detail) for i in wrong)
        raise InvalidError(detail, code="out_of_range", errors=errors)
    return tuple(float(confidence) for confidence in confidences)


def checked_horizon(days: float) -> float:
    """Return the horizon. Raises InvalidError unless it is of 0 to 365 days, 0 excluded."""
    if not 0.0 < days <= HORIZON_DAYS_MAX:
        raise invalid("/horizon_days", "out_of_range", f"a horizon is of 0 to {HORIZON_DAYS_MAX:.0f} days, 0 excluded")
    return float(days)


def rank_of(count: int, confidence: float) -> tuple[int, float]:
    """Return the rank, and the fraction towards the next, of the `linear` quantile at 1 - confidence of the P&L."""
    position = round((count - 1) * (1.0 - confidence), RANK_DECIMALS)
    rank = math.floor(position)
    return rank, position - rank


def sample_tails(losses: NDArray[np.floating], confidences: Sequence[float]) -> tuple[SampleTail, ...]:
    """Return the figures of equally likely losses (T,).

    VaR is the loss at numpy's `linear` quantile (Hyndman & Fan 1996, type 7); ES the mean of the losses from VaR
    on. Losses that tie with VaR count as often as the rank needs, so that every ES of a sample is the mean of as
    many largest losses, hence subadditive (Acerbi & Tasche 2002).
    """
    count = len(losses)
    deepest = max(rank_of(count, confidence)[0] for confidence in confidences) + 2
    return ranked_tails(count, *largest(losses, deepest), confidences)


def quantiles(losses: Floats, confidences: Sequence[float]) -> Floats:
    """Return the VaR (K, W) of each row of equally likely losses (W, T), as `sample_tails` has it."""
    count = losses.shape[1]
    ranks = [rank_of(count, confidence) for confidence in confidences]
    places = {place for rank, _ in ranks for place in (count - 1 - rank, max(0, count - 2 - rank))}
    found = np.partition(losses, sorted(places), axis=1)
    here = [found[:, count - 1 - rank] for rank, _ in ranks]
    following = [found[:, max(0, count - 2 - rank)] for rank, _ in ranks]
    fractions = np.array([fraction for _, fraction in ranks])[:, None]
    return np.array(here) + fractions * (np.array(following) - np.array(here))


def largest(losses: NDArray[np.floating], count: int) -> tuple[Rows, Floats]:
    """Return the rows (count,) of the largest losses, in order, and these losses; all of them where there are fewer."""
    if count >= len(losses):
        order = np.argsort(-losses, kind="stable")
    else:
        found = np.argpartition(losses, -count)[-count:]
        order = found[np.argsort(-losses[found], kind="stable")]
    return order, losses[order].astype(np.float64)


def ranked_tails(count: int, order: Rows, worst: Floats, confidences: Sequence[float]) -> tuple[SampleTail, ...]:
    """Return the figures of `count` losses of which the largest are given, as `largest` does."""
    return tuple(_ranked_tail(confidence, *rank_of(count, confidence), order, worst) for confidence in confidences)


def _ranked_tail(confidence: float, rank: int, fraction: float, order: Rows, worst: Floats) -> SampleTail:
    following = min(rank + 1, len(worst) - 1)
    value_at_risk = worst[rank] + fraction * (worst[following] - worst[rank])
    shortfall = worst[: rank + 1].mean()
    return SampleTail(
        confidence,
        float(value_at_risk),
        max(float(shortfall), float(value_at_risk)),  # equal losses: the mean differs from them in the last bit
        Mix(order[[rank, following]], np.array([1.0 - fraction, fraction])),
        Mix(order[: rank + 1], np.full(rank + 1, 1.0 / (rank + 1))),
    )


def scaled(tail: SampleTail, factor: float) -> SampleTail:
    """Return the tail with both figures times a factor; the mixes stay those of the sample."""
    return replace(tail, value_at_risk=factor * tail.value_at_risk, expected_shortfall=factor * tail.expected_shortfall)


def age_weights(count: int, decay: float) -> Floats:
    """Return the weights (T,), oldest first, λ^age (1-λ)/(1-λ^T), age 0 the newest; λ 1: equal.

    Source: Boudoukh, Richardson & Whitelaw 1998, "The best of both worlds".
    """
    weights = decay ** np.arange(count - 1, -1, -1, dtype=np.float64)
    return cast("Floats", weights / weights.sum())


@dataclass(frozen=True, slots=True)
class WeightedPlace:
    """Where the weighted quantile lies in losses sorted downwards, along the last axis of (..., T).

    VaR = low + fraction x (high - low), where low is the mean of the ranks `rank - 1, rank` and high that of
    `rank, rank + 1`; before the first and after the last rank stands that loss itself.
    """

    rank: NDArray[np.intp]
    fraction: Floats
    low: Floats
    high: Floats

    @property
    def value_at_risk(self) -> Floats:
        """VaR (...)."""
        return self.low + self.fraction * (self.high - self.low)


def weighted_place(worst: Floats, weights: Floats, confidence: float) -> WeightedPlace:
    """Return the place of the quantile at 1 - confidence, for losses (..., T) sorted downwards and their weights.

    The rule is that of Boudoukh, Richardson & Whitelaw: half of each observation's weight lies on either side of
    it, so the cumulative weight C_k of the k largest losses stands at the midpoint of the k-th and the next one, and
    between two such points the quantile is linear. The ends: weight 0 at the largest loss, 1 at the smallest.
    """
    cumulative = np.cumsum(weights, axis=-1)
    probability = 1.0 - confidence
    last = worst.shape[-1] - 1
    rank = np.minimum((cumulative < probability).sum(axis=-1), last)

    def at(values: Floats, index: NDArray[np.intp]) -> Floats:
        return np.take_along_axis(values, np.clip(index, 0, last)[..., None], axis=-1)[..., 0]

    own = at(weights, rank)
    before = at(cumulative, rank) - own
    fraction = np.clip((probability - before) / own, 0.0, 1.0)
    here = at(worst, rank)
    low, high = 0.5 * (at(worst, rank - 1) + here), 0.5 * (here + at(worst, rank + 1))
    return WeightedPlace(rank, fraction, low, high)


def weighted_quantiles(losses: Floats, weights: Floats, confidences: Sequence[float]) -> Floats:
    """Return the VaR (K, W) of each row of losses (W, T) of these weights (T,), as `weighted_tails` has it."""
    order = np.argsort(-losses, axis=1, kind="stable")
    worst, own = np.take_along_axis(losses, order, axis=1), weights[order]
    return np.array([weighted_place(worst, own, confidence).value_at_risk for confidence in confidences])


def weighted_tails(losses: Floats, weights: Floats, confidences: Sequence[float]) -> tuple[SampleTail, ...]:
    """Return the figures of losses (T,) with weights (T,) that sum to 1; for the quantile see `weighted_place`.

    ES is the weighted mean of the losses >= VaR.
    """
    order, worst = largest(losses, len(losses))
    own = weights[order]
    return tuple(_weighted_tail(confidence, order, worst, own) for confidence in confidences)


def _weighted_tail(confidence: float, order: Rows, worst: Floats, weights: Floats) -> SampleTail:
    place = weighted_place(worst, weights, confidence)
    value_at_risk = float(place.value_at_risk)
    rank, fraction = int(place.rank), float(place.fraction)
    around = np.clip([rank - 1, rank, rank + 1], 0, len(worst) - 1)
    beyond = max(1, int((worst >= value_at_risk).sum()))
    share = weights[:beyond] / weights[:beyond].sum()
    return SampleTail(
        confidence,
        value_at_risk,
        max(float(share @ worst[:beyond]), value_at_risk),
        Mix(order[around], np.array([0.5 * (1.0 - fraction), 0.5, 0.5 * fraction])),
        Mix(order[:beyond], share),
    )
