"""Webhooks and events over HTTP: secrets shown once, a delivery from end to end, streams that resume."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from standardwebhooks import Webhook

from app.services import accounts, delivery, events, fleets
from app.services.fleet_terms import Terms
from app.services.sender import Sender
from tests.api.service import ADMIN_KEY, Service, problem, running
from tests.api.wire import serving
from tests.receiver import receiving

if TYPE_CHECKING:
    from sqlalchemy import URL

    from app.db.session import Database

HOOKS, EVENTS = "/api/webhooks", "/api/events"


@pytest.fixture
async def hooked(database_url: URL) -> AsyncIterator[Service]:
    """Yield an app that lets webhooks go to loopback."""
    async with running(database_url, webhook_allow_private=True) as started:
        yield started


async def _add(service: Service, url: str = "http://127.0.0.1:9/", *filters: str, **given: Any) -> dict[str, Any]:
    answer = await service.post(HOOKS, json={"url": url, "filters": list(filters)}, **given)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def _deliver(service: Service) -> None:
    """Do the worker's part until nothing is due."""
    parts = service.app.state.parts
    async with Sender(parts.settings, parts.database.clock) as sender:
        while await delivery.deliver_once(parts.database, sender, parts.settings, parts.metrics, "test"):
            pass


async def _emit(database: Database, agent_id: str | None, count: int = 1) -> list[str]:
    ids = []
    for i in range(count):
        async with database.transaction("test") as tx:
            ids.append(await events.emit(tx, "zone.changed", agent_id, {"zone": "RED", "number": i}))
    return ids


async def test_a_webhook_from_end_to_end(hooked: Service) -> None:
    async with receiving() as receiver:
        made = await _add(hooked, receiver.url, "zone.*")
        assert made["secret"].startswith("whsec_")
        shown = (await hooked.get(f"{HOOKS}/{made['id']}")).json()
        assert shown == {name: value for name, value in made.items() if name != "secret"}
        assert (await hooked.get(HOOKS)).json() == {"webhooks": [shown], "next_cursor": None}
        rotated = (await hooked.post(f"{HOOKS}/{made['id']}/rotate")).json()
        assert rotated["secret"] != made["secret"]
        assert rotated["secret_before_until"] is not None
        queued = await hooked.post(f"{HOOKS}/{made['id']}/test")
        assert (queued.status_code, queued.json()["state"]) == (202, "pending")
        await _deliver(hooked)
        (got,) = receiver.received
        for secret in (made["secret"], rotated["secret"]):
            assert Webhook(secret).verify(got.body, got.headers)["type"] == "webhook.test"
        (listed,) = (await hooked.get(f"{HOOKS}/{made['id']}/deliveries")).json()["deliveries"]
        assert (listed["id"], listed["state"], listed["last_status"]) == (queued.json()["id"], "delivered", 204)
        whole = (await hooked.get(f"{HOOKS}/deliveries/{listed['id']}")).json()
        assert [attempt["status"] for attempt in whole["log"]] == [204]
        assert (await hooked.post(f"{HOOKS}/deliveries/{listed['id']}/replay")).status_code == 202
        await _deliver(hooked)
        assert [item.id for item in receiver.received] == [listed["event_id"]] * 2
        since = made["created_at"]
        assert (await hooked.post(f"{HOOKS}/{made['id']}/recover", json={"since": since})).json() == {
            "recovered": 0,
            "more": False,
        }
    assert (await hooked.delete(f"{HOOKS}/{made['id']}")).status_code == 204
    problem(await hooked.get(f"{HOOKS}/{made['id']}"), 404, "webhook_not_found")


async def test_an_endpoint_that_is_gone_is_disabled_and_enabled_again(hooked: Service) -> None:
    async with receiving() as receiver:
        receiver.statuses[:] = [410]
        made = await _add(hooked, receiver.url)
        await hooked.post(f"{HOOKS}/{made['id']}/test")
        await _deliver(hooked)
        shown = (await hooked.get(f"{HOOKS}/{made['id']}")).json()
        assert (shown["status"], "410" in shown["reason"]) == ("disabled", True)
        told = (await hooked.get(EVENTS)).json()["events"]
        assert [event["type"] for event in told] == ["webhook.test", "webhook.disabled"]
        problem(await hooked.post(f"{HOOKS}/{made['id']}/test"), 409, "webhook_disabled")
        assert (await hooked.post(f"{HOOKS}/{made['id']}/enable")).json()["status"] == "enabled"
        await hooked.post(f"{HOOKS}/{made['id']}/test")
        await _deliver(hooked)
        assert len(receiver.received) == 2


async def test_other_agents_find_nothing(hooked: Service) -> None:
    made = await _add(hooked)
    queued = (await hooked.post(f"{HOOKS}/{made['id']}/test")).json()
    bob = (await hooked.post("/api/agents", key="settings", json={"name": "Bob"})).json()["api_key"]
    body = {"since": made["created_at"]}
    for key in (bob, "admin"):  # an admin names the agent
        assert (await hooked.get(HOOKS, key=key)).json()["webhooks"] == []
        assert (await hooked.get(EVENTS, key=key)).json()["events"] == []
        for method, path in (
            ("GET", f"/{made['id']}"),
            ("DELETE", f"/{made['id']}"),
            ("POST", f"/{made['id']}/rotate"),
            ("POST", f"/{made['id']}/enable"),
            ("POST", f"/{made['id']}/test"),
            ("GET", f"/{made['id']}/deliveries"),
        ):
            problem(await hooked.send(method, HOOKS + path, key=key), 404, "webhook_not_found")
        problem(await hooked.post(f"{HOOKS}/{made['id']}/recover", key=key, json=body), 404, "webhook_not_found")
        problem(await hooked.get(f"{HOOKS}/deliveries/{queued['id']}", key=key), 404, "delivery_not_found")
        problem(await hooked.post(f"{HOOKS}/deliveries/{queued['id']}/replay", key=key), 404, "delivery_not_found")
    problem(await hooked.get(EVENTS, key=bob, params={"agent_id": hooked.agent_id}), 404, "agent_not_found")
    problem(await hooked.get(HOOKS, key="market"), 403, "scope_missing")
    named = await hooked.get(f"{HOOKS}/{made['id']}", key="admin", params={"agent_id": hooked.agent_id})
    assert named.status_code == 200


async def test_the_service_has_events_and_webhooks_of_its_own(hooked: Service) -> None:
    async with receiving() as receiver:
        await _add(hooked, receiver.url, key="admin")
        await _emit(hooked.app.state.parts.database, hooked.agent_id)
        (event_id,) = await _emit(hooked.app.state.parts.database, None)
        await _deliver(hooked)
        assert [got.id for got in receiver.received] == [event_id]
    (event,) = (await hooked.get(EVENTS, key="admin")).json()["events"]
    assert (event["id"], event["sequence"], event["data"]["agent_id"]) == (event_id, 1, None)


@pytest.mark.parametrize(
    ("body", "status", "code", "pointer"),
    [
        ({"url": "http://127.0.0.1/"}, 422, "private_address", "/url"),
        ({"url": "http://localhost:8000/"}, 422, "private_address", "/url"),
        ({"url": "ftp://example.com/"}, 422, "invalid_url", "/url"),
        ({"url": "https://user:pass@example.com/"}, 422, "invalid_url", "/url"),
        ({"url": "https://[::1]@/"}, 422, "invalid_url", "/url"),
        ({"url": "https://example.com/", "filters": ["no_such.event"]}, 422, "unknown_event", "/filters/0"),
        ({"url": "https://example.com/", "filters": ["zone.*"] * 51}, 422, "too_many", "/filters"),
        ({"url": "https://example.com/", "secret": "mine"}, 422, "unknown_field", "/secret"),
        ({}, 422, "missing_field", "/url"),
    ],
)
async def test_what_is_refused(service: Service, body: Any, status: int, code: str, pointer: str) -> None:
    problem(await service.post(HOOKS, json=body), status, code, pointer)


async def test_more_that_is_refused(service: Service) -> None:
    made = await _add(service, "https://example.com/")
    for since in ("2020-01-01T00:00:00Z", "2999-01-01T00:00:00Z"):
        answer = await service.post(f"{HOOKS}/{made['id']}/recover", json={"since": since})
        problem(answer, 422, "out_of_range", "/since")
    for delivery_id in ("0", "x", "9" * 30, "٣"):
        problem(await service.get(f"{HOOKS}/deliveries/{delivery_id}"), 404, "delivery_not_found")
    for i in range(9):
        await _add(service, f"https://example.com/{i}")
    problem(await service.post(HOOKS, json={"url": "https://example.com/"}), 409, "too_many_webhooks")
    problem(await service.get(EVENTS, params={"after": "-1"}), 422, "invalid_parameter")


async def test_events_in_pages(service: Service) -> None:
    ids = await _emit(service.app.state.parts.database, service.agent_id, 5)
    found: list[dict[str, Any]] = []
    after: str | None = "0"
    while after is not None:
        page = (await service.get(EVENTS, params={"limit": 2, "after": after})).json()
        found += page["events"]
        after = page["next_cursor"]
    assert [event["id"] for event in found] == ids
    assert [event["sequence"] for event in found] == [1, 2, 3, 4, 5]
    assert found[0].keys() == {"id", "sequence", "type", "timestamp", "data"}
    assert found[0]["data"] | {"zone": "RED", "number": 0, "agent_id": service.agent_id} == found[0]["data"]


# --- streams


class Stream:
    """A stream as its caller reads it."""

    def __init__(self, reply: httpx.Response) -> None:
        self.reply = reply
        self.lines = reply.aiter_lines()

    async def read(self, count: int) -> list[dict[str, str]]:
        """Return the next events, each as its fields."""
        found: list[dict[str, str]] = []
        fields: dict[str, str] = {}
        async with asyncio.timeout(5):
            async for line in self.lines:
                name, _, value = line.partition(": ")
                if line and name:
                    fields[name] = value
                elif "data" in fields:
                    found.append(fields)
                if not line:
                    fields = {}
                if len(found) == count:
                    return found
        raise AssertionError(f"the stream ended after {found}")


@asynccontextmanager
async def _stream(port: int, key: str = ADMIN_KEY, path: str = EVENTS, **headers: str) -> AsyncIterator[Stream]:
    given = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
        client.stream("GET", path, headers=given) as reply,
    ):
        yield Stream(reply)


async def test_a_stream_resumes_where_it_was_cut(database_url: URL, database: Database) -> None:
    async with database.transaction("test") as tx:
        agent_id = await accounts.create_agent(tx, "Alice")
        key = (await accounts.create_key(tx, agent_id, {"agent"})).text
    ids = await _emit(database, agent_id, 3)
    async with serving(database_url) as port:
        async with _stream(port, key, last_event_id="0") as stream:
            assert stream.reply.headers["content-type"].startswith("text/event-stream")
            found = await stream.read(3)
            assert [event["id"] for event in found] == ["1", "2", "3"]
            assert [json.loads(event["data"])["id"] for event in found] == ids
            assert {event["event"] for event in found} == {"zone.changed"}
        ids += await _emit(database, agent_id, 2)
        async with _stream(port, key, last_event_id=found[-1]["id"]) as stream:
            assert [event["id"] for event in await stream.read(2)] == ["4", "5"]
            (live,) = await _emit(database, agent_id)
            (event,) = await stream.read(1)
            assert json.loads(event["data"])["id"] == live
            polled = {"id": live} | json.loads(event["data"])
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            params = {"after": 5}
            answer = await client.get(EVENTS, params=params, headers={"Authorization": f"Bearer {key}"})
            assert answer.json()["events"] == [polled]


async def test_a_stream_without_a_place_begins_now(database_url: URL, database: Database) -> None:
    await _emit(database, None, 2)
    async with serving(database_url) as port, _stream(port) as stream:
        await asyncio.sleep(0.2)
        await _emit(database, None)
        assert [event["id"] for event in await stream.read(1)] == ["3"]


async def test_a_stream_ends_with_its_key(database_url: URL, database: Database) -> None:
    async with database.transaction("test") as tx:
        agent_id = await accounts.create_agent(tx, "Alice")
        key = await accounts.create_key(tx, agent_id, {"agent"})
    async with (
        serving(database_url, heartbeat_seconds=0.2, key_cache_seconds=0) as port,
        _stream(port, key.text) as stream,
    ):
        lines = stream.reply.aiter_lines()
        async with asyncio.timeout(5):
            while not (await anext(lines)).startswith(": "):
                pass
            async with database.transaction("test") as tx:
                await accounts.revoke_key(tx, key.id)
            async for _ in lines:
                pass


async def test_a_coordinators_stream_of_a_member_ends_when_that_has_left(database_url: URL, database: Database) -> None:
    async with database.transaction("test") as tx:
        lead, agent = await accounts.create_agent(tx, "Alice"), await accounts.create_agent(tx, "Bob")
        key = (await accounts.create_key(tx, lead, {"agent", "coordinator"})).text
        fleet = await fleets.create(tx, lead, "Alpha")
        member = await fleets.invite(tx, fleet, agent, Terms(Decimal(0)), joins=True)
    async with (
        serving(database_url, heartbeat_seconds=0.2) as port,
        _stream(port, key, f"{EVENTS}?agent_id={agent}") as stream,
    ):
        lines = stream.reply.aiter_lines()
        async with asyncio.timeout(5):
            while not (await anext(lines)).startswith(": "):
                pass
            async with database.transaction("test") as tx:
                await accounts.lock_accounts(tx, {lead, agent})
                await fleets.remove(tx, member)
            async for _ in lines:
                pass


async def test_a_busy_stream_ends_with_its_key(database_url: URL, database: Database) -> None:
    async with database.transaction("test") as tx:
        agent_id = await accounts.create_agent(tx, "Alice")
        key = await accounts.create_key(tx, agent_id, {"agent"})

    async def emit_for_ever() -> None:
        while True:
            await _emit(database, agent_id, 5)

    async with (
        serving(database_url, heartbeat_seconds=2.0, key_cache_seconds=0) as port,
        _stream(port, key.text) as stream,
    ):
        emitting = asyncio.create_task(emit_for_ever())
        await stream.read(20)
        async with database.transaction("test") as tx:
            await accounts.revoke_key(tx, key.id)
        async with asyncio.timeout(8):
            async for _ in stream.lines:
                pass
        assert not emitting.done()
        emitting.cancel()


async def test_a_stream_goes_on_past_events_that_are_gone(database_url: URL, database: Database) -> None:
    await _emit(database, None, 3)
    async with database.transaction("test") as tx:  # as a purge would
        await tx.connection.exec_driver_sql("ALTER TABLE events DISABLE TRIGGER USER")
        await tx.connection.exec_driver_sql("DELETE FROM events")
        await tx.connection.exec_driver_sql("ALTER TABLE events ENABLE TRIGGER USER")
    async with (
        serving(database_url, heartbeat_seconds=0.2) as port,
        _stream(port, last_event_id="1") as stream,
        asyncio.timeout(5),
    ):
        lines = stream.reply.aiter_lines()
        while not (await anext(lines)).startswith(": "):  # it is quiet, not busy looking for what is gone
            pass
        await _emit(database, None)
        while (line := await anext(lines)) != "id: 4":
            assert not line.startswith("id: ")


async def test_few_tests_wait(hooked: Service) -> None:
    made = await _add(hooked)
    for _ in range(5):
        assert (await hooked.post(f"{HOOKS}/{made['id']}/test")).status_code == 202
    problem(await hooked.post(f"{HOOKS}/{made['id']}/test"), 409, "too_many_tests")


async def test_streams_are_few_and_end_with_the_process(database_url: URL) -> None:
    async with serving(database_url) as port:
        async with _stream(port), _stream(port), _stream(port), _stream(port):
            await asyncio.sleep(0.3)
            async with _stream(port) as refused:
                assert refused.reply.status_code == 429
        await asyncio.sleep(0.5)
        async with _stream(port, last_event_id="x") as wrong:
            assert wrong.reply.status_code == 422
        async with _stream(port) as stream:
            assert stream.reply.status_code == 200


async def test_no_more_streams_than_the_setting(database_url: URL) -> None:
    async with serving(database_url, event_streams_max=0) as port, _stream(port) as refused:
        assert refused.reply.status_code == 503
