"""Books to measure on, made from a seed, and the plain double loop that they are measured against."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from typing import Any

AS_OF = datetime(2026, 11, 21, tzinfo=UTC)
PRICES = {"BTC": 88_500.0, "ETH": 2_840.0, "SOL": 131.0, "BNB": 842.0}


def book(
    positions: int, underlyings: int = 16, options: int = 0, greeks_every: int = 5, seed: int = 1
) -> dict[str, Any]:
    """Return a request body: options first, then linear positions with a greeks position every so many (0: none)."""
    rng = random.Random(seed)
    names = [*PRICES, *(f"COIN{k}" for k in range(underlyings - len(PRICES)))][:underlyings]
    prices = PRICES | {name: rng.uniform(0.1, 50.0) for name in names if name not in PRICES}
    marks = {name: round(price * rng.uniform(0.999, 1.001), 6) for name, price in prices.items()}
    rows = [_option(rng, names, prices) for _ in range(options)]
    rows += [
        _greeks(rng, names) if greeks_every and i % greeks_every == greeks_every - 1 else _linear(rng, names, marks)
        for i in range(positions - options)
    ]
    collateral = [{"asset": "USDC", "amount": 250_000.0 * positions}, {"asset": "BTC", "amount": 2.0}]
    market = {"prices": {name: prices[name] for name in names} | {"BTC": PRICES["BTC"]}}
    return {"positions": rows, "collateral": collateral, "market": market, "as_of": AS_OF.isoformat()}


def _linear(rng: random.Random, names: list[str], marks: dict[str, float]) -> dict[str, Any]:
    name = rng.choice(names)
    mark = marks[name]
    return {
        "symbol": f"{name}-PERP",
        "side": rng.choice(["long", "short"]),
        "size": round(rng.uniform(1_000, 50_000) / mark, 6),
        "entry_price": round(mark * rng.uniform(0.9, 1.1), 6),
        "mark_price": mark,
        "leverage": rng.choice([2, 3, 5]),
    }


def _greeks(rng: random.Random, names: list[str]) -> dict[str, Any]:
    return {
        "symbol": rng.choice(names),
        "notional": round(rng.uniform(1_000, 50_000), 2),
        "delta": round(rng.uniform(-1, 1), 4),
        "gamma": 0.001,
        "vega": round(rng.uniform(-500, 500), 2),
    }


def _option(rng: random.Random, names: list[str], prices: dict[str, float]) -> dict[str, Any]:
    name = rng.choice(names)
    return {
        "underlying": name,
        "type": rng.choice(["call", "put"]),
        "side": rng.choice(["long", "short"]),
        "size": round(rng.uniform(1_000, 20_000) / prices[name], 6),
        "strike": round(prices[name] * rng.uniform(0.7, 1.3), 6),
        "expiry": (AS_OF + timedelta(days=rng.randint(3, 180))).isoformat(),
        "iv": round(rng.uniform(0.3, 1.2), 4),
    }


def loop_pnl(rows: list[dict[str, Any]], scenarios: list[tuple[float, float]]) -> list[float]:
    """Return the profit and loss of linear and greeks rows: a plain loop over scenarios and positions."""
    results = []
    for move, vol in scenarios:
        total = 0.0
        for row in rows:
            notional = row.get("notional") or row["size"] * row["mark_price"]
            delta = row["delta"] if "delta" in row else 1.0 if row["side"] == "long" else -1.0
            gamma, vega = row.get("gamma", 0.0), row.get("vega", 0.0)
            total += delta * notional * move + 0.5 * gamma * notional * move * move + vega * vol
        results.append(total)
    return results


def loop_option_pnl(
    rows: list[dict[str, Any]], prices: dict[str, float], scenarios: list[tuple[float, float]]
) -> list[float]:
    """Return the profit and loss of option rows, revalued one by one with the standard library."""
    results = []
    for move, vol in scenarios:
        total = 0.0
        for row in rows:
            years = (datetime.fromisoformat(row["expiry"]) - AS_OF).total_seconds() / 31_536_000
            price, strike, iv = prices[row["underlying"]], row["strike"], row["iv"]
            before = _black(price, strike, years, iv, row["type"])
            after = _black(price * (1 + move), strike, years, max(iv * (1 + vol), 0.01), row["type"])
            total += (1.0 if row["side"] == "long" else -1.0) * row["size"] * (after - before)
        results.append(total)
    return results


def _black(forward: float, strike: float, years: float, iv: float, kind: str) -> float:
    deviation = iv * math.sqrt(years)
    d1 = math.log(forward / strike) / deviation + 0.5 * deviation
    sign = 1.0 if kind == "call" else -1.0
    first = 0.5 * math.erfc(-sign * d1 / math.sqrt(2.0))
    second = 0.5 * math.erfc(-sign * (d1 - deviation) / math.sqrt(2.0))
    return sign * (forward * first - strike * second)
