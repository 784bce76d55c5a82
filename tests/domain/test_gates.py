from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import pytest

from app.domain.book import THRESHOLDS, AccountSettings, Book, Holding, OpenPosition, OpenReservation
from app.domain.gates import Refusal, refusal, stale_symbols
from app.domain.parameters import HealthPolicy
from app.domain.prices import StoredPrice
from app.errors import ConflictError
from app.services.margin import Scene
from app.services.market_cache import MarketView

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = HealthPolicy()
Sizes = Mapping[str, Any]


def scene(btc: float = 100.0, eth: float = 100.0, age_seconds: float = 0.0) -> Scene:
    as_of = NOW - timedelta(seconds=age_seconds)
    prices = {"BTC": StoredPrice(btc, as_of), "ETH": StoredPrice(eth, NOW)}
    return Scene(MarketView(prices=MappingProxyType(prices)), NOW, timedelta(seconds=60), 100)


def book(
    usdc: Any,
    reserved: Any = 0,
    owed: Any = 0,
    *,
    entry: Any = 100,
    isolated: Any = None,
    own: Any = None,
    **sizes: Any,
) -> Book:
    """Return a book of USDC and positions by symbol with _ for -, below zero for a short."""
    positions = [
        position(symbol.replace("_", "-"), Decimal(size), Decimal(entry), isolated) for symbol, size in sizes.items()
    ]
    held = Holding(Decimal(usdc), Decimal(reserved), Decimal(isolated or 0), Decimal(owed))
    holds = [reservation(Decimal(reserved))] if reserved else []
    return Book("alice", AccountSettings(**(own or {})), 1, {"USDC": held}, positions, holds)


def position(symbol: str, size: Decimal, entry: Decimal, allocated: Any) -> OpenPosition:
    return OpenPosition(
        id=symbol,
        symbol=symbol,
        side="long" if size > 0 else "short",
        size=abs(size),
        entry_price=entry,
        leverage=None,
        margin_mode="pooled" if allocated is None else "isolated",
        allocated=Decimal(allocated or 0),
        realized_pnl=Decimal(0),
        reducible=True,
        opened_at=NOW,
    )


def reservation(amount: Decimal) -> OpenReservation:
    return OpenReservation("res", "casino", "USDC", amount, amount, Decimal(0), None, True, NOW)


def judged(before: Book, after: Book, at: Scene | None = None) -> Refusal | None:
    return (at or scene()).refusal(before, after)


def code(before: Book, after: Book, at: Scene | None = None) -> str | None:
    refused = judged(before, after, at)
    return None if refused is None else refused.code


# --- the gate: initial margin .30 a unit of 100, so 30 USD of margin a contract


def test_utilization_may_come_to_the_gate() -> None:
    # 24 contracts: 720 of margin; 720 / .80 = 900
    assert code(book(900), book(900, BTC_PERP=24)) is None


@pytest.mark.parametrize(("usdc", "passes"), [("900.00001", True), ("899.99999", False), ("899", False)])
def test_but_not_past_it(usdc: str, passes: bool) -> None:
    assert code(book(usdc), book(usdc, BTC_PERP=24)) == (None if passes else "insufficient_margin")


@pytest.mark.parametrize(
    ("equity", "size"), [(7, "0.1866666666666666667"), ("0.3", "0.008"), (123, "3.28"), (3, "0.08")]
)
def test_rounding_of_sums_closes_no_gate(equity: Any, size: str) -> None:
    # size x 30 is .80 of the equity: in floats at times a bit more
    assert code(book(equity), book(equity, BTC_PERP=size)) is None


def test_the_shortfall_is_what_would_let_it_pass() -> None:
    refused = judged(book(500), book(500, BTC_PERP=-24))
    assert refused is not None
    assert refused.shortfall == pytest.approx(400.0, rel=1e-12)
    assert code(book(900), book(900, BTC_PERP=-24)) is None
    assert "0.8" in refused.detail
    assert "1.44" in refused.detail


def test_reservations_count_beside_margin() -> None:
    # 300 of margin + 420 reserved of 900
    assert code(book(900, BTC_PERP=10), book(480, 420, BTC_PERP=10)) is None
    refused = judged(book(900, BTC_PERP=10), book(479, 421, BTC_PERP=10))
    assert refused is not None
    assert refused.code == "insufficient_margin"
    assert refused.shortfall == pytest.approx(1 / 0.8, rel=1e-9)


@pytest.mark.parametrize(
    ("before", "after", "passes"),
    [
        # 24 contracts on 800 are at .90 already
        ({"BTC_PERP": 24}, {"BTC_PERP": 24}, True),
        ({"BTC_PERP": 24}, {"BTC_PERP": 23}, True),
        ({"BTC_PERP": 24}, {"BTC_PERP": "24.001"}, False),
        ({"BTC_PERP": 24}, {"BTC_PERP": -24}, True),
        ({"BTC_PERP": 24}, {"BTC_PERP": 24, "BTC_MAR": -1}, True),
        ({"BTC_PERP": 24}, {"BTC_PERP": 24, "BTC_MAR": 1}, False),
        ({"BTC_PERP": 24}, {"BTC_PERP": 23, "ETH_PERP": 1}, True),
        ({"BTC_PERP": 24}, {"BTC_PERP": 24, "ETH_PERP": -1}, False),
    ],
)
def test_past_the_gate_only_what_raises_utilization_is_refused(before: Sizes, after: Sizes, passes: bool) -> None:
    assert code(book(800, **before), book(800, **after)) == (None if passes else "insufficient_margin")


def test_past_the_gate_nothing_is_withdrawn() -> None:
    assert code(book(800, BTC_PERP=24), book("799.99", BTC_PERP=24)) == "insufficient_margin"
    assert code(book(800, BTC_PERP=24), book(850, BTC_PERP=24)) is None


@pytest.mark.parametrize("usdc", [0, 10])
def test_without_equity_nothing_opens(usdc: int) -> None:
    # a fall of 10 on one contract
    at = scene(btc=90.0)
    refused = judged(book(usdc, BTC_PERP=1), book(usdc, BTC_PERP=1, ETH_PERP=1), at)
    assert refused is not None
    assert refused.code == "insufficient_margin"
    assert "no equity" in refused.detail
    # 27 + 30 of margin over the gate, less an equity of usdc - 10
    assert refused.shortfall == pytest.approx(57 / 0.8 - (usdc - 10), rel=1e-12)


def test_a_debt_without_cover_is_no_standing() -> None:
    assert code(book(0, owed=5), book(0, owed=6)) == "insufficient_margin"


@pytest.mark.parametrize(("usdc", "passes"), [(100, True), ("99.99", False)])
def test_a_debt_weighs_at_most_the_gate_s_share_of_what_is_held(usdc: Any, passes: bool) -> None:
    before, after = (
        replace(book(0), holdings={"USDC": Holding(owed=Decimal(80)), "USDT": Holding(free=Decimal(free))})
        for free in (150, usdc)
    )
    assert code(before, after) == (None if passes else "insufficient_margin")
    assert code(after, after) is None


def test_what_leaves_nothing_required_passes() -> None:
    assert code(book(100, BTC_PERP=1), book(90)) is None
    assert code(book(10), book(0)) is None


# --- the cap on gross notional


def hedged(usdc: Any, each: Any, **more: Any) -> Book:
    return book(usdc, BTC_PERP=each, BTC_MAR=-Decimal(each), **more)


@pytest.mark.parametrize(("each", "passes"), [("17.5", True), ("17.500001", False), ("30", False)])
def test_gross_notional_may_come_to_the_cap(each: str, passes: bool) -> None:
    # 17.5 long and 17.5 short of 100 on 1,000: nothing net, gross 3.5 times the equity
    assert code(book(1_000), hedged(1_000, each)) == (None if passes else "leverage_above_cap")


def test_a_withdrawal_may_not_pass_the_cap_either() -> None:
    assert code(hedged(1_001, "17.5"), hedged(1_000, "17.5")) is None
    assert code(hedged(1_000, "17.5"), hedged(999, "17.5")) == "leverage_above_cap"


def test_the_shortfall_to_the_cap() -> None:
    refused = judged(book(1_000), hedged(1_000, 28))
    assert refused is not None
    # 5,600 / 3.5 = 1,600
    assert refused.shortfall == pytest.approx(600.0)
    assert code(book(1_600), hedged(1_600, 28)) is None


def test_isolated_positions_count_to_the_cap() -> None:
    # 35 contracts hold 1,050 for themselves
    assert code(book(1_050), book(0, isolated=1_050, BTC_PERP=35)) is None
    assert code(book(1_050), book(0, isolated=1_050, BTC_PERP=37)) == "leverage_above_cap"


@pytest.mark.parametrize(
    ("after", "passes"),
    [(hedged(1_000, 20), True), (hedged(1_000, 19), True), (hedged(1_000, "20.1"), False), (hedged(999, 20), False)],
    ids=["as it is", "less", "more", "a withdrawal"],
)
def test_above_the_cap_only_what_raises_leverage_is_refused(after: Book, passes: bool) -> None:
    assert code(hedged(1_000, 20), after) == (None if passes else "leverage_above_cap")


# --- a wallet without positions


def test_a_wallet_without_positions_may_reserve_all_that_is_free() -> None:
    assert code(book(100), book(0, 100)) == "insufficient_margin"  # by the figures: at 1.00
    scene(age_seconds=9e9).require_margin(book(100), book(0, 100), "/amount")


@pytest.mark.parametrize("more", [{"BTC_PERP": "0.01"}, {"owed": 1}])
def test_with_something_open_or_owed_it_may_not(more: Any) -> None:
    before, after = book(100, **more), book(0, 100, **more)
    with pytest.raises(ConflictError) as refused:
        scene().require_margin(before, after, "/amount")
    assert refused.value.code == "insufficient_margin"
    assert refused.value.errors[0].pointer == "/amount"
    assert refused.value.figures["shortfall"] > 0


# --- stale prices


def stale(held: Book, at: Scene, seconds: float = 60.0) -> Sequence[str]:
    return stale_symbols(at.figures(held), NOW, seconds)


@pytest.mark.parametrize(("age", "expected"), [(0.0, []), (60.0, []), (60.001, ["BTC"]), (1e6, ["BTC"])])
def test_a_price_is_stale_past_the_limit(age: float, expected: list[str]) -> None:
    assert stale(book(100, BTC_PERP=1, ETH_PERP=1), scene(age_seconds=age)) == expected


def test_only_prices_that_count_are_stale() -> None:
    old = scene(age_seconds=100.0)
    assert stale(book(100), old) == []
    assert stale(book(100, ETH_PERP=1), old) == []
    coins = replace(book(100), holdings={"BTC": Holding(free=Decimal(1))})
    assert stale(coins, old) == ["BTC"]


def test_nothing_that_raises_utilization_is_decided_on_a_stale_price() -> None:
    old, held = scene(age_seconds=61.0), book(1_000, BTC_PERP=1)
    with pytest.raises(ConflictError) as refused:
        old.require_margin(held, book(990, BTC_PERP=1), "/amount")
    assert refused.value.code == "stale_price"
    assert [error.pointer for error in refused.value.errors] == ["/market/prices"]
    scene(age_seconds=60.0).require_margin(held, book(990, BTC_PERP=1), "/amount")


# --- an account's own levels


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize(("own", "counts"), [(0.1, True), (0.999, False)])
def test_an_account_s_level_is_never_looser_than_the_market_s(name: str, own: float, counts: bool) -> None:
    held = AccountSettings(**{name: own})  # type: ignore[arg-type]
    market = getattr(POLICY, name)
    policy = held.policy(POLICY)
    assert getattr(policy, name) == (own if counts else market)
    assert replace(policy, **{name: market}) == POLICY


def test_a_market_that_grows_stricter_overrules_an_account() -> None:
    held = AccountSettings(gate_utilization=0.7)
    assert held.policy(replace(POLICY, gate_utilization=0.6)).gate_utilization == 0.6
    assert AccountSettings().policy(POLICY) is POLICY


@pytest.mark.parametrize(("own", "size", "passes"), [(0.5, 15, True), (0.5, "15.01", False), (0.99, "24.01", False)])
def test_the_gate_is_the_account_s_own(own: float, size: Any, passes: bool) -> None:
    # 15 contracts need 450 of 900
    settings = {"gate_utilization": own}
    found = code(book(900, own=settings), book(900, own=settings, BTC_PERP=size))
    assert found == (None if passes else "insufficient_margin")


def test_a_level_shows_in_the_figures_too() -> None:
    at = scene()
    plain = at.figures(book(900, BTC_PERP=15)).health
    strict = at.figures(book(900, own={"target_utilization": 0.5, "shortfall_utilization": 0.45}, BTC_PERP=15)).health
    assert [plain.headroom, plain.shortfall] == pytest.approx([150.0, 0.0])
    assert [strict.headroom, strict.shortfall] == pytest.approx([0.0, 100.0])


def test_both_refusals_are_one_after_the_other() -> None:
    at = scene()
    before, after = at.figures(book(1_000)), at.figures(book(1_000, BTC_PERP=40))
    first = refusal(before, after, POLICY)
    assert first is not None
    assert first.code == "insufficient_margin"
    open_gate = replace(POLICY, gate_utilization=2.0)
    second = refusal(before, after, open_gate)
    assert second is not None
    assert second.code == "leverage_above_cap"
    assert refusal(before, after, replace(open_gate, leverage_cap=4.0)) is None
