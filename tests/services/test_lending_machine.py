"""Drawn sequences of lending on a real database with a clock of our own, against a second account of interest."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from app.db.session import Database, parse_database_url
from app.errors import PrimeriskError
from app.services.loans import Loan, all_accrued
from tests.database import make_settings
from tests.postgres import fresh_database
from tests.services.desk import ACTOR, Desk
from tests.services.lenders import PRICES, Lenders, check

DRAWN = settings(
    max_examples=10,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
WHO = st.integers(0, 2)
AMOUNT = st.one_of(st.sampled_from([100, 1_000, 9_000]), st.decimals(1, 9_000, places=6)).map(Decimal)
PART = st.sampled_from([None, "0.5", "0.9999"])
HOURS = st.sampled_from([0.0, 0.001, 1.0, 25.0, 24.0 * 40])
YEAR = 365 * 24 * 3_600
BALANCES = "SELECT min(amount) FROM balances"
OPEN = "SELECT lender_id, id FROM loan_offers WHERE remaining > 0"
ENDS = """
    SELECT l.id, l.status, l.interest_paid, l.amount,
           (SELECT coalesce(sum(e.amount), 0) FROM ledger_entries e WHERE e.reference = l.id AND e.asset = l.asset
                AND e.from_owner = l.borrower_id AND e.to_owner = l.lender_id AND e.from_bucket = 'free'),
           (SELECT coalesce(array_agg(DISTINCT v.type), '{}') FROM events v WHERE v.data->>'loan_id' = l.id
                AND (v.type = 'loan.returned' OR v.type = 'loan.liquidated') AND v.data->>'is_whole' = 'true')
    FROM loans l WHERE closed_at IS NOT NULL
"""


def _curve(used: Fraction) -> Fraction:
    """Return the curve's rate a second way: b .01, s1 .04, s2 .60, U* .80."""
    low = Fraction("0.01") + Fraction("0.04") * used / Fraction("0.8")
    if used > Fraction("0.8"):
        low = Fraction("0.05") + Fraction("0.6") * (used - Fraction("0.8")) / Fraction("0.2")
    return Fraction(math.ceil(low * 10**8), 10**8)


class LendingMachine(RuleBasedStateMachine):
    loop: ClassVar[asyncio.AbstractEventLoop]
    lenders: ClassVar[Lenders]
    seen: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.agents: list[str] = []
        self.owed: defaultdict[str, Fraction] = defaultdict(Fraction)
        """By loan all the interest that it has ever borne, in fractions."""
        self.btc = Decimal(60_000)

    @initialize()
    def begin(self) -> None:
        self.agents = [self.run(self.lenders.desk.agent("20000")) for _ in range(3)]
        for agent_id in self.agents:
            self.run(self.lenders.desk.deposit(agent_id, "BTC", 1))
        self.price(Decimal(60_000))
        self.offer(0, Decimal(3_000), "0", 24)
        self.offer(1, Decimal(2_000), None, 0)
        self.borrow(1, Decimal(2_000), "floating", 0)
        self.borrow(2, Decimal(2_500), "fixed", 1)

    def run(self, step: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(step)

    def does(self, step: Awaitable[Any]) -> Any:
        """Take a step that may be refused, and check all that must hold after it."""
        try:
            found = self.run(step)
        except PrimeriskError as error:
            self.seen[error.code] += 1
            found = None
        self.check()
        return found

    def price(self, btc: Decimal) -> None:
        self.btc = btc
        self.run(self.lenders.desk.prices({"BTC": btc}))

    # --- what happens

    @rule(who=WHO, amount=AMOUNT, rate=st.sampled_from([None, "0", "0.2"]), hours=st.sampled_from([0, 24]))
    def offer(self, who: int, amount: Decimal, rate: str | None, hours: int) -> None:
        self.does(self.lenders.offer(self.agents[who], amount, rate=rate, hours=hours))

    @rule(who=WHO, amount=AMOUNT, kind=st.sampled_from(["floating", "floating", "fixed"]), more=st.integers(0, 2))
    def borrow(self, who: int, amount: Decimal, kind: Any, more: int) -> None:
        pledge = None if more == 0 else (amount * more / 40_000).quantize(Decimal("0.000001"))
        taken = self.does(self.lenders.borrow(self.agents[who], amount, pledge, kind=kind))
        self.seen["borrowed"] += len(taken or ())

    @rule(hours=HOURS)
    def pass_time(self, hours: float) -> None:
        self.lenders.pass_time(hours=hours)
        seconds = Fraction(round(hours * 3_600 * 10**6), 10**6)
        live = self.live()
        if live:
            at = self.run(self.lenders.market())
            rate = _curve(Fraction(at.borrowed) / Fraction(at.supplied))
            for loan in live:
                own = Fraction(loan.rate) if loan.rate_kind == "fixed" else max(rate, Fraction(loan.rate))
                self.owed[loan.id] += Fraction(loan.principal) * own * seconds / YEAR
        self.check()

    @rule(factor=st.sampled_from(["0.5", "0.9", "0.97", "1.02", "1.3"]))
    def price_moves(self, factor: str) -> None:
        self.price(min(max(self.btc * Decimal(factor), Decimal(8_000)), Decimal(120_000)).quantize(Decimal("0.01")))
        self.decide_on_all()

    @rule()
    def decide_on_all(self) -> None:
        for loan in self.live():
            done = self.does(self.lenders.decide(loan.id))
            self.seen.update(done.told)
            if done.deficit:
                self.seen["deficit"] += 1

    @precondition(lambda self: self.live())
    @rule(data=st.data(), part=PART)
    def give_back(self, data: st.DataObject, part: str | None) -> None:
        loan = data.draw(st.sampled_from(self.live()))
        self.does(self.lenders.give_back(loan, self.part(loan.principal, part)))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), part=PART)
    def recall(self, data: st.DataObject, part: str | None) -> None:
        loan = data.draw(st.sampled_from(self.live()))
        wanted = loan.id if part is None else loan.offer_id
        self.does(self.lenders.recall(loan.lender_id, wanted, self.part(loan.principal, part)))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), more=st.booleans())
    def pledge(self, data: st.DataObject, more: bool) -> None:
        loan = data.draw(st.sampled_from(self.live()))
        self.does(self.lenders.top_up(loan, "0.01") if more else self.lenders.release(loan))

    @rule(who=WHO, asset=st.sampled_from(["USDC", "BTC"]), share=st.sampled_from(["0.2", "1"]))
    def withdraw(self, who: int, asset: str, share: str) -> None:
        free = self.run(self.lenders.money(self.agents[who], asset)).get("free", Decimal(0))
        amount = (free * Decimal(share)).quantize(Decimal("0.000001"))
        if amount > 0:
            self.does(self.lenders.desk.withdraw(self.agents[who], asset, amount))

    # --- what must hold

    def live(self) -> list[Loan]:
        rows = self.run(self.lenders.desk.rows("SELECT id FROM loans WHERE closed_at IS NULL ORDER BY seq"))
        return [self.run(self.lenders.loan(row[0])) for row in rows]

    @staticmethod
    def part(principal: Decimal, share: str | None) -> Decimal | None:
        if share is None:
            return None
        return max(Decimal("0.000001"), (principal * Decimal(share)).quantize(Decimal("0.000001")))

    async def _accrued(self) -> list[Loan]:
        found = [
            await self.lenders.loan(row[0])
            for row in await self.lenders.desk.rows("SELECT id FROM loans WHERE closed_at IS NULL")
        ]
        async with self.lenders.desk.database.transaction(ACTOR) as tx:
            return await all_accrued(tx, found, (await self.lenders.scenes.at(tx)).now)

    def check(self) -> None:
        self.run(check(self.lenders.desk))
        [(least,)] = self.run(self.lenders.desk.rows(BALANCES))
        assert least >= 0
        for loan in self.run(self._accrued()):
            expected = Fraction(math.ceil(self.owed[loan.id] * 10**6), 10**6)
            assert Fraction(loan.interest(6) + loan.interest_paid) == expected
        for loan_id, status, interest, amount, received, ends in self.run(self.lenders.desk.rows(ENDS)):
            assert ends == [f"loan.{status}"]  # never both
            assert received == amount + interest  # the lender is whole, whatever became of the collateral
            assert Fraction(interest) == Fraction(math.ceil(self.owed[loan_id] * 10**6), 10**6)


@pytest.fixture
def machine(postgres_server: str, database_template: str) -> Iterator[type[LendingMachine]]:
    """Yield the machine's class on a database of its own; every example begins with a fresh one."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()

        class Machine(LendingMachine):
            def __init__(self) -> None:
                super().__init__()
                self.context = fresh_database(postgres_server, database_template)
                url = loop.run_until_complete(self.context.__aenter__())
                database = Database(parse_database_url(url), make_settings())
                type(self).lenders = Lenders(Desk(database))
                self.price(Decimal(60_000))
                loop.run_until_complete(self.lenders.desk.prices(PRICES))
                loop.run_until_complete(self.lenders.stop_clock())

            def teardown(self) -> None:
                loop.run_until_complete(self.lenders.desk.database.close())
                loop.run_until_complete(self.context.__aexit__(None, None, None))

        Machine.loop, Machine.seen = loop, Counter()
        yield Machine


def test_drawn_lending_keeps_its_books_and_its_lenders_whole(machine: type[LendingMachine]) -> None:
    run_state_machine_as_test(machine, settings=DRAWN)
    print(machine.seen)  # noqa: T201  shown where it fails
    assert {"loan.liquidated", "not_enough_offered", "lent_share_above_ceiling"} <= set(+machine.seen)
    assert machine.seen["borrowed"] > 20


# --- random paths of prices


def test_over_random_paths_of_prices_no_lender_ends_below_principal_and_interest(
    machine: type[LendingMachine],
) -> None:
    """Several loans at once ride a path to its end; every step that a price brings about is taken."""
    ride = machine()
    ride.begin()
    for loan in ride.live():
        ride.does(ride.lenders.give_back(loan))
    rng = random.Random(7)
    for path in range(6):
        ride.price(Decimal(60_000))
        for who in (1, 2):
            ride.run(ride.lenders.desk.deposit(ride.agents[who], "BTC", 1))
        ride.does(ride.lenders.offer(ride.agents[0], 3_000, rate="0"))
        for who in (1, 2):
            ride.borrow(who, Decimal(1_000), "floating" if path % 2 else "fixed", 0)
        for _ in range(12):
            ride.pass_time(float(rng.choice([1, 13, 36])))
            ride.price((ride.btc * Decimal(str(round(rng.gauss(0.995, 0.03), 4)))).quantize(Decimal("0.01")))
            ride.decide_on_all()
        for loan in ride.live():
            ride.run(ride.lenders.desk.deposit(loan.borrower_id, "USDC", 5_000))
            ride.does(ride.lenders.give_back(loan))
        for lender, offer in ride.run(ride.lenders.desk.rows(OPEN)):
            ride.run(ride.lenders.cancel(lender, offer))
    statuses = dict(ride.run(ride.lenders.desk.rows("SELECT status, count(*) FROM loans GROUP BY status")))
    assert statuses["liquidated"] >= 3
    assert ride.run(ride.lenders.money(ride.agents[0])).keys() == {"free"}
    assert ride.run(ride.lenders.money(ride.agents[0]))["free"] > 20_000
    ride.teardown()
