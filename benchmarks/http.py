"""Is a quote over HTTP fast? The service against an empty FastAPI route and a bare ASGI reply, in one run.

Each server is one process of uvicorn with the same options; `guarded` is the service's own server, with an empty route
in place of the quote. The route reads the same body and answers `{}`; the
ASGI app reads it and answers as many bytes as the quote does. Rivals take turns, over as many keep-alive
connections, all on one core with the client.

Two ratios are shown: of requests a second, and of the server's own processor time a request, which other load on the
machine does not change. Each is the median over the rounds, in which one turn stands beside the other: the best turn of
each says more of luck, since an empty route's rate sways by a fifth from one second to the next.

Run with `make bench`, or `python -m benchmarks.http`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.books import book

CONNECTIONS = 8
SECONDS_A_TURN = 1.0
ROUNDS = 9
KEY = "a-key-for-the-benchmark-only"
RIVALS = ("guarded", "fastapi", "asgi")


def books() -> list[tuple[str, dict[str, Any], str]]:
    """Return what is quoted: a label, the request, the target as a share of an empty route's rate."""
    targets = {10: "0.30", 100: "0.20", 1_000: "0.07"}
    linear = [(f"{n:,} linear", book(n, greeks_every=0), target) for n, target in targets.items()]
    return [*linear, ("1,000, a fifth greeks", book(1_000), ""), ("10, two of them options", book(10, options=2), "")]


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its port and its process."""

    port: int
    process: psutil.Process

    def busy_seconds(self) -> float:
        """Return the processor time that it has used so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests a second, and processor seconds a request, of one turn."""

    a_second: float
    busy: float


Turns = Mapping[str, Sequence[Rate]]
"""The turns of each server, in the order of the rounds."""


def main() -> None:
    """Print the table."""
    pin_to_one_core()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        # the API alone, as its rivals are; a worker in the same process takes some 5 % of a core beside it
        servers = {name: stack.enter_context(server(name, Path(directory), verb="api")) for name in ("quote", *RIVALS)}
        table = Table("book", "quotes/s", "CPU, µs", title="a quote over HTTP, as a share of what a rival does")
        for name in RIVALS:
            table.add_column(f"of {name}: rate", justify="right")
            table.add_column("CPU", justify="right")
        table.add_column("target")
        for label, body, target in books():
            turns = measure(servers, json.dumps(body).encode(), label)
            ours = turns["quote"]
            cells = [
                f"{statistics.median(turn.a_second for turn in ours):,.0f}",
                f"{statistics.median(turn.busy for turn in ours) * 1e6:,.0f}",
            ]
            for name in RIVALS:
                cells += [
                    f"{_share(turns, name, lambda ours, other: ours.a_second / other.a_second):.3f}",
                    f"{_share(turns, name, lambda ours, other: other.busy / ours.busy):.2f}",
                ]
            table.add_row(label, *cells, target)
        Console(width=120).print(table)


def pin_to_one_core() -> None:
    """Share one core between client and servers, so that rates count the client's work on both sides alike."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _share(turns: Turns, rival: str, ratio: Callable[[Rate, Rate], float]) -> float:
    """Return the median of the ratio over the rounds."""
    return statistics.median(ratio(ours, other) for ours, other in zip(turns["quote"], turns[rival], strict=True))


def measure(servers: dict[str, Server], body: bytes, label: str) -> Turns:
    """Return the rates of each server, which take turns."""
    size = 0
    found: dict[str, list[Rate]] = {name: [] for name in servers}
    for _ in track(range(ROUNDS), description=label):
        for name, target in servers.items():
            path = f"/?bytes={size}" if name == "asgi" else "/api/quotes/margin"
            busy, started = target.busy_seconds(), time.perf_counter()
            count, length = asyncio.run(load(target.port, request(path, body)))
            seconds, busy = time.perf_counter() - started, target.busy_seconds() - busy
            size = length if name == "quote" else size
            found[name].append(Rate(count / seconds, busy / count))
    return found


def request(path: str, body: bytes) -> bytes:
    """Return the bytes of one POST."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


async def load(port: int, raw: bytes) -> tuple[int, int]:
    """Return the requests answered over all connections in one turn, and the size of a reply."""
    deadline = time.perf_counter() + SECONDS_A_TURN
    results = await asyncio.gather(*(_connection(port, raw, deadline) for _ in range(CONNECTIONS)))
    return sum(count for count, _ in results), results[0][1]


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
def server(
    name: str, directory: Path, settings: Mapping[str, str] | None = None, verb: str = "serve"
) -> Iterator[Server]:
    """Run one of the servers on a free port, with settings of ours where they matter, and stop it by its pid.

    The service itself is started by `verb`: `serve` with a worker, `api` without.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PRIMERISK_DATA_DIR": str(directory / "data"),
        "PRIMERISK_ADMIN_KEY": KEY,
        "PRIMERISK_REQUESTS_PER_SECOND": "0",
        "PRIMERISK_LOG_LEVEL": "warning",
        **(settings or {}),
    }
    command = ["-m", "app.cli", verb, "--port", str(port)]
    if name == "guarded":
        command = ["-m", "benchmarks.baselines", str(port)]
    elif name != "quote":
        command = ["-m", "uvicorn", f"benchmarks.baselines:{name}", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait(port, process)
        yield Server(port, psutil.Process(process.pid))
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
