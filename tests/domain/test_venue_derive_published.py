"""Derive's PM2 against the portfolio cases that the venue publishes with its contracts (v2-core, PMRM_2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from app.domain.margin.venues.derive import DeriveInputs, DeriveParameters
from tests.domain.book import Row, linear, option
from tests.domain.venue_books import margined, unit_figure

BTC, ETH, USDC = 95_663.50604855, 2_681.6029850999994, 1.00019088635
WEEK, FORTNIGHT, MONTH, QUARTER, HALF_YEAR = 794_852, 1_399_652, 3_214_052, 11_076_452, 18_938_852
FORWARDS = {
    ("BTC", WEEK): 95_776.67392708939,
    ("BTC", MONTH): 96_248.76561417685,
    ("BTC", QUARTER): 98_198.07812501276,
    ("BTC", HALF_YEAR): 100_374.61000117072,
    ("ETH", 1): 2_682.9997436016715,
    ("ETH", WEEK): 2_682.9997436016715,
    ("ETH", FORTNIGHT): 2_687.1439750528034,
    ("ETH", MONTH): 3_014.178509176334,
    ("ETH", HALF_YEAR): 2_801.18485249767,
}


def held(name: str, amount: float, strike: float, kind: str, seconds: int, iv: float, rate: float) -> Row:
    side = "long" if amount > 0.0 else "short"
    forward = FORWARDS[name, seconds]
    return option(name, kind, side, abs(amount), strike, seconds / 86_400, iv, rate=rate, forward=forward)


NOTHING = DeriveInputs()


@dataclass(frozen=True)
class Case:
    """A portfolio as published: P&L of the worst scenario, of the basis and of both skews, and the net margins, signed.

    What collateral is worth is taken off the net margins: here it is no part of them. The basis is left out of books
    whose expiries lose in opposite moves: the files give one of them, the contracts and the rule add them up.
    """

    rows: tuple[Row, ...]
    worst: float
    skews: tuple[float, float]
    initial: float
    maintenance: float
    basis: float | None = None
    inputs: DeriveInputs = NOTHING
    own: Mapping[str, object] = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=lambda: {"BTC": BTC, "ETH": ETH, "USDC": USDC})


COVERED, HEDGE = 95_645.24867613538, 10_132.529435329823
BOX = ("call", -1.0, 100_000.0, 0.5543377511787965), ("call", 1.0, 110_000.0, 0.5592157396329432)
PUTS = ("put", 1.0, 100_000.0, 0.5543377511787965), ("put", -1.0, 110_000.0, 0.5592157396329432)

CASES = {
    "call_spread": Case(
        rows=(
            held("ETH", -1.0, 4_000.0, "call", WEEK, 0.8795543651099665, 0.15),
            held("ETH", 1.0, 4_200.0, "call", WEEK, 0.8833255402190362, 0.15),
        ),
        worst=-22.15596034331399,
        basis=-0.18719471531829726,
        skews=(-0.42564850725437114, -0.42564850725437114),
        initial=-35.75844560967082,
        maintenance=-25.96404757080802,
    ),
    "delta_neutral_risk_reversal": Case(
        rows=(
            linear("ETH-PERP", "short", 0.354, mark_price=2_681.0, entry_price=2_681.0),
            held("ETH", 1.0, 3_100.0, "call", FORTNIGHT, 0.6826604391503175, 0.17),
            held("ETH", -1.0, 2_375.0, "put", FORTNIGHT, 0.689188821287917, 0.17),
        ),
        worst=-114.13734630880396,
        basis=-25.70640813637827,
        skews=(-7.536104005394503, -0.5264444585226524),
        initial=-151.7861049071551,
        maintenance=-118.85126564539434,
        prices={"ETH": 2_681.0},
    ),
    "call_spread_of_low_confidence": Case(
        rows=(
            held("ETH", 1.0, 1_700.0, "call", MONTH, 0.981510069021587, 0.21),
            held("ETH", -1.0, 1_800.0, "call", MONTH, 0.938667615013681, 0.21),
        ),
        worst=-20.746056469341525,
        basis=-0.7911250264267096,
        skews=(-6.918252721753532, -7.627110532798554),
        initial=-4_740.496330315975,
        maintenance=69.65288097789352,
        inputs=DeriveInputs(confidence=0.2),
        prices={"ETH": 3_000.0},
    ),
    "perpetual_of_low_confidence": Case(
        rows=(linear("ETH-PERP", "short", 1.0, mark_price=4_000.0, entry_price=3_100.0),),
        worst=-720.0,
        basis=0.0,
        skews=(0.0, 0.0),
        initial=-4_380.0,
        maintenance=-1_521.0,
        inputs=DeriveInputs(confidence=0.1),
        prices={"ETH": 3_000.0},
    ),
    "two_expiries": Case(
        rows=(
            held("BTC", 1.5, 100_000.0, "call", HALF_YEAR, 0.5543377511787965, 0.2),
            held("BTC", 2.1, 120_000.0, "put", HALF_YEAR, 0.5665119096978181, 0.2),
            held("BTC", -4.0, 120_000.0, "put", QUARTER, 0.5646450091750466, 0.1),
        ),
        worst=-64_978.620774194904,
        skews=(-20_143.53722156721, -20_134.331828240734),
        initial=-94_908.87072619566,
        maintenance=-81_147.83852296826,
    ),
    "short_box_at_its_cap": Case(
        rows=tuple(held("BTC", q, k, kind, HALF_YEAR, iv, 0.1) for kind, q, k, iv in (*BOX, *PUTS)),
        worst=-582.8698492580588,
        basis=0.0,
        skews=(-582.8698492580534, -582.8698492580534),
        initial=-10_000.0,
        maintenance=-9_883.426030148392,
        own={"short_rate_multiple": 3.0, "short_rate_add": 5.0},
    ),
    "volatility_bounded_at_nothing": Case(
        rows=(held("BTC", 1.0, 2_500.0, "call", WEEK, 0.15213047481388386, 0.15),),
        worst=-21_378.206708673126,
        basis=-2_363.2844845036507,
        skews=(-5_156.509161626585, -5_156.509161626585),
        initial=14_148.379309536263,
        maintenance=75_822.12428040088,
        inputs=DeriveInputs(confidence=0.4),
        own={"volatility_down": 2.0},
    ),
    "a_second_to_expiry": Case(  # settled but for a 1,800th
        rows=(held("ETH", -1.0, 2_700.0, "call", 1, 0.6360190705815766, 0.15),),
        worst=0.0,
        basis=0.0,
        skews=(0.0, 0.0),
        initial=-13.408014925499998,
        maintenance=-8.044808955299999,
        own={"volatility_floor": 1.0},
    ),
    "covered_call": Case(
        rows=(
            linear("BTC-USD", "long", 1.0, mark_price=COVERED),
            held("BTC", -2.0, 100_000.0, "call", WEEK, 0.453803924321583, 0.15),
        ),
        worst=-15_050.749373322431,
        basis=-1_894.419609860217,
        skews=(-86.86790519006036, -86.86790519006036),
        initial=74_395.66964312586 - COVERED,
        maintenance=78_744.92602874589 - COVERED,
        inputs=DeriveInputs(collateral_initial=2_869.3574602840613, collateral_maintenance=1_912.9049735227075),
    ),
    "basis_of_collateral_and_two_expiries": Case(
        rows=(
            linear("ETH-USD", "long", 0.1, mark_price=ETH / USDC),
            held("ETH", 0.01, 4_000.0, "put", WEEK, 0.8795543651099665, 0.15),
            held("ETH", -0.6, 1_000.0, "call", WEEK, 1.225482363870083, 0.15),
            held("ETH", 0.01, 5_000.0, "put", HALF_YEAR, 0.7065777498085652, 0.29),
            held("ETH", -0.6, 500.0, "call", HALF_YEAR, 0.9537288427123918, 0.29),
        ),
        worst=-777.6482885422348,
        basis=-751.997756717363,
        skews=(-219.719789256289, -222.660726557638),
        initial=4_314.521663887444 - HEDGE,
        maintenance=4_965.050821168831 - HEDGE,
        inputs=DeriveInputs(collateral_initial=2_889.714415065716, collateral_maintenance=2_401.150762657017),
        own={"basis_factor": 4.0, "basis_factor_annual": 5.0},
    ),
    "tails_that_bind": Case(
        rows=(
            linear("BTC-USD", "long", 2.86, mark_price=BTC / USDC),
            held("BTC", -24.0, 70_000.0, "call", MONTH, 0.6471940890501066, 0.21),
            held("BTC", -14.0, 120_000.0, "put", QUARTER, 0.5646450091750466, 0.27),
            held("BTC", -43.0, 190_000.0, "call", HALF_YEAR, 0.6289064859688547, 0.29),
        ),
        worst=-21_614_960.99035228,
        skews=(-91_176.02231821525, -96_966.34310506462),
        initial=-22_327_723.787738454 - 439_058.0808580691,
        maintenance=-17_976_278.899254967 - 439_058.0808580691,
        inputs=DeriveInputs(
            cash=10_000.0,
            collateral_initial=28_609.69250250758 + 5_783.496009556497,
            collateral_maintenance=21_437.98607889784,
        ),
        own={"tails": ((-0.66, 3.0), (-0.33, 1.5), (0.5, 5.0), (1.0, 0.1), (2.0, 2.3))},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_published_portfolio(name: str) -> None:
    case = CASES[name]
    unit = case.rows[-1].get("underlying") or "ETH"
    own = DeriveParameters(**case.own)  # type: ignore[arg-type]
    result = margined(
        "derive",
        *case.rows,
        prices=case.prices,
        inputs={unit: case.inputs},
        parameters={unit: own} if case.own else None,
    )
    assert unit_figure(result, "worst_scenario") == pytest.approx(case.worst, rel=1e-9, abs=1e-9)
    if case.basis is not None:
        assert unit_figure(result, "basis") == pytest.approx(case.basis, rel=1e-9, abs=1e-8)
    assert result.per_underlying["scenario_pnl"][0][-2:] == pytest.approx(case.skews, rel=1e-9, abs=1e-9)
    net = [result.notes["net_initial"], result.notes["net_maintenance"]]
    assert net == pytest.approx([case.initial, case.maintenance], rel=1e-9)
    assert result.position_initial.sum() == pytest.approx(result.initial_margin, rel=1e-9)


def test_a_rate_below_nothing_marks_nothing_up() -> None:
    """The published box at -1.2 loses nothing in any scenario: its discounts are those of a rate of 0."""
    rows = [held("BTC", q, k, kind, HALF_YEAR, iv, -1.2) for kind, q, k, iv in (*BOX, *PUTS)]
    result = margined("derive", *rows, prices={"BTC": BTC})
    assert unit_figure(result, "worst_scenario") == pytest.approx(0.0, abs=1e-6)
