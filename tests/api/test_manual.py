"""What the manual says that a body looks like, or that a margin does, is so."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from tests.api.bodies import AS_OF, OPTION
from tests.manual import MANUAL, PAGES

if TYPE_CHECKING:
    from tests.api.service import Service


def example(pattern: str) -> Any:
    """Return the JSON in backticks that follows the pattern."""
    found = re.search(pattern + r"[^`]*`(\{.*?\})`", MANUAL)
    assert found, pattern
    return json.loads(found[1])


async def test_the_example_of_new_parameters(service: Service) -> None:
    body = example(r"GET, PUT /api/market/parameters .*?PUT")
    answer = await service.put("/api/market/parameters", json=body)
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    factors = {**reply["models"], **reply["settings"]}
    assert {name: factors[name] for name in body["parameters"]} == body["parameters"]
    assert reply["version"] == body["version"] + 1


async def test_the_risk_requests_work_as_they_stand(service: Service) -> None:
    await service.prices(BTC=61_000)
    alice = await service.agent()
    await alice.deposit(USDC=20_000)
    await alice.order("BTC-PERP", "buy", 0.5, leverage=3)
    pattern = r"\$API/quotes/(stress|sizing|deleverage|drawdown) -H \"\$KEY\" -d '(\{.*?\})'"
    found = re.findall(pattern, MANUAL, re.DOTALL)
    assert len(found) == 6
    for route, body in found:
        answer = await alice.ask(f"/quotes/{route}", json.loads(body))
        assert answer.status_code == 200, answer.text


async def test_a_far_wing_has_a_small_margin_unless_a_minimum_is_set(service: Service) -> None:
    wing = OPTION | {"strike": 200_000, "expiry": "2027-01-22T08:00:00Z", "iv": 0.45}
    market = {"prices": {"BTC": 61_000}}
    body = {"positions": [wing], "models": ["cross", "portfolio", "span"], "as_of": AS_OF}
    plain = (await service.quote(**body, market=market))["models"]
    assert plain["portfolio"]["initial_margin"] < 1
    assert plain["span"]["initial_margin"] < 1
    assert plain["cross"]["initial_margin"] >= 0.3 * 61_000
    charges = example("short-option minimum that clearing houses")
    minimum = charges["span_charges"]["BTC"]["short_option_minimum"]
    held = (await service.quote(**body, market=market | charges))["models"]
    assert held["span"]["maintenance_margin"] == minimum
    assert held["portfolio"] == plain["portfolio"]


async def test_the_lines_of_lending_work_as_they_stand(service: Service) -> None:
    lines = re.findall(
        r"curl -sS \"?\$API(/\S+?)\"? -H \"\$(ADMIN|ALICE|BOB)\"(?: -d '(.*)')?$", PAGES["lending"], re.MULTILINE
    )
    keys = {"ADMIN": "admin", "ALICE": (await service.agent("Alice")).key, "BOB": (await service.agent("Bob")).key}
    answers = [
        await service.send("POST" if body else "GET", f"/api{path}", key=keys[who], content=body or None)
        for path, who, body in lines
    ]
    assert [path.partition("?")[0].rpartition("/")[2] for path, _, _ in lines] == [
        *("prices", "deposits", "deposits", "create", "quote", "borrow", "active"),
    ]
    assert all(answer.status_code < 300 for answer in answers), [answer.text for answer in answers]
    [loan] = answers[-1].json()["loans"]
    assert (loan["lent"], loan["offered"], loan["borrow_rate_apy"]) == (200, 200, 0.094)
