from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.money import AMOUNT_MAX, DECIMALS_MAX, round_owed, round_owned, to_decimal, to_float

AMOUNTS = st.decimals(min_value=-AMOUNT_MAX, max_value=AMOUNT_MAX, allow_nan=False, places=30)
DECIMALS = st.integers(min_value=0, max_value=DECIMALS_MAX)


@pytest.mark.parametrize(
    ("amount", "decimals", "owed", "owned"),
    [
        ("1.0000001", 6, "1.000001", "1.000000"),
        ("1.000000", 6, "1.000000", "1.000000"),
        ("0.5", 0, "1", "0"),
        ("-0.5", 0, "0", "-1"),
        ("999999999999999.9999999999999999991", 18, "1e15", "999999999999999.999999999999999999"),
    ],
)
def test_rounding_goes_against_the_debtor(amount: str, decimals: int, owed: str, owned: str) -> None:
    assert round_owed(Decimal(amount), decimals) == Decimal(owed)
    assert round_owned(Decimal(amount), decimals) == Decimal(owned)


@given(AMOUNTS, DECIMALS)
def test_rounding_moves_less_than_one_unit(amount: Decimal, decimals: int) -> None:
    unit = Decimal(1).scaleb(-decimals)
    assert amount <= round_owed(amount, decimals)
    assert round_owned(amount, decimals) <= amount
    assert round_owed(amount, decimals) - round_owned(amount, decimals) in (0, unit)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_the_same(value: float) -> None:
    assert to_float(to_decimal(value)) == value


@given(st.decimals(min_value=Decimal("1e-18"), max_value=AMOUNT_MAX, places=18))
def test_up_to_fifteen_digits_come_back_the_same(amount: Decimal) -> None:
    short = Decimal(f"{amount:.14e}")
    assert to_decimal(to_float(short)) == short


def test_the_shortest_digits_are_taken() -> None:
    assert str(to_decimal(0.1)) == "0.1"
    assert str(to_decimal(np.float64(0.1))) == "0.1"
    assert str(to_decimal(-0.0)) == "0"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_float_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        to_decimal(value)


@pytest.mark.parametrize("text", ["NaN", "sNaN", "Infinity", "-Infinity", "1e400", "-1E+1000000"])
def test_a_decimal_that_no_float_holds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"finite|NaN"):
        to_float(Decimal(text))


@pytest.mark.parametrize("text", ["NaN", "Infinity"])
def test_only_numbers_are_rounded(text: str) -> None:
    with pytest.raises(ValueError, match="finite"):
        round_owed(Decimal(text), 6)


@pytest.mark.parametrize("decimals", [-1, 19])
def test_decimals_are_bounded(decimals: int) -> None:
    with pytest.raises(ValueError, match="decimals"):
        round_owned(Decimal(1), decimals)


def test_sums_keep_every_digit_wherever_they_are_made() -> None:
    def less_dust() -> Decimal:
        return Decimal("999999999999999.999999999999999999") - Decimal("0.000000000000000001")

    expected = Decimal("999999999999999.999999999999999998")
    assert less_dust() == expected
    assert Context().run(less_dust) == expected
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(less_dust).result() == expected
