"""Escrows, netting agreements with their obligations and runs; reservations that a contract holds."""

from __future__ import annotations

from alembic import op

revision = "20261127_0700"
down_revision: str | None = "20261127_0610"

RESERVATIONS = """
ALTER TABLE reservations ADD COLUMN bound_to TEXT;
ALTER TABLE reservations ADD CONSTRAINT reservations_bound_check CHECK (bound_to IS NULL OR NOT reducible) NOT VALID;
"""

ESCROWS = """
CREATE TABLE escrows (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    payer TEXT NOT NULL,
    payee TEXT NOT NULL,
    referrer TEXT,
    arbiter TEXT,
    asset TEXT NOT NULL,
    amount NUMERIC NOT NULL,
    counter_asset TEXT,
    counter_amount NUMERIC,
    fee_rate NUMERIC NOT NULL,
    referral_share NUMERIC NOT NULL,
    fee_payer TEXT NOT NULL,
    on_timeout TEXT NOT NULL,
    reference TEXT,
    state TEXT NOT NULL,
    payer_confirmed BOOLEAN DEFAULT false NOT NULL,
    payee_confirmed BOOLEAN DEFAULT false NOT NULL,
    funded_at TIMESTAMP WITH TIME ZONE NOT NULL,
    deadline_at TIMESTAMP WITH TIME ZONE NOT NULL,
    accepted_at TIMESTAMP WITH TIME ZONE,
    disputed_at TIMESTAMP WITH TIME ZONE,
    ended_at TIMESTAMP WITH TIME ZONE,
    next_action_at TIMESTAMP WITH TIME ZONE,
    disputed_by TEXT,
    dispute_reason TEXT,
    reason TEXT,
    to_payee NUMERIC,
    fee NUMERIC,
    referral NUMERIC,
    CONSTRAINT escrows_pkey PRIMARY KEY (id),
    CONSTRAINT escrows_parties_check
        CHECK (payer <> payee AND referrer NOT IN (payer, payee) AND arbiter NOT IN (payer, payee)),
    CONSTRAINT escrows_asset_check
        CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$' AND
            counter_asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT escrows_amount_check CHECK (amount > 0 AND amount < 1e15 AND scale(amount) <= 18),
    CONSTRAINT escrows_counter_check
        CHECK ((counter_asset IS NULL) = (counter_amount IS NULL) AND counter_amount > 0 AND
            counter_amount < 1e15 AND scale(counter_amount) <= 18),
    CONSTRAINT escrows_fees_check
        CHECK (fee_rate >= 0 AND fee_rate <= 1 AND referral_share >= 0 AND referral_share <= 1),
    CONSTRAINT escrows_fee_payer_check CHECK (fee_payer IN ('payer', 'payee', 'split')),
    CONSTRAINT escrows_on_timeout_check CHECK (on_timeout IN ('release', 'refund')),
    CONSTRAINT escrows_state_check
        CHECK (state IN ('funded', 'accepted', 'disputed', 'released', 'refunded', 'cancelled', 'resolved')),
    CONSTRAINT escrows_reason_check CHECK (reason IN ('confirmed', 'timeout', 'cancelled', 'resolved')),
    CONSTRAINT escrows_timer_check CHECK ((next_action_at IS NOT NULL) = (state IN ('funded', 'accepted'))),
    CONSTRAINT escrows_ended_check
        CHECK ((state IN ('funded', 'accepted', 'disputed')) = (ended_at IS NULL) AND
            (ended_at IS NULL) = (to_payee IS NULL) AND (ended_at IS NULL) = (fee IS NULL) AND
            (ended_at IS NULL) = (reason IS NULL)),
    CONSTRAINT escrows_outcome_check
        CHECK (to_payee >= 0 AND to_payee <= amount AND fee >= 0 AND referral >= 0 AND referral <= fee),
    CONSTRAINT escrows_released_check CHECK (state <> 'released' OR to_payee = amount),
    CONSTRAINT escrows_refunded_check CHECK (state NOT IN ('refunded', 'cancelled') OR (to_payee = 0 AND fee = 0)),
    CONSTRAINT escrows_payer_fkey FOREIGN KEY(payer) REFERENCES agents (id),
    CONSTRAINT escrows_payee_fkey FOREIGN KEY(payee) REFERENCES agents (id),
    CONSTRAINT escrows_referrer_fkey FOREIGN KEY(referrer) REFERENCES agents (id),
    CONSTRAINT escrows_arbiter_fkey FOREIGN KEY(arbiter) REFERENCES agents (id)
);
CREATE INDEX escrows_arbiter_idx ON escrows (arbiter, seq) WHERE arbiter IS NOT NULL;
CREATE INDEX escrows_due_idx ON escrows (next_action_at) WHERE next_action_at IS NOT NULL;
CREATE INDEX escrows_open_idx ON escrows (state) WHERE state IN ('funded', 'accepted', 'disputed');
CREATE INDEX escrows_payee_idx ON escrows (payee, seq);
CREATE INDEX escrows_payer_idx ON escrows (payer, seq);
"""

NETTING_AGREEMENTS = """
CREATE TABLE netting_agreements (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    name TEXT NOT NULL,
    proposer TEXT NOT NULL,
    services TEXT[] NOT NULL,
    interval_seconds INTEGER,
    threshold NUMERIC,
    fee_rate NUMERIC NOT NULL,
    buffer NUMERIC NOT NULL,
    state TEXT NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    activated_at TIMESTAMP WITH TIME ZONE,
    defaulted_at TIMESTAMP WITH TIME ZONE,
    ended_at TIMESTAMP WITH TIME ZONE,
    next_action_at TIMESTAMP WITH TIME ZONE,
    open_obligations INTEGER DEFAULT 0 NOT NULL,
    settled_through BIGINT DEFAULT 0 NOT NULL,
    CONSTRAINT netting_agreements_pkey PRIMARY KEY (id),
    CONSTRAINT netting_agreements_name_check CHECK (length(name) BETWEEN 1 AND 200),
    CONSTRAINT netting_agreements_services_check CHECK (cardinality(services) BETWEEN 1 AND 32),
    CONSTRAINT netting_agreements_interval_seconds_check CHECK (interval_seconds BETWEEN 1 AND 31622400),
    CONSTRAINT netting_agreements_threshold_check CHECK (threshold > 0 AND threshold < 1e15),
    CONSTRAINT netting_agreements_fees_check CHECK (fee_rate >= 0 AND fee_rate <= 1 AND buffer >= 0 AND buffer <= 1),
    CONSTRAINT netting_agreements_state_check CHECK (state IN ('proposed', 'active', 'defaulted', 'ended')),
    CONSTRAINT netting_agreements_defaulted_check CHECK ((state = 'defaulted') = (defaulted_at IS NOT NULL)),
    CONSTRAINT netting_agreements_ended_check CHECK ((state = 'ended') = (ended_at IS NOT NULL)),
    CONSTRAINT netting_agreements_open_check
        CHECK (open_obligations >= 0 AND (open_obligations = 0 OR state IN ('active', 'defaulted'))),
    CONSTRAINT netting_agreements_proposer_fkey FOREIGN KEY(proposer) REFERENCES agents (id)
);
CREATE INDEX netting_agreements_due_idx ON netting_agreements (next_action_at) WHERE next_action_at IS NOT NULL;
"""

NETTING_MEMBERS = """
CREATE TABLE netting_members (
    agreement_id TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    accepted_at TIMESTAMP WITH TIME ZONE,
    left_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT netting_members_pkey PRIMARY KEY (agreement_id, agent_id),
    CONSTRAINT netting_members_agreement_id_fkey FOREIGN KEY(agreement_id) REFERENCES netting_agreements (id),
    CONSTRAINT netting_members_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES agents (id)
);
CREATE INDEX netting_members_agent_id_idx ON netting_members (agent_id);
"""

NETTING_POSITIONS = """
CREATE TABLE netting_positions (
    agreement_id TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    asset TEXT NOT NULL,
    pays NUMERIC NOT NULL,
    receives NUMERIC NOT NULL,
    CONSTRAINT netting_positions_pkey PRIMARY KEY (agreement_id, agent_id, asset),
    CONSTRAINT netting_positions_pays_check CHECK (pays >= 0 AND pays < 1e21),
    CONSTRAINT netting_positions_receives_check CHECK (receives >= 0 AND receives < 1e21),
    CONSTRAINT netting_positions_agreement_id_fkey FOREIGN KEY(agreement_id) REFERENCES netting_agreements (id),
    CONSTRAINT netting_positions_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES agents (id)
);
"""

NETTING_OBLIGATIONS = """
CREATE TABLE netting_obligations (
    agreement_id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    id TEXT NOT NULL,
    payer TEXT NOT NULL,
    payee TEXT NOT NULL,
    service TEXT NOT NULL,
    asset TEXT NOT NULL,
    amount NUMERIC NOT NULL,
    reference TEXT NOT NULL,
    booked_by TEXT NOT NULL,
    booked_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT netting_obligations_pkey PRIMARY KEY (agreement_id, seq),
    CONSTRAINT netting_obligations_parties_check CHECK (payer <> payee),
    CONSTRAINT netting_obligations_service_check CHECK (service ~ '^[a-z][a-z0-9_]{0,31}$'),
    CONSTRAINT netting_obligations_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT netting_obligations_amount_check CHECK (amount > 0 AND amount < 1e15 AND scale(amount) <= 18),
    CONSTRAINT netting_obligations_reference_check CHECK (length(reference) BETWEEN 1 AND 200),
    CONSTRAINT netting_obligations_agreement_id_fkey FOREIGN KEY(agreement_id) REFERENCES netting_agreements (id),
    CONSTRAINT netting_obligations_payer_fkey FOREIGN KEY(payer) REFERENCES agents (id),
    CONSTRAINT netting_obligations_payee_fkey FOREIGN KEY(payee) REFERENCES agents (id)
);
CREATE UNIQUE INDEX netting_obligations_reference_idx ON netting_obligations (agreement_id, payer, reference);
"""

NETTING_RUNS = """
CREATE TABLE netting_runs (
    agreement_id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    id TEXT NOT NULL,
    cause TEXT NOT NULL,
    outcome TEXT NOT NULL,
    ran_at TIMESTAMP WITH TIME ZONE NOT NULL,
    after_seq BIGINT NOT NULL,
    last_seq BIGINT NOT NULL,
    obligations INTEGER NOT NULL,
    figures JSONB NOT NULL,
    CONSTRAINT netting_runs_pkey PRIMARY KEY (agreement_id, seq),
    CONSTRAINT netting_runs_cause_check CHECK (cause IN ('interval', 'threshold', 'demand')),
    CONSTRAINT netting_runs_outcome_check CHECK (outcome IN ('settled', 'defaulted')),
    CONSTRAINT netting_runs_range_check CHECK (after_seq < last_seq AND obligations > 0),
    CONSTRAINT netting_runs_agreement_id_fkey FOREIGN KEY(agreement_id) REFERENCES netting_agreements (id)
);
CREATE UNIQUE INDEX netting_runs_id_idx ON netting_runs (id);
CREATE UNIQUE INDEX netting_runs_settled_idx ON netting_runs (agreement_id, last_seq) WHERE outcome = 'settled';
"""

APPEND_ONLY = """
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON netting_obligations
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON netting_runs
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();
"""

# under the first version: what clearing asks for until it is changed
SEED = """
INSERT INTO model_parameters VALUES
    ('escrow_fee', 1, 0.01),
    ('referral_share', 1, 0.15),
    ('netting_fee', 1, 0.01),
    ('netting_buffer', 1, 0.05)
    ON CONFLICT DO NOTHING;
"""

STEPS = (
    RESERVATIONS,
    ESCROWS,
    NETTING_AGREEMENTS,
    NETTING_MEMBERS,
    NETTING_POSITIONS,
    NETTING_OBLIGATIONS,
    NETTING_RUNS,
    APPEND_ONLY,
    SEED,
)


def upgrade() -> None:
    for statement in "".join(STEPS).split(";\n"):
        if statement.strip():
            op.execute(statement)
