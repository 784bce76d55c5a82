"""The timers of clearing: what is due is fired, what fails is put off and holds up no other, two workers do no harm."""

from __future__ import annotations

import asyncio
from decimal import Decimal

from app.services import accounts, shards
from app.services.clearing import Timers
from app.telemetry import Metrics
from tests.services.clearing import Clearing


def timers(clearing: Clearing, name: str = "worker") -> Timers:
    return Timers(name, clearing.desk.database, clearing.scenes, Metrics())


def counted(worker: Timers, name: str, **labels: str) -> float:
    return worker.metrics.registry.get_sample_value(f"primerisk_{name}", labels) or 0.0


async def test_two_workers_fire_what_is_due_once(clearing: Clearing) -> None:
    desk = clearing.desk
    payer, payee = await desk.agent("5000"), await desk.agent("5000")
    held = [await clearing.fund(payer, payee, 100, on_timeout="release") for _ in range(6)]
    waits = await clearing.fund(payer, payee, 100)
    for escrow in held:
        await clearing.pass_deadline(escrow)
    made = await clearing.agree(payer, payee)
    await clearing.owe(made, payer, payee, 50)
    await clearing.make_due(made)
    workers = [timers(clearing, name) for name in ("a", "b")]
    await asyncio.gather(*(worker.fire(shards.ALL) for worker in workers))
    assert sum(counted(w, "escrow_events_total", event="released") for w in workers) == 6
    assert sum(counted(w, "netting_runs_total", outcome="settled") for w in workers) == 1
    assert (await clearing.get(waits)).state == "funded"
    assert (await desk.money(payee))["free"] == 5_650
    assert [counted(w, "clearing_failures_total") for w in workers] == [0, 0]
    await workers[0].fire(shards.ALL)
    assert counted(workers[0], "netting_runs_total", outcome="defaulted") == 0
    await clearing.check()


async def test_shards_share_the_timers_out(clearing: Clearing) -> None:
    payer, payee = await clearing.desk.agent("5000"), await clearing.desk.agent("5000")
    held = await clearing.fund(payer, payee, 100)
    await clearing.pass_deadline(held)
    worker = timers(clearing)
    for shard in shards.ALL:
        await worker.fire({shard})
        if (await clearing.get(held)).state == "refunded":
            break
    else:
        raise AssertionError("no shard has it")


async def test_what_can_not_be_paid_is_put_off_and_holds_up_no_other(clearing: Clearing) -> None:
    """A payee whose balance would pass what a balance holds."""
    desk = clearing.desk
    payer, payee, full = await desk.agent("5000"), await desk.agent(), await desk.agent(Decimal(10) ** 15 - 1)
    stuck = await clearing.fund(payer, full, 100, on_timeout="release")
    fine = await clearing.fund(payer, payee, 100, on_timeout="release")
    for escrow in (stuck, fine):
        await clearing.pass_deadline(escrow)
    worker = timers(clearing)
    await worker.fire(shards.ALL)
    assert counted(worker, "clearing_failures_total") == 1
    assert (await clearing.get(fine)).state == "released"
    assert (await clearing.get(stuck)).state == "funded"
    await worker.fire(shards.ALL)  # left alone for a while
    assert counted(worker, "clearing_failures_total") == 1
    await desk.withdraw(full, "USDC", 1_000)
    await desk.rows("UPDATE escrows SET next_action_at = now() WHERE id = :id RETURNING id", id=stuck.id)
    await worker.fire(shards.ALL)
    assert (await clearing.get(stuck)).state == "released"
    await clearing.check()


async def test_an_account_that_somebody_holds_is_waited_for_alone(clearing: Clearing) -> None:
    desk = clearing.desk
    slow, payer, payee = await desk.agent("5000"), await desk.agent("5000"), await desk.agent()
    held, other = await clearing.fund(slow, payee, 100), await clearing.fund(payer, payee, 100)
    for escrow in (held, other):
        await clearing.pass_deadline(escrow)
    worker = timers(clearing)
    async with desk.database.transaction("slow") as tx:
        await accounts.lock_account(tx, slow)
        await worker.fire(shards.ALL)  # after the lock's patience of some seconds
        assert (await clearing.get(other)).state == "refunded"
    assert (await clearing.get(held)).state == "funded"
    assert counted(worker, "clearing_failures_total") == 0
