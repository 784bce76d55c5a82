"""VaR across services: by hand, and what holds of any."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.parameters import CorrelationTable
from app.domain.var.services import service_value_at_risk
from app.errors import InvalidError
from tests.domain.var_books import DRAWN

SERVICES = ("trading", "casino", "escrow", "domains", "lending")
DEFAULTS = {
    ("trading", "casino"): 0.42,
    ("trading", "domains"): 0.08,
    ("trading", "escrow"): 0.11,
    ("casino", "escrow"): 0.06,
    ("lending", "trading"): -0.31,
}
amounts = st.dictionaries(st.sampled_from((*SERVICES, "storage")), st.floats(0.0, 1e6), max_size=6)


@pytest.mark.parametrize(("pair", "rho"), DEFAULTS.items())
def test_two_services_by_hand(pair: tuple[str, str], rho: float) -> None:
    risk = service_value_at_risk({pair[0]: 100.0, pair[1]: 50.0})
    total = math.sqrt(100.0**2 + 50.0**2 + 2.0 * rho * 100.0 * 50.0)
    assert risk.value_at_risk == pytest.approx(total)
    assert risk.components == pytest.approx([(100.0**2 + rho * 5_000.0) / total, (50.0**2 + rho * 5_000.0) / total])


def test_all_five() -> None:
    own = {"trading": 1_000.0, "casino": 200.0, "escrow": 50.0, "domains": 80.0, "lending": 300.0}
    squares = sum(v * v for v in own.values())
    crossed = sum(2.0 * rho * own[a] * own[b] for (a, b), rho in DEFAULTS.items())
    assert service_value_at_risk(own).value_at_risk == pytest.approx(math.sqrt(squares + crossed))


@DRAWN
@given(amounts)
def test_components_sum_and_nothing_beats_the_sum(own: dict[str, float]) -> None:
    risk = service_value_at_risk(own)
    assert risk.components.sum() == pytest.approx(risk.value_at_risk, rel=1e-9, abs=1e-9)
    assert risk.value_at_risk <= sum(own.values()) * (1.0 + 1e-12)
    assert not risk.repaired


def test_unknown_services_are_uncorrelated() -> None:
    assert service_value_at_risk({"storage": 3.0, "trading": 4.0}).value_at_risk == pytest.approx(5.0)
    assert service_value_at_risk({}).value_at_risk == 0.0


def test_correlations_that_cannot_be_are_repaired_and_said_so() -> None:
    pairs = {("casino", "trading"): 1.0, ("escrow", "trading"): 1.0, ("casino", "escrow"): 0.0}
    risk = service_value_at_risk(dict.fromkeys(SERVICES[:3], 1.0), CorrelationTable(MappingProxyType(pairs), 0.0))
    assert risk.repaired
    # Higham 2002: the nearest has .7607, .7607, .1573
    assert risk.value_at_risk == pytest.approx(math.sqrt(3.0 + 2.0 * (0.7607 + 0.7607 + 0.1573)), abs=1e-4)
    assert np.linalg.eigvalsh(risk.correlation).min() > -1e-7


@pytest.mark.parametrize("own", [-1.0, math.nan, math.inf])
def test_a_vars_own_value_is_checked(own: float) -> None:
    with pytest.raises(InvalidError) as refused:
        service_value_at_risk({"trading": own})
    assert refused.value.errors[0].pointer == "/services/trading"
