"""Hostile URLs: none of them is ever connected to, whether it is refused when it is stored or when it is sent to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest

from app.db.session import Clock
from app.errors import InvalidError
from app.services.addresses import checked_url, is_public
from app.services.outbox import Claim, Outcome
from app.services.sender import Resolve, Sender
from tests.database import make_settings
from tests.receiver import receiving

HOSTILE = [
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://[::1]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[64:ff9b::7f00:1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/",
    "http://100.64.0.1/",
    "http://192.0.0.1/",
    "http://198.18.0.1/",
    "http://224.0.0.1/",
    "http://[fe80::1%25lo]/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_INFO",
    "http://127.0.0.1.:{port}/",
    "http://LOCALHOST.:{port}/",
    "http://x.localhost:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[::]:{port}/",
    "http://127.0.0.1:{port}#@1.1.1.1/",
    "http://1.1.1.1@127.0.0.1:{port}/",
    "http://0x7f.1:{port}/",
    "//127.0.0.1:{port}/",
    "http://:{port}/",
    "http://[::1:{port}/",
    "http://a b:{port}\n/",
    "https://[::1]@/",
    "https://[::1]@:{port}/",
    "http://[::1]x@y:{port}/",
    "",
]
"""Of shared/data/hostile_urls.txt, and some more."""

BY_NAME = ["loop.test", "internal.test", "mixed.test", "rebind.test"]
PUBLIC = "3000::1"
"""Counts as public, and is given to nobody: no packet of a test leaves this network."""

_NAMES = {
    "loop.test": [["127.0.0.1"]],
    "internal.test": [["10.0.0.5"]],
    "mixed.test": [[PUBLIC, "127.0.0.1"]],
    "rebind.test": [[PUBLIC], ["127.0.0.1"]],
}


def resolver() -> Resolve:
    """Return a look-up that knows the names of the list, and asks the system for every other."""
    looked_up = dict.fromkeys(_NAMES, 0)

    async def resolve(host: str, port: int) -> Sequence[tuple[Any, ...]]:
        if host == "gone.test":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        if host not in _NAMES:
            return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        answers = _NAMES[host]
        found = answers[min(looked_up[host], len(answers) - 1)]
        looked_up[host] += 1
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in found
        ]

    return resolve


class Listener:
    """A server on loopback, IPv4 and IPv6, that counts who comes."""

    def __init__(self) -> None:
        self.connections = 0
        self.port = 0

    def accept(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.close()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    made = Listener()
    four = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    made.port = four.sockets[0].getsockname()[1]
    servers = [four]
    if socket.has_ipv6:
        with suppress(OSError):  # a machine without IPv6
            servers.append(await asyncio.start_server(made.accept, "::1", made.port))
    yield made
    for server in servers:
        server.close()
        await server.wait_closed()


def _claim(url: str) -> Claim:
    now = datetime(2026, 11, 22, tzinfo=UTC)
    return Claim(1, "t", "wh", "agent", url, "whsec_AAAA", None, "evt_1", "zone.changed", now, "{}", 0, 0, None)


async def _sent(url: str, times: int = 1, **settings: Any) -> Outcome:
    clock = Clock()
    clock.set(datetime(2026, 11, 22, tzinfo=UTC))
    given = make_settings(**{"webhook_seconds_max": 0.5} | settings)
    for _ in range(times):
        async with Sender(given, clock, look_up) as sender:
            outcome = await sender.send(_claim(url))
    return outcome


look_up = resolver()


@pytest.mark.parametrize("pattern", HOSTILE)
async def test_a_hostile_url_is_not_stored(pattern: str) -> None:
    with pytest.raises(InvalidError) as refused:
        checked_url(pattern.format(port=8080), allow_private=False)
    assert refused.value.code in ("invalid_url", "private_address")
    assert refused.value.errors[0].pointer == "/url"


@pytest.mark.parametrize("pattern", [*HOSTILE, *(f"http://{name}:{{port}}/" for name in BY_NAME)])
async def test_a_hostile_url_is_not_connected_to(listener: Listener, pattern: str) -> None:
    """Also where it came into the table all the same."""
    outcome = await _sent(pattern.format(port=listener.port), times=2)
    assert listener.connections == 0
    assert outcome.status is None
    assert outcome.error


@pytest.mark.parametrize("name", BY_NAME)
async def test_a_name_that_leads_inside_is_called_so(listener: Listener, name: str) -> None:
    outcome = await _sent(f"http://{name}:{listener.port}/", times=2)
    assert outcome.error == "private address"
    assert listener.connections == 0


async def test_a_name_that_nobody_knows_and_a_server_without_tls(listener: Listener) -> None:
    assert (await _sent(f"http://gone.test:{listener.port}/")).error == "the name was not found"
    async with receiving() as receiver:
        tls = await _sent(f"https://127.0.0.1:{receiver.port}/", webhook_allow_private=True)
        assert tls.error == "TLS failed"
    free = await asyncio.start_server(listener.accept, "127.0.0.1", 0)
    port = free.sockets[0].getsockname()[1]
    free.close()
    assert (await _sent(f"http://127.0.0.1:{port}/", webhook_allow_private=True)).error == "no connection"


async def test_where_it_is_allowed_the_listener_is_reached(listener: Listener) -> None:
    """Else the tests above would pass for any reason."""
    for url in ("http://127.0.0.1:{}/", "http://loop.test:{}/", "http://localhost:{}/", "http://0x7f000001:{}/"):
        before = listener.connections
        await _sent(url.format(listener.port), webhook_allow_private=True)
        assert listener.connections > before, url


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True),
        ("93.184.216.34", True),
        (PUBLIC, True),
        ("2606:4700:4700::1111", True),
        ("2a00:1450:4001:81b::200e", True),
        ("10.255.255.255", False),
        ("11.0.0.0", True),
        ("172.15.255.255", True),
        ("172.16.0.0", False),
        ("172.31.255.255", False),
        ("172.32.0.0", True),
        ("192.167.255.255", True),
        ("192.168.0.1", False),
        ("100.63.255.255", True),
        ("100.127.255.255", False),
        ("223.255.255.255", True),
        ("224.0.0.0", False),
        ("255.255.255.255", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("2001::1", False),
        ("2001:200::1", True),
        ("2001:db8::1", False),
        ("2002:a00:1::", False),
        ("64:ff9b:1::7f00:1", False),
        ("::ffff:1.1.1.1", False),
        ("loop.test", False),
        ("", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("https://example.com", "https://example.com"),
        ("HTTPS://EXAMPLE.com/Hook?a=1#part", "https://example.com/Hook?a=1"),
        ("http://example.com:8080/x", "http://example.com:8080/x"),
        ("https://bücher.example/ü", "https://xn--bcher-kva.example/%C3%BC"),
        ("https://1.1.1.1/", "https://1.1.1.1/"),
    ],
)
def test_urls_are_stored_as_they_are_asked_for(given: str, stored: str) -> None:
    assert checked_url(given, allow_private=False) == stored
    assert checked_url(given, allow_private=True) == stored


@pytest.mark.parametrize("url", ["ftp://example.com/", "https://u:p@example.com/", "https://example.com/" + "a" * 2000])
def test_what_is_refused_even_where_private_addresses_are_allowed(url: str) -> None:
    with pytest.raises(InvalidError):
        checked_url(url, allow_private=True)
