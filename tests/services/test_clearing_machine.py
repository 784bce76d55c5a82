"""Drawn sequences of escrows and netting against a second account of them: every contract ends once, books balance."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from app.db.session import Database, parse_database_url
from app.errors import ConflictError
from app.services.agreements import Agreement
from app.services.escrows import Escrow
from tests.database import make_settings
from tests.postgres import fresh_database
from tests.services.clearing import Clearing
from tests.services.desk import Desk

DRAWN = settings(
    max_examples=10,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
AGENTS = 4
UNIT = Fraction(1, 10**6)
AMOUNT = st.one_of(st.just(Decimal("0.000001")), st.decimals("0.000001", 900, places=6)).map(Decimal)
WHO = st.integers(0, AGENTS - 1)


def _up(amount: Fraction) -> Fraction:
    return math.ceil(amount / UNIT) * UNIT


def _down(amount: Fraction) -> Fraction:
    return math.floor(amount / UNIT) * UNIT


@dataclass
class Told:
    """What the second account knows of an escrow."""

    escrow: Escrow
    payer: int
    payee: int
    referrer: int | None
    arbiter: int | None
    amount: Fraction
    fee_payer: str
    release_at_end: bool
    state: str = "funded"
    confirmed: set[int] = field(default_factory=set)

    def fees(self, amount: Fraction) -> tuple[Fraction, Fraction]:
        """Return the payer's and the payee's part."""
        fee = _up(amount / 100)
        if self.fee_payer == "split":
            return _up(fee / 2), fee - _up(fee / 2)
        return (fee, Fraction(0)) if self.fee_payer == "payer" else (Fraction(0), fee)

    @property
    def held(self) -> Fraction:
        return self.amount + self.fees(self.amount)[0]


class ClearingMachine(RuleBasedStateMachine):
    loop: ClassVar[asyncio.AbstractEventLoop]
    clearing: ClassVar[Clearing]
    seen: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.free = [Fraction(2_000)] * AGENTS
        self.agents: list[str] = []
        self.escrows: list[Told] = []
        self.owed: list[tuple[int, int, Fraction]] = []
        self.fees = Fraction(0)
        self.agreement: Agreement

    @initialize()
    def begin(self) -> None:
        self.agents = [self.run(self.clearing.desk.agent("2000")) for _ in range(AGENTS)]
        self.agreement = self.run(self.clearing.agree(*self.agents))

    # --- what happens

    @rule(payer=WHO, step=st.integers(1, AGENTS - 1), amount=AMOUNT, third=st.sampled_from(["", "referrer", "arbiter"]),
          fee_payer=st.sampled_from(["payer", "payee", "split"]), release=st.booleans())  # fmt: skip
    def fund(self, payer: int, step: int, amount: Decimal, third: str, fee_payer: str, release: bool) -> None:
        payee = (payer + step) % AGENTS
        other = next(k for k in range(AGENTS) if k not in (payer, payee))
        more = {} if not third else {third: self.agents[other]}
        made = self.does(
            self.clearing.fund(
                self.agents[payer],
                self.agents[payee],
                amount,
                fee_payer=fee_payer,
                on_timeout="release" if release else "refund",
                **more,
            )
        )
        told = Told(made, payer, payee, other if third == "referrer" else None, other if third == "arbiter" else None,
                    Fraction(amount), fee_payer, release)  # fmt: skip
        enough = self.free[payer] - self.reserved(payer) >= told.held
        assert (made is not None) == enough, "funded"
        if made is not None:
            self.escrows.append(told)
        self.check()

    @precondition(lambda self: bool(self.escrows))
    @rule(pick=st.integers(0, 99), by_payee=st.booleans())
    def confirm(self, pick: int, by_payee: bool) -> None:
        told = self.picked(pick)
        who = told.payee if by_payee else told.payer
        done = self.does(self.clearing.confirm(self.agents[who], told.escrow))
        assert (done is not None) == (told.state in ("funded", "accepted"))
        if done is not None:
            told.confirmed.add(who)
            told.state = "accepted" if told.payee in told.confirmed else "funded"
            if len(told.confirmed) == 2:
                self.ends(told, "released", told.amount)
        self.check()

    @precondition(lambda self: bool(self.escrows))
    @rule(pick=st.integers(0, 99), by_payee=st.booleans())
    def cancel(self, pick: int, by_payee: bool) -> None:
        told = self.picked(pick)
        who = told.payee if by_payee else told.payer
        done = self.does(self.clearing.act(self.agents[who], told.escrow, "cancel"))
        assert (done is not None) == (told.state == "funded")
        if done is not None:
            self.ends(told, "cancelled", Fraction(0))
        self.check()

    @precondition(lambda self: bool(self.escrows))
    @rule(pick=st.integers(0, 99), by_payee=st.booleans(), share=st.fractions(0, 1, max_denominator=1_000))
    def dispute(self, pick: int, by_payee: bool, share: Fraction) -> None:
        """Dispute what may be, and have the half of it resolved at once."""
        told = self.picked(pick)
        who = told.payee if by_payee else told.payer
        done = self.does(self.clearing.act(self.agents[who], told.escrow, "dispute"))
        assert (done is not None) == (told.state == "accepted")
        if done is not None:
            told.state = "disputed"
        if told.state == "disputed" and (pick % 2 or done is None):
            to_payee = _down(told.amount * share)
            decider = None if told.arbiter is None else self.agents[told.arbiter]
            assert self.does(self.clearing.resolve(decider, told.escrow, _decimal(to_payee))) is not None
            self.ends(told, "resolved", to_payee)
        self.check()

    @precondition(lambda self: bool(self.escrows))
    @rule(pick=st.integers(0, 99), is_over=st.booleans())
    def timer(self, pick: int, is_over: bool) -> None:
        told = self.picked(pick)
        is_over = is_over and told.state in ("funded", "accepted")
        if is_over:
            self.run(self.clearing.pass_deadline(told.escrow))
        done = self.does(self.clearing.fire(told.escrow))
        assert (done is not None) == is_over
        if done is not None:
            released = told.release_at_end
            self.ends(told, "released" if released else "refunded", told.amount if released else Fraction(0))
        self.check()

    @rule(payer=WHO, step=st.integers(1, AGENTS - 1), amount=AMOUNT)
    def owe(self, payer: int, step: int, amount: Decimal) -> None:
        payee = (payer + step) % AGENTS
        made = self.does(self.clearing.owe(self.agreement, self.agents[payer], self.agents[payee], amount))
        free = self.free[payer] - self.reserved(payer)
        before = self.cover(payer)
        self.owed.append((payer, payee, Fraction(amount)))
        assert (made is not None) == (self.cover(payer) - before <= free), "booked"
        if made is None:
            self.owed.pop()
        self.check()

    @precondition(lambda self: len(self.owed) > 1)
    @rule(who=WHO)
    def settle(self, who: int) -> None:
        ran = self.does(self.clearing.settle(self.agreement, self.agents[who]))
        assert (ran is not None) == bool(self.owed)
        moved = 0
        for k in range(AGENTS):
            net = self.net(k)
            fee = _up(max(net, Fraction(0)) / 100)
            self.free[k] -= net + fee
            self.fees += fee
            moved += net != 0
        if ran is not None:
            assert len(ran.run.figures["movements"]) <= max(0, moved - 1)
            self.seen["settled"] += 1
        self.owed.clear()
        self.check()

    # --- the second account

    def ends(self, told: Told, state: str, to_payee: Fraction) -> None:
        of_payer, of_payee = told.fees(to_payee)
        fee = of_payer + of_payee
        referral = Fraction(0) if told.referrer is None else _down(fee * 15 / 100)
        self.free[told.payer] -= to_payee + of_payer
        self.free[told.payee] += to_payee - of_payee
        if told.referrer is not None:
            self.free[told.referrer] += referral
        self.fees += fee - referral
        told.state = state
        self.seen[state] += 1

    def net(self, who: int) -> Fraction:
        pays = sum((amount for payer, _, amount in self.owed if payer == who), Fraction(0))
        return pays - sum((amount for _, payee, amount in self.owed if payee == who), Fraction(0))

    def cover(self, who: int) -> Fraction:
        net = max(self.net(who), Fraction(0))
        return net + _up(net / 100) + _up(net / 20)

    def reserved(self, who: int) -> Fraction:
        """Return what is set aside of an agent's own."""
        live = (t.held for t in self.escrows if t.payer == who and t.state in ("funded", "accepted", "disputed"))
        return sum(live, Fraction(0)) + self.cover(who)

    def check(self) -> None:
        self.run(self.clearing.check())
        for k, agent_id in enumerate(self.agents):
            money = self.run(self.clearing.desk.book(agent_id)).holding("USDC")
            assert money.free >= 0
            assert Fraction(money.held) == self.free[k]
            assert Fraction(money.reserved) == self.reserved(k)
        told = {t.escrow.id: t.state for t in self.escrows}
        stored = self.run(
            self.clearing.desk.rows("SELECT id, state FROM escrows WHERE payer = ANY(:ids)", ids=self.agents)
        )
        assert dict(stored) == told
        assert sum(self.free) + self.fees == 2_000 * AGENTS

    # --- how it is done

    def picked(self, pick: int) -> Told:
        """Return an escrow, mostly the latest that is live."""
        live = [told for told in self.escrows if told.state in ("funded", "accepted", "disputed")]
        return live[-1] if live and pick % 4 else self.escrows[pick % len(self.escrows)]

    def run(self, step: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(step)

    def does(self, step: Awaitable[Any]) -> Any:
        """Return what a step gives, None where it was refused."""
        try:
            return self.run(step)
        except ConflictError as error:
            self.seen[f"refused: {error.code}"] += 1
            return None


def _decimal(amount: Fraction) -> Decimal:
    return Decimal(amount.numerator) / Decimal(amount.denominator)


@pytest.fixture
def machine(postgres_server: str, database_template: str) -> Iterator[type[ClearingMachine]]:
    """Yield the machine on a database of its own; `seen` of the class counts what its runs come across."""
    loop = asyncio.new_event_loop()
    run = loop.run_until_complete
    fresh = fresh_database(postgres_server, database_template)
    database = Database(parse_database_url(run(fresh.__aenter__())), make_settings())
    try:

        class Machine(ClearingMachine):
            pass

        Machine.loop, Machine.clearing, Machine.seen = loop, Clearing(Desk(database)), Counter()
        yield Machine
    finally:
        run(database.close())
        run(fresh.__aexit__(None, None, None))
        loop.close()


def test_a_tour_of_all_that_may_happen(machine: type[ClearingMachine]) -> None:
    tour = machine()
    tour.begin()
    for third, fee_payer, release in (("referrer", "split", True), ("arbiter", "payee", False), ("", "payer", True)):
        tour.fund(0, 1, Decimal("100.000333"), third, fee_payer, release)
        tour.confirm(1, by_payee=True)
        tour.confirm(1, by_payee=True)
        tour.cancel(1, by_payee=False)
        if third == "arbiter":
            tour.dispute(2, by_payee=True, share=Fraction(1, 3))
            tour.timer(1, is_over=True)
            tour.confirm(1, by_payee=False)
            tour.dispute(1, by_payee=True, share=Fraction(1, 3))
        elif third == "referrer":
            tour.confirm(1, by_payee=False)
            tour.confirm(0, by_payee=False)
        else:
            tour.timer(1, is_over=False)
            tour.timer(1, is_over=True)
    for release in (True, False):
        tour.fund(2, 1, Decimal("0.000001"), "", "payer", release)
        tour.dispute(1, by_payee=False, share=Fraction(0))
        if release:
            tour.cancel(1, by_payee=True)
        else:
            tour.timer(1, is_over=True)
    tour.fund(0, 1, Decimal(5_000), "", "payer", release=True)
    tour.owe(0, 1, Decimal("80.000001"))
    tour.owe(1, 1, Decimal("80.000001"))
    tour.owe(2, 2, Decimal("33.3"))
    tour.owe(3, 1, Decimal(3_000))
    tour.settle(3)
    tour.settle(3)
    assert {"released", "refunded", "cancelled", "resolved", "settled"} <= set(+machine.seen), machine.seen
    refused = {name.removeprefix("refused: ") for name in machine.seen if name.startswith("refused")}
    assert refused >= {"escrow_accepted", "escrow_disputed", "escrow_closed", "not_accepted", "insufficient_funds"}


def test_drawn_contracts_agree_with_a_second_account_of_them(machine: type[ClearingMachine]) -> None:
    run_state_machine_as_test(machine, settings=DRAWN)
    assert sum(machine.seen[state] for state in ("released", "refunded", "cancelled", "resolved", "settled")) > 0
