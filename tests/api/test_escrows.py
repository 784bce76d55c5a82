"""Escrows over HTTP, with a worker beside the app: funded, confirmed, timed out, disputed, and told."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from app.services.ledger import imbalances
from tests.api.service import Agent, Service, problem, until

if TYPE_CHECKING:
    pass


async def funded(service: Service, count: int, usdc: Any = 20_000) -> list[Agent]:
    agents = [await service.agent(f"agent {k}") for k in range(count)]
    for agent in agents:
        await agent.deposit(USDC=usdc)
    return agents


async def told(agent: Agent, family: str) -> list[str]:
    return [e["type"] for e in (await agent.get("/events"))["events"] if e["type"].startswith(family)]


def counted(service: Service, name: str, **labels: str) -> float:
    return service.app.state.parts.metrics.registry.get_sample_value(f"primerisk_{name}", labels) or 0.0


def escrow(payee: Agent, amount: Any = 100, **more: Any) -> dict[str, Any]:
    return {"payee": payee.id, "amount": amount, "timeout_seconds": 3_600, "on_timeout": "refund"} | more


async def test_a_life_of_an_escrow(service: Service) -> None:
    payer, payee, referrer = await funded(service, 3)
    made = await payer.post("/escrows", escrow(payee, 10_000, referrer=referrer.id, reference="invoice 7"))
    assert (made["state"], made["reserved"], made["fee_quoted"], made["reference"]) == (
        "funded",
        10_100,
        100,
        "invoice 7",
    )
    assert (await payer.get("/account"))["health"]["required_initial"] == 10_100
    path = f"/escrows/{made['id']}"
    assert (await payee.post(f"{path}/confirm"))["state"] == "accepted"
    done = await payer.post(f"{path}/confirm", {"note": "all there"})
    assert (done["state"], done["reason"], done["to_payee"]) == ("released", "confirmed", 10_000)
    assert (done["fee"], done["referral"]) == (100, 15)
    assert await payer.get(path) == await payee.get(path) == done
    # T+0: the next request spends it
    await payee.post("/wallet/withdrawals", {"asset": "USDC", "amount": 30_000})
    assert (await referrer.get("/wallet/balance"))["free"] == 20_015
    names = ["escrow.funded", "escrow.accepted", "escrow.released"]
    assert await told(payer, "escrow") == await told(payee, "escrow") == names
    assert [counted(service, "escrow_events_total", event=n.partition(".")[2]) for n in names] == [1, 1, 1]
    entries = (await payee.get("/wallet/ledger"))["entries"]
    assert [(e["kind"], e["service"], e["change"]) for e in entries[1:2]] == [("escrow", "escrow", 10_000)]


async def test_once_by_its_key(service: Service) -> None:
    payer, payee = await funded(service, 2)
    key = {"Idempotency-Key": "pay Bob"}
    first = await payer.send("POST", "/escrows", json=escrow(payee), headers=key)
    again = await payer.send("POST", "/escrows", json=escrow(payee), headers=key)
    assert (first.status_code, again.status_code, again.text) == (201, 201, first.text)
    assert again.headers["idempotency-replayed"] == "true"
    problem(await payer.send("POST", "/escrows", json=escrow(payee, 7), headers=key), 409, "idempotency_conflict")
    confirms = [payee.send("POST", f"/escrows/{first.json()['id']}/confirm", json={}, headers=key) for _ in range(4)]
    assert {answer.text for answer in await asyncio.gather(*confirms)} == {(await confirms_text(payee, first.json()))}
    assert len((await payer.get("/escrows"))["escrows"]) == 1
    assert counted(service, "escrow_events_total", event="accepted") == 1


async def confirms_text(payee: Agent, made: dict[str, Any]) -> str:
    return (await payee.send("GET", f"/escrows/{made['id']}")).text


async def test_the_worker_times_escrows_out(worked: Service) -> None:
    payer, payee = await funded(worked, 2)
    released = await payer.post("/escrows", escrow(payee, 500, timeout_seconds=1, on_timeout="release"))
    refunded = await payer.post("/escrows", escrow(payee, 300, timeout_seconds=1))
    waits = await payer.post("/escrows", escrow(payee, 200))

    async def over() -> Any:
        found = [await payer.get(f"/escrows/{e['id']}") for e in (released, refunded)]
        return found if all(e["ended_at"] for e in found) else None

    first, second = await until(over)
    assert (first["state"], second["state"]) == ("released", "refunded")
    assert first["reason"] == second["reason"] == "timeout"
    assert (await payer.get("/wallet/balance"))["free"] == 20_000 - 505 - 202
    assert (await payee.get("/wallet/balance"))["free"] == 20_500
    assert (await payer.get(f"/escrows/{waits['id']}"))["state"] == "funded"

    async def measured() -> Any:
        return counted(worked, "escrows_open", state="funded") == 1

    assert await until(measured)
    assert counted(worked, "escrow_outstanding_usd", kind="stable") == 200
    assert counted(worked, "escrow_outstanding_usd", kind="coin") == 0
    async with worked.app.state.parts.database.transaction("test") as tx:
        assert await imbalances(tx) == {}


async def test_an_arbiter_or_an_admin_decides(service: Service) -> None:
    payer, payee, arbiter = await funded(service, 3)
    for who in ("arbiter", "admin"):
        made = await payer.post("/escrows", escrow(payee, 1_000, arbiter=arbiter.id))
        path = f"/escrows/{made['id']}"
        problem(await arbiter.ask(f"{path}/resolve", {"payee_share": 1}), 409, "not_disputed", "/state")
        await payee.post(f"{path}/confirm")
        disputed = await payer.post(f"{path}/dispute", {"note": "a half is missing"})
        assert (disputed["state"], disputed["dispute_reason"]) == ("disputed", "a half is missing")
        problem(await payer.ask(f"{path}/confirm"), 409, "escrow_disputed", "/state")
        problem(await payer.ask(f"{path}/resolve", {"payee_share": 0}), 403, "not_your_part")
        key = arbiter.key if who == "arbiter" else "admin"
        for body in ({}, {"payee_share": 1, "to_payee": 1}):
            problem(await arbiter.ask(f"{path}/resolve", body, key=key), 422, "missing_field", "/to_payee")
        problem(await arbiter.ask(f"{path}/resolve", {"to_payee": -1}, key=key), 422, "number_out_of_range")
        problem(await arbiter.ask(f"{path}/resolve", {"payee_share": "1.01"}, key=key), 422, "out_of_range")
        done = await arbiter.post(f"{path}/resolve", {"payee_share": "0.25"}, key=key)
        assert (done["state"], done["to_payee"], done["fee"]) == ("resolved", 250, Decimal("2.5"))
    assert (await payer.get("/wallet/balance"))["free"] == 20_000 - 505
    assert (await payee.get("/wallet/balance"))["free"] == 20_500
    assert {e["id"] for e in (await arbiter.get("/escrows?role=arbiter"))["escrows"]} == {
        e["id"] for e in (await payer.get("/escrows?role=payer&state=resolved"))["escrows"]
    }


async def test_delivery_versus_payment(service: Service) -> None:
    await service.prices(BTC=60_000)
    buyer, seller = await funded(service, 2, 100_000)
    await seller.deposit(BTC=1)
    terms = escrow(seller, 60_000, counter_leg={"asset": "BTC", "amount": "0.999"}, fee_payer="split")
    made = await buyer.post("/escrows", terms)
    assert made["counter_leg"] == {"asset": "BTC", "amount": Decimal("0.999")}
    await buyer.post(f"/escrows/{made['id']}/confirm")
    assert (await seller.post(f"/escrows/{made['id']}/confirm"))["state"] == "released"
    held = {b["asset"]: b["free"] for b in (await buyer.get("/wallet/balance"))["balances"]}
    assert held == {"USDC": 39_700, "BTC": Decimal("0.999")}
    assert (await seller.get("/wallet/balance"))["free"] == 159_700


async def test_a_stranger_does_nothing_to_an_escrow(service: Service) -> None:
    payer, payee, stranger = await funded(service, 3)
    made = await payer.post("/escrows", escrow(payee))
    bodies: dict[str, Any] = {"confirm": {}, "cancel": {}, "dispute": {}, "resolve": {"payee_share": 1}}
    for name, body in bodies.items():
        path = f"/escrows/{made['id']}/{name}"
        theirs = problem(await stranger.ask(path, body), 404, "escrow_not_found")
        nobodys = problem(await stranger.ask(path.replace(made["id"], "esc_0"), body), 404, "escrow_not_found")
        assert theirs["detail"] == nobodys["detail"]
        problem(await stranger.ask(f"{path}?agent_id={payer.id}", body), 404, "agent_not_found")
        problem(await stranger.ask(path, body, key=""), 401, "no_key")
        problem(await stranger.ask(path, body, key="market"), 403, "scope_missing")
    for hostile in ("%00", "a" * 3_000, "%F0%9F%98%80"):
        assert (await payer.send("GET", f"/escrows/{hostile}")).status_code in (404, 422)
    problem(await payer.ask(f"/escrows/{made['id']}/resolve", {"payee_share": 1}, key="agent"), 404, "escrow_not_found")
    assert (await payer.get(f"/escrows/{made['id']}"))["state"] == "funded"


async def test_what_is_refused_says_where(service: Service) -> None:
    payer, payee = await funded(service, 2)
    cases: list[tuple[dict[str, Any], int, str, str]] = [
        ({"amount": 0}, 422, "not_positive", "/amount"),
        ({"amount": "1e-7"}, 422, "too_many_decimals", "/amount"),
        ({"amount": 1e16}, 422, "number_out_of_range", "/amount"),
        ({"amount": "x"}, 422, "invalid_value", "/amount"),
        ({"amount": 20_000}, 409, "insufficient_funds", "/amount"),
        ({"asset": "no price"}, 422, "invalid_symbol", "/asset"),
        ({"asset": "NOPE"}, 422, "missing_price", "/asset"),
        ({"asset": ""}, 422, "invalid_symbol", "/asset"),
        ({"timeout_seconds": 0}, 422, "number_out_of_range", "/timeout_seconds"),
        ({"timeout_seconds": 10**9}, 422, "number_out_of_range", "/timeout_seconds"),
        ({"on_timeout": "keep"}, 422, "invalid_value", "/on_timeout"),
        ({"fee_payer": "nobody"}, 422, "invalid_value", "/fee_payer"),
        ({"payee": payer.id}, 422, "same_party", "/payee"),
        ({"payee": "a\x00"}, 422, "invalid_value", "/payee"),
        ({"referrer": "agent_0"}, 422, "unknown_agent", "/referrer"),
        ({"counter_leg": {"asset": "USDC", "amount": 1}}, 422, "same_asset", "/counter_leg/asset"),
        ({"counter_leg": {"asset": "USDT", "amount": 0}}, 422, "not_positive", "/counter_leg/amount"),
        ({"colour": "red"}, 422, "unknown_field", "/colour"),
    ]
    for given, status, code, pointer in cases:
        answer = await payer.ask("/escrows", escrow(payee) | given)
        figures = ("available",) if code == "insufficient_funds" else ()
        problem(answer, status, code, pointer, figures)
    assert (await payer.get("/wallet/balance"))["reserved"] == 0


async def test_pages(service: Service) -> None:
    payer, payee = await funded(service, 2)
    ids = [(await payer.post("/escrows", escrow(payee, k + 1)))["id"] for k in range(5)]
    found, cursor = [], ""
    for _ in range(3):
        page = await payee.get(f"/escrows?limit=2&cursor={cursor}")
        found += [e["id"] for e in page["escrows"]]
        cursor = page["next_cursor"] or ""
    assert found == ids[::-1]
    problem(await payer.send("GET", "/escrows?cursor=x"), 422, "invalid_cursor")
