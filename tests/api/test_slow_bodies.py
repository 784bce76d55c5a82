"""Bodies that trickle, lie about their length or never end: a real server on a real socket."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests.api.service import ADMIN_KEY, MARGIN
from tests.api.wire import problem_read, serving

if TYPE_CHECKING:
    from sqlalchemy import URL


def _head(*more: str) -> bytes:
    lines = [f"POST {MARGIN} HTTP/1.1", "Host: x", f"Authorization: Bearer {ADMIN_KEY}", *more, "", ""]
    return "\r\n".join(lines).encode()


async def _refusal(port: int, *sent: bytes, pause: float = 0.0) -> tuple[int, str]:
    """Send the parts and return status and code of the answer, after which the connection must be closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in sent:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        status, document = await problem_read(reader)
        async with asyncio.timeout(5):
            with suppress(ConnectionResetError):  # bytes of ours were still under way when it closed
                assert await reader.read() == b""
    finally:
        writer.close()
    return status, document["code"]


async def test_bodies_that_do_not_come(database_url: URL) -> None:
    async with serving(database_url, body_seconds_max=0.4) as port:
        declared, chunked = _head("Content-Length: 100"), _head("Transfer-Encoding: chunked")
        assert await _refusal(port, declared) == (408, "body_too_slow")
        assert await _refusal(port, declared, b'{"positions"') == (408, "body_too_slow")
        assert await _refusal(port, declared, *[b"{"] * 3, pause=0.1) == (408, "body_too_slow")
        assert await _refusal(port, chunked, b"1\r\n{\r\n") == (408, "body_too_slow")


async def test_bodies_past_the_limit(database_url: URL) -> None:
    async with serving(database_url, body_bytes_max=10_000) as port:
        huge = b"2711\r\n" + b" " * 0x2711 + b"\r\n"
        assert await _refusal(port, _head("Content-Length: 100000000")) == (413, "body_too_large")
        assert await _refusal(port, _head("Content-Length: 10001"), b" " * 100) == (413, "body_too_large")
        assert await _refusal(port, _head("Transfer-Encoding: chunked"), huge) == (413, "body_too_large")


async def test_a_caller_that_hangs_up_is_no_fault_of_ours(database_url: URL, caplog: Any) -> None:
    async with serving(database_url) as port:
        for part in (b"", b'{"positions":['):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_head("Content-Length: 100") + part)
            await writer.drain()
            await asyncio.sleep(0.1)
            writer.transport.abort()
        await asyncio.sleep(0.2)
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_one_key_that_withholds_bodies_leaves_room_to_others(database_url: URL) -> None:
    async with serving(database_url, requests_under_way_max=8, body_seconds_max=5) as port:
        waiting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in waiting:
            writer.write(_head("Content-Length: 10"))
            await writer.drain()
        await asyncio.sleep(0.3)
        assert await _refusal_of_one_more(port) == (503, "overloaded")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /api/market/assets HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer another\r\n\r\n")
        assert (await problem_read(reader))[0] == 401
        writer.close()
        for _, other in waiting:
            other.close()


async def _refusal_of_one_more(port: int) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_head("Content-Length: 10"))
    status, document = await problem_read(reader)
    writer.close()
    return status, document["code"]
