"""Parameters of the venues' margin models, and the expiry of a future."""

from __future__ import annotations

from alembic import op

revision = "20261127_1000"
down_revision: str | None = "20261127_0920"

KINDS = """
ALTER TABLE market_changes DROP CONSTRAINT market_changes_kind_check;
ALTER TABLE market_changes ADD CONSTRAINT market_changes_kind_check
    CHECK (kind IN ('seed', 'asset', 'instrument', 'model', 'correlation', 'lending', 'venue'));
"""

EXPIRY = """
ALTER TABLE instrument_parameters ADD COLUMN expiry TIMESTAMP WITH TIME ZONE;
ALTER TABLE instrument_parameters ADD CONSTRAINT instrument_parameters_expiry_check
    CHECK (expiry IS NULL OR kind = 'future') NOT VALID;
ALTER TABLE instrument_parameters VALIDATE CONSTRAINT instrument_parameters_expiry_check;
"""

TABLE = """
CREATE TABLE venue_parameters (
    venue TEXT NOT NULL,
    underlying TEXT NOT NULL,
    version BIGINT NOT NULL,
    parameters JSONB NOT NULL,
    CONSTRAINT venue_parameters_pkey PRIMARY KEY (venue, underlying, version),
    CONSTRAINT venue_parameters_version_fkey FOREIGN KEY (version) REFERENCES market_changes (version),
    CONSTRAINT venue_parameters_venue_check CHECK (venue ~ '^[a-z][a-z0-9_]{0,31}$'),
    CONSTRAINT venue_parameters_underlying_check CHECK (underlying ~ '^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'),
    CONSTRAINT venue_parameters_parameters_check
        CHECK (jsonb_typeof(parameters) = 'object' AND length(parameters::text) <= 100000)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON venue_parameters
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();
"""

# under the first version: these are what the venues publish, and what every version so far has had
SEED = """
INSERT INTO venue_parameters VALUES
    ('deribit', 'BTC', 1,
     '{"price_range": 0.16, "price_buckets": 4, "volatility_up": 0.5, "volatility_down": 0.25, "volatility_floor":
     0.5, "term_days": 30.0, "term_power_short": 0.3, "term_power_long": 0.13, "extended_moves": [-0.66, -0.33,
     0.5, 1.0, 2.0, 3.0, 4.0, 5.0], "extended_factor": 1.0, "extended_dampener": 100000.0, "pnl_offset": 0.0,
     "annual_roll": 0.075, "minimum_roll": 0.01, "maintenance_fraction": 0.8}'),
    ('deribit', 'ETH', 1,
     '{"price_range": 0.18, "price_buckets": 4, "volatility_up": 0.4, "volatility_down": 0.25, "volatility_floor":
     0.5, "term_days": 30.0, "term_power_short": 0.3, "term_power_long": 0.13, "extended_moves": [-0.66, -0.33,
     0.5, 1.0, 2.0, 3.0, 4.0, 5.0], "extended_factor": 1.0, "extended_dampener": 200000.0, "pnl_offset": 0.0,
     "annual_roll": 0.05, "minimum_roll": 0.005, "maintenance_fraction": 0.8}'),
    ('paradex', 'default', 1,
     '{"scenarios": [[0.16, 0.4, 1.0], [0.12, 0.4, 1.0], [0.12, -0.22, 1.0], [0.08, 0.4, 1.0], [0.08, -0.22, 1.0],
     [0.04, 0.4, 1.0], [0.04, -0.22, 1.0], [0.0, 0.4, 1.0], [0.0, -0.22, 1.0], [-0.04, 0.4, 1.0], [-0.04, -0.22,
     1.0], [-0.08, 0.4, 1.0], [-0.08, -0.22, 1.0], [-0.12, 0.4, 1.0], [-0.12, -0.22, 1.0], [-0.16, 0.4, 1.0],
     [-0.66, 0.4, 0.24], [-0.33, 0.4, 0.48], [0.5, 0.4, 0.32], [1.0, 0.4, 0.16], [2.0, 0.4, 0.08], [3.0, 0.4,
     0.0533], [4.0, 0.4, 0.04], [5.0, 0.4, 0.032]], "term_days": 30.0, "term_power_short": 0.3,
     "term_power_long": 0.13, "volatility_floor": 0.0, "net_delta_rate": 0.02, "hedged_delta_rate": 0.01,
     "maintenance_fraction": 0.5}');
"""


def upgrade() -> None:
    for statement in (KINDS + EXPIRY + TABLE + SEED).split(";\n"):
        if statement.strip():
            op.execute(statement)
