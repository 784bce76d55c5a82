"""Loans between agents: offers, loans, the rates of their markets, and the buckets of what is lent and borrowed."""

from __future__ import annotations

from alembic import op

revision = "20261127_0500"
down_revision: str | None = "20261127_0400"

BUCKETS = """
ALTER TABLE balances DROP CONSTRAINT balances_bucket_check;
ALTER TABLE balances ADD CONSTRAINT balances_bucket_check
    CHECK (bucket IN ('free', 'reserved', 'allocated', 'owed', 'offered', 'lent', 'pledged', 'borrowed'));
ALTER TABLE market_changes DROP CONSTRAINT market_changes_kind_check;
ALTER TABLE market_changes ADD CONSTRAINT market_changes_kind_check
    CHECK (kind IN ('seed', 'asset', 'instrument', 'model', 'correlation', 'lending'));
"""

TABLES = r"""
CREATE TABLE lending_parameters (
    asset TEXT NOT NULL,
    version BIGINT NOT NULL,
    base_rate NUMERIC NOT NULL,
    slope NUMERIC NOT NULL,
    steep_slope NUMERIC NOT NULL,
    target_utilization NUMERIC NOT NULL,
    minimum_rate NUMERIC NOT NULL,
    collateral_ratio NUMERIC NOT NULL,
    low_ratio NUMERIC NOT NULL,
    liquidation_ratio NUMERIC NOT NULL,
    decimals INTEGER NOT NULL,
    CONSTRAINT lending_parameters_pkey PRIMARY KEY (asset, version),
    CONSTRAINT lending_parameters_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT lending_parameters_rates_check
        CHECK (base_rate >= 0 AND base_rate <= 10 AND minimum_rate >= 0 AND minimum_rate <= 10),
    CONSTRAINT lending_parameters_slopes_check
        CHECK (slope >= 0 AND slope <= 10 AND steep_slope >= 0 AND steep_slope <= 100),
    CONSTRAINT lending_parameters_target_utilization_check CHECK (target_utilization > 0 AND target_utilization < 1),
    CONSTRAINT lending_parameters_ratios_check
        CHECK (liquidation_ratio >= 1 AND liquidation_ratio <= low_ratio AND low_ratio <= collateral_ratio AND
        collateral_ratio <= 10),
    CONSTRAINT lending_parameters_decimals_check CHECK (decimals BETWEEN 0 AND 18),
    CONSTRAINT lending_parameters_version_fkey FOREIGN KEY (version) REFERENCES market_changes (version)
);
CREATE TABLE lending_markets (
    asset TEXT NOT NULL,
    supplied NUMERIC NOT NULL,
    borrowed NUMERIC NOT NULL,
    rate NUMERIC NOT NULL,
    changed_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT lending_markets_pkey PRIMARY KEY (asset),
    CONSTRAINT lending_markets_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT lending_markets_supplied_check CHECK (supplied >= 0 AND supplied < 1e18),
    CONSTRAINT lending_markets_borrowed_check CHECK (borrowed >= 0 AND borrowed <= supplied),
    CONSTRAINT lending_markets_rate_check CHECK (rate >= 0 AND rate <= 1000)
);
CREATE TABLE lending_rates (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    asset TEXT NOT NULL,
    changed_at TIMESTAMP WITH TIME ZONE NOT NULL,
    rate NUMERIC NOT NULL,
    supplied NUMERIC NOT NULL,
    borrowed NUMERIC NOT NULL,
    CONSTRAINT lending_rates_pkey PRIMARY KEY (id),
    CONSTRAINT lending_rates_rate_check CHECK (rate >= 0 AND rate <= 1000)
);
CREATE INDEX lending_rates_asset_idx ON lending_rates (asset, changed_at);
CREATE TABLE loan_offers (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    lender_id TEXT NOT NULL,
    asset TEXT NOT NULL,
    amount NUMERIC NOT NULL,
    remaining NUMERIC NOT NULL,
    minimum_rate NUMERIC NOT NULL,
    notice_seconds INTEGER NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    withdrawn_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT loan_offers_pkey PRIMARY KEY (id),
    CONSTRAINT loan_offers_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT loan_offers_amount_check CHECK (amount > 0 AND amount < 1e15 AND scale(amount) <= 18),
    CONSTRAINT loan_offers_remaining_check
        CHECK (remaining >= 0 AND remaining <= amount AND (withdrawn_at IS NULL OR remaining = 0)),
    CONSTRAINT loan_offers_minimum_rate_check CHECK (minimum_rate >= 0 AND minimum_rate <= 10),
    CONSTRAINT loan_offers_notice_seconds_check CHECK (notice_seconds BETWEEN 0 AND 604800),
    CONSTRAINT loan_offers_lender_id_fkey FOREIGN KEY (lender_id) REFERENCES accounts (agent_id)
);
CREATE INDEX loan_offers_lender_id_idx ON loan_offers (lender_id, seq);
CREATE INDEX loan_offers_open_idx ON loan_offers (asset, minimum_rate, seq) WHERE remaining > 0;
CREATE TABLE loans (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    offer_id TEXT NOT NULL,
    lender_id TEXT NOT NULL,
    borrower_id TEXT NOT NULL,
    asset TEXT NOT NULL,
    amount NUMERIC NOT NULL,
    principal NUMERIC NOT NULL,
    rate_kind TEXT NOT NULL,
    rate NUMERIC NOT NULL,
    notice_seconds INTEGER NOT NULL,
    collateral_asset TEXT NOT NULL,
    collateral NUMERIC NOT NULL,
    accrued NUMERIC NOT NULL,
    accrued_to TIMESTAMP WITH TIME ZONE NOT NULL,
    interest_paid NUMERIC NOT NULL,
    interest_booked NUMERIC NOT NULL,
    next_interest_at TIMESTAMP WITH TIME ZONE NOT NULL,
    is_low BOOLEAN DEFAULT false NOT NULL,
    recalled NUMERIC NOT NULL,
    recalled_at TIMESTAMP WITH TIME ZONE,
    due_at TIMESTAMP WITH TIME ZONE,
    wanted_by TEXT,
    status TEXT NOT NULL,
    deficit NUMERIC NOT NULL,
    opened_at TIMESTAMP WITH TIME ZONE NOT NULL,
    closed_at TIMESTAMP WITH TIME ZONE,
    next_action_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT loans_pkey PRIMARY KEY (id),
    CONSTRAINT loans_parties_check CHECK (lender_id <> borrower_id),
    CONSTRAINT loans_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT loans_amount_check CHECK (amount > 0 AND amount < 1e15 AND scale(amount) <= 18),
    CONSTRAINT loans_principal_check CHECK (principal >= 0 AND principal <= amount AND scale(principal) <= 18),
    CONSTRAINT loans_rate_kind_check CHECK (rate_kind IN ('floating', 'fixed')),
    CONSTRAINT loans_rate_check CHECK (rate >= 0 AND rate <= 1000),
    CONSTRAINT loans_notice_seconds_check CHECK (notice_seconds BETWEEN 0 AND 604800),
    CONSTRAINT loans_collateral_check CHECK (collateral >= 0 AND collateral < 1e15 AND scale(collateral) <= 18),
    CONSTRAINT loans_accrued_check CHECK (accrued >= 0 AND accrued < 'Infinity'),
    CONSTRAINT loans_interest_check
        CHECK (interest_paid >= 0 AND interest_booked >= 0 AND interest_paid + interest_booked < 1e15),
    CONSTRAINT loans_recalled_check
        CHECK (recalled >= 0 AND recalled <= principal AND (recalled > 0) = (due_at IS NOT NULL)),
    CONSTRAINT loans_due_at_check CHECK (due_at >= recalled_at AND (due_at IS NULL) = (recalled_at IS NULL)),
    CONSTRAINT loans_status_check CHECK (status IN ('active', 'recalled', 'returned', 'liquidated')),
    CONSTRAINT loans_is_recalled_check CHECK ((status = 'recalled') = (recalled > 0)),
    CONSTRAINT loans_deficit_check CHECK (deficit >= 0 AND deficit < 1e15),
    CONSTRAINT loans_closed_check
        CHECK ((status IN ('active', 'recalled')) = (closed_at IS NULL) AND (status IN ('active', 'recalled')) =
        (principal > 0) AND (status IN ('active', 'recalled')) = (next_action_at IS NOT NULL) AND (status IN
        ('active', 'recalled') OR collateral = 0 AND interest_booked = 0)),
    CONSTRAINT loans_offer_id_fkey FOREIGN KEY (offer_id) REFERENCES loan_offers (id),
    CONSTRAINT loans_lender_id_fkey FOREIGN KEY (lender_id) REFERENCES accounts (agent_id),
    CONSTRAINT loans_borrower_id_fkey FOREIGN KEY (borrower_id) REFERENCES accounts (agent_id),
    CONSTRAINT loans_wanted_by_fkey FOREIGN KEY (wanted_by) REFERENCES margin_calls (id) DEFERRABLE INITIALLY DEFERRED
);
CREATE INDEX loans_borrower_id_idx ON loans (borrower_id, seq);
CREATE INDEX loans_due_idx ON loans (next_action_at) WHERE status IN ('active', 'recalled');
CREATE INDEX loans_lent_idx ON loans (lender_id, notice_seconds, seq) WHERE status IN ('active', 'recalled');
CREATE INDEX loans_offer_id_idx ON loans (offer_id, seq);
CREATE INDEX loans_pairs_idx ON loans (asset, collateral_asset) WHERE status IN ('active', 'recalled');
CREATE TABLE holding_settings (
    agent_id TEXT NOT NULL,
    asset TEXT NOT NULL,
    long_term BOOLEAN NOT NULL,
    lent_share_max NUMERIC,
    CONSTRAINT holding_settings_pkey PRIMARY KEY (agent_id, asset),
    CONSTRAINT holding_settings_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT holding_settings_lent_share_max_check CHECK (lent_share_max >= 0 AND lent_share_max <= 1),
    CONSTRAINT holding_settings_agent_id_fkey FOREIGN KEY (agent_id) REFERENCES accounts (agent_id)
);
"""

# under the first version: what every version so far would have used
SEED = """
INSERT INTO lending_parameters VALUES
    ('default', 1, 0.01, 0.04, 0.6, 0.8, 0.05,  1.15, 1.08, 1.03, 8),
    ('BTC',     1, 0.01, 0.04, 0.6, 0.8, 0.028, 1.1,  1.06, 1.03, 8),
    ('ETH',     1, 0.01, 0.04, 0.6, 0.8, 0.042, 1.1,  1.06, 1.03, 18),
    ('SOL',     1, 0.01, 0.04, 0.6, 0.8, 0.071, 1.15, 1.08, 1.03, 9),
    ('USDC',    1, 0.01, 0.04, 0.6, 0.8, 0.094, 1.05, 1.04, 1.03, 6),
    ('USDT',    1, 0.01, 0.04, 0.6, 0.8, 0.094, 1.05, 1.04, 1.03, 6);
"""


def upgrade() -> None:
    for statement in (BUCKETS + TABLES + SEED).split(";\n"):
        if statement.strip():
            op.execute(statement)
    for table in ("lending_parameters", "lending_rates"):
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite()"
        )
