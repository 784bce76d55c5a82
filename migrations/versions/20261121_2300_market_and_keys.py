"""Agents, their keys, and the market: versioned parameters and prices, seeded with the defaults."""

from __future__ import annotations

from alembic import op

revision = "20261121_2300"
down_revision: str | None = None

SYMBOL = "'^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$'"

AGENTS = """
CREATE TABLE agents (
    id text CONSTRAINT agents_pkey PRIMARY KEY CONSTRAINT agents_id_check CHECK (length(id) BETWEEN 1 AND 64),
    name text NOT NULL CONSTRAINT agents_name_check CHECK (length(name) BETWEEN 1 AND 200),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE api_keys (
    id text PRIMARY KEY CONSTRAINT api_keys_id_check CHECK (length(id) BETWEEN 1 AND 64),
    agent_id text CONSTRAINT api_keys_agent_id_fkey REFERENCES agents (id),
    name text NOT NULL CONSTRAINT api_keys_name_check CHECK (length(name) <= 200),
    secret_sha256 bytea NOT NULL
        CONSTRAINT api_keys_secret_sha256_check CHECK (octet_length(secret_sha256) = 32),
    scopes text[] NOT NULL CONSTRAINT api_keys_scopes_check CHECK (
        cardinality(scopes) > 0 AND scopes <@ ARRAY['agent', 'coordinator', 'market', 'admin']::text[]
    ),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX api_keys_agent_id_idx ON api_keys (agent_id);
"""

VERSIONS = """
CREATE TABLE market_state (
    name text PRIMARY KEY CONSTRAINT market_state_name_check CHECK (name IN ('parameters', 'prices')),
    version bigint NOT NULL CONSTRAINT market_state_version_check CHECK (version >= 0)
);
CREATE TABLE market_changes (
    version bigint PRIMARY KEY,
    changed_at timestamptz NOT NULL,
    changed_by text NOT NULL,
    kind text NOT NULL CONSTRAINT market_changes_kind_check
        CHECK (kind IN ('seed', 'asset', 'instrument', 'model', 'correlation')),
    name text NOT NULL
);
"""

PARAMETERS = f"""
CREATE TABLE asset_parameters (
    asset text CONSTRAINT asset_parameters_asset_check CHECK (asset ~ {SYMBOL}),
    version bigint CONSTRAINT asset_parameters_version_fkey REFERENCES market_changes (version),
    kind text NOT NULL CONSTRAINT asset_parameters_kind_check CHECK (kind IN ('stable', 'coin')),
    haircut numeric NOT NULL
        CONSTRAINT asset_parameters_haircut_check CHECK (haircut >= 0 AND haircut <= 1),
    initial_margin_rate numeric NOT NULL,
    maintenance_margin_rate numeric NOT NULL,
    price_range numeric NOT NULL
        CONSTRAINT asset_parameters_price_range_check CHECK (price_range > 0 AND price_range < 1),
    volatility_range numeric NOT NULL CONSTRAINT asset_parameters_volatility_range_check
        CHECK (volatility_range > 0 AND volatility_range <= 10),
    volatility numeric
        CONSTRAINT asset_parameters_volatility_check CHECK (volatility > 0 AND volatility <= 100),
    concentration_limit numeric CONSTRAINT asset_parameters_concentration_limit_check
        CHECK (concentration_limit > 0 AND concentration_limit < 1e15),
    PRIMARY KEY (asset, version),
    CONSTRAINT asset_parameters_margin_rates_check CHECK (
        maintenance_margin_rate > 0 AND maintenance_margin_rate <= initial_margin_rate
        AND initial_margin_rate <= 10
    )
);
CREATE TABLE instrument_parameters (
    symbol text CONSTRAINT instrument_parameters_symbol_check CHECK (symbol ~ {SYMBOL}),
    version bigint CONSTRAINT instrument_parameters_version_fkey REFERENCES market_changes (version),
    underlying text NOT NULL
        CONSTRAINT instrument_parameters_underlying_check CHECK (underlying ~ {SYMBOL}),
    kind text NOT NULL
        CONSTRAINT instrument_parameters_kind_check CHECK (kind IN ('spot', 'perpetual', 'future')),
    contract_size numeric NOT NULL CONSTRAINT instrument_parameters_contract_size_check
        CHECK (contract_size > 0 AND contract_size < 1e15),
    initial_margin_rate numeric CONSTRAINT instrument_parameters_initial_margin_rate_check
        CHECK (initial_margin_rate > 0 AND initial_margin_rate <= 10),
    maintenance_margin_rate numeric CONSTRAINT instrument_parameters_maintenance_margin_rate_check
        CHECK (maintenance_margin_rate > 0 AND maintenance_margin_rate <= 10),
    price_range numeric
        CONSTRAINT instrument_parameters_price_range_check CHECK (price_range > 0 AND price_range < 1),
    volatility numeric
        CONSTRAINT instrument_parameters_volatility_check CHECK (volatility > 0 AND volatility <= 100),
    PRIMARY KEY (symbol, version),
    CONSTRAINT instrument_parameters_margin_rates_check
        CHECK (maintenance_margin_rate <= initial_margin_rate)
);
CREATE TABLE model_parameters (
    name text,
    version bigint CONSTRAINT model_parameters_version_fkey REFERENCES market_changes (version),
    value numeric NOT NULL
        CONSTRAINT model_parameters_value_check CHECK (value >= 0 AND value < 1e15),
    PRIMARY KEY (name, version)
);
CREATE TABLE correlation_parameters (
    matrix text CONSTRAINT correlation_parameters_matrix_check CHECK (matrix IN ('stress', 'hedge')),
    a text,
    b text,
    version bigint CONSTRAINT correlation_parameters_version_fkey REFERENCES market_changes (version),
    value numeric NOT NULL
        CONSTRAINT correlation_parameters_value_check CHECK (value >= -1 AND value <= 1),
    PRIMARY KEY (matrix, a, b, version),
    CONSTRAINT correlation_parameters_pair_check CHECK (a COLLATE "C" < b OR a = '*' AND b = '*')
);
"""

PRICES = f"""
CREATE TABLE market_prices (
    symbol text PRIMARY KEY CONSTRAINT market_prices_symbol_check CHECK (symbol ~ {SYMBOL}),
    price numeric NOT NULL CONSTRAINT market_prices_price_check
        CHECK (price > 0 AND price < 1e15 AND scale(price) <= 18),
    as_of timestamptz NOT NULL,
    received_at timestamptz NOT NULL,
    version bigint NOT NULL
);
"""

APPEND_ONLY = (
    "market_changes",
    "asset_parameters",
    "instrument_parameters",
    "model_parameters",
    "correlation_parameters",
)

SEED = """
INSERT INTO market_state VALUES ('parameters', 1), ('prices', 0);
INSERT INTO market_changes VALUES (1, now(), 'migration', 'seed', 'defaults');
INSERT INTO asset_parameters VALUES
    ('default', 1, 'coin',   0.50, 0.30, 0.15, 0.30, 0.25, NULL, NULL),
    ('BTC',     1, 'coin',   0.10, 0.30, 0.15, 0.15, 0.25, 0.65, NULL),
    ('ETH',     1, 'coin',   0.12, 0.30, 0.15, 0.15, 0.25, 0.80, NULL),
    ('SOL',     1, 'coin',   0.15, 0.30, 0.15, 0.20, 0.25, 1.20, NULL),
    ('BNB',     1, 'coin',   0.20, 0.30, 0.15, 0.20, 0.25, NULL, NULL),
    ('USDC',    1, 'stable', 0,    0.30, 0.15, 0.30, 0.25, NULL, NULL),
    ('USDT',    1, 'stable', 0,    0.30, 0.15, 0.30, 0.25, NULL, NULL);
INSERT INTO instrument_parameters VALUES
    ('BTC-PERP', 1, 'BTC', 'perpetual', 1),
    ('ETH-PERP', 1, 'ETH', 'perpetual', 1),
    ('SOL-PERP', 1, 'SOL', 'perpetual', 1),
    ('BNB-PERP', 1, 'BNB', 'perpetual', 1);
INSERT INTO correlation_parameters VALUES
    ('stress', '*',   '*',   1, 0.80),
    ('stress', 'BTC', 'ETH', 1, 0.95),
    ('stress', 'BTC', 'SOL', 1, 0.90),
    ('stress', 'ETH', 'SOL', 1, 0.92),
    ('stress', 'BNB', 'BTC', 1, 0.88),
    ('stress', 'BNB', 'ETH', 1, 0.87),
    ('stress', 'BNB', 'SOL', 1, 0.85),
    ('hedge',  '*',   '*',   1, 0.40),
    ('hedge',  'BTC', 'ETH', 1, 0.60),
    ('hedge',  'BTC', 'SOL', 1, 0.50),
    ('hedge',  'ETH', 'SOL', 1, 0.55);
INSERT INTO model_parameters VALUES
    ('maintenance_fraction', 1, 0.8),
    ('scenario_factor', 1, 1.2),
    ('portfolio_factor', 1, 1.2),
    ('portfolio_tail_multiple', 1, 2),
    ('portfolio_tail_weight', 1, 0.5),
    ('portfolio_floor_gross', 1, 0.01),
    ('portfolio_floor_hedged', 1, 0.01),
    ('portfolio_minimum_equity', 1, 10000),
    ('concentration_rate', 1, 0.1),
    ('term_days', 1, 30),
    ('term_power_short', 1, 0.3),
    ('term_power_long', 1, 0.13),
    ('span_initial_factor', 1, 1.1),
    ('span_tail_multiple', 1, 2),
    ('span_tail_weight', 1, 0.35),
    ('recall_haircut', 1, 0.05),
    ('regime_normal', 1, 1),
    ('regime_sideways', 1, 0.85),
    ('regime_sell_off', 1, 1.5),
    ('regime_liquidity_crisis', 1, 2),
    ('target_utilization', 1, 0.6),
    ('gate_utilization', 1, 0.8),
    ('breach_utilization', 1, 0.85),
    ('cure_utilization', 1, 0.8),
    ('stop_utilization', 1, 0.75),
    ('shortfall_utilization', 1, 0.75),
    ('leverage_cap', 1, 3.5),
    ('zone_yellow', 1, 0.6),
    ('zone_orange', 1, 0.75),
    ('zone_red', 1, 0.85),
    ('alert_warning', 1, 0.5),
    ('alert_danger', 1, 0.7),
    ('alert_emergency', 1, 0.85),
    ('status_warning', 1, 0.8),
    ('status_danger', 1, 0.9),
    ('status_liquidation', 1, 1),
    ('band_margin_ratio_warning', 1, 0.5),
    ('band_margin_ratio_critical', 1, 0.8),
    ('band_utilization_warning', 1, 0.6),
    ('band_utilization_critical', 1, 0.8),
    ('band_buffer_safe', 1, 0.4),
    ('band_buffer_warning', 1, 0.2),
    ('band_net_exposure_warning', 1, 2),
    ('band_net_exposure_critical', 1, 3.5),
    ('band_survival_safe', 1, 1.1),
    ('band_survival_warning', 1, 1),
    ('survival_move', 1, 0.2),
    ('stable_share_min', 1, 0.5),
    ('asset_share_max', 1, 0.5),
    ('lent_share_max', 1, 0.4);
"""


def upgrade() -> None:
    _run(AGENTS + VERSIONS + PARAMETERS + PRICES)
    op.execute("""
        CREATE FUNCTION refuse_rewrite() RETURNS trigger LANGUAGE plpgsql AS $body$
        BEGIN
            RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
        END
        $body$
    """)
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}"
            " FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite()"
        )
    _run(SEED)


def _run(script: str) -> None:
    """Execute statement by statement: the driver prepares each, and a prepared statement is a single one."""
    for statement in script.split(";\n"):
        if statement.strip():
            op.execute(statement)
