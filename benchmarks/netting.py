"""How long does a cut-off take? Thousands of obligations of a group, netted in one transaction on an embedded Postgres.

Obligations are written in bulk, with the running sums and reservations that booking them one by one leaves; the run
is the service's own. Beside it, the same obligations paid one by one by the ledger. `make bench`, or
`python -m benchmarks.netting`.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sqlalchemy import insert, text

from app.db import embedded, migrate
from app.db.clearing_tables import netting_obligations
from app.db.session import Database, Tx, parse_database_url
from app.domain.moves import Move, agent
from app.services import accounts, agreements, book, ledger, netting, statements, wallet
from app.services.agreements import NewAgreement
from app.services.ledger import Occasion
from app.services.margin import Scenes
from app.services.market_cache import MarketCache
from app.services.wallet import Names, NewReservation
from app.settings import Settings

OBLIGATIONS = 5_000
ROUNDS = 5
PAID_ONE_BY_ONE = 200
TARGET_SECONDS = 2.0
CASES = ((2, 1), (20, 1), (50, 3))
"""Members and assets."""
ASSETS = ("USDC", "USDT", "DAI")

_SUMS = text(
    """
    INSERT INTO netting_positions (agreement_id, agent_id, asset, pays, receives)
    SELECT agreement_id, agent_id, asset, sum(pays), sum(receives) FROM (
        SELECT agreement_id, payer AS agent_id, asset, amount AS pays, 0 AS receives, seq FROM netting_obligations
        UNION ALL SELECT agreement_id, payee, asset, 0, amount, seq FROM netting_obligations) AS sides
    WHERE agreement_id = :id AND seq > :after GROUP BY agreement_id, agent_id, asset
    """
)
_COUNT = text("UPDATE netting_agreements SET open_obligations = :count WHERE id = :id")


@dataclass(frozen=True, slots=True)
class Group:
    """Agents that net with each other in some assets, on one database."""

    database: Database
    scenes: Scenes
    members: list[str]
    assets: tuple[str, ...]
    agreement_id: str

    async def book(self, rng: random.Random) -> None:
        """Write obligations in bulk, and what booking them leaves."""
        async with self.database.transaction("benchmark") as tx:
            agreement = await agreements.get(tx, None, self.agreement_id)
            rows = [self._row(rng, tx, k) for k in range(OBLIGATIONS)]
            await tx.connection.execute(insert(netting_obligations), rows)
            values = {"id": self.agreement_id, "after": agreement.settled_through, "count": OBLIGATIONS}
            await tx.connection.execute(_SUMS, values)
            await tx.connection.execute(_COUNT, values)
            now = await statements.stated(tx, self.members[0], self.agreement_id, limit=1)
            for position in statements.worked_out(now).positions:
                cover = agreement.terms.cover(position.asset, position.net)
                asked = NewReservation("netting", position.asset, cover, reducible=False, bound_to=agreement.id)
                await wallet.fit_bound(tx, await book.lock(tx, position.agent_id), asked, Names())

    def _row(self, rng: random.Random, tx: Tx, k: int) -> dict[str, object]:
        payer, payee = rng.sample(self.members, 2)
        amount = Decimal(rng.randrange(1, 10**8)) / 10**6
        return {
            "id": f"obl_{rng.getrandbits(64):x}",
            "agreement_id": self.agreement_id,
            "payer": payer,
            "payee": payee,
            "service": "data",
            "asset": self.assets[k % len(self.assets)],
            "amount": amount,
            "reference": f"{rng.getrandbits(64):x}",
            "booked_by": "benchmark",
            "booked_at": tx.now,
        }

    async def settle(self) -> float:
        """Return the seconds of a cut-off, from the beginning of its transaction to its commit."""
        begun = time.perf_counter()
        async with self.database.transaction("benchmark") as tx:
            ran = await netting.run(tx, self.scenes, self.agreement_id, self.members[0])
        seconds = time.perf_counter() - begun
        if ran is None or (ran.run.outcome, ran.run.obligations) != ("settled", OBLIGATIONS):
            raise SystemExit(f"not settled: {ran}")
        return seconds

    async def pay(self, rng: random.Random) -> float:
        """Return the seconds of one payment by itself, as the mean of some."""
        begun = time.perf_counter()
        for _ in range(PAID_ONE_BY_ONE):
            payer, payee = rng.sample(self.members, 2)
            async with self.database.transaction("benchmark") as tx:
                await book.lock_all(tx, [payer, payee])
                move = Move(self.assets[0], Decimal(1), agent(payer, "free"), agent(payee, "free"))
                await ledger.post(tx, Occasion(payer, "data", "settle"), [move])
        return (time.perf_counter() - begun) / PAID_ONE_BY_ONE


async def _group(database: Database, members: int, assets: int) -> Group:
    scenes = Scenes(MarketCache(database), timedelta(hours=1), 1_000)
    async with database.transaction("benchmark") as tx:
        agents = [await accounts.create_agent(tx, "benchmark") for _ in range(members)]
        scene = await scenes.at(tx)
        for agent_id in agents:
            for asset in ASSETS[:assets]:
                held = await book.lock(tx, agent_id)
                await wallet.deposit(tx, scene, held, asset, Decimal(10_000_000), Names())
        made = await agreements.propose(tx, scene, agents[0], NewAgreement("benchmark", agents[1:], ["data"]))
        for agent_id in agents[1:]:
            await agreements.accept(tx, agent_id, made.id)
    return Group(database, scenes, agents, ASSETS[:assets], made.id)


async def _measure(url: str) -> None:
    address = parse_database_url(url)
    await migrate.upgrade(address)
    database = Database(address, Settings())
    rng = random.Random(1)
    name = f"{OBLIGATIONS:,} obligations in one transaction"
    table = Table(name, "median s", "worst s", "target s", "paid one by one s", "ratio", box=None)
    try:
        async with database.transaction("benchmark") as tx:
            await tx.connection.execute(text("INSERT INTO market_prices VALUES ('DAI', 1, now(), now(), 1)"))
            await tx.connection.execute(text("UPDATE market_state SET version = 1 WHERE name = 'prices'"))
        for members, assets in CASES:
            group = await _group(database, members, assets)
            took = []
            for _ in range(ROUNDS):
                await group.book(rng)
                took.append(await group.settle())
            took.sort()
            single = OBLIGATIONS * await group.pay(rng)
            shown = f"{members} members, {assets} assets"
            figures = (f"{took[ROUNDS // 2]:.2f}", f"{took[-1]:.2f}", f"<= {TARGET_SECONDS:g}", f"{single:.0f}")
            table.add_row(shown, *figures, f"{single / took[ROUNDS // 2]:.0f}x")
    finally:
        await database.close()
    Console(width=120).print(table)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory, embedded.start(Path(directory) / "data") as served:
        asyncio.run(_measure(served.url))


if __name__ == "__main__":
    main()
