"""What an owner has said of its units of an asset: kept for long, and how much of them may be lent."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from decimal import Decimal

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from app.db.lending_tables import holding_settings
from app.db.session import Tx
from app.domain.money import to_decimal
from app.errors import invalid
from app.services import audit, market_rules

HOLDINGS_MAX = 1_000
"""Assets that an agent may say something of."""


@dataclass(frozen=True, slots=True)
class HoldingSettings:
    """A holding marked long-term may be lent whole; else up to `lent_share_max`, None: the market's."""

    long_term: bool = False
    lent_share_max: Decimal | None = None

    def ceiling(self, market: float) -> Decimal:
        """Return the share of the holding that may be on loan or on offer."""
        if self.long_term:
            return Decimal(1)
        return to_decimal(market) if self.lent_share_max is None else self.lent_share_max


async def put(tx: Tx, agent_id: str, asset: str, chosen: HoldingSettings) -> None:
    """Set what holds for an agent's units of an asset; its account is locked. Raises InvalidError."""
    market_rules.check_symbol("/asset", asset)
    share = chosen.lent_share_max
    known = await of_agent(tx, agent_id)
    if asset not in known and len(known) >= HOLDINGS_MAX:
        raise invalid("/asset", "too_many", f"settings are kept of {HOLDINGS_MAX} assets at most")
    values = asdict(chosen)
    statement = insert(holding_settings).values(agent_id=agent_id, asset=asset, **values)
    await tx.connection.execute(statement.on_conflict_do_update(index_elements=["agent_id", "asset"], set_=values))
    shown = None if share is None else f"{share:f}"
    await audit.record(tx, "holding.set", asset, agent_id, long_term=chosen.long_term, lent_share_max=shown)


async def of_agent(tx: Tx, agent_id: str) -> dict[str, HoldingSettings]:
    """Return what an agent has said, by asset."""
    columns = holding_settings.c
    query = select(columns.asset, columns.long_term, columns.lent_share_max).where(columns.agent_id == agent_id)
    return {row.asset: HoldingSettings(row.long_term, row.lent_share_max) for row in await tx.connection.execute(query)}
