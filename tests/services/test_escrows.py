"""Escrows on real commits: what is set aside, who is paid at the end, and races that have one outcome."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from decimal import Decimal
from typing import Any

import pytest

from app.domain.escrow import Leg
from app.domain.moves import Move, agent, house
from app.errors import ConflictError, ForbiddenError, InvalidError, NotFoundError, PrimeriskError
from app.services import escrows, ledger, liquidation, market
from app.services.escrows import Escrow
from app.services.ledger import Occasion
from tests.services.clearing import Clearing
from tests.services.desk import ACTOR


async def refused(step: Awaitable[Any], code: str) -> PrimeriskError:
    with pytest.raises(PrimeriskError) as caught:
        await step
    assert caught.value.code == code, caught.value
    return caught.value


async def ended(steps: Sequence[Awaitable[Any]]) -> Counter[str]:
    """Run steps at once and count how they end; anything but a refusal is raised."""
    found: Counter[str] = Counter()
    for result in await asyncio.gather(*steps, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, PrimeriskError):
            raise result
        if isinstance(result, PrimeriskError):
            found[result.code] += 1
        else:
            told = None if result is None else result.told
            found["nothing" if told is None else told] += 1
    return found


# --- money


async def test_ten_thousand_through_escrow(clearing: Clearing) -> None:
    """Fee 100, referrer 15, platform 85: to the last digit, in the balances and in the entries."""
    desk = clearing.desk
    payer, payee, referrer = await desk.agent("20000"), await desk.agent(), await desk.agent()
    held = await clearing.fund(payer, payee, 10_000, referrer=referrer)
    assert await desk.money(payer) == {"free": 9_900, "reserved": 10_100}
    assert (await clearing.confirm(payee, held)).told == "escrow.accepted"
    done = await clearing.confirm(payer, held)
    assert (done.told, done.escrow.fee, done.escrow.referral) == ("escrow.released", Decimal(100), Decimal(15))
    assert await clearing.purses() == {
        (payer, "free"): 9_900,
        (payee, "free"): 10_000,
        (referrer, "free"): 15,
        ("house", "fees"): 85,
        ("house", "external"): -20_000,
    }
    await clearing.check()
    # T+0: the very next request spends it
    await desk.withdraw(payee, "USDC", 10_000)
    for party in (payer, payee):
        assert await clearing.events(party) == ["escrow.funded", "escrow.accepted", "escrow.released"]
    assert await clearing.events(referrer) == ["escrow.released"]
    # who is no party hears of its share, and not who paid whom for what
    [(data,)] = await desk.rows("SELECT data::text FROM events WHERE agent_id = :id AND type ~ '^escrow'", id=referrer)
    assert '"referral": 15' in data
    assert payer not in data
    assert payee not in data


async def test_fee_and_share_are_parameters_and_those_of_the_funding(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee, referrer = await desk.agent("20000"), await desk.agent(), await desk.agent()
    old = await clearing.fund(payer, payee, 1_000, referrer=referrer)
    async with desk.database.transaction("admin") as tx:
        await market.put_model_parameters(tx, {"escrow_fee": 0.02, "referral_share": 0.5})
    new = await clearing.fund(payer, payee, 1_000, referrer=referrer)
    for held in (old, new):
        await clearing.confirm(payee, held)
        await clearing.confirm(payer, held)
    assert [((await clearing.get(h)).fee, (await clearing.get(h)).referral) for h in (old, new)] == [
        (Decimal(10), Decimal("1.5")),
        (Decimal(20), Decimal(10)),
    ]
    await clearing.check()


@pytest.mark.parametrize(("fee_payer", "reserved", "received"), [("payer", 1_010, 1_000), ("payee", 1_000, 990)])
async def test_who_pays_the_fee_is_chosen_at_funding(
    clearing: Clearing, fee_payer: Any, reserved: int, received: int
) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("5000"), await desk.agent()
    held = await clearing.fund(payer, payee, 1_000, fee_payer=fee_payer, on_timeout="release")
    assert (await desk.money(payer))["reserved"] == reserved
    await clearing.pass_deadline(held)
    await clearing.fire(held)
    assert await desk.money(payee) == {"free": received}
    assert await desk.money(payer) == {"free": 5_000 - reserved}


async def test_what_the_payee_owes_is_paid_first(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("5000"), await desk.agent()
    async with desk.locked(payee) as (tx, _, _held):
        debt = [Move("USDC", Decimal(300), agent(payee, "owed"), house("trading"))]
        await ledger.post(tx, Occasion(payee, "trading", "realized_pnl"), debt)
    held = await clearing.fund(payer, payee, 1_000)
    await clearing.confirm(payee, held)
    await clearing.confirm(payer, held)
    assert await desk.money(payee) == {"free": 700}
    await clearing.check()


async def test_it_is_funded_wholly_or_not_at_all(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("1000"), await desk.agent()
    await refused(clearing.fund(payer, payee, 1_000), "insufficient_funds")  # the fee is not covered
    await desk.order(payer, "buy", "0.04", leverage=3)  # margin 800 of 1,000
    await refused(clearing.fund(payer, payee, 100), "insufficient_margin")
    assert await desk.rows("SELECT count(*) FROM escrows") == [(0,)]
    assert await desk.money(payer) == {"free": 1_000}


async def test_many_fundings_at_once_reserve_no_more_than_there_is(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("1000"), await desk.agent()
    steps = [clearing.fund(payer, payee, 300) for _ in range(8)]
    results = await asyncio.gather(*steps, return_exceptions=True)
    assert Counter(type(r) for r in results) == {Escrow: 3, ConflictError: 5}
    assert await desk.money(payer) == {"free": 91, "reserved": 909}
    await clearing.check()


# --- what an escrow holds is its own


async def test_only_the_escrow_touches_what_it_holds(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("5000"), await desk.agent()
    await clearing.fund(payer, payee, 1_000)
    [reservation] = (await desk.book(payer)).reservations
    assert (reservation.service, reservation.reducible, reservation.remaining) == ("escrow", False, Decimal(1_010))
    for step in (desk.release, desk.settle):
        await refused(step(payer, reservation.id), "reservation_bound")
        await refused(step(payer, reservation.id, 1), "reservation_bound")
    await refused(desk.reduce(payer, reservation.id, "0.5"), "not_reducible")
    async with desk.scene() as (_, scene):
        held = await desk.book(payer)
        assert liquidation.targets(held, scene.figures(held)) == []
    assert (await desk.figures(payer)).health.required_initial == 1_010


# --- ends


async def test_a_dispute_freezes_and_is_split(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee, arbiter = await desk.agent("2000"), await desk.agent(), await desk.agent()
    held = await clearing.fund(payer, payee, 1_000, arbiter=arbiter, on_timeout="release")
    await clearing.confirm(payee, held)
    await clearing.act(payer, held, "dispute", note="half of it is missing")
    await clearing.pass_deadline_of_a_dispute(held)
    assert await clearing.fire(held) is None
    for step in ("confirm", "cancel", "dispute"):
        await refused(clearing.act(payer, held, step), "escrow_disputed")
    await refused(clearing.resolve(payer, held, 0), "not_your_part")
    await refused(clearing.resolve(arbiter, held, "1000.000001"), "amount_above_escrow")
    await refused(clearing.resolve(arbiter, held, "0.0000001"), "too_many_decimals")
    done = await clearing.resolve(arbiter, held, "333.333333")
    assert (done.escrow.state, done.escrow.fee) == ("resolved", Decimal("3.333334"))
    assert await desk.money(payee) == {"free": Decimal("333.333333")}
    assert await desk.money(payer) == {"free": Decimal(2_000) - Decimal("333.333333") - Decimal("3.333334")}
    assert await clearing.events(arbiter) == ["escrow.disputed", "escrow.resolved"]
    await clearing.check()
    await refused(clearing.resolve(None, held, 0), "escrow_closed")


async def test_an_admin_resolves_by_a_share(clearing: Clearing) -> None:
    desk = clearing.desk
    await desk.prices({"BTC": "60000"})
    payer, payee = await desk.agent(), await desk.agent()
    await desk.deposit(payer, "BTC", 2)
    held = await clearing.fund(payer, payee, 1, "BTC", fee_payer="payee")
    await clearing.confirm(payee, held)
    await clearing.act(payee, held, "dispute")
    await refused(clearing.resolve(None, held, fraction="1.1"), "out_of_range")
    third = "0.3333333333333333333333"
    done = await clearing.resolve(None, held, fraction=third)
    assert done.escrow.to_payee == Decimal("0.333333333333333333")
    purses = await clearing.purses("BTC")
    assert purses[payer, "free"] + purses[payee, "free"] + purses["house", "fees"] == 2
    await clearing.check()


@pytest.mark.parametrize("who", ["payer", "payee"])
async def test_it_is_called_off_before_it_is_accepted(clearing: Clearing, who: str) -> None:
    desk = clearing.desk
    parties = {"payer": await desk.agent("2000"), "payee": await desk.agent()}
    held = await clearing.fund(parties["payer"], parties["payee"], 1_000)
    done = await clearing.act(parties[who], held, "cancel")
    assert (done.told, done.escrow.fee, done.escrow.reason) == ("escrow.cancelled", Decimal(0), "cancelled")
    assert await desk.money(parties["payer"]) == {"free": 2_000}
    await clearing.check()


async def test_a_confirmation_again_changes_nothing(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("2000"), await desk.agent()
    held = await clearing.fund(payer, payee, 1_000)
    assert (await clearing.confirm(payer, held)).told is None
    again = await clearing.confirm(payer, held)
    assert (again.told, again.escrow.state, again.escrow.payer_confirmed) == (None, "funded", True)
    assert (await clearing.confirm(payee, held)).told == "escrow.released"
    await refused(clearing.confirm(payee, held), "escrow_closed")
    assert await clearing.events(payee) == ["escrow.funded", "escrow.released"]


@pytest.mark.parametrize("on_timeout", ["release", "refund"])
async def test_a_time_out_does_what_was_agreed_and_only_when_it_is_due(clearing: Clearing, on_timeout: Any) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("2000"), await desk.agent()
    held = await clearing.fund(payer, payee, 1_000, on_timeout=on_timeout)
    assert await clearing.fire(held) is None
    async with desk.database.transaction("worker") as tx:
        assert await escrows.due(tx, 10) == []
    await clearing.pass_deadline(held)
    async with desk.database.transaction("worker") as tx:
        assert await escrows.due(tx, 10) == [held.id]
    # past its deadline nothing else can be done, though the timer has not fired
    for who, step in ((payer, "confirm"), (payee, "confirm"), (payer, "cancel")):
        await refused(clearing.act(who, held, step), "escrow_expired")  # type: ignore[arg-type]
    done = await clearing.fire(held)
    assert done is not None
    assert done.told == ("escrow.released" if on_timeout == "release" else "escrow.refunded")
    assert done.escrow.reason == "timeout"
    assert await clearing.fire(held) is None
    assert await desk.money(payer) == {"free": 990 if on_timeout == "release" else 2_000}
    await clearing.check()


# --- two legs


async def test_delivery_versus_payment(clearing: Clearing) -> None:
    desk = clearing.desk
    buyer, seller = await desk.agent("100000"), await desk.agent()
    await desk.deposit(seller, "BTC", 1)
    held = await clearing.fund(buyer, seller, 60_000, counter=("BTC", 1))
    await clearing.confirm(seller, held)
    assert (await desk.book(seller)).holding("BTC").reserved == 1
    await clearing.confirm(buyer, held)
    assert await desk.money(buyer) == {"free": 100_000 - 60_600}
    assert await desk.money(seller) == {"free": 60_000}
    assert (await desk.book(buyer)).holding("BTC").free == 1
    # both legs are one batch
    rows = await desk.rows(
        "SELECT count(DISTINCT batch), count(DISTINCT asset) FROM ledger_entries WHERE kind = 'escrow'"
    )
    assert rows == [(1, 2)]
    await clearing.check()


async def test_a_leg_that_is_not_there_is_not_accepted(clearing: Clearing) -> None:
    desk = clearing.desk
    buyer, seller = await desk.agent("100000"), await desk.agent()
    held = await clearing.fund(buyer, seller, 60_000, counter=("BTC", 1), on_timeout="release")
    await clearing.confirm(buyer, held)
    await refused(clearing.confirm(seller, held), "insufficient_funds")
    assert (await clearing.get(held)).state == "funded"
    await clearing.pass_deadline(held)
    done = await clearing.fire(held)
    assert done is not None
    assert done.told == "escrow.refunded"
    assert await desk.money(buyer) == {"free": 100_000}


async def test_a_dispute_over_two_legs_splits_both_alike(clearing: Clearing) -> None:
    desk = clearing.desk
    buyer, seller = await desk.agent("100000"), await desk.agent()
    await desk.deposit(seller, "BTC", 1)
    held = await clearing.fund(buyer, seller, 60_000, counter=("BTC", 1))
    await clearing.confirm(seller, held)
    await clearing.act(buyer, held, "dispute")
    await clearing.resolve(None, held, 15_000)
    assert await desk.money(seller) == {"free": 15_000}
    assert (await desk.book(seller)).holding("BTC").free == Decimal("0.75")
    assert (await desk.book(buyer)).holding("BTC").free == Decimal("0.25")
    assert await desk.money(buyer) == {"free": 100_000 - 15_150}
    await clearing.check()


# --- what is refused


async def test_parties_are_agents_and_different_ones(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee, other = await desk.agent("5000"), await desk.agent(), await desk.agent()
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"payee": payer}, "same_party", "/payee"),
        ({"payee": "agent_0"}, "unknown_agent", "/payee"),
        ({"referrer": payer}, "same_party", "/referrer"),
        ({"referrer": payee}, "same_party", "/referrer"),
        ({"arbiter": payee}, "same_party", "/arbiter"),
        ({"arbiter": "agent_0"}, "unknown_agent", "/arbiter"),
        ({"counter": ("USDC", 1)}, "same_asset", "/counter_leg/asset"),
        ({"counter": ("NOPE", 1)}, "missing_price", "/counter_leg/asset"),
        ({"amount": "0.0000001"}, "too_many_decimals", "/amount"),
        ({"timeout_seconds": 0}, "number_out_of_range", "/timeout_seconds"),
    ]
    for given, code, pointer in cases:
        asked: dict[str, Any] = {"payee": payee, "amount": 100, "referrer": other} | given
        error = await refused(clearing.fund(payer, **asked), code)
        assert isinstance(error, InvalidError)
        assert error.errors[0].pointer == pointer


async def test_a_stranger_finds_no_escrow(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee, stranger, referrer = [await desk.agent("5000") for _ in range(4)]
    held = await clearing.fund(payer, payee, 100, referrer=referrer)
    for who in (stranger, referrer):
        for kind in ("confirm", "cancel", "dispute", "resolve"):
            with pytest.raises(NotFoundError):
                await clearing.act(who, held, kind)
    with pytest.raises(NotFoundError):
        await clearing.act(payer, "esc_0", "confirm")
    with pytest.raises(ForbiddenError):
        await clearing.act(payer, held, "resolve")


async def test_lists_are_by_party_role_and_state(clearing: Clearing) -> None:
    desk = clearing.desk
    alice, bob, carol = [await desk.agent("5000") for _ in range(3)]
    first = await clearing.fund(alice, bob, 100)
    second = await clearing.fund(bob, alice, 100)
    third = await clearing.fund(bob, carol, 100, arbiter=alice)
    await clearing.act(bob, second, "cancel")
    async with desk.database.transaction(ACTOR) as tx:

        async def ids(*given: Any, **more: Any) -> list[str]:
            return [e.id for e in await escrows.list_escrows(tx, *given, **more)]

        assert await ids(alice, 10) == [third.id, second.id, first.id]
        assert await ids(alice, 10, role="payee") == [second.id]
        assert await ids(alice, 10, role="arbiter") == [third.id]
        assert await ids(bob, 10, state="cancelled") == [second.id]
        assert await ids(alice, 2) == [third.id, second.id]
        assert await ids(alice, 2, before=second.seq) == [first.id]
        assert await ids(carol, 10, state="released") == []
        assert [await escrows.open_legs(tx, agent_id) for agent_id in (bob, carol)] == [{"USDC": -100}, {}]
    # what is to come counts once it is accepted
    await clearing.confirm(bob, first)
    await clearing.confirm(carol, third)
    async with desk.database.transaction(ACTOR) as tx:
        assert await escrows.open_legs(tx, bob) == {}  # 100 to come, 100 to go
        assert await escrows.open_legs(tx, carol) == {"USDC": 100}


# --- races, over real connections


@pytest.mark.parametrize("turn", range(4))
async def test_a_confirmation_races_the_time_out(clearing: Clearing, turn: int) -> None:
    """Whoever comes first under the lock: past the deadline the confirmation is refused, and one end is written."""
    desk = clearing.desk
    payer, payee = await desk.agent("2000"), await desk.agent()
    held = await clearing.fund(payer, payee, 1_000)
    await clearing.confirm(payee, held)
    await desk.rows("UPDATE escrows SET deadline_at = clock_timestamp() + interval '60 ms' RETURNING 1")
    await desk.rows("UPDATE escrows SET next_action_at = deadline_at RETURNING 1")

    async def later(seconds: float, *, fires: bool) -> Any:
        await asyncio.sleep(seconds)
        return await (clearing.fire(held) if fires else clearing.confirm(payer, held))

    steps: list[Awaitable[Any]] = [later(0.02 * k, fires=k % 2 == turn % 2) for k in range(8)]
    steps.append(later(0.3, fires=True))
    found = await ended(steps)
    assert found["escrow.released"] + found["escrow.refunded"] == 1, found
    assert set(found) <= {"escrow.released", "escrow.refunded", "nothing", "escrow_closed", "escrow_expired"}
    is_released = found["escrow.released"] == 1
    assert await desk.money(payer) == {"free": 990 if is_released else 2_000}
    assert await clearing.events(payee) == [
        "escrow.funded",
        "escrow.accepted",
        "escrow.released" if is_released else "escrow.refunded",
    ]
    await clearing.check()


@pytest.mark.parametrize("turn", range(3))
async def test_all_that_may_end_it_at_once_ends_it_once(clearing: Clearing, turn: int) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("2000"), await desk.agent()
    held = await clearing.fund(payer, payee, 1_000)
    steps: list[Awaitable[Any]] = []
    for _ in range(3):
        steps += [clearing.confirm(payee, held), clearing.confirm(payer, held), clearing.act(payer, held, "cancel")]
    steps = steps[turn:] + steps[:turn]
    found = await ended(steps)
    assert found["escrow.released"] + found["escrow.cancelled"] == 1, found
    assert set(found) <= {
        *("escrow.accepted", "escrow.released", "escrow.cancelled"),
        *("nothing", "escrow_closed", "escrow_accepted"),
    }
    await clearing.check()


async def test_escrows_across_do_not_wait_for_each_other_for_ever(clearing: Clearing) -> None:
    """Each of three pays both others, each refers and each decides: locks are taken in one order."""
    desk = clearing.desk
    agents = [await desk.agent("100000") for _ in range(3)]
    funded = []
    for k in range(18):
        payer, payee, third = (agents[(k + i) % 3] for i in ((0, 1, 2), (0, 2, 1))[k % 2])
        more = {"referrer": third} if k % 3 else {"arbiter": third}
        funded.append(await clearing.fund(payer, payee, 100 + k, **more))
    found = await ended([clearing.confirm(h.payee, h) for h in funded])
    assert found == {"escrow.accepted": 18}
    steps: list[Awaitable[Any]] = [
        clearing.confirm(h.payer, h) if k % 3 else clearing.act(h.payee, h, "dispute") for k, h in enumerate(funded)
    ]
    found = await ended([*steps, *(clearing.confirm(h.payer, h) for h in funded[::2] if h.arbiter is None)])
    assert "database_busy" not in found
    disputed = [h for k, h in enumerate(funded) if k % 3 == 0]
    found = await ended([clearing.resolve(h.arbiter, h, fraction="0.5") for h in disputed])
    assert found == {"escrow.resolved": 6}
    await clearing.check()
    total = sum(amount for (owner, _), amount in (await clearing.purses()).items() if owner != "house")
    fees = (await clearing.purses())["house", "fees"]
    assert total + fees == 300_000


async def test_a_transaction_that_dies_leaves_it_open(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("2000"), await desk.agent()
    held = await clearing.fund(payer, payee, 1_000)
    await clearing.confirm(payee, held)

    async def dies() -> None:
        async with desk.database.transaction(ACTOR) as tx:
            done = await escrows.act(tx, clearing.scenes, payer, held.id, "confirm")
            assert done.told == "escrow.released"
            raise ConnectionAbortedError

    with pytest.raises(PrimeriskError):
        await dies()
    assert (await clearing.get(held)).state == "accepted"
    assert await desk.money(payer) == {"free": 990, "reserved": 1_010}
    assert (await clearing.confirm(payer, held)).told == "escrow.released"
    await clearing.check()


async def test_the_clock_is_the_databases(clearing: Clearing) -> None:
    held = await clearing.fund(await clearing.desk.agent("200"), await clearing.desk.agent(), 100, timeout_seconds=77)
    rows = await clearing.desk.rows("SELECT deadline_at - funded_at, now() - funded_at < interval '1 min' FROM escrows")
    assert [(span.total_seconds(), recent) for span, recent in rows] == [(77, True)]
    assert held.terms.leg == Leg("USDC", Decimal(100))
