"""What a member of a fleet does with its master's money behind it: drawn where its own does not do, given back after.

The member's request runs as anybody's; where a gate refuses it for want of money, what is missing is drawn and it runs
again, all in one transaction under both locks. What the member can spare after it flows back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import TypeVar

from app.db.session import Tx
from app.domain.book import ZERO, Book
from app.domain.money import plain, round_owned, to_decimal, to_float
from app.domain.moves import SETTLEMENT_ASSET, SETTLEMENT_DECIMALS, Move, agent, pay_in
from app.domain.quote import AccountFigures
from app.errors import ConflictError, InvalidError, conflict
from app.services import book, fleets, ledger, wallet
from app.services.fleets import Member
from app.services.ledger import Occasion
from app.services.margin import Scene, Scenes

T = TypeVar("T")
Effect = Callable[[Tx, Book, Scene], Awaitable[T]]

DRAWS_MAX = 4
"""Draws of one request: for what is not free, for the gate, for the leverage cap, and for a rounding."""
SERVICE = "fleet"
_CENT = Decimal("0.01")
_EXHAUSTED = ("delegation_exhausted", "fleet_exhausted")


class MasterNeeded(Exception):  # noqa: N818  no error: the transaction is begun anew with another lock
    """A member's request needs the master's account too, and locks are taken in the order of their ids."""

    def __init__(self, master_id: str) -> None:
        super().__init__(master_id)
        self.master_id = master_id


@dataclass(frozen=True, slots=True)
class Pair:
    """A member's book and its master's, both locked."""

    member: Book
    master: Book


async def alone(tx: Tx, scenes: Scenes, agent_id: str, effect: Effect[T]) -> T:
    """Run an effect on a book, whoever's it is. Raises MasterNeeded where the agent's fleet has a say in it."""
    held = await book.lock(tx, agent_id)
    delegation = held.delegation
    if delegation is not None and delegation.drawn > 0:
        raise MasterNeeded(delegation.master_id)
    scene = await scenes.at(tx)
    try:
        return await effect(tx, held, scene)
    except ConflictError as refused:
        if delegation is None or _missing(scene, refused) is None:
            raise
        raise MasterNeeded(delegation.master_id) from refused


async def together(tx: Tx, scenes: Scenes, agent_id: str, master_id: str, service: str, effect: Effect[T]) -> T:
    """Run an effect on a member's book with its fleet's money behind it. Raises what it raises, or why none is left."""
    books = await book.lock_all(tx, {agent_id, master_id})
    scene, pair = await scenes.at(tx), Pair(books[agent_id], books[master_id])
    delegation = pair.member.delegation
    if delegation is None or delegation.master_id != master_id:
        return await effect(tx, pair.member, scene)  # it has left the fleet meanwhile
    for _ in range(DRAWS_MAX):
        try:
            async with tx.connection.begin_nested():
                done = await effect(tx, pair.member, scene)
        except ConflictError as refused:
            missing = _missing(scene, refused)
            if missing is None:
                raise
            pair = await draw(tx, scene, pair, service, missing)
        else:
            await give_back(tx, scene, Pair(await book.load(tx, agent_id), pair.master))
            return done
    return await effect(tx, pair.member, scene)


def is_exhausted(refused: ConflictError) -> bool:
    """Whether a request was refused for the end of what a member, or its fleet, may draw."""
    return refused.code in _EXHAUSTED


def _missing(scene: Scene, refused: ConflictError) -> Decimal | None:
    """Return how much more USDC would have made a refused request pass, in whole cents; None: no money would."""
    if refused.code == "insufficient_funds" and refused.figures.get("asset") == SETTLEMENT_ASSET:
        return Decimal(refused.figures["missing"])
    shortfall = refused.figures.get("shortfall")
    if refused.code not in ("insufficient_margin", "leverage_above_cap") or not shortfall:
        return None
    worth = scene.worth(SETTLEMENT_ASSET, Decimal(1))
    return to_decimal(shortfall / worth).quantize(_CENT, ROUND_CEILING) if worth > 0.0 else None


async def draw(tx: Tx, scene: Scene, pair: Pair, service: str, amount: Decimal) -> Pair:
    """Move USDC from the master to the member; return the books that it leaves.

    Raises ConflictError; `fleet_call_is_live` where it would leave a pool that is under a margin call.
    """
    of = pair.member.delegation
    if of is not None and not of.is_pooled and pair.master.is_in_called_pool:
        detail = "the fleet is under a margin call: who is isolated draws nothing out of its pool"
        raise conflict("/amount", "fleet_call_is_live", detail)
    drawn = await fleets.take(tx, pair.master.agent_id, pair.member.agent_id, service, amount)
    return await _moved(tx, scene, pair, moves_of_draw(scene, pair, amount), drawn, amount)


def moves_of_draw(scene: Scene, pair: Pair, amount: Decimal) -> list[Move]:
    """Return the moves of a draw. Raises ConflictError where the master's own book can't spare it."""
    member, master = pair.member, pair.master
    free = master.holding(SETTLEMENT_ASSET).free
    if amount > free:
        detail = f"{amount:f} {SETTLEMENT_ASSET} more are needed, {free:f} are free with the master"
        raise conflict("/amount", "fleet_exhausted", detail, available=free, needed=amount)
    source, owed = agent(master.agent_id, "free"), member.holding(SETTLEMENT_ASSET).owed
    moves = pay_in(member.agent_id, SETTLEMENT_ASSET, amount, source, owed)
    try:
        scene.require_margin(master, master.after_moves(moves), "/amount")
    except ConflictError as refused:
        detail = f"{amount:f} {SETTLEMENT_ASSET} more are needed, which the master's own book can't spare"
        raise conflict("/amount", "fleet_exhausted", detail, needed=amount) from refused
    return moves


async def give_back(tx: Tx, scene: Scene, pair: Pair) -> Pair:
    """Move what the member can spare of what it has drawn back to the master; return the books that it leaves."""
    member, master = pair.member, pair.master
    amount = spare(scene, member)
    if amount <= 0:
        return pair
    drawn = await fleets.put_back(tx, member.agent_id, amount)
    source, owed = agent(member.agent_id, "free"), master.holding(SETTLEMENT_ASSET).owed
    moves = pay_in(master.agent_id, SETTLEMENT_ASSET, amount, source, owed)
    return await _moved(tx, scene, pair, moves, drawn, -amount)


async def sweep(tx: Tx, scene: Scene, pair: Pair, amount: Decimal | None) -> Decimal:
    """Move a member's own USDC that it can do without to the master, all or an amount of it; return how much.

    Both are locked, and what it could spare of what it drew is given back. Raises ConflictError.
    """
    member, master, delegation = pair.member, pair.master, pair.member.delegation
    most = max(ZERO, loose(scene, member) - (ZERO if delegation is None else delegation.drawn))
    moved = most if amount is None else amount
    if moved > most:
        detail = f"{plain(most):f} {SETTLEMENT_ASSET} are its own and not needed for what is open"
        raise ledger.insufficient_funds(detail, available=plain(most))
    if moved > 0:
        source, owed = agent(member.agent_id, "free"), master.holding(SETTLEMENT_ASSET).owed
        moves = pay_in(master.agent_id, SETTLEMENT_ASSET, moved, source, owed)
        reference = None if delegation is None else delegation.fleet_id
        await ledger.post(tx, Occasion(member.agent_id, SERVICE, "sweep", reference), moves)
        await _shift_peaks(tx, scene, pair, -moved)
    return moved


async def write_off(tx: Tx, member: Book, stored: Member) -> Member:
    """Count what a member has drawn and lost as lost. Both are locked, and what it could spare is given back.

    Raises ConflictError `positions_open` while anything is open, set aside or held that may still bring some back. What
    it owes the house, having lost more than it had, brings nothing back.
    """
    if stored.drawn <= 0:
        return stored
    borrows = any(holding.borrowed > 0 for holding in member.holdings.values())
    is_open = bool(member.positions or member.pending or member.reservations) or borrows
    if is_open or member.holding(SETTLEMENT_ASSET).held > 0:
        raise conflict("/drawn", "positions_open", "something is open or held: what is lost shows when nothing is")
    return await fleets.write_off(tx, stored)


def spare(scene: Scene, member: Book) -> Decimal:
    """Return how much of what it has drawn a member can do without, USDC."""
    return ZERO if member.delegation is None else min(member.delegation.drawn, loose(scene, member))


def loose(scene: Scene, member: Book) -> Decimal:
    """Return how much of its free USDC an account can do without.

    All where nothing is open; else what leaves utilization at its target and gross notional within the cap. Nothing
    while a margin call is live, or on prices that are stale or missing.
    """
    free = member.holding(SETTLEMENT_ASSET).free
    if member.live_call is not None:
        return ZERO
    if not member.is_leveraged or free <= 0:
        return free
    try:
        figures = scene.figures(scene.exposed(member))
        scene.require_fresh(figures)
        worth = scene.worth(SETTLEMENT_ASSET, Decimal(1))
    except (ConflictError, InvalidError):
        return ZERO
    unused = _unused(scene, member, figures) / worth if worth > 0.0 else 0.0
    return min(free, round_owned(to_decimal(max(0.0, unused)), SETTLEMENT_DECIMALS))


def _unused(scene: Scene, member: Book, figures: AccountFigures) -> float:
    """Return the equity above what the account's target and the leverage cap ask for, USD."""
    policy = member.settings.policy(scene.market.parameters.policy)
    health, gross = figures.health, figures.gross_notional / policy.leverage_cap
    return min(health.equity - health.required_initial / policy.target_utilization, figures.equity - gross)


async def _moved(tx: Tx, scene: Scene, pair: Pair, moves: list[Move], drawn: Decimal, amount: Decimal) -> Pair:
    member, delegation = pair.member, pair.member.delegation
    if delegation is None:
        raise RuntimeError("a draw of who is no member")
    kind: ledger.Kind = "delegate" if amount > 0 else "undelegate"
    await ledger.post(tx, Occasion(member.agent_id, SERVICE, kind, delegation.fleet_id), moves)
    await _shift_peaks(tx, scene, pair, amount)
    after = replace(member.after_moves(moves), delegation=replace(delegation, drawn=drawn))
    return Pair(after, pair.master.after_moves(moves))


async def _shift_peaks(tx: Tx, scene: Scene, pair: Pair, amount: Decimal) -> None:
    """Have what came in to the member, or (below zero) went to the master, be no profit or loss of either."""
    worth = scene.worth(SETTLEMENT_ASSET, abs(amount)) * (1.0 if amount > 0 else -1.0)
    for held, flow in ((pair.member, worth), (pair.master, -worth)):
        await wallet.shift_peak(tx, scene, held, flow)


def net_utilization(required: float, balance: Decimal) -> float | None:
    """Return what members have required of the master's wallet as a share of it; None where that is empty."""
    return required / to_float(balance) if balance > 0 else None
