"""Escrows; netting agreements with what is booked against them, and the runs that settled it."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Identity, Index, Integer, Table, Text, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from app.db.columns import check, moment, number, string
from app.db.tables import SERVICE_PATTERN, SYMBOL_PATTERN, append_only, metadata

_AMOUNT = "{0} > 0 AND {0} < 1e15 AND scale({0}) <= 18"
_SUM = "{0} >= 0 AND {0} < 1e21"
"""Sums of amounts: more than one account can hold, but a number."""


def _agent(name: str, *, nullable: bool = False) -> Column[str]:
    """Return a column of an agent's id.

    It refers to `agents`, whose rows nobody locks: a key to `accounts` would wait for whoever decides on that account.
    """
    return Column(name, Text, ForeignKey("agents.id"), nullable=nullable)


# One row an escrow: its state is the whole of its memory, next_action_at its timer. Fees are those of its funding.
escrows = Table(
    "escrows",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    _agent("payer"),
    _agent("payee"),
    _agent("referrer", nullable=True),
    _agent("arbiter", nullable=True),
    string("asset"),
    number("amount"),
    Column("counter_asset", Text),
    number("counter_amount", nullable=True),
    number("fee_rate"),
    number("referral_share"),
    string("fee_payer"),
    string("on_timeout"),
    Column("reference", Text),
    string("state"),
    Column("payer_confirmed", Boolean, nullable=False, server_default=text("false")),
    Column("payee_confirmed", Boolean, nullable=False, server_default=text("false")),
    moment("funded_at"),
    moment("deadline_at"),
    moment("accepted_at", nullable=True),
    moment("disputed_at", nullable=True),
    moment("ended_at", nullable=True),
    moment("next_action_at", nullable=True),
    Column("disputed_by", Text),
    Column("dispute_reason", Text),
    Column("reason", Text),  # what ended it
    number("to_payee", nullable=True),
    number("fee", nullable=True),
    number("referral", nullable=True),
    check(
        "parties",
        "payer <> payee AND referrer NOT IN (payer, payee) AND arbiter NOT IN (payer, payee)",
    ),
    check("asset", f"asset ~ '^{SYMBOL_PATTERN}$' AND counter_asset ~ '^{SYMBOL_PATTERN}$'"),
    check("amount", _AMOUNT.format("amount")),
    check("counter", f"(counter_asset IS NULL) = (counter_amount IS NULL) AND {_AMOUNT.format('counter_amount')}"),
    check("fees", "fee_rate >= 0 AND fee_rate <= 1 AND referral_share >= 0 AND referral_share <= 1"),
    check("fee_payer", "fee_payer IN ('payer', 'payee', 'split')"),
    check("on_timeout", "on_timeout IN ('release', 'refund')"),
    check("state", "state IN ('funded', 'accepted', 'disputed', 'released', 'refunded', 'cancelled', 'resolved')"),
    check("reason", "reason IN ('confirmed', 'timeout', 'cancelled', 'resolved')"),
    check("timer", "(next_action_at IS NOT NULL) = (state IN ('funded', 'accepted'))"),
    check(
        "ended",
        "(state IN ('funded', 'accepted', 'disputed')) = (ended_at IS NULL) AND (ended_at IS NULL) = (to_payee IS NULL)"
        " AND (ended_at IS NULL) = (fee IS NULL) AND (ended_at IS NULL) = (reason IS NULL)",
    ),
    check("outcome", "to_payee >= 0 AND to_payee <= amount AND fee >= 0 AND referral >= 0 AND referral <= fee"),
    check("released", "state <> 'released' OR to_payee = amount"),
    check("refunded", "state NOT IN ('refunded', 'cancelled') OR (to_payee = 0 AND fee = 0)"),
    Index("escrows_payer_idx", "payer", "seq"),
    Index("escrows_payee_idx", "payee", "seq"),
    Index("escrows_arbiter_idx", "arbiter", "seq", postgresql_where=text("arbiter IS NOT NULL")),
    Index("escrows_due_idx", "next_action_at", postgresql_where=text("next_action_at IS NOT NULL")),
    Index("escrows_open_idx", "state", postgresql_where=text("state IN ('funded', 'accepted', 'disputed')")),
    info={"owner": "escrows"},
)

# What is booked against an agreement is written under the lock of its row, so that its obligations up to a number are
# a whole: those up to `settled_through` are settled, the others open.
netting_agreements = Table(
    "netting_agreements",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, Identity(always=True), nullable=False),
    string("name"),
    _agent("proposer"),
    Column("services", ARRAY(Text), nullable=False),
    Column("interval_seconds", Integer),
    number("threshold", nullable=True),
    number("fee_rate"),
    number("buffer"),
    string("state"),
    moment("created_at"),
    moment("activated_at", nullable=True),
    moment("defaulted_at", nullable=True),
    moment("ended_at", nullable=True),
    moment("next_action_at", nullable=True),
    Column("open_obligations", Integer, nullable=False, server_default=text("0")),
    Column("settled_through", BigInteger, nullable=False, server_default=text("0")),
    check("name", "length(name) BETWEEN 1 AND 200"),
    check("services", "cardinality(services) BETWEEN 1 AND 32"),
    check("interval_seconds", "interval_seconds BETWEEN 1 AND 31622400"),
    check("threshold", "threshold > 0 AND threshold < 1e15"),
    check("fees", "fee_rate >= 0 AND fee_rate <= 1 AND buffer >= 0 AND buffer <= 1"),
    check("state", "state IN ('proposed', 'active', 'defaulted', 'ended')"),
    check("defaulted", "(state = 'defaulted') = (defaulted_at IS NOT NULL)"),
    check("ended", "(state = 'ended') = (ended_at IS NOT NULL)"),
    check("open", "open_obligations >= 0 AND (open_obligations = 0 OR state IN ('active', 'defaulted'))"),
    Index("netting_agreements_due_idx", "next_action_at", postgresql_where=text("next_action_at IS NOT NULL")),
    info={"owner": "agreements"},
)

netting_members = Table(
    "netting_members",
    metadata,
    Column("agreement_id", Text, ForeignKey("netting_agreements.id"), primary_key=True),
    Column("agent_id", Text, ForeignKey("agents.id"), primary_key=True),
    moment("accepted_at", nullable=True),
    moment("left_at", nullable=True),
    Index("netting_members_agent_id_idx", "agent_id"),
    info={"owner": "agreements"},
)

# A member's running sums of what is open, by asset; gone once they are settled.
netting_positions = Table(
    "netting_positions",
    metadata,
    Column("agreement_id", Text, ForeignKey("netting_agreements.id"), primary_key=True),
    Column("agent_id", Text, ForeignKey("agents.id"), primary_key=True),
    Column("asset", Text, primary_key=True),
    number("pays"),
    number("receives"),
    check("pays", _SUM.format("pays")),
    check("receives", _SUM.format("receives")),
    info={"owner": "netting"},
)

netting_obligations = Table(
    "netting_obligations",
    metadata,
    Column("agreement_id", Text, ForeignKey("netting_agreements.id"), primary_key=True),
    Column("seq", BigInteger, Identity(always=True), primary_key=True),
    string("id"),
    _agent("payer"),
    _agent("payee"),
    string("service"),
    string("asset"),
    number("amount"),
    string("reference"),
    string("booked_by"),
    moment("booked_at"),
    check("parties", "payer <> payee"),
    check("service", f"service ~ '^{SERVICE_PATTERN}$'"),
    check("asset", f"asset ~ '^{SYMBOL_PATTERN}$'"),
    check("amount", _AMOUNT.format("amount")),
    check("reference", "length(reference) BETWEEN 1 AND 200"),
    Index("netting_obligations_reference_idx", "agreement_id", "payer", "reference", unique=True),
    info={"owner": "netting"},
)

# A cut-off: obligations of the agreement after `after_seq`, up to `last_seq`; settled all, or (defaulted) none.
netting_runs = Table(
    "netting_runs",
    metadata,
    Column("agreement_id", Text, ForeignKey("netting_agreements.id"), primary_key=True),
    Column("seq", BigInteger, Identity(always=True), primary_key=True),
    string("id"),
    string("cause"),
    string("outcome"),
    moment("ran_at"),
    Column("after_seq", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("obligations", Integer, nullable=False),
    Column("figures", JSONB, nullable=False),
    check("cause", "cause IN ('interval', 'threshold', 'demand')"),
    check("outcome", "outcome IN ('settled', 'defaulted')"),
    check("range", "after_seq < last_seq AND obligations > 0"),
    Index("netting_runs_id_idx", "id", unique=True),
    Index(
        "netting_runs_settled_idx",
        "agreement_id",
        "last_seq",
        unique=True,
        postgresql_where=text("outcome = 'settled'"),
    ),
    info={"owner": "netting"},
)

APPEND_ONLY = (netting_obligations, netting_runs)

for _table in APPEND_ONLY:
    append_only(_table)
