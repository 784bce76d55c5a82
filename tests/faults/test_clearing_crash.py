"""Escrows and cut-offs while the API, two workers and Postgres are killed: settled or open, never half, never twice."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import httpx
from sqlalchemy import text

from app.db.session import Database, parse_database_url
from app.errors import DatabaseUnavailableError
from app.services import ledger
from tests.database import make_settings
from tests.faults.stack import ADMIN_KEY, KINDS, Stack, standing

KILLS_A_KIND = 2
ANSWERS_BETWEEN_KILLS = 8
AGENTS = 5
DEPOSIT = Decimal(50_000)
UNIT = Decimal("0.000001")
PATIENCE_SECONDS = 90.0

_OPEN = """
    SELECT (SELECT count(*) FROM escrows WHERE ended_at IS NULL)
         + (SELECT coalesce(sum(open_obligations), 0) FROM netting_agreements)"""


@dataclass(slots=True)
class Street:
    """Agents of a stack that pay each other, and whatever no client should ever see."""

    stack: Stack
    client: httpx.AsyncClient
    rng: random.Random
    keys: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    names: int = 0
    answered: int = 0

    async def send(self, method: str, path: str, body: Any, key: str = ADMIN_KEY) -> tuple[int, Any]:
        """Send a request under a name of its own until it is answered."""
        self.names += 1
        headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": f"request {self.names}"}
        while True:
            try:
                url = f"{self.stack.address}/api{path}"
                answer = await self.client.request(method, url, json=body, headers=headers)
            except httpx.TransportError:
                await asyncio.sleep(0.1)
                continue
            if answer.status_code in (429, 503):
                await asyncio.sleep(0.2)
                continue
            if answer.status_code >= 500:
                self.faults.append(f"{method} {path}: {answer.text}")
            self.answered += 1
            return answer.status_code, answer.json()

    async def open(self) -> str:
        """Make the agents with their money, and the agreement between all; return its path."""
        for k in range(AGENTS):
            _, made = await self.send("POST", "/agents", {"name": f"agent {k}"})
            self.keys[made["agent_id"]] = made["api_key"]
            await self.send("POST", "/wallet/deposits", {"asset": "USDC", "amount": str(DEPOSIT)}, made["api_key"])
        first, *others = self.keys
        body = {"members": others, "services": ["data"], "interval_seconds": 1}
        _, made = await self.send("POST", "/netting/agreements", body, self.keys[first])
        path = f"/netting/agreements/{made['id']}"
        for agent_id in others:
            await self.send("POST", f"{path}/accept", {}, self.keys[agent_id])
        return path

    async def pay(self) -> None:
        """Fund an escrow and see it through, or leave it to its time-out."""
        payer, payee, referrer = self.rng.sample(list(self.keys), 3)
        terms = {
            "payee": payee,
            "amount": f"{self.rng.uniform(1, 900):.6f}",
            "timeout_seconds": self.rng.choice([1, 2, 4]),
            "on_timeout": self.rng.choice(["release", "refund"]),
            "fee_payer": self.rng.choice(["payer", "payee", "split"]),
            "referrer": referrer,
        }
        status, made = await self.send("POST", "/escrows", terms, self.keys[payer])
        if status != 201:
            self.faults.append(f"not funded: {made}")
            return
        for who in self.rng.choice([(), (payee,), (payee, payer), (payer, payee)]):
            await self.send("POST", f"/escrows/{made['id']}/confirm", {}, self.keys[who])

    async def owe(self, path: str) -> None:
        """Book an obligation, and sometimes settle on demand, while cut-offs come by themselves."""
        payer, payee = self.rng.sample(list(self.keys), 2)
        owed = {"payee": payee, "service": "data", "asset": "USDC", "amount": f"{self.rng.uniform(1, 90):.6f}"}
        body = owed | {"reference": f"{self.rng.getrandbits(64):x}"}
        status, said = await self.send("POST", f"{path}/obligations", body, self.keys[payer])
        if status != 201:
            self.faults.append(f"not booked: {said}")
        if self.rng.random() < 0.2:
            await self.send("POST", f"{path}/settle", {}, self.keys[payee])

    async def trade(self, path: str, until: asyncio.Event) -> None:
        while not until.is_set():
            await (self.pay() if self.rng.random() < 0.5 else self.owe(path))

    async def kill(self) -> None:
        """Kill each kind of process in turn, each time in the middle of work: after some answers, a moment later."""
        kinds = self.rng.sample(KINDS * KILLS_A_KIND, len(KINDS) * KILLS_A_KIND)
        for kind in kinds:
            enough = self.answered + ANSWERS_BETWEEN_KILLS
            while self.answered < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await asyncio.sleep(self.rng.uniform(0, 0.3))
            role = self.rng.choice(kind)
            while not self.stack.is_alive(role):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            self.stack.kill(role, self.rng.uniform(0, 0.5))


async def _rows(database: Database, query: str) -> list[tuple[Any, ...]]:
    """Read, through outages."""
    patience = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            async with database.transaction("test") as tx:
                return [tuple(row) for row in await tx.connection.execute(text(query))]
        except DatabaseUnavailableError:
            if time.monotonic() > patience:
                raise
            await asyncio.sleep(0.2)


async def _until_over(database: Database) -> None:
    patience = time.monotonic() + PATIENCE_SECONDS
    while (await _rows(database, _OPEN))[0][0]:
        assert time.monotonic() < patience, await _rows(database, _OPEN)
        await asyncio.sleep(0.2)


async def test_nothing_is_half_settled_whatever_is_killed() -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")  # noqa: T201  shown where it fails
    async with standing() as stack, httpx.AsyncClient(timeout=15) as client:
        street = Street(stack, client, random.Random(seed))
        path = await street.open()
        database = Database(parse_database_url(stack.server.url), make_settings())
        try:
            killed = asyncio.Event()
            trading = asyncio.gather(*(street.trade(path, killed) for _ in range(3)))
            await street.kill()
            killed.set()
            await trading
            await _until_over(database)
            assert street.faults == []
            await _check(database, list(street.keys))
        finally:
            await database.close()


async def _check(database: Database, agents: list[str]) -> None:
    """Check the books, and what each agent has against what the contracts say, added up anew."""
    async with database.transaction("test") as tx:
        assert await ledger.imbalances(tx) == {}
    assert await _rows(database, "SELECT 1 FROM reservations WHERE status = 'open'") == []
    assert await _rows(database, "SELECT 1 FROM netting_positions") == []
    expected = dict.fromkeys(agents, DEPOSIT)
    columns = "id, payer, payee, referrer, state, reason, amount, to_payee, fee, referral, fee_payer"
    escrows = await _rows(database, f"SELECT {columns} FROM escrows")
    assert len(escrows) > 5
    for _, payer, payee, referrer, state, _, amount, to_payee, fee, referral, fee_payer in escrows:
        assert to_payee == (amount if state == "released" else 0)
        of_payee = {"payer": Decimal(0), "payee": fee}.get(fee_payer, fee / 2 // UNIT * UNIT)
        expected[payer] -= to_payee + fee - of_payee
        expected[payee] += to_payee - of_payee
        expected[referrer] += referral
    for payer, payee, amount in await _rows(database, "SELECT payer, payee, amount FROM netting_obligations"):
        expected[payer] -= amount
        expected[payee] += amount
    charged = "SELECT from_owner, amount FROM ledger_entries WHERE service = 'netting' AND to_bucket = 'fees'"
    for payer, fee in await _rows(database, charged):
        expected[payer] -= fee
    held = dict(await _rows(database, "SELECT agent_id, sum(amount) FROM balances GROUP BY 1"))
    assert held == expected
    # each end was one batch of the ledger, each settled number is in one run, each end was told once to each party
    batches = dict(await _rows(database, "SELECT reference, count(DISTINCT batch) FROM ledger_entries"
                                         " WHERE kind = 'escrow' GROUP BY 1"))  # fmt: skip
    assert batches == {row[0]: 1 for row in escrows}
    runs = await _rows(database, "SELECT after_seq, last_seq, obligations FROM netting_runs ORDER BY last_seq")
    assert [run[0] for run in runs[1:]] == [run[1] for run in runs[:-1]]
    [(booked,)] = await _rows(database, "SELECT count(*) FROM netting_obligations")
    assert sum(run[2] for run in runs) == booked
    told = Counter(await _rows(database, "SELECT agent_id, data->>'escrow_id' FROM events"
                                         " WHERE type IN ('escrow.released', 'escrow.refunded')"))  # fmt: skip
    for escrow_id, payer, payee, *_ in escrows:
        assert (told[payer, escrow_id], told[payee, escrow_id]) == (1, 1)
