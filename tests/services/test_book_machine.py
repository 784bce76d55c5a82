"""Drawn sequences of everything that moves money, on a real database, against a second account of it in fractions."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from app.db.session import Database, parse_database_url
from app.domain.quote import AccountFigures
from app.errors import ConflictError
from app.services import book, ledger
from app.services.market import put_instrument
from app.services.trading import Filled
from tests.database import make_settings
from tests.postgres import fresh_database
from tests.services.desk import PURSES, Desk
from tests.services.shadow import HAIRCUTS, MARKETS, Hold, Refused, Shadow

DRAWN = settings(
    max_examples=20,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),  # a failure prints its steps; shrinking them would take minutes
    suppress_health_check=list(HealthCheck),
)

HAPPENS = {
    "a deficit",
    "a loss is owed",
    "owed is paid first",
    "flips",
    "grows",
    "part of an isolated position closes",
    "refused: amount_above_reservation",
    "refused: insufficient_funds",
    "refused: insufficient_margin",
    "refused: leverage_above_cap",
    "refused: margin_mode_conflict",
    "refused: not_isolated",
    "refused: nothing_to_reduce",
    "refused: would_flip",
}
"""What the tour comes across, whatever is drawn."""

STATE = f"""
    SELECT json_build_array(
        (SELECT json_agg(json_build_array(owner, asset, bucket, held)) FROM (
            {PURSES.replace("FROM ledger_entries", "FROM ledger_entries WHERE agent_id = ANY($1)")}) AS purses),
        (SELECT json_agg(json_build_array(agent_id, asset, bucket, amount))
            FROM balances WHERE agent_id = ANY($1)),
        (SELECT coalesce(json_agg(json_build_array(agent_id, symbol, side, size, entry_price, leverage, margin_mode,
            allocated, realized_pnl, closed_at IS NULL)), '[]') FROM positions WHERE agent_id = ANY($1)),
        (SELECT coalesce(json_agg(json_build_array(agent_id, id, asset, amount, remaining, settled, status)), '[]')
            FROM reservations WHERE agent_id = ANY($1)),
        (SELECT coalesce(json_agg(json_build_array(agent_id, symbol, realized)), '[]') FROM (
            SELECT agent_id, symbol, sum(realized_pnl) AS realized FROM orders WHERE agent_id = ANY($1)
            GROUP BY agent_id, symbol) AS filled),
        (SELECT json_agg(json_build_array(agent_id, version)) FROM accounts WHERE agent_id = ANY($1)),
        (SELECT json_build_array(count(*)) FROM audit_log WHERE agent_id = ANY($1)),
        (SELECT json_build_array(count(*)) FROM orders WHERE agent_id = ANY($1)),
        (SELECT json_build_array(count(*)) FROM ledger_entries WHERE agent_id = ANY($1))
    )::text
"""
"""All that is stored of some agents; purses from the entries alone."""

WHO = st.integers(0, 1)
SYMBOL = st.sampled_from(sorted(MARKETS))
ASSET = st.sampled_from(["USDC", "USDC", "BTC", "ETH"])
USD = st.one_of(st.sampled_from([5, 400, 5_000, 20_000]), st.decimals(1, 9_000, places=6)).map(Decimal)
FRACTION = st.sampled_from(["0.1", "0.333333333333333333", "0.5", "1"]).map(Decimal)
LEVERAGE = st.sampled_from([None, None, Decimal("1.5"), Decimal(3), Decimal(10)])
MODE = st.sampled_from([None, "pooled", "isolated", "isolated"])

State = tuple[Any, ...]


class BookMachine(RuleBasedStateMachine):
    loop: ClassVar[asyncio.AbstractEventLoop]
    desk: ClassVar[Desk]
    seen: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.prices = {"USDC": Fraction(1), "BTC": Fraction(0), "ETH": Fraction(0)}
        self.shadows = [Shadow(self.prices, netting=True), Shadow(self.prices, netting=False)]
        self.agents: list[str] = []
        self.last: State = ()

    @initialize()
    def begin(self) -> None:
        self.agents = [self.run(self.desk.agent()), self.run(self.desk.agent(margin_mode="isolated"))]
        self.post({"BTC": Decimal(60_000), "ETH": Decimal(3_000)})
        self.deposit(0, "USDC", Decimal(20_000))
        self.deposit(1, "USDC", Decimal(10_000))
        self.deposit(1, "BTC", Decimal("0.2"))

    def teardown(self) -> None:
        for shadow in self.shadows:
            self.seen.update(shadow.seen)

    # --- what happens

    @rule(who=WHO, asset=ASSET, usd=USD)
    def put_in(self, who: int, asset: str, usd: Decimal) -> None:
        self.deposit(who, asset, self.units(asset, usd))

    @rule(who=WHO, asset=ASSET, usd=USD)
    def take_out(self, who: int, asset: str, usd: Decimal) -> None:
        amount = self.units(asset, usd)
        agent_id = self.agents[who]
        self.does(who, lambda s: s.withdraw(asset, Fraction(amount)), self.desk.withdraw(agent_id, asset, amount))

    @rule(who=WHO, asset=ASSET, usd=USD)
    def reserve(self, who: int, asset: str, usd: Decimal) -> None:
        amount = self.units(asset, usd)
        made = self.does(
            who,
            lambda s: s.reserve(asset, Fraction(amount)),
            self.desk.reserve(self.agents[who], amount, asset),
            check=False,
        )
        if made is not None:
            holds = self.shadows[who].holds
            holds[made.id] = holds.pop("new")
        self.check()

    @precondition(lambda self: self.any_open("holds"))
    @rule(
        who=WHO,
        pick=st.integers(0, 9),
        part=st.sampled_from([None, "0.3", "0.3", "0.3", "1", "1.5"]),
        paid=st.booleans(),
    )
    def end_reservation(self, who: int, pick: int, part: str | None, paid: bool) -> None:
        who = who if self.shadows[who].holds else 1 - who
        hold_id, hold = self.picked(self.shadows[who].holds, pick)
        amount = None if part is None else _decimal(hold.left * Fraction(part))
        ended = hold.left if amount is None else Fraction(amount)
        if ended:
            end = self.desk.settle if paid else self.desk.release
            self.does(who, lambda s: s.end(hold_id, ended, paid=paid), end(self.agents[who], hold_id, amount))

    @precondition(lambda self: self.any_open("holds"))
    @rule(who=WHO, pick=st.integers(0, 9), fraction=FRACTION)
    def reduce_reservation(self, who: int, pick: int, fraction: Decimal) -> None:
        who = who if self.shadows[who].holds else 1 - who
        hold_id, hold = self.picked(self.shadows[who].holds, pick)
        part = _part(hold.left, fraction)
        self.does(
            who, lambda s: s.end(hold_id, part, paid=False), self.desk.reduce(self.agents[who], hold_id, fraction)
        )

    @rule(
        who=WHO,
        symbol=SYMBOL,
        times=st.sampled_from(["0.004", "0.3", "0.3", "0.9", "2.4", "8"]),
        sign=st.sampled_from([1, -1]),
        leverage=LEVERAGE,
        mode=MODE,
        reduce_only=st.sampled_from([False, False, False, False, True]),
    )
    def trade(
        self, who: int, symbol: str, times: str, sign: int, leverage: Decimal | None, mode: Any, reduce_only: bool
    ) -> None:
        usd = max(self.shadows[who].equity, Fraction(1_000)) * Fraction(times)
        self.order(
            who, symbol, sign * self.contracts(symbol, usd), leverage=leverage, mode=mode, reduce_only=reduce_only
        )

    @precondition(lambda self: self.any_open("lots"))
    @rule(who=WHO, pick=st.integers(0, 9), times=st.sampled_from(["0.3", "1", "1.6"]), reduce_only=st.booleans())
    def trade_against(self, who: int, pick: int, times: str, reduce_only: bool) -> None:
        who = who if self.shadows[who].lots else 1 - who
        symbol, lot = self.picked(self.shadows[who].lots, pick)
        size = _decimal(-lot.size * Fraction(times))
        if size:
            self.order(who, symbol, size, reduce_only=reduce_only)

    @rule(who=WHO, times=st.sampled_from(["1.5", "2.2"]), pieces=st.integers(1, 2))
    def hedge(self, who: int, times: str, pieces: int) -> None:
        """Grow in one market and against it in another: net stays small, gross does not."""
        usd = max(self.shadows[who].equity, Fraction(1_000)) * Fraction(times)
        for _ in range(pieces):
            self.order(who, "BTC-PERP", self.contracts("BTC-PERP", usd), mode="pooled")
            self.order(who, "BTC-MINI", -self.contracts("BTC-MINI", usd), mode="pooled")

    @rule(who=WHO, symbol=SYMBOL, sign=st.sampled_from([1, -1]), isolated=st.booleans(), paid=USD)
    def gamble(self, who: int, symbol: str, sign: int, isolated: bool, paid: Decimal) -> None:
        """Open a position or add to one, see its price run against it, close it, and pay some of what is owed."""
        lot = self.shadows[who].lots.get(symbol)
        if lot is not None:
            sign, isolated = (1 if lot.size > 0 else -1), lot.isolated
        usd = self.shadows[who].equity * (Fraction(1, 3) if isolated else Fraction(2))
        if usd > 100:
            size = sign * self.contracts(symbol, usd)
            self.order(who, symbol, size, mode="isolated" if isolated else "pooled")
        if symbol in self.shadows[who].lots:
            self.price_moves(MARKETS[symbol].underlying, "0.4" if sign > 0 else "2.1")
            self.order(who, symbol, _decimal(-self.shadows[who].lots[symbol].size), reduce_only=True)
        if self.shadows[who].owed["USDC"]:
            self.deposit(who, "USDC", paid)

    @precondition(lambda self: self.any_open("lots"))
    @rule(who=WHO, pick=st.integers(0, 9), fraction=FRACTION)
    def reduce_position(self, who: int, pick: int, fraction: Decimal) -> None:
        who = who if self.shadows[who].lots else 1 - who
        symbol, lot = self.picked(self.shadows[who].lots, pick)
        part = _part(abs(lot.size), fraction)
        size = -part if lot.size > 0 else part
        self.does(
            who,
            lambda s: s.order(symbol, size, reduce_only=True),
            self.desk.reduce(self.agents[who], self.position_id(who, symbol), fraction),
        )

    @precondition(lambda self: self.any_open("lots"))
    @rule(who=WHO, pick=st.integers(0, 9), amount=st.sampled_from(["50", "2500", "-0.000001", "-80", "-900", "-99999"]))
    def move_collateral(self, who: int, pick: int, amount: str) -> None:
        who = who if self.shadows[who].lots else 1 - who
        symbol, _ = self.picked(self.shadows[who].lots, pick)
        self.does(
            who,
            lambda s: s.allocate(symbol, Fraction(amount)),
            self.desk.allocate(self.agents[who], self.position_id(who, symbol), amount),
        )

    @rule(asset=st.sampled_from(["BTC", "ETH"]), factor=st.sampled_from(["0.4", "0.7", "0.93", "1.01", "1.3", "2.1"]))
    def price_moves(self, asset: str, factor: str) -> None:
        price = _decimal(self.prices[asset] * Fraction(factor), 4)
        if 50 < price < 5_000_000:
            self.post({asset: price})
            self.check()

    # --- how it is done

    def run(self, step: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(step)

    def post(self, prices: dict[str, Decimal]) -> None:
        self.run(self.desk.prices(prices))
        self.prices.update({asset: Fraction(price) for asset, price in prices.items()})

    def deposit(self, who: int, asset: str, amount: Decimal) -> None:
        self.does(
            who,
            lambda s: s.deposit(asset, Fraction(amount)),
            self.desk.deposit(self.agents[who], asset, amount),
        )

    def order(
        self,
        who: int,
        symbol: str,
        size: Decimal,
        *,
        leverage: Decimal | None = None,
        mode: Any = None,
        reduce_only: bool = False,
    ) -> None:
        shadow, own = self.shadows[who], None if leverage is None else Fraction(leverage)
        isolated = None if mode is None else mode == "isolated"

        def send(to: Shadow, signed: Decimal) -> None:
            to.order(symbol, Fraction(signed), leverage=own, isolated=isolated, reduce_only=reduce_only)

        side = "buy" if size > 0 else "sell"
        filled = self.does(
            who,
            lambda s: send(s, size),
            self.desk.order(
                self.agents[who],
                side,  # type: ignore[arg-type]
                abs(size),
                symbol,
                leverage=leverage,
                mode=mode,
                reduce_only=reduce_only,
            ),
            refused=lambda figures: self.largest(shadow, send, size, figures),
        )
        if isinstance(filled, Filled):
            assert Fraction(filled.order.fill_price or 0) == shadow.price(symbol)

    def largest(self, shadow: Shadow, send: Callable[[Shadow, Decimal], None], size: Decimal, figures: Any) -> None:
        """Check the size that a refusal says would pass: it does, and one percent more does not."""
        if "size_max" not in figures:
            return
        self.seen["size_max"] += 1
        best = Decimal(figures["size_max"]).copy_sign(size)
        assert abs(best) < abs(size)
        if best:
            trial = shadow.copy()
            trial.lenient = True
            send(trial, best)
        more = best * Decimal("1.01") + Decimal("1e-7").copy_sign(size)
        if abs(more) < abs(size):
            with pytest.raises(Refused):
                send(shadow.copy(), more)

    def does(
        self,
        who: int,
        expected: Callable[[Shadow], None],
        done: Awaitable[Any],
        *,
        check: bool = True,
        refused: Callable[[Any], None] | None = None,
    ) -> Any:
        """Do it twice, in the database and in fractions: with the same result, or refused by both, without a trace."""
        trial, code = self.shadows[who].copy(), ""
        try:
            expected(trial)
        except Refused as refusal:
            code = str(refusal)
        result, error = self.tried(done)
        if error is not None:
            assert code, f"refused: {error.code}, {error.detail}"
            assert re.fullmatch(code.removeprefix("?"), error.code)
            self.seen[f"refused: {error.code}"] += 1
            assert self.state() == self.last
            if refused is not None:
                refused(error.figures)
            return None
        assert not code or code.startswith("?"), f"{code} is expected"
        if code:  # a close call that the database let pass
            trial = self.shadows[who].copy()
            trial.lenient = True
            expected(trial)
            trial.lenient = False
        self.shadows[who] = trial
        if check:
            self.check()
        return result

    def tried(self, done: Awaitable[Any]) -> tuple[Any, ConflictError | None]:
        try:
            return self.run(done), None
        except ConflictError as error:
            return None, error

    # --- what holds

    def state(self) -> State:
        found = self.run(self.desk.database.fetch_value(STATE, self.agents))
        decoded = json.loads(found, parse_float=Fraction, parse_int=Fraction)
        return tuple(sorted(rows, key=repr) for rows in decoded)

    async def standings(self) -> tuple[dict[str, Decimal], list[AccountFigures]]:
        """Return what is out of balance, and each agent's figures."""
        async with self.desk.scene() as (tx, scene):
            return await ledger.imbalances(tx), [scene.figures(await book.load(tx, a)) for a in self.agents]

    def check(self) -> None:
        self.last = self.state()
        purses, balances, positions, reservations, orders = self.last[:5]
        off, figures = self.run(self.standings())
        assert off == {}
        self._check_house(purses, balances)
        for agent_id, shadow, found in zip(self.agents, self.shadows, figures, strict=True):
            own = [row[1:] for row in balances if row[0] == agent_id]
            opened = [row[1:] for row in positions if row[0] == agent_id and row[-1]]
            self._check_wallet(shadow, own, opened, [row[1:] for row in reservations if row[0] == agent_id])
            self._check_positions(shadow, opened)
            self._check_profit(shadow, [row[1:] for row in orders if row[0] == agent_id])
            self._check_equity(shadow, found, [row[1:] for row in purses if row[0] == agent_id], opened)

    def _check_house(self, purses: list[Any], balances: list[Any]) -> None:
        """Check the house's purses, and that what agents hold, less what they owe, is all that the house gave."""
        expected: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
        for shadow in self.shadows:
            for key, amount in shadow.house.items():
                expected[key] += amount
        house = {(asset, bucket): amount for owner, asset, bucket, amount in purses if owner == "house"}
        assert {k: v for k, v in house.items() if v} == {k: v for k, v in expected.items() if v}
        sums: dict[str, Fraction] = defaultdict(Fraction)
        for _, asset, bucket, amount in balances:
            assert amount >= 0
            sums[asset] += -amount if bucket == "owed" else amount
        for (asset, _), amount in house.items():
            sums[asset] += amount
        assert set(sums.values()) <= {0}, sums

    def _check_wallet(self, shadow: Shadow, own: list[Any], opened: list[Any], held: list[Any]) -> None:
        stored = {(bucket, asset): amount for asset, bucket, amount in own if amount}
        assert stored == {key: amount for key, amount in shadow.purses() if amount}
        for asset in HAIRCUTS:
            remaining = sum(row[3] for row in held if row[1] == asset and row[5] == "open")
            assert stored.get(("reserved", asset), 0) == remaining
        assert stored.get(("allocated", "USDC"), 0) == sum(row[6] for row in opened)
        left = {row[0]: Hold(row[1], row[3], row[4]) for row in held if row[5] == "open"}
        assert left == shadow.holds

    def _check_positions(self, shadow: Shadow, opened: list[Any]) -> None:
        stored = {
            row[0]: (
                row[2] if row[1] == "long" else -row[2],
                *(row[i] for i in (3, 6, 7, 4)),
                row[5] == "isolated",
            )
            for row in opened
        }
        assert stored == {
            symbol: (lot.size, lot.entry, lot.own, lot.realized, lot.leverage, lot.isolated)
            for symbol, lot in shadow.lots.items()
        }

    def _check_profit(self, shadow: Shadow, orders: list[Any]) -> None:
        """Check realised profit against the cash that fills cost and brought, and what is open at its entry."""
        for symbol, realized in orders:
            assert realized == shadow.realized[symbol]
            lot = shadow.lots.get(symbol)
            at_entry = lot.exposure(lot.entry) if lot is not None else Fraction(0)
            lost = shadow.cash[symbol] + at_entry - realized
            assert 0 <= lost <= Fraction(shadow.closes + 1, 10**6)

    def _check_equity(self, shadow: Shadow, figures: AccountFigures, purses: list[Any], opened: list[Any]) -> None:
        equity = Fraction(0)
        for asset, bucket, amount in purses:
            equity += amount * self.prices[asset] * (1 if bucket == "owed" else 1 - HAIRCUTS[asset])
        for symbol, side, size, entry, *_ in opened:
            move = self.prices[MARKETS[symbol].underlying] - entry
            equity += (1 if side == "long" else -1) * size * MARKETS[symbol].contract * move
        scale = float(shadow.gross) + 1.0
        assert figures.equity == pytest.approx(float(equity), rel=1e-9, abs=1e-12 * scale)
        assert figures.health.equity == pytest.approx(float(shadow.pool_equity), rel=1e-9, abs=1e-12 * scale)
        assert figures.health.required_initial == pytest.approx(float(shadow.required), rel=1e-9, abs=1e-12 * scale)
        assert figures.gross_notional == pytest.approx(float(shadow.gross), rel=1e-9)

    # --- short names

    def contracts(self, symbol: str, usd: Fraction) -> Decimal:
        return _decimal(usd / (self.prices[MARKETS[symbol].underlying] * MARKETS[symbol].contract), 7)

    def units(self, asset: str, usd: Decimal) -> Decimal:
        return usd if asset == "USDC" else _decimal(Fraction(usd) / self.prices[asset])

    def any_open(self, what: str) -> bool:
        return any(getattr(shadow, what) for shadow in self.shadows)

    @staticmethod
    def picked(choices: dict[str, Any], pick: int) -> tuple[str, Any]:
        return list(choices.items())[pick % len(choices)]

    def position_id(self, who: int, symbol: str) -> str:
        position = self.run(self.desk.book(self.agents[who])).position(symbol)
        assert position is not None
        return str(position.id)


def _decimal(value: Fraction, places: int = 18) -> Decimal:
    """Round towards zero."""
    scaled = abs(value) * 10**places
    whole = Decimal(scaled.numerator // scaled.denominator).scaleb(-places)
    return -whole if value < 0 else whole


def _part(whole: Fraction, fraction: Decimal) -> Fraction:
    """Return a fraction of the whole, rounded up to 18 decimals."""
    return min(whole, Fraction(-(-whole * Fraction(fraction) * 10**18 // 1), 10**18))


@pytest.fixture
def machine(postgres_server: str, database_template: str) -> Iterator[type[BookMachine]]:
    """Yield the machine on a database of its own; `seen` of the class counts what its runs come across."""
    loop = asyncio.new_event_loop()  # not a Runner: it would set up Ctrl-C anew for every step
    run = loop.run_until_complete
    fresh = fresh_database(postgres_server, database_template)
    database = Database(parse_database_url(run(fresh.__aenter__())), make_settings())
    try:
        desk = run(_open(database))

        class Machine(BookMachine):
            pass

        Machine.loop, Machine.desk, Machine.seen = loop, desk, Counter()
        yield Machine
    finally:
        run(database.close())
        run(fresh.__aexit__(None, None, None))
        loop.close()


async def _open(database: Database) -> Desk:
    async with database.transaction("market") as tx:
        await put_instrument(tx, "BTC-MINI", {"underlying": "BTC", "contract_size": 0.01, "initial_margin_rate": 0.4})
    desk = Desk(database)
    await desk.market.refresh()
    return desk


def test_a_tour_of_all_that_may_happen(machine: type[BookMachine]) -> None:
    tour = machine()
    tour.begin()
    tour.order(0, "ETH-PERP", Decimal(2), leverage=Decimal("1.5"))
    tour.order(0, "ETH-PERP", Decimal("0.7"))
    tour.order(0, "ETH-PERP", Decimal("0.1"), mode="isolated")
    tour.move_collateral(0, 0, "50")
    tour.price_moves("ETH", "1.3")
    tour.order(0, "ETH-PERP", Decimal("-1.333333333333333333"))
    tour.order(0, "ETH-PERP", Decimal(-2), reduce_only=True)
    tour.order(0, "ETH-PERP", Decimal(1), reduce_only=True)
    tour.trade_against(0, 0, "1.6", reduce_only=False)
    tour.order(0, "ETH-PERP", Decimal(50))
    tour.take_out(0, "USDC", Decimal(19_990))
    tour.take_out(0, "USDC", Decimal(99_990))
    tour.reserve(0, "USDC", Decimal(400))
    for part, paid in (("1.5", True), ("0.3", True), ("0.3", False), ("1.5", False), ("0.3", True), (None, False)):
        tour.end_reservation(0, 0, part, paid=paid)
    tour.order(1, "BTC-PERP", Decimal("0.1"), leverage=Decimal(10))
    tour.price_moves("BTC", "0.93")
    tour.order(1, "BTC-PERP", Decimal("0.0777777"))
    tour.reduce_position(1, 0, Decimal("0.333333333333333333"))
    for amount in ("2500", "-900", "-99999", "-0.000001"):
        tour.move_collateral(1, 0, amount)
    tour.gamble(1, "BTC-PERP", 1, isolated=True, paid=Decimal(5))
    tour.put_in(0, "USDC", Decimal(20_000))
    tour.gamble(0, "BTC-PERP", -1, isolated=False, paid=Decimal(400))
    tour.hedge(1, "1.5", 3)
    tour.put_in(0, "USDC", Decimal(90_000))
    tour.hedge(0, "2.2", 2)
    tour.teardown()
    assert set(+machine.seen) >= HAPPENS, HAPPENS - set(+machine.seen)
    assert machine.seen["size_max"] > 2


def test_drawn_bookings_agree_with_a_second_account_of_them(machine: type[BookMachine]) -> None:
    run_state_machine_as_test(machine, settings=DRAWN)
    assert len(+machine.seen) > 8
