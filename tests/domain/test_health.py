"""Scales, bands, nulls and advisories at and around their boundaries (RISK.md section 1)."""

from __future__ import annotations

import math

import pytest

from tests.domain.book import Book, Holding, book, linear, option

# Reservations alone: utilization = margin_ratio = reserved / 10,000.
SCALES = [
    # reserved, zone, alert, status, bands of margin_ratio, utilization, liquidation_buffer
    (0.0, "GREEN", "OK", "SAFE", "safe", "safe", "safe"),
    (4_999.99, "GREEN", "OK", "SAFE", "safe", "safe", "safe"),
    (5_000.0, "GREEN", "WARNING", "SAFE", "warning", "safe", "safe"),
    (5_999.99, "GREEN", "WARNING", "SAFE", "warning", "safe", "safe"),
    (6_000.0, "YELLOW", "WARNING", "SAFE", "warning", "warning", "safe"),
    (6_000.01, "YELLOW", "WARNING", "SAFE", "warning", "warning", "warning"),
    (6_999.99, "YELLOW", "WARNING", "SAFE", "warning", "warning", "warning"),
    (7_000.0, "YELLOW", "DANGER", "SAFE", "warning", "warning", "warning"),
    (7_499.99, "YELLOW", "DANGER", "SAFE", "warning", "warning", "warning"),
    (7_500.0, "ORANGE", "DANGER", "SAFE", "warning", "warning", "warning"),
    (7_999.99, "ORANGE", "DANGER", "SAFE", "warning", "warning", "warning"),
    (8_000.0, "ORANGE", "DANGER", "WARNING", "critical", "critical", "warning"),
    (8_000.01, "ORANGE", "DANGER", "WARNING", "critical", "critical", "critical"),
    (8_499.99, "ORANGE", "DANGER", "WARNING", "critical", "critical", "critical"),
    (8_500.0, "RED", "EMERGENCY", "WARNING", "critical", "critical", "critical"),
    (8_999.99, "RED", "EMERGENCY", "WARNING", "critical", "critical", "critical"),
    (9_000.0, "RED", "EMERGENCY", "DANGER", "critical", "critical", "critical"),
    (9_999.99, "RED", "EMERGENCY", "DANGER", "critical", "critical", "critical"),
    (10_000.0, "RED", "EMERGENCY", "LIQUIDATION", "critical", "critical", "critical"),
    (20_000.0, "RED", "EMERGENCY", "LIQUIDATION", "critical", "critical", "critical"),
]


@pytest.mark.parametrize(("reserved", "zone", "alert", "status", "ratio", "utilization", "buffer"), SCALES)
def test_lower_bounds_are_inclusive(
    reserved: float, zone: str, alert: str, status: str, ratio: str, utilization: str, buffer: str
) -> None:
    health = book(held={"USDC": 10_000.0}, reserved=reserved).quote().health
    assert (health.zone, health.alert_level, health.status) == (zone, alert, status)
    bands = {name: band.band for name, band in health.bands.items()}
    assert bands["margin_ratio"] == ratio
    assert bands["utilization"] == utilization
    assert bands["liquidation_buffer"] == buffer
    assert health.health_score == pytest.approx(max(0.0, 100 * (1 - reserved / 10_000)))


@pytest.mark.parametrize(("reserved", "shortfall"), [(9_000.0, 2_000.0), (7_500.0, 0.0), (7_000.0, 0.0)])
def test_the_shortfall_is_what_three_quarters_want(reserved: float, shortfall: float) -> None:
    health = book(held={"USDC": 10_000.0}, reserved=reserved).quote().health
    assert health.shortfall == pytest.approx(shortfall)


def test_zone_and_alert_level_part_ways() -> None:
    # utilization .85 on 28,333.33 of notional, margin ratio half of it
    health = book(linear("BTC-PERP", "long", 8_500 / 0.3 / 60_000 * 1.000001), held={"USDC": 10_000.0}).quote().health
    assert (health.zone, health.alert_level, health.status) == ("RED", "OK", "WARNING")


@pytest.mark.parametrize(
    ("notional", "band"), [(19_999, "safe"), (20_000, "warning"), (34_999, "warning"), (35_000, "critical")]
)
@pytest.mark.parametrize("side", ["long", "short"])
def test_net_exposure_bands(notional: float, band: str, side: str) -> None:
    health = book(linear("X", side, notional, mark_price=1.0), held={"USDC": 10_000.0}, prices={}).quote().health
    assert health.bands["net_exposure_ratio"].band == band
    assert health.net_exposure_ratio == pytest.approx(notional / 10_000)


@pytest.mark.parametrize(
    ("equity", "band"), [(3_320.01, "safe"), (3_319.99, "warning"), (3_200.01, "warning"), (3_199.99, "critical")]
)
def test_survival_bands(equity: float, band: str) -> None:
    # after -20 % of a long 10,000: (equity - 2,000) / (.15 x 8,000)
    health = book(linear("X", "long", 10_000.0, mark_price=1.0), held={"USDC": equity}, prices={}).quote().health
    assert health.stress_survival == pytest.approx((equity - 2_000) / 1_200)
    assert health.bands["stress_survival"].band == band


def test_survival_takes_the_worse_side() -> None:
    health = book(linear("X", "short", 10_000.0, mark_price=1.0), held={"USDC": 5_000.0}, prices={}).quote().health
    assert health.stress_survival == pytest.approx((5_000 - 2_000) / (0.15 * 12_000))


def test_survival_leaves_volatility_alone_and_stables_still() -> None:
    rows = (option("BTC", "put", "short", 1.0, 55_000.0, 30, 0.6),)
    whole = book(*rows, held={"USDC": 40_000.0, "ETH": 1.0})
    after = [whole.common(move).quote().health for move in (-0.2, 0.2)]
    expected = min(h.equity / h.required_maintenance for h in after)
    assert whole.quote().health.stress_survival == pytest.approx(expected)


def test_survival_is_finite_where_next_to_nothing_has_to_be_kept() -> None:
    # the margin of a long option is its value, after a fall of 20 % some 1e-309
    row = option("BTC", "put", "long", 1.0, 27_980.0, 30, 0.05)
    health = book(row, held={"USDC": 40_000.0}).quote().health
    assert health.stress_survival is None or math.isfinite(health.stress_survival)


INSOLVENT = [
    book(linear("BTC-PERP", "long", 1.0), prices={"BTC": 60_000.0}),
    book(linear("BTC-PERP", "long", 1.0, entry_price=70_000.0), held={"USDC": 10_000.0}),
    book(linear("BTC-PERP", "long", 1.0, entry_price=70_000.0), held={"USDC": 5_000.0}),
    Book(rows=(linear("BTC-PERP", "short", 1.0),), owed=(Holding("USDC", 5_000.0),), mode="portfolio"),
    Book(owed=(Holding("USDC", 5_000.0),), reserved=1.0),
]


@pytest.mark.parametrize("whole", INSOLVENT)
def test_at_or_below_zero_equity(whole: Book) -> None:
    health = whole.quote().health
    assert health.equity <= 0
    assert health.insolvent
    for name in ("utilization", "margin_ratio", "liquidation_buffer", "net_exposure_ratio", "stress_survival"):
        assert getattr(health, name) is None
    assert {band.band for band in health.bands.values()} == {"critical"}
    assert {band.value for band in health.bands.values()} == {None}
    assert (health.zone, health.alert_level, health.status) == ("RED", "EMERGENCY", "LIQUIDATION")
    assert health.health_score == health.free_margin == health.headroom == 0.0


@pytest.mark.parametrize("held", [{}, {"USDC": 10.0}])
def test_nothing_open(held: dict[str, float]) -> None:
    quote = book(held=held).quote()
    health = quote.health
    assert (health.zone, health.alert_level, health.status) == ("GREEN", "OK", "SAFE")
    assert health.utilization == health.margin_ratio == health.net_exposure_ratio == 0.0
    assert health.liquidation_buffer == 1.0
    assert health.stress_survival is None
    assert {band.band for band in health.bands.values()} == {"safe"}
    assert health.health_score == 100.0
    assert not health.insolvent
    assert quote.distances.to_breach is None
    assert quote.distances.to_liquidation is None


def test_debt_alone_is_insolvent() -> None:
    # its equity is below its maintenance margin of nothing, which opens a margin call: it can't be called safe
    health = Book(owed=(Holding("USDC", 5.0),)).quote().health
    assert health.insolvent
    assert health.status == "LIQUIDATION"


def test_a_full_hedge_at_zero_equity_is_a_number() -> None:
    rows = linear("BTC-PERP", "long", 1.0), linear("BTC-PERP", "short", 1.0)
    health = book(*rows).quote().health
    assert health.equity == 0.0
    assert health.utilization == health.margin_ratio == health.net_exposure_ratio == 0.0
    assert health.gross_leverage is None


def test_collateral_after_haircut_and_recall() -> None:
    held = (Holding("USDC", 1_000.0), Holding("BTC", 1.0, 0.4), Holding("DOGE", 100.0))
    quote = Book(held=held, owed=(Holding("ETH", 2.0),)).quote()
    assert quote.collateral.collateral_value == pytest.approx(1_000 + 54_000 - 0.05 * 0.4 * 60_000 + 10)
    assert quote.collateral.liabilities == pytest.approx(6_000)


def test_advisories() -> None:
    codes = {a.code: a for a in Book(held=(Holding("BTC", 1.0, 0.41), Holding("USDC", 30_000.0))).quote().advisories}
    assert codes["stable_share_low"].value == pytest.approx(1 / 3)
    assert codes["asset_share_high"].value == pytest.approx(2 / 3)
    assert codes["lent_share_high"].value == pytest.approx(0.41)
    balanced = (Holding("BTC", 0.5, 0.2), Holding("USDC", 30_000.0))
    assert not Book(held=balanced).quote().advisories


def test_gross_leverage_above_the_cap() -> None:
    at_cap, above = (
        book(linear("X", "long", size, mark_price=1.0), held={"USDC": 10_000.0}, prices={}).quote().advisories
        for size in (35_000.0, 35_001.0)
    )
    assert not at_cap
    assert [a.code for a in above] == ["leverage_above_cap"]
    assert above[0].limit == 3.5


@pytest.mark.parametrize(("stated", "told"), [((600.0, 400.0), False), ((600.0, 400.01), True), ((None, None), True)])
def test_allocations_above_the_collateral(stated: tuple[float | None, ...], told: bool) -> None:
    rows = [
        linear("X", "long", 2_000.0, mark_price=1.0, margin_mode="isolated", allocated_collateral=a) for a in stated
    ]
    quote = book(*rows, held={"USDC": 1_000.0}, prices={}).quote()
    found = [a for a in quote.advisories if a.code == "allocated_above_collateral"]
    assert [(a.value, a.limit) for a in found] == [(quote.allocated, 1_000.0)] * told


@pytest.mark.parametrize(("usdc", "eligible"), [(9_999.99, False), (10_000.0, True)])
def test_eligible_for_portfolio_margin(usdc: float, eligible: bool) -> None:
    assert book(held={"USDC": usdc}).quote().eligible is eligible
