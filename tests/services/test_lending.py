"""Offers and loans on a real database: what moves, what is refused, what is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import URL

from app.errors import ConflictError, NotFoundError, PrimeriskError
from app.services import holdings, market
from app.services.holdings import HoldingSettings
from tests.services.lenders import Lenders, lenders_on

D = Decimal


@pytest.fixture
async def lenders(database_url: URL) -> AsyncIterator[Lenders]:
    async with lenders_on(database_url) as made:
        await made.stop_clock()
        yield made


async def borrower_of(lenders: Lenders, btc: str = "1") -> str:
    agent_id = await lenders.desk.agent()
    await lenders.desk.deposit(agent_id, "BTC", btc)
    return agent_id


def code_of(error: pytest.ExceptionInfo[PrimeriskError]) -> str:
    return error.value.code


# --- offers


async def test_an_offer_sets_units_aside_and_its_withdrawal_gives_them_back(lenders: Lenders) -> None:
    alice = await lenders.desk.agent("1000")
    offer = await lenders.offer(alice, 400)
    assert await lenders.money(alice) == {"free": 600, "offered": 400}
    assert (await lenders.market()).supplied == 400
    with pytest.raises(ConflictError) as refused:
        await lenders.desk.withdraw(alice, "USDC", 601)
    assert code_of(refused) == "insufficient_funds"
    assert (await lenders.cancel(alice, offer.id)).remaining == 0
    assert await lenders.money(alice) == {"free": 1000}
    assert (await lenders.market()).supplied == 0
    again = await lenders.cancel(alice, offer.id)
    assert again.withdrawn_at is not None


async def test_the_ceiling_of_a_holding(lenders: Lenders) -> None:
    alice = await lenders.desk.agent("1000")
    with pytest.raises(ConflictError) as refused:
        await lenders.offer(alice, "400.01")
    assert (code_of(refused), refused.value.figures) == ("lent_share_above_ceiling", {"available": 400})
    await lenders.offer(alice, 300)
    with pytest.raises(ConflictError):
        await lenders.offer(alice, "100.01")
    async with lenders.desk.locked(alice) as (tx, _, _held):
        await holdings.put(tx, alice, "USDC", HoldingSettings(lent_share_max=Decimal("0.35")))
    with pytest.raises(ConflictError):
        await lenders.offer(alice, "50.01")
    async with lenders.desk.locked(alice) as (tx, _, _held):
        await holdings.put(tx, alice, "USDC", HoldingSettings(long_term=True))
    await lenders.offer(alice, 700)
    assert await lenders.money(alice) == {"offered": 1000}


async def test_an_offer_that_would_pass_the_gate_if_it_were_lent_is_refused(lenders: Lenders) -> None:
    alice = await lenders.desk.agent()
    await lenders.desk.deposit(alice, "USDC", 10_000)
    await lenders.desk.order(alice, "buy", "0.44")  # 7,920 of margin: utilization .792
    with pytest.raises(ConflictError) as refused:
        await lenders.offer(alice, 3_000)  # 5 % of it would be 150: utilization .804
    assert code_of(refused) == "insufficient_margin"
    await lenders.offer(alice, 1_000)


# --- loans


async def test_a_loan_moves_units_and_pledges_collateral_at_once(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("1000"), await borrower_of(lenders)
    await lenders.offer(alice, 400)
    [loan] = await lenders.borrow(bob, 200, "0.01")
    assert await lenders.money(alice) == {"free": 600, "offered": 200, "lent": 200}
    assert await lenders.money(bob) == {"free": 200, "borrowed": 200}
    assert await lenders.money(bob, "BTC") == {"free": Decimal("0.99"), "pledged": Decimal("0.01")}
    market = await lenders.market()
    assert (market.supplied, market.borrowed, market.utilization) == (D(400), D(200), D("0.5"))
    assert loan.rate_at(market.rate) == Decimal("0.094")
    # the lender's equity has the recall haircut taken, the borrower's is what it was
    assert (await lenders.desk.figures(alice)).equity == pytest.approx(1000 - 0.05 * 200)
    assert (await lenders.desk.figures(bob)).equity == pytest.approx(60_000 * 0.9)
    assert await lenders.events(alice) == await lenders.events(bob) == ["loan.opened"]


async def test_200_usdc_at_9_4_percent_for_a_year_pay_18_80(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("1000"), await borrower_of(lenders)
    await lenders.desk.deposit(bob, "USDC", 100)
    await lenders.offer(alice, 200)
    [loan] = await lenders.borrow(bob, 200, "0.01", kind="fixed", rate_max=Decimal(1))
    assert loan.rate == Decimal("0.65")  # all that is on offer is taken: the curve's end
    await lenders.give_back(loan)
    await lenders.offer(alice, 400)
    [loan] = await lenders.borrow(bob, 200, "0.01")
    lenders.pass_time(days=365)
    returned = await lenders.give_back(loan)
    assert returned.interest_paid == Decimal("18.80")
    assert await lenders.money(alice) == {"free": Decimal("818.80"), "offered": 200}
    assert await lenders.money(bob) == {"free": Decimal("81.20")}
    assert await lenders.money(bob, "BTC") == {"free": 1}


async def test_daily_interest_comes_to_what_one_payment_would(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("1000"), await borrower_of(lenders)
    await lenders.desk.deposit(bob, "USDC", 100)
    await lenders.offer(alice, 400)
    [loan] = await lenders.borrow(bob, 200, "0.01")
    for _ in range(10):
        lenders.pass_time(hours=36.5)
        await lenders.decide(loan.id)
    paid = (await lenders.loan(loan.id)).interest_paid
    assert paid == Decimal("0.783334")  # 200 x .094 x 365 h / 8760 h, rounded up
    lenders.pass_time(days=365, hours=-365)
    assert (await lenders.give_back(loan)).interest_paid == Decimal("18.80")


async def test_interest_that_is_not_free_is_booked_and_bears_none(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("1000"), await borrower_of(lenders)
    await lenders.offer(alice, 400)
    [loan] = await lenders.borrow(bob, 200, "0.01")
    await lenders.desk.reserve(bob, 200)  # nothing is free to pay with
    lenders.pass_time(days=1)
    await lenders.decide(loan.id)
    due = Decimal("0.051507")
    assert await lenders.money(bob) == {"reserved": 200, "borrowed": 200 + due}
    assert await lenders.money(alice) == {"free": 600, "offered": 200, "lent": 200 + due}
    lenders.pass_time(days=364)
    await lenders.decide(loan.id)
    assert (await lenders.loan(loan.id)).interest_booked == Decimal("18.80")
    await lenders.desk.deposit(bob, "USDC", "18.80")
    [(reservation,)] = await lenders.desk.rows("SELECT id FROM reservations")
    await lenders.desk.release(bob, reservation)
    await lenders.give_back(loan)
    assert await lenders.money(bob) == {}
    assert await lenders.money(alice) == {"free": Decimal("818.80"), "offered": 200}


async def test_a_floating_rate_follows_the_curve_and_a_fixed_one_does_not(lenders: Lenders) -> None:
    alice, bob, carol = await lenders.desk.agent("1000"), await borrower_of(lenders), await borrower_of(lenders)
    for who in (bob, carol):
        await lenders.desk.deposit(who, "USDC", 500)
    await lenders.offer(alice, 400, rate="0")
    [floating] = await lenders.borrow(bob, 100, "0.01")  # U .25: .0225
    [fixed] = await lenders.borrow(bob, 100, "0.01", kind="fixed")  # U .5: .035
    assert fixed.rate == Decimal("0.035")
    lenders.pass_time(days=73)
    [third] = await lenders.borrow(carol, 160, "0.01")  # U .9: .35
    lenders.pass_time(days=73)
    await lenders.give_back(third)  # what it had is its lender's, and no longer supplied: U .8333, .15
    lenders.pass_time(days=219)
    # a fifth of a year each at .035 and .35, three fifths at .15
    assert (await lenders.give_back(floating)).interest_paid == Decimal("16.7")
    assert (await lenders.give_back(fixed)).interest_paid == Decimal("3.5")


async def test_offers_are_taken_cheapest_first_and_in_part(lenders: Lenders) -> None:
    first, second, third = [await lenders.desk.agent("1000") for _ in range(3)]
    bob = await borrower_of(lenders)
    dear = await lenders.offer(first, 400, rate="0.09")
    cheap = await lenders.offer(second, 100, rate="0.02")
    middle = await lenders.offer(third, 300, rate="0.05")
    taken = await lenders.borrow(bob, 450, "0.011")
    assert [(loan.offer_id, loan.principal) for loan in taken] == [
        (cheap.id, D(100)),
        (middle.id, D(300)),
        (dear.id, D(50)),
    ]
    assert [loan.rate for loan in taken] == [Decimal("0.02"), Decimal("0.05"), Decimal("0.09")]
    assert sum(loan.collateral for loan in taken) == Decimal("0.011")
    assert await lenders.money(first) == {"free": 600, "offered": 350, "lent": 50}
    with pytest.raises(ConflictError) as refused:
        await lenders.borrow(bob, 351, "0.01")
    assert (code_of(refused), refused.value.figures) == ("not_enough_offered", {"available": 350})


async def test_what_a_loan_needs(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("1000"), await borrower_of(lenders)
    await lenders.offer(alice, 400)
    with pytest.raises(ConflictError) as refused:
        await lenders.borrow(bob, 200, "0.0038")  # 205.2 after haircut, 210 are needed
    assert code_of(refused) == "insufficient_collateral"
    needed = refused.value.figures["needed"]
    assert float(needed) == pytest.approx(200 * 1.05 / (60_000 * 0.9), rel=1e-12)
    [loan] = await lenders.borrow(bob, 200)
    assert loan.collateral == needed
    with pytest.raises(ConflictError) as refused:
        await lenders.borrow(bob, 100, "2")
    assert code_of(refused) == "insufficient_funds"
    with pytest.raises(ConflictError) as refused:
        await lenders.borrow(bob, 100, rate_max=Decimal("0.05"))
    assert code_of(refused) == "rate_above_limit"
    with pytest.raises(ConflictError) as refused:
        await lenders.borrow(bob, 100, notice_min=timedelta(hours=25))
    assert code_of(refused) == "not_enough_offered"
    with pytest.raises(ConflictError) as refused:
        await lenders.borrow(alice, 100, of="USDC")  # nobody borrows from itself
    assert code_of(refused) == "not_enough_offered"


async def test_what_is_borrowed_leaves_only_as_far_as_the_gate_lets_it(lenders: Lenders) -> None:
    alice = await lenders.desk.agent()
    await lenders.desk.deposit(alice, "BTC", 3)
    bob = await lenders.desk.agent("70000")
    await lenders.offer(alice, 1, "BTC")
    await lenders.borrow(bob, 1, 66_000, "BTC", "USDC")
    await lenders.desk.withdraw(bob, "BTC", "0.5")
    with pytest.raises(ConflictError) as refused:
        await lenders.desk.withdraw(bob, "BTC", "0.5")  # 70,000 would back 60,000
    assert code_of(refused) == "insufficient_margin"
    await lenders.desk.deposit(bob, "USDC", 5_000)
    await lenders.desk.withdraw(bob, "BTC", "0.5")


async def test_top_up_and_release(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("100000"), await borrower_of(lenders)
    await lenders.offer(alice, 40_000)
    [loan] = await lenders.borrow(bob, 25_000, "0.5")
    topped = await lenders.top_up(loan, "0.25")
    assert topped.collateral == Decimal("0.75")
    released = await lenders.release(loan)
    # 25,000 x 1.05 / (60,000 x .9)
    assert float(released.collateral) == pytest.approx(0.486111111111)
    with pytest.raises(ConflictError) as refused:
        await lenders.release(loan, "0.001")
    assert code_of(refused) == "insufficient_collateral"
    assert (await lenders.money(bob, "BTC"))["pledged"] == released.collateral


async def test_a_part_is_returned_with_all_interest(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("1000"), await borrower_of(lenders)
    await lenders.desk.deposit(bob, "USDC", 50)
    await lenders.offer(alice, 400)
    [loan] = await lenders.borrow(bob, 200, "0.01")
    lenders.pass_time(days=365)
    with pytest.raises(ConflictError) as refused:
        await lenders.give_back(loan, 201)
    assert code_of(refused) == "amount_above_loan"
    part = await lenders.give_back(loan, 150)
    assert (part.principal, part.interest_paid) == (D(50), D("18.80"))
    lenders.pass_time(days=365)
    whole = await lenders.give_back(loan)
    assert (whole.status, whole.interest_paid) == ("returned", Decimal("23.50"))
    with pytest.raises(ConflictError) as refused:
        await lenders.give_back(loan)
    assert code_of(refused) == "loan_closed"
    assert await lenders.events(alice) == ["loan.opened", "loan.returned", "loan.returned"]


# --- recall


async def test_a_recall_has_its_notice_and_is_bought_in_when_it_is_overdue(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("1000"), await borrower_of(lenders)
    await lenders.offer(alice, 200)
    [loan] = await lenders.borrow(bob, 200, "0.01", kind="floating")
    done = await lenders.recall(alice, loan.id)
    [recalled] = done.recalled
    assert recalled.due_at == recalled.recalled_at + timedelta(hours=24)  # type: ignore[operator]
    again = await lenders.recall(alice, loan.id)
    assert again.recalled[0].due_at == recalled.due_at
    lenders.pass_time(hours=23)
    assert (await lenders.decide(loan.id)).told == ()
    lenders.pass_time(hours=1)
    assert (await lenders.decide(loan.id)).told == ("loan.liquidated",)
    over = await lenders.loan(loan.id)
    interest = Decimal("0.356165")  # 200 x .65 / 365, rounded up
    assert (over.interest_paid, over.deficit) == (interest, D(0))
    assert await lenders.money(alice) == {"free": 1000 + interest}
    assert await lenders.money(bob) == {"free": 200}
    sold = (200 + interest) / (60_000 * Decimal("0.995"))
    assert float((await lenders.money(bob, "BTC"))["free"]) == pytest.approx(float(1 - sold))
    assert await lenders.events(alice) == ["loan.opened", "loan.recalled", "loan.liquidated"]
    assert await lenders.events(bob) == await lenders.events(alice)


async def test_an_offer_is_recalled_with_all_that_it_became(lenders: Lenders) -> None:
    alice, bob, carol = await lenders.desk.agent("1000"), await borrower_of(lenders), await borrower_of(lenders)
    offer = await lenders.offer(alice, 400, hours=1)
    [first] = await lenders.borrow(bob, 100)
    [second] = await lenders.borrow(carol, 200)
    part = await lenders.recall(alice, offer.id, 150)
    assert (part.withdrawn, [loan.recalled for loan in part.recalled]) == (D(100), [D(50)])
    lenders.pass_time(hours=1)
    await lenders.decide(first.id)
    left = await lenders.loan(first.id)
    assert (left.principal, left.due_at) == (D(50), None)
    whole = await lenders.recall(alice, offer.id)
    assert (whole.withdrawn, [loan.recalled for loan in whole.recalled]) == (D(0), [D(50), D(200)])
    await lenders.give_back(first)
    await lenders.give_back(second, 199)
    assert (await lenders.loan(second.id)).recalled == 1
    lenders.pass_time(hours=1)
    await lenders.decide(second.id)
    assert set(await lenders.money(alice)) == {"free"}


async def test_strangers_recall_and_return_nothing(lenders: Lenders) -> None:
    alice, bob, eve = await lenders.desk.agent("1000"), await borrower_of(lenders), await borrower_of(lenders)
    offer = await lenders.offer(alice, 400)
    [loan] = await lenders.borrow(bob, 100)
    for wrong in (bob, eve):
        for wanted in (offer.id, loan.id):
            with pytest.raises(NotFoundError):
                await lenders.recall(wrong, wanted)
        with pytest.raises(NotFoundError):
            await lenders.cancel(wrong, offer.id)
    for wrong in (alice, eve):
        for act in (lenders.give_back, lenders.release):
            with pytest.raises(NotFoundError):
                await act(replace(loan, borrower_id=wrong))


# --- collateral that falls short


async def test_low_collateral_is_told_once_then_sold_and_the_rest_is_the_borrowers(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("100000"), await borrower_of(lenders)
    await lenders.offer(alice, 40_000)
    [loan] = await lenders.borrow(bob, 25_000, "0.5")  # 27,000 after haircut: 1.08
    assert (await lenders.decide(loan.id)).told == ()
    await lenders.desk.prices({"BTC": 57_700})  # 1.0386
    assert (await lenders.decide(loan.id)).told == ("loan.collateral_low",)
    assert (await lenders.decide(loan.id)).told == ()
    await lenders.desk.prices({"BTC": 57_000})  # 1.026
    assert (await lenders.decide(loan.id)).told == ("loan.liquidated",)
    assert (await lenders.decide(loan.id)).told == ()
    assert await lenders.money(alice) == {"free": 85_000, "offered": 15_000}
    assert await lenders.money(bob) == {"free": 25_000}
    sold = 25_000 / (57_000 * 0.995)
    assert float((await lenders.money(bob, "BTC"))["free"]) == pytest.approx(1 - sold)
    over = await lenders.loan(loan.id)
    assert (over.collateral, over.deficit) == (D(0), D(0))
    kinds = ["loan.opened", "loan.collateral_low", "loan.liquidated"]
    assert await lenders.events(alice) == await lenders.events(bob) == kinds


async def test_a_gap_that_collateral_does_not_cover_is_the_borrowers_debt_and_not_the_lenders_loss(
    lenders: Lenders,
) -> None:
    alice, bob = await lenders.desk.agent("100000"), await borrower_of(lenders, "3")
    await lenders.offer(alice, 40_000)
    [loan] = await lenders.borrow(bob, 25_000, "0.5")
    await lenders.desk.withdraw(bob, "USDC", 10_000)
    lenders.pass_time(days=365)
    await lenders.desk.prices({"BTC": 20_000})
    done = await lenders.decide(loan.id)
    interest = Decimal(25_000) * Decimal("0.094")
    assert (await lenders.money(alice))["free"] == 85_000 + interest
    # .5 x 20,000 x .995 = 9,950 is bought; 15,000 were free
    missing = 25_000 + interest - 9_950 - 15_000
    assert await lenders.money(bob) == {"owed": missing}
    assert (await lenders.loan(loan.id)).deficit == missing
    assert done.deficit == pytest.approx(float(missing))
    await lenders.desk.deposit(bob, "USDC", missing)
    assert await lenders.money(bob) == {}


async def test_collateral_that_counts_for_nothing_any_more_is_sold(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("1000"), await borrower_of(lenders)
    await lenders.offer(alice, 400)
    [loan] = await lenders.borrow(bob, 200, "0.01")
    async with lenders.desk.database.transaction("admin") as tx:
        await market.put_asset(tx, "BTC", {"haircut": 1.0})
    assert (await lenders.decide(loan.id)).told == ("loan.collateral_low", "loan.liquidated")
    assert await lenders.desk.rows("SELECT DISTINCT data->'top_up' FROM events WHERE type = 'loan.collateral_low'") == [
        (None,)
    ]
    assert (await lenders.money(alice))["free"] == 800


async def test_a_loan_without_collateral_ends_out_of_what_the_borrower_has(lenders: Lenders) -> None:
    """What is lent may be worth less than the last digit of its collateral: one of two such loans has none."""
    alice, bob = [await lenders.desk.agent() for _ in range(2)]
    for who, asset in ((alice, "ETH"), (bob, "BTC")):
        await lenders.desk.deposit(who, asset, 1)
    digit = D(1).scaleb(-18)
    for _ in range(2):
        await lenders.offer(alice, digit, "ETH")
    made = await lenders.borrow(bob, 2 * digit, asset="ETH")
    assert sorted(loan.collateral for loan in made) == [0, digit]
    for loan in made:
        await lenders.decide(loan.id)
    assert [(await lenders.loan(loan.id)).status for loan in made] == ["liquidated", "active"]
    assert await lenders.money(alice, "ETH") == {"free": 1 - digit, "lent": digit}
    assert (await lenders.loan(made[0].id)).deficit == 0


async def test_nothing_is_sold_on_a_stale_or_missing_price(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("100000"), await borrower_of(lenders)
    await lenders.offer(alice, 40_000, hours=0)
    [loan] = await lenders.borrow(bob, 25_000, "0.5")
    await lenders.desk.prices({"BTC": 50_000})
    await lenders.recall(alice, loan.id)
    lenders.pass_time(days=20_000)
    assert (await lenders.decide(loan.id)).told == ()
    found = await lenders.loan(loan.id)
    assert found.status == "recalled"
    assert found.next_action_at is not None  # a second later
    lenders.pass_time(days=-20_000)
    assert (await lenders.decide(loan.id)).told == ("loan.collateral_low", "loan.liquidated")


async def test_a_warning_is_over_when_there_is_collateral_again(lenders: Lenders) -> None:
    alice, bob = await lenders.desk.agent("100000"), await borrower_of(lenders)
    await lenders.offer(alice, 40_000)
    [loan] = await lenders.borrow(bob, 25_000, "0.5")
    await lenders.desk.prices({"BTC": 57_500})
    await lenders.decide(loan.id)
    assert (await lenders.loan(loan.id)).is_low
    await lenders.top_up(loan, "0.1")
    await lenders.decide(loan.id)
    assert not (await lenders.loan(loan.id)).is_low
    await lenders.desk.prices({"BTC": 48_000})
    assert (await lenders.decide(loan.id)).told == ("loan.collateral_low",)
