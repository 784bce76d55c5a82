"""Who makes the risk: marginal, component and incremental VaR and ES, by position and by underlying."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import numpy as np

from app.domain.black76 import Floats
from app.domain.portfolio import Portfolio, Rows
from app.domain.var.historical import HistoricalRisk
from app.domain.var.monte_carlo import MonteCarloRisk, MonteCarloTerms, SimulatedTail, moves_of
from app.domain.var.parametric import NormalTail, sigma_of
from app.domain.var.revalue import mixed_losses, positions_apart
from app.domain.var.tail import YEAR_DAYS, Mix, SampleTail

ComponentRule = Literal["elliptical", "scenarios", "kernel"]
"""elliptical: Euler's x·Σx/x'Σx. scenarios: the losses in the very scenarios that the figure is a mean of.
kernel: VaR's are a mean over scenarios around it, scaled to sum to it."""

ROUNDING = 1e-14
"""A variance this small beside the figures it is the difference of is none."""


@dataclass(frozen=True, slots=True)
class Components:
    """What each position (n,) and underlying (J,) adds, USD; each sums to VaR, or to ES, of one confidence."""

    confidence: float
    rule: ComponentRule
    var_by_position: Floats
    es_by_position: Floats
    var_by_underlying: Floats
    es_by_underlying: Floats


@dataclass(frozen=True)
class Deviations:
    """The standard deviation σ of a book's horizon P&L and its parts, USD: those of VaR and ES over VaR/σ and ES/σ.

    `marginal` (J,) is ∂σ/∂x per USD of exposure, that of a position its underlying's; `component` sums to σ;
    `incremental` is σ less the σ of the book without it.
    """

    portfolio: Portfolio
    covariance: Floats
    horizon_days: float

    @cached_property
    def sigma(self) -> float:
        """√(x'Σx)·√(h/365)."""
        return sigma_of(self.portfolio.net, self.covariance, self.horizon_days)

    @cached_property
    def marginal(self) -> Floats:
        """Σx/√(x'Σx)·√(h/365), (J,); zero where σ is, as it has no slope there."""
        if self.sigma == 0.0:
            return np.zeros(len(self.covariance))
        return self._slope / self.sigma

    @cached_property
    def by_position(self) -> Floats:
        """Component (n,) of each position."""
        return self.portfolio.exposure * self.marginal[self.portfolio.underlying]

    @cached_property
    def by_underlying(self) -> Floats:
        """Component (J,) of each underlying."""
        return self.portfolio.net * self.marginal

    @cached_property
    def incremental_by_position(self) -> Floats:
        """What σ would fall by (n,) without each position alone."""
        underlying = self.portfolio.underlying
        return self._incremental(self.portfolio.exposure, underlying)

    @cached_property
    def incremental_by_underlying(self) -> Floats:
        """What σ would fall by (J,) without each underlying alone."""
        return self._incremental(self.portfolio.net, np.arange(len(self.covariance)))

    def change(self, exposures: Floats) -> float:
        """Return what σ rises by when signed exposures (J,) are added: the incremental σ of a trade."""
        return sigma_of(self.portfolio.net + exposures, self.covariance, self.horizon_days) - self.sigma

    @cached_property
    def _slope(self) -> Floats:
        slope: Floats = self.covariance @ self.portfolio.net * (self.horizon_days / YEAR_DAYS)
        return slope

    def _incremental(self, exposure: Floats, underlying: Rows) -> Floats:
        own = np.diag(self.covariance)[underlying] * (self.horizon_days / YEAR_DAYS)
        without = self.sigma**2 - 2.0 * exposure * self._slope[underlying] + exposure**2 * own
        without[without <= ROUNDING * (self.sigma**2 + exposure**2 * own)] = 0.0
        return self.sigma - np.sqrt(without)


@dataclass(frozen=True, slots=True)
class VarParts:
    """VaR and ES in parts, USD: `marginal` (J,) per USD of exposure, the others by position (n,) and underlying (J,).

    Incremental VaR is VaR less that of the book without the position, or the underlying; NaN where it is not told.
    """

    marginal_var: Floats
    marginal_es: Floats
    incremental_var_by_position: Floats
    incremental_var_by_underlying: Floats
    components: Components


def parametric_parts(parts: Deviations, tail: NormalTail) -> VarParts:
    """Return the parts of one confidence's figures. Moments of the P&L, where given, are held where they are.

    Source: Jorion, "Value at Risk", ch. 7; Euler's theorem on functions of degree one.
    """
    return _of_sigma(parts, tail.confidence, tail.value_at_risk, tail.expected_shortfall)


def _of_sigma(parts: Deviations, confidence: float, value_at_risk: float, shortfall: float) -> VarParts:
    """Return the parts of figures that are multiples of σ."""
    scale = 1.0 / parts.sigma if parts.sigma > 0.0 else 0.0
    var_of, es_of = value_at_risk * scale, shortfall * scale
    return VarParts(
        marginal_var=var_of * parts.marginal,
        marginal_es=es_of * parts.marginal,
        incremental_var_by_position=var_of * parts.incremental_by_position,
        incremental_var_by_underlying=var_of * parts.incremental_by_underlying,
        components=elliptical(parts, confidence, value_at_risk, shortfall),
    )


def elliptical(parts: Deviations, confidence: float, value_at_risk: float, shortfall: float) -> Components:
    """Return each part's share x·Σx/x'Σx of both figures: E[part | loss] under any elliptical distribution.

    Source: McNeil, Frey & Embrechts, "Quantitative Risk Management", ch. 8 (Euler allocation).
    """
    scale = 1.0 / parts.sigma if parts.sigma > 0.0 else 0.0
    position, underlying = parts.by_position * scale, parts.by_underlying * scale
    return Components(
        confidence,
        "elliptical",
        value_at_risk * position,
        shortfall * position,
        value_at_risk * underlying,
        shortfall * underlying,
    )


def historical_parts(portfolio: Portfolio, risk: HistoricalRisk) -> tuple[VarParts, ...]:
    """Return the parts of each confidence; a USD more of an underlying loses what that lost on the days of the figure.

    Incremental VaR is of the book revalued without each position on the same days. Source: Hallerbach 2003.
    """
    by_position, by_underlying = _without_each(portfolio, risk)
    return tuple(
        VarParts(
            marginal_var=risk.scale * _losses_a_dollar(risk.moves[tail.var_mix.rows], tail.var_mix),
            marginal_es=risk.scale * _losses_a_dollar(risk.moves[tail.es_mix.rows], tail.es_mix),
            incremental_var_by_position=tail.value_at_risk - by_position[k],
            incremental_var_by_underlying=tail.value_at_risk - by_underlying[k],
            components=components,
        )
        for k, (tail, components) in enumerate(zip(risk.tails, historical_components(portfolio, risk), strict=True))
    )


def _losses_a_dollar(moves: Floats, mix: Mix) -> Floats:
    """Return what a USD of each underlying (J,) loses over the mix of moves (K, J)."""
    return -(mix.weights @ moves)


def _without_each(portfolio: Portfolio, risk: HistoricalRisk) -> tuple[Floats, Floats]:
    """Return the VaR of the book without each position (K, n), and without each underlying (K, J), alone."""
    by_position = np.empty((len(risk.tails), len(portfolio)))
    by_underlying = np.zeros((len(portfolio.prices), risk.days))
    for chosen, pnl in positions_apart(portfolio, risk.moves):
        by_position[:, chosen] = risk.values_at_risk(risk.losses + pnl)
        np.add.at(by_underlying, portfolio.underlying[chosen], pnl)
    return by_position, risk.values_at_risk(risk.losses + by_underlying)


def historical_components(portfolio: Portfolio, risk: HistoricalRisk) -> tuple[Components, ...]:
    """Return the parts of each confidence: the losses on the days that VaR interpolates, and on those of the tail.

    Source: Tasche 2000, "Risk contributions and performance measurement" (E[part | tail]); Hallerbach 2003,
    "Decomposing portfolio value-at-risk".
    """
    return tuple(
        _components(
            portfolio,
            tail,
            "scenarios",
            risk.scale * mixed_losses(portfolio, risk.moves[tail.var_mix.rows], tail.var_mix.weights),
            risk.scale * mixed_losses(portfolio, risk.moves[tail.es_mix.rows], tail.es_mix.weights),
        )
        for tail in risk.tails
    )


def monte_carlo_parts(
    portfolio: Portfolio, covariance: Floats, risk: MonteCarloRisk, terms: MonteCarloTerms
) -> tuple[VarParts, ...]:
    """Return the parts of each confidence of a simulation.

    A linear book's are those of its σ, times VaR/σ and ES/σ. Another's marginal figures are what a USD of an underlying
    loses on the paths of its components; its incremental VaR would take a simulation for each position, and is NaN.
    """
    if portfolio.is_linear:
        parts = Deviations(portfolio, covariance, risk.horizon_days)
        return tuple(_of_sigma(parts, t.confidence, t.value_at_risk, t.expected_shortfall) for t in risk.tails)
    found, untold = [], np.full(len(portfolio), np.nan)
    for tail, components in zip(risk.tails, monte_carlo_components(portfolio, covariance, risk, terms), strict=True):
        around, beyond = (_losses_a_dollar(moves_of(covariance, m.rows, terms), m) for m in (tail.around, tail.beyond))
        found.append(VarParts(around, beyond, untold, np.full(len(covariance), np.nan), components))
    return tuple(found)


def monte_carlo_components(
    portfolio: Portfolio, covariance: Floats, risk: MonteCarloRisk, terms: MonteCarloTerms
) -> tuple[Components, ...]:
    """Return the parts of each confidence of a simulation, which is drawn again for the paths of the tail.

    A linear book's are `elliptical`. Another's ES is shared out by the losses of its tail paths, VaR by a mean over
    the paths within one standard error of its rank, whose rest is shared out by size.
    Source: Tasche 2000; Tasche 2009, "Capital allocation for credit portfolios with kernel estimators".
    """
    if portfolio.is_linear:
        parts = Deviations(portfolio, covariance, risk.horizon_days)
        return tuple(elliptical(parts, t.confidence, t.value_at_risk, t.expected_shortfall) for t in risk.tails)
    found = []
    for tail in risk.tails:
        count = len(tail.around.rows)
        moves = moves_of(covariance, np.concatenate([tail.around.rows, tail.beyond.rows]), terms)
        by_var = _summing_to(tail.value_at_risk, mixed_losses(portfolio, moves[:count], tail.around.weights))
        by_es = mixed_losses(portfolio, moves[count:], tail.beyond.weights)
        found.append(_components(portfolio, tail, "kernel", by_var, by_es))
    return tuple(found)


def _components(
    portfolio: Portfolio, tail: SampleTail | SimulatedTail, rule: ComponentRule, by_var: Floats, by_es: Floats
) -> Components:
    return Components(
        tail.confidence, rule, by_var, by_es, portfolio.by_underlying(by_var), portfolio.by_underlying(by_es)
    )


def _summing_to(total: float, parts: Floats) -> Floats:
    """Share out what the parts leave of the total, by size: a factor would blow up parts that cancel."""
    size = np.abs(parts)
    whole = float(size.sum())
    return parts if whole == 0.0 else cast("Floats", parts + (total - parts.sum()) * (size / whole))
