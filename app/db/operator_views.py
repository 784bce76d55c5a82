"""What operators read by SQL: no more than a dashboard shows. A role of theirs is granted these and nothing else."""

from __future__ import annotations

import re

from sqlalchemy import DDL, event, text

from app.db.session import Tx
from app.db.tables import metadata
from app.errors import StartupError

CALLS = """
CREATE VIEW operator_calls AS
SELECT c.id AS margin_call_id, c.agent_id, a.name, c.state, c.cause, c.noticed_at, c.opened_at, c.deadline_at,
       c.acknowledged_at, c.slices, c.deficit + c.uncovered AS deficit,
       (c.figures ->> 'utilization')::float8 AS utilization, (c.figures ->> 'equity')::float8 AS equity,
       (c.figures ->> 'shortfall')::float8 AS shortfall
FROM margin_calls c JOIN agents a ON a.id = c.agent_id
WHERE c.state IN ('noticed', 'open', 'expired', 'liquidating')
"""
"""The live margin calls; figures are those of the last decision on each."""

ACCOUNTS = """
CREATE VIEW operator_accounts AS
SELECT worst.agent_id, a.name, worst.margin_ratio, worst.utilization, worst.equity,
       coalesce(told.zone, 'GREEN') AS zone, coalesce(told.alert_level, 'OK') AS alert_level,
       coalesce(told.stale, false) AS stale, c.state AS margin_call, c.deadline_at, w.seen_at
FROM workers w
CROSS JOIN LATERAL jsonb_to_recordset(w.figures -> 'worst')
    AS worst (agent_id text, margin_ratio float8, utilization float8, equity float8)
JOIN agents a ON a.id = worst.agent_id
LEFT JOIN account_watch told ON told.agent_id = worst.agent_id
LEFT JOIN margin_calls c
    ON c.agent_id = worst.agent_id AND c.state IN ('noticed', 'open', 'expired', 'liquidating')
WHERE w.seen_at > now() - interval '3 s'
"""
"""The accounts in the greatest danger, as the live workers' screens last assessed them: a hundred of each worker's."""

LOANS = """
CREATE VIEW operator_loans AS
SELECT l.id AS loan_id, lender.name AS lender, borrower.name AS borrower, l.asset, l.principal, l.interest_booked,
       l.collateral_asset, l.collateral, l.is_low, l.status, l.recalled, l.due_at, l.next_action_at, l.opened_at,
       l.lender_id, l.borrower_id
FROM loans l
JOIN agents lender ON lender.id = l.lender_id
JOIN agents borrower ON borrower.id = l.borrower_id
WHERE l.status IN ('active', 'recalled')
"""
"""The live loans with both parties."""

ESCROWS = """
CREATE VIEW operator_escrows AS
SELECT e.id AS escrow_id, payer.name AS payer, payee.name AS payee, arbiter.name AS arbiter, e.asset, e.amount, e.state,
       e.funded_at, e.deadline_at, e.disputed_at, e.dispute_reason, e.next_action_at, e.payer AS payer_id,
       e.payee AS payee_id, e.arbiter AS arbiter_id
FROM escrows e
JOIN agents payer ON payer.id = e.payer
JOIN agents payee ON payee.id = e.payee
LEFT JOIN agents arbiter ON arbiter.id = e.arbiter
WHERE e.state IN ('funded', 'accepted', 'disputed')
"""
"""The escrows that are not over."""

AGREEMENTS = """
CREATE VIEW operator_agreements AS
SELECT a.id AS agreement_id, a.name, proposer.name AS proposer, a.state, a.open_obligations, a.defaulted_at,
       a.next_action_at, a.activated_at, a.proposer AS proposer_id
FROM netting_agreements a
JOIN agents proposer ON proposer.id = a.proposer
WHERE a.state <> 'ended'
"""
"""The netting agreements that have not ended."""

FLEETS = """
CREATE VIEW operator_fleets AS
SELECT f.id AS fleet_id, f.name, f.zone, f.drawn, f.dry_powder, f.released_at, f.release_reason, f.drifted_at,
       f.created_at, f.master_id, f.drawn + (
           SELECT coalesce(sum(CASE WHEN b.bucket IN ('owed', 'borrowed') THEN -b.amount ELSE b.amount END), 0)
           FROM balances b WHERE b.agent_id = f.master_id AND b.asset = 'USDC') AS balance,
       m.members, m.reduce_only, m.invited, m.delegated
FROM fleets f CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE joined_at IS NOT NULL) AS members,
           count(*) FILTER (WHERE reduce_only) AS reduce_only,
           count(*) FILTER (WHERE joined_at IS NULL) AS invited,
           coalesce(sum(max_margin) FILTER (WHERE joined_at IS NOT NULL), 0) AS delegated
    FROM fleet_members WHERE fleet_id = f.id) AS m
"""
"""The fleets with what their wallets hold, USDC, and their members by number."""

VIEWS = (
    "operator_calls",
    "operator_accounts",
    "operator_loans",
    "operator_escrows",
    "operator_agreements",
    "operator_fleets",
)

_ROLE = re.compile(r"[a-z_][a-z0-9_]{0,62}")


async def grant(tx: Tx, role: str) -> None:
    """Let a role read the views. Raises StartupError where there is no such role."""
    if not _ROLE.fullmatch(role):
        raise StartupError(f"a role has lower-case letters, digits and underscores: not {role}")
    known = await tx.connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role})
    if known.first() is None:
        raise StartupError(f"the database has no role {role}")
    await tx.connection.execute(text(f"GRANT SELECT ON {', '.join(VIEWS)} TO {role}"))


for _statement in (CALLS, ACCOUNTS, LOANS, ESCROWS, AGREEMENTS, FLEETS):
    event.listen(metadata, "after_create", DDL(_statement))  # type: ignore[no-untyped-call]
