"""Events: gapless numbers an agent, written or not with the transaction; and endpoints, replayed and recovered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy.exc import IntegrityError

from app.db.session import Database
from app.errors import ConflictError, InvalidError, NotFoundError
from app.services import accounts, events, outbox, webhooks
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


async def test_numbers_are_gapless_and_in_the_order_of_commits(hooks: Hooks) -> None:
    async def emit(number: int) -> None:
        async with hooks.database.transaction("test") as tx:
            await events.emit(tx, "zone.changed", hooks.agent_id, {"number": number})
            await asyncio.sleep(0.001 * (number % 5))
            if number % 4 == 3:
                raise ConflictError("rolled back")

    done = await asyncio.gather(*(emit(i) for i in range(20)), return_exceptions=True)
    assert sum(isinstance(outcome, ConflictError) for outcome in done) == 5
    async with hooks.database.transaction("test") as tx:
        found = await events.list_events(tx, hooks.agent_id, 200)
    assert [event.sequence for event in found] == list(range(1, 16))
    assert [json.loads(event.data)["sequence"] for event in found] == list(range(1, 16))
    assert len({event.event_id for event in found}) == 15


async def test_a_reader_never_sees_a_number_before_the_ones_below_it(hooks: Hooks) -> None:
    async def read() -> None:
        seen = 0
        while seen < 40:
            async with hooks.database.transaction("reader") as tx:
                found = await events.list_events(tx, hooks.agent_id, 200, seen)
            assert [event.sequence for event in found] == list(range(seen + 1, seen + 1 + len(found)))
            seen += len(found)

    await asyncio.gather(read(), *(hooks.emit() for _ in range(40)))


async def test_each_agent_and_the_service_have_numbers_of_their_own(hooks: Hooks) -> None:
    async with hooks.database.transaction("test") as tx:
        bob = await accounts.create_agent(tx, "Bob")
        for owner in (hooks.agent_id, bob, None, None, bob, None):
            await events.emit(tx, "market.stale", owner, {"symbol": "BTC"})
        for owner, count in ((hooks.agent_id, 1), (bob, 2), (None, 3)):
            found = await events.list_events(tx, owner, 200)
            assert [event.sequence for event in found] == list(range(1, count + 1))
            assert {json.loads(event.data)["agent_id"] for event in found} == {owner}
        assert len(await events.list_events(tx, None, 200, after=1)) == 2
        assert len(await events.list_events(tx, None, 1)) == 1


async def test_an_event_and_its_deliveries_are_rolled_back_together(hooks: Hooks) -> None:
    await hooks.endpoint("http://127.0.0.1:1/")

    async def fail() -> None:
        async with hooks.database.transaction("test") as tx:
            await events.emit(tx, "zone.changed", hooks.agent_id, {})
            raise ConflictError("no")

    with pytest.raises(ConflictError):
        await fail()
    assert await hooks.deliveries() == []
    assert await hooks.rows("SELECT * FROM events") == []


async def test_what_is_no_event(hooks: Hooks) -> None:
    with pytest.raises(ValueError, match="no event type"):
        await hooks.emit("margin_call.invented")
    with pytest.raises(IntegrityError):
        async with hooks.database.transaction("test") as tx:
            await events.emit(tx, "zone.changed", "agent_nobody", {})


async def test_digits_and_moments_come_back_as_they_went_in(hooks: Hooks) -> None:
    now = hooks.database.clock.now()
    await hooks.emit("zone.changed", amount=Decimal("0.100000000000000001"), at=now, name='a "b" \\ ü', none=None)
    async with hooks.database.transaction("test") as tx:
        (event,) = await events.list_events(tx, hooks.agent_id, 10)
    assert '"amount": 0.100000000000000001' in event.data
    body = events.body_of(event.type, event.timestamp, event.data)
    assert json.loads(body)["data"]["name"] == 'a "b" \\ ü'
    assert json.loads(event.data)["none"] is None


async def test_an_endpoint_is_its_agents_alone(hooks: Hooks) -> None:
    endpoint_id, _ = await hooks.endpoint("http://127.0.0.1:1/")
    await hooks.emit()
    (row,) = await hooks.deliveries()
    async with hooks.database.transaction("test") as tx:
        bob = await accounts.create_agent(tx, "Bob")
    since = hooks.database.clock.now() - timedelta(hours=1)
    for other in (bob, None):
        for call in (
            lambda tx, o: webhooks.get(tx, o, endpoint_id),
            lambda tx, o: webhooks.rotate(tx, o, endpoint_id),
            lambda tx, o: webhooks.enable(tx, o, endpoint_id),
            lambda tx, o: webhooks.delete(tx, o, endpoint_id),
            lambda tx, o: webhooks.send_test(tx, o, endpoint_id),
            lambda tx, o: webhooks.list_deliveries(tx, o, endpoint_id, 10),
            lambda tx, o: webhooks.recover(tx, o, endpoint_id, since),
            lambda tx, o: webhooks.replay(tx, o, row["id"]),
        ):
            with pytest.raises(NotFoundError):
                async with hooks.database.transaction("test") as tx:
                    await call(tx, other)
        async with hooks.database.transaction("test") as tx:
            assert await webhooks.list_endpoints(tx, other) == []


async def test_no_more_endpoints_than_the_limit_even_at_once(hooks: Hooks) -> None:
    made = await asyncio.gather(
        *(hooks.endpoint(f"http://127.0.0.1:1/{i}") for i in range(webhooks.ENDPOINTS_MAX + 5)), return_exceptions=True
    )
    refused = [outcome for outcome in made if isinstance(outcome, ConflictError)]
    assert len(refused) == 5
    assert {error.code for error in refused} == {"too_many_webhooks"}


async def test_a_deleted_endpoint_gets_nothing_more_and_keeps_no_secret(hooks: Hooks, receiver: Receiver) -> None:
    endpoint_id, _ = await hooks.endpoint(receiver.url)
    await hooks.emit()
    async with hooks.database.transaction("test") as tx:
        await webhooks.rotate(tx, hooks.agent_id, endpoint_id)
        await webhooks.delete(tx, hooks.agent_id, endpoint_id)
    await hooks.emit()
    assert await hooks.deliver() == 0
    (row,) = await hooks.rows("SELECT * FROM webhook_endpoints")
    assert (row["secret"], row["secret_before"]) == (None, None)
    (delivery,) = await hooks.deliveries()
    assert delivery["state"] == "failed"
    await hooks.endpoint(receiver.url)


async def test_a_delivery_is_replayed_under_its_own_id(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.endpoint(receiver.url)
    event_id = await hooks.emit()
    await hooks.deliver()
    (row,) = await hooks.deliveries()
    async with hooks.database.transaction("test") as tx:
        assert (await webhooks.replay(tx, hooks.agent_id, row["id"])).state == "pending"
    assert await hooks.deliver() == 1
    assert [got.id for got in receiver.received] == [event_id, event_id]
    (row,) = await hooks.deliveries()
    assert (row["state"], row["attempts"]) == ("delivered", 2)
    async with hooks.database.transaction("test") as tx:
        assert len(await outbox.list_attempts(tx, row["id"])) == 2


async def test_what_was_missed_is_recovered_and_nothing_else(hooks: Hooks, receiver: Receiver) -> None:
    endpoint_id, _ = await hooks.endpoint(receiver.url, "zone.*", "webhook.*")
    delivered = await hooks.emit()
    await hooks.deliver()
    receiver.statuses[:] = [410]
    failed = await hooks.emit()
    await hooks.deliver()
    meanwhile = await hooks.emit()
    await hooks.emit("market.stale")
    async with hooks.database.transaction("test") as tx:
        since = tx.now - timedelta(hours=1)
        for call in (
            webhooks.recover(tx, hooks.agent_id, endpoint_id, since),
            webhooks.send_test(tx, hooks.agent_id, endpoint_id),
        ):
            with pytest.raises(ConflictError, match="410"):
                await call
        assert (await webhooks.enable(tx, hooks.agent_id, endpoint_id)).status == "enabled"
        assert await webhooks.recover(tx, hooks.agent_id, endpoint_id, tx.now) == 0
        assert await webhooks.recover(tx, hooks.agent_id, endpoint_id, since) == 3
        assert await webhooks.recover(tx, hooks.agent_id, endpoint_id, since) == 0
    while await hooks.deliver():
        pass
    assert [got.id for got in receiver.received[:2]] == [delivered, failed]
    again = receiver.received[2:]
    assert {got.id for got in again} > {failed, meanwhile}
    assert {got.event["type"] for got in again} == {"zone.changed", "webhook.disabled"}


@pytest.mark.parametrize("days", [-31, 1])
async def test_since_when_nothing_is_recovered(hooks: Hooks, days: int) -> None:
    endpoint_id, _ = await hooks.endpoint("http://127.0.0.1:1/")
    async with hooks.database.transaction("test") as tx:
        with pytest.raises(InvalidError):
            await webhooks.recover(tx, hooks.agent_id, endpoint_id, tx.now + timedelta(days=days))


async def test_a_test_event_goes_to_one_endpoint_whatever_its_filters(hooks: Hooks, receiver: Receiver) -> None:
    endpoint_id, _ = await hooks.endpoint(receiver.url, "market.stale")
    await hooks.endpoint(receiver.url)
    async with hooks.database.transaction("test") as tx:
        queued = await webhooks.send_test(tx, hooks.agent_id, endpoint_id)
    assert await hooks.deliver() == 1
    assert [(got.id, got.event["type"]) for got in receiver.received] == [(queued.event_id, "webhook.test")]
