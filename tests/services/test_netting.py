"""Netting on real commits: what is reserved, what moves, defaults, and races that have one outcome."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from app.errors import NotFoundError, PrimeriskError
from app.services import agreements, book, events, netting, statements
from app.services.agreements import Agreement
from app.services.netting import Ran
from tests.services.clearing import Clearing
from tests.services.desk import ACTOR
from tests.services.test_escrows import refused

_WEI = Decimal("1e-18")


async def settled(clearing: Clearing, agreement: Agreement, member: str) -> Ran:
    ran = await clearing.settle(agreement, member)
    assert ran is not None
    assert ran.run.outcome == "settled"
    return ran


async def ended(steps: Sequence[Awaitable[Any]]) -> Counter[str]:
    """Run steps at once and count how they end; anything but a refusal is raised."""
    found: Counter[str] = Counter()
    for result in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, PrimeriskError):
            raise result
        if isinstance(result, PrimeriskError):
            found[result.code] += 1
        elif isinstance(result, Ran):
            found[result.run.outcome] += 1
        else:
            found["nothing" if result is None else "booked"] += 1
    return found


# --- agreements


async def test_it_binds_when_all_have_accepted(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob, carol = [await desk.agent("1000") for _ in range(3)]
    async with desk.database.transaction(ACTOR) as tx:
        asked = agreements.NewAgreement("data", [bob, carol], ["data", "api"], 60)
        made = await agreements.propose(tx, await clearing.scenes.at(tx), alice, asked)
    await refused(clearing.owe(made, alice, bob, 10), "agreement_not_active")
    assert (await clearing.accept(bob, made)).state == "proposed"
    assert (await clearing.accept(bob, made)).state == "proposed"
    active = await clearing.accept(carol, made)
    assert active.state == "active"
    assert active.activated_at is not None
    assert active.next_action_at is None  # nothing is open
    await refused(clearing.owe(made, alice, bob, 10, service="casino"), "service_not_agreed")
    await clearing.owe(made, alice, bob, 10)
    assert (await clearing.agreement(made)).next_action_at == active.activated_at + timedelta(seconds=60)
    for member in (alice, bob, carol):
        assert (await clearing.events(member, "netting"))[:2] == ["netting.proposed", "netting.activated"]


async def test_it_is_declined_or_left_when_nothing_is_open(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob, carol = [await desk.agent("1000") for _ in range(3)]
    async with desk.database.transaction(ACTOR) as tx:
        asked = agreements.NewAgreement("data", [bob], ["data"])
        declined = await agreements.propose(tx, await clearing.scenes.at(tx), alice, asked)
    assert (await clearing.leave(bob, declined)).state == "ended"
    await refused(clearing.accept(bob, declined), "agreement_ended")
    made = await clearing.agree(alice, bob, carol)
    await clearing.owe(made, alice, bob, 10)
    await refused(clearing.leave(carol, made), "obligations_open")
    await settled(clearing, made, carol)
    assert (await clearing.leave(carol, made)).state == "active"
    await refused(clearing.owe(made, alice, carol, 10), "not_a_member")
    await refused(clearing.settle(made, carol), "agreement_not_active")
    assert (await clearing.leave(bob, made)).state == "ended"
    await refused(clearing.owe(made, alice, bob, 10), "not_a_member")
    assert (await clearing.events(alice, "netting"))[-2:] == ["netting.left", "netting.ended"]


async def test_who_has_left_sees_what_was_and_no_more(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob, carol = [await desk.agent("1000") for _ in range(3)]
    made = await clearing.agree(alice, bob, carol)
    first = await clearing.owe(made, alice, carol, 10)
    before = await settled(clearing, made, carol)
    await clearing.leave(carol, made)
    second = await clearing.owe(made, alice, bob, 10)
    after = await settled(clearing, made, alice)
    third = await clearing.owe(made, alice, bob, 20)
    for more in ({}, {"as_of": third.booked_at}, {"as_of": second.booked_at}):
        assert (await clearing.statement(carol, made, **more))[0].owed == []
    assert [o.id for o in (await clearing.statement(carol, made, run_id=before.run.id))[0].page] == [first.id]
    await refused(clearing.statement(carol, made, run_id=after.run.id), "run_not_found")
    now = await clearing.agreement(made)
    async with desk.database.transaction(ACTOR) as tx:
        left_at = now.left_at(carol)
        assert [run.id for run in await statements.last_runs(tx, now, left_at)] == [before.run.id]
        shown = await statements.list_obligations(tx, await statements.all_of(tx, now, left_at), 9)
        assert [o.id for o in shown] == [first.id]
        assert [run.id for run in await statements.last_runs(tx, now)] == [after.run.id, before.run.id]
        assert len(await statements.list_obligations(tx, await statements.all_of(tx, now), 9)) == 3
    # a booking that is sent again is the one it was, though its payee has left since
    again = await clearing.owe(made, alice, carol, 10, reference=first.reference)
    assert (again.id, again.run_id) == (first.id, before.run.id)
    await clearing.check()


async def test_telling_the_members_waits_for_who_tells_them_in_another_order(clearing: Clearing) -> None:
    """As a loan does: its lender first, whichever of the two comes first by its id."""
    desk = clearing.desk
    alice, bob = sorted([await desk.agent("1000"), await desk.agent("1000")])
    async with desk.database.transaction(ACTOR) as tx:
        asked = agreements.NewAgreement("data", [bob], ["data"])
        made = await agreements.propose(tx, await clearing.scenes.at(tx), alice, asked)
    async with desk.database.transaction(ACTOR) as tx:
        await book.lock_all(tx, [alice, bob])
        await events.emit(tx, "loan.opened", bob, {})
        accepting = asyncio.create_task(clearing.accept(bob, made))
        await asyncio.sleep(0.3)
        await events.emit(tx, "loan.opened", alice, {})
    assert (await accepting).state == "active"


async def test_a_stranger_finds_no_agreement(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob, stranger = [await desk.agent("1000") for _ in range(3)]
    made = await clearing.agree(alice, bob)
    steps: list[Awaitable[Any]] = [
        clearing.accept(stranger, made),
        clearing.leave(stranger, made),
        clearing.owe(made, stranger, alice, 1),
        clearing.settle(made, stranger),
        clearing.statement(stranger, made),
    ]
    for step in steps:
        with pytest.raises(NotFoundError):
            await step
    await refused(clearing.owe(made, alice, stranger, 1), "not_a_member")
    await refused(clearing.owe(made, alice, alice, 1), "not_a_member")


# --- what is reserved


async def test_only_the_running_net_is_reserved(clearing: Clearing) -> None:
    """Of a net of 100: 1 of fee and 5 of buffer beside it. It grows and shrinks with each booking, for both."""
    desk = clearing.desk
    alice, bob = await desk.agent("1000"), await desk.agent("1000")
    made = await clearing.agree(alice, bob)
    await clearing.owe(made, alice, bob, 100)
    assert (await desk.money(alice), await desk.money(bob)) == ({"free": 894, "reserved": 106}, {"free": 1_000})
    await clearing.owe(made, bob, alice, 80)
    assert await desk.money(alice) == {"free": Decimal("978.8"), "reserved": Decimal("21.2")}
    await clearing.owe(made, bob, alice, 50)
    assert (await desk.money(alice))["free"] == 1_000
    assert await desk.money(bob) == {"free": Decimal("968.2"), "reserved": Decimal("31.8")}
    await clearing.check()
    [reservation] = (await desk.book(bob)).reservations
    await refused(desk.release(bob, reservation.id), "reservation_bound")
    await refused(desk.withdraw(bob, "USDC", 990), "insufficient_funds")
    assert (await desk.figures(bob)).health.required_initial == pytest.approx(31.8)


async def test_what_is_not_covered_is_not_booked(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob = await desk.agent("100"), await desk.agent("1000")
    made = await clearing.agree(alice, bob)
    await refused(clearing.owe(made, alice, bob, 100), "insufficient_funds")
    await clearing.owe(made, bob, alice, 50)
    await clearing.owe(made, alice, bob, 100)  # on balance 50
    assert (await desk.money(alice))["reserved"] == 53
    await desk.order(bob, "buy", "0.04", leverage=3)
    await refused(clearing.owe(made, bob, alice, 200), "insufficient_margin")
    assert (await clearing.agreement(made)).open_obligations == 2
    await clearing.check()


async def test_no_more_assets_than_a_run_pays_in_a_moment(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob = await desk.agent("1000"), await desk.agent("1000")
    names = [f"COIN{k}" for k in range(netting.ASSETS_MAX + 1)]
    await desk.prices(dict.fromkeys(names, "1"))
    made = await clearing.agree(alice, bob)
    for name in names[:-1]:
        await clearing.owe(made, alice, bob, 1, name, fact=True)
    await refused(clearing.owe(made, bob, alice, 1, names[-1], fact=True), "agreement_full")
    await clearing.owe(made, bob, alice, 1, names[0], fact=True)
    assert (await clearing.agreement(made)).open_obligations == netting.ASSETS_MAX + 1
    await clearing.check()


async def test_a_reference_is_booked_once(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob = await desk.agent("1000"), await desk.agent("1000")
    made = await clearing.agree(alice, bob)
    first = await clearing.owe(made, alice, bob, 10, reference="invoice 1")
    assert await clearing.owe(made, alice, bob, 10, reference="invoice 1") == first
    await refused(clearing.owe(made, alice, bob, 11, reference="invoice 1"), "reference_conflict")
    await clearing.owe(made, bob, alice, 10, reference="invoice 1")  # its own
    found = await ended([clearing.owe(made, alice, bob, 7, reference="invoice 2") for _ in range(6)])
    assert found == {"booked": 6}
    assert (await clearing.agreement(made)).open_obligations == 3
    await settled(clearing, made, bob)
    again = await clearing.owe(made, alice, bob, 10, reference="invoice 1")
    assert (again.id, again.run_id is not None) == (first.id, True)


# --- what moves


async def test_twenty_obligations_are_one_payment_and_one_fee(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob = await desk.agent("5000"), await desk.agent("5000")
    made = await clearing.agree(alice, bob)
    for k in range(10):
        await clearing.owe(made, alice, bob, 100 + k)
        await clearing.owe(made, bob, alice, 90 + k)
    what_if = await clearing.statement(alice, made)
    ran = await settled(clearing, made, alice)
    entries = (
        "SELECT from_owner, to_owner, amount FROM ledger_entries WHERE kind = 'netting' AND from_owner <> to_owner"
    )
    assert sorted(await desk.rows(entries), key=str) == sorted([(alice, bob, 100), (alice, "house", 1)], key=str)
    assert await desk.money(alice) == {"free": 4_899}
    assert await desk.money(bob) == {"free": 5_100}
    assert (ran.run.obligations, ran.movements_saved) == (20, 19)
    # what settling was said to take and to save before it was done, and what is said after it
    told = await clearing.statement(bob, made, run_id=ran.run.id)
    for said, found in (what_if, told):
        [movement], [charge], [saving] = found.settlement.movements, found.settlement.charges, found.savings
        assert (movement.payer, movement.payee, movement.amount) == (alice, bob, Decimal(100))
        assert (charge.payer, charge.amount) == (alice, Decimal(1))
        assert (saving.gross_movements, saving.gross_amount, saving.gross_fees) == (20, Decimal(1_990), Decimal("19.9"))
        assert len(said.page) == len(said.owed) == 20
    assert ran.fees_saved == pytest.approx(18.9)
    assert {o.run_id for o in told[0].page} == {ran.run.id}
    assert (await clearing.statement(alice, made))[0].owed == []
    await clearing.check()


async def test_a_hundred_against_eighty_is_twenty(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob = await desk.agent("1000"), await desk.agent("1000")
    made = await clearing.agree(alice, bob)
    await clearing.owe(made, alice, bob, 100)
    await clearing.owe(made, bob, alice, 80)
    await settled(clearing, made, bob)
    assert (await desk.money(bob), await desk.money(alice)) == ({"free": 1_020}, {"free": Decimal("979.8")})


async def test_a_group_settles_in_several_assets(clearing: Clearing) -> None:
    """Against a second account of the nets: what each holds after is what it held, less its net, less its fee."""
    desk = clearing.desk
    rng = random.Random(7)
    members = [await desk.agent("100000") for _ in range(6)]
    for member in members:
        await desk.deposit(member, "BTC", 50)
    made = await clearing.agree(*members)
    nets: Counter[tuple[str, str]] = Counter()
    for _ in range(40):
        payer, payee = rng.sample(members, 2)
        asset = rng.choice(["USDC", "BTC"])
        amount = (
            Decimal(rng.randrange(1, 10**9)).scaleb(-6) if asset == "USDC" else Decimal(rng.random()).quantize(_WEI)
        )
        await clearing.owe(made, payer, payee, amount, asset)
        nets[payer, asset] += amount  # type: ignore[assignment]
        nets[payee, asset] -= amount  # type: ignore[assignment]
    await clearing.check()
    ran = await settled(clearing, made, members[0])
    for asset, decimals, before in (("USDC", 6, 100_000), ("BTC", 18, 50)):
        moved = [m for m in ran.run.figures["movements"] if m["asset"] == asset]
        assert 1 <= len(moved) <= len(members) - 1
        fees = Decimal(0)
        for member in members:
            net = nets[member, asset]
            fee = math.ceil(max(Fraction(net), Fraction(0)) * 10**decimals / 100) * Decimal(1).scaleb(-decimals)
            holding = (await desk.book(member)).holding(asset)
            assert (holding.free, holding.reserved) == (before - net - fee, Decimal(0))
            fees += fee
        assert (await clearing.purses(asset))["house", "fees"] == fees
    await clearing.check()
    for member in members:
        assert (await clearing.events(member, "netting"))[-1] == "netting.settled"


async def test_what_a_creditor_owes_is_paid_first(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob = await desk.agent("1000"), await desk.agent()
    made = await clearing.agree(alice, bob)
    await clearing.owe(made, alice, bob, 100)
    await desk.deposit(bob, "USDC", 5)
    await desk.rows("UPDATE balances SET bucket = 'owed' WHERE agent_id = :id RETURNING 1", id=bob)
    await settled(clearing, made, alice)
    assert await desk.money(bob) == {"free": 95}


# --- when


async def test_a_cut_off_comes_with_the_interval(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob = await desk.agent("1000"), await desk.agent("1000")
    made = await clearing.agree(alice, bob, interval_seconds=3_600)
    assert made.activated_at is not None
    # whole intervals from the activation, which is 2.5 of them ago, not from the booking
    await desk.rows("UPDATE netting_agreements SET activated_at = activated_at - interval '9000 s' RETURNING 1")
    await clearing.owe(made, alice, bob, 100)
    cut_off = made.activated_at + timedelta(seconds=3 * 3_600 - 9_000)
    assert (await clearing.agreement(made)).next_action_at == cut_off
    await clearing.owe(made, alice, bob, 1)
    assert (await clearing.agreement(made)).next_action_at == cut_off
    assert await clearing.settle(made) is None  # not due
    await clearing.make_due(made)
    async with desk.database.transaction(ACTOR) as tx:
        assert await agreements.due(tx, 10) == [made.id]
    ran = await clearing.settle(made)
    assert ran is not None
    assert ran.run.cause == "interval"
    # nothing is open, so that nothing is timed: an idle agreement wakes no worker and locks no account
    assert (await clearing.agreement(made)).next_action_at is None
    await clearing.make_due(made)
    async with desk.database.transaction(ACTOR) as tx:
        assert await agreements.due(tx, 10) == []
    assert await clearing.settle(made) is None
    await refused(clearing.settle(made, alice), "nothing_to_settle")


async def test_a_threshold_makes_it_due(clearing: Clearing) -> None:
    """1,000 USD of gross: 400 USDC and .01 BTC at 60,000."""
    desk = clearing.desk
    alice, bob = await desk.agent("1000"), await desk.agent("1000")
    await desk.deposit(bob, "BTC", 1)
    made = await clearing.agree(alice, bob, threshold=1_000)
    await clearing.owe(made, alice, bob, 400)
    assert (await clearing.agreement(made)).next_action_at is None
    await clearing.owe(made, bob, alice, "0.01", "BTC")
    ran = await clearing.settle(made)
    assert ran is not None
    assert (ran.run.cause, ran.run.obligations) == ("threshold", 2)
    assert (await clearing.agreement(made)).next_action_at is None


async def test_a_statement_of_a_moment_that_has_passed(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob = await desk.agent("1000"), await desk.agent("1000")
    made = await clearing.agree(alice, bob)
    first = await clearing.owe(made, alice, bob, 100)
    second = await clearing.owe(made, bob, alice, 80)
    ran = await settled(clearing, made, alice)
    third = await clearing.owe(made, alice, bob, 5)
    moments = {
        first.booked_at - timedelta(microseconds=1): [],
        first.booked_at: [100],
        second.booked_at: [20],
        ran.run.ran_at: [],
        third.booked_at: [5],
        third.booked_at + timedelta(days=9): [5],
    }
    for moment, moved in moments.items():
        _, found = await clearing.statement(bob, made, as_of=moment)
        assert [m.amount for m in found.settlement.movements] == moved, moment
    pages = [await clearing.statement(bob, made, run_id=ran.run.id, limit=1, before=b) for b in (None, second.seq)]
    assert [[o.id for o in page.page] for page, _ in pages] == [[second.id], [first.id]]


# --- defaults


async def test_a_default_leaves_all_open_reserves_what_there_is_and_says_so(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob, carol = await desk.agent("30"), await desk.agent("1000"), await desk.agent("1000")
    made = await clearing.agree(alice, bob, carol)
    await clearing.owe(made, bob, carol, 50)
    # a fact is booked though it is not covered: what is free is reserved for it
    await refused(clearing.owe(made, alice, bob, 100), "insufficient_funds")
    await clearing.owe(made, alice, bob, 100, fact=True)
    assert await desk.money(alice) == {"reserved": 30}
    await desk.deposit(alice, "USDC", 20)
    ran = await clearing.settle(made, bob)
    assert ran is not None
    assert ran.run.outcome == "defaulted"
    assert ran.run.figures["short"] == [{"agent_id": alice, "asset": "USDC", "due": "101", "missing": "71"}]
    assert await desk.money(alice) == {"reserved": 50}
    after = await clearing.agreement(made)
    assert (after.state, after.open_obligations) == ("defaulted", 2)
    assert len((await clearing.statement(carol, made))[0].owed) == 2
    assert await desk.rows("SELECT count(*) FROM ledger_entries WHERE kind = 'netting'") == [(0,)]
    for member in (alice, bob, carol):
        assert (await clearing.events(member, "netting"))[-1] == "netting.defaulted"
    await refused(clearing.owe(made, bob, carol, 1), "agreement_defaulted")
    await refused(clearing.leave(carol, made), "obligations_open")
    # tried again by its timer: in silence while it can't be, whole once it can
    told = await clearing.events(carol, "netting")
    await clearing.make_due(made)
    assert await clearing.settle(made) is None
    assert await clearing.events(carol, "netting") == told
    await clearing.check()
    await desk.deposit(alice, "USDC", 51)
    await clearing.make_due(made)
    again = await clearing.settle(made)
    assert again is not None
    assert again.run.outcome == "settled"
    assert await desk.money(alice) == {}
    assert await desk.money(bob) == {"free": 1_050}
    assert await desk.money(carol) == {"free": 1_050}
    assert (await clearing.agreement(made)).state == "active"
    await clearing.owe(made, bob, carol, 1)
    await clearing.check()


async def test_creditors_may_waive_what_is_never_paid(clearing: Clearing) -> None:
    """Alice owes bob 100 that she has not, and bob carol 50: bob waives it, and carol and he are free again."""
    desk = clearing.desk
    alice, bob, carol = await desk.agent(), await desk.agent("1000"), await desk.agent("1000")
    made = await clearing.agree(alice, bob, carol)
    await clearing.owe(made, bob, carol, 50)
    await clearing.owe(made, alice, bob, 100, fact=True)
    ran = await clearing.settle(made, carol)
    assert ran is not None
    assert ran.run.outcome == "defaulted"
    for payer, payee, amount in ((carol, bob, 51), (bob, alice, "50.000001"), (alice, carol, 1)):
        await refused(clearing.owe(made, payer, payee, amount, fact=True), "agreement_defaulted")
    await clearing.owe(made, bob, alice, 50)
    await clearing.owe(made, carol, alice, 50)
    await clearing.check()
    assert (await settled(clearing, made, carol)).run.figures["movements"] == []
    for member, held in ((alice, {}), (bob, {"free": 1_000}), (carol, {"free": 1_000})):
        assert await desk.money(member) == held
    assert (await clearing.leave(carol, made)).state == "active"
    await clearing.check()


async def test_a_debt_takes_no_collateral_that_the_gates_hold(clearing: Clearing) -> None:
    """What is free backs a position: it is neither paid out nor reserved for a fact that was never covered."""
    desk = clearing.desk
    alice, bob = await desk.agent("30"), await desk.agent("1000")
    made = await clearing.agree(alice, bob)
    await clearing.owe(made, alice, bob, 100, fact=True)
    await desk.deposit(alice, "USDC", 1_000)
    await desk.order(alice, "buy", "0.038", leverage=3)  # 760 of margin and 30 reserved, of 1,030
    ran = await clearing.settle(made, bob)
    assert ran is not None
    assert ran.run.outcome == "defaulted"
    assert await desk.money(alice) == {"free": 1_000, "reserved": 30}
    await desk.order(alice, "sell", "0.038", reduce_only=True)
    await settled(clearing, made, bob)
    assert await desk.money(alice) == {"free": 929}
    await clearing.check()


# --- races, over real connections


@pytest.mark.parametrize("turn", range(3))
async def test_two_cut_offs_at_once_settle_once(clearing: Clearing, turn: int) -> None:
    desk = clearing.desk
    alice, bob, carol = [await desk.agent("1000") for _ in range(3)]
    made = await clearing.agree(alice, bob, carol, interval_seconds=3_600)
    for payer, payee in ((alice, bob), (bob, carol), (carol, alice), (alice, carol)):
        await clearing.owe(made, payer, payee, 50)
    await clearing.make_due(made)
    steps: list[Awaitable[Any]] = [clearing.settle(made) for _ in range(4)]
    steps += [clearing.settle(made, member) for member in (alice, bob, carol)]
    found = await ended(steps[turn:] + steps[:turn])
    assert found["settled"] == 1
    assert set(found) <= {"settled", "nothing", "nothing_to_settle"}
    assert await desk.rows("SELECT count(*), sum(obligations) FROM netting_runs") == [(1, 4)]
    assert await desk.money(carol) == {"free": 1_050}
    await clearing.check()


@pytest.mark.parametrize("turn", range(3))
async def test_settling_races_new_obligations(clearing: Clearing, turn: int) -> None:
    """Each obligation is settled by one run or still open: what both sides hold says which."""
    desk = clearing.desk
    alice, bob, carol = [await desk.agent("10000") for _ in range(3)]
    made = await clearing.agree(alice, bob, carol)
    await clearing.owe(made, carol, alice, 1)
    steps: list[Awaitable[Any]] = [clearing.owe(made, alice, bob, 10) for _ in range(8)]
    steps += [clearing.owe(made, bob, alice, 3) for _ in range(5)]
    steps.insert(turn, clearing.settle(made, carol))
    steps.insert(turn + 4, clearing.settle(made, bob))
    steps.append(clearing.settle(made, alice))
    found = await ended(steps)
    assert found["booked"] == 13
    assert set(found) <= {"booked", "settled", "nothing_to_settle"}
    await clearing.check()
    [(in_runs,)] = await desk.rows("SELECT coalesce(sum(obligations), 0) FROM netting_runs")
    assert in_runs + (await clearing.agreement(made)).open_obligations == 14
    if (await clearing.agreement(made)).open_obligations:
        await settled(clearing, made, alice)
    free = [(await desk.money(member))["free"] for member in (alice, bob, carol)]
    [(fees,)] = await desk.rows("SELECT sum(amount) FROM ledger_entries WHERE to_bucket = 'fees'")
    assert sum(free) + fees == 30_000
    assert free[2] == Decimal("9998.99")


async def test_groups_that_overlap_do_not_wait_for_each_other_for_ever(clearing: Clearing) -> None:
    desk = clearing.desk
    members = [await desk.agent("10000") for _ in range(4)]
    made = [await clearing.agree(*(members[(k + i) % 4] for i in range(3))) for k in range(4)]
    steps: list[Awaitable[Any]] = []
    for k, agreement in enumerate(made):
        trio = [members[(k + i) % 4] for i in range(3)]
        for i in range(3):
            steps.append(clearing.owe(agreement, trio[i], trio[(i + 1) % 3], 10 + k + i))
            steps.append(clearing.settle(agreement, trio[i]))
    random.Random(3).shuffle(steps)
    found = await ended(steps)
    assert found["booked"] == 12
    assert set(found) <= {"booked", "settled", "nothing_to_settle"}
    await clearing.check()


async def test_a_run_that_dies_has_done_nothing(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob = await desk.agent("1000"), await desk.agent("1000")
    made = await clearing.agree(alice, bob)
    await clearing.owe(made, alice, bob, 100)

    async def dies() -> None:
        async with desk.database.transaction(ACTOR) as tx:
            ran = await netting.run(tx, clearing.scenes, made.id, alice)
            assert ran is not None
            raise ConnectionAbortedError

    with pytest.raises(PrimeriskError):
        await dies()
    assert await desk.money(bob) == {"free": 1_000}
    assert (await clearing.agreement(made)).open_obligations == 1
    assert await desk.rows("SELECT count(*) FROM netting_runs") == [(0,)]
    await settled(clearing, made, bob)
    assert await desk.money(bob) == {"free": 1_100}
    await clearing.check()
