"""Daily closes of assets."""

from __future__ import annotations

from alembic import op

revision = "20261122_0530"
down_revision: str | None = "20261122_0525"

DAILY_CLOSES = """
CREATE TABLE daily_closes (
    asset TEXT NOT NULL,
    day DATE NOT NULL,
    close NUMERIC NOT NULL,
    version BIGINT NOT NULL,
    stored_at TIMESTAMP WITH TIME ZONE NOT NULL,
    CONSTRAINT daily_closes_pkey PRIMARY KEY (asset, day),
    CONSTRAINT daily_closes_asset_check CHECK (asset ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT daily_closes_day_check CHECK (day >= '1970-01-01'),
    CONSTRAINT daily_closes_close_check CHECK (close > 0 AND close < 1e15 AND scale(close) <= 18)
);
"""

VERSION = """
ALTER TABLE market_state DROP CONSTRAINT market_state_name_check;
ALTER TABLE market_state ADD CONSTRAINT market_state_name_check
    CHECK (name IN ('parameters', 'prices', 'history'));
INSERT INTO market_state VALUES ('history', 0);
"""


def upgrade() -> None:
    for statement in (DAILY_CLOSES + VERSION).split(";\n"):
        if statement.strip():
            op.execute(statement)
