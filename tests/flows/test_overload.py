"""More heavy work than a process has threads for: what is refused, what goes on, and how it still ends."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.bodies import OPTION, WORKED
from tests.api.service import MARGIN, problem
from tests.flows.process import Home, home, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.flows.process import Greeting

UNDERLYINGS = 60
HEAVY = {  # minutes of work
    "positions": [OPTION | {"underlying": f"A{i}"} for i in range(UNDERLYINGS) for _ in range(20)],
    "market": {"prices": {f"A{i}": 61_000 for i in range(UNDERLYINGS)}},
    "settings": {"margin_mode": "portfolio"},
}
SETTINGS = {
    "PRIMERISK_HEAVY_THREADS": "1",
    "PRIMERISK_HEAVY_WAITING_MAX": "1",
    "PRIMERISK_QUOTE_MILLISECONDS_MAX": "1e9",
}


@pytest.fixture
def place() -> Iterator[Home]:
    with home() as made:
        yield made


def _ask(greeting: Greeting, stack: ExitStack) -> socket.socket:
    """Ask for a heavy quote and leave the connection open."""
    address = urlsplit(greeting.address)
    connection = stack.enter_context(socket.create_connection((address.hostname or "", address.port or 0)))
    body = json.dumps(HEAVY).encode()
    lines = [f"POST {MARGIN} HTTP/1.1", "Host: x", f"Authorization: Bearer {greeting.key}"]
    connection.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    return connection


def test_heavy_quotes_are_bounded_and_hold_up_neither_others_nor_the_end(place: Home) -> None:
    with serving(place, **SETTINGS) as served, ExitStack() as stack:
        headers = {"Authorization": f"Bearer {served.greeting.key}"}
        for _ in range(2):
            connection = _ask(served.greeting, stack)
            connection.settimeout(1)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        url = f"{served.greeting.address}{MARGIN}"
        refused = httpx.post(url, json=HEAVY, headers=headers, timeout=10)
        problem(refused, 503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert httpx.post(url, json=WORKED, headers=headers).status_code == 200
        served.process.send_signal(signal.SIGINT)
        assert served.stop(signal.SIGINT) == 0
    assert place.servers() == []


def test_a_head_without_end_is_cut_off(place: Home) -> None:
    with serving(place) as served:
        address = urlsplit(served.greeting.address)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
            with suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(b"a" * 1_000_000)
            answer = b""
            with suppress(ConnectionError):
                while part := connection.recv(65_536):
                    answer += part
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b'"headers_too_large"' in answer
        assert httpx.get(f"{served.greeting.address}/healthz").status_code == 200
        served.stop(signal.SIGINT)
