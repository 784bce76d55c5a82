"""The tables of loans between agents; see `tables` for how all of them are written."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Table,
    Text,
    text,
)

from app.db.columns import check, moment, number, string
from app.db.tables import SYMBOL_PATTERN, append_only, metadata

LIVE = "status IN ('active', 'recalled')"
"""Of loans that are neither returned nor liquidated."""

_AMOUNT = "{0} > 0 AND {0} < 1e15 AND scale({0}) <= 18"


def _agent(name: str) -> Column[str]:
    return Column(name, Text, ForeignKey("accounts.agent_id"), nullable=False)


# Rates of loans of an asset, versioned as all parameters of the market are.
lending_parameters = Table(
    "lending_parameters",
    metadata,
    Column("asset", Text, primary_key=True),
    Column("version", BigInteger, ForeignKey("market_changes.version"), primary_key=True),
    number("base_rate"),
    number("slope"),
    number("steep_slope"),
    number("target_utilization"),
    number("minimum_rate"),
    number("collateral_ratio"),
    number("low_ratio"),
    number("liquidation_ratio"),
    Column("decimals", Integer, nullable=False),
    check("asset", f"asset ~ '^{SYMBOL_PATTERN}$'"),
    check("rates", "base_rate >= 0 AND base_rate <= 10 AND minimum_rate >= 0 AND minimum_rate <= 10"),
    check("slopes", "slope >= 0 AND slope <= 10 AND steep_slope >= 0 AND steep_slope <= 100"),
    check("target_utilization", "target_utilization > 0 AND target_utilization < 1"),
    check(
        "ratios",
        "liquidation_ratio >= 1 AND liquidation_ratio <= low_ratio"
        " AND low_ratio <= collateral_ratio AND collateral_ratio <= 10",
    ),
    check("decimals", "decimals BETWEEN 0 AND 18"),
    info={"owner": "market"},
)

# What of an asset is lent or on offer, and what of that is borrowed: locked by whoever changes either, and held by
# whoever accrues interest, so that no interest is accrued at a rate that has already changed.
lending_markets = Table(
    "lending_markets",
    metadata,
    Column("asset", Text, primary_key=True),
    number("supplied"),
    number("borrowed"),
    number("rate"),
    moment("changed_at"),
    check("asset", f"asset ~ '^{SYMBOL_PATTERN}$'"),
    check("supplied", "supplied >= 0 AND supplied < 1e18"),
    check("borrowed", "borrowed >= 0 AND borrowed <= supplied"),
    check("rate", "rate >= 0 AND rate <= 1000"),
    info={"owner": "loans"},
)

lending_rates = Table(
    "lending_rates",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    string("asset"),
    moment("changed_at"),
    number("rate"),
    number("supplied"),
    number("borrowed"),
    check("rate", "rate >= 0 AND rate <= 1000"),
    Index("lending_rates_asset_idx", "asset", "changed_at"),
    info={"owner": "loans"},
)

loan_offers = Table(
    "loan_offers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    _agent("lender_id"),
    string("asset"),
    number("amount"),
    number("remaining"),
    number("minimum_rate"),
    Column("notice_seconds", Integer, nullable=False),
    moment("created_at"),
    moment("withdrawn_at", nullable=True),
    check("asset", f"asset ~ '^{SYMBOL_PATTERN}$'"),
    check("amount", _AMOUNT.format("amount")),
    check("remaining", "remaining >= 0 AND remaining <= amount AND (withdrawn_at IS NULL OR remaining = 0)"),
    check("minimum_rate", "minimum_rate >= 0 AND minimum_rate <= 10"),
    check("notice_seconds", "notice_seconds BETWEEN 0 AND 604800"),
    Index("loan_offers_open_idx", "asset", "minimum_rate", "seq", postgresql_where=text("remaining > 0")),
    Index("loan_offers_lender_id_idx", "lender_id", "seq"),
    info={"owner": "loans"},
)

# One loan: so much of one offer to one borrower. `accrued` is principal x rate x microseconds up to accrued_to, exact;
# what of it was charged is either paid or booked as a further debt. Its timer is next_action_at.
loans = Table(
    "loans",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    Column("offer_id", Text, ForeignKey("loan_offers.id"), nullable=False),
    _agent("lender_id"),
    _agent("borrower_id"),
    string("asset"),
    number("amount"),
    number("principal"),
    string("rate_kind"),
    number("rate"),
    Column("notice_seconds", Integer, nullable=False),
    string("collateral_asset"),
    number("collateral"),
    number("accrued"),
    moment("accrued_to"),
    number("interest_paid"),
    number("interest_booked"),
    moment("next_interest_at"),
    Column("is_low", Boolean, nullable=False, server_default=text("false")),
    number("recalled"),
    moment("recalled_at", nullable=True),
    moment("due_at", nullable=True),
    # deferred: a decision marks loans before it writes its call, at its end
    Column("wanted_by", Text, ForeignKey("margin_calls.id", deferrable=True, initially="DEFERRED")),
    string("status"),
    number("deficit"),
    moment("opened_at"),
    moment("closed_at", nullable=True),
    moment("next_action_at", nullable=True),
    check("parties", "lender_id <> borrower_id"),
    check("asset", f"asset ~ '^{SYMBOL_PATTERN}$'"),
    check("amount", _AMOUNT.format("amount")),
    check("principal", "principal >= 0 AND principal <= amount AND scale(principal) <= 18"),
    check("rate_kind", "rate_kind IN ('floating', 'fixed')"),
    check("rate", "rate >= 0 AND rate <= 1000"),
    check("notice_seconds", "notice_seconds BETWEEN 0 AND 604800"),
    check("collateral", "collateral >= 0 AND collateral < 1e15 AND scale(collateral) <= 18"),
    check("accrued", "accrued >= 0 AND accrued < 'Infinity'"),
    check("interest", "interest_paid >= 0 AND interest_booked >= 0 AND interest_paid + interest_booked < 1e15"),
    check("recalled", "recalled >= 0 AND recalled <= principal AND (recalled > 0) = (due_at IS NOT NULL)"),
    check("due_at", "due_at >= recalled_at AND (due_at IS NULL) = (recalled_at IS NULL)"),
    check("status", "status IN ('active', 'recalled', 'returned', 'liquidated')"),
    check("is_recalled", "(status = 'recalled') = (recalled > 0)"),
    check("deficit", "deficit >= 0 AND deficit < 1e15"),
    check(
        "closed",
        f"({LIVE}) = (closed_at IS NULL) AND ({LIVE}) = (principal > 0) AND ({LIVE}) = (next_action_at IS NOT NULL)"
        f" AND ({LIVE} OR collateral = 0 AND interest_booked = 0)",
    ),
    Index("loans_due_idx", "next_action_at", postgresql_where=text(LIVE)),
    Index("loans_pairs_idx", "asset", "collateral_asset", postgresql_where=text(LIVE)),
    Index("loans_lent_idx", "lender_id", "notice_seconds", "seq", postgresql_where=text(LIVE)),
    Index("loans_borrower_id_idx", "borrower_id", "seq"),
    Index("loans_offer_id_idx", "offer_id", "seq"),
    Index("loans_lost_idx", "asset", "deficit", postgresql_where=text("deficit > 0")),
    info={"owner": "loans"},
)

# What an owner said of its units of an asset: not meant to be traded, and how much of them may be lent.
holding_settings = Table(
    "holding_settings",
    metadata,
    Column("agent_id", Text, ForeignKey("accounts.agent_id"), primary_key=True),
    Column("asset", Text, primary_key=True),
    Column("long_term", Boolean, nullable=False),
    number("lent_share_max", nullable=True),
    check("asset", f"asset ~ '^{SYMBOL_PATTERN}$'"),
    check("lent_share_max", "lent_share_max >= 0 AND lent_share_max <= 1"),
    info={"owner": "holdings"},
)

APPEND_ONLY = (lending_parameters, lending_rates)

for _table in APPEND_ONLY:
    append_only(_table)
