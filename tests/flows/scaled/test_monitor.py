"""A client's story, on two API processes by turns: a monitor that sees a price fall, and reduces in time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import httpx
import pytest

from app.db.session import Database
from tests.api.service import make_agent
from tests.flows.topology import Topology
from tests.flows.trader import ADMIN_KEY, PLAIN

ALARM, TARGET = 0.75, 0.55
STEPS_MAX = 100
SECONDS_MAX = 20.0


@dataclass(frozen=True, slots=True)
class Monitor:
    """Knows where to ask and a key, and no more of the service than the routes that it polls."""

    addresses: Iterator[str]
    key: str

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the reply; the key is the only header that is ours."""
        content = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.key}"}
        url = f"{next(self.addresses)}/api{path}"
        answer = httpx.request(method, url, content=content, headers=headers, timeout=10, verify=PLAIN)
        assert answer.status_code in (200, 201, 202), answer.text
        reply: dict[str, Any] = answer.json()
        return reply

    def usage(self) -> tuple[float, list[dict[str, Any]]]:
        """Return the share of the equity that is reserved, and what reserves it."""
        balance = self.call("GET", "/wallet/balance")
        rows = self.call("GET", "/portfolio/positions")["positions"]
        for row in rows:
            for name in ("notional_usd", "margin_reserved", "leverage"):
                assert isinstance(row[name], int | float), row
        return sum(row["margin_reserved"] for row in rows) / balance["equity"], rows

    def watch(self) -> list[str]:
        """Where the usage is over the alarm, reduce the smallest position that can be until it is at the target."""
        reduced: list[str] = []
        used, rows = self.usage()
        if used <= ALARM:
            return reduced
        while used > TARGET:
            smallest = min((r for r in rows if r["reducible"]), key=lambda r: float(r["margin_reserved"]))
            body = {"reduce_pct": 0.25, "reason": f"utilization {used:.2f}"}
            if smallest["margin_reserved"] < 50:
                body = {"reduce_pct": 1.0, "reason": "what is left of it"}
            answer = self.call("POST", f"/positions/{smallest['id']}/reduce", body)
            assert answer["id"] == smallest["id"]
            reduced.append(smallest["id"])
            assert len(reduced) < STEPS_MAX
            before, (used, rows) = used, self.usage()
            assert used < before
        return reduced


def _wait_until_seen(topology: Topology, key: str, price: float) -> None:
    """Poll until both processes show a price of BTC: each reads it from the database by itself."""
    deadline = time.monotonic() + SECONDS_MAX
    for address in topology.addresses:
        monitor = Monitor(cycle([address]), key)
        while price not in [p["current_price"] for p in monitor.call("GET", "/account")["positions"]]:
            assert time.monotonic() < deadline, address
            time.sleep(0.05)


async def test_a_monitor_reduces_in_time(topology: Topology, database: Database) -> None:
    _, key = await make_agent(database, "a fund of one")
    monitor = Monitor(cycle(topology.addresses), key)
    feed = Monitor(cycle(topology.addresses), ADMIN_KEY)
    feed.call("POST", "/market/prices", {"prices": {"BTC": 60_000, "ETH": 3_000, "SOL": 150}})
    monitor.call("POST", "/wallet/deposits", {"asset": "USDC", "amount": 20_000})
    monitor.call("POST", "/wallet/deposits", {"asset": "BTC", "amount": 0.1})
    for symbol, side, size in (("BTC-PERP", "buy", 0.6), ("ETH-PERP", "buy", 3), ("SOL-PERP", "buy", 10)):
        order = {"symbol": symbol, "side": side, "size": size, "leverage": 3, "order_type": "market"}
        assert monitor.call("POST", "/orders", order)["status"] == "filled"
    for service, amount, reducible in (("casino", 500, True), ("domains", 300, False)):
        body = {"service": service, "amount": amount, "reducible": reducible}
        monitor.call("POST", "/reservations", body)

    assert monitor.call("GET", "/wallet/balance")["usdc_balance"] == 20_000
    _wait_until_seen(topology, key, 60_000)
    calm, rows = monitor.usage()
    assert calm < ALARM
    assert {row["service"] for row in rows} == {"trading", "casino", "domains"}
    assert monitor.watch() == []

    feed.call("POST", "/market/prices", {"prices": {"BTC": 48_000, "ETH": 2_500, "SOL": 130}})
    _wait_until_seen(topology, key, 48_000)
    alarmed, rows = monitor.usage()
    assert alarmed > ALARM
    account = monitor.call("GET", "/account")
    assert account["health"]["utilization"] == pytest.approx(alarmed)
    assert account["health"]["zone"] in ("ORANGE", "RED")

    reduced = monitor.watch()
    kept = {row["id"]: row for row in rows if not row["reducible"]}
    assert len(reduced) >= 2
    assert not kept.keys() & set(reduced)
    used, left = monitor.usage()
    assert used <= TARGET
    assert {row["id"]: row for row in left if row["id"] in kept} == kept
    account = monitor.call("GET", "/account")
    assert account["health"]["zone"] == "GREEN"
    assert account["health"]["utilization"] == pytest.approx(used)
    assert monitor.watch() == []

    # what was lost is what the ledger says, to the last digit
    entries = monitor.call("GET", "/wallet/ledger")["entries"]
    moved = sum(entry["change"] for entry in entries if entry["asset"] == "USDC")
    assert monitor.call("GET", "/wallet/balance")["usdc_balance"] == pytest.approx(moved, abs=1e-9)
    orders = monitor.call("GET", "/orders")["orders"]
    assert moved == pytest.approx(20_000 + sum(order["realized_pnl"] for order in orders), abs=1e-6)
    assert all(order["reduce_only"] and order["reason"] for order in orders[:-3])
