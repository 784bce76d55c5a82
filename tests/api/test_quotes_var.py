"""VaR over HTTP: worked numbers, the stored book and the same portfolio, history that is missing, hostile bodies."""

from __future__ import annotations

from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import norm

from tests.api.service import problem

if TYPE_CHECKING:
    from tests.api.service import Service

VAR = "/api/quotes/var"
SHARED = pytest.mark.asyncio(loop_scope="module")

CAD_EUR = {
    "positions": [
        {"symbol": "CAD", "notional": 2_000_000, "delta": 1, "mark_price": 1},
        {"symbol": "EUR", "notional": 1_000_000, "delta": 1, "mark_price": 1},
    ],
    "vols": {"CAD": 0.05, "EUR": 0.12},
    "correlation": {"CAD": {"EUR": 0}},
    "horizon_days": 365,
    "confidence": 0.95,
    "z": 1.65,
}
MONTH = {"expiry": "2027-06-25T08:00:00Z"}
LONG = [{"symbol": "BTC-PERP", "side": "long", "size": 1, "mark_price": 60_000}]


async def var(service: Service, **body: Any) -> dict[str, Any]:
    answer = await service.post(VAR, json=body)
    assert answer.status_code == 200, answer.text
    reply: dict[str, Any] = answer.json()
    return reply


def drawn(days: int, *assets: str, seed: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    common = rng.normal(0, 0.02, days)
    return {a: np.round(100 * np.exp(np.cumsum(common + rng.normal(0, 0.015, days))), 6) for a in assets}


async def post_closes(service: Service, closes: dict[str, np.ndarray]) -> None:
    rows = [
        {"asset": asset, "date": str(date(2023, 1, 1) + timedelta(days=k)), "close": float(close)}
        for asset, series in closes.items()
        for k, close in enumerate(series)
    ]
    answer = await service.post("/api/market/history", key="market", json={"closes": rows, "confirm": True})
    assert answer.status_code == 200, answer.text


async def test_the_worked_case(service: Service) -> None:
    """Jorion, "Value at Risk", ch. 7: two currencies, 257,738 = 105,630 + 152,108."""
    reply = await var(service, **CAD_EUR)
    (result,) = reply["results"]
    assert result["var"] == pytest.approx(257_738, abs=0.5)
    (parts,) = reply["components"]
    assert [row["var"] for row in parts["underlyings"]] == pytest.approx([105_630, 152_108], abs=0.7)
    assert [row["var"] for row in parts["positions"]] == pytest.approx([105_630, 152_108], abs=0.7)
    assert reply["covariance"]["defaulted_pairs"] == []
    assert reply["evidence"]["z"] == [-1.65]


async def test_services_together(service: Service) -> None:
    reply = await var(service, **CAD_EUR, services={"casino": 100_000, "escrow": 50_000})
    (found,) = reply["services"]
    v = np.array([reply["results"][0]["var"], 1e5, 5e4])
    rho = np.array([[1, 0.42, 0.11], [0.42, 1, 0.06], [0.11, 0.06, 1]])
    assert found["var"] == pytest.approx(np.sqrt(v @ rho @ v))
    assert sum(found["components"].values()) == pytest.approx(found["var"])
    other = await var(service, **CAD_EUR, services={"casino": 100_000}, service_correlation={"casino": {"trading": -1}})
    assert other["services"][0]["var"] == pytest.approx(v[0] - 1e5)


async def test_historical_is_numpys_quantile_of_the_stored_returns(service: Service) -> None:
    closes = drawn(401, "BTC", "ETH")
    await post_closes(service, closes)
    positions = [*LONG, {"symbol": "ETH-PERP", "side": "short", "size": 10, "mark_price": 3_000}]
    reply = await var(service, positions=positions, method="historical", window_days=300, confidence=[0.9, 0.99])
    returns = np.column_stack([closes[a][1:] / closes[a][:-1] - 1 for a in ("BTC", "ETH")])[-300:]
    pnl = returns @ [60_000, -30_000]
    for result in reply["results"]:
        expected = -np.quantile(pnl, 1 - result["confidence"])
        assert result["var"] == pytest.approx(expected, rel=1e-9)
        assert result["es"] == pytest.approx(-pnl[pnl <= -expected * (1 - 1e-12)].mean(), rel=1e-9)
    assert reply["evidence"]["days"] == 300
    assert reply["evidence"]["first"] == str(date(2023, 1, 1) + timedelta(days=101))
    assert (reply["history"]["version"], reply["history"]["days"]) == (1, 300)
    sigma = returns.std(axis=0, ddof=1) * np.sqrt(365)
    plain = await var(service, positions=positions, window_days=300, confidence=0.99)
    cov = np.cov(returns.T)
    x = np.array([60_000, -30_000])
    assert plain["results"][0]["var"] == pytest.approx(norm.ppf(0.99) * np.sqrt(x @ cov @ x), rel=1e-9)
    assert plain["covariance"]["volatility"]["BTC"] == pytest.approx(sigma[0], rel=1e-9)


def depends_on_the_book(more: dict[str, Any]) -> bool:
    """Whether another book has other paths, moments or covariances: no difference of two quotes is exact then."""
    own = more.get("method") in ("monte_carlo", "cornish_fisher") and "skew" not in more
    return own or more.get("covariance") == "ledoit_wolf"


@pytest.mark.parametrize(
    "more",
    [
        {"method": "historical"},
        {"method": "historical", "weighting": "age_weighted"},
        {"method": "historical", "weighting": "filtered"},
        {"method": "cornish_fisher"},
        {"method": "cornish_fisher", "skew": -0.7, "excess_kurtosis": 4.5},
        {"method": "monte_carlo", "seed": 7, "paths": 20_000},
        {"method": "monte_carlo", "distribution": "student_t", "nu": 4, "paths": 20_000},
        {"covariance": "ewma"},
        {"covariance": "ledoit_wolf"},
        {"regime": "liquidity_crisis"},
    ],
)
async def test_every_method_holds_to_the_properties(service: Service, more: dict[str, Any]) -> None:
    await post_closes(service, drawn(200, "BTC", "ETH"))
    await service.prices(BTC=60_000, ETH=3_000)
    body = {
        "positions": [{"symbol": "ETH-PERP", "side": "short", "size": 10}],
        "collateral": [{"asset": "BTC", "amount": 0.5}, {"asset": "USDC", "amount": 10_000}],
        "confidence": [0.9, 0.975, 0.99],
    }
    reply = await var(service, **body, **more)
    figures = [(r["var"], r["es"]) for r in reply["results"]]
    assert figures == sorted(figures)
    assert all(es >= var_ for var_, es in figures)
    for (var_, es), parts in zip(figures, reply["components"], strict=True):
        for rows in (parts["positions"], parts["underlyings"]):
            assert sum(row["var"] for row in rows) == pytest.approx(var_, rel=1e-9)
            assert sum(row["es"] for row in rows) == pytest.approx(es, rel=1e-9)
        # Euler, once more: of a linear book a part is its exposure times the slope of the figure
        for row in parts["underlyings"]:
            assert row["exposure"] * row["marginal_var"] == pytest.approx(row["var"], rel=1e-9)
            assert row["exposure"] * row["marginal_es"] == pytest.approx(row["es"], rel=1e-9)
        short, long = sorted(parts["underlyings"], key=lambda row: row["exposure"])
        if not depends_on_the_book(more):
            alone = await var(service, **body | {"collateral": []}, **more)
            (kept,) = (r["var"] for r in alone["results"] if r["confidence"] == parts["confidence"])
            assert long["incremental_var"] == pytest.approx(var_ - kept, rel=1e-6)
        assert short["incremental_var"] == pytest.approx(parts["positions"][0]["incremental_var"], rel=1e-9)
    assert (reply["seed"], reply["method"]) == (more.get("seed", 0), more.get("method", "parametric"))
    assert reply["standing_still"] == ["USDC"]
    assert reply["exposures"] == {"BTC": pytest.approx(30_000), "ETH": pytest.approx(-30_000)}
    longer = await var(service, **body, **more, horizon_hours=96)
    assert [r["var"] for r in longer["results"]] > [r["var"] for r in reply["results"]]


async def test_monte_carlo_repeats_and_agrees_with_the_parametric_answer(service: Service) -> None:
    await service.prices(BTC=60_000)
    body = {"positions": LONG, "vols": {"BTC": 0.6}, "confidence": 0.99}
    exact_ = (await var(service, **body))["results"][0]["var"]
    one, two = [await var(service, **body, method="monte_carlo", seed=11) for _ in range(2)]
    assert one["results"] == two["results"]
    assert one["evidence"]["seed"] == 11
    (error,) = one["evidence"]["var_standard_error"]
    assert abs(one["results"][0]["var"] - exact_) < 3 * error


async def test_the_stored_book_and_the_same_portfolio_agree(service: Service) -> None:
    await post_closes(service, drawn(200, "BTC", "ETH"))
    await service.prices(BTC=60_000, ETH=3_000)
    agent = await service.agent()
    await agent.deposit(USDC=50_000, ETH=4)
    await agent.order("BTC-PERP", "buy", 0.5)
    await agent.post("/reservations", {"service": "casino", "asset": "ETH", "amount": 1})
    same = {
        "positions": [{"symbol": "BTC-PERP", "side": "long", "size": 0.5}],
        "collateral": [{"asset": "ETH", "amount": 4}, {"asset": "USDC", "amount": 50_000}],
    }
    for more in ({}, {"method": "historical"}, {"method": "monte_carlo"}, {"regime": "sell_off"}):
        stored = await agent.post("/quotes/var", {"book": "account", **more})
        given = await agent.post("/quotes/var", {**same, **more})
        assert stored.pop("as_of")
        assert given.pop("as_of")
        assert stored == given
    other = await service.post(f"{VAR}?agent_id={agent.id}", key="admin", json={"book": "account"})
    assert other.status_code == 200
    problem(await service.post(f"{VAR}?agent_id={agent.id}", json={"book": "account"}), 404, "agent_not_found")
    problem(await service.post(VAR, key="market", json={"book": "account"}), 403, "scope_missing")


async def test_missing_history_names_what_is_missing(service: Service) -> None:
    await service.prices(BTC=60_000, SOL=100)
    await post_closes(service, drawn(100, "BTC"))
    positions = [*LONG, {"symbol": "SOL-PERP", "side": "long", "size": 1}]
    answer = await service.post(VAR, json={"positions": positions, "method": "historical"})
    found = problem(answer, 422, "missing_history", figures=("history",))
    assert found["history"] == {"SOL": {"days": 0, "required": 60}}
    assert [e["pointer"] for e in found["errors"]] == ["/history/SOL"]
    defaulted = await var(service, positions=positions)
    assert defaulted["covariance"]["defaulted_pairs"] == ["BTC:SOL"]
    assert defaulted["covariance"]["defaulted_volatilities"] == ["SOL"]
    assert defaulted["covariance"]["correlation"]["BTC"]["SOL"] == pytest.approx(0.90)
    unknown = [{"symbol": "XYZ-PERP", "side": "long", "size": 1, "mark_price": 1}]
    problem(await service.post(VAR, json={"positions": unknown}), 422, "missing_volatility")


async def test_a_correction_of_the_history_counts_at_once(service: Service) -> None:
    closes = drawn(100, "BTC")
    await post_closes(service, closes)
    before = await var(service, positions=LONG, method="historical", confidence=0.9)
    closes["BTC"][50] /= 2
    await post_closes(service, closes)
    after = await var(service, positions=LONG, method="historical", confidence=0.9)
    assert after["history"]["version"] == before["history"]["version"] + 1
    assert after["results"][0]["es"] > before["results"][0]["es"]


async def test_the_decay_of_an_ewma_covariance_is_the_request_s(service: Service) -> None:
    closes = drawn(101, "BTC")
    await post_closes(service, closes)
    returns = closes["BTC"][1:] / closes["BTC"][:-1] - 1
    variance = returns.var(ddof=1)
    for r in returns:
        variance = 0.9 * variance + 0.1 * r * r
    reply = await var(service, positions=LONG, covariance="ewma", volatility_decay=0.9, confidence=0.99)
    assert reply["results"][0]["var"] == pytest.approx(norm.ppf(0.99) * 60_000 * np.sqrt(variance), rel=1e-9)
    assert reply["parameters"]["decay"] == 0.9


@SHARED
async def test_what_a_delta_leaves_out_is_told(shared: Service) -> None:
    """A straddle sold at the money has next to no delta, and a loss either way: VaR by delta says nothing of it."""
    leg = {"underlying": "BTC", "side": "short", "size": 1, "strike": 60_900, "iv": 0.6} | MONTH
    straddle = [leg | {"type": kind} for kind in ("call", "put")]
    market: dict[str, Any] = {"market": {"prices": {"BTC": 60_000}}, "as_of": "2027-05-26T08:00:00Z"}
    body = {"positions": straddle, **market, "vols": {"BTC": 0.6}, "confidence": 0.99}
    by_delta = await var(shared, **body)
    assert by_delta["evidence"]["not_modelled"] == ["curvature", "implied_volatility_moves", "passage_of_time"]
    revalued = await var(shared, **body, method="monte_carlo")
    assert revalued["evidence"]["not_modelled"] == ["implied_volatility_moves", "passage_of_time"]
    assert revalued["results"][0]["var"] > 2 * by_delta["results"][0]["var"]
    linear = await var(shared, positions=LONG, vols={"BTC": 0.6})
    assert linear["evidence"]["not_modelled"] == []


async def test_defaults_are_parameters_under_a_version(service: Service) -> None:
    given = {"var_degrees": 4, "var_age_decay": 0.9, "backtest_size": 0.1, "sizing_volatility_target": 0.25}
    given |= {"sizing_weight_max": 0.1, "sizing_free_margin_share": 0.3, "sizing_volatility_base": 0.1}
    given |= {"deleverage_utilization": 0.4, "var_window_days": 80}
    answer = await service.put("/api/market/parameters", json={"parameters": given})
    assert answer.status_code == 200, answer.text
    assert answer.json()["models"] | given == answer.json()["models"]
    await post_closes(service, drawn(100, "BTC"))
    simulated = await var(service, positions=LONG, method="monte_carlo", distribution="student_t", paths=1_000)
    assert simulated["evidence"]["nu"] == 4
    aged = await var(service, positions=LONG, method="historical", weighting="age_weighted")
    assert (aged["evidence"]["decay"], aged["evidence"]["days"]) == (0.9, 80)
    tested = (await service.post("/api/quotes/backtest", json={"exposures": {"BTC": 1}})).json()
    assert (tested["window"], tested["coverage"]["test_size"]) == (80, 0.1)
    assets = [{"asset": "BTC", "edge": 1}]
    sized = (await service.post("/api/quotes/sizing", json={"method": "lp", "assets": assets})).json()
    assert sized["weights"] == {"BTC": 0.1}
    weighed = {"method": "risk_parity", "assets": [{"asset": "BTC"}], "covariance": {"method": "sample"}}
    assert (await service.post("/api/quotes/sizing", json=weighed)).json()["history"]["days"] == 80
    book = {"positions": LONG, "collateral": [{"asset": "USDC", "amount": 30_000}]}
    plan = (await service.post("/api/quotes/deleverage", json=book)).json()
    assert plan["target"] == 0.4
    one = {"method": "correlation_aware", "asset": "BTC", "max_leverage": 3, "equity": 1e4, "free_margin": 1e4}
    found = (await service.post("/api/quotes/sizing", json=one)).json()
    assert (found["target_volatility"], found["free_margin_share"]) == (0.25, 0.3)


@SHARED
async def test_a_misspelt_name_is_told(shared: Service) -> None:
    given = {"vols": {"BTC": 0.6, "BTC-PERP": 0.9}, "correlation": {"BTC": {"EHT": 0.5}}}
    shown = (await var(shared, positions=LONG, **given))["covariance"]
    assert (shown["unused_volatilities"], shown["unused_pairs"]) == (["BTC-PERP"], ["BTC:EHT"])


@SHARED
@pytest.mark.parametrize("method", ["parametric", "cornish_fisher", "monte_carlo"])
async def test_a_seed_is_taken_and_echoed_by_every_method(shared: Service, method: str) -> None:
    moments = {"skew": 0, "excess_kurtosis": 0} if method == "cornish_fisher" else {}
    reply = await var(shared, positions=LONG, vols={"BTC": 0.6}, method=method, seed=17, **moments)
    assert (reply["method"], reply["seed"]) == (method, 17)


@SHARED
@pytest.mark.parametrize(
    ("body", "pointer", "code"),
    [
        ({}, "/positions", "missing_field"),
        ({"positions": LONG, "book": "account"}, "/positions", "not_allowed"),
        ({"book": "somebody"}, "/book", "invalid_value"),
        ({"positions": LONG, "confidence": 1}, "/confidence/0", "out_of_range"),
        ({"positions": LONG, "confidence": [0.5]}, "/confidence/0", "out_of_range"),
        ({"positions": LONG, "confidence": []}, "/confidence", "too_many_items"),
        ({"positions": LONG, "confidence": [0.9] * 21}, "/confidence", "too_many_items"),
        ({"positions": LONG, "horizon_days": 1, "horizon_hours": 24}, "/horizon_hours", "not_allowed"),
        ({"positions": LONG, "horizon_days": 0}, "/horizon_days", "out_of_range"),
        ({"positions": LONG, "horizon_hours": 1e9}, "/horizon_hours", "out_of_range"),
        ({"positions": LONG, "window_days": 59}, "/window_days", "invalid_value"),
        ({"positions": LONG, "method": "guess"}, "/method", "invalid_value"),
        ({"positions": LONG, "paths": 1000}, "/paths", "not_allowed"),
        ({"positions": LONG, "method": "monte_carlo", "paths": 1_000_001}, "/paths", "out_of_range"),
        ({"positions": LONG, "method": "monte_carlo", "paths": 10}, "/paths", "out_of_range"),
        ({"positions": LONG, "method": "monte_carlo", "seed": -1}, "/seed", "out_of_range"),
        ({"positions": LONG, "seed": 2**63}, "/seed", "out_of_range"),
        ({"positions": LONG, "method": "monte_carlo", "nu": 4}, "/nu", "not_allowed"),
        ({"positions": LONG, "method": "historical", "age_decay": 0.97}, "/age_decay", "not_allowed"),
        (
            {"positions": LONG, "method": "historical", "weighting": "age_weighted", "volatility_decay": 0.9},
            "/volatility_decay",
            "not_allowed",
        ),
        ({"positions": LONG, "volatility_decay": 0.9}, "/volatility_decay", "not_allowed"),
        (
            {"positions": LONG, "method": "monte_carlo", "distribution": "student_t", "nu": 2},
            "/nu",
            "out_of_range",
        ),
        ({"positions": LONG, "z": [1.6, 2.3, 3]}, "/z", "wrong_length"),
        ({"positions": LONG, "z": [1.6, 0]}, "/z/1", "out_of_range"),
        ({"positions": LONG, "regime": "panic"}, "/regime", "invalid_value"),
        ({"positions": LONG, "regime": "normal", "correlation": {}}, "/regime", "not_allowed"),
        ({"positions": LONG, "regime": "normal", "covariance": "ewma"}, "/regime", "not_allowed"),
        ({"positions": LONG, "correlation": {}, "covariance": "sample"}, "/correlation", "not_allowed"),
        ({"positions": LONG, "correlation": {"A": {"B": 2}}}, "/correlation/A/B", "invalid_value"),
        ({"positions": LONG, "correlation": {"A": {"A": 0.5}}}, "/correlation/A/A", "not_a_correlation"),
        (
            {"positions": LONG, "correlation": {"A": {"B": 0.5}, "B": {"A": 0.4}}},
            "/correlation/B/A",
            "not_symmetric",
        ),
        ({"positions": LONG, "vols": {"BTC": -1}}, "/vols/BTC", "invalid_value"),
        ({"positions": LONG, "services": {"trading": 1}}, "/services/trading", "not_allowed"),
        ({"positions": LONG, "services": {"casino": 1}}, "/services/casino", "wrong_length"),
        ({"positions": LONG, "confidence": 0.9, "services": {"casino": -1}}, "/services/casino", "out_of_range"),
        ({"positions": LONG, "services": {"Casino!": [1, 1]}}, "/services", "invalid_value"),
        (
            {"positions": [], "liabilities": [{"asset": "NOPRICE", "amount": 1}]},
            "/liabilities/0/price",
            "missing_price",
        ),
        ({"positions": LONG, "nonsense": 1}, "/nonsense", "unknown_field"),
    ],
)
async def test_what_is_refused(shared: Service, body: dict[str, Any], pointer: str, code: str) -> None:
    found = problem(await shared.post(VAR, json=body), 422, code)
    assert [e["pointer"] for e in found["errors"]] == [pointer]


@SHARED
async def test_work_is_bounded(shared: Service) -> None:
    expiry = "2060-01-01T00:00:00Z"
    option = {
        "underlying": "BTC",
        "type": "call",
        "side": "long",
        "size": 1,
        "strike": 9e4,
        "expiry": expiry,
        "iv": 0.5,
    }
    body = {"positions": [option] * 1000, "market": {"prices": {"BTC": 6e4}}, "vols": {}}
    problem(await shared.post(VAR, json={**body, "method": "monte_carlo", "paths": 1_000_000}), 422, "too_much_work")
    rows = [{"symbol": "BTC-PERP", "side": "long", "size": 1, "mark_price": 6e4}] * 5_000
    confidences = [0.9 + k / 1000 for k in range(20)]
    problem(await shared.post(VAR, json={"positions": rows, "confidence": confidences}), 422, "too_much_work")
    coins = [{"asset": f"C{k}", "amount": 1, "price": 1} for k in range(501)]
    problem(await shared.post(VAR, json={"collateral": coins}), 422, "too_many_underlyings")


@SHARED
async def test_a_book_of_nothing_loses_nothing(shared: Service) -> None:
    for method in ("parametric", "monte_carlo"):
        reply = await var(shared, positions=[], collateral=[{"asset": "USDC", "amount": 5}], method=method)
        assert [(r["var"], r["es"]) for r in reply["results"]] == [(0, 0), (0, 0)]


async def test_open_escrows_are_a_service_of_the_account(service: Service) -> None:
    """BTC to come and ETH to go, at volatilities of .65 and .80 and a correlation of .95, over a day at 99 %."""
    await service.prices(BTC=60_000, ETH=3_000)
    alice, bob = await service.agent("Alice"), await service.agent("Bob")
    await alice.deposit(USDC=50_000, ETH=10)
    await bob.deposit(BTC=1)
    body = {"book": "account", "covariance": "given", "confidence": 0.99}
    assert "services" not in await alice.post("/quotes/var", body)
    terms = {"timeout_seconds": 3_600, "on_timeout": "refund", "fee_payer": "payee"}
    paid = await bob.post("/escrows", terms | {"payee": alice.id, "asset": "BTC", "amount": "0.5"})
    big = {"payee": alice.id, "amount": "0.01", "asset": "BTC", "counter_leg": {"asset": "ETH", "amount": 10**9}}
    await bob.post("/escrows", terms | big)
    assert "services" not in await alice.post("/quotes/var", body)  # whatever a stranger offers, until it is accepted
    await alice.post(f"/escrows/{paid['id']}/confirm", {})
    swap = {"payee": bob.id, "asset": "ETH", "amount": 4, "counter_leg": {"asset": "USDC", "amount": 12_000}}
    await alice.post("/escrows", terms | swap)
    (found,) = (await alice.post("/quotes/var", body))["services"]
    btc, eth = 30_000 * 0.65, -12_000 * 0.80
    own = 2.3263478740408408 * (btc**2 + eth**2 + 2 * 0.95 * btc * eth) ** 0.5 / 365**0.5
    trading = 2.3263478740408408 * 30_000 * 0.80 / 365**0.5
    together = (own**2 + trading**2 + 2 * 0.11 * own * trading) ** 0.5
    assert float(found["var"]) == pytest.approx(together, rel=1e-9)
    assert sum(map(float, found["components"].values())) == pytest.approx(together, rel=1e-9)
    (given,) = (await alice.post("/quotes/var", body | {"services": {"escrow": 1}}))["services"]
    assert float(given["var"]) == pytest.approx((1 + trading**2 + 2 * 0.11 * trading) ** 0.5, rel=1e-9)
    (his,) = (await bob.post("/quotes/var", body))["services"]
    assert set(his["components"]) == {"trading", "escrow"}
