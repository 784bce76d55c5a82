"""Deliveries to real receivers, good and bad, and what becomes of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psutil
import pytest
from aiohttp import web
from standardwebhooks import Webhook

from app.db.session import Database
from app.domain.dispatch import AN_ENDPOINT_MAX
from app.errors import DatabaseUnavailableError
from app.services import outbox, webhooks
from app.services.delivery import POLL_SECONDS
from tests.receiver import Receiver, receiving
from tests.services.hooks import Hooks, hooks_on


@pytest.fixture
async def hooks(database: Database) -> AsyncIterator[Hooks]:
    async with hooks_on(database) as made:
        yield made


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


async def test_an_event_arrives_as_it_was_written_and_verifies(hooks: Hooks, receiver: Receiver) -> None:
    _, secret = await hooks.endpoint(receiver.url)
    event_id = await hooks.emit("zone.changed", zone="RED", equity=Decimal("12345678901234567890.10"))
    assert await hooks.deliver() == 1
    (got,) = receiver.received
    event = Webhook(secret).verify(got.body, got.headers)
    assert got.id == event_id
    assert got.headers["content-type"] == "application/json"
    assert list(event) == ["type", "timestamp", "data"]
    assert event["type"] == "zone.changed"
    assert abs(datetime.fromisoformat(event["timestamp"]) - hooks.database.clock.now()) < timedelta(seconds=5)
    assert event["data"].keys() == {"zone", "equity", "agent_id", "fleet_id", "sequence"}
    assert (event["data"]["agent_id"], event["data"]["fleet_id"], event["data"]["sequence"]) == (
        hooks.agent_id,
        None,
        1,
    )
    assert b"12345678901234567890.10" in got.body
    (row,) = await hooks.deliveries()
    assert (row["state"], row["attempts"], row["last_status"], row["lease_token"]) == ("delivered", 1, 204, None)
    assert hooks.count("delivered") == 1
    assert await hooks.deliver() == 0


async def test_500_then_200_under_one_id_and_with_the_same_body(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    receiver.statuses[:] = [500, 429]
    receiver.headers["Retry-After"] = "120"
    event_id = await hooks.emit()
    for wait, state in ((120, "pending"), (300, "pending"), (None, "delivered")):
        assert await hooks.deliver() == 1
        assert await hooks.deliver() == 0
        (row,) = await hooks.deliveries()
        assert row["state"] == state
        if wait is not None:
            seconds = (row["next_attempt_at"] - hooks.database.clock.now()).total_seconds()
            assert wait * 0.9 - 3 < seconds <= wait * 1.1
            (endpoint,) = await hooks.rows("SELECT * FROM webhook_endpoints")
            assert endpoint["failing_since"] is not None
        await hooks.make_due()
    assert {got.id for got in receiver.received} == {event_id}
    assert len({got.body for got in receiver.received}) == 1
    assert [row["status"] for row in await hooks.rows("SELECT * FROM webhook_attempts ORDER BY id")] == [500, 429, 204]
    (endpoint,) = await hooks.rows("SELECT * FROM webhook_endpoints")
    assert (endpoint["status"], endpoint["failing_since"]) == ("enabled", None)


async def _seconds_to_next(hooks: Hooks) -> float:
    (row,) = await hooks.deliveries()
    return float((row["next_attempt_at"] - hooks.database.clock.now()).total_seconds())


async def test_a_margin_call_is_tried_again_at_once_until_its_deadline(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    receiver.statuses[:] = [500] * 20
    deadline = hooks.database.clock.now() + timedelta(seconds=300)
    await hooks.emit("margin_call.opened", deadline_at=deadline)
    for wait in (2, 5, 10, 20, 40, 60, 60):
        await hooks.deliver()
        assert wait - 2 < await _seconds_to_next(hooks) <= wait
        await hooks.make_due()
    await hooks.execute("UPDATE webhook_deliveries SET urgent_until = now()")
    for wait in (5, 300):
        await hooks.deliver()
        assert wait * 0.9 - 2 < await _seconds_to_next(hooks) <= wait * 1.1
        await hooks.make_due()


async def test_after_the_last_retry_a_delivery_has_failed(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    receiver.statuses[:] = [500] * 20
    await hooks.emit()
    for _ in range(8):
        assert await hooks.deliver() == 1
        await hooks.make_due()
    assert await hooks.deliver() == 0
    (row,) = await hooks.deliveries()
    assert (row["state"], row["attempts"], row["slow_retries"]) == ("failed", 8, 7)


async def test_410_disables_at_once_and_tells_the_other_endpoints(hooks: Hooks, receiver: Receiver) -> None:
    lost, _ = await hooks.endpoint(receiver.url)
    async with receiving() as other:
        kept, _ = await hooks.endpoint(other.url, "webhook.*")
        receiver.statuses[:] = [410]
        await hooks.emit()
        await hooks.emit()
        assert await hooks.deliver() == 2
        assert await hooks.deliver() == 1
        (told,) = other.received
        assert told.event["type"] == "webhook.disabled"
        assert told.event["data"]["webhook_id"] == lost
        assert "410" in told.event["data"]["reason"]
    states = {row["id"]: row["status"] for row in await hooks.rows("SELECT * FROM webhook_endpoints")}
    assert states == {lost: "disabled", kept: "enabled"}
    assert "pending" not in {row["state"] for row in await hooks.deliveries()}
    await hooks.emit()
    assert await hooks.deliver() == 0


async def test_five_days_of_failures_alone_disable(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    receiver.statuses[:] = [500, 500, 200, 500]
    await hooks.emit()
    for days, status in (("4.9", "enabled"), ("5", "disabled")):
        await hooks.deliver()
        await hooks.execute(f"UPDATE webhook_endpoints SET failing_since = now() - interval '{days} days'")
        await hooks.make_due()
        if status == "disabled":
            receiver.statuses[:] = [500]
            await hooks.deliver()
        (endpoint,) = await hooks.rows("SELECT * FROM webhook_endpoints")
        assert endpoint["status"] == status


async def test_a_success_ends_the_count_of_days(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    await hooks.execute("UPDATE webhook_endpoints SET failing_since = now() - interval '9 days'")
    await hooks.emit()
    await hooks.deliver()
    receiver.statuses[:] = [500]
    await hooks.emit()
    await hooks.deliver()
    (endpoint,) = await hooks.rows("SELECT * FROM webhook_endpoints")
    assert endpoint["status"] == "enabled"


async def _redirect(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound(str(request.url.with_path("/elsewhere")))


async def _hang(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


async def _drip(request: web.Request) -> web.StreamResponse:
    reply = web.StreamResponse()
    await reply.prepare(request)
    for _ in range(100):
        await asyncio.sleep(0.3)
        await reply.write(b".")
    return reply


async def _gigabyte(request: web.Request) -> web.StreamResponse:
    reply = web.StreamResponse(headers={"Content-Length": str(10**9)})
    await reply.prepare(request)
    for _ in range(1000):
        await reply.write(bytes(10**6))
    return reply


async def _cut(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    ("answer", "state", "status", "error", "result"),
    [
        (_redirect, "pending", 302, None, "refused"),
        (_hang, "pending", None, "timeout", "timeout"),
        (_drip, "delivered", 200, None, "delivered"),
        (_gigabyte, "delivered", 200, None, "delivered"),
        (_cut, "pending", None, "the connection was closed", "unreachable"),
    ],
)
async def test_receivers_that_misbehave(
    hooks: Hooks, answer: Any, state: str, status: int | None, error: str | None, result: str
) -> None:
    before = psutil.Process().memory_info().rss
    async with receiving(answer) as receiver:
        await hooks.endpoint(receiver.url)
        await hooks.emit()
        started = time.monotonic()
        assert await hooks.deliver() == 1
        assert time.monotonic() - started < 10, "whoever hangs or drips takes thirty seconds"
        assert len(receiver.received) == 1
    (row,) = await hooks.deliveries()
    assert (row["state"], row["last_status"], row["last_error"]) == (state, status, error)
    assert hooks.count(result) == 1
    assert psutil.Process().memory_info().rss - before < 50e6


async def _raw(reply: bytes) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"HTTP/1.1 999999 no\r\n\r\n",
        b"HTTP/1.1 \xff\xfe\r\n\r\n",
    ],
)
async def test_what_is_no_http(hooks: Hooks, reply: bytes) -> None:
    server = await _raw(reply)
    async with server:
        await hooks.endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        await hooks.emit()
        assert await hooks.deliver() == 1
    (row,) = await hooks.deliveries()
    assert (row["state"], row["last_status"]) == ("pending", None)
    assert row["last_error"] in ("not HTTP", "the connection was closed")


async def test_one_slow_endpoint_does_not_hold_the_others(hooks: Hooks, receiver: Receiver) -> None:
    async with receiving(_hang) as slow:
        await hooks.endpoint(slow.url, "zone.*")
        await hooks.endpoint(receiver.url, "market.*")
        for _ in range(150):
            await hooks.emit("zone.changed")
        running = asyncio.create_task(hooks.run())
        await slow.wait_for(1)
        waits = list[float]()
        for _ in range(5):
            started = time.monotonic()
            await hooks.emit("market.stale")
            await receiver.wait_for(len(waits) + 1)
            waits.append(time.monotonic() - started)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert max(waits) < 0.7
    assert len(slow.received) <= 2 * AN_ENDPOINT_MAX * 4


async def test_two_workers_deliver_everything_and_rarely_twice(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    async with receiving() as other:
        await hooks.endpoint(other.url)
        sent = {await hooks.emit("zone.changed", number=i) for i in range(100)}
        loops = [asyncio.create_task(hooks.run(name)) for name in ("one", "two")]
        await receiver.wait_for(100)
        await other.wait_for(100)
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        for got in (receiver.received, other.received):
            assert Counter(item.id for item in got) == dict.fromkeys(sent, 1)
    assert {row["state"] for row in await hooks.deliveries()} == {"delivered"}


async def test_a_cancelled_worker_finishes_what_it_has_begun(hooks: Hooks) -> None:
    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.5)
        return web.Response()

    async with receiving(slow) as receiver:
        await hooks.endpoint(receiver.url)
        await hooks.emit()
        running = asyncio.create_task(hooks.run())
        await receiver.wait_for(1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()
    (row,) = await hooks.deliveries()
    assert row["state"] == "delivered"


async def test_what_a_dead_worker_held_is_sent_by_another_after_the_lease(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    event_id = await hooks.emit()
    async with hooks.database.transaction("dead") as tx:
        (claimed,) = await outbox.claim(tx, "dead", lease_seconds=0.5)
    assert await hooks.deliver("other") == 0
    await asyncio.sleep(0.6)
    assert await hooks.deliver("other") == 1
    assert [got.id for got in receiver.received] == [event_id]
    # it was not dead, only slow: what it says now changes nothing, and is logged
    late = outbox.Outcome(claimed, datetime.now(UTC), 1, 500)  # noqa: TID251
    async with hooks.database.transaction("dead") as tx:
        await webhooks.record(tx, [late], lambda: 0.5)
    (row,) = await hooks.deliveries()
    assert (row["state"], row["attempts"], row["last_status"]) == ("delivered", 1, 204)
    (endpoint,) = await hooks.rows("SELECT * FROM webhook_endpoints")
    assert endpoint["failing_since"] is None
    assert len(await hooks.rows("SELECT * FROM webhook_attempts")) == 2


async def test_filters(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url + "/all")
    await hooks.endpoint(receiver.url + "/calls", "margin_call.*", "zone.changed")
    await hooks.endpoint(receiver.url + "/none", "market.stale")
    for kind in ("margin_call.opened", "margin_call.cured", "zone.changed", "liquidation.executed"):
        await hooks.emit(kind)
    while await hooks.deliver():
        pass
    counts = Counter(row["url"].rsplit("/", 1)[1] for row in await hooks.rows(
        "SELECT e.url FROM webhook_deliveries d JOIN webhook_endpoints e ON e.id = d.endpoint_id"
    ))  # fmt: skip
    assert counts == {"all": 4, "calls": 3}


async def test_after_a_rotation_both_secrets_sign_for_a_day(hooks: Hooks, receiver: Receiver) -> None:
    endpoint_id, old = await hooks.endpoint(receiver.url)
    async with hooks.database.transaction("test") as tx:
        _, new = await webhooks.rotate(tx, hooks.agent_id, endpoint_id)
    await hooks.emit()
    await hooks.deliver()
    for secret in (old, new):
        Webhook(secret).verify(receiver.received[0].body, receiver.received[0].headers)
    await hooks.execute("UPDATE webhook_endpoints SET secret_before_until = now()")
    await hooks.emit()
    await hooks.deliver()
    assert receiver.received[1].headers["webhook-signature"].count("v1,") == 1
    Webhook(new).verify(receiver.received[1].body, receiver.received[1].headers)


async def test_the_backlog_is_measured(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    await hooks.emit()
    await hooks.execute(
        "UPDATE webhook_deliveries SET next_attempt_at = now() - interval '7 s', created_at = now() - interval '1 h'"
    )
    async with hooks.database.transaction("test") as tx:
        [(_, backlog)] = (await outbox.read_backlog(tx)).items()
        assert backlog.made_at is not None
        assert backlog.due_at is not None
        assert backlog.count == 1
        assert (tx.now - backlog.made_at).total_seconds() == pytest.approx(3_600, abs=5)
        assert (tx.now - backlog.due_at).total_seconds() == pytest.approx(7, abs=5)
    await hooks.deliver()
    async with hooks.database.transaction("test") as tx:
        assert await outbox.read_backlog(tx) == {}


async def test_many_workers_disable_an_endpoint_once(hooks: Hooks, receiver: Receiver) -> None:
    receiver.statuses[:] = [410] * 200
    lost = [(await hooks.endpoint(receiver.url, "zone.*"))[0] for _ in range(3)]
    async with receiving() as other:
        await hooks.endpoint(other.url, "webhook.disabled")
        for _ in range(12):
            await hooks.emit()
        loops = [asyncio.create_task(hooks.run(name)) for name in ("one", "two", "three")]
        await other.wait_for(len(lost))
        await asyncio.sleep(2 * POLL_SECONDS)
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        assert sorted(got.event["data"]["webhook_id"] for got in other.received) == sorted(lost)
    assert await hooks.deliver() == 0
    states = Counter(row["state"] for row in await hooks.deliveries())
    assert states == {"failed": 36, "delivered": 3}


async def test_connections_that_are_cut_hold_up_nothing(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    loops = [asyncio.create_task(hooks.run(name)) for name in ("one", "two")]
    sent = set()
    for _ in range(30):
        sent.add(await hooks.emit())
        with suppress(DatabaseUnavailableError):
            await hooks.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        await asyncio.sleep(0.03)
    async with asyncio.timeout(20):
        while {got.id for got in receiver.received} != sent:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert not any(loop.done() for loop in loops)
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)


async def test_the_loop_outlives_an_outage(hooks: Hooks, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    await hooks.endpoint(receiver.url)
    running = asyncio.create_task(hooks.run())
    await asyncio.sleep(POLL_SECONDS)
    await hooks.execute("ALTER TABLE webhook_attempts RENAME TO gone")
    await hooks.emit()
    await receiver.wait_for(1)
    while "a webhook can't be recorded" not in caplog.text:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await hooks.execute("ALTER TABLE gone RENAME TO webhook_attempts")
    await hooks.execute("UPDATE webhook_deliveries SET lease_until = now()")
    await receiver.wait_for(2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert receiver.received[0].id == receiver.received[1].id
    assert [row["state"] for row in await hooks.deliveries()] == ["delivered"]
