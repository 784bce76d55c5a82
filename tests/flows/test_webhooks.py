"""Webhooks across processes: a worker that is killed loses nothing, streams hold up no stop, the example works."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
from aiohttp import web

from app.domain.webhooks import format_secret, signatures
from tests.flows.process import ROOT, STOP_SECONDS_MAX, home, serving
from tests.receiver import receiving
from tests.services.hooks import Hooks, hooks_on

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from app.db.session import Database

EVENTS = 150
KILLS = 8


@contextmanager
def _child(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    given: Mapping[str, str] = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=given)
    try:
        yield process
    finally:
        process.kill()
        process.wait(STOP_SECONDS_MAX)


async def _emit_slowly(hooks: Hooks) -> set[str]:
    sent = set()
    for i in range(EVENTS):
        sent.add(await hooks.emit("margin_call.opened", number=i))
        await asyncio.sleep(0.04)
    return sent


async def test_workers_that_are_killed_lose_nothing(database: Database) -> None:
    """Two workers, one of them killed -9 again and again while its receiver is slow to answer."""
    rng = random.Random(1)
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)

    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(rng.uniform(0, 0.3))
        return web.Response(status=503 if rng.random() < 0.1 else 204)

    async with hooks_on(database) as hooks, receiving(slow) as receiver:
        for path in ("one", "two", "three"):
            await hooks.endpoint(f"{receiver.url}/{path}")
        emitting = asyncio.create_task(_emit_slowly(hooks))
        killed = 0
        while not emitting.done() or killed < KILLS:
            with _child("-m", "tests.flows.deliver", url) as worker:
                before = len(receiver.received)
                while len(receiver.received) < before + 5 and not emitting.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await asyncio.sleep(rng.uniform(0, 0.2))
                worker.send_signal(signal.SIGKILL)
            killed += 1
        sent = await emitting
        left = [row for row in await hooks.deliveries() if row["lease_token"] is not None]
        async with asyncio.timeout(60):
            while any(row["state"] == "pending" for row in await hooks.deliveries()):
                await hooks.execute("UPDATE webhook_deliveries SET next_attempt_at = now() WHERE state = 'pending'")
                await hooks.deliver("survivor")
                await asyncio.sleep(0.05)
        assert left, "no worker was killed with a delivery in its hands"
        got = [item.id for item in receiver.received]
        assert set(got) == sent
        assert len(await hooks.deliveries()) == 3 * len(sent)
        assert {row["state"] for row in await hooks.deliveries()} == {"delivered"}


def test_an_open_stream_does_not_hold_up_a_stop() -> None:
    with home() as place, serving(place, PYTHONPATH=str(ROOT)) as served:
        headers = {"Authorization": f"Bearer {served.greeting.key}", "Accept": "text/event-stream"}
        with httpx.stream("GET", f"{served.greeting.address}/api/events", headers=headers, timeout=20) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines()
            assert next(lines).startswith("retry:")
            started = time.monotonic()
            assert served.stop(signal.SIGTERM) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
            list(lines)  # the end, not a connection that was cut
            assert time.monotonic() - started < 8


def test_the_examples_receiver_takes_what_is_genuine_and_fresh() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secret, now = format_secret(bytes(range(32))), int(time.time())  # noqa: TID251  the receiver's clock
    body = json.dumps({"type": "webhook.test", "data": {}}).encode()
    good = signatures([format_secret(bytes(32)), secret], "evt_1", now, body)
    with _child("examples/receive.py", str(port), SECRET=secret):
        for stamp, header, sent, status in (
            (now, good, body, 204),
            (now, good, body + b" ", 401),
            (now, signatures([format_secret(bytes(32))], "evt_1", now, body), body, 401),
            (now - 600, signatures([secret], "evt_1", now - 600, body), body, 401),
            (now, "", body, 401),
        ):
            headers = {"webhook-id": "evt_1", "webhook-timestamp": str(stamp), "webhook-signature": header}
            assert _post(f"http://127.0.0.1:{port}/", sent, headers) == status


def _post(url: str, body: bytes, headers: dict[str, str]) -> int:
    request = urllib.request.Request(url, body, headers)
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except urllib.error.URLError:
            time.sleep(0.05)
    raise AssertionError("the receiver does not listen")
