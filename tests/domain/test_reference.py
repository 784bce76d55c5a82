"""The service against the second implementation in reference.py, over drawn books."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from app.domain.quote import MarginQuote
from tests.domain.book import MODELS, NOW, Book, underlying_of
from tests.domain.drawn import books
from tests.domain.reference import Reference, nearest_root

QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking a whole book takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)
ROOTS = settings(QUICK, max_examples=50)
SLOW = settings(QUICK, max_examples=10)


def close(value: float, scale: float) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-10 * scale + 1e-9)


def scale_of(book: Book, reference: Reference) -> float:
    held = sum(abs(h.amount) * book.prices[h.asset] for h in (*book.held, *book.owed))
    return held + sum(leg.notional for leg in reference.whole)


@QUICK
@given(books())
def test_margins_agree(book: Book) -> None:
    reference, quote = Reference(book, NOW), book.quote()
    scale = scale_of(book, reference)
    for name in MODELS:
        expected = reference.model(name)
        assert quote.models[name].initial_margin == close(expected.initial, scale), name
        assert quote.models[name].maintenance_margin == close(expected.maintenance, scale), name
    parts = reference.portfolio_parts(reference.whole)
    shown = quote.models["portfolio"]
    for part in ("joint", "parallel", "floor"):
        assert shown.notes[part] == close(parts[part], scale), part
    assert shown.add_ons["concentration"] == close(parts["concentration"], scale)
    isolated = reference.model("isolated").initial
    for name in MODELS:
        if 0 < isolated < 1e-6:
            continue
        freed = 1 - reference.model(name).initial / isolated if isolated > 0 else 0.0
        assert quote.capital_freed[name] == pytest.approx(freed, rel=1e-6, abs=1e-6)


@QUICK
@given(books())
def test_account_figures_agree(book: Book) -> None:
    reference, quote = Reference(book, NOW), book.quote()
    scale, health, required = scale_of(book, reference), quote.health, reference.required()
    equity = reference.pool_equity()
    assert quote.equity == close(reference.equity(), scale)
    assert quote.collateral.collateral_value == close(reference.collateral_value(), scale)
    assert quote.collateral.liabilities == close(reference.liabilities(), scale)
    assert health.equity == close(equity, scale)
    assert health.required_initial == close(required.initial, scale)
    assert health.required_maintenance == close(required.maintenance, scale)
    assert health.free_margin == close(max(0.0, equity - required.initial), scale)
    assert health.headroom == close(max(0.0, equity - required.initial / 0.60), scale)
    assert health.shortfall == close(max(0.0, required.initial / 0.75 - equity), scale)
    assert quote.eligible == (quote.equity >= 10_000)
    if equity > 1e-6 * scale:
        check_ratios(reference, quote)


def check_ratios(reference: Reference, quote: MarginQuote) -> None:
    equity, required, health = reference.pool_equity(), reference.required(), quote.health
    ratio = required.maintenance / equity
    net = abs(sum(leg.exposure for leg in reference.pool))
    assert health.utilization == pytest.approx(required.initial / equity, rel=1e-6, abs=1e-9)
    assert health.margin_ratio == pytest.approx(ratio, rel=1e-6, abs=1e-9)
    assert health.liquidation_buffer == pytest.approx(1 - ratio, rel=1e-6, abs=1e-6)
    assert health.net_exposure_ratio == pytest.approx(net / equity, rel=1e-6, abs=1e-6)
    assert health.health_score == pytest.approx(100 * min(max(1 - ratio, 0), 1), rel=1e-6, abs=1e-6)


@QUICK
@given(books(modes_of=("cross", "isolated")))
def test_survival_agrees(book: Book) -> None:
    survival(book)


@SLOW
@given(books(modes_of=("portfolio",)))
def test_survival_agrees_under_portfolio_margin(book: Book) -> None:
    survival(book)


def survival(book: Book) -> None:
    reference, quote = Reference(book, NOW), book.quote()
    if reference.pool_equity() <= 1e-6 * scale_of(book, reference):
        return
    after = [Reference(moved(book, None, move), NOW) for move in (-0.2, 0.2)]
    known = [
        r.pool_equity() / r.required().maintenance
        for r in after
        if r.required().maintenance > 1e-9 * scale_of(book, reference)
    ]
    if len(known) == 2:
        assert quote.health.stress_survival == pytest.approx(min(known), rel=1e-6, abs=1e-9)


@ROOTS
@given(books(modes_of=("cross", "isolated")))
def test_liquidation_agrees(book: Book) -> None:
    liquidation(book)


@SLOW
@given(books(modes_of=("portfolio",)))
def test_liquidation_agrees_under_portfolio_margin(book: Book) -> None:
    liquidation(book)


def liquidation(book: Book) -> None:
    quote, reference = book.quote(), Reference(book, NOW)
    tiny = 1e-7 * scale_of(book, reference)

    def surplus(name: str | None) -> Callable[[float], float]:
        return lambda move: Reference(moved(book, name, move), NOW).surplus()

    same_root(quote.distances.to_liquidation, surplus(None), tiny)
    for name, move in zip(quote.portfolio.underlyings.names, quote.distances.by_underlying.tolist(), strict=True):
        same_root(None if math.isnan(move) else move, surplus(name), tiny)
    for row, leg in enumerate(reference.whole):
        if leg.allocation is not None and leg.notional > 0:
            own = underlying_of(book.rows[row])
            move = float(quote.liquidation_move[row])
            same_root(None if math.isnan(move) else move, own_surplus(book, own, row), tiny)
    if abs(reference.surplus()) > tiny:
        assert quote.distances.liquidatable == (reference.surplus() < 0)


def own_surplus(book: Book, name: str, row: int) -> Callable[[float], float]:
    return lambda move: Reference(moved(book, name, move), NOW).own_surplus(row)


def moved(book: Book, name: str | None, move: float) -> Book:
    # an allocation that is not given was posted at entry: it does not move
    reference = Reference(book, NOW)
    rows = tuple(
        row if leg.allocation is None else {**row, "allocated_collateral": leg.allocation}
        for row, leg in zip(book.rows, reference.whole, strict=True)
    )
    fixed = Book(**{**book.__dict__, "rows": rows})
    return fixed.common(move) if name is None else fixed.moved({name: move})


def same_root(reported: float | None, surplus: Callable[[float], float], tiny: float) -> None:
    """Compare with our own root; where both are there the nearer must be the reported one."""
    expected = nearest_root(surplus)
    if all(abs(surplus(m)) < tiny for m in (0.0, 0.3, -0.3)):
        return  # all but zero everywhere: rounding decides
    if reported is not None:
        near, at, far = (surplus((1 + reported) * (1 + e) - 1) for e in (-1e-6, 0.0, 1e-6))
        # it crosses there, or touches: with nothing but a short gamma the surplus is a wedge with its tip at zero
        assert (near < 0) != (far < 0) or min(abs(near), abs(at), abs(far)) < tiny
    if expected is None:
        assert reported is None or not 1e-6 < 1 + reported < 1_001  # beyond our walk
        return
    if all(abs(surplus((1 + expected) * (1 + e) - 1)) < tiny for e in (-1e-3, 1e-3)):
        return  # it touches zero, as a worthless option does: rounding decides
    assert reported is not None, expected
    assert reported == pytest.approx(expected, rel=1e-6, abs=1e-8)
