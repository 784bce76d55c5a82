"""A fleet's books, read together, and what they come to as one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import Text, any_, bindparam, select
from sqlalchemy.dialects.postgresql import ARRAY

from app.db.fleet_tables import fleet_members
from app.db.fleet_tables import fleets as known_fleets
from app.db.session import Tx
from app.domain.book import ZERO, Book
from app.domain.fleet import merged
from app.domain.moves import SETTLEMENT_ASSET
from app.domain.quote import AccountFigures
from app.services import book, fleets
from app.services.fleet_limits import reachable
from app.services.fleets import Fleet, Member
from app.services.margin import Scene


@dataclass(frozen=True, slots=True)
class FleetBooks:
    """A fleet, its master's book, and its members that have joined with theirs, in the order in which they came."""

    fleet: Fleet
    master: Book
    members: list[tuple[Member, Book]]

    @property
    def pooled(self) -> list[Book]:
        """The books of the members whose delegation is pooled."""
        return [held for member, held in self.members if member.delegation == "pooled"]

    @property
    def rebalanced(self) -> list[Member]:
        """The members whose delegation is set anew with the others': who is to reduce keeps its own."""
        return [member for member, _ in self.members if not member.reduce_only]


async def load(tx: Tx, fleet: Fleet) -> FleetBooks:
    """Return the books of a fleet, all as one statement sees them; who its members are as another one does."""
    members = [m for m in await fleets.list_members(tx, fleet.id, fleets.MEMBERS_MAX) if m.joined_at is not None]
    books = await book.load_all(tx, [fleet.master_id, *(m.agent_id for m in members)])
    return FleetBooks(fleet, books[fleet.master_id], [(m, books[m.agent_id]) for m in members])


async def masters_of(tx: Tx, agents: Collection[str]) -> dict[str, str]:
    """Return, of these agents, those that are members of a fleet, each with who leads it.

    They are one argument: in a crash they may be more than a statement has arguments.
    """
    of_member, of_fleet = fleet_members.c, known_fleets.c
    named = bindparam("agents", list(agents), ARRAY(Text))
    query = select(of_member.agent_id, of_fleet.master_id).join(known_fleets, of_fleet.id == of_member.fleet_id)
    joined = query.where(of_member.agent_id == any_(named), of_member.joined_at.is_not(None))
    return {row.agent_id: row.master_id for row in await tx.connection.execute(joined)}


def figures(scene: Scene, books: FleetBooks) -> AccountFigures:
    """Return what the master and its pooled members come to as one book. Raises InvalidError for a missing price."""
    return scene.figures(merged(books.master, books.pooled))


def balance(master: Book, fleet: Fleet) -> Decimal:
    """Return the master's wallet, USDC: what it holds less what it owes, and what its members have drawn of it."""
    held = master.holding(SETTLEMENT_ASSET)
    return held.held - held.debt + fleet.drawn


def reach(books: FleetBooks) -> Decimal:
    """Return what all members together may have drawn, USDC."""
    fleet = books.fleet
    held = balance(books.master, fleet) - fleet.drawn
    return reachable(held, fleet.drawn, fleet.dry_powder, released=fleet.released_at is not None)


def to_share_out(books: FleetBooks) -> Decimal:
    """Return what there is to be delegated anew, USDC: what all may reach less what those have who are to reduce."""
    kept = (max(member.max_margin, member.drawn) for member, _ in books.members if member.reduce_only)
    return max(ZERO, reach(books) - sum(kept, ZERO))
