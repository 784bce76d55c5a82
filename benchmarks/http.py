"""Is a quote over HTTP fast? The service against an empty FastAPI route and a bare ASGI reply, in one run.

Each server is one process of uvicorn with the same options. The route reads the same body and answers `{}`; the
ASGI app reads it and answers as many bytes as the quote does. Rivals take turns on the same keep-alive connections.

Run with `make bench`, or `python -m benchmarks.http`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.books import book

CONNECTIONS = 8
SECONDS_A_TURN = 1.0
ROUNDS = 5
KEY = "a-key-for-the-benchmark-only"
TARGETS = {10: 0.30, 100: 0.20, 1_000: 0.07}


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(server(name, Path(directory))) for name in ("quote", "fastapi", "asgi")}
        table = Table("positions", *("quotes/s", "empty FastAPI route/s", "bare ASGI reply/s"))
        for name in ("of FastAPI", "target", "of ASGI"):
            table.add_column(name)
        for positions, target in TARGETS.items():
            rates = measure(servers, json.dumps(book(positions)).encode(), positions)
            quote, fastapi, asgi = (rates[name] for name in ("quote", "fastapi", "asgi"))
            table.add_row(
                f"{positions:,}", f"{quote:,.0f}", f"{fastapi:,.0f}", f"{asgi:,.0f}",
                f"{quote / fastapi:.2f}", f"{target:.2f}", f"{quote / asgi:.2f}",
            )  # fmt: skip
        Console(width=120).print(table)


def measure(servers: dict[str, int], body: bytes, positions: int) -> dict[str, float]:
    """Return the best requests a second of each server, which take turns."""
    sizes: dict[str, int] = {}
    best = dict.fromkeys(servers, 0.0)
    for _ in track(range(ROUNDS), description=f"{positions:,} positions"):
        for name, port in servers.items():
            path = f"/?bytes={sizes['quote']}" if name == "asgi" else "/api/quotes/margin"
            rate, sizes[name] = asyncio.run(load(port, request(path, body)))
            best[name] = max(best[name], rate)
    return best


def request(path: str, body: bytes) -> bytes:
    """Return the bytes of one POST."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


async def load(port: int, raw: bytes) -> tuple[float, int]:
    """Return requests a second over all connections in one turn, and the size of a reply."""
    deadline = time.perf_counter() + SECONDS_A_TURN
    started = time.perf_counter()
    results = await asyncio.gather(*(_connection(port, raw, deadline) for _ in range(CONNECTIONS)))
    return sum(count for count, _ in results) / (time.perf_counter() - started), results[0][1]


async def _connection(port: int, raw: bytes, deadline: float) -> tuple[int, int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    count, length = 0, 0
    while time.perf_counter() < deadline:
        writer.write(raw)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"unexpected reply: {head[:200]!r}")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        count += 1
    writer.close()
    return count, length


@contextlib.contextmanager
def server(name: str, directory: Path) -> Iterator[int]:
    """Run one of the servers on a free port, and stop it by its pid."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PRIMERISK_DATA_DIR": str(directory / "data"),
        "PRIMERISK_ADMIN_KEY": KEY,
        "PRIMERISK_REQUESTS_PER_SECOND": "0",
        "PRIMERISK_LOG_LEVEL": "warning",
    }
    command = ["-m", "app.cli", "serve", "--port", str(port)]
    if name != "quote":
        command = ["-m", "uvicorn", f"benchmarks.baselines:{name}", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait(port, process)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit("a server did not start")


if __name__ == "__main__":
    main()
