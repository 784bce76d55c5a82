"""Escrows and netting on a desk: each call in a transaction of its own, as routes and timers make it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from itertools import count
from typing import Any

from app.domain.escrow import Kind, Leg
from app.services import agreements, escrows, netting, statements
from app.services.agreements import Agreement, NewAgreement
from app.services.escrows import Done, Escrow, NewEscrow, Share
from app.services.margin import Scenes
from app.services.netting import NewObligation, Ran
from app.services.statements import Obligation, Stated, Statement
from app.services.wallet import Names
from tests.services.desk import ACTOR, ITEMS_MAX, PURSES, Amount, Desk

_REFERENCES = count(1)


@dataclass
class Clearing:
    """Acts on the clearing of one desk."""

    desk: Desk
    scenes: Scenes = field(init=False)

    def __post_init__(self) -> None:
        self.scenes = Scenes(self.desk.market, timedelta(hours=1), ITEMS_MAX)

    async def fund(self, payer: str, payee: str, amount: Amount, asset: str = "USDC", **more: Any) -> Escrow:
        timeout = more.pop("timeout_seconds", 3_600)
        counter = more.pop("counter", None)
        if counter is not None:
            more["counter"] = Leg(counter[0], Decimal(counter[1]))
        asked = NewEscrow(payee, Leg(asset, Decimal(amount)), timeout, more.pop("on_timeout", "refund"), **more)
        async with self.desk.locked(payer) as (tx, scene, held):
            return (await escrows.fund(tx, scene, held, asked, Names())).escrow

    async def act(self, agent_id: str | None, escrow: Escrow | str, kind: Kind, **more: Any) -> Done:
        escrow_id = escrow if isinstance(escrow, str) else escrow.id
        async with self.desk.database.transaction(ACTOR) as tx:
            return await escrows.act(tx, self.scenes, agent_id, escrow_id, kind, **more)

    async def confirm(self, agent_id: str, escrow: Escrow) -> Done:
        return await self.act(agent_id, escrow, "confirm")

    async def resolve(
        self, agent_id: str | None, escrow: Escrow, amount: Amount | None = None, fraction: Amount | None = None
    ) -> Done:
        share = Share(*(None if part is None else Decimal(part) for part in (amount, fraction)))
        return await self.act(agent_id, escrow, "resolve", share=share)

    async def fire(self, escrow: Escrow) -> Done | None:
        async with self.desk.database.transaction("worker") as tx:
            return await escrows.fire(tx, self.scenes, escrow.id)

    async def pass_deadline(self, escrow: Escrow) -> None:
        """Have an escrow be as old as its time-out: its clock is the database's, and its dates are rows."""
        statement = (
            "UPDATE escrows SET funded_at = funded_at - (deadline_at - now()), deadline_at = now(),"
            " next_action_at = now() WHERE id = :id RETURNING id"
        )
        assert await self.desk.rows(statement, id=escrow.id)

    async def pass_deadline_of_a_dispute(self, escrow: Escrow) -> None:
        statement = "UPDATE escrows SET deadline_at = now() - interval '1 day' WHERE id = :id RETURNING id"
        assert await self.desk.rows(statement, id=escrow.id)

    async def get(self, escrow: Escrow) -> Escrow:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await escrows.get(tx, None, escrow.id)

    # --- netting

    async def agree(self, *members: str, services: tuple[str, ...] = ("data",), **more: Any) -> Agreement:
        """Propose an agreement as the first of these agents, and have the others accept it."""
        if "threshold" in more:
            more["threshold"] = Decimal(more["threshold"])
        asked = NewAgreement("netting", members[1:], services, **more)
        async with self.desk.database.transaction(ACTOR) as tx:
            made = await agreements.propose(tx, await self.scenes.at(tx), members[0], asked)
        for member in members[1:]:
            made = await self.accept(member, made)
        return made

    async def accept(self, agent_id: str, agreement: Agreement) -> Agreement:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await agreements.accept(tx, agent_id, agreement.id)

    async def leave(self, agent_id: str, agreement: Agreement) -> Agreement:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await agreements.leave(tx, agent_id, agreement.id)

    async def agreement(self, agreement: Agreement) -> Agreement:
        async with self.desk.database.transaction(ACTOR) as tx:
            return await agreements.get(tx, None, agreement.id)

    async def owe(
        self, agreement: Agreement, payer: str, payee: str, amount: Amount, asset: str = "USDC", **more: Any
    ) -> Obligation:
        """Book an obligation, under a reference of its own unless one is given."""
        reference = more.pop("reference", None) or f"ref-{next(_REFERENCES)}"
        service = more.pop("service", "data")
        asked = NewObligation(payee, service, asset, Decimal(amount), reference, **more)
        async with self.desk.database.transaction(ACTOR) as tx:
            return (await netting.book_obligation(tx, self.scenes, payer, agreement.id, asked))[0]

    async def settle(self, agreement: Agreement, agent_id: str | None = None) -> Ran | None:
        """Run an agreement: for a member, or because it is due."""
        async with self.desk.database.transaction(ACTOR) as tx:
            return await netting.run(tx, self.scenes, agreement.id, agent_id)

    async def statement(self, agent_id: str, agreement: Agreement, **more: Any) -> tuple[Stated, Statement]:
        async with self.desk.database.transaction(ACTOR) as tx:
            said = await statements.stated(tx, agent_id, agreement.id, **more)
        return said, statements.worked_out(said)

    async def make_due(self, agreement: Agreement) -> None:
        statement = "UPDATE netting_agreements SET next_action_at = now() WHERE id = :id RETURNING id"
        assert await self.desk.rows(statement, id=agreement.id)

    # --- what there is

    async def purses(self, asset: str = "USDC") -> dict[tuple[str, str], Any]:
        """Return what every purse holds of an asset, from the entries alone, empty ones left out."""
        rows = await self.desk.rows(PURSES)
        return {(owner, bucket): held for owner, of, bucket, held in rows if of == asset and held != 0}

    async def check(self) -> None:
        """Check that balances are what the entries say, and reserved what open reservations hold."""
        assert await self.desk.imbalances() == {}
        off = await self.desk.rows(
            """
            SELECT agent_id, asset, b.amount, r.held FROM (
                SELECT agent_id, asset, amount FROM balances WHERE bucket = 'reserved' AND amount > 0) AS b
            FULL JOIN (
                SELECT agent_id, asset, sum(remaining) AS held FROM reservations WHERE status = 'open'
                GROUP BY agent_id, asset) AS r USING (agent_id, asset)
            WHERE b.amount IS DISTINCT FROM r.held
            """
        )
        assert off == []
        # running sums are those of what is open, and nothing is half settled
        sums = await self.desk.rows(
            """
            SELECT agreement_id, agent_id, asset, sum(pays), sum(receives) FROM (
                SELECT o.agreement_id, o.payer AS agent_id, o.asset, o.amount AS pays, 0 AS receives, o.seq
                FROM netting_obligations o
                UNION ALL
                SELECT o.agreement_id, o.payee, o.asset, 0, o.amount, o.seq FROM netting_obligations o) AS sides
            JOIN netting_agreements a ON a.id = agreement_id AND sides.seq > a.settled_through
            GROUP BY agreement_id, agent_id, asset ORDER BY 1, 2, 3
            """
        )
        kept = "SELECT agreement_id, agent_id, asset, pays, receives FROM netting_positions ORDER BY 1, 2, 3"
        assert sums == await self.desk.rows(kept)
        through = await self.desk.rows(
            """
            SELECT a.id FROM netting_agreements a LEFT JOIN netting_runs r
            ON r.agreement_id = a.id AND r.outcome = 'settled'
            GROUP BY a.id, a.settled_through HAVING coalesce(max(r.last_seq), 0) <> a.settled_through
            """
        )
        assert through == []

    async def events(self, agent_id: str, family: str = "escrow") -> list[str]:
        rows = await self.desk.rows(
            "SELECT type FROM events WHERE agent_id = :id AND type LIKE :family ORDER BY sequence",
            id=agent_id,
            family=f"{family}.%",
        )
        return [row[0] for row in rows]
