"""The wallet over HTTP: exact balances, the ledger, reservations, and what may leave."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from app.services import ledger
from tests.api.service import Agent, Service, problem, running

if TYPE_CHECKING:
    import httpx
    from sqlalchemy import URL

DEPOSITS, WITHDRAWALS = "/wallet/deposits", "/wallet/withdrawals"
RESERVATIONS = "/reservations"


@pytest.fixture
async def agent(service: Service) -> Agent:
    """Return an agent with nothing, on a market that has prices."""
    await service.prices(BTC=61_000, BTC_PERP=60_000, ETH=3_000)
    return await service.agent()


async def _raw(agent: Agent, path: str) -> str:
    answer = await agent.send("GET", path)
    assert answer.status_code == 200, answer.text
    return answer.text


async def _reserve(agent: Agent, **body: Any) -> dict[str, Any]:
    return await agent.post(RESERVATIONS, {"service": "casino", "amount": 10} | body)


async def _balanced(service: Service) -> None:
    async with service.app.state.parts.database.transaction("test") as tx:
        assert await ledger.imbalances(tx) == {}


# --- balances

NO_LOANS = {"offered": 0, "lent": 0, "pledged": 0, "borrowed": 0}


async def test_an_empty_wallet(agent: Agent) -> None:
    assert await agent.get("/wallet/balance") == {
        "usdc_balance": 0, "free": 0, "reserved": 0, "allocated": 0, "owed": 0, **NO_LOANS,
        "collateral_value": 0, "equity": 0, "balances": [],
    }  # fmt: skip
    assert await agent.get("/wallet/ledger") == {"entries": [], "next_cursor": None}
    assert await agent.get("/portfolio/positions") == {"positions": []}


async def test_a_deposit_says_what_it_booked(agent: Agent) -> None:
    answer = await agent.ask(DEPOSITS, {"asset": "BTC", "amount": 0.5, "reference": "tx 7"})
    assert answer.status_code == 201
    booked = answer.json()
    balance = {"asset": "BTC", "amount": 0.5, "free": 0.5, "reserved": 0, "owed": 0}
    told = {"kind": "deposit", "asset": "BTC", "amount": 0.5, "reference": "tx 7", "balance": balance}
    assert booked == told | {"id": booked["id"], "posted_at": booked["posted_at"]}
    assert booked["id"]
    wallet = await agent.get("/wallet/balance")
    assert wallet["collateral_value"] == wallet["equity"] == Decimal(61_000) * Decimal("0.5") * Decimal("0.9")
    assert wallet["usdc_balance"] == 0
    half = Decimal("0.5")
    assert wallet["balances"] == [
        {"asset": "BTC", "amount": half, "free": half, "reserved": 0, "allocated": 0, "owed": 0, **NO_LOANS}
    ]


async def test_a_tenth_and_two_tenths_are_three_tenths(agent: Agent) -> None:
    await agent.deposit(USDC=0.1)
    await agent.deposit(USDC="0.2")
    raw = await _raw(agent, "/wallet/balance")
    assert '"usdc_balance":0.3,' in raw
    assert json.loads(raw)["usdc_balance"] == 0.3


@pytest.mark.parametrize(
    ("given", "then", "total"),
    [
        ("1.000000000000000001", "1", "2.000000000000000001"),
        ("123456789012345.123456789012345678", "0.000000000000000001", "123456789012345.123456789012345679"),
        ("99999999999999.999999999999999999", "0.000000000000000001", "100000000000000"),
        ("1E+3", "1e-3", "1000.001"),
        ("0.10", "0.20", "0.3"),
        ("1." + "0" * 20_000, "0.1" + "0" * 20, "1.1"),
    ],
)
async def test_every_digit_comes_back(service: Service, agent: Agent, given: str, then: str, total: str) -> None:
    await agent.deposit(USDC=given)
    booked = await agent.post(DEPOSITS, {"asset": "USDC", "amount": then})
    assert booked["balance"]["free"] == booked["balance"]["amount"] == Decimal(total)
    wallet = await agent.get("/wallet/balance")
    assert wallet["usdc_balance"] == wallet["free"] == wallet["balances"][0]["amount"] == Decimal(total)
    latest, first = (await agent.get("/wallet/ledger"))["entries"]
    assert Decimal(str(latest["amount"])) == Decimal(then)
    assert Decimal(str(first["amount"])) == Decimal(given)
    await _balanced(service)
    await agent.post(WITHDRAWALS, {"asset": "USDC", "amount": total})
    assert (await agent.get("/wallet/balance"))["balances"] == []
    await _balanced(service)


async def test_numbers_are_numbers(agent: Agent) -> None:
    await agent.deposit(USDC="20.5")
    reservation = await _reserve(agent, amount="10.25")
    await agent.order("BTC-PERP", "buy", "0.0001", leverage="3")
    texts = {"asset", "symbol", "service", "side", "margin_mode", "zone", "alert_level", "status"}

    def check(value: Any, name: str = "") -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                check(item, key)
        elif isinstance(value, list):
            for item in value:
                check(item, name)
        elif isinstance(value, str) and name not in texts:
            assert not value.replace(".", "").replace("-", "").isdigit(), (name, value)

    for path in ("/wallet/balance", "/portfolio/positions", "/account", f"{RESERVATIONS}/{reservation['id']}"):
        check(json.loads(await _raw(agent, path)))


async def test_usdc_balance_counts_what_is_reserved(agent: Agent) -> None:
    await agent.deposit(USDC=100)
    await _reserve(agent, amount=40)
    wallet = await agent.get("/wallet/balance")
    assert (wallet["usdc_balance"], wallet["free"], wallet["reserved"]) == (100, 60, 40)
    assert wallet["equity"] == 100


async def test_only_an_admin_deposits_where_the_settings_say_so(database_url: URL, agent: Agent) -> None:
    body = {"asset": "USDC", "amount": 5}
    async with running(database_url, agents_may_deposit=False) as strict:
        theirs = replace(agent, service=strict)
        problem(await theirs.ask(DEPOSITS, body), 403, "scope_missing")
        assert (await theirs.get("/wallet/balance"))["usdc_balance"] == 0
        answer = await theirs.ask(f"{DEPOSITS}?agent_id={agent.id}", body, key="admin")
        assert answer.status_code == 201
        assert (await theirs.get("/wallet/balance"))["usdc_balance"] == 5


# --- withdrawals


async def test_a_withdrawal_takes_what_is_free(agent: Agent) -> None:
    await agent.deposit(USDC=100)
    await _reserve(agent, amount=40)
    refused = await agent.ask(WITHDRAWALS, {"asset": "USDC", "amount": "60.000000000000000001"})
    document = problem(refused, 409, "insufficient_funds", "/amount", figures={"available"})
    assert document["available"] == 60
    booked = await agent.post(WITHDRAWALS, {"asset": "USDC", "amount": 60})
    assert booked["kind"] == "withdrawal"
    assert booked["balance"] == {"asset": "USDC", "amount": 40, "free": 0, "reserved": 40, "owed": 0}
    problem(
        await agent.ask(WITHDRAWALS, {"asset": "NOPE", "amount": 1}), 409, "insufficient_funds", figures={"available"}
    )


async def test_a_withdrawal_never_passes_the_gate(agent: Agent) -> None:
    """1 BTC-PERP at 60,000 needs 20,000 at leverage 3: at a gate of .80 the equity stays at 25,000 or more."""
    await agent.deposit(USDC=30_000)
    await agent.order("BTC-PERP", "buy", 1, leverage=3)
    refused = await agent.ask(WITHDRAWALS, {"asset": "USDC", "amount": "5000.01"})
    document = problem(refused, 409, "insufficient_margin", "/amount", figures={"shortfall"})
    assert document["shortfall"] == pytest.approx(0.01)
    assert (await agent.get("/wallet/balance"))["usdc_balance"] == 30_000
    await agent.post(WITHDRAWALS, {"asset": "USDC", "amount": 5_000})
    assert (await agent.get("/account"))["health"]["utilization"] == Decimal("0.8")
    problem(
        await agent.ask(RESERVATIONS, {"service": "casino", "amount": 1}), 409, "insufficient_margin", "/amount",
        figures={"shortfall"},
    )  # fmt: skip


# --- the ledger


async def test_the_ledger_tells_every_move(service: Service, agent: Agent) -> None:
    await agent.deposit(USDC=100)
    held = await _reserve(agent, amount=40, reference="bet 1")
    await agent.post(f"{RESERVATIONS}/{held['id']}/settle", {"amount": 15})
    await agent.post(f"{RESERVATIONS}/{held['id']}/release", {"reference": "over"})
    await agent.post(WITHDRAWALS, {"asset": "USDC", "amount": 5})
    entries = (await agent.get("/wallet/ledger"))["entries"]
    told = [(e["kind"], e["service"], e["amount"], e["change"], e["reference"]) for e in entries]
    assert told == [
        ("withdrawal", "wallet", 5, -5, None),
        ("release", "casino", 25, 0, "over"),
        ("settle", "casino", 15, -15, held["id"]),
        ("reserve", "casino", 40, 0, "bet 1"),
        ("deposit", "wallet", 100, 100, None),
    ]
    assert sum(e["change"] for e in entries) == (await agent.get("/wallet/balance"))["usdc_balance"] == 80
    assert {e["agent_id"] for e in entries} == {agent.id}
    await _balanced(service)


async def test_pages_of_the_ledger(agent: Agent) -> None:
    for amount in range(1, 8):
        await agent.deposit(USDC=amount)
    seen: list[int] = []
    pages, cursor = 0, None
    while pages == 0 or cursor is not None:
        asked = "/wallet/ledger?limit=3" + (f"&cursor={cursor}" if pages else "")
        page = await agent.get(asked)
        assert len(page["entries"]) <= 3
        seen += [e["amount"] for e in page["entries"]]
        pages, cursor = pages + 1, page["next_cursor"]
        await agent.deposit(ETH=1)  # what is booked meanwhile moves no page
    assert seen == [7, 6, 5, 4, 3, 2, 1]
    assert pages == 3


# --- reservations


async def test_the_life_of_a_reservation(service: Service, agent: Agent) -> None:
    await agent.deposit(USDC=100)
    made = await _reserve(agent, amount="40.5", reference="bet 1", reducible=True)
    path = f"{RESERVATIONS}/{made['id']}"
    assert made == {
        "id": made["id"], "service": "casino", "asset": "USDC", "amount": Decimal("40.5"),
        "remaining": Decimal("40.5"), "settled": 0, "reference": "bet 1", "reducible": True, "status": "open",
        "created_at": made["created_at"], "closed_at": None, "bound_to": None,
    }  # fmt: skip
    assert await agent.get(path) == made
    assert (await agent.get("/portfolio/positions"))["positions"] == [
        {
            "id": made["id"], "service": "casino", "symbol": "USDC", "side": None, "notional_usd": Decimal("40.5"),
            "margin_reserved": Decimal("40.5"), "leverage": 1, "reducible": True,
        }
    ]  # fmt: skip
    settled = await agent.post(f"{path}/settle", {"amount": "10.25"})
    assert (settled["remaining"], settled["settled"], settled["status"]) == (Decimal("30.25"), Decimal("10.25"), "open")
    released = await agent.post(f"{path}/release", {"amount": "0.25"})
    assert (released["remaining"], released["settled"], released["status"]) == (30, Decimal("10.25"), "open")
    above = await agent.ask(f"{path}/settle", {"amount": "30.000000000000000001"})
    problem(above, 409, "amount_above_reservation", "/amount")
    done = await agent.post(f"{path}/settle")
    assert (done["remaining"], done["settled"], done["status"]) == (0, Decimal("40.25"), "settled")
    assert done["closed_at"] is not None
    assert await agent.get(path) == done
    for part in ("settle", "release"):
        problem(await agent.ask(f"{path}/{part}"), 409, "reservation_closed", "/status")
    wallet = await agent.get("/wallet/balance")
    assert (wallet["usdc_balance"], wallet["free"], wallet["reserved"]) == (Decimal("59.75"), Decimal("59.75"), 0)
    await _balanced(service)


async def test_lists_of_reservations(agent: Agent) -> None:
    await agent.deposit(USDC=100)
    made = [(await _reserve(agent, reference=str(i)))["id"] for i in range(5)]
    await agent.post(f"{RESERVATIONS}/{made[0]}/release")
    await agent.post(f"{RESERVATIONS}/{made[1]}/settle")

    async def ids(query: str) -> tuple[list[str], int | None]:
        page = await agent.get(f"{RESERVATIONS}?{query}")
        return [r["id"] for r in page["reservations"]], page["next_cursor"]

    assert (await ids("status=released"))[0] == [made[0]]
    assert (await ids("status=settled"))[0] == [made[1]]
    first, cursor = await ids("status=open&limit=2")
    assert first == [made[4], made[3]]
    assert await ids(f"status=open&limit=2&cursor={cursor}") == ([made[2]], None)
    assert (await ids(""))[0] == made[::-1]


async def test_reserved_in_another_asset_counts_after_its_haircut(agent: Agent) -> None:
    await agent.deposit(USDC=10_000, ETH=2)
    made = await _reserve(agent, asset="ETH", amount="0.5")
    [row] = (await agent.get("/portfolio/positions"))["positions"]
    assert (row["symbol"], row["notional_usd"], row["margin_reserved"]) == ("ETH", 1_500, 1_320)
    [shown] = (await agent.get("/account"))["reservations"]
    assert (shown["id"], shown["usd_value"]) == (made["id"], 1_320)
    assert (await agent.get("/account"))["health"]["required_initial"] == 1_320


async def test_a_book_has_room_for_so_much(database_url: URL, agent: Agent) -> None:
    await agent.deposit(USDC=100)
    async with running(database_url, account_items_max=3) as small:
        theirs = replace(agent, service=small)
        held = [await _reserve(theirs) for _ in range(2)]
        problem(await theirs.ask(RESERVATIONS, {"service": "casino", "amount": 10}), 409, "account_full")
        problem(await theirs.ask(DEPOSITS, {"asset": "ETH", "amount": 1}), 409, "account_full")
        await theirs.deposit(USDC=1)
        await theirs.post(f"{RESERVATIONS}/{held[0]['id']}/release")
        await theirs.deposit(ETH=1)


async def test_no_more_is_reserved_than_there_is(service: Service, agent: Agent) -> None:
    """An account with nothing open may reserve all; 20 at once of 10 each get no more than the 100."""
    await agent.deposit(USDC=100)
    body = {"service": "casino", "amount": 10}
    answers: list[httpx.Response] = await asyncio.gather(*(agent.ask(RESERVATIONS, body) for _ in range(20)))
    assert sorted(a.status_code for a in answers) == [201] * 10 + [409] * 10
    for refused in (a for a in answers if a.status_code == 409):
        problem(refused, 409, "insufficient_funds", "/amount", figures={"available"})
    wallet = await agent.get("/wallet/balance")
    assert (wallet["usdc_balance"], wallet["free"], wallet["reserved"]) == (100, 0, 100)
    await _balanced(service)


async def test_a_released_part_is_never_released_twice(service: Service, agent: Agent) -> None:
    await agent.deposit(USDC=100)
    held = await _reserve(agent, amount=100)
    path = f"{RESERVATIONS}/{held['id']}"
    parts = ["settle" if i % 2 else "release" for i in range(16)]
    answers = await asyncio.gather(*(agent.ask(f"{path}/{part}", {"amount": 10}) for part in parts))
    done = [part for part, answer in zip(parts, answers, strict=True) if answer.status_code == 200]
    assert len(done) == 10
    found = await agent.get(path)
    assert found["settled"] == 10 * done.count("settle")
    wallet = await agent.get("/wallet/balance")
    assert (wallet["reserved"], wallet["free"]) == (0, 10 * done.count("release"))
    await _balanced(service)
