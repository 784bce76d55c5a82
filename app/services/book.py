"""An agent's stored book, read whole in one statement."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from decimal import Decimal

import msgspec
from sqlalchemy import ARRAY, Text, bindparam, text

from app.db.session import Database, Tx
from app.domain.book import (
    AccountSettings,
    Book,
    Delegation,
    Holding,
    LentLoan,
    OpenPosition,
    OpenReservation,
    PendingOrder,
)
from app.errors import NotFoundError
from app.services.accounts import hold_account, lock_account, lock_accounts

BOOKS_REMEMBERED_MAX = 1_024


class _Row(msgspec.Struct):
    """What the statement returns, as JSON: Postgres writes numerics with all their digits."""

    settings: AccountSettings
    version: int
    balances: list[tuple[str, str, Decimal]]
    positions: list[OpenPosition]
    reservations: list[OpenReservation]
    live_call: tuple[str, str] | None
    rung: int
    pending: list[PendingOrder]
    loans: list[LentLoan]
    delegation: Delegation | None
    leads: str | None


LOANS_RECALLED_MAX = 200
"""Loans that a margin call recalls at once; those that can be had back soonest are read first."""

_BOOK_OF = f"""
    json_build_object(
        'settings', to_json(a),
        'version', a.version,
        'balances', coalesce((
            SELECT json_agg(json_build_array(asset, bucket, amount) ORDER BY asset, bucket)
            FROM balances b WHERE b.agent_id = a.agent_id AND amount > 0), '[]'),
        'positions', coalesce((
            SELECT json_agg(p ORDER BY seq)
            FROM positions p WHERE p.agent_id = a.agent_id AND closed_at IS NULL), '[]'),
        'reservations', coalesce((
            SELECT json_agg(r ORDER BY seq)
            FROM reservations r WHERE r.agent_id = a.agent_id AND status = 'open'), '[]'),
        'live_call', (
            SELECT json_build_array(state, cause) FROM margin_calls c WHERE c.agent_id = a.agent_id
            AND state IN ('noticed', 'open', 'expired', 'liquidating')),
        'rung', coalesce((SELECT rung FROM account_watch w WHERE w.agent_id = a.agent_id), 0),
        'pending', coalesce((
            SELECT json_agg(json_build_object(
                'id', id, 'symbol', symbol, 'side', side, 'remaining', size - filled_size, 'reduce_only', reduce_only,
                'leverage', leverage, 'margin_mode', margin_mode, 'margin_call_id', margin_call_id) ORDER BY seq)
            FROM orders o WHERE o.agent_id = a.agent_id AND status IN ('pending', 'partially_filled')), '[]'),
        'loans', coalesce((
            SELECT json_agg(json_build_object(
                'id', id, 'asset', asset, 'principal', principal, 'notice_seconds', notice_seconds,
                'asked_back', recalled = principal OR wanted_by IS NOT NULL) ORDER BY seq)
            FROM (SELECT * FROM loans l
                WHERE l.lender_id = a.agent_id AND status IN ('active', 'recalled') AND notice_seconds <= 86400
                ORDER BY notice_seconds, seq LIMIT {LOANS_RECALLED_MAX}) AS soonest), '[]'),
        'delegation', (
            SELECT json_build_object(
                'fleet_id', m.fleet_id, 'master_id', f.master_id, 'max_margin', m.max_margin, 'drawn', m.drawn,
                'services', m.services, 'reduce_only', m.reduce_only, 'delegation', m.delegation,
                'fleet_call', c.state, 'fleet_in_doubt', coalesce(jsonb_exists(c.figures, 'in_doubt'), false),
                'fleet_call_is_spent', coalesce(c.state = 'expired' OR c.exhausted_at IS NOT NULL, false))
            FROM fleet_members m JOIN fleets f ON f.id = m.fleet_id
            LEFT JOIN margin_calls c ON c.agent_id = f.master_id AND c.cause = 'fleet'
                AND c.state IN ('noticed', 'open', 'expired', 'liquidating')
            WHERE m.agent_id = a.agent_id AND m.joined_at IS NOT NULL),
        'leads', (SELECT id FROM fleets f WHERE f.master_id = a.agent_id)
    )::text"""  # noqa: S608  no value from outside
BOOK_QUERY = f"SELECT {_BOOK_OF} FROM accounts a WHERE a.agent_id = $1"  # noqa: S608  nor here

_BOOK = text(BOOK_QUERY.replace("$1", ":agent_id"))
_BOOKS = text(f"SELECT agent_id, {_BOOK_OF} AS book FROM accounts a WHERE agent_id = ANY (:agents)")  # noqa: S608
_BOOKS = _BOOKS.bindparams(bindparam("agents", type_=ARRAY(Text)))
_last_read: OrderedDict[str, tuple[str, Book]] = OrderedDict()
"""The last row of an agent and the book it is: the same row is the same book, which nobody changes."""
_decoder = msgspec.json.Decoder(_Row)


async def load(tx: Tx, agent_id: str) -> Book:
    """Return an agent's book as the transaction sees it. Raises NotFoundError."""
    found = await tx.connection.execute(_BOOK, {"agent_id": agent_id})
    return _book(agent_id, found.scalar_one_or_none())


async def load_all(tx: Tx, agent_ids: Collection[str]) -> dict[str, Book]:
    """Return several agents' books by id, all as one statement sees them; who is not there is left out."""
    rows = await tx.connection.execute(_BOOKS, {"agents": list(agent_ids)})
    return {row.agent_id: _decoded(row.agent_id, row.book) for row in rows}


async def read(database: Database, agent_id: str) -> Book:
    """Return an agent's book outside a transaction: one statement is one snapshot. Raises NotFoundError."""
    return _book(agent_id, await database.fetch_value(BOOK_QUERY, agent_id))


async def lock(tx: Tx, agent_id: str) -> Book:
    """Lock an agent's book and return it as the last change left it. Raises NotFoundError."""
    await lock_account(tx, agent_id)
    return await load(tx, agent_id)


async def lock_all(tx: Tx, agent_ids: Collection[str]) -> dict[str, Book]:
    """Lock several agents' books in the order of their ids, and return them by id. Raises NotFoundError."""
    await lock_accounts(tx, agent_ids)
    return {agent_id: await load(tx, agent_id) for agent_id in sorted(set(agent_ids))}


async def hold(tx: Tx, agent_id: str) -> Book:
    """Lock an agent's book to look at it, and return it; whoever then changes it calls `lock_account`."""
    await hold_account(tx, agent_id)
    return await load(tx, agent_id)


async def hold_all(tx: Tx, agent_ids: Collection[str]) -> dict[str, Book]:
    """Lock several books as `hold` does, in the order of their ids, and return them by id. Raises NotFoundError."""
    for agent_id in sorted(set(agent_ids)):
        await hold_account(tx, agent_id)
    return {agent_id: await load(tx, agent_id) for agent_id in sorted(set(agent_ids))}


def _book(agent_id: str, row: str | None) -> Book:
    if row is None:
        raise NotFoundError("There is no such agent.", code="agent_not_found")
    known = _last_read.get(agent_id)
    if known is not None and known[0] == row:
        return known[1]
    book = _decoded(agent_id, row)
    _last_read[agent_id] = row, book
    if len(_last_read) > BOOKS_REMEMBERED_MAX:
        _last_read.popitem(last=False)
    return book


def _decoded(agent_id: str, row: str) -> Book:
    found = _decoder.decode(row)
    return Book(
        agent_id=agent_id,
        settings=found.settings,
        version=found.version,
        holdings=_holdings(found.balances),
        positions=found.positions,
        reservations=found.reservations,
        live_call=None if found.live_call is None else found.live_call[0],
        live_cause=None if found.live_call is None else found.live_call[1],
        rung=found.rung,
        pending=found.pending,
        loans=found.loans,
        delegation=found.delegation,
        leads=found.leads,
    )


def _holdings(balances: Sequence[tuple[str, str, Decimal]]) -> dict[str, Holding]:
    holdings: dict[str, Holding] = {}
    for asset, bucket, amount in balances:
        holdings[asset] = replace(holdings.get(asset, Holding()), **{bucket: amount})
    return holdings
