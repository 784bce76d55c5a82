"""Nobody's endpoints, backlog or faults hold up what is sent to anybody else."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web

from app.db.session import LOCK_SECONDS_MAX, Database, Tx
from app.domain.dispatch import AN_AGENT_MAX, AN_AGENT_ORDINARY_MAX, AN_ENDPOINT_MAX
from app.errors import ConflictError
from app.services import accounts, outbox, webhooks
from app.services.outbox import Claim, Outcome
from app.services.sender import Sender
from tests.database import make_settings
from tests.receiver import Receiver, receiving
from tests.services.hooks import Hooks, hooks_on

HOGS = 16
WAIT_SECONDS_MAX = 8.0
"""Below the time limit of a request in these tests: nothing waited for a slot that a hanging receiver held."""


@pytest.fixture
async def hooks(database: Database) -> AsyncIterator[Hooks]:
    async with hooks_on(database, webhook_seconds_max=12.0) as made:
        yield made


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


@asynccontextmanager
async def _hanging() -> AsyncIterator[Receiver]:
    """Yield a receiver that answers nobody before the block ends."""
    released = asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        await released.wait()
        return web.Response()

    async with receiving(hang) as made:
        try:
            yield made
        finally:
            released.set()


@asynccontextmanager
async def _running(hooks: Hooks) -> AsyncIterator[asyncio.Task[None]]:
    running = asyncio.create_task(hooks.run())
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _another(hooks: Hooks, name: str = "Bob") -> Hooks:
    async with hooks.database.transaction("test") as tx:
        return replace(hooks, agent_id=await accounts.create_agent(tx, name))


async def _backlog(hooks: Hooks, endpoint_id: str, count: int) -> None:
    """Let events wait for an endpoint."""
    await hooks.execute(
        "INSERT INTO events (event_id, agent_id, sequence, type, timestamp, data)"
        f" SELECT 'evt_' || md5(random()::text), '{hooks.agent_id}', n + 1000, 'zone.changed', now(), '{{}}'"
        f" FROM generate_series(1, {count}) n"
    )
    await hooks.execute(
        "INSERT INTO webhook_deliveries (endpoint_id, event, created_at, next_attempt_at)"
        f" SELECT '{endpoint_id}', id, now(), now() FROM events"
        f" WHERE agent_id = '{hooks.agent_id}' ON CONFLICT DO NOTHING"
    )


async def _states(hooks: Hooks) -> Counter[str]:
    return Counter(row["state"] for row in await hooks.deliveries())


# --- slots


async def test_hanging_receivers_of_many_agents_do_not_delay_a_margin_call(hooks: Hooks, receiver: Receiver) -> None:
    """Sixteen agents with ten endpoints each that answer nobody: more than there are slots."""
    await hooks.endpoint(receiver.url)
    async with _hanging() as hog:
        for i in range(HOGS):
            other = await _another(hooks, f"hog {i}")
            await asyncio.gather(*(other.endpoint(f"{hog.url}/{i}/{j}") for j in range(webhooks.ENDPOINTS_MAX)))
            await other.emit()
            await other.emit()
        async with _running(hooks):
            await hog.wait_for(HOGS * AN_AGENT_ORDINARY_MAX, 30)
            event_id = await hooks.emit("margin_call.opened")
            (got,) = await receiver.wait_for(1, WAIT_SECONDS_MAX)
            assert got.id == event_id
            assert len(hog.received) == HOGS * AN_AGENT_ORDINARY_MAX


async def test_an_agents_own_hanging_endpoints_do_not_delay_its_margin_call(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url, "margin_call.*")
    async with _hanging() as hog:
        for i in range(webhooks.ENDPOINTS_MAX - 1):
            await hooks.endpoint(f"{hog.url}/{i}", "zone.*")
        for _ in range(4):
            await hooks.emit()
        async with _running(hooks):
            await hog.wait_for(AN_AGENT_ORDINARY_MAX, 30)
            await hooks.emit("margin_call.opened")
            await receiver.wait_for(1, WAIT_SECONDS_MAX)
            assert len(hog.received) < AN_AGENT_MAX


async def test_an_endpoint_that_fails_is_sent_one_at_a_time(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    await hooks.execute("UPDATE webhook_endpoints SET failing_since = now()")
    for _ in range(8):
        await hooks.emit()
    assert [await hooks.deliver() for _ in range(4)] == [1, AN_ENDPOINT_MAX, 3, 0]


async def test_endpoints_that_fail_leave_the_others_room(hooks: Hooks, receiver: Receiver) -> None:
    for i in range(40):
        other = await _another(hooks, f"agent {i}")
        await other.endpoint(f"{receiver.url}/{i}")
        await other.emit("margin_call.opened")
    await hooks.execute("UPDATE webhook_endpoints SET failing_since = now()")
    await hooks.endpoint(receiver.url)
    await hooks.emit()
    assert await hooks.deliver() == 32 + 1
    assert await hooks.deliver() == 8


async def test_what_is_urgent_goes_first_and_a_test_last(hooks: Hooks, receiver: Receiver) -> None:
    endpoint_id, _ = await hooks.endpoint(receiver.url)
    async with hooks.database.transaction("test") as tx:
        await webhooks.send_test(tx, hooks.agent_id, endpoint_id)
    for kind in ("zone.changed", "market.stale", "zone.changed", "margin_call.opened", "liquidation.executed"):
        await hooks.emit(kind)
    assert [await hooks.deliver(), await hooks.deliver()] == [4, 2]
    types = [got.event["type"] for got in receiver.received]
    assert {"margin_call.opened", "liquidation.executed"} < set(types[:4])
    assert sorted(types[4:]) == ["webhook.test", "zone.changed"]


async def test_few_tests_wait_and_each_is_tried_once(hooks: Hooks, receiver: Receiver) -> None:
    endpoint_id, _ = await hooks.endpoint(receiver.url)

    async def ask() -> None:
        async with hooks.database.transaction("test") as tx:
            await webhooks.send_test(tx, hooks.agent_id, endpoint_id)

    for _ in range(webhooks.TESTS_MAX):
        await ask()
    with pytest.raises(ConflictError) as refused:
        await ask()
    assert refused.value.code == "too_many_tests"
    receiver.statuses[:] = [500] * webhooks.TESTS_MAX
    while await hooks.deliver():
        pass
    assert await _states(hooks) == {"failed": webhooks.TESTS_MAX}
    await ask()


async def test_hanging_look_ups_of_one_agent_leave_threads_to_the_others(hooks: Hooks, receiver: Receiver) -> None:
    hung, released = Counter[str](), asyncio.Event()

    async def resolve(host: str, port: int) -> Sequence[tuple[Any, ...]]:
        if host.startswith("tar"):
            hung[host] += 1
            await released.wait()
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    def claim(agent: str, host: str) -> Claim:
        now = datetime(2026, 11, 22, tzinfo=UTC)
        url = f"http://{host}:{receiver.port}/"
        return Claim(1, "t", "wh", agent, url, "whsec_AAAA", None, "evt_1", "zone.changed", now, "{}", 0, 0, None)

    given = make_settings(webhook_allow_private=True, webhook_seconds_max=0.5)
    async with Sender(given, hooks.database.clock, resolve) as sender:
        ended = await asyncio.gather(*(sender.send(claim("a", f"tar{i}.test")) for i in range(AN_AGENT_MAX)))
        assert {outcome.error for outcome in ended} == {"timeout"}
        for i in range(3):  # the requests are over, their look-ups are not
            assert (await sender.send(claim("a", f"tar-too{i}.test"))).error == "look-ups hang"
        assert len(hung) == AN_AGENT_MAX
        assert (await sender.send(claim("b", "good.test"))).status == 204
        released.set()
        await asyncio.sleep(0.1)
        assert (await sender.send(claim("a", "well.test"))).status == 204


# --- backlogs


async def test_a_backlog_hides_nobody(hooks: Hooks, receiver: Receiver) -> None:
    """More is due than a claim looks at one by one, and all of it for longer."""
    endpoint_id, _ = await hooks.endpoint(receiver.url + "/much", "zone.*")
    await hooks.endpoint(receiver.url + "/little", "market.*")
    other = await _another(hooks)
    await other.endpoint(receiver.url + "/other")
    await _backlog(hooks, endpoint_id, 2_500)
    async with hooks.database.transaction("dead") as tx:
        assert len(await outbox.claim(tx, "dead", 60)) == AN_ENDPOINT_MAX
    await other.emit()
    await hooks.emit("market.stale")
    await hooks.emit("zone.changed")
    await other.emit("margin_call.opened")
    await other.emit("market.stale")
    await hooks.execute("UPDATE webhook_deliveries SET next_attempt_at = now() + interval '1 h' WHERE id % 997 = 5")
    assert await hooks.deliver() == AN_ENDPOINT_MAX + 1 + 3
    assert Counter(got.event["type"] for got in receiver.received) == {
        "zone.changed": AN_ENDPOINT_MAX + 1,
        "market.stale": 2,
        "margin_call.opened": 1,
    }
    assert await hooks.deliver() == AN_ENDPOINT_MAX


@asynccontextmanager
async def _locked(hooks: Hooks, query: str) -> AsyncIterator[Tx]:
    async with hooks.database.transaction("locker") as tx:
        await tx.connection.exec_driver_sql(query + " FOR UPDATE")
        yield tx


async def test_an_endpoint_is_deleted_whatever_waits_for_it(hooks: Hooks) -> None:
    """What waits is ended later, a batch at a time, and what somebody holds is left for the next time."""
    endpoint_id, _ = await hooks.endpoint("http://127.0.0.1:1/")
    count = outbox.ENDED_AT_ONCE_MAX + 10
    await _backlog(hooks, endpoint_id, count)
    async with _locked(hooks, "SELECT id FROM webhook_deliveries ORDER BY id LIMIT 1"):
        async with hooks.database.transaction("test") as tx:
            await webhooks.delete(tx, hooks.agent_id, endpoint_id)
        assert (await _states(hooks)) == {"pending": count}
        async with hooks.database.transaction("test") as tx:
            assert await outbox.end_abandoned(tx) == outbox.ENDED_AT_ONCE_MAX
        assert await hooks.deliver() == 0
        assert (await _states(hooks)) == {"failed": count - 1, "pending": 1}
    assert await hooks.deliver() == 0
    assert (await _states(hooks)) == {"failed": count}
    assert {row["last_error"] for row in await hooks.deliveries()} == {"the webhook was deleted"}


async def test_an_endpoint_that_is_gone_is_disabled_whatever_waits_for_it(hooks: Hooks, receiver: Receiver) -> None:
    gone, _ = await hooks.endpoint(receiver.url + "/gone", "zone.*")
    receiver.statuses[:] = [410]
    await hooks.emit()
    await _backlog(hooks, gone, 100)
    async with (
        _locked(hooks, "SELECT id FROM webhook_deliveries ORDER BY id DESC LIMIT 1"),
        _running(hooks),
        receiving() as other,
    ):
        await receiver.wait_for(1)
        await hooks.endpoint(other.url, "webhook.disabled", "market.*")
        await hooks.emit("market.stale")
        await other.wait_for(1, WAIT_SECONDS_MAX)
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while (await _states(hooks))["pending"] > 1:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    (endpoint,) = await hooks.rows(f"SELECT * FROM webhook_endpoints WHERE id = '{gone}'")
    assert endpoint["status"] == "disabled"


async def test_what_waited_for_an_endpoint_before_it_was_deleted_ends_too(hooks: Hooks) -> None:
    await hooks.endpoint("http://127.0.0.1:1/")
    await hooks.emit("margin_call.opened")
    await hooks.execute("UPDATE webhook_endpoints SET status = 'deleted', secret = NULL")
    await hooks.execute("UPDATE webhook_deliveries SET next_attempt_at = now() + interval '10 h'")
    assert await hooks.deliver() == 0
    assert (await _states(hooks)) == {"failed": 1}


# --- faults


async def test_what_cannot_be_recorded_stops_nothing_else(hooks: Hooks, receiver: Receiver) -> None:
    """Somebody holds an endpoint's row for long: its outcome waits, the events of all others do not."""
    endpoint_id, _ = await hooks.endpoint(receiver.url)
    await hooks.emit()
    other = await _another(hooks)
    receiver.statuses[:] = [500]
    async with receiving() as good, AsyncExitStack() as worker:
        await other.endpoint(good.url)
        async with _locked(hooks, f"SELECT id FROM webhook_endpoints WHERE id = '{endpoint_id}'"):
            await worker.enter_async_context(_running(hooks))
            await receiver.wait_for(1)
            await asyncio.sleep(0.1)
            for i in range(3):
                await other.emit()
                await good.wait_for(i + 1, LOCK_SECONDS_MAX - 1)
            assert await hooks.rows("SELECT * FROM webhook_attempts WHERE status = 500") == []
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            while not await hooks.rows("SELECT * FROM webhook_attempts WHERE status = 500"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_workers_that_record_for_the_same_endpoints_take_turns(hooks: Hooks) -> None:
    """One worker finds that the first endpoint fails and the second is well, the other one the contrary."""
    ids = sorted([(await hooks.endpoint(f"http://127.0.0.1:1/{i}"))[0] for i in range(2)])
    for _ in range(3):  # as many as may be under way to one agent
        await hooks.emit()

    async def record(claims: dict[str, Claim], failing: str) -> None:
        at = hooks.database.clock.now()
        found = [Outcome(claims[one], at, 1, 500 if one == failing else 204) for one in ids]
        async with hooks.database.transaction("test") as tx:
            await webhooks.record(tx, found, lambda: 0.5)

    for _ in range(10):
        await hooks.execute("UPDATE webhook_endpoints SET failing_since = NULL")
        await hooks.execute(
            "UPDATE webhook_deliveries SET state = 'pending', next_attempt_at = now(), lease_until = NULL,"
            " lease_token = NULL, delivered_at = NULL, slow_retries = 0, attempts = 0"
        )
        async with hooks.database.transaction("test") as tx:
            claimed = await outbox.claim(tx, "one", 60)
        await hooks.execute("UPDATE webhook_endpoints SET failing_since = now()")
        of_first, of_second = ([claim for claim in claimed if claim.endpoint_id == one] for one in ids)
        pairs = [dict(zip(ids, pair, strict=True)) for pair in zip(of_first, of_second, strict=True)]
        await asyncio.gather(*(record(pair, ids[i % 2]) for i, pair in enumerate(pairs)))


class _Faulty(Database):
    """A database on which some transactions of the worker fail as nothing ought to."""

    faults = 0

    @asynccontextmanager
    async def transaction(self, actor: str) -> AsyncIterator[Tx]:
        if actor == "worker" and self.faults:
            self.faults -= 1
            raise RuntimeError("a fault of ours")
        async with super().transaction(actor) as tx:
            yield tx


class _Broken(Sender):
    """A client that has a fault with one receiver."""

    async def send(self, claim: Claim) -> Outcome:
        if claim.url.endswith("/broken"):
            raise RuntimeError("a fault of ours")
        return await super().send(claim)


async def test_the_loop_outlives_any_fault(hooks: Hooks, receiver: Receiver) -> None:
    faulty = _Faulty(hooks.database.url, hooks.settings)
    faulty.faults = 2
    await hooks.endpoint(receiver.url)
    await hooks.endpoint(receiver.url + "/broken")
    await hooks.emit()
    async with (
        _Broken(hooks.settings, faulty.clock) as sender,
        _running(replace(hooks, database=faulty, sender=sender)) as running,
    ):
        await receiver.wait_for(1)
        faulty.faults = 1
        await hooks.emit()
        await receiver.wait_for(2)
        assert not running.done()
    await faulty.close()
    assert hooks.metrics.registry.get_sample_value("primerisk_webhook_faults_total") == 2 + 1 + 2
    assert Counter(row["lease_token"] is None for row in await hooks.deliveries()) == {True: 2, False: 2}
