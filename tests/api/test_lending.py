"""Lending over HTTP: as existing clients call it, and all that is new."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from tests.api.service import Agent, Service, problem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")

OFFER = {"asset": "USDC", "amount": 200, "min_borrow_rate_apy": 0.094, "recall_notice_hours": 24}


@pytest_asyncio.fixture(loop_scope="module")
async def lender(shared: Service) -> AsyncIterator[Agent]:
    """Yield an agent with 1,000 USDC; nobody else has anything on offer afterwards."""
    await shared.prices(BTC=60_000)
    agent = await shared.agent("lender")
    await agent.deposit(USDC=1_000)
    yield agent
    for loan in (await agent.get("/lending/active"))["loans"]:
        await agent.post(f"/lending/{loan['id']}/cancel")


@pytest_asyncio.fixture(loop_scope="module")
async def borrower(shared: Service, lender: Agent) -> AsyncIterator[Agent]:
    """Yield an agent with 1 BTC and 100 USDC, which returns what it has borrowed."""
    agent = await shared.agent("borrower")
    await agent.deposit(BTC=1, USDC=100)
    yield agent
    for loan in (await agent.get("/lending/active?role=borrower"))["loans"]:
        await agent.post(f"/lending/{loan['id']}/return")


def _wanted(amount: Any = 200, **more: Any) -> dict[str, Any]:
    return {"asset": "USDC", "amount": amount, "collateral": {"asset": "BTC", "amount": 0.01}, **more}


async def test_the_routes_of_existing_clients(lender: Agent, borrower: Agent) -> None:
    """No header but the key, plain numbers, the names that they know."""
    made = (await lender.ask("/lending/create", OFFER)).json()
    assert made.keys() >= {"loan_id", "rate_apy", "status"}
    assert (made["rate_apy"], made["status"]) == (0.094, "offered")
    await borrower.post("/lending/borrow", _wanted())
    [loan] = (await lender.send("GET", "/lending/active")).json()["loans"]
    known = {"id", "asset", "amount", "usdc_value", "borrow_rate_apy", "recall_notice_hours", "status"}
    assert loan.keys() >= known
    shown = {name: loan[name] for name in known}
    assert shown == {
        "id": made["loan_id"], "asset": "USDC", "amount": 200, "usdc_value": 200.0, "borrow_rate_apy": 0.65,
        "recall_notice_hours": 24.0, "status": "active",
    }  # fmt: skip
    recalled = (await lender.ask(f"/lending/{made['loan_id']}/recall", {"reason": "margin"})).json()
    due = datetime.fromisoformat(recalled["due_at"]) - datetime.fromisoformat(loan["created_at"])
    assert timedelta(hours=24) <= due < timedelta(hours=24, minutes=5)
    assert recalled["status"] == "recalled"
    [loan] = (await lender.get("/lending/active"))["loans"]
    assert loan["status"] == "recalled"


async def test_a_loan_from_offer_to_return(lender: Agent, borrower: Agent) -> None:
    offer = await lender.post("/lending/create", {**OFFER, "amount": 400})
    quote = await borrower.get("/lending/quote?asset=USDC&amount=200&collateral_asset=BTC")
    assert quote["utilization"] == Decimal("0.5")
    assert quote["interest_per_year"] == Decimal("18.8")
    assert quote["liquidation_price"] == pytest.approx(Decimal(60_000) / Decimal("1.05") * Decimal("1.03"))
    taken = await borrower.post("/lending/borrow", _wanted())
    assert (taken["rate_apy"], taken["status"], taken["amount"]) == (Decimal("0.094"), "active", 200)
    [loan] = taken["loans"]
    assert float(loan["ratio"]) == pytest.approx(540 / 200)
    assert (await borrower.get("/wallet/balance"))["borrowed"] == 200
    wallet = await lender.get("/wallet/balance")
    assert (wallet["usdc_balance"], wallet["free"], wallet["lent"], wallet["offered"]) == (1_000, 600, 200, 200)
    for who, role in ((lender, "lender"), (borrower, "borrower")):
        shown = await who.get(f"/lending/{loan['id']}")
        assert (shown["role"], shown["amount"]) == (role, 200)
        assert not {borrower.id, lender.id} & set(map(str, shown.values()))
    topped = await borrower.post(f"/lending/{loan['id']}/top-up", {"amount": "0.01"})
    assert topped["collateral"] == {"asset": "BTC", "amount": Decimal("0.02")}
    released = await borrower.post(f"/lending/{loan['id']}/release", {"amount": 0.01})
    assert released["collateral"]["amount"] == Decimal("0.01")
    part = await borrower.post(f"/lending/{loan['id']}/return", {"amount": 50})
    assert (part["amount"], part["status"]) == (150, "active")
    over = await borrower.post(f"/lending/{loan['id']}/return")
    assert (over["amount"], over["status"], over["debt"]) == (0, "returned", 0)
    problem(await borrower.ask(f"/lending/{loan['id']}/return"), 409, "loan_closed")
    assert (await lender.get(f"/lending/{offer['loan_id']}"))["status"] == "offered"
    kinds = [e["type"] for e in (await lender.get("/events"))["events"] if e["type"].startswith("loan.")]
    assert kinds == ["loan.opened", "loan.returned", "loan.returned"]


async def test_the_same_key_lends_and_borrows_once(lender: Agent, borrower: Agent) -> None:
    key = {"headers": {"Idempotency-Key": "once"}}
    first = await lender.ask("/lending/create", OFFER, **key)
    again = await lender.ask("/lending/create", OFFER, **key)
    assert (again.headers["Idempotency-Replayed"], again.json()) == ("true", first.json())
    problem(await lender.ask("/lending/create", {**OFFER, "amount": 1}, **key), 409, "idempotency_conflict")
    taken = [await borrower.ask("/lending/borrow", _wanted(100), **key) for _ in range(2)]
    assert taken[0].json() == taken[1].json()
    assert (await borrower.get("/wallet/balance"))["borrowed"] == 100


async def test_rates_show_the_curve_and_both_sides(lender: Agent, borrower: Agent) -> None:
    await lender.post("/lending/create", {**OFFER, "amount": 400, "min_borrow_rate_apy": 0})
    await borrower.post("/lending/borrow", _wanted(360))
    [row] = (await borrower.get("/lending/rates?asset=USDC"))["rates"]
    assert (row["utilization"], row["curve_rate_apy"]) == (Decimal("0.9"), Decimal("0.35"))
    assert row["borrow_rate_apy"] == row["lend_rate_apy"] == Decimal("0.35")
    points = {p["utilization"]: p["borrow_rate_apy"] for p in row["curve"]["points"]}
    expected = {"0.4": "0.03", "0.8": "0.05", "0.9": "0.35"}
    assert {u: points[Decimal(u)] for u in expected} == {u: Decimal(r) for u, r in expected.items()}
    assert points[1] == Decimal("0.65")


async def test_what_a_borrower_sees(lender: Agent, borrower: Agent) -> None:
    await lender.post("/lending/create", {**OFFER, "amount": 400})
    ids = [(await borrower.post("/lending/borrow", _wanted(10)))["loan_id"] for _ in range(3)]
    assert (await borrower.get("/lending/active"))["loans"] == []
    page = await borrower.get("/lending/active?role=borrower&limit=2")
    assert [loan["id"] for loan in page["loans"]] == ids[:0:-1]
    rest = await borrower.get(f"/lending/active?role=borrower&limit=2&cursor={page['next_cursor']}")
    assert [loan["id"] for loan in rest["loans"]] == ids[:1]
    [offer] = (await lender.get("/lending/active"))["loans"]
    assert (offer["amount"], offer["lent"], offer["offered"]) == (400, 30, 370)
    assert [loan["id"] for loan in offer["loans"]] == ids


async def test_a_ceiling_is_an_advisory_when_the_holding_has_shrunk(lender: Agent) -> None:
    refused = await lender.ask("/lending/create", {**OFFER, "amount": 401})
    problem(refused, 409, "lent_share_above_ceiling", "/amount", ["available"])
    await lender.post("/lending/create", {**OFFER, "amount": 400})
    assert (await lender.get("/lending/active"))["advisories"] == []
    await lender.post("/wallet/withdrawals", {"asset": "USDC", "amount": 500})
    [advisory] = (await lender.get("/lending/active"))["advisories"]
    assert (advisory["code"], advisory["value"], advisory["limit"]) == (
        "lent_share_high",
        Decimal("0.8"),
        Decimal("0.4"),
    )
    marked = await lender.send("PUT", "/wallet/holdings/USDC", json={"long_term": True})
    assert marked.json()["ceiling"] == 1
    assert (await lender.get("/lending/active"))["advisories"] == []
    [holding] = (await lender.get("/wallet/holdings"))["holdings"]
    assert (holding["asset"], holding["long_term"]) == ("USDC", True)


@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        ({"amount": 0}, "/amount", "not_positive"),
        ({"amount": -1}, "/amount", "not_positive"),
        ({"amount": "NaN"}, "/amount", "invalid_value"),
        ({"amount": "0.0000001"}, "/amount", "too_many_decimals"),
        ({"amount": "1e1000000"}, "/amount", "number_out_of_range"),
        ({"asset": "-"}, "/asset", "invalid_symbol"),
        ({"asset": ""}, "/asset", "invalid_value"),
        ({"min_borrow_rate_apy": -0.1}, "/min_borrow_rate_apy", "out_of_range"),
        ({"min_borrow_rate_apy": 11}, "/min_borrow_rate_apy", "out_of_range"),
        ({"min_borrow_rate_apy": "0.123456789"}, "/min_borrow_rate_apy", "too_many_decimals"),
        ({"recall_notice_hours": 169}, "/recall_notice_hours", "invalid_value"),
        ({"recall_notice_hours": -1}, "/recall_notice_hours", "invalid_value"),
        ({"rate": 1}, "/rate", "unknown_field"),
    ],
)
async def test_what_is_no_offer(lender: Agent, body: dict[str, Any], pointer: str, code: str) -> None:
    problem(await lender.ask("/lending/create", OFFER | body), 422, code, pointer)


async def test_numbers_and_names_that_no_book_holds(lender: Agent, borrower: Agent) -> None:
    await lender.post("/lending/create", OFFER)
    huge, tiny = {"content": '{"lent_share_max": 1e999999999}'}, {"content": '{"lent_share_max": 1e-999999999}'}
    problem(await lender.send("PUT", "/wallet/holdings/USDC", **huge), 422, "out_of_range")
    problem(await lender.send("PUT", "/wallet/holdings/USDC", **tiny), 422, "too_many_decimals")
    wanted = '{"asset": "USDC", "amount": 1e999999999, "collateral": {"asset": "BTC"}}'
    problem(await borrower.send("POST", "/lending/borrow", content=wanted), 422, "number_out_of_range", "/amount")
    problem(await borrower.send("GET", "/lending/rates?asset=%00"), 422, "invalid_symbol", "/asset")


async def test_what_is_no_loan(lender: Agent, borrower: Agent) -> None:
    await lender.post("/lending/create", OFFER)
    for body, status, code, *figures in (
        (_wanted(201), 409, "not_enough_offered", "available"),
        (_wanted(rate="wild"), 422, "invalid_value"),
        (_wanted(max_rate_apy=0.01), 409, "rate_above_limit"),
        (_wanted() | {"collateral": {"asset": "BTC", "amount": 0.001}}, 409, "insufficient_collateral", "needed"),
        (_wanted() | {"collateral": {"asset": "XYZ"}}, 422, "missing_price"),
        (_wanted() | {"collateral": {"asset": "BTC", "amount": 2}}, 409, "insufficient_funds", "available"),
        ({"asset": "USDC", "amount": 1}, 422, "missing_field"),
    ):
        problem(await borrower.ask("/lending/borrow", body), status, code, figures=figures)
    problem(await borrower.ask("/lending/loan_0/return"), 404, "loan_not_found")
    problem(await lender.ask("/lending/offer_0/recall", {"reason": ""}), 404, "loan_not_found")
    problem(await borrower.send("GET", "/lending/quote?asset=USDC&amount=x"), 422, "invalid_value")


async def test_the_parameters_of_loans_are_versioned(shared: Service, lender: Agent, borrower: Agent) -> None:
    await lender.post("/lending/create", {**OFFER, "amount": 400, "min_borrow_rate_apy": 0})
    taken = await borrower.post("/lending/borrow", _wanted(320))
    assert taken["rate_apy"] == Decimal("0.05")
    before = (await shared.get("/api/market/lending/USDC")).json()
    put = await shared.put("/api/market/lending/USDC", json={"slope": 0.09})
    assert put.status_code == 200
    version = put.json()["version"]
    shown = await borrower.get(f"/lending/{taken['loan_id']}")
    assert shown["borrow_rate_apy"] == Decimal("0.1")
    old = (await shared.get(f"/api/market/lending/USDC?version={version - 1}")).json()
    assert old == before
    problem(await shared.put("/api/market/lending/USDC", json={"low_ratio": 2}), 422, "out_of_order", "/low_ratio")
    problem(await shared.put("/api/market/lending/USDC", json={"slope": -1}), 422, "out_of_range", "/slope")
    problem(await shared.put("/api/market/lending/USDC", json={"slope": 1, "version": 1}), 409, "version_conflict")
    problem(await shared.put("/api/market/lending/USDC", json={"slope": 1}, key="agent"), 403, "scope_missing")
    await shared.put("/api/market/lending/USDC", json={"slope": before["slope"]})
    listed = (await shared.get("/api/market/lending")).json()["lending"]
    assert {row["asset"] for row in listed} >= {"BTC", "ETH", "SOL", "USDC", "default"}


async def test_a_plan_recalls_loans_before_it_closes_anything(lender: Agent, borrower: Agent) -> None:
    await lender.post("/lending/create", {**OFFER, "amount": 400})
    ids = [(await borrower.post("/lending/borrow", _wanted(amount)))["loan_id"] for amount in (200, 50)]
    await lender.order("BTC-PERP", "buy", 0.03)  # 540 of margin
    plan = await lender.post("/quotes/deleverage", {"book": "account", "target": 0.5})
    assert [recall["loan_id"] for recall in plan["recalls"]] == [ids[1], ids[0]]  # 92.5 are missing
    assert plan["before"]["equity"] == pytest.approx(Decimal(1_000) - Decimal("0.05") * 250)
    assert plan["after"]["equity"] == pytest.approx(Decimal(1_000))
    assert plan["orders"]
    enough = await lender.post("/quotes/deleverage", {"book": "account", "target": 0.545})
    assert [recall["loan_id"] for recall in enough["recalls"]] == [ids[1]]
    assert enough["reached"]
