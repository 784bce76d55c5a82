"""The application behind uvicorn on a real socket, and its answers as they come off the wire."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from app.api.front import front
from tests.api.service import connected

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import URL


@asynccontextmanager
async def serving(
    url: URL, *, send_seconds_max: float = 60.0, heartbeat_seconds: float = 15.0, **settings: Any
) -> AsyncIterator[int]:
    """Yield the port of a uvicorn that serves the app as `primerisk serve` does."""
    async with connected(url, **settings) as (app, _):
        app.state.parts.streams.heartbeat_seconds = heartbeat_seconds
        protocol = front(app.state.parts.settings)
        protocol.send_seconds_max = send_seconds_max
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            config = uvicorn.Config(app, log_config=None, lifespan="off", http=protocol, ws="none")
            server = uvicorn.Server(config)
            task = asyncio.create_task(server.serve(sockets=[listener]))
            for _ in range(500):
                if server.started:
                    break
                await asyncio.sleep(0.01)
            yield listener.getsockname()[1]
            app.state.parts.streams.close()
            server.should_exit = True
            await task


async def problem_read(reader: asyncio.StreamReader) -> tuple[int, dict[str, Any]]:
    """Return the status and the problem document of the next answer."""
    async with asyncio.timeout(5):
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        document: dict[str, Any] = json.loads(await reader.readexactly(length))
    assert "content-type: application/problem+json" in head
    assert f"x-request-id: {document['request_id']}\r\n" in head
    assert document["status"] == int(head.split()[1])
    return document["status"], document
