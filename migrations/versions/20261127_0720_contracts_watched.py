"""What operators are shown of lending and clearing: an index of the loans that lost money, and views to read by."""

from __future__ import annotations

from alembic import op

revision = "20261127_0720"
down_revision: str | None = "20261127_0710"

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

AGREEMENTS = """
CREATE VIEW operator_agreements AS
SELECT a.id AS agreement_id, a.name, proposer.name AS proposer, a.state, a.open_obligations, a.defaulted_at,
       a.next_action_at, a.activated_at, a.proposer AS proposer_id
FROM netting_agreements a
JOIN agents proposer ON proposer.id = a.proposer
WHERE a.state <> 'ended'
"""


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS loans_lost_idx")  # one that was broken off half-way
        op.execute("CREATE INDEX CONCURRENTLY loans_lost_idx ON loans (asset, deficit) WHERE deficit > 0")
    for view in (LOANS, ESCROWS, AGREEMENTS):  # after what commits: they are made together with the revision, or not
        op.execute(view)
