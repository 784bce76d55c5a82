"""Parameters of the venues' margin models, and the expiry of a future."""

from __future__ import annotations

from alembic import op
from sqlalchemy import column, table
from sqlalchemy.dialects.postgresql import JSONB

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

PARAMETERS = column("parameters", JSONB)

_TERM = {"term_days": 30.0, "term_power_short": 0.3, "term_power_long": 0.13}
_DERIBIT = {
    "price_range": 0.16,
    "price_buckets": 4,
    "volatility_up": 0.5,
    "volatility_down": 0.25,
    "volatility_floor": 0.5,
    "extended_moves": [-0.66, -0.33, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0],
    "extended_factor": 1.0,
    "extended_dampener": 100_000.0,
    "pnl_offset": 0.0,
    "annual_roll": 0.075,
    "minimum_roll": 0.01,
    "maintenance_fraction": 0.8,
} | _TERM
_DERIBIT_ETH = {
    "price_range": 0.18,
    "volatility_up": 0.4,
    "extended_dampener": 200_000.0,
    "annual_roll": 0.05,
    "minimum_roll": 0.005,
}
_OKX = {
    "spot_moves": [0.08, 0.16, 0.25],
    "volatility_up": 0.25,
    "volatility_down": 0.25,
    "extreme_move": 0.5,
    "extreme_weight": 0.5,
    "basis_rate": 0.008,
    "basis_annual_rate": 0.3,
    "minimum_rate": 0.007,
    "minimum_tiers": [[0, 1], [250e3, 2], [500e3, 4], [1e6, 6], [2e6, 8], [3e6, 10], [4e6, 12]],
    "initial_factor": 1.3,
} | _TERM
_OKX_MAJOR = {
    "spot_moves": [0.04, 0.08, 0.12],
    "extreme_move": 0.24,
    "basis_rate": 0.002,
    "basis_annual_rate": 0.05,
    "minimum_rate": 0.0045,
}
_OKX_SPOT = {"spot_moves": [0.06, 0.12, 0.18]}
_OKX_EXTREME = {"extreme_move": 0.36, "basis_annual_rate": 0.15}
_DERIVE = {
    "edge_moves": [0.18, -0.18],
    "moves": [0.135, 0.09, 0.045, 0.0, -0.045, -0.09, -0.135],
    "tails": [[-0.66, 0.054545], [-0.33, 0.109091], [0.5, 0.072], [1.0, 0.036], [2.0, 0.018], [3.0, 0.012]],
    "volatility_up": 0.5,
    "volatility_down": 0.275,
    "volatility_floor": 0.45,
    "term_days_least": 1.0,
    "long_discount": 0.95,
    "long_rate_multiple": 1.0,
    "long_rate_add": 0.08,
    "short_premium": 1.04,
    "short_rate_multiple": 0.5,
    "short_rate_add": 0.08,
    "settlement_seconds": 1800.0,
    "basis_move": 0.045,
    "basis_factor": 0.5,
    "basis_factor_annual": 2.0,
    "skew_cap": 0.15,
    "skew_cap_decay": 0.05,
    "skew_reach": 4.0,
    "skew_level": 0.6,
    "skew_level_decay": 0.1,
    "skew_reach_least": 0.01,
    "loss_factor_initial": 1.0,
    "loss_factor_maintenance": 0.8,
    "perpetual_rate": 0.015,
    "perpetual_rate_initial": 0.005,
    "short_option_rate": 0.003,
    "short_option_rate_initial": 0.002,
    "confidence_least": 0.55,
    "stable_least": 0.98,
    "stable_factor": 2.0,
} | _TERM
_PARADEX_MOVES = [0.12, 0.08, 0.04, 0.0, -0.04, -0.08, -0.12]
_PARADEX_TAILS = [
    [-0.66, 0.4, 0.24],
    [-0.33, 0.4, 0.48],
    [0.5, 0.4, 0.32],
    [1.0, 0.4, 0.16],
    [2.0, 0.4, 0.08],
    [3.0, 0.4, 0.0533],
    [4.0, 0.4, 0.04],
    [5.0, 0.4, 0.032],
]
_PARADEX = {
    "scenarios": [
        [0.16, 0.4, 1.0],
        *([move, side, 1.0] for move in _PARADEX_MOVES for side in (0.4, -0.22)),
        [-0.16, 0.4, 1.0],
        *_PARADEX_TAILS,
    ],
    "volatility_floor": 0.0,
    "net_delta_rate": 0.02,
    "hedged_delta_rate": 0.01,
    "maintenance_fraction": 0.5,
} | _TERM

SEED: dict[str, dict[str, dict[str, object]]] = {
    "deribit": {"BTC": _DERIBIT, "ETH": _DERIBIT | _DERIBIT_ETH},
    "okx": {
        "default": _OKX,
        **dict.fromkeys(("BTC", "ETH"), _OKX | _OKX_MAJOR),
        **dict.fromkeys(("EOS", "OKB", "DOT", "BSV", "LINK", "FIL", "TRX", "UNI"), _OKX | _OKX_SPOT),
        **dict.fromkeys(("LTC", "BCH", "ADA", "XRP"), _OKX | _OKX_SPOT | _OKX_EXTREME),
        **dict.fromkeys(("SOL", "DOGE", "PEPE", "BNB", "SHIB", "ORDI", "WLD"), _OKX | _OKX_EXTREME),
    },
    "derive": {"default": _DERIVE},
    "paradex": {"default": _PARADEX},
}


def upgrade() -> None:
    for statement in (KINDS + EXPIRY + TABLE).split(";\n"):
        if statement.strip():
            op.execute(statement)
    # under the first version: these are what the venues publish, and what every version so far has had
    op.bulk_insert(
        table("venue_parameters", *(column(name) for name in ("venue", "underlying", "version")), PARAMETERS),
        [
            {"venue": venue, "underlying": underlying, "version": 1, "parameters": parameters}
            for venue, underlyings in SEED.items()
            for underlying, parameters in underlyings.items()
        ],
    )
