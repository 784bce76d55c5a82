"""Figures of the whole service: taken once for all processes, right after one of them was killed, and true."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import URL, text

from app.db import operator_views
from app.db.session import Database
from app.domain.tally import BANDS, Endangered, Tally
from app.services import heartbeat
from app.services.figures import accounts, backtest, books, calls, clearing, every, fleets, lending, webhooks
from app.services.figures.accounts import Endangered as Shown
from app.services.figures.keep import Figure, Keeper, Values, gauge
from app.services.fleet_terms import Terms
from app.services.fleets import invite
from app.settings import Settings
from tests.services.calls import BREACH, PRICES, Calls
from tests.services.clearing import Clearing
from tests.services.desk import Desk
from tests.services.hooks import Hooks, hooks_on
from tests.services.lenders import Lenders
from tests.services.squadron import Squadron

Samples = Mapping[tuple[str, str], float]


def _keeper(database: Database, *kinds: Figure) -> tuple[Keeper, CollectorRegistry]:
    registry = CollectorRegistry()
    return Keeper(database, kinds, 1.0, registry), registry


def _samples(registry: CollectorRegistry) -> Samples:
    """Return the values by the sample's name and its label's value, empty where it has none."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


async def _shown(database: Database, *kinds: Figure) -> Samples:
    keeper, registry = _keeper(database, *kinds)
    await _run(database, "UPDATE service_figures SET taken_at = 'epoch'")
    await keeper.round()
    return _samples(registry)


async def _run(database: Database, statement: str, **values: Any) -> None:
    async with database.transaction("test") as tx:
        await tx.connection.execute(text(statement), values)


# --- who takes them


class Counted:
    """A kind that says how often it was taken."""

    def __init__(self, pause: float = 0.0) -> None:
        self.taken = 0
        self._pause = pause
        self.figure = Figure("counted", 3_600.0, self._take, lambda values, _: [gauge("g", "g", values["n"])])

    async def _take(self, _tx: object, before: Values) -> Values:
        self.taken += 1
        await asyncio.sleep(self._pause)
        return {"n": before.get("n", 0) + 1}


@pytest.fixture
async def hooks(database: Database) -> AsyncIterator[Hooks]:
    async with hooks_on(database) as made:
        yield made


@pytest.fixture
async def databases(database_url: URL, settings: Settings) -> AsyncIterator[list[Database]]:
    """Yield pools as of several processes."""
    opened = [Database(database_url, settings) for _ in range(4)]
    yield opened
    for database in opened:
        await database.close()


async def test_of_many_processes_one_takes_them_and_all_show_them(databases: list[Database]) -> None:
    kind = Counted(pause=0.2)
    made = [_keeper(database, kind.figure) for database in databases]
    await asyncio.gather(*(keeper.round() for keeper, _ in made))
    assert kind.taken == 1
    for keeper, registry in made:
        await keeper.round()
        assert _samples(registry)["g", ""] == 1
    assert kind.taken == 1


async def test_one_that_is_killed_while_it_takes_them_leaves_them_to_the_next(databases: list[Database]) -> None:
    slow, quick = Counted(pause=30.0), Counted()
    dying = asyncio.create_task(_keeper(databases[0], slow.figure)[0].round())
    while not slow.taken:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    keeper, registry = _keeper(databases[1], quick.figure)
    await keeper.round()
    assert (quick.taken, _samples(registry).get(("g", ""))) == (0, None), "it is being taken elsewhere"
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    await keeper.round()
    assert (quick.taken, _samples(registry)["g", ""]) == (1, 1)


async def test_what_takes_long_is_left_alone_for_longer(databases: list[Database]) -> None:
    kind = Counted()
    keeper, _ = _keeper(databases[0], kind.figure)
    await keeper.round()
    await _run(databases[0], "UPDATE service_figures SET taken_at = now() - interval '2 h', seconds = 1000")
    await keeper.round()
    assert kind.taken == 1
    await _run(databases[0], "UPDATE service_figures SET taken_at = now() - interval '3 h'")
    await keeper.round()
    assert kind.taken == 2


async def test_a_kind_at_fault_keeps_no_other_from_being_taken(databases: list[Database]) -> None:
    async def fail(_tx: object, _: Values) -> Values:
        raise ZeroDivisionError

    kind = Counted()
    keeper, registry = _keeper(databases[0], Figure("faulty", 0.0, fail, lambda *_: ()), kind.figure)
    await keeper.round()
    await keeper.round()
    shown = _samples(registry)
    assert (shown["g", ""], shown["primerisk_figure_failures_total", ""]) == (1, 1), "not tried again at once"
    assert shown["primerisk_figures_age_seconds", "counted"] < 60


async def test_a_kind_that_another_release_took_otherwise_hides_no_other(databases: list[Database]) -> None:
    kind, renamed = Counted(), Counted()
    odd = replace(renamed.figure, name="odd", show=lambda values, _: [gauge("odd", "odd", values["gone"])])
    keeper, registry = _keeper(databases[0], odd, kind.figure)
    await keeper.round()
    shown = _samples(registry)
    assert shown["g", ""] == 1
    assert ("primerisk_figures_age_seconds", "odd") not in shown, "it is missing, and that is an alert"
    assert _samples(registry)["primerisk_figure_failures_total", ""] >= 1


# --- what they say


async def test_before_anything_has_happened(database: Database) -> None:
    shown = await _shown(database, *every.kinds(1.0, 1.0))
    assert shown["primerisk_margin_calls", "open"] == 0
    assert shown["primerisk_workers", ""] == 0
    assert shown["primerisk_worker_seen_seconds", ""] == math.inf
    assert shown["primerisk_shards", "free"] == 64
    assert shown["primerisk_var_exceptions", "0.99"] == 0
    assert shown["primerisk_webhooks_pending", "margin_call"] == 0


async def test_margin_calls_from_breach_to_loss(database: Database) -> None:
    desk = Calls(Desk(database))
    await desk.desk.prices(PRICES)
    agents = [await desk.trader(grace_period_seconds=grace) for grace in (45, 500)]
    await desk.desk.prices({"BTC": BREACH})
    for agent in agents:
        made = await desk.decide(agent)
        assert made.priced_at is not None
        assert (await desk.decide(agent)).priced_at is None, "the call is not new any more"
    shown = await _shown(database, calls.FIGURE)
    assert shown["primerisk_margin_calls", "open"] == 2
    buckets = [shown["primerisk_margin_call_grace_remaining_seconds_bucket", le] for le in ("30.0", "60.0", "+Inf")]
    assert buckets == [0, 1, 2]
    assert shown["primerisk_margin_call_grace_remaining_seconds_sum", ""] == pytest.approx(545, abs=5)
    assert shown["primerisk_margin_call_overdue_seconds", ""] == 0
    await _run(
        database, "UPDATE margin_calls SET opened_at = now() - interval '1 h', deadline_at = now() - interval '9 s'"
    )
    shown = await _shown(database, calls.FIGURE)
    assert shown["primerisk_margin_call_overdue_seconds", ""] == pytest.approx(9, abs=5)
    assert shown["primerisk_margin_call_deficit_usd_total", ""] == 0
    await _run(
        database,
        "UPDATE margin_calls SET state = 'expired', deficit = 12.5, uncovered = 1 WHERE agent_id = :a",
        a=agents[0],
    )
    shown = await _shown(database, calls.FIGURE)
    assert shown["primerisk_margin_call_deficit_usd_total", ""] == 13.5
    assert shown["primerisk_margin_calls_with_deficit_total", ""] == 1
    assert (shown["primerisk_margin_calls", "open"], shown["primerisk_margin_calls", "expired"]) == (1, 1)


def _tally(zone: str, band: str, *worst: Endangered, prices: Mapping[str, int] | None = None) -> Tally:
    zones = dict.fromkeys(("GREEN", "YELLOW", "ORANGE", "RED"), 0) | {zone: 3}
    return Tally(3, zones, {"OK": 3}, dict.fromkeys(BANDS, 0) | {band: 3}, 1, worst, prices or {})


async def _beat(database: Database, worker: str, tally: Tally) -> None:
    async with database.transaction(worker) as tx:
        await heartbeat.beat(tx, worker, tally)


async def test_accounts_are_the_live_workers_sum(database: Database) -> None:
    await Desk(database).prices({"BTC": "60000", "ETH": "3000", "UNUSED": "1"})
    await _run(database, "UPDATE market_prices SET as_of = now() - interval '30 s' WHERE symbol = 'ETH'")
    near, gone = Endangered("agent_near", 0.93, 0.99, 50.0), Endangered("agent_gone", None, None, -7.0)
    await _beat(database, "a", _tally("RED", "0.85-1.00", near, prices={"BTC": 2, "ETH": 1}))
    await _beat(database, "b", _tally("GREEN", "1.00+", gone, prices={"BTC": 5}))
    await _beat(database, "dead", _tally("RED", "1.00+"))
    await _run(database, "UPDATE workers SET seen_at = now() - interval '4 s' WHERE id = 'dead'")
    shown = await _shown(database, accounts.FIGURE)
    assert [shown["primerisk_accounts", zone] for zone in ("GREEN", "YELLOW", "RED")] == [3, 0, 3]
    assert shown["primerisk_accounts_by_margin_ratio", "1.00+"] == 3
    assert shown["primerisk_accounts_unpriced", ""] == 2
    assert shown["primerisk_margin_ratio_worst", ""] == math.inf
    assert shown["primerisk_workers", ""] == 2
    assert shown["primerisk_worker_seen_seconds", ""] < 3
    assert shown["primerisk_price_age_seconds", "ETH"] == pytest.approx(30, abs=5)
    assert ("primerisk_price_age_seconds", "UNUSED") not in shown
    await _run(database, "UPDATE workers SET seen_at = now() - interval '1 min'")
    shown = await _shown(database, accounts.FIGURE)
    assert (shown["primerisk_workers", ""], shown["primerisk_accounts", "RED"]) == (0, 3), "the last that was known"
    assert shown["primerisk_worker_seen_seconds", ""] > 50


async def test_the_endangered_are_named_worst_first_and_capped(database: Database) -> None:
    worst = [Endangered(f"agent_{k}", k / 100, 0.5, 1.0) for k in range(90, 0, -1)]
    await _beat(database, "a", _tally("RED", "1.00+", *worst))
    keeper, _ = _keeper(database, accounts.FIGURE)
    await keeper.round()
    ratio, *_ = Shown(keeper.values("accounts"), 3).collect()
    assert [(s.labels["agent_id"], s.value) for s in ratio.samples] == [
        ("agent_90", 0.90),
        ("agent_89", 0.89),
        ("agent_88", 0.88),
    ]


async def test_webhooks_wait_in_their_lanes(hooks: Hooks) -> None:
    await hooks.endpoint("http://192.0.2.1/")
    await hooks.emit()
    await hooks.execute("UPDATE webhook_deliveries SET created_at = now() - interval '90 s'")
    shown = await _shown(hooks.database, webhooks.FIGURE)
    lanes = {lane: shown["primerisk_webhooks_pending", lane] for lane in ("margin_call", "other", "test")}
    assert sum(lanes.values()) == 1
    [lane] = [lane for lane, count in lanes.items() if count]
    assert shown["primerisk_webhook_oldest_undelivered_seconds", lane] == pytest.approx(90, abs=5)


async def test_the_ledger_is_swept_and_an_imbalance_shown(database: Database) -> None:
    desk = Desk(database)
    agents = sorted([await desk.agent("100") for _ in range(5)])
    ledger = books.figure(0.001, accounts_a_time=2)

    async def sweep() -> Samples:
        for _ in range(3):
            shown = await _shown(database, ledger)
        return shown

    assert (await sweep())["primerisk_ledger_imbalance", "USDC"] == 0
    await _run(database, "UPDATE balances SET amount = amount + 0.25 WHERE agent_id = :a", a=agents[4])
    shown = await sweep()
    assert shown["primerisk_ledger_imbalance", "USDC"] == 0.25
    assert shown["primerisk_ledger_checked_seconds", ""] < 60
    await _run(database, "UPDATE balances SET amount = amount - 0.25 WHERE agent_id = :a", a=agents[4])
    await sweep()
    assert (await sweep())["primerisk_ledger_imbalance", "USDC"] == 0


async def test_var_is_held_to_what_happened(database: Database) -> None:
    agent = await Desk(database).agent()
    rows = [(9, 1_000.0), (8, 1_050.0), (7, 940.0), (6, 935.0), (4, 100.0), (3, 10.0)]  # a day lacks in between
    for age, value in rows:
        await _run(
            database,
            """
            INSERT INTO account_snapshots VALUES
                (:a, (now() AT TIME ZONE 'UTC')::date - cast(:age AS int), now(), :v, :v, 0, 0, 60, 100, 0)
            """,
            a=agent, age=age, v=value,
        )  # fmt: skip
    for _ in range(3):  # a few days at a time
        shown = await _shown(database, backtest.FIGURE)
    # held to the day before: +50, −110, −5, −90
    assert shown["primerisk_var_forecasts", ""] == 4
    assert (shown["primerisk_var_exceptions", "0.95"], shown["primerisk_var_exceptions", "0.99"]) == (2, 1)
    assert shown["primerisk_var_exceptions_expected", "0.95"] == pytest.approx(0.2)


async def test_loans_from_the_offer_to_the_loss(database: Database) -> None:
    desk, lenders = Desk(database), Lenders(Desk(database))
    await desk.prices({"BTC": "60000", "USDC": "1.01"})
    lender, borrower = await desk.agent("100000"), await desk.agent()
    await desk.deposit(borrower, "BTC", "0.5")
    await lenders.offer(lender, 8_000, hours=1)
    shown = await _shown(database, lending.FIGURE)
    assert (shown["primerisk_loans_utilization", "USDC"], shown["primerisk_loans", "active"]) == (0, 0)
    [loan] = await lenders.borrow(borrower, 6_000, "0.15")
    await lenders.borrow(borrower, 2_000, "0.06")
    shown = await _shown(database, lending.FIGURE)
    assert shown["primerisk_loans_utilization", "USDC"] == 1
    assert shown["primerisk_loans_borrowed_usd", "USDC"] == 8_080
    assert shown["primerisk_loans_rate", "USDC"] == float((await lenders.market()).rate) > 0
    await lenders.recall(lender, loan.id)
    shown = await _shown(database, lending.FIGURE)
    assert (shown["primerisk_loans", "active"], shown["primerisk_loans", "recalled"]) == (1, 1)
    assert shown["primerisk_loan_recall_overdue_seconds", ""] == 0
    await _run(
        database,
        """UPDATE loans SET recalled_at = now() - interval '2 h', due_at = now() - interval '90 s',
                             next_action_at = now() - interval '40 s' WHERE status = 'recalled'""",
    )
    shown = await _shown(database, lending.FIGURE)
    assert shown["primerisk_loan_recall_overdue_seconds", ""] == pytest.approx(90, abs=5)
    assert shown["primerisk_loan_action_late_seconds", ""] == pytest.approx(40, abs=5)
    assert shown["primerisk_loan_deficit_total", "USDC"] == shown["primerisk_loans_with_deficit_total", ""] == 0
    await _run(database, "UPDATE loans SET deficit = 12.5 WHERE id = :id", id=loan.id)
    shown = await _shown(database, lending.FIGURE)
    assert shown["primerisk_loan_deficit_total", "USDC"] == 12.5
    assert shown["primerisk_loans_with_deficit_total", ""] == 1


async def test_of_many_assets_that_are_lent_those_with_the_most_loans_are_named(database: Database) -> None:
    agents = [await Desk(database).agent() for _ in range(2)]
    await _run(
        database,
        """INSERT INTO lending_markets SELECT 'A' || n, 1000, n, 0.01, now() FROM generate_series(1, 130) n""",
    )
    await _run(
        database,
        """
        WITH offers AS (
            INSERT INTO loan_offers (id, lender_id, asset, amount, remaining, minimum_rate, notice_seconds, created_at)
            SELECT 'o' || n, :lender, 'A' || n, 1000, 0, 0, 0, now() FROM generate_series(1, 130) n RETURNING *)
        INSERT INTO loans (id, offer_id, lender_id, borrower_id, asset, amount, principal, rate_kind, rate,
                           notice_seconds, collateral_asset, collateral, accrued, accrued_to, interest_paid,
                           interest_booked, next_interest_at, recalled, status, deficit, opened_at, next_action_at)
        SELECT id || '.' || k, id, lender_id, :borrower, asset, 10, 1, 'floating', 0, 0, 'BTC', 1, 0, now(), 0, 0,
               now(), 0, 'active', substr(asset, 2)::int, now(), now()
        FROM offers, generate_series(1, CASE WHEN asset = 'A130' THEN 3 ELSE 1 END) k
        """,
        lender=agents[0],
        borrower=agents[1],
    )
    shown = await _shown(database, lending.FIGURE)
    used = {asset: value for (name, asset), value in shown.items() if name == "primerisk_loans_utilization"}
    assert len(used) == lending.MARKETS_MAX
    assert used["A130"] == 0.13
    assert not [key for key in shown if key[0] == "primerisk_loans_borrowed_usd"], "without a price nothing is said"
    lost = {asset: value for (name, asset), value in shown.items() if name == "primerisk_loan_deficit_total"}
    assert len(lost) == 100
    assert (lost["A130"], lost["A129"], min(lost.values())) == (390, 129, 31)
    assert shown["primerisk_loans", "active"] == shown["primerisk_loans_with_deficit_total", ""] == 132


async def test_escrows_and_agreements_and_what_goes_wrong_with_them(database: Database) -> None:
    desk = Desk(database)
    contracts = Clearing(desk)
    await desk.prices({"BTC": "60000", "NEW": "2"})
    payer, payee = await desk.agent("5000"), await desk.agent("5000")
    for asset in ("BTC", "NEW"):
        await desk.deposit(payer, asset, 10)
    await contracts.fund(payer, payee, 100)
    await contracts.fund(payer, payee, 3, "NEW", fee_payer="payee")  # not listed: a coin, as the default is
    disputed = await contracts.fund(payer, payee, "0.5", "BTC", fee_payer="payee")
    await contracts.confirm(payee, disputed)
    await contracts.act(payer, disputed, "dispute")
    made = await contracts.agree(payer, payee)
    await contracts.owe(made, payer, payee, 5)
    shown = await _shown(database, clearing.FIGURE)
    assert [shown["primerisk_escrows_open", state] for state in ("funded", "accepted", "disputed")] == [2, 0, 1]
    assert shown["primerisk_escrow_outstanding_usd", "coin"] == 30_006
    assert shown["primerisk_escrow_outstanding_usd", "stable"] == 100, "at par, without a price"
    assert [shown["primerisk_netting_agreements", s] for s in ("proposed", "active", "defaulted")] == [0, 1, 0]
    assert shown["primerisk_netting_obligations_open", ""] == 1
    calm = ("primerisk_clearing_action_late_seconds", "primerisk_netting_default_seconds")
    assert [shown[name, ""] for name in calm] == [0, 0]
    await _run(database, "UPDATE escrows SET disputed_at = now() - interval '2 d' WHERE state = 'disputed'")
    await _run(
        database,
        """UPDATE netting_agreements SET state = 'defaulted', defaulted_at = now() - interval '1 h',
                                         next_action_at = now() - interval '50 s'""",
    )
    shown = await _shown(database, clearing.FIGURE)
    assert shown["primerisk_escrow_dispute_seconds", ""] == pytest.approx(172_800, abs=5)
    assert shown["primerisk_netting_default_seconds", ""] == pytest.approx(3_600, abs=5)
    assert shown["primerisk_clearing_action_late_seconds", ""] == pytest.approx(50, abs=5)
    assert shown["primerisk_netting_agreements", "defaulted"] == 1


async def test_fleets_as_one_and_what_is_left_of_them(database: Database) -> None:
    """Two fleets: of 10,000 with 3,000 drawn, 1,500 kept dry; and of 1,000, all of it within reach."""
    squadron = Squadron(Desk(database))
    first, second = await squadron.fleet(10_000), await squadron.fleet(1_000, "0.5", over_delegation=True)
    member = await squadron.member(first, 8_000)
    for fleet, most in ((first, 100), (second, 2_000)):
        await squadron.member(fleet, most)
    async with database.transaction("test") as tx:
        await invite(tx, second, await squadron.desk.agent(), Terms(Decimal(5_000)), joins=False)
    await squadron.reserve(member, 3_000)
    await squadron.change(first, member, reduce_only=True, max_margin=Decimal(1_000))
    await squadron.powder(second, release=True)
    await _run(database, "UPDATE fleets SET zone = 'RED', drifted_at = now() WHERE drawn > 0")
    await _run(database, "UPDATE fleets SET released_at = now() - interval '1 h' WHERE released_at IS NOT NULL")
    shown = await _shown(database, fleets.FIGURE)
    assert [shown["primerisk_fleets", zone] for zone in ("GREEN", "YELLOW", "ORANGE", "RED")] == [1, 0, 0, 1]
    assert [shown["primerisk_fleet_members", s] for s in ("active", "reduce_only", "invited")] == [2, 1, 1]
    kinds = ("balance", "delegated", "drawn", "available", "dry_powder")
    assert [shown["primerisk_fleet_usdc", kind] for kind in kinds] == [11_000, 3_100, 3_000, 6_500, 2_000]
    assert shown["primerisk_fleet_release_seconds", ""] == pytest.approx(3_600, abs=5)
    assert [shown[name, ""] for name in ("primerisk_fleets_released", "primerisk_fleets_drifting")] == [1, 1]
    rows = await squadron.desk.rows("SELECT master_id, balance, members, reduce_only, invited FROM operator_fleets")
    assert {row[0]: row[1:] for row in rows} == {
        first.master_id: (10_000, 2, 1, 0),
        second.master_id: (1_000, 1, 0, 1),
    }


async def test_the_views_name_the_parties_of_what_is_open(database: Database) -> None:
    desk = Desk(database)
    lenders, contracts = Lenders(desk), Clearing(desk)
    await desk.prices({"BTC": "60000"})
    lender, borrower = await desk.agent("100000"), await desk.agent("1000")
    await desk.deposit(borrower, "BTC", "0.5")
    await lenders.offer(lender, 8_000)
    [loan] = await lenders.borrow(borrower, 6_000, "0.15")
    held = await contracts.fund(lender, borrower, 100)
    made = await contracts.agree(lender, borrower)
    [lent] = await desk.rows("SELECT loan_id, lender_id, borrower_id, principal FROM operator_loans")
    assert lent == (loan.id, lender, borrower, 6_000)
    [escrow] = await desk.rows("SELECT escrow_id, payer_id, payee_id, arbiter, amount FROM operator_escrows")
    assert escrow == (held.id, lender, borrower, None, 100)
    [agreement] = await desk.rows("SELECT agreement_id, proposer_id, state, open_obligations FROM operator_agreements")
    assert agreement == (made.id, lender, "active", 0)


async def test_the_views_show_who_is_in_danger(database: Database) -> None:
    desk = Calls(Desk(database))
    await desk.desk.prices(PRICES)
    agent = await desk.trader()
    await desk.desk.prices({"BTC": BREACH})
    await desk.decide(agent)
    await _beat(database, "a", _tally("RED", "0.85-1.00", Endangered(agent, 0.9, 0.95, 3_000.0)))
    async with database.transaction("test") as tx:
        [row] = (await tx.connection.execute(text("SELECT * FROM operator_accounts"))).mappings().all()
        [call] = (await tx.connection.execute(text("SELECT * FROM operator_calls"))).mappings().all()
        assert (row["agent_id"], row["margin_ratio"], row["margin_call"], row["zone"]) == (agent, 0.9, "open", "RED")
        assert (call["state"], call["utilization"] > 0.85, call["deadline_at"] - tx.now < timedelta(hours=1)) == (
            "open",
            True,
            True,
        )


async def test_a_reader_of_the_views_reads_nothing_else(database: Database, database_url: URL) -> None:
    role = f"reader_{database_url.database}"
    await _run(database, f"CREATE ROLE {role} LOGIN PASSWORD 'a password'")
    async with database.transaction("test") as tx:
        await operator_views.grant(tx, role)
    try:
        given = database_url.set(drivername="postgresql", username=role, password="a password")
        reader = await asyncpg.connect(given.render_as_string(hide_password=False))
        try:
            for view in operator_views.VIEWS:
                assert await reader.fetch(f"SELECT * FROM {view}") == []
            for statement in (
                "SELECT * FROM api_keys",
                "SELECT * FROM webhook_endpoints",
                "SELECT * FROM margin_calls",
                "SELECT * FROM loans",
                "SELECT * FROM escrows",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await reader.execute(statement)
        finally:
            await reader.close()
    finally:
        await _run(database, f"DROP OWNED BY {role}")
        await _run(database, f"DROP ROLE {role}")
