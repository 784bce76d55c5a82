"""Is the account read fast? GET /api/account over HTTP against a bare asyncpg pool that reads the same rows.

One process serves; both sides are asked by 16 callers at once, in turns, in one run. All share one core with the
client, but for Postgres, which has what the machine leaves it.

While neither book nor market changes, reads share one assessment; the last line has a price posted every 10 ms, by
the same client.

Run with `make bench`, or `python -m benchmarks.account`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
from rich.console import Console
from rich.progress import track
from rich.table import Table

from app.db import embedded
from app.services.book import BOOK_QUERY
from benchmarks.http import KEY, Server, pin_to_one_core, server

CALLERS = 16
POSITIONS = 10
ROUNDS = 5
SECONDS_A_TURN = 1.0
TARGET = "0.30"
COINS = {"BTC": 88_500, "ETH": 2_840, "SOL": 131, "BNB": 842, "XRP": 2}
COINS |= {"ADA": 1, "DOT": 7, "LTC": 90, "UNI": 9, "ETC": 20}


def main() -> None:
    """Print the table."""
    pin_to_one_core()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        home = Path(directory)
        served = stack.enter_context(server("quote", home))
        agent_id, key = _fill(served)
        url = stack.enter_context(embedded.start(home / "data")).url
        asyncio.run(_compare(served, url, agent_id, key))


def _fill(served: Server) -> tuple[str, str]:
    """Make an agent with ten open positions, and return its id and key."""
    made = _call(served, KEY, "POST", "/api/agents", {"name": "benchmark"})
    agent_id, key = made["agent_id"], made["api_key"]
    _call(served, KEY, "POST", "/api/market/prices", {"prices": COINS})
    _call(served, key, "POST", "/api/wallet/deposits", {"asset": "USDC", "amount": 1_000_000})
    for coin, price in list(COINS.items())[:POSITIONS]:
        size = str(round(Decimal(20_000) / price, 3))
        _call(served, key, "POST", "/api/orders", {"symbol": f"{coin}-PERP", "side": "buy", "size": size})
    return agent_id, key


def _call(served: Server, key: str, method: str, path: str, body: Any) -> Any:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.port}{path}", json.dumps(body).encode(), headers, method=method
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


async def _compare(served: Server, url: str, agent_id: str, key: str) -> None:
    async with asyncpg.create_pool(url, min_size=CALLERS, max_size=CALLERS) as pool:

        async def read() -> None:
            await pool.fetchval(BOOK_QUERY, agent_id)

        rivals: dict[str, Callable[[], Awaitable[float]]] = {
            "bare asyncpg pool, the same statement": lambda: _rate([read] * CALLERS),
            "GET /api/account": lambda: _http_rate(served.port, key),
            "GET /api/account, prices moving": lambda: _moving_rate(served.port, key),
        }
        best = dict.fromkeys(rivals, 0.0)
        for _ in track(range(ROUNDS), description="account"):
            for name, rate in rivals.items():
                best[name] = max(best[name], await rate())
    table = Table("read", "a second", "of asyncpg", title=f"an account with {POSITIONS} positions, target {TARGET}")
    base = next(iter(best.values()))
    for name, figure in best.items():
        table.add_row(name, f"{figure:,.0f}", f"{figure / base:.2f}")
    Console(width=120).print(table)


async def _moving_rate(port: int, key: str) -> float:
    """Return the rate while the market changes a hundred times a second."""
    post = asyncio.create_task(_post_prices(port))
    try:
        return await _http_rate(port, key)
    finally:
        post.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await post


async def _post_prices(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for step in itertools.count(1):
        body = json.dumps({"prices": {"BTC": COINS["BTC"] + step % 100}}).encode()
        head = f"POST /api/market/prices HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(answer.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
        await asyncio.sleep(0.01)


async def _rate(calls: list[Callable[[], Awaitable[None]]]) -> float:
    """Return the calls a second of callers that each call again as soon as they are answered."""
    deadline = time.perf_counter() + SECONDS_A_TURN

    async def caller(call: Callable[[], Awaitable[None]]) -> int:
        count = 0
        while time.perf_counter() < deadline:
            await call()
            count += 1
        return count

    started = time.perf_counter()
    counts = await asyncio.gather(*map(caller, calls))
    return sum(counts) / (time.perf_counter() - started)


async def _http_rate(port: int, key: str) -> float:
    raw = f"GET /api/account HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CALLERS)]

    def asker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Callable[[], Awaitable[None]]:
        async def ask() -> None:
            writer.write(raw)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"unexpected reply: {head[:200]!r}")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))

        return ask

    rate = await _rate([asker(reader, writer) for reader, writer in streams])
    for _, writer in streams:
        writer.close()
    return rate


if __name__ == "__main__":
    main()
