from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.book import AccountSettings, Book, Holding, OpenPosition
from app.domain.trade import Contract, Order, Trade, plan
from app.errors import ConflictError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
PERP = Contract(Decimal(1), Decimal("0.30"))
MICRO = Fraction(1, 10**6)
DRAWN = settings(max_examples=60, deadline=None, derandomize=True)


def book(free: Any = 100_000, owed: Any = 0, **own: Any) -> Book:
    held = {"USDC": Holding(free=Decimal(free), owed=Decimal(owed))}
    return Book("alice", AccountSettings(**own), 1, held, [], [])


def trade(held: Book, side: Any, size: Any, price: Any, contract: Contract = PERP, **terms: Any) -> Any:
    order = Order("BTC-PERP", side, Decimal(size), **terms)
    return plan(held, order, contract, Decimal(price), "new", NOW)


def after(held: Book, *fills: tuple[str, Any, Any], contract: Contract = PERP, **terms: Any) -> Any:
    """Return the last of a sequence of (side, size, price)."""
    done: Trade | None = None
    for side, size, price in fills:
        done = trade(held if done is None else done.book, side, size, price, contract, **terms)
    assert done is not None
    return done


def position(done: Trade) -> Any:
    assert done.after is not None
    assert done.book.position("BTC-PERP") == done.after
    return done.after


def money(held: Book) -> dict[str, Any]:
    """Return the USDC by bucket, empty ones left out."""
    found = held.holding("USDC")
    return {name: value for name in Holding.__slots__ if (value := getattr(found, name))}


def postings(done: Trade) -> list[tuple[Any, ...]]:
    """Return every move as (kind, amount, from, to); the agent's buckets by their name alone."""
    return [
        (posting.kind, move.amount, *(p.bucket if p.owner == "alice" else f"house {p.bucket}" for p in purses))
        for posting in done.postings
        for move in posting.moves
        for purses in [(move.source, move.target)]
    ]


def refusal(held: Book, side: Any, size: Any, **terms: Any) -> tuple[str, str]:
    with pytest.raises(ConflictError) as refused:
        trade(held, side, size, 100, **terms)
    return refused.value.code, refused.value.errors[0].pointer


# --- entry prices


def test_an_order_opens_a_position_at_its_price() -> None:
    done = trade(book(), "sell", "0.5", 60_000, leverage=Decimal(3))
    opened = OpenPosition(
        "new",
        "BTC-PERP",
        "short",
        Decimal("0.5"),
        Decimal(60_000),
        Decimal(3),
        "pooled",
        Decimal(0),
        Decimal(0),
        True,
        NOW,
    )
    assert (done.before, done.after, done.book.positions) == (None, opened, [opened])
    assert (done.closed, done.opened, done.is_opening, done.realized_pnl) == (0, Decimal("0.5"), True, 0)
    assert done.postings == []


def test_the_entry_price_is_the_average_over_what_was_opened() -> None:
    done = after(book(), ("buy", 1, 100), ("buy", 3, 200))
    assert (position(done).size, position(done).entry_price) == (Decimal(4), Decimal(175))


def test_closing_a_part_keeps_the_entry_price() -> None:
    done = after(book(), ("buy", 1, 100), ("buy", 3, 200), ("sell", 2, 500), ("buy", 2, 225))
    # 2 left of the 4 at 175, and 2 at 225
    assert (position(done).size, position(done).entry_price) == (Decimal(4), Decimal(200))


@pytest.mark.parametrize(("side", "last"), [("buy", "7"), ("sell", "6")])
def test_the_average_is_rounded_against_the_agent(side: str, last: str) -> None:
    done = after(book(), (side, 1, 100), (side, 2, 101))
    # 302 / 3 = 100.66…: a long has paid more, a short has received less
    assert position(done).entry_price == Decimal("100.66666666666666666" + last)


def test_the_average_of_wide_numbers_is_exact() -> None:
    price = Decimal("999999999999999.999999999999999999")
    done = after(book(), ("buy", "0.000000000000000001", price), ("buy", "99999999999999.999999999999999999", price))
    assert position(done).entry_price == price


def test_an_order_may_change_the_leverage_and_keeps_it_otherwise() -> None:
    first = trade(book(), "buy", 1, 100, leverage=Decimal(2))
    assert position(trade(first.book, "buy", 1, 100)).leverage == 2
    assert position(trade(first.book, "buy", 1, 100, leverage=Decimal(5))).leverage == 5
    assert position(trade(first.book, "sell", "0.5", 100, leverage=Decimal(5))).leverage == 2


# --- profit and loss


@pytest.mark.parametrize(
    ("side", "against", "price", "pnl"),
    [("buy", "sell", 130, 30), ("buy", "sell", 80, -20), ("sell", "buy", 80, 20), ("sell", "buy", 130, -30)],
)
def test_a_close_pays_the_difference_to_the_entry(side: str, against: str, price: int, pnl: int) -> None:
    done = after(book(1_000), (side, 2, 100), (against, 1, price))
    assert (done.realized_pnl, done.closed, done.opened, done.is_opening) == (pnl, 1, 0, False)
    assert money(done.book) == {"free": 1_000 + pnl}
    assert (position(done).size, position(done).realized_pnl) == (1, pnl)


def test_the_realized_profits_of_a_position_add_up() -> None:
    done = after(book(1_000), ("buy", 3, 100), ("sell", 1, 130), ("sell", 1, 90))
    assert position(done).realized_pnl == 20
    assert money(done.book) == {"free": 1_020}


def test_a_contract_of_many_units_pays_for_each() -> None:
    done = after(book(1_000), ("buy", 2, 100), ("sell", 2, "100.5"), contract=Contract(Decimal(50), Decimal("0.3")))
    assert (done.realized_pnl, done.after) == (50, None)


@pytest.mark.parametrize(("price", "pnl"), [("100.000001", "0.000000"), ("99.999999", "-0.000001")])
def test_dust_is_never_in_the_favour_of_the_agent(price: str, pnl: str) -> None:
    done = after(book(1_000), ("buy", "0.5", 100), ("sell", "0.5", price))
    assert done.realized_pnl == Decimal(pnl)
    assert money(done.book) == {"free": 1_000 + Decimal(pnl)}


def test_a_close_at_the_entry_moves_nothing() -> None:
    done = after(book(1_000), ("buy", 1, 100), ("sell", 1, 100))
    assert (done.postings, done.after, money(done.book)) == ([], None, {"free": 1_000})


def test_a_flip_closes_one_position_and_opens_another() -> None:
    first = trade(book(1_000), "buy", 1, 100, leverage=Decimal(2))
    done: Any = plan(first.book, Order("BTC-PERP", "sell", Decimal(3)), PERP, Decimal(110), "other", NOW)
    assert (done.closed, done.opened, done.realized_pnl, done.is_opening) == (1, 2, 10, True)
    flipped = position(done)
    assert (flipped.id, flipped.side, flipped.size, flipped.entry_price) == ("other", "short", Decimal(2), Decimal(110))
    assert (flipped.leverage, flipped.realized_pnl) == (None, 0)
    assert done.before == first.after
    assert len(done.book.positions) == 1


# --- what is refused


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [
        ("buy", 1, ("nothing_to_reduce", "/reduce_only")),
        ("sell", "1.000000000000000001", ("would_flip", "/size")),
        ("sell", 2, ("would_flip", "/size")),
    ],
)
def test_a_reduce_only_order_reduces(side: str, size: Any, expected: tuple[str, str]) -> None:
    held = trade(book(), "buy", 1, 100).book
    assert refusal(held, side, size, reduce_only=True) == expected
    assert trade(held, "sell", 1, 100, reduce_only=True).after is None


def test_without_a_position_there_is_nothing_to_reduce() -> None:
    assert refusal(book(), "sell", 1, reduce_only=True) == ("nothing_to_reduce", "/reduce_only")


def test_a_position_has_one_mode_while_it_is_open() -> None:
    held = trade(book(), "buy", 1, 100, margin_mode="pooled").book
    assert refusal(held, "buy", 1, margin_mode="isolated") == ("margin_mode_conflict", "/margin_mode")
    # what closes it all has no mode, and the position behind a flip is a new one
    assert trade(held, "sell", 1, 100, margin_mode="isolated").after is None
    assert position(trade(held, "sell", 2, 100, margin_mode="isolated")).margin_mode == "isolated"


@pytest.mark.parametrize(
    ("account", "asked", "expected"),
    [
        ("cross", None, "pooled"),
        ("portfolio", None, "pooled"),
        ("isolated", None, "isolated"),
        ("isolated", "pooled", "pooled"),
        ("cross", "isolated", "isolated"),
    ],
)
def test_the_mode_is_the_order_s_or_the_account_s(account: str, asked: Any, expected: str) -> None:
    done = trade(book(margin_mode=account), "buy", 1, 100, margin_mode=asked)
    assert position(done).margin_mode == expected


# --- losses beyond what is free, and what is owed


def test_a_loss_beyond_what_is_free_is_owed() -> None:
    done = after(book(50), ("buy", 1, 100), ("sell", 1, 30))
    assert money(done.book) == {"owed": 20}
    assert postings(done) == [
        ("realized_pnl", 50, "free", "house trading"),
        ("realized_pnl", 20, "owed", "house trading"),
    ]
    assert done.book.is_leveraged


@pytest.mark.parametrize(
    ("gain", "left"), [(15, {"owed": 5}), (20, {}), (60, {"free": 40})], ids=["a part", "all", "more"]
)
def test_a_profit_pays_what_is_owed_first(gain: int, left: dict[str, int]) -> None:
    done = after(book(0, owed=20), ("sell", 1, 100), ("buy", 1, 100 - gain))
    assert (done.realized_pnl, money(done.book)) == (gain, left)


def test_a_loss_with_a_debt_takes_what_is_free_and_then_adds_to_it() -> None:
    done = after(book(10, owed=20), ("buy", 1, 100), ("sell", 1, 60))
    assert money(done.book) == {"owed": 50}


# --- isolated positions


def isolated(free: Any = 1_000, *fills: tuple[str, Any, Any], **terms: Any) -> Any:
    return after(book(free), *fills, margin_mode="isolated", **terms)


def test_an_isolated_position_takes_its_margin_out_of_what_is_free() -> None:
    done = isolated(1_000, ("buy", 2, 100))
    assert (money(done.book), position(done).allocated) == ({"free": 940, "allocated": 60}, 60)
    assert postings(done) == [("allocate", 60, "free", "allocated")]


@pytest.mark.parametrize(("leverage", "own"), [("1", "200"), ("2", "100"), ("3", "66.666667"), ("10", "60")])
def test_leverage_only_raises_the_margin(leverage: str, own: str) -> None:
    done = isolated(1_000, ("buy", 2, 100), leverage=Decimal(leverage))
    assert position(done).allocated == Decimal(own)


def test_growing_adds_to_the_allocation() -> None:
    done = isolated(1_000, ("buy", 2, 100), ("buy", 1, 200))
    # 600 at 200 ask for 180, of which 60 are there
    assert (money(done.book), position(done).allocated) == ({"free": 820, "allocated": 180}, 180)
    cheaper = isolated(1_000, ("sell", 2, 100), ("sell", 1, 50))
    # 150 at 50 ask for 45, less than there is: the new contract still brings its own 15
    assert position(cheaper).allocated == 75


def test_growing_a_position_that_loses_pays_for_its_loss() -> None:
    done = isolated(1_000, ("buy", 2, 100), ("buy", 1, 80))
    # 240 ask for 72; 60 are there, and 40 are lost so far
    assert position(done).allocated == 60 + 72 - 60 + 40


def test_an_isolated_profit_is_free_with_the_closed_part_of_the_allocation() -> None:
    done = isolated(1_000, ("buy", 4, 100), ("sell", 1, 130))
    # 120 are allocated; a quarter comes back, and 30 of profit
    assert (money(done.book), position(done).allocated) == ({"free": 880 + 30 + 30, "allocated": 90}, 90)
    assert postings(done) == [
        ("realized_pnl", 30, "house trading", "free"),
        ("deallocate", 30, "allocated", "free"),
    ]


def test_an_isolated_loss_is_taken_from_the_allocation_first() -> None:
    done = isolated(1_000, ("buy", 4, 100), ("sell", 1, 80))
    # the closed quarter has 30 of the 120, of which the loss leaves 10
    assert (money(done.book), position(done).allocated) == ({"free": 880 + 10, "allocated": 90}, 90)


@pytest.mark.parametrize("price", ["5", "65", "75", "85", "130"])
def test_closing_in_parts_gives_no_more_than_closing_at_once(price: str) -> None:
    at_once = isolated(1_000, ("buy", 4, 100), ("sell", 4, price))
    parts = isolated(1_000, ("buy", 4, 100), ("sell", 1, price), ("sell", 2, price), ("sell", 1, price))
    assert money(parts.book)["free"] <= money(at_once.book)["free"]
    if price != "5":
        assert money(parts.book) == money(at_once.book)


@pytest.mark.parametrize(
    ("price", "back", "beyond"), [(71, 1, 0), (70, 0, 0), (69, 0, 1), ("0.000001", 0, "69.999999")]
)
def test_an_isolated_loss_stops_at_the_allocation(price: Any, back: int, beyond: Any) -> None:
    done = isolated(1_000, ("buy", 1, 100), ("sell", 1, price))
    assert (done.after, money(done.book)) == (None, {"free": 970 + back})
    assert done.realized_pnl == Decimal(price) - 100
    deficits = [entry for entry in postings(done) if entry[0] == "deficit"]
    expected = [("deficit", Decimal(beyond), "house deficit", "house trading")]
    assert deficits == (expected if beyond else [])


def test_what_lies_beyond_the_allocation_of_a_part_is_the_house_s_too() -> None:
    done = isolated(1_000, ("buy", 2, 100), ("sell", 1, 10))
    assert (money(done.book), position(done).allocated) == ({"free": 940}, 0)
    assert postings(done) == [
        ("realized_pnl", 60, "allocated", "house trading"),
        ("deficit", 30, "house deficit", "house trading"),
    ]


def test_what_comes_back_pays_what_is_owed_first() -> None:
    opened = isolated(1_000, ("buy", 1, 100))
    indebted = replace(opened.book, holdings={"USDC": Holding(allocated=Decimal(30), owed=Decimal(35))})
    done = trade(indebted, "sell", 1, 110)
    # 10 of profit, then 30 of allocation, on a debt of 35
    assert money(done.book) == {"free": 5}


def test_an_isolated_flip_frees_one_allocation_and_takes_another() -> None:
    done = isolated(1_000, ("buy", 1, 100), ("sell", 3, 100))
    assert (money(done.book), position(done).allocated) == ({"free": 940, "allocated": 60}, 60)


def test_the_plan_shows_an_allocation_that_is_not_there() -> None:
    assert isolated(50, ("buy", 2, 100)).book.holding("USDC").free == -10


def test_a_part_of_an_allocation_comes_back_rounded_down() -> None:
    done = isolated(1_000, ("buy", 3, 100), ("sell", 1, "100.00001"))
    assert money(done.book) == {"free": 910 + Decimal("0.00001") + 30, "allocated": 60}
    thirds = isolated(1_000, ("buy", "0.3", "100.00001"), ("sell", "0.1", "100.00001"))
    # 9.0000009 is posted as 9.000001, a third of which is 3.000000333…
    assert position(thirds).allocated == Decimal("6.000001")


# --- any sequence

SIZES = st.decimals("0.000000001", 50, places=9)
PRICES = st.decimals("0.01", 100_000, places=4)
FILLS = st.lists(st.tuples(st.sampled_from(["buy", "sell"]), SIZES, PRICES), min_size=1, max_size=12)
CONTRACTS = st.sampled_from(["1", "0.001", "100"]).map(lambda size: Contract(Decimal(size), Decimal("0.3")))
MODES = st.sampled_from(["pooled", "isolated"])


def played(fills: Sequence[tuple[str, Decimal, Decimal]], contract: Contract, mode: str) -> list[Trade]:
    done: list[Trade] = []
    held = book(10**12)
    for side, size, price in fills:
        done.append(trade(held, side, size, price, contract, margin_mode=mode))
        held = done[-1].book
    return done


@DRAWN
@given(FILLS, CONTRACTS, MODES)
def test_profits_are_what_fills_paid_and_brought(
    fills: list[tuple[str, Decimal, Decimal]], contract: Contract, mode: str
) -> None:
    done = played(fills, contract, mode)
    cash = net = Fraction(0)
    for side, size, price in fills:
        signed = Fraction(size) * Fraction(contract.contract_size) * (1 if side == "buy" else -1)
        cash -= signed * Fraction(price)
        net += signed
    mark = Fraction(fills[-1][2])
    left = done[-1].after
    signed_left, entry = Fraction(0), mark
    if left is not None:
        signed_left = Fraction(left.size) * Fraction(contract.contract_size) * (1 if left.side == "long" else -1)
        entry = Fraction(left.entry_price)
    assert signed_left == net
    profit = sum(Fraction(t.realized_pnl) for t in done) + signed_left * (mark - entry)
    # each close rounds down to a millionth, each average by 1e-18 a unit
    assert 0 <= cash + net * mark - profit <= len(fills) * (MICRO + Fraction(1, 10**9))


@DRAWN
@given(FILLS, CONTRACTS, MODES)
def test_what_the_agent_has_changes_by_profits_less_deficits(
    fills: list[tuple[str, Decimal, Decimal]], contract: Contract, mode: str
) -> None:
    done = played(fills, contract, mode)
    deficit = sum(m.amount for t in done for p in t.postings if p.kind == "deficit" for m in p.moves)
    assert mode == "isolated" or deficit == 0
    end = done[-1].book.holding("USDC")
    profit = sum(t.realized_pnl for t in done)
    assert end.held - end.owed == 10**12 + profit + deficit
    assert end.allocated == sum(p.allocated for p in done[-1].book.positions)
    assert min(end.free, end.allocated, end.owed) >= 0


@DRAWN
@given(FILLS, CONTRACTS, MODES)
def test_every_fill_closes_or_opens_its_whole_size(
    fills: list[tuple[str, Decimal, Decimal]], contract: Contract, mode: str
) -> None:
    for (side, size, price), done in zip(fills, played(fills, contract, mode), strict=True):
        assert done.closed + done.opened == size
        assert min(done.closed, done.opened) >= 0
        assert done.price == price
        if done.opened:
            assert position(done).side == ("long" if side == "buy" else "short")
        if done.closed and done.opened:
            assert done.before is not None
            assert (done.before.side, position(done).entry_price) != (position(done).side, done.before.entry_price)
