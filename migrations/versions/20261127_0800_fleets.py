"""Fleets and their members."""

from __future__ import annotations

from alembic import op

revision = "20261127_0800"
down_revision: str | None = "20261127_0720"

FLEETS = """
CREATE TABLE fleets (
    id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    master_id TEXT NOT NULL,
    name TEXT NOT NULL,
    dry_powder NUMERIC NOT NULL,
    drawn NUMERIC DEFAULT 0 NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE NOT NULL,
    released_at TIMESTAMP WITH TIME ZONE,
    release_reason TEXT,
    zone TEXT DEFAULT 'GREEN' NOT NULL,
    CONSTRAINT fleets_pkey PRIMARY KEY (id),
    CONSTRAINT fleets_name_check CHECK (length(name) BETWEEN 1 AND 200),
    CONSTRAINT fleets_dry_powder_check CHECK (dry_powder >= 0 AND dry_powder <= 0.9),
    CONSTRAINT fleets_drawn_check CHECK (drawn >= 0 AND drawn < 1e18 AND scale(drawn) <= 18),
    CONSTRAINT fleets_zone_check CHECK (zone IN ('GREEN', 'YELLOW', 'ORANGE', 'RED')),
    CONSTRAINT fleets_released_check CHECK ((released_at IS NULL) = (release_reason IS NULL)),
    CONSTRAINT fleets_master_id_fkey FOREIGN KEY(master_id) REFERENCES agents (id)
);
CREATE UNIQUE INDEX fleets_master_id_key ON fleets (master_id);
"""

MEMBERS = """
CREATE TABLE fleet_members (
    agent_id TEXT NOT NULL,
    seq BIGINT GENERATED ALWAYS AS IDENTITY,
    fleet_id TEXT NOT NULL,
    max_margin NUMERIC NOT NULL,
    drawn NUMERIC DEFAULT 0 NOT NULL,
    services TEXT[] NOT NULL,
    liquidation_priority INTEGER NOT NULL,
    delegation TEXT NOT NULL,
    reduce_only BOOLEAN DEFAULT false NOT NULL,
    invited_at TIMESTAMP WITH TIME ZONE NOT NULL,
    joined_at TIMESTAMP WITH TIME ZONE,
    capped_at TIMESTAMP WITH TIME ZONE,
    CONSTRAINT fleet_members_pkey PRIMARY KEY (agent_id),
    CONSTRAINT fleet_members_max_margin_check
        CHECK (max_margin >= 0 AND max_margin < 1e15 AND scale(max_margin) <= 18),
    CONSTRAINT fleet_members_drawn_check CHECK (drawn >= 0 AND drawn < 1e18 AND scale(drawn) <= 18),
    CONSTRAINT fleet_members_cap_check CHECK (drawn <= max_margin OR reduce_only),
    CONSTRAINT fleet_members_joined_check CHECK (joined_at IS NOT NULL OR drawn = 0),
    CONSTRAINT fleet_members_services_check CHECK (cardinality(services) <= 32),
    CONSTRAINT fleet_members_liquidation_priority_check CHECK (liquidation_priority BETWEEN 0 AND 1000),
    CONSTRAINT fleet_members_delegation_check CHECK (delegation IN ('pooled', 'isolated')),
    CONSTRAINT fleet_members_agent_id_fkey FOREIGN KEY(agent_id) REFERENCES agents (id),
    CONSTRAINT fleet_members_fleet_id_fkey FOREIGN KEY(fleet_id) REFERENCES fleets (id)
);
CREATE INDEX fleet_members_fleet_id_idx ON fleet_members (fleet_id, seq);
"""


def upgrade() -> None:
    for statement in (FLEETS + MEMBERS).split(";\n"):
        if statement.strip():
            op.execute(statement)
