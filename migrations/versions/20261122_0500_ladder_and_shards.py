"""The drawdown ladder, shards of the screen, and what may be deleted when its time has come."""

from __future__ import annotations

from alembic import op

revision = "20261122_0500"
down_revision: str | None = "20261122_0330"

LADDER = """
ALTER TABLE accounts ADD COLUMN drawdown_ladder TEXT DEFAULT 'off' NOT NULL;
ALTER TABLE accounts ADD CONSTRAINT accounts_drawdown_ladder_check
    CHECK (drawdown_ladder IN ('off', 'notify', 'apply'));
ALTER TABLE account_watch ADD COLUMN rung INTEGER DEFAULT 0 NOT NULL;
ALTER TABLE account_watch ADD COLUMN rung_applied INTEGER DEFAULT 0 NOT NULL;
ALTER TABLE account_watch ADD CONSTRAINT account_watch_rungs_check
    CHECK (rung BETWEEN 0 AND 4 AND rung_applied BETWEEN 0 AND 4);
INSERT INTO model_parameters (name, version, value) VALUES
    ('drawdown_trim', 1, 0.05),
    ('drawdown_cut', 1, 0.08),
    ('drawdown_halve', 1, 0.12),
    ('drawdown_minimum', 1, 0.18),
    ('drawdown_trim_share', 1, 0.1),
    ('drawdown_cut_share', 1, 0.25),
    ('drawdown_halve_share', 1, 0.5);
"""

SHARDS = """
CREATE TABLE screen_shards (
    shard INTEGER NOT NULL,
    worker_id TEXT,
    lease_until TIMESTAMP WITH TIME ZONE,
    CONSTRAINT screen_shards_pkey PRIMARY KEY (shard),
    CONSTRAINT screen_shards_shard_check CHECK (shard >= 0),
    CONSTRAINT screen_shards_lease_check CHECK ((worker_id IS NULL) = (lease_until IS NULL))
);
INSERT INTO screen_shards (shard) SELECT generate_series(0, 63);
CREATE INDEX webhook_deliveries_event_idx ON webhook_deliveries (event);
"""

REFUSE_REWRITE = """
    CREATE OR REPLACE FUNCTION refuse_rewrite() RETURNS trigger LANGUAGE plpgsql AS $body$
    BEGIN
        IF TG_OP = 'DELETE' AND TG_TABLE_NAME IN ('events', 'webhook_attempts')
           AND current_setting('primerisk.past_its_time', true) = 'yes' THEN
            RETURN NULL;
        END IF;
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END
    $body$
"""


def upgrade() -> None:
    for statement in (LADDER + SHARDS).split(";\n"):
        if statement.strip():
            op.execute(statement)
    op.execute(REFUSE_REWRITE)
