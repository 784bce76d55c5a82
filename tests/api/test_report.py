"""GET /api/account/report: the stored account's page, its headers, whose it is, and how many at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from app.api.workshop import Workshop
from tests.api.service import problem
from tests.report.pages import Page, amount, closes

if TYPE_CHECKING:
    from tests.api.service import Agent, Service

REPORT = "/account/report"


async def _agent(service: Service) -> Agent:
    agent = await service.agent("an agent with a book")
    await service.prices(BTC=60_000, ETH=3_000)
    await agent.deposit(USDC=20_000, BTC=0.1)
    await agent.order("BTC-PERP", "buy", 0.5)
    await agent.order("ETH-PERP", "sell", 9)
    return agent


async def _history(service: Service) -> None:
    rows = [
        {"asset": asset, "date": str(day), "close": round(close, 4)}
        for asset, series in closes("BTC", "ETH", days=100).items()
        for day, close in series.items()
    ]
    answer = await service.post("/api/market/history", key="market", json={"closes": rows})
    assert answer.status_code == 200, answer.text


async def _page(agent: Agent, **params: Any) -> Page:
    answer = await agent.send("GET", REPORT, params=params)
    assert answer.status_code == 200, answer.text
    return Page(answer.text)


async def test_the_account_as_a_page(service: Service) -> None:
    agent = await _agent(service)
    await agent.post("/reservations", {"service": "casino", "amount": 1_000})
    answer = await agent.send("GET", REPORT)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none';")
    assert "frame-ancestors 'none'" in policy
    assert "script-src" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    page, account = Page(answer.text), await agent.get("/account")
    assert f"{account['equity']:,.2f}" in page.text
    health = account["health"]
    assert f"{health['required_initial']:,.2f}" in page.text
    rows = {row["figure"]: row for row in page.table("Health under cross margin")}
    assert amount(rows["utilization"]["value"]) == pytest.approx(float(health["utilization"]), abs=0.00005)
    (fall, _) = page.table("The whole account after each shock")
    # dollars that are reserved do not move
    assert amount(fall["maintenance after"]) == pytest.approx(0.15 * 0.8 * 57_000 + 1_000)
    assert "Monte Carlo" in " ".join(page.text)


async def test_stored_closes_are_its_history(service: Service) -> None:
    agent = await _agent(service)
    await _history(service)
    page = await _page(agent)
    assert "Historical: today's account on each of 99 days" in " ".join(page.text)
    quoted = await agent.post("/quotes/var", {"book": "account", "method": "historical"})
    for row, result in zip(page.table("Value at risk"), quoted["results"], strict=True):
        assert amount(row["VaR"]) == pytest.approx(float(result["var"]), abs=0.006)
        assert amount(row["ES"]) == pytest.approx(float(result["es"]), abs=0.006)
    assert len(page.table("The whole account after each shock")) == 10
    await service.put("/api/market/parameters", json={"parameters": {"var_window_days": 70}})
    assert "Historical: today's account on each of 70 days" in " ".join((await _page(agent)).text)


async def test_a_seed_is_kept_to(service: Service) -> None:
    agent = await _agent(service)
    one, again, other = [(await _page(agent, seed=seed)).tables for seed in (7, 7, 8)]
    var = "Value at risk and expected shortfall, USD"
    assert one[var] == again[var] != other[var]
    for seed in ("-1", "x", str(2**63)):
        problem(await agent.send("GET", REPORT, params={"seed": seed}), 422, "invalid_parameter", "/seed")


async def test_an_account_without_anything(service: Service) -> None:
    page = await _page(await service.agent())
    assert "there are no open positions" in " ".join(page.text)


async def test_whose_report_it_is(service: Service) -> None:
    agent = await _agent(service)
    other = await service.agent("another")
    problem(await other.send("GET", REPORT, params={"agent_id": agent.id}), 404, "agent_not_found")
    problem(await service.get(f"/api{REPORT}", key="admin"), 403, "agent_key_needed")
    named = await service.get(f"/api{REPORT}", key="admin", params={"agent_id": agent.id})
    assert f"<h1>{agent.id}</h1>" in named.text
    assert f"<h1>{other.id}</h1>" in (await other.send("GET", REPORT)).text


async def test_a_key_has_one_report_made_at_a_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for many holds one thread of the workshop, another key the other one."""
    agent, other = await _agent(service), await service.agent("another")
    under_way: list[str] = []
    most: list[list[str]] = []
    run = Workshop.run

    async def counted(workshop: Workshop, work: Any, *args: Any, **kwargs: Any) -> Any:
        agent_id = args[2].agent_id
        under_way.append(agent_id)
        most.append(list(under_way))
        try:
            return await run(workshop, work, *args, **kwargs)
        finally:
            under_way.remove(agent_id)

    monkeypatch.setattr(Workshop, "run", counted)
    asked = [agent.send("GET", REPORT) for _ in range(4)] + [other.send("GET", REPORT)]
    answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200] * 5
    assert max(seen.count(agent.id) for seen in most) == 1
    assert any(set(seen) == {agent.id, other.id} for seen in most)
