"""Bodies of a margin quote, as text so that tests can spoil them."""

from __future__ import annotations

from typing import Any

LINEAR: dict[str, Any] = {
    "symbol": "BTC-PERP",
    "side": "long",
    "size": 1,
    "entry_price": 60000,
    "mark_price": 61000,
    "leverage": 3,
}
GREEKS: dict[str, Any] = {"symbol": "BTC-X", "notional": 10000, "delta": 1.0, "gamma": 0.001, "vega": 50}
OPTION: dict[str, Any] = {
    "underlying": "BTC",
    "type": "call",
    "strike": 70000,
    "expiry": "2027-06-25T08:00:00Z",
    "side": "short",
    "size": 1,
    "iv": 0.45,
}
AS_OF = "2027-01-01T00:00:00Z"
ALL_MODELS = ["isolated", "cross", "scenario", "portfolio", "span"]

WORKED: dict[str, Any] = {
    "positions": [LINEAR],
    "collateral": [{"asset": "USDC", "amount": 20000}, {"asset": "BTC", "amount": 0.5}],
}
EVERYTHING: dict[str, Any] = {
    "positions": [
        LINEAR | {"id": "a", "margin_mode": "cross"},
        {"symbol": "ETH-PERP", "side": "short", "size": 9, "entry_price": 2900, "mark_price": 2840, "leverage": 3},
        LINEAR | {"symbol": "SOL-PERP", "mark_price": 150, "margin_mode": "isolated", "allocated_collateral": 500},
        GREEKS,
        OPTION,
        OPTION | {"type": "put", "side": "long", "strike": 55000, "rate": 0.02, "forward": 61100},
    ],
    "collateral": [{"asset": "USDC", "amount": 50000, "lent": 100}, {"asset": "BTC", "amount": 0.5}],
    "liabilities": [{"asset": "USDT", "amount": 100, "price": 1.001}],
    "reservations": [{"service": "casino", "amount": 250}],
    "models": ALL_MODELS,
    "scenarios": [{"price_move": -0.1, "vol_move": 0.25}, {"shocks": {"BTC": 0.1, "ETH": -0.15}, "weight": 0.5}],
    "regime": "sell_off",
    "market": {
        "prices": {"BTC": 61050},
        "assets": {"BTC": {"haircut": 0.1}},
        "instruments": {"BTC-X": {"initial_margin_rate": 0.4}},
        "correlation": {"BTC": {"ETH": 0.9}},
        "hedge_correlation": {"BTC": {"ETH": 0.5}},
        "span_charges": {"BTC": {"intra_commodity": 10}},
        "venues": {
            "deribit": {"BTC": {"mmp": 0.06, "parameters": {"price_range": 0.2, "extended_moves": [0.5, -0.5]}}},
            "okx": {"ETH": {"mr2": 10, "parameters": {"minimum_tiers": [[0, 1], [1000, 2]]}}},
            "derive": {"BTC": {"cash": -5, "confidence": 0.9}},
            "paradex": {"SOL": {"fee_provision": 3}},
        },
    },
    "settings": {"margin_mode": "cross", "target_utilization": 0.5},
    "as_of": AS_OF,
    "name": "everything",
}
