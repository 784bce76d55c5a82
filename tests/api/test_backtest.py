"""Backtests over HTTP: published test statistics, real closes, stored and supplied series, what is refused."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.api.service import problem
from tests.api.test_quotes_var import drawn, post_closes
from tests.domain.closes import CLOSES, needs_closes

if TYPE_CHECKING:
    from tests.api.service import Service

BACKTEST = "/api/quotes/backtest"
SHARED = pytest.mark.asyncio(loop_scope="module")


async def ask(service: Service, **body: Any) -> dict[str, Any]:
    answer = await service.post(BACKTEST, json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


def _series(n00: int, n01: int, n11: int) -> list[float]:
    """Return a P&L with a VaR of 1 in mind: exceptions of -2 that follow one another `n11` times."""
    clusters = [[-2.0, -2.0]] * n11 + [[-2.0]] * (n01 - n11)
    quiet = n00 + n01  # days without, each cluster but the last followed by one
    rows: list[float] = []
    for cluster in clusters:
        rows += [0.0, *cluster]
    return rows + [0.0] * (quiet + 1 - len(clusters))


@SHARED
async def test_the_published_case(shared: Service) -> None:
    """N00/N01/N10/N11 932/53/53/4 of 1,043 days at 5 %: POF .46147, CCI .25866, CC .72013."""
    pnl = _series(932, 53, 4)
    assert len(pnl) == 1_043
    reply = await ask(shared, pnl=pnl, var=[1.0] * len(pnl), confidence=0.95)
    found = reply["coverage"]
    assert found["exceptions"] == 57
    assert found["transitions"] == {"n00": 932, "n10": 53, "n01": 53, "n11": 4}
    figures = {name: (found[name]["statistic"], found[name]["p_value"]) for name in ("kupiec", "independence")}
    assert figures["kupiec"] == pytest.approx((0.46147, 0.49694), abs=1e-5)
    assert figures["independence"] == pytest.approx((0.25866, 0.61104), abs=1e-5)
    assert found["conditional"]["statistic"] == pytest.approx(0.72013, abs=1e-5)
    assert found["conditional"]["p_value"] == pytest.approx(0.69763, abs=1e-5)
    assert found["traffic_light"] == {"zone": "green", "probability": pytest.approx(0.77913, abs=1e-5)}
    assert len(reply["exceptions"]) == 57


@needs_closes
async def test_real_closes(service: Service) -> None:
    with CLOSES.open() as lines:
        header, *rows = csv.reader(lines)
    closes = [{"asset": asset, "date": row[0], "close": row[k]} for k, asset in enumerate(header) if k for row in rows]
    answer = await service.post("/api/market/history", key="market", json={"closes": closes, "confirm": True})
    assert answer.status_code == 200, answer.text
    expected = {"BTC": (12, 0.94), "ETH": (15, 0.45), "SOL": (7, 0.10), "BNB": (7, 0.10)}
    books = {name: {name: 10_000.0} for name in expected} | {"equal": dict.fromkeys(expected, 2_500.0)}
    for name, (count, p_value) in (expected | {"equal": (11, 0.71)}).items():
        reply = await ask(service, exposures=books[name], confidence=0.99, window=500)
        found = reply["coverage"]
        assert (found["observations"], found["exceptions"]) == (1_226, count), name
        assert found["kupiec"]["p_value"] == pytest.approx(p_value, abs=0.006), name
        assert reply["history"]["last"] == "2024-12-31"


@pytest.mark.parametrize("method", ["plain", "age_weighted", "filtered", "normal"])
async def test_stored_and_supplied_returns_are_the_same(service: Service, method: str) -> None:
    closes = drawn(301, "BTC", "ETH")
    await post_closes(service, closes)
    exposures = {"ETH": -5_000.0, "BTC": 10_000.0}
    returns = {name: (series[1:] / series[:-1] - 1).tolist() for name, series in closes.items()}
    stored = await ask(service, exposures=exposures, window=100, method=method, confidence=0.95)
    given = await ask(service, exposures=exposures, returns=returns, window=100, method=method, confidence=0.95)
    assert stored["coverage"] == given["coverage"]
    assert [e["loss"] for e in stored["exceptions"]] == pytest.approx([e["loss"] for e in given["exceptions"]])
    if method != "filtered":
        pnl = np.array(returns["BTC"]) * 10_000 - np.array(returns["ETH"]) * 5_000
        alone = await ask(service, pnl=pnl.tolist(), window=100, method=method, confidence=0.95)
        assert alone["coverage"] == stored["coverage"]


@SHARED
@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        ({}, "/pnl", "missing_field"),
        ({"pnl": [1], "exposures": {"BTC": 1}}, "/pnl", "missing_field"),
        ({"pnl": []}, "/pnl", "invalid_value"),
        ({"pnl": [1, 2], "var": [1]}, "/var", "wrong_length"),
        ({"pnl": [1], "var": [1], "window": 100}, "/window", "not_allowed"),
        ({"pnl": [1], "returns": {"BTC": [0.1]}}, "/returns", "not_allowed"),
        ({"exposures": {"BTC": 1}, "var": [1]}, "/var", "not_allowed"),
        ({"exposures": {}}, "/exposures", "too_many_items"),
        ({"exposures": {f"A{k}": 1 for k in range(51)}}, "/exposures", "too_many_items"),
        ({"exposures": {"BTC": 1}, "returns": {"ETH": [0.1]}}, "/returns/BTC", "missing_field"),
        ({"exposures": {"B": 1, "A": 1}, "returns": {"A": [0.1], "B": [0.1] * 2}}, "/returns/A", "wrong_length"),
        ({"exposures": {"A": 1}, "returns": {"A": [-1]}}, "/returns/A/0", "invalid_value"),
        ({"pnl": [1], "var": [1], "confidence": 1.5}, "/confidence", "out_of_range"),
        ({"pnl": [1], "var": [1], "test_size": 0}, "/test_size", "out_of_range"),
        ({"pnl": [1] * 70, "window": 10}, "/window", "invalid_value"),
        ({"pnl": [1] * 5000, "window": 2000, "method": "age_weighted", "age_decay": 1}, "/age_decay", "invalid_value"),
        ({"pnl": [1] * 600, "age_decay": 0.97}, "/age_decay", "not_allowed"),
        ({"pnl": [1] * 600, "method": "age_weighted", "volatility_decay": 0.9}, "/volatility_decay", "not_allowed"),
        ({"pnl": [1e400]}, "/pnl/0", "number_out_of_range"),
    ],
)
async def test_what_is_refused(shared: Service, body: dict[str, Any], pointer: str, code: str) -> None:
    text = json.dumps(body).replace("Infinity", "1e400")
    found = problem(await shared.post(BACKTEST, content=text), 422, code)
    assert [e["pointer"] for e in found["errors"]] == [pointer]


@SHARED
async def test_missing_history_is_named(shared: Service) -> None:
    answer = await shared.post(BACKTEST, json={"exposures": {"NOPE": 1}})
    found = problem(answer, 422, "missing_history", figures=("history",))
    assert found["history"] == {"NOPE": {"days": 0, "required": 501}}
    answer = await shared.post(BACKTEST, json={"pnl": [1.0] * 100})
    assert problem(answer, 422, "missing_history", figures=("history",))["history"]["pnl"]["days"] == 100


@SHARED
async def test_queries_of_the_account_are_checked(shared: Service) -> None:
    for path in (
        "/api/account/backtest?confidence=0.9",
        "/api/account/backtest?confidence=nan",
        "/api/account/backtest?window=0",
        "/api/account/snapshots?cursor=2024-13-01",
        "/api/account/snapshots?cursor=x",
    ):
        assert (await shared.get(path)).status_code == 422, path


async def test_correlation_seen_and_configured(service: Service) -> None:
    closes = drawn(201, "BTC", "ETH", "SOL")
    await post_closes(service, closes)
    await service.prices(BTC=60_000, ETH=3_000)
    reply = (await service.get("/api/market/correlation?assets=BTC,ETH,SOL&regime=sell_off&window_days=90")).json()
    returns = np.column_stack([closes[a][1:] / closes[a][:-1] - 1 for a in ("BTC", "ETH", "SOL")])[-90:]
    seen = np.corrcoef(returns.T)
    assert reply["realised"]["correlation"]["BTC"]["ETH"] == pytest.approx(seen[0, 1])
    assert reply["configured"]["correlation"]["BTC"]["SOL"] == pytest.approx(0.90)
    configured = np.array([[1, 0.935, 0.90], [0.935, 1, 0.92], [0.90, 0.92, 1]])
    assert reply["drift"]["distance"] == pytest.approx(np.linalg.norm(seen - configured))
    assert reply["drift"]["nearest"] == min(reply["drift"]["distances"], key=reply["drift"]["distances"].get)
    assert reply["var"] is None
    agent = await service.agent()
    await agent.deposit(USDC=50_000)
    await agent.order("BTC-PERP", "buy", 0.5)
    await agent.order("ETH-PERP", "sell", 5)
    own = await agent.get("/market/correlation?book=account&confidence=0.99")
    x = np.array([30_000, -15_000])
    expected = 2.3263479 * np.sqrt(x @ np.cov(returns[:, :2].T) @ x)
    assert float(own["var"]["realised"]) == pytest.approx(expected, rel=1e-6)
    s = returns[:, :2].std(axis=0, ddof=1) * x
    assert float(own["var"]["configured"]) == pytest.approx(
        2.3263479 * np.sqrt(s @ s + 2 * 0.8 * s[0] * s[1]), rel=1e-6
    )
    empty = await service.agent("with nothing")
    assert (await empty.get("/market/correlation?book=account"))["var"]["realised"] == 0
    for path, code in (
        ("assets=BTC&book=account", "not_allowed"),
        ("assets=B!", "invalid_symbol"),
        ("assets=" + ",".join(f"A{k}" for k in range(51)), "too_many_items"),
        ("assets=NOPE", "missing_volatility"),
        ("regime=panic", "invalid_parameter"),
    ):
        problem(await service.get(f"/api/market/correlation?{path}"), 422, code)
