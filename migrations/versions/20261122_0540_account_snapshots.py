"""Daily snapshots of accounts."""

from __future__ import annotations

from alembic import op

revision = "20261122_0540"
down_revision: str | None = "20261122_0530"

ACCOUNT_SNAPSHOTS = """
CREATE TABLE account_snapshots (
    agent_id TEXT NOT NULL,
    day DATE NOT NULL,
    taken_at TIMESTAMP WITH TIME ZONE NOT NULL,
    equity DOUBLE PRECISION NOT NULL,
    value DOUBLE PRECISION NOT NULL,
    flows DOUBLE PRECISION,
    gross DOUBLE PRECISION NOT NULL,
    var_95 DOUBLE PRECISION,
    var_99 DOUBLE PRECISION,
    ledger_id BIGINT NOT NULL,
    CONSTRAINT account_snapshots_pkey PRIMARY KEY (agent_id, day),
    CONSTRAINT account_snapshots_forecast_check
        CHECK ((var_95 IS NULL) = (var_99 IS NULL) AND var_95 >= 0 AND var_99 >= 0),
    CONSTRAINT account_snapshots_agent_id_fkey FOREIGN KEY (agent_id) REFERENCES accounts (agent_id)
);
CREATE INDEX account_snapshots_day_idx ON account_snapshots (day);
"""


def upgrade() -> None:
    for statement in ACCOUNT_SNAPSHOTS.split(";\n"):
        if statement.strip():
            op.execute(statement)
