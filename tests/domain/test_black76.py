"""Option values and deltas against QuantLib, and deltas against finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import QuantLib

from app.domain import black76
from app.domain.black76 import Floats

FORWARD = 60_000.0
YEARS = (1 / 8_760, 1 / 365, 7 / 365, 30 / 365, 0.5, 2.0, 10.0)
GRID = list(
    itertools.product(
        (0.02, 0.5, 0.8, 0.98, 1.0, 1.02, 1.25, 2.0, 20.0),  # strike over forward
        YEARS,
        (0.01, 0.2, 0.6, 1.5, 5.0),
        (-0.05, 0.0, 0.05, 0.2),
        (1.0, -1.0),
    )
)


def arrays() -> dict[str, Floats]:
    ratio, years, iv, rate, sign = (np.array(column, dtype=np.float64) for column in zip(*GRID, strict=True))
    forward = np.full_like(ratio, FORWARD)
    discount = np.exp(-rate * years)
    return {
        "forward": forward,
        "strike": forward * ratio,
        "years": years,
        "iv": iv,
        "discount": discount,
        "sign": sign,
    }


def calculator(ratio: float, years: float, iv: float, rate: float, sign: float) -> QuantLib.BlackCalculator:
    kind = QuantLib.Option.Call if sign > 0 else QuantLib.Option.Put
    payoff = QuantLib.PlainVanillaPayoff(kind, FORWARD * ratio)
    return QuantLib.BlackCalculator(payoff, FORWARD, iv * math.sqrt(years), math.exp(-rate * years))


def test_values_are_quantlibs() -> None:
    expected = [max(0.0, calculator(*cell).value()) for cell in GRID]
    assert black76.value(**arrays()) == pytest.approx(np.array(expected), rel=1e-9, abs=1e-9 * FORWARD)


def test_deltas_are_quantlibs() -> None:
    expected = [calculator(*cell).deltaForward() for cell in GRID]
    assert black76.delta(**arrays()) == pytest.approx(np.array(expected), rel=1e-9, abs=1e-10)


def test_deltas_are_finite_differences() -> None:
    grid = arrays()
    smooth = grid["iv"] * np.sqrt(grid["years"]) > 0.01  # else the kink is narrower than the step
    step = 1e-5 * FORWARD
    up = black76.value(**(grid | {"forward": grid["forward"] + step}))
    down = black76.value(**(grid | {"forward": grid["forward"] - step}))
    expected = ((up - down) / (2 * step))[smooth]
    assert black76.delta(**grid)[smooth] == pytest.approx(expected, rel=2e-4, abs=2e-6)


def test_put_call_parity() -> None:
    grid = arrays()
    call = black76.value(**(grid | {"sign": np.ones(len(GRID))}))
    put = black76.value(**(grid | {"sign": -np.ones(len(GRID))}))
    parity = grid["discount"] * (grid["forward"] - grid["strike"])
    assert call - put == pytest.approx(parity, rel=1e-9, abs=1e-9 * FORWARD)


@pytest.mark.parametrize(
    ("days", "factor"),
    [(0.04, 30**0.30), (1.0, 30**0.30), (15.0, 2**0.30), (30.0, 1.0), (60.0, 0.5**0.13), (365.0, (30 / 365) ** 0.13)],
)
def test_term_factor(days: float, factor: float) -> None:
    assert black76.term_factor(np.array([days]), 30.0, 0.30, 0.13)[0] == pytest.approx(factor)
