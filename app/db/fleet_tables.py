"""Fleets: a coordinator's master wallet, and the agents that draw margin from it."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Identity, Index, Integer, Table, Text, text
from sqlalchemy.dialects.postgresql import ARRAY

from app.db.columns import check, moment, number, string
from app.db.tables import metadata

_SUM = "{0} >= 0 AND {0} < 1e18 AND scale({0}) <= 18"

# The master is the coordinator's own account. `drawn`, of USDC, is what members hold of its money.
fleets = Table(
    "fleets",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    Column("master_id", Text, ForeignKey("agents.id"), nullable=False),
    string("name"),
    number("dry_powder"),
    Column("drawn", number("drawn").type, nullable=False, server_default=text("0")),
    moment("created_at"),
    moment("released_at", nullable=True),  # since when members may reach the dry powder
    Column("release_reason", Text),
    Column("zone", Text, nullable=False, server_default="GREEN"),  # as it was last told
    Column("in_emergency", Boolean, nullable=False, server_default=text("false")),  # released for its zone alone
    moment("drifted_at", nullable=True),  # since when it is told that correlations have drifted
    Column("over_delegation", Boolean, nullable=False, server_default=text("false")),  # lines past what is there
    check("name", "length(name) BETWEEN 1 AND 200"),
    check("dry_powder", "dry_powder >= 0 AND dry_powder <= 0.9"),
    check("drawn", _SUM.format("drawn")),
    check("zone", "zone IN ('GREEN', 'YELLOW', 'ORANGE', 'RED')"),
    check("released", "(released_at IS NULL) = (release_reason IS NULL)"),
    Index("fleets_master_id_key", "master_id", unique=True),
    info={"owner": "fleets"},
)

# An agent is in one fleet at most. Until it has joined it is only invited, and nobody's to command.
fleet_members = Table(
    "fleet_members",
    metadata,
    Column("agent_id", Text, ForeignKey("agents.id"), primary_key=True),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    Column("fleet_id", Text, ForeignKey("fleets.id"), nullable=False),
    number("max_margin"),
    Column("drawn", number("drawn").type, nullable=False, server_default=text("0")),
    Column("services", ARRAY(Text), nullable=False),  # none: every service
    Column("liquidation_priority", Integer, nullable=False),
    string("delegation"),
    Column("reduce_only", Boolean, nullable=False, server_default=text("false")),
    moment("invited_at"),
    moment("joined_at", nullable=True),
    moment("capped_at", nullable=True),  # when it was last told that it draws no more
    Column("made_for_fleet", Boolean, nullable=False, server_default=text("false")),  # and was nobody's before
    number("capped_drawn", nullable=True),  # what it had drawn when that was told; none once it has had room since
    check("max_margin", "max_margin >= 0 AND max_margin < 1e15 AND scale(max_margin) <= 18"),
    check("drawn", _SUM.format("drawn")),
    check("cap", "drawn <= max_margin OR reduce_only"),
    check("joined", "joined_at IS NOT NULL OR drawn = 0"),
    check("services", "cardinality(services) <= 32"),
    check("liquidation_priority", "liquidation_priority BETWEEN 0 AND 1000"),
    check("delegation", "delegation IN ('pooled', 'isolated')"),
    Index("fleet_members_fleet_id_idx", "fleet_id", "seq"),
    info={"owner": "fleets"},
)
