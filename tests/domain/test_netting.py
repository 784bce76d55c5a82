"""Netting against a second account of it in fractions: nets, movements, fees."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.fees import decimals_of
from app.domain.netting import Gross, Terms, movements, settlement

TERMS = Terms(Decimal("0.01"), Decimal("0.05"))
Obligation = tuple[int, int, str, Decimal]
ASSETS = ("USDC", "BTC")


def positions(obligations: list[Obligation]) -> list[Gross]:
    sums: dict[tuple[str, str], list[Decimal]] = defaultdict(lambda: [Decimal(0), Decimal(0)])
    for payer, payee, asset, amount in obligations:
        sums[f"m{payer}", asset][0] += amount
        sums[f"m{payee}", asset][1] += amount
    return [Gross(member, asset, *both) for (member, asset), both in sums.items()]


@st.composite
def graphs(draw: st.DrawFn) -> list[Obligation]:
    members = draw(st.integers(2, 9))
    found = []
    for _ in range(draw(st.integers(1, 40))):
        payer = draw(st.integers(0, members - 1))
        payee = (payer + draw(st.integers(1, members - 1))) % members
        asset = draw(st.sampled_from(ASSETS))
        amount = Decimal(draw(st.integers(1, 10**12))).scaleb(-decimals_of(asset))
        found.append((payer, payee, asset, amount))
    return found


@given(graphs())
def test_random_graphs_of_obligations(obligations: list[Obligation]) -> None:
    done = settlement(positions(obligations), TERMS)
    for asset in ASSETS:
        gross: dict[str, Fraction] = defaultdict(Fraction)
        for payer, payee, of, amount in obligations:
            if of == asset:
                gross[f"m{payer}"] -= Fraction(amount)
                gross[f"m{payee}"] += Fraction(amount)
        assert sum(gross.values()) == 0
        moved: dict[str, Fraction] = defaultdict(Fraction)
        mine = [m for m in done.movements if m.asset == asset]
        for movement in mine:
            assert movement.amount > 0
            moved[movement.payer] -= Fraction(movement.amount)
            moved[movement.payee] += Fraction(movement.amount)
        # what each member receives on balance is gross in less gross out
        assert all(moved[member] == net for member, net in gross.items())
        assert set(moved) <= set(gross)
        assert len(mine) <= max(0, len(gross) - 1)
        # nobody pays and receives
        assert not {m.payer for m in mine} & {m.payee for m in mine}
        # one fee a debtor, rounded up
        unit = Fraction(1, 10 ** decimals_of(asset))
        charged = {charge.payer: Fraction(charge.amount) for charge in done.charges if charge.asset == asset}
        assert charged.keys() == {member for member, net in gross.items() if net < 0}
        assert all(0 <= fee + gross[member] / 100 < unit for member, fee in charged.items())


def test_twenty_obligations_one_movement_one_fee() -> None:
    """Ten each way between two."""
    there: list[Obligation] = [(0, 1, "USDC", Decimal(100 + i)) for i in range(10)]
    back: list[Obligation] = [(1, 0, "USDC", Decimal(90 + i)) for i in range(10)]
    done = settlement(positions(there + back), TERMS)
    [moved], [charge] = done.movements, done.charges
    assert (moved.payer, moved.payee, moved.amount) == ("m0", "m1", Decimal(100))
    assert (charge.payer, charge.amount) == ("m0", Decimal(1))


def test_a_hundred_and_eighty_net_to_twenty() -> None:
    done = settlement(positions([(0, 1, "USDC", Decimal(100)), (1, 0, "USDC", Decimal(80))]), TERMS)
    assert [(m.payer, m.payee, m.amount) for m in done.movements] == [("m0", "m1", Decimal(20))]


def test_what_nets_to_nothing_moves_nothing() -> None:
    ring: list[Obligation] = [(i, (i + 1) % 5, "BTC", Decimal("0.1")) for i in range(5)]
    done = settlement(positions(ring), TERMS)
    assert (list(done.movements), list(done.charges)) == ([], [])


def test_the_largest_are_matched_first() -> None:
    nets = {name: Decimal(net) for name, net in {"a": 70, "b": 30, "c": -60, "d": -40}.items()}
    assert [(m.payer, m.payee, m.amount) for m in movements("USDC", nets)] == [
        ("a", "c", Decimal(60)),
        ("b", "d", Decimal(30)),
        ("a", "d", Decimal(10)),
    ]


def test_nets_of_no_group_are_refused() -> None:
    with pytest.raises(ArithmeticError):
        movements("USDC", {"a": Decimal(1), "b": Decimal("-0.999999")})


def test_what_is_reserved_of_a_running_net() -> None:
    """100 with a fee of 1 % and a buffer of 5 %, each rounded up at the asset's last digit."""
    assert (TERMS.due("USDC", Decimal(100)), TERMS.cover("USDC", Decimal(100))) == (Decimal(101), Decimal(106))
    assert TERMS.cover("USDC", Decimal("0.000001")) == Decimal("0.000003")
    assert (TERMS.due("USDC", Decimal(-5)), TERMS.cover("USDC", Decimal(0))) == (Decimal(0), Decimal(0))
