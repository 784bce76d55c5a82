"""The correlations of the regimes, stored and versioned as the stress and the hedge matrix are; factors of stress."""

from __future__ import annotations

from alembic import op

revision = "20261122_0550"
down_revision: str | None = "20261122_0540"

MATRICES = """
ALTER TABLE correlation_parameters DROP CONSTRAINT correlation_parameters_matrix_check;
ALTER TABLE correlation_parameters ADD CONSTRAINT correlation_parameters_matrix_check
    CHECK (matrix IN ('stress', 'hedge', 'normal', 'sideways', 'sell_off', 'liquidity_crisis'));
"""

# under the first version: these are what every version so far was computed with
SEED = """
INSERT INTO correlation_parameters VALUES
    ('normal',           'BTC', 'ETH', 1, 0.80),
    ('normal',           'BTC', 'SOL', 1, 0.70),
    ('normal',           'ETH', 'SOL', 1, 0.75),
    ('sideways',         'BTC', 'ETH', 1, 0.675),
    ('sideways',         'BTC', 'SOL', 1, 0.575),
    ('sideways',         'ETH', 'SOL', 1, 0.625),
    ('sell_off',         'BTC', 'ETH', 1, 0.935),
    ('sell_off',         'BTC', 'SOL', 1, 0.90),
    ('sell_off',         'ETH', 'SOL', 1, 0.92),
    ('liquidity_crisis', 'BTC', 'ETH', 1, 0.97),
    ('liquidity_crisis', 'BTC', 'SOL', 1, 0.95),
    ('liquidity_crisis', 'ETH', 'SOL', 1, 0.965);
INSERT INTO model_parameters VALUES
    ('covariance_decay', 1, 0.94),
    ('impact_coefficient', 1, 0.1),
    ('forced_sale_slippage', 1, 0.03)
    ON CONFLICT DO NOTHING;
"""


def upgrade() -> None:
    for statement in (MATRICES + SEED).split(";\n"):
        if statement.strip():
            op.execute(statement)
