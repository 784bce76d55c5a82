"""The daily returns that stress and sizing read, with the version of the history that they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.db.session import Tx
from app.domain.panel import Panel
from app.errors import invalid
from app.services.closes import history_version, load_panel

HISTORY_CELLS_MAX = 200_000
"""Assets x days that a request may read."""


@dataclass(frozen=True, slots=True)
class History:
    """Daily returns, and the version of the history as they were read."""

    panel: Panel
    version: int


async def load_history(tx: Tx, assets: Sequence[str], days: int, pointer: str) -> History:
    """Return the last so many daily returns of the assets. Raises InvalidError `too_much_work` at the pointer."""
    if len(assets) * days > HISTORY_CELLS_MAX:
        detail = f"{len(assets)} assets x {days} days of history, over the limit of {HISTORY_CELLS_MAX}"
        raise invalid(pointer, "too_much_work", detail)
    version = await history_version(tx)
    return History(await load_panel(tx, assets, days), version)
