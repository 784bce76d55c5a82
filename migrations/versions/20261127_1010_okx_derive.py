"""What OKX and Derive publish, as the first parameters of their margin models."""

from __future__ import annotations

from alembic import op

revision = "20261127_1010"
down_revision: str | None = "20261127_1000"

# under the first version, as those of the other venues
OKX = """
INSERT INTO venue_parameters
SELECT 'okx', underlying, 1, common || spot::jsonb || extreme::jsonb
FROM (VALUES (
    '{"volatility_up": 0.25, "volatility_down": 0.25, "term_days": 30.0, "term_power_short": 0.3,
    "term_power_long": 0.13, "extreme_weight": 0.5, "basis_rate": 0.008, "minimum_rate": 0.007, "minimum_tiers":
    [[0.0, 1.0], [250000.0, 2.0], [500000.0, 4.0], [1000000.0, 6.0], [2000000.0, 8.0], [3000000.0, 10.0],
    [4000000.0, 12.0]], "initial_factor": 1.3}'::jsonb
)) AS shared (common), (VALUES
    ('major', '{"spot_moves": [0.04, 0.08, 0.12], "basis_rate": 0.002, "minimum_rate": 0.0045}'),
    ('middle', '{"spot_moves": [0.06, 0.12, 0.18]}'),
    ('other', '{"spot_moves": [0.08, 0.16, 0.25]}')
) AS by_spot (spot_group, spot), (VALUES
    ('major', '{"extreme_move": 0.24, "basis_annual_rate": 0.05}'),
    ('middle', '{"extreme_move": 0.36, "basis_annual_rate": 0.15}'),
    ('other', '{"extreme_move": 0.5, "basis_annual_rate": 0.3}')
) AS by_extreme (extreme_group, extreme), (VALUES
    ('BTC', 'major', 'major'), ('ETH', 'major', 'major'),
    ('LTC', 'middle', 'middle'), ('BCH', 'middle', 'middle'), ('ADA', 'middle', 'middle'), ('XRP', 'middle', 'middle'),
    ('EOS', 'middle', 'other'), ('OKB', 'middle', 'other'), ('DOT', 'middle', 'other'), ('BSV', 'middle', 'other'),
    ('LINK', 'middle', 'other'), ('FIL', 'middle', 'other'), ('TRX', 'middle', 'other'), ('UNI', 'middle', 'other'),
    ('SOL', 'other', 'middle'), ('DOGE', 'other', 'middle'), ('PEPE', 'other', 'middle'), ('BNB', 'other', 'middle'),
    ('SHIB', 'other', 'middle'), ('ORDI', 'other', 'middle'), ('WLD', 'other', 'middle'), ('default', 'other', 'other')
) AS groups (underlying, spot_of, extreme_of)
WHERE spot_group = spot_of AND extreme_group = extreme_of;
"""

DERIVE = """
INSERT INTO venue_parameters VALUES
    ('derive', 'default', 1,
     '{"edge_moves": [0.18, -0.18], "moves": [0.135, 0.09, 0.045, 0.0, -0.045, -0.09, -0.135], "tails": [[-0.66,
     0.054545], [-0.33, 0.109091], [0.5, 0.072], [1.0, 0.036], [2.0, 0.018], [3.0, 0.012]], "volatility_up": 0.5,
     "volatility_down": 0.275, "volatility_floor": 0.45, "term_days": 30.0, "term_days_least": 1.0,
     "term_power_short": 0.3, "term_power_long": 0.13, "long_discount": 0.95, "long_rate_multiple": 1.0,
     "long_rate_add": 0.08, "short_premium": 1.04, "short_rate_multiple": 0.5, "short_rate_add": 0.08, "basis_move":
     0.045, "basis_factor": 0.5, "basis_factor_annual": 2.0, "skew_cap": 0.15, "skew_cap_decay": 0.05, "skew_reach":
     4.0, "skew_level": 0.6, "skew_level_decay": 0.1, "skew_reach_least": 0.01, "loss_factor_initial": 1.0,
     "loss_factor_maintenance": 0.8, "perpetual_rate": 0.015, "perpetual_rate_initial": 0.005, "short_option_rate":
     0.003, "short_option_rate_initial": 0.002, "confidence_least": 0.55, "stable_least": 0.98, "stable_factor":
     2.0}');
"""


def upgrade() -> None:
    op.execute(OKX)
    op.execute(DERIVE)
