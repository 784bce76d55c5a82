"""Regime matrices pair by pair, and drift from them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from app.domain.covariance import Covariance, covariance_of
from app.domain.parameters import REGIMES, CorrelationTable, MarketParameters, Regime
from app.domain.regimes import drift, regime_correlation, regime_table, stored_regime

PARAMETERS = MarketParameters()
NAMES = ("BTC", "ETH", "SOL", "BNB", "DOGE")
OWN = {
    "normal": (0.80, 0.70, 0.75),
    "sideways": (0.675, 0.575, 0.625),
    "sell_off": (0.935, 0.90, 0.92),
    "liquidity_crisis": (0.97, 0.95, 0.965),
}
STRESS = {"BTC BNB": 0.88, "ETH BNB": 0.87, "SOL BNB": 0.85}
VOLS = {"BTC": 0.65, "ETH": 0.80, "SOL": 1.2, "BNB": 0.9, "DOGE": 1.5}


def test_multipliers() -> None:
    assert [PARAMETERS.models.regime_multiplier(r) for r in REGIMES] == [1.0, 0.85, 1.5, 2.0]


@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_lists_its_pairs_and_caps_the_others_at_its_largest(regime: Regime) -> None:
    table = regime_table(regime, NAMES, PARAMETERS)
    own = dict(zip(("BTC ETH", "BTC SOL", "ETH SOL"), OWN[regime], strict=True))
    for a, b in itertools.combinations(NAMES, 2):
        pair = f"{a} {b}"
        assert table.between(a, b) == own.get(pair, min(STRESS.get(pair, 0.80), max(OWN[regime])))
    found = regime_correlation(regime, NAMES, PARAMETERS)
    assert np.linalg.eigvalsh(found.matrix).min() > -1e-12
    raw = np.array([[table.between(a, b) for b in NAMES] for a in NAMES])
    assert found.distance == pytest.approx(np.linalg.norm(found.matrix - raw))


def test_a_request_may_bring_its_own_regime() -> None:
    parameters = replace(
        PARAMETERS, regimes={**PARAMETERS.regimes, "sideways": {("BTC", "ETH"): -0.5, ("ETH", "SOL"): 0.2}}
    )
    table = regime_table("sideways", NAMES, parameters)
    assert [table.between(*p) for p in (("BTC", "ETH"), ("ETH", "SOL"), ("BTC", "SOL"), ("BNB", "DOGE"))] == [
        -0.5,
        0.2,
        0.2,
        0.2,
    ]


def test_a_regime_that_is_no_correlation_is_repaired() -> None:
    impossible = {("BTC", "ETH"): 1.0, ("ETH", "SOL"): 1.0, ("BTC", "SOL"): 0.0}
    parameters = replace(PARAMETERS, regimes={**PARAMETERS.regimes, "normal": impossible})
    found = regime_correlation("normal", ("BTC", "ETH", "SOL"), parameters)
    assert found.distance == pytest.approx(0.5278, abs=5e-5)
    assert found.matrix[0].tolist() == pytest.approx([1, 0.7607, 0.1573], abs=5e-5)


def test_a_stored_account_is_never_asked_less_than_normal() -> None:
    assert [stored_regime(r, PARAMETERS) for r in REGIMES] == ["normal", "normal", "sell_off", "liquidity_crisis"]


def test_drift_by_hand() -> None:
    names = ("BTC", "ETH", "SOL")
    recent = covariance_of(
        names,
        VOLS,
        CorrelationTable({("BTC", "ETH"): 0.93, ("BTC", "SOL"): 0.88, ("ETH", "SOL"): 0.91}, 0.8),
        PARAMETERS,
    )
    x = np.array([10_000.0, -4_000.0, 2_000.0])

    def deviation(covariance: Covariance) -> float:
        return covariance.deviation(x)

    found = drift(recent, "normal", PARAMETERS, deviation)
    assert found.nearest == "sell_off"
    assert found.distance == pytest.approx((2 * (0.13**2 + 0.18**2 + 0.16**2)) ** 0.5)
    assert found.distances["normal"] == found.distance
    assert found.distances["sell_off"] == pytest.approx((2 * (0.005**2 + 0.02**2 + 0.01**2)) ** 0.5)
    variance = sum(
        x[i]
        * x[j]
        * VOLS[a]
        * VOLS[b]
        * (1.0 if a == b else {("BTC", "ETH"): 0.8, ("BTC", "SOL"): 0.7, ("ETH", "SOL"): 0.75}[min(a, b), max(a, b)])
        for i, a in enumerate(names)
        for j, b in enumerate(names)
    )
    assert found.expected == pytest.approx((variance / 365) ** 0.5)
    assert found.realised == recent.deviation(x)


def test_drift_looks_at_assets_with_history_alone() -> None:
    names = ("BTC", "ETH", "DOGE")
    full = covariance_of(names, VOLS, CorrelationTable({("BTC", "ETH"): 0.5}, -0.4), PARAMETERS)
    recent = replace(full, too_short={"DOGE": 3})
    found = drift(recent, "normal", PARAMETERS, lambda c: c.deviation(np.ones(3)))
    assert found.names == ("BTC", "ETH")
    assert found.distance == pytest.approx(2**0.5 * 0.3)
    assert found.nearest == "sideways"


@pytest.mark.parametrize("regime", REGIMES)
def test_no_drift_from_itself(regime: Regime) -> None:
    matrix = regime_correlation(regime, NAMES, PARAMETERS).matrix
    recent = Covariance(NAMES, np.array([VOLS[n] for n in NAMES]), matrix)
    found = drift(recent, regime, PARAMETERS, lambda c: c.deviation(np.ones(5)))
    assert (found.distance, found.nearest) == (0.0, regime)
    assert found.realised == found.expected
    by_matrix = drift(recent, matrix, PARAMETERS, lambda c: c.deviation(np.ones(5)))
    assert by_matrix.distance == 0.0
