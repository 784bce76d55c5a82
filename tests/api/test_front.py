"""What stands before the application on the wire: heads too large or too slow, no HTTP, too many connections."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from app.db.session import parse_database_url
from tests.api.service import ADMIN_KEY, MARGIN
from tests.api.wire import problem_read, serving
from tests.postgres import fresh_database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL

ALIVE = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
POST = f"POST {MARGIN} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN_KEY}\r\n".encode()
LARGE = (431, "headers_too_large")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(postgres_server: str, database_template: str) -> AsyncIterator[int]:
    async with (
        fresh_database(postgres_server, database_template) as url,
        serving(parse_database_url(url), header_seconds_max=0.5, connections_max=5) as port,
    ):
        yield port


pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def _connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _refusal(port: int, *sent: bytes, pause: float = 0.0) -> tuple[int, str]:
    """Send the parts, a refusal or not, and return status and code of the answer, the last on its connection."""
    async with _connection(port) as (reader, writer):
        with suppress(ConnectionError):  # it may be cut off before all is sent
            for part in sent:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
        status, document = await problem_read(reader)
        async with asyncio.timeout(5):
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
    return status, document["code"]


async def _status(reader: asyncio.StreamReader) -> int:
    """Read one whole answer."""
    async with asyncio.timeout(5):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
    return int(head.split()[1])


async def _ask_on(writer: asyncio.StreamWriter) -> None:
    """Ask for more and more, for some seconds."""
    for _ in range(5_000):
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


def _chunk(body: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(body), extension, body)


async def test_heads_of_any_shape_are_bounded(port: int) -> None:
    kilobytes = [b"a" * 1_000] * 1_000
    lines = [b"X-%d: %s\r\n" % (i, b"a" * 1_000) for i in range(1_000)]
    assert await _refusal(port, ALIVE[:-2], *lines) == LARGE
    assert await _refusal(port, ALIVE[:-2], b"X: ", *kilobytes) == LARGE
    assert await _refusal(port, ALIVE[:-2], *kilobytes) == LARGE
    assert await _refusal(port, b"GET /", *kilobytes) == LARGE
    assert await _refusal(port, ALIVE[:-2], b"".join(lines[:100]), b"\r\n") == LARGE
    assert await _refusal(port, ALIVE[:-2] + b"".join(lines[:66]) + b"\r\n") == LARGE


async def test_what_follows_the_head_is_bounded_as_well(port: int) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    lines = [b"X-%d: %s\r\n" % (i, b"a" * 1_000) for i in range(1_000)]
    assert await _refusal(port, head, _chunk(b"{"), b"0\r\n", *lines) == LARGE
    assert await _refusal(port, head, _chunk(b"{"), b"1;", *[b"a" * 1_000] * 1_000) == LARGE


async def test_a_head_below_the_limit_is_read(port: int) -> None:
    async with _connection(port) as (reader, writer):
        for _ in range(3):
            writer.write(ALIVE[:-2] + b"X: " + b"a" * 65_000 + b"\r\n\r\n")
            assert await _status(reader) == 200


async def test_bodies_are_not_heads(port: int) -> None:
    """A body in one piece with its head, in many pieces, in many small chunks."""
    body = b'{"positions":[]' + b" " * 300_000 + b"}"
    declared = POST + b"Content-Length: %d\r\n\r\n" % len(body)
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    small = [_chunk(body[at : at + 2]) for at in range(0, len(body), 2)]
    async with _connection(port) as (reader, writer):
        for parts in (
            [declared + body],
            [declared, *(body[at : at + 50_000] for at in range(0, len(body), 50_000))],
            [chunked, *small, b"0\r\n\r\n"],
        ):
            for part in parts:
                writer.write(part)
                await writer.drain()
            assert await _status(reader) == 200


async def test_heads_that_do_not_come(port: int) -> None:
    assert await _refusal(port, ALIVE[:10]) == (408, "headers_too_slow")
    assert await _refusal(port, *[ALIVE[i : i + 1] for i in range(10)], pause=0.1) == (408, "headers_too_slow")
    async with _connection(port) as (reader, _), asyncio.timeout(5):
        assert await reader.read() == b""
    async with _connection(port) as (reader, writer):  # the second request of a connection
        writer.write(ALIVE)
        assert await _status(reader) == 200
        writer.write(ALIVE[:10])
        assert (await problem_read(reader))[1]["code"] == "headers_too_slow"


async def test_blank_lines_do_not_keep_a_connection(port: int) -> None:
    async with _connection(port) as (reader, writer):
        writer.write(ALIVE)
        assert await _status(reader) == 200
        writer.write(b"\r\n\r\n")
        async with asyncio.timeout(5):
            await reader.read()


async def test_an_idle_connection_that_has_asked_is_kept(port: int) -> None:
    async with _connection(port) as (reader, writer):
        for _ in range(2):
            writer.write(ALIVE)
            assert await _status(reader) == 200
            await asyncio.sleep(0.8)


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        POST + b"Content-Length: x\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
    ],
)
async def test_what_is_no_http_is_answered_with_a_problem(port: int, sent: bytes) -> None:
    assert await _refusal(port, sent) == (400, "not_http")


async def test_two_requests_at_once_are_answered_in_turn(port: int) -> None:
    async with _connection(port) as (reader, writer):
        writer.write(ALIVE * 2)
        assert [await _status(reader), await _status(reader)] == [200, 200]


async def test_connections_are_bounded(port: int) -> None:
    opened = []
    try:
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(ALIVE)
            assert await _status(reader) == 200
            opened.append(writer)
        assert await _refusal(port, ALIVE) == (503, "overloaded")
    finally:
        for writer in opened:
            writer.close()
            await writer.wait_closed()
    async with _connection(port) as (reader, writer):
        writer.write(ALIVE)
        assert await _status(reader) == 200


@pytest.mark.asyncio(loop_scope="function")
async def test_a_caller_that_does_not_read_is_cut_off(database_url: URL) -> None:
    async with serving(database_url, send_seconds_max=0.3) as port, _connection(port) as (reader, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # as sockets' transports can
        with pytest.raises(ConnectionError):
            await _ask_on(writer)
        assert reader.at_eof() is False  # nothing was read
