"""What VaR, backtests, sizing and plans begin with where a request says nothing: stored and versioned like all else."""

from __future__ import annotations

from alembic import op

revision = "20261127_0400"
down_revision: str | None = "20261122_0550"

# under the first version: these are what every version so far was computed with
SEED = """
INSERT INTO model_parameters VALUES
    ('var_window_days', 1, 500),
    ('var_age_decay', 1, 0.98),
    ('var_volatility_decay', 1, 0.94),
    ('var_degrees', 1, 5),
    ('backtest_size', 1, 0.05),
    ('sizing_volatility_target', 1, 0.5),
    ('sizing_volatility_base', 1, 0.2),
    ('sizing_free_margin_share', 1, 0.6),
    ('sizing_weight_max', 1, 0.25),
    ('deleverage_utilization', 1, 0.55)
    ON CONFLICT DO NOTHING
"""


def upgrade() -> None:
    op.execute(SEED)
