"""`primerisk health`: well is who answers; of a worker, who still looks at the accounts."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from app import probe
from app.db import embedded
from app.db.session import system_now
from app.errors import StartupError
from tests.receiver import receiving


async def _checked(path: str, text: str, status: int = 200) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(text=text, status=status)

    async with receiving(answer) as receiver:
        await asyncio.to_thread(probe.check, receiver.url.replace("/hook", path))


async def test_who_is_ready_is_well() -> None:
    await _checked("/readyz", "{}")
    with pytest.raises(StartupError, match="503"):
        await _checked("/readyz", "{}", 503)


async def test_a_worker_is_well_while_its_heart_beats() -> None:
    beat = "primerisk_worker_heartbeat_timestamp_seconds"
    now = system_now().timestamp()
    await _checked("/metrics", f"# HELP\n{beat} {now - 3}\n")
    for told in (f"{beat} {now - 60}\n", f"{beat} 0.0\n", "nothing\n"):
        with pytest.raises(StartupError, match="last looked at the accounts"):
            await _checked("/metrics", told)


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}/readyz", "file:///etc/passwd"])
def test_who_does_not_answer_is_not(url: str) -> None:
    with pytest.raises(StartupError):
        probe.check(url.format(embedded._free_port()))
