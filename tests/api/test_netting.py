"""Netting over HTTP, with a worker beside the app: agreed, booked, settled at the cut-off, and told."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from urllib.parse import quote

from sqlalchemy import text

from app.services.ledger import imbalances
from tests.api.service import Agent, Service, problem, until
from tests.api.test_escrows import counted, funded, told

AN_HOUR_PASSES = text(
    "UPDATE netting_agreements SET activated_at = activated_at - interval '1 h',"
    " next_action_at = next_action_at - interval '1 h' WHERE id = :id"
)


async def agreed(*members: Agent, **more: Any) -> str:
    """Return the path of an agreement that all have accepted."""
    body = {"members": [m.id for m in members[1:]], "services": ["data", "api"], **more}
    path = f"/netting/agreements/{(await members[0].post('/netting/agreements', body))['id']}"
    for member in members[1:]:
        await member.post(f"{path}/accept")
    return path


def owes(payee: Agent, amount: Any, reference: str, **more: Any) -> dict[str, Any]:
    return {"payee": payee.id, "service": "data", "asset": "USDC", "amount": amount, "reference": reference} | more


async def test_twenty_obligations_one_payment_one_fee(service: Service) -> None:
    alice, bob = await funded(service, 2)
    path = await agreed(alice, bob)
    for k in range(10):
        await alice.post(f"{path}/obligations", owes(bob, 100 + k, f"a{k}"))
        await bob.post(f"{path}/obligations", owes(alice, 90 + k, f"b{k}"))
    before = await alice.get(f"{path}/statement")
    assert (before["count"], before["movements_saved"], len(before["obligations"])) == (20, 19, 20)
    assert before["movements"] == [{"payer": alice.id, "payee": bob.id, "asset": "USDC", "amount": 100}]
    assert before["fees"] == [{"payer": alice.id, "asset": "USDC", "amount": 1}]
    [saving] = before["saving"]
    assert (saving["gross_fees"], saving["fees"], saving["fees_saved"]) == (Decimal("19.9"), 1, Decimal("18.9"))
    assert sum(net["net"] for net in before["nets"]) == 0
    ran = await bob.post(f"{path}/settle")
    assert (ran["outcome"], ran["cause"], ran["obligations"], ran["movements"]) == (
        "settled",
        "demand",
        20,
        before["movements"],
    )
    problem(await alice.ask(f"{path}/settle"), 409, "nothing_to_settle", "/open_obligations")
    after = await bob.get(f"{path}/statement?run_id={ran['run_id']}")
    for name in ("movements", "fees", "saving", "nets", "count"):
        assert after[name] == before[name]
    assert after["run"] == ran == (await alice.get(path))["runs"][0]
    assert {o["state"] for o in after["obligations"]} == {"settled"}
    assert (await alice.get(f"{path}/statement?as_of={quote(before['as_of'])}"))["count"] == 20
    assert (await alice.get("/wallet/balance"))["free"] == 19_899
    assert (await bob.get("/wallet/balance"))["free"] == 20_100
    assert counted(service, "netting_runs_total", outcome="settled") == 1
    assert counted(service, "netting_movements_saved_total") == 19
    [event] = [e for e in (await alice.get("/events"))["events"] if e["type"] == "netting.settled"]
    assert (event["data"]["run_id"], event["data"]["nets"], event["data"]["fees"]) == (
        ran["run_id"],
        {"USDC": 100},
        {"USDC": 1},
    )


async def test_the_worker_settles_at_the_cut_off_and_past_the_threshold(worked: Service) -> None:
    alice, bob, carol = await funded(worked, 3)
    timely = await agreed(alice, bob, carol, interval_seconds=3_600)
    large = await agreed(alice, bob, threshold="1000.5")
    await alice.post(f"{timely}/obligations", owes(bob, 50, "1"))
    await bob.post(f"{timely}/obligations", owes(carol, 50, "1"))
    await alice.post(f"{large}/obligations", owes(bob, 1_000, "1"))

    async def runs(path: str) -> Any:
        return (await alice.get(path))["runs"]

    assert await runs(timely) == []
    async with worked.app.state.parts.database.transaction("test") as tx:
        await tx.connection.execute(AN_HOUR_PASSES, {"id": timely.rpartition("/")[2]})
    [run] = await until(lambda: runs(timely))
    assert (run["cause"], run["outcome"]) == ("interval", "settled")
    assert run["movements"] == [{"payer": alice.id, "payee": carol.id, "asset": "USDC", "amount": 50}]
    assert await runs(large) == []
    await bob.post(f"{large}/obligations", owes(alice, "0.5", "1"))
    [run] = await until(lambda: runs(large))
    assert (run["cause"], run["obligations"], run["movements_saved"]) == ("threshold", 2, 1)
    assert (await alice.get("/wallet/balance"))["reserved"] == 0

    async def measured() -> Any:
        return counted(worked, "netting_agreements", state="active") == 2

    assert await until(measured)
    assert counted(worked, "clearing_failures_total") == 0
    async with worked.app.state.parts.database.transaction("test") as tx:
        assert await imbalances(tx) == {}


async def test_a_fact_is_an_admins_to_book_and_may_default(service: Service) -> None:
    alice, bob = await funded(service, 2, 40)
    path = await agreed(alice, bob)
    fact = owes(bob, 100, "fact", fact=True)
    problem(await alice.ask(f"{path}/obligations", fact), 403, "scope_missing")
    named = f"{path}/obligations?agent_id={alice.id}"
    problem(
        await alice.ask(named, owes(bob, 100, "fact"), key="admin"), 409, "insufficient_funds", "/amount", ["available"]
    )
    booked = await alice.post(named, fact, key="admin")
    assert booked["state"] == "open"
    ran = await bob.post(f"{path}/settle")
    assert (ran["outcome"], ran["short"]) == (
        "defaulted",
        [{"agent_id": alice.id, "asset": "USDC", "due": 101, "missing": 61}],
    )
    assert (await bob.get(path))["state"] == "defaulted"
    assert counted(service, "netting_runs_total", outcome="defaulted") == 1
    problem(await bob.ask(f"{path}/obligations", owes(alice, 101, "x")), 409, "agreement_defaulted", "/state")
    await alice.deposit(USDC=61)
    assert (await bob.post(f"{path}/settle"))["outcome"] == "settled"
    assert (await bob.get("/wallet/balance"))["free"] == 140
    assert await told(bob, "netting") == [
        *("netting.proposed", "netting.activated", "netting.booked", "netting.defaulted", "netting.settled"),
    ]


async def test_a_reference_again_is_the_same_obligation(service: Service) -> None:
    alice, bob = await funded(service, 2)
    path = await agreed(alice, bob)
    first = await alice.ask(f"{path}/obligations", owes(bob, "1.50", "a"))
    again = await alice.ask(f"{path}/obligations", owes(bob, "1.5", "a"))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    problem(await alice.ask(f"{path}/obligations", owes(bob, 2, "a")), 409, "reference_conflict", "/reference")
    page = await bob.get(f"{path}/obligations?limit=1")
    assert (page["obligations"], page["next_cursor"] is not None) == ([first.json()], True)
    assert (await bob.get(f"{path}/obligations?limit=1&cursor={page['next_cursor']}"))["obligations"] == []


async def test_a_stranger_does_nothing_to_an_agreement(service: Service) -> None:
    alice, bob, stranger = await funded(service, 3)
    path = await agreed(alice, bob)
    bodies: dict[str, Any] = {"obligations": owes(bob, 1, "a"), "settle": {}, "leave": {}, "accept": {}}
    for name, body in bodies.items():
        theirs = problem(await stranger.ask(f"{path}/{name}", body), 404, "agreement_not_found")
        nobodys = problem(await stranger.ask(f"/netting/agreements/net_0/{name}", body), 404, "agreement_not_found")
        assert theirs["detail"] == nobodys["detail"]
        problem(await stranger.ask(f"{path}/{name}?agent_id={alice.id}", body), 404, "agent_not_found")
        problem(await stranger.ask(f"{path}/{name}", body, key=""), 401, "no_key")
        problem(await stranger.ask(f"{path}/{name}", body, key="admin"), 403, "agent_key_needed")
        problem(await stranger.ask(f"{path}/{name}", body, key="market"), 403, "scope_missing")
    for name in ("obligations", "statement"):
        problem(await stranger.send("GET", f"{path}/{name}"), 404, "agreement_not_found")
        problem(await stranger.send("GET", f"{path}/{name}?agent_id={alice.id}"), 404, "agent_not_found")
        assert stranger.id not in str(await alice.get(f"{path}/{name}?agent_id={alice.id}", key="admin"))
    assert (await alice.get(path))["open_obligations"] == 0


async def test_what_is_refused_says_where(service: Service) -> None:
    alice, bob = await funded(service, 2)
    made = "/netting/agreements"
    proposals: list[tuple[dict[str, Any], str, str]] = [
        ({"members": []}, "too_many_items", "/members"),
        ({"members": ["agent_0"]}, "unknown_agent", "/members/0"),
        ({"members": [f"agent_{k}" for k in range(51)]}, "too_many_items", "/members"),
        ({"services": []}, "too_many_items", "/services"),
        ({"services": ["Data"]}, "invalid_service", "/services"),
        ({"services": ["data"] * 33}, "too_many_items", "/services"),
        ({"interval_seconds": 0}, "number_out_of_range", "/interval_seconds"),
        ({"threshold": 0}, "not_positive", "/threshold"),
        ({"name": ""}, "invalid_value", "/name"),
    ]
    for given, code, pointer in proposals:
        body = {"members": [bob.id], "services": ["data"]} | given
        problem(await alice.ask(made, body), 422, code, pointer)
    path = await agreed(alice, bob)
    obligations: list[tuple[dict[str, Any], int, str, str]] = [
        ({"amount": 0}, 422, "not_positive", "/amount"),
        ({"amount": "0.0000001"}, 422, "too_many_decimals", "/amount"),
        ({"asset": "NOPE"}, 422, "missing_price", "/asset"),
        ({"asset": "no asset"}, 422, "invalid_symbol", "/asset"),
        ({"service": "casino"}, 422, "service_not_agreed", "/service"),
        ({"payee": alice.id}, 422, "not_a_member", "/payee"),
        ({"payee": "agent_0"}, 422, "not_a_member", "/payee"),
        ({"reference": ""}, 422, "invalid_value", "/reference"),
        ({"amount": 19_999}, 409, "insufficient_funds", "/amount"),
    ]
    for given, status, code, pointer in obligations:
        figures = ("available",) if code == "insufficient_funds" else ()
        problem(await alice.ask(f"{path}/obligations", owes(bob, 1, "r") | given), status, code, pointer, figures)
    for query, code in (("as_of=yesterday", "invalid_value"), ("run_id=r&as_of=2026-01-01T00:00:00Z", "not_allowed")):
        problem(await alice.send("GET", f"{path}/statement?{query}"), 422, code, "/as_of")
    problem(await alice.send("GET", f"{path}/statement?run_id=run_0"), 404, "run_not_found")
    problem(await alice.send("GET", f"{path}/statement?run_id=%00"), 422, "invalid_parameter")
    await alice.post(f"{path}/obligations", owes(bob, 1, "r"))
    life = [(await alice.get(path))["created_at"], (await alice.get(f"{path}/statement"))["as_of"]]
    for moment, count in (("0001-01-01T00:00:00%2B14:00", 0), ("9999-12-31T23:59:59-14:00", 1)):  # in UTC, no years
        said = await alice.get(f"{path}/statement?as_of={moment}")
        assert said["count"] == count
        assert said["as_of"] >= life[count]
